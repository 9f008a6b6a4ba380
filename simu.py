"""SIMU: Selective Influence Machine Unlearning (arXiv 2510.07822), both steps and both baselines.

Step 1 scores every MLP output neuron by how much it carries the forget set (`attribute`, Eq. 1-2)
and keeps the critical ones (`critical_mask`, Section 2.1). Step 2 unlearns with GradDiff
(`graddiff_loss`, A.1) under Sophia (`sophia_update`, Eq. 3-7), moving only the attention
projections and the critical rows of down_proj. `make_mask` and `unlearn` hold the variants that
the paper compares with or points to.

    code         paper                               where       shape
    beta         beta_{l,i}: MLP output              Eq. 1       [D] per layer l and sample i
    a            a_j = (j/m) beta                    Eq. 1a      as beta
    log P        -L_i(a_j), see [D3]                 Eq. 1b      scalar
    scores       Att(w_l^k)                          Eq. 2       [L, D]
    steps        m                                   Eq. 1-2
    threshold    t;  critical iff Att > t * M_l      Section 2.1
    mask         M (make_mask: six kinds)            Eq. 5-7     [L, D], rows of down_proj [D, F]
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
import json
import os
import random
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import stage  # before torch: it silences a warning of torch's import

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

import data
import hub
from card import write_card, write_generation_config
from data import IGNORE, Batch, Encoded, collate
from eval import evaluate_model
from model import Config, Transformer, causal_attention, save_tensors
from resume import Checkpoints
from stage import Settings, Stage, UserError, mask_name, unlearned_name

# ----------------------------------------------------------------------------------------- recipes

# Tables 3 and 4. A key naming a method ("fo", "so", "simu") holds what only that method overrides,
# and "original" what fine-tuning one overrides, where nobody published it (hub.ORIGINALS).
PAPER = dict(batch=16, fo=dict(lam=0.3), so=dict(lam=2.0), simu=dict(lam=2.0))
TOFU = dict(max_total_tokens=200, max_new_tokens=0)
LUME = dict(max_total_tokens=0, max_new_tokens=256, template="raw")
# So that at 7B SIMU fits 48 GB, and the baselines, which move everything, one card of 80 GB.
FIT_7B = dict(micro_tokens=512, fo=dict(lam=0.3, state="bfloat16"),
              so=dict(lam=2.0, state="bfloat16"))
# As TOFU made its own: 5 epochs, the first of them warm-up, 32 rows per update, at the rate of its
# model of this size, phi-1.5. How LUME's was made is not known to us: the rate of TOFU's 7B, and
# more epochs, as its rows are to be known by heart.
LEARN_TOFU = dict(learn_lr=2e-5, learn_epochs=5, learn_batch=32,
                  original=dict(weight_decay=0.01, warmup=0.2))
LEARN_LUME = LEARN_TOFU | dict(learn_lr=1e-5, learn_epochs=10,
                               original=dict(weight_decay=0.01, warmup=0.1))
RECIPES = {
    ("tofu", "llama2-7b"): PAPER | TOFU | FIT_7B | dict(threshold=0.3, steps=5, lr=5e-6, epochs=5,
                                                        template="llama2"),
    ("tofu", "olmo-1b"): PAPER | TOFU | LEARN_TOFU | dict(threshold=0.1, steps=5, lr=5e-6,
                                                       epochs=20),
    ("lume", "llama2-7b"): PAPER | LUME | FIT_7B | LEARN_LUME | dict(
        threshold=0.1, steps=3, lr=9e-6, epochs=20,
        original=LEARN_LUME["original"] | dict(state="bfloat16")),
    ("lume", "olmo-1b"): PAPER | LUME | LEARN_LUME | dict(threshold=0.3, steps=5, lr=5e-6,
                                                          epochs=10, fo=dict(lam=0.3, epochs=5)),
}
# Tiny models, made here on a CPU. Their learning rates come from the grid in benchmarks/.
TINY = PAPER | dict(threshold=0.6, steps=5, epochs=40, batch=4, eval_tokens=8192,
                    fo=dict(lam=0.3, lr=2e-4), so=dict(lam=2.0, lr=1e-4),
                    simu=dict(lam=2.0, lr=8e-4))
for _model in ("tiny-llama", "tiny-olmo"):
    RECIPES["demo", _model] = TINY | TOFU | dict(
        rows_per_author=10, learn_epochs=30, light_epochs=15)
    RECIPES["tofu", _model] = TINY | TOFU | dict(
        forget_groups=2, retain_groups=15, learn_epochs=25, light_epochs=15, epochs=20)
    RECIPES["lume", _model] = TINY | LUME | dict(
        forget_groups=3, retain_groups=8, learn_epochs=60, light_lr=1e-3, light_epochs=40,
        epochs=20)


def resolve(given: dict) -> Settings:
    """Settings from defaults, then the recipe, then the recipe's method, then what was given."""
    base = Settings(**{k: given[k] for k in ("benchmark", "model", "method") if k in given})
    recipe = RECIPES[base.benchmark, base.model]
    common = {k: v for k, v in recipe.items() if k not in (*stage.METHODS, "original")}
    values = common | recipe.get(base.method, {}) | given
    if base.benchmark != "demo" and not values.get("data"):
        values["data"] = os.environ.get("SIMU_DATA") or hub.default_data()
    for place in ("data", "weights"):  # a run must be readable from any folder
        if values.get(place) and not values[place].startswith("hf:"):
            values[place] = str(Path(values[place]).expanduser().absolute())
    return Settings(**values)


