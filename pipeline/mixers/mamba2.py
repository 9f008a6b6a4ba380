"""Mamba-2 (arXiv 2405.21060), as transformers' Mamba2ForCausalLM stores it
(AntonV/mamba2-130m-hf).

A layer has no attention and no MLP beside it: its only write to the stream is `mixer.out_proj`,
whose D output channels are therefore SIMU's neurons; here it is called `mlp.down_proj`. Nothing in
it has the name of an attention projection, so SIMU moves the critical rows alone.

Letters: B batch, T time, D d_model, E = expand * D, H heads of P channels, N state size, G groups
of heads that share b and c, K width of the convolution.

Not here: a limited time step, biases of the projections.
"""

import math
import reprlib
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from model import RMSNorm, Transformer, UserError, check_supported, need_keys
from pipeline.mixers.states import (NO_LIMIT, StateBlock, StateModel, check_fields, gather_before,
                                    in_chunks)

SUPPORTED = {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True,
             "quantization_config": None}
NO_STEP_LIMIT = ([0.0, math.inf], [0.0, {"__float__": "Infinity"}])  # transformers 4's, and 5's


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Names are those of HF's config.json, but for norm_eps (layer_norm_epsilon)."""

    model_type: str = "mamba2"
    vocab_size: int  # V
    hidden_size: int  # D
    num_hidden_layers: int
    num_heads: int  # H
    head_dim: int  # P
    state_size: int  # N
    n_groups: int  # G
    expand: int = 2
    conv_kernel: int = 4  # K
    max_position_embeddings: int = NO_LIMIT  # longest text; HF's config.json has none
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    neurons: str = "output"  # the only ones there are here

    def __post_init__(self):
        check_fields(self)
        if self.expand * self.hidden_size != self.num_heads * self.head_dim:
            raise UserError(f"num_heads * head_dim = {self.num_heads * self.head_dim}: must be "
                            f"expand * hidden_size = {self.expand * self.hidden_size}")
        if self.num_heads % self.n_groups:
            raise UserError(f"n_groups = {self.n_groups}: must divide num_heads = {self.num_heads}")

    @property
    def neuron_count(self) -> int:
        return self.hidden_size

    @classmethod
    def from_hf(cls, content: dict, **changes) -> "Mamba2Config":
        """From the content of a config.json."""
        present = {k: v for k, v in content.items() if v is not None}
        check_supported(present, SUPPORTED)
        if (limit := present.get("time_step_limit", NO_STEP_LIMIT[0])) not in NO_STEP_LIMIT:
            raise UserError(f"time_step_limit = {reprlib.repr(limit)} is not supported; only "
                            "[0, Infinity] is")
        if "layer_norm_epsilon" in present:
            present["norm_eps"] = present["layer_norm_epsilon"]
        need_keys(present, ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads",
                            "head_dim", "state_size", "n_groups"))
        return cls(**{f.name: present[f.name] for f in fields(cls)
                      if f.name in present and f.name != "neurons"} | changes)

    def to_hf(self, dtype: torch.dtype) -> dict:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "neurons"}
        return values | {
            "layer_norm_epsilon": values.pop("norm_eps"), "architectures": ["Mamba2ForCausalLM"],
            "hidden_act": "silu", "use_bias": False, "use_conv_bias": True,
            "torch_dtype": str(dtype).removeprefix("torch.")}


