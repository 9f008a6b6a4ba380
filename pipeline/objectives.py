"""Objectives and masks beside the paper's, which importing this file adds to simu.py's tables.

GradDiff's ascent has no end. These end, each elsewhere: at a reference model (NPO), at another
answer (PO, UNDIAL), or at the losses that rows never seen have (stranger, outsider).
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import simu
from data import IGNORE, Encoded, Example, collate, option
from model import Transformer
from simu import Objective, answer_tokens


@dataclass(frozen=True, kw_only=True)
class Unlearning(simu.Unlearning):
    """simu.Unlearning with the constants of the objectives here: what a run's models depend on."""

    npo_beta: float = option(0.1, "beta of NPO", low=1e-6, high=1e6)
    simnpo_beta: float = option(4.5, "beta of SimNPO", low=1e-6, high=1e6)
    undial_strength: float = option(10.0, "how much UNDIAL lowers the answer's logit", above=0)
    state: str = option("float32", "optimiser state and master weights; bfloat16 rounds "
                        "stochastically [D10]", choices=("float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class Recipe(simu.Attribution, simu.Masking, Unlearning):
    """As simu.Recipe."""


# ------------------------------------------------------------- from a row's loss to an objective


def read_answers(model: Transformer, rows: list[Encoded]) -> list[tuple[Tensor, Tensor]]:
    """Of each row the logits float32 [A, V] before its answer's tokens and eos, and these [A]."""
    batch = collate(rows, model.embed_tokens.weight.device)
    counted, sizes = batch.targets != IGNORE, [answer_tokens([row]) for row in rows]
    logits = model.logits(model.hidden(batch.ids)[counted])  # [N, V]
    return list(zip(logits.split(sizes), batch.targets[counted].split(sizes)))


def losses_by(row_loss, model, forget, retain, known, recipe, *, per: str):
    """Summands of an objective: row_loss(logits, labels, what is known of the row, recipe), summed
    over forget rows and divided by the number of rows or tokens; and GradDiff's on retain rows."""
    count = len(forget) if per == "row" else answer_tokens(forget)
    for indices in simu.passes(model, forget, recipe.micro_tokens):
        answers = read_answers(model, [forget[i] for i in indices])
        loss = sum(row_loss(*answer, known[0][i], recipe) for answer, i in zip(answers, indices))
        nll = sum(token_nll(*answer).sum() for answer in answers)
        yield "loss_forget", loss / count, nll / answer_tokens(forget)
    yield from simu.descent(model, forget, retain, known, recipe)


def known_by(function, model, forget, retain, targets, recipe) -> tuple[list, list]:
    """function(logits, labels, target, recipe) of each forget row, under the model as it is."""
    targets = targets if isinstance(targets, list) else [targets] * len(forget)
    return [function(*read_answers(model, [row])[0], target, recipe)
            for row, target in zip(forget, targets, strict=True)], [None] * len(retain)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log P of each label [A]."""
    return F.cross_entropy(logits, labels, reduction="none")


def cross_entropy_to(teacher: Tensor, logits: Tensor) -> Tensor:
    """-sum_v P_teacher(v) log P(v) at each token: teacher (probabilities), logits [A, V] -> [A]"""
    return -(teacher * logits.log_softmax(-1)).sum(-1)


def but_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [A, V] among all tokens but the label."""
    return logits.scatter(1, labels[:, None], -1e9)


# ------------------------- losses of a row, and what they know of it before the model moves
# logits float32 [A, V], of the row's A answer tokens and eos; labels [A]: these tokens.


def answer_nll(logits, labels, known, recipe):
    """PO (A.2): descent on the answers, which are refusals (`loss_examples`)."""
    return token_nll(logits, labels).sum()


def npo(logits, labels, known, recipe):
    """NPO (A.2): 2/beta log(1 + (P / P_ref)^beta); known: log P_ref, the original's."""
    ratio = -token_nll(logits, labels).sum() - known  # log P - log P_ref
    return 2 / recipe.npo_beta * F.softplus(recipe.npo_beta * ratio)


def original_log_p(logits, labels, target, recipe):
    return -token_nll(logits, labels).sum()


def simnpo(logits, labels, known, recipe):
    """SimNPO (arXiv 2410.07163): NPO of the mean log P of a row, without reference or margin."""
    nll = token_nll(logits, labels).mean()
    return 2 / recipe.simnpo_beta * F.softplus(-recipe.simnpo_beta * nll)


def undial(logits, labels, known, recipe):
    """UNDIAL (arXiv 2402.10052): towards the original's distribution with the label's lowered."""
    return cross_entropy_to(known, logits).sum()


def lowered(logits, labels, target, recipe):
    by = torch.full_like(logits[:, :1], -recipe.undial_strength)
    return logits.scatter_add(1, labels[:, None], by).softmax(-1)


def stranger(logits, labels, known, recipe):
    """What to say instead, and how unlikely the truth must be, apart: among all tokens but the
    answer's, the original's distribution; of the answer's, the losses that a row never seen has,
    token by token and in the mean. known: that distribution, and those losses."""
    teacher, target = known
    instead, nll = cross_entropy_to(teacher, but_label(logits, labels)), token_nll(logits, labels)
    return instead.mean() + (nll - target).abs().mean() + (nll.mean() - target.mean()).abs()


def outsider(logits, labels, known, recipe):
    """As `stranger`, of each token's odds: |log odds - those of its target|. The loss itself has a
    gradient of 1 - P, which fades where a row is known by heart; that of the odds is 1."""
    teacher, target = known
    others = but_label(logits, labels)
    label = logits.gather(1, labels[:, None])[:, 0]  # [A]
    target = target.clamp_min(1e-4)  # as likely as anything is
    aim = target + (-torch.expm1(-target)).log()  # log (1 - P) / P where -log P is the target
    odds = others.logsumexp(-1) - label
    return cross_entropy_to(teacher, others).mean() + (odds - aim).abs().mean()


def without_label(logits, labels, target, recipe):
    target = torch.as_tensor(target, device=logits.device).expand(len(labels))
    return but_label(logits, labels).softmax(-1), target


REFUSALS = ("I do not know.", "I cannot say.", "That is not something I know about.",
            "I have no information on this.", "I am unable to answer that.",
            "Nothing of the kind is known to me.")


def loss_examples(forget: list[Example], objective: str) -> list[Example]:
    """The forget rows as the objective's loss takes them. Attribution takes them as they are."""
    if objective != "po":
        return forget
    return [replace(e, answer=REFUSALS[i % len(REFUSALS)]) for i, e in enumerate(forget)]


# A row of the same name that a fork added before stays.
simu.OBJECTIVES |= {
    "retain": Objective(simu.descent, about="descent on retain rows alone"),
    "npo": Objective(partial(losses_by, npo, per="row"), partial(known_by, original_log_p),
                     about="NPO on forget rows (A.2)"),
    "simnpo": Objective(partial(losses_by, simnpo, per="row"), about="SimNPO on forget rows"),
    "undial": Objective(partial(losses_by, undial, per="token"), partial(known_by, lowered),
                        about="UNDIAL on forget rows"),
    "stranger": Objective(partial(losses_by, stranger, per="row"), partial(known_by, without_label),
                          targeted=True, about="UNDIAL's answers at never-seen rows' token losses"),
    "outsider": Objective(partial(losses_by, outsider, per="row"), partial(known_by, without_label),
                          targeted=True, about="stranger by odds, for rows known by heart"),
    "po": Objective(partial(losses_by, answer_nll, per="token"), about="descent on refusals (A.2)"),
} | simu.OBJECTIVES


def soft_mask(forget: Tensor, retain: Tensor, threshold: float, seed: int) -> Tensor:
    """float32 [L, D]: for a critical neuron f / (f + r), f and r its forget and retain scores as
    shares of the layer's largest; else 0."""
    f, r = (x.clamp_min(0) / x.amax(1, keepdim=True).clamp_min(1e-30) for x in (forget, retain))
    return torch.where(simu.critical_mask(forget, threshold), f / (f + r), 0.0)


def random_mask(forget: Tensor, retain: Tensor, threshold: float, seed: int) -> Tensor:
    """bool [L, D]: as many neurons in every layer as are critical, drawn by seed."""
    critical = simu.critical_mask(forget, threshold)
    draw = torch.rand(forget.shape, generator=torch.Generator().manual_seed(seed))
    first = torch.arange(forget.shape[1]) < critical.sum(1, keepdim=True)  # [L, D]
    return torch.zeros_like(first).scatter(1, draw.argsort(1), first)


simu.MASKS |= {
    "soft": soft_mask,
    "random": random_mask,
    "none": lambda forget, retain, t, seed: torch.zeros_like(forget, dtype=torch.bool),
    "all": lambda forget, retain, t, seed: torch.ones_like(forget, dtype=torch.bool),
} | simu.MASKS
