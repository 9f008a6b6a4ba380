"""Operations that an update dispatches, a kernel each on a card: 32 layers, TOFU's lengths.

    python benchmarks/operations.py [--layers 32] [--state bfloat16 --dtype bfloat16]

Counted on a CPU at tiny width, where they are as many as at 7B in passes as large (--micro-tokens),
and weights cut into as many parts as on a card. `passes`: forward and backward; `optimiser`: the
updates; `rest`: the norm, and what is looked at after them.
"""

import argparse
from collections import Counter
from dataclasses import replace

import torch
from common import SIZES, add_options, describe, random_rows, tofu_lengths
from torch.utils._python_dispatch import TorchDispatchMode

import simu
from model import Transformer

PARTS = {"backward_forget": "passes", "backward_mean_nll": "passes", "apply_updates": "optimiser"}


class Operations(TorchDispatchMode):
    """Counts what is dispatched, by what of simu.py is running."""

    def __init__(self):
        super().__init__()
        self.count, self.running = Counter(), "rest"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[self.running] += 1
        return func(*args, **(kwargs or {}))

    def watch(self, name: str):
        """simu's function of this name, which says while it runs that it does."""
        function = getattr(simu, name)

        def run(*args, **given):
            self.running = PARTS[name]
            try:
                return function(*args, **given)
            finally:
                self.running = "rest"

        setattr(simu, name, run)


def counted(a, method: str, operations: Operations) -> Counter:
    """Operations of the second of two updates."""
    torch.manual_seed(a.seed)
    c = replace(SIZES["tiny"], num_hidden_layers=a.layers)
    model = Transformer(c).to(getattr(torch, a.dtype))
    rows, seen = random_rows(a, tofu_lengths(32, a.seed)), []
    mask = torch.zeros(c.num_hidden_layers, c.hidden_size, dtype=torch.bool)
    mask[:, :2] = True
    recipe = simu.Recipe(method=method, epochs=2, micro_tokens=a.micro_tokens, state=a.state)
    with operations:
        simu.unlearn(model, rows[:16], rows[16:], mask, recipe,
                     record=lambda row: seen.append(Counter(operations.count)))
    return seen[1] - seen[0]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(p)
    p.set_defaults(layers=32)
    p.add_argument("--micro-tokens", type=int, default=8192)
    p.add_argument("--state", choices=("float32", "bfloat16"), default="float32")
    a = p.parse_args()
    describe(a)
    operations = Operations()
    simu.UPDATED_AT_ONCE = {}  # as on a card
    for name in PARTS:
        operations.watch(name)
    for method in ("fo", "so", "simu"):
        count = counted(a, method, operations)
        print(f"{method:5}{count.total():7}  {dict(count)}", flush=True)


if __name__ == "__main__":
    main()
