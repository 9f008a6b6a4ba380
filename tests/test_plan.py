"""The plan against what is really alive, its goals, its refusals; and the cost of attribution."""

import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import simu
from data import Encoded, collate, encode_all
from model import Config, Transformer, UserError, generate, write_json
from pipeline import fused, hub, original, pace, plan, reading, stage, tokenizers
from pipeline.plan import LiveBytes, Need
from pipeline.settings import Settings, load_benchmark, resolve

LLAMA = dict(model_type="llama", num_key_value_heads=2, tie_word_embeddings=False)
OLMO = dict(model_type="olmo", tie_word_embeddings=True, clip_qkv=8.0)
CRITICAL = 37
LENGTHS = dict(longest=24, answer=16)


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


def alive(c, s, method, dtype, **twins) -> Need:
    """Bytes of a real run of two updates, counted on the tensors themselves."""
    torch.manual_seed(0)
    model = Transformer(c).to(dtype)
    mask = torch.zeros(c.num_hidden_layers, c.hidden_size, dtype=torch.bool)
    mask.view(-1)[torch.arange(CRITICAL) * 5] = True
    s, seen = replace(s, method=method), []
    own = list(model.parameters())
    with LiveBytes(*own) as live:
        real = simu.apply_updates

        def spy(moving, *args, **kwargs):
            kept = {p.data_ptr(): p.nbytes for p in [*own, *(w.weight for w in moving)]}
            grads = [w.weight.grad for w in moving]
            state = {t.data_ptr(): t.nbytes for w in moving for t in (w.master, w.m, w.h)}
            state = {k: v for k, v in state.items() if k not in kept}
            assert all(p.grad is None for p in own if all(p is not w.weight for w in moving))
            seen.append((sum(kept.values()), sum(g.nbytes for g in grads), sum(state.values())))
            return real(moving, *args, **kwargs)

        simu.apply_updates = spy
        try:
            simu.unlearn(model, rows(12), rows(12), mask, s, **twins)
        finally:
            simu.apply_updates = real
    return Need(*seen[-1], live.peak - sum(seen[-1]))


@pytest.mark.parametrize("kind, dtype, state", [
    (LLAMA, torch.float32, "float32"), (LLAMA, torch.bfloat16, "float32"),
    (OLMO, torch.bfloat16, "bfloat16"), (OLMO, torch.float32, "bfloat16")])
@pytest.mark.parametrize("method", simu.METHODS)
def test_unlearning_needs_what_was_planned(kind, method, dtype, state):
    for checkpointing in (False, True):
        s = settings(state=state, checkpointing=checkpointing)
        planned = plan.need(s, config(kind), "unlearn", method, dtype=dtype, critical=CRITICAL,
                            **LENGTHS)
        real = alive(config(kind), s, method, dtype)
        assert (planned.weights, planned.gradients, planned.state) == (
            real.weights, real.gradients, real.state)
        assert planned.activations == pytest.approx(real.activations, rel=0.25)


@pytest.mark.parametrize("method", ["fo", "simu"])
def test_joined_passes_need_what_was_planned_for_a_gpu(method):
    """There forget and retain rows share a pass, which may hold more rows than the batch has."""
    s = settings(batch=2, micro_tokens=72, device="cuda")  # passes of 3 rows and 1
    planned, apart = (plan.need(x, config(), "unlearn", method, dtype=torch.float32,
                                critical=CRITICAL, **LENGTHS)
                      for x in (s, replace(s, device="cpu")))
    # The pass of 3 comes first, and finds no gradients yet, which the plan holds to be there.
    real = alive(config(), s, method, torch.float32, backward=fused.backward_together)
    assert real.activations == pytest.approx(planned.activations - planned.gradients, rel=0.1)
    assert planned.activations > 1.25 * apart.activations


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [LLAMA, OLMO], ids=["llama", "olmo"])
def test_few_layers_tell_of_all(kind, checkpointing, monkeypatch):
    s, c = settings(checkpointing=checkpointing), config(kind, num_hidden_layers=9)
    given = dict(dtype=torch.bfloat16, critical=CRITICAL, **LENGTHS)
    for method in ("so", "simu"):
        few = plan.need(s, c, "unlearn", method, **given)
        with monkeypatch.context() as m:
            m.setattr(plan, "FEW_LAYERS", (9, 9))
            every = plan.traced(s, c, "unlearn", method, **given)
        assert replace(few, activations=0) == replace(every, activations=0)
        assert few.activations == pytest.approx(every.activations, rel=0.01)


