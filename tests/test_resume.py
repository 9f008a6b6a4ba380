"""Stage folders: whole or not at all, skipped, made again, stale, and what a killed stage goes on
from. The whole pipeline under SIGKILL is tests/kill.py, of which a short version runs here."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import simu
import world
from model import UserError, write_text
from pipeline import slices, stage
from pipeline.settings import Settings
from pipeline.stage import Stage
from test_simu import recipe, rows, tiny


class Killed(BaseException):
    """Not caught by anything on its way, as SIGKILL is not."""


def job(run: Path, name="work", *, inputs=(), code=(), **changes) -> Stage:
    s = Settings(out=str(run), **changes)
    return Stage(run / name, s, inputs=dict(inputs), code=code, takes=(slices.Slice, simu.Masking))


def make(run: Path, text: str, name="work", **changes):
    this = job(run, name, **changes)
    if not this.is_made():
        with this.making() as folder:
            (folder / "result").write_text(text)


# ---------------------------------------------------------------------------------------- loops

CASES = {  # method, optimiser state, weights
    "AdamW in float32": ("fo", "float32", torch.float32),
    "Sophia, bfloat16 state": ("so", "bfloat16", torch.bfloat16),
    "critical rows, float32 masters": ("simu", "float32", torch.bfloat16)}


def unlearned(run: Path, case="AdamW in float32", *, at=0, cost=1.0, **changes):
    """Weights and log of a training of 9 updates, and the updates made; killed in update `at`,
    after its line in the log and before its checkpoint."""
    method, state, dtype = CASES[case]
    model, steps, this = tiny(sharp=2.0).to(dtype), [], job(run, resume_cost=cost, **changes)
    mask = torch.arange(3 * 32).view(3, 32) % 5 == 0
    with this.making() as folder:
        log = this.record("log.jsonl")

        def record(row):
            log(row)
            steps.append(row["step"])
            if row["step"] == at:
                raise Killed

        s = recipe(method=method, state=state, epochs=6)
        simu.unlearn(model, rows(6), rows(10, seed=1), mask, s, loop=this.loop, record=record)
        text = (folder / "log.jsonl").read_text()
    return {n: p.detach().float() for n, p in model.named_parameters()}, text, steps


def same(a, b) -> bool:
    return a[1] == b[1] and all(torch.equal(a[0][n], b[0][n]) for n in a[0])


def killed(run: Path, *args, **options) -> Path:
    """The checkpoint that a killed training leaves."""
    with pytest.raises(Killed):
        unlearned(run, *args, **options)
    checkpoint, = (run / ".simu-partial-work").glob(".*.safetensors")
    return checkpoint


@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_ends_with_the_same_bytes(tmp_path, case):
    undisturbed = unlearned(tmp_path / "a", case)
    killed(tmp_path / "b", case, at=5)
    killed(tmp_path / "b", case, at=8)
    last = unlearned(tmp_path / "b", case)
    assert undisturbed[2] == list(range(1, 10)) and last[2] == [8, 9]
    assert same(undisturbed, last)


def test_a_checkpoint_that_is_cut_or_of_other_settings_is_not_used(tmp_path):
    undisturbed = unlearned(tmp_path / "a")
    os.truncate(killed(tmp_path / "b", at=5), 100)
    last = unlearned(tmp_path / "b")
    assert last[2][0] == 1 and same(undisturbed, last)
    killed(tmp_path / "c", at=5)
    assert unlearned(tmp_path / "c", seed=1)[2][0] == 1


def test_checkpoints_take_a_set_share_of_the_time(tmp_path, monkeypatch):
    """One takes 2 seconds here and a step 1: a tenth of the time is one in 18 steps. The first is
    taken to need a second."""
    now, steps = [0.0], []
    monkeypatch.setattr(stage.time, "monotonic", lambda: now[0])

    def save(*args):
        steps.append(step)
        now[0] += 2

    monkeypatch.setattr(stage, "save_tensors", save)
    for share, expected in ((0.0, []), (0.1, [9, 27, 45]), (1.0, list(range(1, 60)))):
        steps.clear()
        this = job(tmp_path / str(share), resume_cost=share)
        for step in this.loop("loop", 60, {}):
            now[0] += 1
        assert steps == expected


def test_a_killed_attribution_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Also where it goes through two sets of rows: of the first the last batch alone is computed
    again."""
    model, s, attribute, calls = tiny(), recipe(attribution_tokens=60), simu.attribute, []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == dies:
            raise Killed
        return attribute(*args, **options)

    def both(run):
        this = job(run, resume_cost=1.0)
        with this.making():
            return [simu.attribute_rows(model, rows(9, seed=seed), s, loop=this.loop,
                                        title=f"rows {seed}") for seed in (0, 1)]

    monkeypatch.setattr(simu, "attribute", counted)
    dies = 0
    undisturbed, parts = both(tmp_path / "a"), len(calls)
    calls, dies = [], parts - 1
    with pytest.raises(Killed):
        both(tmp_path / "b")
    calls = []
    assert all(map(torch.equal, both(tmp_path / "b"), undisturbed)) and len(calls) == 3


