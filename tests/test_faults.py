"""Bad input, all of it: each fault ends in one line on stderr that says what, where and what to do,
with status 2, without a traceback, and with nothing new under a final name.

The commands run in this process, through the same stage.run_cli as on the command line; a few run
as programs of their own. fuzz.py holds the small world they spoil, and spoils it at random."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fuzz
import simu
from model import INDEX, Transformer, save_tensors, stored_parameters
from pipeline import plan, stage, tokenizers
from pipeline.__main__ import main as command_line

ROOT = Path(simu.__file__).parent
WHOLE, SHARDS = "weights-tofu/model.safetensors", f"sharded-tofu/{INDEX}"
CONFIG = "weights-tofu/config.json"
UP = "model.layers.0.mlp.up_proj.weight"
FORGET, LUME = "data/tofu/forget10.json", "data/lume/forget.jsonl"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "world"
    fuzz.make_world(folder)
    return folder


@pytest.fixture
def w(world, tmp_path):
    """A copy of that world, to be spoilt."""
    return Path(shutil.copytree(world, tmp_path / "w"))


def listing(folder: Path) -> dict:
    """What stands under final names."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")
            if p.is_file() and p.name != stage.LOCK and ".simu-partial" not in str(p)}


def words_of(w: Path, command: str) -> tuple:
    """The words of a command: its stage, then where, then more options. Where: a folder of
    weights, for which a new run is made; or a finished run."""
    name, where, *more = command.split(" ")
    more = [x.replace("@", str(w)) for x in more]
    if name in ("evaluate", "report"):
        return (name, w / where, *more)
    cell = where.rpartition("-")[2] if where.rpartition("-")[2] in fuzz.CELLS else "tofu"
    if where.startswith("run-"):
        return (name, *fuzz.options(w, cell, w / where), *more)
    weights = ["--weights", str(w / where)] if where != "new" else []
    return (name, *fuzz.options(w, cell, w / "out"), *weights, *more)


def refused(w: Path, commands: list[str], says: str):
    """The last of the commands is refused as it should be; those before it succeed."""
    for command in commands[:-1]:
        assert fuzz.cli(*words_of(w, command)) == (0, ""), command
    before = listing(w)
    status, stderr = fuzz.cli(*words_of(w, commands[-1]))
    assert fuzz.is_one_line(status, stderr), stderr
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


def cut(name: str, share: float = 0.6):
    return change(name, lambda old: old[:int(len(old) * share)])


def change(name: str, edit):
    """A file with its bytes put through edit."""
    def spoil(w):
        (w / name).write_bytes(edit((w / name).read_bytes()))
    return spoil


def field(name: str, **values):
    """A JSON object with other fields; ... drops one."""
    def edit(old):
        new = json.loads(old) | values
        return json.dumps({k: v for k, v in new.items() if v is not ...}).encode()
    return change(name, edit)


def row(name: str, n: int = 0, **values):
    """A JSON-lines file with other fields in row n; ... drops one."""
    def edit(old):
        lines = old.splitlines()
        new = json.loads(lines[n]) | values
        lines[n] = json.dumps({k: v for k, v in new.items() if v is not ...}).encode()
        return b"\n".join(lines)
    return change(name, edit)


def header(edit):
    """The weights' safetensors header put through edit (bytes to bytes)."""
    def whole(old):
        size = 8 + int.from_bytes(old[:8], "little")
        new = edit(old[8:size])
        return len(new).to_bytes(8, "little") + new + old[size:]
    return change(WHOLE, whole)


def tensor(**values):
    """Other dtype, shape or data_offsets of one tensor in that header."""
    def edit(old):
        new = json.loads(old)
        new[UP].update(values)
        return json.dumps(new).encode()
    return header(edit)


def weight(value: float):
    """One number of the weights is this."""
    def spoil(w):
        own = Transformer.from_pretrained(w / "weights-tofu")
        with torch.no_grad():
            own.layers[0].mlp.up_proj.weight[3, 5] = value
        save_tensors(w / WHOLE, stored_parameters(own))
    return spoil


def folder(name: str):
    """A folder in place of a file."""
    def spoil(w):
        (w / name).unlink()
        (w / name).mkdir()
    return spoil


def gone(*names: str):
    def spoil(w):
        for name in names:
            (w / name).unlink()
    return spoil


def shard(name: str):
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


def pickled(w):
    (w / WHOLE).rename(w / "weights-tofu/pytorch_model.bin")


def nothing(w):
    pass


def swap_lines(old: bytes) -> bytes:
    first, *rest = old.splitlines(keepends=True)
    return b"".join([first, *reversed(rest)])


# ------------------------------------------------------------------------------------- the table

LOAD = ["original weights-tofu", "attribute weights-tofu"]
SHARDED = ["original sharded-tofu", "attribute sharded-tofu"]
ORIGINAL, OLMO = LOAD[:1], ["original weights-lume"]
PICKLES = b"\x80\x04\x95(__main__"
NOT_WHOLE = "model.safetensors is not a whole safetensors file .*download it again"
EVAL = "run-tofu/original/eval"
REPORT, MASK = ["report run-tofu"], ["mask run-tofu --threshold 0.4"]
UNLEARN = ["unlearn run-tofu --lr 1e-4"]
NAME = r"name of the file '.*\\udcff.*' is not UTF-8 text; rename it"
CHANGED = "is not what its stage wrote; delete .* and run its stage again"

