"""The objectives beside the paper's, each by hand or at its own solution; and Lion."""

import math

import pytest
import torch
from test_simu import recipe, rows, run, tiny

import simu
from data import collate
from model import UserError
from pipeline import objectives


def forget_term(objective, model, some, known=None, **changes):
    """An objective's forget term, as `unlearn` averages it, and its gradient by weight."""
    answers = simu.read_answers(model, collate(some))
    row = simu.OBJECTIVES[objective]
    known = known or [None] * len(some)
    loss = row.forget(answers, known, recipe(objective=objective, **changes))
    loss = loss / (sum(answers.sizes) if row.per == "token" else len(some))
    names, weights = zip(*model.named_parameters())
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, weights)))


def test_simnpo_by_hand():
    """-2/beta log sigmoid(-beta/|y| log P - margin), a row at a time."""
    model, some = tiny(), rows(3)
    means = [simu.mean_nll(model, collate([r])).item() for r in some]
    hand = [-2 / 4.5 * math.log(1 / (1 + math.exp(-(4.5 * x - 0.7)))) for x in means]
    loss, _ = forget_term("simnpo", model, some, simnpo_margin=0.7)
    assert loss == pytest.approx(sum(hand) / 3, rel=1e-5)


def norm_of(grads):
    return torch.cat([g.flatten() for g in grads.values()]).norm().item()


def knowing(objective, model, some, targets):
    return simu.known_of_rows(model, some, recipe(objective=objective),
                              simu.OBJECTIVES[objective].known, targets)


def test_level_has_two_sides_and_rest_between_them():
    model, some = tiny(), rows(1)
    own = simu.mean_nll(model, collate(some)).item()
    up = forget_term("level", model, some, knowing("level", model, some, own + 1))
    down = forget_term("level", model, some, knowing("level", model, some, own - 1))
    assert up[0] == pytest.approx(1, rel=1e-4) and down[0] == pytest.approx(1, rel=1e-4)
    for name in up[1]:  # below the level it ascends, above it descends, by the same gradient
        torch.testing.assert_close(up[1][name], -down[1][name])
    ascent = forget_term("graddiff", model, some)[1]
    torch.testing.assert_close(up[1]["norm.weight"], ascent["norm.weight"], rtol=1e-4, atol=1e-6)
    at_rest = forget_term("level", model, some, [simu.read_answers(
        model, collate(some)).nll.detach().mean()])
    assert at_rest[0] == 0 and norm_of(at_rest[1]) == 0


def test_ceiling_is_level_below_and_nothing_above():
    model, some = tiny(), rows(3)
    low, high = (forget_term(x, model, some, knowing(x, model, some, 99.0))
                 for x in ("level", "ceiling"))
    assert low[0] == high[0] and all(torch.equal(low[1][n], high[1][n]) for n in low[1])
    above = forget_term("ceiling", model, some, knowing("ceiling", model, some, 0.0))
    assert above[0] == 0 and norm_of(above[1]) == 0


def test_undial_and_stranger_rest_at_their_own_solutions():
    """UNDIAL: logits that are the original's with the label's lowered. Stranger: the label at its
    target, all others in the original's proportions."""
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 9), torch.tensor([1, 2, 3, 4, 8])
    answers = simu.Answers(logits, labels, -logits.log_softmax(-1)[range(5), labels], [2, 3])
    s, rest = recipe(), logits.clone()
    rest[range(5), labels] -= s.undial_strength
    parts = [simu.Answers(x, y, n, [len(y)]) for x, y, n in zip(
        logits.split([2, 3]), labels.split([2, 3]), answers.nll.split([2, 3]))]

    def slope(objective, start, known):
        start = start.clone().requires_grad_()
        here = simu.Answers(start, labels, -start.log_softmax(-1)[range(5), labels], [2, 3])
        return torch.autograd.grad(objective(here, known, s), start)[0].abs().max().item()

    lowered = [objectives.lowered(x, None, s) for x in parts]
    assert slope(objectives.undial, rest, lowered) < 1e-6
    assert slope(objectives.undial, logits, lowered) > 1e-2
    targets = [torch.tensor([1.5, 3.0]), torch.tensor([0.5, 4.0, 2.0])]
    known = [objectives.without_label(x, y, s) for x, y in zip(parts, targets)]
    apart = logits.clone()
    others = apart.scatter(1, labels[:, None], -1e9).logsumexp(-1)
    wanted = torch.cat(targets)
    apart[range(5), labels] = others - wanted - torch.log1p(-torch.exp(-wanted))
    here = simu.Answers(apart, labels, -apart.log_softmax(-1)[range(5), labels], [2, 3])
    torch.testing.assert_close(here.nll, wanted)
    entropy = sum(-(p * p.clamp_min(1e-30).log()).sum(-1).mean() for p, _ in known)
    torch.testing.assert_close(objectives.stranger(here, known, s), entropy, rtol=1e-5, atol=1e-5)
    assert objectives.stranger(answers, known, s) > entropy + 0.5


def test_a_never_seen_rows_losses_are_spread_over_a_row():
    usual = objectives.usual_losses([3, 3, 7], [1.0, 3.0, 8.0], 10)
    torch.testing.assert_close(usual[[0, 3, 7]], torch.tensor([4.0, 20 / 6, 24 / 5]))
    got = objectives.spread_losses([7, 0, 3, 7], [9.0, 1.0], usual)
    assert got.tolist() == [9.0, 1.0, 1.0, 9.0]  # two harder tokens take the higher half


def test_objectives_that_end_somewhere_need_to_know_where():
    with pytest.raises(UserError, match="level needs targets"):
        run(tiny(), recipe(objective="level"), torch.ones(3, 32).bool())


@pytest.mark.parametrize("objective", sorted(simu.OBJECTIVES))
def test_every_objective_runs_and_its_micro_batches_are_exact(objective):
    grads = []
    for tokens in (8192, 24):
        model, some, s = tiny(), rows(4), recipe(objective=objective, micro_tokens=tokens)
        if not simu.OBJECTIVES[objective].forget:
            return
        simu.backward_apart(model, some, [], (knowing(objective, model, some, 2.5), []), 0.0, s)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for n in grads[0]:
        torch.testing.assert_close(*(g[n] for g in grads), rtol=1e-3, atol=1e-5)


def test_lion_by_hand():
    p, m, h = torch.tensor([1.0, 1.0]), torch.tensor([0.2, -0.4]), torch.zeros(2)
    moments, step = simu.OPTIMISERS["lion"].rules(recipe(beta1=0.9, beta2=0.99), 0.1, 0.5, 1)
    simu.masked_update(p, torch.tensor([-4.0, 1.0]), m, h, moments=moments, step=step, mask=None)
    # direction .9*.2 - .4 = -.22 and -.36 + .1 = -.26: both weights rise by lr after the decay
    torch.testing.assert_close(p, torch.tensor([0.95 + 0.1, 0.95 + 0.1]))
    torch.testing.assert_close(m, torch.tensor([0.198 - 0.04, -0.396 + 0.01]))
