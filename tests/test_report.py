"""pipeline/evaluate.py, report.py, card.py: evaluations of a run's models, laid side by side."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from test_eval import micro_tofu, teach

import eval as ev
import simu
from model import UserError, read_json, write_json, write_text
from pipeline import card, columns, evaluate, reach, report, slices, stage
from pipeline.__main__ import main
from pipeline.settings import Settings, load_benchmark, read_settings
from pipeline.stage import Stage, content, data_inputs, read_stage, seal, write_stage

# -------------------------------------------------------------------------- the paper's own numbers


def from_columns(kind: str, numbers) -> tuple[float, float]:
    """A published row's aggregate, as printed and as it follows from the row's other columns."""
    names = [n for _, _, some in columns.COLUMNS[kind] for n in some]
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


def make_run(run: Path, root: Path, *, seed: int = 0, settings: dict = {}):
    """A run folder of the cell (tofu, olmo-1b): original, retain-only, and simu-graddiff, which is
    the retain-only model again."""
    s = Settings(benchmark="tofu", model="olmo-1b", data=str(root), out=str(run), seed=seed,
                 device="cpu", max_total_tokens=48, **settings)
    write_json(run / "settings.json", dataclasses.asdict(s))
    bench, like = load_benchmark(s), run.parent / "run"
    known = bench.retain + bench.world_facts
    plain = dict(settings=s, code=(), takes=(slices.Slice,), inputs=data_inputs(s))
    for name, rows in (("retain-only", known), ("original", known + bench.forget)):
        with Stage(run / name, **plain) as folder:
            if seed == 0:
                teach(folder, rows)
            else:
                copy_model(like / name, folder)
    inputs = plain["inputs"] | dict(original=content(run / "original"))
    with Stage(run / "simu-graddiff", **plain | dict(
            takes=(slices.Slice, simu.Unlearning), inputs=inputs)) as folder:
        copy_model(run / "retain-only", folder)
    return s


def copy_model(source: Path, folder: Path):
    shutil.copytree(source, folder, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("eval*", "stage.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, evaluated; nobody may write into it."""
    root = tmp_path_factory.mktemp("micro")
    micro_tofu(root / "data")
    make_run(root / "run", root / "data")
    for name in ("retain-only", "original", "simu-graddiff"):
        evaluate.evaluate(root / "run", name)
    return root


@pytest.fixture
def run(made, tmp_path):
    """A copy of that run, to be spoilt."""
    shutil.copytree(made, tmp_path / "copy")
    s = read_json(tmp_path / "copy" / "run" / "settings.json")
    write_json(tmp_path / "copy" / "run" / "settings.json",
                     s | {"data": str(tmp_path / "copy" / "data")})
    return tmp_path / "copy" / "run"


# --------------------------------------------------------------------- the command line, and faults


def test_finished_evaluations_are_skipped(made, capsys):
    main(["evaluate", str(made / "run")])  # every model of the run
    out = capsys.readouterr().out.splitlines()
    assert out == [f"[{name}/eval] already made; skipped"
                   for name in ("original", "retain-only", "simu-graddiff")]


def test_a_killed_evaluation_goes_on(run, monkeypatch):
    folder = run / "original" / "eval"
    before = {n: (folder / n).read_bytes() for n in ("metrics.json", "generations.jsonl")}
    shutil.rmtree(folder)
    generate, asked = evaluate.generate, []

    def counted(model, prompts, **options):
        asked.append(len(prompts))
        return generate(model, prompts, **options)

    monkeypatch.setattr(evaluate, "generate", counted)
    evaluate.evaluate(run, "original")
    whole = sum(asked)  # questions whose losses did not tell the answer
    assert whole > 4
    asked.clear()
    shutil.rmtree(folder)

    def dies_third(model, prompts, **options):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return generate(model, prompts, **options)

    monkeypatch.setattr(evaluate, "KEEP_EVERY", 2)
    monkeypatch.setattr(evaluate, "generate", dies_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run, "original")
    assert not folder.exists()
    kept = run / "original" / ".simu-partial-eval" / "resume" / "generations.jsonl"
    with open(kept, "a") as file:
        file.write('["torn')
    asked.clear()
    monkeypatch.setattr(evaluate, "generate", counted)
    evaluate.evaluate(run, "original")
    left = whole - 4  # which were answered before
    assert asked == [2] * (left // 2) + [1] * (left % 2)
    assert before == {n: (folder / n).read_bytes() for n in before}
    assert sorted(p.name for p in folder.iterdir()) == [*sorted(before), "stage.json"]


# ------------------------------------------------------------------------- summaries made again


def older(run: Path, name: str = "original") -> Path:
    """An evaluation whose metrics.json is of code that is no more, and says another thing."""
    folder = run / name / "eval"
    metrics = read_json(folder / "metrics.json")
    metrics["values"]["retired"] = 0.5
    write_json(folder / "metrics.json", metrics)
    info = read_stage(folder, files=False)
    write_stage(folder, info | dict(files=seal(folder), derived={"metrics.json": "older"}))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "stage.json"}


