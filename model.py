"""The transformer SIMU looks into: LLaMA, OLMo, OLMo-2 and Qwen2.5 in one class, told apart by
their config alone.

Letters: B batch, T time, L layers, D d_model, H heads, K key/value heads, hd head size, F d_ff,
V vocabulary. A SIMU neuron [D1] is one of the D output channels of a layer's down_proj; a function
put in `model.layers[l].mlp.intervene` sees and may change exactly those channels.

Not here: dropout, sliding windows, quantised weights, sampling, padding masks (training rows are
padded on the right, where causal attention cannot see them).
"""

import ctypes
import json
import math
import os
import re
import reprlib
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from stage import NO_TEXT, UserError, read_json, write_json

HUGE = 1e30  # no constant of a model is larger; float32 must hold it
OLMO_EPS = 1e-5  # not in OLMo's config.json: its released code and transformers both fix it
INIT_STD = 0.02  # GPT-2's, which LLaMA's and OLMo's published configs share
SHARD_BYTES = 5_000_000_000  # above this a checkpoint is split, as transformers does
PREFILL_ROWS = 16  # prompts read at once: less padding, smaller activations
INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
HEAD, OLMO_HEAD = "lm_head.weight", "model.transformer.ff_out.weight"  # HF's, original OLMo's
NAMED = 4  # tensors named of each kind of fault before only counting

MOST = 1 << 24  # of any size in a config.json, and MOST_LAYERS: far above any model's, below what
MOST_LAYERS = 1 << 10  # overflows or takes minutes before the weights are found not to fit

ARCHITECTURES = {"llama": "LlamaForCausalLM", "olmo": "OlmoForCausalLM",
                 "olmo2": "Olmo2ForCausalLM", "qwen2": "Qwen2ForCausalLM"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys that would change the numbers, and the one value of each that this code computes.
SUPPORTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
             "attention_dropout": 0, "partial_rotary_factor": 1, "quantization_config": None,
             "use_sliding_window": False}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# The original OLMo layout (allenai/OLMo-1B, not -hf): its config's names for ours, what its config
# must say, and its fused tensors, whose rows are those of several of ours, one after the other.
OLMO_NAMES = {"d_model": "hidden_size", "n_layers": "num_hidden_layers",
              "n_heads": "num_attention_heads", "max_sequence_length": "max_position_embeddings"}
OLMO_SUPPORTED = {"activation_type": "swiglu", "block_type": "sequential", "rope": True,
                  "layer_norm_type": "default", "layer_norm_with_affine": False, "alibi": False,
                  "layer_norm_eps": OLMO_EPS, "attention_layer_norm": False, "include_bias": False,
                  "scale_logits": False, "norm_after": False}
OLMO_TENSORS = {"att_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "attn_out": ("self_attn.o_proj",), "ff_out": ("mlp.down_proj",),
                "ff_proj": ("mlp.up_proj", "mlp.gate_proj")}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # safetensors' names


