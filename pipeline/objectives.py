"""Rows beside the paper's: objectives, and an optimiser. Importing this file adds them to simu.py's
tables; a fork can add its own here, or in a file of its own that is imported beside this one.

GradDiff's ascent has no end. These end, each elsewhere: at a reference model (NPO), at an answer
(PO), or at the losses that rows never seen have (level, ceiling, stranger).
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import simu
from data import Example, option
from simu import Answers, Method, Objective, Optimiser


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Of the objectives here."""

    npo_beta: float = option(0.1, "beta of NPO", low=1e-6, high=1e6)
    simnpo_beta: float = option(4.5, "beta of SimNPO", low=1e-6, high=1e6)
    simnpo_margin: float = option(0.0, "gamma of SimNPO", low=0)
    undial_strength: float = option(10.0, "how much UNDIAL lowers the answer's logit", above=0)


@dataclass(frozen=True, kw_only=True)
class Unlearning(simu.Unlearning, Constants):
    """simu.Unlearning with the constants of the objectives here: what a run's models depend on."""


@dataclass(frozen=True, kw_only=True)
class Recipe(simu.Attribution, simu.Masking, Unlearning):
    """As simu.Recipe."""


# ------------------------------------------------------------------------------- forget terms


def row_sums(answers: Answers, x: Tensor) -> Tensor:
    """Per-token x [N] summed over each row: [B]."""
    return torch.stack([row.sum() for row in x.split(answers.sizes)])


def row_means(answers: Answers, x: Tensor) -> Tensor:
    """Per-token x [N] averaged over each row: [B]."""
    return torch.stack([row.mean() for row in x.split(answers.sizes)])


def npo(answers: Answers, known: list, recipe: Constants) -> Tensor:
    """NPO (A.2): 2/beta log(1 + (P / P_ref)^beta) of each row. Its pull ends where the ascent's
    does not. known: log P_ref, the original's."""
    ratio = -row_sums(answers, answers.nll) - torch.stack(known)  # log P - log P_ref, [B]
    return 2 / recipe.npo_beta * F.softplus(recipe.npo_beta * ratio).sum()


def simnpo(answers: Answers, known: list, recipe: Constants) -> Tensor:
    """SimNPO (arXiv 2410.07163): NPO of the mean log P of a row, without a reference."""
    beta, margin = recipe.simnpo_beta, recipe.simnpo_margin
    return 2 / beta * F.softplus(margin - beta * row_means(answers, answers.nll)).sum()


def level(answers: Answers, known: list, recipe: Constants) -> Tensor:
    """|loss - level| of each row: ascent that ends where a row never seen would be, and descent for
    what went past it. known: the level."""
    return (row_means(answers, answers.nll) - torch.stack(known)).abs().sum()


def ceiling(answers: Answers, known: list, recipe: Constants) -> Tensor:
    """max(0, level - loss) of each row: ascent that stops. known: the level."""
    return (torch.stack(known) - row_means(answers, answers.nll)).clamp_min(0).sum()


def cross_entropy_to(teacher: Tensor, logits: Tensor) -> Tensor:
    """-sum_v P_teacher(v) log P(v) at each token: teacher (probabilities), logits [N, V] -> [N]."""
    return -(teacher.to(logits) * logits.log_softmax(-1)).sum(-1)


def undial(answers: Answers, known: list, recipe: Constants) -> Tensor:
    """UNDIAL (arXiv 2402.10052): towards the original's own distribution with the answer token's
    logit lowered. known: that distribution."""
    return cross_entropy_to(torch.cat(known), answers.logits).sum()


def stranger(answers: Answers, known: list, recipe: Constants) -> Tensor:
    """What to say instead, and how unlikely the truth must be, apart: among all tokens but the
    answer's, the original's own distribution; of the answer's, the losses that a row never seen
    has, token by token and in the mean. known: that distribution, and those losses."""
    teachers, targets = (list(x) for x in zip(*known))
    others = answers.logits.scatter(1, answers.labels[:, None], -1e9)  # [N, V] without the label
    instead = row_means(answers, cross_entropy_to(torch.cat(teachers), others))
    by_token = row_means(answers, (answers.nll - torch.cat(targets)).abs())
    means = torch.stack([x.mean() for x in targets])
    return (instead + by_token + (row_means(answers, answers.nll) - means).abs()).sum()


def outsider(answers: Answers, known: list, recipe: Constants) -> Tensor:
    """As `stranger`, of each token's odds: |log odds - those of its target|. The loss itself has a
    gradient of 1 - P, which fades where a row is known by heart; that of the odds is 1."""
    teachers, targets = (list(x) for x in zip(*known))
    others = answers.logits.scatter(1, answers.labels[:, None], -1e9)  # [N, V] without the label
    instead = row_means(answers, cross_entropy_to(torch.cat(teachers), others))
    label = answers.logits.gather(1, answers.labels[:, None]).squeeze(1)  # [N]
    target = torch.cat(targets).clamp_min(1e-4)  # as known as anything is
    wanted = target + (-torch.expm1(-target)).log()  # log (1 - P) / P where -log P is the target
    by_token = row_means(answers, (others.logsumexp(-1) - label - wanted).abs())
    return (instead + by_token).sum()