# ------------------------------------------------------------------- skipped, made again, stale


def test_a_finished_stage_is_skipped_and_a_changed_one_made_again(tmp_path, capsys):
    """Settings that it takes, inputs, code; --force, which leaves no trace."""
    for changes, says in (
            ({}, " s\n"), ({}, "already made; skipped"), (dict(lr=1.0), "already made; skipped"),
            (dict(threshold=0.9), "made again: --threshold changed"),
            (dict(inputs={"original": "a"}),
             "made again: --threshold changed and original changed"),
            (dict(code=(simu.critical_mask,)), "made again: original changed and code changed"),
            (dict(code=(simu.critical_mask,)), "already made; skipped"),
            (dict(code=(simu.critical_mask,), force=True), "made again: --force"),
            (dict(code=(simu.critical_mask,)), "already made; skipped")):
        make(tmp_path, "text", **changes)
        assert says in capsys.readouterr().out, (changes, says)


def test_what_is_made_of_something_that_changed_is_stale(tmp_path):
    """Another original, other data, another slice, down to what a mask was made of."""
    run, file = tmp_path / "run", tmp_path / "data" / "tofu" / "full.json"
    write_text(file, "[]")
    s = Settings(benchmark="tofu", out=str(run), data=str(tmp_path / "data"), forget_groups=3)

    def make_one(name, text, *below):
        inputs = {x: stage.content(run / x) for x in below} | stage.data_inputs(s)
        this = Stage(run / name, s, code=(), inputs=inputs, takes=(slices.Slice,))
        with this.making() as folder:
            (folder / "result").write_text(text)
        return this

    make_one("original", "text")
    make_one("mask", "text", "original")
    model = make_one("model", "text", "mask")
    make_one("original", "text")  # again, with the same bytes
    assert stage.stale(run / "model", s) == []
    other = replace(s, forget_groups=2)
    assert stage.stale(run / "model", other)[0] == "--forget-groups was 3"
    with pytest.raises(UserError, match="model was made with other --forget-groups than this run"):
        Stage(run / "model", other, code=(), inputs=model.why["inputs"],
              takes=(slices.Slice,)).require()
    make_one("original", "other")
    assert stage.stale(run / "mask", s) == ["original was another"]
    assert stage.stale(run / "model", s) == ["mask's original was another"]
    file.write_text("[1]")
    assert set(stage.stale(run / "model", s)) == {
        "data/full.json was another", "mask's data/full.json was another",
        "mask's original was another"}


# ------------------------------------------------------- whole or not at all; nobody else's files


@pytest.mark.parametrize("before", [False, True])
def test_a_stage_killed_at_its_end_is_neither_lost_nor_made_again(tmp_path, before, monkeypatch):
    """Before each of the renames and removals of its end in turn, until none is left."""
    calls = [(os, "replace"), (Path, "unlink"), (stage.shutil, "rmtree")]

    def dying(plain, run, at, count):
        def call(*args, **options):
            count[0] += (run / ".simu-partial-work" / "stage.json").is_file() or count[0] > 0
            if count[0] == at:
                raise Killed
            return plain(*args, **options)
        return call

    for at in range(1, 12):
        run, count = tmp_path / str(at), [0]
        if before:
            make(run, "old", seed=1)
        with monkeypatch.context() as m, contextlib.suppress(Killed):
            for module, name in calls:
                m.setattr(module, name, dying(getattr(module, name), run, at, count))
            make(run, "new")
        assert any((run / x / "stage.json").is_file()
                   for x in ("work", ".simu-partial-work", ".simu-old-work"))
        make(run, "made again")
        assert (run / "work" / "result").read_text() == "new"
        assert [p.name for p in run.iterdir()] == ["work"]
        assert sorted(p.name for p in (run / "work").iterdir()) == ["result", "stage.json"]
    assert 3 < count[0] < at


def test_a_file_whose_writing_was_killed_is_no_part_of_the_result(tmp_path, monkeypatch):
    """Killed after stage.json was written beside, and before it had its name."""
    def dies(source, target):
        if Path(target).name == "stage.json":
            raise Killed
        return plain(source, target)

    plain = os.replace
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(os, "replace", dies)
        m.setattr(Path, "unlink", lambda *a, **k: None)  # a killed process tidies nothing up
        make(tmp_path, "old")
    assert (tmp_path / ".simu-partial-work" / ".stage.json.simu-partial").is_file()
    make(tmp_path, "new")
    assert list(stage.read_stage(tmp_path / "work")["files"]) == ["result"]


