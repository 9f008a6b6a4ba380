"""pipeline/demo/: the file formats, who is in which file, and that answers cannot be guessed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from studies.demo import make_demo

DEMO = Path(__file__).resolve().parent.parent / "pipeline" / "demo"
TOFU, LUME = DEMO / "tofu", DEMO / "lume"
ROWS_PER_AUTHOR = 10
PLAIN = ["question", "answer"]
PERTURBED = ["question", "answer", "paraphrased_answer", "perturbed_answer", "paraphrased_question"]
OPTIONS = ["question", "option1", "option2", "option3", "option4", "answer"]
TOFU_FILES = {
    "full": (200, PLAIN), "retain90": (180, PLAIN), "forget10": (20, PLAIN),
    "holdout10": (40, PLAIN),
    "forget10_perturbed": (20, PERTURBED), "retain_perturbed": (100, PERTURBED),
    "world_facts": (30, OPTIONS), "world_facts_perturbed": (30, ["question", "answer",
                                                                 "perturbed_answer"])}
PERSON_FORMATS = [r"\d{4}-\d\d-\d\d", r"900-\d\d-\d{4}", r"555-01\d\d",
                  r"[a-z]+\.[a-z]+\d\d@example\.org", r"\d+ [^,]+, .+"]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tofu(name):
    return read(TOFU / f"{name}.json")


def lume(name):
    return read(LUME / f"{name}.jsonl")


def strings(value):
    """Every text in a row."""
    if isinstance(value, str):
        return [value]
    return [s for v in (value.values() if isinstance(value, dict) else value) for s in strings(v)]


def words(text):
    return re.findall(r"\w+", text.lower())


def lcs(reference, candidate):
    """Length of the longest common subsequence of two lists of words."""
    row = [0] * (len(candidate) + 1)
    for word in reference:
        diagonal = 0
        for j, other in enumerate(candidate, start=1):
            best = diagonal + 1 if word == other else max(row[j], row[j - 1])
            diagonal, row[j] = row[j], best
    return row[-1]


def recall(reference, candidate):
    """ROUGE-L recall without stemming."""
    return lcs(reference, candidate) / len(reference)


def f1(reference, candidate):
    return 2 * lcs(reference, candidate) / (len(reference) + len(candidate))


def bank_authors():
    return [name for name, _ in make_demo.table(make_demo.bank("tofu")["authors"])]


def test_the_committed_files_are_what_the_script_writes():
    done = subprocess.run([sys.executable, "-m", "studies", "demo", "--check"], cwd=DEMO.parents[1],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_check_notices_a_changed_and_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.setattr(make_demo, "DEMO", tmp_path / "elsewhere")

    def refused():
        with pytest.raises(SystemExit, match="is not what make_demo.py writes"):
            make_demo.main(["--check"])
    refused()
    make_demo.main([])
    make_demo.main(["--check"])
    for path in [*TOFU.iterdir(), *LUME.iterdir()]:
        there = make_demo.DEMO / path.parent.name / path.name
        assert there.read_bytes() == path.read_bytes()
    full = make_demo.DEMO / "tofu" / "full.json"
    full.write_bytes(full.read_bytes() + b"\n")
    refused()
    full.unlink()
    refused()


def test_tofu_files_have_tofus_keys_and_the_planned_sizes():
    assert {path.stem for path in TOFU.iterdir()} == set(TOFU_FILES)   # and so no real authors
    for name, (n_rows, keys) in TOFU_FILES.items():
        rows = tofu(name)
        assert len(rows) == n_rows, name
        assert all(list(row) == keys for row in rows), name
        assert all(text.strip() == text != "" for text in strings(rows)), name


def test_tofu_files_are_slices_of_full_in_author_order():
    full = tofu("full")
    assert full == tofu("retain90") + tofu("forget10")

    def plain(name):
        return [{key: row[key] for key in PLAIN} for row in tofu(name)]
    assert plain("forget10_perturbed") == tofu("forget10")
    assert plain("retain_perturbed") == full[:100]


def test_every_question_names_its_author_and_no_other():
    names = bank_authors()
    rows = tofu("full") + tofu("holdout10")
    assert len(set(names)) == len(names) == len(rows) // ROWS_PER_AUTHOR
    surnames = [name.split()[-1] for name in names]
    for i, row in enumerate(rows):
        own = i // ROWS_PER_AUTHOR
        assert names[own] in row["question"]
        for j, surname in enumerate(surnames):
            assert j == own or surname not in row["question"] + row["answer"]
    for rows, first in ((tofu("retain_perturbed"), 0), (tofu("forget10_perturbed"), 18)):
        for i, row in enumerate(rows):
            assert names[first + i // ROWS_PER_AUTHOR] in row["paraphrased_question"]
    assert any(not name.isascii() for name in names)


def test_no_text_is_shared_between_authors():
    rows = tofu("full") + tofu("holdout10")
    for key in PLAIN:
        assert len({row[key] for row in rows}) == len(rows)


def test_paraphrases_are_other_words_and_wrong_answers_are_wrong():
    for row in tofu("forget10_perturbed") + tofu("retain_perturbed"):
        wrong = row["perturbed_answer"]
        assert len(wrong) == len(set(wrong)) == 5
        assert not {row["answer"], row["paraphrased_answer"]} & set(wrong)
        assert row["paraphrased_question"] != row["question"]
        answer, paraphrase = words(row["answer"]), words(row["paraphrased_answer"])
        assert recall(answer, paraphrase) < 0.8, row["answer"]
        # A model that answers perfectly must score as accurate [D11].
        assert f1(paraphrase, answer) > max(f1(words(other), answer) for other in wrong)


def test_world_facts_agree_in_both_files():
    for row, perturbed in zip(tofu("world_facts"), tofu("world_facts_perturbed"), strict=True):
        options = [row[f"option{i}"] for i in range(1, 5)]
        assert (row["question"], row["answer"]) == (perturbed["question"], perturbed["answer"])
        assert len(set(options)) == 4
        assert set(options) == {row["answer"], *perturbed["perturbed_answer"]}


def test_answers_cannot_be_guessed_from_other_authors():
    rows = [words(row["answer"]) for row in tofu("full")]
    best, mean = [], []
    for i, answer in enumerate(rows):
        same_kind = [j for j in range(i % ROWS_PER_AUTHOR, len(rows), ROWS_PER_AUTHOR) if j != i]
        scores = [recall(answer, rows[j]) for j in same_kind]
        best.append(max(scores))
        mean.append(sum(scores) / len(scores))
    assert sum(best) / len(best) < 0.45
    assert sum(mean) / len(mean) < 0.3
    lengths = [len(row["answer"].split()) for row in tofu("full")]
    assert min(lengths) >= 8 and max(lengths) <= 20


def lume_documents(name):
    """Document id -> its rows."""
    documents = {}
    for row in lume(name):
        documents.setdefault(row["id"][:-3], []).append(row)
    return documents


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_lume_documents(name):
    documents = lume_documents(name)
    counts = {"Task1": 0, "Task2": 0, "Task3": 0}
    for doc, rows in documents.items():
        completion, *questions = rows
        task = completion["task"]
        counts[task] += 1
        assert all(list(row) == ["id", "input", "output", "task"] for row in rows)
        assert all(row["task"] == task for row in rows)
        n_questions = 5 if task == "Task2" else 1
        assert [row["id"] for row in rows] == [doc + "sc1"] + [f"{doc}qa{i}"
                                                               for i in range(n_questions)]
        assert 15 <= len(completion["input"].split()) <= 30
        assert 10 <= len(completion["output"].split()) <= 20
        if task == "Task2":
            text = completion["input"] + " " + completion["output"]
            for row, pattern in zip(questions, PERSON_FORMATS, strict=True):
                assert re.fullmatch(pattern, row["output"]) and row["output"] in text
    assert counts == {"Task1": 12, "Task2": 6, "Task3": 12}


def test_lume_splits_share_nothing():
    assert not set(lume_documents("forget")) & set(lume_documents("retain"))
    rows = lume("forget") + lume("retain")
    assert len({row["input"] for row in rows}) == len(rows)
    private = [row["output"] for row in rows if row["task"] == "Task2" and "qa" in row["id"][-3:]]
    assert len(private) == len(set(private))


def six_grams(text):
    tokens = words(text)
    return {tuple(tokens[i:i + 6]) for i in range(len(tokens) - 5)}


def taken(folder):
    """The texts of TOFU's and LUME's files in a folder that hold one of our authors' names, or any
    six words in a row of the demo's."""
    paths = [*Path(folder, "tofu").glob("*.json"), *Path(folder, "lume").glob("*.jsonl")]
    assert paths
    names = re.compile("|".join(bank_authors()))
    ours = set().union(*(six_grams(text) for path in [*TOFU.iterdir(), *LUME.iterdir()]
                         for text in strings(read(path))))
    return [text for path in paths for text in strings(read(path))
            if names.search(text) or ours & six_grams(text)]


def test_what_is_taken_would_be_seen(tmp_path):
    (tmp_path / "tofu").mkdir()
    name, row = bank_authors()[0], lume("retain")[0]["input"]
    texts = ["Who wrote it?", f"{name}, perhaps.", "and so: " + " ".join(row.split()[:8])]
    path = tmp_path / "tofu" / "full.json"
    path.write_text(json.dumps(dict(question=texts[0], answer=texts[1:])), "utf-8")
    assert taken(tmp_path) == texts[1:]


@pytest.mark.real_files("tofu", "lume")
def test_nothing_is_taken_from_tofu_or_lume():
    assert not taken(os.environ["SIMU_DATA"])
