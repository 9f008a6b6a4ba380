"""The transformer SIMU looks into: LLaMA, Mistral, OLMo, OLMo-2 and Qwen2.5 in one class, told
apart by their config alone.

Letters: B batch, T time, L layers, D width, H heads, K key/value heads, hd head size, F d_ff,
V vocabulary, S cached columns, N tokens of several rows side by side. A SIMU neuron [D1] is one of
the D output channels of a layer's down_proj; a function put in `model.layers[l].mlp.intervene`
sees and may change exactly those.

Not here: dropout, sliding windows, quantised weights, sampling, padding masks (training rows are
padded on the right, where causal attention cannot see them); fast decoding (pipeline/reading.py),
more checks of a stranger's files and the original OLMo layout (pipeline/checkpoint.py).
"""

import contextlib
import ctypes
import json
import math
import os
import re
import reprlib
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

INIT_STD = 0.02  # GPT-2's, which LLaMA's and OLMo's published configs share
OLMO_EPS = 1e-5  # not in OLMo's config.json: its released code and transformers both fix it
LOGITS = 1 << 25  # logits held at once: 128 MiB of float32


class UserError(Exception):
    """Something the person at the keyboard can put right: what is wrong, where, what to do."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight; torch divides in float32, as the models were trained, and rounds before
    the weight, as they did."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class LayerNorm(nn.Module):
    """OLMo's (x - mean) / std without weights, in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def make_norm(c: "Config") -> nn.Module:
    return (LayerNorm if c.architecture.plain_norm else RMSNorm)(c.hidden_size, c.norm_eps)


def rope(c: "Config", positions):
    """int64 [...] -> cos, sin float32 [..., hd], each frequency standing twice: j, j + hd/2, the
    sine below hd/2 with the sign that `rotate` wants."""
    hd, scaling = c.head_dim, c.rope_scaling
    j = torch.arange(0, hd, 2, dtype=torch.float32, device=positions.device)  # [hd/2]
    frequency = 1.0 / c.rope_theta ** (j / hd)
    if scaling is not None:  # Llama 3.1: `factor` slower where the trained context has few turns
        factor, low, high, context = (scaling[k] for k in LLAMA3)
        turns = context * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
    angle = positions[..., None].float() * frequency  # [..., hd/2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # [..., hd]


def rotate(x, cos, sin):
    """RoPE in float32, as cos and sin are, on x [B, heads, T, hd]: channels j and j + hd/2 turn
    together (the "rotate half" layout of HF checkpoints, not Meta's interleaved one)."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def attention(q, k, v, mask=None):
    """q [B, H, T, hd] on k, v [B, K, S, hd] -> [B, T, H*hd]. `mask` [B, 1, H/K * T or 1, S] is
    added to the scores; without one S is T, and a position sees itself and what is before it."""
    if q.is_cuda:  # cuDNN would make a plan, up to 40 ms, for every shape; ours hardly ever repeat
        torch.backends.cuda.enable_cudnn_sdp(False)
    B, H, T, hd = q.shape
    if mask is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != k.shape[1])
    else:  # heads that share keys become rows of queries, so that no key is copied
        q = q.reshape(B, k.shape[1], -1, hd)  # [B, K, H/K * T, hd]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.reshape(B, H, T, hd)  # not view: a card's kernels lay memory out in another order
    return y.transpose(1, 2).flatten(2)  # [B, T, H*hd]


def causal_attention(q, k, v):
    """The attention of every layer that is not handed another; shapes as `attention`'s."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # bfloat16's backward is 3x slower
        return attention(q.float(), k.float(), v.float()).to(q.dtype)
    return attention(q, k, v)


def attention_of_rows(slots, shape, q, k, v, *, attend):
    """Attention where the tokens of B rows stand side by side, q [1, H, N, hd] and k, v
    [1, K, N, hd], token n in slot slots[n] of shape (B, T) laid out flat -> [1, N, H*hd]"""
    def spread(x):  # [1, heads, N, hd] -> [B, heads, T, hd]
        rows = x.new_zeros(shape[0] * shape[1], *x.shape[1::2]).index_copy(
            0, slots, x[0].transpose(0, 1))
        return rows.unflatten(0, shape).transpose(1, 2)

    return attend(*map(spread, (q, k, v))).flatten(0, 1).index_select(0, slots)[None]


