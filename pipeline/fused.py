"""What step 2 needs of a large model on a card: an update of each weight in one compiled kernel,
and masters and moments in bfloat16, rounded stochastically [D10].

The update is simu.masked_update with the same moments and weights; a compiler only makes one kernel
of it, which reads and writes each tensor once. What changes from update to update comes as 0-d
tensors, and sizes are unknown to the compiler, so that one graph serves all matrices and updates
(tests/test_fused.py).
"""

import sys
from functools import cache, partial

import torch
from torch import Tensor

import simu

VARIES = ("lr", "weight_decay", "step")  # arguments of `weights`; the others are constants
MOST_GRAPHS = 64  # one for each kind of weight, dtype and optimiser; torch's own limit is 8


def on(device: torch.device, state: str) -> dict:
    """What simu.unlearn and simu.train are to be handed on a device for masters and moments in
    `state`."""
    dtype = getattr(torch, state)
    if device.type != "cuda" and dtype == torch.float32:
        return {}
    return dict(apply=apply_updates, state=dtype)


def stochastic_round(x: Tensor) -> Tensor:
    """float32 to bfloat16, up or down with the probability that makes it right on average [D10],
    by torch's global generator."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def update_weight(moments, weights, varying: dict, shrink: Tensor, weight, master: Tensor,
                  grad: Tensor, m: Tensor, h: Tensor, mask) -> Tensor:
    """One update of one weight in float32, rounded to what is stored. weight: what the model
    reads, where that is not the master itself."""
    stored = master, m, h
    wide = [x.float() for x in stored]  # the same tensors where they are in float32
    clipped = simu.masked_update(wide[0], grad.float() * shrink, *wide[1:], moments=moments,
                                 weights=partial(weights, **varying), mask=mask)
    for narrow, x in zip(stored, wide):
        if narrow.dtype == torch.bfloat16:
            narrow.copy_(stochastic_round(x))
    if weight is not None:
        weight.copy_(master)
    return clipped


def rules_of(optimiser, recipe, lr: float, decay: float, step: int) -> tuple:
    """moments, weights with its constants, and as 0-d tensors what changes between updates."""
    moments, weights = optimiser(recipe, lr, decay, step)
    constants = {k: x for k, x in weights.keywords.items() if k not in VARIES}
    varying = {k: as_scalar(x) for k, x in weights.keywords.items() if k in VARIES}
    return moments, partial(weights.func, **constants), varying


def as_scalar(x) -> Tensor:
    return torch.tensor(float(x), dtype=torch.float64)


@cache
def compiled_update(device: str):
    """update_weight compiled for a kind of device, or as it is, with one line that says so, where
    the compiler (Triton and gcc; on a CPU g++) is missing or refuses it."""
    torch._dynamo.config.cache_size_limit = MOST_GRAPHS
    try:
        update = torch.compile(update_weight, dynamic=True, fullgraph=True)
        tensors = [torch.zeros(4, 4, device=device) for _ in range(4)]
        rules = rules_of(simu.OPTIMISERS["sophia"], simu.Recipe(), 1.0, 0.1, 1)
        update(*rules, as_scalar(1.0), None, *tensors, None)
        return update
    except Exception as e:  # any of a dozen kinds: what is wrong with the compiler is not ours
        why = (str(e).strip().splitlines() or [type(e).__name__])[0]
        print(f"updates are not fused, so about ten times slower: torch.compile fails on {device} "
              f"({why})", file=sys.stderr)
        return update_weight


@torch.no_grad()
def apply_updates(moving: list[simu.Moving], optimiser, recipe, *, lr: float, step: int,
                  shrink: float) -> Tensor:
    """simu.apply_updates by update_weight, compiled on a card. The noise of its rounding depends on
    seed and step alone."""
    device, clipped = moving[0].master.device, 0
    update = compiled_update(device.type) if device.type == "cuda" else update_weight
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        for w in moving:
            decay = recipe.weight_decay if w.weight.dim() == 2 else 0.0
            grad, w.weight.grad = w.weight.grad, None
            weight = w.weight.detach() if w.master.dtype != w.weight.dtype else None
            clipped += update(*rules_of(optimiser, recipe, lr, decay, step), as_scalar(shrink),
                              weight, w.master, grad, w.m, w.h, w.mask)
    return clipped
