"""The fast twins of step 2 on a card: an update of each weight in one compiled kernel, and forget
and retain rows in the same passes. `on(device)` is what simu.unlearn and simu.train take of it.

Why the update is the same: it calls simu.masked_update with the same moments and step, and a
compiler only makes one kernel of it, which reads and writes each tensor once. What changes from
update to update comes as 0-d tensors, and sizes are unknown to the compiler, so that one graph
serves all matrices and all updates (tests/test_fused.py). The passes are the same by linearity, to
rounding; on a CPU, where launches cost little, simu's own keep their bytes.
"""

import random
import sys
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

import simu
from data import Encoded, batches_by_length

VARIES = ("lr", "weight_decay", "step")  # of a step's arguments; the others are constants
MOST_GRAPHS = 64  # one for each kind of weight, dtype and optimiser; torch's own limit is 8


def on(device: torch.device) -> dict:
    """What to hand to simu.unlearn: on a card these twins, on a CPU nothing."""
    return dict(apply=apply_updates, backward=backward_together) if device.type == "cuda" else {}


# ------------------------------------------------------------------------------------ updates


def noise_bits(count, key: Tensor, device) -> tuple[Tensor, Tensor, Tensor]:
    """Three times `count` random integers of 16 bits, a function of key and index alone: computed
    where they are needed, in registers. Two rounds of a 32-bit integer hash, the key between them;
    its constants are below 2**31, so that no product leaves int64."""
    x = torch.arange(count, device=device)
    x = (x ^ (x >> 16)) * 0x21f0aaad & 0xffffffff
    x = (x ^ (x >> 15)) + key & 0xffffffff
    x = (x ^ (x >> 15)) * 0x735a2d97 & 0xffffffff
    x = (x ^ (x >> 16)) * 0x21f0aaad & 0xffffffff
    x = x ^ (x >> 15)
    y = x * 0x735a2d97 & 0xffffffff
    return x & 0xffff, x >> 16, (y ^ (y >> 15)) >> 16


def round_into(narrow: Tensor, wide: Tensor, noise: Tensor):
    """narrow <- wide; bfloat16 as simu.stochastic_round, with the 16 bits of noise given [D10]."""
    if narrow.dtype == torch.bfloat16:
        bits = wide.view(torch.int32) + noise.view_as(wide).int()
        wide = (bits & -(1 << 16)).view(torch.float32)
    narrow.copy_(wide)


def whole_update(moments, step, varying: dict, scale: Tensor, key: Tensor, weight, master: Tensor,
                 grad: Tensor, m: Tensor, h: Tensor, mask) -> Tensor:
    """One update of one weight, as simu.update_rows makes it: a function that a compiler can fuse.
    weight: what the model reads, where that is not the master itself."""
    wide = [t.float() for t in (master, m, h)]  # the same tensors where they are float32
    clipped = simu.masked_update(wide[0], grad.float() * scale, wide[1], wide[2], mask=mask,
                                 moments=moments, step=partial(step, **varying))
    if m.dtype == torch.bfloat16:
        noise = noise_bits(master.numel(), key, master.device)
        for narrow, t, bits in zip((master, m, h), wide, noise):
            round_into(narrow, t, bits)
    if weight is not None:
        weight.copy_(master)
    return clipped


@cache
def compiled_update(device: str):
    """whole_update compiled for a kind of device, or None, with one line that says so, where its
    compiler (Triton and gcc; on a CPU g++) is missing or refuses it."""
    torch._dynamo.config.cache_size_limit = MOST_GRAPHS
    try:
        update = torch.compile(whole_update, dynamic=True, fullgraph=True)
        recipe, tensors = simu.Recipe(), [torch.zeros(4, 4, device=device) for _ in range(4)]
        rules = changing_apart(*simu.OPTIMISERS["sophia"].rules(recipe, 1.0, 0.1, 1))
        update(*rules, as_scalar(1.0), torch.tensor(1), None, *tensors, None)
    except Exception as e:  # any of a dozen kinds: what is wrong with the compiler is not ours
        why = (str(e).strip().splitlines() or [type(e).__name__])[0]
        print(f"updates are not fused, so about ten times slower: torch.compile fails on {device} "
              f"({why})", file=sys.stderr)
        return None
    return update