READERS = {"report": lambda run: main(["report", str(run)]),
           "check": lambda run: report.check_original(run),
           "evaluate": lambda run: main(["evaluate", str(run), "original"]),
           "recompute": lambda run: main(["report", str(run), "--recompute"])}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_an_old_summary_makes_it_again(run, capsys, monkeypatch, reader):
    monkeypatch.setattr(evaluate.Transformer, "from_pretrained", None)  # no model is asked
    before = files_of(run / "original" / "eval")
    folder = older(run)
    assert files_of(folder) != before
    READERS[reader](run)
    told = [x for x in capsys.readouterr().out.splitlines() if "made again" in x]
    assert told == ["[original/eval] metrics.json made again from generations.jsonl: the code that "
                    "summarises changed"]
    assert files_of(folder) == before and set(read_stage(folder)["files"]) == set(before)
    READERS[reader](run)
    assert "made again" not in capsys.readouterr().out


def test_rows_that_were_changed_make_no_new_summary(run):
    folder = older(run)
    spoil_rows(run)
    with pytest.raises(UserError, match="generations.jsonl is not what its stage wrote"):
        evaluate.read_metrics(folder)


@pytest.mark.parametrize("dies", [1, 2, 3])
def test_a_kill_while_a_summary_is_made_again(run, monkeypatch, dies):
    before, folder, written = files_of(run / "original" / "eval"), older(run), []

    def dying(write):
        def or_die(*given):
            written.append(given)
            if len(written) == dies:
                raise KeyboardInterrupt
            write(*given)
        return or_die

    with monkeypatch.context() as patch:
        for name in ("write_stage", "write_json"):
            patch.setattr(stage, name, dying(getattr(stage, name)))
        with pytest.raises(KeyboardInterrupt):
            evaluate.read_metrics(folder)
    read_stage(folder)  # whole at any time, and no file in it is a stranger's
    assert stage.foreign(folder) is None
    assert evaluate.evaluation_job(read_settings(run), "original").changed() == []
    evaluate.read_metrics(folder)
    assert files_of(folder) == before and set(read_stage(folder)["files"]) == set(before)


def edited_code(monkeypatch, tmp_path, old: str, new: str):
    """From now on the digests are of a copy of the code in which eval.py is another."""
    copied = {}
    for name, path in reach.FOLLOWED.items():
        copied[name] = tmp_path / "code" / f"{name}.py"
        copied[name].parent.mkdir(exist_ok=True)
        if path.is_file():
            shutil.copy(path, copied[name])
    text = copied["eval"].read_text("utf-8")
    assert old in text
    copied["eval"].write_text(text.replace(old, new, 1), "utf-8")
    monkeypatch.setattr(reach, "FOLLOWED", copied)
    reach.read_module.cache_clear()
    reach.digest_of.cache_clear()


@pytest.fixture
def clean_digests():
    yield
    reach.read_module.cache_clear()
    reach.digest_of.cache_clear()