FAULTS = {
    # Weights.
    "weights: cut": (cut(WHOLE), LOAD, NOT_WHOLE),
    "weights: empty": (put(WHOLE, b""), LOAD, NOT_WHOLE),
    "weights: seven bytes": (put(WHOLE, b"\x08\0\0\0\0\0\0"), LOAD, NOT_WHOLE),
    "weights: header of no bytes": (change(WHOLE, lambda x: bytes(8) + x[8:]), LOAD, NOT_WHOLE),
    "weights: header beyond the file": (
        change(WHOLE, lambda x: (10**7).to_bytes(8, "little") + x[8:]), LOAD, NOT_WHOLE),
    "weights: header of 2**63 bytes": (
        change(WHOLE, lambda x: (2**63).to_bytes(8, "little") + x[8:]), LOAD, NOT_WHOLE),
    "weights: header is not JSON": (header(lambda x: x[:-9] + b"{" * 9), LOAD, NOT_WHOLE),
    "weights: header is a list": (header(lambda x: b"[1, 2]"), LOAD, NOT_WHOLE),
    "weights: header is not UTF-8": (header(lambda x: b"\xff" + x[1:]), LOAD, NOT_WHOLE),
    "weights: offsets outside": (tensor(data_offsets=[0, 10**12]), LOAD, NOT_WHOLE),
    "weights: offsets negative": (tensor(data_offsets=[-4, 65536]), LOAD, NOT_WHOLE),
    "weights: unknown dtype": (tensor(dtype="F33"), LOAD, NOT_WHOLE),
    "weights: whole numbers": (tensor(dtype="I32"), LOAD, f"{UP} is .*int32"),
    "weights: other shape": (tensor(shape=[64, 256]), LOAD, f"{UP} is "),
    "weights: huge shape": (tensor(shape=[2**40, 2**40]), LOAD, NOT_WHOLE),
    "weights: tensor of another name": (
        header(lambda x: x.replace(b"up_proj", b"upp_roj")), LOAD, "up_proj.* is missing"),
    "weights: NaN": (weight(float("nan")), LOAD, f"{UP} holds NaN or infinity"),
    "weights: infinity": (weight(float("-inf")), LOAD, f"{UP} holds NaN or infinity"),
    "weights: overflowing": (weight(3e38), LOAD, "scores are not finite"),
    "weights: a folder": (folder(WHOLE), ORIGINAL, "neither model.safetensors"),
    "weights: none": (gone(WHOLE), ORIGINAL, "neither model.safetensors.*finish the download"),
    "weights: pickled": (pickled, ORIGINAL, "pickled weights .*never read"),
    "weights: a pickle by another name": (put(WHOLE, PICKLES), LOAD, NOT_WHOLE),
    "index: missing shard": (
        shard("model-9.safetensors"), SHARDED[:1], "model-9.safetensors is missing"),
    "index: shard above the folder": (
        shard("../weights-tofu/model.safetensors"), SHARDED[:1], "not stand beside it"),
    "index: absolute path": (shard("/etc/passwd.safetensors"), SHARDED[:1], "not stand beside it"),
    "index: shard is a number": (shard(7), SHARDED[:1], "weight_map must map"),
    "index: not JSON": (cut(SHARDS), SHARDED[:1], "index.json is not valid JSON"),
    "index: a list": (put(SHARDS, []), SHARDED[:1], "weight_map must map"),
    "index: no map": (put(SHARDS, {"weight_map": {}}), SHARDED[:1], "weight_map must map"),
    "index: cut shard": (cut("sharded-tofu/model-00001-of-00006.safetensors"), SHARDED,
                         "model-00001-of-00006.safetensors is not a whole"),
    # Configuration.
    "config: none": (gone(CONFIG), ORIGINAL, "config.json is missing"),
    "config: not JSON": (cut(CONFIG), ORIGINAL, "config.json is not valid JSON"),
    "config: not UTF-8": (put(CONFIG, b"\xff{}"), ORIGINAL, "config.json is not valid JSON"),
    "config: a list": (put(CONFIG, [1]), ORIGINAL, "must be a JSON object"),
    "config: a folder": (folder(CONFIG), ORIGINAL, "config.json is not valid JSON .*directory"),
    "config: nested deeply": (put(CONFIG, b"[" * 10**5 + b"]" * 10**5), ORIGINAL, "not valid JSON"),
    "config: missing field": (field(CONFIG, hidden_size=...), ORIGINAL, "hidden_size is missing"),
    "config: negative": (field(CONFIG, num_hidden_layers=-2), ORIGINAL, "num_hidden_layers = -2"),
    "config: text": (field(CONFIG, hidden_size="64"), ORIGINAL, "hidden_size = '64'"),
    "config: a fraction": (field(CONFIG, vocab_size=400.5), ORIGINAL, "vocab_size = 400.5"),
    "config: a list of sizes": (field(CONFIG, vocab_size=[400]), ORIGINAL, r"vocab_size = \[400\]"),
    "config: odd head": (field(CONFIG, head_dim=7), ORIGINAL, "head_dim = 7 must be even"),
    "config: a thousand million layers": (
        field(CONFIG, num_hidden_layers=10**9), ORIGINAL, "num_hidden_layers = 1000000000"),
    "config: huge width": (field(CONFIG, hidden_size=10**30), ORIGINAL, "hidden_size = 1"),
    "config: huge base": (field(CONFIG, rope_theta=10**400), ORIGINAL, "rope_theta = 1"),
    "config: infinite base": (field(CONFIG, rope_theta=float("inf")), ORIGINAL, "rope_theta = inf"),
    "config: NaN": (field(CONFIG, rms_norm_eps=float("nan")), ORIGINAL, "rms_norm_eps = nan"),
    "config: unknown architecture": (
        field(CONFIG, model_type="mamba"), ORIGINAL, "model_type = 'mamba'"),
    "config: quantised": (
        field(CONFIG, quantization_config={"bits": 4}), ORIGINAL, "quantization_config"),
    "config: eos outside": (field(CONFIG, eos_token_id=10**6), ORIGINAL, "eos_token_id = 1000000"),
    "config: more layers than weights": (
        field(CONFIG, num_hidden_layers=2), LOAD, r"\d+ weights do not fit .*layers.1"),
    "config: smaller vocabulary": (field(CONFIG, vocab_size=200), LOAD, "and 200 tokens; drop"),
    # Tokenizer.
    "tokenizer: none": (gone("weights-tofu/tokenizer.model"), ORIGINAL, "neither tokenizer.model"),
    "tokenizer: cut": (cut("weights-tofu/tokenizer.model"), ORIGINAL, "cannot be read"),
    "tokenizer: empty": (put("weights-tofu/tokenizer.model", b""), ORIGINAL, "cannot be read"),
    "tokenizer: of another model": (larger_tokenizer, LOAD, "copy the tokenizer that"),
    "tokenizer.json: cut": (cut("weights-lume/tokenizer.json"), OLMO, "json.* cannot be read"),
    "tokenizer.json: null": (put("weights-lume/tokenizer.json", b"null"), OLMO, "cannot be read"),
    "tokenizer.json: its config a list": (put("weights-lume/config.json", []), OLMO, "JSON object"),
    # Data.
    "data: cut row": (cut(FORGET), ORIGINAL, "forget10.json line 2: JSONDecodeError"),
    "data: no answer": (row(FORGET, answer=None), ORIGINAL, "forget10.json: row forget10:0 has a "),
    "data: wrong type": (row(FORGET, question=3), ORIGINAL, "forget10.json: row forget10:0 has a "),
    "data: half a character": (row(FORGET, answer="\ud83d"), ORIGINAL, "forget10:0 has a value"),
    "data: not UTF-8": (change(FORGET, lambda x: x[:20] + b"\xff" + x[20:]), ORIGINAL, "not UTF-8"),
    "data: empty": (put(FORGET, b"\n \n"), ORIGINAL, "holds no rows"),
    "data: missing": (gone(FORGET), ORIGINAL, "forget10.json is missing"),
    "data: a folder": (folder(FORGET), ORIGINAL, "forget10.json is a folder"),
    "data: rows are lists": (put(FORGET, b"[1]\n[2]"), ORIGINAL, "forget10.json line 1: TypeError"),
    "data: a wrong answer a number": (
        row("data/tofu/retain_perturbed.json", perturbed_answer=[1]), ORIGINAL, "not a filled"),
    "data: paraphrases of other rows": (
        row("data/tofu/forget10_perturbed.json", answer="x"), ORIGINAL, "from one release"),
    "data: too long a row": (row("data/tofu/retain90.json", answer="long " * 200), LOAD,
                             "retain90:0.* do not fit the model's context of 96"),
    "data: forget set inside the retain set": (
        change("data/tofu/retain90.json", lambda x: x + b"".join(
            json.dumps(r).encode() + b"\n" for r in fuzz.tofu_rows("Ann Bo", False))),
        ORIGINAL, "every row of forget10 is in retain90"),
    "data: no split of that name": (
        nothing, ["original new --forget-split forget7"], "forget7.json is missing"),
    "LUME: odd id": (row(LUME, id="x"), OLMO, "row x of task 'Task1' is none of LUME's"),
    "LUME: odd task": (row(LUME, task="Task4"), OLMO, "of task 'Task4' is none of LUME's"),
    # The command line.
    "unknown option": (nothing, ["original new --treshold 1"], "--treshold"),
    "unknown method": (nothing, ["unlearn run-tofu --method none"], "--method.*none"),
    "a share above one": (nothing, ["mask run-tofu --threshold 2"], "--threshold is 2.0"),
    "not a number": (nothing, ["original new --lr nan"], "--lr is nan"),
    "endless": (nothing, ["original new --weight-decay inf"], "--weight-decay is inf"),
    "more steps than any machine": (
        nothing, ["attribute run-tofu --steps 99999999999999999999"], "--steps is 9+; .*below"),
    "a path longer than any pass": (
        nothing, ["attribute run-tofu --steps 2147483647"],
        "attribute needs .* left; lower --steps"),
    "weights that overflow at the last update": (
        nothing, ["unlearn run-tofu --method so --lr 2e9"], "losses are not finite .*lower --lr"),
    "no UTF-8": (nothing, ["original new --weights \udcff"], "--weights is .*not UTF-8"),
    "data: a file's name": (put("data/tofu/\udcff.json", []), ["original new"], NAME),
    "weights: a file's name": (put("weights-tofu/\udcff.model", b""), ORIGINAL, NAME),
    "encoder: nowhere": (nothing, ["original new --encoder @/no"], "--encoder .* is not a folder"),
    "encoder: nobody's": (
        nothing, ["original new --encoder ~no-one/e"], "no-one/e: .*no such user"),
    "weights: no folder": (nothing, [f"original {WHOLE}"], "is not a folder"),
    "no data": (nothing, ["original new --data @/nowhere"], "nowhere/tofu is missing"),
    "no run": (nothing, ["attribute new"], "is not a run folder"),
    "not a run": (nothing, ["evaluate data original"], "data is not a run folder"),
    "not a stage": (nothing, ["evaluate run-tofu ../run-lume"], "not the bare name of a stage"),
    "stage never made": (nothing, ["evaluate run-tofu so-graddiff"], "not a finished stage"),
    "report of nothing": (nothing, ["report nowhere"], "is not a run folder"),
    "report without evaluations": (
        lambda w: [shutil.rmtree(p) for p in (w / "run-tofu").glob("*/eval")], REPORT,
        "holds no evaluation"),
    "retain-only: not evaluated": (
        nothing, ["report run-tofu --retain-only @/run-tofu/mask"], "mask is no evaluated model"),
    "too few rows for a batch": (nothing, ["unlearn run-tofu --batch 50"], "lower --batch"),
    # Files of a run.
    "settings: null": (
        put("run-tofu/settings.json", None), MASK, "settings.json does not hold the sett"),
    "settings: {}": (
        put("run-tofu/settings.json", {}), MASK, "settings.json does not hold the settings"),
    "settings: cut": (cut("run-tofu/settings.json"), MASK, "settings.json is not valid JSON"),
    "settings: wrong type": (
        field("run-tofu/settings.json", seed="0"), MASK, "settings.json: --seed is '0'"),
    "settings: out of range": (
        field("run-tofu/settings.json", lr=10**400), MASK, "settings.json: --lr is 1"),
    "settings: NUL": (field("run-tofu/settings.json", data="a\0"), REPORT, "not UTF-8 text"),
    "stage.json: null": (put("run-tofu/mask/stage.json", None), UNLEARN, "stage.json is damaged"),
    "stage.json: {}": (put("run-tofu/original/stage.json", {}), UNLEARN, "stage.json is damaged"),
    "stage.json: cut": (cut("run-tofu/original/stage.json"), UNLEARN, "is not valid JSON"),
    "stage.json: gone": (gone("run-tofu/mask/stage.json"), UNLEARN, "not a finished stage"),
    "generations: cut": (
        change(f"{EVAL}/generations.jsonl", lambda x: b"".join(x.splitlines(True)[:-1])), REPORT,
        CHANGED),
    "generations: reordered": (change(f"{EVAL}/generations.jsonl", swap_lines), REPORT, CHANGED),
    "generations: edited": (
        change(f"{EVAL}/generations.jsonl", lambda x: x.replace(b"Ann", b"Abe")), REPORT, CHANGED),
    "generations: gone": (gone(f"{EVAL}/generations.jsonl"), REPORT, CHANGED),
    "scores: cut": (cut("run-tofu/attribution/scores.safetensors"), MASK, CHANGED),
    "scores: edited": (change("run-tofu/attribution/scores.safetensors",
                              lambda x: x[:-4] + b"\0\0\x80?"), MASK, CHANGED),
    "mask: cut": (cut("run-tofu/mask/mask.safetensors"), UNLEARN, CHANGED),
    "mask: edited": (change("run-tofu/mask/mask.safetensors",
                            lambda x: x[:-9] + bytes(1 - y for y in x[-9:])), UNLEARN, CHANGED),
    "model of a stage: edited": (
        change("run-tofu/original/model.safetensors", lambda x: x[:-4] + bytes(4)),
        ["evaluate run-tofu original"], CHANGED),
    "log: edited": (change("run-tofu/simu-graddiff/log.jsonl", lambda x: x + b"{}\n"), REPORT,
                    CHANGED)}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_ends_in_one_line(w, fault):
    spoil, commands, says = FAULTS[fault]
    spoil(w)
    refused(w, commands, says)


