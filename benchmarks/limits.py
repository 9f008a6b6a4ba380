"""What a card cannot do faster, to lay beside the other rows: its matrix products, its memory, and
from both the least time of an update, a Sophia step, a decoding step and 400 pairs' attribution.

    python benchmarks/limits.py [--size llama2-7b --device cuda --dtype bfloat16]

Counted is what no way can save: each token through each matrix (forward and twice that backward),
each answer token through the head, each weight, gradient and moment read and written once.
"""

import argparse

import torch
from common import add_options, config, describe, matmul_rate, timed, tofu_lengths

import simu
from model import Transformer
from pipeline import fused


def copy_rate(a) -> float:
    """Bytes a second that a copy reads and writes, the best of ten."""
    x = torch.zeros(1 << (28 if a.device == "cuda" else 24), device=a.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(timed(a, lambda: y.copy_(x))[0] for _ in range(10))


def sophia_seconds(a, numel: int, apply) -> float:
    """Seconds for 1e9 weights of Sophia's step on a square matrix, bfloat16 state. apply: the
    written update or the fused one."""
    side = int(numel ** 0.5)
    w, m, h, g = (torch.zeros(side, side, device=a.device, dtype=torch.bfloat16) for _ in range(4))
    w.requires_grad_()
    moving, generator = simu.Moving("w", w, w.detach(), m, h), torch.Generator(a.device)

    def run():
        w.grad = g
        apply([moving], simu.OPTIMISERS["sophia"], simu.Recipe(), lr=1e-5, step=1, scale=1.0,
              generator=generator)

    return min(timed(a, run)[0] for _ in range(4)) / side ** 2 * 1e9


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(p)
    a = p.parse_args()
    describe(a)
    c, flops, memory = config(a), matmul_rate(a), copy_rate(a)
    print(f"copy: {memory / 1e9:.4g} GB/s, read and written")
    with torch.device("meta"):
        shapes = {n: p.numel() for n, p in Transformer(c).named_parameters()}
    layers = sum(n for name, n in shapes.items() if "_proj" in name)
    attention = sum(n for name, n in shapes.items() if simu.MOVES["attention"](name))
    whole, head = sum(shapes.values()), c.vocab_size * c.hidden_size
    lengths = tofu_lengths(32, a.seed)
    read, told = sum(p + n - 1 for p, n in lengths), sum(n for _, n in lengths)

    def update(moving: int) -> float:
        """Forward and gradients of states everywhere, of weights where they move; then the step:
        gradient read, weight and two moments read and written, all bfloat16."""
        passes = 2 * (2 * layers + moving) * read + 6 * head * told
        return passes / flops + 14 * moving / memory

    print(f"{a.size}, 16 and 16 rows, {read} tokens read, {told} told; {whole:,} weights")
    print(f"  update at the least: FO, SO {update(whole):.3f} s, SIMU {update(attention):.3f} s")
    written, compiled = (sophia_seconds(a, 1 << (27 if a.device == "cuda" else 20), apply)
                         for apply in (simu.apply_updates, fused.apply_updates))
    print(f"  Sophia, 1e9 weights: {written:.4f} s as written, {compiled:.4f} s fused; at the "
          f"least {14e9 / memory:.4f} s")
    for rows in (32, 256):
        cached = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 100 * rows
        step = max((2 * (layers + head) + cached) / memory, 2 * (layers + head) * rows / flops)
        print(f"  decoding step of {rows} rows of 100 tokens: {1e3 * step:.2f} ms")


if __name__ == "__main__":
    main()
