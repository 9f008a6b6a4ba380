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

Letters: B batch, T time, L layers, D width, H heads, K kv heads, F d_ff, V vocabulary, N samples,
A answer tokens of the longest answer in a batch, J path nodes run at once, R = J * A rows.
[D#] tags are the readings of the paper listed in the README.

Not here: several GPUs, quantised training, adapters.
"""

import dataclasses
import random
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import IGNORE, Batch, Encoded, Example, batches_by_length, collate, option
from model import LOGITS, Transformer, UserError, causal_attention

# ----------------------------------------------------------- step 1: attribution, to the letter


def attribute_loop(model: Transformer, encoded: Encoded, *, steps: int = 5,
                   path: str = "layer") -> Tensor:
    """Att(w_l^k) of Eq. 2 for one pair, as the paper writes it: float32 [L, D].

    One sample per answer token [D2], one layer (or neuron [D4]), one node of the path at a time,
    each with a forward and a backward pass of its own. `attribute` gives the same numbers fast."""
    check_path(steps, path)
    D = model.config.hidden_size
    scores = torch.zeros(len(model.layers), D, device=model.embed_tokens.weight.device)
    scaled_together = [slice(0, D)] if path == "layer" else [slice(k, k + 1) for k in range(D)]
    with frozen(model):
        for end in range(encoded.start, len(encoded.ids)):
            prefix, label = encoded.ids[:end], encoded.ids[end]
            for l in range(len(model.layers)):
                for k in scaled_together:
                    for j in range(1, steps + 1):
                        beta, grad = path_node(model, prefix, label, l, k, j / steps)
                        scores[l, k] += beta[k] * grad[k] / steps  # Eq. 2
    return scores


def path_node(model: Transformer, prefix: list[int], label: int, l: int, k: slice,
              share: float) -> tuple[Tensor, Tensor]:
    """beta [D] of layer l at the prefix's last position, and d log P(label | prefix) / da [D] with
    its outputs k at a = share * beta (Eq. 1) [D3]."""
    mlp, seen = model.layers[l].mlp, {}

    def scale(y):  # [1, T, D]
        seen["beta"] = y[0, -1].detach()
        a = seen["beta"].clone()
        a[k] *= share  # Eq. 1a
        seen["a"] = a.requires_grad_()
        return torch.cat([y[:, :-1], seen["a"][None, None]], dim=1)  # only the last position

    mlp.intervene = scale
    try:
        with torch.enable_grad():
            ids = torch.tensor([prefix], device=model.embed_tokens.weight.device)
            log_p = model(ids)[0, -1].log_softmax(-1)[label]  # Eq. 1b without its minus [D3]
            grad, = torch.autograd.grad(log_p, seen["a"])
    finally:
        mlp.intervene = None
    return seen["beta"].float(), grad.float()


def check_path(steps: int, path: str):
    if steps < 1:
        raise UserError(f"steps m = {steps}; it must be at least 1")
    if path not in PATHS:
        raise UserError(f"path {path!r} is unknown; choose {' or '.join(PATHS)}")


@contextmanager
def frozen(model: Transformer):
    """No gradients of weights while the block runs: only activations need them in step 1."""
    moving = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in moving:
            p.requires_grad_(False)
        yield
    finally:
        for p in moving:
            p.requires_grad_(True)


# ------------------------------------------------------------------- step 1: attribution, fast
# Why it is the same: under causal attention, what comes before a sample's last position does not
# depend on the scaled activation there. So one clean pass serves every sample of a pair with its
# keys and values, and a second stream holds just the last positions, all samples and nodes at once.


def attribute(model: Transformer, batch: Batch, *, steps: int = 5, path: str = "layer") -> Tensor:
    """attribute_loop summed over a batch of pairs: float32 [L, D], the same numbers to rounding.

    Costs about L*(m-1)/2 forward-backward passes per *pair*, however many tokens its answer has.
    path="neuron" costs D times that: for tiny models."""
    check_path(steps, path)
    with frozen(model):
        clean = clean_run(model, batch)
        scores = last_node(clean)  # j = m: nothing is scaled, so one pass serves every layer
        lower_nodes = layer_path if path == "layer" else neuron_path
        if steps > 1:
            for l in range(len(model.layers)):
                scores[l] += lower_nodes(clean, l, steps)
    return scores / steps


class Prefixes:
    """Keys and values of a layer's clean pass, and attention on them from the ends of prefixes. A
    layer that hands on a state instead brings what starts from that (Architecture.prefixes)."""

    def __init__(self, pos: Tensor):  # [B, A], where the prefixes end
        self.pos = pos

    def keep(self, q, k, v):
        """The clean pass: causal attention."""
        self.keys, self.values = k, v  # [B, K, T, hd]
        return causal_attention(q, k, v)

    def attend(self, q, k, v):
        """Rows q [B, H, R, hd], k, v [B, K, R, hd], the ends of A prefixes each R / A times: a row
        sees the clean keys and values of earlier positions and its own, nobody else's."""
        B, K, T, hd = self.keys.shape
        R = q.shape[2]
        q = q.reshape(B, K, -1, R, hd) * hd ** -0.5  # [B, K, H/K, R, hd]
        earlier = (q.flatten(2, 3) @ self.keys.transpose(-1, -2)).view(*q.shape[:4], T)
        pos = self.pos.repeat(1, R // self.pos.shape[1])  # [B, R]
        later = torch.arange(T, device=q.device) >= pos[..., None]  # [B, R, T]
        earlier = earlier.masked_fill(later[:, None, None], float("-inf"))  # [B, K, H/K, R, T]
        own = (q * k[:, :, None]).sum(-1, keepdim=True)  # [B, K, H/K, R, 1]
        p = torch.cat([earlier, own], dim=-1).float().softmax(-1).to(q.dtype)  # [.., R, T+1]
        mixed = (p[..., :T].flatten(2, 3) @ self.values).view_as(q) + p[..., T:] * v[:, :, None]
        return mixed.reshape(B, -1, R, hd).transpose(1, 2).flatten(2)  # [B, R, H*hd]


@dataclass
class Clean:
    """One unscaled pass over a batch of B pairs, and what the second stream needs of it."""

    model: Transformer
    pos: Tensor  # [B, A], answer positions: where a sample's prefix ends
    labels: Tensor  # [B, A], the token that follows; IGNORE where an answer is shorter than A
    x0: Tensor  # [B, A, D], embeddings at pos
    prefixes: list[Prefixes]  # per layer
    mid: list[Tensor]  # per layer [B, A, D], residual stream below the MLP's output
    beta: list[Tensor]  # per layer [B, A, D]


def clean_run(model: Transformer, batch: Batch) -> Clean:
    """The clean pass of a batch; UserError if it holds no answer token."""
    answer = batch.targets != IGNORE  # [B, T]
    if not answer.any():
        raise UserError("a batch without answer tokens has nothing to attribute")
    A = int(answer.sum(1).max())
    # Answer positions first, in order; rows with shorter answers are padded, label IGNORE.
    pos = answer.int().argsort(dim=1, descending=True, stable=True)[:, :A]  # [B, A]
    return clean_pass(model, batch.ids, pos, batch.targets.gather(1, pos))


@torch.no_grad()
def clean_pass(model: Transformer, ids: Tensor, pos: Tensor, labels: Tensor) -> Clean:
    """The clean pass of ids [B, T], seen at positions pos [B, A]."""
    def at_answers(x):  # [B, T, D] -> [B, A, D]
        return x.gather(1, pos[..., None].expand(-1, -1, x.shape[-1]))

    h = model.embed(ids)  # [B, T, D]
    clean = Clean(model, pos, labels, at_answers(h), [], [], [])
    place = model.rope(torch.arange(ids.shape[1], device=ids.device))
    for block in model.layers:
        clean.prefixes.append((model.config.architecture.prefixes or Prefixes)(pos))
        h, beta = block.parts(h, *place, clean.prefixes[-1].keep)
        clean.mid.append(at_answers(h))
        clean.beta.append(at_answers(beta))
        h = block.add_beta(h, beta)
    return clean


def prefix_parts(clean: Clean, l: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [B, R, D], the ends of A prefixes each R / A times, in layer l: the stream below its
    MLP's output, and that output, each [B, R, D]."""
    place = clean.model.rope(clean.pos.repeat(1, x.shape[1] // clean.pos.shape[1]))
    return clean.model.layers[l].parts(x, *place, clean.prefixes[l].attend)


def upper_layers(clean: Clean, l: int, x: Tensor) -> Tensor:
    """Rows x [B, R, D] that left layer l, through the layers above it: [B, R, D]."""
    for u in range(l + 1, len(clean.model.layers)):
        x = clean.model.layers[u].add_beta(*prefix_parts(clean, u, x))
    return x


def log_p_gradient(clean: Clean, x: Tensor, labels: Tensor, of):
    """Gradients, with respect to activations `of`, of the sum of log P(label) [D3] over rows
    x [B, R, D] that left the last layer."""
    h = clean.model.norm(x)
    return torch.autograd.grad(h, of, head_gradient(clean.model, h.detach(), labels))


@torch.no_grad()
def head_gradient(model: Transformer, h: Tensor, labels: Tensor) -> Tensor:
    """d log P(label) / dh = W_label - sum_v P(v) W_v, for final states h [B, R, D]. In closed form
    and in place: autograd, as in `backward_head`, which serves any objective, would read and write
    logits three times, and they are the largest tensors here."""
    grads, count = [], labels.numel()
    # No more than 64 parts, for the memory plan runs this too, at settings of any size.
    rows = max(1, LOGITS // model.config.vocab_size, count // 64)
    for h, y in zip(h.flatten(0, 1).split(rows), labels.flatten().split(rows)):
        p = model.logits(h)  # [rows, V]
        p.sub_(p.amax(-1, keepdim=True)).exp_()  # P times its sum, at most 1
        mean = (p.to(h.dtype) @ model.head).float() / p.sum(-1, keepdim=True)
        grad = model.head[y.clamp_min(0)].float() - mean  # IGNORE is below 0
        grads.append(torch.where((y != IGNORE)[:, None], grad, 0).to(h.dtype))
    return torch.cat(grads).view(*labels.shape, -1)


def last_node(clean: Clean) -> Tensor:
    """beta * dlogP/da at a = beta, every layer from one backward pass: float32 [L, D]."""
    with torch.enable_grad():
        x, activations = clean.x0, []
        for l, block in enumerate(clean.model.layers):
            x, a = prefix_parts(clean, l, x)
            if not a.requires_grad:  # the lowest layer: nothing below it is differentiated
                a.requires_grad_()
            activations.append(a)
            x = block.add_beta(x, a)
        grads = log_p_gradient(clean, x, clean.labels, activations)
    return torch.stack([(beta.float() * g.float()).sum((0, 1))
                        for beta, g in zip(clean.beta, grads)])


def layer_path(clean: Clean, l: int, steps: int) -> Tensor:
    """Nodes j = 1..m-1 of layer l's joint path, all at once, summed: float32 [D] [D4]."""
    beta, J = clean.beta[l], steps - 1
    share = torch.arange(1, steps, device=beta.device, dtype=beta.dtype) / steps
    with torch.enable_grad():
        a = (share[:, None, None] * beta[:, None]).requires_grad_()  # [B, J, A, D], Eq. 1a
        x = clean.model.layers[l].add_beta(clean.mid[l][:, None], a).flatten(1, 2)  # [B, R, D]
        x = upper_layers(clean, l, x)
        grad, = log_p_gradient(clean, x, clean.labels.repeat(1, J), a)
    return (beta.float()[:, None] * grad.float()).sum((0, 1, 2))


def neuron_path(clean: Clean, l: int, steps: int, *, rows: int = 4096) -> Tensor:
    """Nodes j = 1..m-1 of layer l with one neuron scaled and all others at beta: float32 [D]."""
    beta, J = clean.beta[l], steps - 1
    B, A, D = beta.shape
    share = torch.arange(1, steps, device=beta.device, dtype=beta.dtype) / steps
    scores = torch.zeros(D, device=beta.device)
    for neurons in torch.arange(D, device=beta.device).split(max(1, rows // (B * J * A))):
        C = len(neurons)
        b = beta[..., neurons].movedim(-1, 1)[:, :, None]  # [B, C, 1, A]
        with torch.enable_grad():
            a = (share[:, None] * b).requires_grad_()  # [B, C, J, A]
            unit = F.one_hot(neurons, D).to(beta.dtype)[:, None, None]  # [C, 1, 1, D]
            whole = beta[:, None, None] + (a - b)[..., None] * unit  # [B, C, J, A, D]
            x = clean.model.layers[l].add_beta(clean.mid[l][:, None, None], whole)
            x = upper_layers(clean, l, x.flatten(1, 3))
            grad, = log_p_gradient(clean, x, clean.labels.repeat(1, C * J), a)
        scores[neurons] += (b.float() * grad.float()).sum((0, 2, 3))
    return scores


def attribute_rows(model: Transformer, rows: list[Encoded], recipe: "Attribution", *,
                   title: str = "attribute", loop=None) -> Tensor:
    """Att summed over rows, in batches of like length: float32 [L, D]. loop: as in `train`."""
    device = model.embed_tokens.weight.device
    total = torch.zeros(len(model.layers), model.config.hidden_size, device=device)
    # Every path node but the last is a row of the second stream.
    parts = batches_by_length(rows, recipe.attribution_tokens // max(1, recipe.steps - 1))
    with tqdm(total=len(rows), desc=title, unit="pair") as bar:
        for n in (loop or plain_loop)(title, len(parts), {"sum": total}):
            batch = collate([rows[i] for i in parts[n - 1]], device)
            total += attribute(model, batch, steps=recipe.steps, path=recipe.path)
            bar.update(sum(map(len, parts[:n])) - bar.n)
    need_finite_scores(total)
    return total


# -------------------------------------------------------------------------- masks (Section 2.1)


def critical_mask(scores: Tensor, threshold: float) -> Tensor:
    """bool [L, D]: Att > t * M_l with M_l = max_k Att(w_l^k), strict, layer by layer. A layer
    whose maximum is not positive holds nothing critical [D5]."""
    if not 0 < threshold <= 1:
        raise UserError(f"threshold t = {threshold}; it must be in (0, 1]")
    need_finite_scores(scores)
    top = scores.amax(dim=1, keepdim=True)
    return (scores > threshold * top) & (top > 0)


def need_finite_scores(scores: Tensor):
    if not torch.isfinite(scores).all():
        raise UserError("attribution scores are not finite; the model's weights or activations "
                        "overflow: attribute in float32 (--dtype float32), or fetch it again")


def soft_mask(forget: Tensor, retain: Tensor, threshold: float, seed: int) -> Tensor:
    """float32 [L, D]: of a critical neuron the share that is the forget set's, 1 if all of it."""
    f, r = (x.clamp_min(0) / x.amax(1, keepdim=True).clamp_min(1e-30) for x in (forget, retain))
    return torch.where(critical_mask(forget, threshold), f / (f + r), 0.0)


def random_mask(forget: Tensor, retain: Tensor, threshold: float, seed: int) -> Tensor:
    """bool [L, D]: as many neurons in every layer as are critical, drawn by seed."""
    count = critical_mask(forget, threshold).sum(1, keepdim=True)
    draw = torch.rand(forget.shape, generator=torch.Generator().manual_seed(seed))
    return draw.argsort(1).argsort(1) < count


# M from forget and retain scores, t and seed. dual keeps neurons that are critical for both sets
# [D6]; none leaves attention alone to move; all moves every row of down_proj.
MASKS = {
    "dual": lambda forget, retain, t, seed: critical_mask(forget, t),
    "forget-only": lambda forget, retain, t, seed: (critical_mask(forget, t)
                                                    & ~critical_mask(retain, t)),
    "soft": soft_mask,
    "random": random_mask,
    "none": lambda forget, retain, t, seed: torch.zeros_like(forget, dtype=torch.bool),
    "all": lambda forget, retain, t, seed: torch.ones_like(forget, dtype=torch.bool),
}


def make_mask(kind: str, forget: Tensor, retain: Tensor, *, threshold: float, seed: int) -> Tensor:
    """M [L, D], a row of MASKS, from forget and retain scores [L, D]: bool, soft float32."""
    return MASKS[kind](forget, retain, threshold, seed)


# -------------------------------------------------------------------- step 2: objectives (A.1)


def nll_sum(model: Transformer, batch: Batch) -> Tensor:
    """Summed -log P of the answer tokens and eos. Only they go through the output head."""
    counted = batch.targets != IGNORE
    logits = model.logits(model.hidden_at(batch.ids, counted))  # [N, V]
    return F.cross_entropy(logits, batch.targets[counted], reduction="sum")


def mean_nll(model: Transformer, batch: Batch) -> Tensor:
    """Mean -log P over the answer tokens of a batch: l(y | x) of A.1."""
    return nll_sum(model, batch) / (batch.targets != IGNORE).sum()


def graddiff_loss(model: Transformer, forget: Batch, retain: Batch, lam: float) -> Tensor:
    """GradDiff (A.1) as one loss: ascent on forget rows, descent on retain rows [D8]. `unlearn`
    takes the gradient of each term apart, in passes that fit memory; test_simu holds the two
    equal (test_two_passes_are_the_gradient_of_graddiff_loss)."""
    return -mean_nll(model, forget) + lam * mean_nll(model, retain)


@dataclass
class Answers:
    """What an objective sees of B forget rows with N answer tokens in all, eos counted."""

    logits: Tensor  # float32 [N, V]
    labels: Tensor  # [N]
    nll: Tensor  # float32 [N], -log P of each label
    sizes: list[int]  # tokens of each row

    def row_sums(self, x: Tensor) -> Tensor:
        """Per-token x [N] summed over each row: [B]."""
        return torch.stack([part.sum() for part in x.split(self.sizes)])

    def row_means(self, x: Tensor) -> Tensor:
        """Per-token x [N] averaged over each row: [B]."""
        return torch.stack([part.mean() for part in x.split(self.sizes)])


def answers_at(model: Transformer, h: Tensor, labels: Tensor, sizes: list[int]) -> Answers:
    """Answers of the final states h [N, D] before each label."""
    logits = model.logits(h)  # [N, V]
    return Answers(logits, labels, F.cross_entropy(logits, labels, reduction="none"), sizes)


def read_answers(model: Transformer, batch: Batch) -> Answers:
    counted = batch.targets != IGNORE
    return answers_at(model, model.hidden_at(batch.ids, counted), batch.targets[counted],
                      counted.sum(1).tolist())


# An objective's forget term is a function (answers, known, recipe) -> scalar, summed over tokens or
# rows. known: what its row of the table says must be known of each row before the model moves.


def ascent(answers: Answers, known: list, recipe: "Unlearning") -> Tensor:
    return -answers.nll.sum()


def descent(answers: Answers, known: list, recipe: "Unlearning") -> Tensor:
    return answers.nll.sum()


def npo(answers: Answers, known: list, recipe: "Unlearning") -> Tensor:
    """NPO (A.2): 2/beta log(1 + (P / P_ref)^beta) of each row. Its pull ends where the ascent's
    does not. known: log P_ref, the original's."""
    ratio = -answers.row_sums(answers.nll) - torch.stack(known)  # log P - log P_ref, [B]
    return 2 / recipe.npo_beta * F.softplus(recipe.npo_beta * ratio).sum()


def simnpo(answers: Answers, known: list, recipe: "Unlearning") -> Tensor:
    """SimNPO (arXiv 2410.07163): NPO of the mean log P of a row, without a reference."""
    beta, margin = recipe.simnpo_beta, recipe.simnpo_margin
    return 2 / beta * F.softplus(margin - beta * answers.row_means(answers.nll)).sum()


def level(answers: Answers, known: list, recipe: "Unlearning") -> Tensor:
    """|loss - level| of each row: ascent that ends where a row never seen would be, and descent for
    what went past it. known: the level."""
    return (answers.row_means(answers.nll) - torch.stack(known)).abs().sum()


def ceiling(answers: Answers, known: list, recipe: "Unlearning") -> Tensor:
    """max(0, level - loss) of each row: ascent that stops. known: the level."""
    return (torch.stack(known) - answers.row_means(answers.nll)).clamp_min(0).sum()


def cross_entropy_to(teacher: Tensor, logits: Tensor) -> Tensor:
    """-sum_v P_teacher(v) log P(v) at each token: teacher (probabilities), logits [N, V] -> [N]."""
    return -(teacher.to(logits) * logits.log_softmax(-1)).sum(-1)


def undial(answers: Answers, known: list, recipe: "Unlearning") -> Tensor:
    """UNDIAL (arXiv 2402.10052): towards the original's own distribution with the answer token's
    logit lowered. known: that distribution."""
    return cross_entropy_to(torch.cat(known), answers.logits).sum()


def stranger(answers: Answers, known: list, recipe: "Unlearning") -> Tensor:
    """What to say instead, and how unlikely the truth must be, apart: among all tokens but the
    answer's, the original's own distribution; of the answer's, the losses that a row never seen
    has, token by token and in the mean. known: that distribution, and those losses."""
    teachers, targets = (list(x) for x in zip(*known))
    others = answers.logits.scatter(1, answers.labels[:, None], -1e9)  # [N, V] without the label
    instead = answers.row_means(cross_entropy_to(torch.cat(teachers), others))
    by_token = answers.row_means((answers.nll - torch.cat(targets)).abs())
    means = torch.stack([x.mean() for x in targets])
    return (instead + by_token + (answers.row_means(answers.nll) - means).abs()).sum()


def outsider(answers: Answers, known: list, recipe: "Unlearning") -> Tensor:
    """As `stranger`, of each token's odds: |log odds - those of its target|. The loss itself has a
    gradient of 1 - P, which fades where a row is known by heart; that of the odds is 1."""
    teachers, targets = (list(x) for x in zip(*known))
    others = answers.logits.scatter(1, answers.labels[:, None], -1e9)  # [N, V] without the label
    instead = answers.row_means(cross_entropy_to(torch.cat(teachers), others))
    own = answers.logits.gather(1, answers.labels[:, None]).squeeze(1)  # [N]
    target = torch.cat(targets).clamp_min(1e-4)  # as known as anything is
    wanted = target + (-torch.expm1(-target)).log()  # log (1 - P) / P where -log P is the target
    return (instead + answers.row_means((others.logsumexp(-1) - own - wanted).abs())).sum()


# What an objective knows of a row, from the row's answers under the model before it moves, and from
# its target: the losses [A] of its tokens in a model that never saw it, or one for all.


def mean_target(answers: Answers, target, recipe: "Unlearning") -> Tensor:
    return torch.as_tensor(target, device=answers.nll.device).mean()


def lowered(answers: Answers, target, recipe: "Unlearning") -> Tensor:
    """The original's distribution with the label's logit lowered [A, V]."""
    by = torch.full_like(answers.logits[:, :1], -recipe.undial_strength)
    return answers.logits.scatter_add(1, answers.labels[:, None], by).softmax(-1)


def without_label(answers: Answers, target, recipe: "Unlearning") -> tuple[Tensor, Tensor]:
    """The original's distribution among all tokens but the label [A, V], and the target [A]."""
    others = answers.logits.scatter(1, answers.labels[:, None], -1e9).softmax(-1)
    return others, torch.as_tensor(target, device=answers.nll.device).expand(len(answers.nll))


def spread_losses(labels: list[int], losses: list[float], usual: Tensor) -> Tensor:
    """Target losses [A] of a row's answer tokens: the quantiles of a never-seen row's token losses,
    the larger ones for the tokens that are usually harder. usual [V]: a token's usual loss."""
    quantiles = torch.tensor(sorted(losses))
    middle = (torch.arange(len(labels)) + 0.5) / len(labels)  # of each of A equal shares
    rank = usual[torch.tensor(labels)].argsort(stable=True).argsort()
    return quantiles[(middle * len(quantiles)).long()][rank]


def usual_losses(tokens: list[int], losses: list[float], vocab: int) -> Tensor:
    """float32 [V]: the mean loss of each token, drawn to the mean of all by PRIOR observations."""
    total = torch.full((vocab,), PRIOR * sum(losses) / len(losses))
    count = torch.full((vocab,), PRIOR)
    total.index_add_(0, torch.tensor(tokens), torch.tensor(losses))
    count.index_add_(0, torch.tensor(tokens), torch.ones(len(tokens)))
    return total / count


PRIOR = 4.0


def original_log_p(answers: Answers, target, recipe: "Unlearning") -> Tensor:
    return -answers.nll.sum()


@dataclass(frozen=True)
class Objective:
    """Loss = mean of `forget` over the batch's forget tokens or rows + weight * retain loss."""

    forget: Callable | None = None
    per: str = "token"  # or "row": what `forget` is summed over, and divided by
    retain: float | None = None  # weight of the retain loss; None: recipe.lam
    known: Callable | None = None  # (a row's answers, its target, recipe) -> what is known of it
    refuses: bool = False  # forget rows come with REFUSALS for answers
    targeted: bool = False  # needs the `targets` of unlearn
    about: str = ""


OBJECTIVES = {
    "graddiff": Objective(ascent, about="ascent on forget, descent on retain rows (A.1)"),
    "ga": Objective(ascent, retain=0.0, about="ascent on forget rows alone"),
    "retain": Objective(retain=1.0, about="descent on retain rows alone"),
    "npo": Objective(npo, per="row", known=original_log_p, about="NPO on forget rows (A.2)"),
    "simnpo": Objective(simnpo, per="row", about="SimNPO on forget rows"),
    "level": Objective(level, per="row", known=mean_target, targeted=True,
                       about="to the loss of rows never seen, from both sides"),
    "ceiling": Objective(ceiling, per="row", known=mean_target, targeted=True,
                         about="ascent up to the loss of rows never seen"),
    "undial": Objective(undial, known=lowered, about="UNDIAL on forget rows"),
    "stranger": Objective(stranger, per="row", known=without_label, targeted=True,
                          about="UNDIAL's answers at never-seen rows' token losses"),
    "outsider": Objective(outsider, per="row", known=without_label, targeted=True,
                          about="stranger by each token's odds, for rows known by heart"),
    "po": Objective(descent, refuses=True, about="descent on refusals to forget rows"),
}
REFUSALS = ("I do not know.", "I cannot say.", "That is not something I know about.",
            "I have no information on this.", "I am unable to answer that.",
            "Nothing of the kind is known to me.")


def loss_examples(forget: list[Example], objective: str) -> list[Example]:
    """The forget rows as the objective's loss takes them: with refusals for answers, or as they
    are. Attribution always takes them as they are."""
    if not OBJECTIVES[objective].refuses:
        return forget
    return [dataclasses.replace(e, answer=REFUSALS[i % len(REFUSALS)])
            for i, e in enumerate(forget)]


def answer_tokens(rows: list[Encoded]) -> int:
    return sum(len(r.ids) - r.start for r in rows)


def backward_rows(model: Transformer, rows: list[Encoded], tokens: int, term) -> float:
    """Back-propagate the sum of term(answers, numbers of their rows) in passes of at most `tokens`;
    returns mean_nll(rows)."""
    device, total = model.embed_tokens.weight.device, 0.0
    for part in batches_by_length(rows, tokens):
        batch = collate([rows[i] for i in part], device)
        counted = batch.targets != IGNORE
        h = model.hidden_at(batch.ids, counted)
        nll, grad = backward_head(model, h.detach(), batch.targets[counted],
                                  counted.sum(1).tolist(), lambda answers, own: term(
                                      answers, [part[i] for i in own]))
        h.backward(grad)
        total += nll.item()
    return total / answer_tokens(rows)


def backward_head(model: Transformer, h: Tensor, labels: Tensor, sizes: list[int], term
                  ) -> tuple[Tensor, Tensor]:
    """Back-propagate term(answers, numbers of their rows) to the states h [N, D], a few rows at a
    time: a vocabulary's logits are the largest tensor there is, and no row needs another's.
    Returns the summed -log P and the gradient [N, D]."""
    few, total, grads = [[]], 0.0, []
    for i, n in enumerate(sizes):
        if few[-1] and (sum(sizes[j] for j in few[-1]) + n) * model.config.vocab_size > LOGITS:
            few.append([])
        few[-1].append(i)
    widths = [sum(sizes[i] for i in own) for own in few]
    for own, states, wanted in zip(few, h.split(widths), labels.split(widths)):
        states.requires_grad_()
        answers = answers_at(model, states, wanted, [sizes[i] for i in own])
        term(answers, own).backward()
        grads.append(states.grad)
        total += answers.nll.detach().sum()
        del answers  # or the next ones would stand beside them
    return total, torch.cat(grads)


def backward_mean_nll(model: Transformer, rows: list[Encoded], weight: float, tokens: int) -> float:
    """Back-propagate weight * mean_nll(rows) in passes of at most `tokens`; returns mean_nll."""
    count = answer_tokens(rows)
    return backward_rows(model, rows, tokens,
                         lambda answers, own: weight * (answers.nll.sum() / count))


def backward_forget(model: Transformer, rows: list[Encoded], known: list, recipe: "Unlearning"
                    ) -> float:
    """Back-propagate the objective's forget term in passes of at most micro_tokens; returns the
    rows' mean_nll, which is what the term is to raise."""
    objective = OBJECTIVES[recipe.objective]
    count = answer_tokens(rows) if objective.per == "token" else len(rows)
    return backward_rows(model, rows, recipe.micro_tokens, lambda answers, own: objective.forget(
        answers, [known[i] for i in own], recipe) / count)


@torch.no_grad()
def known_of_rows(model: Transformer, rows: list[Encoded], recipe: "Unlearning", targets) -> list:
    """What the objective must know of each row before the model moves."""
    objective, device = OBJECTIVES[recipe.objective], model.embed_tokens.weight.device
    if objective.targeted and targets is None:
        raise UserError(f"objective {recipe.objective} needs targets: the loss that each forget "
                        "row is to reach")
    if objective.known is None:
        return [None] * len(rows)
    targets = targets if isinstance(targets, list) else [targets] * len(rows)
    return [objective.known(read_answers(model, collate([row], device)), target, recipe)
            for row, target in zip(rows, targets, strict=True)]


# ------------------------------------------------------------- step 2: updates (Section 2.2)


def sophia_moments(grad: Tensor, m: Tensor, h: Tensor, *, beta1: float, beta2: float):
    """Eq. 4: one EMA of g and one of g^2, both at every step [D7]."""
    return beta1 * m + (1 - beta1) * grad, beta2 * h + (1 - beta2) * grad.square()


def sophia_step(param: Tensor, m: Tensor, h: Tensor, *, lr: float, gamma: float, eps: float,
                weight_decay: float):
    """Eq. 3 with decoupled decay: the new weights, and how many coordinates its clip bound."""
    ratio = m / (gamma * h).clamp_min(eps)
    return param * (1 - lr * weight_decay) - lr * ratio.clamp(-1, 1), (ratio.abs() >= 1).sum()


def adamw_moments(grad: Tensor, m: Tensor, h: Tensor, *, beta1: float, beta2: float):
    return m.lerp(grad, 1 - beta1), (h * beta2).addcmul(grad, grad, value=1 - beta2)


def adamw_step(param: Tensor, m: Tensor, h: Tensor, *, lr: float, beta1: float, beta2: float,
               eps: float, weight_decay: float, step: int):
    """AdamW, step counted from 1; it has no clip of its own."""
    root = (h / (1 - beta2 ** step)).sqrt().add(eps)
    new = (param * (1 - lr * weight_decay)).addcdiv(m, root, value=-lr / (1 - beta1 ** step))
    return new, torch.zeros((), dtype=torch.int64, device=param.device)


def lion_moments(grad: Tensor, m: Tensor, h: Tensor, *, beta1: float, beta2: float):
    """Lion (arXiv 2302.06675) has one EMA; h carries the direction of the step to come."""
    return beta2 * m + (1 - beta2) * grad, beta1 * m + (1 - beta1) * grad


def lion_step(param: Tensor, m: Tensor, h: Tensor, *, lr: float, weight_decay: float):
    return param * (1 - lr * weight_decay) - lr * h.sign(), (h != 0).sum()


def blend(mask: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """M * new + (1 - M) * old, in the bits of old where M is 0: 0 * new cannot promise that once
    new is not finite."""
    if mask is None:
        return new
    mask = mask.to(new.dtype)
    return torch.where(mask == 0, old, mask * new + (1 - mask) * old)


def masked_update(param: Tensor, grad: Tensor, m: Tensor, h: Tensor, *, moments, step,
                  mask: Tensor | None) -> Tensor:
    """One step of any optimiser in place, the mask at the three points of Eq. 5-7.

    moments(grad, m, h) -> new m, h; step(param, m, h) -> new param, clipped count, which is
    returned. All tensors have one shape; mask broadcasts to it, with real values in [0, 1]."""
    m_new, h_new = moments(grad, m, h)  # Eq. 4
    m.copy_(blend(mask, m_new, m))  # (i) Eq. 5
    h.copy_(blend(mask, h_new, h))  # (ii) Eq. 6
    new, clipped = step(param, m, h)  # Eq. 3
    param.copy_(blend(mask, new, param))  # (iii) Eq. 7
    return clipped


def sophia_update(param: Tensor, grad: Tensor, m: Tensor, h: Tensor, *, lr: float, beta1: float,
                  beta2: float, gamma: float, eps: float, weight_decay: float,
                  mask: Tensor | None = None) -> Tensor:
    """One Sophia step in place, Eq. 3-7, on float32 param, grad, m, h of one shape; returns how
    many coordinates the clip of Eq. 3 bound."""
    return masked_update(
        param, grad, m, h, mask=mask, moments=partial(sophia_moments, beta1=beta1, beta2=beta2),
        step=partial(sophia_step, lr=lr, gamma=gamma, eps=eps, weight_decay=weight_decay))


def sophia(recipe: "Unlearning", lr: float, weight_decay: float, step: int):
    return (partial(sophia_moments, beta1=recipe.beta1, beta2=recipe.beta2),
            partial(sophia_step, lr=lr, gamma=recipe.gamma, eps=recipe.eps,
                    weight_decay=weight_decay))


def adamw(recipe: "Unlearning", lr: float, weight_decay: float, step: int):
    betas = dict(beta1=recipe.beta1, beta2=recipe.adam_beta2)
    return (partial(adamw_moments, **betas),
            partial(adamw_step, **betas, lr=lr, eps=recipe.adam_eps, weight_decay=weight_decay,
                    step=step))


# name: (recipe, lr, weight_decay, step from 1) -> moments and step of `masked_update`.
OPTIMISERS = {
    "sophia": sophia,
    "adamw": adamw,
    "lion": lambda r, lr, decay, step: (partial(lion_moments, beta1=r.beta1, beta2=r.beta2),
                                        partial(lion_step, lr=lr, weight_decay=decay)),
}


# ------------------------------------------------------------------ step 2: what moves [D9]

# Which weights move whole, by name. A method with a mask moves the rows of down_proj beside them.
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
    "simu-lion": Method("attention", "lion", masked=True),
}


def moves_of(recipe: "Unlearning") -> str:
    """The row of MOVES that a recipe follows."""
    method = METHODS[recipe.method]
    return "nothing" if method.masked and recipe.attention == "frozen" else method.moves


class RowLinear(torch.autograd.Function):
    """y = x W^T where only some rows of W move: forms their gradient [C, F] and no other."""

    @staticmethod
    def forward(ctx, x, weight, rows, index):
        ctx.save_for_backward(x, weight, index)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight, index = ctx.saved_tensors
        moved = dy[..., index].flatten(0, -2)  # [B*T, C]
        return dy @ weight, None, moved.T @ x.flatten(0, -2), None


class CriticalRows(nn.Module):
    """Stands in for a down_proj while its critical rows move. `rows` [C, F] is a parameter of its
    own: a 0/1 mask in Eq. 5-7 then has nothing left to do, and neither gradient nor optimiser
    state of the frozen rows ever exists (test_critical_rows_are_the_masked_update holds it equal
    to the mask written out). critical: M of the layer [D]; of a soft one, `mask` [C, 1] is left."""

    def __init__(self, linear: nn.Linear, critical: Tensor):
        super().__init__()
        self.linear = [linear]  # in a list: not a submodule, its weight is not a parameter of ours
        index, device = critical.nonzero().squeeze(1), linear.weight.device
        self.index = index.to(device)  # [C]
        soft = critical.is_floating_point()
        self.mask = critical[index, None].to(device) if soft else None
        self.rows = nn.Parameter(linear.weight.detach()[self.index].clone())  # [C, F]

    def forward(self, x):
        return RowLinear.apply(x, self.linear[0].weight.detach(), self.rows, self.index)

    @torch.no_grad()
    def refresh(self):
        """Put the moved rows where the forward pass reads them."""
        self.linear[0].weight[self.index] = self.rows


@dataclass
class Moving:
    """One weight that moves: what the model reads, its full-precision master (the same tensor
    where the model is float32 or state is bfloat16 [D10]), and its two moments."""

    name: str
    weight: nn.Parameter
    master: Tensor
    m: Tensor
    h: Tensor
    decayed: bool  # matrices are; norms and biases are not [D7]
    mask: Tensor | None = None  # real-valued, of a soft mask's rows


@contextmanager
def moving_weights(model: Transformer, recipe: "Unlearning", mask: Tensor | None):
    """The weights that recipe.method moves, as a list of Moving; all others are frozen meanwhile.
    mask [L, D], of a masked method: the rows of down_proj where it is not zero move [D9]."""
    method, stand_ins, masks = METHODS[recipe.method], [], {}
    for name, p in model.named_parameters():
        p.requires_grad_(MOVES[moves_of(recipe)](name))
    if method.masked:
        if mask is None or mask.shape != (len(model.layers), model.config.hidden_size):
            raise UserError(f"method {recipe.method} needs a mask of one value per layer and "
                            "neuron; make_mask gives one")
        for block, critical in zip(model.layers, mask):
            if critical.any():
                rows = CriticalRows(block.mlp.down_proj, critical)
                stand_ins.append((block.mlp, block.mlp.down_proj, rows))
                block.mlp.down_proj, masks[rows.rows] = rows, rows.mask
    try:
        moving = [start_moving(name, p, recipe.state, masks.get(p))
                  for name, p in model.named_parameters() if p.requires_grad]
        if not moving:
            raise UserError(f"method {recipe.method} moves nothing here: the mask is empty and "
                            "attention frozen; lower the threshold or let attention move")
        yield moving
    finally:
        for mlp, linear, rows in stand_ins:
            rows.refresh()
            mlp.down_proj = linear
        for p in model.parameters():
            p.requires_grad_(True)


def start_moving(name: str, p: nn.Parameter, state: str, mask: Tensor | None) -> Moving:
    dtype = getattr(torch, state)
    full = p.dtype == torch.float32 or dtype == torch.bfloat16
    master = p.detach() if full else p.detach().float()
    m, h = (torch.zeros_like(master, dtype=dtype) for _ in range(2))
    return Moving(name, p, master, m, h, p.dim() == 2, mask)


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with the probability that makes it right on average [D10]."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device,
                          generator=generator)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


PART = {"cpu": 1 << 17}  # weights updated at once: an update's temporaries fit a CPU's cache
LARGE_PART = 1 << 24  # elsewhere: few kernels, and temporaries smaller than an embedding


def parts_of(w: Moving) -> list[tuple[Tensor, Moving]]:
    """A weight that moves as runs of its rows, each with its gradient, which is let go."""
    most = PART.get(w.weight.device.type, LARGE_PART)
    rows = max(1, most * len(w.weight) // w.weight.numel())
    grad, w.weight.grad = w.weight.grad, None
    runs = list(zip(*(t.split(rows) for t in (grad, w.weight, w.master, w.m, w.h))))
    masks = [None] * len(runs) if w.mask is None else w.mask.split(rows)
    return [(grad, Moving(w.name, *own, w.decayed, mask))
            for (grad, *own), mask in zip(runs, masks)]


@torch.no_grad()
def apply_updates(moving: list[Moving], update, *, scale: float, generator: torch.Generator) -> int:
    """Call update(param, grad, m, h, part) in float32 on parts of each moving weight, with their
    gradients times `scale`; gradients are freed on the way. Returns the clipped coordinates."""
    clipped = 0
    for grad, w in (part for weight in moving for part in parts_of(weight)):
        grad = grad.float() * scale
        if w.m.dtype == torch.float32:
            clipped += update(w.master, grad, w.m, w.h, w)
            if w.master.dtype != w.weight.dtype:
                w.weight.copy_(w.master)
            continue
        wide = [t.float() for t in (w.master, w.m, w.h)]
        clipped += update(wide[0], grad, wide[1], wide[2], w)
        for narrow, t in zip((w.master, w.m, w.h), wide):
            narrow.copy_(stochastic_round(t, generator)
                         if narrow.dtype == torch.bfloat16 else t)
    return int(clipped)


@torch.no_grad()
def read_masters(moving: list[Moving], rows: list[CriticalRows]):
    """Bring what the model computes with up to its masters."""
    for w in moving:
        if w.master.dtype != w.weight.dtype:
            w.weight.copy_(w.master)
    for module in rows:
        module.refresh()


# --------------------------------------------------------------------------- step 2: the loop


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear rise over the first share of updates, then linear decay to 0. step counts from 1."""
    rise = max(1, int(total * warmup))
    return peak * min(step / rise, (total - step + 1) / (total - rise + 1))


def plain_loop(title: str, steps: int, tensors: dict[str, Tensor]):
    """Step numbers from 1. Another loop may fill `tensors`, which are all that the steps change,
    with those of an interrupted run, and go on from there; it must draw nothing at random."""
    yield from range(1, steps + 1)


def train(model: Transformer, moving: list[Moving], order: list, backward, recipe: "Unlearning", *,
          optimiser, lr: float, title: str, loop=None, record=None) -> list[dict]:
    """Run one update per item of `order`; returns a log row per update, also given to record(row).

    backward(item) leaves gradients and returns the losses by name; optimiser: a row of OPTIMISERS.
    Items, rates and random bits depend on the step alone, so that `loop` may go on from any."""
    total, count = len(order), sum(w.master.numel() for w in moving)
    generator = torch.Generator(moving[0].master.device)
    rows = [module for module in model.modules() if isinstance(module, CriticalRows)]
    tensors = {f"{w.name}.{k}": getattr(w, k) for w in moving for k in ("master", "m", "h")}
    log = []
    with tqdm(total=total, desc=title) as bar:
        for step in (loop or plain_loop)(title, total, tensors):
            if not log:  # the loop may have filled the masters
                read_masters(moving, rows)
            losses = backward(order[step - 1])
            norm = torch.stack([w.weight.grad.float().norm() for w in moving]).norm().item()
            if not all(abs(x) < float("inf") for x in (norm, *losses.values())):
                raise UserError(f"{title}: loss or gradient is not finite at update {step} of "
                                f"{total}; {to_put_right(recipe, lr)}")
            rate = learning_rate(step, total, lr, recipe.warmup)
            generator.manual_seed(recipe.seed * 1_000_003 + step)

            def update(p, g, m, h, w):
                moments, move = optimiser(recipe, rate, recipe.weight_decay * w.decayed, step)
                return masked_update(p, g, m, h, moments=moments, step=move, mask=w.mask)

            clipped = apply_updates(moving, update, scale=min(1.0, recipe.clip / (norm + 1e-6)),
                                    generator=generator)
            for module in rows:
                module.refresh()
            log.append(dict(step=step, **losses, lr=rate, grad_norm=norm, clipped=clipped / count))
            bar.set_postfix({k: f"{v:.3f}" for k, v in losses.items()}, refresh=False)
            bar.update(step - bar.n)
            if record:
                record(log[-1])
    if not all(torch.isfinite(w.master).all() for w in moving):
        raise UserError(f"{title}: weights are not finite after the last update; "
                        + to_put_right(recipe, lr))
    return log


def to_put_right(recipe: "Unlearning", lr: float) -> str:
    """What to change where numbers overflow: first what no recipe sets, if it was changed."""
    changed = [f"--{f.name.replace('_', '-')} (now {getattr(recipe, f.name):g})"
               for f in fields(recipe)
               if f.name in CONSTANTS and getattr(recipe, f.name) != f.default]
    put_back = f"put back {' and '.join(changed)}, or " if changed else ""
    return f"{put_back}lower --lr (now {lr:g})"


def unlearning_order(n_forget: int, n_retain: int, recipe: "Unlearning"
                     ) -> list[tuple[list, list]]:
    """For each update, the forget rows and the retain rows drawn to go with them [D8]. Epochs of
    permutations laid end to end and cut into whole batches, as SOUL counts them."""
    rng = random.Random(recipe.seed)
    forget = [i for _ in range(recipe.epochs) for i in rng.sample(range(n_forget), n_forget)]
    whole = len(forget) // recipe.batch * recipe.batch
    if not whole:
        raise UserError(f"{n_forget} forget rows times {recipe.epochs} epochs do not fill one "
                        f"batch of {recipe.batch}; lower --batch")
    pairs = [(i, rng.randrange(n_retain) if n_retain else None) for i in forget[:whole]]
    return [tuple(zip(*pairs[i:i + recipe.batch])) for i in range(0, whole, recipe.batch)]


def unlearn(model: Transformer, forget: list[Encoded], retain: list[Encoded],
            mask: Tensor | None, recipe: "Unlearning", *, targets=None, title: str = "unlearn",
            loop=None, record=None) -> list[dict]:
    """Step 2 on model, in place: recipe.method with recipe.objective; returns the log, a row per
    update. mask [L, D]: of masked methods. targets: of objectives that end somewhere, a loss, or
    for each forget row a loss or those of its tokens. UserError where a loss is not finite or the
    rows do not fill a batch."""
    order = unlearning_order(len(forget), len(retain), recipe)
    objective = OBJECTIVES[recipe.objective]
    known = known_of_rows(model, forget, recipe, targets)
    weight = recipe.lam if objective.retain is None else objective.retain
    if weight and not retain:
        raise UserError(f"objective {recipe.objective} needs retain rows; give some, or lam = 0")

    def backward(item):
        # Two passes, each freed before the next: by linearity the gradient of the whole loss.
        losses = {}
        if objective.forget:
            losses["loss_forget"] = backward_forget(
                model, [forget[i] for i in item[0]], [known[i] for i in item[0]], recipe)
        if weight:
            losses["loss_retain"] = backward_mean_nll(
                model, [retain[i] for i in item[1]], weight, recipe.micro_tokens)
        return losses

    model.checkpoint = recipe.checkpointing
    with moving_weights(model, recipe, mask) as moving:
        log = train(model, moving, order, backward, recipe, lr=recipe.lr, title=title, loop=loop,
                    optimiser=OPTIMISERS[METHODS[recipe.method].optimiser], record=record)
    need_finite_losses(model, forget, recipe, title)
    return log


@torch.no_grad()
def need_finite_losses(model: Transformer, rows: list[Encoded], recipe: "Unlearning", title: str):
    """Weights can be finite and what they compute not. An update's loss tells of the one before it;
    of the last one, at most eight rows spread over all of them do."""
    for row in rows[::-(-len(rows) // 8)]:
        if not nll_sum(model, collate([row], model.embed_tokens.weight.device)).isfinite():
            raise UserError(f"{title}: the model's losses are not finite after the last update; "
                            + to_put_right(recipe, recipe.lr))


# ------------------------------------------------------------------ settings and Tables 3-4

PATHS = ("layer", "neuron")
CONSTANTS = ("beta1", "beta2", "gamma", "eps", "adam_beta2", "adam_eps", "clip", "npo_beta",
             "simnpo_beta", "simnpo_margin", "undial_strength", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Step 1, scores (Section 2.1)."""

    seed: int = option(0, "seeds every draw: slice, initial weights, order, pairing")
    steps: int = option(5, "m: nodes on the path from 0 to beta (Eq. 1)")
    path: str = option("layer", "scale a layer's outputs together, or one neuron at a time [D4]",
                       choices=PATHS)
    attribution_tokens: int = option(4096, "tokens in one attribution pass, path nodes counted in")


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Step 1, mask (Section 2.1)."""

    seed: int = option(0, "seeds every draw: slice, initial weights, order, pairing")
    threshold: float = option(0.3, "t: critical if Att > t * max of the layer")
    mask: str = option("dual", "dual keeps neurons critical for both sets [D6], forget-only drops, "
                       "soft weighs them; random: of equal size; none: attention only; all: no "
                       "mask on down_proj", choices=tuple(MASKS))


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """Step 2 (Section 2.2)."""

    seed: int = option(0, "seeds every draw: slice, initial weights, order, pairing")
    method: str = option("simu", "fo: AdamW on all weights; so: Sophia on all; simu: Sophia on "
                         "attention and critical rows", choices=tuple(METHODS))
    objective: str = option("graddiff", "; ".join(f"{k}: {v.about}" for k, v in OBJECTIVES.items()),
                            choices=tuple(OBJECTIVES))
    attention: str = option("moving", "of masked methods: frozen follows the sentence after Eq. 7 "
                            "[D9]", choices=("moving", "frozen"))
    npo_beta: float = option(0.1, "beta of NPO")
    simnpo_beta: float = option(4.5, "beta of SimNPO")
    simnpo_margin: float = option(0.0, "gamma of SimNPO")
    undial_strength: float = option(10.0, "how much UNDIAL lowers the answer's logit")
    lr: float = option(5e-6, "eta: peak learning rate")
    epochs: int = option(5, "passes over the forget set")
    batch: int = option(16, "forget rows per update, each with one retain row")
    micro_tokens: int = option(8192, "tokens in one forward-backward pass; a batch is cut to fit")
    lam: float = option(2.0, "lambda: weight of the retain loss")
    beta1: float = option(0.9, "of the first moment (Eq. 4)")
    beta2: float = option(0.95, "of the curvature (Eq. 4)")
    gamma: float = option(204.8, "damping (Eq. 3): SOUL's rho * bs = 0.04 * 5120 [D7]")
    eps: float = option(1e-15, "floor of gamma * H (Eq. 3)")
    adam_beta2: float = option(0.999, "AdamW's second moment (FO-GradDiff)")
    adam_eps: float = option(1e-8, "AdamW's epsilon (FO-GradDiff)")
    weight_decay: float = option(0.1, "decoupled, none on norms [D7]")
    clip: float = option(1.0, "largest gradient norm over the weights that move")
    warmup: float = option(0.1, "share of updates with rising learning rate")
    state: str = option("float32", "optimiser state and master weights; bfloat16 rounds "
                        "stochastically [D10]", choices=("float32", "bfloat16"))
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