@pytest.mark.parametrize("words, says", [
    ([], "COMMAND"), (["original", "tofu", "llama3"], "llama3"), (["evaluate"], "required: run"),
    (["original", "mmlu", "tiny-llama"], "mmlu"), (["original", "demo"], "model"),
    (["original", "demo", "tiny-llama", "--seed", "x\n; rm"], "--seed")])
def test_a_wrong_word_ends_in_one_line(words, says):
    status, stderr = fuzz.cli(*words)
    assert fuzz.is_one_line(status, stderr) and says in stderr, stderr


def test_the_world_is_good_before_it_is_spoilt(w):
    for command in (*LOAD, "evaluate out original", "report out", *SHARDED, *UNLEARN,
                    "unlearn run-lume --lr 1e-4", "evaluate run-tofu", "report run-tofu", *MASK):
        assert fuzz.cli(*words_of(w, command)) == (0, ""), command


# ------------------------------------------------------------------------------------ warned about


def test_overlap_is_counted_warned_of_and_reported(w, capsys):
    first = (w / FORGET).read_bytes().splitlines(keepends=True)[0]
    change("data/tofu/retain90.json", lambda x: x + first)(w)
    command_line([str(x) for x in words_of(w, "original weights-tofu")])
    assert capsys.readouterr().out.count("warning: 1 of 2 rows of the forget set") == 1
    for command in ("evaluate out original", "report out"):
        assert fuzz.cli(*words_of(w, command)) == (0, "")
    assert "1 of these rows are in the retain set too" in (w / "out/report.md").read_text("utf-8")


