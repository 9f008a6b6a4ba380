"""SIMU: Selective Influence Machine Unlearning (arXiv 2510.07822), both steps and both baselines.

Step 1 scores every MLP output neuron by how much it carries the forget set (Eq. 1-2) and keeps the
critical ones as a mask (Section 2.1). Step 2 unlearns with GradDiff (A.1) under Sophia (Eq. 3-7),
moving only the attention projections and the critical rows of down_proj. The baselines are the same
loop with everything moving: FO-GradDiff under AdamW, SO-GradDiff under Sophia.

    code         paper                               where       shape
    beta         beta_{l,i}: MLP output              Eq. 1       [D] per layer l and sample i
    a            a_j = (j/m) beta, a node of a path  Eq. 1a      as beta
    log P        -L_i(a_j); L = -log P(y | a_j) [D3] Eq. 1b      scalar
    scores       Att(w_l^k)                          Eq. 2       [L, D]
    steps        m                                   Eq. 1-2
    threshold    t;  critical iff Att > t * M_l      Section 2.1
    mask         M                                   Eq. 5-7     [L, D], rows of down_proj [D, F]
    m, h         m_t, H_t: EMAs of g and g^2         Eq. 4-6     as the weight
    lr           eta_t                               Eq. 3
    gamma, eps   damping, floor                      Eq. 3
    lam          lambda: weight of the retain loss   Table 4

Letters: B batch, T time, L layers, D width of the stream and neurons of a layer (F if inner), H
heads, K kv heads, hd head size, F d_ff, V vocabulary, N answer tokens of a batch, A of its longest
answer, J nodes run at once, C neurons chosen of D. [D1] to [D16]: readings of the paper (README).

Part 1 is the method, an equation at a time, in these readings. Part 2 gives each of its steps a
fast twin, with the reason why they are equal and the test that holds them so. Then come tables that
a fork edits, and the settings of Tables 3-4. Tables 1-2 are eval.py's; 5 counts `critical_mask`.
"""

import math
import random
from collections import Counter, namedtuple
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
IN_CACHE = 1 << 17  # numbers updated at once on a CPU, so that its cache holds the temporaries
PATHS = ("layer", "neuron")

# ==================================================================== Part 1: the method
# ----------------------------------------------------- Step 1: attribution (Eq. 1-2)


def scaled_together(model: Transformer, steps: int, path: str) -> list[slice]:
    """The neurons of a layer that each path scales: all of them, or one [D4]."""
    if steps < 1 or path not in PATHS:
        raise UserError(f"steps m = {steps} and path {path!r}: m must be at least 1, and path "
                        f"{' or '.join(PATHS)}")
    D = model.config.neuron_count
    return [slice(0, D)] if path == "layer" else [slice(k, k + 1) for k in range(D)]


@torch.enable_grad()  # whatever the caller has set
def path_node(model: Transformer, prefix: list[int], label: int, l: int, neurons: slice,
              share: float) -> tuple[Tensor, Tensor]:
    """beta [D] of layer l at the prefix's last position, and d log P(label | prefix) / da [D] where
    these neurons are scaled to a = share * beta, share = j / m of node j (Eq. 1) [D3]."""
    mlp, activations = model.layers[l].mlp, {}

    def scale(y):  # [1, T, D]
        activations["beta"] = y[0, -1].detach()
        a = activations["beta"].clone()
        a[neurons] *= share  # Eq. 1a
        activations["a"] = a.requires_grad_()
        return torch.cat([y[:, :-1], a[None, None]], dim=1)  # only the last position

    mlp.intervene = scale
    try:
        ids = torch.tensor([prefix], device=model.embed_tokens.weight.device)
        log_p = model(ids)[0, -1].log_softmax(-1)[label]  # Eq. 1b without its minus [D3]
        grad, = torch.autograd.grad(log_p, activations["a"])
    finally:
        mlp.intervene = None
    return activations["beta"].float(), grad.float()


