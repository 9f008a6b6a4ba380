"""What a model still knows: every metric of Tables 1-2 and of the benchmarks, defined and computed.

f = forget, r = retain, RA = real authors, WF = world facts; q' = the paraphrased question; a, a' =
answer and its paraphrase, w = a wrong answer, g, g' = what is said greedily to q and to q'; loss(a)
= mean over the tokens of a (and one eos) of -log P(token | what comes before); p(a) =
exp(-loss(a)); ideal = the same number of retain-only. OU = open-unlearning, TOFU's leaderboard.

name            formula                                               range  better        source
--------------  ----------------------------------------------------  -----  ------------  -------
rouge_l         LCS(a, g) / |a| in stemmed words: ROUGE-L recall.     0..1   f low r high  TOFU,
                LUME: on sentence completions ("regurgitation")                            SemEval
exact_match     strip(a) = strip(g), case-folded, in Unicode's NFC.   0..1   f low r high  SemEval
                LUME: on questions ("knowledge")
accuracy [D11]  f, r: g' is closest to a' among a' and five w; ties   0..1   f low r high  SOUL
                share the point. Table 1's "EM"; blind guessing
                gives about 1/6. RA, WF: a occurs in g. Closeness:
                ROUGE-L F1, or cosine with --closeness encoder
accuracy_whole  the same, a tie with a' being a whole point           0..1   f low r high  SOUL
accuracy_       the same of a in place of g': what a model that       0..1   high          ours
  ceiling       answers word for word would score
probability     f, r: p(a).  RA, WF: p(a) / (p(a) + sum p(w))         0..1   f low r high  TOFU
paraphrased_    rouge_l of g';                                        0..1   f low r high  ours
  rouge_l, _probability: p(a) after q'
truth_ratio     R = geometric mean of p(w), over p(a'); over p(a) on  0..1   high          OU
                RA, WF. f: mean min(R, 1/R).  Others: mean max(0,
                1 - R).  _arithmetic: the arithmetic mean of p(w)                          TOFU
model_utility   harmonic mean of rouge_l, probability, truth_ratio    0..1   high          OU
                on r, RA, WF: nine numbers, six where RA is missing.
                _arithmetic: of truth_ratio_arithmetic                                     TOFU
forget_quality  p-value, two-sample KS test: R of the forget rows     0..1   high          TOFU
                against retain-only's
exact_          share of a's tokens (no eos) that are the likeliest   0..1   f low r high  OU
  memorisation  after what comes before them in a
extraction_     1 - k / |a|, k < |a| the least for which a's tokens   0..1   f low r high  OU
  strength      from the k-th on (no eos) are the likeliest
repetition      share of g's three-word sequences seen in it before   0..1   low           ours
ended           share of g that end by eos, not at the length limit   0..1   high          ours
mia.auc [D12]   AUC of score = -loss(text); members = forget rows,    0..1   ideal         SemEval
                non-members = text never trained on; text = prompt           (paper: low)
                and answer, all tokens but the first, no eos
mia.min_k       the same AUC for score = mean of the k% lowest        0..1   ideal         SOUL
                log P in the text, k = 10..60
mia.distance    |mia.auc - ideal|; 0.5 where there is no ideal        0..1   0             ours
mia.score       1 - 2 |mia.auc - 0.5|                                 0..1   high          SemEval
mia.soul        mia.auc by SOUL's misaligned labels: the scores of    0..1   none          SOUL
                (members, non-members), as many labels 0 as there
                are non-members, then 1. A perfect attack has about
                .77, its reverse .23. aggregate_soul: with it
mia.answer_auc  AUC of score = -loss(a), the answer alone;            0..1   ideal         OU
  _min_40       mean of the 40% lowest log P in a (no eos);
  _min_40_plus  the same of (log P - mean) / deviation, both of
                log P over the vocabulary (Min-K%++);
  _zlib         -loss(a) / bytes of a compressed;
  _reference    loss(a) of retain-only - loss(a)
privleak        100 ((1 - x) / (1 - ideal) - 1), x = the AUC          -100.. 0             OU
                mia.answer_min_40; 0.5 where there is no ideal
aggregate       mean(1 - EM_f, 1 - RL_f, 1 - mia.auc, EM_r, RL_r);    0..1   high          SIMU,
  [D13]         RL = rouge_l; EM = accuracy on TOFU, exact_match                           Table 2
                elsewhere. aggregate_exact_match: everywhere
task_aggregate  harmonic mean of rouge_l and exact_match on three     0..1   high          SemEval
                LUME tasks, 1 - x for those of f; 0 if any is 0

Table 1: Exact Match is accuracy (forget, retain, world_facts), ROUGE-L is rouge_l, MIA fits
mia.soul [D12]; ours is mia.auc. Table 2: Regurgitation and Knowledge are rouge_l and exact_match
by task.

Words: where most letters of a are a-z, the runs of a-z and 0-9, as rouge_score has them (an
accented letter parts a word: published numbers do). Elsewhere Unicode's: letters, digits and the
marks on them; a letter of a script without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese)
is a word with its marks.
The MIA text is the whole document, as in SemEval and SOUL: it is what was or was not trained on.
A metric whose data are missing is None, with the reason beside it; 0.0 always means zero. A row of
which it says nothing (rouge_l where a has no word) is left out of its mean, which a note counts.
"""

import json
import math
import re
import unicodedata
import zlib
from bisect import bisect_left, bisect_right
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import torch

