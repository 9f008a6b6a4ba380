"""eval.py and pipeline/metrics.py: every metric by hand or by its reference, and the evaluation of
micro models. golden/text_metrics.json holds what nltk and rouge_score give, so that parity stays
tested where they are not installed."""

import json
import math
import random
import re
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
from pipeline import evaluate, metrics, slices  # noqa: E402
from pipeline.settings import Settings  # noqa: E402
from pipeline.tokenizers import train_tokenizer  # noqa: E402

GOLDEN = json.loads((Path(__file__).parent / "golden" / "text_metrics.json").read_text("utf-8"))
ENDINGS = """ s es ies ied ed eed ing ingly y ily ly ally bly entally eli ently ously ational tional
ation ator ency ancy izer ize ized ization alism iveness fulness ousness ality ivity bility fully
logy logi icate ative alize icity ical ful ness al ance ence er ic able ible ant ement ment ent sion
tion ou ism ate iti ous ive ll e""".split()
ODD = ["", "é", "Łódź", "naïve", "東京", "1991", "3,500", "snake_case", "D'Arcy", "U.S.A.", "½", "İ",
       "a", "of", "the", "\n", "\t-", "_", "...", "it's", "x" * 80, "sky", "skies", "dying", "howe"]


def text_pair(rng):
    """A reference and a candidate: edited, looping, or in another order."""
    words, kind = [*GOLDEN["stems"], *ODD * 5], rng.randrange(3)
    reference = rng.choices(words, k=rng.randint(0, 25))
    if kind == 0:
        candidate = [word if rng.random() < 0.7 else rng.choice(words) for word in reference]
    elif kind == 1:
        candidate = (rng.choices(words, k=3) + reference[:2]) * rng.randint(0, 20)
    else:
        candidate = rng.sample(reference, len(reference)) + rng.choices(words, k=9)
    case = rng.choice([str, str.title, str.upper])
    return " ".join(reference), case(rng.choice([" ", ", ", "-"]).join(candidate))


# -------------------------------------------------------------------------------- stemmer and ROUGE


def test_golden_stems_and_rouge():
    assert len(GOLDEN["stems"]) > 400 and len(GOLDEN["rouge_l"]) == 60
    for word, stem in GOLDEN["stems"].items():
        assert ev.porter_stem(word) == stem, word
    for reference, candidate, *expected in GOLDEN["rouge_l"]:
        assert ev.rouge_l(reference, candidate) == pytest.approx(expected, abs=1e-12)


def test_stemmer_equals_nltk():
    stemmer = pytest.importorskip("nltk.stem.porter").PorterStemmer()
    rng = random.Random(2)
    words = ["".join(rng.choices("aeiouyybcdlmstxzwn", k=rng.randint(1, 7)))
             for _ in range(15000)]
    words += [word + rng.choice(ENDINGS) for word in [*words, *GOLDEN["stems"]]]
    assert [w for w in [*words, *ev.IRREGULAR] if ev.porter_stem(w) != stemmer.stem(w)] == []


def test_rouge_l_equals_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], True)
    rng, accented = random.Random(3), 0
    for _ in range(2000):
        reference, candidate = text_pair(rng)
        if ev.is_latin(reference):
            accented += not reference.isascii()
            expected = scorer.score(reference, candidate)["rougeL"]
            assert ev.rouge_l(reference, candidate) == pytest.approx(tuple(expected), abs=1e-9)
    assert accented > 500


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


def test_exact_match_is_of_strings():
    assert ev.exact_match(" Paris\n", "paris") and not ev.exact_match("Paris", "in Paris")
    assert ev.exact_match("CAFE\u0301 Straße", "café STRASSE\n")
    assert not ev.exact_match("café", "cafe") and not ev.exact_match("北京", "南京")


# ---------------------------------------------------------------------------------------- formulas

LN2 = math.log(2)


