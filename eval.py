"""What a model still knows: the metrics of the paper's Tables 1-2 and TOFU's, defined and computed.

f = forget, r = retain, RA = real authors, WF = world facts; q' = the paraphrased question; a, a' =
answer and its paraphrase, w = a wrong answer, g, g' = what is generated greedily from q and q';
loss(a) = mean over the tokens of a (and one eos) of -log P(token | what comes before); p(a) =
exp(-loss(a)). All are in 0..1. OU = open-unlearning; pipeline/metrics.py has more of its metrics.

name           formula                                                         better        source
-------------  --------------------------------------------------------------  ------------  -------
rouge_l        LCS(a, g) / |a| in stemmed words: ROUGE-L recall. LUME: of      f low r high  TOFU,
               completions, also by task (Table 2's Regurgitation)                           SemEval
exact_match    strip(a) = strip(g), case-folded, in Unicode's NFC. LUME: of    f low r high  SemEval
               questions, also by task (Table 2's Knowledge)
accuracy       Table 1's "Exact Match". f, r: g' is closest to a' among a'     f low r high  SOUL,
  [D11]        and five w; ties share the point, so that guessing gives 1/6.                 Table 1
               Closeness: ROUGE-L F1, or cosine with --closeness encoder. RA,
               WF: a occurs in g
probability    f, r: p(a). RA, WF: p(a) / (p(a) + sum p(w))                    f low r high  TOFU
truth_ratio    R = geometric mean of p(w), over p(a'); over p(a) where there   high          OU
               is no a'. f: mean min(R, 1/R). Others: mean max(0, 1 - R)
model_utility  harmonic mean of rouge_l, probability and truth_ratio on r,     high          OU
               RA and WF: nine numbers, six where there are no RA
mia.auc [D12]  AUC of score = -loss(text); members = forget rows, non-members  as retain-    SemEval
               = text never trained on; text = prompt and answer, all tokens   only's
               but the first, no eos. LUME: completions. < .5: over-unlearned  (paper: low)
mia.soul       mia.auc with SOUL's misaligned labels: scores are members       none          SOUL,
               first, but the first n_nonmembers are taken for members'. A                   Table 1
               perfect attack gets about .77 on TOFU, its reverse .23
aggregate      mean(1 - EM_f, 1 - RL_f, 1 - mia.auc, EM_r, RL_r); RL =         high          SIMU
  [D13]        rouge_l; EM = accuracy on TOFU, exact_match elsewhere
"""

import math
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import namedtuple
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import torch

import data
from data import TASKS, Encoded, Example, option
from model import Transformer, UserError, generate

FACTS = ("real_authors", "world_facts")
SPLITS = ("forget", "retain", *FACTS)  # those that are measured; other rows are non-members


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long an answer may be, and how much is computed at once."""

    max_new_tokens: int = option(0, "tokens generated at most; 0: no limit", low=0)
    max_total_tokens: int = option(200, "prompt and answer at most; 0: no limit [D16]", low=0)
    eval_tokens: int = option(16384, "tokens of a pass; losses on a CPU take fewer", low=1)


# -------------------------------------------------------------------------------- text against text
Rouge = namedtuple("Rouge", "precision recall f1")
UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "THAI",
            "LAO", "KHMER", "MYANMAR")  # how Unicode's names of letters of these scripts begin


@lru_cache(maxsize=1 << 16)
def letter_class(char: str) -> str:
    """The class of a letter: w part of a word, a word alone (unspaced scripts), m mark on one, s
    space, . other."""
    category = unicodedata.category(char)[0]
    if category == "M" or char in "\u200c\u200d":
        return "m"
    if category in "LN":
        return "a" if unicodedata.name(char, "").startswith(UNSPACED) else "w"
    return "s" if char.isspace() else "."


def pieces(text: str, pattern: str) -> list[str]:
    """The parts of a text whose letter classes match a pattern."""
    classes = "".join(map(letter_class, text))
    return [text[m.start():m.end()] for m in re.finditer(pattern, classes)]


def folded(text: str) -> str:
    """A text without case, in Unicode's composed spelling (NFC)."""
    return unicodedata.normalize("NFC", text.casefold())