class Attention(nn.Module):
    """The projections of one layer, before (`qkv`) and after (`o_proj`) attention. The attention
    between them is the caller's: causal, on a cache, or SIMU's second stream [D2]."""

    def __init__(self, c: "Config"):
        super().__init__()
        self.head_dim, self.clip, arch = c.head_dim, c.clip_qkv, c.architecture
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=arch.biases)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=arch.biases)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=arch.biases)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if arch.norms_qk:
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim if arch.norms_qk == "head" else n,
                                                c.norm_eps) for n in (q_size, kv_size))

    def qkv(self, x, cos, sin):
        """x [B, T, D], cos and sin [T, hd] or [B, T, hd] -> q [B, H, T, hd], k, v [B, K, T, hd],
        clipped or normed, and rotated: what attention sees and what a cache keeps."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None:  # over each head, or over all heads at once
            q, k = (norm(y.unflatten(-1, (-1, len(norm.weight)))).flatten(2)
                    for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        if self.clip is not None:
            q, k, v = (y.clamp(-self.clip, self.clip) for y in (q, k, v))
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (y.view(split).transpose(1, 2) for y in (q, k, v))  # [B, heads, T, hd]
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # [.., 1, T, hd]
        q, k = rotate(torch.cat((q, k), dim=1), cos, sin).split((q.shape[1], k.shape[1]), dim=1)
        return q, k, v


class MLP(nn.Module):
    """SwiGLU in two steps: `neurons` gives the activations of SIMU's neurons (NEURONS), which
    `intervene` may change; `write` gives what they add to the residual stream."""

    def __init__(self, c: "Config"):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.inner = c.neurons == "inner"
        self.intervene = None  # or a function of the activations, the beta of Eq. 1

    def neurons(self, x):
        """x [.., D] -> [.., D], what down_proj gives; of inner neurons [.., F], what it reads"""
        a = F.silu(self.gate_proj(x)) * self.up_proj(x)
        a = a if self.inner else self.down_proj(a)
        return a if self.intervene is None else self.intervene(a)

    def write(self, a):
        """The neurons' activations [.., D] or [.., F] -> what they add to the stream [.., D]"""
        return self.down_proj(a) if self.inner else a

    def forward(self, x):
        return self.write(self.neurons(x))


class Block(nn.Module):
    """One layer: how attention and MLP read the residual stream and add to it. Most models norm
    what the two read, OLMo-2 what they write. beta: the neurons' activations (Eq. 1)."""

    def __init__(self, c: "Config"):
        super().__init__()
        self.norms_output = c.architecture.norms_output
        if not self.norms_output:
            self.input_layernorm = make_norm(c)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = make_norm(c)
        if self.norms_output:
            self.post_feedforward_layernorm = make_norm(c)
        self.mlp = MLP(c)

    def qkv(self, x, cos, sin):
        """The stream x [B, T, D] -> q, k, v, as Attention.qkv"""
        return self.self_attn.qkv(x if self.norms_output else self.input_layernorm(x), cos, sin)

    def add_attention(self, x, mixed):
        """The stream x [B, T, D] and attention's output `mixed` [B, T, H*hd] -> [B, T, D]"""
        y = self.self_attn.o_proj(mixed)
        return x + (self.post_attention_layernorm(y) if self.norms_output else y)

    def beta(self, x):
        """The stream x [B, T, D] after attention -> the neurons' activations"""
        return self.mlp.neurons(x if self.norms_output else self.post_attention_layernorm(x))

    def add_beta(self, x, beta):
        """The stream x after attention and the neurons' activations, which broadcast against each
        other -> the stream that leaves the layer [..., D]"""
        y = self.mlp.write(beta)
        return x + (self.post_feedforward_layernorm(y) if self.norms_output else y)

    def up_to_beta(self, x, cos, sin, attend):
        """The stream after attention [B, T, D], and beta: all of a layer but its last step."""
        x = self.add_attention(x, attend(*self.qkv(x, cos, sin)))
        return x, self.beta(x)

    def forward(self, x, cos, sin, attend=causal_attention):
        return self.add_beta(*self.up_to_beta(x, cos, sin, attend))


