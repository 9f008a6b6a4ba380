"""Metrics beside the paper's Tables 1-2: TOFU's and its leaderboard's, SemEval's, SOUL's and ours.

Importing this file adds them to eval's tables. They use the words of eval's docstring, and like all
metrics they are computed from stored rows alone. ideal = the same number of a retain-only model,
whose rows `eval.summarise` takes as `reference`. OU = open-unlearning, TOFU's leaderboard.

name              formula                                             range  better        source
----------------  --------------------------------------------------  -----  ------------  -------
accuracy_ceiling  accuracy of a in place of g': what a model that     0..1   high          ours
                  answers word for word would have
paraphrased_      rouge_l: of g'; probability: p(a) after q'          0..1   f low r high  ours
  rouge_l, _probability
truth_ratio_      truth_ratio with the arithmetic mean of p(w);       0..1   high          TOFU
  arithmetic      model_utility_arithmetic: with it
exact_            share of a's tokens (no eos) that are the           0..1   f low r high  OU
  memorisation    likeliest after what comes before them in a
extraction_       1 - k / |a|, k < |a| the least for which a's        0..1   f low r high  OU
  strength        tokens from the k-th on (no eos) are the likeliest
ended             share of g that end by eos, not at the limit        0..1   high          ours
mia.min_k         mia.auc for score = mean of the k% lowest log P in  0..1   ideal         SOUL
                  the text, k = 10..60
mia.answer_auc    AUC of score = -loss(a), the answer alone;          0..1   ideal         OU
  _min_40         mean of the 40% lowest log P in a (no eos);
  _min_40_plus    the same of (log P - mean) / deviation, both of
                  log P over the vocabulary (Min-K%++);
  _zlib           -loss(a) / bytes of a compressed;
  _reference      loss(a) of retain-only - loss(a)
mia.distance      |mia.auc - ideal|; 0.5 where there is no ideal      0..1   0             ours
privleak          100 ((1 - x) / (1 - ideal) - 1), x = the AUC        -100.. 0             OU
                  mia.answer_min_40; 0.5 where there is no ideal
forget_quality    p-value of a two-sample KS test: R of the forget    0..1   high          TOFU
                  rows against retain-only's
aggregate_soul    aggregate with mia.soul, or with exact_match:       0..1   high          ours
                  aggregate_exact_match
task_aggregate    harmonic mean of rouge_l and exact_match on three   0..1   high          SemEval
                  LUME tasks, 1 - x for those of f; 0 if any is 0
"""

import math
import zlib
from functools import partial

from data import TASKS
from eval import (METRICS, NO_CHOICE, OVERALL, Metric, Missing, Overall, Summary, attack,
                  exact_memorisation, extraction_strength, harmonic_mean, is_nearest, ks_p_value,
                  lacking, losses_of, mean, model_utility, paper_aggregate, rouge_recall,
                  row_truth_ratio)

CHANCE = 0.5  # AUC of an attack that learns nothing
MIN_K = (10, 20, 30, 40, 50, 60)  # percent
ANSWER_K = 40  # percent, as open-unlearning sets it
NO_REFERENCE = Missing("no retain-only model: evaluate one that never saw the forget set, then "
                       "report with --retain-only ITS_FOLDER")

# -------------------------------------------------------------------------------- metrics of a row


def has_ended(row) -> bool:
    return row["generation_ended"]


def paraphrased_rouge_l(row):
    if "paraphrased_generation" not in row:
        return NO_CHOICE
    return rouge_recall(row, "paraphrased_generation")


def paraphrased_probability(row):
    losses = losses_of(row, "paraphrased_question")
    return math.exp(-losses[0]) if losses else NO_CHOICE


def answer_part(row, key) -> list:
    """What is stored under a key of each token of a row's answer, without eos."""
    text = row["scores"]["answer"][0]
    return text[key][text["start"]:-1]


def memorised_share(row) -> float:
    return exact_memorisation(answer_part(row, "predicted"), answer_part(row, "ids"))


def extracted_share(row) -> float:
    return extraction_strength(answer_part(row, "predicted"), answer_part(row, "ids"))


arithmetic_ratio = partial(row_truth_ratio, mean="arithmetic")
METRICS |= {
    "truth_ratio_arithmetic": Metric(arithmetic_ratio, arithmetic_ratio),
    "ended": Metric(has_ended, has_ended, lume=("sc", "qa")),
    "accuracy_ceiling": Metric(partial(is_nearest, text="answer")),
    "paraphrased_rouge_l": Metric(paraphrased_rouge_l),
    "paraphrased_probability": Metric(paraphrased_probability),
    "exact_memorisation": Metric(memorised_share, lume=("sc",)),
    "extraction_strength": Metric(extracted_share, lume=("sc",)),
}


# ----------------------------------------------------------------------------- membership inference