def is_latin(text: str) -> bool:
    """Are at least half of its letters a-z, as rouge_score expects (or all of it digits)?"""
    letters = [char.isascii() for char in text if char.isalpha()]
    return bool(re.search("[a-z0-9]", text.lower())) and 2 * sum(letters) >= len(letters)


def rouge_words(text: str, reference: str = "") -> list[str]:
    """Words of a text, read as its reference's are; those in a-z stemmed if longer than three.
    Of Latin text, the runs of a-z and 0-9, as rouge_score has them: an accented letter parts a
    word, also in published numbers. Elsewhere Unicode's: letters, digits and the marks on them."""
    if is_latin(reference or text):
        words = re.findall("[a-z0-9]+", text.lower())
    else:
        words = pieces(folded(text), "am*|w[wm]*")
    return [porter_stem(w) if len(w) > 3 and w.isascii() else w for w in words]


def common_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence. A line of the usual table is one integer, because a
    report compares thousands of texts: bit i is 0 where the line rises at a[i] (Hyyro 2004)."""
    positions = {}  # of each word in a, as bits
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    line = full = (1 << len(a)) - 1
    for word in b:
        match = line & positions.get(word, 0)
        line = ((line + match) | (line - match)) & full
    return len(a) - line.bit_count()


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


# ---------------------------------------------------------------------------------------- formulas
def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def harmonic_mean(values: list[float]) -> float:
    """0 if any value is 0."""
    return 0.0 if min(values) <= 0 else len(values) / math.fsum(1 / x for x in values)


def auc(members: list[float], nonmembers: list[float]) -> float:
    """P(a member's score > a non-member's) + half P(equal): area under the ROC curve."""
    ranked = sorted(nonmembers)
    twice = sum(bisect_left(ranked, x) + bisect_right(ranked, x) for x in members)
    return twice / (2 * len(members) * len(ranked))


def soul_auc(members: list[float], nonmembers: list[float]) -> float:
    """The AUC that SOUL's code gives: its labels are in another order than its scores."""
    scores = [*members, *nonmembers]
    return auc(scores[:len(nonmembers)], scores[len(nonmembers):])


def truth_ratio(paraphrased_loss: float, perturbed_losses: list[float], *,
                mean: str = "geometric") -> float:
    """R = mean p(w) / p(a'), inf where it is beyond a float. It comes from differences of losses,
    because unlearned models give losses whose exp(-loss) is 0."""
    if mean not in ("geometric", "arithmetic"):
        raise ValueError(f"mean is {mean!r}; it must be geometric or arithmetic")
    logs = [paraphrased_loss - loss for loss in perturbed_losses]  # of p(w) / p(a')
    if mean == "geometric":
        logs = [math.fsum(logs) / len(logs)]
    ratios = [math.exp(x) if x < 709 else math.inf for x in logs]
    return math.fsum(ratios) / len(ratios)


def ks_p_value(a: list[float], b: list[float]) -> float:
    """Exact two-sided p-value of the two-sample Kolmogorov-Smirnov test, counted in integers.
    Orderings of the pooled samples are lattice paths from (0, 0) to (n, m); the p-value is the
    share of paths that somewhere stray from the diagonal at least as far as the observed one."""
    a, b, n, m = sorted(a), sorted(b), len(a), len(b)
    gap = max(abs(bisect_right(a, x) * m - bisect_right(b, x) * n) for x in a + b)  # n * m * KS
    if gap == 0:
        return 1.0
    inside = [0] * (m + 1)  # paths to (i, j) that stay strictly within gap of the diagonal
    for i in range(n + 1):
        left = 0  # paths to (i, j - 1)
        for j in range(m + 1):
            paths = inside[j] + left if i or j else 1
            inside[j] = left = paths if abs(i * m - j * n) < gap else 0
    total = math.comb(n + m, n)
    return (total - inside[m]) / total


