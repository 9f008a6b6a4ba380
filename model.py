"""The transformer SIMU looks into: LLaMA, Mistral, OLMo, OLMo-2 and Qwen2.5 in one class, told
apart by their config alone.

Letters: B batch, T time, L layers, D width, H heads, K key/value heads, hd head size, F d_ff,
V vocabulary, S cached columns. A SIMU neuron [D1] is one of the D output channels of a layer's
down_proj; a function put in `model.layers[l].mlp.intervene` sees and may change exactly those.

Not here: dropout, sliding windows, quantised weights, sampling, padding masks (training rows are
padded on the right, where causal attention cannot see them), saving weights in several files.
"""

import contextlib
import ctypes
import json
import math
import os
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

INIT_STD = 0.02  # GPT-2's, which LLaMA's and OLMo's published configs share
OLMO_EPS = 1e-5  # not in OLMo's config.json: its released code and transformers both fix it


class UserError(Exception):
    """Something the person at the keyboard can put right: what is wrong, where, what to do."""


class Norm(nn.Module):
    """x / rms(x) * weight; torch divides in float32, as the models were trained, and rounds before
    the weight, as they did. plain: OLMo's (x - mean) / std without weights, in float32."""

    def __init__(self, dim: int, eps: float, plain: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = None if plain else nn.Parameter(torch.ones(dim))

    def forward(self, x):
        if self.weight is None:
            return F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def make_norm(c: "Config") -> Norm:
    return Norm(c.hidden_size, c.rms_norm_eps, c.architecture.plain_norm)


def rotate(x, cos, sin):
    """RoPE on x [B, heads, T, hd], in float32 as cos and sin are: the pair (x_j, x_j+hd/2) becomes
    (x_j cos - x_j+hd/2 sin, x_j+hd/2 cos + x_j sin). This is the "rotate half" layout of HF
    checkpoints; Meta's own turn neighbouring channels."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def attention(q, k, v, mask):
    """q [B, H, T, hd] on k, v [B, K, S, hd] -> [B, T, H*hd]; mask [B, 1, T, S]: is it seen?"""
    B, H, T, hd = q.shape
    shared = H // k.shape[1]  # heads that share keys are folded into T: no copy of k and v
    q = q.reshape(B, -1, shared * T, hd)  # [B, K, H/K * T, hd]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, shared, 1))
    return y.reshape(B, H, T, hd).transpose(1, 2).flatten(2)  # [B, T, H*hd]


def causal_attention(q, k, v):
    """q [B, H, T, hd] on k, v [B, K, T, hd] -> [B, T, H*hd]: a position sees itself and what stands
    before it. A replacement has the same arguments and result."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # its backward is 3x slower there
        return causal_attention(q.float(), k.float(), v.float()).to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2)  # [B, T, H*hd]


class Attention(nn.Module):
    """The projections of a layer. The attention between them, `attend`, is the caller's."""

    def __init__(self, c: "Config"):
        super().__init__()
        self.head_dim, self.clip = c.head_dim, c.clip_qkv
        self.norms, biases = c.architecture.norms_qk, c.architecture.biases
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=biases)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=biases)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=biases)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)
        if self.norms:
            heads = self.norms == "head"
            self.q_norm = Norm(c.head_dim if heads else q_size, c.rms_norm_eps)
            self.k_norm = Norm(c.head_dim if heads else kv_size, c.rms_norm_eps)

    def qkv(self, x, cos, sin):
        """x [B, T, D], cos and sin [T, hd] or [B, T, hd] -> q [B, H, T, hd], k, v [B, K, T, hd],
        clipped or normed, and rotated: what attention sees and what a cache keeps."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.norms == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (y.clamp(-self.clip, self.clip) for y in (q, k, v))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))  # [B, T, heads, hd]
        if self.norms == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, heads, T, hd]
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # [1, T, hd] or [B, 1, T, hd]
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x, cos, sin, attend):
        return self.o_proj(attend(*self.qkv(x, cos, sin)))


class MLP(nn.Module):
    """SwiGLU in two steps: `neurons` gives the activations of SIMU's neurons (NEURONS), which
    `intervene` may change; `write` gives what they add to the residual stream."""

    def __init__(self, c: "Config"):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.inner = NEURONS[c.neurons].size == "intermediate_size"
        self.intervene = None  # or a function of the activations, the beta of Eq. 1

    def neurons(self, x):
        """x [.., D] -> [.., D], what down_proj gives; of inner neurons [.., F], what it reads"""
        a = F.silu(self.gate_proj(x)) * self.up_proj(x)
        a = a if self.inner else self.down_proj(a)
        return a if self.intervene is None else self.intervene(a)

    def write(self, a):
        """The neurons' activations [.., D] or [.., F] -> what they add to the stream [.., D]"""
        return self.down_proj(a) if self.inner else a