# --------------------------------------------------------------------- step 1: attribution (2.1)


def attribute(model: Transformer, batch: Batch, *, steps: int = 5, path: str = "layer") -> Tensor:
    """Att(w_l^k) of Eq. 2 summed over the batch's samples: float32 [L, D].

    A sample is one answer token with the prefix before it; beta is the MLP output at the last
    position of that prefix, and only that position is scaled [D2]. The exact scores cost about
    L*(m-1)/2 forward-backward passes per *pair*, however many tokens its answer has: the clean pass
    is run once and keeps every layer's keys and values, then all samples and nodes of a pair go
    through the upper layers together. path="neuron" scales one neuron at a time, to the letter of
    Eq. 1, at D times the cost [D4]: for tiny models.
    """
    if steps < 1:
        raise UserError(f"steps m = {steps}; it must be at least 1")
    if path not in ("layer", "neuron"):
        raise UserError(f"path {path!r} is unknown; choose layer or neuron")
    with _frozen(model):
        run = _CleanRun(model, batch)
        scores = _last_node(run)  # j = m: nothing is scaled, so one pass serves every layer
        for l in range(len(model.layers)):
            inner = _layer_path if path == "layer" else _neuron_path
            if steps > 1:
                scores[l] += inner(run, l, steps)
    return scores / steps


@contextmanager
def _frozen(model):
    """No gradients of weights while the block runs: only activations need them here."""
    moving = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in moving:
            p.requires_grad_(False)
        yield
    finally:
        for p in moving:
            p.requires_grad_(True)


class _CleanRun:
    """One unscaled pass over a batch, and what the second stream needs of it."""

    @torch.no_grad()
    def __init__(self, model: Transformer, batch: Batch):
        self.model = model
        ids, targets = batch.ids, batch.targets
        answer = targets != IGNORE  # [B, T]
        if not answer.any():
            raise UserError("a batch without answer tokens has nothing to attribute")
        A = int(answer.sum(1).max())
        # Answer positions first, in order; rows with shorter answers are padded, label IGNORE.
        self.pos = answer.int().argsort(dim=1, descending=True, stable=True)[:, :A]  # [B, A]
        self.labels = targets.gather(1, self.pos)  # [B, A]
        cos, sin = model.rope(torch.arange(ids.shape[1], device=ids.device))
        self.x0 = self._at(model.embed_tokens(ids))  # [B, A, D]
        self.keys, self.values, self.mid, self.beta = [], [], [], []
        h = model.embed_tokens(ids)  # [B, T, D]
        for block in model.layers:
            q, k, v = block.qkv(h, cos, sin)
            h = block.add_attention(h, causal_attention(q, k, v))
            beta = block.beta(h)
            self.keys.append(k)
            self.values.append(v)
            self.mid.append(self._at(h))  # residual stream below the MLP's output
            self.beta.append(self._at(beta))
            h = block.add_beta(h, beta)

    def _at(self, x):
        """x [B, T, D] at the answer positions: [B, A, D]."""
        return x.gather(1, self.pos[..., None].expand(-1, -1, x.shape[-1]))


def _row_attention(run: _CleanRun, l: int, x: Tensor, pos: Tensor) -> Tensor:
    """Rows x [B, R, D] with layer l's attention, each the last position of its own prefix: it sees
    the clean keys and values of earlier positions and its own at pos [B, R], nobody else's."""
    block = run.model.layers[l]
    keys, values = run.keys[l], run.values[l]  # [B, K, T, hd]
    B, K, T, hd = keys.shape
    cos, sin = run.model.rope(pos)  # [B, R, hd]
    q, k, v = block.qkv(x, cos, sin)
    R = x.shape[1]
    q = q.reshape(B, K, -1, R, hd) * hd ** -0.5  # [B, K, H/K, R, hd]
    clean = (q.flatten(2, 3) @ keys.transpose(-1, -2)).view(*q.shape[:4], T)  # [B, K, H/K, R, T]
    later = torch.arange(T, device=x.device) >= pos[..., None]  # [B, R, T]
    clean = clean.masked_fill(later[:, None, None], float("-inf"))
    own = (q * k[:, :, None]).sum(-1, keepdim=True)  # [B, K, H/K, R, 1]
    p = torch.cat([clean, own], dim=-1).float().softmax(-1).to(x.dtype)  # [B, K, H/K, R, T+1]
    mixed = (p[..., :T].flatten(2, 3) @ values).view_as(q) + p[..., T:] * v[:, :, None]
    mixed = mixed.reshape(B, -1, R, hd).transpose(1, 2).flatten(2)  # [B, R, H*hd]
    return block.add_attention(x, mixed)


