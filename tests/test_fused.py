"""The fused update and the joined passes against the written ones. On a CPU, where inductor works
with g++; what only a card can show is not claimed here."""

import shutil

import pytest
import torch
from test_simu import OLMO, recipe, rows, tiny
from torch import nn

import simu
from pipeline import fused

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
SHAPES = [(33, 40), (7, 64), (64, 7), (50,)]
KINDS = [("sophia", "float32", "float32"), ("sophia", "bfloat16", "float32"),
         ("sophia", "bfloat16", "bfloat16"), ("adamw", "bfloat16", "bfloat16"),
         ("lion", "float32", "float32")]


def moving(weights: str, state: str, soft: bool) -> list[simu.Moving]:
    torch.manual_seed(0)
    made = []
    for i, shape in enumerate(SHAPES):
        p = nn.Parameter(torch.randn(shape).to(getattr(torch, weights)))
        mask = torch.rand(shape[0], 1) if soft and len(shape) == 2 else None
        if mask is not None:
            mask[0] = 0
        made.append(simu.start_moving(f"w{i}", p, state, mask))
        made[-1].m.normal_()
        made[-1].h.normal_().square_()
    return made


def run(apply, name: str, weights: str, state: str, soft: bool, updates: int):
    moves, counts = moving(weights, state, soft), []
    for step in range(1, updates + 1):
        torch.manual_seed(step)
        for w in moves:
            w.weight.grad = torch.randn_like(w.weight)
        counts.append(int(apply(moves, simu.OPTIMISERS[name], recipe(), lr=1e-3 / step, step=step,
                                scale=0.3, generator=torch.Generator())))
    return moves, counts


@compiler
@pytest.mark.parametrize("name, weights, state", KINDS)
def test_the_fused_update_is_the_written_one(name, weights, state):
    """Also with a soft mask, whose frozen rows stay to the bit. One graph for each kind, whatever
    shapes and rates. A bfloat16 state is equal but for which way it was rounded, once."""
    assert fused.compiled_update("cpu")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for soft in (False, True):
        args = name, weights, state, soft, 1 if state == "bfloat16" else 4
        (want, counts), (got, ours) = (run(x, *args) for x in (simu.apply_updates,
                                                               fused.apply_updates))
        for x, y in zip(want, got):
            assert y.weight.grad is None
            for kind in ("weight", "master", "m", "h"):
                a, b = (getattr(w, kind).detach().float() for w in (x, y))
                exact = getattr(x, kind).dtype == torch.float32
                torch.testing.assert_close(b, a, rtol=2e-6 if exact else 2 ** -7, atol=1e-6)
            if y.mask is not None:
                frozen = moving(weights, state, soft)[int(y.name[1])]
                assert all(torch.equal(getattr(frozen, k)[0], getattr(y, k)[0])
                           for k in ("master", "m", "h"))
        assert counts == ours and bool(sum(counts)) == (name != "adamw")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 3  # matrices, vectors, matrices with a soft mask


def test_noise_is_uniform_and_independent():
    """Of index, of key, and of the three that one hash gives: means, correlations, every bit."""
    n = 1 << 14
    draws = torch.stack([torch.stack(fused.noise_bits(n, torch.tensor(key), "cpu")).double()
                         for key in (0, 1, 12345, 2 ** 32 - 1)])  # [keys, 3, n]
    assert draws.min() >= 0 and draws.max() < 1 << 16
    error = 65536 / 12 ** 0.5 / n ** 0.5
    assert (draws.mean(-1) - 32767.5).abs().max() < 5 * error
    flat = draws.flatten(0, 1)  # [12, n]
    for lag in (1, 2, 64, 4096):  # every stream against every other, shifted
        both = torch.corrcoef(torch.cat([flat, flat.roll(lag, -1)]))
        assert (both - torch.eye(len(both), dtype=torch.float64)).abs().max() < 5 / n ** 0.5
    for bit in range(16):
        share = (draws.long() >> bit & 1).double().mean(-1)
        assert (share - 0.5).abs().max() < 5 * 0.5 / n ** 0.5


