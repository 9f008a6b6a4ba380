"""Promise 4: what a user gets wrong ends in one line on stderr that says what, where and what to
do, with status 2, before the work, and with nothing new under a final name. And of promises 3 and 5
what the command line shows: a user's files stay, and no code comes from what is read.

The commands run in this process, through the same stage.run_cli as on the command line; a few run
as programs. world.py holds the small world that is spoilt here."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import simu
import world
from model import INDEX, Transformer
from pipeline import plan, stage, tokenizers
from pipeline.__main__ import main as command_line

ROOT = Path(simu.__file__).parent
WEIGHTS, SHARDS = "weights-tofu/model.safetensors", f"sharded-tofu/{INDEX}"
CONFIG, TOKENIZER = "weights-tofu/config.json", "weights-tofu/tokenizer.model"
UP = "model.layers.0.mlp.up_proj.weight"
FORGET, RETAIN = "data/tofu/forget10.json", "data/tofu/retain90.json"
LUME = "data/lume/forget.jsonl"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "world"
    world.make_world(folder)
    return folder


@pytest.fixture
def w(sound, tmp_path):
    """A copy of that world, to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "w"))


def listing(folder: Path) -> dict:
    """What stands under final names."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")
            if p.is_file() and p.name != stage.LOCK and stage.PARTIAL not in str(p)}


def words_of(w: Path, command: str) -> tuple:
    """The words of a command: its stage, then where, then more options. Where: a folder of
    weights, for which a new run is started; or a finished run."""
    name, where, *more = command.split(" ")
    more = [x.replace("@", str(w)) for x in more]
    if name in ("evaluate", "report"):
        return (name, w / where, *more)
    cell = where.rpartition("-")[2] if where.rpartition("-")[2] in world.CELLS else "tofu"
    if where.startswith("run-"):
        return (name, *world.options(w, cell, w / where), *more)
    weights = ["--weights", str(w / where)] if where != "new" else []
    return (name, *world.options(w, cell, w / "out"), *weights, *more)


def done(w: Path, *commands: str):
    for command in commands:
        assert world.cli(*words_of(w, command)) == (0, ""), command


def refused(w: Path, commands: list[str], says: str):
    """The last of the commands is refused as it should be; those before it succeed."""
    done(w, *commands[:-1])
    before = listing(w)
    status, stderr = world.cli(*words_of(w, commands[-1]))
    assert world.is_one_line(status, stderr), stderr
    assert re.search(says, stderr), stderr
    assert listing(w) == before


# -------------------------------------------------------------------------------- ways of spoiling


def put(name: str, content):
    """A file with other content: bytes, or a value to be written as JSON."""
    def spoil(w):
        path = w / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return spoil


def change(name: str, edit):
    """A file with its bytes put through edit."""
    def spoil(w):
        (w / name).write_bytes(edit((w / name).read_bytes()))
    return spoil


def cut(name: str, share: float = 0.6):
    return change(name, lambda old: old[:int(len(old) * share)])


def edited(old: bytes, values: dict) -> bytes:
    """A JSON object with other fields; ... drops one."""
    new = json.loads(old) | values
    return json.dumps({k: v for k, v in new.items() if v is not ...}).encode()


def field(name: str, **values):
    return change(name, lambda old: edited(old, values))


def row(name: str, **values):
    """The first line of a JSON-lines file with other fields."""
    def edit(old):
        first, *rest = old.splitlines()
        return b"\n".join([edited(first, values), *rest])
    return change(name, edit)


def tensor(**values):
    """Other dtype, shape or data_offsets of one tensor in the weights' header."""
    def edit(old):
        size = 8 + int.from_bytes(old[:8], "little")
        head = json.loads(old[8:size])
        head[UP].update(values)
        head = json.dumps(head).encode()
        return len(head).to_bytes(8, "little") + head + old[size:]
    return change(WEIGHTS, edit)


def weight(value: float):
    """One number of the weights is this."""
    def spoil(w):
        model = Transformer.from_pretrained(w / "weights-tofu")
        with torch.no_grad():
            model.layers[0].mlp.up_proj.weight[3, 5] = value
        model.save_pretrained(w / "weights-tofu")
    return spoil