def attribute_loop(model: Transformer, encoded: Encoded, *, steps: int = 5,
                   path: str = "layer") -> Tensor:
    """Att(w_l^k) of Eq. 1-2 for one pair, term by term: float32 [L, D]. One sample per answer token
    and its eos [D2], one layer (or neuron [D4]), one node of the path at a time, each in a forward
    and backward pass of its own. `attribute` gives the same numbers fast."""
    L, D = len(model.layers), model.config.neuron_count
    scores = torch.zeros(L, D, device=model.embed_tokens.weight.device)
    for i in range(encoded.start, len(encoded.ids)):  # sample i: predict token i
        prefix, label = encoded.ids[:i], encoded.ids[i]
        for l in range(L):
            for neurons in scaled_together(model, steps, path):
                for j in range(1, steps + 1):
                    beta, grad = path_node(model, prefix, label, l, neurons, j / steps)
                    scores[l, neurons] += beta[neurons] * grad[neurons] / steps  # Eq. 2
    return scores


# ------------------------------------------------- Step 1: critical neurons (Section 2.1)


def critical_mask(scores: Tensor, threshold: float) -> Tensor:
    """bool [L, D]: Att > t * M_l with M_l = max_k Att(w_l^k), strict, layer by layer. A layer
    whose maximum is not positive holds nothing critical [D5]."""
    if not 0 < threshold <= 1:
        raise UserError(f"threshold t = {threshold}; it must be in (0, 1]")
    if not scores.isfinite().all():
        raise UserError("attribution scores are not finite; the model's weights or activations "
                        "overflow: attribute in float32 (--dtype float32), or fetch it again")
    top = scores.amax(dim=1, keepdim=True)
    return (scores > threshold * top) & (top > 0)


# ---------------------------------------------------------------- Step 2: GradDiff (A.1)


def mean_nll(model: Transformer, batch: Batch) -> Tensor:
    """l(y | x) of A.1: the mean of -log P over a batch's answer tokens and eos [D8]."""
    counted = batch.targets != IGNORE
    logits = model.logits(model.hidden(batch.ids)[counted])  # [N, V]
    return F.cross_entropy(logits, batch.targets[counted], reduction="sum") / counted.sum()


def graddiff_loss(model: Transformer, forget: Batch, retain: Batch, lam: float) -> Tensor:
    """GradDiff as one loss (A.1): ascent on forget rows, descent on retain rows [D8]."""
    return -mean_nll(model, forget) + lam * mean_nll(model, retain)


# ------------------------------------------------------- Step 2: masked Sophia (Eq. 3-7)


def sophia(recipe: "Unlearning", lr: float, weight_decay: float, step: int):
    """Rules of an update: moments(grad, m, h) -> new m, h; weights(param, m, h) -> new param."""
    beta1, beta2, gamma, eps = recipe.beta1, recipe.beta2, recipe.gamma, recipe.eps

    def moments(grad, m, h):
        """Eq. 4: one EMA of g and one of g^2, both at every update [D7]."""
        return beta1 * m + (1 - beta1) * grad, beta2 * h + (1 - beta2) * grad.square()

    def weights(param, m, h):
        """Eq. 3 with decoupled decay."""
        ratio = m / (gamma * h).clamp_min(eps)
        return param * (1 - lr * weight_decay) - lr * ratio.clamp(-1, 1)

    return moments, weights


