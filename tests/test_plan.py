"""The plan against what is really alive, its goals, its refusals; and the cost of attribution."""

import os
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import simu
from data import Encoded, collate, encode_all
from model import Config, Transformer, UserError, generate, write_json
from pipeline import fused, original, plan, reading, tokenizers
from pipeline.plan import LiveBytes, Need
from pipeline.settings import Settings, resolve
from pipeline.slices import load_benchmark

LLAMA = dict(model_type="llama", num_key_value_heads=2, tie_word_embeddings=False)
OLMO = dict(model_type="olmo", tie_word_embeddings=True, clip_qkv=8.0)
CRITICAL = 37
LENGTHS = dict(longest=24, answer=16)
CELL = dict(benchmark="tofu", model="llama2-7b")
DEMO = dict(benchmark="demo", model="tiny-llama")


def config(kind=LLAMA, **changes):
    return Config(**(dict(vocab_size=300, hidden_size=64, intermediate_size=176,
                          num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64,
                          eos_token_id=2) | kind | changes))


def settings(**changes):
    return Settings(**(dict(batch=6, epochs=1, micro_tokens=96, steps=4) | changes))


def rows(n, *, longest=24, answer=16, vocab=300):
    g = torch.Generator().manual_seed(0)
    return [Encoded(torch.randint(3, vocab, (longest,), generator=g).tolist(), longest - answer)
            for _ in range(n)]


def alive(c, s, method, dtype) -> Need:
    """Bytes of a real run of two updates, counted on the tensors themselves."""
    torch.manual_seed(0)
    model = Transformer(c).to(dtype)
    mask = torch.zeros(c.num_hidden_layers, c.hidden_size, dtype=torch.bool)
    mask.view(-1)[torch.arange(CRITICAL) * 5] = True
    s, seen, weights = replace(s, method=method), [], list(model.parameters())
    with LiveBytes(*weights) as live:
        twins = fused.on(torch.device("cpu"), s.state)
        apply = twins.pop("apply", simu.apply_updates)

        def spy(moving, *args, **kwargs):
            read = {p.data_ptr(): p.nbytes for p in [*weights, *(w.weight for w in moving)]}
            state = {t.data_ptr(): t.nbytes for w in moving for t in (w.master, w.m, w.h)}
            state = {k: v for k, v in state.items() if k not in read}
            seen.append((sum(read.values()), sum(w.weight.grad.nbytes for w in moving),
                         sum(state.values())))
            return apply(moving, *args, **kwargs)

        simu.unlearn(model, rows(12), rows(12), mask, s, apply=spy, **twins)
    return Need(*seen[-1], live.peak - sum(seen[-1]))


@pytest.mark.parametrize("kind, dtype, state", [
    (LLAMA, torch.float32, "float32"), (LLAMA, torch.bfloat16, "float32"),
    (OLMO, torch.bfloat16, "bfloat16")])
