"""What a killed stage goes on from, and that it ends with the bytes of an undisturbed one. The
whole pipeline under SIGKILL is tests/kill.py, of which a short version runs here."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import simu
from model import UserError
from pipeline import checkpoint, stage
from pipeline.resume import RESUME, Checkpoints
from pipeline.settings import Settings
from pipeline.stage import Stage
from test_simu import recipe, rows, tiny

CASES = {  # method, optimiser state, weights
    "AdamW in float32": ("fo", "float32", torch.float32),
    "Sophia, bfloat16 state": ("so", "bfloat16", torch.bfloat16),
    "critical rows, float32 masters": ("simu", "float32", torch.bfloat16)}


def test_a_large_file_is_read_once_and_again_when_it_changed(tmp_path, monkeypatch):
    """Whatever it is called: as an input, behind a link, and as a stage's own file."""
    read, plain = [], stage.sha256
    monkeypatch.setattr(stage, "sha256", lambda path: read.append(path) or plain(path))
    monkeypatch.setattr(stage, "REHASHED", 10)
    file, link = tmp_path / "a", tmp_path / "folder" / "b"
    file.write_bytes(b"x" * 11)
    link.parent.mkdir()
    link.symlink_to(file)
    first = stage.digests_of([file])
    assert stage.seal(link.parent) == {"b": [11, first["a"], file.stat().st_mtime_ns]}
    assert stage.file_digest(file.rename(tmp_path / "c")) == first["a"] and len(read) == 1
    (tmp_path / "c").write_bytes(b"y" * 12)
    assert stage.file_digest(tmp_path / "c") != first["a"] and len(read) == 2


def test_a_stage_says_how_long_it_loaded_computed_and_saved(tmp_path, capsys):
    s = Settings(out=str(tmp_path))
    with Stage(tmp_path / "x", settings=s, inputs={}, code=()) as folder:
        with checkpoint.clocked("loading"):
            time.sleep(0.2)
        (folder / "file").write_text("")
    made = stage.read_stage(tmp_path / "x")
    assert made["spent"]["loading"] >= 0.2 and min(made["spent"].values()) >= 0
    assert sum(made["spent"].values()) == pytest.approx(made["seconds"], abs=0.01)
    assert re.search(r"\[x\] [0-9.]+ s \(loading 0\.[2-9], computing [0-9.]+, saving [0-9.]+\), ",
                     capsys.readouterr().out)


class Killed(BaseException):
    """Not caught by anything on its way, as SIGKILL is not."""


class Unfinished:
    """What a Stage gives a loop: checkpoints and logs in its unfinished folder."""

    loop, record = Stage.loop, Stage.record

    def __init__(self, folder, cost=1.0):
        self.partial, self.settings = folder, Settings(resume_cost=cost)
        (folder / RESUME).mkdir(parents=True, exist_ok=True)


def unlearned(folder, case="AdamW in float32", *, at=0, **changes):
    """The bytes of a training of 9 updates, and the steps made; killed in update `at`, after its
    line in the log and before its checkpoint."""
    method, state, dtype = CASES[case]
    model, steps, job = tiny(sharp=2.0).to(dtype), [], Unfinished(folder)
    mask = torch.arange(3 * 32).view(3, 32) % 5 == 0
    log, epochs = job.record("log.jsonl"), job.record("epochs.jsonl")

    def record(row):
        log(row)
        steps.append(row["step"])
        epochs(row["step"])
        if row["step"] == at:
            raise Killed

    s = recipe(method=method, state=state, epochs=6, **changes)
    simu.unlearn(model, rows(6), rows(10, seed=1), mask, s, loop=job.loop, record=record)
    weights = {n: p.detach().float() for n, p in model.named_parameters()}
    return weights, [(folder / n).read_bytes() for n in ("log.jsonl", "epochs.jsonl")], steps


def same(a, b) -> bool:
    return a[1] == b[1] and all(torch.equal(a[0][n], b[0][n]) for n in a[0])


def killed(folder, *args, **options) -> list[Path]:
    """Checkpoints that a killed training leaves, the newest first."""
    with pytest.raises(Killed):
        unlearned(folder, *args, **options)
    return sorted((folder / RESUME).glob("*"), reverse=True)


# -------------------------------------------------------------------------------------- trainings