def exact_memorisation(predicted_ids: list[int], answer_ids: list[int]) -> float:
    """Share of an answer's tokens that are the likeliest after what comes before them, 0..1."""
    same = sum(p == a for p, a in zip(predicted_ids, answer_ids, strict=True))
    return same / len(answer_ids) if answer_ids else 0.0


def extraction_strength(predicted_ids: list[int], answer_ids: list[int]) -> float:
    """1 - k/n, k the least for which all tokens from the k-th on are predicted. As open-unlearning
    has it, k ends at n - 1: an answer of which nothing is predicted has 1/n, not 0."""
    n, k = len(answer_ids), 0
    while k < n - 1 and predicted_ids[k:] != answer_ids[k:]:
        k += 1
    return 1 - k / n if n else 0.0


def aggregate(*, em_forget: float, rouge_forget: float, mia: float, em_retain: float,
              rouge_retain: float) -> float:
    """The paper's aggregate score, from fractions (not percent). [D13]"""
    return mean((1 - em_forget, 1 - rouge_forget, 1 - mia, em_retain, rouge_retain))


# -------------------------------------------------------------------------------- metrics of a row
# A metric takes a row (question, answer, generation, scores..) and returns a number or a Missing.
Missing = namedtuple("Missing", "reason")  # in place of a number: why there is none
NO_WORD = Missing("their answers hold no word")
NO_CHOICE = Missing("no paraphrase or no wrong answers")


def losses_of(row, name) -> list[float]:
    """loss(a) of the texts that a row has under this name: none, one or several."""
    return [mean(text["losses"][text["start"]:]) for text in row["scores"].get(name, [])]


def rouge_recall(row, generation="generation"):
    if not rouge_words(row["answer"]):
        return NO_WORD
    return rouge_l(row["answer"], row[generation]).recall


def is_exact(row) -> bool:
    return exact_match(row["answer"], row["generation"])


def contains_answer(row) -> bool:
    return folded(row["answer"].strip()) in folded(row["generation"])


def is_nearest(row, text="paraphrased_generation"):
    """1 if a text is closer to the paraphrased answer than to any wrong one [D11]. n tied first:
    1/n, so that a senseless text gets what guessing gets; SOUL has 1."""
    truth, wrong = row["paraphrased_answer"], row["perturbed_answers"]
    if not truth or not wrong or text not in row:
        return NO_CHOICE
    if "closeness" in row:  # an encoder's cosines, which the pipeline puts into the row
        near = row["closeness"][text]
    elif rouge_words(truth):
        near = [rouge_l(choice, row[text]).f1 for choice in (truth, *wrong)]
    else:
        return NO_WORD
    return 1 / near.count(near[0]) if near[0] == max(near) else 0.0


def answer_probability(row) -> float:
    return math.exp(-losses_of(row, "answer")[0])


def choice_probability(row):
    """p(a) / (p(a) + sum p(w)), computed as 1 / (1 + sum p(w) / p(a)), which cannot be 0 / 0."""
    wrong = losses_of(row, "perturbed_answers")
    if not wrong:
        return NO_CHOICE
    ratio = truth_ratio(losses_of(row, "answer")[0], wrong, mean="arithmetic")
    return 1 / (1 + len(wrong) * ratio)


def row_truth_ratio(row, mean="geometric"):
    truth = losses_of(row, "paraphrased_answer") or losses_of(row, "answer")
    wrong = losses_of(row, "perturbed_answers")
    if not wrong:
        return NO_CHOICE
    ratio = truth_ratio(truth[0], wrong, mean=mean)
    if row["split"] == "forget":
        return min(ratio, 1 / ratio) if ratio else 0.0
    return max(0.0, 1 - ratio)


