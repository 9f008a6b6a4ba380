"""Mask variants and objectives by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

import simu
from data import IGNORE, collate
from pipeline import objectives
from test_simu import recipe, rows, run, tiny


# ------------------------------------------------------------------------------------- mask kinds

FORGET = torch.tensor([[1.0, 8.0, 10.0, 6.0], [-1.0, -2.0, -3.0, -4.0], [9.0, 1.0, 2.0, 10.0]])
RETAIN = torch.tensor([[5.0, 1.0, 10.0, -1.0], [1.0, 1.0, 1.0, 1.0], [-5.0, -1.0, -2.0, -3.0]])


def mask_of(kind, seed=0):
    return simu.make_mask(kind, FORGET, RETAIN, threshold=0.5, seed=seed)


def test_the_six_masks_by_hand():
    dual = mask_of("dual")
    assert dual.int().tolist() == [[0, 1, 1, 1], [0] * 4, [1, 0, 0, 1]]
    # Neuron 2 of layer 0 is retain-critical; in layer 2 nothing is, for no score there is positive.
    assert mask_of("forget-only").int().tolist() == [[0, 1, 0, 1], [0] * 4, [1, 0, 0, 1]]
    torch.testing.assert_close(mask_of("soft"), torch.tensor(
        [[0, 0.8 / 0.9, 0.5, 1.0], [0] * 4, [1.0, 0, 0, 1.0]]))
    assert not mask_of("none").any() and mask_of("all").all()
    draws = [mask_of("random", seed) for seed in range(8)]
    assert all(d.sum(1).tolist() == dual.sum(1).tolist() for d in draws)
    assert torch.equal(draws[0], mask_of("random")) and len({str(d.tolist()) for d in draws}) > 4
    assert set(simu.MASKS) == {"dual", "forget-only", "soft", "random", "none", "all"}


def test_lean_rows_of_a_soft_mask_equal_the_literal_masked_update():
    """Eq. 5-7 with real M over dense tensors against the run that holds only the rows."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(3, 32, generator=generator)
    mask[mask < 0.4] = 0.0
    s = recipe(epochs=3, lr=3e-3)
    got = run(tiny(), s, mask)
    binary = run(tiny(), s, mask > 0)
    literal, start = tiny(), dict(tiny().named_parameters())
    simu.unlearn_loop(literal, rows(6), rows(10, seed=1), mask, s)
    for n, p in literal.named_parameters():
        moved = (p.detach() - start[n].detach()).abs().max()
        torch.testing.assert_close(got[n], p.detach(), rtol=0, atol=float(2e-3 * moved) + 1e-9)
        if "down_proj" in n:
            frozen = mask[int(n.split(".")[1])] == 0
            assert torch.equal(got[n][frozen], start[n].detach()[frozen])
            assert not torch.allclose(got[n], binary[n], rtol=0, atol=float(0.05 * moved))


@pytest.mark.parametrize("kind", ["none", "all"])
def test_none_moves_attention_alone_and_all_every_row_of_down_proj(kind):
    model, mask = tiny(), torch.full((3, 32), kind == "all")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = run(model, recipe(), mask)
    for name, old in before.items():
        changed = (after[name] != old).reshape(len(old), -1).any(1)
        if "self_attn" in name or (kind == "all" and "down_proj" in name):
            assert changed.all(), name
        else:
            assert not changed.any(), name


# -------------------------------------------------------------------------------------- objectives


def test_npo_by_hand():
    """2/beta log(1 + (P / P_ref)^beta) of rows of two tokens and of one."""
    s, nll = recipe(npo_beta=0.5), torch.tensor([1.0, 2.0, 1.0], requires_grad=True)
    answers = simu.Answers(torch.zeros(3, 5), torch.zeros(3).long(), nll, [2, 1])
    known = [torch.tensor(-2.0), torch.tensor(-4.0)]
    by_hand = sum(2 / 0.5 * math.log(1 + math.exp(0.5 * d)) for d in (-1.0, 3.0))
    torch.testing.assert_close(objectives.npo(answers, known, s), torch.tensor(by_hand))
    same = [torch.tensor(-3.0), torch.tensor(-1.0)]
    objectives.npo(answers, same, s).backward()  # where P = P_ref its gradient is the ascent's
    torch.testing.assert_close(nll.grad, -torch.ones(3))


def gradients(s, monkeypatch):
    """Gradients, losses and rows of the first update of a run, before the clip."""
    seen = {}

    def stop(model, moving, order, backward, *_, **__):
        seen["losses"] = backward(order[0])
        seen["grads"] = {w.name: w.weight.grad for w in moving}
        seen["order"] = order[0]

    monkeypatch.setattr(simu, "train", stop)
    simu.unlearn(tiny(), rows(6), rows(10, seed=1), None, s)
    return seen


def literal_row_log_p(model, batch):
    log_p = model(batch.ids).log_softmax(-1)
    picked = log_p.gather(-1, batch.targets.clamp_min(0)[..., None]).squeeze(-1)
    return (picked * (batch.targets != IGNORE)).sum(1)


@pytest.mark.parametrize("objective", ["graddiff", "ga", "retain", "po", "npo"])
def test_the_gradient_of_an_objective(objective, monkeypatch):
    s = recipe(method="so", objective=objective, lam=0.7, npo_beta=0.3, micro_tokens=40)
    seen, model = gradients(s, monkeypatch), tiny()
    f, r = ([x[i] for i in part] for x, part in zip((rows(6), rows(10, seed=1)), seen["order"]))
    f, r = collate(f), collate(r)
    forget, retain = simu.mean_nll(model, f), simu.mean_nll(model, r)
    with torch.no_grad():
        reference = literal_row_log_p(model, f)
    ratio = literal_row_log_p(model, f) - reference
    npo = -2 / 0.3 * F.logsigmoid(-0.3 * ratio).mean()
    loss = {"graddiff": -forget + 0.7 * retain, "ga": -forget, "retain": retain,
            "po": forget + 0.7 * retain, "npo": npo + 0.7 * retain}[objective]
    loss.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(seen["grads"][n], p.grad, rtol=1e-3, atol=1e-5)
    names = {"ga": {"loss_forget"}, "retain": {"loss_retain"}}
    assert seen["losses"].keys() == names.get(objective, {"loss_forget", "loss_retain"})