def _log_p(run: _CleanRun, x: Tensor, labels: Tensor) -> Tensor:
    """Sum of log P(label) for rows x [B, R, D] that left the last layer [D3]."""
    logits = run.model.logits(run.model.norm(x))  # [B, R, V]
    return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE,
                            reduction="sum")


def _upper_layers(run: _CleanRun, l: int, x: Tensor, pos: Tensor) -> Tensor:
    """Rows x [B, R, D] that left layer l, through the layers above it."""
    for u in range(l + 1, len(run.model.layers)):
        block = run.model.layers[u]
        x = _row_attention(run, u, x, pos)
        x = block.add_beta(x, block.beta(x))
    return x


def _last_node(run: _CleanRun) -> Tensor:
    """beta * dlogP/da at a = beta, every layer from one backward pass: float32 [L, D]."""
    with torch.enable_grad():
        x, activations = run.x0, []
        for l, block in enumerate(run.model.layers):
            x = _row_attention(run, l, x, run.pos)
            a = block.beta(x)
            if not a.requires_grad:  # the lowest layer: nothing below it is differentiated
                a.requires_grad_()
            activations.append(a)
            x = block.add_beta(x, a)
        grads = torch.autograd.grad(_log_p(run, x, run.labels), activations)
    return torch.stack([(beta.float() * g.float()).sum((0, 1))
                        for beta, g in zip(run.beta, grads)])


def _layer_path(run: _CleanRun, l: int, steps: int) -> Tensor:
    """Nodes j = 1..m-1 of layer l's joint path, all at once, summed: float32 [D] [D4]."""
    beta, J = run.beta[l], steps - 1
    scale = torch.arange(1, steps, device=beta.device, dtype=beta.dtype) / steps
    with torch.enable_grad():
        a = (scale[:, None, None] * beta[:, None]).requires_grad_()  # [B, J, A, D]
        x = run.model.layers[l].add_beta(run.mid[l][:, None], a).flatten(1, 2)  # [B, R, D]
        x = _upper_layers(run, l, x, run.pos.repeat(1, J))
        grad, = torch.autograd.grad(_log_p(run, x, run.labels.repeat(1, J)), a)
    return (beta.float()[:, None] * grad.float()).sum((0, 1, 2))


