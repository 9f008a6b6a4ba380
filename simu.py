"""SIMU: Selective Influence Machine Unlearning (arXiv 2510.07822), both steps and both baselines.

Step 1 scores every MLP output neuron by how much it carries the forget set (Eq. 1-2) and keeps the
critical ones as a mask (Section 2.1). Step 2 unlearns with GradDiff (A.1) under Sophia (Eq. 3-7),
moving only the attention projections and the critical rows of down_proj. The baselines are the same
loop with everything moving: FO-GradDiff under AdamW, SO-GradDiff under Sophia.

    code         paper                               where       shape
    beta         beta_{l,i}: MLP output              Eq. 1       [D] per layer l and sample i
    a            a_j = (j/m) beta                    Eq. 1a      as beta
    log P        -L_i(a_j), see [D3]                 Eq. 1b      scalar
    scores       Att(w_l^k)                          Eq. 2       [L, D]
    steps        m                                   Eq. 1-2
    threshold    t;  critical iff Att > t * M_l      Section 2.1
    mask         M                                   Eq. 5-7     [L, D], rows of down_proj [D, F]
    m, h         m_t, H_t: EMAs of g and g^2         Eq. 4-6     as the weight
    lr           eta_t                               Eq. 3
    gamma, eps   damping, floor                      Eq. 3
    lam          lambda: weight of the retain loss   Table 4

Letters: B batch, T time, L layers, D neurons of a layer (its width), H heads, K kv heads, hd head
size, F d_ff, V vocabulary, N answer tokens of a batch, A of its longest answer, J path nodes run at
once, R = J * A, C neurons chosen of D. [D#]: the readings of the paper listed in the README.

Part 1 is the method to the letter. Part 2 gives each of its steps a fast twin, with the reason why
the two are equal and the test that holds them so. Then come the tables that a fork edits, and the
settings with Tables 3 and 4. Tables 1-2 are eval.py's; Table 5 counts what `critical_mask` selects.

Not here: several GPUs, quantised training, adapters.
"""

import math
import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import IGNORE, Batch, Encoded, batches_by_length, collate, option
from model import NEURONS, Transformer, UserError, attention, causal_attention

LOGITS = 1 << 25  # logits held at once, the largest tensors there are: 128 MiB of float32

# ==================================================================== Part 1: the method
# ----------------------------------------------------- Step 1: attribution (Eq. 1-2)

PATHS = ("layer", "neuron")