def blend(mask: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """M * new + (1 - M) * old. Where M is 0 it is old itself: 0 * new is not 0 if new overflows."""
    if mask is None:
        return new
    mask = mask.to(new)  # its dtype and device
    return torch.where(mask == 0, old, mask * new + (1 - mask) * old)


def masked_update(param: Tensor, grad: Tensor, m: Tensor, h: Tensor, rules: tuple,
                  mask: Tensor | None):
    """One update in place, by the rules of a row of OPTIMISERS, M at the three points of Eq. 5-7. M
    broadcasts to the shape of the other tensors, with real values in [0, 1]. In `unlearn` a bool M
    never arrives here: see CriticalRows."""
    moments, weights = rules
    m_new, h_new = moments(grad, m, h)  # Eq. 4
    m.copy_(blend(mask, m_new, m))  # (i) Eq. 5
    h.copy_(blend(mask, h_new, h))  # (ii) Eq. 6
    param.copy_(blend(mask, weights(param, m, h), param))  # Eq. 3; (iii) Eq. 7


def sophia_update(param: Tensor, grad: Tensor, m: Tensor, h: Tensor, *, lr: float, beta1: float,
                  beta2: float, gamma: float, eps: float, weight_decay: float,
                  mask: Tensor | None = None):
    """Eq. 3-7 apart from a model and its recipe, on float32 tensors of one shape."""
    recipe = Unlearning(beta1=beta1, beta2=beta2, gamma=gamma, eps=eps)
    masked_update(param, grad, m, h, sophia(recipe, lr, weight_decay, step=1), mask)


def adamw(recipe: "Unlearning", lr: float, weight_decay: float, step: int):
    """FO-GradDiff's rules."""
    beta1, beta2 = recipe.beta1, recipe.adam_beta2

    def moments(grad, m, h):
        return m.lerp(grad, 1 - beta1), (h * beta2).addcmul(grad, grad, value=1 - beta2)

    def weights(param, m, h):
        root = (h / (1 - beta2 ** step)).sqrt().add(recipe.adam_eps)
        return (param * (1 - lr * weight_decay)).addcdiv(m, root, value=-lr / (1 - beta1 ** step))

    return moments, weights


OPTIMISERS = {"sophia": sophia, "adamw": adamw}
ELEMENTWISE = ("sophia", "adamw")  # may update a matrix in parts; others may need all of it

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
                            "neuron; a row of MASKS gives one")
        neurons = NEURONS[model.config.neurons]  # by default the rows of down_proj [D1]
        for block, M in zip(model.layers, mask):
            moving |= {getattr(block.mlp, name).weight: M[:, None] for name in neurons.rows}
            moving |= {getattr(block.mlp, name).weight: M[None] for name in neurons.columns}
    return moving


