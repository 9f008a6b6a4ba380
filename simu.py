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
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import IGNORE, Batch, Encoded, batches_by_length, collate, option
from model import NEURONS, Transformer, UserError, attention, causal_attention

LOGITS = 1 << 25  # logits held at once, the largest tensors there are: 128 MiB of float32
PATHS = ("layer", "neuron")

# ==================================================================== Part 1: the method
# ----------------------------------------------------- Step 1: attribution (Eq. 1-2)


def check_path(steps: int, path: str):
    if steps < 1 or path not in PATHS:
        raise UserError(f"steps m = {steps} and path {path!r}: m must be at least 1, and path "
                        f"{' or '.join(PATHS)}")


def path_node(model: Transformer, prefix: list[int], label: int, l: int, neurons: slice,
              share: float) -> tuple[Tensor, Tensor]:
    """beta [D] of layer l at the prefix's last position, and d log P(label | prefix) / da [D] where
    these neurons are scaled to a = share * beta, share = j / m (Eq. 1) [D3]."""
    mlp, activations = model.layers[l].mlp, {}

    def scale(y):  # [1, T, D]
        activations["beta"] = y[0, -1].detach()
        a = activations["beta"].clone()
        a[neurons] *= share  # Eq. 1a
        activations["a"] = a.requires_grad_()
        return torch.cat([y[:, :-1], a[None, None]], dim=1)  # only the last position

    mlp.intervene = scale
    try:
        with torch.enable_grad():  # whatever the caller has set
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
    for i in range(encoded.start, len(encoded.ids)):  # sample i: predict token i
        prefix, label = encoded.ids[:i], encoded.ids[i]
        for l in range(len(model.layers)):
            for neurons in scaled_together:
                for j in range(1, steps + 1):
                    beta, grad = path_node(model, prefix, label, l, neurons, j / steps)
                    scores[l, neurons] += beta[neurons] * grad[neurons] / steps  # Eq. 2
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


def sophia(recipe: "Unlearning", lr: float, weight_decay: float, step: int):
    """Rules of an update: moments(grad, m, h) -> new m, h; weights(param, m, h) -> new param, and
    how many coordinates were clipped. step, the update's number from 1, is not needed here."""
    beta1, beta2, gamma, eps = recipe.beta1, recipe.beta2, recipe.gamma, recipe.eps

    def moments(grad: Tensor, m: Tensor, h: Tensor):
        """Eq. 4: one EMA of g and one of g^2, both at every update [D7]."""
        return beta1 * m + (1 - beta1) * grad, beta2 * h + (1 - beta2) * grad.square()

    def weights(param: Tensor, m: Tensor, h: Tensor):
        """Eq. 3 with decoupled decay."""
        ratio = m / (gamma * h).clamp_min(eps)
        return param * (1 - lr * weight_decay) - lr * ratio.clamp(-1, 1), (ratio.abs() >= 1).sum()

    return moments, weights


