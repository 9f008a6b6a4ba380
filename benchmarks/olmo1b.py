"""An OLMo-1B of random weights that knows real TOFU rows, for benchmarks/olmo1b.sh: everything but
the forget set first, then the forget set lightly, as the tiny originals are made.

    python benchmarks/olmo1b.py OUT --tokenizer FOLDER [--device cuda] [--tiny]

OUT/retain-only and OUT/weights, in Hugging Face layout; what is there is kept. FOLDER holds OLMo's
tokenizer.json. --tiny: two narrow layers, a few rows; to see on a CPU that it runs.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline  # noqa: E402, F401  before torch: it silences a warning of torch's import
import torch  # noqa: E402

import data  # noqa: E402
import simu  # noqa: E402
from model import Transformer  # noqa: E402
from pipeline import original  # noqa: E402
from pipeline.plan import CONFIGS  # noqa: E402
from pipeline.settings import choose_dtype, load_benchmark, resolve  # noqa: E402
from pipeline.stage import run_cli  # noqa: E402

LEARN = dict(learn_batch=32, learn_lr=3e-4, learn_epochs=20, light_lr=5e-5, light_epochs=12)
TINY = dict(width=64, depth=2, learn_epochs=1, light_epochs=1, learn_batch=8)


def config_for(tokenizer, tiny: bool):
    size = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, head_dim=32) if tiny else {}
    return dataclasses.replace(CONFIGS["olmo-1b"], eos_token_id=tokenizer.eos_id, **size)


def save(model, tokenizer_folder: Path, folder: Path):
    """Whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    data.copy_tokenizer(tokenizer_folder, partial)
    os.replace(partial, folder)


def learn(model, epochs: list, recipe: simu.Unlearning, log: Path):
    """One stage of learning, without checkpoints."""
    with open(log, "w", encoding="ascii") as file:
        job = SimpleNamespace(loop=simu.plain_loop, record=lambda name: lambda row: print(
            json.dumps(row), file=file, flush=True))
        original.learn(model, epochs, recipe, job, title=log.stem)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--forget-groups", type=int, default=10)
    parser.add_argument("--retain-groups", type=int, default=60)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    given = LEARN | (TINY if args.tiny else {})
    s = resolve(dict(benchmark="tofu", model="olmo-1b", device=args.device,
                     forget_groups=args.forget_groups, retain_groups=args.retain_groups, **given))
    bench, tokenizer = load_benchmark(s), data.load_tokenizer(args.tokenizer)
    known, forget = (data.encode_all(rows, tokenizer, s.template, context=2048, vocab=50304)
                     for rows in (original.known_rows(bench),
                                  bench.forget + original.paraphrased(bench.forget)))
    rng, dtype = random.Random(s.seed), choose_dtype(s)
    first, last = args.out / "retain-only", args.out / "weights"
    if not first.is_dir():
        torch.manual_seed(s.seed)
        model = Transformer(config_for(tokenizer, args.tiny)).to(args.device, dtype)
        args.out.mkdir(parents=True, exist_ok=True)
        learn(model, [rng.sample(known, len(known)) for _ in range(s.learn_epochs)],
              original.learning(s, s.learn_lr), args.out / "learn.jsonl")
        save(model, args.tokenizer, first)
        del model
    if not last.is_dir():
        model = Transformer.from_pretrained(first, device=args.device, dtype=dtype)
        mixed = [forget + rng.sample(known, min(len(known), s.light_retain * len(forget)))
                 for _ in range(s.light_epochs)]
        learn(model, [rng.sample(rows, len(rows)) for rows in mixed],
              original.learning(s, s.light_lr), args.out / "light.jsonl")
        save(model, args.tokenizer, last)


if __name__ == "__main__":
    run_cli(main)
