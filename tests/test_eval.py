"""eval.py: parity of every metric with its reference, by hand or by oracle; the evaluation and the
report on micro models. `python tests/test_eval.py` rewrites golden/text_metrics.json from nltk and
rouge_score, so that parity stays tested where they are not installed."""

import json
import math
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as ev  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "text_metrics.json"

# ------------------------------------------------------------------------------- text for the tests

ROOTS = """abil agree allow angular archae author bat bled born caress cease city class conflat
control decis depend die differ digit earn east electr enjoy fail fall feed fil fizz fly form general
geo goodn hap happi hesit hiss hop hope kin know lady life lovel mark meet motor nation news observ
old oper play please poem pon possess predic prob rat relat replac revis rival roll sad sens sing siz
sky snow spy stud sub tann theo tie toy trav triplic trouble try univers use vill vis vow watch week
win work writ year yellow yoy zeal""".split()
ENDINGS = """ s es ies ied ed eed ing ings ingly y ily ly ally bly entally eli ently ously ational
tional ation ations ator ency ancy izer ize ized ization alism iveness fulness ousness ality ivity
bility fully logy logi icate ative alize icity ical ful ness al ance ence er ers ic able ible ant
ement ment ent ion sion tion ou ism ate iti ity ous ive ll e""".split()
ODD = ["", "é", "Łódź", "naïve", "東京", "1991", "3,500", "snake_case", "D'Arcy", "U.S.A.", "½", "İ",
       "a", "of", "the", "\n", "\t-", "_", "...", "it's", "x" * 80, "sky", "skies", "dying", "howe"]


def word_forms(rng, n):
    return [rng.choice(ROOTS) + rng.choice(ENDINGS) for _ in range(n)]


def text_pair(rng):
    """A reference and a candidate: unrelated, edited, looping, or empty."""
    def words(low):
        draw = lambda: rng.choice(ODD) if rng.random() < 0.2 else word_forms(rng, 1)[0]
        return [draw() for _ in range(rng.randint(low, 25))]

    reference, kind = words(0), rng.randrange(5)
    if kind == 0:
        candidate = words(0)
    elif kind == 1:
        candidate = [w if rng.random() < 0.7 else rng.choice(ROOTS) for w in reference]
    elif kind == 2:
        candidate = (words(1)[:3] + reference[:2]) * rng.randint(1, 20)
    elif kind == 3:
        candidate = rng.sample(reference, len(reference)) + words(0)
    else:
        candidate = []
    case = rng.choice([str, str.title, str.upper])
    return " ".join(reference), case(rng.choice([" ", ", ", "-"]).join(candidate))


def golden_values():
    from nltk.stem.porter import PorterStemmer
    from rouge_score.rouge_scorer import RougeScorer
    rng, stemmer = random.Random(1), PorterStemmer()
    words = sorted(set(word_forms(rng, 600)) | {w for w in ODD if w.isalpha() and w.isascii()})
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [text_pair(rng) for _ in range(60)]
    return {"stems": {w: stemmer.stem(w) for w in words},
            "rouge_l": [[a, b, *scorer.score(a, b)["rougeL"]] for a, b in pairs]}


# -------------------------------------------------------------------------------- stemmer and ROUGE


def test_golden_stems_and_rouge():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(golden["stems"]) > 400 and len(golden["rouge_l"]) == 60
    for word, stem in golden["stems"].items():
        assert ev.porter_stem(word) == stem, word
    for reference, candidate, *expected in golden["rouge_l"]:
        assert ev.rouge_l(reference, candidate) == pytest.approx(expected, abs=1e-12)


def test_golden_catches_a_missing_stemmer(monkeypatch):
    monkeypatch.setattr(ev, "porter_stem", lambda word: word)
    with pytest.raises(AssertionError):
        test_golden_stems_and_rouge()


def test_stemmer_equals_nltk():
    stemmer = pytest.importorskip("nltk.stem.porter").PorterStemmer()
    rng = random.Random(2)
    letters = ["".join(rng.choices("aeiouyybcdlmstxzwn", k=rng.randint(1, 7))) for _ in range(15000)]
    words = {root + end for root in ROOTS for end in ENDINGS}
    words |= set(letters) | {w + rng.choice(ENDINGS) for w in letters}
    words |= {w + rng.choice(ENDINGS) for w in word_forms(rng, 5000)} | set(ev.IRREGULAR)
    assert [w for w in words if ev.porter_stem(w) != stemmer.stem(w)] == []


def test_rouge_l_equals_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], True)
    rng = random.Random(3)
    for _ in range(3000):
        reference, candidate = text_pair(rng)
        expected = scorer.score(reference, candidate)["rougeL"]
        assert ev.rouge_l(reference, candidate) == pytest.approx(tuple(expected), abs=1e-9)