# --------------------------------------------------------------------- Step 2: the loop


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear rise over a share `warmup` of the updates, then linear decay [D7]. step: from 1."""
    rise = max(1, int(total * warmup))
    return peak * min(step / rise, (total - step + 1) / (total - rise + 1))


def unlearning_order(n_forget: int, n_retain: int, recipe: "Unlearning"):
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
    """Step 2 (Section 2.2) with GradDiff on a float32 model, in place, term by term: one loss,
    dense m and h, M at its three points. Returns a log row per update. It needs retain rows, and
    something that moves. `unlearn` is the fast twin."""
    order = unlearning_order(len(forget), len(retain), recipe)
    moving = mask_of_weights(model, mask, recipe)
    moments_of = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in moving}  # m, h
    optimiser, log = OPTIMISERS[METHODS[recipe.method].optimiser], []
    device = model.embed_tokens.weight.device
    for step, (f, r) in enumerate(order, 1):
        loss = graddiff_loss(model, collate([forget[i] for i in f], device),
                             collate([retain[i] for i in r], device), recipe.lam)
        grads = torch.autograd.grad(loss, list(moving))  # g_t of Eq. 4
        # The clip [D7] is over what moves: a frozen row's gradient must not shorten the update.
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
# depend on the scaled activation there. So one clean pass gives keys and values to every sample of
# a pair, whose last positions are a second stream, all at once (test_attribute_equals_the_loop).


@torch.enable_grad()
def attribute(model: Transformer, batch: Batch, *, steps: int = 5, path: str = "layer") -> Tensor:
    """attribute_loop summed over a batch of pairs: float32 [L, D], the same numbers to rounding, in
    about L*(m-1)/2 forward-backward passes per pair, however many tokens its answer has. Path
    "neuron" takes D times as many: for tiny models."""
    answer = batch.targets != IGNORE  # [B, T]
    if not answer.any():
        raise UserError("a batch without answer tokens has nothing to attribute")
    A = int(answer.sum(1).max())
    # Answer positions first, in order. Pairs with shorter answers are padded, their labels IGNORE.
    pos = answer.int().argsort(dim=1, descending=True, stable=True)[:, :A]  # [B, A]
    with trainable(model, set()):
        clean = Clean(model, batch.ids, pos, batch.targets.gather(1, pos))
        scores = last_node(clean)  # j = m scales nothing, so one pass serves every layer
        for l in range(len(model.layers)):
            for neurons in scaled_together(model, steps, path):
                if steps > 1:
                    scores[l, neurons] += lower_nodes(clean, l, steps, neurons)
    return scores / steps  # the 1/m of Eq. 2


@contextmanager
def trainable(model, wanted: set):
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
    """What one clean pass over ids [B, T] leaves for the scaled runs: keys and values, and stream
    and beta at the last positions pos [B, A] of all samples. These positions alone are the second
    stream. labels [B, A]: the token after each, or IGNORE."""

    @torch.no_grad()
    def __init__(self, model, ids, pos, labels):
        def attend(q, k, v):
            self.keys_values.append((k, v))
            return causal_attention(q, k, v)

        B, A = pos.shape
        positions = torch.arange(ids.shape[1], device=ids.device)
        x, cos_sin = model.embed_tokens(ids), model.rope(positions)
        ends = torch.arange(B, device=ids.device)[:, None], pos  # x[ends]: [B, T, D] -> [B, A, D]
        self.model, self.labels = model, labels
        self.x, self.cos_sin = x[ends], model.rope(pos)
        # A last position sees the clean positions before it, and itself: [B, 1, A, T + A].
        itself = torch.eye(A, dtype=torch.bool, device=ids.device).expand(B, A, A)
        self.seen = torch.cat([positions < pos[..., None], itself], dim=2)[:, None]
        # Of each layer: keys, values [B, K, T, hd]; stream after attention, and beta [B, A, D].
        self.keys_values, self.mid, self.beta = [], [], []
        for block in model.layers:
            x, beta = block.up_to_beta(x, *cos_sin, attend)
            self.mid.append(x[ends])
            self.beta.append(beta[ends])
            x = block.add_beta(x, beta)

    def up_to_beta(self, l, x):
        """Block.up_to_beta of layer l for the second stream x [B*J, A, D]: each last position
        attends to the clean keys before it, and to its own."""
        keys, values, seen, *cos_sin = (
            y.repeat_interleave(len(x) // len(y), dim=0)  # [B, ...] -> [B*J, ...]
            for y in (*self.keys_values[l], self.seen, *self.cos_sin))

        def attend(q, k, v):  # q [B*J, H, A, hd], k and v [B*J, K, A, hd]
            return attention(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), seen)

        return self.model.layers[l].up_to_beta(x, *cos_sin, attend)

    def log_p_gradient(self, x, activations):
        """d log P(label) / da (Eq. 1b) [D3], summed over samples, of the stream x [B*J, A, D] that
        left the last layer. d log P(y) / d logits is 1 at y, minus P: without autograd this is
        three times as fast, and few logits, the largest tensors of all, are held at once."""
        model, grads = self.model, []
        hidden = model.norm(x)
        labels = self.labels.repeat_interleave(len(x) // len(self.labels), dim=0)  # [B*J, A]
        size = max(1, LOGITS // model.config.vocab_size)
        with torch.no_grad():
            for h, y in zip(hidden.flatten(0, 1).split(size), labels.flatten().split(size)):
                p = model.logits(h).softmax(-1)  # [size, V]
                p[torch.arange(len(y), device=y.device), y.clamp_min(0)] -= 1
                grads.append(p.to(h.dtype) @ model.head)
            grad = -torch.cat(grads).view_as(hidden).masked_fill(labels[..., None] == IGNORE, 0)
        return torch.autograd.grad(hidden, activations, grad)


def last_node(clean):
    """beta * d log P / da at a = beta, every layer from one backward pass: float32 [L, D]."""
    x = clean.x.detach().requires_grad_()
    activations = []
    for l, block in enumerate(clean.model.layers):
        x, a = clean.up_to_beta(l, x)
        activations.append(a)
        x = block.add_beta(x, a)
    grads = clean.log_p_gradient(x, activations)
    return torch.stack([(beta.float() * grad.float()).sum((0, 1))  # Eq. 2
                        for beta, grad in zip(clean.beta, grads)])


def lower_nodes(clean, l, steps, neurons: slice):
    """beta * d log P / da of these C neurons of layer l, summed over the nodes j = 1..m-1 of their
    path: float32 [C]."""
    layers = clean.model.layers
    beta = clean.beta[l][:, None]  # [B, 1, A, D]
    j = torch.arange(1, steps, device=beta.device, dtype=beta.dtype)
    a = beta.repeat(1, steps - 1, 1, 1)  # [B, J, A, D]
    a[..., neurons] *= j[:, None, None] / steps  # Eq. 1a
    x = layers[l].add_beta(clean.mid[l][:, None], a.requires_grad_())  # [B, J, A, D]
    x = x.flatten(0, 1)  # [B*J, A, D]
    for u in range(l + 1, len(layers)):
        x = layers[u].add_beta(*clean.up_to_beta(u, x))
    grad, = clean.log_p_gradient(x, [a])
    return (beta.float() * grad.float())[..., neurons].sum((0, 1, 2))  # Eq. 2


def attribute_rows(model: Transformer, rows: list[Encoded], recipe: "Attribution", *,
                   title: str = "attribute", loop=None) -> Tensor:
    """Att of Eq. 2 summed over rows, in batches of like length. loop: see `train`."""
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
    return total


# ------------------------------------------------------------ `nll_parts` for `mean_nll`
# Why it is the same: a gradient is linear, so GradDiff's is the sum of those of its summands, each
# from a pass that fits memory (test_the_summands_are_the_gradient_of_graddiff_loss).


def passes(model: Transformer, rows: list[Encoded], tokens: int):
    """Indices of the rows that go through the model together: at most so many tokens, and at most
    LOGITS logits unless one row has more."""
    lengths = [len(row.ids) for row in rows]
    return batches_by_length(lengths, min(tokens, LOGITS // model.config.vocab_size))


def answer_tokens(rows: list[Encoded]) -> int:
    """How many tokens of the rows are predicted: their answers' and eos."""
    return sum(len(row.ids) - row.start for row in rows)


