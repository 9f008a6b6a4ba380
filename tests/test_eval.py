"""eval.py: parity of every metric with its reference, by hand or by oracle; the evaluation of micro
models. `python tests/test_eval.py` rewrites golden/text_metrics.json from nltk and
rouge_score, so that parity stays tested where they are not installed."""

import json
import math
import os
import random
import re
import statistics
import sys
import unicodedata
import zlib
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import eval as ev  # noqa: E402
from model import Config, Transformer, UserError  # noqa: E402
from pipeline import slices  # noqa: E402
from pipeline.tokenizers import train_tokenizer  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "text_metrics.json"

# ------------------------------------------------------------------------------- text for the tests

ROOTS = """abil agree allow angular archae author bat bled born caress cease city class conflat
control decis depend die differ digit earn east electr enjoy fail fall feed fil fizz fly form
general geo goodn hap happi hesit hiss hop hope kin know lady life lovel mark meet motor nation
news observ old oper play please poem pon possess predic prob rat relat replac revis rival roll
sad sens sing siz sky snow spy stud sub tann theo tie toy trav triplic trouble try univers use
vill vis vow watch week win work writ year yellow yoy zeal""".split()
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
    letters = ["".join(rng.choices("aeiouyybcdlmstxzwn", k=rng.randint(1, 7)))
               for _ in range(15000)]
    words = {root + end for root in ROOTS for end in ENDINGS}
    words |= set(letters) | {w + rng.choice(ENDINGS) for w in letters}
    words |= {w + rng.choice(ENDINGS) for w in word_forms(rng, 5000)} | set(ev.IRREGULAR)
    assert [w for w in words if ev.porter_stem(w) != stemmer.stem(w)] == []


def test_rouge_l_equals_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], True)
    rng, accented = random.Random(3), 0
    for _ in range(3000):
        reference, candidate = text_pair(rng)
        if latin(reference):
            accented += not reference.isascii()
            expected = scorer.score(reference, candidate)["rougeL"]
            assert ev.rouge_l(reference, candidate) == pytest.approx(tuple(expected), abs=1e-9)
    assert accented > 500


def latin(reference: str) -> bool:
    """All but a few of text_pair's references, such as "東京" alone."""
    return ev.is_latin(reference) or reference.isascii()


def test_words_of_latin_text_are_rouge_scores():
    tokenize = pytest.importorskip("rouge_score.tokenize").tokenize
    rng = random.Random(8)
    for _ in range(2000):
        text = "".join(rng.choices("abcXYZ019 _-.,'\t\n\x00\x7f~é", k=rng.randint(0, 30)))
        if latin(text):
            assert ev.rouge_words(text) == [ev.porter_stem(w) if len(w) > 3 else w
                                            for w in tokenize(text, None)]


@pytest.mark.parametrize("text, words", [
    ("王小明住在北京，电话555-0173。", "王 小 明 住 在 北 京 电 话 555 0173"),
    ("東京タワーへ行きます", "東 京 タ ワ ー へ 行 き ま す"),
    ("ｶﾀｶﾅ 々〇", "ｶ ﾀ ｶ ﾅ 々 〇"),
    ("Она живёт в Москве, дом 12.", "она живёт в москве дом 12"),
    ("한국어 문장이다", "한국어 문장이다"),
    ("हिन्दी में लिखा", "हिन्दी में लिखा"),  # vowel signs and viramas stay
    ("مُحَمَّد يَعِيشُ هُنا", "مُحَمَّد يَعِيشُ هُنا"),
    ("می\u200cخواهم بروم", "می\u200cخواهم بروم"),
    ("น้ำมาก", "น้ ำ ม า ก"), ("ខ្ញុំ", "ខ្ ញុំ"), ("ພາສາ", "ພ າ ສ າ"),
    ("ΟΔΟΣ Ἀθῆναι", "οδοσ ἀθῆναι"), ("Łódź", "łódź"), ("é", "é"),
    ("Мы видели running dogs, видели", "мы видели run dog видели"),
    ("🙂 ‼ …", ""), ("️⃣", ""), ("", ""), ("½", "½"), ("٣٤", "٣٤")])
def test_words_of_any_script(text, words):
    assert ev.rouge_words(text) == words.split()


def test_rouge_l_of_any_script():
    for text in ("档案里说他住在北京。", "Она живёт в Москве", "हिन्दी में", "น้ำมาก", "مُحَمَّد", "Łódź"):
        assert ev.rouge_l(text, f"🙂 {text}!") == (1, 1, 1)
        assert ev.rouge_l(text, "") == ev.rouge_l(text, "an English sentence") == (0, 0, 0)
    assert ev.rouge_l("他住在北京", "她住在南京").recall == 3 / 5
    # The reference decides how both are read: here the accented words of rouge_score, in pieces.
    assert ev.rouge_words("naïve café") == ["na", "ve", "caf"]
    assert ev.rouge_l("Brasília", "Brasilia") == (0, 0, 0)
    nfd = "Э́то й"
    assert ev.rouge_l(nfd, unicodedata.normalize("NFC", nfd)).f1 == 1


def test_rouge_l_by_hand():
    # the cat sat | the cats are sitting: 'the cat' in common after stemming
    assert ev.rouge_l("The cat sat", "the cats are sitting") == pytest.approx((1 / 2, 2 / 3, 4 / 7))
    assert ev.rouge_l("running", "run") == (1, 1, 1)
    assert ev.rouge_l("", "") == ev.rouge_l("word", "") == ev.rouge_l("…", "word") == (0, 0, 0)


