"""pipeline/report.py, columns.py, card.py: a run's evaluations beside the paper's numbers."""

import dataclasses
import json
import shutil
import statistics
from pathlib import Path

import pytest
from test_eval import micro_tofu, teach

import data
import eval as ev
import simu
from model import UserError, read_json, write_json
from pipeline import card, columns, evaluate, report
from pipeline.__main__ import main
from pipeline.settings import read_settings
from pipeline.stage import read_stage

# -------------------------------------------------------------------------- the paper's own numbers


def from_columns(kind: str, numbers) -> tuple[float, float]:
    """A published row's aggregate, as printed and as it follows from the row's other columns."""
    names = [name for c in columns.MAIN[kind] for name in c.names.split(" / ")]
    row = dict(zip(names, numbers, strict=True))
    em = "accuracy" if kind == "tofu" else "exact_match"
    return row["aggregate"], ev.aggregate(
        em_forget=row[f"forget.{em}"], rouge_forget=row["forget.rouge_l"], mia=row["mia.auc"],
        em_retain=row[f"retain.{em}"], rouge_retain=row["retain.rouge_l"])


def test_aggregate_reproduces_table_1():
    for model in ("llama2-7b", "olmo-1b"):
        for approach, numbers in columns.PUBLISHED["tofu", model].items():
            printed, computed = from_columns("tofu", numbers)
            # One cell of Table 1 is a misprint: with ROUGE-L retain .7239 for .8239 it would fit.
            misprint = 0.02 if (model, approach) == ("olmo-1b", "Original") else 0
            assert computed - printed == pytest.approx(misprint, abs=5e-5), (model, approach)


def test_table_2_follows_from_no_aggregate():
    rows = [from_columns("lume", numbers) for model in ("llama2-7b", "olmo-1b")
            for numbers in columns.PUBLISHED["lume", model].values()]
    assert len(rows) == 8 and all(abs(computed - printed) > 9e-4 for printed, computed in rows)
    assert max(abs(computed - printed) for printed, computed in rows) > 0.18


# ---------------------------------------------------------------------------------------- a run

MODELS = ["original", "retain-only", "simu-graddiff"]  # in the order of the alphabet