@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_ends_with_the_same_bytes(tmp_path, case):
    whole = unlearned(tmp_path / "a", case)
    left = killed(tmp_path / "b", case, at=5)
    assert [p.name[-13:] for p in left] == ["4.safetensors", "3.safetensors"]
    again = killed(tmp_path / "b", case, at=8)
    assert len(again) == 2
    on = unlearned(tmp_path / "b", case)
    assert whole[2] == list(range(1, 10)) and on[2] == [8, 9]
    assert same(whole, on)


def flip(path: Path, byte: int):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


TORN = {"cut": lambda p: os.truncate(p, p.stat().st_size // 2),
        "empty": lambda p: os.truncate(p, 0), "a bit of a tensor": lambda p: flip(p, -5),
        "its step": lambda p: p.write_bytes(
            p.read_bytes().replace(b'\\"step\\": 4', b'\\"step\\": 5')),
        "longer logs": lambda p: [os.truncate(log, 9) for log in p.parents[1].glob("epochs.*")]}


@pytest.mark.parametrize("what", TORN)
def test_a_torn_checkpoint_is_passed_over(tmp_path, what):
    whole = unlearned(tmp_path / "a")
    newest, older = killed(tmp_path / "b", at=5)
    before = newest.read_bytes()
    TORN[what](newest)
    assert before != newest.read_bytes() or "logs" in what
    on = unlearned(tmp_path / "b")
    assert on[2][0] == (4 if what != "longer logs" else 5) and same(whole, on)


def test_without_a_good_checkpoint_it_starts_over(tmp_path):
    whole = unlearned(tmp_path / "a")
    for path in killed(tmp_path / "b", at=5):
        os.truncate(path, 100)
    (tmp_path / "b" / "epochs.jsonl").write_text("of before\n")
    on = unlearned(tmp_path / "b")
    assert on[2][0] == 1 and same(whole, on)


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path):
    this = job(tmp_path, resume_cost=1.0)
    with pytest.raises(UserError, match="not finite; .*resume/loop-000000002.safetensors is"):
        with this:
            for step in this.loop("loop", 5, {"x": torch.zeros(3)}):
                if step == 3:
                    raise UserError("not finite")


def test_no_share_of_the_time_means_no_checkpoint_and_a_small_one_few(tmp_path):
    (tmp_path / RESUME).mkdir()
    tensors = {"x": torch.zeros(3)}
    Checkpoints(tmp_path, "loop", tensors, 0.0).keep(1)
    assert not list((tmp_path / RESUME).iterdir())
    kept = Checkpoints(tmp_path, "loop", tensors, 0.1)
    kept.cost, now = 2.0, kept.since
    for age, due in ((17.9, False), (18.1, True)):  # 2 of 20 seconds
        kept.since = now - age
        kept.keep(1)
        assert bool(kept.newest) == due
    assert Checkpoints(tmp_path, "another loop", tensors, 0.0).restore() == 0
    assert Checkpoints(tmp_path, "loop", {"x": torch.zeros(4)}, 0.0).restore() == 0
    assert Checkpoints(tmp_path, "loop", tensors, 0.0).restore() == 1