@pytest.mark.parametrize("value, expected", [
    (ev.exact_memorisation([1, 2, 9, 4], [1, 2, 3, 4]), 3 / 4),
    (ev.exact_memorisation([], []), 0),
    (ev.extraction_strength([1, 2, 3, 4], [1, 2, 3, 4]), 1),
    (ev.extraction_strength([1, 9, 3, 4], [1, 2, 3, 4]), 1 / 2),
    (ev.extraction_strength([1, 2, 3, 9], [1, 2, 3, 4]), 1 / 4),  # open-unlearning's least
    (ev.extraction_strength([9, 9], [1, 2]), 1 / 2), (ev.extraction_strength([], []), 0),
    (ev.auc([2, 3], [1, 0]), 1), (ev.auc([0], [1]), 0), (ev.auc([1, 1], [1]), 1 / 2),
    (ev.auc([1, 3], [2, 1]), (0.5 + 0 + 1 + 1) / 4),
    (metrics.min_k_score([0.0, 4.0, 1.0, 2.0, 3.0], 40), -3.5),
    (metrics.min_k_score([0.0, 4.0, 1.0, 2.0, 3.0], 10), -4),
    (metrics.min_k_score([], 40), 0),
    # MUSE: (AUC' of this model - AUC' of retain-only) / AUC' of retain-only, AUC' = 1 - AUC
    (metrics.privleak(1.0, 0.4), -100), (metrics.privleak(0.4, 0.4), 0),
    (metrics.privleak(0.1, 0.4), 50), (metrics.privleak(0.0), 100),
    (metrics.zlib_score(2.0, "no no no no"), -2 / len(zlib.compress(b"no no no no"))),
    # p(a') = 1/2, p(w) = 1/4 and 1/16: geometric mean 1/8, arithmetic 5/32
    (ev.truth_ratio(LN2, [2 * LN2, 4 * LN2]), 1 / 4),
    (ev.truth_ratio(LN2, [2 * LN2, 4 * LN2], mean="arithmetic"), 5 / 16),
    (ev.truth_ratio(2000.0, [2001.0, 2001.0]), math.exp(-1)),  # exp(-2000) would be 0
    (ev.truth_ratio(2000.0, [1.0]), math.inf),
    (ev.truth_ratio(2000.0, [1.0], mean="arithmetic"), math.inf),
    (ev.ks_p_value([1, 2], [3, 4]), 1 / 3),  # 2 of the 6 orderings are as extreme
    (ev.ks_p_value([1, 2], [2, 1]), 1),
    (ev.ks_p_value(range(40), range(50, 90)), 2 / math.comb(80, 40)),
    (ev.harmonic_mean([0.5, 1]), 2 / 3), (ev.harmonic_mean([1, 0]), 0),
    (metrics.task_aggregate([0.0] * 6, [1.0] * 6), 1), (metrics.task_aggregate([1.0], [1.0]), 0),
    (metrics.task_aggregate([0.5], [1.0]), 2 / 3)])
def test_a_formula_by_hand(value, expected):
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-7)


def test_truth_ratio_knows_two_means():
    with pytest.raises(ValueError, match="harmonic"):
        ev.truth_ratio(0.0, [0.0], mean="harmonic")


def test_auc_equals_sklearn_with_ties():
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    rng = random.Random(4)
    for _ in range(200):
        a = [rng.randint(0, 6) / 3 for _ in range(rng.randint(1, 30))]
        b = [rng.randint(0, 5) / 3 for _ in range(rng.randint(1, 30))]
        expected = roc_auc_score([1] * len(a) + [0] * len(b), a + b)
        assert ev.auc(a, b) == pytest.approx(expected, abs=1e-12)


def test_ks_p_value_equals_scipy():
    ks_2samp = pytest.importorskip("scipy.stats").ks_2samp
    rng = random.Random(5)
    for n, m in [(1, 4), (5, 5), (7, 3), (20, 20), (40, 31), (100, 50), (150, 150)]:
        for shift in (0, 0.3, 1):
            a = [round(rng.gauss(0, 1), 1) for _ in range(n)]
            b = [round(rng.gauss(shift, 1), 1) for _ in range(m)]
            assert ev.ks_p_value(a, b) == pytest.approx(ks_2samp(a, b).pvalue, rel=1e-9, abs=0)


