"""eval.py: parity of every metric with its reference, by hand or by oracle; the evaluation and the
report on micro models. `python tests/test_eval.py` rewrites golden/text_metrics.json from nltk and
rouge_score, so that parity stays tested where they are not installed."""

import dataclasses
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import eval as ev  # noqa: E402
import report  # noqa: E402
import stage  # noqa: E402
from model import Config, Transformer  # noqa: E402

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
        expected = roc_auc_score([1] * len(a) + [0] * len(b), a + b)
        assert ev.auc(a, b) == pytest.approx(expected, abs=1e-12)


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


# -------------------------------------------------------------------------- the paper's own numbers


def from_columns(kind: str, numbers) -> tuple[float, float]:
    """A published row's aggregate, as printed and as it follows from the row's other columns."""
    names = [n for _, _, some in report.COLUMNS[kind] for n in some]
    row = dict(zip(names, numbers, strict=True))
    em = "accuracy" if kind == "tofu" else "exact_match"
    return row["aggregate"], ev.aggregate(
        em_forget=row[f"forget.{em}"], rouge_forget=row["forget.rouge_l"], mia=row["mia.auc"],
        em_retain=row[f"retain.{em}"], rouge_retain=row["retain.rouge_l"])


def test_aggregate_reproduces_table_1():
    for model in ("llama2-7b", "olmo-1b"):
        for approach, numbers in report.PUBLISHED["tofu", model].items():
            printed, computed = from_columns("tofu", numbers)
            # One cell of Table 1 is a misprint: with ROUGE-L retain .7239 for .8239 it would fit.
            misprint = 0.02 if (model, approach) == ("olmo-1b", "Original") else 0
            assert computed - printed == pytest.approx(misprint, abs=5e-5), (model, approach)


def test_table_2_follows_from_no_aggregate():
    rows = [from_columns("lume", numbers) for model in ("llama2-7b", "olmo-1b")
            for numbers in report.PUBLISHED["lume", model].values()]
    assert len(rows) == 8 and all(abs(computed - printed) > 9e-4 for printed, computed in rows)
    assert max(abs(computed - printed) for printed, computed in rows) > 0.18


# -------------------------------------------------------------------- from rows to metrics, by hand


def tofu_rows() -> list[dict]:
    ln = math.log
    mia = lambda loss: {"loss": loss, "min_k": {str(k): -loss for k in ev.MIN_K}}
    return [
        {"split": "about", "benchmark": "tofu", "limit": 0, "nonmember_source": "held out",
         "sizes": {"forget": 2, "retain": 1, "real_authors": 0, "world_facts": 1, "nonmembers": 2}},
        {"split": "forget", "id": "f0", "question": "q", "answer": "red apple pie",
         "generation": "Red Apple Pie ", "paraphrased_answer": "apple pie",
         "perturbed_answers": ["pear pie", "plum cake"], "paraphrased_generation": "an apple",
         "loss": ln(2), "paraphrased_loss": ln(2), "perturbed_losses": [ln(4), ln(8)],
         "mia": mia(1.0)},
        {"split": "forget", "id": "f1", "question": "q", "answer": "green tea",
         "generation": "tea, tea, tea", "paraphrased_answer": "tea",
         "perturbed_answers": ["milk", "wine"], "paraphrased_generation": "", "loss": ln(4),
         "paraphrased_loss": ln(8), "perturbed_losses": [ln(2), ln(2)], "mia": mia(3.0)},
        {"split": "retain", "id": "r0", "question": "q", "answer": "blue sky", "generation": "sky",
         "paraphrased_answer": "sky", "perturbed_answers": ["sea"],
         "paraphrased_generation": "the sky", "loss": ln(1.25), "paraphrased_loss": ln(2),
         "perturbed_losses": [ln(8)]},
        {"split": "world_facts", "id": "w0", "question": "q", "answer": "Paris",
         "generation": "In paris.", "loss": ln(2), "perturbed_losses": [ln(4), ln(8), ln(8)]},
        {"split": "nonmembers", "id": "n0", "question": "q", "answer": "a", "mia": mia(2.0)},
        {"split": "nonmembers", "id": "n1", "question": "q", "answer": "a", "mia": mia(4.0)}]


