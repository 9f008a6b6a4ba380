"""The sweep: what it computes, and that it computes nothing twice. Every figure, from the tables
stored in benchmarks/results."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest

import simu
from model import UserError, read_json, write_json
from pipeline import evaluate, objectives, settings
from pipeline.__main__ import main
from pipeline.stages import encoded_rows
from studies import depth, figures, sweep

ROOT = Path(simu.__file__).parent
DEMO, RESULTS = ROOT / "pipeline" / "demo", ROOT / "benchmarks" / "results"
MICRO = ("--width 64 --depth 2 --vocab 500 --learn-epochs 2 --light-epochs 2 --epochs 1 "
         "--max-total-tokens 40 --context 160").split()


# ------------------------------------------------------------------------------------------- sweep


@pytest.mark.parametrize("arm, want", [
    ("so", ("so", "dual", "graddiff")), ("simu-forget-only-npo", ("simu", "forget-only", "npo")),
    ("fo-retain", ("fo", "dual", "retain")),
    *((name, (name, "dual", "graddiff")) for name in simu.METHODS)])
def test_an_arm_names_a_method_a_mask_and_an_objective(arm, want):
    assert sweep.arm_settings(arm) == dict(zip(("method", "mask", "objective"), want))


@pytest.mark.parametrize("arm", ["sophia", "fo-random", "simu-", "simu-graddiff-npo"])
def test_an_unknown_arm_is_refused(arm):
    with pytest.raises(UserError, match="arm"):
        sweep.arm_settings(arm)


OPTIONS = dict(benchmark="demo", model="tiny-llama", out="/x")


def plan(factors=(0.5, 1), seeds=2, variants=False, grid=()):
    homes = [settings.resolve(OPTIONS | dict(seed=seed, out=f"/x/seed{seed}"))
             for seed in range(seeds)]
    return sweep.plan_points(OPTIONS, homes, ("simu", "so"), factors, variants, list(grid))


def test_each_arm_has_its_recipes_rate_and_m_a_run_for_each_value_but_the_recipes():
    points = plan(variants=True)
    assert [p.sweep for p in points].count("frontier") == 8
    assert len({p.settings.run for p in points}) == 2 + len(sweep.STEPS) - 1
    rates = {(p.sweep, p.arm, p.settings.lr) for p in points if p.settings.seed == 1}
    assert ("frontier", "so", 0.5e-4) in rates and ("frontier", "simu", 8e-4) in rates


def test_a_grid_is_the_product_of_what_is_varied():
    grid = sweep.read_grid(["lr=1e-4,3e-4", "steps=3,5", "state=bfloat16"])
    assert grid == [dict(lr=lr, steps=m, state="bfloat16") for lr in (1e-4, 3e-4) for m in (3, 5)]
    points = [p for p in plan(factors=(), grid=grid) if p.sweep == "vary"]
    assert len(points) == 2 * 2 * 4
    assert {(p.settings.lr, p.settings.run.name) for p in points} == {
        (lr, f"seed{seed}{steps}") for lr in (1e-4, 3e-4) for seed in (0, 1)
        for steps in ("-steps=3", "")}  # 5 is the recipe's


@pytest.mark.parametrize("text, message", [
    ("method=fo", "cannot be varied"), ("seed=1,2", "cannot be varied"),
    ("width=64", "cannot be varied"), ("", "cannot be varied"), ("lr=1e-4,", "--lr"),
    ("epochs=1.5", "--epochs"), ("state=float16", "--state")])
def test_what_cannot_be_varied_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        sweep.read_grid([text])


def words(out, *more):
    return ["sweep", "demo", "tiny-llama", "--out", str(out), "--data", str(DEMO), "--seeds", "1",
            "--arms", "simu", "--no-variants", "--jobs", "1", *MICRO, *more]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "s"
    main(words(out, "--factors", "1"))
    return out


def table(out):
    return (out / "sweep.csv").read_text().splitlines()


def test_a_sweep_goes_on_where_it_stopped_and_computes_nothing_twice(swept, monkeypatch):
    file, before = swept / "points.json", table(swept)
    first = read_json(file)
    assert len(first) == 3  # original, retain-only, simu
    run_point, computed = sweep.run_point, []

    def counted(keyed):
        computed.append(keyed[1].settings)
        return run_point(keyed)

    monkeypatch.setattr(sweep, "run_point", counted)
    main(words(swept, "--factors", "1"))
    assert not computed and read_json(file) == first and table(swept) == before
    write_json(file, dict(list(first.items())[:-1]))  # killed before it wrote the last point
    main(words(swept, "--factors", "1", "2"))
    assert [s.lr for s in computed] == [8e-4, 1.6e-3]
    assert before[-1] in table(swept) and len(table(swept)) == 1 + 4
    computed.clear()
    main(words(swept, "--factors", "1", "--epochs", "2"))  # another setting: another point
    assert [s.epochs for s in computed] == [2]  # what was not unlearned is the same
    computed.clear()
    main(words(swept, "--vary", "threshold=0.3,0.9", "--vary", "lam=0.5"))
    assert [(s.threshold, s.lam) for s in computed] == [(0.3, 0.5), (0.9, 0.5)]
    assert [x.split(",")[-2] for x in table(swept)[-2:]] == [
        "threshold=0.3 lam=0.5", "threshold=0.9 lam=0.5"]
    assert read_json(swept / "settings.json")["threshold"] == 0.6  # figures draw the recipe's mask


def test_a_point_is_what_the_stages_make(swept):
    """A line of the sweep against the same unlearning and evaluation by the ordinary stages; and
    the losses and depths of that run."""
    main(words(swept, "--factors", "1"))
    lines = [x.split(",") for x in table(swept)]
    line = dict(zip(lines[0], lines[-1]))
    run = swept / "seed0"
    for stage in ("mask", "unlearn"):
        main([stage, "demo", "tiny-llama", "--out", str(run), "--data", str(DEMO), *MICRO])
    main(["evaluate", str(run), "simu-graddiff"])
    values = evaluate.read_metrics(run / "simu-graddiff" / "eval")["values"]
    for name in sweep.VALUES:
        assert values[name] == pytest.approx(float(line[name]), abs=1e-5), name
    pytest.importorskip("matplotlib")
    figures.main([str(run)])
    log = [json.loads(x) for x in (run / "simu-graddiff/log.jsonl").read_text().splitlines()]
    losses = (run / "figures" / "losses.csv").read_text().splitlines()
    assert losses[1:] == [f"simu-graddiff,{x['step']},{x['loss_forget']},{x['loss_retain']}"
                          for x in log]
    assert (run / "figures" / "figure6.png").is_file()
    depth.main([str(run)])
    depths = read_json(run / "depth.json")
    assert (depths["retain-only"]["uds"], depths["original"]["uds"]) == (1.0, 0.0)
    depth.main([str(run), "--answers", "own"])  # what differs from row to row is known less
    own = read_json(run / "depth.json")["retain-only"]["by_layer"]
    assert own[-1] > depths["retain-only"]["by_layer"][-1] > 0


def test_po_refuses_where_it_unlearns_and_nowhere_else(swept):
    s = settings.read_settings(swept / "seed0")
    (_, rows), (bench, refused) = (encoded_rows(s, x) for x in ("npo", "po"))
    assert rows["retain"] == refused["retain"] and rows["forget"] != refused["forget"]
    assert not {e.answer for e in bench.forget} & set(objectives.REFUSALS)  # what is scored


def test_a_diverged_point_is_reported_and_does_not_end_the_sweep(swept, monkeypatch):
    _, options = sweep.read_options(words(swept)[1:])
    homes = [settings.resolve(options | dict(seed=0, out=str(swept / "seed0")))]
    p = sweep.plan_points(options, homes, ("simu",), (1,), False, [])[-1]

    def diverge(*_, **__):
        raise UserError("simu-graddiff: loss or gradient is not finite at update 1 of 10")

    monkeypatch.setattr(simu, "unlearn", diverge)
    _, result = sweep.run_point(("key", p))
    assert result["error"] == "diverged" and result["values"] == {}
    cells = sweep.table_line(p, result)
    assert set(cells) == set(sweep.COLUMNS) and cells["utility"] == ""


def test_utility_is_of_what_the_data_has():
    values = {"forget.rouge_l": 0.1, "forget.exact_match": 0.3, "retain.rouge_l": 0.5,
              "retain.exact_match": 0.7, "world_facts.rouge_l": 0.9}
    assert sweep.axes(values, "tofu") == (0.1, pytest.approx(0.7))
    del values["world_facts.rouge_l"]
    assert sweep.axes(values, "tofu") == sweep.axes(values, "rows") == (0.1, 0.5)
    assert sweep.axes(values, "lume") == (pytest.approx(0.2), pytest.approx(0.6))
    assert sweep.axes({}, "tofu") == (None, None)


def refuse(x):
    raise UserError(f"{x} is refused")


def test_what_a_worker_refuses_ends_the_sweep_in_one_line():
    with pytest.raises(UserError, match="^1 is refused$"):
        list(sweep.run_each(refuse, [1, 1], 2, "points"))


# ----------------------------------------------------------------------------------------- figures


def test_the_frontier_by_hand():
    front = figures.pareto([(0.9, 1.0), (0.5, 0.6), (0.5, 0.7), (0.6, 0.65), (0.1, 0.5)])
    assert front == [(0.1, 0.5), (0.5, 0.7), (0.9, 1.0)]
    assert figures.utility_at(front, 0.3) == pytest.approx(0.6)
    assert figures.utility_at(front, 0.05) is None and figures.utility_at(front, 2.0) == 1.0
    fronts = {"simu": {"0": [(0.0, 0.9)], "1": [(0.0, 0.8)]},
              "so": {"0": [(0.0, 0.7)], "1": [(0.2, 0.7)]}}
    of_simu, of_so = figures.equal_forgetting(fronts, {"x": {"0": 0.1, "1": 0.1}})
    assert of_simu[:3] == ["x", "simu", 2] and of_so[:4] == ["x", "so", 1, 0.7]
    assert of_so[5] == pytest.approx(0.2)  # of the one seed that both reach


@pytest.mark.parametrize("degrees, t", [(1, 12.706), (2, 4.303), (9, 2.262), (15, 2.131),
                                        (30, 2.042), (79, 2.042)])
def test_an_interval_has_the_degrees_of_freedom_of_its_numbers(degrees, t):
    xs = [0.0, 1.0] * ((degrees + 1) // 2) + [0.5] * ((degrees + 1) % 2)
    deviation = math.sqrt(sum((x - 0.5) ** 2 for x in xs) / degrees)
    assert figures.interval(xs) == (0.5, pytest.approx(t * deviation / math.sqrt(len(xs))))
    assert math.isnan(figures.interval([1.0])[1])


def stored_sweep(name, tmp_path):
    """A copy of a sweep of benchmarks/results, without its figures."""
    return Path(shutil.copytree(RESULTS / name, tmp_path / name,
                                ignore=shutil.ignore_patterns("figures")))


def test_every_figure_of_a_sweep_and_again_the_same_bytes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = stored_sweep("tofu-tiny-llama", tmp_path)
    figures.main([str(folder)])
    pictures = {"figure2", "figure3", "figure4", "figure5", "figure6", "frontier"}
    files = {p: p.read_bytes() for p in (folder / "figures").iterdir()}
    assert {p.name for p in files} == {
        *(f"{n}.{e}" for n in pictures for e in ("png", "csv")), "layers.csv", "table5.csv",
        "equal-forgetting.csv"}
    by_layer = (folder / "figures" / "layers.csv").read_text().splitlines()
    critical = simu.critical_mask(figures.read_scores(folder, {})[0], 0.6)
    assert [sum(map(int, x.split(",")[1:3])) for x in by_layer[1:]] == critical.sum(1).tolist()
    assert "18 comparisons, each a 95% t-interval over seeds" in capsys.readouterr().out
    figures.main([str(folder)])
    assert {p: p.read_bytes() for p in files} == files


@pytest.mark.parametrize("name", sorted(p.parent.name for p in RESULTS.glob("*/sweep.csv")))
def test_the_stored_tables_are_those_of_their_stored_sweep(name, tmp_path, monkeypatch):
    """And so what the pages take from them."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda *_, **__: None)  # tables alone
    folder = stored_sweep(name, tmp_path)
    figures.main([str(folder)])
    tables, again = ({p.name: p.read_bytes() for p in (x / "figures").glob("*.csv")}
                     for x in (RESULTS / name, folder))
    assert again == tables


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        figures.main([str(stored_sweep("tofu-tiny-llama", tmp_path))])


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(UserError, match="settings.json is missing"):
        figures.main([str(tmp_path)])
    write_json(tmp_path / "settings.json", dict(benchmark="demo"))
    with pytest.raises(UserError, match="nothing to draw"):
        figures.main([str(tmp_path)])
