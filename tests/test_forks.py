"""What a fork adds to a table is what it gets: every row of every table goes through `unlearn`;
Muon sees whole matrices, RMU's gradient may end early, and inner neurons are one setting."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from forks import muon, rmu
from test_simu import LLAMA, OLMO, recipe, rows, tiny

import simu
from data import collate
from model import NEURONS, Config
from pipeline import fused
from pipeline.__main__ import main

SCORES = {"output": 32, "inner": 48}


def masks(kind, neurons="output", L=3):
    g = torch.Generator().manual_seed(3)
    forget, retain = (torch.randn(L, SCORES[neurons], generator=g) for _ in range(2))
    return simu.MASKS[kind](forget, retain, 0.3, 0)


def unlearned(model, s, mask):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    log = simu.unlearn(model, rows(6), rows(10, seed=1), mask, s, targets=3.0,
                       **fused.on(torch.device("cpu"), s.state))
    assert len(log) == len(simu.unlearning_order(6, 10, s))
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


@pytest.mark.parametrize("method", sorted(simu.METHODS))
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_every_method_goes_through_unlearn(method, state):
    moved = unlearned(tiny(), recipe(method=method, state=state), masks("dual"))
    kept = [n for n, change in moved.items() if not change.any()]
    masked = simu.METHODS[method].masked
    assert bool(kept) == masked and not any("self_attn" in n or "down_proj" in n for n in kept)
    assert all(x.isfinite().all() for x in moved.values())


@pytest.mark.parametrize("objective", sorted(simu.OBJECTIVES))
def test_every_objective_goes_through_unlearn(objective):
    moved = unlearned(tiny(), recipe(method="fo", objective=objective), None)
    assert any(x.any() for x in moved.values())


@pytest.mark.parametrize("kind", sorted(simu.MASKS))
@pytest.mark.parametrize("moves", sorted(simu.MOVES))
def test_every_mask_and_every_rule_of_what_moves(kind, moves, monkeypatch):
    monkeypatch.setitem(simu.METHODS, "mine", simu.Method(moves, "sophia", masked=moves != "all"))
    if kind == "none" and moves == "nothing":
        with pytest.raises(Exception, match="moves nothing"):
            unlearned(tiny(), recipe(method="mine"), masks(kind))
        return
    moved = unlearned(tiny(), recipe(method="mine"), masks(kind))
    rows_moved = torch.stack([moved[f"layers.{l}.mlp.down_proj.weight"].any(1) for l in range(3)])
    assert torch.equal(rows_moved, masks(kind) != 0) or moves == "all"


@pytest.mark.parametrize("model_kind, kind, neurons, method", [
    (LLAMA, "dual", "output", "simu"), (OLMO, "soft", "output", "simu"),
    (LLAMA, "random", "inner", "simu"), (OLMO, "soft", "inner", "simu"),
    (LLAMA, "dual", "output", "so"),
    (OLMO, "dual", "output", "fo")])
def test_unlearn_equals_the_loop(model_kind, kind, neurons, method):
    """The fast step 2 and the literal one, from the same start: what moves, and how far."""
    s, mask = recipe(epochs=3, method=method), masks(kind, neurons)
    literal, fast = (tiny(model_kind, neurons=neurons) for _ in range(2))
    start = {n: p.detach().clone() for n, p in literal.named_parameters()}
    logs = (simu.unlearn_loop(literal, rows(6), rows(10, seed=1), mask, s),
            simu.unlearn(fast, rows(6), rows(10, seed=1), mask, s))
    for a, b in zip(*logs, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["loss"] == pytest.approx(-b["loss_forget"] + s.lam * b["loss_retain"], rel=1e-3)
    for (n, p), q in zip(literal.named_parameters(), fast.parameters()):
        far = float((p.detach() - start[n]).abs().max())
        torch.testing.assert_close(q, p, rtol=0, atol=1e-3 * far + 1e-9)
        assert torch.equal(p.detach() == start[n], q.detach() == start[n]) or far > 0
    if method == "simu":
        assert {n for n, p in fast.named_parameters() if not torch.equal(p.detach(), start[n])} == {
            n for n in start if "self_attn" in n or n.split(".")[-2] in (
                *NEURONS[neurons].rows, *NEURONS[neurons].columns)}


# ------------------------------------------------------------------------------------------ Muon


def test_muon_gets_whole_matrices():
    s, model = recipe(method="simu-muon", epochs=1, weight_decay=0.0), tiny()
    for n, change in unlearned(model, s, masks("dual")).items():
        if "q_proj" in n:  # one update of rate lr: singular values of about lr
            values = torch.linalg.svdvals(change) / s.lr
            assert values.max() < 1.4 and values.median() > 0.5, n


def test_muons_polar_factor():
    x = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(
        muon.orthogonal(x).flatten(), (u @ v).flatten(), dim=0) > 0.97


# ------------------------------------------------------------------------------------------- RMU


def test_rmu_misdirects_forget_states_and_holds_the_others():
    model, s = tiny(sharp=2.0), recipe(method="fo", objective="rmu", epochs=40, lr=3e-3, lam=2.0,
                                       weight_decay=0.0)
    both = rows(6), rows(10, seed=1)

    def states():
        return [torch.cat([rmu.states(model, row) for row in x]).detach() for x in both]

    before, moved, after = states(), unlearned(model, s, None), states()
    far = [(x - y).norm(dim=1).mean() for x, y in zip(before, after)]
    assert far[0] > 3 * far[1]
    for n, change in moved.items():  # what the gradient does not reach stays
        reached = n.startswith(("embed", "layers.0.", "layers.1."))
        assert bool(change.any()) == reached, n


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_a_weight_without_a_gradient_decays_alone(state):
    s = recipe(method="so", objective="rmu", epochs=1, state=state, lr=0.1, weight_decay=0.5,
               warmup=0.0)
    model = tiny()
    old = model.layers[2].mlp.up_proj.weight.detach().clone()
    unlearned(model, s, None)
    torch.testing.assert_close(model.layers[2].mlp.up_proj.weight.detach(), old * 0.95)


# --------------------------------------------------------------------------------- inner neurons


@pytest.mark.parametrize("kind", [LLAMA, OLMO], ids=["llama", "olmo"])
@pytest.mark.parametrize("path, steps", [("layer", 4), ("neuron", 2)])
def test_inner_neurons_are_scored_by_both_forms(kind, path, steps):
    model = tiny(kind, neurons="inner", num_hidden_layers=2)
    pairs = rows(2)[: 1 if path == "neuron" else 2]
    expected = sum(simu.attribute_loop(model, r, steps=steps, path=path) for r in pairs)
    got = simu.attribute(model, collate(pairs), steps=steps, path=path)
    assert got.shape == (2, 48)
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert torch.equal(model(torch.tensor([[5, 6]])), tiny(
        kind, num_hidden_layers=2)(torch.tensor([[5, 6]])))


def test_of_an_inner_neuron_its_row_and_its_column_move():
    mask = masks("dual", "inner")
    model = tiny(neurons="inner")
    moved = unlearned(model, recipe(attention="frozen"), mask)
    for l, critical in enumerate(mask):
        for name in ("gate_proj", "up_proj"):
            assert torch.equal(moved[f"layers.{l}.mlp.{name}.weight"].any(1), critical)
        assert torch.equal(moved[f"layers.{l}.mlp.down_proj.weight"].any(0), critical)


def test_inner_neurons_end_to_end(tmp_path, capsys):
    """--neurons inner beside the paper's, in one run: each has its scores, mask and model."""
    out = tmp_path / "run"
    at = ["demo", "tiny-llama", "--out", str(out), "--learn-epochs", "1", "--light-epochs", "1",
          "--epochs", "1", "--forget-groups", "1", "--retain-groups", "2", "--width", "64",
          "--depth", "2"]
    main(["original", *at])
    for neurons, name, count in (("output", "", 64), ("inner", "-inner", 256)):
        main(["plan", *at, "--neurons", neurons])
        for stage in ("attribute", "mask", "unlearn"):
            main([stage, *at, "--neurons", neurons, "--method", "simu"])
        scores = load_file(out / f"attribution{name}" / "scores.safetensors")["forget"]
        mask = load_file(out / f"mask{name}" / "mask.safetensors")["mask"]
        assert scores.shape == mask.shape == (2, count)
        model = out / f"simu{name}-graddiff"
        assert Config.from_dir(model).neurons == "output"  # a model is a model
        made = json.loads((model / "stage.json").read_text())["settings"]
        assert made["neurons"] == neurons
        assert f"of {2 * count} neurons" in capsys.readouterr().out
    main(["evaluate", str(out)])
    main(["report", str(out)])
    report = (out / "report.md").read_text()
    assert "simu-inner-graddiff" in report and "of 512" in report and "of 128" in report
    pytest.importorskip("matplotlib")
    main(["figures", str(out)])
    assert list(out.rglob("*.png"))


def test_the_tables_names_are_those_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["unlearn", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name in itertools.chain(simu.METHODS, simu.OBJECTIVES, simu.MASKS, NEURONS):
        assert name in told, name


def test_the_command_line_knows_what_a_file_in_forks_adds(tmp_path):
    """And a row of a fork's is not replaced by ours of the same name."""
    root = Path(simu.__file__).parent
    for name in ("simu", "model", "data", "eval"):
        shutil.copy(root / f"{name}.py", tmp_path)
    shutil.copytree(root / "pipeline", tmp_path / "pipeline")
    (tmp_path / "forks").mkdir()
    (tmp_path / "forks" / "mine.py").write_text(
        "import data, simu\nsimu.MASKS['half'] = simu.MASKS['dual']\n"
        "data.TEMPLATES['told'] = ('Q ', 'A', ' ')\n"
        "simu.OBJECTIVES['npo'] = simu.Objective(simu.graddiff, about='npo of a fork')\n")
    out = subprocess.run([sys.executable, "-m", "pipeline", "unlearn", "--help"], cwd=tmp_path,
                         capture_output=True, text=True).stdout
    assert all(name in out for name in ("half", "told", "npo of a fork"))
