"""Mask variants and objectives by hand, the sweep's resume, every figure from a small fixture."""

import builtins
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import simu
import stage
import sweep
from data import IGNORE, collate
from stage import UserError
from test_simu import literal_update, rows, run, settings, tiny

ROOT = Path(simu.__file__).parent
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
    assert set(stage.MASKS) == {"dual", "forget-only", "soft", "random", "none", "all"}


def test_lean_rows_of_a_soft_mask_equal_the_literal_masked_update(tmp_path):
    """Eq. 5-7 with real M over dense tensors against the run that holds only the rows."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(3, 32, generator=generator)
    mask[mask < 0.4] = 0.0
    s = settings(epochs=3, lr=3e-3)
    got = run(tiny(), s, mask, tmp_path)
    binary = run(tiny(), s, mask > 0, tmp_path)
    literal, masks = literal_update(s, mask)
    start = dict(tiny().named_parameters())
    for n, p in literal.named_parameters():
        moved = (p.detach() - start[n].detach()).abs().max()
        torch.testing.assert_close(got[n], p.detach(), rtol=0, atol=float(2e-3 * moved) + 1e-9)
        assert torch.equal(got[n][masks[n] == 0], start[n].detach()[masks[n] == 0])
        if "down_proj" in n:
            assert not torch.allclose(got[n], binary[n], rtol=0, atol=float(0.05 * moved))


@pytest.mark.parametrize("kind", ["none", "all"])
def test_none_moves_attention_alone_and_all_every_row_of_down_proj(kind, tmp_path):
    model, mask = tiny(), torch.full((3, 32), kind == "all")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = run(model, settings(), mask, tmp_path)
    for name, old in before.items():
        changed = (after[name] != old).reshape(len(old), -1).any(1)
        if "self_attn" in name or (kind == "all" and "down_proj" in name):
            assert changed.all(), name
        else:
            assert not changed.any(), name


# -------------------------------------------------------------------------------------- objectives


def test_npo_by_hand():
    beta, log_p, reference = 0.5, torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -4.0])
    by_hand = sum(2 / beta * math.log(1 + math.exp(beta * d)) for d in (-1.0, 3.0)) / 2
    torch.testing.assert_close(simu.npo_loss(log_p, reference, beta), torch.tensor(by_hand))
    log_p.requires_grad_()  # its gradient is twice the sigmoid: that of ascent when P = P_ref, over
    simu.npo_loss(log_p, log_p.detach(), beta).backward()  # the mean of two rows
    torch.testing.assert_close(log_p.grad, torch.tensor([0.5, 0.5]))


def gradients(s, tmp_path, monkeypatch):
    """Gradients and losses of the first update of a run, before the clip."""
    seen = {}

    def stop(model, moving, order, backward, update, **_):
        seen["losses"] = backward(order[0])
        seen["grads"] = {w.name: w.weight.grad for w in moving}
        seen["order"] = order[0]

    monkeypatch.setattr(simu, "train", stop)
    model = tiny()
    simu.unlearn(model, rows(6), rows(10, seed=1), None, s, tmp_path / "log")
    return seen


def literal_row_log_p(model, batch):
    log_p = model(batch.ids).log_softmax(-1)
    picked = log_p.gather(-1, batch.targets.clamp_min(0)[..., None]).squeeze(-1)
    return (picked * (batch.targets != IGNORE)).sum(1)


@pytest.mark.parametrize("objective", stage.OBJECTIVES)
def test_the_gradient_of_every_objective(objective, tmp_path, monkeypatch):
    s = settings(method="so", objective=objective, lam=0.7, npo_beta=0.3, micro_tokens=40)
    seen = gradients(s, tmp_path, monkeypatch)
    model = tiny()
    f, r = ([x[i] for i in part] for x, part in zip((rows(6), rows(10, seed=1)), seen["order"]))
    f, r = collate(f), collate(r)
    forget = simu.mean_nll(model, f)
    retain = simu.mean_nll(model, r)
    with torch.no_grad():
        reference = literal_row_log_p(model, f)
    ratio = literal_row_log_p(model, f) - reference
    npo = -2 / 0.3 * F.logsigmoid(-0.3 * ratio).mean()
    loss = {"graddiff": -forget + 0.7 * retain, "ga": -forget, "retain": retain,
            "po": forget + 0.7 * retain, "npo": npo + 0.7 * retain}[objective]
    loss.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(seen["grads"][n], p.grad, rtol=1e-3, atol=1e-5)
    names = {"graddiff": {"loss_forget", "loss_retain"}, "ga": {"loss_forget"},
             "retain": {"loss_retain"}, "po": {"loss_forget", "loss_retain"},
             "npo": {"loss_npo", "loss_retain"}}[objective]
    assert seen["losses"].keys() == names


def test_npo_refers_to_the_model_before_it_moved(tmp_path):
    model, forget = tiny(), rows(6)
    s = settings(method="so", objective="npo", lr=1e-2, epochs=4)
    simu.unlearn(model, forget, rows(10, seed=1), None, s, tmp_path / "log")
    log = [json.loads(x) for x in (tmp_path / "log").read_text().splitlines()]
    assert log[0]["loss_npo"] == pytest.approx(2 / s.npo_beta * math.log(2), rel=1e-4)
    assert log[-1]["loss_npo"] < log[0]["loss_npo"]


# ------------------------------------------------------------------------------------------- sweep


def test_arms():
    assert sweep.arm_settings("so") == dict(method="so", mask="dual", objective="graddiff")
    assert sweep.arm_settings("simu-forget-only-npo") == dict(method="simu", mask="forget-only",
                                                              objective="npo")
    assert sweep.arm_settings("fo-retain")["objective"] == "retain"
    for bad in ("sophia", "fo-random", "simu-", "simu-graddiff-npo"):
        with pytest.raises(UserError, match="arm"):
            sweep.arm_settings(bad)


def test_points_share_what_coincides():
    given = dict(benchmark="demo", model="tiny-llama", out="x")
    points = sweep.plan_points(given, ("simu", "so"), (0.5, 1), 2, True, [])
    assert [p["sweep"] for p in points].count("frontier") == 8
    assert len({p["settings"].run for p in points}) == 2 + len(sweep.STEPS)
    by = {(p["sweep"], p["arm"], p["settings"].lr) for p in points if p["settings"].seed == 1}
    assert ("frontier", "so", 0.5e-4) in by and ("frontier", "simu", 8e-4) in by
    # Of what is there already, only what was made for a frontier joins it.
    earlier = [dict(arm=arm, seed=0, lr=1e-5, frontier=arm == "fo")
               for arm in ("original", "fo", "simu-soft")]
    more = sweep.plan_points(given, ("simu", "so"), (0.5, 1), 2, True, earlier)
    assert [p["arm"] for p in more[len(points):]] == ["fo"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "s"
    words = ["sweep", "demo", "tiny-llama", "--out", str(out), "--data", str(ROOT / "demo"),
             "--seeds", "1", "--arms", "simu", "--no-variants", "--jobs", "1", *MICRO]
    simu.main([*words, "--factors", "1"])
    return out, words


def test_a_sweep_goes_on_where_it_stopped_and_computes_nothing_twice(swept, monkeypatch):
    out, words = swept
    path = out / "points.jsonl"
    first = path.read_text()
    assert len(first.splitlines()) == 3  # original, retain-only, simu
    table = (out / "sweep.csv").read_text()
    real, made = sweep.run_point, []
    monkeypatch.setattr(sweep, "run_point", lambda job: made.append(job[1:]) or real(job))
    simu.main([*words, "--factors", "1"])
    assert not made and path.read_text() == first and (out / "sweep.csv").read_text() == table
    path.write_text(first[:-20])  # killed while it wrote the last line
    simu.main([*words, "--factors", "1", "2"])
    assert sorted(s.lr for _, s in made) == [8e-4, 1.6e-3]
    assert table.splitlines()[-1] in (out / "sweep.csv").read_text().splitlines()
    made.clear()
    simu.main([*words, "--factors", "2"])  # earlier points stay in the table
    assert not made and len((out / "sweep.csv").read_text().splitlines()) == 1 + 4
    simu.main([*words, "--factors", "1", "--epochs", "2"])  # another setting: another point
    assert [s.epochs for _, s in made] == [2, 2, 2]
    assert len((out / "sweep.csv").read_text().splitlines()) == 1 + 3


def test_a_point_is_what_the_stages_make_and_variants_lie_beside_it(swept):
    """A line of the sweep against the same unlearning and evaluation by the ordinary stages; a
    random mask and po beside them in one report, until their mask is made again."""
    import eval as evaluation
    from report import report
    out, words = swept
    line = json.loads((out / "points.jsonl").read_text().splitlines()[2])
    run = out / "seed0"
    own = ["demo", "tiny-llama", "--out", str(run), "--data", str(ROOT / "demo"), *MICRO]
    variant = ["--mask", "random", "--objective", "po"]
    for command, more in (("mask", []), ("unlearn", []), ("mask", variant), ("unlearn", variant)):
        simu.main([command, *own, *more])
    evaluation.main(["evaluate", str(run), "simu-graddiff", "simu-random-po"])
    values = stage.read_json(run / "simu-graddiff/eval/metrics.json")["values"]
    for name, value in line["values"].items():
        assert values[name] == pytest.approx(value, abs=1e-6), name
    report(run)
    made = stage.read_json(run / "report.json")["evaluations"]
    assert [e["name"] for e in made] == ["simu-graddiff", "simu-random-po"]
    assert stage.read_stage(run / "simu-random-po")["settings"]["objective"] == "po"
    card = (run / "simu-random-po" / "README.md").read_text()
    assert "unlearned by simu-random-po" in card and "Not evaluated" not in card
    simu.main(["mask", *own, *variant, "--threshold", "0.9"])
    with pytest.raises(UserError, match="unlearned with another mask-random"):
        report(run)


def test_po_refuses_where_it_unlearns_and_nowhere_else(swept):
    run = swept[0] / "seed0"
    own = ["demo", "tiny-llama", "--out", str(run), "--data", str(ROOT / "demo"), *MICRO]
    scores = (run / "attribution/scores.safetensors").read_bytes()
    simu.main(["attribute", *own, "--objective", "po", "--force"])
    assert (run / "attribution/scores.safetensors").read_bytes() == scores
    s = stage.read_settings(run)
    (_, rows), (bench, refused) = (simu.encoded_rows(s, objective=x) for x in ("npo", "po"))
    assert rows["retain"] == refused["retain"] and rows["forget"] != refused["forget"]
    assert not {e.answer for e in bench.forget} & set(simu.REFUSALS)  # what evaluation asks for


def test_a_diverged_point_is_told_and_does_not_end_the_sweep(swept, monkeypatch):
    s = simu.resolve(dict(benchmark="demo", model="tiny-llama", out=str(swept[0] / "seed0"),
                          data=str(ROOT / "demo"), max_total_tokens=40, epochs=1,
                          width=64, depth=2, vocab=500, context=160))

    def diverge(*_):
        raise UserError("simu-graddiff: loss or gradient is not finite at update 1 of 10")

    monkeypatch.setattr(simu, "unlearn", diverge)
    line = sweep.run_point(("f", "simu", s))
    assert line["error"] == "diverged" and line["values"] == {}
    row = sweep.table_row(dict(sweep="frontier", arm="simu", settings=s), line)
    assert len(row) == len(sweep.COLUMNS) and row[-1] == "diverged"
    sweep.print_table([row])


# ----------------------------------------------------------------------------------------- figures


def test_the_frontier_by_hand():
    import figures
    front = figures.pareto([(0.9, 1.0), (0.5, 0.6), (0.5, 0.7), (0.6, 0.65), (0.1, 0.5)])
    assert front == [(0.1, 0.5), (0.5, 0.7), (0.9, 1.0)]
    assert figures.utility_at(front, 0.3) == pytest.approx(0.6)
    assert figures.utility_at(front, 0.05) is None and figures.utility_at(front, 2.0) == 1.0
    mean, half = figures.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(figures.interval([1.0])[1])
    fronts = {"simu": {"0": [(0.0, 0.9)], "1": [(0.0, 0.8)]},
              "so": {"0": [(0.0, 0.7)], "1": [(0.2, 0.7)]}}
    told = figures.equal_forgetting(fronts, {"x": {"0": 0.1, "1": 0.1}})
    assert told[0][:3] == ["x", "simu", 2] and told[1][:4] == ["x", "so", 1, 0.7]
    assert told[1][5] == pytest.approx(0.2)  # of the one seed that both reach


def stored(folder, D=40):
    """A folder as a sweep leaves it, with numbers that only have to be drawn."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 3, D, generator=generator).tolist()
    sweep.write_csv(folder / "scores.csv", ("layer", "neuron", "forget", "retain"),
                    [(l, k, scores[0][l][k], scores[1][l][k]) for l in range(3) for k in range(D)])
    stage.write_json(folder / "settings.json", dict(benchmark="tofu", model="tiny-llama",
                                                    threshold=0.6, steps=5))
    rows = []

    def add(kind, arm, seed, forget, utility, **changed):
        row = dict.fromkeys(sweep.COLUMNS, 0.5) | dict(
            sweep=kind, arm=arm, seed=seed, forget=forget, utility=utility, error="",
            critical=7) | changed
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
    for kind in stage.MASKS:
        add("mask", "simu" if kind == "dual" else f"simu-{kind}", 0, 0.1, 0.8)
    sweep.write_csv(folder / "sweep.csv", sweep.COLUMNS, rows)