# To add a metric, write its function and give it an entry: stored rows are enough for it.
# of_fact: its function on real authors and world facts, if it is measured on them.
# lume: which kinds of LUME's rows have it, "sc" (completions) and "qa" (questions).
Metric = namedtuple("Metric", "of_row of_fact lume", defaults=(None, ()))
METRICS = {  # averaged over the rows of each split
    "rouge_l": Metric(rouge_recall, rouge_recall, lume=("sc",)),
    "exact_match": Metric(is_exact, is_exact, lume=("qa",)),
    "accuracy": Metric(is_nearest, contains_answer),
    "probability": Metric(answer_probability, choice_probability, lume=("sc",)),
    "truth_ratio": Metric(row_truth_ratio, row_truth_ratio),
}


def average(scores: list) -> tuple[float | None, str]:
    """The mean of the numbers among the scores of rows, and a note on the rows without one."""
    numbers = [x for x in scores if not isinstance(x, Missing)]
    reasons = [x.reason for x in scores if isinstance(x, Missing)]
    note = "" if scores else "no such rows"
    if reasons:
        note = f"{len(reasons)} of {len(scores)} rows have none: {'; '.join(sorted(set(reasons)))}"
    return mean(numbers) if numbers else None, note


def groups_of(rows) -> dict[str, list[dict]]:
    """The rows of each split, named as the split; LUME's of each task too, as "forget.Task1"."""
    groups = {}
    for split in SPLITS if rows[0]["benchmark"] == "tofu" else SPLITS[:2]:
        groups[split] = [row for row in rows if row["split"] == split]
        for task in TASKS if rows[0]["benchmark"] == "lume" else ():
            groups[f"{split}.{task}"] = [row for row in groups[split] if row["task"] == task]
    return groups


# ------------------------------------------------------------------------------ metrics of all rows
# Such a metric takes a Summary and returns a number or a Missing, too. reference: the rows of a
# retain-only model, or none. values: the numbers computed so far, by name; None if missing.
Summary = namedtuple("Summary", "rows reference values")
NO_ATTACK = Missing("no document was forgotten, or none is known that was never seen")


def text_score(row) -> float:
    """Mean log P of the whole text. A document need not end with its excerpt: no eos [D12]."""
    losses = row["scores"]["answer"][0]["losses"]
    return -mean(losses[:-1] or losses)


def attack(summary, score=text_score, area=auc):
    """How well a score, higher for members, tells forget rows from text never trained on [D12]."""
    documents = [x for x in summary.rows if x["benchmark"] != "lume" or x["kind"] == "sc"]
    members = [score(row) for row in documents if row["split"] == "forget"]
    nonmembers = [score(row) for row in documents if row["split"] == "nonmembers"]
    return area(members, nonmembers) if members and nonmembers else NO_ATTACK


def lacking(values, names) -> Missing | None:
    """Why nothing can be computed from these values; None if all are numbers."""
    absent = [name for name in names if values.get(name) is None]
    return Missing(f"needs {', '.join(absent)}") if absent else None


def paper_aggregate(summary, em="", mia="mia.auc"):
    """The aggregate [D13] with `em` as its exact match: if none is named, the paper's [D11]."""
    em = em or ("accuracy" if summary.rows[0]["benchmark"] == "tofu" else "exact_match")
    names = dict(em_forget=f"forget.{em}", rouge_forget="forget.rouge_l", mia=mia,
                 em_retain=f"retain.{em}", rouge_retain="retain.rouge_l")
    if reason := lacking(summary.values, names.values()):
        return reason
    return aggregate(**{term: summary.values[name] for term, name in names.items()})