@contextmanager
def frozen(model: Transformer):
    """No gradients of weights while the block runs: only activations need them in step 1."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def check_path(steps: int, path: str):
    if steps < 1:
        raise UserError(f"steps m = {steps}; it must be at least 1")
    if path not in PATHS:
        raise UserError(f"path {path!r} is unknown; choose {' or '.join(PATHS)}")


def path_node(model: Transformer, prefix: list[int], label: int, l: int, k: slice,
              share: float) -> tuple[Tensor, Tensor]:
    """beta [D] of layer l at the prefix's last position, and d log P(label | prefix) / da [D] where
    its neurons k are scaled to a = share * beta, share = j / m (Eq. 1) [D3]."""
    mlp, activations = model.layers[l].mlp, {}

    def scale(y):  # [1, T, D]
        activations["beta"] = y[0, -1].detach()
        a = activations["beta"].clone()
        a[k] *= share  # Eq. 1a
        activations["a"] = a.requires_grad_()
        return torch.cat([y[:, :-1], a[None, None]], dim=1)  # only the last position

    mlp.intervene = scale
    try:
        with torch.enable_grad():
            ids = torch.tensor([prefix], device=model.embed_tokens.weight.device)
            log_p = model(ids)[0, -1].log_softmax(-1)[label]  # Eq. 1b without its minus [D3]
            grad, = torch.autograd.grad(log_p, activations["a"])
    finally:
        mlp.intervene = None
    return activations["beta"].float(), grad.float()


def attribute_loop(model: Transformer, encoded: Encoded, *, steps: int = 5,
                   path: str = "layer") -> Tensor:
    """Att(w_l^k) of Eq. 1-2 for one pair, as the paper writes it: float32 [L, D].

    One sample per answer token [D2], one layer (or neuron [D4]), one node of the path at a time,
    each in a separate forward and backward pass. `attribute` gives the same numbers fast."""
    check_path(steps, path)
    D = model.config.neuron_count
    scores = torch.zeros(len(model.layers), D, device=model.embed_tokens.weight.device)
    scaled_together = [slice(0, D)] if path == "layer" else [slice(k, k + 1) for k in range(D)]
    with frozen(model):
        for i in range(encoded.start, len(encoded.ids)):  # sample i: predict token i
            prefix, label = encoded.ids[:i], encoded.ids[i]
            for l in range(len(model.layers)):
                for k in scaled_together:
                    for j in range(1, steps + 1):
                        beta, grad = path_node(model, prefix, label, l, k, j / steps)
                        scores[l, k] += beta[k] * grad[k] / steps  # Eq. 2
    return scores


# ------------------------------------------------- Step 1: critical neurons (Section 2.1)


def need_finite_scores(scores: Tensor):
    if not torch.isfinite(scores).all():
        raise UserError("attribution scores are not finite; the model's weights or activations "
                        "overflow: attribute in float32 (--dtype float32), or fetch it again")


def critical_mask(scores: Tensor, threshold: float) -> Tensor:
    """bool [L, D]: Att > t * M_l with M_l = max_k Att(w_l^k), strict, layer by layer. A layer
    whose maximum is not positive holds nothing critical [D5]."""
    if not 0 < threshold <= 1:
        raise UserError(f"threshold t = {threshold}; it must be in (0, 1]")
    need_finite_scores(scores)
    top = scores.amax(dim=1, keepdim=True)
    return (scores > threshold * top) & (top > 0)


# ---------------------------------------------------------------- Step 2: GradDiff (A.1)


def mean_nll(model: Transformer, batch: Batch) -> Tensor:
    """l(y | x) of A.1: the mean of -log P over a batch's answer tokens and eos. Only they go
    through the output head."""
    counted = batch.targets != IGNORE
    logits = model.logits(model.hidden(batch.ids)[counted])  # [N, V]
    return F.cross_entropy(logits, batch.targets[counted], reduction="sum") / counted.sum()


def graddiff_loss(model: Transformer, forget: Batch, retain: Batch, lam: float) -> Tensor:
    """GradDiff as one loss (A.1): ascent on forget rows, descent on retain rows [D8]."""
    return -mean_nll(model, forget) + lam * mean_nll(model, retain)


# ------------------------------------------------------- Step 2: masked Sophia (Eq. 3-7)


def sophia_moments(grad: Tensor, m: Tensor, h: Tensor, *, beta1: float, beta2: float):
    """Eq. 4: one EMA of g and one of g^2, both at every update [D7]."""
    return beta1 * m + (1 - beta1) * grad, beta2 * h + (1 - beta2) * grad.square()


def sophia_weights(param: Tensor, m: Tensor, h: Tensor, *, lr: float, gamma: float, eps: float,
                   weight_decay: float):
    """Eq. 3 with decoupled decay: the new weights, and how many coordinates its clip held."""
    ratio = m / (gamma * h).clamp_min(eps)
    return param * (1 - lr * weight_decay) - lr * ratio.clamp(-1, 1), (ratio.abs() >= 1).sum()


def blend(mask: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """M * new + (1 - M) * old. Where M is 0 it is old itself: 0 * new is not 0 if new overflows."""
    if mask is None:
        return new
    mask = mask.to(new.dtype)
    return torch.where(mask == 0, old, mask * new + (1 - mask) * old)


def masked_update(param: Tensor, grad: Tensor, m: Tensor, h: Tensor, *, moments: Callable,
                  weights: Callable, mask: Tensor | None) -> Tensor:
    """One update by any optimiser, in place, the mask at the three points of Eq. 5-7.

    moments(grad, m, h) -> new m, h; weights(param, m, h) -> new param, clipped count. Returns that
    count. All tensors have one shape; mask broadcasts to it, with real values in [0, 1]."""
    m_new, h_new = moments(grad, m, h)  # Eq. 4
    m.copy_(blend(mask, m_new, m))  # (i) Eq. 5
    h.copy_(blend(mask, h_new, h))  # (ii) Eq. 6
    new, clipped = weights(param, m, h)  # Eq. 3
    param.copy_(blend(mask, new, param))  # (iii) Eq. 7
    return clipped


def sophia_update(param: Tensor, grad: Tensor, m: Tensor, h: Tensor, *, lr: float, beta1: float,
                  beta2: float, gamma: float, eps: float, weight_decay: float,
                  mask: Tensor | None = None) -> Tensor:
    """`masked_update` by Sophia, Eq. 3-7, on float32 param, grad, m, h of one shape: for use apart
    from a model. `unlearn_loop` and `unlearn` get the same two functions from OPTIMISERS."""
    return masked_update(
        param, grad, m, h, mask=mask, moments=partial(sophia_moments, beta1=beta1, beta2=beta2),
        weights=partial(sophia_weights, lr=lr, gamma=gamma, eps=eps, weight_decay=weight_decay))


# ------------------------------------------------- Step 2: optimisers, a table that a fork edits


def adamw_moments(grad: Tensor, m: Tensor, h: Tensor, *, beta1: float, beta2: float):
    return m.lerp(grad, 1 - beta1), (h * beta2).addcmul(grad, grad, value=1 - beta2)


def adamw_weights(param: Tensor, m: Tensor, h: Tensor, *, lr: float, beta1: float, beta2: float,
                  eps: float, weight_decay: float, step: int):
    """AdamW, step counted from 1; it clips nothing, so its count is 0."""
    root = (h / (1 - beta2 ** step)).sqrt().add(eps)
    new = (param * (1 - lr * weight_decay)).addcdiv(m, root, value=-lr / (1 - beta1 ** step))
    return new, torch.zeros((), dtype=torch.int64, device=param.device)


def sophia(recipe: "Unlearning", lr: float, weight_decay: float, step: int):
    return (partial(sophia_moments, beta1=recipe.beta1, beta2=recipe.beta2),
            partial(sophia_weights, lr=lr, gamma=recipe.gamma, eps=recipe.eps,
                    weight_decay=weight_decay))


def adamw(recipe: "Unlearning", lr: float, weight_decay: float, step: int):
    betas = dict(beta1=recipe.beta1, beta2=recipe.adam_beta2)
    return (partial(adamw_moments, **betas),
            partial(adamw_weights, **betas, lr=lr, eps=recipe.adam_eps, weight_decay=weight_decay,
                    step=step))


# (recipe, lr, weight_decay, step from 1) -> moments and weights of masked_update
OPTIMISERS = {"sophia": sophia, "adamw": adamw}


# ------------------------------------- Step 2: methods and what they move [D9], for a fork to edit

# Which weights all of whose values move, by name. A masked method moves rows of down_proj too.
MOVES = {
    "all": lambda name: True,
    "attention": lambda name: ".self_attn." in name and "_proj." in name,  # biases too, no norm
    "nothing": lambda name: False,
}


@dataclass(frozen=True)
class Method:
    moves: str  # a row of MOVES
    optimiser: str  # a row of OPTIMISERS
    masked: bool = False  # the mask's rows of down_proj move too


METHODS = {
    "fo": Method("all", "adamw"),
    "so": Method("all", "sophia"),
    "simu": Method("attention", "sophia", masked=True),
}


def moves_of(recipe: "Unlearning") -> str:
    """The row of MOVES that a recipe follows."""
    method = METHODS[recipe.method]
    return "nothing" if method.masked and recipe.attention == "frozen" else method.moves


def need_mask(model: Transformer, recipe: "Unlearning", mask: Tensor | None):
    if mask is None or mask.shape != (len(model.layers), model.config.neuron_count):
        raise UserError(f"method {recipe.method} needs a mask of one value per layer and neuron; "
                        "make_mask gives one")


def mask_of_weights(model: Transformer, mask: Tensor | None, recipe: "Unlearning") -> dict:
    """What moves (Section 2.2) [D9]: weight -> M in a shape that broadcasts to it, or None if all
    of it moves."""
    moving = {p: None for name, p in model.named_parameters() if MOVES[moves_of(recipe)](name)}
    if METHODS[recipe.method].masked:
        need_mask(model, recipe, mask)
        neurons = NEURONS[model.config.neurons]  # by default the rows of down_proj [D1]
        for block, M in zip(model.layers, mask.to(model.embed_tokens.weight.device)):
            moving |= {getattr(block.mlp, name).weight: M[:, None] for name in neurons.rows}
            moving |= {getattr(block.mlp, name).weight: M[None] for name in neurons.columns}
    return moving


# --------------------------------------------------------------------- Step 2: the loop


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear rise over the first `warmup` of all updates, then linear decay to 0. step counts from
    1."""
    rise = max(1, int(total * warmup))
    return peak * min(step / rise, (total - step + 1) / (total - rise + 1))