def _neuron_path(run: _CleanRun, l: int, steps: int, rows: int = 4096) -> Tensor:
    """Nodes j = 1..m-1 of layer l with one neuron scaled and all others at beta: float32 [D]."""
    beta, J = run.beta[l], steps - 1
    B, A, D = beta.shape
    scale = torch.arange(1, steps, device=beta.device, dtype=beta.dtype) / steps
    chunk = max(1, rows // (B * J * A))
    scores = torch.zeros(D, device=beta.device)
    for neurons in torch.arange(D, device=beta.device).split(chunk):
        C = len(neurons)
        b = beta[..., neurons].movedim(-1, 1)[:, :, None]  # [B, C, 1, A]
        with torch.enable_grad():
            a = (scale[:, None] * b).requires_grad_()  # [B, C, J, A]
            unit = F.one_hot(neurons, D).to(beta.dtype)[:, None, None]  # [C, 1, 1, D]
            whole = beta[:, None, None] + (a - b)[..., None] * unit  # [B, C, J, A, D]
            x = run.model.layers[l].add_beta(run.mid[l][:, None, None], whole)
            x = _upper_layers(run, l, x.flatten(1, 3), run.pos.repeat(1, C * J))
            grad, = torch.autograd.grad(_log_p(run, x, run.labels.repeat(1, C * J)), a)
        scores[neurons] += (b.float() * grad.float()).sum((0, 2, 3))
    return scores


def critical_mask(scores: Tensor, threshold: float) -> Tensor:
    """bool [L, D]: Att > t * M_l with M_l = max_k Att(w_l^k), strict, layer by layer. A layer
    whose maximum is not positive holds nothing critical [D5]."""
    if not 0 < threshold <= 1:
        raise UserError(f"threshold t = {threshold}; it must be in (0, 1]")
    _need_finite(scores)
    top = scores.amax(dim=1, keepdim=True)
    return (scores > threshold * top) & (top > 0)


def _need_finite(scores: Tensor):
    if not torch.isfinite(scores).all():
        raise UserError("attribution scores are not finite; the model's weights or activations "
                        "overflow: attribute in float32 (--dtype float32), or fetch it again")


def make_mask(kind: str, forget: Tensor, retain: Tensor, *, threshold: float, seed: int) -> Tensor:
    """M [L, D] of one of the six kinds, from forget and retain scores [L, D]: bool, soft float32.
    none leaves attention alone to move; all moves every row of down_proj beside it."""
    critical = critical_mask(forget, threshold)
    if kind == "forget-only":
        return critical & ~critical_mask(retain, threshold)
    if kind == "soft":  # the share of a critical neuron that is the forget set's: 1 if all of it
        f, r = (x.clamp_min(0) / x.amax(1, keepdim=True).clamp_min(1e-30) for x in (forget, retain))
        return torch.where(critical, f / (f + r), 0.0)
    if kind == "random":  # as many in every layer as are critical
        draw = torch.rand(critical.shape, generator=torch.Generator().manual_seed(seed))
        return draw.argsort(1).argsort(1) < critical.sum(1, keepdim=True)
    return {"dual": critical, "none": torch.zeros_like(critical),
            "all": torch.ones_like(critical)}[kind]  # dual: also what is critical for both [D6]


# ---------------------------------------------------------------------- step 2: unlearning (2.2)


def nll_sum(model: Transformer, batch: Batch) -> Tensor:
    """Summed -log P of the answer tokens and eos. Only they go through the output head."""
    counted = batch.targets != IGNORE
    logits = model.logits(model.hidden(batch.ids)[counted])  # [N, V]
    return F.cross_entropy(logits, batch.targets[counted], reduction="sum")


def mean_nll(model: Transformer, batch: Batch) -> Tensor:
    """Mean -log P over the answer tokens of a batch: l(y | x) of A.1."""
    return nll_sum(model, batch) / (batch.targets != IGNORE).sum()


def graddiff_loss(model: Transformer, forget: Batch, retain: Batch, lam: float) -> Tensor:
    """GradDiff (A.1): ascent on the forget rows, descent on the retain rows [D8]. `ga` is its
    first term, `retain` its second without lam; `npo` and `po` put another in the first's place:
    npo_loss, and descent on REFUSALS instead of the forget rows' answers."""
    return -mean_nll(model, forget) + lam * mean_nll(model, retain)


def row_log_p(model: Transformer, batch: Batch) -> Tensor:
    """log P(y | x) of each row, eos counted: [B]."""
    counted = batch.targets != IGNORE
    logits = model.logits(model.hidden(batch.ids)[counted])  # [N, V]
    losses = F.cross_entropy(logits, batch.targets[counted], reduction="none")
    return -torch.stack([x.sum() for x in losses.split(counted.sum(1).tolist())])


def npo_loss(log_p: Tensor, reference: Tensor, beta: float) -> Tensor:
    """NPO (A.2): mean of 2/beta log(1 + (P / P_ref)^beta) over rows' log P [B], under the model
    and under the original. Its pull ends where GradDiff's ascent has none."""
    return 2 / beta * F.softplus(beta * (log_p - reference)).mean()


REFUSALS = ("I do not know.", "I cannot say.", "That is not something I know about.",
            "I have no information on this.", "I am unable to answer that.",
            "Nothing of the kind is known to me.")


def sophia_update(param: Tensor, grad: Tensor, m: Tensor, h: Tensor, *, lr: float, beta1: float,
                  beta2: float, gamma: float, eps: float, weight_decay: float,
                  mask: Tensor | None = None) -> Tensor:
    """One Sophia step in place on param, m and h (all of one shape; mask broadcasts to it, real
    values in [0, 1] allowed): Eq. 4-6, then Eq. 3 with decay, then Eq. 7. One EMA of g and one of
    g^2, both at every step [D7]. Returns how many coordinates the clip of Eq. 3 bound."""
    m_new = beta1 * m + (1 - beta1) * grad  # Eq. 5, first line
    h_new = beta2 * h + (1 - beta2) * grad.square()  # Eq. 6, first line
    if mask is not None:
        mask = mask.to(param.dtype)
        m_new = mask * m_new + (1 - mask) * m  # (i) Eq. 5
        h_new = mask * h_new + (1 - mask) * h  # (ii) Eq. 6
    m.copy_(m_new)
    h.copy_(h_new)
    ratio = m / (gamma * h).clamp_min(eps)
    new = param * (1 - lr * weight_decay) - lr * ratio.clamp(-1, 1)  # Eq. 3 with decoupled decay
    if mask is not None:
        # (iii) Eq. 7. Where mask is 0 the old bits stay, which M*new + (1-M)*old cannot promise
        # once new is not finite.
        new = torch.where(mask == 0, param, mask * new + (1 - mask) * param)
    param.copy_(new)
    return (ratio.abs() >= 1).sum()


def adamw_update(param: Tensor, grad: Tensor, m: Tensor, h: Tensor, *, lr: float, beta1: float,
                 beta2: float, eps: float, weight_decay: float, step: int) -> Tensor:
    """One AdamW step in place, step counted from 1. Returns 0: it has no clip of its own."""
    m.lerp_(grad, 1 - beta1)
    h.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (h / (1 - beta2 ** step)).sqrt_().add_(eps)
    param.mul_(1 - lr * weight_decay).addcdiv_(m, root, value=-lr / (1 - beta1 ** step))
    return torch.zeros((), dtype=torch.int64, device=param.device)


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with the probability that makes it right on average [D10]."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device,
                          generator=generator)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class _RowLinear(torch.autograd.Function):
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
    """Stands in for a down_proj while its critical rows move: `rows` [C, F] is a parameter of its
    own, so neither gradient nor optimiser state of the frozen rows ever exists. critical: M of
    the layer [D]; where it is soft, `weight` [C, 1] is what Eq. 5-7 still have to apply."""

    def __init__(self, linear: nn.Linear, critical: Tensor):
        super().__init__()
        self.linear = [linear]  # in a list: not a submodule, its weight is not a parameter of ours
        index, device = critical.nonzero().squeeze(1), linear.weight.device
        self.index = index.to(device)  # [C]
        soft = critical.is_floating_point()
        self.weight = critical[index, None].to(device) if soft else None
        self.rows = nn.Parameter(linear.weight.detach()[self.index].clone())  # [C, F]

    def forward(self, x):
        return _RowLinear.apply(x, self.linear[0].weight.detach(), self.rows, self.index)

    @torch.no_grad()
    def refresh(self):
        """Put the moved rows where the forward pass reads them."""
        self.linear[0].weight[self.index] = self.rows