# ---------------------------------------------------------------------------------------- config


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What sets one model_type apart from LLaMA."""

    name: str  # transformers' class
    plain_norm: bool = False  # LayerNorm without weights, its epsilon fixed, for RMSNorm
    clips: bool = False  # may clamp q, k and v (clip_qkv)
    biases: bool = False  # q, k and v have biases
    norms_qk: str = ""  # RMSNorm of q and of k: over "all" heads at once, or over each "head"
    norms_output: bool = False  # norms what attention and MLP write, not what they read
    window: int | None = None  # its sliding_window where its config.json names none
    more_keys: dict = field(default_factory=dict)  # of its config.json


NO_BIAS = {"attention_bias": False}
ARCHITECTURES = {  # model_type of a config.json -> what is different there
    "llama": Architecture(name="LlamaForCausalLM", more_keys=NO_BIAS),
    "mistral": Architecture(name="MistralForCausalLM", window=4096,
                            more_keys={"sliding_window": None}),
    "olmo": Architecture(name="OlmoForCausalLM", plain_norm=True, clips=True, more_keys=NO_BIAS),
    "olmo2": Architecture(name="Olmo2ForCausalLM", norms_qk="all", norms_output=True,
                          more_keys=NO_BIAS),
    "qwen2": Architecture(name="Qwen2ForCausalLM", biases=True)}


@dataclass(frozen=True)
class Neurons:
    """Where a layer's neurons are: matrices of its MLP whose row (column) k is neuron k's."""

    size: str  # the field of Config that counts them
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


NEURONS = {"output": Neurons("hidden_size", rows=("down_proj",)),
           "inner": Neurons("intermediate_size", rows=("gate_proj", "up_proj"),
                            columns=("down_proj",))}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Keys that would change the numbers, and the one value of each that this code computes.
SUPPORTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
             "attention_dropout": 0, "partial_rotary_factor": 1, "quantization_config": None,
             "use_sliding_window": False}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a model. Names are those of HF's config.json, but for norm_eps (rms_norm_eps)
    and neurons. UserError if the sizes contradict each other."""

    model_type: str  # a row of ARCHITECTURES
    vocab_size: int  # V, rows of the embedding
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int | None = None  # K; None: H
    head_dim: int | None = None  # hd; None: D / H
    max_position_embeddings: int
    norm_eps: float = OLMO_EPS
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # or {"rope_type": "llama3"} with the numbers LLAMA3 names
    tie_word_embeddings: bool = False  # the head is the embedding
    clip_qkv: float | None = None  # q, k, v are clamped to [-clip, clip] before RoPE
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    neurons: str = "output"  # a row of NEURONS; SIMU's setting, not part of config.json

    def __post_init__(self):
        for name, table in (("model_type", ARCHITECTURES), ("neurons", NEURONS)):
            if getattr(self, name) not in list(table):
                raise self.fault(name, " or ".join(table) + "; no other is supported")
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        for name in SIZES:  # head_dim is filled in once what it is made of is known to be good
            value = getattr(self, name)
            if (type(value) is not int or value <= 0) and (name, value) != ("head_dim", None):
                raise self.fault(name, "a whole number above 0")
        if self.hidden_size % heads:
            raise self.fault("hidden_size", f"a multiple of num_attention_heads = {heads}")
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)
        if heads % self.num_key_value_heads:
            raise self.fault("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
        if self.head_dim % 2:
            raise self.fault("head_dim", "even, for RoPE turns pairs of channels")

    def fault(self, name: str, must: str) -> UserError:
        return UserError(f"{name} = {reprlib.repr(getattr(self, name))}: must be {must}")

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model_type]

    @property
    def neuron_count(self) -> int:
        """Neurons of a layer: the D of every [L, D] of scores and masks."""
        return getattr(self, NEURONS[self.neurons].size)

    @classmethod
    def from_dir(cls, path, **changes) -> "Config":
        """Read `path`/config.json, as transformers 4 or 5 wrote it."""
        file = Path(path) / "config.json"
        if not Path(path).is_dir():
            raise UserError(f"{path} is not a folder; give the folder that holds config.json")
        content = read_json(file)
        if not isinstance(content, dict):
            raise UserError(f"{file}: must hold a JSON object; fetch it again")
        cls = Transformer.subclasses.get(str(content.get("model_type")), Transformer).config_class
        try:
            return cls.from_hf(content, **changes)
        except UserError as e:
            raise UserError(f"{file}: {e}") from None

    @classmethod
    def from_hf(cls, content: dict, **changes) -> "Config":
        """From the content of a config.json."""
        present = {key: value for key, value in content.items() if value is not None}
        check_supported(present, SUPPORTED)
        types = present.get("layer_types", [])
        if not isinstance(types, list) or any(x != "full_attention" for x in types):
            raise UserError(f"layer_types = {reprlib.repr(types)} is not supported; only "
                            '"full_attention" is')
        values = {f.name: present[f.name] for f in fields(cls) if f.name in present}
        values |= rope_fields(present) | dict(norm_eps=present.get("rms_norm_eps"),
                                              neurons="output")
        arch = ARCHITECTURES.get(str(values.get("model_type")), Architecture(name=""))
        if arch.plain_norm:
            values["norm_eps"] = OLMO_EPS
        if not arch.clips:
            values.pop("clip_qkv", None)  # transformers' other classes ignore it too
        if arch.window is not None:
            check_window(content.get("sliding_window", arch.window),
                         values.get("max_position_embeddings"))
        if values.get("pad_token_id") == -1:  # how old LLaMA exports say "none"
            del values["pad_token_id"]
        need_keys(values, [f.name for f in fields(cls) if f.default is MISSING] + ["norm_eps"])
        return cls(**values | changes)

    def to_hf(self, dtype: torch.dtype) -> dict:
        """The content of a config.json which transformers 4 and 5 load; dtype of the weights."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "neurons"}
        eps = values.pop("norm_eps")
        if not self.architecture.plain_norm:
            values["rms_norm_eps"] = eps
        if not self.architecture.clips:
            del values["clip_qkv"]
        return values | self.architecture.more_keys | {
            "architectures": [self.architecture.name], "hidden_act": "silu",
            "attention_dropout": 0.0, "torch_dtype": str(dtype).removeprefix("torch.")}


def need_keys(content: dict, keys):
    for key in keys:
        if content.get(key) is None:
            raise UserError(f"{'rms_norm_eps' if key == 'norm_eps' else key} is missing; "
                            "take the config.json the weights came with")


def check_supported(content: dict, supported: dict):
    for key, only in supported.items():
        if content.get(key, only) != only:
            raise UserError(f"{key} = {reprlib.repr(content[key])} is not supported; only "
                            f"{json.dumps(only)} is")


def check_window(window, context):
    """UserError if the window is narrower than the context: only full attention is computed."""
    if window is not None and not (type(window) is type(context) is int and window >= context):
        raise UserError(f"sliding_window = {reprlib.repr(window)} is below max_position_embeddings "
                        f"= {reprlib.repr(context)} and not computed here; lower the latter to it "
                        "in config.json, if texts are that short")


def rope_fields(content: dict) -> dict:
    """RoPE's base (absent: 10000) and scaling, as transformers 4 writes them or, inside
    rope_parameters, transformers 5."""
    values = {"rope_theta": content.get("rope_theta", 10000.0), "rope_scaling": None}
    for key in ("rope_scaling", "rope_parameters"):
        given = content.get(key, {})
        if not isinstance(given, dict):
            raise UserError(f"{key} = {reprlib.repr(given)}: must be null or an object")
        rope_type = given.get("rope_type", given.get("type", "default"))
        if rope_type not in ("default", "llama3") or given.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{key} = {reprlib.repr(given)} is not supported; only plain RoPE and "
                            "llama3's are")
        if rope_type == "llama3":
            values["rope_scaling"] = dict(rope_type="llama3", **{k: given.get(k) for k in LLAMA3})
        values["rope_theta"] = given.get("rope_theta", values["rope_theta"])
    return values


# ----------------------------------------------------------------------------------------- model


class KVCache:
    """Keys and values [L, B, K, S, hd] of B rows. A token's column is its position (input_pos)."""

    def __init__(self, c: Config, B: int, columns: int, like):
        shape = (c.num_hidden_layers, B, c.num_key_value_heads, columns, c.head_dim)
        # Zeros, not empty: a masked column still counts with weight 0, and 0 * NaN is NaN.
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.columns, self.rows = (torch.arange(n, device=like.device) for n in (columns, B))
        self.sharing = c.num_attention_heads // c.num_key_value_heads  # H/K

    def attends(self, input_pos, counts):
        """For each layer, attention of tokens at input_pos [B, T] on all columns up to their own.
        counts [B], tokens of each row, is for other caches: what pads a row here is overwritten
        before any token sees it."""
        unseen = (self.columns > input_pos[..., None]).repeat(1, self.sharing, 1)[:, None]
        mask = self.k.new_zeros(unseen.shape).masked_fill_(unseen, -math.inf)
        return [partial(self.update, k, v, input_pos, mask) for k, v in zip(self.k, self.v)]

    def update(self, keys, values, input_pos, mask, q, k, v):
        keys[self.rows[:, None], :, input_pos] = k.transpose(1, 2)  # [B, T, K, hd]
        values[self.rows[:, None], :, input_pos] = v.transpose(1, 2)
        return attention(q, keys, values, mask)