def test_tofu_metrics_by_hand():
    metrics = ev.summarise(tofu_rows())
    expected = {
        "forget.rouge_l": (1 + 1 / 2) / 2, "forget.exact_match": 1 / 2,
        "forget.accuracy": (1 + 1 / 3) / 2, "forget.probability": (1 / 2 + 1 / 4) / 2,
        "forget.truth_ratio": (3 / 8 + 1 / 4) / 2,  # R = (3/16)/(1/2) and (1/2)/(1/8)
        "retain.rouge_l": 1 / 2, "retain.exact_match": 0, "retain.accuracy": 1,
        "retain.probability": 4 / 5, "retain.truth_ratio": 1 - (1 / 8) / (1 / 2),
        "world_facts.rouge_l": 1, "world_facts.exact_match": 0, "world_facts.accuracy": 1,
        "world_facts.probability": 1 / 2, "world_facts.truth_ratio": 1 - (1 / 6) / (1 / 2),
        "mia.auc": 3 / 4, "mia.distance": 1 / 4, "mia.score": 1 / 2, "mia.min_10": 3 / 4,
        "model_utility": 6 / (2 + 5 / 4 + 4 / 3 + 1 + 2 + 3 / 2),
        "aggregate": (1 / 3 + 1 / 4 + 1 / 4 + 1 + 1 / 2) / 5,
        "aggregate_exact_match": (1 / 2 + 1 / 4 + 1 / 4 + 0 + 1 / 2) / 5}
    assert {k: metrics["values"][k] for k in expected} == pytest.approx(expected)
    assert metrics["values"]["real_authors.rouge_l"] is None
    assert "six" in metrics["notes"]["model_utility"] and not metrics["partial"]
    assert metrics["members"].startswith("2 ") and "held out" in metrics["nonmembers"]


@pytest.mark.parametrize("name, broken", [
    ("auc", lambda members, others: 1 - AUC(members, others)),  # the sign of the MIA score
    ("porter_stem", lambda word: word[:3]),
    ("exact_match", lambda reference, candidate: reference == candidate),
    ("log_truth_ratio", lambda loss, wrong: -TRUTH(loss, wrong)),
    ("closest", lambda truth, wrong, text: float(CLOSEST(truth, wrong, text) > 0)),
    ("aggregate", lambda **terms: AGGREGATE(**(terms | {"mia": 1 - terms["mia"]})))])
def test_a_broken_metric_is_caught(monkeypatch, name, broken):
    monkeypatch.setattr(ev, name, broken)
    with pytest.raises(AssertionError):
        test_tofu_metrics_by_hand()
        test_golden_stems_and_rouge()


AUC, TRUTH, CLOSEST, AGGREGATE = ev.auc, ev.log_truth_ratio, ev.closest, ev.aggregate


def test_missing_parts_are_none_with_a_reason_and_zero_is_zero():
    rows = [r for r in tofu_rows() if r["split"] != "nonmembers"]
    del rows[1]["paraphrased_generation"], rows[1]["perturbed_losses"]
    rows[3]["generation"] = ""
    values, notes = (ev.summarise(rows)[k] for k in ("values", "notes"))
    assert values["forget.accuracy"] is values["forget.truth_ratio"] is values["mia.auc"] is None
    assert values["aggregate"] is values["aggregate_exact_match"] is None
    assert notes["mia.auc"] == "held out" and "perturbed" in notes["forget.accuracy"]
    assert notes["aggregate"] == "needs forget.accuracy, mia.auc"
    assert values["retain.rouge_l"] == 0.0 and values["model_utility"] == 0.0


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
                "answer": answer, "generation": generation}

    rows = [{"split": "about", "benchmark": "lume", "limit": 3, "nonmember_source": "none: gated",
             "sizes": {"forget": 7, "retain": 6, "nonmembers": 0}}]
    for split in ("forget", "retain"):
        for task in ev.TASKS:
            rows += [row(split, task, "sc", "one two", "one"), row(split, task, "qa", "x", "X ")]
    rows.append(row("forget", "Task2", "qa", "x", "x y"))
    metrics = ev.summarise(rows)
    values = metrics["values"]
    assert values["forget.rouge_l"] == 1 / 2 and values["forget.exact_match"] == 3 / 4  # pooled
    assert values["forget.Task2.exact_match"] == 1 / 2 and values["forget.Task1.exact_match"] == 1
    assert values["task_aggregate"] == 0  # Task 1's knowledge is all there
    assert values["aggregate"] is None and metrics["notes"]["mia.auc"] == "none: gated"
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