def blend(mask: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """M * new + (1 - M) * old. Where M is 0 it is old itself: 0 * new is not 0 if new overflows."""
    if mask is None:
        return new
    mask = mask.to(new)  # its dtype and device
    return torch.where(mask == 0, old, mask * new + (1 - mask) * old)


def masked_update(param: Tensor, grad: Tensor, m: Tensor, h: Tensor, rules: tuple,
                  mask: Tensor | None) -> Tensor:
    """One update in place, by the rules that a row of OPTIMISERS gives, the mask at the three
    points of Eq. 5-7. Returns the number of clipped coordinates. All tensors have one shape; mask
    broadcasts to it, with real values in [0, 1]."""
    moments, weights = rules
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
    from a model and its recipe. The loops below call masked_update themselves."""
    recipe = Unlearning(beta1=beta1, beta2=beta2, gamma=gamma, eps=eps)
    return masked_update(param, grad, m, h, sophia(recipe, lr, weight_decay, step=1), mask)


def adamw(recipe: "Unlearning", lr: float, weight_decay: float, step: int):
    """FO-GradDiff's rules. AdamW clips nothing."""
    beta1, beta2 = recipe.beta1, recipe.adam_beta2

    def moments(grad: Tensor, m: Tensor, h: Tensor):
        return m.lerp(grad, 1 - beta1), (h * beta2).addcmul(grad, grad, value=1 - beta2)

    def weights(param: Tensor, m: Tensor, h: Tensor):
        root = (h / (1 - beta2 ** step)).sqrt().add(recipe.adam_eps)
        new = (param * (1 - lr * weight_decay)).addcdiv(m, root, value=-lr / (1 - beta1 ** step))
        return new, torch.zeros((), dtype=torch.int64, device=param.device)

    return moments, weights


OPTIMISERS = {"sophia": sophia, "adamw": adamw}

# -------------------------------------------------- Step 2: what moves (Section 2.2) [D9]

# Weights that move with all their values, by name. A masked method moves rows of down_proj too.
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


def mask_of_weights(model: Transformer, mask: Tensor | None, recipe: "Unlearning") -> dict:
    """What moves: weight -> M in a shape that broadcasts to it, or None if all of it moves."""
    moving = {p: None for name, p in model.named_parameters() if MOVES[moves_of(recipe)](name)}
    if METHODS[recipe.method].masked:
        if mask is None or mask.shape != (len(model.layers), model.config.neuron_count):
            raise UserError(f"method {recipe.method} needs a mask of one value per layer and "
                            "neuron; make_mask gives one")
        neurons = NEURONS[model.config.neurons]  # by default the rows of down_proj [D1]
        for block, M in zip(model.layers, mask):
            moving |= {getattr(block.mlp, name).weight: M[:, None] for name in neurons.rows}
            moving |= {getattr(block.mlp, name).weight: M[None] for name in neurons.columns}
    return moving


# --------------------------------------------------------------------- Step 2: the loop


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear rise over a share `warmup` of the updates, then linear decay. step counts from 1."""
    rise = max(1, int(total * warmup))
    return peak * min(step / rise, (total - step + 1) / (total - rise + 1))


def unlearning_order(n_forget: int, n_retain: int, recipe: "Unlearning") -> list[tuple[list, list]]:
    """For each update, the indices of its forget rows and of the retain rows drawn to go with them
    [D8]. Epochs are permutations laid end to end and cut into full batches, as SOUL does."""
    rng, B = random.Random(recipe.seed), recipe.batch
    forget = [i for _ in range(recipe.epochs) for i in rng.sample(range(n_forget), n_forget)]
    starts = range(0, len(forget) - B + 1, B)
    if not starts:
        raise UserError(f"{n_forget} forget rows times {recipe.epochs} epochs do not fill one "
                        f"batch of {B}; lower --batch")
    retain = [rng.randrange(n_retain) for _ in range(len(starts) * B)] if n_retain else []
    return [(forget[i:i + B], retain[i:i + B]) for i in starts]


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
        norm = torch.stack([(g if M is None else g * (M.to(g) != 0)).norm()
                            for g, M in zip(grads, moving.values())]).norm()
        shrink = (recipe.clip / (norm + 1e-6)).clamp(max=1)
        lr = learning_rate(step, len(order), recipe.lr, recipe.warmup)
        for (p, M), grad in zip(moving.items(), grads):
            decay = recipe.weight_decay if p.dim() == 2 else 0.0  # none on norms and biases [D7]
            rules = optimiser(recipe, lr, decay, step)
            masked_update(p.detach(), shrink * grad, *moments_of[p], rules, M)
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
    path="neuron" costs D times that: for tiny models. UserError without an answer token."""
    check_path(steps, path)
    answer = batch.targets != IGNORE  # [B, T]
    if not answer.any():
        raise UserError("a batch without answer tokens has nothing to attribute")
    A = int(answer.sum(1).max())
    # Answer positions first, in order. Pairs with shorter answers are padded, their labels IGNORE.
    pos = answer.int().argsort(dim=1, descending=True, stable=True)[:, :A]  # [B, A]
    with trainable(model, set()):
        clean = Clean(model, batch.ids, pos, batch.targets.gather(1, pos))
        scores = last_node(clean)  # j = m scales nothing, so one pass serves every layer
        if steps > 1:
            for l in range(len(model.layers)):
                scores[l] += lower_nodes(clean, l, steps, path)  # j = 1..m-1
    return scores / steps  # the 1/m of Eq. 2


@contextmanager
def trainable(model: Transformer, wanted: set):
    """Only the `wanted` weights require gradients while the block runs."""
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in before:
            p.requires_grad_(p in wanted)
        yield
    finally:
        for p, required in before.items():
            p.requires_grad_(required)


class Clean:
    """The clean pass over ids [B, T], as a second stream needs it, which holds the last positions
    pos [B, A] of all samples alone; labels [B, A]: the token after each, or IGNORE."""

    @torch.no_grad()
    def __init__(self, model: Transformer, ids: Tensor, pos: Tensor, labels: Tensor):
        def at_ends(x):  # [B, T, D] -> [B, A, D]
            return x.gather(1, pos[..., None].expand(-1, -1, x.shape[-1]))

        def attend(q, k, v):
            self.keys_values.append((k, v))
            return causal_attention(q, k, v)

        positions, A = torch.arange(ids.shape[1], device=ids.device), pos.shape[1]
        x, cos_sin = model.embed_tokens(ids), model.rope(positions)
        self.model, self.labels, self.cos_sin, self.x = model, labels, model.rope(pos), at_ends(x)
        # A last position sees the clean positions before it, and itself: [B, 1, A, T + A].
        itself = torch.eye(A, dtype=torch.bool, device=ids.device).expand(len(pos), A, A)
        seen = torch.cat([positions < pos[..., None], itself], dim=2)
        self.mask = x.new_zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None]
        # Per layer: keys and values [B, K, T, hd]; the residual stream after attention, and beta,
        # at the last positions [B, A, D].
        self.keys_values, self.mid, self.beta = [], [], []
        for block in model.layers:
            x, beta = block.up_to_beta(x, *cos_sin, attend)
            self.mid.append(at_ends(x))
            self.beta.append(at_ends(beta))
            x = block.add_beta(x, beta)

    def up_to_beta(self, l: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Block.up_to_beta of layer l for the second stream x [N, A, D], N = B * nodes of a path:
        each last position attends to the clean keys before it, and to its own."""
        nodes = len(x) // len(self.labels)

        def of_nodes(y):  # [B, ...] -> [N, ...]
            return y.repeat_interleave(nodes, dim=0)

        def attend(q, k, v):  # q [N, H, A, hd], k and v [N, K, A, hd]
            keys, values = self.keys_values[l]
            keys = torch.cat([of_nodes(keys), k], dim=2)  # [N, K, T + A, hd]
            values = torch.cat([of_nodes(values), v], dim=2)
            return attention(q, keys, values, of_nodes(self.mask))

        return self.model.layers[l].up_to_beta(x, *map(of_nodes, self.cos_sin), attend)

    def log_p_gradient(self, x: Tensor, activations: list[Tensor]) -> tuple[Tensor, ...]:
        """d log P(label) / da (Eq. 1b) [D3], summed over samples, for the second stream x [N, A, D]
        that left the last layer. d log P(y) / d logits is 1 at y, minus P: three times as fast as
        autograd, and a few rows of logits, the largest tensors of all, are held at once."""
        model, hidden, grads = self.model, self.model.norm(x), []
        labels = self.labels.repeat_interleave(len(x) // len(self.labels), dim=0)  # [N, A]
        size = max(1, LOGITS // model.config.vocab_size)
        with torch.no_grad():
            for h, y in zip(hidden.flatten(0, 1).split(size), labels.flatten().split(size)):
                p = model.logits(h).softmax(-1)  # [size, V]
                p[torch.arange(len(y), device=y.device), y.clamp_min(0)] -= 1
                grads.append(p.to(h.dtype) @ model.head)
            grad = -torch.cat(grads).view_as(hidden).masked_fill(labels[..., None] == IGNORE, 0)
        return torch.autograd.grad(hidden, activations, grad)


def last_node(clean: Clean) -> Tensor:
    """beta * d log P / da at a = beta, every layer from one backward pass: float32 [L, D]."""
    with torch.enable_grad():
        x, activations = clean.x.detach().requires_grad_(), []
        for l, block in enumerate(clean.model.layers):
            x, a = clean.up_to_beta(l, x)
            activations.append(a)
            x = block.add_beta(x, a)
        grads = clean.log_p_gradient(x, activations)
    return torch.stack([(beta.float() * grad.float()).sum((0, 1))  # Eq. 2
                        for beta, grad in zip(clean.beta, grads)])


def lower_nodes(clean: Clean, l: int, steps: int, path: str) -> Tensor:
    """beta * d log P / da of layer l, summed over the nodes j = 1..m-1 of its path, or of the path
    of each of its neurons [D4]: float32 [D]."""
    beta, mid, block = clean.beta[l], clean.mid[l][:, None, None], clean.model.layers[l]
    B, A, D = beta.shape
    beta = beta[:, None, None]  # [B, 1, 1, A, D]
    share = torch.arange(1, steps, device=beta.device, dtype=beta.dtype) / steps
    share = share[:, None, None]  # [J, 1, 1]
    paths = (torch.ones(1, D) if path == "layer" else torch.eye(D)).to(beta.device)
    scores = torch.zeros(D, device=beta.device)
    for scaled in paths.bool().split(max(1, 4096 // (B * A * (steps - 1)))):
        scaled = scaled[:, None, None]  # [C, 1, 1, D], the neurons that each path scales
        with torch.enable_grad():
            a = torch.where(scaled, share * beta, beta).requires_grad_()  # [B, C, J, A, D], Eq. 1a
            x = block.add_beta(mid, a).flatten(0, 2)  # [N, A, D]
            for u in range(l + 1, len(clean.model.layers)):
                x = clean.model.layers[u].add_beta(*clean.up_to_beta(u, x))
            grad, = clean.log_p_gradient(x, [a])
        scores += (scaled * beta.float() * grad.float()).sum((0, 1, 2, 3))  # Eq. 2
    return scores


def attribute_rows(model: Transformer, rows: list[Encoded], recipe: "Attribution", *,
                   title: str = "attribute", loop=None) -> Tensor:
    """Att of Eq. 2 summed over rows, in batches of like length: float32 [L, D]. loop: as in
    `train`."""
    device = model.embed_tokens.weight.device
    total = torch.zeros(len(model.layers), model.config.neuron_count, device=device)
    # Of m nodes, m - 1 run at once; the last is cheaper.
    batches = batches_by_length([len(row.ids) for row in rows],
                                recipe.attribution_tokens // max(1, recipe.steps - 1))
    count = len(batches)
    numbers = loop(title, count, {"sum": total}) if loop else range(1, count + 1)
    for number in tqdm(numbers, desc=title, total=count):
        batch = collate([rows[i] for i in batches[number - 1]], device)
        total += attribute(model, batch, steps=recipe.steps, path=recipe.path)
    need_finite_scores(total)
    return total


# ---------------------------------------------------------- summands, for the loss as one
# Why it is the same: a gradient is linear, so GradDiff's is the sum of those of its summands, each
# from a pass that fits memory (test_the_summands_are_the_gradient_of_graddiff_loss).


def passes(model: Transformer, rows: list[Encoded], tokens: int) -> list[list[int]]:
    """Indices of the rows that go through the model together: at most so many tokens, and at most
    LOGITS logits unless one row has more."""
    lengths = [len(row.ids) for row in rows]
    return batches_by_length(lengths, min(tokens, LOGITS // model.config.vocab_size))


def answer_tokens(rows: list[Encoded]) -> int:
    """How many tokens of the rows are predicted: their answers' and eos."""
    return sum(len(row.ids) - row.start for row in rows)


def nll_parts(model: Transformer, rows: list[Encoded], tokens: int):
    """Yields the summands of mean_nll(rows), one per pass of at most `tokens`."""
    for indices in passes(model, rows, tokens):
        part = [rows[i] for i in indices]
        batch = collate(part, model.embed_tokens.weight.device)
        yield mean_nll(model, batch) * (answer_tokens(part) / answer_tokens(rows))


# ------------------------------------------ only what moves, for the masked update of it all
# Why it is the same: where M is 0, Eq. 5-7 leave weight and moments as they are, and where it is 1
# they are the plain update. So the critical rows can be separate weights, and neither gradient nor
# optimiser state of the frozen rows need ever exist (test_unlearn_equals_the_loop).


class CriticalRows(nn.Module):
    """Stands in for a matrix [O, I] while only those of its rows (dim 0), or columns (dim 1), move
    where M [O, 1], or [1, I], is not 0: the parameter `rows` [C, I], or [O, C]. Meanwhile these are
    0 in the matrix itself, so that the two products add up. mask: a soft M of the rows."""

    def __init__(self, linear: nn.Linear, M: Tensor):
        super().__init__()
        self.linear, self.dim = linear.requires_grad_(False), int(M.shape[0] == 1)
        index = M.flatten().nonzero()[:, 0]  # [C]
        soft = M.index_select(self.dim, index) if M.is_floating_point() else None
        self.mask, self.index = soft, index.to(linear.weight.device)
        self.rows = nn.Parameter(linear.weight.detach().index_select(self.dim, self.index))
        linear.weight.detach().index_fill_(self.dim, self.index, 0.0)

    def forward(self, x):
        if self.dim == 0:
            return self.linear(x).index_add(-1, self.index, F.linear(x, self.rows))
        return self.linear(x) + F.linear(x[..., self.index], self.rows)


@contextmanager
def critical_rows(model: Transformer, masks: dict):
    """CriticalRows in place of the matrices of which only some rows move, while the block runs."""
    stand_ins = []
    try:
        for block in model.layers:
            for name, linear in list(block.mlp.named_children()):
                M = masks.get(linear.weight)
                if M is not None and M.any():
                    stand_ins.append((block.mlp, name, CriticalRows(linear, M)))
                    setattr(*stand_ins[-1])
        yield [module for *_, module in stand_ins]
    finally:
        for mlp, name, module in stand_ins:
            module.linear.weight.detach().index_copy_(module.dim, module.index, module.rows)
            setattr(mlp, name, module.linear)


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
    masks = mask_of_weights(model, mask, recipe)
    everywhere, moving = {p for p, M in masks.items() if M is None}, []
    with trainable(model, everywhere), critical_rows(model, masks) as modules:
        soft = {module.rows: module.mask for module in modules}
        for name, p in model.named_parameters():
            if p.requires_grad:
                master = p.detach().to(torch.promote_types(p.dtype, state))
                m, h = torch.zeros_like(master, dtype=state), torch.zeros_like(master, dtype=state)
                moving.append(Moving(name, p, master, m, h, soft.get(p)))
        if not moving:
            raise UserError(f"method {recipe.method} moves nothing here: the mask is empty and "
                            "attention frozen; lower the threshold or let attention move")
        yield moving


@torch.no_grad()
def apply_updates(moving: list[Moving], optimiser: Callable, recipe: "Unlearning", *, lr: float,
                  step: int, shrink: float) -> Tensor:
    """masked_update of every master, with its weight's gradient times `shrink`; the gradient is
    freed. Returns the number of clipped coordinates."""
    clipped = 0
    for w in moving:
        decay = recipe.weight_decay if w.weight.dim() == 2 else 0.0  # none on norms and biases [D7]
        grad, w.weight.grad = shrink * w.weight.grad.float(), None
        rules = optimiser(recipe, lr, decay, step)
        clipped += masked_update(w.master, grad, w.m, w.h, rules, w.mask)
    return clipped


def write_masters(moving: list[Moving]):
    """Round the masters into the weights that the model reads. One of a weight's own dtype is that
    weight, and copying it onto itself would cost each update two passes over the model."""
    for w in moving:
        if w.weight.dtype != w.master.dtype:
            w.weight.data.copy_(w.master)


# ------------------------------------------------------------- `unlearn` for `unlearn_loop`


def train(model: Transformer, moving: list[Moving], batches: list[tuple], objective: "Objective",
          recipe: "Unlearning", *, title: str, loop=None, record=None, apply=None) -> list[dict]:
    """One update per batch (forget rows, retain rows, known) by objective.losses. Returns a log row
    per update, also handed to record(row). apply: in place of apply_updates. loop(title, total,
    tensors): gives update numbers, from 1 to total unless it ends early, or goes on from a later
    one with tensors, all that updates change, filled. It must draw nothing at random: all else that
    an update takes depends on its number."""
    tensors = {f"{w.name}.{k}": getattr(w, k) for w in moving for k in ("master", "m", "h")}
    total, count, log = len(batches), sum(w.master.numel() for w in moving), []
    optimiser = OPTIMISERS[METHODS[recipe.method].optimiser]
    numbers = loop(title, total, tensors) if loop else range(1, total + 1)
    for step in tqdm(numbers, desc=title, total=total):
        if not log:  # `loop` may have filled the masters
            write_masters(moving)
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
            raise UserError(f"{title}: loss or gradient is not finite at update {step} of {total}; "
                            f"lower --lr (now {recipe.lr:g})")
        shrink = min(1.0, recipe.clip / (norm + 1e-6))
        lr = learning_rate(step, total, recipe.lr, recipe.warmup)
        clipped = (apply or apply_updates)(moving, optimiser, recipe, lr=lr, step=step,
                                           shrink=shrink)
        write_masters(moving)
        log.append(dict(step=step, **losses, lr=lr, grad_norm=norm, clipped=int(clipped) / count))
        if record:
            record(log[-1])
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
    known, known_retain = [None] * len(forget), [None] * len(retain)
    with torch.no_grad():
        if objective.known:
            known = objective.known(model, forget, targets, recipe)
        if objective.known_retain:
            known_retain = objective.known_retain(model, retain, recipe)
    batches = [([forget[i] for i in f], [retain[i] for i in r],
                ([known[i] for i in f], [known_retain[i] for i in r])) for f, r in order]
    model.checkpoint = recipe.checkpointing
    with moving_weights(model, recipe, mask, state) as moving:
        log = train(model, moving, batches, objective, recipe, title=title, loop=loop,
                    record=record, apply=apply)
        finite = all(w.master.isfinite().all() for w in moving)
    # Each update's loss checks the update before it. For the last one, some rows' losses do.
    with torch.no_grad():
        losses = [mean_nll(model, collate([row], model.embed_tokens.weight.device))
                  for row in forget[::max(1, len(forget) // 8)]]
    if not finite or not all(map(torch.isfinite, losses)):
        raise UserError(f"{title}: weights or losses are not finite after the last update; lower "
                        f"--lr (now {recipe.lr:g})")
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
    """graddiff_loss (A.1) in summands."""
    for nll in nll_parts(model, forget, recipe.micro_tokens):
        yield "loss_forget", -nll, nll
    yield from descent(model, forget, retain, known, recipe)


def descent(model, forget, retain, known, recipe):
    """The retain rows' part of graddiff."""
    for nll in nll_parts(model, retain if recipe.lam else [], recipe.micro_tokens):
        yield "loss_retain", recipe.lam * nll, nll


OBJECTIVES = {  # pipeline/objectives.py adds others
    "graddiff": Objective(graddiff, about="ascent on forget, descent on retain rows (A.1)"),
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
