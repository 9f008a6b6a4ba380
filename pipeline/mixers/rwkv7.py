"""RWKV-7 (arXiv 2503.14456), as flash-linear-attention stores it (fla-hub/rwkv7-168M-pile), whose
r_proj is the author's `att.receptance`, ffn.value his `ffn.value`, and so on.

Time mix and channel mix stand where attention and MLP do: `self_attn` with the projections r
(receptance), k, v and o (output), which are what SIMU moves whole, and `mlp`, whose down_proj
(ffn.value) has the D output channels that are SIMU's neurons. Both see the position before as well.
All layers see the values of the first: they travel in the stream, behind its D channels.

Letters: B batch, T time, D d_model, H heads of N channels, F d_ff.

Not here: layers of attention in between, the older layout with one x_x for x_r to x_g.
"""

import math
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model import Transformer, UserError, check_supported, need_keys
from pipeline.checkpoint import is_positive
from pipeline.mixers.states import (NO_LIMIT, StateBlock, StateModel, check_fields, gather_before,
                                    in_chunks)

SLOWEST = -0.6065306597126334  # -exp(-0.5): no channel of a state decays faster than exp(this)
SHIFTED = ("r", "w", "k", "v", "a", "g")  # each takes a learnt share of the position before: x_r
SUPPORTED = {"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "attn": None,
             "quantization_config": None}


@dataclass(frozen=True, kw_only=True)
class RWKV7Config:
    """Names are those of fla's config.json."""

    model_type: str = "rwkv7"
    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int
    head_dim: int = 64  # N
    decay_low_rank_dim: int
    gate_low_rank_dim: int
    a_low_rank_dim: int
    v_low_rank_dim: int
    max_position_embeddings: int = NO_LIMIT
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    neurons: str = "output"  # the only ones there are here

    def __post_init__(self):
        check_fields(self)
        if self.hidden_size % self.head_dim:
            raise UserError(f"hidden_size = {self.hidden_size}: must be a multiple of head_dim = "
                            f"{self.head_dim}")

    @property
    def neuron_count(self) -> int:
        return self.hidden_size

    @classmethod
    def from_hf(cls, content: dict, **changes) -> "RWKV7Config":
        """From the content of a config.json."""
        present = {k: v for k, v in content.items() if v is not None}
        need_keys(present, ("vocab_size", "hidden_size", "num_hidden_layers", *(
            f"{x}_low_rank_dim" for x in ("decay", "gate", "a", "v"))))
        D, ratio = present["hidden_size"], present.get("hidden_ratio", 4)
        if is_positive(D) and is_positive(ratio):  # as fla does; else check_fields refuses D
            present.setdefault("intermediate_size", 32 * math.ceil(int(D * ratio) / 32))
        check_supported(present, SUPPORTED)
        c = cls(**{"intermediate_size": 1} | {
            f.name: present[f.name] for f in fields(cls)
                      if f.name in present and f.name != "neurons"} | changes)
        check_supported(present, {"num_heads": D // c.head_dim,
                                  "value_dim": [D] * c.num_hidden_layers})
        return c

    def to_hf(self, dtype: torch.dtype) -> dict:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "neurons"}
        return values | SUPPORTED | {
            "architectures": ["RWKV7ForCausalLM"],
            "value_dim": [self.hidden_size] * self.num_hidden_layers,
            "torch_dtype": str(dtype).removeprefix("torch.")}


def shift(state, before, x):
    """An op of states.py: x [B, T, D] -> the x of the position before, nothing before the first."""
    last = x.new_zeros(len(x), x.shape[2]) if state is None else state[0]
    seen = torch.cat((last[:, None], x), dim=1)  # [B, T + 1, D]
    return seen[:, :-1], None if before is None else [gather_before(seen, before)]


class LoRA(nn.Module):
    """Two thin matrices with a function between them, and an offset."""

    def __init__(self, D: int, rank: int, between=None, offset=None):
        super().__init__()
        self.first, self.second = nn.Linear(D, rank, bias=False), nn.Linear(rank, D, bias=False)
        self.between = between or (lambda x: x)
        self.offset = None if offset is None else nn.Parameter(offset)

    def forward(self, x):
        y = self.second(self.between(self.first(x)))
        return y if self.offset is None else y + self.offset