import data
from data import TASKS, Encoded, Example, option
from model import Transformer, UserError, generate

MIN_K = (10, 20, 30, 40, 50, 60)  # percent
CHANCE = 0.5  # AUC of an attack that learns nothing
FORGET_RETAIN, FACTS = ("forget", "retain"), ("real_authors", "world_facts")
SPLITS = FORGET_RETAIN + FACTS


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long an answer may be, and how much is computed at once."""

    max_new_tokens: int = option(0, "tokens generated at most; 0: no limit", low=0)
    max_total_tokens: int = option(200, "prompt and answer at most; 0: no limit [D16]", low=0)
    eval_tokens: int = option(16384, "tokens in one evaluation pass; on a CPU losses take fewer",
                              low=1)


# ------------------------------------------------------------------------------------------- words

UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "THAI",
            "LAO", "KHMER", "MYANMAR")  # how Unicode's names of letters of these scripts begin


@lru_cache(maxsize=1 << 16)
def letter_class(char: str) -> str:
    """w: part of a word; a: a word alone (unspaced scripts); m: a mark on what precedes it; s:
    space; else a dot."""
    category = unicodedata.category(char)[0]
    if category in "LN":
        return "a" if unicodedata.name(char, "").startswith(UNSPACED) else "w"
    return "m" if category == "M" or char in "\u200c\u200d" else "s" if char.isspace() else "."


def pieces(text: str, pattern: str) -> list[str]:
    """The parts of a text whose letter classes match a pattern."""
    classes = "".join(map(letter_class, text))
    return [text[m.start():m.end()] for m in re.finditer(pattern, classes)]


def folded(text: str) -> str:
    """A text without case, in Unicode's composed spelling (NFC)."""
    return unicodedata.normalize("NFC", text.casefold())


def is_latin(text: str) -> bool:
    """Are at least half of its letters a-z, as rouge_score expects (or all of it digits)?"""
    letters = [c.isascii() for c in text if c.isalpha()]
    return bool(re.search("[a-z0-9]", text.lower())) and 2 * sum(letters) >= len(letters)


def rouge_words(text: str, reference: str | None = None) -> list[str]:
    """Words of a text, read as its reference's are; those in a-z stemmed if longer than three."""
    if is_latin(text if reference is None else reference):
        words = re.findall("[a-z0-9]+", text.lower())
    else:
        words = pieces(folded(text), "am*|w[wm]*")
    return [porter_stem(w) if len(w) > 3 and w.isascii() else w for w in words]


def repetition(text: str, n: int = 3) -> float:
    """Share of a text's n-word sequences that stood in it before; 0 if it has none."""
    words = text.split() if text.isascii() else pieces(text, "am*|[^as]+")
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


# ------------------------------------------------------------------------------------- text metrics

Rouge = namedtuple("Rouge", "precision recall f1")


def common_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by rows of the usual table: bit i of `row` is 0
    where the row's value rises at a[i] (Hyyro's recurrence)."""
    positions = {}  # of each word in a, as bits
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    row = full = (1 << len(a)) - 1
    for word in b:
        match = row & positions.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()


def rouge_l(reference: str, candidate: str) -> Rouge:
    """ROUGE-L over stemmed words, equal to rouge_score's `rougeL` with use_stemmer=True where the
    reference is in Latin letters; as there, 0 if one of the two has no word."""
    a, b = rouge_words(reference), rouge_words(candidate, reference)
    common = common_length(a, b)
    if not common:
        return Rouge(0.0, 0.0, 0.0)
    precision, recall = common / len(b), common / len(a)
    return Rouge(precision, recall, 2 * precision * recall / (precision + recall))


def exact_match(reference: str, candidate: str) -> bool:
    """Same string but for case, surrounding white space and Unicode's spelling."""
    return folded(reference.strip()) == folded(candidate.strip())


def contains(reference: str, candidate: str) -> bool:
    """The reference occurs in the candidate, whatever the case."""
    return folded(reference.strip()) in folded(candidate)


def first_is_best(scores: list[float], *, ties: str = "shared") -> float:
    """1 if the first score is above all others, 0 if another is above it. n tied first: 1/n if ties
    are "shared", so that a senseless candidate scores what guessing would; 1 if "whole" (SOUL)."""
    if max(scores) > scores[0]:
        return 0.0
    return 1.0 if ties == "whole" else 1 / scores.count(scores[0])


# ------------------------------------------------------------------------------------- memorisation


def exact_memorisation(predicted_ids: list[int], answer_ids: list[int]) -> float:
    """Share of an answer's tokens that are the likeliest after what comes before them, 0..1."""
    same = sum(p == a for p, a in zip(predicted_ids, answer_ids, strict=True))
    return same / len(answer_ids) if answer_ids else 0.0


def extraction_strength(predicted_ids: list[int], answer_ids: list[int]) -> float:
    """1 - k/n, k the least for which all tokens from the k-th on are predicted. As open-unlearning
    has it, k ends at n - 1: an answer of which nothing is predicted has 1/n, not 0."""
    n = len(answer_ids)
    k = next((i for i in range(n - 1) if predicted_ids[i:] == answer_ids[i:]), n - 1)
    return 1 - k / n if n else 0.0


# ----------------------------------------------------------------------------- membership inference