class Block(nn.Module):
    """One layer: how attention and MLP read the residual stream and add to it. Most models norm
    what the two read, OLMo-2 what they write; the names are those of HF's checkpoints."""

    def __init__(self, c: "Config"):
        super().__init__()
        self.norms_output = c.architecture.norms_output
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.post_attention_layernorm = make_norm(c)
        if self.norms_output:
            self.post_feedforward_layernorm = make_norm(c)
        else:
            self.input_layernorm = make_norm(c)

    def up_to_beta(self, x, cos, sin, attend):
        """The stream x [B, T, D] -> the stream after attention, and the activations beta (Eq. 1)"""
        if self.norms_output:
            x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin, attend))
            return x, self.mlp.neurons(x)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x, self.mlp.neurons(self.post_attention_layernorm(x))

    def add_beta(self, x, beta):
        """The stream after attention, and beta, which broadcast -> what leaves the layer [.., D]"""
        y = self.mlp.write(beta)
        return x + (self.post_feedforward_layernorm(y) if self.norms_output else y)

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


ARCHITECTURES = {  # model_type of a config.json -> what is different there
    "llama": Architecture(name="LlamaForCausalLM"),
    "mistral": Architecture(name="MistralForCausalLM", window=4096),
    "olmo": Architecture(name="OlmoForCausalLM", plain_norm=True, clips=True),
    "olmo2": Architecture(name="Olmo2ForCausalLM", norms_qk="all", norms_output=True),
    "qwen2": Architecture(name="Qwen2ForCausalLM", biases=True)}


@dataclass(frozen=True)
class Neurons:
    """Where a layer's neurons are: matrices of its MLP whose k-th row, or column, is neuron k's."""

    size: str  # the field of Config that counts them
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


NEURONS = {"output": Neurons("hidden_size", rows=("down_proj",)),
           "inner": Neurons("intermediate_size", ("gate_proj", "up_proj"), ("down_proj",))}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Keys that would change the numbers, and the one value of each that this code computes.
SUPPORTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
             "attention_dropout": 0, "partial_rotary_factor": 1, "quantization_config": None,
             "use_sliding_window": False}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a model. Names are those of HF's config.json."""

    model_type: str  # a row of ARCHITECTURES
    vocab_size: int  # V, rows of the embedding
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int | None = None  # K; None: H
    head_dim: int | None = None  # hd; None: D / H
    max_position_embeddings: int
    rms_norm_eps: float = OLMO_EPS
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # or {"rope_type": "llama3"} with the numbers LLAMA3 names
    tie_word_embeddings: bool = False  # the head is the embedding
    clip_qkv: float | None = None  # q, k, v are clamped to [-clip, clip] before RoPE
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    neurons: str = "output"  # a row of NEURONS; SIMU's setting, not part of config.json

    def __post_init__(self):
        heads = self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model_type]

    @property
    def neuron_count(self) -> int:
        """Neurons of a layer: the D of every [L, D] of scores and masks."""
        return getattr(self, NEURONS[self.neurons].size)

    @classmethod
    def from_dir(cls, path, **changes) -> "Config":
        """Read `path`/config.json, as transformers 4 or 5 wrote it. UserError if this code would
        compute other numbers than transformers."""
        file = Path(path) / "config.json"
        content = read_json(file)
        architecture = ARCHITECTURES.get(content.get("model_type"))
        if architecture is None:
            raise UserError(f"{file}: model_type = {content.get('model_type')!r} is not supported; "
                            f"only {', '.join(ARCHITECTURES)} are")
        scaling = content.get("rope_parameters") or content.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        window = content.get("sliding_window", architecture.window) if architecture.window else None
        faults = [f"{key} = {content[key]!r}" for key, only in SUPPORTED.items()
                  if content.get(key) not in (None, only)]
        if kind not in ("default", "llama3") or scaling.get("partial_rotary_factor", 1) != 1:
            faults.append(f"RoPE of {scaling}")
        if any(x != "full_attention" for x in content.get("layer_types") or ()):
            faults.append(f"layer_types = {content['layer_types']}")
        if window is not None and window < content["max_position_embeddings"]:
            faults.append(f"sliding_window = {window}, below max_position_embeddings,")
        if faults:
            raise UserError(f"{file}: {'; '.join(faults)} is not supported")
        values = {f.name: content[f.name] for f in fields(cls) if content.get(f.name) is not None}
        values["rope_theta"] = scaling.get("rope_theta") or content.get("rope_theta") or 10000.0
        values["rope_scaling"] = None
        if kind == "llama3":
            values["rope_scaling"] = {"rope_type": kind} | {key: scaling[key] for key in LLAMA3}
        values["rms_norm_eps"] = OLMO_EPS if architecture.plain_norm else content["rms_norm_eps"]
        if not architecture.clips:  # transformers' other classes ignore clip_qkv too
            values["clip_qkv"] = None
        if values.get("pad_token_id") == -1:  # how old LLaMA exports say "none"
            values["pad_token_id"] = None
        return cls(**values | {"neurons": "output"} | changes)

    def to_hf(self, dtype: torch.dtype) -> dict:
        """The content of a config.json which transformers 4 and 5 load; dtype of the weights."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "neurons"}
        return values | {"architectures": [self.architecture.name], "sliding_window": None,
                         "torch_dtype": str(dtype).removeprefix("torch.")}


# ----------------------------------------------------------------------------------------- model


class KVCache:
    """Keys and values [L, B, K, S, hd] of B rows. A token's column is its position."""

    def __init__(self, c: Config, B: int, columns: int, like):
        shape = (c.num_hidden_layers, B, c.num_key_value_heads, columns, c.head_dim)
        # Zeros, not empty: a masked column still counts with weight 0, and 0 * NaN is NaN.
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.rows, self.columns = (torch.arange(n, device=like.device) for n in (B, columns))

    def attends(self, positions, end: int) -> list:
        """For each layer, attention of tokens at positions [B, T], all below `end`, on the columns
        up to their own. What pads a row on the right is overwritten before any token sees it."""
        unseen = self.columns[:end] > positions[..., None]  # [B, T, S]
        mask = self.k.new_zeros(unseen.shape).masked_fill_(unseen, -math.inf)[:, None]
        return [partial(self.update, k[:, :, :end], v[:, :, :end], positions, mask)
                for k, v in zip(self.k, self.v)]

    def update(self, keys, values, positions, mask, q, k, v):
        keys[self.rows[:, None], :, positions] = k.transpose(1, 2)  # [B, T, K, hd]
        values[self.rows[:, None], :, positions] = v.transpose(1, 2)
        return attention(q, keys, values, mask)