class TimeMix(nn.Module):
    def __init__(self, c: RWKV7Config, layer: int):
        super().__init__()
        D, self.N = c.hidden_size, c.head_dim
        self.shift = partial(shift)  # an object, and so a state, of its own
        for name in SHIFTED:
            setattr(self, f"x_{name}", nn.Parameter(torch.full((1, 1, D), 0.5)))
        self.k_k, self.k_a = (nn.Parameter(torch.full((D,), x)) for x in (0.7, 1.0))
        self.r_k = nn.Parameter(torch.zeros(D // self.N, self.N))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(D, D, bias=False) for _ in range(4))
        # From channels that remember for hundreds of positions to channels that forget at once.
        self.w_lora = LoRA(D, c.decay_low_rank_dim, torch.tanh, torch.linspace(-5.5, 0.5, D))
        self.a_lora = LoRA(D, c.a_low_rank_dim, None, torch.zeros(D))
        self.g_lora = LoRA(D, c.gate_low_rank_dim, torch.sigmoid)
        self.v_lora = LoRA(D, c.v_low_rank_dim, None, torch.full((D,), 0.5)) if layer else None
        self.g_norm = nn.GroupNorm(D // self.N, D, eps=self.N * c.norm_eps)

    def forward(self, x, first, attend):
        """x [B, T, D], the first layer's values [B, T, D] (None: this is it) -> what the layer adds
        to the stream, and those values."""
        before = attend(self.shift, x)
        xr, xw, xk, xv, xa, xg = (x + (before - x) * getattr(self, f"x_{name}") for name in SHIFTED)
        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        if first is None:
            first = v
        else:
            v = v + (first - v) * self.v_lora(xv).sigmoid()
        decay = SLOWEST * self.w_lora(xw).float().sigmoid()  # its logarithm
        a = self.a_lora(xa).sigmoid()
        kk = F.normalize(self.heads(k * self.k_k), dim=-1)  # [B, T, H, N]
        r, k, v, a = map(self.heads, (r, k * (1 + (a - 1) * self.k_a), v, a))
        y = attend(self.scan, r, self.heads(decay), k, v, kk, kk * a).flatten(2)  # [B, T, D]
        y = self.g_norm(y.flatten(0, 1)).view_as(x)
        y = y + ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)
        return self.o_proj(y * self.g_lora(xg)), first

    def heads(self, x):
        return x.unflatten(-1, (-1, self.N))  # [B, T, D] -> [B, T, H, N]

    def scan(self, state, before, r, decay, k, v, kk, ka):
        """An op of states.py, all u [B, T, H, N] -> y [B, T, H, N]. The state S [B, H, N, N], value
        by key: S_t = S_(t-1) (diag(exp(decay_t)) - kk_t ka_t^T) + v_t k_t^T, and y_t = S_t r_t."""
        B, _, H, N = r.shape
        S = r.new_zeros(B, H, N, N).float() if state is None else state[0]
        y, kept = in_chunks(scan_chunk, S, before, *(x.float() for x in (r, decay, k, v, kk, ka)))
        return y.to(r.dtype), None if before is None else [kept]


def scan_chunk(S, *u):
    """As in_chunks asks, from TimeMix.scan's u. Divided by the decay since the chunk's start, which
    is at least exp(-.61 * CHUNK) and so well within float32, S_t is S_(t-1) + v_t k_t^T -
    gone_t ka_t^T, and gone_t = S_(t-1) kk_t hangs on the gone before it: a triangular system."""
    r, decay, k, v, kk, ka = (x.transpose(1, 2) for x in u)  # [B, H, Q, N]
    total = decay.cumsum(2)
    k, ka = k * (-total).exp(), ka * (-total).exp()
    r, kk = r * total.exp(), kk * (total - decay).exp()
    known = kk @ S.mT + (kk @ k.mT).tril(-1) @ v  # of gone
    gone = known if known.shape[2] == 1 else torch.linalg.solve_triangular(
        (kk @ ka.mT).tril(-1), known, upper=False, unitriangular=True)  # I + this
    y = r @ S.mT + (r @ k.mT).tril() @ v - (r @ ka.mT).tril() @ gone

    def states(at):  # [B, A] -> [B, A, H, N, N]
        seen = torch.arange(r.shape[2], device=r.device) < at[..., None]  # [B, A, Q]
        seen = seen[:, :, None, :, None]  # [B, A, 1, Q, 1]
        new = (seen * v[:, None]).mT @ k[:, None] - (seen * gone[:, None]).mT @ ka[:, None]
        upto = gather_before(F.pad(total, (0, 0, 1, 0)).transpose(1, 2), at)  # [B, A, H, N]
        return (S[:, None] + new) * upto.exp()[..., None, :]

    return y.transpose(1, 2), states


class ChannelMix(nn.Module):
    """Its D outputs are SIMU's neurons, as those of model.MLP."""

    def __init__(self, c: RWKV7Config):
        super().__init__()
        self.shift = partial(shift)
        self.x_k = nn.Parameter(torch.full((c.hidden_size,), 0.5))
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.intervene = None

    def forward(self, x, attend):
        x = x + (attend(self.shift, x) - x) * self.x_k
        beta = self.down_proj(self.up_proj(x).relu().square())
        return beta if self.intervene is None else self.intervene(beta)


class RWKV7Block(StateBlock):
    """The stream that enters the first layer has D channels; from there on it has 2 D."""

    def __init__(self, c: RWKV7Config, layer: int):
        super().__init__()
        norms = [nn.LayerNorm(c.hidden_size, eps=c.norm_eps) for _ in range(3)]
        self.pre_norm = None if layer else norms[0]
        self.attn_norm, self.ffn_norm = norms[1:]
        self.self_attn, self.mlp = TimeMix(c, layer), ChannelMix(c)

    def up_to_beta(self, x, attend):
        """The stream below beta [B, T, 2 D], and beta [B, T, D]"""
        x, first = (self.pre_norm(x), None) if self.pre_norm else x.chunk(2, dim=-1)
        y, first = self.self_attn(self.attn_norm(x), first, attend)
        x = x + y
        return torch.cat((x, first), dim=-1), self.mlp(self.ffn_norm(x), attend)

    def add_beta(self, x, beta):
        x, first = x.chunk(2, dim=-1)
        x = x + beta
        return torch.cat((x, first.expand_as(x)), dim=-1)


class LastNorm(nn.LayerNorm):
    def forward(self, x):  # [B, T, 2 D] -> [B, T, D]
        return super().forward(x.chunk(2, dim=-1)[0])


NAMES = {".self_attn.": ".attn.", ".mlp.up_proj.": ".ffn.key.", ".mlp.down_proj.": ".ffn.value.",
         ".mlp.": ".ffn.", "_lora.first.": "_lora.lora.0.", "_lora.second.": "_lora.lora.2.",
         "_lora.offset": "_lora.lora.2.bias", "embed_tokens.": "embeddings."}


class RWKV7(StateModel, Transformer, model_type="rwkv7"):
    config_class = RWKV7Config

    def make_block(self, layer: int) -> nn.Module:
        return RWKV7Block(self.config, layer)

    def make_last_norm(self) -> nn.Module:
        return LastNorm(self.config.hidden_size, eps=self.config.norm_eps)

    @staticmethod
    def stored_name(name: str) -> str:
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        return name if name.startswith("lm_head.") else f"model.{name}"


def tiny_config(*, width: int, depth: int, context: int, **ids) -> RWKV7Config:
    """A small one, of about as many weights as a LLaMA of this width."""
    return RWKV7Config(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
                       decay_low_rank_dim=16, gate_low_rank_dim=32, a_low_rank_dim=16,
                       v_low_rank_dim=16, max_position_embeddings=context, **ids)