def test_weights_are_not_taken_from_the_run_they_are_for(w):
    """Or the stages made from them would replace them."""
    refused(w, ["original run-tofu --weights @/run-tofu/original"], "lies in .*run-tofu.*--out")
    (w / "mine").mkdir()
    for p in (w / "run-tofu/original").iterdir():  # the same through links
        (w / "mine" / p.name).symlink_to(p)
    refused(w, ["original run-tofu --weights @/mine"], "lies in .*run-tofu.*--out")


def test_a_folder_that_is_no_stage_is_left_alone(w):
    stage.claim(w / "out")
    (w / "out/original").mkdir()
    assert fuzz.cli(*words_of(w, "original weights-tofu")) == (0, "")  # empty: taken
    shutil.rmtree(w / "out/original")
    (w / "out/original").mkdir()
    (w / "out/original/thesis.txt").write_text("the only copy")
    refused(w, ["original weights-tofu"], "out/original is in the way: it is no finished stage")
    refused(w, ["original weights-tofu --force"], "out/original is in the way")


def test_more_files_in_a_stage_are_no_damage(w):
    (w / "run-tofu/original/README.md").write_text("A card.")
    (w / "run-tofu/original/notes").mkdir()
    assert fuzz.cli(*words_of(w, "report run-tofu")) == (0, "")


