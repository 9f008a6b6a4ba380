"""What step 2 needs of a large model on a card: an update of each weight in one compiled kernel,
which reads and writes each tensor once, and masters and moments in bfloat16 [D10].

It is simu.masked_update by the same optimiser. What changes from update to update comes as 0-d
tensors, and sizes are unknown to the compiler, so that one graph serves all (tests/test_fused.py).
"""

import sys
from functools import cache

import torch
from torch import Tensor

import simu


def on(device: torch.device, state: str) -> dict:
    """What simu.unlearn takes of this file on a device, for masters and moments in `state`."""
    needed = device.type == "cuda" or state == "bfloat16"
    return dict(apply=apply_updates, state=getattr(torch, state)) if needed else {}


def stochastic_round(x: Tensor) -> Tensor:
    """float32 to bfloat16, up or down with the probability that makes it right on average [D10],
    by torch's global generator."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def update_weight(optimiser, recipe, lr, decay, step, shrink, stored: tuple[Tensor, Tensor, Tensor],
                  grad: Tensor, mask: Tensor | None):
    """masked_update of one weight in float32; stored: its master, m and h, as they are stored."""
    exact = [t.float() for t in stored]  # the stored tensors themselves, where they are float32
    simu.masked_update(exact[0], shrink * grad.float(), exact[1], exact[2],
                       optimiser(recipe, lr, decay, step), mask)
    for narrow, wide in zip(stored, exact):
        if narrow.dtype == torch.bfloat16:
            narrow.copy_(stochastic_round(wide))


def as_scalar(x: float) -> Tensor:
    """A number that a compiler does not build into its graph."""
    return torch.tensor(float(x), dtype=torch.float64)


@cache
def compiled_update(device: str, optimiser):
    """update_weight compiled, which is tried; as it is, with one line that says so, where the
    compiler (Triton and gcc; on a CPU g++) fails."""
    torch._dynamo.config.cache_size_limit = 64  # one for each kind of weight, dtype and optimiser
    tensors = [torch.zeros(4, 4, device=device) for _ in range(4)]
    try:
        update = torch.compile(update_weight, dynamic=True, fullgraph=True)
        update(optimiser, simu.Recipe(), *map(as_scalar, (1, 0.1, 1, 1)), tuple(tensors[:3]),
               tensors[3], None)
        return update
    except Exception as e:  # any of a dozen kinds: what is wrong with the compiler is not ours
        why = (str(e).strip().splitlines() or [type(e).__name__])[0]
        print(f"updates are not fused, so about ten times slower: torch.compile fails on {device} "
              f"({why})", file=sys.stderr)
        return update_weight


@torch.no_grad()
def apply_updates(moving: list[simu.Moving], optimiser, recipe, *, lr: float, step: int,
                  shrink: float):
    """simu.apply_updates by update_weight, compiled on a card. The noise of its rounding depends on
    seed and step alone, and torch's random numbers go on as if there were none."""
    device = moving[0].master.device
    update = compiled_update("cuda", optimiser) if device.type == "cuda" else update_weight
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        for w in moving:
            decay = recipe.weight_decay if w.weight.dim() == 2 else 0.0
            numbers = map(as_scalar, (lr, decay, step, shrink))
            grad, w.weight.grad = w.weight.grad, None
            update(optimiser, recipe, *numbers, (w.master, w.m, w.h), grad, w.mask)
            if w.weight.dtype != w.master.dtype:
                w.weight.copy_(w.master)