@compiler
def test_rounding_in_the_graph_is_unbiased_and_repeats():
    """[D10] Steps far below bfloat16's resolution add up to what they are in float32."""
    ends = []
    for _ in range(2):
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        w = simu.start_moving("w", p, "bfloat16", None)
        for step in range(1, 201):
            p.grad = torch.ones_like(p)
            fused.apply_updates([w], simu.OPTIMISERS["lion"], recipe(beta1=0.0, weight_decay=0.0),
                                lr=1e-5, step=step, scale=1.0, generator=None)
        ends.append(p.detach())
    assert ends[0].float().mean().item() == pytest.approx(1 - 200e-5, abs=1e-4)
    assert ends[0].unique().numel() > 1 and torch.equal(*ends)


def test_without_a_compiler_one_line_says_so_and_the_written_step_is_taken(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("Cannot find a working triton installation.\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    fused.compiled_update.cache_clear()
    try:
        (want, counts), (got, ours) = (run(x, "sophia", "float32", "float32", True, 2)
                                       for x in (simu.apply_updates, fused.apply_updates))
    finally:
        fused.compiled_update.cache_clear()
    told = capsys.readouterr().err
    assert "not fused" in told and "triton" in told and told.count("\n") == 1
    assert counts == ours and all(torch.equal(x.master, y.master) for x, y in zip(want, got))


def test_a_cpu_keeps_the_written_forms():
    assert fused.on(torch.device("cpu")) == {}
    assert set(fused.on(torch.device("cuda"))) == {"apply", "backward"}


@pytest.mark.parametrize("objective", sorted(simu.OBJECTIVES))
@pytest.mark.parametrize("tokens", [8192, 24])
def test_joined_passes_give_the_same_gradients(objective, tokens):
    """Every objective's two terms, in the same passes and apart, and in fewer of the model's."""
    s, f, r = recipe(objective=objective, micro_tokens=tokens), rows(5), rows(5, seed=1)
    row, found = simu.OBJECTIVES[objective], []
    for backward in (simu.backward_apart, fused.backward_together):
        model, passes = tiny(OLMO), []
        model.layers[0].register_forward_hook(lambda *_: passes.append(1))
        known = (simu.known_of_rows(model, f, s, row.known, 2.5),
                 simu.known_of_rows(model, r, s, row.known_retain))
        passes.clear()
        losses = backward(model, f, r, known, 0.0 if row.weight == 0 else 0.7, s)
        found.append((losses, {n: p.grad for n, p in model.named_parameters()}, len(passes)))
    (apart, grads, before), (joined, ours, now) = found
    assert apart.keys() == joined.keys() and now <= before
    if tokens == 8192 and len(apart) == 2 and not row.read:
        assert (before, now) == (2, 1)
    for name, loss in apart.items():
        assert joined[name] == pytest.approx(loss, rel=1e-5)
    for n, grad in grads.items():
        torch.testing.assert_close(ours[n], grad, rtol=1e-3, atol=1e-5)


@compiler
@pytest.mark.parametrize("method", ["simu", "so", "fo"])
def test_unlearn_ends_alike_with_either(method):
    draw = torch.rand(3, 32, generator=torch.Generator().manual_seed(0))
    s, mask, ends = recipe(method=method, epochs=3), draw < 0.4, []
    for twins in ({}, dict(apply=fused.apply_updates, backward=fused.backward_together)):
        model = tiny()
        log = simu.unlearn(model, rows(6), rows(10, seed=1), mask, s, **twins)
        ends.append((log, dict(model.named_parameters())))
    start = dict(tiny().named_parameters())
    for n, p in ends[0][1].items():
        far = float((p.detach() - start[n].detach()).abs().max())
        torch.testing.assert_close(ends[1][1][n], p, rtol=0, atol=1e-3 * far + 1e-9)
    assert [x["step"] for x in ends[0][0]] == [x["step"] for x in ends[1][0]]