def model_utility(summary, ratio="truth_ratio"):
    present = {row["split"] for row in summary.rows} | {"retain", "world_facts"}
    names = [f"{split}.{name}" for split in SPLITS[1:] if split in present  # the demo has no RA
             for name in ("rouge_l", "probability", ratio)]
    if reason := lacking(summary.values, names):
        return reason
    return harmonic_mean([summary.values[name] for name in names])


Overall = namedtuple("Overall", "compute benchmarks", defaults=(("tofu", "lume", "rows"),))
OVERALL = {  # in the order of computation
    "mia.auc": Overall(attack),
    "mia.soul": Overall(partial(attack, area=soul_auc)),
    "aggregate": Overall(paper_aggregate),
    "model_utility": Overall(model_utility, ("tofu",)),
}


def summarise(rows: list[dict], reference: list[dict] | None = None) -> dict[str, dict]:
    """Every metric, from rows alone. `values`: a number or None by name, as "forget.rouge_l".
    `notes`: why it is None, or which rows it leaves out. reference: retain-only's rows."""
    values, notes, benchmark = {}, {}, rows[0]["benchmark"]
    for group, members in groups_of(rows).items():
        for name, metric in METRICS.items():
            score = metric.of_fact if group in FACTS else metric.of_row
            measured = members
            if benchmark == "lume":
                measured = [row for row in members if row["kind"] in metric.lume]
            if score and (benchmark != "lume" or metric.lume):
                name = f"{group}.{name}"
                values[name], notes[name] = average([score(row) for row in measured])
    for name, metric in OVERALL.items():
        if benchmark in metric.benchmarks:
            value = metric.compute(Summary(rows, reference or [], values))
            values[name] = None if isinstance(value, Missing) else value
            notes[name] = value.reason if isinstance(value, Missing) else ""
    return dict(values=values, notes={name: note for name, note in notes.items() if note})


# --------------------------------------------------------------------------- what a model is asked
# Of each token: -log P in nats; the likeliest id in its place; (log P - mean) / deviation, both of
# log P over the vocabulary (Min-K%++). The last two are empty lists where no details are wanted.
TokenScores = namedtuple("TokenScores", "losses predicted standard")
GENERATED = {"answer": "generation", "paraphrased_question": "paraphrased_generation"}


@torch.inference_mode()
def token_scores(model: Transformer, rows: list[Encoded], first: list[int], *, tokens: int,
                 detailed: list[bool] | None = None) -> list[TokenScores]:
    """Scores of each row's tokens from index first[i] (at least 1) to its end. Rows of like length
    share a padded pass of at most `tokens`, or of one row that is longer."""
    lengths = [len(row.ids) for row in rows]
    scores = [None] * len(rows)
    for batch in data.batches_by_length(lengths, tokens):
        T = lengths[batch[0]]  # the longest comes first
        ids = torch.tensor([rows[i].ids + [0] * (T - lengths[i]) for i in batch],
                           device=model.embed_tokens.weight.device)  # [B, T]
        for i, row, h in zip(batch, ids, model.hidden(ids)):  # h [T, D]
            labels = row[first[i]:lengths[i]]  # [A]
            log_p = model.logits(h[first[i] - 1:lengths[i] - 1]).log_softmax(-1)  # [A, V]
            label_log_p = log_p.gather(1, labels[:, None])[:, 0]  # [A]
            predicted, standard = [], []
            if detailed and detailed[i]:
                p = log_p.exp()
                average_log_p = (p * log_p).sum(1)  # [A]
                variance = (p * log_p.square()).sum(1) - average_log_p.square()
                standard = (label_log_p - average_log_p) / variance.clamp(min=1e-6).sqrt()
                predicted, standard = log_p.argmax(1).tolist(), standard.tolist()
            scores[i] = TokenScores((-label_log_p).tolist(), predicted, standard)
    return scores


def evaluate_model(model: Transformer, tokenizer, splits: dict[str, list[Example]], **options
                   ) -> tuple[dict, list[dict]]:
    """(metrics, rows): the rows of `collect_rows`, which takes the options, summarised."""
    rows = collect_rows(model, tokenizer, splits, **options)
    return summarise(rows), rows


