"""Mask variants and objectives by hand, the sweep's resume, and every figure from a small fixture."""

import builtins
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import simu
import stage
import sweep
from data import IGNORE, collate
from stage import Settings, UserError
from test_simu import rows, run, settings, tiny

ROOT = Path(simu.__file__).parent
MICRO = ("--width 64 --depth 2 --vocab 500 --learn-epochs 2 --light-epochs 2 --epochs 1 "
         "--max-total-tokens 40 --context 160").split()


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
    assert set(stage.MASKS) == {"dual", "forget-only", "soft", "random", "none", "all"}


def test_lean_rows_of_a_soft_mask_equal_the_literal_masked_update(tmp_path):
    """Eq. 5-7 with real M over dense tensors against the run that holds only the rows."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(3, 32, generator=generator)
    mask[mask < 0.4] = 0.0
    s = settings(epochs=3, lr=3e-3)
    got = run(tiny(), s, mask, tmp_path)
    binary = run(tiny(), s, mask > 0, tmp_path)
    forget, retain, literal = rows(6), rows(10, seed=1), tiny()
    masks = {n: mask[int(n.split(".")[1])][:, None].expand_as(p) if "down_proj" in n
             else torch.full_like(p, float("self_attn" in n))
             for n, p in literal.named_parameters()}
    state = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in literal.named_parameters()}
    order = simu.unlearning_order(len(forget), len(retain), s)
    for step, (f, r) in enumerate(order, 1):
        literal.zero_grad()
        simu.graddiff_loss(literal, collate([forget[i] for i in f]),
                           collate([retain[i] for i in r]), s.lam).backward()
        norm = torch.cat([p.grad[masks[n] > 0] for n, p in literal.named_parameters()]).norm()
        with torch.no_grad():
            for n, p in literal.named_parameters():
                simu.sophia_update(p, p.grad * min(1.0, s.clip / (norm + 1e-6)), *state[n],
                                   lr=simu.learning_rate(step, len(order), s.lr, s.warmup),
                                   beta1=s.beta1, beta2=s.beta2, gamma=s.gamma, eps=s.eps,
                                   weight_decay=s.weight_decay, mask=masks[n])
    start = dict(tiny().named_parameters())
    for n, p in literal.named_parameters():
        moved = (p.detach() - start[n].detach()).abs().max()
        torch.testing.assert_close(got[n], p.detach(), rtol=0, atol=float(2e-3 * moved) + 1e-9)
        assert torch.equal(got[n][masks[n] == 0], start[n].detach()[masks[n] == 0])
        if "down_proj" in n:
            assert not torch.allclose(got[n], binary[n], rtol=0, atol=float(0.05 * moved))


@pytest.mark.parametrize("kind", ["none", "all"])
def test_none_moves_attention_alone_and_all_every_row_of_down_proj(kind, tmp_path):
    model, mask = tiny(), torch.full((3, 32), kind == "all")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = run(model, settings(), mask, tmp_path)
    for name, old in before.items():
        changed = (after[name] != old).reshape(len(old), -1).any(1)
        if "self_attn" in name or (kind == "all" and "down_proj" in name):
            assert changed.all(), name
        else:
            assert not changed.any(), name


# -------------------------------------------------------------------------------------- objectives


def test_npo_by_hand():
    beta, log_p, reference = 0.5, torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -4.0])
    by_hand = sum(2 / beta * math.log(1 + math.exp(beta * d)) for d in (-1.0, 3.0)) / 2
    torch.testing.assert_close(simu.npo_loss(log_p, reference, beta), torch.tensor(by_hand))
    log_p.requires_grad_()  # its gradient is twice the sigmoid: that of ascent when P = P_ref, over
    simu.npo_loss(log_p, log_p.detach(), beta).backward()  # the mean of two rows
    torch.testing.assert_close(log_p.grad, torch.tensor([0.5, 0.5]))


def gradients(s, tmp_path, monkeypatch):
    """Gradients and losses of the first update of a run, before the clip."""
    seen = {}

    def stop(model, moving, order, backward, update, **_):
        seen["losses"] = backward(order[0])
        seen["grads"] = {w.name: w.weight.grad for w in moving}
        seen["order"] = order[0]

    monkeypatch.setattr(simu, "train", stop)
    model = tiny()
    simu.unlearn(model, rows(6), rows(10, seed=1), None, s, tmp_path / "log")
    return seen


def literal_row_log_p(model, batch):
    log_p = model(batch.ids).log_softmax(-1)
    picked = log_p.gather(-1, batch.targets.clamp_min(0)[..., None]).squeeze(-1)
    return (picked * (batch.targets != IGNORE)).sum(1)


@pytest.mark.parametrize("objective", stage.OBJECTIVES)
def test_the_gradient_of_every_objective(objective, tmp_path, monkeypatch):
    s = settings(method="so", objective=objective, lam=0.7, npo_beta=0.3, micro_tokens=40)
    seen = gradients(s, tmp_path, monkeypatch)
    model = tiny()
    f, r = ([x[i] for i in part] for x, part in zip((rows(6), rows(10, seed=1)), seen["order"]))
    f, r = collate(f), collate(r)
    forget = simu.mean_nll(model, f)
    retain = simu.mean_nll(model, r)
    with torch.no_grad():
        reference = literal_row_log_p(model, f)
    ratio = literal_row_log_p(model, f) - reference
    npo = -2 / 0.3 * F.logsigmoid(-0.3 * ratio).mean()
    loss = {"graddiff": -forget + 0.7 * retain, "ga": -forget, "retain": retain,
            "po": forget + 0.7 * retain, "npo": npo + 0.7 * retain}[objective]
    loss.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(seen["grads"][n], p.grad, rtol=1e-3, atol=1e-5)
    names = {"graddiff": {"loss_forget", "loss_retain"}, "ga": {"loss_forget"},
             "retain": {"loss_retain"}, "po": {"loss_forget", "loss_retain"},
             "npo": {"loss_npo", "loss_retain"}}[objective]
    assert seen["losses"].keys() == names


def test_npo_refers_to_the_model_before_it_moved(tmp_path):
    model, forget = tiny(), rows(6)
    s = settings(method="so", objective="npo", lr=1e-2, epochs=4)
    simu.unlearn(model, forget, rows(10, seed=1), None, s, tmp_path / "log")
    log = [json.loads(x) for x in (tmp_path / "log").read_text().splitlines()]
    assert log[0]["loss_npo"] == pytest.approx(2 / s.npo_beta * math.log(2), rel=1e-4)
    assert log[-1]["loss_npo"] < log[0]["loss_npo"]
