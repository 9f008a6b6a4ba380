"""Operations that an update and a decoding step dispatch, a kernel each on a card: 32 layers, rows
of TOFU's lengths.

    python benchmarks/operations.py [--layers 32] [--state bfloat16 --dtype bfloat16]

Counted on a CPU at tiny width, where they are as many as at 7B in passes as large (--micro-tokens),
and weights cut into as many parts as on a card. `passes`: forward and backward; `optimiser`: the
updates; `rest`: the norm, and what is looked at after them. `written`: simu.py's own forms, as a
CPU takes them; `card`: those of pipeline/fused.py, a compiled graph's call counted as one. In
brackets: of these, views and casts that change nothing, which launch no kernel.
"""

import argparse
from collections import Counter
from dataclasses import replace

import torch
from common import SIZES, add_options, describe, random_rows, tofu_lengths
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import simu
from model import Transformer
from pipeline import fused, reading

PARTS = {(simu, "backward_apart"): "passes", (fused, "backward_together"): "passes",
         (simu, "apply_updates"): "optimiser", (fused, "apply_updates"): "optimiser"}


def memory(values) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, torch.Tensor)}


class Operations(TorchDispatchMode):
    """Counts what is dispatched, by what is running, and how much of it launches no kernel."""

    def __init__(self):
        super().__init__()
        self.count, self.views, self.running, self.silent = Counter(), Counter(), "rest", False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.silent:
            self.count[self.running] += 1
            written = any(x.alias_info and x.alias_info.is_write for x in func._schema.arguments)
            self.views[self.running] += not written and bool(memory(out) & memory((args, kwargs)))
        return out

    def watch(self, module, name: str):
        """A module's function of this name, which says while it runs that it does."""
        function = getattr(module, name)

        def run(*args, **given):
            self.running = PARTS[module, name]
            try:
                return function(*args, **given)
            finally:
                self.running = "rest"

        setattr(module, name, run)

    def graph(self, device: str):
        """fused.compiled_update whose call counts as one operation."""
        def call(*args):
            self.count[self.running] += 1
            self.silent = True
            try:
                return fused.whole_update(*args)
            finally:
                self.silent = False
        return call


def update(a, method: str, operations: Operations, twins: dict) -> tuple[Counter, Counter]:
    """Operations of the second of two updates, and the views among them."""
    torch.manual_seed(a.seed)
    c = replace(SIZES["tiny"], num_hidden_layers=a.layers)
    model = Transformer(c).to(getattr(torch, a.dtype))
    rows, seen = random_rows(a, tofu_lengths(32, a.seed)), []
    mask = torch.zeros(c.num_hidden_layers, c.hidden_size, dtype=torch.bool)
    mask[:, :2] = True
    recipe = simu.Recipe(method=method, epochs=2, micro_tokens=a.micro_tokens, state=a.state)
    with operations:
        simu.unlearn(model, rows[:16], rows[16:], mask, recipe, **twins, record=lambda row: (
            seen.append((Counter(operations.count), Counter(operations.views)))))
    return tuple(now - before for before, now in zip(*seen))


def decoding_step(a) -> tuple[int, int]:
    """Operations of a pass over one id of each of 6 rows, and the views among them."""
    torch.manual_seed(a.seed)
    c = replace(SIZES["tiny"], num_hidden_layers=a.layers)
    model, steps, plain = Transformer(c).to(getattr(torch, a.dtype)), [], reading.read_on

    def read_on(*args):
        with Operations() as operations:
            chosen = plain(*args)
        steps.append((operations.count.total(), operations.views.total()))
        return chosen

    reading.read_on = read_on
    prompts = [torch.randint(3, c.vocab_size, (10 + i,)).tolist() for i in range(6)]
    reading.generate(model, prompts, max_new_tokens=4, eos_id=None)
    reading.read_on = plain
    return steps[0]


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
    for module, name in PARTS:
        operations.watch(module, name)
    fused.compiled_update = operations.graph
    forms = {"written": dict(apply=simu.apply_updates, backward=simu.backward_apart),
             "card": fused.on(torch.device("cuda"))}
    for method in ("fo", "so", "simu"):
        for form, twins in forms.items():
            count, views = update(a, method, operations, twins)
            print(f"{method:5}{form:8}{count.total():7} ({views.total()})  {dict(count)}",
                  flush=True)
    total, views = decoding_step(a)
    print(f"a decoding step of 6 rows {total} ({views}), {(total - views) / a.layers:.1f} kernels "
          "a layer")


if __name__ == "__main__":
    main()
