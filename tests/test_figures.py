"""Mask variants and objectives by hand, the sweep's resume, every figure from a small fixture."""

import builtins
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import simu
from data import IGNORE, collate
from model import UserError, read_json, write_json
from pipeline import settings, stage, workers
from pipeline import objectives
from pipeline.__main__ import main
from pipeline.files import sha256
from pipeline.report import report
from pipeline.stages import encoded_rows
from studies import figures, sweep
from test_simu import recipe, rows, run, tiny

DEMO = Path(simu.__file__).parent / "pipeline" / "demo"
MICRO = ("--width 64 --depth 2 --vocab 500 --learn-epochs 2 --light-epochs 2 --epochs 1 "
         "--max-total-tokens 40 --context 160").split()


# ------------------------------------------------------------------------------------- mask kinds

FORGET = torch.tensor([[1.0, 8.0, 10.0, 6.0], [-1.0, -2.0, -3.0, -4.0], [9.0, 1.0, 2.0, 10.0]])
RETAIN = torch.tensor([[5.0, 1.0, 10.0, -1.0], [1.0, 1.0, 1.0, 1.0], [-5.0, -1.0, -2.0, -3.0]])


def mask_of(kind, seed=0):
    return simu.make_mask(kind, FORGET, RETAIN, threshold=0.5, seed=seed)


def test_the_six_masks_by_hand():
    dual = mask_of("dual")
    assert dual.int().tolist() == [[0, 1, 1, 1], [0] * 4, [1, 0, 0, 1]]
    # Neuron 2 of layer 0 is retain-critical; in layer 2 nothing is, for no score there is positive.
    assert mask_of("forget-only").int().tolist() == [[0, 1, 0, 1], [0] * 4, [1, 0, 0, 1]]
    torch.testing.assert_close(mask_of("soft"), torch.tensor(
        [[0, 0.8 / 0.9, 0.5, 1.0], [0] * 4, [1.0, 0, 0, 1.0]]))
    assert not mask_of("none").any() and mask_of("all").all()
    draws = [mask_of("random", seed) for seed in range(8)]
    assert all(d.sum(1).tolist() == dual.sum(1).tolist() for d in draws)
    assert torch.equal(draws[0], mask_of("random")) and len({str(d.tolist()) for d in draws}) > 4
    assert set(simu.MASKS) == {"dual", "forget-only", "soft", "random", "none", "all"}