class StreamNorm(RMSNorm):
    """RMSNorm in the weights' dtype of a stream that may be kept in float32."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Mixer(nn.Module):
    """What a position gives to later ones: in_proj, a short convolution, and the state."""

    def __init__(self, c: Mamba2Config):
        super().__init__()
        self.heads, self.head_dim, self.groups, self.N = (c.num_heads, c.head_dim, c.n_groups,
                                                          c.state_size)
        self.E, self.K = c.expand * c.hidden_size, c.conv_kernel
        mixed = self.E + 2 * c.n_groups * c.state_size  # channels of x, b and c
        self.sizes = (self.E, mixed, c.num_heads)
        self.in_proj = nn.Linear(c.hidden_size, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, c.conv_kernel, groups=mixed)
        # As the authors draw them: a decay of its own for each head, time steps of .001 to .1
        self.A_log = nn.Parameter(torch.arange(1, c.num_heads + 1).float().log())
        step = torch.exp(math.log(1e-3) + torch.rand(c.num_heads) * math.log(100))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus undone
        self.D = nn.Parameter(torch.ones(c.num_heads))

    def scan(self, state, before, xbc, dt):
        """An op of states.py. xbc [B, T, E + 2GN], dt [B, T, H] -> y [B, T, E]. The state is the
        last K - 1 of xbc, and S [B, H, P, N]: S_t = exp(-A dt_t) S_(t-1) + dt_t x_t b_t^T, and
        y_t = S_t c_t + D x_t."""
        B, T, _ = xbc.shape
        H, P, N, left = self.heads, self.head_dim, self.N, self.K - 1
        if state is None:
            state = xbc.new_zeros(B, left, xbc.shape[2]), xbc.new_zeros(B, H, P, N).float()
        seen, S = torch.cat((state[0], xbc), dim=1), state[1]  # [B, K - 1 + T, E + 2GN]
        u = self.conv1d(seen.transpose(1, 2)).transpose(1, 2)  # [B, T, E + 2GN]
        x, b, c = F.silu(u).float().split([self.E, self.groups * N, self.groups * N], dim=-1)
        x = x.unflatten(-1, (H, P))  # [B, T, H, P]
        b, c = (y.unflatten(-1, (self.groups, N)).repeat_interleave(H // self.groups, dim=2)
                for y in (b, c))  # [B, T, H, N]
        dt = F.softplus(dt + self.dt_bias).float()  # [B, T, H]
        decay = -self.A_log.float().exp() * dt  # its logarithm [B, T, H]
        y, kept = in_chunks(scan_chunk, S, before, decay, x * dt[..., None], b, c)
        y = (y + x * self.D[:, None]).flatten(2).to(xbc.dtype)  # [B, T, E]
        if before is None:
            return y, None
        windows = torch.stack([gather_before(seen, before + i) for i in range(left)], dim=2)
        return y, [windows, kept]  # [B, A, K - 1, E + 2GN], [B, A, H, P, N]


def scan_chunk(S, decay, dx, b, c):
    """As in_chunks asks: Q positions at once from the state S [B, H, P, N], decay [B, Q, H],
    dx [B, Q, H, P], b and c [B, Q, H, N] -> y [B, Q, H, P], and the function."""
    Q = decay.shape[1]
    total = F.pad(decay.cumsum(1), (0, 0, 1, 0))  # [B, Q + 1, H], from the chunk's start on
    until = total[:, 1:]
    weight = (until[:, :, None] - until[:, None]).masked_fill(  # [B, Q, Q, H], t sees s <= t
        torch.ones(Q, Q, dtype=torch.bool, device=S.device).triu(1)[..., None], -math.inf).exp()
    scores = torch.einsum("bthn,bshn->btsh", c, b) * weight
    y = torch.einsum("btsh,bshp->bthp", scores, dx)
    y = y + torch.einsum("bthn,bhpn->bthp", c, S) * until.exp()[..., None]

    def states(at):  # [B, A] -> [B, A, H, P, N]
        upto = gather_before(total, at)  # [B, A, H]
        seen = (torch.arange(Q, device=S.device) < at[..., None])[..., None]  # [B, A, Q, 1]
        share = (upto[:, :, None] - until[:, None]).masked_fill(~seen, -math.inf).exp()
        new = torch.einsum("baqhp,bqhn->bahpn", share[..., None] * dx[:, None], b)
        return upto.exp()[..., None, None] * S[:, None] + new

    return y, states


class Neurons(nn.Module):
    """The layer's output map behind its gate: its D outputs are SIMU's neurons."""

    def __init__(self, c: Mamba2Config):
        super().__init__()
        E = c.expand * c.hidden_size
        self.groups, self.eps = c.n_groups, c.norm_eps
        self.norm = nn.ParameterDict({"weight": torch.ones(E)})
        self.down_proj = nn.Linear(E, c.hidden_size, bias=False)
        self.intervene = None  # as model.MLP's

    def forward(self, y, gate):
        """y, gate [B, T, E] -> beta [B, T, D]"""
        y = (y.float() * F.silu(gate.float())).unflatten(-1, (self.groups, -1))  # [B, T, G, E / G]
        y = F.rms_norm(y, y.shape[-1:], eps=self.eps).flatten(2).to(gate.dtype)  # [B, T, E]
        beta = self.down_proj(y * self.norm["weight"])
        return beta if self.intervene is None else self.intervene(beta)


class Mamba2Block(StateBlock):
    def __init__(self, c: Mamba2Config, layer: int):
        super().__init__()
        self.wide = c.residual_in_fp32
        self.norm = StreamNorm(c.hidden_size, c.norm_eps)
        self.mixer, self.mlp = Mixer(c), Neurons(c)

    def up_to_beta(self, x, attend):
        """The stream that beta is added to, and beta, each [B, T, D]"""
        gate, xbc, dt = self.mixer.in_proj(self.norm(x)).split(self.mixer.sizes, dim=-1)
        return x, self.mlp(attend(self.mixer.scan, xbc, dt), gate)

    def add_beta(self, x, beta):
        return (x.float() if self.wide else x) + beta


NAMES = {"embed_tokens.": "embeddings.", "norm.": "norm_f."}  # of what is outside the layers


class Mamba2(StateModel, Transformer, model_type="mamba2"):
    config_class = Mamba2Config

    def make_block(self, layer: int) -> nn.Module:
        return Mamba2Block(self.config, layer)

    def make_last_norm(self) -> nn.Module:
        return StreamNorm(self.config.hidden_size, self.config.norm_eps)

    @staticmethod
    def stored_name(name: str) -> str:
        if name.startswith("lm_head."):
            return name
        for ours, theirs in NAMES.items():
            if name.startswith(ours):
                return "backbone." + theirs + name.removeprefix(ours)
        name = name.replace(".mlp.down_proj.", ".mixer.out_proj.").replace(".mlp.", ".mixer.")
        return "backbone." + name


def tiny_config(*, width: int, depth: int, context: int, **ids) -> Mamba2Config:
    """A small one, of half as many weights as a LLaMA of this width and depth."""
    return Mamba2Config(hidden_size=width, num_hidden_layers=depth, num_heads=2 * width // 32,
                        head_dim=32, state_size=32, n_groups=1, max_position_embeddings=context,
                        tie_word_embeddings=True, **ids)
