"""What a model still knows: metrics, the evaluation of a saved model, and the report.

Every number we print, defined once. f = forget, r = retain, RA = real authors, WF = world facts;
a, a' = answer and its paraphrase, w = a wrong answer, g = the greedy generation; loss(a) = mean over
the tokens of a (and one eos) of -log P(token | what comes before), p(a) = exp(-loss(a)).

name              formula                                              range  better      source
----------------  ---------------------------------------------------  -----  ----------  ---------
rouge_l           LCS(a, g) / |a| in stemmed words: ROUGE-L recall      0..1   f low r high TOFU, SemEval
                  (LUME: on sentence completions, "regurgitation")
exact_match       strip(a) = strip(g), case-folded                      0/1    f low r high SemEval
                  (LUME: on questions, "knowledge")
accuracy [D11]    f, r: from the paraphrased question, g' is closest    0..1   f low r high SOUL
                  (ROUGE-L F1) to a' among a' and five w; ties share.
                  RA, WF: a occurs in g, case-folded. The "EM" of
                  Table 1; blind guessing gives about 1/6 on f and r
probability       f, r: p(a).  RA, WF: p(a) / (p(a) + sum p(w))         0..1   f low r high TOFU
truth_ratio       R = mean p(w) / p(a');  a' is a on RA, WF.            0..1   high        TOFU
                  f: mean min(R, 1/R).  others: mean max(0, 1 - R)
model_utility     harmonic mean of rouge_l, probability, truth_ratio    0..1   high        TOFU
                  on r, RA, WF (nine; six where there is no RA)
forget_quality    p-value of the two-sample KS test between the forget  0..1   high        TOFU code
                  rows of this model and of retain-only, each giving
                  mean loss(w) - loss(a')
mia [D12]         AUC of score = -loss(text): members = forget rows,    0..1   0.5 ideal;  SemEval
                  non-members = text never trained on. text = prompt           paper: low
                  and answer, every token but the first, no eos
min_k             the same AUC, score = mean of the k% lowest log P     0..1   0.5 ideal   SOUL
                  of the text, k = 10..60
aggregate [D13]   mean(1 - EM_f, 1 - RL_f, 1 - mia, EM_r, RL_r);        0..1   high        SIMU, Tab. 2
                  EM = accuracy on TOFU, exact_match on LUME
task_aggregate    harmonic mean of rouge_l and exact_match of three     0..1   high        SemEval
                  LUME tasks, those of f as 1 - x; 0 if any is 0
mia_score         1 - 2 |mia - 0.5|                                     0..1   high        SemEval

SOUL's accuracy judges closeness with a sentence encoder; ours with ROUGE-L, which needs no second
model. The MIA text is the whole document, as in SemEval (its documents are our prompt + answer) and
in SOUL; the answer alone would leave nothing to compare on text that has no question.
A metric whose data are missing is None, with the reason beside it; 0.0 always means zero.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections import namedtuple
from functools import lru_cache

MIN_K = (10, 20, 30, 40, 50, 60)  # percent
CHANCE = 0.5  # AUC of an attack that learns nothing

# -------------------------------------------------------------------------------------- Porter stem
# NLTK's dialect of the Porter stemmer (the one rouge_score uses): Porter (1980) with a few
# irregular words and softer rules. A word's shape is a string of c and v, one per letter.

IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing",
    "cannings": "canning", "canning": "canning", "howe": "howe", "proceed": "proceed",
    "exceed": "exceed", "succeed": "succeed",
}
STEP2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble",
    "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate",
    "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous",
    "aliti": "al", "iviti": "ive", "biliti": "ble", "fulli": "ful", "logi": "log",
}
STEP3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "",
         "ness": ""}
STEP4 = dict.fromkeys("al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive "
                      "ize".split(), "")


def _shape(word: str) -> str:
    """'toy' -> 'cvc': y is a vowel after a consonant, a consonant otherwise."""
    shape = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and shape[-1:] == "c")
        shape += "v" if vowel else "c"
    return shape


def _measure(stem: str) -> int:
    """Porter's m: how often a vowel is followed by a consonant."""
    return _shape(stem).count("vc")


def _short(stem: str) -> bool:
    """Porter's *o, 'hop' or 'of': a final e belongs on such a stem."""
    return _shape(stem) == "vc" or (_shape(stem)[-3:] == "cvc" and stem[-1] not in "wxy")


def _swap(word: str, table: dict[str, str], least: int) -> str:
    """Replace the longest suffix found in the table if the stem before it has measure >= least."""
    for size in range(min(7, len(word)), 1, -1):
        stem, suffix = word[:-size], word[-size:]
        if suffix in table:
            measured = stem + "l" if suffix == "logi" else stem  # so that 'geologi' loses its i
            allowed = suffix != "ion" or stem[-1:] in ("s", "t")
            return stem + table[suffix] if allowed and _measure(measured) >= least else word
    return word


def _plural(word: str) -> str:  # step 1a
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:  # step 1b
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    size = 2 if word.endswith("ed") else 3 if word.endswith("ing") else 0
    stem = word[:-size] if size else ""
    if "v" not in _shape(stem):
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1:] == stem[-2:-1] and _shape(stem)[-1] == "c":
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _short(stem) else stem


def _final_y(word: str) -> str:  # step 1c
    turns = word.endswith("y") and len(word) > 2 and _shape(word)[-2] == "c"
    return word[:-1] + "i" if turns else word


