"""A fork's objective: RMU (arXiv 2403.03218). The states that leave layer LAYER are pulled to one
random direction on forget rows, and held where the original has them on retain rows.

Its loss reads states, not answers; no gradient reaches the weights above that layer; its retain
term is its own. Importing this file adds the row."""

import torch
import torch.nn.functional as F
from torch import Tensor

import simu
from data import IGNORE, Batch

LAYER, LENGTH = 1, 20.0  # the layer, and how long the random direction is


def states(model: simu.Transformer, batch: Batch) -> Tensor:
    """States [N, D] that leave the layer, where answer tokens are predicted."""
    x = model.embed(batch.ids)  # [B, T, D]
    cos_sin = model.rope(torch.arange(batch.ids.shape[1], device=x.device))
    for block in model.layers[:LAYER + 1]:
        x = block(x, *cos_sin)
    return x[batch.targets != IGNORE]


def misdirect(found: Tensor, known: list, recipe: simu.Unlearning) -> Tensor:
    generator = torch.Generator().manual_seed(recipe.seed)
    direction = F.normalize(torch.rand(found.shape[1], generator=generator), dim=0).to(found)
    return (found - LENGTH * direction).square().mean(1).sum()


def hold(found: Tensor, known: list, recipe: simu.Unlearning) -> Tensor:
    return (found - torch.cat(known)).square().mean(1).sum()


def originals(found: Tensor, target, recipe: simu.Unlearning) -> Tensor:
    return found


simu.OBJECTIVES["rmu"] = simu.Objective(misdirect, retain=hold, known_retain=originals, read=states,
                                        about="RMU: states misdirected, retain states held")
