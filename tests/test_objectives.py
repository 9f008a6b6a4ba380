"""Masks and objectives by hand, or at their own solution."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_simu import recipe, rows, run, tiny

import simu
from data import IGNORE, collate
from model import UserError
from pipeline import objectives

# ----------------------------------------------------------------------------------------- masks

FORGET = torch.tensor([[1.0, 8.0, 10.0, 6.0], [-1.0, -2.0, -3.0, -4.0], [9.0, 1.0, 2.0, 10.0]])
RETAIN = torch.tensor([[5.0, 1.0, 10.0, -1.0], [1.0, 1.0, 1.0, 1.0], [-5.0, -1.0, -2.0, -3.0]])


def mask_of(kind, seed=0):
    return simu.MASKS[kind](FORGET, RETAIN, 0.5, seed)


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


# ------------------------------------------------------------------------------------ objectives


def row_log_p(model, some):
    """log P of each row's answer, as its definition reads."""
    batch = collate(some)
    log_p = model(batch.ids).log_softmax(-1)
    picked = log_p.gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0]
    return (picked * (batch.targets != IGNORE)).sum(1)


@pytest.mark.parametrize("objective", ["graddiff", "retain", "po", "npo", "simnpo"])
def test_the_gradient_of_an_objective(objective):
    """In small passes, against the loss as the papers write it."""
    s = recipe(objective=objective, lam=0.7, npo_beta=0.3, micro_tokens=40)
    model, f, r, table = tiny(), rows(4), rows(4, seed=1), simu.OBJECTIVES[objective]
    with torch.no_grad():
        reference = row_log_p(model, f)
        known = table.known(model, f, r, None, s) if table.known else ([None] * 4, None)
    logged = {}
    for name, loss, value in table.losses(model, f, r, known, s):
        loss.backward()
        logged[name] = logged.get(name, 0) + value.item()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    forget, retain = simu.mean_nll(model, collate(f)), simu.mean_nll(model, collate(r))
    ratio, size = row_log_p(model, f) - reference, torch.tensor([len(x.ids) - x.start for x in f])
    npo = -2 / 0.3 * F.logsigmoid(-0.3 * ratio).mean()
    simnpo = -2 / 4.5 * F.logsigmoid(-4.5 / size * row_log_p(model, f)).mean()
    loss = {"graddiff": -forget + 0.7 * retain, "retain": 0.7 * retain,
            "po": forget + 0.7 * retain, "npo": npo + 0.7 * retain,
            "simnpo": simnpo + 0.7 * retain}[objective]
    loss.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(grads[n], p.grad, rtol=1e-3, atol=1e-5)
    expected = dict(loss_forget=forget.item(), loss_retain=retain.item())
    if objective == "retain":
        del expected["loss_forget"]
    assert logged == pytest.approx(expected, rel=1e-5)


def slope(row_loss, logits, labels, known):
    logits = logits.clone().requires_grad_()
    loss = row_loss(logits, labels, known, recipe())
    return torch.autograd.grad(loss, logits)[0].abs().max().item()


def test_npo_where_the_model_has_not_moved_is_the_ascent():
    nll = torch.tensor([1.0, 2.0])
    logits = torch.stack([-nll, (-torch.expm1(-nll)).log()], 1).requires_grad_()
    loss = objectives.npo(logits, torch.zeros(2).long(), torch.tensor(-3.0), recipe(npo_beta=0.5))
    assert loss.item() == pytest.approx(2 / 0.5 * math.log(2))
    grad, = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad[:, 0], 1 - torch.exp(-nll))  # d log P / d logit


def test_undial_rests_at_the_originals_distribution_with_the_label_lowered():
    torch.manual_seed(0)
    logits, labels, s = torch.randn(5, 9), torch.tensor([1, 2, 3, 4, 8]), recipe()
    known, rest = objectives.lowered(logits, labels, None, s), logits.clone()
    rest[range(5), labels] -= s.undial_strength
    assert slope(objectives.undial, rest, labels, known) < 1e-6
    assert slope(objectives.undial, logits, labels, known) > 1e-2


@pytest.mark.parametrize("row_loss", [objectives.stranger, objectives.outsider])
def test_stranger_and_outsider_rest_with_the_label_at_its_target(row_loss):
    """And all others in the original's proportions: the loss there is these others' entropy."""
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 9), torch.tensor([1, 2, 3, 4, 8])
    target = torch.tensor([1.5, 3.0, 0.5, 4.0, 2.0])
    known = objectives.without_label(logits, labels, target, recipe())
    others = logits.scatter(1, labels[:, None], -1e9).logsumexp(-1)
    rest = logits.clone()
    rest[range(5), labels] = others - target - torch.log1p(-torch.exp(-target))
    torch.testing.assert_close(objectives.token_nll(rest, labels), target)
    entropy = -(known[0] * known[0].clamp_min(1e-30).log()).sum(-1).mean()
    at_rest = row_loss(rest, labels, known, recipe())
    torch.testing.assert_close(at_rest, entropy, rtol=1e-5, atol=1e-5)
    assert row_loss(logits, labels, known, recipe()) > entropy + 0.3


def test_an_outsiders_pull_does_not_fade_where_a_row_is_known_by_heart():
    logits, labels = torch.zeros(2, 9), torch.tensor([1, 2])
    known = objectives.without_label(logits, labels, 3.0, recipe())
    logits[range(2), labels] = 15.0
    assert slope(objectives.outsider, logits, labels, known) > 0.4
    assert slope(objectives.stranger, logits, labels, known) < 1e-3


@pytest.mark.parametrize("changes, retain, says", [
    (dict(objective="stranger"), rows(4), "stranger needs targets"),
    (dict(objective="npo"), [], "no retain rows")])
def test_what_an_objective_needs_is_said_before_anything_moves(changes, retain, says):
    model = tiny()
    with pytest.raises(UserError, match=says):
        simu.unlearn(model, rows(6), retain, None, recipe(method="fo", **changes))
    start = tiny().state_dict()
    assert all(torch.equal(x, start[n]) for n, x in model.state_dict().items())


def test_without_retain_rows_and_with_lambda_0():
    log = simu.unlearn(tiny(), rows(6), [], None, recipe(method="fo", objective="npo", lam=0.0))
    assert log[0].keys() == {"step", "loss_forget", "lr", "grad_norm"}