def nll_parts(model, rows, tokens):
    """Yields the summands of mean_nll(rows), one per pass of at most `tokens`."""
    for indices in passes(model, rows, tokens):
        part = [rows[i] for i in indices]
        batch = collate(part, model.embed_tokens.weight.device)
        yield mean_nll(model, batch) * (answer_tokens(part) / answer_tokens(rows))


# ----------------------------------------------- `CriticalRows` for the mask of Eq. 5-7
# Why it is the same: where M is 0, Eq. 5-7 leave weight and moments as they are, and where it is 1
# they are the plain update. So the critical rows can be separate weights, and neither gradient nor
# optimiser state of the frozen rows need ever exist (test_unlearn_equals_the_loop).


class CriticalRows(nn.Module):
    """Stands in for a matrix [O, I] while only those of its rows (dim 0), or columns (dim 1), move
    where M [O, 1], or [1, I], is not 0. These are the parameter `part` [C, I], or [O, C]; in the
    matrix itself they are 0 meanwhile, so that the two products add up. mask: a soft M of them."""

    def __init__(self, linear, M):
        super().__init__()
        self.linear, self.dim = linear, int(M.shape[0] == 1)
        index = M.flatten().nonzero()[:, 0]  # [C]
        self.mask = M.index_select(self.dim, index) if M.is_floating_point() else None
        self.index = index.to(linear.weight.device)
        self.part = nn.Parameter(linear.weight.detach().index_select(self.dim, self.index))
        linear.weight.detach().index_fill_(self.dim, self.index, 0.0)

    def forward(self, x):
        if self.dim == 0:
            return self.linear(x).index_add(-1, self.index, F.linear(x, self.part))
        return self.linear(x) + F.linear(x[..., self.index], self.part)


@contextmanager
def critical_rows(model, masks: dict):
    """CriticalRows in place of the matrices of which a part moves; yields part -> soft M."""
    stand_ins = []
    try:
        for block in model.layers:
            for name, linear in list(block.mlp.named_children()):
                M = masks.get(linear.weight)
                if M is not None and M.any():
                    stand_ins.append((block.mlp, name, CriticalRows(linear, M)))
                    setattr(*stand_ins[-1])
        yield {module.part: module.mask for *_, module in stand_ins}
    finally:
        for mlp, name, module in stand_ins:
            module.linear.weight.detach().index_copy_(module.dim, module.index, module.part)
            setattr(mlp, name, module.linear)


