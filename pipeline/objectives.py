"""Objectives beside the paper's. Importing this file adds them to simu.OBJECTIVES; a fork can add
its own here, or in a file of its own that is imported beside this one.

GradDiff's ascent has no end. These end, each elsewhere: at a reference model (NPO), at an answer
(PO), or at the losses that rows never seen have (stranger, outsider).
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import simu
from data import IGNORE, Batch, Encoded, Example, batches_by_length, collate, option
from model import Transformer
from simu import Objective

LOGITS = 1 << 25  # logits held at once: 128 MiB of float32


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

    state: str = option("float32", "optimiser state and master weights; bfloat16 rounds "
                        "stochastically [D10]", choices=("float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class Recipe(simu.Attribution, simu.Masking, Unlearning):
    """As simu.Recipe."""


# --------------------------------------------------------------- from a term to an objective


@dataclass
class Answers:
    """What a term sees of B rows with N answer tokens in all, eos counted."""

    logits: Tensor  # float32 [N, V]
    labels: Tensor  # [N]
    nll: Tensor  # float32 [N], -log P of each label
    sizes: list[int]  # tokens of each row

    def row_sums(self, x: Tensor) -> Tensor:
        """Per-token x [N] summed over each row: [B]."""
        return torch.stack([row.sum() for row in x.split(self.sizes)])

    def row_means(self, x: Tensor) -> Tensor:
        """Per-token x [N] averaged over each row: [B]."""
        return torch.stack([row.mean() for row in x.split(self.sizes)])


def read_answers(model: Transformer, batch: Batch) -> Answers:
    counted = batch.targets != IGNORE
    logits, labels = model.logits(model.hidden(batch.ids)[counted]), batch.targets[counted]
    nll = F.cross_entropy(logits, labels, reduction="none")
    return Answers(logits, labels, nll, counted.sum(1).tolist())


def losses_by(term, model: Transformer, forget: list[Encoded], retain: list[Encoded], known: tuple,
              recipe: simu.Unlearning, *, per: str):
    """Summands of an objective (see simu.Objective) whose loss on forget rows is the sum of
    term(answers, known, recipe) over its rows or tokens, divided by their number; on retain rows
    it is GradDiff's."""
    device, lengths = model.embed_tokens.weight.device, [len(row.ids) for row in forget]
    tokens = sum(len(row.ids) - row.start for row in forget)
    count = len(forget) if per == "row" else tokens
    most = max(*lengths, min(recipe.micro_tokens, LOGITS // model.config.vocab_size))
    for numbers in batches_by_length(lengths, most):
        answers = read_answers(model, collate([forget[i] for i in numbers], device))
        loss = term(answers, [known[0][i] for i in numbers], recipe) / count
        yield "loss_forget", loss, answers.nll.sum() / tokens
    yield from simu.descent(model, forget, retain, known, recipe)


@torch.no_grad()
def known_by(function, model: Transformer, rows: list[Encoded], targets: list | None,
             recipe: simu.Unlearning) -> list:
    """function(answers, target, recipe) of each row alone, under the model as it is."""
    device = model.embed_tokens.weight.device
    return [function(read_answers(model, collate([row], device)), target, recipe)
            for row, target in zip(rows, targets or [None] * len(rows), strict=True)]


# ------------------------------------------------------------------------------- forget terms


def answer_nll(answers: Answers, known: list, recipe: Constants) -> Tensor:
    return answers.nll.sum()


def npo(answers: Answers, known: list, recipe: Constants) -> Tensor:
    """NPO (A.2): 2/beta log(1 + (P / P_ref)^beta) of each row. Its pull ends where the ascent's
    does not. known: log P_ref, the original's."""
    ratio = -answers.row_sums(answers.nll) - torch.stack(known)  # log P - log P_ref, [B]
    return 2 / recipe.npo_beta * F.softplus(recipe.npo_beta * ratio).sum()


def simnpo(answers: Answers, known: list, recipe: Constants) -> Tensor:
    """SimNPO (arXiv 2410.07163): NPO of the mean log P of a row, without a reference."""
    beta, margin = recipe.simnpo_beta, recipe.simnpo_margin
    return 2 / beta * F.softplus(margin - beta * answers.row_means(answers.nll)).sum()


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
    instead = answers.row_means(cross_entropy_to(torch.cat(teachers), others))
    by_token = answers.row_means((answers.nll - torch.cat(targets)).abs())
    means = torch.stack([x.mean() for x in targets])
    return (instead + by_token + (answers.row_means(answers.nll) - means).abs()).sum()


def outsider(answers: Answers, known: list, recipe: Constants) -> Tensor:
    """As `stranger`, of each token's odds: |log odds - those of its target|. The loss itself has a
    gradient of 1 - P, which fades where a row is known by heart; that of the odds is 1."""
    teachers, targets = (list(x) for x in zip(*known))
    others = answers.logits.scatter(1, answers.labels[:, None], -1e9)  # [N, V] without the label
    instead = answers.row_means(cross_entropy_to(torch.cat(teachers), others))
    label = answers.logits.gather(1, answers.labels[:, None]).squeeze(1)  # [N]
    target = torch.cat(targets).clamp_min(1e-4)  # as likely as anything is
    aim = target + (-torch.expm1(-target)).log()  # log (1 - P) / P where -log P is the target
    by_token = answers.row_means((others.logsumexp(-1) - label - aim).abs())
    return (instead + by_token).sum()


# ------------------------------------------------- what terms know of a row under the original


def original_log_p(answers: Answers, target, recipe: Constants) -> Tensor:
    return -answers.nll.sum()


def lowered(answers: Answers, target, recipe: Constants) -> Tensor:
    """The original's distribution with the label's logit lowered [A, V]."""
    by = torch.full_like(answers.logits[:, :1], -recipe.undial_strength)
    return answers.logits.scatter_add(1, answers.labels[:, None], by).softmax(-1)


def without_label(answers: Answers, target, recipe: Constants) -> tuple[Tensor, Tensor]:
    """The original's distribution among all tokens but the label [A, V], and the target [A]."""
    others = answers.logits.scatter(1, answers.labels[:, None], -1e9).softmax(-1)
    return others, torch.as_tensor(target, device=answers.nll.device).expand(len(answers.nll))


# -------------------------------------------------------------------------------------- tables

REFUSALS = ("I do not know.", "I cannot say.", "That is not something I know about.",
            "I have no information on this.", "I am unable to answer that.",
            "Nothing of the kind is known to me.")
ANSWERS = {"po": REFUSALS}  # what an objective's loss takes in place of the forget rows' answers


def loss_examples(forget: list[Example], objective: str) -> list[Example]:
    """The forget rows as the objective's loss takes them. Attribution takes them as they are."""
    answers = ANSWERS.get(objective)
    if not answers:
        return forget
    return [dataclasses.replace(e, answer=answers[i % len(answers)]) for i, e in enumerate(forget)]


simu.OBJECTIVES |= {
    "npo": Objective(partial(losses_by, npo, per="row"), partial(known_by, original_log_p),
                     about="NPO on forget rows (A.2)"),
    "simnpo": Objective(partial(losses_by, simnpo, per="row"), about="SimNPO on forget rows"),
    "undial": Objective(partial(losses_by, undial, per="token"), partial(known_by, lowered),
                        about="UNDIAL on forget rows"),
    "stranger": Objective(partial(losses_by, stranger, per="row"), partial(known_by, without_label),
                          targeted=True, about="UNDIAL's answers at never-seen rows' token losses"),
    "outsider": Objective(partial(losses_by, outsider, per="row"), partial(known_by, without_label),
                          targeted=True, about="stranger by each token's odds, for rows known by "
                          "heart"),
    "po": Objective(partial(losses_by, answer_nll, per="token"),
                    about="descent on refusals to forget rows (A.2)"),
}