def test_a_full_disk_ends_the_checkpoints_and_not_the_stage(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    whole = unlearned(tmp_path / "a")
    monkeypatch.setattr("pipeline.resume.save_tensors", full)
    assert same(whole, unlearned(tmp_path / "b"))
    assert capsys.readouterr().out.count("No space left on device") == 1


# ------------------------------------------------------------------------------------ attribution


def test_a_killed_attribution_ends_with_the_same_bytes(tmp_path, monkeypatch):
    model, s = tiny(), recipe(attribution_tokens=60)
    attribute, calls = simu.attribute, []
    whole = simu.attribute_rows(model, rows(9), s)

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return attribute(*args, **options)

    monkeypatch.setattr(simu, "attribute", counted)
    with pytest.raises(Killed):
        simu.attribute_rows(model, rows(9), s, loop=Unfinished(tmp_path).loop)
    calls[:] = [1] * 4
    on = simu.attribute_rows(model, rows(9), s, loop=Unfinished(tmp_path).loop)
    assert torch.equal(on, whole)
    parts = len(simu.batches_by_length([len(r.ids) for r in rows(9)], 60 // (s.steps - 1)))
    assert len(calls) - 4 == parts - 3


# ----------------------------------------------------------------------------------- stage folders


def job(run: Path, seed=0, **changes):
    return Stage(run / "work", settings=Settings(out=str(run), seed=seed, **changes),
                 takes=(simu.Masking,), inputs={}, code=())


def make(run: Path, text: str, **changes):
    this = job(run, **changes)
    if not this.is_made():
        with this as folder:
            (folder / "result").write_text(text)


def test_what_was_kept_of_other_settings_is_not_used(tmp_path):
    for seed, found in ((0, False), (0, True), (1, False)):
        with pytest.raises(Killed):
            with job(tmp_path, seed) as folder:
                kept = folder / RESUME / "kept"
                assert kept.exists() == found
                kept.touch()
                raise Killed


def test_a_file_whose_writing_was_killed_is_no_part_of_the_result(tmp_path, monkeypatch):
    """Killed after stage.json was written beside, and before it had its name."""
    plain = os.replace

    def dies(source, target):
        if Path(target).name == "stage.json":
            raise Killed
        plain(source, target)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(os, "replace", dies)
        m.setattr(Path, "unlink", lambda *a, **k: None)  # a killed process tidies nothing up
        make(tmp_path, "old")
    assert (tmp_path / ".simu-partial-work" / ".stage.json.simu-partial").is_file()
    make(tmp_path, "new")
    assert list(stage.read_stage(tmp_path / "work")["files"]) == ["result"]
    assert job(tmp_path).is_made()


@pytest.mark.parametrize("event", ["os.rename", "shutil.rmtree"])
@pytest.mark.parametrize("before", [False, True], ids=["new", "made again"])
def test_a_stage_killed_at_its_end_is_neither_lost_nor_made_again(tmp_path, event, before,
                                                                  monkeypatch):
    """Before each of the renames and removals of its end in turn, until none is left."""
    module, name = event.split(".")
    module = {"os": os, "shutil": stage.shutil}[module]
    plain = getattr(module, "replace" if name == "rename" else name)
    for at in range(1, 9):
        run = tmp_path / str(at)
        if before:
            make(run, "old", seed=1)
        count = []

        def dies(*args, **options):
            whole = (run / ".simu-partial-work" / "stage.json").is_file() or count
            count.extend([1] * bool(whole))
            if len(count) == at:
                raise Killed
            return plain(*args, **options)

        with monkeypatch.context() as m:
            m.setattr(module, "replace" if name == "rename" else name, dies)
            try:
                make(run, "new")
            except Killed:
                died = True
            else:
                died = False
        make(run, "made again")
        assert (run / "work" / "result").read_text() == "new"
        assert {p.name for p in run.iterdir()} - {stage.LOCK} == {"work"}
        assert sorted(p.name for p in (run / "work").iterdir()) == ["result", "stage.json"]
        if not died:
            break
    assert at > 1


def test_force_makes_again_what_is_made(tmp_path, capsys):
    make(tmp_path, "first")
    make(tmp_path, "second")
    assert (tmp_path / "work" / "result").read_text() == "first"
    make(tmp_path, "third", force=True)
    assert (tmp_path / "work" / "result").read_text() == "third"
    assert "[work] made again: --force\n" in capsys.readouterr().out
    make(tmp_path, "fourth")  # it leaves no trace in the fingerprint
    assert (tmp_path / "work" / "result").read_text() == "third"


# --------------------------------------------------------------------------------------- the rest


def test_sigterm_stops_like_ctrl_c(capsys):
    before = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            with pytest.raises(SystemExit) as e:
                stage.run_cli(lambda: signal.raise_signal(number))
            assert e.value.code == 130
            assert "goes on from where it stopped" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_deterministic_is_switched_on_by_a_stage_and_changes_nothing_on_a_cpu(tmp_path,
                                                                              monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    plain = unlearned(tmp_path / "a")
    try:
        make(tmp_path / "run", "x", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert same(plain, unlearned(tmp_path / "b"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_killed_pipeline_ends_with_the_same_bytes():
    done = subprocess.run([sys.executable, Path(__file__).with_name("kill.py"), "--short"],
                          capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert done.returncode == 0 and re.search("after [12] kills: 1 of 1 runs", told), told