def auc(members: list[float], nonmembers: list[float]) -> float:
    """P(a member's score > a non-member's) + half P(equal): area under the ROC curve."""
    others = sorted(nonmembers)
    twice = sum(bisect_left(others, x) + bisect_right(others, x) for x in members)
    return twice / (2 * len(members) * len(others))


def soul_auc(members: list[float], nonmembers: list[float]) -> float:
    """The AUC that SOUL's code gives: its labels are in another order than its scores."""
    scores = [*members, *nonmembers]
    return auc(scores[:len(nonmembers)], scores[len(nonmembers):])


def min_k_score(losses: list[float], percent: int) -> float:
    """Min-K%: mean log-probability of the least likely k% of the tokens, at least one, or 0."""
    worst = sorted(losses, reverse=True)[: max(1, len(losses) * percent // 100)]
    return -mean(worst) if worst else 0.0


def zlib_score(loss: float, text: str) -> float:
    """Mean log-probability of an answer over the bytes that zlib makes of it."""
    return -loss / len(zlib.compress(text.encode()))


def privleak(area: float, ideal: float = CHANCE) -> float:
    """MUSE's privacy leak in percent: below 0 the attack still finds members, above 0 it finds
    that they were unlearned. area, ideal: AUC of this model and of retain-only."""
    return 100 * (ideal - area) / (1 - ideal + 1e-10)


def mia_score(area: float) -> float:
    """SemEval-2025 Task 4: 1 where the attack learns nothing, 0 where it never errs (or always)."""
    return 1 - 2 * abs(area - CHANCE)


# ----------------------------------------------------------------------------------- TOFU's metrics


def log_truth_ratio(paraphrased_loss: float, perturbed_losses: list[float], *,
                    mean: str = "geometric") -> float:
    """log R; kept in logs because unlearned models give losses whose exp(-loss) underflows."""
    n, least = len(perturbed_losses), min(perturbed_losses)
    if mean == "geometric":
        return paraphrased_loss - math.fsum(perturbed_losses) / n
    if mean != "arithmetic":
        raise ValueError(f"mean is {mean!r}; it must be geometric or arithmetic")
    total = math.fsum(math.exp(least - x) for x in perturbed_losses)
    return paraphrased_loss - least + math.log(total / n)


def truth_ratio(paraphrased_loss: float, perturbed_losses: list[float], *,
                mean: str = "geometric") -> float:
    """R = mean p(w) / p(a'); inf where it is beyond a float."""
    log_r = log_truth_ratio(paraphrased_loss, perturbed_losses, mean=mean)
    return math.exp(log_r) if log_r < 709 else math.inf


def choice_probability(loss: float, wrong_losses: list[float]) -> float:
    """p(a) / (p(a) + sum p(w)), without underflow."""
    least = min(loss, *wrong_losses)
    return math.exp(least - loss) / math.fsum(math.exp(least - x) for x in [loss, *wrong_losses])


def ks_p_value(a: list[float], b: list[float]) -> float:
    """Exact two-sided p-value of the two-sample Kolmogorov-Smirnov test, counted in integers.

    Orderings of the pooled samples are lattice paths from (0, 0) to (n, m); the p-value is the
    share of paths that somewhere stray from the diagonal at least as far as the observed one.
    """
    a, b, n, m = sorted(a), sorted(b), len(a), len(b)
    d = max(abs(bisect_right(a, x) * m - bisect_right(b, x) * n) for x in a + b)  # n * m * KS
    if d == 0:
        return 1.0
    inside = [0] * (m + 1)  # paths to (i, j) that stay strictly within d of the diagonal
    for i in range(n + 1):
        before = 0
        for j in range(m + 1):
            here = inside[j] + before if i or j else 1
            before = inside[j] = here if abs(i * m - j * n) < d else 0
    total = math.comb(n + m, n)
    return (total - inside[m]) / total


# --------------------------------------------------------------------------------------- aggregates


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def harmonic_mean(values: list[float]) -> float:
    """0 if any value is 0."""
    return 0.0 if min(values) <= 0 else len(values) / math.fsum(1 / x for x in values)


AGGREGATED = ("em_forget", "rouge_forget", "mia", "em_retain", "rouge_retain")


def aggregate(*, em_forget: float, rouge_forget: float, mia: float, em_retain: float,
              rouge_retain: float) -> float:
    """The paper's aggregate score, from fractions (not percent). [D13]"""
    return mean((1 - em_forget, 1 - rouge_forget, 1 - mia, em_retain, rouge_retain))


def task_aggregate(forget: list[float], retain: list[float]) -> float:
    """SemEval-2025 Task 4: harmonic mean of the retain scores and of 1 - the forget scores."""
    return harmonic_mean([1 - x for x in forget] + list(retain))


# ------------------------------------------------------------------------------ scores of one row
# A row is one of generations.jsonl. Its score is a number; None where it lacks the data: then the
# mean is None too; or a sentence that says why it has none: then it is left out of the mean.


CHOICE = {"paraphrased_answer", "perturbed_answers"}
WORDLESS = "their answers hold no word"


def stored(key: str, row: dict) -> float | None:
    return float(row[key]) if key in row else None


def rouge_score(row, text="generation"):
    if text not in row:
        return None
    return rouge_l(row["answer"], row[text]).recall if rouge_words(row["answer"]) else WORDLESS


def choice_texts(row: dict) -> list[str]:
    """What an answer to the paraphrased question is held against: the truth, then the wrong."""
    return [row["paraphrased_answer"], *row["perturbed_answers"]]


def accuracy_score(row, text="paraphrased_generation", ties="shared"):  # [D11]
    if row["split"] in FACTS:
        return float(contains(row["answer"], row["generation"]))
    if not CHOICE | {text} <= row.keys():
        return None
    near = row.get("closeness", {}).get(text)  # an encoder's, else ROUGE-L's
    if not near and not rouge_words(row["paraphrased_answer"]):
        return WORDLESS
    near = near or [rouge_l(choice, row[text]).f1 for choice in choice_texts(row)]
    return first_is_best(near, ties=ties)


def probability_score(row, key="loss"):
    if row["split"] not in FACTS:
        return math.exp(-row[key]) if key in row else None
    wrong = row.get("perturbed_losses")
    return None if wrong is None else choice_probability(row["loss"], wrong)


def truth_ratio_score(row, mean="geometric"):
    if "perturbed_losses" not in row:
        return None
    log_r = log_truth_ratio(row.get("paraphrased_loss", row["loss"]), row["perturbed_losses"],
                            mean=mean)
    return (math.exp(-abs(log_r)) if row["split"] == "forget"
            else max(0.0, -math.expm1(min(log_r, 0.0))))


# To add a metric: write its score of a row, and give it a line here. Stored rows are enough for it.
Metric = namedtuple("Metric", "score splits lume", defaults=(SPLITS, {}))
COMPLETIONS = dict.fromkeys(FORGET_RETAIN, lambda row: row["kind"] == "sc")
QUESTIONS = dict.fromkeys(FORGET_RETAIN, lambda row: row["kind"] == "qa")
ALL_ROWS = dict.fromkeys(FORGET_RETAIN, lambda row: True)
DOCUMENTS = {"forget": lambda row: "loss" in row}
METRICS = {  # name: score, splits it is averaged over, and on LUME {split: is a row averaged?}
    "rouge_l": Metric(rouge_score, SPLITS, COMPLETIONS),
    "exact_match": Metric(
        lambda row: float(exact_match(row["answer"], row["generation"])), SPLITS, QUESTIONS),
    "accuracy": Metric(accuracy_score),
    "probability": Metric(probability_score, SPLITS, DOCUMENTS),
    "truth_ratio": Metric(truth_ratio_score),
    "truth_ratio_arithmetic": Metric(partial(truth_ratio_score, mean="arithmetic")),
    "repetition": Metric(lambda row: repetition(row["generation"]), SPLITS, ALL_ROWS),
    "ended": Metric(partial(stored, "ended"), SPLITS, ALL_ROWS),
    "accuracy_whole": Metric(partial(accuracy_score, ties="whole"), FORGET_RETAIN),
    "accuracy_ceiling": Metric(partial(accuracy_score, text="answer"), FORGET_RETAIN),
    "paraphrased_rouge_l": Metric(
        partial(rouge_score, text="paraphrased_generation"), FORGET_RETAIN),
    "paraphrased_probability": Metric(
        partial(probability_score, key="paraphrased_question_loss"), FORGET_RETAIN),
    "exact_memorisation": Metric(partial(stored, "exact_memorisation"), FORGET_RETAIN, DOCUMENTS),
    "extraction_strength": Metric(
        partial(stored, "extraction_strength"), FORGET_RETAIN, DOCUMENTS)}
BY_TASK = ("rouge_l", "exact_match")  # on LUME, averaged over each task too
ATTACKS = {  # name: keys under which a row holds its score, higher for members; a loss is negated
    "mia.auc": ("mia", "loss"), **{f"mia.min_{k}": ("mia", "min_k", str(k)) for k in MIN_K},
    "mia.answer_auc": ("answer_mia", "log_p"), "mia.answer_min_40": ("answer_mia", "min_k"),
    "mia.answer_min_40_plus": ("answer_mia", "min_k_plus"),
    "mia.answer_zlib": ("answer_mia", "zlib")}
ANSWER_K = 40  # percent, of mia.answer_min_40, as open-unlearning sets it


# ----------------------------------------------------------------------------- from rows to metrics


class Summary:
    """`values` maps a name like "forget.rouge_l" to a number or None; `notes` says why it is None,
    or how to read it."""

    def __init__(self):
        self.values, self.notes = {}, {}

    def put(self, name: str, value: float | None, note: str | None = None):
        self.values[name] = value
        if note:
            self.notes[name] = note

    def average(self, name: str, rows: list[dict], score: Callable):
        scores, note = [score(row) for row in rows], "" if rows else "no such rows"
        if None in scores:
            return self.put(name, None, f"{scores.count(None)} of {len(rows)} rows lack its data "
                                        "(paraphrase, wrong answers)")
        numbers = [x for x in scores if not isinstance(x, str)]
        if reasons := sorted({x for x in scores if isinstance(x, str)}):
            count = len(rows) - len(numbers)
            note = f"{count} of {len(rows)} rows have none: {'; '.join(reasons)}"
        self.put(name, mean(numbers) if numbers else None, note)

    def derive(self, name: str, formula: Callable, *sources: str):
        """A formula of other values, if all of them are there."""
        if lacking := [source for source in sources if self.values.get(source) is None]:
            self.put(name, None, f"needs {', '.join(lacking)}")
        else:
            self.put(name, formula(*(self.values[source] for source in sources)))


def summarise(rows: list[dict], reference: list[dict] | None = None) -> dict:
    """Every metric of an evaluation from its rows alone, those of generations.jsonl. reference:
    the rows of retain-only, of the same data."""
    about, out = rows[0], Summary()
    benchmark = about["benchmark"]
    add_means(out, rows, benchmark)
    add_membership(out, rows)
    add_against_retain_only(out, rows, reference)
    add_aggregates(out, benchmark)
    if about.get("shared"):
        out.notes["forget"] = f"{about['shared']} of these rows are in the retain set too"
    counts = {split: sum(r["split"] == split for r in rows) for split in about["sizes"]}
    what = "sentence completions" if benchmark == "lume" else "rows"
    return dict(benchmark=benchmark, closeness=about.get("closeness", "rouge"),
                partial=f"at most {about['limit']} rows of each split" if about["limit"] else "",
                counts=counts, members=f"{len(attacked(rows)[0])} {what} of the forget set",
                nonmembers=f"{counts['nonmembers']} {what}: {about['nonmember_source']}",
                values=out.values, notes=out.notes)


def add_means(out: Summary, rows: list[dict], benchmark: str):
    """The mean of every metric over each split, and on LUME over each task."""
    lume = benchmark == "lume"
    for split in SPLITS if benchmark == "tofu" else FORGET_RETAIN:
        of_split = [r for r in rows if r["split"] == split]
        for name, metric in METRICS.items():
            if split in (metric.lume if lume else metric.splits):
                averaged = [r for r in of_split if not lume or metric.lume[split](r)]
                out.average(f"{split}.{name}", averaged, metric.score)
                for task in TASKS if lume and name in BY_TASK else ():
                    out.average(f"{split}.{task}.{name}",
                                [r for r in averaged if r["task"] == task], metric.score)


def attacked(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Members and non-members."""
    return tuple([r for r in rows if r["split"] == split and "mia" in r]
                 for split in ("forget", "nonmembers"))


def attack_scores(rows: list[dict], name: str) -> list[float | None]:
    scores, keys = [], ATTACKS[name]
    for value in rows:
        for key in keys:
            value = value and value.get(key)
        scores.append(-value if keys[-1] == "loss" else value)
    return scores


def add_membership(out: Summary, rows: list[dict]):
    """The attacks [D12] that need no other model's rows."""
    members, nonmembers = attacked(rows)
    if not members or not nonmembers:
        reason = ("the forget rows hold no document" if nonmembers else
                  rows[0]["nonmember_source"])
        for name in (*ATTACKS, "mia.score", "mia.soul"):
            out.put(name, None, reason)
        return
    for name in ATTACKS:
        scores = attack_scores(members, name), attack_scores(nonmembers, name)
        if None in scores[0] + scores[1]:
            out.put(name, None, "some rows hold no scores of their answers")
        else:
            out.put(name, auc(*scores))
    out.put("mia.soul", soul_auc(*(attack_scores(x, "mia.auc") for x in (members, nonmembers))))
    out.derive("mia.score", mia_score, "mia.auc")
    if out.values["mia.auc"] < CHANCE:
        out.notes["mia.auc"] = "below 0.5: over-unlearned, the forgetting itself is detectable"


NO_RETAIN_ONLY = ("no retain-only model: evaluate one that never saw the forget set, then report "
                  "with --retain-only ITS_FOLDER")


def add_against_retain_only(out: Summary, rows: list[dict], reference: list[dict] | None):
    """What compares a model with retain-only, whose rows `reference` are."""
    ideal = Summary()
    if reference:
        add_membership(ideal, reference)
    for name, source, formula in (("mia.distance", "mia.auc", lambda x, y: abs(x - y)),
                                  ("privleak", "mia.answer_min_40", privleak)):
        area, best = out.values[source], ideal.values.get(source)
        if area is None:
            out.put(name, None, out.notes.get(source))
        elif best is None:
            out.put(name, formula(area, CHANCE),
                    "against 0.5, as there is no retain-only model to hold it against")
        else:
            out.put(name, formula(area, best))
    if not reference:
        out.put("mia.answer_reference", None, NO_RETAIN_ONLY)
        return out.put("forget_quality", None, NO_RETAIN_ONLY)
    add_reference_attack(out, rows, reference)
    ours, theirs = forget_ratios(rows), forget_ratios(reference)
    if ours and set(ours) == set(theirs):
        out.put("forget_quality", ks_p_value(list(ours.values()), list(theirs.values())))
    else:
        out.put("forget_quality", None, "retain-only was evaluated on other forget rows, or these "
                "have no paraphrase or wrong answers")


def add_reference_attack(out: Summary, rows: list[dict], reference: list[dict]):
    """The attack by each answer's log P less its log P under retain-only."""
    if out.values["mia.answer_auc"] is None:
        return out.put("mia.answer_reference", None, out.notes.get("mia.answer_auc"))
    members, nonmembers = attacked(reference)
    log_p = {(r["split"], r["id"]): r["answer_mia"]["log_p"]
             for r in members + nonmembers if "answer_mia" in r}
    members, nonmembers = attacked(rows)
    if any((r["split"], r["id"]) not in log_p for r in members + nonmembers):
        return out.put("mia.answer_reference", None, "retain-only was evaluated on other rows")
    out.put("mia.answer_reference", auc(*(
        [r["answer_mia"]["log_p"] - log_p[r["split"], r["id"]] for r in group]
        for group in (members, nonmembers))))


def forget_ratios(rows: list[dict]) -> dict[str, float]:
    """Per forget row, what forget quality compares: log R."""
    return {r["id"]: log_truth_ratio(r["paraphrased_loss"], r["perturbed_losses"])
            for r in rows if r["split"] == "forget" and CHOICE | {"perturbed_losses"} <= r.keys()}


def add_aggregates(out: Summary, benchmark: str):
    """The aggregate score of Tables 1-2 and the benchmarks' overall scores."""
    tofu = benchmark == "tofu"
    sources = {"aggregate": ("accuracy" if tofu else "exact_match", "mia.auc")}  # [D11], [D13]
    if tofu:
        sources |= dict(aggregate_exact_match=("exact_match", "mia.auc"),
                        aggregate_soul=("accuracy", "mia.soul"))
        for suffix in ("", "_arithmetic"):
            add_model_utility(out, f"model_utility{suffix}", f"truth_ratio{suffix}")
    for name, (em, mia) in sources.items():
        out.derive(name, lambda *x: aggregate(**dict(zip(AGGREGATED, x))), f"forget.{em}",
                   "forget.rouge_l", mia, f"retain.{em}", "retain.rouge_l")
    if benchmark == "lume":
        out.derive("task_aggregate", lambda *x: task_aggregate(x[:6], x[6:]), *(
            f"{split}.{task}.{name}" for split in FORGET_RETAIN for task in TASKS
            for name in BY_TASK))


def add_model_utility(out: Summary, name: str, ratio: str):
    factors = {split: [f"{split}.{m}" for m in ("rouge_l", "probability", ratio)]
               for split in SPLITS[1:]}
    if all(out.values[x] is None for x in factors["real_authors"]):  # the demo has none
        del factors["real_authors"]
        out.notes[name] = "harmonic mean of six: there are no real authors"
    out.derive(name, lambda *x: harmonic_mean(x), *sum(factors.values(), []))


# --------------------------------------------------------------------------- what a model is asked

# Per token: -log P in nats; the likeliest id; (log P - mean) / deviation, both of log P over the
# vocabulary (Min-K%++). The last two are empty lists where no details are asked for.
TokenScores = namedtuple("TokenScores", "losses predicted standard")
# A text to be put to the model, and the row and key under which its result is stored.
Text = namedtuple("Text", "row key example")


@torch.inference_mode()
def token_scores(model: Transformer, rows: list[Encoded], first: list[int], *, tokens: int,
                 detailed: list[bool] | None = None) -> list[TokenScores]:
    """Scores of each row's tokens from index first[i] (at least 1) to its end. Rows of like length
    share a padded pass of at most `tokens`, or of one row that is longer."""
    out, lengths = [None] * len(rows), [len(r.ids) for r in rows]
    for batch in data.batches_by_length(lengths, max([tokens, *lengths])):
        T = lengths[batch[0]]  # the longest comes first
        ids = torch.tensor([rows[i].ids + [0] * (T - lengths[i]) for i in batch],
                           device=model.embed_tokens.weight.device)  # [B, T]
        for i, row, h in zip(batch, ids, model.hidden(ids)):  # h [T, D]
            label = row[first[i]:lengths[i]]  # [A]
            log_p = model.logits(h[first[i] - 1:lengths[i] - 1]).log_softmax(-1)  # [A, V]
            label_log_p, details = log_p.gather(1, label[:, None])[:, 0], ([], [])  # [A]
            if detailed and detailed[i]:
                average = (log_p.exp() * log_p).sum(1)
                variance = (log_p.exp() * log_p.square()).sum(1) - average.square()
                standard = (label_log_p - average) / variance.clamp(min=1e-6).sqrt()
                details = log_p.argmax(1).tolist(), standard.tolist()
            out[i] = TokenScores((-label_log_p).tolist(), *details)
    return out


def evaluate_model(model: Transformer, tokenizer, benchmark, *, template: str,
                   limits: Limits, limit: int = 0, generate: Callable = generate,
                   token_scores: Callable = token_scores) -> tuple[dict, list[dict]]:
    """(metrics, rows): `metrics` is `summarise(rows)`, and rows[0] says what was evaluated.
    limit: at most so many rows of each split, spread evenly; marked as partial."""
    rows = rows_of(benchmark, limit)
    verbatim = add_losses(rows, model, tokenizer, template, limits, token_scores)
    add_generations(rows, model, tokenizer, template, limits, generate, verbatim)
    return summarise(rows), rows


def rows_of(benchmark, limit: int = 0) -> list[dict]:
    """The rows to be asked and measured, in types that JSON has; the first describes them all."""
    splits = {"forget": benchmark.forget, "retain": benchmark.retain_eval,
              "real_authors": benchmark.real_authors, "world_facts": benchmark.world_facts,
              "nonmembers": benchmark.nonmembers}
    rows = [{"split": "about", "benchmark": benchmark.kind, "limit": limit,
             "sizes": {k: len(v) for k, v in splits.items()}, "closeness": "rouge",
             "nonmember_source": benchmark.nonmember_source, "shared": benchmark.shared}]
    for split, examples in splits.items():
        if split == "nonmembers" and benchmark.kind == "lume":
            examples = [e for e in examples if e.kind == "sc"]  # the rows that hold a document
        for e in spread(examples, limit):  # of a plain text, its second half is asked for
            fields = json.loads(json.dumps(asdict(data.halved(e) if e.kind == "text" else e)))
            del fields["where"]  # a file of this machine
            rows.append({"split": split} | {k: v for k, v in fields.items()
                                            if v or k in ("id", "question")})
    return rows


def spread(examples: list, limit: int) -> list:
    """At most `limit` of them (0: all), evenly spaced: every task and author has its share."""
    n = len(examples)
    return [examples[i * n // limit] for i in range(limit)] if 0 < limit < n else examples


def example_of(row: dict, question: str, answer: str) -> Example:
    """The Example that puts a question and an answer of a row to the model."""
    return Example(question, answer, id=row["id"], kind=row["kind"],
                   turns=tuple(map(tuple, row.get("turns", ()))))


def texts_of(row: dict, benchmark: str) -> list[Text]:
    """Every text of a row whose loss some metric needs."""
    measured, pairs = row["split"] in SPLITS, []
    if is_attacked(row, benchmark) or (measured and benchmark != "lume"):
        pairs.append(("loss", row["question"], row["answer"]))
    if measured and "paraphrased_answer" in row:
        pairs.append(("paraphrased_loss", row["question"], row["paraphrased_answer"]))
    if measured:
        pairs += [("perturbed_losses", row["question"], wrong)
                  for wrong in row.get("perturbed_answers", ())]
    if measured and "paraphrased_question" in row:
        pairs.append(("paraphrased_question_loss", row["paraphrased_question"], row["answer"]))
    return [Text(row, key, example_of(row, *pair)) for key, *pair in pairs]


def is_attacked(row: dict, benchmark: str) -> bool:
    """Is this a row that the membership attack is about [D12]?"""
    return row["split"] in ("forget", "nonmembers") and (benchmark != "lume" or row["kind"] == "sc")


def add_losses(rows: list[dict], model: Transformer, tokenizer, template: str, limits: Limits,
               token_scores: Callable = token_scores) -> dict:
    """Teacher-forced passes: the loss of each text, and what is made of it (`add_loss`). Returns,
    by row and question, the texts whose answer and eos are the likeliest tokens throughout: greedy
    decoding gives just that answer, and need not run."""
    benchmark, verbatim = rows[0]["benchmark"], {}
    texts = [text for row in rows[1:] for text in texts_of(row, benchmark)]
    encoded = data.encode_for(model.config, [t.example for t in texts], tokenizer, template)
    attacks = [t.key == "loss" and is_attacked(t.row, benchmark) for t in texts]
    first = [1 if attack else e.start for attack, e in zip(attacks, encoded)]
    scores = token_scores(model, encoded, first, tokens=limits.eval_tokens,
                          detailed=[t.key in ("loss", "paraphrased_question_loss") for t in texts])
    for text, e, start, attack, score in zip(texts, encoded, first, attacks, scores):
        check_finite(score.losses, text.row["id"])
        answer = TokenScores(*(x[e.start - start:] for x in score))
        add_loss(text, answer, e.ids[e.start:-1], tokenizer, score.losses if attack else None)
        if answer.predicted == e.ids[e.start:]:
            verbatim[id(text.row), text.example.question] = e
    return verbatim


def add_loss(text: Text, answer: TokenScores, ids: list[int], tokenizer, losses: list | None):
    """`loss` of the answer, its paraphrase or a wrong one (nats per token, eos counted), how much
    of the answer is memorised, and `mia` and `answer_mia`, what the attacks see of a text and of
    its answer. ids: the answer's, without eos; losses: of the whole text, if it is attacked."""
    row, key, loss = text.row, text.key, mean(answer.losses)
    if key == "perturbed_losses":
        row.setdefault(key, []).append(loss)
    else:
        row[key] = loss
    if key == "loss":
        row["exact_memorisation"] = exact_memorisation(answer.predicted[:-1], ids)
        row["extraction_strength"] = extraction_strength(answer.predicted[:-1], ids)
    if losses:
        losses = losses[:-1] or losses  # a document need not end with its excerpt: no eos
        row["mia"] = dict(loss=mean(losses), min_k={str(k): min_k_score(losses, k) for k in MIN_K})
        row["answer_mia"] = dict(
            log_p=-loss, min_k=min_k_score(answer.losses[:-1], ANSWER_K),
            min_k_plus=min_k_score([-x for x in answer.standard[:-1]], ANSWER_K),
            zlib=zlib_score(loss, tokenizer.decode(ids)))


def check_finite(values: list[float], name: str):
    if not all(map(math.isfinite, values)):
        raise UserError(f"the model's loss on row {name} is not a number: its weights are broken; "
                        "make or fetch it again")


def add_generations(rows: list[dict], model: Transformer, tokenizer, template: str, limits: Limits,
                    generate: Callable = generate, verbatim: dict | None = None):
    """Greedy answers to each question, and to each paraphrased one that accuracy needs [D16], and
    whether each ended by itself. verbatim: what `add_losses` returns."""
    asked, prompts, drafts = [], [], []
    for row, key, e in (text for row in rows[1:] for text in questions_of(row)):
        prompt = data.encode_prompt(e.question, tokenizer, template, turns=e.turns, kind=e.kind)
        known = (verbatim or {}).get((id(row), e.question))
        encoded = known or data.encode(e, tokenizer, template)
        answer = encoded.ids[encoded.n_prompt:]
        if (known and encoded.ids[:encoded.n_prompt] == prompt
                and len(answer) <= room(model, prompt, limits)):
            row |= answer_of(key, tokenizer.decode(answer[:-1]), True)
        else:
            asked.append((row, key))
            prompts.append(prompt)
            drafts.append(answer)  # a guess at the generation: it only saves time
    texts = generate(model, prompts, eos_id=tokenizer.eos_ids, drafts=drafts, progress="generate",
                     max_new_tokens=limits.max_new_tokens or None, batch_tokens=limits.eval_tokens,
                     max_total_tokens=limits.max_total_tokens or None)
    for (row, key), prompt, ids in zip(asked, prompts, texts, strict=True):
        row |= answer_of(key, tokenizer.decode(ids), len(ids) < room(model, prompt, limits))


def answer_of(key: str, text: str, ended: bool) -> dict:
    return {key: text} | ({"ended": ended} if key == "generation" else {})


def questions_of(row: dict) -> list[Text]:
    """The questions that a row puts to a model, and the keys for their answers."""
    keys = {"generation": "question"} if row["split"] in SPLITS else {}
    if row["split"] in FORGET_RETAIN and CHOICE | {"paraphrased_question"} <= row.keys():
        keys["paraphrased_generation"] = "paraphrased_question"
    return [Text(row, key, example_of(row, row[question], row["answer"]))
            for key, question in keys.items()]


def room(model: Transformer, prompt: list[int], limits: Limits) -> int:
    """How many tokens `generate` gives a prompt that no eos ends."""
    context = model.config.max_position_embeddings
    total = min(limits.max_total_tokens or context, context) - len(prompt)
    return min(limits.max_new_tokens or total, total)


# -------------------------------------------------------------------------------------- Porter stem
# NLTK's dialect of the Porter stemmer (the one rouge_score uses): Porter (1980) with a few
# irregular words and softer rules. A word's shape is a string of c and v, one per letter.

def pairs(text: str) -> dict[str, str]:
    """Every second word by the one before it; '-' is none."""
    words = [word.strip("-") for word in text.split()]
    return dict(zip(words[::2], words[1::2]))


IRREGULAR = pairs("skies sky sky sky dying die lying lie tying tie news news innings inning inning "
                  "inning outings outing outing outing cannings canning canning canning howe howe "
                  "proceed proceed exceed exceed succeed succeed")
STEP2 = pairs("ational ate tional tion enci ence anci ance izer ize bli ble alli al entli ent eli "
              "e ousli ous ization ize ation ate ator ate alism al iveness ive fulness ful ousness "
              "ous aliti al iviti ive biliti ble fulli ful logi log")
STEP3 = pairs("icate ic ative - alize al iciti ic ical ic ful - ness -")
STEP4 = dict.fromkeys("al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive "
                      "ize".split(), "")


def shape(word: str) -> str:
    """'toy' -> 'cvc': y is a vowel after a consonant, a consonant otherwise."""
    out = ""
    for letter in word:
        out += "v" if letter in "aeiou" or (letter == "y" and out[-1:] == "c") else "c"
    return out


def measure(stem: str) -> int:
    """Porter's m: how often a vowel is followed by a consonant."""
    return shape(stem).count("vc")


def is_short(stem: str) -> bool:
    """Porter's *o, 'hop' or 'of': a final e belongs on such a stem."""
    return shape(stem) == "vc" or (shape(stem)[-3:] == "cvc" and stem[-1] not in "wxy")


def swap(word: str, table: dict[str, str], least: int) -> str:
    """Replace the longest suffix found in the table if the stem before it has measure >= least."""
    size = next((n for n in range(min(7, len(word)), 1, -1) if word[-n:] in table), 0)
    stem, suffix = word[:len(word) - size], word[len(word) - size:]
    m = measure(stem + "l" if suffix == "logi" else stem)  # so that 'geologi' loses its i
    fits = size and m >= least and (suffix != "ion" or stem[-1:] in ("s", "t"))
    return stem + table[suffix] if fits else word


def uninflected(word: str) -> str:
    """The word without -s, -ed and -ing (steps 1a and 1b)."""
    if word.endswith("s") and not word.endswith("ss"):
        long = word.endswith("sses") or (word.endswith("ies") and len(word) > 4)
        word = word[:-2] if long else word[:-1]
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    stem = word[:-2] if word.endswith("ed") else word[:-3] if word.endswith("ing") else ""
    if "v" not in shape(stem):
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1:] == stem[-2:-1] and shape(stem)[-1] == "c":
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if measure(stem) == 1 and is_short(stem) else stem


@lru_cache(maxsize=1 << 16)  # looping generations repeat a few words thousands of times
def porter_stem(word: str) -> str:
    """The Porter stem, as nltk.stem.PorterStemmer() gives it: 'relational' -> 'relat'."""
    word = word.lower()
    if word in IRREGULAR or len(word) <= 2:
        return IRREGULAR.get(word, word)
    word = uninflected(word)
    if word.endswith("y") and len(word) > 2 and shape(word)[-2] == "c":  # step 1c
        word = word[:-1] + "i"
    if word.endswith("alli") and measure(word[:-4]) > 0:  # 'rationalli' -> 'rational' -> 'ration'
        word = word[:-2]
    word = swap(swap(swap(word, STEP2, 1), STEP3, 1), STEP4, 2)
    stem = word[:-1]
    if word.endswith("e") and (measure(stem) > 1 or (measure(stem) == 1 and not is_short(stem))):
        word = stem  # step 5
    return word[:-1] if word.endswith("ll") and measure(word[:-1]) > 1 else word
