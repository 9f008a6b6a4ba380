"""How long stages will take: their passes and updates, counted, at the pace of some measured on
this machine. An estimate: what a stage does beside them is not counted, and a GPU's pace grows with
the size of a pass."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

import simu
from data import Encoded
from model import Config, Transformer

MEASURED = 4  # rows of the measured pass
FORWARD = 1 / 3  # of a pass forward and backward
DECODING = 4  # times a token's forward pass, in small batches
DEPTHS = (1, 2)  # layers of the models that stand in for a deeper one


class Rows(NamedTuple):
    """Rows of one kind: how many, and the tokens of each and of its answer in the mean."""

    count: int
    tokens: float
    answer: float


def rows_of(rows: list[Encoded]) -> Rows:
    n = len(rows)
    return Rows(n, sum(len(r.ids) for r in rows) / max(1, n),
                sum(len(r.ids) - r.start for r in rows) / max(1, n))


@dataclass(frozen=True)
class Pace:
    tokens: float  # a second, forward and backward
    weights: dict[str, float] = field(default_factory=dict)  # a second, by optimiser


def attribution_passes(s, config: Config) -> float:
    """Forward and backward through all layers, of each answer row of a pair: a node of the path
    begins at its layer."""
    return 1 + (s.steps - 1) * (config.num_hidden_layers - 1) / 2


def seconds(s, config: Config, pace: Pace, name: str, forget: Rows, keep: Rows, *, asked: int = 0,
            updates: int = 0, moving: int = 0) -> float:
    """Of a stage: "learn", "attribute", "evaluate" (`asked` rows) or "unlearn" (`updates`, of so
    many weights each)."""
    if name == "learn":
        passed = s.learn_epochs * (forget.count * forget.tokens + keep.count * keep.tokens)
    elif name == "attribute":
        pairs = forget.count + min(keep.count, forget.count)
        passed = pairs * forget.answer * attribution_passes(s, config) * 2 * FORWARD
    elif name == "evaluate":
        said = min(s.max_new_tokens or config.max_position_embeddings, 2 * forget.answer)
        passed = asked * said * DECODING * FORWARD
    else:
        passed = updates * s.batch * (forget.tokens + keep.tokens)
    optimiser = simu.METHODS[s.method].optimiser
    spent = updates * moving / pace.weights[optimiser] if optimiser in pace.weights else 0.0
    return passed / pace.tokens + spent


def least(*calls: Callable) -> float:
    """Seconds of the fastest of some calls; the first also pays for what is made once."""
    taken = []
    for call in calls:
        start = time.monotonic()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.monotonic() - start)
    return max(1e-6, min(taken))


def pass_seconds(model: Transformer, rows: list[Encoded], s) -> float:
    """Of a pass forward and backward over some rows. The gradients stay."""
    return least(*2 * [lambda: [x.backward() for x in simu.nll_parts(
        model, rows, s.micro_tokens or 8192)]])


def weights_a_second(model: Transformer, s, optimiser) -> float:
    """That an optimiser's step moves, of all of a model's."""
    moving = [simu.Moving(name, p, p.detach(), *(torch.zeros_like(p) for _ in range(2)))
              for name, p in model.named_parameters()]

    def update():
        for w in moving:
            w.weight.grad = torch.zeros_like(w.weight)
        simu.apply_updates(moving, optimiser, s, lr=0.0, step=1, shrink=1.0)
    return sum(w.weight.numel() for w in moving) / least(update, update)


def measured(s, config: Config, device: torch.device, dtype: torch.dtype, rows: Rows) -> Pace:
    """The pace of a model of random weights. A deeper one's is that of its first layers and of
    everything else, by two models of few layers."""
    own = [Encoded([3] * round(rows.tokens), round(rows.tokens - rows.answer))] * MEASURED
    L = config.num_hidden_layers
    depths = DEPTHS if L > 2 * DEPTHS[-1] else (L,)
    taken = []
    for depth in depths:
        model = Transformer(replace(config, num_hidden_layers=depth)).to(device, dtype)
        taken.append(pass_seconds(model, own, s))
    per_layer = max(0.0, taken[-1] - taken[0]) / max(1, depths[-1] - depths[0])
    whole = taken[-1] + (L - depths[-1]) * per_layer
    used = {row.optimiser for row in simu.METHODS.values()}
    return Pace(MEASURED * rows.tokens / whole,
                {name: weights_a_second(model, s, simu.OPTIMISERS[name]) for name in used})


def in_words(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