@dataclasses.dataclass
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
def moving_weights(model: Transformer, method: str, mask: Tensor | None, state: torch.dtype):
    """The weights that `method` moves [D9], as a list of Moving; all others are frozen meanwhile.
    fo, so: every weight. simu: attention projections, and the rows of down_proj where mask
    [L, D] is not zero."""
    stand_ins, masks = [], {}
    for p in model.parameters():
        p.requires_grad_(method != "simu")
    if method == "simu":
        for block, critical in zip(model.layers, mask):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):  # with biases; no norm moves
                getattr(block.self_attn, name).requires_grad_(True)
            if critical.any():
                rows = CriticalRows(block.mlp.down_proj, critical)
                stand_ins.append((block.mlp, block.mlp.down_proj, rows))
                block.mlp.down_proj, masks[rows.rows] = rows, rows.weight
    moving = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            full = p.dtype == torch.float32 or state == torch.bfloat16
            master = p.detach() if full else p.detach().float()
            moving.append(Moving(name, p, master, torch.zeros_like(master, dtype=state),
                                 torch.zeros_like(master, dtype=state), p.dim() == 2,
                                 masks.get(p)))
    try:
        yield moving
    finally:
        for mlp, linear, rows in stand_ins:
            rows.refresh()
            mlp.down_proj = linear
        for p in model.parameters():
            p.requires_grad_(True)