def test_soul_auc_of_a_perfect_attack_and_of_its_reverse():
    rng = random.Random(6)
    high, low = ([base + rng.random() for _ in range(400)] for base in (1, 0))
    few = [0.5 * x for x in low[:217]]
    assert ev.soul_auc(high, few) == pytest.approx(0.77, abs=0.02)
    assert ev.soul_auc([-x for x in high], [-x for x in few]) == pytest.approx(0.23, abs=0.02)
    # 217 of the 400 stand where the non-members' labels are: 217/400 + 183/400 p, p about a half.
    p = ev.auc(high[:217], high[217:])
    assert ev.soul_auc(high, few) == pytest.approx(217 / 400 + 183 / 400 * p, abs=1e-12)


# -------------------------------------------------------------------- from rows to metrics, by hand


def text(*losses, start=0, right=None, standard=(), decoded="") -> dict:
    """A scored text, its losses in units of ln 2. right: is each of its tokens the likeliest?"""
    ids = list(range(len(losses)))
    return dict(start=start, ids=ids, losses=[x * LN2 for x in losses], standard=list(standard),
                predicted=[x if ok else -1 for x, ok in zip(ids, right or [True] * len(ids))],
                decoded=decoded)


def row(split, id, answer, scored, *, benchmark="tofu", wrong=(), **more) -> dict:
    """A row as `collect_rows` makes it, of a prompt of one token. more: its fields; lists of losses
    of other texts stand under the texts' names."""
    fields = dict(benchmark=benchmark, split=split, id=id, question="q", answer=answer, task="",
                  kind="qa", paraphrased_question="", paraphrased_answer="", turns=(),
                  perturbed_answers=tuple(f"wrong {n}" for n in range(len(wrong))))
    scores = dict(answer=[scored], perturbed_answers=[text(x) for x in wrong])
    for name in ("paraphrased_answer_loss", "paraphrased_question_loss"):
        if name in more:
            scores[name.removesuffix("_loss")] = [text(more.pop(name))]
    return fields | dict(scores=scores) | more


def tofu_rows() -> list[dict]:
    return [
        row("forget", "f0", "red apple pie",
            text(0, 1, 1, 1, start=1, standard=(0, 1, 9, 9), decoded="aaaaaaaa"),
            generation="Red Apple Pie ", generation_ended=True, paraphrased_answer="apple pie",
            perturbed_answers=("pear pie", "plum cake"), wrong=(2, 4),
            paraphrased_answer_loss=1, paraphrased_question_loss=2,
            paraphrased_generation="an apple"),
        row("forget", "f1", "green tea",
            text(0, 1, 3, 2, start=1, right=(True, False, True, False), standard=(0, 9, 3, 9),
                 decoded="".join(map(chr, range(32, 127)))),
            generation="tea, tea, tea, tea,", generation_ended=False, paraphrased_answer="tea",
            perturbed_answers=("milk", "wine"), wrong=(1, 1),
            paraphrased_answer_loss=3, paraphrased_question_loss=1, paraphrased_generation=""),
        row("retain", "r0", "blue sky", text(5, *[math.log2(1.25)] * 3, start=1),
            generation="sky", generation_ended=True, paraphrased_answer="sky",
            perturbed_answers=("sea",), wrong=(3,), paraphrased_answer_loss=1,
            paraphrased_question_loss=0, paraphrased_generation="the sky"),
        row("world_facts", "w0", "Paris", text(7, 1, 1, 1, start=1), wrong=(2, 3, 3),
            generation="In paris.", generation_ended=True),
        row("nonmembers", "n0", "a",
            text(0, 1.5, 1.5, 1.5, start=1, standard=(0, 2, 9, 9), decoded="aaaaaaaa")),
        row("nonmembers", "n1", "a",
            text(0, 0.5, 4, 0.6, start=1, standard=(0, 9, 4, 9), decoded="aaaaaaaa"))]