class Transformer(nn.Module):
    """A decoder-only language model. Fresh weights are drawn from torch's global generator, so
    `torch.manual_seed` decides them. A model whose layers are others is a subclass that names its
    model_type (pipeline/mixers): then Transformer(config) is one of those."""

    subclasses: dict[str, type] = {}  # model_type -> its class
    config_class, cache_class = Config, KVCache
    packs = True  # a mask can keep texts apart that stand side by side
    attend = staticmethod(causal_attention)

    def __init_subclass__(cls, model_type: str):
        Transformer.subclasses[model_type] = cls

    def __new__(cls, config=None):
        return super().__new__(Transformer.subclasses.get(getattr(config, "model_type", ""), cls))

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpoint = False  # True: blocks recompute their activations in the backward pass
        # Not nn.Embedding(V, D): its own initialisation, on the meta device, imports torch._dynamo.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(map(self.make_block, range(config.num_hidden_layers)))
        self.norm = self.make_last_norm()
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # The residual stream adds 2L outputs: scaled so that its variance does not grow with L.
        scale = 1 / math.sqrt(2 * config.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.is_meta:  # a loader fills it
                continue
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=INIT_STD * scale if residual else INIT_STD)
            elif name.endswith(".bias"):
                nn.init.zeros_(weight)

    def make_block(self, layer: int) -> nn.Module:
        return Block(self.config)

    def make_last_norm(self) -> nn.Module:
        return make_norm(self.config)

    @staticmethod
    def stored_name(name: str) -> str:
        """Our parameter's name in a HF checkpoint."""
        return name if name.startswith("lm_head.") else f"model.{name}"

    def rope(self, positions):
        """positions int64 [...] -> cos, sin float32 [..., hd]: the `cos_sin` that layers take"""
        return rope(self.config, positions)

    def embed(self, ids):
        """ids [B, T] -> the stream that enters the first layer [B, T, D]"""
        return self.embed_tokens(ids)

    def hidden(self, ids, attend=None, *, cos_sin=None):
        """ids [B, T] -> final normed states [B, T, D], in the weights' dtype. `attend` stands in
        for causal_attention: one function, or a list with one for each layer. `cos_sin`: self.rope
        of the positions where the ids stand, if not from 0 on."""
        x, attend = self.embed(ids), attend or self.attend  # [B, T, D]
        if cos_sin is None:
            cos_sin = self.rope(torch.arange(ids.shape[1], device=ids.device))
        for layer, block in enumerate(self.layers):
            attend_here = attend if callable(attend) else attend[layer]
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, *cos_sin, attend_here, use_reentrant=False,
                               preserve_rng_state=False)
            else:
                x = block(x, *cos_sin, attend_here)
        return self.norm(x)

    def hidden_at(self, ids, wanted):
        """Final normed states [N, D] where wanted [B, T] is true. No padding is read, nor anything
        else right of a row's last wanted position: what is left of all rows stands side by side.
        ids and wanted may lie on the host: then nothing here waits for the model's device."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        last = positions.where(wanted, -1).amax(1)  # [B]
        slots = (positions <= last[:, None]).flatten().nonzero()[:, 0]
        which = wanted.flatten()[slots].nonzero()[:, 0]  # [N]
        read, slots, positions, which = (
            x.to(self.embed_tokens.weight.device)
            for x in (ids.flatten()[slots], slots, slots % ids.shape[1], which))
        return self.hidden_of_rows(read, slots, ids.shape, positions).index_select(0, which)

    def hidden_of_rows(self, ids, slots, shape, positions, attend=causal_attention):
        """Final normed states [N, D] of the ids [N] of B rows, side by side: id n stands in slot
        slots[n] of shape (B, T) laid out flat, and at positions[n] of its text. `attend`: the
        attention over the rows as they are laid out."""
        if not self.packs:  # a state runs through each row alone
            rows = ids.new_zeros(shape[0] * shape[1]).index_copy(0, slots, ids)
            return self.hidden(rows.view(shape)).flatten(0, 1)[slots]
        attend = partial(attention_of_rows, slots, shape, attend=attend)
        return self.hidden(ids[None], attend, cos_sin=self.rope(positions))[0]

    @property
    def head(self):
        """The matrix [V, D] of the logits."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    def logits(self, h):
        """Final normed states [..., D] -> float32 [..., V]"""
        return F.linear(h, self.head).float()

    def forward(self, ids):
        """ids [B, T] -> float32 logits [B, T, V]"""
        return self.logits(self.hidden(ids))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", *, neurons="output"
                        ) -> "Transformer":
        """Load a HF folder (config.json and safetensors, whole or sharded), tensor by tensor into
        dtype on device. UserError names what is missing, unexpected, misshapen or damaged."""
        with torch.device("meta"):
            model = cls(Config.from_dir(path, neurons=neurons))
        load_weights(model, Path(path), dtype, device)
        return model

    def save_pretrained(self, path, *, shard_bytes: int = 5_000_000_000):
        """Write a HF folder: config.json, generation_config.json, safetensors (bf16 stays bf16),
        split above shard_bytes. Each file appears under its name only when whole."""
        save_weights(self, Path(path), shard_bytes)