# ---------------------------------------------------------------------------------------- config


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a model. Names are those of HF's config.json, but for norm_eps (rms_norm_eps).
    UserError if the fields contradict each other or ask for what is not computed here."""

    model_type: str  # see Block and Attention for what "olmo", "olmo2", "qwen2" do differently
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
    rope_scaling: dict | None = None  # or {"rope_type": "llama3"} with the LLAMA3 numbers
    tie_word_embeddings: bool = False  # the head is the embedding
    clip_qkv: float | None = None  # OLMo: q, k, v are clamped to [-clip, clip] before RoPE
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        _need(self.model_type in list(ARCHITECTURES), self, "model_type",
              f"{' or '.join(ARCHITECTURES)}; no other architecture is supported")
        for name in SIZES:
            value = getattr(self, name)
            optional = value is None and name in ("num_key_value_heads", "head_dim")
            most = MOST_LAYERS if name == "num_hidden_layers" else MOST
            _need(optional or _is_int(value) and 0 < value <= most, self, name,
                  f"a whole number above 0, at most {most}")
        heads = self.num_attention_heads
        _need(self.hidden_size % heads == 0, self, "hidden_size",
              f"a multiple of num_attention_heads = {heads}")
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)
        _need(heads * self.head_dim <= MOST, self, "head_dim", f"at most {MOST} over all heads")
        _check_values(self)

    @classmethod
    def from_dir(cls, path) -> "Config":
        """Read `path`/config.json, as transformers 4 or 5 or OLMo's own code wrote it."""
        file = Path(path) / "config.json"
        if not Path(path).is_dir():
            raise UserError(f"{path} is not a folder; give the folder that holds config.json")
        raw = read_json(file)
        try:
            return cls(**_from_hf(raw))
        except UserError as e:
            raise UserError(f"{file}: {e}") from None

    def to_hf(self, dtype: torch.dtype) -> dict:
        """The content of a config.json which transformers 4 and 5 load; dtype of the weights."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        eps = own.pop("norm_eps")
        if self.model_type != "olmo":
            del own["clip_qkv"]
            own["rms_norm_eps"] = eps
        if self.model_type != "qwen2":  # which knows no such key: q, k and v always have biases
            own["attention_bias"] = False
        return own | {"architectures": [ARCHITECTURES[self.model_type]], "hidden_act": "silu",
                      "attention_dropout": 0.0, "torch_dtype": str(dtype).removeprefix("torch.")}


def _need(good: bool, config: Config, name: str, must: str):
    if not good:
        key = "rms_norm_eps" if name == "norm_eps" else name
        raise UserError(f"{key} = {reprlib.repr(getattr(config, name))}: must be {must}")


def _is_int(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_positive(x) -> bool:
    number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return number and 0 < x < HUGE


def _check_values(c: Config):
    _need(c.num_attention_heads % c.num_key_value_heads == 0, c, "num_key_value_heads",
          f"a divisor of num_attention_heads = {c.num_attention_heads}")
    _need(c.head_dim % 2 == 0, c, "head_dim", "even, for RoPE turns pairs of channels")
    _need(_is_positive(c.norm_eps), c, "norm_eps", "a number above 0")
    _need(_is_positive(c.rope_theta), c, "rope_theta", "a number above 0")
    _need(isinstance(c.tie_word_embeddings, bool), c, "tie_word_embeddings", "true or false")
    if c.model_type == "olmo":
        _need(c.norm_eps == OLMO_EPS, c, "norm_eps", f"{OLMO_EPS} for olmo, which fixes it")
        _need(c.clip_qkv is None or _is_positive(c.clip_qkv), c, "clip_qkv",
              "null or a number above 0")
    else:
        _need(c.clip_qkv is None, c, "clip_qkv", f"null for {c.model_type}; only olmo clips")
    scaling = c.rope_scaling
    if scaling is not None:
        good = isinstance(scaling, dict) and all(_is_positive(scaling.get(k)) for k in LLAMA3)
        _need(good and scaling["low_freq_factor"] < scaling["high_freq_factor"], c, "rope_scaling",
              f"null, or llama3's with {', '.join(LLAMA3)} above 0, the low below the high one")
    for name in TOKEN_IDS:
        value = getattr(c, name)
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        good = all(i is None or _is_int(i) and 0 <= i < c.vocab_size for i in ids)
        _need(good, c, name, f"null or a token id below vocab_size = {c.vocab_size}")


def _from_hf(raw) -> dict:
    """The fields of Config in the content of a config.json; a null counts as absent."""
    if not isinstance(raw, dict):
        raise UserError("must hold a JSON object; fetch it again")
    raw = {key: value for key, value in raw.items() if value is not None}
    if _is_original_olmo(raw):
        raw = _from_original_olmo(raw)
    _refuse_others(raw, SUPPORTED)
    kinds = raw.get("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"layer_types = {reprlib.repr(kinds)} is not supported; only "
                        '"full_attention" is')
    own = {f.name: raw[f.name] for f in fields(Config) if f.name in raw}
    own.pop("norm_eps", None)
    own.pop("rope_scaling", None)
    own |= _rope(raw)
    if own.get("model_type") != "olmo":
        own.pop("clip_qkv", None)  # transformers' others know no such key either
        own["norm_eps"] = raw.get("rms_norm_eps")
    if own.get("pad_token_id") == -1:  # how old LLaMA exports say "none"
        del own["pad_token_id"]
    for f in fields(Config):
        if own.get(f.name, f.default) is MISSING or own.get(f.name, 0) is None:
            key = "rms_norm_eps" if f.name == "norm_eps" else f.name
            raise UserError(f"{key} is missing; take the config.json the weights came with")
    return own


def _refuse_others(raw: dict, supported: dict):
    for key, only in supported.items():
        if raw.get(key, only) != only:
            raise UserError(f"{key} = {reprlib.repr(raw[key])} is not supported; only "
                            f"{json.dumps(only)} is")


def _is_original_olmo(raw) -> bool:
    """Is this the config.json of a checkpoint in the original OLMo layout?"""
    return isinstance(raw, dict) and "d_model" in raw


def _from_original_olmo(raw: dict) -> dict:
    """OLMo's own config in HF's names."""
    _refuse_others(raw, OLMO_SUPPORTED)
    for key in (*OLMO_NAMES, "vocab_size"):
        if key not in raw:
            raise UserError(f"{key} is missing; take the config.json the weights came with")
    up_and_gate = raw.get("mlp_hidden_size")  # both halves of ff_proj
    if not up_and_gate:
        ratio, width = raw.get("mlp_ratio", 4), raw["d_model"]
        up_and_gate = ratio * width if _is_int(ratio) and _is_int(width) else None
    if not _is_int(up_and_gate) or up_and_gate % 2:
        raise UserError("mlp_hidden_size, or mlp_ratio * d_model, must be an even whole number")
    heads = 1 if raw.get("multi_query_attention") is True else raw["n_heads"]
    same = ("clip_qkv", "rope_theta", *TOKEN_IDS)
    return {ours: raw[key] for key, ours in OLMO_NAMES.items()} | {
        key: raw[key] for key in same if key in raw} | dict(
        model_type="olmo", intermediate_size=up_and_gate // 2,
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],  # rows, with those that pad
        num_key_value_heads=raw.get("n_kv_heads", heads),
        tie_word_embeddings=raw.get("weight_tying", True))


def _rope(raw: dict) -> dict:
    """RoPE's base (absent: 10000) and scaling, from their old place or from transformers 5's
    rope_parameters."""
    own = {"rope_theta": raw.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key, {})
        if not isinstance(rope, dict):
            raise UserError(f"{key} = {reprlib.repr(rope)}: must be null or an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{key} = {reprlib.repr(rope)} is not supported; only plain RoPE and "
                            "llama3's are")
        if kind == "llama3":
            own["rope_scaling"] = {"rope_type": kind} | {k: rope.get(k) for k in LLAMA3}
        own["rope_theta"] = rope.get("rope_theta", own["rope_theta"])
    return own


# ----------------------------------------------------------------------------------------- model


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the division in float32, as the models were trained."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class LayerNorm(nn.Module):
    """OLMo's (x - mean) / std without weights, in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotate(x, cos, sin):
    """RoPE in float32 on x [B, heads, T, hd]: channels j and j + hd/2 turn together (the
    "rotate half" layout of HF checkpoints, not Meta's interleaved one)."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def causal_attention(q, k, v):
    """q [B, H, T, hd] on k, v [B, K, T, hd] at their own and earlier positions -> [B, T, H*hd]"""
    y = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])  # [B, H, T, hd]
    return y.transpose(1, 2).flatten(2)  # [B, T, H*hd]


class Attention(nn.Module):
    """The projections of one layer; `qkv` and `o_proj` stand apart so that callers (the key/value
    cache, SIMU's second stream [D2]) can put their own attention between them."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim, self.clip, bias = c.head_dim, c.clip_qkv, c.model_type == "qwen2"
        wide, narrow = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        self.q_proj = nn.Linear(c.hidden_size, wide, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, narrow, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, narrow, bias=bias)
        self.o_proj = nn.Linear(wide, c.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if c.model_type == "olmo2":  # over all heads at once
            self.q_norm, self.k_norm = RMSNorm(wide, c.norm_eps), RMSNorm(narrow, c.norm_eps)

    def qkv(self, x, cos, sin):
        """x [B, T, D], cos and sin [T, hd] or [B, T, hd] -> q [B, H, T, hd], k, v [B, K, T, hd],
        clipped or normed, and rotated: what attention sees and what a cache keeps."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (y.clamp(-self.clip, self.clip) for y in (q, k, v))
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (y.view(split).transpose(1, 2) for y in (q, k, v))  # [B, heads, T, hd]
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # [.., 1, T, hd]
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU. Its D outputs are SIMU's neurons, row k of down_proj.weight [D, F] being the k-th."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.intervene = None  # or a function [B, T, D] -> [B, T, D] on the output (beta in Eq. 1)

    def forward(self, x):
        beta = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return beta if self.intervene is None else self.intervene(beta)


class Block(nn.Module):
    """One layer. How attention and MLP join the residual stream stands here alone: most models norm
    what the two read, OLMo-2 what they write. SIMU's beta is the MLP's output before any norm."""

    def __init__(self, c: Config):
        super().__init__()
        norm = LayerNorm if c.model_type == "olmo" else RMSNorm
        self.norms_output = c.model_type == "olmo2"
        if not self.norms_output:
            self.input_layernorm = norm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = norm(c.hidden_size, c.norm_eps)
        if self.norms_output:
            self.post_feedforward_layernorm = norm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)

    def qkv(self, x, cos, sin):
        """Queries, keys and values of the stream x [B, T, D], as Attention.qkv gives them."""
        return self.self_attn.qkv(x if self.norms_output else self.input_layernorm(x), cos, sin)

    def add_attention(self, x, mixed):
        """The stream x [B, T, D] with what attention mixed [B, T, H*hd] -> [B, T, D]"""
        y = self.self_attn.o_proj(mixed)
        return x + (self.post_attention_layernorm(y) if self.norms_output else y)

    def beta(self, x):
        """The MLP's output on the stream x [B, T, D], attention already in it -> [B, T, D]"""
        return self.mlp(x if self.norms_output else self.post_attention_layernorm(x))

    def add_beta(self, x, beta):
        """The stream that leaves the layer: x with beta, which broadcast -> [..., D]"""
        return x + (self.post_feedforward_layernorm(beta) if self.norms_output else beta)

    def forward(self, x, cos, sin, attend=causal_attention):
        x = self.add_attention(x, attend(*self.qkv(x, cos, sin)))
        return self.add_beta(x, self.beta(x))


class Transformer(nn.Module):
    """A decoder-only language model. Fresh weights are drawn from torch's global generator, so
    `torch.manual_seed` decides them."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpoint = False  # True: blocks recompute their activations in the backward pass
        norm = LayerNorm if config.model_type == "olmo" else RMSNorm
        # Not nn.Embedding(V, D): its own initialisation, on the meta device, imports torch._dynamo.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = norm(config.hidden_size, config.norm_eps)
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
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def rope(self, positions):
        """int64 [...] -> cos, sin float32 [..., hd], each frequency standing twice: j, j + hd/2."""
        hd, scaling = self.config.head_dim, self.config.rope_scaling
        j = torch.arange(0, hd, 2, dtype=torch.float32, device=positions.device)  # [hd/2]
        inverse = 1.0 / self.config.rope_theta ** (j / hd)
        if scaling is not None:  # Llama 3.1: what turns seldom in its first context turns slower
            factor, low, high, context = (scaling[k] for k in LLAMA3)
            turns = context * inverse / (2 * math.pi)
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            inverse = inverse * (keep + (1 - keep) / factor)
        angle = positions[..., None].float() * inverse  # [..., hd/2]
        angle = torch.cat((angle, angle), dim=-1)  # [..., hd]
        return angle.cos(), angle.sin()

    def hidden(self, ids):
        """ids [B, T] -> final normed states [B, T, D], in the weights' dtype."""
        x = self.embed_tokens(ids)  # [B, T, D]
        cos, sin = self.rope(torch.arange(ids.shape[1], device=ids.device))  # [T, hd]
        for block in self.layers:
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin)
        return self.norm(x)

    def logits(self, h):
        """Final normed states [..., D] -> float32 [..., V]"""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(h, head.weight).float()

    def forward(self, ids):
        """ids [B, T] -> float32 logits [B, T, V]"""
        return self.logits(self.hidden(ids))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu") -> "Transformer":
        """Load a HF folder (config.json and safetensors, whole or sharded; also in the original
        OLMo layout), tensor by tensor into dtype on device. UserError names what is missing,
        unexpected, misshapen or damaged."""
        folder = Path(path)
        with torch.device("meta"):
            model = cls(Config.from_dir(folder))
        contents = _contents(model, _is_original_olmo(read_json(folder / "config.json")))
        files, index = weight_files(folder)
        places = _check_headers(model, contents, folder, files, index)
        for file in files:
            _load_shard(model, file, {n: contents[n] for n in places if places[n] == file},
                        dtype, device)
        for name in (HEAD, OLMO_HEAD):
            if model.lm_head is None and name in places:
                _check_tied(model, name, places[name])
        return model

    def save_pretrained(self, path, *, shard_bytes: int = SHARD_BYTES):
        """Write a HF folder: config.json, generation_config.json, safetensors (bf16 stays bf16).
        Each file appears under its name only when whole."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {_hf(name): p.detach() for name, p in self.named_parameters()}
        if {n: t.shape for n, t in tensors.items()} != _shapes(self.config):
            raise ValueError("parameters differ from the config's: undo replaced modules first")
        shards = _split(tensors, shard_bytes)
        names = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards):
            save_tensors(folder / name, shard, metadata={"format": "pt"})
        if len(shards) > 1:
            total = sum(t.nbytes for t in tensors.values())
            where = {key: name for name, shard in zip(names, shards) for key in shard}
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        c = self.config
        write_json(folder / "config.json", c.to_hf(self.embed_tokens.weight.dtype))
        ids = {key: getattr(c, key) for key in TOKEN_IDS if getattr(c, key) is not None}
        write_json(folder / "generation_config.json", {"do_sample": False} | ids)
        keep = {*names, INDEX} if len(shards) > 1 else set(names)
        for old in folder.iterdir():  # an older, differently sharded save would be read instead
            if WEIGHTS.fullmatch(old.name) and old.name not in keep:
                old.unlink()


# --------------------------------------------------------------------------------- loading, saving


def _hf(name: str) -> str:
    """Our parameter's name in a HF checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _contents(model, original_olmo: bool) -> dict[str, list[str]]:
    """Tensor of a checkpoint -> our parameters whose rows it holds; a tied head may be stored, but
    is none of ours."""
    head = [] if model.lm_head is None else ["lm_head.weight"]
    if not original_olmo:
        return {_hf(name): [name] for name, _ in model.named_parameters()} | {HEAD: head}
    blocks = {f"model.transformer.blocks.{i}.{name}.weight": [f"layers.{i}.{p}.weight" for p in own]
              for i in range(len(model.layers)) for name, own in OLMO_TENSORS.items()}
    return {"model.transformer.wte.weight": ["embed_tokens.weight"]} | blocks | {OLMO_HEAD: head}


def _shapes(config: Config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {_hf(name): p.shape for name, p in Transformer(config).named_parameters()}


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a checkpoint, and its index: tensor name -> file name."""
    whole, index = folder / "model.safetensors", folder / INDEX
    if whole.is_file():
        return [whole], {}
    if not index.is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise UserError(f"{folder} has only pickled weights (.bin, .pt), which can run code "
                            "and are never read; convert them (transformers: save_pretrained)")
        raise UserError(f"{folder} has no model.safetensors and no {INDEX}; "
                        "finish the download, or point to the folder that has them")
    content = read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: weight_map must map tensor names to files; download it again")
    for tensor, name in where.items():
        # A bare name cannot leave the folder. Links may: HF's own cache is made of them.
        bare = isinstance(name, str) and not re.search(r"[/\\]", name) and not NO_TEXT.search(name)
        if not bare or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {tensor} is said to be in {reprlib.repr(name)}; a shard "
                            "must be a .safetensors file beside the index")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing ({INDEX} puts {tensor} there); "
                            "finish the download")
    return [folder / name for name in sorted(set(where.values()))], where


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"{file} is not a whole safetensors file ({reason}); "
                        "download it again") from None


def _check_headers(model, contents: dict, folder: Path, files: list[Path],
                   index: dict) -> dict[str, Path]:
    """Tensor name -> its file, once the headers promise exactly what the config asks for."""
    ours = {name: p.shape for name, p in model.named_parameters()}
    stored = {name: parts or ["embed_tokens.weight"] for name, parts in contents.items()}
    want = {name: [sum(ours[p][0] for p in parts), *ours[parts[0]][1:]]
            for name, parts in stored.items()}
    places, faults = {}, {kind: [] for kind in ("missing", "unexpected", "misshapen", "not float")}
    for file in files:
        with _open(file) as shard:
            names = set(shard.keys())
            lost = [n for n, f in index.items() if f == file.name and n not in names]
            if lost:
                raise UserError(f"{file}: the index puts {_several(lost)} here, but the file does "
                                "not hold it; index and shards are of different models")
            for name in sorted(names):
                if name.endswith("rotary_emb.inv_freq") or index.get(name, file.name) != file.name:
                    continue  # old exports store RoPE's frequencies, which the config decides
                tensor = shard.get_slice(name)
                shape = list(tensor.get_shape())
                if name not in want:
                    faults["unexpected"].append(name)
                elif shape != want[name]:
                    faults["misshapen"].append(f"{name} {shape}, not {want[name]}")
                elif not DTYPES.get(tensor.get_dtype(), torch.int8).is_floating_point:
                    faults["not float"].append(f"{name} ({tensor.get_dtype()})")
                places[name] = file
    faults["missing"] = [name for name, parts in contents.items() if parts and name not in places]
    told = [f"{kind}: {_several(names)}" for kind, names in faults.items() if names]
    if told:
        raise UserError(f"{folder}: weights do not fit config.json; {'; '.join(told)}; "
                        "take both from the same model")
    return places


def _several(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _load_shard(model, file: Path, contents: dict[str, list[str]], dtype, device):
    with _open(file) as shard:
        for name, parts in contents.items():
            rows = [model.get_parameter(part).shape[0] for part in parts]
            mapped = shard.get_tensor(name)  # its memory is the file
            for part, source in zip(parts, mapped.split(rows) if parts else ()):
                # A copy even where dtype and device agree: the file may change or go away.
                tensor = torch.empty(source.shape, dtype=dtype, device=device)
                tensor.copy_(source)
                low, high = tensor.aminmax()  # NaN passes; no temporary of the tensor's size
                if not (low.isfinite() and high.isfinite()):
                    raise UserError(f"{file}: {name} holds NaN or infinity in {dtype}; "
                                    "the checkpoint is damaged, or needs a wider dtype")
                module, _, leaf = part.rpartition(".")
                setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))


def _check_tied(model, name: str, file: Path):
    """UserError unless the head stored beside a tied embedding is the embedding."""
    weight = model.embed_tokens.weight
    with _open(file) as shard:
        if not torch.equal(shard.get_tensor(name).to(weight), weight):
            raise UserError(f"{file}: {name} is not the embedding, yet config.json says "
                            "tie_word_embeddings (or weight_tying); set it to false to use this "
                            "head")


def _split(tensors: dict, limit: int) -> list[dict]:
    """Tensors in order, in as many shards of at most `limit` bytes as that takes."""
    shards, room = [{}], limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def raw(t: torch.Tensor):
    """The bytes of a contiguous CPU tensor, not copied: the caller must keep the tensor."""
    return (ctypes.c_ubyte * t.nbytes).from_address(t.data_ptr()) if t.nbytes else b""


def save_tensors(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    """Write a safetensors file, one tensor at a time and whole or not at all. (The safetensors
    package would copy each shard and needs numpy: the format is 8 bytes of header length, a JSON
    header, raw little-endian data.)"""
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps alignment
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, t in ordered:
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape),
                        "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, t in ordered:
                t = t.detach().to("cpu").contiguous()
                file.write(raw(t))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- generation


class Cache:
    """Keys and values of B rows. Columns below `width` hold the prompts, padded on the right;
    column width + s holds every row's s-th new token. A row's pads are masked out, and RoPE has
    put each token's true position into its key, so where a key is stored does not matter."""

    def __init__(self, c: Config, lengths, width: int, steps: int, like):
        shape = (len(lengths), c.num_key_value_heads, width + steps, c.head_dim)
        # Zeroed: a masked key weighs 0, but 0 times an uninitialised NaN would be NaN.
        self.k = [like.new_zeros(shape) for _ in range(c.num_hidden_layers)]  # [B, K, cap, hd]
        self.v = [like.new_zeros(shape) for _ in range(c.num_hidden_layers)]
        self.end = width  # columns in use
        column = torch.arange(width + steps, device=like.device)
        self.mask = None  # added to scores: 0, or -inf at pads [B, 1, 1, cap]
        if (lengths < width).any():
            pads = (column >= lengths[:, None]) & (column < width)  # [B, cap]
            self.mask = like.new_zeros(pads.shape).masked_fill(pads, -math.inf)[:, None, None]

    def prefill(self, rows: slice, layer: int, q, k, v):
        """Causal attention over the prompts of some rows, whose keys and values are kept."""
        width = k.shape[2]
        self.k[layer][rows, :, :width], self.v[layer][rows, :, :width] = k, v
        return causal_attention(q, k, v)

    def step(self, layer: int, q, k, v):
        """One new token per row, q [B, H, 1, hd], on all it may see -> [B, 1, H*hd]"""
        keys, values = self.k[layer][:, :, : self.end], self.v[layer][:, :, : self.end]
        keys[:, :, -1:], values[:, :, -1:] = k, v
        # With one query per head, the heads sharing a key head are just its rows of queries.
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, K, H/K, hd]
        mask = None if self.mask is None else self.mask[..., : self.end]
        y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return y.reshape(q.shape[0], 1, -1)  # [B, 1, H*hd]

    def keep(self, rows):
        """Drop all rows but these (distinct int64 indices), which take this order. Those among
        the first len(rows) should stand at their own place: they are not copied."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for kept in (self.k, self.v):
            for layer, x in enumerate(kept):
                x[moved, :, : self.end] = x[rows[moved], :, : self.end]
                kept[layer] = x[: len(rows)]
        self.mask = None if self.mask is None else self.mask[rows]


def generate(model, prompts, *, max_new_tokens=None, eos_id, max_total_tokens=None,
             batch_tokens=16384, progress=None) -> list[list[int]]:
    """Greedy continuations [D16] of `prompts` (lists of ids), in their order: new ids, without eos.
    A row ends at eos_id (None: never), after max_new_tokens, at max_total_tokens with its prompt,
    or at the model's context. A batch holds at most batch_tokens cached positions; `progress`
    names a tqdm bar. In float32 a row's tokens do not depend on its company; in bfloat16 rounding
    may decide a near tie. UserError for a prompt that is empty, too long or not in vocabulary."""
    limits = [_room(model.config, i, prompt, max_new_tokens, max_total_tokens)
              for i, prompt in enumerate(prompts)]
    for i, prompt in enumerate(prompts):
        if len(prompt) + limits[i] > batch_tokens:
            raise UserError(f"prompt {i} with its new tokens takes {len(prompt) + limits[i]} "
                            f"positions; a batch of {batch_tokens} tokens cannot hold it: raise "
                            "the batch's tokens or lower the number of new tokens")
    out = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc=progress, unit="row", disable=progress is None) as bar:
        for rows in _batches([len(p) for p in prompts], limits, batch_tokens):
            new = _decode(model, [prompts[i] for i in rows], [limits[i] for i in rows], eos_id)
            for i, ids in zip(rows, new):
                out[i] = ids
            bar.update(len(rows))
    return out


def _room(c: Config, i: int, prompt: list[int], max_new, max_total) -> int:
    """How many tokens prompt i may get."""
    context = c.max_position_embeddings
    if not prompt:
        raise UserError(f"prompt {i} is empty; there is nothing to continue")
    if len(prompt) >= context:
        raise UserError(f"prompt {i} has {len(prompt)} tokens, which leaves no room in the model's "
                        f"context of {context}; shorten it")
    if min(prompt) < 0 or max(prompt) >= c.vocab_size:
        raise UserError(f"prompt {i} has token ids outside the model's vocabulary of "
                        f"{c.vocab_size}; is this the model's own tokenizer?")
    most = context if max_total is None else min(context, max_total)
    room = max(0, most - len(prompt))
    return room if max_new is None else min(room, max_new)


def _batches(lengths: list[int], limits: list[int], budget: int):
    """Row numbers in batches, rows of like length together, the longest first: what does not fit
    in memory fails at once. Rows with no room are left out."""
    order = sorted((i for i in range(len(lengths)) if limits[i] > 0), key=lambda i: -lengths[i])
    batch, steps = [], 0
    for i in order:
        wider = max(steps, limits[i])
        if batch and (len(batch) + 1) * (lengths[batch[0]] + wider) > budget:
            yield batch
            batch, wider = [], limits[i]
        batch, steps = [*batch, i], wider
    if batch:
        yield batch


@torch.inference_mode()
def _decode(model, prompts: list[list[int]], limits: list[int], eos_id) -> list[list[int]]:
    """Greedy decoding of one batch."""
    device = model.embed_tokens.weight.device
    width, steps = max(map(len, prompts)), max(limits)
    position = torch.tensor([len(p) for p in prompts], device=device)  # [B], of the next token
    cache = Cache(model.config, position, width, steps, model.embed_tokens.weight)
    cos, sin = model.rope(torch.arange(width + steps, device=device))  # [cap, hd]

    x = []
    for i in range(0, len(prompts), PREFILL_ROWS):
        rows = slice(i, i + PREFILL_ROWS)
        own = max(map(len, prompts[rows]))
        ids = torch.tensor([p + [0] * (own - len(p)) for p in prompts[rows]], device=device)
        h = _run(model, ids, cos[:own], sin[:own], partial(cache.prefill, rows))  # [b, own, D]
        x.append(h[torch.arange(len(h), device=device), position[rows] - 1])
    x = torch.cat(x)  # [B, D], at each row's last token
    out, alive = [[] for _ in prompts], list(range(len(prompts)))
    for step in range(1, steps + 1):
        token = model.logits(model.norm(x)).argmax(-1)  # [B]
        left = []
        for j, (row, new) in enumerate(zip(alive, token.tolist())):
            if new != eos_id:
                out[row].append(new)
                if step < limits[row]:
                    left.append(j)
        if not left:
            break
        if len(left) < len(alive):
            # Survivors from the end fill the places of the finished: few rows are copied.
            stay = set(left)
            last = [j for j in left if j >= len(left)]
            left = [j if j in stay else last.pop() for j in range(len(left))]
            rows = torch.tensor(left, device=device)
            cache.keep(rows)
            token, position, alive = token[rows], position[rows], [alive[j] for j in left]
        cache.end += 1
        x = _run(model, token[:, None], cos[position][:, None], sin[position][:, None], cache.step)
        x, position = x[:, 0], position + 1  # [B, D]
    return out


def _run(model, ids, cos, sin, attend):
    """All blocks with attend(layer, q, k, v) in place of plain causal attention -> [B, T, D]"""
    x = model.embed_tokens(ids)
    for layer, block in enumerate(model.layers):
        x = block(x, cos, sin, partial(attend, layer))
    return x