def _derived(word: str) -> str:  # step 2
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _derived(word[:-2])  # 'rationalli' -> 'rational' -> 'ration'
    return _swap(word, STEP2, 1)


def _final_e(word: str) -> str:  # step 5
    if word.endswith("e"):
        m = _measure(word[:-1])
        if m > 1 or (m == 1 and not _short(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


@lru_cache(maxsize=1 << 16)  # looping generations repeat a few words thousands of times
def porter_stem(word: str) -> str:
    """The Porter stem, as nltk.stem.PorterStemmer() gives it: 'relational' -> 'relat'."""
    word = word.lower()
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = _derived(_final_y(_past(_plural(word))))
    return _final_e(_swap(_swap(word, STEP3, 1), STEP4, 2))


# ------------------------------------------------------------------------------------ text metrics

Rouge = namedtuple("Rouge", "precision recall f1")


def rouge_words(text: str) -> list[str]:
    """Lower-case runs of ASCII letters and digits, stemmed if longer than three."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [porter_stem(w) if len(w) > 3 else w for w in words]


def _lcs(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a row of the usual table at once: bit i of `row` is
    0 where the row's value rises at a[i] (Hyyro's recurrence)."""
    where = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        match = row & where.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()


def rouge_l(reference: str, candidate: str) -> Rouge:
    """ROUGE-L over stemmed words, equal to rouge_score's `rougeL` with use_stemmer=True."""
    a, b = rouge_words(reference), rouge_words(candidate)
    common = _lcs(a, b)
    if not common:
        return Rouge(0.0, 0.0, 0.0)
    precision, recall = common / len(b), common / len(a)
    return Rouge(precision, recall, 2 * precision * recall / (precision + recall))


def exact_match(reference: str, candidate: str) -> bool:
    """Same string but for case and surrounding white space."""
    return reference.strip().casefold() == candidate.strip().casefold()


def contains(reference: str, candidate: str) -> bool:
    """The reference occurs in the candidate, whatever the case."""
    return reference.strip().casefold() in candidate.casefold()


def closest(truth: str, wrong: list[str], candidate: str) -> float:
    """1 if the candidate is closer (ROUGE-L F1) to the truth than to any wrong answer, else 0; a
    tie of n gives 1/n, so that an empty or senseless candidate scores what guessing would. [D11]"""
    ours = rouge_l(truth, candidate).f1
    others = [rouge_l(w, candidate).f1 for w in wrong]
    return 0.0 if max(others) > ours else 1 / (1 + others.count(ours))


# ------------------------------------------------------------------------------- membership inference


def auc(members: list[float], nonmembers: list[float]) -> float:
    """P(a member's score > a non-member's) + half P(equal): area under the ROC curve."""
    others = sorted(nonmembers)
    twice = sum(bisect_left(others, x) + bisect_right(others, x) for x in members)
    return twice / (2 * len(members) * len(others))


def min_k_score(losses: list[float], percent: int) -> float:
    """Min-K%: mean log-probability of the least likely k% of the tokens, at least one."""
    worst = sorted(losses, reverse=True)[: max(1, len(losses) * percent // 100)]
    return -math.fsum(worst) / len(worst)


def mia_score(area: float) -> float:
    """SemEval-2025 Task 4: 1 where the attack learns nothing, 0 where it is always right or wrong."""
    return 1 - 2 * abs(area - CHANCE)


# ------------------------------------------------------------------------------------ TOFU's metrics


def log_truth_ratio(paraphrased_loss: float, perturbed_losses: list[float]) -> float:
    """log R; kept in logs because unlearned models give losses whose exp(-loss) underflows."""
    least = min(perturbed_losses)
    total = math.fsum(math.exp(least - x) for x in perturbed_losses)
    return paraphrased_loss - least + math.log(total / len(perturbed_losses))


def choice_probability(loss: float, wrong_losses: list[float]) -> float:
    """p(a) / (p(a) + sum p(w)), without underflow."""
    least = min(loss, *wrong_losses)
    return math.exp(least - loss) / math.fsum(math.exp(least - x) for x in [loss, *wrong_losses])


def ks_p_value(a: list[float], b: list[float]) -> float:
    """Exact two-sided p-value of the two-sample Kolmogorov-Smirnov test, counted in integers.

    Orderings of the pooled samples are lattice paths from (0, 0) to (n, m); the p-value is the share
    of paths that somewhere stray from the diagonal at least as far as the observed one.
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


def harmonic_mean(values: list[float]) -> float:
    """0 if any value is 0."""
    return 0.0 if min(values) <= 0 else len(values) / math.fsum(1 / x for x in values)


# ---------------------------------------------------------------------------------------- aggregates


def aggregate(*, em_forget: float, rouge_forget: float, mia: float, em_retain: float,
              rouge_retain: float) -> float:
    """The paper's aggregate score, from fractions (not percent). [D13]"""
    terms = (1 - em_forget, 1 - rouge_forget, 1 - mia, em_retain, rouge_retain)
    return math.fsum(terms) / len(terms)


def task_aggregate(forget: list[float], retain: list[float]) -> float:
    """SemEval-2025 Task 4: harmonic mean of the retain scores and of 1 - the forget scores."""
    return harmonic_mean([1 - x for x in forget] + list(retain))