def test_rouge_l_by_hand():
    # the cat sat | the cats are sitting: 'the cat' in common after stemming
    assert ev.rouge_l("The cat sat", "the cats are sitting") == pytest.approx((1 / 2, 2 / 3, 4 / 7))
    assert ev.rouge_l("running", "run") == (1, 1, 1)
    assert ev.rouge_l("", "") == ev.rouge_l("word", "") == ev.rouge_l("…", "word") == (0, 0, 0)


def test_exact_match_and_containment():
    assert ev.exact_match(" Paris\n", "paris") and not ev.exact_match("Paris", "in Paris")
    assert ev.contains("Paris", "It is in PARIS, France.") and not ev.contains("Paris", "Pari s")


def test_closest_shares_ties():
    truth, wrong = "red apple", ["green pear", "green plum"]
    assert ev.closest(truth, wrong, "a red apple") == 1
    assert ev.closest(truth, wrong, "a green pear") == 0
    assert ev.closest(truth, wrong, "") == ev.closest(truth, wrong, "his his his") == 1 / 3
    assert ev.closest("red apple", ["red pear", "green plum"], "red") == 1 / 2


# ---------------------------------------------------------------------------------------------- MIA


def test_auc_by_hand():
    assert ev.auc([2, 3], [1, 0]) == 1 and ev.auc([0], [1]) == 0 and ev.auc([1, 1], [1]) == 0.5
    assert ev.auc([1, 3], [2, 1]) == (0.5 + 0 + 1 + 1) / 4


def test_auc_equals_sklearn_with_ties():
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    rng = random.Random(4)
    for _ in range(200):
        a = [rng.randint(0, 6) / 3 for _ in range(rng.randint(1, 30))]
        b = [rng.randint(0, 5) / 3 for _ in range(rng.randint(1, 30))]
        assert ev.auc(a, b) == pytest.approx(roc_auc_score([1] * len(a) + [0] * len(b), a + b), abs=1e-12)


def test_min_k_score_by_hand():
    losses = [0.0, 4.0, 1.0, 2.0, 3.0]
    assert ev.min_k_score(losses, 40) == -3.5 and ev.min_k_score(losses, 10) == -4
    assert ev.min_k_score(losses, 60) == -3


def test_mia_score():
    assert [ev.mia_score(x) for x in (0.5, 0, 1, 0.75)] == [1, 0, 0, 0.5]


# -------------------------------------------------------------------------------- TOFU's statistics


def test_truth_ratio_by_hand():
    # p(a') = 1/2, p(w) = 1/4 and 1/8: R = (3/16) / (1/2)
    ratio = ev.log_truth_ratio(math.log(2), [math.log(4), math.log(8)])
    assert math.exp(ratio) == pytest.approx(3 / 8)


def test_truth_ratio_and_probability_do_not_underflow():
    assert ev.log_truth_ratio(2000.0, [2001.0, 2001.0]) == pytest.approx(-1)
    assert ev.choice_probability(2000.0, [2000.0] * 3) == pytest.approx(1 / 4)


def test_ks_p_value_by_hand():
    # two against two, fully apart: 2 of the 6 orderings are as extreme
    assert ev.ks_p_value([1, 2], [3, 4]) == pytest.approx(1 / 3)
    assert ev.ks_p_value([1, 2], [2, 1]) == 1
    apart = ev.ks_p_value(list(range(400)), list(range(500, 900)))
    assert apart == pytest.approx(2 / math.comb(800, 400), rel=1e-12, abs=0)


def test_ks_p_value_equals_scipy():
    ks_2samp = pytest.importorskip("scipy.stats").ks_2samp
    rng = random.Random(5)
    for n, m in [(1, 4), (5, 5), (7, 3), (20, 20), (40, 31), (100, 50), (150, 150)]:
        for shift in (0, 0.3, 1):
            a = [round(rng.gauss(0, 1), 1) for _ in range(n)]
            b = [round(rng.gauss(shift, 1), 1) for _ in range(m)]
            assert ev.ks_p_value(a, b) == pytest.approx(ks_2samp(a, b).pvalue, rel=1e-9, abs=0)


def test_harmonic_mean():
    assert ev.harmonic_mean([0.5, 1]) == pytest.approx(2 / 3) and ev.harmonic_mean([1, 0]) == 0


def test_task_aggregate():
    assert ev.task_aggregate([0.0] * 6, [1.0] * 6) == 1 and ev.task_aggregate([1.0], [1.0]) == 0
    assert ev.task_aggregate([0.5], [1.0]) == pytest.approx(2 / 3)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_values(), ensure_ascii=False, indent=0) + "\n", "utf-8")