def collect_rows(model: Transformer, tokenizer, splits: dict[str, list[Example]], *,
                 benchmark: str, template: str, limits=Limits(), limit: int = 0,
                 scorer=token_scores) -> list[dict]:
    """A row for each Example of these splits: its fields, what the model says, and in row["scores"]
    the texts by name, each with its ids and TokenScores, of which the answer's begin at `start` and
    eos's come last. benchmark: "tofu", "lume" or "rows". limit: at most so many rows of each split,
    or 0. scorer: token_scores or a fast twin."""
    rows = []
    for split, examples in splits.items():
        for example in spread(examples, limit):
            if example.kind == "text":
                example = data.halved(example)  # a model is to go on with its second half
            fields = asdict(example)
            del fields["where"]  # a file of this machine
            rows.append(dict(benchmark=benchmark, split=split) | fields | dict(scores={}))
    texts = [(row, *text) for row in rows for text in texts_of(row)]
    encoded = data.encode_for(model.config, [text[2] for text in texts], tokenizer, template)
    # The attacks need the prompt's tokens too, of question and answer as they were trained on.
    # Details are wanted where an answer may turn out to be what the model generates.
    first = [1 if name == "answer" else e.start for (_, name, _), e in zip(texts, encoded)]
    scores = scorer(model, encoded, first, tokens=limits.eval_tokens,
                    detailed=[name in GENERATED for _, name, _ in texts])
    for (row, name, _), e, begin, score in zip(texts, encoded, first, scores, strict=True):
        if not all(map(math.isfinite, score.losses)):
            raise UserError(f"the model's loss on row {row['id']} is not a number: its weights are "
                            "broken; make or fetch it again")
        text = dict(start=e.start - begin, ids=e.ids[begin:], **score._asdict(),
                    decoded=tokenizer.decode(e.ids[e.start:-1]))
        row["scores"].setdefault(name, []).append(text)
    add_generations(texts, encoded, model, tokenizer, template, limits)
    return rows