def unlearning_order(n_forget: int, n_retain: int, recipe: "Unlearning"
                     ) -> list[tuple[list[int], list[int]]]:
    """For each update, the indices of its forget rows and of the retain rows drawn to go with them
    [D8], none if there are none. Epochs are permutations laid end to end and cut into full batches,
    as SOUL does."""
    rng, size = random.Random(recipe.seed), recipe.batch
    forget = [i for _ in range(recipe.epochs) for i in rng.sample(range(n_forget), n_forget)]
    count = len(forget) // size
    if not count:
        raise UserError(f"{n_forget} forget rows times {recipe.epochs} epochs do not fill one "
                        f"batch of {size}; lower --batch")
    retain = [rng.randrange(n_retain) for _ in range(count * size)] if n_retain else []
    return [(forget[i * size:(i + 1) * size], retain[i * size:(i + 1) * size])
            for i in range(count)]


def unlearn_loop(model: Transformer, forget: list[Encoded], retain: list[Encoded],
                 mask: Tensor | None, recipe: "Unlearning") -> list[dict]:
    """Step 2 (Section 2.2) with GradDiff on a float32 model, in place, as the paper writes it: one
    loss, dense m and h, M at its three points. Returns a log row per update. `unlearn` is fast."""
    order = unlearning_order(len(forget), len(retain), recipe)
    moving = mask_of_weights(model, mask, recipe)
    moments_of = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in moving}  # m, h
    optimiser, log = OPTIMISERS[METHODS[recipe.method].optimiser], []
    device = model.embed_tokens.weight.device
    for step, (f, r) in enumerate(order, 1):
        loss = graddiff_loss(model, collate([forget[i] for i in f], device),
                             collate([retain[i] for i in r], device), recipe.lam)
        grads = torch.autograd.grad(loss, list(moving))  # g_t of Eq. 4
        # The clip is over what moves: the gradient of a frozen row must not shorten the update.
        norm = torch.stack([(g if M is None else g * (M != 0)).norm()
                            for g, M in zip(grads, moving.values())]).norm()
        shrink = (recipe.clip / (norm + 1e-6)).clamp(max=1)
        lr = learning_rate(step, len(order), recipe.lr, recipe.warmup)
        for (p, M), grad in zip(moving.items(), grads):
            decay = recipe.weight_decay if p.dim() == 2 else 0.0  # none on norms and biases [D7]
            moments, weights = optimiser(recipe, lr, decay, step)
            masked_update(p.detach(), shrink * grad, *moments_of[p], moments=moments,
                          weights=weights, mask=M)
        log.append(dict(step=step, loss=loss.item(), lr=lr, grad_norm=norm.item()))
    return log


# ============================================================= Part 2: the same, fast
# --------------------------------------------------------- `attribute` for `attribute_loop`
# Why it is the same: under causal attention, what comes before a sample's last position does not
# depend on the scaled activation there. So one clean pass serves every sample of a pair with its
# keys and values, and a second stream holds just the last positions, all samples and nodes at once
# (test_attribute_equals_the_loop).