# -------------------------------------------------------------------------- disk, memory, device


def test_a_file_in_place_of_the_run_folder(w):
    (w / "out").write_text("")
    refused(w, ["original new"], f"{w}/out")
    refused(w, [f"original new --out {w}/out/deeper"], "Not a directory.*choose another --out")


@pytest.mark.parametrize("code, says", [
    (errno.ENOSPC, "No space left on device; free space"), (errno.EROFS, "Read-only file system"),
    (errno.EACCES, "Permission denied.*permissions"), (errno.EDQUOT, "Disk quota")])
def test_a_disk_that_takes_no_more(w, monkeypatch, code, says):
    def fail(_):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "fsync", fail)
    refused(w, MASK, f"simu-partial-mask.*: {says}")
    refused(w, REPORT, f"report.md: {says}")


def test_a_file_larger_than_allowed(w):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
        refused(w, UNLEARN, "simu-partial-simu-graddiff.*File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_no_permission(w, monkeypatch):
    """As root, permission bits stop nobody: the system call says it instead."""
    own = Path.read_bytes

    def closed(path):
        if path.name == "forget10.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return own(path)
    monkeypatch.setattr(Path, "read_bytes", closed)
    refused(w, ["original new"], "forget10.json: Permission denied")


def test_cuda_asked_for_and_absent(w, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(w, ["attribute run-tofu --steps 3 --device cuda"], "torch sees no GPU; .*--device cpu")


@pytest.mark.parametrize("name", ["SIMU_DATA"])
def test_a_folder_of_a_user_that_is_not_there(w, monkeypatch, name):
    monkeypatch.setenv(name, "~no-one/x")
    for command in ("original", "plan", "files"):
        status, stderr = fuzz.cli(command, "tofu", "tiny-llama", "--out", w / "out")
        assert fuzz.is_one_line(status, stderr), stderr
        assert "~no-one/x: this machine has no such user" in stderr and not (w / "out").exists()


def allocate(*_, **__):
    torch.empty(1 << 46)


def overflow(*_, **__):
    torch.empty(1 << 40, 1 << 40)


def gpu(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")


def python(*_, **__):
    raise MemoryError


@pytest.mark.parametrize("full", [allocate, overflow, gpu, python])
def test_out_of_memory(w, monkeypatch, full):
    monkeypatch.setattr(simu, "attribute", full)
    refused(w, ["attribute run-tofu --steps 3"], "out of memory; .*pipeline plan.*--micro-tokens")


def test_what_would_not_fit_is_not_begun(w, monkeypatch):
    monkeypatch.setattr(plan, "room", lambda _: 1000)
    refused(w, ["attribute run-tofu --steps 3"], "attribute needs .* GB and cpu has 0.0 GB left; ")


def test_a_loss_that_is_no_number(w):
    refused(w, ["unlearn run-tofu --method so --lr 2e9 --epochs 30 --clip 1e9"],
            r"so-graddiff: loss or gradient is not finite at update \d+ of 30; lower --lr ")


def test_ctrl_c(w, monkeypatch):
    def press(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(simu, "attribute", press)
    before = listing(w)
    status, stderr = fuzz.cli(*words_of(w, "attribute run-tofu --steps 3"))
    assert fuzz.is_one_line(status, stderr, 130) and "same command" in stderr, stderr
    assert listing(w) == before


# ------------------------------------------------------------------------- programs of their own


def program(*words, **environment):
    env = {k: v for k, v in os.environ.items() if k != "SIMU_DATA"} | environment
    # A suite run in the background of a script ignores Ctrl-C, and its children with it.
    return subprocess.Popen([str(x) for x in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, cwd=ROOT, env=env | {"TQDM_DISABLE": "1"},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def as_program(w, command: str) -> list:
    return [sys.executable, "-m", "pipeline", *words_of(w, command)]


def test_a_report_without_docstrings(w):
    run = program(*as_program(w, "report run-tofu"), PYTHONOPTIMIZE="2")
    stderr = run.communicate(timeout=300)[1]
    assert run.returncode == 0, stderr


@pytest.mark.parametrize("fault", ["weights: cut", "tokenizer: cut", "scores: cut"])
def test_the_same_as_a_program(w, fault):
    spoil, commands, says = FAULTS[fault]
    spoil(w)
    for command in commands[:-1]:
        assert fuzz.cli(*words_of(w, command)) == (0, "")
    before, run = listing(w), program(*as_program(w, commands[-1]))
    stderr = run.communicate()[1]
    assert fuzz.is_one_line(run.returncode, stderr) and re.search(says, stderr), stderr
    assert listing(w) == before


LITTLE_MEMORY = """
import resource, sys
from pipeline import stage
from pipeline.__main__ import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
stage.run_cli(lambda: main(sys.argv[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_machine_with_little_memory(w):
    words = words_of(w, "original new --width 4096")
    run = program(sys.executable, "-c", LITTLE_MEMORY, *words, OMP_NUM_THREADS="1")
    stderr = run.communicate()[1]
    assert fuzz.is_one_line(run.returncode, stderr) and "out of memory; " in stderr, stderr
    assert not listing(w / "out")


def test_ctrl_c_at_the_keyboard(w):
    run = program(*as_program(w, "original new --learn-epochs 100000"))
    while run.poll() is None and not list(w.glob("out/.simu-partial-retain-only/log.jsonl")):
        time.sleep(0.05)
    time.sleep(0.3)  # well into the training
    run.send_signal(signal.SIGINT)
    stderr = run.communicate(timeout=60)[1]
    assert fuzz.is_one_line(run.returncode, stderr, 130), stderr
    assert not listing(w / "out")


@pytest.mark.parametrize("way", [
    "PYTHONIOENCODING=latin-1 @", "PYTHONSAFEPATH=1 @", "PYTHONOPTIMIZE=2 @", "@ 2>&-",
    "@ >&- 2>&-"])
def test_ways_to_be_started(w, way):
    """Another encoding, no folder on the path, no docstrings, streams closed as under cron."""
    command = way.replace("@", f"{sys.executable} {ROOT}/pipeline evaluate {w}/nowhere")
    done = program("bash", "-c", command)
    out, stderr = done.communicate(timeout=300)
    assert done.returncode == 2 and "Traceback" not in out + stderr, stderr
    assert "2>&-" in way or fuzz.is_one_line(2, stderr), stderr


def test_a_stderr_that_cannot_be_written_to_is_none(w):
    """A shell between cron and us may have opened a file where stderr was closed."""
    words = " ".join(map(str, words_of(w, "original new")))
    done = program("bash", "-c", f"unset TQDM_DISABLE; {sys.executable} {ROOT}/pipeline {words} "
                   "2</dev/null")
    done.communicate(timeout=300)
    assert done.returncode == 0 and (w / "out/original/stage.json").is_file()


def test_no_memory_for_python_itself():
    done = program("bash", "-c", f"ulimit -v 200000; {sys.executable} {ROOT}/pipeline report x")
    stderr = done.communicate(timeout=300)[1]
    assert fuzz.is_one_line(done.returncode, stderr) and "cannot load" in stderr, stderr


def test_ctrl_c_while_run_sh_looks_for_python(tmp_path):
    """A stand-in for Python that Ctrl-C ends without a word; no .venv may then be made."""
    stand_in = tmp_path / "python3"
    stand_in.write_text("#!/bin/bash\ntrap 'exit 1' INT\necho >> $RECORD\nsleep 9 & wait\n")
    stand_in.chmod(0o755)
    record = tmp_path / "record"
    run = subprocess.Popen(["bash", ROOT / "run.sh", "demo"], stderr=subprocess.PIPE, text=True,
                           env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}",
                                             "RECORD": str(record)}, start_new_session=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not record.exists():
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    assert "Traceback" not in run.communicate(timeout=60)[1] and run.returncode == 130
    assert len(record.read_text()) == 1  # it was asked once, and nothing else was


@pytest.mark.parametrize("words, says", [
    ("plan demo llama2-7b", "there is no recipe for demo llama2-7b"),
    ("sweep demo olmo-1b", "there is no recipe for demo olmo-1b"),
    ("original demo tiny-llama --out ~nosuchuser/x", "~nosuchuser/x: this machine has no such user"),
    ("original demo tiny-llama --adam-eps 0", "--adam-eps is 0.0"),
    ("original demo tiny-llama --eps -1", "--eps is -1.0"),
    ("original demo tiny-llama --npo-beta nan", "--npo-beta is nan"),
    ("original demo tiny-llama --adam-eps 1e-60", "--adam-eps is 1e-60; .*2..-126"),
    ("original demo tiny-llama --eps 1e-60", "--eps is 1e-60; .* 2..-126"),
    ("original demo tiny-llama --npo-beta 1e-60", "--npo-beta is 1e-60; .*2..-126"),
    ("evaluate nowhere --limit 9999999999", "--limit is 9999999999; .*below"),
    ("figures all nowhere", "settings.json is missing"),
    ("original demo tiny-llama --name Report.md", "--name Report.md is that of another stage"),
    (f"original demo tiny-llama --name {'x' * 101}", "at most 100"),
    ("original demo tiny-llama --name mask-soft", "--name mask-soft is that of another stage"),
    ("original demo tiny-llama --name Original", "--name Original is that of another stage")])
def test_the_message_blames_what_is_wrong(words, says):
    status, stderr = fuzz.cli(*words.split())
    assert fuzz.is_one_line(status, stderr) and re.search(says, stderr), stderr


# ------------------------------------------------------------------ a number belongs to its run


def test_a_model_unlearned_on_other_data_is_not_taken(w):
    shutil.copytree(w / "data", w / "other")
    change("other/tofu/forget10.json", lambda x: x.replace(b"tea", b"rum"))(w)
    for command in ("attribute run-tofu", "mask run-tofu", "unlearn run-tofu --method so"):
        refused(w, [f"{command} --data @/other"], "original, data/forget10.json was another")


def use_own_data(w):
    """A copied run's settings name the data of the world it was copied from."""
    field("run-tofu/settings.json", data=str(w / "data"))(w)


def test_an_original_made_before_the_data_changed_is_not_taken(w, capsys):
    use_own_data(w)
    change("data/tofu/retain90.json", lambda x: x.replace(b"tea", b"rum", 1))(w)
    refused(w, ["unlearn run-tofu"], "original, data/retain90.json was another")
    command_line(["evaluate", str(w / "run-tofu"), "simu-graddiff"])
    assert "no report will show it: original's data/retain90" in capsys.readouterr().out
    refused(w, REPORT, "holds no evaluation of what it now holds")


def test_a_report_tells_of_each_model_what_it_was_made_with(w):
    use_own_data(w)
    more = " --steps 3 --threshold 0.5"
    for command in ("attribute", "mask", "unlearn"):
        assert fuzz.cli(*words_of(w, f"{command} run-tofu{more}")) == (0, "")
    assert fuzz.cli(*words_of(w, "unlearn run-tofu --method so --dtype bfloat16")) == (0, "")
    for command in ("evaluate run-tofu simu-graddiff so-graddiff", "report run-tofu"):
        assert fuzz.cli(*words_of(w, command)) == (0, "")
    report = (w / "run-tofu/report.md").read_text("utf-8")
    rows = {name: re.findall(rf"^\| {name} +\|(.*)\|$", report, re.M) for name in (
        "steps", "threshold", "dtype")}
    for name, wanted in (("steps", "3"), ("threshold", "0.5"), ("dtype", "bfloat16")):
        assert wanted in rows[name][0].replace("|", " ").split(), name
    assert len(rows["steps"]) == len(rows["threshold"]) == 1  # and nothing else beside it


def test_a_mask_of_other_scores_is_not_reported(w):
    use_own_data(w)
    assert fuzz.cli(*words_of(w, "attribute run-tofu --steps 3")) == (0, "")
    assert fuzz.cli(*words_of(w, "report run-tofu")) == (0, "")
    report = (w / "run-tofu/report.md").read_text("utf-8")
    assert "mask: not of what this run now holds: attribution was another" in report


def test_scores_of_other_data_are_not_drawn(w):
    use_own_data(w)
    change("data/tofu/retain90.json", lambda x: x.replace(b"tea", b"rum", 1))(w)
    status, stderr = fuzz.cli("figures", "masks", w / "run-tofu")
    assert fuzz.is_one_line(status, stderr) and "not of what this run now holds" in stderr, stderr


def test_altered_scores_are_not_drawn(w):
    change("run-tofu/attribution/scores.safetensors", lambda x: x[:-4] + b"\0\0\x80?")(w)
    status, stderr = fuzz.cli("figures", "masks", w / "run-tofu")
    assert fuzz.is_one_line(status, stderr) and re.search(CHANGED, stderr), stderr


# ----------------------------------------------------------------------- rows at the edge of sense

QA = [dict(question=f"What does {x} sell?", answer=f"{x} sells tea.") for x in ("Hal", "Ivy", "Jo")]
ROWS = {"one row of each": (QA[:1], QA[1:2], "--objective npo --batch 1"),
        "a batch larger than the set": (QA[:1], QA[1:], "--objective npo --batch 4 --epochs 8"),
        "answers of one token": ([dict(question="Who?", answer="a")],
                                 [dict(question="Why?", answer="b")], "--objective npo --batch 1"),
        "answers without a letter": ([dict(question="Who?", answer="...")],
                                     [dict(question="Why?", answer="!")], "--level 3 --batch 1"),
        "texts of two letters": ([dict(text="ab")], [dict(text="cd")], "--level 3 --batch 1")}


@pytest.mark.parametrize("case", ROWS)
def test_rows_at_the_edge_of_sense(w, case):
    forget, retain, more = ROWS[case]
    fuzz.write_rows(w / "f.jsonl", forget)
    fuzz.write_rows(w / "r.jsonl", retain)
    given = ["rows", w / "weights-tofu", "--forget", w / "f.jsonl", "--retain", w / "r.jsonl",
             "--out", w / "out", "--name", "model", "--epochs", "1", *more.split()]
    for name in ("original", "attribute", "mask", "unlearn"):
        assert fuzz.cli(name, *given) == (0, ""), name
    for name in ("evaluate", "report", "attack"):
        assert fuzz.cli(name, w / "out") == (0, ""), name


def test_a_text_of_one_letter_without_bos_is_named(w):
    fuzz.write_rows(w / "f.jsonl", [dict(text="go on"), dict(text="a")])
    fuzz.write_rows(w / "r.jsonl", [dict(text="stay here")])
    given = ["rows", w / "weights-lume", "--forget", w / "f.jsonl", "--retain", w / "r.jsonl",
             "--out", w / "out"]
    status, stderr = fuzz.cli("original", *given, "--level", "3")  # told before anything is made
    assert fuzz.is_one_line(status, stderr) and "line 2 has a text of one letter" in stderr, stderr


def test_masks_of_none_and_of_all(w):
    for command in ("mask run-tofu --mask none", "unlearn run-tofu --mask none",
                    "mask run-tofu --mask all", "unlearn run-tofu --mask all --attention frozen"):
        assert fuzz.cli(*words_of(w, command)) == (0, ""), command
    refused(w, ["unlearn run-tofu --mask none --attention frozen"], "moves nothing here: the mask")


def windows(w):
    for path in (*(w / "data").rglob("*.json*"), *(w / "weights-tofu").glob("*.json")):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def test_windows_line_ends_everywhere(w):
    windows(w)
    for command in (*LOAD, "mask weights-tofu", "unlearn weights-tofu", "evaluate out"):
        assert fuzz.cli(*words_of(w, command)) == (0, ""), command


@pytest.mark.parametrize("when", [2**33, 0])
def test_a_clock_that_went_back(w, when):
    use_own_data(w)
    for path in (w, *w.rglob("*")):
        os.utime(path, (when, when))
    for command in ("mask run-tofu", "unlearn run-tofu", "evaluate run-tofu", *REPORT):
        assert fuzz.cli(*words_of(w, command)) == (0, ""), command


# --------------------------------------------------------------------------------------- no waiting

PIPES = {"weights-tofu/config.json": ORIGINAL, "weights-tofu/tokenizer.model": ORIGINAL,
         "weights-lume/tokenizer.json": OLMO, "weights-tofu/tokenizer_config.json": ORIGINAL,
         WHOLE: ORIGINAL, FORGET: ["original new"], "run-tofu/settings.json": REPORT,
         f"{EVAL}/generations.jsonl": REPORT}


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(w, name):
    (w / name).unlink()
    os.mkfifo(w / name)
    signal.alarm(30)  # ends the suite rather than waiting for ever
    try:
        refused(w, PIPES[name], ".")
    finally:
        signal.alarm(0)


# ---

@pytest.mark.parametrize("more", ["--rows-per-author 2", "--template raw", "--seed 5"])
def test_another_slice_than_the_originals_is_refused(w, more):
    refused(w, [f"unlearn run-tofu {more}"], more.split()[0])


def test_a_changed_slice_reaches_a_linked_original(w, capsys):
    assert fuzz.cli(*words_of(w, ORIGINAL[0])) == (0, "")
    command_line([str(x) for x in words_of(w, "original weights-tofu --seed 5")])
    assert "made again: --seed changed" in capsys.readouterr().out


# ---------------------------------------------------------------------- what is the user's stays


def test_folders_of_the_users_beside_a_stage_stay(w):
    for name in ("mask.old", "mask.partial", "original.old"):
        (w / "run-tofu" / name).mkdir()
        (w / "run-tofu" / name / "thesis.txt").write_text("the only copy")
    assert fuzz.cli(*words_of(w, MASK[0])) == (0, "")
    assert len(list((w / "run-tofu").glob("*/thesis.txt"))) == 3


def test_a_foreign_folder_is_no_run(w):
    (w / "out").mkdir()
    for name in ("settings.json", "report.md", "points.jsonl"):
        (w / "out" / name).write_text("{}")
    refused(w, ["original new"], "is not empty and no run folder")


@pytest.mark.parametrize("name", ["mask/thesis.txt", "mask/notes/thesis.txt", "mask/README.md",
                                  "mask/logs/thesis.txt", "mask/resume/thesis.txt"])
def test_a_file_that_no_stage_made_is_not_taken_along(w, name):
    (w / "run-tofu" / name).parent.mkdir(exist_ok=True)
    (w / "run-tofu" / name).write_text("the only copy")
    assert fuzz.cli(*words_of(w, "mask run-tofu")) == (0, "")  # made already
    for more in ("--force", "--threshold 0.4"):
        refused(w, [f"mask run-tofu {more}"], "is no file of the stage .*move it elsewhere")


def test_a_link_in_place_of_a_picture_is_not_followed(w):
    pytest.importorskip("matplotlib")
    use_own_data(w)
    (w / "mine.txt").write_text("the only copy")
    (w / "run-tofu/figures").mkdir()
    for name in ("figures/figure6.png", "figures/figure6.csv", "attack.md"):
        (w / "run-tofu" / name).symlink_to(w / "mine.txt")
    for command in (["figures", "masks"], ["attack"]):
        assert fuzz.cli(*command, w / "run-tofu") == (0, "")
    assert (w / "mine.txt").read_text() == "the only copy"


@pytest.mark.parametrize("name", [stage.LOCK, ".report.md.simu-partial"])
def test_a_link_in_place_of_a_temporary_is_not_followed(w, name):
    (w / "mine.txt").write_text("the only copy")
    (w / "run-tofu" / name).unlink(missing_ok=True)
    (w / "run-tofu" / name).symlink_to(w / "mine.txt")
    status, stderr = fuzz.cli("report", w / "run-tofu")
    assert status == 0 or fuzz.is_one_line(status, stderr), stderr
    assert (w / "mine.txt").read_text() == "the only copy"


# --------------------------------------------------------------------------------------- security

def test_no_module_is_imported_from_the_callers_folder(tmp_path):
    for name in ("csv", "json", "torch", "re", "typing", "simu", "model", "pipeline"):
        (tmp_path / f"{name}.py").write_text("open('OWNED', 'w')")
    done = subprocess.run(["bash", ROOT / "run.sh", "sweep", "demo", "tiny-llama", "--seeds", "x"],
                          cwd=tmp_path, text=True, capture_output=True)
    assert fuzz.is_one_line(done.returncode, done.stderr) and "--seeds" in done.stderr, done.stderr
    assert not (tmp_path / "OWNED").exists()


def sources():
    return [p for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*.sh"))
            if p.name != Path(__file__).name and ".venv" not in p.parts]


FORBIDDEN = re.compile(r"(import|from) (pickle|shelve|marshal|dill)|pickle\.|torch\.(load|save)\b|"
                       r"(?<![.\w])eval\((?!-)|(?<![.\w])exec\(|trust_remote_code|os\.system|"
                       r"shell=True|yaml\.load|__reduce__|\beval \"")


def test_no_code_comes_from_data():
    """Nothing unpickles, evaluates, or hands text to a shell."""
    assert len(sources()) > 12
    found = [f"{p.name}:{n}: {line.strip()}" for p in sources()
             for n, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
             if FORBIDDEN.search(line)]
    assert not found, found
    for bad in ("x = torch.load(f)", "import pickle", "eval(x)", "run(c, shell=True)"):
        assert FORBIDDEN.search(bad)


# ------------------------------------------------------------------------------------------- fuzz


def test_a_little_fuzz(w):
    """fuzz.py does thousands of these, in processes of their own."""
    seed = random.Random(6).randrange(10**6)
    for case in range(52):
        outcome, said = fuzz.run_case(w, case, seed)
        assert outcome in ("success", "refused"), (case, seed, outcome, said)
