"""The compiled update against the written one. On a CPU, where inductor works with g++; what only a
card can show is not claimed here."""

import shutil

import pytest
import torch
from test_simu import recipe, rows, tiny
from torch import nn

import simu
from pipeline import fused

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
WRITTEN = fused.update_weight
SHAPES = [(33, 40), (7, 64), (64, 7), (50,)]
KINDS = [("sophia", "float32", "float32"), ("sophia", "bfloat16", "float32"),
         ("sophia", "bfloat16", "bfloat16"), ("adamw", "bfloat16", "bfloat16")]


@pytest.fixture
def compiled(monkeypatch):
    """fused.apply_updates as a card has it."""
    update = fused.compiled_update("cpu", simu.sophia)
    assert update is not WRITTEN
    monkeypatch.setattr(fused, "update_weight", update)


def moving(weights: str, state: str, soft: bool) -> list[simu.Moving]:
    torch.manual_seed(0)
    moves = []
    for i, shape in enumerate(SHAPES):
        p = nn.Parameter(torch.randn(shape).to(getattr(torch, weights)))
        dtype = getattr(torch, state)
        master = p.detach().to(torch.promote_types(p.dtype, dtype))
        m, h = (torch.randn(shape).to(dtype) for _ in range(2))
        mask = torch.rand(shape[0], 1) if soft and len(shape) == 2 else None
        if mask is not None:
            mask[0] = 0
        moves.append(simu.Moving(f"w{i}", p, master, m, h.square(), mask))
    return moves


def run(apply, name: str, weights: str, state: str, soft: bool, updates: int):
    moves = moving(weights, state, soft)
    for step in range(1, updates + 1):
        torch.manual_seed(step)
        for w in moves:
            w.weight.grad = torch.randn_like(w.weight)
        apply(moves, simu.OPTIMISERS[name], recipe(), lr=1e-3 / step, step=step, shrink=0.3)
    return moves


@compiler
@pytest.mark.parametrize("name, weights, state", KINDS)
def test_the_compiled_update_is_the_written_one(name, weights, state, compiled, monkeypatch):
    """Also with a soft mask, whose frozen rows stay to the bit. One graph for each kind, whatever
    shapes and rates. A bfloat16 state is equal but for which way it was rounded, once."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for soft in (False, True):
        args = name, weights, state, soft, 1 if state == "bfloat16" else 4
        got = run(fused.apply_updates, *args)
        with monkeypatch.context() as m:
            m.setattr(fused, "update_weight", WRITTEN)
            want = run(fused.apply_updates, *args)
        if state == "float32":
            literal = run(simu.apply_updates, *args)
            assert all(torch.equal(x.master, y.master) for x, y in zip(want, literal))
        for x, y in zip(want, got):
            assert y.weight.grad is None
            for kind in ("master", "m", "h"):
                a, b = (getattr(w, kind).float() for w in (x, y))
                exact = getattr(x, kind).dtype == torch.float32
                torch.testing.assert_close(b, a, rtol=2e-6 if exact else 2 ** -7, atol=1e-6)
            if y.mask is not None:
                frozen = moving(weights, state, soft)[int(y.name[1])]
                assert all(torch.equal(getattr(frozen, k)[0], getattr(y, k)[0])
                           for k in ("master", "m", "h"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 3  # matrices, vectors, matrices with a soft mask


def test_stochastic_rounding_is_right_on_average():
    torch.manual_seed(0)
    x = torch.full((200_000,), 1.0 + 0.3 * 2**-7)  # 0.3 of the way to the next bfloat16
    up = (fused.stochastic_round(x).float() > 1).float().mean()
    assert float(up) == pytest.approx(0.3, abs=0.01)
    exact = torch.tensor([0.0, -1.5, 2.0**-120])
    assert torch.equal(fused.stochastic_round(exact).float(), exact)


@compiler
@pytest.mark.parametrize("way", ["written", "compiled"])
def test_small_updates_add_up_and_repeat(way, request):
    """[D10] Updates far below bfloat16's resolution add up to what they are in float32. Their noise
    depends on seed and step alone, and leaves torch's random numbers as they were."""
    if way == "compiled":
        request.getfixturevalue("compiled")

    def ends(seed):
        w = moving("bfloat16", "bfloat16", False)[0]
        w.master.fill_(1.0)
        for step in range(1, 201):
            w.weight.grad = torch.ones_like(w.weight)
            s = recipe(beta1=0.0, gamma=0.1, weight_decay=0.0, seed=seed)
            fused.apply_updates([w], simu.sophia, s, lr=1e-5, step=step, shrink=1.0)
        return w.master.clone()

    first, again, other = ends(0), ends(0), ends(1)
    assert first.float().mean().item() == pytest.approx(1 - 200e-5, abs=3e-4)
    assert torch.equal(first, again) and not torch.equal(first, other)
    weight, = moving("bfloat16", "bfloat16", False)[:1]
    weight.weight.grad = torch.ones_like(weight.weight)
    state = torch.get_rng_state()
    fused.apply_updates([weight], simu.sophia, recipe(), lr=1.0, step=1, shrink=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_compiler_one_line_says_so_and_the_written_update_is_taken(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("Cannot find a working triton installation.\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    assert fused.compiled_update.__wrapped__("cpu", simu.sophia) is fused.update_weight
    printed = capsys.readouterr().err
    assert "not fused" in printed and "triton" in printed and printed.count("\n") == 1


def test_who_takes_it():
    """A card, and bfloat16 wherever it is."""
    assert fused.on(torch.device("cpu"), "float32") == {}
    for device, state in (("cuda", "float32"), ("cuda", "bfloat16"), ("cpu", "bfloat16")):
        assert fused.on(torch.device(device), state) == dict(
            apply=fused.apply_updates, state=getattr(torch, state))


@compiler
@pytest.mark.parametrize("method", ["simu", "so", "fo"])
def test_unlearn_ends_the_same_with_either(method, compiled):
    draw = torch.rand(3, 32, generator=torch.Generator().manual_seed(0))
    s, mask, ends = recipe(method=method, epochs=3), draw < 0.4, []
    for apply in (simu.apply_updates, fused.apply_updates):
        model = tiny()
        log = simu.unlearn(model, rows(6), rows(10, seed=1), mask, s, apply=apply)
        ends.append((log, dict(model.named_parameters())))
    start = dict(tiny().named_parameters())
    for n, p in ends[0][1].items():
        far = float((p.detach() - start[n].detach()).abs().max())
        torch.testing.assert_close(ends[1][1][n], p, rtol=0, atol=1e-3 * far + 1e-9)
    assert [x["step"] for x in ends[0][0]] == [x["step"] for x in ends[1][0]]
