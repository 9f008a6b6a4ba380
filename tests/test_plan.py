"""The plan against what is really alive, its goals, its refusals; and the cost of attribution."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import simu
from data import Encoded, collate
from model import Config, Transformer, UserError, generate, write_json
from pipeline import fused, hub, plan
from pipeline.plan import LiveBytes
from pipeline.settings import Settings, resolve

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


def peak(*args, **about) -> int:
    return sum(plan.need(*args, **about).values())


def alive(c, s, dtype) -> dict:
    """Bytes of a real run of two updates, counted on the tensors themselves."""
    torch.manual_seed(0)
    model = Transformer(c).to(dtype)
    mask = torch.zeros(c.num_hidden_layers, c.hidden_size, dtype=torch.bool)
    mask.view(-1)[torch.arange(CRITICAL) * 5] = True
    seen, weights = [], list(model.parameters())
    with LiveBytes(*weights) as live:
        twins = fused.on(torch.device("cpu"), s.state)
        apply = twins.pop("apply", simu.apply_updates)

        def spy(moving, *args, **kwargs):
            read = {p.data_ptr(): p.nbytes for p in [*weights, *(w.weight for w in moving)]}
            state = {t.data_ptr(): t.nbytes for w in moving for t in (w.master, w.m, w.h)}
            state = {k: v for k, v in state.items() if k not in read}
            seen.append(dict(weights=sum(read.values()), state=sum(state.values()),
                             gradients=sum(w.weight.grad.nbytes for w in moving)))
            return apply(moving, *args, **kwargs)

        simu.unlearn(model, rows(12), rows(12), mask, s, apply=spy, **twins)
    return seen[-1] | dict(activations=live.peak - sum(seen[-1].values()))


@pytest.mark.parametrize("kind, dtype, state", [
    (LLAMA, torch.float32, "float32"), (LLAMA, torch.bfloat16, "float32"),
    (OLMO, torch.bfloat16, "bfloat16")])
@pytest.mark.parametrize("method", ["fo", "so", "simu"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_unlearning_needs_what_was_planned(kind, method, dtype, state, checkpointing):
    s = settings(state=state, checkpointing=checkpointing, method=method)
    planned = plan.need(s, config(kind), "unlearn", dtype=dtype, critical=CRITICAL, **LENGTHS)
    real = alive(config(kind), s, dtype)
    assert planned.pop("activations") == pytest.approx(real.pop("activations"), rel=0.25)
    assert planned == real


@pytest.mark.parametrize("kind", [LLAMA, OLMO], ids=["llama", "olmo"])
def test_attribution_needs_what_was_planned(kind):
    c, s = config(kind), settings(attribution_tokens=288)
    planned = plan.need(s, c, "attribute", dtype=torch.float32, critical=0, **LENGTHS)
    model = Transformer(c)
    with LiveBytes(*model.parameters()) as live:
        simu.attribute_rows(model, rows(8), s, title="")
    weights = sum(p.nbytes for p in model.parameters())
    assert planned["weights"] == weights
    assert planned["activations"] == pytest.approx(live.peak - weights, rel=0.25)


def test_decoding_needs_what_was_planned():
    """To the end of every row, where the cache is most of it."""
    c = config(LLAMA, vocab_size=40, num_hidden_layers=40, intermediate_size=64,
               num_key_value_heads=4)
    lengths = dict(longest=64, answer=48)
    model, examples = Transformer(c), rows(20, vocab=40, **lengths)
    with LiveBytes(*model.parameters()) as live:
        generate(model, [r.ids[:r.start] for r in examples], eos_id=None, max_new_tokens=48)
    planned = plan.need(settings(eval_tokens=1280), c, "evaluate", dtype=torch.float32, critical=0,
                        **lengths)
    assert planned["activations"] == pytest.approx(live.peak - planned["weights"], rel=0.25)


def test_a_budget_is_filled_by_rows_shorter_than_the_longest():
    assert plan.widest(640, 164, 16) == (4, 160)
    assert plan.widest(8192, 164, 16) == (16, 164)
    assert plan.widest(100, 164, 16) == (1, 164)


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


@pytest.mark.parametrize("name, most, changes", [
    ("unlearn", 48, {}), ("unlearn", 40, dict(state="bfloat16")),
    ("unlearn", 48, dict(micro_tokens=8192, checkpointing=True)),
    ("unlearn", 79, dict(method="fo")), ("unlearn", 79, dict(method="so")),
    ("attribute", 48, {}), ("evaluate", 48, {})])
def test_seven_billion_weights_fit_their_card(name, most, changes):
    longest, answer = plan.LONGEST["tofu"]
    need = peak(resolve(CELL | changes), plan.CONFIGS["llama2-7b"], name, dtype=torch.bfloat16,
                critical=722, longest=longest, answer=answer)
    assert need / plan.GB <= most


def test_seven_billion_weights_by_hand():
    n = plan.need(resolve(CELL), plan.CONFIGS["llama2-7b"], "unlearn", dtype=torch.bfloat16,
                  critical=722, longest=2, answer=1)
    attention, rows_ = 32 * 4 * 4096 * 4096, 722 * 11008
    assert n["weights"] == 2 * (6_738_415_616 + rows_)
    assert n["gradients"] == 2 * (attention + rows_)
    assert n["state"] == 12 * (attention + rows_)  # float32 master, m, h


@pytest.mark.parametrize("name, count", [
    ("llama2-7b", 6_738_415_616), ("olmo-1b", 1_176_764_416), ("olmo-1b-0724", 1_279_787_008)])
def test_configs_have_the_published_number_of_weights(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(plan.CONFIGS[name]).parameters()) == count


# -------------------------------------------------------------------------------- does it fit


@pytest.mark.parametrize("name, method", [("attribute", "simu"), ("unlearn", "fo"),
                                          ("unlearn", "simu"), ("learn", "simu")])
def test_what_cannot_fit_is_refused_in_one_line(name, method, monkeypatch, tmp_path):
    s = resolve(DEMO | dict(out=str(tmp_path), depth=1, method=method))
    c = plan.config_of(s)
    need = plan.fit_memory(s, c, name, rows(3))[1]["predicted_bytes"]
    monkeypatch.setattr(plan, "room", lambda device: need)
    assert plan.fit_memory(s, c, name, rows(3)) == (s, dict(predicted_bytes=need))
    monkeypatch.setattr(plan, "room", lambda device: need - 1)
    with pytest.raises(UserError, match=f"^{name} needs .* GB .* left; lower --micro-tokens") as e:
        plan.fit_memory(s, c, name, rows(3))
    assert "\n" not in str(e.value)


def test_a_gpu_chooses_passes_by_its_memory(monkeypatch, capsys):
    monkeypatch.delenv("SIMU_DATA", raising=False)
    s, c = resolve(CELL | dict(method="simu", device="cuda")), config(max_position_embeddings=512)
    monkeypatch.setattr(plan, "PASSES", (4096, 1024, 512))
    monkeypatch.setattr(plan, "choose_device", lambda s: torch.device("cuda"))
    monkeypatch.setattr(plan, "critical_count", lambda s, c: 32)
    monkeypatch.setattr(plan, "choose_dtype", lambda s: torch.bfloat16)
    about = dict(dtype=torch.bfloat16, critical=32, longest=164, answer=105)
    by_size = {n: peak(replace(s, micro_tokens=n), c, "unlearn", **about) for n in plan.PASSES}
    assert sorted(by_size.values(), reverse=True) == [*by_size.values()]
    for n, most in by_size.items():
        monkeypatch.setattr(plan, "room", lambda device: most)
        assert plan.fit_memory(s, c, "unlearn", rows(3, longest=164, answer=105)) == (
            replace(s, micro_tokens=n), dict(predicted_bytes=most, micro_tokens=n))
        assert capsys.readouterr().out.startswith(f"passes of {n} tokens (--micro-tokens), ")


def test_passes_that_a_user_chose_stay_and_a_cpu_takes_the_recipes():
    for named, tokens in ((dict(), 512), (dict(micro_tokens=0), 512), (dict(micro_tokens=99), 99),
                          (dict(device="cuda"), 0), (dict(device="cuda", micro_tokens=99), 99)):
        assert resolve(CELL | named).micro_tokens == tokens
    on_cpu, on_gpu = (resolve(DEMO | dict(device=device)) for device in ("cpu", "cuda"))
    assert on_cpu.micro_tokens == on_gpu.micro_tokens  # a tiny model's are its recipe's anywhere


def test_the_table_names_every_stage_and_what_does_not_fit(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("SIMU_DATA", raising=False)
    monkeypatch.setattr(plan, "CARD", 14 * plan.GB)
    plan.plan_command(resolve(dict(benchmark="lume", model="olmo-1b", out=str(tmp_path),
                                   micro_tokens=512, learn_tokens=512)))
    out = capsys.readouterr().out
    for word, fits in (("attribute", "yes"), ("simu", "yes"), ("evaluate", "yes"), ("fo", "no"),
                       ("so", "no"), ("learn", "no")):
        assert re.search(rf"^{word} .* {fits}$", out, re.M), out


def test_a_model_that_is_not_the_papers_is_planned_by_its_config(monkeypatch, tmp_path):
    s, c = Settings(**CELL, weights="hf:a/b", out=str(tmp_path / "run")), config()
    assert plan.config_of(s) == plan.CONFIGS["llama2-7b"]
    write_json(tmp_path / "config.json", c.to_hf(torch.float32))
    monkeypatch.setattr(hub, "download", lambda repo, files: tmp_path)
    for change in (dict(model="hf:a/b"), dict(weights=str(tmp_path))):
        assert plan.config_of(replace(s, **change)) == c


def test_the_plan_reads_a_finished_mask(tmp_path):
    s = resolve(CELL | dict(out=str(tmp_path)))
    assert plan.critical_count(s, plan.config_of(s)) == 722
    (tmp_path / "mask").mkdir()
    write_json(tmp_path / "mask" / "stage.json", dict(
        files={}, notes=dict(critical=5), why=dict(settings={}, inputs={}, code="")))
    assert plan.critical_count(s, plan.config_of(s)) == 5


def test_a_pair_costs_half_of_layers_times_steps_passes():
    """About L*(m-1)/2, and the clean pass with the node that all layers share."""
    c = config(hidden_size=128, intermediate_size=512, num_hidden_layers=8, vocab_size=64)
    L, m, model = c.num_hidden_layers, 5, Transformer(c)
    block = sum(p.numel() for p in model.layers[0].parameters() if p.dim() == 2)
    # Forward and back to the input, without gradients of weights, of two pairs' answer rows.
    once = 2 * LENGTHS["answer"] * 2 * 2 * (L * block + c.vocab_size * c.hidden_size)
    with FlopCounterMode(display=False) as counter:
        simu.attribute(model, collate(rows(2, vocab=64)), steps=m)
    cost = counter.get_total_flops() / once
    assert L * (m - 1) / 2 * 0.75 <= cost <= (L * (m - 1) / 2 + 1) * 1.25