def test_every_figure_from_stored_numbers(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import figures
    stored(tmp_path)
    figures.main(["all", str(tmp_path)])
    made = {p.name for p in (tmp_path / "figures").iterdir()}
    names = {"figure2", "figure3", "figure4", "figure5", "figure6", "frontier"}
    assert made == {f"{n}.{e}" for n in names for e in ("png", "csv")} | {"table5.csv",
                                                                         "equal-forgetting.csv"}
    told = capsys.readouterr().out
    row = next(x for x in told.splitlines() if "forget = 0.2" in x and "random" in x)
    assert "+0.1000 ± 0.0000" in row and "| 3 " in row
    before = (tmp_path / "figures" / "frontier.png").read_bytes()
    figures.main(["frontier", str(tmp_path)])
    assert (tmp_path / "figures" / "frontier.png").read_bytes() == before


def test_a_heat_map_of_a_7b_model_is_put_together(tmp_path):
    import figures
    mask = torch.zeros(2, 4096, dtype=torch.bool)
    mask[0, 8:12] = True
    shown = figures.binned(mask, 8)
    assert len(shown[0]) == 512 and shown[0][1] == 0.5 and sum(map(sum, shown)) == 0.5


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    import figures
    stored(tmp_path)
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    for what in figures.FIGURES:
        with pytest.raises(UserError, match="pip install matplotlib"):
            figures.main([what, str(tmp_path)])


@pytest.mark.parametrize("spoil, told", [
    (lambda f: (f / "sweep.csv").unlink(), "sweep.csv is missing"),
    (lambda f: (f / "sweep.csv").write_text("sweep,arm\nfrontier,so\n"), "lacks columns"),
    (lambda f: (f / "sweep.csv").write_text(",".join(sweep.COLUMNS) + "\n"), "no rows"),
    (lambda f: (f / "settings.json").unlink(), "settings.json is missing")])
def test_what_is_not_there_is_told(tmp_path, spoil, told):
    import figures
    stored(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=told):
        figures.main(["frontier", str(tmp_path)])