@torch.no_grad()
def apply_updates(moving: list[Moving], update, *, scale: float, generator: torch.Generator) -> int:
    """Call update(param, grad, m, h, w) in float32 on each moving weight w, with its gradient
    times `scale`; gradients are freed on the way. Returns the clipped coordinates."""
    clipped = 0
    for w in moving:
        grad = w.weight.grad.float() * scale
        w.weight.grad = None
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


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear rise over the first share of updates, then linear decay to 0. step counts from 1."""
    rise = max(1, int(total * warmup))
    return peak * min(step / rise, (total - step + 1) / (total - rise + 1))


def micro_batches(rows: list[Encoded], tokens: int, device) -> list[Batch]:
    """Rows cut into batches of at most `tokens` tokens, padding counted in."""
    return [collate([rows[i] for i in part], device)
            for part in data.batches_by_length(rows, tokens)]


def backward_mean_nll(model, rows: list[Encoded], weight: float, tokens: int) -> float:
    """Back-propagate weight * mean_nll(rows) in passes of at most `tokens`; returns mean_nll."""
    device = model.embed_tokens.weight.device
    count = sum(len(r.ids) - max(r.n_prompt, 1) for r in rows)
    total = 0.0
    for batch in micro_batches(rows, tokens, device):
        loss = nll_sum(model, batch) / count
        (weight * loss).backward()
        total += loss.item()
    return total


def train(model, moving: list[Moving], order: list, backward, update, *, s: Settings, lr: float,
          warmup: float, log: Path, title: str, after=None):
    """Run one update per item of `order`. backward(item) leaves gradients and returns the losses
    by name; update(param, grad, m, h, lr, w, step) is a step of the weight w; after(step) is
    called when it is done. A line per update goes to `log`. In a killed stage's folder it goes on
    from the last checkpoint: items, rates and random bits depend on the step alone."""
    total, count = len(order), sum(w.master.numel() for w in moving)
    generator = torch.Generator(moving[0].master.device)
    rows = [m for m in model.modules() if isinstance(m, CriticalRows)]
    kept = Checkpoints(log.parent, title, {f"{w.name}.{k}": getattr(w, k) for w in moving
                                           for k in ("master", "m", "h")}, s)
    if done := kept.restore():
        read_masters(moving, rows)
    with (open(log, "a" if done else "w", encoding="utf-8") as file,
          tqdm(total=total, initial=done, desc=title) as bar):
        for step, item in enumerate(order[done:], done + 1):
            losses = backward(item)
            norms = torch.stack([w.weight.grad.float().norm() for w in moving])
            norm = norms.norm().item()
            if not all(map(_finite, (norm, *losses.values()))):
                raise UserError(f"{title}: loss or gradient is not finite at update {step} of "
                                f"{total}; lower --lr{kept.told()}")
            rate = learning_rate(step, total, lr, warmup)
            generator.manual_seed(s.seed * 1_000_003 + step)
            clipped = apply_updates(
                moving, lambda p, g, m, h, w: update(p, g, m, h, rate, w, step),
                scale=min(1.0, s.clip / (norm + 1e-6)), generator=generator)
            for module in rows:
                module.refresh()
            file.write(json.dumps(dict(step=step, **losses, lr=rate, grad_norm=norm,
                                       clipped=clipped / count)) + "\n")
            bar.set_postfix({k: f"{v:.3f}" for k, v in losses.items()}, refresh=False)
            bar.update()
            if after:
                after(step)
            file.flush()
            kept.keep(step)


@torch.no_grad()
def read_masters(moving: list[Moving], rows: list[CriticalRows]):
    """Bring what the model computes with up to its masters."""
    for w in moving:
        if w.master.dtype != w.weight.dtype:
            w.weight.copy_(w.master)
    for module in rows:
        module.refresh()


def _finite(x: float) -> bool:
    return abs(x) < float("inf")


def unlearning_order(n_forget: int, n_retain: int, s: Settings) -> list[tuple[list, list]]:
    """For each update, the forget rows and the retain rows drawn to go with them [D8]. Epochs of
    permutations laid end to end and cut into whole batches, as SOUL counts them."""
    rng = random.Random(s.seed)
    forget = [i for _ in range(s.epochs) for i in rng.sample(range(n_forget), n_forget)]
    whole = len(forget) // s.batch * s.batch
    if not whole:
        raise UserError(f"{n_forget} forget rows times {s.epochs} epochs do not fill one batch of "
                        f"{s.batch}; lower --batch")
    pairs = [(i, rng.randrange(n_retain)) for i in forget[:whole]]
    return [tuple(zip(*pairs[i:i + s.batch])) for i in range(0, whole, s.batch)]


def backward_npo(model, rows: list[Encoded], reference: list[float], beta: float,
                 tokens: int) -> float:
    """Back-propagate npo_loss(rows) in passes of at most `tokens`; returns it."""
    device, total = model.embed_tokens.weight.device, 0.0
    for part in data.batches_by_length(rows, tokens):
        log_p = row_log_p(model, collate([rows[i] for i in part], device))
        ref = torch.tensor([reference[i] for i in part], device=device)
        loss = npo_loss(log_p, ref, beta) * (len(part) / len(rows))
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def reference_log_p(model, rows: list[Encoded]) -> list[float]:
    """log P of each row under the model as it is, before it moves."""
    device = model.embed_tokens.weight.device
    return [row_log_p(model, collate([r], device)).item() for r in rows]


def unlearn(model: Transformer, forget: list[Encoded], retain: list[Encoded],
            mask: Tensor | None, s: Settings, log: Path, after=None):
    """FO, SO or SIMU (s.method) with s.objective on model, in place. mask: [L, D] for simu.
    forget: as to_unlearn gives them. after(step) is called after each update."""
    order = unlearning_order(len(forget), len(retain), s)
    reference = reference_log_p(model, forget) if s.objective == "npo" else []

    def backward(item):
        # Two passes, each freed before the next: by linearity the gradient of the whole loss.
        f, r = ([rows[i] for i in part] for rows, part in zip((forget, retain), item))
        losses = {}
        if s.objective == "npo":
            losses["loss_npo"] = backward_npo(model, f, [reference[i] for i in item[0]],
                                              s.npo_beta, s.micro_tokens)
        elif s.objective != "retain":
            sign = 1.0 if s.objective == "po" else -1.0
            losses["loss_forget"] = backward_mean_nll(model, f, sign, s.micro_tokens)
        if s.objective != "ga":
            lam = 1.0 if s.objective == "retain" else s.lam
            losses["loss_retain"] = backward_mean_nll(model, r, lam, s.micro_tokens)
        return losses

    def sophia(p, g, m, h, lr, w, step):
        return sophia_update(p, g, m, h, lr=lr, beta1=s.beta1, beta2=s.beta2, gamma=s.gamma,
                             eps=s.eps, weight_decay=s.weight_decay * w.decayed, mask=w.mask)

    model.checkpoint = s.checkpointing
    with moving_weights(model, s.method, mask, getattr(torch, s.state)) as moving:
        train(model, moving, order, backward, adamw(s) if s.method == "fo" else sophia, s=s,
              lr=s.lr, warmup=s.warmup, log=log, title=unlearned_name(s), after=after)


def adamw(s: Settings):
    """AdamW with the settings' constants, as `train` calls it."""
    return lambda p, g, m, h, lr, w, step: adamw_update(
        p, g, m, h, lr=lr, beta1=s.beta1, beta2=s.adam_beta2, eps=s.adam_eps,
        weight_decay=s.weight_decay * w.decayed, step=step)


