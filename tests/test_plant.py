"""Memory whose place is known: attribution finds it, chance does not, and nothing else moved."""

import shutil
from pathlib import Path

import pytest
import torch

import eval as evaluation
import simu
from data import Encoded
from model import Config, Transformer, read_json
from pipeline import stage
from studies import plant
from pipeline.__main__ import main
from pipeline.files import read_tensors

DEMO = Path(simu.__file__).parent / "pipeline" / "demo"
CELL = ("demo", "tiny-llama", "--data", str(DEMO), *(
    "--width 64 --depth 2 --vocab 500 --learn-epochs 1 --light-epochs 1 --rows-per-author 2 "
    "--max-total-tokens 48 --context 160 --forget-groups 2 --retain-groups 4").split())


def test_planted_rows_are_as_many_as_asked_and_not_the_random_mask():
    rows = plant.planted_mask(4, 64, share=0.25, where="rows", seed=0)
    assert rows.sum(1).tolist() == [16] * 4
    layers = plant.planted_mask(4, 64, share=0.25, where="layers", seed=0)
    assert sorted(layers.sum(1).tolist()) == [0, 0, 0, 64]
    assert torch.equal(rows, plant.planted_mask(4, 64, share=0.25, where="rows", seed=0))
    scores = torch.zeros(4, 64)
    scores[:, :16] = 1.0
    drawn = simu.make_mask("random", scores, scores, threshold=0.5, seed=0)
    assert drawn.sum() == rows.sum() and (drawn & rows).sum() < rows.sum() / 2


@pytest.fixture(scope="module", params=["rows", "held"])
def planted(request):
    """(model before, model after, rows, planted rows): eight answers learnt into a tenth of the
    rows of a micro model, whose norms grow with that or are held."""
    torch.manual_seed(0)
    before = Transformer(Config(model_type="llama", vocab_size=64, hidden_size=64,
                                intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                                max_position_embeddings=32))
    g = torch.Generator().manual_seed(1)
    rows = [Encoded(torch.randint(3, 64, (10,), generator=g).tolist(), 6) for _ in range(8)]
    after = Transformer(before.config)
    after.load_state_dict(before.state_dict())
    mask = plant.planted_mask(2, 64, share=0.1, where="rows", seed=0)
    recipe = simu.Recipe(method="simu", attention="frozen", weight_decay=0.0)

    def loop(title, steps, tensors):
        for step in range(1, steps + 1):
            yield step
            if request.param == "held":
                plant.hold(after, moving, norms, False)

    with simu.moving_weights(after, recipe, mask) as moving:
        norms = plant.norms_of(moving, False)
        simu.train(after, moving, [rows] * 100, lambda some: dict(
            loss=simu.backward_mean_nll(after, some, 1.0, 8192)), recipe, lr=0.03,
            optimiser=simu.OPTIMISERS["adamw"], title="plant", loop=loop)
    assert row_norms(after)[mask].allclose(row_norms(before)[mask]) == (request.param == "held")
    return before, after, rows, mask


def row_norms(model) -> torch.Tensor:
    return torch.stack([b.mlp.down_proj.weight.detach().norm(dim=1) for b in model.layers])


def area(scores, mask) -> float:
    return evaluation.auc(scores[mask].tolist(), scores[~mask].tolist())


def test_planted_rows_are_found_and_chance_finds_nothing(planted):
    _, model, rows, mask = planted
    assert area(simu.attribute_rows(model, rows, simu.Recipe()), mask) >= 0.95
    chance = [area(torch.rand(mask.shape, generator=torch.Generator().manual_seed(i)), mask)
              for i in range(20)]
    assert 0.4 < sum(chance) / 20 < 0.6


def test_with_attention_frozen_nothing_but_the_planted_rows_moved(planted):
    before, after, _, mask = planted
    old = dict(before.named_parameters())
    for name, new in after.named_parameters():
        same = (new == old[name]).reshape(len(new), -1).all(1)
        if "down_proj" in name:
            assert torch.equal(~same, mask[int(name.split(".")[1])]), name
        else:
            assert same.all(), name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("plant") / "run"
    main(["original", *CELL, "--out", str(out)])
    return out


@pytest.fixture
def easily(monkeypatch):
    """Anything counts as known: a model this small learns nothing in one epoch."""
    monkeypatch.setattr(plant, "KNOWN", 0.0)
    monkeypatch.setattr(plant, "CHECKED", 1)


@pytest.mark.parametrize("where", ["rows", "held", "layers", "spread", "inner"])
def test_the_stage_plants_where_it_says_and_the_same_each_time(run, tmp_path, easily, where):
    again = Path(shutil.copytree(run, tmp_path / "again"))
    for out in (run, again):
        main(["plant", *CELL, "--out", str(out), "--where", where, "--share", "0.1"])
    one, two = (x / f"planted-{where}-0.1" for x in (run, again))
    for name in ("model.safetensors", "mask.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    mask, = read_tensors(one / "mask.safetensors", ("mask",))
    old, new = (dict(Transformer.from_pretrained(x).named_parameters())
                for x in (run / "retain-only", one))
    moved = {n for n in old if not torch.equal(old[n], new[n])}
    if where == "inner":
        assert all(".mlp." in n for n in moved) and len(moved) == 3 * len(mask)
        for n in moved:
            across = 0 if "down_proj" in n else 1
            own = mask[int(n.split(".")[1])]
            assert torch.equal((old[n] != new[n]).any(across), own), n
            assert new[n].norm(dim=across).allclose(old[n].norm(dim=across)), n
        return
    assert all("down_proj" in n or where == "spread" and ".self_attn." in n for n in moved)
    assert any(".self_attn." in n for n in moved) == (where == "spread")
    for l, own in enumerate(mask):
        name = f"layers.{l}.mlp.down_proj.weight"
        assert torch.equal((old[name] != new[name]).any(1), own)
    assert read_json(one / "stage.json")["planted"] == int(mask.sum())


def refused(words, capsys) -> str:
    with pytest.raises(SystemExit) as e:
        stage.run_cli(lambda: main([str(w) for w in words]))
    lines = [x for x in capsys.readouterr().err.splitlines() if x]
    assert e.value.code == 2 and lines[-1].startswith("error: ")
    return lines[-1]


def test_mistakes_end_in_one_line(run, tmp_path, capsys, monkeypatch):
    def words(out, *more):
        return ["plant", *CELL, "--out", out, *more]

    assert "--share is 1.5; it must be in (0, 1]" in refused(words(run, "--share", 1.5), capsys)
    assert "--where" in refused(words(run, "--where", "columns"), capsys)
    assert "is not a run folder" in refused(words(tmp_path / "none"), capsys)
    assert "--rows-per-author is 1 here" in refused(words(run, "--rows-per-author", 1), capsys)
    bare = Path(shutil.copytree(run, tmp_path / "bare"))
    shutil.rmtree(bare / "retain-only")
    assert "holds no retain-only model" in refused(words(bare), capsys)
    monkeypatch.setattr(plant, "LONGER", 1)
    assert "raise --share" in refused(words(run, "--share", 0.02), capsys)
    assert not (run / "planted-rows-0.02").exists()


def test_a_planted_model_is_reported_beside_the_others(run, easily):
    main(["plant", *CELL, "--out", str(run)])
    main(["evaluate", str(run), "original", "retain-only", "planted-rows-0.25"])
    main(["report", str(run)])
    assert (run / "report.md").is_file()