# -------------------------------------------------------------------------------------- decoding


@torch.inference_mode()
def generate(model, prompts, *, max_new_tokens=None, eos_id, max_total_tokens=None, drafts=None,
             batch_tokens=16384, progress=None) -> list[list[int]]:
    """Greedy continuations [D16] of `prompts` (lists of ids), in their order: new ids, without eos.
    A row ends at eos_id (an id, several, or None: never), after max_new_tokens, at max_total_tokens
    with its prompt, or at the model's context. A batch holds at most batch_tokens cached positions;
    `progress` names a tqdm bar. `drafts` are for the fast twin, pipeline.reading.generate, which
    gives the same tokens (tests/test_reading.py). UserError: a prompt that cannot be continued."""
    room = [new_tokens(model.config, i, prompt, max_new_tokens, max_total_tokens, batch_tokens)
            for i, prompt in enumerate(prompts)]
    size = [len(prompt) + n for prompt, n in zip(prompts, room)]
    order = sorted((i for i, n in enumerate(room) if n), key=lambda i: -size[i])
    texts, ends = [[] for _ in prompts], eos_ids(eos_id)
    with tqdm(total=len(prompts), desc=progress, unit="row", disable=progress is None) as bar:
        bar.update(room.count(0))
        while order:  # the longest first: what does not fit in memory fails at once
            columns = size[order[0]]
            rows, order = order[:batch_tokens // columns], order[batch_tokens // columns:]
            decode(model, [prompts[i] for i in rows], [room[i] for i in rows],
                   [texts[i] for i in rows], ends, columns)
            bar.update(len(rows))
    return texts


def decode(model, prompts, room, texts, ends, columns):
    """Append its continuation to each of the texts, at most room[b] ids and none of `ends`."""
    device, B, T = model.embed_tokens.weight.device, len(prompts), max(map(len, prompts))
    cache = model.cache_class(model.config, B, columns, model.embed_tokens.weight)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)  # [B, T]
    input_pos, counts = torch.arange(T, device=device).expand(B, T), lengths
    alive = set(range(B))
    while alive:
        h = model.hidden(ids, cache.attends(input_pos, counts), cos_sin=model.rope(input_pos))
        ids = model.logits(h[torch.arange(B, device=device), counts - 1]).argmax(-1)[:, None]
        for b, token in enumerate(ids[:, 0].tolist()):  # what an ended row goes on with is dropped
            if b in alive and token not in ends:
                texts[b].append(token)
            if token in ends or len(texts[b]) == room[b]:
                alive.discard(b)
        input_pos = lengths[:, None].clamp(max=columns - 1)  # [B, 1]
        lengths, counts = lengths + 1, torch.ones_like(lengths)


