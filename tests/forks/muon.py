"""A fork's optimiser: Muon (Keller Jordan, 2024). The momentum of a matrix, made orthogonal by a
Newton-Schulz iteration, is the step; everything that is no matrix takes its momentum's sign.

Importing this file adds it, and a method with it."""

from functools import partial

import torch
from torch import Tensor

import simu

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration: all singular values end near 1


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """U V^T of x = U S V^T, roughly."""
    a, b, c = COEFFICIENTS
    y = x / (x.norm() + 1e-7)
    y = y.mT if len(x) > x.shape[1] else y
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if len(x) > x.shape[1] else y


def moments(grad: Tensor, m: Tensor, h: Tensor, *, beta1: float):
    return beta1 * m + grad, h


def weights(param: Tensor, m: Tensor, h: Tensor, *, lr: float, weight_decay: float):
    move = orthogonal(m) if m.dim() == 2 else m.sign()
    return param * (1 - lr * weight_decay) - lr * move


def muon(recipe: simu.Unlearning, lr: float, weight_decay: float, step: int):
    return (partial(moments, beta1=recipe.beta1),
            partial(weights, lr=lr, weight_decay=weight_decay))


simu.OPTIMISERS["muon"] = muon
simu.METHODS["simu-muon"] = simu.Method("attention", "muon", masked=True)