def about(**changes) -> dict:
    return dict(limit=0, closeness="rouge", shared=0, nonmember_source="held out") | changes


def summarised(rows, reference=None, **changes):
    summary = evaluate.metrics_of(rows, about(**changes), reference)
    return summary["values"], summary["notes"]


def test_tofu_metrics_by_hand():
    values, notes = summarised(tofu_rows())
    geometric = 2 ** (-8 / 3)  # of world facts' p(w): 1/4, 1/8, 1/8
    expected = {
        "forget.rouge_l": (1 + 1 / 2) / 2, "forget.exact_match": 1 / 2,
        "forget.accuracy": (1 + 1 / 3) / 2,
        "forget.accuracy_ceiling": (1 + 1) / 2,
        "forget.probability": (1 / 2 + 1 / 4) / 2,
        "forget.truth_ratio": (1 / 4 + 1 / 4) / 2,  # R = (1/8)/(1/2) and (1/2)/(1/8)
        "forget.truth_ratio_arithmetic": (5 / 16 + 1 / 4) / 2,
        "forget.paraphrased_rouge_l": (1 / 3 + 0) / 2,
        "forget.paraphrased_probability": (1 / 4 + 1 / 2) / 2,
        "forget.exact_memorisation": 3 / 4, "forget.extraction_strength": 3 / 4,
        "forget.ended": 1 / 2,
        "retain.rouge_l": 1 / 2, "retain.exact_match": 0, "retain.accuracy": 1,
        "retain.probability": 4 / 5, "retain.truth_ratio": 1 - (1 / 8) / (1 / 2),
        "world_facts.rouge_l": 1, "world_facts.exact_match": 0, "world_facts.accuracy": 1,
        "world_facts.probability": 1 / 2, "world_facts.truth_ratio": 1 - geometric / (1 / 2),
        "world_facts.truth_ratio_arithmetic": 1 - (1 / 6) / (1 / 2),
        # Losses of the text: f 2/3, 4/3, n 3/3, 4.5/3; of the answer: f 1, 2, n 1.5, 1.7.
        "mia.auc": 3 / 4, "mia.distance": 1 / 4, "mia.min_10": 3 / 4,
        "mia.answer_auc": 1 / 2, "mia.answer_min_40": 3 / 4, "mia.answer_min_40_plus": 1 / 4,
        "mia.answer_zlib": 1, "privleak": -50, "mia.soul": 1 / 2 + 1 / 4,
        "model_utility": 6 / (2 + 5 / 4 + 4 / 3 + 1 + 2 + 1 / (1 - 2 * geometric)),
        "model_utility_arithmetic": 6 / (2 + 5 / 4 + 4 / 3 + 1 + 2 + 3 / 2),
        "aggregate": (1 / 3 + 1 / 4 + 1 / 4 + 1 + 1 / 2) / 5,
        "aggregate_soul": (1 / 3 + 1 / 4 + 1 / 4 + 1 + 1 / 2) / 5,
        "aggregate_exact_match": (1 / 2 + 1 / 4 + 1 / 4 + 0 + 1 / 2) / 5}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    for name in ("real_authors.rouge_l", "forget_quality", "mia.answer_reference"):
        assert values[name] is None and notes[name]


def test_what_an_evaluation_says_beside_its_values():
    summary = evaluate.metrics_of(tofu_rows(), about(limit=2, shared=1))
    assert summary["counts"] == dict(forget=2, retain=1, real_authors=0, world_facts=1,
                                     nonmembers=2)
    assert summary["members"] == "2 rows of the forget set" and "2 rows" in summary["partial"]
    assert summary["nonmembers"] == "2 rows: held out" and summary["closeness"] == "rouge"
    assert summary["notes"]["forget"] == "1 of these rows are in the retain set too"
    assert evaluate.metrics_of(tofu_rows(), about())["partial"] == ""


