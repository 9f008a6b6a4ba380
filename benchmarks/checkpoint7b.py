"""A checkpoint of LLaMA2-7B's real layout (three float16 shards, random weights, a tokenizer)
through the stages users run: original --weights, attribute, mask, unlearn, evaluate, report.

    python benchmarks/checkpoint7b.py [--tokenizer tokenizer.model] [--simu ...]     one large GPU
    python benchmarks/checkpoint7b.py --cell --tokenizer ... --folder STATE           the whole cell
    python benchmarks/checkpoint7b.py --size tiny [--cell]                            on a CPU

--cell: FO, SO and SIMU with the paper's recipe on all of TOFU's forget10 (SIMU_DATA must hold it),
every model evaluated on every row, in place of a few rows of the demo. Each stage says how long it
loaded, computed and saved.
What follows --simu goes to every stage. Nothing is downloaded. Without --tokenizer one is trained
on the demo, and most rows of the embedding are never asked for. About 45 GB of disk in --folder, 85
with --cell. With --folder a call ends before ten minutes (--seconds) and the next goes on with what
is left, until it says "done".
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

import torch

import data
from model import UserError
from pipeline.settings import HERE
from pipeline.stage import run_cli
from pipeline.tokenizers import train_tokenizer

DEMO = HERE / "pipeline" / "demo"

SHARD_BYTES = {"llama2-7b": 4_950_000_000, "tiny": 300_000}  # three shards, as published
FEW = "--forget-groups 2 --retain-groups 4 --rows-per-author 10 --epochs 2 --batch 4".split()
TINY_CELL = "--forget-groups 1 --retain-groups 1 --epochs 1 --max-total-tokens 60".split()
LEFT = 3  # exit status where a call has ended before the work


def write_checkpoint(a, folder: Path) -> int:
    """Its config, shards and tokenizer; returns the bytes of the shards."""
    model = common.random_model(a)
    model.half().save_pretrained(folder, shard_bytes=SHARD_BYTES[a.size])
    if a.tokenizer:
        shutil.copyfile(a.tokenizer, folder / "tokenizer.model")
    else:
        rows = data.load_tofu(DEMO / "tofu", "full")
        train_tokenizer([t for e in rows for t in (e.question, e.answer)], folder, llama=True,
                             vocab=1000)
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) != 3:
        raise UserError(f"{len(shards)} shards were written, not three")
    return sum(f.stat().st_size for f in shards)


def checkpoint(a, folder: Path):
    """folder/weights, whole or not at all."""
    weights, partial = folder / "weights", folder / "weights.partial"
    if weights.is_dir():
        return
    shutil.rmtree(partial, ignore_errors=True)
    start = time.perf_counter()
    size = write_checkpoint(a, partial)
    os.replace(partial, weights)
    print(f"three shards, {size / 1e9:.2f} GB, float16: {time.perf_counter() - start:.1f} s")


def run_stage(words: list[str], room: float) -> tuple[int, str, str]:
    """A stage in a process of its own, stopped after `room` seconds as Ctrl-C would."""
    run = subprocess.Popen([sys.executable, "-m", "pipeline", *words], text=True, cwd=HERE,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = run.communicate(timeout=room)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGINT)
        run.communicate()
        return LEFT, "", ""
    return run.returncode, out, err


def step(a, folder: Path, name: str, *words):
    """Run a stage unless it is done; its last lines, without this machine's paths, and times."""
    def plain(text):
        for path, short in ((os.path.relpath(folder), "FOLDER"), (folder, "FOLDER"), (HERE, "."),
                            (os.environ.get("SIMU_DATA") or "/no/such", "DATA")):
            text = text.replace(str(path), short)
        return text

    done = folder / "done"
    if done.is_file() and name in done.read_text().splitlines():
        return
    room = a.end - time.perf_counter()
    if room < 10:
        raise SystemExit(out_of_time(name))
    print(plain(f"$ python -m pipeline {' '.join(words)}"), flush=True)
    start = time.perf_counter()
    status, out, err = run_stage(words, room)
    if status == LEFT:
        raise SystemExit(out_of_time(name))
    print(plain("\n".join(out.strip().splitlines()[-a.lines:])))
    if status:
        raise UserError(f"{name} ended with {status}: {plain(err.strip()[-500:])}")
    print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)
    with open(done, "a") as file:
        file.write(f"{name}\n")


def out_of_time(name: str) -> int:
    print(f"left: {name} and what follows it; call again with the same --folder", flush=True)
    return LEFT


def run_stages(a, folder: Path):
    run = str(folder / "run")
    at = ["tofu", "llama2-7b", "--weights", str(folder / "weights"), "--out", run, "--device",
          a.device, "--must-know", "0"]
    if a.cell:
        a.lines = 12
        at += [*(["--data", str(DEMO), *TINY_CELL] if a.size == "tiny" else []), *a.simu]
        methods, names = ("fo", "so", "simu"), []
    else:
        a.lines = 4
        at += ["--data", str(DEMO), *FEW, *a.simu]
        methods, names = ("simu",), ["original", "simu-graddiff", "--limit", str(a.limit)]
    for name in ("plan", "original", "attribute", "mask"):
        step(a, folder, name, name, *at)
    for method in methods:
        step(a, folder, f"unlearn {method}", "unlearn", *at, "--method", method)
    for stage in ("original", *(f"{m}-graddiff" for m in methods)) if a.cell else ():
        step(a, folder, f"evaluate {stage}", "evaluate", run, stage)
    if not a.cell:
        step(a, folder, "evaluate", "evaluate", run, *names)
    step(a, folder, "report", "report", run)
    print("done", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--size", choices=SHARD_BYTES, default="llama2-7b")
    p.add_argument("--cell", action="store_true", help="the whole cell, three methods")
    p.add_argument("--tokenizer", type=Path, help="LLaMA2's tokenizer.model")
    p.add_argument("--folder", type=Path, help="where to work; kept, and gone on with")
    p.add_argument("--seconds", type=float, default=570, help="when a call ends")
    p.add_argument("--limit", type=int, default=8, help="rows of each split evaluated, no --cell")
    p.add_argument("--simu", nargs=argparse.REMAINDER, default=[])
    a = p.parse_args()
    a.end = time.perf_counter() + a.seconds
    tiny = a.size == "tiny"
    a.device, a.dtype = ("cpu", "float32") if tiny else ("cuda", "bfloat16")
    a.layers, a.seed = None, 0
    if not tiny and not torch.cuda.is_available():
        raise UserError("torch sees no GPU; on a CPU use --size tiny")
    common.describe(a)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (a.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint(a, folder)
        run_stages(a, folder)


if __name__ == "__main__":
    run_cli(main)