def test_lean_rows_of_a_soft_mask_equal_the_literal_masked_update():
    """Eq. 5-7 with real M over dense tensors against the run that holds only the rows."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(3, 32, generator=generator)
    mask[mask < 0.4] = 0.0
    s = recipe(epochs=3, lr=3e-3)
    got = run(tiny(), s, mask)
    binary = run(tiny(), s, mask > 0)
    literal, start = tiny(), dict(tiny().named_parameters())
    simu.unlearn_loop(literal, rows(6), rows(10, seed=1), mask, s)
    for n, p in literal.named_parameters():
        moved = (p.detach() - start[n].detach()).abs().max()
        torch.testing.assert_close(got[n], p.detach(), rtol=0, atol=float(2e-3 * moved) + 1e-9)
        if "down_proj" in n:
            frozen = mask[int(n.split(".")[1])] == 0
            assert torch.equal(got[n][frozen], start[n].detach()[frozen])
            assert not torch.allclose(got[n], binary[n], rtol=0, atol=float(0.05 * moved))


@pytest.mark.parametrize("kind", ["none", "all"])
def test_none_moves_attention_alone_and_all_every_row_of_down_proj(kind):
    model, mask = tiny(), torch.full((3, 32), kind == "all")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = run(model, recipe(), mask)
    for name, old in before.items():
        changed = (after[name] != old).reshape(len(old), -1).any(1)
        if "self_attn" in name or (kind == "all" and "down_proj" in name):
            assert changed.all(), name
        else:
            assert not changed.any(), name


# -------------------------------------------------------------------------------------- objectives


def test_npo_by_hand():
    """2/beta log(1 + (P / P_ref)^beta) of rows of two tokens and of one."""
    s, nll = recipe(npo_beta=0.5), torch.tensor([1.0, 2.0, 1.0], requires_grad=True)
    answers = simu.Answers(torch.zeros(3, 5), torch.zeros(3).long(), nll, [2, 1])
    known = [torch.tensor(-2.0), torch.tensor(-4.0)]
    by_hand = sum(2 / 0.5 * math.log(1 + math.exp(0.5 * d)) for d in (-1.0, 3.0))
    torch.testing.assert_close(objectives.npo(answers, known, s), torch.tensor(by_hand))
    same = [torch.tensor(-3.0), torch.tensor(-1.0)]
    objectives.npo(answers, same, s).backward()  # where P = P_ref its gradient is the ascent's
    torch.testing.assert_close(nll.grad, -torch.ones(3))


def gradients(s, monkeypatch):
    """Gradients, losses and rows of the first update of a run, before the clip."""
    seen = {}

    def stop(model, moving, order, backward, *_, **__):
        seen["losses"] = backward(order[0])
        seen["grads"] = {w.name: w.weight.grad for w in moving}
        seen["order"] = order[0]

    monkeypatch.setattr(simu, "train", stop)
    simu.unlearn(tiny(), rows(6), rows(10, seed=1), None, s)
    return seen


def literal_row_log_p(model, batch):
    log_p = model(batch.ids).log_softmax(-1)
    picked = log_p.gather(-1, batch.targets.clamp_min(0)[..., None]).squeeze(-1)
    return (picked * (batch.targets != IGNORE)).sum(1)


@pytest.mark.parametrize("objective", ["graddiff", "ga", "retain", "po", "npo"])
def test_the_gradient_of_an_objective(objective, monkeypatch):
    s = recipe(method="so", objective=objective, lam=0.7, npo_beta=0.3, micro_tokens=40)
    seen, model = gradients(s, monkeypatch), tiny()
    f, r = ([x[i] for i in part] for x, part in zip((rows(6), rows(10, seed=1)), seen["order"]))
    f, r = collate(f), collate(r)
    forget, retain = simu.mean_nll(model, f), simu.mean_nll(model, r)
    with torch.no_grad():
        reference = literal_row_log_p(model, f)
    ratio = literal_row_log_p(model, f) - reference
    npo = -2 / 0.3 * F.logsigmoid(-0.3 * ratio).mean()
    loss = {"graddiff": -forget + 0.7 * retain, "ga": -forget, "retain": retain,
            "po": forget + 0.7 * retain, "npo": npo + 0.7 * retain}[objective]
    loss.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(seen["grads"][n], p.grad, rtol=1e-3, atol=1e-5)
    names = {"ga": {"loss_forget"}, "retain": {"loss_retain"}}
    assert seen["losses"].keys() == names.get(objective, {"loss_forget", "loss_retain"})


# ------------------------------------------------------------------------------------------- sweep


def test_arms():
    assert sweep.arm_settings("so") == dict(method="so", mask="dual", objective="graddiff")
    assert sweep.arm_settings("simu-forget-only-npo") == dict(method="simu", mask="forget-only",
                                                              objective="npo")
    assert sweep.arm_settings("fo-retain")["objective"] == "retain"
    for bad in ("sophia", "fo-random", "simu-", "simu-graddiff-npo"):
        with pytest.raises(UserError, match="arm"):
            sweep.arm_settings(bad)


def test_every_method_of_the_table_is_an_arm():
    for name, method in simu.METHODS.items():
        assert sweep.arm_settings(name)["method"] == name
        if method.masked:
            assert sweep.arm_settings(f"{name}-random-npo")["method"] == name


GIVEN = dict(benchmark="demo", model="tiny-llama", out="/x")


def plan(arms=("simu", "so"), factors=(0.5, 1), seeds=2, variants=False, grid=(), earlier=()):
    return sweep.plan_points(GIVEN, arms=arms, factors=factors, seeds=seeds, variants=variants,
                             grid=list(grid), earlier=list(earlier))


def test_points_share_what_coincides():
    points, runs = plan(variants=True)
    assert [p.sweep for p in points].count("frontier") == 8
    # m of the recipe is the seed's own run
    assert len({p.settings.run for p in points}) == len(runs) == 2 + len(sweep.STEPS) - 1
    by = {(p.sweep, p.arm, p.settings.lr) for p in points if p.settings.seed == 1}
    assert ("frontier", "so", 0.5e-4) in by and ("frontier", "simu", 8e-4) in by
    # Of what is there already, only what was made for a frontier joins it.
    earlier = [dict(arm=arm, seed=0, lr=1e-5, frontier=arm == "fo")
               for arm in ("original", "fo", "simu-soft")]
    more, _ = plan(variants=True, earlier=earlier)
    assert [p.arm for p in more[len(points):]] == ["fo"]


def test_a_grid_is_the_product_of_what_is_varied():
    grid = sweep.read_grid(["lr=1e-4,3e-4", "lam=1,2", "checkpointing=true"])
    assert grid == [dict(lr=lr, lam=lam, checkpointing=True) for lr in (1e-4, 3e-4)
                    for lam in (1.0, 2.0)]
    points, runs = plan(factors=(), grid=grid)
    varied = [p for p in points if p.sweep == "vary"]
    assert len(varied) == 2 * 2 * 4 and len(runs) == 2
    assert {(p.settings.lr, p.settings.lam) for p in varied} == {
        (lr, lam) for lr in (1e-4, 3e-4) for lam in (1.0, 2.0)}


def test_what_the_original_or_attribution_sees_has_a_run_of_its_own():
    points, runs = plan(arms=("simu",), factors=(), seeds=1,
                        grid=sweep.read_grid(["width=64,128", "steps=3,5"]))
    names = {folder.name: run.original.name for folder, run in runs.items()}
    assert names == {  # 128 and 5 are the recipe's
        "seed0": "seed0", "seed0-steps=3": "seed0", "seed0-width=64": "seed0-width=64",
        "seed0-width=64-steps=3": "seed0-width=64"}
    run = runs[Path("/x/seed0-width=64-steps=3")].settings
    assert (run.width, run.steps) == (64, 3)


@pytest.mark.parametrize("text, message", [
    ("method=fo", "--arms"), ("seed=1,2", "--seeds"), ("out=a", "cannot be varied"),
    ("", "nothing"), ("lr=1e-4,", "floats"), ("epochs=1.5", "ints"),
    ("checkpointing=1", "true or false")])
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
    out, path = swept, swept / "points.jsonl"
    first = path.read_text()
    assert len(first.splitlines()) == 3  # original, retain-only, simu
    before = table(out)
    real, made = sweep.run_point, []
    monkeypatch.setattr(sweep, "run_point", lambda p: made.append(p.settings) or real(p))
    main(words(out, "--factors", "1"))
    assert not made and path.read_text() == first and table(out) == before
    path.write_text(first[:-20])  # killed while it wrote the last line
    main(words(out, "--factors", "1", "2"))
    assert sorted(s.lr for s in made) == [8e-4, 1.6e-3]
    assert before[-1] in table(out) and len(sweep.made_before(out)) == 4
    made.clear()
    main(words(out, "--factors", "2"))  # earlier points stay in the table
    assert not made and len(table(out)) == 1 + 4
    main(words(out, "--factors", "1", "--epochs", "2"))  # another setting: another point
    assert [s.epochs for s in made] == [2]  # what was not unlearned is the same
    assert len(table(out)) == 1 + 3
    made.clear()
    main(words(out, "--vary", "threshold=0.3,0.9", "--vary", "lam=0.5"))
    assert [(s.threshold, s.lam) for s in made] == [(0.3, 0.5), (0.9, 0.5)]
    about = read_json(out / "settings.json")
    assert "lam" not in about and about["threshold"] == 0.6  # scores and masks are of the recipe's
    pytest.importorskip("matplotlib")
    figures.main(["all", str(out)])
    assert len((out / "figures" / "varied.csv").read_text().splitlines()) == 1 + 2


def test_parts_fill_one_table(swept, tmp_path, monkeypatch):
    """Two halves at once in one folder, and the table of the whole, equal to one that was made in
    one go; a part made again computes nothing."""
    grid, out = ["--vary", "lr=2e-4,8e-4", "--vary", "lam=1,2"], tmp_path / "parts"
    command = [sys.executable, "-m", "pipeline", *words(out, *grid, "--part")]
    parts = [subprocess.Popen([*command, k], cwd=DEMO.parent.parent) for k in ("1/2", "2/2")]
    assert [p.wait(100) for p in parts] == [0, 0]
    files = [out / f"points-{k}-of-2.jsonl" for k in (1, 2)]
    assert [len(f.read_text().splitlines()) for f in files] == [3, 3]
    assert not (out / "sweep.csv").exists()
    monkeypatch.setattr(sweep, "run_point", lambda p: pytest.fail("computed twice"))
    main(words(out, *grid, "--part", "1/2"))
    main(words(out, *grid))
    monkeypatch.undo()
    main(words(swept, *grid))
    assert table(out) == [row for row in table(swept) if not row.startswith("frontier")]
    for bad in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(UserError, match="--part"):
            main(words(out, "--part", bad))


def test_a_run_that_another_part_makes_is_waited_for(tmp_path, monkeypatch):
    run = sweep.Run(settings.resolve(GIVEN | dict(out=str(tmp_path / "seed0"))), tmp_path / "seed0")
    order, freed = [], threading.Event()
    monkeypatch.setattr(sweep, "prepare_held", lambda run: order.append("prepared"))
    monkeypatch.setattr(sweep.time, "sleep", lambda _: (order.append("waited"), freed.wait(5)))
    stage.claim(tmp_path / "seed0")
    held = stage.lock(tmp_path / "seed0")
    held.__enter__()
    stage.locked_here.clear()  # as if another process held it
    thread = threading.Thread(target=sweep.prepare, args=(run,))
    thread.start()
    while not order:
        pass
    stage.locked_here.add((tmp_path / "seed0").resolve())
    held.__exit__(None, None, None)
    freed.set()
    thread.join()
    assert order == ["waited", "prepared"]


def test_a_sweep_ends_in_one_line_where_the_system_kills_a_worker():
    seen = []
    with pytest.raises(UserError, match="want of memory.*--jobs") as e:
        for x in sweep.run_each(killed_at_two, [0, 1, 2, 3], 2, "points"):
            seen.append(x)
    assert "\n" not in str(e.value) and 2 not in seen


def killed_at_two(x):
    if x == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def say_where_and_sleep(file):
    Path(file).write_text(str(os.getpid()))
    time.sleep(100)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    file = tmp_path / "worker"
    code = (f"import sys; sys.path[:0] = {[str(DEMO.parent.parent), str(Path(__file__).parent)]}; "
            "from test_figures import *; "
            f"list(sweep.run_each(say_where_and_sleep, ['{file}', '{file}2'], 2, ''))")
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (file.is_file() and file.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    worker, deadline = Path("/proc") / file.read_text(), time.monotonic() + 30
    while worker.is_dir() and "Z" not in (worker / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def refused_at_one(x):
    if x == 1:
        raise UserError("one is refused")
    return x


def test_what_a_worker_refuses_is_told_by_the_parent():
    with pytest.raises(UserError, match="one is refused"):
        list(sweep.run_each(refused_at_one, [0, 1], 2, "points"))


def crafted(text: str, **changed) -> str:
    """A line with other values, whose digest is right."""
    line = {k: v for k, v in json.loads(text).items() if k != "digest"} | changed
    return json.dumps(line | dict(digest=stage.digest(line)))


def test_points_that_no_sweep_wrote_are_left_alone(tmp_path):
    thesis, points = tmp_path / "thesis", tmp_path / "points.jsonl"
    thesis.write_text("the only copy")  # without a line's end, as a torn line
    for place, says in ((points.hardlink_to, "line 1 is damaged"),
                        (points.symlink_to, "not a plain file")):
        points.unlink(missing_ok=True)
        place(thesis)
        with pytest.raises(UserError, match=says):
            sweep.made_before(tmp_path)
        assert thesis.read_text() == "the only copy"


def test_workers_are_deaf_to_ctrl_c_from_their_start():
    class Pool:
        def submit(self, *_):
            return signal.getsignal(signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    assert workers.submitted(Pool(), print, [1, 2]) == [signal.SIG_IGN] * 2
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("spoil", [
    lambda x: x.replace('"seed": 0', '"seed": 1'), lambda x: x.replace("0.", "NaN, 0.", 1),
    lambda x: "[" * 100_000, lambda x: "1", lambda x: '{"key": 1}',
    lambda x: crafted(x, arm="nosuch"), lambda x: crafted(x, seed=-5),
    lambda x: crafted(x, error=[3]), lambda x: crafted(x, critical={})])
def test_a_line_that_no_sweep_wrote_is_refused(tmp_path, spoil):
    line = dict(key="k", arm="fo", seed=0, lr=0.5, frontier=True, values={"forget.rouge_l": 0.25})
    with open(tmp_path / "points.jsonl", "w") as file:
        sweep.write_line(file, line)
    assert sweep.made_before(tmp_path) == {"k": line}
    text = (tmp_path / "points.jsonl").read_text()
    (tmp_path / "points.jsonl").write_text(text + spoil(text.strip()) + "\n")
    with pytest.raises(UserError, match="points.jsonl line 2 is damaged"):
        sweep.made_before(tmp_path)


def test_a_point_is_what_the_stages_make_and_variants_lie_beside_it(swept):
    """A line of the sweep against the same unlearning and evaluation by the ordinary stages; a
    random mask and po beside them in one report, until their mask is made again."""
    line = next(x for x in sweep.read_lines(swept / "points.jsonl")
                if x["arm"] == "simu" and x["lr"] == 8e-4)
    run = swept / "seed0"
    own = ["demo", "tiny-llama", "--out", str(run), "--data", str(DEMO), *MICRO]
    variant = ["--mask", "random", "--objective", "po"]
    for command, more in (("mask", []), ("unlearn", []), ("mask", variant), ("unlearn", variant)):
        main([command, *own, *more])
    main(["evaluate", str(run), "simu-graddiff", "simu-random-po"])
    values = read_json(run / "simu-graddiff/eval/metrics.json")["values"]
    for name, value in line["values"].items():
        assert values[name] == pytest.approx(value, abs=1e-6), name
    report(run)
    made = read_json(run / "report.json")["evaluations"]
    assert [e["name"] for e in made] == ["simu-graddiff", "simu-random-po"]
    assert stage.read_stage(run / "simu-random-po")["settings"]["objective"] == "po"
    card = (run / "simu-random-po" / "README.md").read_text()
    assert "unlearned by simu-random-po" in card and "Not evaluated" not in card
    pytest.importorskip("matplotlib")
    figures.main([str(run)])  # what a run holds: masks, losses by update, kept against forgotten
    drawn = {name: (run / "figures" / f"{name}.csv").read_text() for name in ("losses", "kept")}
    assert all((run / "figures" / f"{x}.png").is_file() for x in (*drawn, "layers", "figure4"))
    log = [json.loads(x) for x in (run / "simu-graddiff/log.jsonl").read_text().splitlines()]
    assert f"simu-graddiff,1,{log[0]['loss_forget']},{log[0]['loss_retain']}" in drawn["losses"]
    assert len(drawn["losses"].splitlines()) == 1 + 2 * len(log)
    forget, utility = sweep.axes(line["values"], "tofu")
    assert f"simu-graddiff,{1 - forget:.5f},{utility:.5f}" in drawn["kept"]
    main(["mask", *own, *variant, "--threshold", "0.9"])
    report(run)
    after = read_json(run / "report.json")
    assert [e["name"] for e in after["evaluations"]] == ["simu-graddiff"]
    assert "mask-random" in after["stale"]["simu-random-po"]


def test_po_refuses_where_it_unlearns_and_nowhere_else(swept):
    run = swept / "seed0"
    own = ["demo", "tiny-llama", "--out", str(run), "--data", str(DEMO), *MICRO]
    scores = (run / "attribution/scores.safetensors").read_bytes()
    main(["attribute", *own, "--objective", "po", "--force"])
    assert (run / "attribution/scores.safetensors").read_bytes() == scores
    s = settings.read_settings(run)
    (_, rows), (bench, refused) = (encoded_rows(s, x) for x in ("npo", "po"))
    assert rows["retain"] == refused["retain"] and rows["forget"] != refused["forget"]
    assert not {e.answer for e in bench.forget} & set(objectives.REFUSALS)  # what is asked for


def test_a_diverged_point_is_told_and_does_not_end_the_sweep(swept, monkeypatch):
    s = settings.resolve(dict(benchmark="demo", model="tiny-llama", out=str(swept / "seed0"),
                              data=str(DEMO), max_total_tokens=40, epochs=1, width=64, depth=2,
                              vocab=500, context=160))

    def diverge(*_, **__):
        raise UserError("simu-graddiff: loss or gradient is not finite at update 1 of 10")

    monkeypatch.setattr(simu, "unlearn", diverge)
    point = sweep.Point("frontier", "simu", s)
    line = sweep.run_point(point)
    assert line["error"] == "diverged" and line["values"] == {}
    row = sweep.table_row(point, line)
    assert len(row) == len(sweep.COLUMNS) and row[-1] == "diverged"
    sweep.print_means([row])


def test_utility_is_of_what_the_data_has():
    values = {"forget.rouge_l": 0.1, "forget.exact_match": 0.3, "retain.rouge_l": 0.5,
              "retain.exact_match": 0.7, "world_facts.rouge_l": 0.9}
    assert sweep.axes(values, "tofu") == (0.1, pytest.approx(0.7))
    del values["world_facts.rouge_l"]
    assert sweep.axes(values, "tofu") == sweep.axes(values, "rows") == (0.1, 0.5)
    assert sweep.axes(values, "lume") == (pytest.approx(0.2), pytest.approx(0.6))
    assert sweep.axes({}, "tofu") == (None, None)
    s = settings.Settings()
    row = dict(zip(sweep.COLUMNS, sweep.table_row(sweep.Point("baseline", "original", s),
                                                  dict(values=values))))
    assert row["utility"] == "0.50000" and row["world_facts.rouge_l"] == ""


# ----------------------------------------------------------------------------------------- figures


def test_the_frontier_by_hand():
    front = figures.pareto([(0.9, 1.0), (0.5, 0.6), (0.5, 0.7), (0.6, 0.65), (0.1, 0.5)])
    assert front == [(0.1, 0.5), (0.5, 0.7), (0.9, 1.0)]
    assert figures.utility_at(front, 0.3) == pytest.approx(0.6)
    assert figures.utility_at(front, 0.05) is None and figures.utility_at(front, 2.0) == 1.0
    mean, half = figures.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(figures.interval([1.0])[1])
    fronts = {"simu": {"0": [(0.0, 0.9)], "1": [(0.0, 0.8)]},
              "so": {"0": [(0.0, 0.7)], "1": [(0.2, 0.7)]}}
    compared = figures.equal_forgetting(fronts, {"x": {"0": 0.1, "1": 0.1}})
    assert compared[0][:3] == ["x", "simu", 2] and compared[1][:4] == ["x", "so", 1, 0.7]
    assert compared[1][5] == pytest.approx(0.2)  # of the one seed that both reach


def stored(folder, D=40):
    """A folder as a sweep leaves it, with numbers that only have to be drawn."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 3, D, generator=generator).tolist()
    sweep.write_csv(folder / "scores.csv", ("layer", "neuron", "forget", "retain"),
                    [(l, k, scores[0][l][k], scores[1][l][k]) for l in range(3) for k in range(D)])
    rows = []

    def add(kind, arm, seed, forget, utility, **changed):
        row = dict.fromkeys(sweep.COLUMNS, 0.5) | dict(
            sweep=kind, arm=arm, seed=seed, forget=forget, utility=utility, error="",
            critical=7, varied="") | changed
        rows.append([row[c] for c in sweep.COLUMNS])

    for seed in range(3):
        add("baseline", "original", seed, 0.95, 0.99)
        add("baseline", "retain-only", seed, 0.1, 0.99)
        for i, arm in enumerate(sweep.ARMS):
            for f in (0.05, 0.4):
                add("frontier", arm, seed, f, 0.9 - 0.1 * i - 0.1 * (f < 0.1) + 0.01 * seed)
        add("frontier", "so", seed, "", "", error="diverged")
    for m in sweep.STEPS:
        add("m", "simu", 0, 0.1, 0.8, steps=m)
    for t in sweep.THRESHOLDS:
        add("t", "simu", 0, 0.1, 0.8, threshold=t)
    for kind in simu.MASKS:
        add("mask", "simu" if kind == "dual" else f"simu-{kind}", 0, 0.1, 0.8)
    for i, lam in enumerate((0.5, 1, 4)):
        for state in ("float32", "bfloat16"):
            add("vary", "simu", 0, 0.1 * i, 0.8, varied=f"lam={lam} state={state}")
    sweep.write_csv(folder / "sweep.csv", sweep.COLUMNS, rows)
    seal(folder)