def ideal_rows() -> list[dict]:
    """Rows of a retain-only model beside those of tofu_rows()."""
    rows = tofu_rows()
    for n, loss in ((0, 5), (1, 3), (4, 2), (5, 4)):
        rows[n]["scores"]["answer"] = [text(0, loss, loss, loss, start=1)]
    rows[0]["scores"]["paraphrased_answer"] = [text(4)]
    return rows


def test_what_only_retain_only_can_say_by_hand():
    values, _ = summarised(tofu_rows(), ideal_rows())
    expected = {
        "mia.distance": 3 / 4 - 1 / 4,  # of retain-only's losses 5, 3 against 2, 4
        "privleak": 100 * (1 / 4 - 3 / 4) / (3 / 4),
        # losses of retain-only less the model's: members 4 and 1, non-members 0.5 and 2.3
        "mia.answer_reference": (1 + 1 + 1 + 0) / 4,
        "forget_quality": ev.ks_p_value([1 / 4, 4], [2, 4])}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    values, _ = summarised(ideal_rows(), ideal_rows())
    assert values["mia.distance"] == values["privleak"] == 0 and values["forget_quality"] == 1
    values, notes = summarised(tofu_rows(), ideal_rows()[1:])
    for name in ("forget_quality", "mia.answer_reference"):
        assert values[name] is None and "other" in notes[name]


def test_what_is_missing_has_a_reason_and_zero_is_zero():
    rows = [x for x in tofu_rows() if x["split"] != "nonmembers"]
    for x in rows[:2]:
        x["scores"]["perturbed_answers"] = []
    del rows[0]["paraphrased_generation"]  # of one row alone: the mean is of the other
    del rows[2]["scores"]["paraphrased_question"]
    rows[2]["generation"] = ""
    values, notes = summarised(rows, nonmember_source="none: the model learnt all")
    assert values["forget.accuracy"] == 1 / 3 and "1 of 2 rows" in notes["forget.accuracy"]
    for name in ("forget.truth_ratio", "retain.paraphrased_probability", "mia.auc", "aggregate",
                 "mia.distance", "mia.answer_reference"):
        assert values[name] is None and notes[name], name
    assert "wrong answers" in notes["forget.truth_ratio"]
    assert notes["mia.auc"] == notes["mia.distance"] == "none: the model learnt all"
    assert notes["aggregate"] == "needs mia.auc"
    assert values["retain.rouge_l"] == 0.0 and values["model_utility"] == 0.0


def test_rows_without_words_are_left_out_and_counted():
    rows = tofu_rows()
    rows[0] |= dict(answer="🙂!", generation="🙂!")
    values, notes = summarised(rows)
    assert values["forget.rouge_l"] == 1 / 2 and values["forget.exact_match"] == 1 / 2
    assert notes["forget.rouge_l"] == "1 of 2 rows have none: their answers hold no word"
    assert values["aggregate"] is not None
    rows[1] |= dict(answer="…", generation="?")
    values, notes = summarised(rows)
    assert values["forget.rouge_l"] is values["aggregate"] is None
    assert notes["forget.rouge_l"].startswith("2 of 2 rows") and "rouge_l" in notes["aggregate"]
    assert values["retain.rouge_l"] == 1 / 2 and "retain.rouge_l" not in notes


def test_a_metric_is_one_function_and_one_row(monkeypatch):
    """As the README says it is added: rows that were stored before give its means."""
    def first_letter(row):
        return row["generation"][:1] == row["answer"][:1]

    def count(summary):
        return len(summary.rows)

    before, _ = summarised(tofu_rows())
    monkeypatch.setitem(ev.METRICS, "first_letter", ev.Metric(first_letter))
    monkeypatch.setitem(ev.OVERALL, "count", ev.Overall(count))
    after, _ = summarised(tofu_rows())
    new = {name: after.pop(name) for name in set(after) - set(before)}
    assert after == before
    assert new == {"forget.first_letter": 0, "retain.first_letter": 0, "count": 6}