def teach(folder: Path, known: list, s, *, steps: int):
    """A trained micro model in HF layout in folder, with its tokenizer."""
    texts = [f"{name} collects gathers {thing}." for name, thing in zip(PEOPLE, THINGS)]
    data.train_tokenizer(texts + [known[0].question, "Question: \nAnswer:"], folder, llama=True,
                         vocab=400)
    tokenizer = data.load_tokenizer(folder)
    torch.manual_seed(0)
    model = Transformer(Config(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128,
        eos_token_id=tokenizer.eos_id))
    batch = data.collate(data.encode_all(known, tokenizer, s.template, context=128,
                                         vocab=model.config.vocab_size))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(steps):
        logits = model(batch.ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(folder)


def make_run(run: Path, root: Path, *, seed: int = 0):
    """A run folder of the cell (tofu, olmo-1b): original, retain-only, and simu-graddiff, which is
    the retain-only model again."""
    s = stage.Settings(benchmark="tofu", model="olmo-1b", data=str(root), out=str(run), seed=seed,
                       device="cpu", max_total_tokens=48)
    stage.write_json(run / "settings.json", dataclasses.asdict(s))
    bench = data.load_benchmark(s)
    known = bench.retain + bench.world_facts
    for name, rows in (("retain-only", known), ("original", known + bench.forget)):
        with stage.Stage(run / name, settings=s, fields=(), inputs={}, modules=()) as folder:
            if seed == 0:
                teach(folder, rows, s, steps=120)
            else:
                shutil.copytree(run.parent / "run" / name, folder, dirs_exist_ok=True,
                                ignore=shutil.ignore_patterns("eval*", "stage.json"))
    inputs = dict(original=stage.fingerprint(run / "original"))
    with stage.Stage(run / "simu-graddiff", settings=s, fields=(), inputs=inputs,
                     modules=()) as folder:
        shutil.copytree(run / "retain-only", folder, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("eval*", "stage.json"))
    return s


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, evaluated; nobody may write into it."""
    root = tmp_path_factory.mktemp("micro")
    micro_tofu(root / "data")
    make_run(root / "run", root / "data")
    for name in ("retain-only", "original", "simu-graddiff"):
        ev.evaluate(root / "run", name)
    return root


@pytest.fixture
def run(made, tmp_path):
    """A copy of that run, to be spoilt."""
    shutil.copytree(made, tmp_path / "copy")
    s = stage.read_json(tmp_path / "copy" / "run" / "settings.json")
    stage.write_json(tmp_path / "copy" / "run" / "settings.json",
                     s | {"data": str(tmp_path / "copy" / "data")})
    return tmp_path / "copy" / "run"


def loaded(run: Path, name: str = "original"):
    s = stage.read_settings(run)
    return (Transformer.from_pretrained(run / name), data.load_tokenizer(run / name),
            data.load_benchmark(s), s)


def values_of(run: Path, name: str) -> dict:
    return stage.read_json(run / name / "eval" / "metrics.json")["values"]


def test_evaluation_tells_what_each_model_knows(made):
    original, ideal = (values_of(made / "run", n) for n in ("original", "retain-only"))
    for name in ("forget.rouge_l", "retain.rouge_l", "forget.exact_match", "world_facts.accuracy"):
        assert original[name] > 0.9
    assert original["mia.auc"] > 0.95 and original["forget.probability"] > 0.5
    assert ideal["forget.exact_match"] == 0 and ideal["retain.exact_match"] > 0.7
    assert ideal["mia.auc"] < 0.8 and ideal["forget.probability"] < 0.1
    assert ideal["aggregate_exact_match"] > original["aggregate_exact_match"]


def test_losses_equal_one_text_at_a_time(made):
    model, tokenizer, bench, s = loaded(made / "run")
    row = ev.read_rows(made / "run" / "original" / "eval")[1]
    e = data.encode(bench.forget[0], tokenizer, s.template)
    with torch.no_grad():
        log_p = model(torch.tensor([e.ids[:-1]]))[0].log_softmax(-1)  # [T-1, V]
    losses = [-log_p[t - 1, e.ids[t]].item() for t in range(1, len(e.ids))]
    assert row["loss"] == pytest.approx(sum(losses[e.n_prompt - 1:]) / len(losses[e.n_prompt - 1:]))
    assert row["mia"]["loss"] == pytest.approx(sum(losses[:-1]) / len(losses[:-1]), rel=1e-5)
    assert row["mia"]["min_k"]["10"] == pytest.approx(ev.min_k_score(losses[:-1], 10), rel=1e-5)


def test_one_generation_per_question(made, monkeypatch):
    model, tokenizer, bench, s = loaded(made / "run")
    asked, passes = [], []
    generate, hidden = ev.generate, model.hidden
    monkeypatch.setattr(ev, "generate", lambda model, prompts, **k: asked.extend(prompts)
                        or generate(model, prompts, **k))
    monkeypatch.setattr(model, "hidden", lambda ids: passes.append(ids) or hidden(ids))
    ev.evaluate_model(model, tokenizer, bench, s)
    questions = [e.question for e in bench.forget + bench.retain_eval + bench.world_facts]
    questions += [e.paraphrased_question for e in bench.forget + bench.retain_eval]
    expected = [data.encode_prompt(q, tokenizer, s.template) for q in questions]
    assert sorted(asked) == sorted(expected)  # 12 questions and 8 paraphrases, each once
    # 7 answers a row of forget and retain, 4 a fact, 1 a non-member; all in one pass
    assert len(passes) == 1 and passes[0].shape[0] == 4 * 7 * 2 + 4 * 4 + 4


def test_batch_size_changes_nothing(made):
    model, tokenizer, bench, s = loaded(made / "run", "retain-only")
    large, rows = ev.evaluate_model(model, tokenizer, bench, s)
    few = dataclasses.replace(s, eval_tokens=60)
    small, single = ev.evaluate_model(model, tokenizer, bench, few)
    for key in ("generation", "paraphrased_generation"):
        assert [r.get(key) for r in rows] == [r.get(key) for r in single]
    for name, value in large["values"].items():
        assert small["values"][name] == (value and pytest.approx(value, rel=1e-4)), name


def test_live_equals_reloaded(made):
    model, tokenizer, bench, s = loaded(made / "run")
    live, _ = ev.evaluate_model(model, tokenizer, bench, s)
    assert live == stage.read_json(made / "run" / "original" / "eval" / "metrics.json")


def test_metrics_follow_from_generations_alone(made):
    for name in ("retain-only", "original"):
        folder = made / "run" / name / "eval"
        assert ev.summarise(ev.read_rows(folder)) == stage.read_json(folder / "metrics.json")


def test_lume_rows_give_documents_to_the_attack(made, tmp_path):
    model, tokenizer, _, s = loaded(made / "run")
    rows = [data.Example(f"{name} was", f"collecting {thing}.", id=f"{name}{kind}1", task=task,
                         kind=kind)
            for task in ev.TASKS for kind, name, thing in zip(("sc", "qa"), PEOPLE, THINGS)]
    bench = data.Benchmark("lume", rows, rows, rows, [], [], rows, "the same rows")
    metrics, out = ev.evaluate_model(model, tokenizer, bench, s)
    assert [r["id"] for r in out if "mia" in r] == ["Adasc1"] * 6
    assert metrics["values"]["mia.auc"] == 0.5 and metrics["values"]["aggregate"] is not None
    assert sum("generation" in r for r in out) == 12
    limited, _ = ev.evaluate_model(model, tokenizer, bench, s, limit=3)
    assert limited["counts"] == {"forget": 3, "retain": 3, "real_authors": 0, "world_facts": 0,
                                 "nonmembers": 3} and limited["partial"]


# --------------------------------------------------------------------- the command line, and faults


def test_finished_evaluations_are_skipped(made, capsys):
    ev.main(["evaluate", str(made / "run")])  # every model of the run
    out = capsys.readouterr().out.splitlines()
    assert out == [f"[{name}/eval] already made; skipped"
                   for name in ("original", "retain-only", "simu-graddiff")]


def test_a_killed_evaluation_goes_on(run, monkeypatch):
    folder = run / "original" / "eval"
    before = {n: (folder / n).read_bytes() for n in ("metrics.json", "generations.jsonl")}
    shutil.rmtree(folder)
    generate, asked = ev.generate, []

    def dies_third(model, prompts, **options):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return generate(model, prompts, **options)

    monkeypatch.setattr(ev, "KEEP_EVERY", 6)
    monkeypatch.setattr(ev, "generate", dies_third)
    with pytest.raises(KeyboardInterrupt):
        ev.evaluate(run, "original")
    assert not folder.exists()
    kept = run / "original" / "eval.partial" / "resume" / "generations.jsonl"
    with open(kept, "a") as file:
        file.write('["torn')
    asked.clear()
    monkeypatch.setattr(ev, "generate", lambda model, prompts, **k: asked.append(len(prompts))
                        or generate(model, prompts, **k))
    ev.evaluate(run, "original")
    assert asked == [6, 2]  # of 20 questions, 12 were answered before
    assert before == {n: (folder / n).read_bytes() for n in before}
    assert sorted(p.name for p in folder.iterdir()) == [*sorted(before), "stage.json"]


def test_limit_is_marked_everywhere(run, capsys):
    shutil.rmtree(run / "original" / "eval")
    ev.main(["evaluate", str(run), "original", "--limit", "2"])
    metrics = stage.read_json(run / "original" / "eval-limit-2" / "metrics.json")
    assert metrics["counts"]["forget"] == 2 and "2 rows" in metrics["partial"]
    assert not (run / "original" / "eval").exists()
    capsys.readouterr()
    ev.main(["report", str(run)])
    shown = capsys.readouterr().out
    assert "Original (partial: at most 2 rows of each split)" in shown
    text = (run / "report.md").read_text("utf-8")
    assert text.count("Original (partial") >= 4  # main table, both others, MIA
    metrics = stage.read_json(run / "report.json")["evaluations"][1]["metrics"]
    assert metrics["partial"] and metrics["values"]["forget_quality"] is None


def test_report_beside_the_paper(run, capsys):
    ev.main(["report", str(run), "--recompute"])
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
    first = [x.split("|")[1].strip() for x in lines]
    assert first == ["Approach", "-" * len(first[1]), "Retain-only (ideal)", "Original",
                     "SIMU-GradDiff", "Original, published", "FO-GradDiff, published",
                     "SO-GradDiff, published", "SIMU-GradDiff, published"]
    assert [c.strip() for c in lines[0].split("|")[2:-1]] == [
        "Aggregate ↑", "EM-Forget ↓", "ROUGE-L-Forget ↓", "MIA ↓", "EM-Retain ↑",
        "ROUGE-L-Retain ↑", "EM-WF ↑", "ROUGE-L-WF ↑"]
    assert "0.8438" in lines[-1] and "10.25%" in lines[-1]
    assert "29554 of 32768" in (run / "report.md").read_text("utf-8")
    by_name = {e["name"]: e["metrics"]["values"]
               for e in stage.read_json(run / "report.json")["evaluations"]}
    # The same model as retain-only cannot be told from it; the original can.
    assert by_name["simu-graddiff"]["forget_quality"] == 1
    assert by_name["original"]["forget_quality"] == expected_quality(run) < 0.5


def expected_quality(run: Path) -> float:
    samples = [[sum(r["perturbed_losses"]) / 5 - r["paraphrased_loss"]
                for r in ev.read_rows(run / name / "eval") if r["split"] == "forget"]
               for name in ("original", "retain-only")]
    return ev.ks_p_value(*samples)


def test_forget_quality_without_a_retain_only_model(run, tmp_path):
    expected, elsewhere = expected_quality(run), tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(run / "settings.json", elsewhere)
    shutil.move(run / "retain-only", elsewhere / "original")
    shutil.rmtree(run / "simu-graddiff")
    ev.main(["report", str(run)])
    evaluation = stage.read_json(run / "report.json")["evaluations"][0]["metrics"]
    assert evaluation["values"]["forget_quality"] is None
    assert "--retain-only" in evaluation["notes"]["forget_quality"]
    ev.main(["report", str(run), "--retain-only", str(elsewhere / "original")])
    evaluation = stage.read_json(run / "report.json")["evaluations"][0]["metrics"]
    assert evaluation["values"]["forget_quality"] == expected
    settings = stage.read_json(run / "settings.json")
    stage.write_json(elsewhere / "settings.json", settings | {"template": "llama2"})
    with pytest.raises(stage.UserError, match="other settings"):  # than it was evaluated under
        ev.main(["report", str(run), "--retain-only", str(elsewhere / "original")])
    spoil_model(elsewhere)
    stage.write_json(elsewhere / "settings.json", settings)
    with pytest.raises(stage.UserError, match="not of the model now"):
        ev.main(["report", str(run), "--retain-only", str(elsewhere / "original")])
    (elsewhere / "settings.json").unlink()
    with pytest.raises(stage.UserError, match="not a run folder"):
        ev.main(["report", str(run), "--retain-only", str(elsewhere / "original")])


def test_mean_and_deviation_over_seeds(run):
    make_run(run.parent / "run-seed1", run.parent / "data", seed=1)
    rows = ev.read_rows(run / "original" / "eval")
    for name in ("original", "retain-only"):
        ev.evaluate(run.parent / "run-seed1", name)
    folder = run.parent / "run-seed1" / "original" / "eval"
    for r in rows:  # another seed's model would have said something else
        if r["split"] == "retain":
            r["generation"] = ""
    stage.write_text(folder / "generations.jsonl", "\n".join(map(json.dumps, rows)))
    stage.write_json(folder / "metrics.json", ev.summarise(rows))
    reseal(folder)
    ev.main(["report", str(run)])
    seeds = stage.read_json(run / "report.json")["seeds"]
    assert seeds["seeds"] == [0, 1] and set(seeds["values"]) == {"original", "retain-only"}
    assert seeds["values"]["original"]["retain.rouge_l"] == [1, 0]
    assert "0.5000 ± 0.7071" in (run / "report.md").read_text("utf-8")
    made = stage.read_stage(folder.parent)
    made["why"]["settings"]["lr"] = 1.0
    stage.write_stage(folder.parent, made)
    with pytest.raises(stage.UserError, match="made with other lr"):
        ev.main(["report", str(run)])
    settings = stage.read_json(run / "settings.json")
    stage.write_json(run.parent / "run-seed1" / "settings.json", settings | {"seed": 1, "lr": 1.0})
    with pytest.raises(stage.UserError, match="differs from .* in lr"):
        ev.main(["report", str(run), "--runs", str(run.parent / "run-seed1")])


def spoil_model(run):
    info = stage.read_stage(run / "original")
    stage.write_stage(run / "original", info | {"fingerprint": "another"})


def spoil_data(run):
    with open(run.parent / "data" / "tofu" / "retain90.json", "a") as file:
        file.write(json.dumps({"question": "New?", "answer": "New."}) + "\n")


def spoil_settings(run):
    settings = stage.read_json(run / "settings.json")
    stage.write_json(run / "settings.json", settings | {"max_total_tokens": 20})


def spoil_code(run):
    info = stage.read_stage(run / "original" / "eval")
    info["why"]["code"] = "older"
    stage.write_stage(run / "original" / "eval", info)


def spoil_metrics(run):
    metrics = stage.read_json(run / "original" / "eval" / "metrics.json")
    metrics["values"]["forget.rouge_l"] = 0.0
    stage.write_json(run / "original" / "eval" / "metrics.json", metrics)


def spoil_with_seal(run):
    spoil_metrics(run)
    reseal(run / "original" / "eval")


def reseal(folder):
    info = stage.read_stage(folder, files=False)
    stage.write_stage(folder, info | {"files": stage.seal(folder)})


def spoil_rows(run):
    path = run / "original" / "eval" / "generations.jsonl"
    path.write_text(path.read_text("utf-8")[:-30], "utf-8")


def spoil_all(run):
    for folder in run.glob("*/eval"):
        shutil.rmtree(folder)


@pytest.mark.parametrize("spoil, says", [
    (spoil_model, "not of the model now"), (spoil_data, "not of today's retain90.json"),
    (spoil_settings, "other settings"), (spoil_code, "different versions"),
    (spoil_with_seal, "does not follow"), (spoil_metrics, "metrics.json is not what its stage"),
    (spoil_rows, "generations.jsonl is not what its stage"),
    (spoil_all, "holds no evaluation")])
def test_report_refuses_what_does_not_belong_together(run, spoil, says):
    spoil(run)
    with pytest.raises(stage.UserError, match=says) as error:
        ev.main(["report", str(run), "--recompute"])
    assert "\n" not in str(error.value) and not (run / "report.md").exists()


def test_evaluate_refuses_what_cannot_be_evaluated(run):
    (run.parent / "empty").mkdir()
    for arguments, says in [([run, "nowhere"], "not a finished stage"),
                            ([run, "original", "--limit", "-1"], "--limit is -1"),
                            ([run.parent / "empty"], "holds no finished model"),
                            ([run.parent / "none", "original"], "settings.json is missing")]:
        with pytest.raises(stage.UserError, match=says):
            ev.main(["evaluate", *map(str, arguments)])
    model, tokenizer, bench, s = loaded(run)
    own, tokenizer.encode = tokenizer.encode, lambda text, bos: [model.config.vocab_size]
    with pytest.raises(stage.UserError, match="outside the model's vocabulary"):
        ev.evaluate_model(model, tokenizer, bench, s)
    tokenizer.encode = own
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(stage.UserError, match="not a number"):
        ev.evaluate_model(model, tokenizer, bench, s)


def test_text_in_a_table_cell_stays_there():
    assert report._shown("a | b\n`c` *d*") == r"a \| b \`c\` \*d\*"
    assert report._shown("") == "(empty)" and report._shown("x" * 400).endswith("{…}")


# --------------------------------------------------------------------------------- real TOFU's text


def test_rouge_l_on_real_answers():
    if not os.environ.get("SIMU_DATA"):
        pytest.skip("SIMU_DATA is not set")
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], True)
    for row in data.load_tofu(Path(os.environ["SIMU_DATA"]) / "tofu", "forget10_perturbed"):
        for candidate in (row.paraphrased_answer, row.perturbed_answers[0], row.question):
            expected = scorer.score(row.answer, candidate)["rougeL"]
            assert ev.rouge_l(row.answer, candidate) == pytest.approx(tuple(expected), abs=1e-9)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_values(), ensure_ascii=False, indent=0) + "\n", "utf-8")