def min_k_score(losses: list[float], percent: int) -> float:
    """Min-K%: mean log-probability of the least likely k% of the tokens, at least one, or 0."""
    count = max(1, len(losses) * percent // 100)
    worst = sorted(losses, reverse=True)[:count]
    return -mean(worst) if worst else 0.0


def zlib_score(loss: float, text: str) -> float:
    """Mean log-probability of an answer over the bytes that zlib makes of it."""
    return -loss / len(zlib.compress(text.encode()))


def text_min_k(row, percent) -> float:
    losses = row["scores"]["answer"][0]["losses"]
    return min_k_score(losses[:-1] or losses, percent)


def answer_score(row) -> float:
    return -losses_of(row, "answer")[0]


def answer_min_k(row) -> float:
    return min_k_score(answer_part(row, "losses"), ANSWER_K)


def answer_min_k_plus(row) -> float:
    return min_k_score([-x for x in answer_part(row, "standard")], ANSWER_K)


def answer_zlib(row) -> float:
    return zlib_score(losses_of(row, "answer")[0], row["scores"]["answer"][0]["decoded"])


def reference_attack(summary):
    """The attack by each answer's log P less its log P under retain-only."""
    if not summary.reference:
        return NO_REFERENCE
    known = {(row["split"], row["id"]): answer_score(row) for row in summary.reference}
    attacked = [row for row in summary.rows if row["split"] in ("forget", "nonmembers")]
    if any((row["split"], row["id"]) not in known for row in attacked):
        return Missing("retain-only was evaluated on other rows")
    return attack(summary, lambda row: answer_score(row) - known[row["split"], row["id"]])


def against_ideal(summary, formula, **score):
    """A formula of an attack's AUC and of its AUC on retain-only, or 0.5 where there is none."""
    area, ideal = attack(summary, **score), attack(Summary(summary.reference, [], {}), **score)
    if isinstance(area, Missing):
        return area
    return formula(area, CHANCE if isinstance(ideal, Missing) else ideal)


def distance(area: float, ideal: float) -> float:
    return abs(area - ideal)


def privleak(area: float, ideal: float = CHANCE) -> float:
    """MUSE's privacy leak in percent: below 0 the attack still finds members, above 0 it finds
    that they were unlearned. area, ideal: AUC of this model and of retain-only."""
    return 100 * (ideal - area) / (1 - ideal + 1e-10)


OVERALL |= {f"mia.min_{k}": Overall(partial(attack, score=partial(text_min_k, percent=k)))
            for k in MIN_K}
OVERALL |= {
    "mia.answer_auc": Overall(partial(attack, score=answer_score)),
    "mia.answer_min_40": Overall(partial(attack, score=answer_min_k)),
    "mia.answer_min_40_plus": Overall(partial(attack, score=answer_min_k_plus)),
    "mia.answer_zlib": Overall(partial(attack, score=answer_zlib)),
    "mia.answer_reference": Overall(reference_attack),
    "mia.distance": Overall(partial(against_ideal, formula=distance)),
    "privleak": Overall(partial(against_ideal, formula=privleak, score=answer_min_k)),
}


# ----------------------------------------------------------------------- forget quality, aggregates


def log_ratios(rows) -> dict[str, float]:
    """log R of each forget row that has a paraphrase and wrong answers; R may be beyond a float."""
    ratios = {}
    for row in rows:
        truth, wrong = losses_of(row, "paraphrased_answer"), losses_of(row, "perturbed_answers")
        if row["split"] == "forget" and truth and wrong:
            ratios[row["id"]] = truth[0] - mean(wrong)
    return ratios


def forget_quality(summary):
    if not summary.reference:
        return NO_REFERENCE
    ratios, ideal = log_ratios(summary.rows), log_ratios(summary.reference)
    if not ratios or set(ratios) != set(ideal):
        return Missing("retain-only was evaluated on other forget rows, or these have no "
                       "paraphrase or wrong answers")
    return ks_p_value(list(ratios.values()), list(ideal.values()))


def task_aggregate(forget: list[float], retain: list[float]) -> float:
    """SemEval-2025 Task 4: harmonic mean of the retain scores and of 1 - the forget scores."""
    return harmonic_mean([1 - x for x in forget] + list(retain))


def semeval_aggregate(summary):
    names = [f"{task}.{name}" for task in TASKS for name in ("rouge_l", "exact_match")]
    forget = [f"forget.{name}" for name in names]
    retain = [f"retain.{name}" for name in names]
    if reason := lacking(summary.values, forget + retain):
        return reason
    return task_aggregate([summary.values[name] for name in forget],
                          [summary.values[name] for name in retain])


OVERALL |= {
    "forget_quality": Overall(forget_quality),
    "aggregate_soul": Overall(partial(paper_aggregate, mia="mia.soul"), ("tofu",)),
    "aggregate_exact_match": Overall(partial(paper_aggregate, em="exact_match"), ("tofu",)),
    "model_utility_arithmetic": Overall(
        partial(model_utility, ratio="truth_ratio_arithmetic"), ("tofu",)),
    "task_aggregate": Overall(semeval_aggregate, ("lume",)),
}