def eos_ids(eos_id) -> frozenset[int]:
    """The ids that end a row: none, one, or several."""
    return frozenset([] if eos_id is None else [eos_id] if isinstance(eos_id, int) else eos_id)


def new_tokens(c: Config, i: int, prompt: list[int], max_new, max_total, batch_tokens) -> int:
    """How many tokens prompt i may get; UserError if the prompt cannot be continued."""
    context = c.max_position_embeddings
    if not prompt:
        raise UserError(f"prompt {i} is empty; there is nothing to continue")
    if len(prompt) >= context:
        raise UserError(f"prompt {i} has {len(prompt)} tokens, which leaves no room in the model's "
                        f"context of {context}; shorten it")
    if min(prompt) < 0 or max(prompt) >= c.vocab_size:
        raise UserError(f"prompt {i} has token ids outside the model's vocabulary of "
                        f"{c.vocab_size}; is this the model's own tokenizer?")
    room = max(0, (context if max_total is None else min(max_total, context)) - len(prompt))
    room = room if max_new is None else min(room, max_new)
    if len(prompt) + room > batch_tokens:
        raise UserError(f"prompt {i} with its new tokens takes {len(prompt) + room} positions; a "
                        f"batch of {batch_tokens} tokens cannot hold it: raise the batch's tokens "
                        "or lower the number of new tokens")
    return room