def stages(home: Path, run: Path, *options, cell=("tofu", "olmo-1b"),
           commands=("original", "attribute", "mask", "unlearn")) -> Path:
    """Stages of a run that links the two micro models of home; returns the run's folder."""
    words = [*cell, "--out", run, "--data", home / "data", "--weights", home / "knows",
             "--max-total-tokens", "48", "--batch", "2", "--epochs", "1", "--lr", "1e-3"]
    if cell[0] == "tofu":
        words += ["--retain-only", home / "ignorant"]
    for command in commands:
        main([command, *map(str, [*words, *options])])
    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Micro TOFU, a model that knows it, one that never saw forget10, and a run, evaluated."""
    home = tmp_path_factory.mktemp("micro")
    micro_tofu(home / "data")
    forget, retain, facts = (data.load_tofu(home / "data" / "tofu", split) for split in (
        "forget10", "retain90", "world_facts_perturbed"))
    for name, rows in (("knows", retain + facts + forget), ("ignorant", retain + facts)):
        (home / name).mkdir()
        teach(home / name, rows)
    main(["evaluate", str(stages(home, home / "run"))])
    return home


@pytest.fixture
def run(home, tmp_path):
    """A copy of that run, to be spoilt."""
    return Path(shutil.copytree(home / "run", tmp_path / "run", symlinks=True))


def reported(run: Path, *options) -> tuple[dict, str]:
    """report.json and report.md, made now."""
    main(["report", str(run), *map(str, options)])
    return read_json(run / "report.json"), (run / "report.md").read_text("utf-8")


def values_of(stored: dict) -> dict:
    return {e["name"]: e["metrics"]["values"] for e in stored["evaluations"]}


def test_report_beside_the_paper(run, capsys):
    stored, text = reported(run)
    out = capsys.readouterr().out
    lines = [x for x in out.splitlines() if x.startswith("|")]
    assert [x.split("|")[1].strip() for x in lines if "---" not in x] == [
        "Approach", "Retain-only (ideal)", "Original", "SIMU-GradDiff", "Original, published",
        "FO-GradDiff, published", "SO-GradDiff, published", "SIMU-GradDiff, published"]
    assert [c.strip() for c in lines[0].split("|")[2:-1]] == [
        "Aggregate ↑", "EM-Forget ↓", "ROUGE-L-Forget ↓", "MIA ↓", "EM-Retain ↑",
        "ROUGE-L-Retain ↑", "EM-WF ↑", "ROUGE-L-WF ↑", "MIA, SOUL's labels", "Aggregate with it"]
    assert "0.8438" in lines[-1] and "10.25%" in lines[-1] and lines[-1] in text
    assert "published (Table 5): 29554 of 32768" in text and "the true answers have" in text
    assert "- real_authors: no such rows" in text and "labels out in another order" in text
    assert "What does Ada collect?" in text  # the same prompts put to every model
    values = values_of(stored)
    assert values["retain-only"]["forget_quality"] == 1
    assert values["original"]["forget_quality"] < 0.5 and values["original"]["privleak"] < -90
    for name in values["original"]:  # also those that a fork adds
        missing = all(x[name] is None for x in values.values())
        assert (f"| {name} " in text) != missing, name


def test_every_setting_of_a_row_is_told(run):
    _, text = reported(run)
    card_text = (run / "simu-graddiff/README.md").read_text("utf-8")
    for name, value in (("optimiser", "sophia"), ("objective", "graddiff"), ("gamma", "204.8"),
                        ("threshold", "0.1"), ("steps", "5"), ("template", "qa")):
        for page in (text, card_text):
            line, = [x for x in page.splitlines() if x.startswith(f"| {name} ")]
            assert value in line.replace("|", " ").split(), name


def test_limit_is_marked_everywhere(run):
    shutil.rmtree(run / "original" / "eval")
    main(["evaluate", str(run), "original", "--limit", "2"])
    assert not (run / "original" / "eval").exists()
    stored, text = reported(run)
    metrics = stored["evaluations"][1]["metrics"]
    assert metrics["counts"]["forget"] == 2 and "2 rows" in metrics["partial"]
    assert metrics["values"]["forget_quality"] is None
    assert "Original (partial: at most 2 rows of each split)" in text


@pytest.mark.parametrize("words, says", [
    ([".", "nowhere"], "not a finished stage"), ([".", "original", "--limit", "-1"], "--limit"),
    (["mask"], "holds no finished model"), (["none", "original"], "settings.json is missing")])
def test_evaluate_refuses_what_cannot_be_evaluated(run, words, says):
    with pytest.raises(UserError, match=says):
        main(["evaluate", str(run / words[0]), *words[1:]])


@pytest.mark.parametrize("ended, seen, says", [
    (0.1, 0.3, "90% of the answers were cut off .* --max-total-tokens"),
    (1.0, 0.95, "95% of the answers' tokens .* another --template"),
    (1.0, 0.2, "more --learn-epochs"), (None, None, "more --learn-epochs")])
def test_an_original_that_does_not_know_is_told_why(run, monkeypatch, ended, seen, says):
    values = evaluate.read_metrics(run / "original" / "eval")["values"] | {
        "forget.rouge_l": 0.1, "forget.ended": ended, "forget.exact_memorisation": seen}
    monkeypatch.setattr(report, "read_metrics", lambda folder: dict(values=values))
    with pytest.raises(UserError, match="0.1000, less than --must-know 0.5.*" + says):
        report.check_original(run)


def test_forget_quality_by_retain_only_of_another_run(run):
    other = run.with_name("other")
    expected = values_of(reported(run)[0])["original"]["forget_quality"]
    other.mkdir()
    shutil.copy(run / "settings.json", other)
    shutil.move(run / "retain-only", other / "original")
    stored, _ = reported(run)
    evaluation = stored["evaluations"][0]["metrics"]
    assert evaluation["values"]["forget_quality"] is None
    assert "retain-only" in evaluation["notes"]["forget_quality"]
    stored, _ = reported(run, "--retain-only", other / "original")
    assert values_of(stored)["original"]["forget_quality"] == expected
    settings = read_json(run / "settings.json")
    for change, says in ((dict(template="llama2"), "template"), (None, "not a run folder")):
        (other / "settings.json").unlink()
        if change:
            write_json(other / "settings.json", settings | change)
        with pytest.raises(UserError, match=says):
            reported(run, "--retain-only", other / "original")
    with pytest.raises(UserError, match="mask/eval is not a finished stage"):
        reported(run, "--retain-only", run / "mask")


def test_mean_and_deviation_over_seeds(home, run, capsys):
    second = stages(home, run.with_name("run-seed1"), "--seed", "1")
    main(["evaluate", str(second)])
    stored, text = reported(run)
    assert stored["seeds"]["seeds"] == [0, 1] and set(stored["seeds"]["values"]) == set(MODELS)
    each = [values_of(x)["simu-graddiff"]["aggregate"] for x in (stored, reported(second)[0])]
    assert stored["seeds"]["values"]["simu-graddiff"]["aggregate"] == each
    mean, deviation = statistics.mean(each), statistics.stdev(each)
    assert f"| SIMU-GradDiff       | {mean:.4f} ± {deviation:.4f} |" in text
    # Another rate: left out.
    stages(home, second, "--seed", "1", "--lr", "2e-3", commands=["unlearn"])
    main(["evaluate", str(second)])
    capsys.readouterr()
    stored, text = reported(run)
    assert stored["seeds"] is None and "±" not in text
    assert f"mean over seeds: {second} differs from {run} in lr" in capsys.readouterr().out


# ------------------------------------------------------------------ what is not of what a run holds


def test_what_is_stale_is_named_and_stands_in_no_table(home, run, capsys):
    stages(home, run, "--threshold", "0.9", commands=["mask"])
    stored, text = reported(run)
    assert list(stored["stale"]) == ["simu-graddiff"]
    assert "mask" in stored["stale"]["simu-graddiff"]
    assert list(values_of(stored)) == ["retain-only", "original"]
    assert "- simu-graddiff: " in text and "| SIMU-GradDiff  " not in text
    assert f"left out: {run}/simu-graddiff: " in capsys.readouterr().out


def test_a_mask_of_other_scores_is_not_counted(home, run):
    stages(home, run, "--steps", "3", commands=["attribute"])
    assert "mask: not of what this run now holds: attribution" in reported(run)[1]
    shutil.rmtree(run / "mask")
    section = reported(run)[1].split("## Critical neurons")[1].splitlines()[2]
    assert section == "published (Table 5): 29554 of 32768"


def other_data(run):
    settings = read_json(run / "settings.json")
    changed = shutil.copytree(settings["data"], run.with_name("data"))
    with open(changed / "tofu" / "retain90.json", "a") as file:
        file.write(json.dumps({"question": "New?", "answer": "New."}) + "\n")
    write_json(run / "settings.json", settings | {"data": str(changed)})


def no_evaluation(run):
    for folder in run.glob("*/eval"):
        shutil.rmtree(folder)


@pytest.mark.parametrize("spoil, says", [
    (other_data, "of what it now holds .*data/retain90.json"),
    (no_evaluation, "holds no evaluation; run `python -m pipeline evaluate .* STAGE`")])
def test_report_refuses_what_does_not_belong_together(run, spoil, says):
    spoil(run)
    with pytest.raises(UserError, match=says) as error:
        reported(run)
    assert "\n" not in str(error.value) and not (run / "report.md").exists()


def test_where_it_was_computed_makes_no_row_stale(run):
    for name in MODELS:
        info = read_stage(run / name / "eval")
        info["why"]["settings"] |= dict(device="cuda", dtype="bfloat16")
        write_json(run / name / "eval" / "stage.json", info)
    assert reported(run)[0]["stale"] == {}


def test_a_report_outlives_a_method_of_a_fork(home, run, monkeypatch):
    monkeypatch.setitem(simu.METHODS, "mine", simu.METHODS["so"])
    stages(home, run, "--method", "mine", commands=["unlearn"])
    main(["evaluate", str(run), "mine-graddiff"])
    monkeypatch.delitem(simu.METHODS, "mine")
    stored, _ = reported(run)
    assert [e["label"] for e in stored["evaluations"]] + list(stored["stale"]) == [
        "Retain-only (ideal)", "Original", "SIMU-GradDiff", "mine-graddiff"]


def test_a_card_names_base_and_licence_and_no_path(home, tmp_path):
    base = shutil.copytree(home / "knows", tmp_path / "base")
    run = stages(home, tmp_path / "run", "--weights", base)
    readme = run / "simu-graddiff" / "README.md"
    notes = read_stage(run / "mask")["notes"]
    assert f"{notes['critical']} of {notes['total']}" in readme.read_text("utf-8")
    assert "Not evaluated yet" in readme.read_text("utf-8")
    main(["evaluate", str(run)])
    for licence, says in (("", "base does not say here what licence"),
                          ("license: mit\n", "base says of itself: mit.")):
        (base / "README.md").write_text(f"---\n{licence}tags: [x]\n---\n# A model\n")
        reported(run)
        text = readme.read_text("utf-8")
        assert "unlearned by SIMU-GradDiff" in text and "| SIMU-GradDiff |" in text
        assert "Base: base." in text and says in text and "Apache" not in text  # as OLMo-1B's is
        assert str(tmp_path) not in text and str(home) not in text
    (base / "README.md").unlink()
    s = dataclasses.replace(read_settings(run), weights="")  # the paper's base model
    assert "OLMo-1B is under Apache" in card.provenance(s)[1]


def test_text_in_a_table_cell_stays_in_it():
    assert report.in_a_cell("a | b\n`c` *d*") == r"a \| b \`c\` \*d\*"
    assert report.in_a_cell("") == "(empty)" and report.in_a_cell("x" * 400).endswith("{…}")