class Transformer(nn.Module):
    """A decoder-only language model, whose fresh weights torch.manual_seed decides."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.stored_dtype = self.generation_config = None  # those of the folder it came from
        self.checkpoint = False  # True: blocks recompute their activations in the backward pass
        # Not nn.Embedding(V, D): its initialisation on the meta device imports torch._dynamo.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # The residual stream adds 2L outputs: scaled so that its variance does not grow with L.
        residual_std = INIT_STD / math.sqrt(2 * config.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and not weight.is_meta:  # else a loader fills it
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=residual_std if residual else INIT_STD)
            elif name.endswith(".bias"):
                nn.init.zeros_(weight)

    def rope(self, positions):
        """positions int64 [...] -> cos, sin float32 [..., hd] as `rotate` takes them: channels j
        and j + hd/2 turn by one angle, so it stands twice, with its sine negated the first time."""
        hd, scaling = self.config.head_dim, self.config.rope_scaling
        j = torch.arange(0, hd, 2, dtype=torch.float32, device=positions.device)  # [hd/2]
        frequency = 1.0 / self.config.rope_theta ** (j / hd)
        if scaling is not None:
            # Llama 3.1 divides by `factor` the frequencies that turn fewer than `low` times in the
            # trained context, keeps those that turn more than `high` times, and blends in between.
            factor, low, high, context = (scaling[k] for k in LLAMA3)
            turns = context * frequency / (2 * math.pi)
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = frequency * (keep + (1 - keep) / factor)
        angle = positions[..., None].float() * frequency  # [..., hd/2]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # [..., hd]

    def hidden(self, ids, attends=None, *, cos_sin=None):
        """ids [B, T] -> final normed states [B, T, D], in the weights' dtype. `attends`: for each
        layer what stands in for causal_attention; `cos_sin`: self.rope of the ids' positions, if
        not from 0 on."""
        x = self.embed_tokens(ids)  # [B, T, D]
        attends = attends or [causal_attention] * len(self.layers)
        if cos_sin is None:
            cos_sin = self.rope(torch.arange(ids.shape[1], device=ids.device))
        for block, attend in zip(self.layers, attends):
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, *cos_sin, attend, use_reentrant=False,
                               preserve_rng_state=False)
            else:
                x = block(x, *cos_sin, attend)
        return self.norm(x)

    @property
    def head(self):
        """The matrix [V, D] of the logits."""
        return (self.lm_head or self.embed_tokens).weight

    def logits(self, h):
        """Final normed states [..., D] -> float32 [..., V]"""
        return F.linear(h, self.head).float()

    def forward(self, ids):
        """ids [B, T] -> float32 logits [B, T, V]"""
        return self.logits(self.hidden(ids))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", *, neurons="output"):
        """Load a HF folder (config.json and safetensors, whole or sharded), tensor by tensor into
        dtype on device. UserError names what is missing, unexpected, misshapen or damaged."""
        with torch.device("meta"):
            model = cls(Config.from_dir(path, neurons=neurons))
        load_weights(model, Path(path), dtype, device)
        file = Path(path) / "generation_config.json"
        model.generation_config = read_json(file) if file.is_file() else None
        return model

    def save_pretrained(self, path):
        """Write a HF folder: config.json, model.safetensors, and the generation_config.json of the
        folder it came from, in whose dtype float32 weights are stored. Files appear complete."""
        dtype = self.embed_tokens.weight.dtype
        if dtype == torch.float32:
            dtype = self.stored_dtype or dtype
        weights = {name: p.detach().to(dtype) for name, p in stored_parameters(self).items()}
        save_tensors(Path(path) / "model.safetensors", weights, {"format": "pt"})
        write_json(Path(path) / "config.json", self.config.to_hf(dtype))
        if self.generation_config is not None:
            write_json(Path(path) / "generation_config.json", self.generation_config)


# -------------------------------------------------------------------------------------- decoding


@torch.inference_mode()
def generate(model, prompts, *, max_new_tokens=None, eos_id, max_total_tokens=None,
             batch_tokens=16384, progress=None) -> list[list[int]]:
    """Greedy continuations [D16] of `prompts` (lists of ids), in their order: new ids, without eos.
    A row ends at eos_id (an id, several, or None: never), after max_new_tokens, at max_total_tokens
    with its prompt, or at the model's context. A batch is one row, or as many as batch_tokens
    cached positions hold; `progress` names a tqdm bar."""
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    for prompt in prompts:
        if not 0 < len(prompt) < context or max(prompt) >= vocab:
            raise UserError(f"a prompt of {len(prompt)} tokens cannot be continued in a context of "
                            f"{context}, with ids up to {max(prompt, default=0)} of {vocab}")
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    new = context if max_new_tokens is None else max_new_tokens
    total = context if max_total_tokens is None else max_total_tokens
    limit = [max(len(p), min(len(p) + new, total, context)) for p in prompts]
    texts = [list(p) for p in prompts]
    order = [i for i, prompt in enumerate(prompts) if limit[i] > len(prompt)]
    # The longest first: what does not fit in memory fails at once, and little is padded.
    order.sort(key=lambda i: (-limit[i], -len(prompts[i])))
    with tqdm(total=len(order), desc=progress, unit="row", disable=progress is None) as bar:
        while order:
            count = max(1, batch_tokens // limit[order[0]])
            rows, order = order[:count], order[count:]
            decode(model, [texts[i] for i in rows], [limit[i] for i in rows], ends)
            bar.update(len(rows))
    return [text[len(prompt):] for text, prompt in zip(texts, prompts)]


def decode(model, texts: list[list[int]], limit: list[int], ends: set[int]):
    """Append to each of B texts its continuation, up to limit[b] ids in all and none of `ends`."""
    device, B, T = model.embed_tokens.weight.device, len(texts), max(map(len, texts))
    columns, alive = max(limit), set(range(B))
    cache = KVCache(model.config, B, columns, model.embed_tokens.weight)
    ids = torch.tensor([text + [0] * (T - len(text)) for text in texts], device=device)  # [B, T]
    read = torch.tensor([len(text) for text in texts], device=device)  # [B], tokens of each row
    positions, newest, end = torch.arange(T, device=device).expand(B, T), read - 1, T
    while alive:
        h = model.hidden(ids, cache.attends(positions, end), cos_sin=model.rope(positions))
        ids = model.logits(h[cache.rows, newest]).argmax(-1)[:, None]  # [B, 1]
        for b, token in enumerate(ids[:, 0].tolist()):
            if b in alive and token not in ends:
                texts[b].append(token)
            if token in ends or len(texts[b]) == limit[b]:
                alive.discard(b)  # the row is read on with the others, and nothing of it is taken
        positions, newest = read[:, None].clamp(max=columns - 1), torch.zeros_like(read)
        read, end = read + 1, min(end + 1, columns)


# ------------------------------------------------------------------------------ loading, saving

INDEX = "model.safetensors.index.json"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # safetensors' names


def stored_parameters(model) -> dict[str, nn.Parameter]:
    """A model's parameters, by their names in a HF checkpoint."""
    return {name if name.startswith("lm_head.") else f"model.{name}": p
            for name, p in model.named_parameters()}


