"""A checkpoint of LLaMA2-7B's real layout (three float16 shards, random weights, a tokenizer)
through the stages users run: original --weights, attribute, mask, unlearn, evaluate.

    python benchmarks/checkpoint7b.py [--tokenizer tokenizer.model] [--simu ...]     one large GPU
    python benchmarks/checkpoint7b.py --size tiny                                     on a CPU

What follows --simu goes to every stage. The data are the demo's; nothing is downloaded.
Without --tokenizer one is trained on the demo, and most rows of the embedding are never asked for.
About 45 GB of disk in --folder, a temporary one unless given.
"""

import argparse
import os
import shutil
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


def step(folder: Path, *words):
    """Run a stage; its last lines on stdout, without this machine's paths."""
    def plain(text):
        for path, name in ((folder, "FOLDER"), (os.path.relpath(folder), "FOLDER"), (HERE, ".")):
            text = text.replace(str(path), name)
        return text

    print(plain(f"$ python -m pipeline {' '.join(words)}"), flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, HERE / "pipeline", *words], capture_output=True,
                          text=True)
    print(plain("\n".join(done.stdout.strip().splitlines()[-4:])))
    if done.returncode:
        raise UserError(f"{words[0]} ended with {done.returncode}: "
                        f"{plain(done.stderr.strip()[-500:])}")
    print(f"-- {time.perf_counter() - start:.1f} s", flush=True)


def run_stages(a, folder: Path):
    at = ["tofu", "llama2-7b", "--weights", str(folder / "weights"), "--data", str(DEMO),
          "--out", str(folder / "run"), "--device", a.device, *FEW, *a.simu]
    for name in ("plan", "original", "attribute", "mask", "unlearn"):
        step(folder, name, *at)
    run = str(folder / "run")
    step(folder, "evaluate", run, "original", "simu-graddiff", "--limit", str(a.limit))
    step(folder, "report", run)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--size", choices=SHARD_BYTES, default="llama2-7b")
    p.add_argument("--tokenizer", type=Path, help="LLaMA2's tokenizer.model")
    p.add_argument("--folder", type=Path, help="where to work; kept")
    p.add_argument("--limit", type=int, default=8, help="rows of each split evaluated")
    p.add_argument("--simu", nargs=argparse.REMAINDER, default=[])
    a = p.parse_args()
    tiny = a.size == "tiny"
    a.device, a.dtype = ("cpu", "float32") if tiny else ("cuda", "bfloat16")
    a.layers, a.seed = None, 0
    if not tiny and not torch.cuda.is_available():
        raise UserError("torch sees no GPU; on a CPU use --size tiny")
    common.describe(a)
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.folder or Path(temporary)
        start = time.perf_counter()
        size = write_checkpoint(a, folder / "weights")
        print(f"three shards, {size / 1e9:.2f} GB, float16: {time.perf_counter() - start:.1f} s")
        run_stages(a, folder)


if __name__ == "__main__":
    run_cli(main)