# ------------------------------------------------------------------------------ loading, saving

INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
TIED_HEADS = ("lm_head.weight", "model.transformer.ff_out.weight")  # HF's, original OLMo's
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what no file name or UTF-8 file can hold
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # safetensors' names


def load_weights(model, folder: Path, dtype, device, contents: dict | None = None):
    """Fill a model on the meta device. contents: tensor of the checkpoint -> our parameters whose
    rows it holds, one after another; None: HF's layout, one tensor for each parameter."""
    contents = contents or {model.stored_name(n): [n] for n, _ in model.named_parameters()}
    files = find_tensors(model, folder, contents)
    for name, parameters in contents.items():
        # Each file is opened for each tensor anew: what is mapped counts as this process's memory
        # until it is closed, which would double the peak.
        with open_tensors(files[name]) as shard:
            sizes = [model.get_parameter(p).shape[0] for p in parameters]
            mapped = shard.get_tensor(name)  # its memory is the file
            for parameter, source in zip(parameters, mapped.split(sizes)):
                # A copy even where dtype and device agree: the file may change or go away.
                tensor = torch.empty(source.shape, dtype=dtype, device=device)
                tensor.copy_(source.to(device))  # moved first: a card rounds faster
                # aminmax hands NaN on, and needs no temporary of the tensor's size.
                if not torch.stack(tensor.aminmax()).isfinite().all():
                    raise UserError(f"{files[name]}: {name} holds NaN or infinity in {dtype}; "
                                    "the checkpoint is damaged, or needs a wider dtype")
                module, _, leaf = parameter.rpartition(".")
                setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
            mapped = source = None  # or the mapping would outlive the file's closing
    for name in set(files) & set(TIED_HEADS):
        if name not in contents:
            with open_tensors(files[name]) as shard:
                if not torch.equal(shard.get_tensor(name).to(model.head), model.head):
                    raise UserError(
                        f"{files[name]}: {name} is not the embedding, yet config.json says "
                        "tie_word_embeddings (or weight_tying); set it to false to use this head")


def find_tensors(model, folder: Path, contents: dict) -> dict[str, Path]:
    """Tensor -> its file; UserError unless the headers name just what the config asks for."""
    wanted = {name: [sum(model.get_parameter(p).shape[0] for p in parameters),
                     *model.get_parameter(parameters[0]).shape[1:]]
              for name, parameters in contents.items()}
    optional = {} if model.lm_head else dict.fromkeys(TIED_HEADS, list(model.head.shape))
    files, faults = {}, {kind: [] for kind in ("missing", "unexpected", "misshapen", "not float")}
    for file in shard_files(folder):
        with open_tensors(file) as shard:
            for name in sorted(shard.keys()):
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # old exports store RoPE's frequencies, which the config decides
                header, files[name] = shard.get_slice(name), file
                shape, expected = list(header.get_shape()), (wanted | optional).get(name)
                if expected is None:
                    faults["unexpected"].append(name)
                elif shape != expected:
                    faults["misshapen"].append(f"{name} {shape}, not {expected}")
                elif not DTYPES.get(header.get_dtype(), torch.int8).is_floating_point:
                    faults["not float"].append(f"{name} ({header.get_dtype()})")
    faults["missing"] = [name for name in wanted if name not in files]
    found = [f"{kind}: {first_names(names)}" for kind, names in faults.items() if names]
    if found:
        raise UserError(f"{folder}: weights do not fit config.json; {'; '.join(found)}; "
                        "take both from the same model")
    return files