@torch.no_grad()
def apply_updates(moving: list[simu.Moving], optimiser: simu.Optimiser, recipe, *, lr: float,
                  step: int, scale: float, generator) -> Tensor:
    """simu.apply_updates by compiled_update. Noise depends on seed, step and a weight's number."""
    update = compiled_update(moving[0].master.device.type)
    if update is None:
        return simu.apply_updates(moving, optimiser, recipe, lr=lr, step=step, scale=scale,
                                  generator=generator)
    clipped, keys, scale = 0, random.Random(recipe.seed * 1_000_003 + step), as_scalar(scale)
    rules = {decays: changing_apart(*optimiser.rules(
        recipe, lr, recipe.weight_decay if decays else 0.0, step)) for decays in (False, True)}
    for w in moving:
        grad, w.weight.grad = w.weight.grad, None
        weight = w.weight.detach() if w.master.dtype != w.weight.dtype else None
        key = torch.tensor(keys.getrandbits(32))
        clipped = clipped + update(*rules[w.decays], scale, key, weight, w.master, grad, w.m, w.h,
                                   w.mask)
    return clipped


def changing_apart(moments, step) -> tuple:
    """Moments, step with its constants, and as 0-d tensors what changes from update to update."""
    constants = {k: x for k, x in step.keywords.items() if k not in VARIES}
    varying = {k: as_scalar(x) for k, x in step.keywords.items() if k in VARIES}
    return moments, partial(step.func, **constants), varying


def as_scalar(x) -> Tensor:
    return torch.tensor(float(x), dtype=torch.float64)


# ------------------------------------------------------------------------------------- passes


def some_rows(answers: simu.Answers, first: int, last: int) -> simu.Answers:
    """The answers of rows first..last-1 among those of several."""
    tokens = slice(sum(answers.sizes[:first]), sum(answers.sizes[:last]))
    return simu.Answers(answers.logits[tokens], answers.labels[tokens], answers.nll[tokens],
                        answers.sizes[first:last])


@dataclass
class Both:
    """Both terms of an objective over the rows of one update, forget rows first, and the sum of
    -log P over the tokens of each kind."""

    forget: simu.Term
    retain: simu.Term
    sums: Tensor  # [2]

    def of(self, answers: simu.Answers, numbers: list[int]) -> Tensor:
        n = len(self.forget.known)
        k = sum(i < n for i in numbers)  # they are sorted
        parts = some_rows(answers, 0, k), some_rows(answers, k, len(numbers))
        self.sums += torch.stack([x.nll.detach().sum() for x in parts])
        loss = self.retain.of(parts[1], [i - n for i in numbers[k:]])
        return loss + self.forget.of(parts[0], numbers[:k]) if k else loss


def backward_together(model: simu.Transformer, forget: list[Encoded], retain: list[Encoded],
                      known: tuple[list, list], weight: float, recipe) -> dict[str, float]:
    """simu.backward_apart with the rows of both kinds in the same passes: half the launches, and
    passes twice as full. The losses are read from the card once."""
    objective, device = simu.OBJECTIVES[recipe.objective], model.embed_tokens.weight.device
    if not objective.forget or not weight or objective.read:
        return simu.backward_apart(model, forget, retain, known, weight, recipe)
    rows, terms = forget + retain, (
        simu.term_of(objective.forget, forget, known[0], 1.0, recipe),
        simu.term_of(objective.retain, retain, known[1], weight, recipe))
    both = Both(*terms, torch.zeros(2, device=device))
    for numbers in map(sorted, batches_by_length([len(r.ids) for r in rows], recipe.micro_tokens)):
        some = [rows[i] for i in numbers]
        h, labels = simu.answer_states(model, some)
        sizes = [len(row.ids) - row.start for row in some]
        _, grad = simu.backward_head(model, h.detach(), labels, sizes, both, numbers)
        h.backward(grad)
    totals = both.sums.tolist()
    return {f"loss_{name}": x / simu.answer_tokens(some)
            for name, x, some in zip(("forget", "retain"), totals, (forget, retain))}