def test_an_edited_metric_remakes_the_summary_alone(clean_digests, run, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        edited_code(patch, run.parent, "lambda row: float(exact_match(",
                    "lambda row: 2 * float(exact_match(")
        patch.setattr(evaluate.Transformer, "from_pretrained", None)
        main(["evaluate", str(run), "original"])
        out = capsys.readouterr().out
        assert "[original/eval] already made; skipped" in out and "metrics.json made again" in out


def test_an_edit_of_what_asks_remakes_generations(clean_digests, run, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        edited_code(patch, run.parent, "drafts.append(answer)", "drafts.append(answer[:1])")
        main(["evaluate", str(run), "original"])
        assert "[original/eval] made again: code changed" in capsys.readouterr().out


@pytest.mark.parametrize("values, notes, measure, known", [
    ({"forget.rouge_l": 0.4}, {}, "ROUGE-L", 0.4),
    ({"forget.rouge_l": 0.4}, {"forget.rouge_l": "1 of 3 rows have none"},
     "ROUGE-L (1 of 3 rows have none)", 0.4),
    ({"forget.rouge_l": None, "forget.exact_match": 0.2}, {"forget.rouge_l": "no word"},
     "exact match (no ROUGE-L: no word)", 0.2)])
def test_must_know_judges_by_what_is_defined(values, notes, measure, known):
    assert report.what_is_known(dict(values=values, notes=notes)) == (measure, known)


@pytest.mark.parametrize("ended, seen, says", [
    (0.1, 0.3, "90% of the answers were cut off .* --max-total-tokens"),
    (1.0, 0.95, "95% of the answers' tokens .* another --template"),
    (1.0, 0.2, "more --learn-epochs"), (None, None, "more --learn-epochs")])
def test_an_original_that_does_not_know_is_told_why(run, ended, seen, says):
    folder = run / "original" / "eval"
    write_json(run / "settings.json", read_json(run / "settings.json") | {"must_know": 1.0})
    metrics = read_json(folder / "metrics.json")
    metrics["values"] |= {"forget.rouge_l": 0.1, "forget.ended": ended,
                          "forget.exact_memorisation": seen}
    write_json(folder / "metrics.json", metrics)
    reseal(folder)
    with pytest.raises(UserError, match=f"ROUGE-L 0.1000, less than --must-know 1.0; .*{says}"):
        report.check_original(run)


def test_limit_is_marked_everywhere(run, capsys):
    shutil.rmtree(run / "original" / "eval")
    main(["evaluate", str(run), "original", "--limit", "2"])
    metrics = read_json(run / "original" / "eval-limit-2" / "metrics.json")
    assert metrics["counts"]["forget"] == 2 and "2 rows" in metrics["partial"]
    assert not (run / "original" / "eval").exists()
    capsys.readouterr()
    main(["report", str(run)])
    shown = capsys.readouterr().out
    assert "Original (partial: at most 2 rows of each split)" in shown
    text = (run / "report.md").read_text("utf-8")
    assert text.count("Original (partial") >= 4  # main table, both others, MIA
    metrics = read_json(run / "report.json")["evaluations"][1]["metrics"]
    assert metrics["partial"] and metrics["values"]["forget_quality"] is None


def test_report_beside_the_paper(run, capsys):
    main(["report", str(run), "--recompute"])
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
    first = [x.split("|")[1].strip() for x in lines]
    assert first == ["Approach", "-" * len(first[1]), "Retain-only (ideal)", "Original",
                     "SIMU-GradDiff", "Original, published", "FO-GradDiff, published",
                     "SO-GradDiff, published", "SIMU-GradDiff, published"]
    assert [c.strip() for c in lines[0].split("|")[2:-1]] == [
        "Aggregate ↑", "EM-Forget ↓", "ROUGE-L-Forget ↓", "MIA ↓", "EM-Retain ↑",
        "ROUGE-L-Retain ↑", "EM-WF ↑", "ROUGE-L-WF ↑", "MIA, SOUL's labels",
        "Aggregate with it"]
    assert "0.8438" in lines[-1] and "10.25%" in lines[-1]
    assert "29554 of 32768" in (run / "report.md").read_text("utf-8")
    by_name = {e["name"]: e["metrics"]["values"]
               for e in read_json(run / "report.json")["evaluations"]}
    # The same model as retain-only cannot be told from it; the original can.
    assert by_name["simu-graddiff"]["forget_quality"] == 1
    assert by_name["original"]["forget_quality"] == expected_quality(run) < 0.5


def expected_quality(run: Path) -> float:
    samples = [[sum(r["perturbed_losses"]) / 5 - r["paraphrased_loss"]
                for r in evaluate.read_rows(run / name / "eval") if r["split"] == "forget"]
               for name in ("original", "retain-only")]
    return ev.ks_p_value(*samples)


def test_forget_quality_without_a_retain_only_model(run, tmp_path):
    expected, elsewhere = expected_quality(run), tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(run / "settings.json", elsewhere)
    shutil.move(run / "retain-only", elsewhere / "original")
    shutil.rmtree(run / "simu-graddiff")
    main(["report", str(run)])
    evaluation = read_json(run / "report.json")["evaluations"][0]["metrics"]
    assert evaluation["values"]["forget_quality"] is None
    assert "--retain-only" in evaluation["notes"]["forget_quality"]
    main(["report", str(run), "--retain-only", str(elsewhere / "original")])
    evaluation = read_json(run / "report.json")["evaluations"][0]["metrics"]
    assert evaluation["values"]["forget_quality"] == expected
    settings = read_json(run / "settings.json")
    write_json(elsewhere / "settings.json", settings | {"template": "llama2"})
    with pytest.raises(UserError, match="with other --template"):
        main(["report", str(run), "--retain-only", str(elsewhere / "original")])
    spoil_model(elsewhere)
    write_json(elsewhere / "settings.json", settings)
    with pytest.raises(UserError, match="with other model"):
        main(["report", str(run), "--retain-only", str(elsewhere / "original")])
    (elsewhere / "settings.json").unlink()
    with pytest.raises(UserError, match="not a run folder"):
        main(["report", str(run), "--retain-only", str(elsewhere / "original")])


def test_mean_and_deviation_over_seeds(run):
    make_run(run.parent / "run-seed1", run.parent / "data", seed=1)
    rows = evaluate.read_rows(run / "original" / "eval")
    for name in ("original", "retain-only"):
        evaluate.evaluate(run.parent / "run-seed1", name)
    folder = run.parent / "run-seed1" / "original" / "eval"
    for r in rows:  # another seed's model would have said something else
        if r["split"] == "retain":
            r["generation"] = ""
    write_text(folder / "generations.jsonl", "\n".join(map(json.dumps, rows)))
    write_json(folder / "metrics.json", ev.summarise(rows))
    reseal(folder)
    main(["report", str(run)])
    seeds = read_json(run / "report.json")["seeds"]
    assert seeds["seeds"] == [0, 1] and set(seeds["values"]) == {"original", "retain-only"}
    assert seeds["values"]["original"]["retain.rouge_l"] == [1, 0]
    assert "0.5000 ± 0.7071" in (run / "report.md").read_text("utf-8")
    made = read_stage(folder.parent)
    made["why"]["settings"]["lr"] = 1.0
    write_stage(folder.parent, made)
    with pytest.raises(UserError, match="made with other lr"):
        main(["report", str(run)])
    settings = read_json(run / "settings.json")
    write_json(run.parent / "run-seed1" / "settings.json", settings | {"seed": 1, "lr": 1.0})
    with pytest.raises(UserError, match="differs from .* in lr"):
        main(["report", str(run), "--runs", str(run.parent / "run-seed1")])


def spoil_model(run):
    path = run / "original" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    reseal(run / "original")


def spoil_data(run):
    with open(run.parent / "data" / "tofu" / "retain90.json", "a") as file:
        file.write(json.dumps({"question": "New?", "answer": "New."}) + "\n")


def spoil_settings(run):
    settings = read_json(run / "settings.json")
    write_json(run / "settings.json", settings | {"max_total_tokens": 20})


def spoil_code(run):
    info = read_stage(run / "original" / "eval")
    info["why"]["code"] = "older"
    write_stage(run / "original" / "eval", info)


def spoil_metrics(run):
    metrics = read_json(run / "original" / "eval" / "metrics.json")
    metrics["values"]["forget.rouge_l"] = 0.0
    write_json(run / "original" / "eval" / "metrics.json", metrics)


def spoil_with_seal(run):
    spoil_metrics(run)
    reseal(run / "original" / "eval")


def reseal(folder):
    info = read_stage(folder, files=False)
    write_stage(folder, info | {"files": seal(folder)})


def spoil_rows(run):
    path = run / "original" / "eval" / "generations.jsonl"
    path.write_text(path.read_text("utf-8")[:-30], "utf-8")


def spoil_all(run):
    for folder in run.glob("*/eval"):
        shutil.rmtree(folder)


@pytest.mark.parametrize("spoil, says", [
    (spoil_with_seal, "does not follow"), (spoil_metrics, "metrics.json is not what its stage"),
    (spoil_rows, "generations.jsonl is not what its stage"),
    (spoil_data, "of what it now holds .*data/retain90.json"),
    (spoil_settings, "of what it now holds .*--max-total-tokens"),
    (spoil_all, "holds no evaluation; run `python -m pipeline evaluate .* STAGE`")])
def test_report_refuses_what_does_not_belong_together(run, spoil, says):
    spoil(run)
    with pytest.raises(UserError, match=says) as error:
        main(["report", str(run), "--recompute"])
    assert "\n" not in str(error.value) and not (run / "report.md").exists()


@pytest.mark.parametrize("spoil, says, out", [
    (spoil_model, "with other model", ["original", "simu-graddiff"]),
    (spoil_code, "with other code", ["original"])])
def test_report_leaves_stale_rows_out_and_says_so(run, capsys, spoil, says, out):
    spoil(run)
    main(["report", str(run)])
    told, shown = read_json(run / "report.json"), capsys.readouterr().out
    assert list(told["stale"]) == out and says in told["stale"]["original"]
    assert not {e["name"] for e in told["evaluations"]} & set(out)
    text = (run / "report.md").read_text("utf-8")
    for name in out:
        assert f"- {name}: " in text and f"left out: {run / name}: " in shown
    if spoil is spoil_model:
        assert "original was another" in told["stale"]["simu-graddiff"]


def test_where_it_was_computed_makes_no_row_stale(run):
    for name in ("original", "retain-only", "simu-graddiff"):
        made = read_stage(run / name / "eval")
        made["why"]["settings"] |= dict(device="cuda", dtype="bfloat16")
        write_stage(run / name / "eval", made)
    main(["report", str(run)])
    assert read_json(run / "report.json")["stale"] == {}


def test_report_has_both_tables_and_says_why_a_cell_is_empty(run):
    main(["report", str(run)])
    text = (run / "report.md").read_text("utf-8")
    board = text[text.index("## In the leaderboard's columns"):]
    header, _, *rows = [[c.strip() for c in x.split("|")[1:-1]] for x in board.splitlines()
                        if x.startswith("|")][:5]
    assert header == ["Approach", "ROUGE", "Prob", "TR", "EM", "ES", "MIA", "PrivLeak", "MU", "FQ"]
    ideal, original, _ = (dict(zip(header, row)) for row in rows)
    assert ideal["PrivLeak"] == "0.00" and ideal["FQ"] == "1" and original["PrivLeak"] < "-90"
    assert "the true answers themselves score" in text and "judged by ROUGE-L" in text
    assert "labels out in another order than the scores" in text
    empty = next(x for x in text.splitlines() if "string EM-RA" in x)
    column = [c.strip() for c in empty.split("|")].index("string EM-RA")
    cell = text[text.index(empty):].splitlines()[2].split("|")[column].strip()
    assert cell[:3] == "– (" and f"- {cell[2:]} real_authors (every row): no such rows" in text


def test_report_states_objective_optimiser_and_constants(run):
    main(["report", str(run)])
    text = (run / "report.md").read_text("utf-8")
    for what, value in (("optimiser", "sophia"), ("objective", "graddiff"), ("gamma", "204.8")):
        assert [what, value] in [x.replace("|", " ").split() for x in text.splitlines()], what
    readme = (run / "simu-graddiff" / "README.md").read_text("utf-8")
    assert "| optimiser" in readme and "sophia" in readme and "OLMo-1B is under Apache" in readme
    assert "unlearned by SIMU-GradDiff" in readme


def test_a_model_of_ones_own_borrows_no_name_and_no_licence(run):
    folder = run.parent / "weights"
    copy_model(run / "original", folder)
    settings = read_json(run / "settings.json")
    write_json(run / "settings.json", settings | dict(model=str(folder), weights=str(folder)))
    for name in ("original", "retain-only", "simu-graddiff"):
        evaluate.evaluate(run, name)
    main(["report", str(run)])
    text = (run / "report.md").read_text("utf-8")
    assert "published" not in text.split("## Definitions")[0] and "SOUL's labels" not in text
    readme = (run / "simu-graddiff" / "README.md").read_text("utf-8")
    assert "Apache" not in readme and "does not say here what licence" in readme
    for name in ("config.json", "model.safetensors"):
        (run / "original" / name).unlink()
        (run / "original" / name).symlink_to(folder / name)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# A model\n")
    assert card.provenance(read_settings(run))[1].startswith("weights says of itself: mit.")


def test_an_original_that_is_linked_is_not_stale(run, capsys):
    folder, out = run.parent / "weights", run.parent / "linked"
    copy_model(run / "original", folder)
    main(["original", "tofu", "olmo-1b", "--weights", str(folder), "--data",
          str(run.parent / "data"), "--out", str(out), "--max-total-tokens", "48"])
    main(["evaluate", str(out), "original"])
    main(["report", str(out)])
    assert read_json(out / "report.json")["stale"] == {}
    with open(folder / "config.json", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="config.json is not what its stage wrote"):
        main(["report", str(out)])


def test_names_of_methods_come_from_the_table(run):
    made = read_stage(run / "simu-graddiff")
    for part in (made["settings"], made["why"]["settings"]):
        part.update(method="simu-lion", objective="simnpo")
    write_stage(run / "simu-graddiff", made)
    (run / "simu-graddiff").rename(run / "simu-lion-simnpo")
    main(["report", str(run)])
    names = [e["label"] for e in read_json(run / "report.json")["evaluations"]]
    assert names == ["Retain-only (ideal)", "Original", "simu-lion-simnpo"]
    readme = (run / "simu-lion-simnpo" / "README.md").read_text("utf-8")
    assert "unlearned by simu-lion-simnpo" in readme
    optimiser = next(x for x in readme.splitlines() if x.startswith("| optimiser"))
    assert simu.METHODS["simu-lion"].optimiser in optimiser


def test_evaluate_refuses_what_cannot_be_evaluated(run):
    (run.parent / "empty").mkdir()
    for arguments, says in [([run, "nowhere"], "not a finished stage"),
                            ([run, "original", "--limit", "-1"], "--limit is -1"),
                            ([run.parent / "empty"], "holds no finished model"),
                            ([run.parent / "none", "original"], "settings.json is missing")]:
        with pytest.raises(UserError, match=says):
            main(["evaluate", *map(str, arguments)])


def test_text_in_a_table_cell_stays_there():
    assert report._shown("a | b\n`c` *d*") == r"a \| b \`c\` \*d\*"
    assert report._shown("") == "(empty)" and report._shown("x" * 400).endswith("{…}")


@pytest.mark.parametrize("given, known", [
    (dict(model="llama3.2-1b"), ".820"), (dict(model="llama2-7b"), None),
    (dict(model="llama2-7b", weights="hf:open-unlearning/tofu_Llama-2-7b-chat-hf_full@main"),
     ".976"), (dict(model="llama3.2-1b", benchmark="rows", forget="x"), None)], ids=str)
def test_the_leaderboards_numbers_stand_beneath_their_own_models(given, known):
    s = Settings(**dict(benchmark="tofu") | given)
    table = columns.table_of(columns.LEADERBOARD_COLUMNS, [], columns.leaderboard(s))
    rows = table.splitlines()[2:]
    assert len(rows) == (3 if known else 0)
    assert not known or [x.strip() for x in rows[0].split("|")][1:3] == [
        "Original, published", f"0{known}0"]
