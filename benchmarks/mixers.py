"""Passes of tiny models without attention, beside tiny-llama's: an update's gradients, attribution.

    OMP_NUM_THREADS=1 python benchmarks/mixers.py

Random weights of the demo's sizes, rows of TOFU's lengths, CPU seconds of this process, the best of
--turns. Only ratios count: those to tiny-llama in one run, or between two commits at one time.
"""

import argparse

import torch
from common import SMALL, describe, random_rows, timed, tofu_lengths

import simu
from model import Transformer
from pipeline import mixers

TINY = dict(vocab_size=SMALL.vocab_size, width=SMALL.hidden_size, depth=SMALL.num_hidden_layers,
            context=512)


def measure(a, kind: str):
    """Seconds of what a model of this kind does with 16 rows."""
    torch.manual_seed(a.seed)
    model = Transformer(mixers.TINY[kind](**TINY) if kind in mixers.TINY else SMALL)
    rows = random_rows(a, tofu_lengths(16, a.seed))
    recipe = simu.Recipe()
    jobs = {"gradients": lambda: simu.backward_mean_nll(model, rows, 1.0, recipe.micro_tokens),
            "attribution": lambda: simu.attribute_rows(model, rows, recipe, title=kind)}
    return {name: min(timed(a, job)[0] for _ in range(a.turns)) for name, job in jobs.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--turns", type=int, default=5)
    a = argparse.Namespace(**vars(p.parse_args()), size="small", device="cpu", dtype="float32",
                           layers=None, seed=0)
    describe(a)
    for kind in ("llama", *mixers.TINY):
        seconds = measure(a, kind)
        if kind == "llama":
            base = seconds
        print(f"  {kind:8}" + "".join(f"{name} {s:.3f} s ({s / base[name]:.1f})   "
                                      for name, s in seconds.items()))


if __name__ == "__main__":
    main()