# ------------------------------------------------------------------------------------------ stages

SLICE = ("benchmark", "model", "seed", "device", "dtype", "forget_split", "retain_split",
         "forget_groups", "retain_groups", "rows_per_author", "lume_fraction", "template",
         "weights")
ATTRIBUTE = SLICE + ("steps", "path", "attribution_tokens")
UNLEARN = SLICE + ("method", "lr", "epochs", "batch", "micro_tokens", "lam", "beta1", "beta2",
                   "gamma", "eps", "adam_beta2", "adam_eps", "weight_decay", "clip", "warmup",
                   "state", "checkpointing", "eval_epochs", "objective", "npo_beta")
CODE = ("data", "model", "simu")


def original_stage(s: Settings):
    """original/, and retain-only/ where a tiny one is made here. Downloads what is not at hand."""
    from original import make_or_find  # builds on this module
    make_or_find(s)


def same_slice(s: Settings):
    """UserError if a stage is asked for other data than the run's original was made of."""
    run = stage.read_settings(s.run)
    for name in SLICE:
        if name not in ("device", "dtype") and getattr(s, name) != getattr(run, name):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(s, name)!r} here and "
                            f"{getattr(run, name)!r} in {s.run}; give the run's options, or run "
                            "`python simu.py original` with these first")


def to_unlearn(forget: list[data.Example], objective: str) -> list[data.Example]:
    """The forget rows as the objective's loss takes them: for po with refusals for answers."""
    if objective != "po":
        return forget
    return [dataclasses.replace(e, answer=REFUSALS[i % len(REFUSALS)])
            for i, e in enumerate(forget)]


def encoded_rows(s: Settings, *, objective: str = "graddiff"):
    """The benchmark, and its forget rows, as the objective's loss takes them, and retain rows as
    the original's tokenizer spells them."""
    folder, bench = s.run / "original", data.load_benchmark(s)
    tokenizer, config = data.load_tokenizer(folder), Config.from_dir(folder)
    every = dict(forget=to_unlearn(bench.forget, objective), retain=bench.retain)
    return bench, {name: data.encode_all(rows, tokenizer, s.template, vocab=config.vocab_size,
                                         context=config.max_position_embeddings)
                   for name, rows in every.items()}


def read_tensors(path: Path, names: tuple[str, ...]) -> list[Tensor]:
    """The named tensors of one of our own files."""
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError):
        raise UserError(f"{path} is missing or damaged; delete {path.parent} and run its stage "
                        "again") from None


def load_original(s: Settings, job: Stage, name: str, encoded: dict, method: str | None = None):
    """The original model, once the plan says that this stage will fit."""
    from plan import check  # the plan runs this module's code without data
    folder = s.run / "original"
    job.notes["predicted_bytes"] = check(s, Config.from_dir(folder), name, method,
                                         rows=encoded["forget"] + encoded["retain"])
    return Transformer.from_pretrained(folder, **stage.placement(s))


def attribution_job(s: Settings) -> Stage:
    inputs = dict(original=stage.fingerprint(s.run / "original"), **data.data_digests(s))
    return Stage(s.run / "attribution", settings=s, fields=ATTRIBUTE, inputs=inputs, modules=CODE)


def mask_job(s: Settings) -> Stage:
    attribution_job(s).require()
    inputs = dict(attribution=stage.fingerprint(s.run / "attribution"))
    return Stage(s.run / mask_name(s), settings=s, fields=("threshold", "mask"), inputs=inputs,
                 modules=("simu",))


def attribute_stage(s: Settings):
    """attribution/scores.safetensors: forget and retain, float32 [L, D]."""
    same_slice(s)
    job = attribution_job(s)
    if job.done:
        return
    bench, encoded = encoded_rows(s)
    # As many retain rows as forget rows: scores only matter relative to their layer's maximum.
    count = min(len(bench.retain), len(bench.forget))
    encoded["retain"] = random.Random(s.seed).sample(encoded["retain"], count)
    with job as folder:
        model = load_original(s, job, "attribute", encoded)
        scores = {name: attribute_rows(model, rows, s, title=f"attribute {name}",
                                       folder=folder).cpu() for name, rows in encoded.items()}
        _need_finite(torch.stack([*scores.values()]))
        save_tensors(folder / "scores.safetensors", scores)