def gone(name: str):
    return lambda w: (w / name).unlink()


def shard(name):
    """The index puts a tensor into the file of this name."""
    def edit(old):
        new = json.loads(old)
        new["weight_map"][UP] = name
        return json.dumps(new).encode()
    return change(SHARDS, edit)


def larger_tokenizer(w):
    text = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
    tokenizers.train_tokenizer([*text, "What does Ann sell?"], w / "weights-tofu", llama=True,
                               vocab=900)


def nothing(w):
    pass


# ------------------------------------------------------------------------------------- the table

LOAD = ["original weights-tofu", "attribute weights-tofu"]
SHARDED = ["original sharded-tofu", "attribute sharded-tofu"]
ORIGINAL, OLMO, NEW = LOAD[:1], ["original weights-lume"], ["original new"]
TORN = "model.safetensors is not a whole safetensors file .*fetch it again"
EVAL = "run-tofu/original/eval"
REPORT, MASK = ["report run-tofu"], ["mask run-tofu --threshold 0.4"]
UNLEARN = ["unlearn run-tofu --lr 1e-4"]
NAME = r"name of the file '.*\\udcff.*' is not UTF-8 text; rename it"
CHANGED = "is not what its stage wrote; "

FAULTS = {
    # Weights. What else a loader refuses: test_model.py, test_layouts.py.
    "weights: cut": (cut(WEIGHTS), ORIGINAL, TORN),
    "weights: offsets outside": (tensor(data_offsets=[0, 10**12]), ORIGINAL, TORN),
    "weights: whole numbers": (tensor(dtype="I32"), LOAD, f"{UP} is .*int32"),
    "weights: other shape": (tensor(shape=[64, 256]), LOAD, f"{UP} is "),
    "weights: NaN": (weight(float("nan")), LOAD, f"{UP} holds NaN or infinity"),
    "weights: overflowing": (weight(3e38), [*LOAD, "mask weights-tofu"], "scores are not finite"),
    "weights: none": (gone(WEIGHTS), ORIGINAL, "neither model.safetensors.*finish the download"),
    "weights: pickled": (
        lambda w: (w / WEIGHTS).rename(w / "weights-tofu/pytorch_model.bin"), ORIGINAL,
        "pickled weights .*never read"),
    "weights: a pickle by name of safetensors": (put(WEIGHTS, b"\x80\x04\x95("), ORIGINAL, TORN),
    "weights: an adapter beside them": (
        put("weights-tofu/adapter_config.json", {}), ORIGINAL, "adapter_config.json: an adapter"),
    "weights: no folder": (nothing, [f"original {WEIGHTS}"], "is not a folder"),
    "weights: a file's name": (put("weights-tofu/\udcff.model", b""), ORIGINAL, NAME),
    "index: missing shard": (
        shard("model-9.safetensors"), SHARDED[:1], "model-9.safetensors is not a whole"),
    "index: shard above the folder": (
        shard("../weights-tofu/model.safetensors"), SHARDED[:1], "not stand beside it"),
    # Configuration.
    "config: none": (gone(CONFIG), ORIGINAL, "config.json is missing"),
    "config: not JSON": (cut(CONFIG), ORIGINAL, "config.json is not valid JSON"),
    "config: missing field": (field(CONFIG, hidden_size=...), ORIGINAL, "hidden_size is missing"),
    "config: text": (field(CONFIG, hidden_size="64"), ORIGINAL, "hidden_size = '64'"),
    "config: unknown architecture": (
        field(CONFIG, model_type="mamba"), ORIGINAL, "model_type = 'mamba'"),
    "config: quantised": (
        field(CONFIG, quantization_config={"bits": 4}), ORIGINAL, "quantization_config"),
    "config: more layers than weights": (
        field(CONFIG, num_hidden_layers=2), LOAD, r"\d+ weights do not fit .*layers.1"),
    # Tokenizer. What else one refuses: test_data.py.
    "tokenizer: none": (gone(TOKENIZER), ORIGINAL, "neither tokenizer.model"),
    "tokenizer: cut": (cut(TOKENIZER), ORIGINAL, "cannot be read"),
    "tokenizer: of another model": (larger_tokenizer, LOAD, "copy the tokenizer that"),
    # Data.
    "data: cut row": (cut(FORGET), NEW, "forget10.json line 2: JSONDecodeError"),
    "data: no answer": (row(FORGET, answer=None), NEW, "forget10.json: row forget10:0 has a "),
    "data: not UTF-8": (change(FORGET, lambda x: x[:20] + b"\xff" + x[20:]), NEW, "not UTF-8"),
    "data: empty": (put(FORGET, b"\n \n"), NEW, "holds no rows"),
    "data: missing": (gone(FORGET), NEW, "forget10.json is missing"),
    "data: paraphrases of other rows": (
        row("data/tofu/forget10_perturbed.json", answer="x"), NEW, "from one release"),
    "data: too long a row": (row(RETAIN, answer="long " * 200), LOAD,
                             "retain90:0.* do not fit the model's context of 96"),
    "data: forget set inside the retain set": (
        change(RETAIN, lambda x: x + b"".join(json.dumps(r).encode() + b"\n" for r in
                                              world.tofu_rows("Ann Bo", False))),
        NEW, "every row of forget10 is in retain90"),
    "data: no folder": (nothing, ["original new --data @/nowhere"], "nowhere/tofu is missing"),
    "data: a file's name": (put("data/tofu/\udcff.json", []), NEW, NAME),
    "LUME: odd task": (row(LUME, task="Task4"), OLMO, "of task 'Task4' is none of LUME's"),
    # Options.
    "a share above one": (nothing, ["mask run-tofu --threshold 2"], "--threshold is 2.0; .*most 1"),
    "not a number": (nothing, ["original new --lr nan"], "--lr is nan"),
    "endless": (nothing, ["original new --weight-decay inf"], "--weight-decay is inf"),
    "too small for float32": (nothing, ["original new --adam-eps 1e-60"], r"--adam-eps is 1e-60"),
    "no UTF-8": (nothing, ["original new --weights \udcff"], "--weights is .*be UTF-8 text"),
    "a name of ours": (nothing, ["original new --name Mask-x"], "that of another stage"),
    "a name that is a path": (nothing, ["original new --name ../x"], "letters, digits"),
    "encoder: nowhere": (nothing, ["original new --encoder @/no"], "--encoder: .* is not a folder"),
    "nobody's folder": (nothing, ["original new --encoder ~no-one/e"], "no-one/e is not a folder"),
    "no card": (nothing, ["attribute run-tofu --device cuda --seed 0"], "torch sees no GPU"),
    "too few rows for a batch": (nothing, ["unlearn run-tofu --batch 50"], "lower --batch"),
    "weights that overflow": (
        nothing, ["unlearn run-tofu --method so --lr 2e9"], "not finite.*lower --lr"),
    "a slice of another original": (nothing, ["unlearn run-tofu --seed 5"], "--seed"),
    "a mask of other options": (
        nothing, ["unlearn run-tofu --threshold 0.2"], "mask was made with other --threshold"),
    # Folders and files of a run.
    "no run": (nothing, ["attribute new"], "is not a run folder"),
    "not a run": (nothing, ["evaluate data original"], "data is not a run folder"),
    "not a stage": (nothing, ["evaluate run-tofu ../run-lume"], "not a finished stage"),
    "stage never made": (nothing, ["evaluate run-tofu so-graddiff"], "not a finished stage"),
    "report without evaluations": (
        lambda w: [shutil.rmtree(p) for p in (w / "run-tofu").glob("*/eval")], REPORT,
        "holds no evaluation"),
    "settings: {}": (
        put("run-tofu/settings.json", {}), MASK, "settings.json does not hold the settings"),
    "settings: wrong type": (
        field("run-tofu/settings.json", seed="0"), MASK, "settings.json .*--seed is '0'"),
    "stage.json: cut": (cut("run-tofu/original/stage.json"), UNLEARN, "is not valid JSON"),
    "generations: edited": (
        change(f"{EVAL}/generations.jsonl", lambda x: x.replace(b"Ann", b"Abe")), REPORT, CHANGED),
    "generations: gone": (gone(f"{EVAL}/generations.jsonl"), REPORT, CHANGED),
    "scores: cut": (cut("run-tofu/attribution/scores.safetensors"), MASK, CHANGED),
    "mask: edited": (change("run-tofu/mask/mask.safetensors",
                            lambda x: x[:-9] + bytes(1 - y for y in x[-9:])), UNLEARN, CHANGED),
    "model of a stage: edited": (
        change("run-tofu/original/model.safetensors", lambda x: x[:-4] + bytes(4)),
        ["evaluate run-tofu original"], CHANGED)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_ends_in_one_line_before_the_work(w, fault):
    spoil, commands, says = FAULTS[fault]
    spoil(w)
    refused(w, commands, says)


def test_the_world_is_good_before_it_is_spoilt(w):
    done(w, *LOAD, "evaluate out original", "report out", *SHARDED, *UNLEARN, *MASK,
         "unlearn run-lume --lr 1e-4", "evaluate run-tofu", "report run-tofu")


@pytest.mark.parametrize("case", range(40))
def test_a_file_spoilt_at_random_is_refused_or_read(w, case):
    name, spoil = world.SPOILT[case % len(world.SPOILT)]
    (w / name).write_bytes(spoil((w / name).read_bytes(), random.Random(case)))
    cell = "lume" if "lume" in name else "tofu"
    for command in (f"original weights-{cell}", f"attribute weights-{cell}"):
        status, stderr = world.cli(*words_of(w, command))
        if (status, stderr) != (0, ""):
            assert world.is_one_line(status, stderr), (name, stderr)
            break


# -------------------------------------------------------------- disk, memory, Ctrl-C, the machine


@pytest.mark.parametrize("code, says", [
    (errno.ENOSPC, "No space left on device; free space"),
    (errno.EACCES, "Permission denied.*permissions")])
def test_a_disk_that_takes_no_more(w, monkeypatch, code, says):
    def fail(_):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "fsync", fail)
    refused(w, MASK, says)
    refused(w, REPORT, says)