def saved_for_backward(model, batch) -> int:
    """Bytes that autograd keeps of one forward pass, each memory once, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        kept.append(t)
        return t

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        simu.mean_nll(model, batch)
    return sum(size for memory, size in sizes.items() if memory not in known)


@pytest.mark.parametrize("method", ["fo", "simu"])
@pytest.mark.parametrize("kind", [LLAMA, OLMO], ids=["llama", "olmo"])
def test_activations_by_autograds_own_count(kind, method):
    """Another way to count than LiveBytes: what is saved, and at the loss two more [N, V]."""
    c, s = config(kind, num_hidden_layers=8), settings()
    planned = plan.need(s, c, "unlearn", method, dtype=torch.float32, critical=CRITICAL, **LENGTHS)
    model = Transformer(c)
    mask = torch.zeros(c.num_hidden_layers, c.hidden_size, dtype=torch.bool)
    mask.view(-1)[torch.arange(CRITICAL) * 13] = True
    B = s.micro_tokens // LENGTHS["longest"]
    with simu.moving_weights(model, replace(s, method=method), mask):
        saved = saved_for_backward(model, collate(rows(B)))
    logits = B * LENGTHS["answer"] * c.vocab_size * 4
    assert planned.activations == pytest.approx(saved + 2 * logits, rel=0.25)


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


def test_answers_read_together_need_no_more_than_planned():
    """Eight answers to a question share its prompt; a mask over all of them would hold the square
    of their tokens."""
    c, s = config(LLAMA, vocab_size=40), settings(eval_tokens=999)
    model = Transformer(c)
    some = [Encoded(ids[:8] + r.ids[8:], 8) for ids in (rows(1, vocab=40)[0].ids,)
            for r in rows(8 * 8, vocab=40)]
    with LiveBytes(*model.parameters()) as live:
        reading.token_scores(model, some, [8] * len(some), tokens=s.eval_tokens)
    planned = plan.need(s, c, "evaluate", dtype=torch.float32, critical=0, **LENGTHS)
    assert live.peak < planned.peak


def test_evaluation_needs_what_was_planned():
    """Decoding to the end of every row, whose cache is most of it, and scoring."""
    c = config(LLAMA, vocab_size=40, num_hidden_layers=40, intermediate_size=64,
               num_key_value_heads=4)
    s, lengths = settings(eval_tokens=1280), dict(longest=64, answer=48)
    model, some = Transformer(c), rows(20, vocab=40, **lengths)
    with LiveBytes(*model.parameters()) as live:
        reading.token_scores(model, some, [r.start for r in some], tokens=s.eval_tokens)
        generate(model, [r.ids[:r.start] for r in some], eos_id=None, max_new_tokens=48,
                 batch_tokens=s.eval_tokens)
    planned = plan.need(s, c, "evaluate", dtype=torch.float32, critical=0, **lengths)
    real = live.peak - planned.weights
    assert real <= planned.activations <= 1.1 * real


def test_a_budget_is_filled_by_rows_shorter_than_the_longest():
    assert plan._widest(640, 164, 16) == (4, 160)
    assert plan._widest(8192, 164, 16) == (16, 164)
    assert plan._widest(100, 164, 16) == (1, 164)  # refused by data.batches_by_length
    assert plan._widest(96, 24, 16) == (4, 24)


def test_live_bytes_counts_each_memory_once_and_while_it_lives():
    given = torch.zeros(10)
    with LiveBytes(given) as live:
        a = torch.zeros(100)
        view = a.view(10, 10)
        del a
        assert live.now == 440
        b = view + 1
        del view, b
        assert (live.now, live.peak) == (40, 840)


# ---------------------------------------------------------------------------------------- the goals


def goal(method=None, name="unlearn", **changes) -> float:
    """GB that a stage of tofu/llama2-7b needs on a GPU."""
    given = dict(benchmark="tofu", model="llama2-7b") | changes
    s = resolve(given | (dict(method=method) if method else {}))
    longest, answer = plan.LONGEST["tofu", "llama2-7b"]
    return plan.need(s, plan.CONFIGS["llama2-7b"], name, method, dtype=torch.bfloat16,
                     critical=plan.CRITICAL["tofu", "llama2-7b"], longest=longest,
                     answer=answer).peak / plan.GB


def test_simu_fits_one_48_gb_card():
    assert goal("simu") <= 48
    assert goal("simu", micro_tokens=8192, checkpointing=True) <= 48
    assert goal("simu", state="bfloat16") <= 40


@pytest.mark.parametrize("method", ["fo", "so"])
def test_baselines_fit_one_80_gb_card_with_bfloat16_state(method):
    assert goal(method, state="bfloat16") <= 79


def test_attribution_and_evaluation_fit_one_48_gb_card():
    assert goal(name="attribute") <= 48
    assert goal(name="evaluate") <= 48


def test_seven_billion_weights_by_hand():
    n = plan.need(resolve(dict(benchmark="tofu", model="llama2-7b")),
                  plan.CONFIGS["llama2-7b"], "unlearn", "simu", dtype=torch.bfloat16, critical=722,
                  longest=2, answer=1)
    attention, rows_ = 32 * 4 * 4096 * 4096, 722 * 11008
    assert n.weights == 2 * (6_738_415_616 + rows_)
    assert n.gradients == 2 * (attention + rows_)
    assert n.state == 12 * (attention + rows_)  # float32 master, m, h


@pytest.mark.parametrize("name, count", [
    ("llama2-7b", 6_738_415_616), ("llama2-13b", 13_015_864_320), ("llama2-70b", 68_976_648_192),
    ("llama3.2-1b", 1_235_814_400), ("smollm2-135m", 134_515_008), ("olmo-1b", 1_176_764_416),
    ("olmo-1b-0724", 1_279_787_008)])
def test_configs_have_the_published_number_of_weights(name, count):
    assert plan._weights(plan.CONFIGS[name], torch.bfloat16) == 2 * count


# ------------------------------------------------------------------------------- refusing, printing


@pytest.mark.parametrize("name, method", plan.STAGES)
def test_what_cannot_fit_is_refused_in_one_line(name, method, monkeypatch, tmp_path):
    s = resolve(dict(benchmark="demo", model="tiny-llama", out=str(tmp_path), depth=1))
    c = plan.config_of(s)
    need = plan.fit_memory(s, c, name, method)[1]["predicted_bytes"]
    monkeypatch.setattr(plan, "room", lambda device: need)
    assert plan.fit_memory(s, c, name, method) == (s, dict(predicted_bytes=need))
    monkeypatch.setattr(plan, "room", lambda device: need - 1)
    with pytest.raises(UserError, match=r"needs .* GB .* left; --\S+.* would need") as e:
        plan.fit_memory(s, c, name, method)
    assert "\n" not in str(e.value)
    monkeypatch.setattr(plan, "room", lambda device: 1)
    with pytest.raises(UserError, match="no setting makes it fit"):
        plan.fit_memory(s, c, name, method)


def test_a_gpu_chooses_passes_by_its_memory(monkeypatch, capsys):
    """The most that fit, none larger than an update's rows ask for; said in one line."""
    monkeypatch.delenv("SIMU_DATA", raising=False)
    s = resolve(dict(benchmark="tofu", model="llama2-7b", method="simu", device="cuda"))
    assert (s.micro_tokens, s.learn_tokens) == (0, 0)
    c = config(max_position_embeddings=512)
    given = dict(dtype=torch.bfloat16, critical=32, longest=164, answer=105)
    by_size = {n: plan.need(replace(s, micro_tokens=n), c, "unlearn", "simu", **given).peak
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
    few = replace(s, batch=2)  # 4 rows of 164
    fits, _ = plan.with_passes(few, c, "unlearn", "simu", 1 << 60, given)
    assert fits.micro_tokens == 1024
    monkeypatch.setattr(plan, "room", lambda device: by_size[512] - 1)
    with pytest.raises(UserError, match="--checkpointing would need"):
        plan.fit_memory(s, c, "unlearn", "simu")


def test_passes_that_were_given_stay_and_a_cpu_takes_the_recipes():
    cell = dict(benchmark="tofu", model="llama2-7b")
    for given, tokens in ((dict(), 512), (dict(micro_tokens=0), 512), (dict(micro_tokens=99), 99),
                          (dict(device="cuda"), 0), (dict(device="cuda", micro_tokens=99), 99)):
        assert resolve(cell | given).micro_tokens == tokens
    tiny = dict(benchmark="demo", model="tiny-llama", device="cuda")  # made in passes of its recipe
    assert resolve(tiny).micro_tokens == resolve(tiny | dict(device="cpu")).micro_tokens


def test_the_plan_names_what_each_card_would_take(tmp_path, monkeypatch):
    s = resolve(dict(benchmark="tofu", model="llama3.2-1b", out=str(tmp_path)))
    given = dict(dtype=torch.bfloat16, critical=9999, longest=164, answer=105)
    c = replace(plan.CONFIGS["llama2-7b"], num_hidden_layers=5)
    monkeypatch.setattr(plan, "CARDS", (18, 80))
    lines = dict(zip(plan.CARDS, plan._cards(s, c, given, False)))
    assert all(line.startswith(f"a card of {gb} GB: attribute ") for gb, line in lines.items())
    assert "; fo --micro-tokens 8192; " in lines[80] and "evaluate as it is" in lines[80]
    assert re.search("; fo --micro-tokens [0-9]+ --state bfloat16", lines[18])
    monkeypatch.setattr(plan, "CARDS", (4,))
    assert "; so does not fit; " in plan._cards(s, c, given, False)[0]


def test_a_stages_own_rows_replace_the_known_lengths(tmp_path):
    s = resolve(dict(benchmark="demo", model="tiny-llama", out=str(tmp_path)))
    c = plan.config_of(s)
    own, known = (plan.fit_memory(s, c, "unlearn", "so", rows=some)[1]["predicted_bytes"]
                  for some in (rows(3, longest=9, answer=4), ()))
    assert own < known


def test_the_table_names_every_stage(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("SIMU_DATA", raising=False)
    monkeypatch.setattr(plan, "CARDS", ())
    plan.plan_command(resolve(dict(benchmark="lume", model="olmo-1b", out=str(tmp_path))))
    out = capsys.readouterr().out
    for word in ("attribute", *simu.METHODS, "evaluate"):
        assert f"\n{word} " in out
    assert "1,279,787,008 weights" in out and "23089 of 32768" in out
    assert "fo: 341 updates" in out and "so: 682 updates" in out  # 5 and 10 epochs of 1092 rows
    assert "does not fit" not in out


def test_the_plan_tells_how_long_each_stage_will_take(capsys, tmp_path):
    plan.plan_command(resolve(dict(benchmark="demo", model="tiny-olmo", out=str(tmp_path))))
    line, = (x for x in capsys.readouterr().out.splitlines() if x.startswith("time, roughly, at "))
    told = re.findall(r"([\w-]+) \d[\d.]* (?:s|min|h)\b", line)
    assert told == ["retain-only", "attribute", *simu.METHODS, "evaluate"]


def test_rows_that_teach_a_tiny_model_are_those_that_it_reads(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(original, "learn", lambda model, epochs, *_, **__: read.extend(epochs))
    s = resolve(dict(benchmark="demo", model="tiny-llama", out=str(tmp_path), learn_epochs=2,
                     light_epochs=3))
    original.make_tiny(s, load_benchmark(s), {})
    assert sum(map(len, read)) == plan._rows_that_teach(s)


def test_seconds_are_passes_and_updates_at_the_pace_measured():
    c, s = config(), settings(max_new_tokens=99)  # 4 layers, m = 4, batches of 6
    forget, keep = pace.Rows(10, 20.0, 8.0), pace.Rows(30, 24.0, 9.0)
    here = pace.Pace(100.0, dict(sophia=1000.0))
    so, fo = (replace(s, method=x) for x in ("so", "fo"))

    def seconds(name, s=so, **counted):
        return pace.seconds(s, c, here, name, forget, keep, **counted)
    assert seconds("so", updates=5, moving=200) == pytest.approx(5 * 6 * 44 / 100 + 5 * 200 / 1000)
    assert seconds("fo", fo, updates=5, moving=200) == pytest.approx(5 * 6 * 44 / 100)
    passes = 1 + 3 * 3 / 2  # as many layers' passes as `attribute` makes, and their gradients
    assert seconds("attribute") == pytest.approx(20 * 8 * passes * 2 / 3 / 100)
    assert seconds("evaluate", asked=7) == pytest.approx(7 * 16 * pace.DECODING / 3 / 100)
    assert seconds("learn") == pytest.approx(s.learn_epochs * (200 + 720) / 100)


def test_a_deep_models_pace_is_that_of_its_layers(monkeypatch):
    """A pass of 9 layers costs what 1 and 2 layers say: here a second a layer, and 5 beside."""
    monkeypatch.setattr(pace, "pass_seconds", lambda model, rows, s: 5.0 + len(model.layers))
    found = pace.measured(settings(), config(num_hidden_layers=9), torch.device("cpu"),
                          torch.float32, pace.Rows(10, 28.0, 9.0))
    assert found.tokens == pytest.approx(pace.MEASURED * 28 / 14)
    assert set(found.weights) == {x.optimiser for x in simu.METHODS.values()}


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
    found, cell = pace.rows_of(encoded), (s.benchmark, s.model)
    assert plan.MEAN[cell] == (round(found.tokens), round(found.answer))
    assert plan.LONGEST[cell][0] >= max(len(r.ids) for r in encoded)


def test_what_does_not_fit_is_one_line(capsys, monkeypatch, tmp_path):
    s = resolve(dict(benchmark="tofu", model="tiny-llama", out=str(tmp_path), depth=1))
    monkeypatch.setattr(plan, "_sizes", lambda s: (40, 60, 100))
    monkeypatch.setattr(plan, "room", lambda device: 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    plan.plan_command(s)
    line, = (x for x in capsys.readouterr().out.splitlines() if "does not fit" in x)
    assert "GB in" in line and line.count("no setting makes it fit: use a larger device; the least")
    assert all(name in line for name in ("attribute", *simu.METHODS, "evaluate"))


def test_sizes_that_one_card_cannot_hold_are_known_by_name(tmp_path):
    s = replace(Settings(benchmark="tofu", model="llama2-7b", out=str(tmp_path)),
                model="hf:meta-llama/Llama-2-70b-chat-hf")
    assert plan.config_of(s) == plan.CONFIGS["llama2-70b"]
    assert plan.config_of(replace(s, model="hf:allenai/OLMo-1B-0724-hf")) == plan.CONFIGS[
        "olmo-1b-0724"]
    with pytest.raises(UserError, match="shape of hf:a/b is not known"):
        plan.config_of(replace(s, model="hf:a/b"))
    assert plan._weights(plan.CONFIGS["llama2-70b"], torch.bfloat16) > plan.CARD


def test_disk_counts_the_bytes_of_the_given_weights(tmp_path):
    s = Settings(benchmark="tofu", model="llama2-7b", weights=str(tmp_path), out=str(tmp_path))
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(3_000_000_000)  # takes no room
    line, _ = plan._disk(s, config(), 1000, torch.bfloat16, hub.Sources())
    assert "(original 3.00, " in line


def test_the_plan_reads_the_mask_once_it_is_made(tmp_path):
    s = resolve(dict(benchmark="tofu", model="llama2-7b", out=str(tmp_path)))
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


def forward_backward(c, pairs, answer) -> int:
    """FLOPs of one pass over the pairs' answer rows alone, forward and back to the input, without
    gradients of weights: twice the forward's matrix products."""
    block = sum(p.numel() for p in plan._meta(c, torch.float32).layers[0].parameters()
                if p.dim() == 2)
    head = c.vocab_size * c.hidden_size
    return pairs * answer * 2 * 2 * (c.num_hidden_layers * block + head)


def test_a_pair_costs_half_of_layers_times_steps_passes():
    """About L*(m-1)/2, and the clean pass with the node that all layers share."""
    c = config(hidden_size=128, intermediate_size=512, num_hidden_layers=8, vocab_size=64)
    L, m = c.num_hidden_layers, 5
    cost = flops(c, collate(rows(2, vocab=64)), m) / forward_backward(c, 2, LENGTHS["answer"])
    assert L * (m - 1) / 2 * 0.75 <= cost <= (L * (m - 1) / 2 + 1) * 1.25


def test_cost_is_linear_in_pairs_and_in_steps():
    c = config()
    one = flops(c, collate(rows(1)), 3)
    assert flops(c, collate(rows(4)), 3) == 4 * one
    two, three, six = (flops(c, collate(rows(1)), m) for m in (2, 3, 6))
    assert three - two == (six - three) / 3  # every node beyond the last costs the same


def test_cost_per_answer_token_grows_by_attention_alone():
    """Twice the answer costs twice, but for attention, whose two products see twice the keys."""
    c, m = config(), 4
    prompt = 8
    short, long = (flops(c, collate(rows(1, longest=prompt + n, answer=n)), m) / n
                   for n in (16, 32))
    # Two products per row and layer, forward and twice backward, over 16 keys more.
    L, extra = c.num_hidden_layers, 16
    attention = 2 * 2 * 2 * extra * c.num_attention_heads * c.head_dim
    node_layers = (m - 1) * L * (L - 1) / 2 + L
    assert 0 <= long - short <= 1.5 * attention * node_layers
    assert long / short < 1.1