@pytest.mark.parametrize("method", ["fo", "so", "simu"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_unlearning_needs_what_was_planned(kind, method, dtype, state, checkpointing):
    s = settings(state=state, checkpointing=checkpointing)
    planned = plan.need(s, config(kind), "unlearn", method, dtype=dtype, critical=CRITICAL,
                        **LENGTHS)
    real = alive(config(kind), s, method, dtype)
    assert (planned.weights, planned.gradients, planned.state) == (
        real.weights, real.gradients, real.state)
    assert planned.activations == pytest.approx(real.activations, rel=0.25)


@pytest.mark.parametrize("method, checkpointing", [("so", False), ("simu", True)])
def test_few_layers_tell_of_all(method, checkpointing, monkeypatch):
    s, c = settings(checkpointing=checkpointing), config(num_hidden_layers=9)
    about = dict(dtype=torch.bfloat16, critical=CRITICAL, **LENGTHS)
    few = plan.need(s, c, "unlearn", method, **about)
    monkeypatch.setattr(plan, "FEW_LAYERS", (9, 9))
    every = plan.need(s, c, "unlearn", method, **about)
    assert replace(few, activations=0) == replace(every, activations=0)
    assert few.activations == pytest.approx(every.activations, rel=0.01)


@pytest.mark.parametrize("kind", [LLAMA, OLMO], ids=["llama", "olmo"])
def test_attribution_needs_what_was_planned(kind):
    c, s = config(kind), settings(attribution_tokens=288)
    planned = plan.need(s, c, "attribute", dtype=torch.float32, critical=0, **LENGTHS)
    model = Transformer(c)
    with LiveBytes(*model.parameters()) as live:
        simu.attribute_rows(model, rows(8), s, title="")
    weights = sum(p.nbytes for p in model.parameters())
    assert planned.weights == weights
    assert planned.activations == pytest.approx(live.peak - weights, rel=0.25)


def test_evaluation_needs_what_was_planned():
    """Decoding to the end of every row, whose cache is most of it, and scoring."""
    c = config(LLAMA, vocab_size=40, num_hidden_layers=40, intermediate_size=64,
               num_key_value_heads=4)
    s, lengths = settings(eval_tokens=1280), dict(longest=64, answer=48)
    model, examples = Transformer(c), rows(20, vocab=40, **lengths)
    with LiveBytes(*model.parameters()) as live:
        reading.token_scores(model, examples, [r.start for r in examples], tokens=s.eval_tokens)
        generate(model, [r.ids[:r.start] for r in examples], eos_id=None, max_new_tokens=48)
    planned = plan.need(s, c, "evaluate", dtype=torch.float32, critical=0, **lengths)
    real = live.peak - planned.weights
    assert real <= 1.05 * planned.activations and planned.activations <= 1.25 * real


def test_a_budget_is_filled_by_rows_shorter_than_the_longest():
    assert plan.widest(640, 164, 16) == (4, 160)
    assert plan.widest(8192, 164, 16) == (16, 164)
    assert plan.widest(100, 164, 16) == (1, 164)  # refused by data.batches_by_length


def test_live_bytes_counts_each_memory_once_and_while_it_lives():
    first = torch.zeros(10)
    with LiveBytes(first) as live:
        a = torch.zeros(100)
        view = a.view(10, 10)
        del a
        assert live.now == 440
        b = view + 1
        del view, b
        assert (live.now, live.peak) == (40, 840)


# ---------------------------------------------------------------------------------------- the goals


@pytest.mark.parametrize("name, method, most, changes", [
    ("unlearn", "simu", 48, {}), ("unlearn", "simu", 40, dict(state="bfloat16")),
    ("unlearn", "simu", 48, dict(micro_tokens=8192, checkpointing=True)),
    ("unlearn", "fo", 79, dict(state="bfloat16")), ("unlearn", "so", 79, dict(state="bfloat16")),
    ("attribute", None, 48, {}), ("evaluate", None, 48, {})])
def test_seven_billion_weights_fit_their_card(name, method, most, changes):
    s = resolve(CELL | changes | (dict(method=method) if method else {}))
    longest, answer = plan.LONGEST["tofu", "llama2-7b"]
    n = plan.need(s, plan.CONFIGS["llama2-7b"], name, method, dtype=torch.bfloat16, critical=722,
                  longest=longest, answer=answer)
    assert n.peak / plan.GB <= most


def test_seven_billion_weights_by_hand():
    n = plan.need(resolve(CELL), plan.CONFIGS["llama2-7b"], "unlearn", "simu", dtype=torch.bfloat16,
                  critical=722, longest=2, answer=1)
    attention, rows_ = 32 * 4 * 4096 * 4096, 722 * 11008
    assert n.weights == 2 * (6_738_415_616 + rows_)
    assert n.gradients == 2 * (attention + rows_)
    assert n.state == 12 * (attention + rows_)  # float32 master, m, h


@pytest.mark.parametrize("name, count", [
    ("llama2-7b", 6_738_415_616), ("llama3.2-1b", 1_235_814_400), ("smollm2-135m", 134_515_008),
    ("olmo-1b", 1_176_764_416), ("olmo-1b-0724", 1_279_787_008)])
def test_configs_have_the_published_number_of_weights(name, count):
    model = plan.on_meta(plan.CONFIGS[name], torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == count


# ------------------------------------------------------------------------------- refusing, printing


@pytest.mark.parametrize("name, method, helps", [
    ("attribute", None, "--attribution-tokens"), ("unlearn", "fo", "--micro-tokens"),
    ("unlearn", "simu", "--checkpointing"), ("learn", None, "--learn-tokens")])
def test_what_cannot_fit_is_refused_in_one_line(name, method, helps, monkeypatch, tmp_path):
    s = resolve(DEMO | dict(out=str(tmp_path), depth=1))
    c = plan.config_of(s)
    need = plan.fit_memory(s, c, name, method)[1]["predicted_bytes"]
    monkeypatch.setattr(plan, "room", lambda device: need)
    assert plan.fit_memory(s, c, name, method) == (s, dict(predicted_bytes=need))
    monkeypatch.setattr(plan, "room", lambda device: need - 1)
    with pytest.raises(UserError, match=rf"needs .* GB .* left; .*{helps}") as e:
        plan.fit_memory(s, c, name, method)
    assert "\n" not in str(e.value)


def test_a_gpu_chooses_passes_by_its_memory(monkeypatch, capsys):
    """The most that fit, none larger than an update's rows ask for; said in one line."""
    monkeypatch.delenv("SIMU_DATA", raising=False)
    s, c = resolve(CELL | dict(method="simu", device="cuda")), config(max_position_embeddings=512)
    assert (s.micro_tokens, s.learn_tokens) == (0, 0)
    monkeypatch.setattr(plan, "PASSES", (4096, 1024, 512))
    about = dict(dtype=torch.bfloat16, critical=32, longest=164, answer=105)
    by_size = {n: plan.need(replace(s, micro_tokens=n), c, "unlearn", "simu", **about).peak
               for n in plan.PASSES}
    assert sorted(by_size.values(), reverse=True) == [*by_size.values()]
    monkeypatch.setattr(plan, "choose_device", lambda s: torch.device("cuda"))
    monkeypatch.setattr(plan, "critical_count", lambda s, c: 32)
    monkeypatch.setattr(plan, "choose_dtype", lambda s: torch.bfloat16)
    for n, peak in by_size.items():
        monkeypatch.setattr(plan, "room", lambda device: peak)
        fits, notes = plan.fit_memory(s, c, "unlearn", "simu")
        assert fits == replace(s, micro_tokens=n)
        assert notes == dict(predicted_bytes=peak, micro_tokens=n)
        assert capsys.readouterr().out.startswith(f"passes of {n} tokens (--micro-tokens), ")
    few = replace(s, batch=4)  # 4 rows of 164
    fits, _ = plan.with_passes(few, c, "unlearn", "simu", 1 << 60, about)
    assert fits.micro_tokens == 1024


def test_passes_that_a_user_chose_stay_and_a_cpu_takes_the_recipes():
    for named, tokens in ((dict(), 512), (dict(micro_tokens=0), 512), (dict(micro_tokens=99), 99),
                          (dict(device="cuda"), 0), (dict(device="cuda", micro_tokens=99), 99)):
        assert resolve(CELL | named).micro_tokens == tokens
    on_cpu, on_gpu = (resolve(DEMO | dict(device=device)) for device in ("cpu", "cuda"))
    assert on_cpu.micro_tokens == on_gpu.micro_tokens  # a tiny model's are its recipe's anywhere


def test_the_rows_of_a_stage_replace_the_known_lengths(tmp_path):
    s = resolve(DEMO | dict(out=str(tmp_path)))
    c = plan.config_of(s)
    short, known = (plan.fit_memory(s, c, "unlearn", "so", rows=x)[1]["predicted_bytes"]
                    for x in (rows(3, longest=9, answer=4), ()))
    assert short < known


def test_the_table_names_every_stage_and_what_does_not_fit(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("SIMU_DATA", raising=False)
    monkeypatch.setattr(plan, "CARD", 14 * plan.GB)
    plan.plan_command(resolve(dict(benchmark="lume", model="olmo-1b", out=str(tmp_path))))
    out = capsys.readouterr().out
    assert "1,279,787,008 weights" in out and "23089 of 32768" in out
    for word in ("attribute", "simu", "evaluate"):
        assert re.search(rf"^{word} .* yes$", out, re.M), out
    for word in ("fo", "so"):
        assert re.search(rf"^{word} .* no: lower --micro-tokens", out, re.M), out


@pytest.mark.real_files("tofu")
def test_lengths_known_beforehand_are_those_of_the_rows(tmp_path):
    s = resolve(dict(benchmark="tofu", model="tiny-llama", out=str(tmp_path),
                     data=os.environ["SIMU_DATA"]))
    bench = load_benchmark(s)
    every = (original.known_rows(bench) + bench.forget + original.paraphrased(bench.forget)
             + bench.nonmembers + list(bench.level_rows))
    tokenizers.train_tokenizer([t for e in every for t in (e.question, e.answer)], tmp_path,
                               llama=True, vocab=s.vocab)
    encoded = encode_all(bench.forget, tokenizers.load_tokenizer(tmp_path), s.template,
                         context=s.context, vocab=s.vocab)
    assert plan.LONGEST["tofu", "tiny-llama"][0] >= max(len(r.ids) for r in encoded)


def test_shapes_are_known_by_the_name_of_a_repository(tmp_path):
    s = replace(Settings(**CELL, out=str(tmp_path)), model="hf:meta-llama/Llama-2-7b-chat-hf")
    assert plan.config_of(s) == plan.CONFIGS["llama2-7b"]
    assert plan.config_of(replace(s, model="hf:allenai/OLMo-1B-0724-hf")) == plan.CONFIGS[
        "olmo-1b-0724"]
    with pytest.raises(UserError, match="shape of hf:a/b is not known"):
        plan.config_of(replace(s, model="hf:a/b"))


def test_the_plan_reads_a_finished_mask(tmp_path):
    s = resolve(CELL | dict(out=str(tmp_path)))
    assert plan.critical_count(s, plan.config_of(s)) == 722
    (tmp_path / "mask").mkdir()
    write_json(tmp_path / "mask" / "stage.json", dict(
        files={}, notes=dict(critical=5), why=dict(settings={}, inputs={}, code="")))
    assert plan.critical_count(s, plan.config_of(s)) == 5


# --------------------------------------------------------------------------- what attribution costs


def flops(c, batch, steps) -> int:
    model = Transformer(c)
    with FlopCounterMode(display=False) as counter:
        simu.attribute(model, batch, steps=steps)
    return counter.get_total_flops()


def test_a_pair_costs_half_of_layers_times_steps_passes():
    """About L*(m-1)/2, and the clean pass with the node that all layers share."""
    c = config(hidden_size=128, intermediate_size=512, num_hidden_layers=8, vocab_size=64)
    L, m = c.num_hidden_layers, 5
    block = sum(p.numel() for p in Transformer(c).layers[0].parameters() if p.dim() == 2)
    # Forward and back to the input, without gradients of weights, of two pairs' answer rows.
    once = 2 * LENGTHS["answer"] * 2 * 2 * (L * block + c.vocab_size * c.hidden_size)
    cost = flops(c, collate(rows(2, vocab=64)), m) / once
    assert L * (m - 1) / 2 * 0.75 <= cost <= (L * (m - 1) / 2 + 1) * 1.25


def test_cost_is_linear_in_pairs_and_in_steps():
    c = config()
    assert flops(c, collate(rows(4)), 3) == 4 * flops(c, collate(rows(1)), 3)
    two, three, six = (flops(c, collate(rows(1)), m) for m in (2, 3, 6))
    assert three - two == (six - three) / 3  # every node beyond the last costs the same