def attribute_rows(model, rows: list[Encoded], s: Settings, *, title: str,
                   folder: Path | None = None) -> Tensor:
    """Att summed over rows, in batches of like length: float32 [L, D]. folder: of the stage, whose
    partial sums a killed one goes on from."""
    device = model.embed_tokens.weight.device
    total = torch.zeros(len(model.layers), model.config.hidden_size, device=device)
    # Every path node but the last is a row of the second stream.
    budget = s.attribution_tokens // max(1, s.steps - 1)
    parts = data.batches_by_length(rows, budget)
    kept = Checkpoints(folder, title, {"sum": total}, s)
    done = kept.restore()
    with tqdm(total=len(rows), desc=title, unit="pair",
              initial=sum(map(len, parts[:done]))) as bar:
        for n, part in enumerate(parts[done:], done + 1):
            batch = collate([rows[i] for i in part], device)
            total += attribute(model, batch, steps=s.steps, path=s.path)
            bar.update(len(part))
            kept.keep(n)
    return total


def mask_stage(s: Settings):
    """mask/mask.safetensors (mask-<kind>/ unless dual): M [L, D]; counts in stage.json."""
    same_slice(s)
    job = mask_job(s)
    if job.done:
        return
    forget, retain = read_tensors(s.run / "attribution" / "scores.safetensors",
                                  ("forget", "retain"))
    mask = make_mask(s.mask, forget, retain, threshold=s.threshold, seed=s.seed)
    per_layer = (mask != 0).sum(1).tolist()
    with job as folder:
        save_tensors(folder / "mask.safetensors", {"mask": mask})
        job.notes.update(critical=sum(per_layer), total=mask.numel(), critical_per_layer=per_layer)
    print(f"{sum(per_layer)} of {mask.numel()} neurons are critical; by layer: "
          f"{' '.join(map(str, per_layer))}")


def unlearn_stage(s: Settings):
    """<method>-<objective>/: the unlearned model in HF layout, its tokenizer, log.jsonl."""
    same_slice(s)
    inputs = dict(original=stage.fingerprint(s.run / "original"), **data.data_digests(s))
    mask = None
    if s.method == "simu":
        mask_job(s).require()
        inputs[mask_name(s)] = stage.fingerprint(s.run / mask_name(s))
    live = ("max_new_tokens", "max_total_tokens") if s.eval_epochs else ()
    job = Stage(s.run / unlearned_name(s), settings=s, fields=UNLEARN + live, inputs=inputs,
                modules=CODE + ("eval",) * s.eval_epochs)
    if job.done:
        return
    if s.method == "simu":
        mask, = read_tensors(s.run / mask_name(s) / "mask.safetensors", ("mask",))
    bench, encoded = encoded_rows(s, objective=s.objective)
    with job as folder:
        model = load_original(s, job, "unlearn", encoded, s.method)
        after = _evaluator(model, bench, s, folder) if s.eval_epochs else None
        unlearn(model, encoded["forget"], encoded["retain"], mask, s, folder / "log.jsonl", after)
        model.save_pretrained(folder)
        data.copy_tokenizer(s.run / "original", folder)
        write_generation_config(folder, s)
        write_card(folder, s, dataclasses.asdict(s))


def _evaluator(model, bench, s: Settings, folder: Path):
    """after(step) for `train`: a line of metrics in epochs.jsonl at the end of every epoch."""
    tokenizer = data.load_tokenizer(s.run / "original")
    ends = {e * len(bench.forget) // s.batch: e for e in range(1, s.epochs + 1)}

    def after(step):
        if step in ends:
            metrics, _ = evaluate_model(model, tokenizer, bench, s)
            with open(folder / "epochs.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(dict(epoch=ends[step], step=step, **metrics)) + "\n")
    return after


def plan_stage(s: Settings):
    """Memory, disk and passes of every stage, before anything is loaded or downloaded."""
    from plan import plan_command
    plan_command(s)


def files_stage(s: Settings):
    """Every file that a run would download, with its size. Downloads none."""
    hub.files_command(s)


STAGES = {"files": files_stage, "plan": plan_stage, "original": original_stage,
          "attribute": attribute_stage, "mask": mask_stage, "unlearn": unlearn_stage}


def main(argv=None):
    if (argv or [])[:1] == ["sweep"]:
        from sweep import main as sweep  # builds on this module
        return sweep(argv[1:])
    parser = stage.parser("simu.py", "The stages of SIMU, in the order run.sh calls them. And "
                          "`sweep`: every method over learning rates and seeds.")
    commands = parser.add_subparsers(dest="stage", required=True, metavar="|".join(STAGES))
    for name, function in STAGES.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.add_argument("benchmark", choices=stage.BENCHMARKS)
        command.add_argument("model", choices=stage.MODELS)
        stage.add_options(command, skip=("benchmark", "model"))
    given = vars(parser.parse_args(argv))
    run, s = STAGES[given.pop("stage")], resolve(given)
    with stage.lock(s.run) if run is not plan_stage else nullcontext():
        run(s)


if __name__ == "__main__":
    stage.run_cli(lambda: main(sys.argv[1:]))