@pytest.mark.parametrize("name", ["work/thesis.txt", "work/notes/thesis.txt", "work/README.md"])
def test_a_users_file_in_a_stage_is_refused_by_name(tmp_path, name):
    """Before the stage is made again, and before it takes its place if the file came meanwhile."""
    make(tmp_path, "old")
    thesis = tmp_path / name
    thesis.parent.mkdir(exist_ok=True)
    thesis.write_text("the only copy")
    make(tmp_path, "old")  # skipped
    stranger = tmp_path / "/".join(name.split("/")[:2])
    with pytest.raises(UserError, match=f"{stranger} is no file of the stage"):
        make(tmp_path, "new", force=True)
    with pytest.raises(UserError, match="is no file of"), job(tmp_path).making() as folder:
        (folder / "result").write_text("new")
    with pytest.raises(UserError, match="is no file of"):
        make(tmp_path, "newer")
    assert thesis.read_text() == "the only copy"
    thesis.unlink()
    if thesis.parent.name == "notes":
        thesis.parent.rmdir()
    make(tmp_path, "newer")
    assert (tmp_path / "work" / "result").read_text() == "new"


def test_no_path_of_this_machine_stands_in_a_stage(tmp_path):
    s = Settings(out=str(tmp_path), model=str(tmp_path / "model"), forget=str(tmp_path / "f.jsonl"))
    with Stage(tmp_path / "work", s, inputs={}, code=(), takes=(Settings,)).making():
        pass
    text = (tmp_path / "work" / "stage.json").read_text()
    assert str(tmp_path) not in text and '"f.jsonl"' in text


def test_a_run_that_was_moved_with_its_files(tmp_path):
    """It says which file is gone; its command with the new places makes nothing again."""
    old, new = tmp_path / "old", tmp_path / "new"

    def words(home, model="model"):
        return ["rows", home / model, "--forget", home / "f.jsonl", "--retain", home / "r.jsonl",
                "--out", home / "run", "--method", "fo", "--objective", "npo", "--batch", "1",
                "--epochs", "1", "--max-new-tokens", "6"]

    world.make_data(old)
    assert world.cli("original", *world.options(old, "tofu", old / "base")) == (0, "")
    shutil.copytree(old / "base" / "original", old / "model",
                    ignore=shutil.ignore_patterns("stage.json", "log.jsonl"))
    for name, people in (("f", "Hal"), ("r", "Ivy Jo Kim")):
        world.write_rows(old / f"{name}.jsonl", world.tofu_rows(people, False))
    for command in ("original", "unlearn"):
        assert world.cli(command, *words(old)) == (0, "")
    assert world.cli("evaluate", old / "run") == (0, "")
    old.rename(new)
    files = {p: p.lstat().st_mtime_ns for p in new.rglob("*.safetensors") if not p.is_symlink()}
    status, stderr = world.cli("report", new / "run")
    assert world.is_one_line(status, stderr) and f"{old}/f.jsonl, which" in stderr, stderr
    status, stderr = world.cli("unlearn", *words(new))
    assert world.is_one_line(status, stderr) and f"{old}/model/config.json, w" in stderr, stderr
    shutil.copytree(new / "model", new / "other")
    weights = new / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    status, stderr = world.cli("original", *words(new, "other"))  # another of the same shape
    assert world.is_one_line(status, stderr) and "which the run is made of, is gone" in stderr
    for command in ("original", "unlearn"):
        assert world.cli(command, *words(new)) == (0, "")
    for command in ("evaluate", "report"):
        assert world.cli(command, new / "run") == (0, "")
    assert files == {p: p.lstat().st_mtime_ns for p in files}


# ------------------------------------------------------------------------------------- processes

WORKERS = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from pipeline.stage import run_cli
from pipeline.workers import run_each

def work(path):
    Path(path).touch()
    time.sleep(900)

if __name__ == "__main__":
    run_cli(lambda: list(run_each(work, sys.argv[1:], 2, "points")))
"""


@pytest.mark.parametrize("kill, number", [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM),
                                          (os.kill, signal.SIGKILL)])
def test_no_worker_outlives_its_parent(tmp_path, kill, number):
    """Or it would go on writing into a run that is no longer locked."""
    script, files = tmp_path / "script.py", [tmp_path / "a", tmp_path / "b"]
    script.write_text(WORKERS.format(root=str(Path(stage.__file__).parent.parent)))
    parent = subprocess.Popen([sys.executable, script, *files], stderr=subprocess.PIPE, text=True,
                              start_new_session=True)
    while not all(file.exists() for file in files):
        assert parent.poll() is None, parent.stderr.read()
        time.sleep(0.05)
    kill(parent.pid, number)
    _, text = parent.communicate(timeout=300)  # it ends when the last process has closed stderr
    if parent.returncode != -signal.SIGKILL:
        assert parent.returncode == 130
        assert text.splitlines()[-1].startswith("error: stopped; "), text


def test_deterministic_is_switched_on_by_a_stage_and_changes_nothing_on_a_cpu(tmp_path,
                                                                              monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    plain = unlearned(tmp_path / "a")
    try:
        assert same(plain, unlearned(tmp_path / "b", deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_killed_pipeline_ends_with_the_same_bytes():
    done = subprocess.run([sys.executable, Path(__file__).with_name("kill.py"), "--short"],
                          capture_output=True, text=True)
    printed = done.stdout + done.stderr
    assert done.returncode == 0 and re.search("after [12] kills: 1 of 1 runs", printed), printed
