"""Host memory while a sharded checkpoint is loaded and saved.

    python benchmarks/memory.py            LLaMA layout, three float16 shards of 2 GB in all

Each measurement is a process of its own whose /proc/self/status is read every 2 ms. RssAnon is
memory that must exist; RssFile is pages of mapped files, the checkpoint among them, which the
system takes back when it needs them. Both are shown above what they were before the loading.

cpu: bfloat16 on the CPU, where the model itself must live: expected is the model and one tensor.
away: every tensor leaves the host as soon as it is made, as for a GPU: expected is one tensor.
save: writing a model that is in memory: expected is no more than one tensor above it.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from common import Config, Transformer, describe

import torch

import model as module
from model import UserError, write_json
from pipeline.stage import run_cli

GB = 1e9
SIZES = {"2gb": Config(model_type="llama", vocab_size=32000, hidden_size=2048,
                       intermediate_size=5632, num_hidden_layers=17, num_attention_heads=16,
                       max_position_embeddings=4096),
         "tiny": Config(model_type="llama", vocab_size=2048, hidden_size=256,
                        intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                        max_position_embeddings=512)}


def write_checkpoint(config: Config, folder: Path, shards: int = 3) -> tuple[int, int]:
    """A checkpoint of random rows, never more than a tensor of it in memory: (bytes, those of its
    largest tensor)."""
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape[-1:], generator=g).half().expand(shape)  # no memory yet
               for name, shape in module.tensor_shapes(config).items()}
    sizes = [t.nbytes for t in tensors.values()]
    where, parts = {}, module.split_shards(tensors, -(-sum(sizes) // shards) + max(sizes))
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        module.save_tensors(folder / file, part, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    write_json(folder / module.INDEX, {"metadata": {"total_size": sum(sizes)},
                                       "weight_map": where})
    write_json(folder / "config.json", config.to_hf(torch.float16))
    return sum(sizes), max(sizes)


def resident() -> tuple[int, int]:
    """Bytes of this process: anonymous, of files."""
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file if line.startswith("Rss"))
    return tuple(int(lines[k].split()[0]) * 1024 for k in ("RssAnon", "RssFile"))


def peaks(work) -> list[int]:
    """Highest resident memory during work(), above what it was before."""
    start, top, done = resident(), [0, 0], threading.Event()

    def watch():
        while not done.is_set():
            top[:] = map(max, top, resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return [a - b for a, b in zip(top, start)]


def measure(way: str, folder: Path):
    """Print the peaks of one way, in this process."""
    def load():
        return Transformer.from_pretrained(folder, dtype=torch.bfloat16)

    if way == "away":  # what the loader keeps goes where it takes no host memory
        module.nn = SimpleNamespace(**vars(torch.nn) | {
            "Parameter": lambda t: torch.nn.Parameter(t.to("meta"))})
    if way == "save":
        model = load()
        found = peaks(lambda: model.save_pretrained(folder / "again", shard_bytes=10 ** 9))
    else:
        kept = []
        found = peaks(lambda: kept.append(load()))
    print(*found)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--size", choices=SIZES, default="2gb")
    p.add_argument("--way", choices=("cpu", "away", "save"), help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.way:
        return measure(a.way, a.folder)
    a.device, a.dtype = "cpu", "float32"
    describe(a)
    with tempfile.TemporaryDirectory() as folder:
        weights = sum(s.numel() for s in module.tensor_shapes(SIZES[a.size]).values()) * 2
        if shutil.disk_usage(folder).free < 3 * weights:
            raise UserError(f"{folder} has no room for {3 * weights / GB:.1f} GB; set TMPDIR")
        total, largest = write_checkpoint(SIZES[a.size], Path(folder))
        shard = max(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
        print(f"checkpoint {total / GB:.3f} GB in float16, largest tensor {largest / GB:.3f} GB, "
              f"largest shard {shard / GB:.3f} GB")
        print(f"{'GB':6}{'anonymous':>11}{'of files':>10}")
        for way in ("cpu", "away", "save"):
            out = subprocess.run([sys.executable, __file__, "--way", way, "--folder", folder],
                                 check=True, capture_output=True, text=True).stdout
            anonymous, files = (int(x) / GB for x in out.split())
            print(f"{way:6}{anonymous:11.3f}{files:10.3f}")


if __name__ == "__main__":
    run_cli(main)