def attribute(model: Transformer, batch: Batch, *, steps: int = 5, path: str = "layer") -> Tensor:
    """attribute_loop summed over a batch of pairs: float32 [L, D], the same numbers to rounding.

    Costs about L*(m-1)/2 forward-backward passes per *pair*, however many tokens its answer has.
    path="neuron" costs D times that: for tiny models. UserError if no answer token is in batch."""
    check_path(steps, path)
    answer = batch.targets != IGNORE  # [B, T]
    if not answer.any():
        raise UserError("a batch without answer tokens has nothing to attribute")
    A = int(answer.sum(1).max())
    # Answer positions first, in order. Pairs with shorter answers are padded, their labels IGNORE.
    pos = answer.int().argsort(dim=1, descending=True, stable=True)[:, :A]  # [B, A]
    with frozen(model):
        clean = clean_pass(model, batch.ids, pos, batch.targets.gather(1, pos))
        scores = last_node(clean)  # j = m scales nothing, so one pass serves every layer
        if steps > 1:
            for l in range(len(model.layers)):
                scores[l] += lower_nodes(clean, l, steps, path)  # j = 1..m-1
    return scores / steps  # the 1/m of Eq. 2


@dataclass
class Clean:
    """The clean pass over B pairs, as the second stream needs it: where samples end, [B, A], and
    for each layer what it computed there, and its keys and values at all positions."""

    model: Transformer
    labels: Tensor  # [B, A], the token that follows each sample's prefix
    cos_sin: tuple[Tensor, Tensor]  # [B, A, hd], of the samples' last positions
    mask: Tensor  # [B, 1, A, T + A]: 0 at clean positions before and itself, else -inf
    x: Tensor  # [B, A, D], embeddings
    keys_values: list[tuple[Tensor, Tensor]]  # per layer, [B, K, T, hd]
    mid: list[Tensor]  # per layer [B, A, D], the residual stream after attention
    beta: list[Tensor]  # per layer [B, A, D], the neurons' activations


@torch.no_grad()
def clean_pass(model: Transformer, ids: Tensor, pos: Tensor, labels: Tensor) -> Clean:
    """The clean pass of ids [B, T], kept at the last positions pos [B, A] of the samples."""
    T, A = ids.shape[1], pos.shape[1]
    positions = torch.arange(T, device=ids.device)
    itself = torch.eye(A, dtype=torch.bool, device=ids.device).expand(len(pos), A, A)
    seen = torch.cat([positions < pos[..., None], itself], dim=2)  # [B, A, T + A]
    x, cos_sin = model.embed_tokens(ids), model.rope(positions)
    mask = x.new_zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None]

    def at_ends(x):  # [B, T, D] -> [B, A, D]
        return x.gather(1, pos[..., None].expand(-1, -1, x.shape[-1]))

    def attend(q, k, v):
        clean.keys_values.append((k, v))
        return causal_attention(q, k, v)

    clean = Clean(model, labels, model.rope(pos), mask, at_ends(x), [], [], [])
    for block in model.layers:
        x, beta = block.up_to_beta(x, *cos_sin, attend)
        clean.mid.append(at_ends(x))
        clean.beta.append(at_ends(beta))
        x = block.add_beta(x, beta)
    return clean