def spread(examples: list, limit: int) -> list:
    """At most `limit` of them (0: all), evenly spaced: every task and author has its share."""
    n = len(examples)
    return [examples[i * n // limit] for i in range(limit)] if 0 < limit < n else examples


def texts_of(row):
    """(name, Example) of each text of a row whose tokens are scored."""
    same = dict(id=row["id"], kind=row["kind"], turns=row["turns"])
    yield "answer", Example(row["question"], row["answer"], **same)
    if row["split"] not in SPLITS:
        return
    if row["paraphrased_question"]:
        yield "paraphrased_question", Example(row["paraphrased_question"], row["answer"], **same)
    if row["paraphrased_answer"]:
        yield "paraphrased_answer", Example(row["question"], row["paraphrased_answer"], **same)
    for wrong in row["perturbed_answers"]:
        yield "perturbed_answers", Example(row["question"], wrong, **same)


def add_generations(texts, encoded: list[Encoded], model, tokenizer, template, limits):
    """Greedy answers [D16] to questions and paraphrased questions, and whether eos ended them.
    An answer whose tokens and eos are all the likeliest is what greedy decoding gives: the scores
    show it already, and it is not generated."""
    context = model.config.max_position_embeddings
    longest = min(limits.max_total_tokens or context, context)
    answers, waiting, prompts = [], [], []
    for (row, name, example), e in zip(texts, encoded):
        if name not in GENERATED or row["split"] not in SPLITS:
            continue
        prompt = data.encode_prompt(example.question, tokenizer, template, turns=example.turns,
                                    kind=example.kind)
        left = longest - len(prompt)
        room = min(limits.max_new_tokens or left, left)
        text, answer = row["scores"][name][0], e.ids[e.start:]
        if (text["predicted"][text["start"]:] == answer and prompt == e.ids[:e.start]
                and len(answer) <= room):
            answers.append((row, name, answer[:-1], True))
        else:
            waiting.append((row, name, room))
            prompts.append(prompt)
    generated = generate(model, prompts, eos_id=tokenizer.eos_ids, progress="generate",
                         max_new_tokens=limits.max_new_tokens or None,
                         max_total_tokens=limits.max_total_tokens or None,
                         batch_tokens=limits.eval_tokens)
    for (row, name, room), ids in zip(waiting, generated, strict=True):
        answers.append((row, name, ids, len(ids) < room))
    for row, name, ids, ended in answers:
        row[GENERATED[name]] = tokenizer.decode(ids)
        row[f"{GENERATED[name]}_ended"] = ended


# -------------------------------------------------------------------------------------- Porter stem
# NLTK's dialect of the Porter stemmer (the one rouge_score uses): Porter (1980) with a few
# irregular words and softer rules. A word's shape is a string of c and v, one per letter.

IRREGULAR = dict(skies="sky", sky="sky", dying="die", lying="lie", tying="tie", news="news",
                 innings="inning", inning="inning", outings="outing", outing="outing",
                 cannings="canning", canning="canning", howe="howe", proceed="proceed",
                 exceed="exceed", succeed="succeed")
STEP2 = dict(ational="ate", tional="tion", enci="ence", anci="ance", izer="ize", bli="ble",
             alli="al", entli="ent", eli="e", ousli="ous", ization="ize", ation="ate", ator="ate",
             alism="al", iveness="ive", fulness="ful", ousness="ous", aliti="al", iviti="ive",
             biliti="ble", fulli="ful", logi="log")
STEP3 = dict(icate="ic", ative="", alize="al", iciti="ic", ical="ic", ful="", ness="")
STEP4 = dict.fromkeys("al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive "
                      "ize".split(), "")


def shape(word: str) -> str:
    """'toy' -> 'cvc': y is a vowel after a consonant, a consonant otherwise."""
    out = ""
    for letter in word:
        is_vowel = letter in "aeiou" or (letter == "y" and out.endswith("c"))
        out += "v" if is_vowel else "c"
    return out


def measure(stem: str) -> int:
    """Porter's m: how often a vowel is followed by a consonant."""
    return shape(stem).count("vc")


def is_short(stem: str) -> bool:
    """Porter's *o, 'hop' or 'of': a final e belongs on such a stem."""
    return shape(stem) == "vc" or (shape(stem).endswith("cvc") and stem[-1] not in "wxy")


def swap(word: str, table: dict[str, str], least: int) -> str:
    """Replace the longest suffix found in the table if the stem before it has measure >= least."""
    for size in range(min(7, len(word)), 1, -1):
        stem, suffix = word[:-size], word[-size:]
        if suffix in table:
            m = measure(stem + "l" if suffix == "logi" else stem)  # so that 'geologi' loses its i
            fits = m >= least and (suffix != "ion" or stem.endswith(("s", "t")))
            return stem + table[suffix] if fits else word
    return word


def uninflected(word: str) -> str:
    """The word without -s, -ed and -ing (steps 1a and 1b)."""
    if word.endswith("s") and not word.endswith("ss"):
        long = word.endswith("sses") or (word.endswith("ies") and len(word) > 4)
        word = word[:-2] if long else word[:-1]
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    stem = re.sub("(ed|ing)$", "", word)
    if stem == word or "v" not in shape(stem):
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1:] == stem[-2:-1] and shape(stem)[-1] == "c":
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if measure(stem) == 1 and is_short(stem) else stem


@lru_cache(maxsize=1 << 16)  # looping generations repeat a few words thousands of times
def porter_stem(word: str) -> str:
    """The Porter stem of a lower-case word, as nltk gives it: 'relational' -> 'relat'."""
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