# A weight that moves, as the model reads it; its master, which is the weight itself unless the
# state has more precision [D10]; its moments; and the M of a soft mask, which broadcasts, or None.
Moving = namedtuple("Moving", "name weight master m h mask", defaults=(None,))


@contextmanager
def moving_weights(model, recipe, mask, state=torch.float32):
    """The weights that recipe.method moves [D9], as a list of Moving; all others are frozen
    meanwhile. mask [L, D]: for masked methods. state: the dtype of moments, and of masters unless
    the model has more precision."""
    masks, moving = mask_of_weights(model, mask, recipe), []
    everywhere = {p for p, M in masks.items() if M is None}
    with trainable(model, everywhere), critical_rows(model, masks) as soft:
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
def apply_updates(moving, optimiser, recipe, *, lr, step, shrink):
    """masked_update of every master by its weight's gradient times `shrink`, which is freed. Where
    the master is not the weight itself, it is rounded into it."""
    for w in moving:
        decay = recipe.weight_decay if w.weight.dim() == 2 else 0.0  # none on norms and biases [D7]
        rules = optimiser(recipe, lr, decay, step)
        size = len(w.master)
        if w.mask is None and w.master.is_cpu and METHODS[recipe.method].optimiser in ELEMENTWISE:
            size = max(1, IN_CACHE * size // w.master.numel())
        parts = (t.split(size) for t in (w.master, w.weight.grad, w.m, w.h))
        for master, grad, m, h in zip(*parts):
            masked_update(master, shrink * grad.float(), m, h, rules, w.mask)
        w.weight.grad = None
        if w.weight.dtype != w.master.dtype:
            w.weight.copy_(w.master)


# ------------------------------------------------------------- `unlearn` for `unlearn_loop`


def train(model, batches, objective, recipe, mask=None, *, title, loop=None, record=None,
          apply=apply_updates, state=torch.float32):
    """One update per batch (forget rows, retain rows, known) by objective.losses. Returns a log row
    per update, also handed to record(row). mask, state: as in `moving_weights`.

    loop(title, total, tensors) yields the update numbers 1 to total. To resume it may fill
    `tensors`, which hold all that updates change, and begin later; it may end early. It must not
    draw random numbers, because all else depends on the update's number alone."""
    total, log = len(batches), []
    model.checkpoint = recipe.checkpointing
    optimiser = OPTIMISERS[METHODS[recipe.method].optimiser]
    advice = f"is not finite; lower --lr (now {recipe.lr:g})"
    with moving_weights(model, recipe, mask, state) as moving:
        tensors = {f"{w.name}.{k}": getattr(w, k) for w in moving for k in ("master", "m", "h")}
        numbers = loop(title, total, tensors) if loop else range(1, total + 1)
        for step in tqdm(numbers, desc=title, total=total):
            if not log:  # the first update here, and `loop` may have filled the masters
                for w in moving:
                    w.weight.data.copy_(w.master)
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
            if not losses:
                raise UserError(f"objective {recipe.objective} yields no (name, loss, value)")
            if not all(map(math.isfinite, (norm, *losses.values()))):
                raise UserError(f"{title}: loss or gradient of update {step} of {total} {advice}")
            lr = learning_rate(step, total, recipe.lr, recipe.warmup)
            shrink = min(1.0, recipe.clip / (norm + 1e-6))
            apply(moving, optimiser, recipe, lr=lr, step=step, shrink=shrink)
            log.append(dict(step=step, **losses, lr=lr, grad_norm=norm))
            if record:
                record(log[-1])
        if not all(w.master.isfinite().all() for w in moving):
            raise UserError(f"{title}: a weight {advice}")
    return log


def unlearn(model: Transformer, forget: list[Encoded], retain: list[Encoded],
            mask: Tensor | None, recipe: "Unlearning", *, targets=None, title="unlearn",
            **ways) -> list[dict]:
    """Step 2 (Section 2.2) on model, in place: recipe.method with recipe.objective; returns the
    log, a row per update. mask [L, D]: for masked methods. targets: for objectives with an end, a
    loss; or for each forget row a loss, or a list per token. ways: what else `train` takes."""
    order = unlearning_order(len(forget), len(retain), recipe)
    objective = OBJECTIVES[recipe.objective]
    if objective.targeted and targets is None:
        raise UserError(f"objective {recipe.objective} needs targets: the loss that each forget "
                        "row is to reach")
    if recipe.lam and not retain:
        raise UserError("there are no retain rows; give some, or lam = 0")
    known = [None] * len(forget), [None] * len(retain)
    if objective.known:
        with torch.no_grad():
            known = objective.known(model, forget, retain, targets, recipe)
    batches = []
    for f, r in order:
        known_now = [known[0][i] for i in f], [known[1][i] for i in r]
        batches.append(([forget[i] for i in f], [retain[i] for i in r], known_now))
    log = train(model, batches, objective, recipe, mask, title=title, **ways)
    with torch.no_grad():  # finite weights can compute infinite losses, and no update follows
        nll = sum(nll_parts(model, forget[-8:], recipe.micro_tokens))
    if not nll.isfinite():
        raise UserError(f"{title}: the last loss is not finite; lower --lr (now {recipe.lr:g})")
    return log


# ============================================================= Tables: a fork adds a row

# M [L, D], bool or real-valued, from forget and retain scores, t and seed. dual keeps neurons that
# are critical for both sets [D6]. pipeline/objectives.py adds others.
MASKS = {
    "dual": lambda forget, retain, t, seed: critical_mask(forget, t),
    "forget-only": lambda forget, retain, t, seed: (critical_mask(forget, t)
                                                    & ~critical_mask(retain, t)),
}


@dataclass(frozen=True)
class Objective:
    """losses(model, forget rows, retain rows, known, recipe) yields summands (name, loss, value):
    `train` back-propagates and frees each before it asks for the next, and logs the sum of values
    by name. known(model, forget rows, retain rows, targets, recipe) gives, before the model moves,
    two lists of whatever is to be known of each row; `losses` gets those of its rows."""

    losses: Callable
    known: Callable | None = None
    targeted: bool = False  # needs the `targets` of unlearn
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
    neurons: str = option("output", "of an MLP: outputs [D1], or inner ones", choices=NEURONS)


@dataclass(frozen=True, kw_only=True)
class Attribution(Common):
    """Step 1, scores (Section 2.1)."""
    steps: int = option(5, "m: nodes on the path from 0 to beta (Eq. 1)", low=1, high=1000)
    path: str = option("layer", "which neurons are scaled together [D4]", choices=PATHS)
    attribution_tokens: int = option(4096, "tokens times path nodes in a pass", low=1)


@dataclass(frozen=True, kw_only=True)
class Masking(Common):
    """Step 1, mask (Section 2.1)."""
    threshold: float = option(0.3, "t: critical if Att > t * max of the layer", above=0, high=1)
    mask: str = option("dual", "dual keeps neurons critical for both sets [D6], forget-only drops, "
                       "soft weighs them; random: as many; none, all: of down_proj", choices=MASKS)


@dataclass(frozen=True, kw_only=True)
class Unlearning(Common):
    """Step 2 (Section 2.2)."""
    method: str = option("simu", "fo: AdamW on all weights; so: Sophia on all; simu: Sophia on "
                         "attention and critical rows", choices=METHODS)
    objective: str = option("graddiff", "what each row's loss is", choices=OBJECTIVES)
    attention: str = option("moving", "frozen: as after Eq. 7 [D9]", choices=("moving", "frozen"))
    lr: float = option(5e-6, "eta: peak learning rate", above=0)
    epochs: int = option(5, "passes over the forget set", low=1)
    batch: int = option(16, "forget rows per update, each with one retain row", low=1)
    micro_tokens: int = option(8192, "tokens in a pass, at most 2**25 / V; a batch is cut "
                               "to fit", low=1)
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


# Tables 3 and 4, one line per cell. batch is that of unlearning:
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