def up_to_beta(clean: Clean, l: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Block.up_to_beta of layer l for the second stream x [N, A, D], N = B * nodes of a path: each
    last position attends to the clean keys before it, and to its own."""
    nodes = len(x) // len(clean.labels)

    def of_nodes(y):  # [B, ...] -> [N, ...]
        return y.repeat_interleave(nodes, dim=0)

    def attend(q, k, v):  # q [N, H, A, hd], k and v [N, K, A, hd]
        keys, values = clean.keys_values[l]
        keys = torch.cat([of_nodes(keys), k], dim=2)  # [N, K, T + A, hd]
        values = torch.cat([of_nodes(values), v], dim=2)
        return attention(q, keys, values, of_nodes(clean.mask))

    cos, sin = clean.cos_sin
    return clean.model.layers[l].up_to_beta(x, of_nodes(cos), of_nodes(sin), attend)


def last_node(clean: Clean) -> Tensor:
    """beta * d log P / da at a = beta, every layer from one backward pass: float32 [L, D]."""
    with torch.enable_grad():
        x, activations = clean.x.detach().requires_grad_(), []
        for l, block in enumerate(clean.model.layers):
            x, a = up_to_beta(clean, l, x)
            activations.append(a)
            x = block.add_beta(x, a)
        grads = log_p_gradient(clean, x, activations)
    return torch.stack([(beta.float() * grad.float()).sum((0, 1))  # Eq. 2
                        for beta, grad in zip(clean.beta, grads)])


def lower_nodes(clean: Clean, l: int, steps: int, path: str) -> Tensor:
    """beta * d log P / da of layer l, summed over the nodes j = 1..m-1 of its path, or of the path
    of each of its neurons [D4]: float32 [D]."""
    beta, block = clean.beta[l][:, None, None], clean.model.layers[l]  # [B, 1, 1, A, D]
    B, _, _, A, D = beta.shape
    share = torch.arange(1, steps, device=beta.device, dtype=beta.dtype) / steps
    share = share[:, None, None]  # [J, 1, 1]
    scaled = torch.ones(1, D) if path == "layer" else torch.eye(D)  # [C, D], a row of 1 per path
    scores = torch.zeros(D, device=beta.device)
    for k in scaled.to(beta.device).bool().split(max(1, 4096 // max(1, B * A * (steps - 1)))):
        k = k[:, None, None]  # [C, 1, 1, D]
        with torch.enable_grad():
            a = torch.where(k, share * beta, beta).requires_grad_()  # [B, C, J, A, D], Eq. 1a
            x = block.add_beta(clean.mid[l][:, None, None], a).flatten(0, 2)  # [N, A, D]
            for u in range(l + 1, len(clean.model.layers)):
                x = clean.model.layers[u].add_beta(*up_to_beta(clean, u, x))
            grad, = log_p_gradient(clean, x, [a])
        scores += (k * beta.float() * grad.float()).sum((0, 1, 2, 3))  # Eq. 2
    return scores


def log_p_gradient(clean: Clean, x: Tensor, activations: list[Tensor]) -> tuple[Tensor, ...]:
    """d log P(label) / da (Eq. 1b) [D3], summed over samples, for the second stream x [N, A, D]
    that left the last layer. d log P(y) / d logits is 1 at y, minus P: three times as fast as
    autograd, and a few rows of logits, the largest tensors of all, are held at once."""
    model, hidden, grads = clean.model, clean.model.norm(x), []
    labels = clean.labels.repeat_interleave(len(x) // len(clean.labels), dim=0)  # [N, A]
    size = max(1, LOGITS // model.config.vocab_size)
    with torch.no_grad():
        for h, y in zip(hidden.flatten(0, 1).split(size), labels.flatten().split(size)):
            p = model.logits(h).softmax(-1)  # [size, V]
            p[torch.arange(len(y), device=y.device), y.clamp_min(0)] -= 1
            grads.append(p.to(h.dtype) @ model.head)
        grad = -torch.cat(grads).view_as(hidden).masked_fill(labels[..., None] == IGNORE, 0)
    return torch.autograd.grad(hidden, activations, grad)


def attribute_rows(model: Transformer, rows: list[Encoded], recipe: "Attribution", *,
                   title: str = "attribute", loop=None) -> Tensor:
    """Att of Eq. 2 summed over rows, in batches of like length: float32 [L, D]. loop: as in
    `train`."""
    device = model.embed_tokens.weight.device
    total = torch.zeros(len(model.layers), model.config.neuron_count, device=device)
    # Of m nodes, m - 1 run at once; the last is cheaper.
    batches = batches_by_length([len(r.ids) for r in rows],
                                recipe.attribution_tokens // max(1, recipe.steps - 1))
    with tqdm(total=len(rows), desc=title, unit="pair") as bar:
        for n in (loop or plain_loop)(title, len(batches), {"sum": total}):
            batch = collate([rows[i] for i in batches[n - 1]], device)
            total += attribute(model, batch, steps=recipe.steps, path=recipe.path)
            bar.update(sum(map(len, batches[:n])) - bar.n)
    need_finite_scores(total)
    return total


# -------------------------------------------------- an objective's gradient, for that of one loss
# Why it is the same: a gradient is linear, so GradDiff's is the sum of those of its summands, each
# taken in a pass that fits memory and freed before the next
# (test_two_passes_are_the_gradient_of_graddiff_loss).


def passes(model: Transformer, rows: list[Encoded], tokens: int) -> list[list[int]]:
    """Indices of the rows that go through the model together: at most so many tokens, and at most
    LOGITS logits unless one row has more."""
    lengths = [len(row.ids) for row in rows]
    most = max([LOGITS // model.config.vocab_size, *lengths])
    return batches_by_length(lengths, min(tokens, most))


def answer_tokens(rows: list[Encoded]) -> int:
    """How many tokens of the rows are predicted: their answers' and eos."""
    return sum(len(row.ids) - row.start for row in rows)


def nll_parts(model: Transformer, rows: list[Encoded], tokens: int):
    """Yields the summands of mean_nll(rows), one per pass of at most `tokens`."""
    for indices in passes(model, rows, tokens):
        part = [rows[i] for i in indices]
        batch = collate(part, model.embed_tokens.weight.device)
        yield mean_nll(model, batch) * (answer_tokens(part) / answer_tokens(rows))


# ------------------------------------------ only what moves [D9], for the masked update of it all
# Why it is the same: where M is 0, Eq. 5-7 leave weight and moments as they are, and where it is 1
# they are the plain update. So the critical rows can be separate weights, and neither gradient nor
# optimiser state of the frozen rows need ever exist (test_unlearn_equals_the_loop).


class CriticalRows(nn.Module):
    """Stands in for a matrix [O, I] of an MLP while only the rows (dim 0) or columns (dim 1) of its
    layer's critical neurons move, as the parameter `rows` [C, I] or [O, C]. Meanwhile these are 0
    in the matrix itself, so that two products add up to what the moved matrix gives. critical: M
    of the layer [D]; `mask` holds the values of a soft one, in a shape that broadcasts to rows."""

    def __init__(self, linear: nn.Linear, critical: Tensor, dim: int):
        super().__init__()
        device, index = linear.weight.device, critical.nonzero()[:, 0]  # [C]
        self.index, self.dim, self.mask = index.to(device), dim, None
        if critical.is_floating_point():
            self.mask = critical[index].unsqueeze(1 - dim).to(device)  # [C, 1] or [1, C]
        self.linear = linear.requires_grad_(False)
        self.rows = nn.Parameter(linear.weight.index_select(dim, self.index))
        linear.weight.index_fill_(dim, self.index, 0.0)

    def forward(self, x):
        if self.dim == 0:
            return self.linear(x).index_add(-1, self.index, F.linear(x, self.rows))
        return self.linear(x) + F.linear(x[..., self.index], self.rows)


@torch.no_grad()
def put_critical_rows(model: Transformer, mask: Tensor):
    """A CriticalRows in the place of each matrix that belongs to critical neurons."""
    neurons = NEURONS[model.config.neurons]
    matrices = [(name, 0) for name in neurons.rows] + [(name, 1) for name in neurons.columns]
    for block, M in zip(model.layers, mask):
        for name, dim in matrices if M.any() else ():
            setattr(block.mlp, name, CriticalRows(getattr(block.mlp, name), M, dim))


@torch.no_grad()
def restore_matrices(model: Transformer):
    """The matrices themselves again, with what became of their critical rows."""
    for block in model.layers:
        for name, module in list(block.mlp.named_children()):
            if isinstance(module, CriticalRows):
                module.linear.weight.index_copy_(module.dim, module.index, module.rows)
                setattr(block.mlp, name, module.linear)


@dataclass
class Moving:
    """A weight that moves, as the model reads it; its master, which is the weight itself unless
    the state has more precision [D10]; its moments; and the M of a soft mask, which broadcasts."""

    name: str
    weight: nn.Parameter
    master: Tensor
    m: Tensor
    h: Tensor
    mask: Tensor | None = None


@contextmanager
def moving_weights(model: Transformer, recipe: "Unlearning", mask: Tensor | None,
                   state: torch.dtype = torch.float32):
    """The weights that recipe.method moves, as a list of Moving; all others are frozen meanwhile.
    mask [L, D], of a masked method: the rows of down_proj where it is not zero move [D9]. state:
    the dtype of moments, and of masters unless the model has more precision."""
    required = {p: p.requires_grad for p in model.parameters()}
    moving = []
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(MOVES[moves_of(recipe)](name))
        if METHODS[recipe.method].masked:
            need_mask(model, recipe, mask)
            put_critical_rows(model, mask)
        masks = {x.rows: x.mask for x in model.modules() if isinstance(x, CriticalRows)}
        for name, p in model.named_parameters():
            if p.requires_grad:
                master = p.detach().to(torch.promote_types(p.dtype, state))
                m, h = torch.zeros_like(master, dtype=state), torch.zeros_like(master, dtype=state)
                moving.append(Moving(name, p, master, m, h, masks.get(p)))
        if not moving:
            raise UserError(f"method {recipe.method} moves nothing here: the mask is empty and "
                            "attention frozen; lower the threshold or let attention move")
        yield moving
    finally:
        restore_matrices(model)
        for p, value in required.items():
            p.requires_grad_(value)


def write_masters(moving: list[Moving]):
    """Round the masters into the weights that the model reads."""
    for w in moving:
        if w.weight.dtype != w.master.dtype:  # else the weight is its master
            w.weight.data.copy_(w.master)


@torch.no_grad()
def apply_updates(moving: list[Moving], optimiser: Callable, recipe: "Unlearning", *, lr: float,
                  step: int, shrink: float) -> Tensor:
    """masked_update of every master, with its weight's gradient times `shrink`; the gradient is
    freed. Returns the number of clipped coordinates."""
    clipped = 0
    for w in moving:
        decay = recipe.weight_decay if w.weight.dim() == 2 else 0.0  # none on norms and biases [D7]
        moments, weights = optimiser(recipe, lr, decay, step)
        grad, w.weight.grad = shrink * w.weight.grad.float(), None
        clipped += masked_update(w.master, grad, w.m, w.h, moments=moments, weights=weights,
                                 mask=w.mask)
    return clipped


# ------------------------------------------------------------- `unlearn` for `unlearn_loop`


def plain_loop(title: str, total: int, tensors: dict[str, Tensor]):
    """Update numbers from 1. A loop that resumes (pipeline/stage.py) fills `tensors`, which are
    all that the updates change, and starts at a later one; it must draw nothing at random."""
    yield from range(1, total + 1)


def train(model: Transformer, moving: list[Moving], batches: list[tuple], objective: "Objective",
          recipe: "Unlearning", *, title: str, loop=None, record=None, apply=None) -> list[dict]:
    """One update per batch (forget rows, retain rows, known) by objective.losses. Returns a log row
    per update, also handed to record(row). loop, apply: in place of plain_loop, apply_updates. All
    that an update takes depends on its number alone: `loop` may start at any, and end early."""
    tensors = {f"{w.name}.{k}": getattr(w, k) for w in moving for k in ("master", "m", "h")}
    total, count, log = len(batches), sum(w.master.numel() for w in moving), []
    optimiser = OPTIMISERS[METHODS[recipe.method].optimiser]
    with tqdm(total=total, desc=title) as bar:
        for step in (loop or plain_loop)(title, total, tensors):
            write_masters(moving)  # `loop` may have filled them
            losses = Counter()
            for name, loss, logged in objective.losses(model, *batches[step - 1], recipe):
                loss.backward()
                losses[name] += logged.detach()
            for w in moving:
                if w.weight.grad is None:  # the loss does not reach it
                    w.weight.grad = torch.zeros_like(w.weight)
            norms = torch._foreach_norm([w.weight.grad for w in moving], dtype=torch.float32)
            norm = torch.stack(norms).norm().item()
            losses = {name: value.item() for name, value in losses.items()}
            if not all(map(math.isfinite, (norm, *losses.values()))):
                raise UserError(f"{title}: loss or gradient is not finite at update {step} of "
                                f"{total}; lower --lr (now {recipe.lr:g})")
            shrink = min(1.0, recipe.clip / (norm + 1e-6))
            lr = learning_rate(step, total, recipe.lr, recipe.warmup)
            clipped = (apply or apply_updates)(moving, optimiser, recipe, lr=lr, step=step,
                                               shrink=shrink)
            write_masters(moving)
            log.append(dict(step=step, **losses, lr=lr, grad_norm=norm,
                            clipped=int(clipped) / count))
            bar.set_postfix({k: f"{v:.3f}" for k, v in losses.items()}, refresh=False)
            bar.update(step - bar.n)
            if record:
                record(log[-1])
    if not all(torch.isfinite(w.master).all() for w in moving):
        raise UserError(f"{title}: weights are not finite after the last update; "
                        f"lower --lr (now {recipe.lr:g})")
    return log


def unlearn(model: Transformer, forget: list[Encoded], retain: list[Encoded],
            mask: Tensor | None, recipe: "Unlearning", *, targets: list | float | None = None,
            title: str = "unlearn", loop=None, record=None, apply=None,
            state: torch.dtype = torch.float32) -> list[dict]:
    """Step 2 (Section 2.2) on model, in place: recipe.method with recipe.objective; returns the
    log, a row per update. mask [L, D]: for masked methods. targets: for objectives with an end, the
    loss to reach, or of each forget row a loss or one per token. UserError where a loss is not
    finite or the rows do not fill a batch. Equal to `unlearn_loop` (test_unlearn_equals_the_loop).
    loop, record, apply: as in `train`; state: as in `moving_weights`, with an `apply` that rounds
    stochastically to it [D10]."""
    order = unlearning_order(len(forget), len(retain), recipe)
    objective = OBJECTIVES[recipe.objective]
    if objective.targeted and targets is None:
        raise UserError(f"objective {recipe.objective} needs targets: the loss that each forget "
                        "row is to reach")
    if objective.retains and recipe.lam and not retain:
        raise UserError(f"objective {recipe.objective} needs retain rows; give some, or lam = 0")
    if isinstance(targets, (int, float)):
        targets = [targets] * len(forget)
    known, known_retain = [None] * len(forget), [None] * len(retain)
    with torch.no_grad():
        if objective.known:
            known = objective.known(model, forget, targets, recipe)
        if objective.known_retain:
            known_retain = objective.known_retain(model, retain, recipe)
    model.checkpoint = recipe.checkpointing
    batches = [([forget[i] for i in f], [retain[i] for i in r],
                ([known[i] for i in f], [known_retain[i] for i in r])) for f, r in order]
    with moving_weights(model, recipe, mask, state) as moving:
        log = train(model, moving, batches, objective, recipe, title=title, loop=loop,
                    record=record, apply=apply)
    # Finite weights can compute infinite losses. Each update's loss checks the update before it;
    # some rows, spread over all, check the last one.
    for row in forget[::max(1, len(forget) // 8)]:
        with torch.no_grad():
            nll = mean_nll(model, collate([row], model.embed_tokens.weight.device))
        if not nll.isfinite():
            raise UserError(f"{title}: the model's losses are not finite after the last update; "
                            f"lower --lr (now {recipe.lr:g})")
    return log


# ============================================================= Tables: a fork adds a row
# ------------------------------------------------------------------------------- masks

# M from forget and retain scores, t and seed. dual keeps neurons that are critical for both sets
# [D6]. pipeline/objectives.py adds others.
MASKS = {
    "dual": lambda forget, retain, t, seed: critical_mask(forget, t),
    "forget-only": lambda forget, retain, t, seed: (critical_mask(forget, t)
                                                    & ~critical_mask(retain, t)),
}


def make_mask(kind: str, forget: Tensor, retain: Tensor, *, threshold: float, seed: int) -> Tensor:
    """M [L, D], a row of MASKS, from forget and retain scores [L, D]: bool, soft float32."""
    return MASKS[kind](forget, retain, threshold, seed)


# -------------------------------------------------------------------------- objectives


@dataclass(frozen=True)
class Objective:
    """The loss of an update, in summands.

    losses(model, forget rows, retain rows, known, recipe) yields (name, summand, value): `train`
    back-propagates and frees each summand before it asks for the next, and logs the sum of values
    by name. known: for the forget and for the retain rows, what `known` and `known_retain` gave of
    each, or None."""

    losses: Callable
    known: Callable | None = None  # (model, rows, targets, recipe) -> list, before the model moves
    known_retain: Callable | None = None  # (model, rows, recipe) -> list
    targeted: bool = False  # needs the `targets` of unlearn
    retains: bool = True  # needs retain rows, unless lam = 0
    about: str = ""


def graddiff(model, forget, retain, known, recipe):
    """graddiff_loss (A.1)."""
    for nll in nll_parts(model, forget, recipe.micro_tokens):
        yield "loss_forget", -nll, nll
    yield from descent(model, forget, retain, known, recipe)


def ascent(model, forget, retain, known, recipe):
    """Its first half, on the forget rows."""
    yield from graddiff(model, forget, [], known, recipe)


def descent(model, forget, retain, known, recipe):
    """Its second half, on the retain rows."""
    for nll in nll_parts(model, retain if recipe.lam else [], recipe.micro_tokens):
        yield "loss_retain", recipe.lam * nll, nll


def retain_alone(model, forget, retain, known, recipe):
    for nll in nll_parts(model, retain, recipe.micro_tokens):
        yield "loss_retain", nll, nll


OBJECTIVES = {  # pipeline/objectives.py adds others
    "graddiff": Objective(graddiff, about="ascent on forget, descent on retain rows (A.1)"),
    "ga": Objective(ascent, retains=False, about="ascent on forget rows alone"),
    "retain": Objective(retain_alone, about="descent on retain rows alone"),
}


# ============================================================= Settings and Tables 3-4

@dataclass(frozen=True, kw_only=True)
class Common:
    """What every step takes."""

    seed: int = option(0, "seeds every draw: slice, initial weights, order, pairing", low=0)
    neurons: str = option("output", "of a layer's MLP: its outputs [D1], or what down_proj reads",
                          choices=NEURONS)


@dataclass(frozen=True, kw_only=True)
class Attribution(Common):
    """Step 1, scores (Section 2.1)."""

    steps: int = option(5, "m: nodes on the path from 0 to beta (Eq. 1)", low=1, high=1000)
    path: str = option("layer", "scale a layer's outputs together, or one neuron at a time [D4]",
                       choices=PATHS)
    attribution_tokens: int = option(4096, "tokens in one attribution pass, path nodes counted in",
                                     low=1)


@dataclass(frozen=True, kw_only=True)
class Masking(Common):
    """Step 1, mask (Section 2.1)."""

    threshold: float = option(0.3, "t: critical if Att > t * max of the layer", above=0, high=1)
    mask: str = option("dual", "dual keeps neurons critical for both sets [D6], forget-only drops, "
                       "soft weighs them; random: of equal size; none: attention only; all: no "
                       "mask on down_proj", choices=MASKS)


@dataclass(frozen=True, kw_only=True)
class Unlearning(Common):
    """Step 2 (Section 2.2)."""

    method: str = option("simu", "fo: AdamW on all weights; so: Sophia on all; simu: Sophia on "
                         "attention and critical rows", choices=METHODS)
    objective: str = option("graddiff", "what each row's loss is", choices=OBJECTIVES)
    attention: str = option("moving", "of masked methods: frozen follows the sentence after Eq. 7 "
                            "[D9]", choices=("moving", "frozen"))
    lr: float = option(5e-6, "eta: peak learning rate", above=0)
    epochs: int = option(5, "passes over the forget set", low=1)
    batch: int = option(16, "forget rows per update, each with one retain row", low=1)
    micro_tokens: int = option(8192, "tokens in one forward-backward pass; a batch is cut to fit",
                               low=1)
    lam: float = option(2.0, "lambda: weight of the retain loss", low=0)
    beta1: float = option(0.9, "of the first moment (Eq. 4)", low=0, below=1)
    beta2: float = option(0.95, "of the curvature (Eq. 4)", low=0, below=1)
    gamma: float = option(204.8, "damping (Eq. 3): SOUL's rho * bs = 0.04 * 5120 [D7]", above=0)
    eps: float = option(1e-15, "floor of gamma * H (Eq. 3)", above=0)
    adam_beta2: float = option(0.999, "AdamW's second moment (FO-GradDiff)", low=0, below=1)
    adam_eps: float = option(1e-8, "AdamW's epsilon (FO-GradDiff)", above=0)
    weight_decay: float = option(0.1, "decoupled, none on norms [D7]", low=0)
    clip: float = option(1.0, "largest gradient norm over the weights that move", above=0)
    warmup: float = option(0.1, "share of updates with rising learning rate", low=0, below=1)
    checkpointing: bool = option(False, "recompute activations in the backward pass")


@dataclass(frozen=True, kw_only=True)
class Recipe(Attribution, Masking, Unlearning):
    """All of both steps. dataclasses.replace(recipe, method="so", lr=1e-5) varies one."""


# Tables 3 and 4, to be laid beside the paper:
#                           t  m  batch    lr   epochs FO, SO, SIMU  lambda FO, SO, SIMU
TABLES_3_AND_4 = {
    ("tofu", "llama2-7b"): (0.3, 5, 16, 5e-6, (5, 5, 5), (0.3, 2.0, 2.0)),
    ("tofu", "olmo-1b"): (0.1, 5, 16, 5e-6, (20, 20, 20), (0.3, 2.0, 2.0)),
    ("lume", "llama2-7b"): (0.1, 3, 16, 9e-6, (20, 20, 20), (0.3, 2.0, 2.0)),
    ("lume", "olmo-1b"): (0.3, 5, 16, 5e-6, (5, 10, 10), (0.3, 2.0, 2.0)),
}


def paper_recipe(benchmark: str, model: str, method: str = "simu") -> Recipe:
    """The paper's recipe of a cell; a method that the paper does not have takes SIMU's column."""
    t, m, batch, lr, epochs, lam = TABLES_3_AND_4[benchmark, model]
    column = {"fo": 0, "so": 1}.get(method, 2)
    return Recipe(threshold=t, steps=m, batch=batch, lr=lr, method=method, epochs=epochs[column],
                  lam=lam[column])


RECIPES = {cell: paper_recipe(*cell) for cell in TABLES_3_AND_4}