def load_weights(model, folder: Path, dtype, device):
    """Fill a model on the meta device from a HF folder. Strict: UserError names a tensor that is
    missing, unexpected, misshapen, not float or not finite."""
    files = {}  # the file of each stored name
    for file in shard_files(folder):
        with safe_open(file, framework="pt") as shard:
            files |= dict.fromkeys(sorted(shard.keys()), file)
    parameters = stored_parameters(model)
    # Old exports store RoPE's frequencies, which the config decides, and some a head that is tied.
    optional = ("rotary_emb.inv_freq", "lm_head.weight")
    faults = [f"{name} is missing" for name in parameters if name not in files]
    faults += [f"{name} is unexpected" for name in files
               if name not in parameters and not name.endswith(optional)]
    if faults:
        raise UserError(f"{folder}: {len(faults)} weights do not fit config.json: "
                        f"{', '.join(faults[:4])}; take both from the same model")
    with safe_open(files["model.embed_tokens.weight"], framework="pt") as shard:
        model.stored_dtype = shard.get_tensor("model.embed_tokens.weight").dtype
    for name, parameter in parameters.items():
        weight = read_weight(files[name], name, parameter.shape, dtype, device)
        module, _, leaf = name.removeprefix("model.").rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight))
    file = files.get("lm_head.weight")
    if model.lm_head is None and file is not None:
        head = read_weight(file, "lm_head.weight", model.head.shape, dtype, device)
        if not torch.equal(head, model.head):
            raise UserError(f"{file}: lm_head.weight is not the embedding, yet config.json says "
                            "tie_word_embeddings; set it to false to use this head")


def read_weight(file: Path, name: str, shape, dtype, device) -> torch.Tensor:
    """A copy of one stored tensor. The file is opened for each anew: what is mapped counts as this
    process's memory until it is closed, which would double the peak."""
    with safe_open(file, framework="pt") as shard:
        stored = shard.get_tensor(name)
        if stored.shape != shape or not stored.is_floating_point():
            raise UserError(f"{file}: {name} is {list(stored.shape)} of {stored.dtype}, not "
                            f"{list(shape)} of floating-point numbers, as config.json says")
        weight = torch.empty(shape, dtype=dtype, device=device)
        weight.copy_(stored.to(device))  # moved first, because a card rounds faster
    # aminmax hands NaN on, and needs no temporary of the tensor's size.
    if not torch.stack(weight.aminmax()).isfinite().all():
        raise UserError(f"{file}: {name} holds NaN or infinity in {dtype}; the checkpoint is "
                        "damaged, or needs a wider dtype")
    return weight


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    for name in names:
        if name != Path(name).name:  # only a bare name cannot leave the folder
            raise UserError(f"{folder / INDEX} names {name!r}, which does not stand beside it")
    return [folder / name for name in names]


def save_tensors(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    """Write a safetensors file tensor by tensor, all of it or nothing. Not by the package, which
    copies each shard and needs numpy. The format: 8 bytes of header length, a JSON header, the
    tensors' little-endian bytes."""
    # Wide elements first: then each starts at a multiple of its size, as the package wants it.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, t in ordered:
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape),
                        "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, t in ordered:
            t = t.detach().cpu().contiguous()
            file.write(ctypes.string_at(t.data_ptr(), t.nbytes))  # its bytes, without numpy


def read_json(path):
    """The JSON value in a file; UserError says which file is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e!r}); fetch or make it again") from None


@contextlib.contextmanager
def atomic_file(path):
    """A binary file to write to, which gets its name `path` once all of it is on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f".{path.name}.simu-partial")
    try:
        with open(partial_file, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)


def write_text(path, text: str):
    """In UTF-8, all of it or nothing; missing folders are made."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