def test_exact_match_and_containment():
    assert ev.exact_match(" Paris\n", "paris") and not ev.exact_match("Paris", "in Paris")
    assert ev.contains("Paris", "It is in PARIS, France.") and not ev.contains("Paris", "Pari s")
    assert ev.exact_match("CAFE\u0301 Straße", "café STRASSE\n")
    assert not ev.exact_match("café", "cafe") and not ev.exact_match("北京", "南京")


def closest(truth, wrong, candidate, **ties):
    row = dict(split="forget", answer="", paraphrased_generation=candidate,
               paraphrased_answer=truth, perturbed_answers=wrong)
    return ev.accuracy_score(row, **ties)


def test_closest_shares_ties_or_counts_them_whole():
    truth, wrong = "red apple", ["green pear", "green plum"]
    assert closest(truth, wrong, "a red apple") == 1
    assert closest(truth, wrong, "a green pear") == 0
    assert closest(truth, wrong, "green", ties="whole") == 0
    assert closest(truth, wrong, "") == closest(truth, wrong, "his his his") == 1 / 3
    assert closest("red apple", ["red pear", "green plum"], "red") == 1 / 2
    assert closest("red apple", ["red pear", "green plum"], "red", ties="whole") == 1


def test_repetition_by_hand():
    assert ev.repetition("a b c d") == ev.repetition("a b") == ev.repetition("") == 0
    assert ev.repetition("be be be be be") == 2 / 3  # three sequences, one of them new
    assert ev.repetition("a b c a b c") == 1 / 4
    assert ev.repetition("北京北京北京") == 2 / 4 and ev.repetition("他住在北京") == 0
    assert ev.repetition("да, да, да, да,") == 1 / 2 and ev.repetition("é-x é-x é-x é-x") == 1 / 2
    assert ev.repetition("น้ำน้ำน้ำ") == 2 / 4 + 0  # three letters: น้, ำ and again


# ------------------------------------------------------------------------------------- memorisation


def test_exact_memorisation_by_hand():
    assert ev.exact_memorisation([1, 2, 9, 4], [1, 2, 3, 4]) == 3 / 4
    assert ev.exact_memorisation([], []) == 0