# ------------------------------------------------------------------------------ what they know
# Of a row, from its answers under the model before it moves, and from its target: the losses [A]
# of its tokens in a model that never saw it, or one for all.


def original_log_p(answers: Answers, target, recipe: Constants) -> Tensor:
    return -answers.nll.sum()


def mean_target(answers: Answers, target, recipe: Constants) -> Tensor:
    return torch.as_tensor(target, device=answers.nll.device).mean()


def lowered(answers: Answers, target, recipe: Constants) -> Tensor:
    """The original's distribution with the label's logit lowered [A, V]."""
    by = torch.full_like(answers.logits[:, :1], -recipe.undial_strength)
    return answers.logits.scatter_add(1, answers.labels[:, None], by).softmax(-1)


def without_label(answers: Answers, target, recipe: Constants) -> tuple[Tensor, Tensor]:
    """The original's distribution among all tokens but the label [A, V], and the target [A]."""
    others = answers.logits.scatter(1, answers.labels[:, None], -1e9).softmax(-1)
    return others, torch.as_tensor(target, device=answers.nll.device).expand(len(answers.nll))


def spread_losses(labels: list[int], losses: list[float], usual: Tensor) -> Tensor:
    """Target losses [A] of a row's answer tokens: the quantiles of a never-seen row's token losses,
    the larger ones for the tokens that are usually harder. usual [V]: a token's usual loss."""
    quantiles = torch.tensor(sorted(losses))
    middle = (torch.arange(len(labels)) + 0.5) / len(labels)  # of each of A equal shares
    rank = usual[torch.tensor(labels)].argsort(stable=True).argsort()
    return quantiles[(middle * len(quantiles)).long()][rank]


PRIOR = 4.0


def usual_losses(tokens: list[int], losses: list[float], vocab: int) -> Tensor:
    """float32 [V]: the mean loss of each token, drawn to the mean of all by PRIOR observations."""
    total = torch.full((vocab,), PRIOR * sum(losses) / len(losses))
    count = torch.full((vocab,), PRIOR)
    total.index_add_(0, torch.tensor(tokens), torch.tensor(losses))
    count.index_add_(0, torch.tensor(tokens), torch.ones(len(tokens)))
    return total / count


# ----------------------------------------------------------------------------------- refusals

REFUSALS = ("I do not know.", "I cannot say.", "That is not something I know about.",
            "I have no information on this.", "I am unable to answer that.",
            "Nothing of the kind is known to me.")


def loss_examples(forget: list[Example], objective: str) -> list[Example]:
    """The forget rows as the objective's loss takes them: with its own answers, or as they are.
    Attribution always takes them as they are."""
    answers = simu.OBJECTIVES[objective].answers
    return [dataclasses.replace(e, answer=answers[i % len(answers)]) if answers else e
            for i, e in enumerate(forget)]


# --------------------------------------------------------------------------------------- Lion


def lion_moments(grad: Tensor, m: Tensor, h: Tensor, *, beta1: float, beta2: float):
    """Lion (arXiv 2302.06675) has one EMA; h carries the direction of the step to come."""
    return beta2 * m + (1 - beta2) * grad, beta1 * m + (1 - beta1) * grad


def lion_step(param: Tensor, m: Tensor, h: Tensor, *, lr: float, weight_decay: float):
    return param * (1 - lr * weight_decay) - lr * h.sign(), (h != 0).sum()


def lion(recipe: simu.Unlearning, lr: float, weight_decay: float, step: int):
    return (partial(lion_moments, beta1=recipe.beta1, beta2=recipe.beta2),
            partial(lion_step, lr=lr, weight_decay=weight_decay))


# ------------------------------------------------------------------------------------- tables

OBJECTIVES = {
    "npo": Objective(npo, per="row", known=original_log_p, about="NPO on forget rows (A.2)"),
    "simnpo": Objective(simnpo, per="row", about="SimNPO on forget rows"),
    "level": Objective(level, per="row", known=mean_target, targeted=True,
                       about="to the loss of rows never seen, from both sides"),
    "ceiling": Objective(ceiling, per="row", known=mean_target, targeted=True,
                         about="ascent up to the loss of rows never seen"),
    "undial": Objective(undial, known=lowered, about="UNDIAL on forget rows"),
    "stranger": Objective(stranger, per="row", known=without_label, targeted=True,
                          about="UNDIAL's answers at never-seen rows' token losses"),
    "outsider": Objective(outsider, per="row", known=without_label, targeted=True,
                          about="stranger by each token's odds, for rows known by heart"),
    "po": Objective(simu.descent, answers=REFUSALS,
                    about="descent on refusals to forget rows (A.2)"),
}
OPTIMISERS = {"lion": Optimiser(lion)}
METHODS = {"simu-lion": Method("attention", "lion", masked=True)}
for table, rows in ((simu.OBJECTIVES, OBJECTIVES), (simu.OPTIMISERS, OPTIMISERS),
                    (simu.METHODS, METHODS)):
    table.update(rows)
