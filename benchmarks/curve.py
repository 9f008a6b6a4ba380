"""Cost against model size, tiny to 1B: attribution, a SIMU update, decoding; shares of the rate at
which this machine multiplies each size's own matrices, measured in the same run.

    python benchmarks/curve.py [--sizes tiny small smollm2-135m olmo-1b] [--dtype bfloat16]

Weights are random, rows have the lengths of TOFU's forget10, one neuron in a hundred is critical.
FLOP are counted in a first turn of everything, which also warms up; the second is timed. Decoding:
one token of each of --rows texts in a pass, as where no draft ever fits.
"""

import argparse
import gc

import torch
from common import (SIZES, add_options, describe, random_model, random_rows, shapes_rate, timed,
                    tofu_lengths)
from torch.utils.flop_counter import FlopCounterMode

import simu
from data import collate
from pipeline.reading import generate

NEW = 12  # tokens that each text gets


def work(a, model):
    """{what: (tokens in one pass through a matrix, function)}"""
    rows = random_rows(a, tofu_lengths(2 * a.rows, a.seed))
    forget, retain, pair = rows[:a.rows], rows[a.rows:], rows[:1]
    L, D = len(model.layers), model.config.hidden_size
    mask = torch.zeros(L, D, dtype=torch.bool)
    mask.view(-1)[::100] = True
    recipe = simu.Unlearning(method="simu", objective="graddiff", lr=1e-5, batch=a.rows, epochs=1)
    answers = sum(len(r.ids) - r.n_prompt for r in pair)
    prompts = [r.ids[:r.n_prompt] for r in forget]
    return {
        "attribution": (4 * answers, lambda: simu.attribute(
            model, collate(pair, a.device), steps=5)),
        "SIMU update": (sum(len(r.ids) for r in forget), lambda: simu.unlearn(
            model, forget, retain, mask, recipe)),
        "decoding": (a.rows, lambda: generate(model, prompts, max_new_tokens=NEW, eos_id=None))}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(p)
    p.add_argument("--sizes", nargs="+", choices=SIZES,
                   default=["tiny", "small", "smollm2-135m", "olmo-1b"])
    p.add_argument("--rows", type=int, default=8)
    a = p.parse_args()
    describe(a)
    print(f"{'':14}{'weights':>15}{'':14}{'seconds':>9}{'FLOP':>11}{'GFLOP/s':>9}{'share':>7}")
    for a.size in a.sizes:
        model = random_model(a)
        count = sum(p.numel() for p in model.parameters())
        for name, (tokens, run) in work(a, model).items():
            with FlopCounterMode(display=False) as counter:
                run()
            seconds, flop = timed(a, run)[0], counter.get_total_flops()
            rate = shapes_rate(a, tokens)
            print(f"{a.size:14}{count:15,}  {name:12}{seconds:9.3f}{flop:11.2e}"
                  f"{flop / seconds / 1e9:9.1f}{flop / seconds / rate:7.0%}", flush=True)
        del model
        gc.collect()


if __name__ == "__main__":
    main()