def seal(folder):
    about = dict(benchmark="tofu", model="tiny-llama", threshold=0.6, steps=5)
    sums = {name: sha256(folder / name) for name in ("sweep.csv", "scores.csv")}
    write_json(folder / "settings.json", about | dict(
        sha256=sums | dict(settings=stage.digest(about))))


@pytest.mark.parametrize("stored", sorted((HERE / "benchmarks" / "results").glob("*/sweep.csv")),
                         ids=lambda p: p.parent.name)
def test_the_stored_tables_are_those_of_their_stored_sweep(stored, tmp_path, monkeypatch):
    """And so what the pages take from them; a changed sweep.csv is refused."""
    folder = tmp_path / stored.parent.name
    shutil.copytree(stored.parent, folder)
    shutil.rmtree(folder / "figures")
    monkeypatch.setattr("studies.drawing.save", lambda figure, path: None)  # tables alone
    figures.main(["all", str(folder)])
    for made in (folder / "figures").glob("*.csv"):
        assert made.read_bytes() == (stored.parent / "figures" / made.name).read_bytes(), made.name
    assert len([*(folder / "figures").glob("*.csv")]) == len(
        [*(stored.parent / "figures").glob("*.csv")])
    text = (folder / "sweep.csv").read_text()
    (folder / "sweep.csv").write_text(text.replace("frontier,so,0,", "frontier,so,1,", 1))
    with pytest.raises(UserError, match="sweep.csv is not what its sweep wrote"):
        figures.main(["all", str(folder)])