def first_names(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, whole or in the shards that its index names."""
    index = folder / INDEX
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise UserError(f"{folder} has no model.safetensors and no {INDEX} (pickled weights, .bin "
                        "or .pt, can run code and are never read); finish the download")
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        bare = all(name == Path(name).name and name.endswith(".safetensors") for name in names)
    except (TypeError, KeyError, AttributeError):
        bare = False
    if not bare:  # a bare name cannot leave the folder
        raise UserError(f"{index}: weight_map must map each tensor to a .safetensors file that "
                        "stands beside it; download it again")
    return [folder / name for name in names]


def save_weights(model, folder: Path, shard_bytes: int):
    """What Transformer.save_pretrained writes; an older save in other shards is removed."""
    c = model.config
    with torch.device("meta"):
        expected = {name: p.shape for name, p in Transformer(c).named_parameters()}
    if {name: p.shape for name, p in model.named_parameters()} != expected:
        raise ValueError("parameters differ from the config's: undo replaced modules first")
    tensors = {model.stored_name(name): p.detach() for name, p in model.named_parameters()}
    shards = split_shards(tensors, shard_bytes)
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        save_tensors(folder / name, shard, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        where = {key: name for name, shard in zip(names, shards) for key in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        names.append(INDEX)
    write_json(folder / "config.json", c.to_hf(model.embed_tokens.weight.dtype))
    ids = {key: getattr(c, key) for key in TOKEN_IDS if getattr(c, key) is not None}
    write_json(folder / "generation_config.json", {"do_sample": False} | ids)
    for old in folder.iterdir():  # an older, differently sharded save would be read instead
        if WEIGHTS.fullmatch(old.name) and old.name not in names:
            old.unlink()


def split_shards(tensors: dict, limit: int) -> list[dict]:
    """Tensors in order, in as many shards of at most `limit` bytes as that takes."""
    shards, room = [{}], limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


# ------------------------------------------------------------------------------------------ files


def read_json(path):
    """The JSON value in a file; UserError says which file is missing or broken."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is not a plain file")  # a pipe would be waited for
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file") from None
    except (ValueError, RecursionError) as e:
        what = str(e).splitlines()[0]
        raise UserError(f"{path} is not valid JSON ({what}); fetch or make it again") from None


@contextlib.contextmanager
def atomic_file(path):
    """A binary file to write to, which gets its name `path` once all of it is on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.simu-partial")
    if beside.is_file() and not beside.is_symlink():
        beside.unlink()  # a killed process left it
    try:
        file = open(beside, "xb")  # only a new file: never through a link that someone put there
    except FileExistsError:
        raise UserError(f"{beside} is in the way of {path.name}; delete it") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as e:  # a full disk's names no file
        e.filename = e.filename or str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_text(path, text: str):
    """In UTF-8, all of it or nothing; missing folders are made."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def open_tensors(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"{file} is not a whole safetensors file ({reason}); "
                        "download it again") from None


def tensor_bytes(t: torch.Tensor):
    """The bytes of a contiguous CPU tensor, not copied: the caller must keep the tensor."""
    return (ctypes.c_ubyte * t.nbytes).from_address(t.data_ptr()) if t.nbytes else b""


def save_tensors(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    """Write a safetensors file tensor by tensor, all of it or nothing. Not by the package, which
    copies each shard and needs numpy. The format: 8 bytes of header length, a JSON header, the
    tensors' little-endian bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps alignment
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, t in ordered:
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape),
                        "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, t in ordered:
            t = t.detach().to("cpu").contiguous()
            file.write(tensor_bytes(t))
