"""A fork's objective: RMU (arXiv 2403.03218). The states that leave layer LAYER are pulled to one
random direction on forget rows, and held where the original has them on retain rows.

Its loss reads states, not answers; no gradient reaches the weights above that layer; its retain
term is its own. Importing this file adds the row."""

import torch
import torch.nn.functional as F
from torch import Tensor

import simu
from data import IGNORE, Encoded, collate

LAYER, LENGTH = 1, 20.0  # the layer, and how long the random direction is


def states(model: simu.Transformer, row: Encoded) -> Tensor:
    """States [A, D] of a row that leave the layer, where answer tokens are predicted."""
    device = model.embed_tokens.weight.device
    batch = collate([row], device)
    x = model.embed_tokens(batch.ids)  # [1, T, D]
    cos_sin = model.rope(torch.arange(len(row.ids), device=device))
    for block in model.layers[:LAYER + 1]:
        x = block(x, *cos_sin)
    return x[batch.targets != IGNORE]


def misdirect(model, forget: list, retain: list, known: tuple, recipe: simu.Unlearning):
    generator = torch.Generator().manual_seed(recipe.seed)
    direction = F.normalize(torch.rand(model.config.hidden_size, generator=generator), dim=0)
    direction = direction.to(model.embed_tokens.weight.device)
    for row in forget:
        loss = (states(model, row) - LENGTH * direction).square().mean() / len(forget)
        yield "loss_forget", loss, loss
    for row, original in zip(retain, known[1]):
        loss = (states(model, row) - original).square().mean() / len(retain)
        yield "loss_retain", recipe.lam * loss, loss


def originals(model, forget: list, retain: list, targets, recipe) -> tuple[list, list[Tensor]]:
    return [None] * len(forget), [states(model, row) for row in retain]


simu.OBJECTIVES["rmu"] = simu.Objective(misdirect, originals,
                                        about="RMU: states misdirected, retain states held")