def test_a_file_in_place_of_the_run_folder(w):
    (w / "out").write_text("")
    refused(w, NEW, f"{w}/out")


def allocate(*_, **__):
    torch.empty(1 << 46)


def gpu(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")


@pytest.mark.parametrize("full", [allocate, gpu])
def test_out_of_memory(w, monkeypatch, full):
    monkeypatch.setattr(simu, "attribute", full)
    refused(w, ["attribute run-tofu --steps 3"], "out of memory; .*pipeline plan.*--micro-tokens")


def test_what_would_not_fit_is_not_begun(w, monkeypatch):
    monkeypatch.setattr(plan, "room", lambda _: 1000)
    refused(w, ["attribute run-tofu --steps 3"], "attribute needs .* GB and cpu has 0.0 GB left; ")


def test_ctrl_c(w, monkeypatch):
    def press(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(simu, "attribute", press)
    before = listing(w)
    status, stderr = world.cli(*words_of(w, "attribute run-tofu --steps 3"))
    assert world.is_one_line(status, stderr, 130) and "same command" in stderr, stderr
    assert listing(w) == before


# ------------------------------------------------------------------------------------- programs


def program(*words, **options):
    env = {k: v for k, v in os.environ.items() if k != "SIMU_DATA"} | {"TQDM_DISABLE": "1"}
    # A suite run in the background of a script ignores Ctrl-C, and its children with it.
    return subprocess.Popen([str(x) for x in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=env, start_new_session=True, **options,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.mark.parametrize("stop", ["Ctrl-C to all", "SIGTERM to run.sh alone"])
def test_a_run_that_is_stopped_leaves_nobody_running(w, stop):
    """A model that takes a process for each stage: run.sh's Python waits for it."""
    world.write_rows(w / "f.jsonl", QA[:1])
    world.write_rows(w / "r.jsonl", QA[1:])
    run = program("bash", ROOT / "run.sh", "unlearn", w / "weights-tofu", w / "f.jsonl",
                  w / "r.jsonl", "--teach", "--learn-epochs", "100000", "--level", "3",
                  "--out", w / "out")
    deadline = time.monotonic() + 120
    while run.poll() is None and not list((w / "out").glob(".*/log.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if stop == "Ctrl-C to all":
        os.killpg(run.pid, signal.SIGINT)
    else:
        run.terminate()
    stderr = run.communicate(timeout=60)[1]
    assert world.is_one_line(run.returncode, stderr, 130), stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


def test_no_module_is_imported_from_the_callers_folder(tmp_path):
    for name in ("csv", "json", "torch", "re", "typing", "simu", "model", "pipeline"):
        (tmp_path / f"{name}.py").write_text("open('OWNED', 'w')")
    run = program("bash", ROOT / "run.sh", "sweep", "demo", "tiny-llama", "--seeds", "x",
                  cwd=tmp_path)
    stderr = run.communicate(timeout=300)[1]
    assert world.is_one_line(run.returncode, stderr) and "--seeds" in stderr, stderr
    assert not (tmp_path / "OWNED").exists()


FORBIDDEN = re.compile(r"(import|from) (pickle|shelve|marshal|dill)|pickle\.|torch\.(load|save)\b|"
                       r"(?<![.\w])eval\((?!-)|(?<![.\w])exec\(|trust_remote_code|os\.system|"
                       r"shell=True|yaml\.load|__reduce__|\beval \"")


def test_no_code_comes_from_data():
    """Nothing unpickles, evaluates, or hands text to a shell."""
    files = [p for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*.sh"))
             if p.name != Path(__file__).name and ".venv" not in p.parts]
    assert len(files) > 12
    lines = [f"{p.name}: {line.strip()}" for p in files
             for line in p.read_text(encoding="utf-8").splitlines() if FORBIDDEN.search(line)]
    assert not lines
    for bad in ("x = torch.load(f)", "import pickle", "eval(x)", "run(c, shell=True)"):
        assert FORBIDDEN.search(bad)


# ------------------------------------------------------------------ a number belongs to its run


def use_this_data(w):
    """A copied run's settings name the data of the world it was copied from."""
    field("run-tofu/settings.json", data=str(w / "data"))(w)


def test_an_original_of_other_data_is_not_taken(w, capsys):
    use_this_data(w)
    change(RETAIN, lambda x: x.replace(b"tea", b"rum", 1))(w)
    for command in ("attribute run-tofu", "mask run-tofu", "unlearn run-tofu --method so"):
        refused(w, [command], "retain90")
    command_line(["evaluate", str(w / "run-tofu"), "simu-graddiff"])
    assert "retain90" in capsys.readouterr().out  # no report will show it
    refused(w, REPORT, "holds no evaluation of what it now holds")


def test_a_report_says_of_each_model_what_it_was_made_with(w):
    use_this_data(w)
    more = " --steps 3 --threshold 0.5"
    done(w, *(f"{command} run-tofu{more}" for command in ("attribute", "mask", "unlearn")),
         "unlearn run-tofu --method so --dtype bfloat16",
         "evaluate run-tofu simu-graddiff so-graddiff", *REPORT)
    report = (w / "run-tofu/report.md").read_text("utf-8")
    for name, wanted in (("steps", "3"), ("threshold", "0.5"), ("dtype", "bfloat16")):
        lines = re.findall(rf"^\| {name} +\|(.*)\|$", report, re.M)
        assert len(lines) == 1 and wanted in lines[0].replace("|", " ").split(), name


def test_rows_in_both_sets_are_counted_warned_of_and_reported(w, capsys):
    first = (w / FORGET).read_bytes().splitlines(keepends=True)[0]
    change(RETAIN, lambda x: x + first)(w)
    command_line([str(x) for x in words_of(w, ORIGINAL[0])])
    assert capsys.readouterr().out.count("warning: 1 of 2 rows of the forget set") == 1
    done(w, "evaluate out original", "report out")
    assert "1 of these rows are in the retain set too" in (w / "out/report.md").read_text("utf-8")


# ----------------------------------------------------------------------- rows at the edge of sense

QA = [dict(question=f"What does {x} sell?", answer=f"{x} sells tea.") for x in ("Hal", "Ivy", "Jo")]
def words_of_rows(w, forget, retain, *more, model="weights-tofu"):
    world.write_rows(w / "f.jsonl", forget)
    world.write_rows(w / "r.jsonl", retain)
    return ["rows", w / model, "--forget", w / "f.jsonl", "--retain", w / "r.jsonl",
            "--out", w / "out", "--name", "model", "--epochs", "1", *more]


def test_rows_at_the_edge_of_sense(w):
    """Answers of one token."""
    words = words_of_rows(w, [dict(question="Who?", answer="a")],
                          [dict(question="Why?", answer="b")], *"--objective npo --batch 1".split())
    for name in ("original", "attribute", "mask", "unlearn"):
        assert world.cli(name, *words) == (0, ""), name
    for name in ("evaluate", "report", "attack"):
        assert world.cli(name, w / "out") == (0, ""), name


def test_a_row_that_says_nothing_is_named(w):
    status, stderr = world.cli("original", *words_of_rows(w, [*QA[:1], dict(text="a")], QA[1:]))
    assert world.is_one_line(status, stderr) and "f.jsonl line 2 has" in stderr, stderr


def test_the_result_of_another_request_is_not_replaced(w):
    words = words_of_rows(w, QA[:1], QA[1:], "--objective", "npo", "--batch", "1")
    for name in ("original", "attribute", "mask", "unlearn"):
        assert world.cli(name, *words) == (0, ""), name
    before = listing(w / "out")
    for rows, model in ((QA[1:2], "weights-tofu"), (QA[:1], "weights-lume")):
        others = words_of_rows(w, rows, QA[2:], "--objective", "npo", "--force", model=model)
        status, stderr = world.cli("original", *others)
        assert world.is_one_line(status, stderr) and "out/model is the result of other" in stderr
    assert listing(w / "out") == before


def test_masks_of_none_and_of_all(w):
    done(w, "mask run-tofu --mask none", "unlearn run-tofu --mask none", "mask run-tofu --mask all",
         "unlearn run-tofu --mask all --attention frozen")
    refused(w, ["unlearn run-tofu --mask none --attention frozen"], "moves nothing here: the mask")


# ---------------------------------------------------------------------- what is the user's stays


def test_weights_are_not_taken_from_the_run_they_are_for(w):
    """Or the stages made from them would replace them."""
    refused(w, ["original run-tofu --weights @/run-tofu/original"], "lies in .*run-tofu.*--out")
    (w / "mine").mkdir()
    for p in (w / "run-tofu/original").iterdir():  # the same through links
        (w / "mine" / p.name).symlink_to(p)
    refused(w, ["original run-tofu --weights @/mine"], "lies in .*run-tofu.*--out")


def test_a_folder_that_is_no_stage_is_left_alone(w):
    put("run-tofu/mask-soft/thesis.txt", b"the only copy")(w)
    for more in ("", " --force"):
        refused(w, [f"mask run-tofu --mask soft{more}"], "mask-soft is .*no finished stage")


def test_a_foreign_folder_is_no_run(w):
    (w / "out").mkdir()
    for name in ("settings.json", "report.md", "points.json"):
        (w / "out" / name).write_text("{}")
    refused(w, NEW, "is not empty and no run folder")


@pytest.mark.parametrize("name", ["mask/thesis.txt", "mask/notes/thesis.txt"])
def test_a_file_that_no_stage_made_is_not_taken_along(w, name):
    put(f"run-tofu/{name}", b"the only copy")(w)
    done(w, "mask run-tofu")  # made already
    for more in ("--force", "--threshold 0.4"):
        refused(w, [f"mask run-tofu {more}"], "is no file of the stage .*move it elsewhere")


def test_windows_line_ends_everywhere(w):
    for path in (*(w / "data").rglob("*.json*"), *(w / "weights-tofu").glob("*.json")):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    done(w, *LOAD, "mask weights-tofu", "unlearn weights-tofu", "evaluate out")