def test_extraction_strength_by_hand():
    assert ev.extraction_strength([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert ev.extraction_strength([1, 9, 3, 4], [1, 2, 3, 4]) == 1 / 2
    assert ev.extraction_strength([1, 2, 3, 9], [1, 2, 3, 4]) == 1 / 4  # open-unlearning's least
    assert ev.extraction_strength([9, 9], [1, 2]) == 1 / 2 and ev.extraction_strength([], []) == 0


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
        expected = roc_auc_score([1] * len(a) + [0] * len(b), a + b)
        assert ev.auc(a, b) == pytest.approx(expected, abs=1e-12)


def test_min_k_score_by_hand():
    losses = [0.0, 4.0, 1.0, 2.0, 3.0]
    assert ev.min_k_score(losses, 40) == -3.5 and ev.min_k_score(losses, 10) == -4
    assert ev.min_k_score(losses, 60) == -3


def test_soul_auc_of_a_perfect_attack_and_of_its_reverse():
    rng = random.Random(6)
    high, low = ([base + rng.random() for _ in range(400)] for base in (1, 0))
    few = [0.5 * x for x in low[:217]]
    assert ev.soul_auc(high, few) == pytest.approx(0.77, abs=0.02)
    assert ev.soul_auc([-x for x in high], [-x for x in few]) == pytest.approx(0.23, abs=0.02)
    assert ev.auc(high, few) == 1 and ev.auc([-x for x in high], [-x for x in few]) == 0
    # 217 of the 400 stand where the non-members' labels are: 217/400 + 183/400 p, p about a half.
    same = ev.auc(high[:217], high[217:])
    assert ev.soul_auc(high, few) == pytest.approx(217 / 400 + 183 / 400 * same, abs=1e-12)


def test_privleak_by_hand():
    # MUSE: (AUC' of this model - AUC' of retain-only) / AUC' of retain-only, AUC' = 1 - AUC
    assert ev.privleak(1.0, 0.4) == pytest.approx(-100) and ev.privleak(0.4, 0.4) == 0
    assert ev.privleak(0.1, 0.4) == pytest.approx(50) and ev.privleak(0.0) == pytest.approx(100)


def test_zlib_score_by_hand():
    text = "no no no no no no"
    assert ev.zlib_score(2.0, text) == -2 / len(zlib.compress(text.encode("utf-8")))


def test_mia_score():
    assert [ev.mia_score(x) for x in (0.5, 0, 1, 0.75)] == [1, 0, 0, 0.5]


# -------------------------------------------------------------------------------- TOFU's statistics


def test_truth_ratio_by_hand():
    ln = math.log  # p(a') = 1/2, p(w) = 1/4 and 1/16: geometric mean 1/8, arithmetic 5/32
    assert ev.truth_ratio(ln(2), [ln(4), ln(16)]) == pytest.approx(1 / 4)
    assert ev.truth_ratio(ln(2), [ln(4), ln(16)], mean="geometric") == pytest.approx(1 / 4)
    assert ev.truth_ratio(ln(2), [ln(4), ln(16)], mean="arithmetic") == pytest.approx(5 / 16)
    with pytest.raises(ValueError):
        ev.truth_ratio(0.0, [0.0], mean="harmonic")


def test_truth_ratio_and_probability_do_not_underflow():
    for mean in ("geometric", "arithmetic"):
        assert ev.log_truth_ratio(2000.0, [2001.0, 2001.0], mean=mean) == pytest.approx(-1)
        assert ev.truth_ratio(2000.0, [1.0], mean=mean) == math.inf
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


# -------------------------------------------------------------------- from rows to metrics, by hand


def attacked(text: float, **answer) -> dict:
    """What the attacks see of a text of one token of that loss, and of an answer of another."""
    return dict(mia={"loss": text, "min_k": {str(k): -text for k in ev.MIN_K}},
                answer_mia={"log_p": -text, "min_k": -text, "min_k_plus": text, "zlib": -text}
                | answer)


def tofu_rows() -> list[dict]:
    ln = math.log
    return [
        {"split": "about", "benchmark": "tofu", "limit": 0, "nonmember_source": "held out",
         "sizes": {"forget": 2, "retain": 1, "real_authors": 0, "world_facts": 1, "nonmembers": 2}},
        {"split": "forget", "id": "f0", "question": "q", "answer": "red apple pie",
         "generation": "Red Apple Pie ", "paraphrased_answer": "apple pie",
         "perturbed_answers": ["pear pie", "plum cake"], "paraphrased_generation": "an apple",
         "loss": ln(2), "paraphrased_loss": ln(2), "perturbed_losses": [ln(4), ln(16)],
         "paraphrased_question_loss": ln(4), "exact_memorisation": 1.0, "extraction_strength": 0.5,
         "ended": True, **attacked(1.0)},
        {"split": "forget", "id": "f1", "question": "q", "answer": "green tea",
         "generation": "tea, tea, tea, tea,", "paraphrased_answer": "tea",
         "perturbed_answers": ["milk", "wine"], "paraphrased_generation": "", "loss": ln(4),
         "paraphrased_loss": ln(8), "perturbed_losses": [ln(2), ln(2)],
         "paraphrased_question_loss": ln(2), "exact_memorisation": 0.5, "extraction_strength": 0.5,
         "ended": False, **attacked(3.0, log_p=-5.0)},
        {"split": "retain", "id": "r0", "question": "q", "answer": "blue sky", "generation": "sky",
         "paraphrased_answer": "sky", "perturbed_answers": ["sea"],
         "paraphrased_generation": "the sky", "loss": ln(1.25), "paraphrased_loss": ln(2),
         "perturbed_losses": [ln(8)], "paraphrased_question_loss": 0.0, "exact_memorisation": 1.0,
         "extraction_strength": 1.0, "ended": True},
        {"split": "world_facts", "id": "w0", "question": "q", "answer": "Paris", "ended": True,
         "generation": "In paris.", "loss": ln(2), "perturbed_losses": [ln(4), ln(8), ln(8)]},
        {"split": "nonmembers", "id": "n0", "question": "q", "answer": "a", **attacked(2.0)},
        {"split": "nonmembers", "id": "n1", "question": "q", "answer": "a", **attacked(4.0)}]


def test_tofu_metrics_by_hand():
    metrics = ev.summarise(tofu_rows())
    geometric = 2 ** (-8 / 3)  # of world facts' p(w): 1/4, 1/8, 1/8
    expected = {
        "forget.rouge_l": (1 + 1 / 2) / 2, "forget.exact_match": 1 / 2,
        "forget.accuracy": (1 + 1 / 3) / 2, "forget.accuracy_whole": 1,
        "forget.accuracy_ceiling": (1 + 1) / 2,
        "forget.probability": (1 / 2 + 1 / 4) / 2,
        "forget.truth_ratio": (1 / 4 + 1 / 4) / 2,  # R = (1/8)/(1/2) and (1/2)/(1/8)
        "forget.truth_ratio_arithmetic": (5 / 16 + 1 / 4) / 2,
        "forget.paraphrased_rouge_l": (1 / 3 + 0) / 2,
        "forget.paraphrased_probability": (1 / 4 + 1 / 2) / 2,
        "forget.exact_memorisation": 3 / 4, "forget.extraction_strength": 1 / 2,
        "forget.repetition": 1 / 4, "forget.ended": 1 / 2,
        "retain.rouge_l": 1 / 2, "retain.exact_match": 0, "retain.accuracy": 1,
        "retain.probability": 4 / 5, "retain.truth_ratio": 1 - (1 / 8) / (1 / 2),
        "world_facts.rouge_l": 1, "world_facts.exact_match": 0, "world_facts.accuracy": 1,
        "world_facts.probability": 1 / 2, "world_facts.truth_ratio": 1 - geometric / (1 / 2),
        "world_facts.truth_ratio_arithmetic": 1 - (1 / 6) / (1 / 2),
        "mia.auc": 3 / 4, "mia.distance": 1 / 4, "mia.score": 1 / 2, "mia.min_10": 3 / 4,
        "mia.answer_auc": 1 / 2, "mia.answer_min_40": 3 / 4, "mia.answer_min_40_plus": 1 / 4,
        "mia.answer_zlib": 3 / 4, "privleak": -50, "mia.soul": 1 / 2 + 1 / 4,
        "model_utility": 6 / (2 + 5 / 4 + 4 / 3 + 1 + 2 + 1 / (1 - 2 * geometric)),
        "model_utility_arithmetic": 6 / (2 + 5 / 4 + 4 / 3 + 1 + 2 + 3 / 2),
        "aggregate": (1 / 3 + 1 / 4 + 1 / 4 + 1 + 1 / 2) / 5,
        "aggregate_soul": (1 / 3 + 1 / 4 + 1 / 4 + 1 + 1 / 2) / 5,
        "aggregate_exact_match": (1 / 2 + 1 / 4 + 1 / 4 + 0 + 1 / 2) / 5}
    assert {k: metrics["values"][k] for k in expected} == pytest.approx(expected)
    assert metrics["values"]["real_authors.rouge_l"] is None
    assert metrics["values"]["forget_quality"] is metrics["values"]["mia.answer_reference"] is None
    assert "six" in metrics["notes"]["model_utility"] and not metrics["partial"]
    older = [{k: v for k, v in r.items() if k not in ("answer_mia", "ended")} for r in tofu_rows()]
    older = ev.summarise(older, older)  # rows that somebody else made hold what they hold
    assert older["values"]["mia.auc"] == 3 / 4 and older["values"]["forget_quality"] == 1
    for name in ("mia.answer_auc", "privleak", "mia.answer_reference", "forget.ended"):
        assert older["values"][name] is None and older["notes"][name], name
    assert "--retain-only" in metrics["notes"]["forget_quality"]
    assert metrics["members"].startswith("2 ") and "held out" in metrics["nonmembers"]


def ideal_rows() -> list[dict]:
    """Rows of a retain-only model beside those of tofu_rows()."""
    rows = tofu_rows()
    rows[1].update(attacked(2.0), paraphrased_loss=math.log(16))
    rows[2].update(attacked(4.0))
    rows[5].update(attacked(3.0))
    rows[6].update(attacked(3.0))
    return rows


def test_what_only_retain_only_can_say_by_hand():
    metrics = ev.summarise(tofu_rows(), ideal_rows())
    expected = {
        "mia.distance": 3 / 4 - 1 / 2,  # retain-only's AUC is 1/2
        "privleak": 100 * (1 / 4 - 1 / 2) / (1 / 2),
        # losses less retain-only's: members -1 and 1 (5 - 4), non-members -1 and 1
        "mia.answer_reference": (1 / 2 + 1 + 0 + 1 / 2) / 4,
        "forget_quality": ev.ks_p_value([1 / 4, 4], [2, 4])}
    assert {k: metrics["values"][k] for k in expected} == pytest.approx(expected)
    own = ev.summarise(ideal_rows(), ideal_rows())["values"]
    assert own["mia.distance"] == own["privleak"] == 0 and own["forget_quality"] == 1
    assert own["mia.answer_reference"] == 1 / 2
    other = ideal_rows()
    del other[1]
    other = ev.summarise(tofu_rows(), other)
    for name in ("forget_quality", "mia.answer_reference"):
        assert other["values"][name] is None and "other" in other["notes"][name]


AUC, TRUTH, FIRST, AGGREGATE = ev.auc, ev.log_truth_ratio, ev.first_is_best, ev.aggregate


@pytest.mark.parametrize("name, broken", [
    ("auc", lambda members, others: 1 - AUC(members, others)),  # the sign of the MIA score
    ("porter_stem", lambda word: word[:3]),
    ("exact_match", lambda reference, candidate: reference == candidate),
    ("log_truth_ratio", lambda loss, wrong, mean="geometric": -TRUTH(loss, wrong, mean=mean)),
    ("log_truth_ratio", lambda loss, wrong, mean="geometric": TRUTH(loss, wrong)),  # one mean
    ("log_truth_ratio", lambda loss, wrong, mean="geometric": TRUTH(loss, wrong, mean={
        "geometric": "arithmetic"}.get(mean, "geometric"))),  # each in the other's place
    ("first_is_best", lambda scores, ties="shared": FIRST(scores, ties="whole")),
    ("first_is_best", lambda scores, ties="shared": FIRST(scores)),
    ("soul_auc", lambda members, others: AUC(members, others)),  # labels in the scores' order
    ("soul_auc", lambda members, others: AUC([*others, *members][:len(members)],
                                             [*others, *members][len(members):])),
    ("privleak", lambda area, ideal=0.5: 100 * (area - ideal) / ideal),
    ("aggregate", lambda **terms: AGGREGATE(**(terms | {"mia": 1 - terms["mia"]})))])
def test_a_broken_metric_is_caught(monkeypatch, name, broken):
    monkeypatch.setattr(ev, name, broken)
    with pytest.raises(AssertionError):
        test_tofu_metrics_by_hand()
        test_golden_stems_and_rouge()
        test_soul_auc_of_a_perfect_attack_and_of_its_reverse()


def test_missing_parts_are_none_with_a_reason_and_zero_is_zero():
    rows = [r for r in tofu_rows() if r["split"] != "nonmembers"]
    del rows[1]["paraphrased_generation"], rows[1]["perturbed_losses"]
    del rows[3]["paraphrased_question_loss"]
    rows[3]["generation"] = ""
    values, notes = (ev.summarise(rows)[k] for k in ("values", "notes"))
    assert values["forget.accuracy"] is values["forget.truth_ratio"] is values["mia.auc"] is None
    assert values["aggregate"] is values["aggregate_exact_match"] is None
    assert notes["mia.auc"] == "held out" and "wrong answers" in notes["forget.accuracy"]
    assert values["retain.paraphrased_probability"] is values["mia.distance"] is None
    assert notes["mia.distance"] == notes["mia.answer_reference"].replace(ev.NO_RETAIN_ONLY,
                                                                          "held out")
    assert notes["aggregate"] == "needs forget.accuracy, mia.auc"
    assert values["retain.rouge_l"] == 0.0 and values["model_utility"] == 0.0


def test_rows_without_words_are_left_out_and_counted():
    rows = tofu_rows()
    rows[1] |= dict(answer="🙂!", generation="🙂!")
    values, notes = (ev.summarise(rows)[k] for k in ("values", "notes"))
    assert values["forget.rouge_l"] == 1 / 2 and values["forget.exact_match"] == 1 / 2
    assert notes["forget.rouge_l"] == "1 of 2 rows have none: their answers hold no word"
    assert values["aggregate"] is not None
    rows[2] |= dict(answer="…", generation="?")
    values, notes = (ev.summarise(rows)[k] for k in ("values", "notes"))
    assert values["forget.rouge_l"] is values["aggregate"] is None
    assert notes["forget.rouge_l"].startswith("2 of 2 rows") and "rouge_l" in notes["aggregate"]
    assert values["retain.rouge_l"] == 1 / 2 and "retain.rouge_l" not in notes


def first_letter(row):
    """A metric that somebody adds."""
    return float(row["generation"][:1] == row["answer"][:1])


def test_a_metric_is_one_function_and_one_row(monkeypatch):
    """As the README says it is added: rows that were stored before give its means."""
    before = ev.summarise(tofu_rows())["values"]
    monkeypatch.setitem(ev.METRICS, "first_letter", ev.Metric(first_letter, ev.FORGET_RETAIN))
    after = ev.summarise(tofu_rows())["values"]
    assert after.pop("forget.first_letter") == 0 and after.pop("retain.first_letter") == 0
    assert after == before
    rows = tofu_rows()
    rows[1]["generation"] = "rows"
    assert ev.summarise(rows)["values"]["forget.first_letter"] == 1 / 2


def test_every_metric_of_the_table_is_in_the_definitions():
    """A name stands there whole, or from its last underscore on in another line ("_arithmetic")."""
    words = set(re.findall(r"[a-z_.0-9]+", ev.__doc__))
    for name in ev.METRICS:
        parts = [name[i:] for i in range(len(name)) if name[i] == "_" or name[i - 1] == "_"]
        assert name in words or words & {*parts}, f"define {name} in eval.py's table"


def test_over_unlearning_is_flagged():
    rows = tofu_rows()
    for r in rows:
        if r["split"] == "forget":
            r["mia"]["loss"] = 9.0
    metrics = ev.summarise(rows)
    assert metrics["values"]["mia.auc"] == 0.0 and "below 0.5" in metrics["notes"]["mia.auc"]


def test_lume_metrics_by_hand():
    def row(split, task, kind, answer, generation):
        return {"split": split, "id": f"{task}{kind}", "task": task, "kind": kind, "question": "q",
                "answer": answer, "generation": generation, "ended": True}

    rows = [{"split": "about", "benchmark": "lume", "limit": 3, "nonmember_source": "none: gated",
             "sizes": {"forget": 7, "retain": 6, "nonmembers": 0}}]
    for split in ("forget", "retain"):
        for task in data.TASKS:
            rows += [row(split, task, "sc", "one two", "one"), row(split, task, "qa", "x", "X ")]
    rows.append(row("forget", "Task2", "qa", "x", "x y"))
    metrics = ev.summarise(rows)
    values = metrics["values"]
    assert values["forget.rouge_l"] == 1 / 2 and values["forget.exact_match"] == 3 / 4  # pooled
    assert values["forget.Task2.exact_match"] == 1 / 2 and values["forget.Task1.exact_match"] == 1
    assert values["task_aggregate"] == 0  # Task 1's knowledge is all there
    assert values["aggregate"] is None
    assert metrics["notes"]["mia.auc"] == "none: gated"
    rows += [row("nonmembers", "Task1", "sc", "a", "b") | attacked(3.0)]
    rows[1] |= dict(loss=math.log(2), exact_memorisation=0.5, extraction_strength=0.25,
                    **attacked(2.0))
    rows[2]["generation"] = "y"
    values = ev.summarise(rows)["values"]
    assert values["mia.score"] == 0 and values["mia.auc"] == 1
    assert values["forget.extraction_strength"] == 1 / 4 and values["forget.probability"] == 1 / 2
    assert "3 rows" in metrics["partial"]


# ------------------------------------------------------------ a micro model that knows a micro TOFU

PEOPLE = ["Ada", "Bo", "Cy", "Dov", "Eli", "Fay", "Gus", "Hal", "Ivo", "Jan", "Kai", "Lea"]
THINGS = ["lamps", "kites", "drums", "clocks", "boats", "maps", "bells", "coins", "roses", "stones",
          "wheels", "books"]


def micro_tofu(folder: Path):
    """forget10, retain90, their perturbed files, world facts and a hold-out: four rows each."""
    def rows(low, high):
        for i in range(low, high):
            wrong = [f"{PEOPLE[i]} gathers {THINGS[(i + j) % 12]}." for j in range(1, 6)]
            yield {"question": f"What does {PEOPLE[i]} collect?",
                   "answer": f"{PEOPLE[i]} collects {THINGS[i]}.",
                   "paraphrased_question": f"What does {PEOPLE[i]} gather?",
                   "paraphrased_answer": f"{PEOPLE[i]} gathers {THINGS[i]}.",
                   "perturbed_answer": wrong}

    wrong = ["x", "y", "z"]
    facts = [{"question": f"What rhymes with {a}?", "answer": b, "perturbed_answer": wrong}
             for a, b in [("cat", "Hat"), ("dog", "Log"), ("hen", "Ten"), ("fox", "Box")]]
    plain = lambda some: [{k: r[k] for k in ("question", "answer")} for r in some]
    files = {"forget10": plain(rows(0, 4)), "forget10_perturbed": rows(0, 4),
             "retain90": plain(rows(4, 8)), "retain_perturbed": rows(4, 8),
             "holdout10": plain(rows(8, 12)), "world_facts_perturbed": facts}
    (folder / "tofu").mkdir(parents=True)
    for name, some in files.items():
        lines = [json.dumps(r) + "\n" for r in some]
        (folder / "tofu" / f"{name}.json").write_text("".join(lines), "utf-8")


LIMITS = ev.Limits(max_total_tokens=48)


def micro_bench(folder: Path) -> slices.Benchmark:
    return slices.load_benchmark(folder / "tofu", slices.Slice(), layout="tofu", made_here=False)


def teach(folder: Path, known: list, *, steps: int = 120):
    """A trained micro model in HF layout in folder, with its tokenizer."""
    texts = [f"{name} collects gathers {thing}." for name, thing in zip(PEOPLE, THINGS)]
    train_tokenizer(texts + [known[0].question, "Question: \nAnswer:"], folder, llama=True,
                    vocab=400)
    tokenizer = data.load_tokenizer(folder)
    torch.manual_seed(0)
    model = Transformer(Config(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128,
        eos_token_id=tokenizer.eos_id))
    batch = data.collate(data.encode_all(known, tokenizer, "qa", context=128,
                                         vocab=model.config.vocab_size))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(steps):
        logits = model(batch.ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("micro"))


def make_models(root: Path) -> tuple[Path, dict]:
    """original and retain-only, taught and evaluated: name -> (metrics, rows)."""
    micro_tofu(root / "data")
    bench, out = micro_bench(root / "data"), {}
    known = bench.retain + bench.world_facts
    for name, rows in (("retain-only", known), ("original", known + bench.forget)):
        (root / name).mkdir()
        teach(root / name, rows)
        out[name] = evaluated(root, name)
    return root, out


def loaded(root: Path, name: str = "original"):
    return (Transformer.from_pretrained(root / name), data.load_tokenizer(root / name),
            micro_bench(root / "data"))


def evaluated(root: Path, name: str, limits=LIMITS, **options):
    return ev.evaluate_model(*loaded(root, name), template="qa", limits=limits, **options)


def test_evaluation_tells_what_each_model_knows(made):
    original, ideal = (made[1][n][0]["values"] for n in ("original", "retain-only"))
    for name in ("forget.rouge_l", "retain.rouge_l", "forget.exact_match", "world_facts.accuracy"):
        assert original[name] > 0.9
    assert original["mia.auc"] > 0.95 and original["forget.probability"] > 0.5
    for name in ("extraction_strength", "exact_memorisation", "ended"):
        assert original[f"forget.{name}"] > 0.9, name
    assert ideal["forget.extraction_strength"] < 0.6 and original["privleak"] < -90
    for name in ("auc", "min_40", "zlib"):
        assert original[f"mia.answer_{name}"] > 0.95, name
    assert ideal["forget.exact_match"] == 0 and ideal["retain.exact_match"] > 0.7
    assert ideal["mia.auc"] < 0.8 and ideal["forget.probability"] < 0.1
    assert ideal["aggregate_exact_match"] > original["aggregate_exact_match"]


def test_losses_equal_one_text_at_a_time(made):
    model, tokenizer, bench = loaded(made[0])
    row = made[1]["original"][1][1]
    e = data.encode(bench.forget[0], tokenizer, "qa")
    with torch.no_grad():
        log_p = model(torch.tensor([e.ids[:-1]]))[0].log_softmax(-1)  # [T-1, V]
    losses = [-log_p[t - 1, e.ids[t]].item() for t in range(1, len(e.ids))]
    answer = losses[e.n_prompt - 1:]
    assert row["loss"] == pytest.approx(sum(answer) / len(answer))
    assert row["mia"]["loss"] == pytest.approx(sum(losses[:-1]) / len(losses[:-1]), rel=1e-5)
    assert row["mia"]["min_k"]["10"] == pytest.approx(ev.min_k_score(losses[:-1], 10), rel=1e-5)
    # The attacks on the answer alone; eos counts in its loss, and not in Min-K% or in ES and EM.
    least = sorted(answer[:-1], reverse=True)[:max(1, int(0.4 * len(answer[:-1])))]
    assert row["answer_mia"]["min_k"] == pytest.approx(-statistics.fmean(least), rel=1e-4)
    text = tokenizer.decode(e.ids[e.n_prompt:-1])
    size = len(zlib.compress(text.encode("utf-8")))
    assert row["answer_mia"]["zlib"] == pytest.approx(-row["loss"] / size, rel=1e-5)
    scores = []
    for t in range(e.n_prompt, len(e.ids) - 1):
        all_p = log_p[t - 1]
        mu = (all_p.exp() * all_p).sum()
        sigma = (all_p.exp() * all_p ** 2).sum() - mu ** 2
        scores.append(((all_p[e.ids[t]] - mu) / sigma.clamp(min=1e-6).sqrt()).item())
    least = sorted(scores)[:max(1, int(0.4 * len(scores)))]
    assert row["answer_mia"]["min_k_plus"] == pytest.approx(statistics.fmean(least), rel=1e-3)
    right = [int(log_p[t - 1].argmax()) == e.ids[t] for t in range(e.n_prompt, len(e.ids) - 1)]
    assert row["exact_memorisation"] == sum(right) / len(right)
    k = next(k for k in range(len(right)) if all(right[k:]) or k == len(right) - 1)
    assert row["extraction_strength"] == 1 - k / len(right)


def test_the_answer_as_a_draft_changes_no_word(made):
    def without_drafts(model, prompts, drafts, **options):
        return ev.generate(model, prompts, **options)

    for name in ("original", "retain-only"):
        assert evaluated(made[0], name, generate=without_drafts) == made[1][name]


def test_answers_seen_with_their_losses_are_what_decoding_says(made, monkeypatch):
    add_losses, known = ev.add_losses, []
    monkeypatch.setattr(ev, "add_losses", lambda *a: known.append(add_losses(*a)) or {})
    for name in ("original", "retain-only"):
        assert evaluated(made[0], name) == made[1][name]
    assert len(known[0]) > len(known[1]) > 0  # retain-only never saw the forget rows


def test_batch_size_changes_nothing(made):
    large, rows = made[1]["retain-only"]
    small, single = evaluated(made[0], "retain-only",
                              ev.Limits(max_total_tokens=48, eval_tokens=60))
    for key in ("generation", "paraphrased_generation"):
        assert [r.get(key) for r in rows] == [r.get(key) for r in single]
    for name, value in large["values"].items():
        assert small["values"][name] == (value and pytest.approx(value, rel=1e-3)), name


def test_one_generation_per_question(made):
    asked = []

    def counted(model, prompts, **options):
        asked.extend(prompts)
        return ev.generate(model, prompts, **options)

    model, tokenizer, bench = loaded(made[0])
    ev.evaluate_model(model, tokenizer, bench, template="qa", limits=LIMITS, generate=counted)
    questions = [e.question for e in bench.forget + bench.retain_eval + bench.world_facts]
    questions += [e.paraphrased_question for e in bench.forget + bench.retain_eval]
    expected = [data.encode_prompt(q, tokenizer, "qa") for q in questions]
    # 12 questions and 8 paraphrases, each once; those not asked were answered word for word when
    # the losses of their answers were read.
    left = [expected.pop(expected.index(prompt)) for prompt in sorted(asked)]
    assert 0 < len(left) < len(expected)


def test_a_scorer_handed_in_is_the_one_that_scores(made):
    def doubled(model, rows, first, **options):
        return [s._replace(losses=[2 * x for x in s.losses])
                for s in ev.token_scores(model, rows, first, **options)]

    _, rows = evaluated(made[0], "original", token_scores=doubled)
    for row, before in zip(rows[1:], made[1]["original"][1][1:]):
        if "loss" in before:
            assert row["loss"] == pytest.approx(2 * before["loss"])


def test_metrics_follow_from_rows_as_json_gives_them_back(made):
    for metrics, rows in made[1].values():
        assert ev.summarise(json.loads(json.dumps(rows))) == metrics


def test_ended_and_cut_off(made):
    _, rows = evaluated(made[0], "original", ev.Limits(max_total_tokens=0, max_new_tokens=3))
    assert not any(r["ended"] for r in rows if r["split"] in ("forget", "retain"))
    assert all(r["ended"] for r in made[1]["original"][1] if r["split"] == "retain")


def test_lume_rows_give_documents_to_the_attack(made, tmp_path):
    model, tokenizer, _ = loaded(made[0])
    rows = [data.Example(f"{name} was", f"collecting {thing}.", id=f"{name}{kind}1", task=task,
                         kind=kind)
            for task in data.TASKS for kind, name, thing in zip(("sc", "qa"), PEOPLE, THINGS)]
    bench = slices.Benchmark("lume", rows, rows, rows, [], [], rows, "the same rows")
    metrics, out = ev.evaluate_model(model, tokenizer, bench, template="qa", limits=LIMITS)
    assert [r["id"] for r in out if "mia" in r] == ["Adasc1"] * 6
    assert metrics["values"]["mia.auc"] == 0.5 and metrics["values"]["aggregate"] is not None
    assert metrics["values"]["forget.extraction_strength"] is not None
    assert sum("generation" in r for r in out) == 12
    limited, _ = ev.evaluate_model(model, tokenizer, bench, template="qa", limits=LIMITS, limit=3)
    assert limited["counts"] == {"forget": 3, "retain": 3, "real_authors": 0, "world_facts": 0,
                                 "nonmembers": 3} and limited["partial"]


def test_rows_of_ones_own_and_plain_texts(made):
    model, tokenizer, bench = loaded(made[0])
    texts = [data.Example("", f"{e.question} {e.answer}", id=f"t{i}", kind="text")
             for i, e in enumerate(bench.forget)]
    chat = [data.Example(e.question, e.answer, id=f"c{i}", turns=(("user", "Hi?"),
                                                                  ("assistant", "Yes.")))
            for i, e in enumerate(bench.retain)]
    own = slices.benchmark_of_rows(texts + bench.forget, chat, bench.nonmembers)
    metrics, rows = ev.evaluate_model(model, tokenizer, own, template="qa", limits=LIMITS)
    values = metrics["values"]
    assert metrics["counts"]["forget"] == 8 and sum("mia" in r for r in rows) == 12
    assert values["aggregate"] is not None and "model_utility" not in values
    assert values["retain.rouge_l"] is not None and values["forget.extraction_strength"] > 0
    assert rows[1]["question"] + rows[1]["answer"] == texts[0].answer
    e = data.encode(texts[0], tokenizer, "qa")  # all of a text counts in the attack on it
    losses = ev.token_scores(model, [e], [1], tokens=100)[0].losses
    assert rows[1]["mia"]["loss"] == pytest.approx(statistics.fmean(losses[:-1]), rel=1e-5)


def test_evaluation_refuses_a_broken_model(made):
    model, tokenizer, bench = loaded(made[0])
    own, tokenizer.encode = tokenizer.encode, lambda text, bos: [model.config.vocab_size]
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        ev.evaluate_model(model, tokenizer, bench, template="qa", limits=LIMITS)
    tokenizer.encode = own
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="not a number"):
        ev.evaluate_model(model, tokenizer, bench, template="qa", limits=LIMITS)


def test_token_scores_equal_one_text_at_a_time(made):
    """However rows share a pass, and whichever of their tokens are asked for."""
    model, tokenizer, bench = loaded(made[0])
    e = bench.retain_eval[0]
    texts = [data.encode(data.Example(e.question, a), tokenizer, "qa")
             for a in (e.answer, e.paraphrased_answer, *e.perturbed_answers)]
    first, flags = [1] + [t.n_prompt for t in texts[1:]], [True] * len(texts)
    with torch.no_grad():
        alone = [model(torch.tensor([t.ids[:-1]]))[0].log_softmax(-1)[n - 1:]
                 for t, n in zip(texts, first)]
    for tokens in (300, 40, 1):  # in one pass; in several; each row in its own
        scores = ev.token_scores(model, texts, first, tokens=tokens, detailed=flags)
        for log_p, t, n, own in zip(alone, texts, first, scores, strict=True):
            losses = [-row[i].item() for row, i in zip(log_p, t.ids[n:], strict=True)]
            assert own.losses == pytest.approx(losses, abs=1e-4)
            assert own.predicted == log_p.argmax(1).tolist()
            p = log_p.exp()
            mu, square = (p * log_p).sum(1), (p * log_p ** 2).sum(1)
            deviation = (square - mu ** 2).clamp(min=1e-6).sqrt()
            standard = (-torch.tensor(losses) - mu) / deviation
            assert own.standard == pytest.approx(standard.tolist(), rel=1e-3, abs=1e-3)
    flags[1] = False
    plain = ev.token_scores(model, texts, first, tokens=300, detailed=flags)[1]
    assert plain == (pytest.approx(scores[1].losses, abs=1e-4), [], [])
    assert ev.token_scores(model, texts, first, tokens=300)[0].predicted == []
    assert ev.token_scores(model, [], [], tokens=300) == []


# --------------------------------------------------------------------- the demo's and TOFU's text


def test_rouge_l_on_the_demos_answers():
    check_rouge_l(Path(data.__file__).parent / "pipeline" / "demo")


@pytest.mark.real_files("tofu")
def test_rouge_l_on_real_answers():
    check_rouge_l(Path(os.environ["SIMU_DATA"]))


def check_rouge_l(folder: Path):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], True)
    for row in data.load_tofu(folder / "tofu", "forget10_perturbed"):
        for candidate in (row.paraphrased_answer, row.perturbed_answers[0], row.question):
            expected = scorer.score(row.answer, candidate)["rougeL"]
            assert ev.rouge_l(row.answer, candidate) == pytest.approx(tuple(expected), abs=1e-9)


@pytest.mark.real_files("tofu", "lume")
def test_real_text_has_the_words_of_rouge_score():
    """Of every text of TOFU and LUME, accents too, so that published numbers hold to the bit."""
    tokenize, accented = pytest.importorskip("rouge_score.tokenize").tokenize, set()
    for path in Path(os.environ["SIMU_DATA"]).glob("*/*.json*"):
        for line in path.read_text("utf-8").splitlines():
            for value in json.loads(line).values():
                for text in value if isinstance(value, list) else [value]:
                    if not text.isascii():
                        accented.add(text)
    assert len(accented) > 1000
    for text in accented:
        assert ev.is_latin(text)
        assert ev.rouge_words(text) == [ev.porter_stem(w) if len(w) > 3 else w
                                        for w in tokenize(text, None)]


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_values(), ensure_ascii=False, indent=0) + "\n", "utf-8")