def test_every_figure_from_stored_numbers(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    stored(tmp_path)
    figures.main(["all", str(tmp_path)])
    made = {p.name for p in (tmp_path / "figures").iterdir()}
    names = {"figure2", "figure3", "figure4", "figure5", "figure6", "frontier", "layers", "varied"}
    assert made == {f"{n}.{e}" for n in names for e in ("png", "csv")} | {"table5.csv",
                                                                         "equal-forgetting.csv"}
    printed = capsys.readouterr().out
    by_layer = (tmp_path / "figures" / "layers.csv").read_text().splitlines()
    forget, _ = figures.read_scores(tmp_path, figures.read_about(tmp_path))
    critical = simu.critical_mask(forget, 0.6)
    assert [sum(map(int, x.split(",")[1:3])) for x in by_layer[1:]] == critical.sum(1).tolist()
    assert "15 comparisons, each a 95% t-interval over seeds" in printed
    row = next(x for x in printed.splitlines() if "forget = 0.2" in x and "random" in x)
    assert "+0.1000 ± 0.0000" in row and "| 3 " in row
    before = (tmp_path / "figures" / "frontier.png").read_bytes()
    figures.main(["frontier", str(tmp_path)])
    assert (tmp_path / "figures" / "frontier.png").read_bytes() == before


@pytest.mark.parametrize("degrees, point", [  # of printed tables of Student's t
    (1, 12.706), (9, 2.262), (10, 2.228), (15, 2.131), (39, 2.023), (79, 1.990), (1000, 1.962)])
def test_an_interval_has_the_degrees_of_freedom_of_its_numbers(degrees, point):
    assert figures.student(degrees) == pytest.approx(point, abs=6e-4)
    xs = [0.0, 1.0] * ((degrees + 1) // 2) + [0.5] * ((degrees + 1) % 2)
    spread = math.sqrt(sum((x - 0.5) ** 2 for x in xs) / degrees)
    half = pytest.approx(point * spread / math.sqrt(len(xs)), rel=1e-3)
    assert figures.interval(xs) == (0.5, half)


def test_comparisons_are_counted():
    told = figures.compared([(0.5, 0.4), (-0.5, 0.4), (0.1, 0.4), (1.0, math.nan)], "rows")
    assert told.startswith("3 comparisons, each a 95% t-interval over rows: 2 leave out zero, "
                           "where 0.2 ")


def test_a_heat_map_of_a_7b_model_is_put_together(tmp_path):
    mask = torch.zeros(2, 4096, dtype=torch.bool)
    mask[0, 8:12] = True
    shown = figures.binned(mask, 8)
    assert len(shown[0]) == 512 and shown[0][1] == 0.5 and sum(map(sum, shown)) == 0.5


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    stored(tmp_path)
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    for what in set(figures.FIGURES) - {"losses", "kept"}:  # which are of runs
        with pytest.raises(UserError, match="pip install matplotlib"):
            figures.main([what, str(tmp_path)])


def test_words_are_varied_too(tmp_path):
    assert figures.places_of(["3e-4", "1"]) == {"3e-4": 3e-4, "1": 1.0}
    assert figures.places_of(["layer", "1"]) == {"layer": 0.0, "1": 1.0}


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "sweep.csv").unlink(), "sweep.csv is missing"),
    (lambda f: (f / "sweep.csv").write_text("sweep,arm\nm,so\n"), "not what its sweep wrote"),
    (lambda f: (f / "settings.json").unlink(), "settings.json is missing"),
    (lambda f: write_json(f / "settings.json", [1]), "not that of a run or sweep"),
    (lambda f: edit("settings.json", '"steps": 5', '"steps": 8')(f), "json is not what its sweep")])