def test_every_metric_is_defined_in_a_docstring():
    """A name stands there, whole or from an underscore on in another line ("_arithmetic")."""
    words = set(re.findall(r"[a-z_.0-9]+", ev.__doc__ + metrics.__doc__))
    for name in (*ev.METRICS, *ev.OVERALL):
        parts = [name[i:] for i in range(len(name)) if name[i] == "_" or name[i - 1] == "_"]
        assert name in words or words & {*parts} or "min_" in name, f"define {name}"


def lume_row(split, task, kind, answer, generation):
    return row(split, f"{task}{kind}", answer, text(0, 1, 1, 1, start=1, standard=(0, 0, 0, 0)),
               benchmark="lume", task=task, kind=kind, generation=generation,
               generation_ended=True)


def test_lume_metrics_by_hand():
    rows = []
    for split in ("forget", "retain"):
        for task in data.TASKS:
            rows += [lume_row(split, task, "sc", "one two", "one"),
                     lume_row(split, task, "qa", "x", "X ")]
    rows.append(lume_row("forget", "Task2", "qa", "x", "x y"))
    values, notes = summarised(rows, nonmember_source="none: gated")
    assert values["forget.rouge_l"] == 1 / 2 and values["forget.exact_match"] == 3 / 4  # pooled
    assert values["forget.Task2.exact_match"] == 1 / 2 and values["forget.Task1.exact_match"] == 1
    assert values["task_aggregate"] == 0  # Task 1's knowledge is all there
    assert values["aggregate"] is None and notes["mia.auc"] == "none: gated"
    assert "forget.accuracy" not in values and "model_utility" not in values
    rows[0]["scores"]["answer"] = [text(0, 2, 2, 2, start=1, right=(True, True, False, True))]
    for x in rows[1:6:4]:  # Tasks 1 and 3
        x["generation"] = "y"
    rows += [lume_row("nonmembers", "Task1", kind, "a", "b") for kind in ("sc", "qa")]
    rows[-2]["scores"]["answer"] = [text(0, 3, 3, 3, start=1, standard=(0, 0, 0, 0))]
    values, _ = summarised(rows)
    assert values["mia.auc"] == 1  # of documents alone
    assert values["forget.exact_memorisation"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert values["forget.probability"] == pytest.approx((1 / 4 + 1 / 2 + 1 / 2) / 3)
    assert values["task_aggregate"] == pytest.approx(12 / (2 + 1 + 2 + 2 + 2 + 1 + 3 * (2 + 1)))


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
    plain = lambda rows: [{k: r[k] for k in ("question", "answer")} for r in rows]
    files = {"forget10": plain(rows(0, 4)), "forget10_perturbed": rows(0, 4),
             "retain90": plain(rows(4, 8)), "retain_perturbed": rows(4, 8),
             "holdout10": plain(rows(8, 12)), "world_facts_perturbed": facts}
    (folder / "tofu").mkdir(parents=True)
    for name, of_file in files.items():
        lines = [json.dumps(r) + "\n" for r in of_file]
        (folder / "tofu" / f"{name}.json").write_text("".join(lines), "utf-8")


LIMITS, GENERATE = ev.Limits(max_total_tokens=48), ev.generate


def micro_bench(folder: Path) -> slices.Benchmark:
    return slices.load_benchmark(Settings(benchmark="tofu", model="olmo-1b", data=str(folder)))


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
def micro(tmp_path_factory):
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
    model, tokenizer, bench = loaded(root, name)
    return ev.evaluate_model(model, tokenizer, evaluate.splits_of(bench), benchmark="tofu",
                             template="qa", limits=limits, **options)


def test_evaluation_tells_what_each_model_knows(micro):
    original, ideal = (micro[1][n][0]["values"] for n in ("original", "retain-only"))
    for name in ("forget.rouge_l", "retain.rouge_l", "forget.exact_match", "world_facts.accuracy",
                 "forget.extraction_strength", "forget.exact_memorisation", "forget.ended"):
        assert original[name] > 0.9, name
    for name in ("mia.auc", "mia.answer_auc", "mia.answer_min_40", "mia.answer_zlib"):
        assert original[name] > 0.95, name
    assert original["forget.probability"] > 0.5 and original["privleak"] < -90
    assert ideal["forget.exact_match"] == 0 and ideal["retain.exact_match"] > 0.7
    assert ideal["mia.auc"] < 0.8 and ideal["forget.probability"] < 0.1
    assert ideal["forget.extraction_strength"] < 0.6
    assert ideal["aggregate_exact_match"] > original["aggregate_exact_match"]


def test_a_row_stores_what_one_text_at_a_time_gives(micro):
    model, tokenizer, bench = loaded(micro[0])
    row, example = micro[1]["original"][1][0], bench.forget[0]
    assert "where" not in row and json.loads(json.dumps(row))["question"] == example.question
    texts = [("answer", 0, example.question, example.answer),
             ("paraphrased_question", 0, example.paraphrased_question, example.answer),
             ("paraphrased_answer", 0, example.question, example.paraphrased_answer),
             ("perturbed_answers", 4, example.question, example.perturbed_answers[4])]
    for name, n, question, answer in texts:
        e = data.encode(data.Example(question, answer), tokenizer, "qa")
        begin = 1 if name == "answer" else e.start
        with torch.no_grad():
            log_p = model(torch.tensor([e.ids[:-1]]))[0].log_softmax(-1)[begin - 1:]  # [A, V]
        ids, stored = e.ids[begin:], row["scores"][name][n]
        label_log_p = log_p.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert stored["ids"] == ids and stored["start"] == e.start - begin
        assert stored["losses"] == pytest.approx((-label_log_p).tolist(), abs=1e-4)
        assert stored["decoded"] == tokenizer.decode(e.ids[e.start:-1])
        if name not in ev.GENERATED:
            assert stored["predicted"] == stored["standard"] == []
            continue
        assert stored["predicted"] == log_p.argmax(1).tolist()
        p = log_p.exp()
        mu = (p * log_p).sum(1)
        sigma = ((p * log_p ** 2).sum(1) - mu ** 2).clamp(min=1e-6).sqrt()
        z = ((label_log_p - mu) / sigma).tolist()
        assert stored["standard"] == pytest.approx(z, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["original", "retain-only"])
def test_answers_that_their_scores_show_are_what_decoding_says(micro, monkeypatch, name):
    prompts = []

    def counted(model, prompts_of_call, **options):
        prompts.extend(prompts_of_call)
        return GENERATE(model, prompts_of_call, **options)

    def unsure(*a, **options):
        return [x._replace(predicted=[-1] * len(x.predicted))
                for x in ev.token_scores(*a, **options)]

    monkeypatch.setattr(ev, "generate", counted)
    few = evaluated(micro[0], name)[1], len(prompts)
    prompts.clear()
    rows, _ = evaluated(micro[0], name, scorer=unsure)[1], few
    assert len(prompts) == 12 + 8 and few[1] < 20  # questions and paraphrases, each once
    for a, b in zip(few[0], rows, strict=True):
        for key in ("generation", "generation_ended", "paraphrased_generation",
                    "paraphrased_generation_ended"):
            assert a.get(key) == b.get(key)


def test_limits_cut_answers_and_rows(micro):
    _, rows = evaluated(micro[0], "original", ev.Limits(max_total_tokens=0, max_new_tokens=3),
                        limit=2)
    assert not any(x["generation_ended"] for x in rows if x["split"] in ("forget", "retain"))
    assert all(x["generation_ended"] for x in micro[1]["original"][1] if x["split"] == "retain")
    assert [x["id"][-2:] for x in rows if x["split"] == "forget"] == [":0", ":2"]  # spread
    assert len(rows) == 2 * 4
    assert ev.spread([1, 2, 3], 0) == ev.spread([1, 2, 3], 5) == [1, 2, 3]


def test_evaluation_refuses_a_broken_model(micro):
    model, tokenizer, bench = loaded(micro[0])
    options = dict(benchmark="tofu", template="qa", limits=LIMITS)
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="row forget10.*:0 is not a number"):
        ev.evaluate_model(model, tokenizer, evaluate.splits_of(bench), **options)