def test_what_is_not_there_or_was_altered_is_told(tmp_path, spoil, message):
    stored(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        figures.main(["frontier", str(tmp_path)])


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))
    return change


@pytest.mark.parametrize("what, spoil, message", [
    ("frontier", lambda f: (f / "sweep.csv").write_text("sweep,arm\nm,so\n"), "lacks columns"),
    ("frontier", lambda f: (f / "sweep.csv").write_text(",".join(sweep.COLUMNS) + "\n"), "no rows"),
    ("frontier", lambda f: (f / "sweep.csv").write_bytes(b"\xff\xfe"), "no rows"),
    ("frontier", edit("sweep.csv", "0.95", "nan"), "not a number"),
    ("frontier", edit("sweep.csv", "0.95", "x"), "not a number"),
    ("variants", edit("sweep.csv", "m,simu,0,0.5,0.5,0.5,2,7", "m,simu,0,0.5,0.5,0.5,2,x"),
     "not a number"),
    ("masks", edit("scores.csv", "\n0,1,", "\n0,1,nan,0.5\n0,1,"), "every neuron"),
    ("masks", edit("scores.csv", "\n2,", "\n9,"), "every neuron"),
    ("masks", edit("scores.csv", "\n0,0,0.", "\n0,0,inf0."), "not a number")])
def test_tables_that_cannot_be_read_are_refused_in_one_line(tmp_path, what, spoil, message):
    stored(tmp_path)
    spoil(tmp_path)
    seal(tmp_path)
    with pytest.raises(UserError, match=message) as e:
        figures.main([what, str(tmp_path)])
    assert "\n" not in str(e.value)
