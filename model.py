"""The transformer SIMU looks into: LLaMA, Mistral, OLMo, OLMo-2 and Qwen2.5 in one class, told
apart by their config alone.

Letters: B batch, T time, L layers, D d_model, H heads, K key/value heads, hd head size, F d_ff,
V vocabulary. A SIMU neuron [D1] is one of the D output channels of a layer's down_proj; a function
put in `model.layers[l].mlp.intervene` sees and may change exactly those channels.

Not here: dropout, sliding windows, quantised weights, sampling, padding masks (training rows are
padded on the right, where causal attention cannot see them).
"""

import contextlib
import ctypes
import json
import math
import os
import re
import reprlib
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

INIT_STD = 0.02  # GPT-2's, which LLaMA's and OLMo's published configs share
OLMO_EPS = 1e-5  # not in OLMo's config.json: its released code and transformers both fix it


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What sets one model_type apart from LLaMA. From `config` on it is for layers that are not
    attention and MLP (pipeline/mixers): there `attend` is whatever links positions, and nobody but
    the layer knows what it is given."""

    name: str  # transformers' class
    plain_norm: bool = False  # LayerNorm without weights, its epsilon fixed, for RMSNorm
    clips: bool = False  # may clamp q, k and v (clip_qkv)
    biases: bool = False  # q, k and v have biases
    norms_qk: bool = False  # RMSNorm of q and of k, over all heads at once
    norms_output: bool = False  # norms what attention and MLP write, not what they read
    window: int | None = None  # its sliding_window where its config.json names none
    also: dict = field(default_factory=dict)  # more keys for its config.json
    config: Callable = lambda content: Config(**config_fields(content))  # of its config.json
    stored: Callable = lambda name: hf_name(name)  # our parameter's name in its checkpoints
    block: Callable = lambda c, layer: Block(c)
    last_norm: Callable = lambda c: make_norm(c)
    place: Callable = lambda c, positions: rope(c, positions)  # what layers are told of positions
    attend: Callable = lambda q, k, v: causal_attention(q, k, v)  # over whole texts
    cache: Callable | None = None  # links what is being said to what was; None: Cache
    prefixes: Callable | None = None  # links ends of prefixes to them; None: simu.Prefixes
    packs: bool = True  # a mask can keep texts apart that stand side by side


ARCHITECTURES = {  # model_type of a config.json -> what is different there
    "llama": Architecture(name="LlamaForCausalLM", also={"attention_bias": False}),
    "mistral": Architecture(name="MistralForCausalLM", window=4096, also={"sliding_window": None}),
    "olmo": Architecture(name="OlmoForCausalLM", plain_norm=True, clips=True,
                         also={"attention_bias": False}),
    "olmo2": Architecture(name="Olmo2ForCausalLM", norms_qk=True, norms_output=True,
                          also={"attention_bias": False}),
    "qwen2": Architecture(name="Qwen2ForCausalLM", biases=True)}


@dataclass(frozen=True)
class Neurons:
    """Where a layer's neurons are: the matrices of its MLP whose row (column) k is neuron k's."""

    size: str  # the field of Config that counts them
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


NEURONS = {"output": Neurons("hidden_size", rows=("down_proj",)),
           "inner": Neurons("intermediate_size", rows=("gate_proj", "up_proj"),
                            columns=("down_proj",))}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a model. Names are those of HF's config.json, but for norm_eps (rms_norm_eps).
    UserError if the fields contradict each other or ask for what is not computed here."""

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
    neurons: str = "output"  # which of the MLP's are SIMU's; no config.json says it

    def __post_init__(self):
        check_sizes(self)
        heads = self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)
        check_values(self)

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model_type]

    @property
    def neuron_count(self) -> int:
        """SIMU's neurons in a layer."""
        return getattr(self, NEURONS[self.neurons].size)

    @classmethod
    def from_dir(cls, path) -> "Config":
        """Read `path`/config.json, as transformers 4 or 5 or OLMo's own code wrote it."""
        file = Path(path) / "config.json"
        if not Path(path).is_dir():
            raise UserError(f"{path} is not a folder; give the folder that holds config.json")
        content = read_json(file)
        kind = str(content.get("model_type")) if isinstance(content, dict) else ""
        try:
            return ARCHITECTURES.get(kind, ARCHITECTURES["llama"]).config(content)
        except UserError as e:
            raise UserError(f"{file}: {e}") from None

    def to_hf(self, dtype: torch.dtype) -> dict:
        """The content of a config.json which transformers 4 and 5 load; dtype of the weights."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        eps = own.pop("norm_eps")
        del own["neurons"]
        if not self.architecture.plain_norm:
            own["rms_norm_eps"] = eps
        if not self.architecture.clips:
            del own["clip_qkv"]
        return own | self.architecture.also | {
            "architectures": [self.architecture.name], "hidden_act": "silu",
            "attention_dropout": 0.0, "torch_dtype": str(dtype).removeprefix("torch.")}


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


def make_norm(c: Config) -> nn.Module:
    return (LayerNorm if c.architecture.plain_norm else RMSNorm)(c.hidden_size, c.norm_eps)


def rope(c: Config, positions):
    """int64 [...] -> cos, sin float32 [..., hd], each frequency standing twice: j, j + hd/2."""
    hd, scaling = c.head_dim, c.rope_scaling
    j = torch.arange(0, hd, 2, dtype=torch.float32, device=positions.device)  # [hd/2]
    inverse = 1.0 / c.rope_theta ** (j / hd)
    if scaling is not None:  # Llama 3.1: what turns seldom in its first context turns slower
        factor, low, high, context = (scaling[k] for k in LLAMA3)
        turns = context * inverse / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inverse = inverse * (keep + (1 - keep) / factor)
    angle = positions[..., None].float() * inverse  # [..., hd/2]
    angle = torch.cat((angle, angle), dim=-1)  # [..., hd]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """RoPE in float32 on x [B, heads, T, hd]: channels j and j + hd/2 turn together (the
    "rotate half" layout of HF checkpoints, not Meta's interleaved one)."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def attention(q, k, v, mask=None):
    """q [B, H, T, hd] on k, v [B, K, S, hd] -> [B, T, H*hd]. `mask` [B, 1, H/K * T or 1, S] is added
    to the scores; without one S is T, and a position sees itself and what is before it."""
    B, H, T, hd = q.shape
    if mask is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != k.shape[1])
    else:  # heads that share keys become rows of queries, so that no key is copied
        q = q.reshape(B, k.shape[1], -1, hd)  # [B, K, H/K * T, hd]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, H, T, hd)
    return y.transpose(1, 2).flatten(2)  # [B, T, H*hd]


def causal_attention(q, k, v):
    """What a layer does unless it is handed something else in place of this."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # its own backward is 3 times slower
        return attention(q.float(), k.float(), v.float()).to(q.dtype)
    return attention(q, k, v)


def attention_of_rows(places, shape, q, k, v, *, attend):
    """Attention where the tokens of B rows stand side by side, q [1, H, N, hd] and k, v
    [1, K, N, hd], token n at place places[n] of shape (B, T) laid out flat -> [1, N, H*hd]"""
    def spread(x):  # [1, heads, N, hd] -> [B, heads, T, hd]
        rows = x.new_zeros(shape[0] * shape[1], *x.shape[1::2]).index_copy(
            0, places, x[0].transpose(0, 1))
        return rows.unflatten(0, shape).transpose(1, 2)

    return attend(*map(spread, (q, k, v))).flatten(0, 1).index_select(0, places)[None]


class Attention(nn.Module):
    """The projections of one layer; `qkv` and `o_proj` stand apart so that callers (the key/value
    cache, SIMU's second stream [D2]) can put their own attention between them."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim, self.clip, biases = c.head_dim, c.clip_qkv, c.architecture.biases
        wide, narrow = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        self.q_proj = nn.Linear(c.hidden_size, wide, bias=biases)
        self.k_proj = nn.Linear(c.hidden_size, narrow, bias=biases)
        self.v_proj = nn.Linear(c.hidden_size, narrow, bias=biases)
        self.o_proj = nn.Linear(wide, c.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if c.architecture.norms_qk:
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
        self.inner = c.neurons == "inner"

    def neurons(self, x):
        """What SIMU's neurons say on x [B, T, D] -> [B, T, D], inner ones [B, T, F]"""
        y = F.silu(self.gate_proj(x)) * self.up_proj(x)  # [B, T, F]
        beta = y if self.inner else self.down_proj(y)
        return beta if self.intervene is None else self.intervene(beta)

    def write(self, beta):
        """What the neurons' activations add to the stream: [..., D]"""
        return self.down_proj(beta) if self.inner else beta

    def forward(self, x):
        return self.write(self.neurons(x))


class Block(nn.Module):
    """One layer. How attention and MLP join the residual stream stands here alone: most models norm
    what the two read, OLMo-2 what they write. SIMU's beta is the MLP's output before any norm."""

    def __init__(self, c: Config):
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
        """Queries, keys and values of the stream x [B, T, D], as Attention.qkv gives them."""
        return self.self_attn.qkv(x if self.norms_output else self.input_layernorm(x), cos, sin)

    def add_attention(self, x, mixed):
        """The stream x [B, T, D] with what attention mixed [B, T, H*hd] -> [B, T, D]"""
        y = self.self_attn.o_proj(mixed)
        return x + (self.post_attention_layernorm(y) if self.norms_output else y)

    def beta(self, x):
        """The MLP's output on the stream x [B, T, D], attention already in it -> [B, T, D]"""
        return self.mlp.neurons(x if self.norms_output else self.post_attention_layernorm(x))

    def add_beta(self, x, beta):
        """The stream that leaves the layer: x with beta, which broadcast -> [..., D]"""
        y = self.mlp.write(beta)
        return x + (self.post_feedforward_layernorm(y) if self.norms_output else y)

    def parts(self, x, cos, sin, attend):
        """The stream that the MLP reads, and beta, which it writes: each [B, T, D]"""
        x = self.add_attention(x, attend(*self.qkv(x, cos, sin)))
        return x, self.beta(x)

    def forward(self, x, cos, sin, attend=causal_attention):
        return self.add_beta(*self.parts(x, cos, sin, attend))


class Transformer(nn.Module):
    """A decoder-only language model. Fresh weights are drawn from torch's global generator, so
    `torch.manual_seed` decides them."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpoint = False  # True: blocks recompute their activations in the backward pass
        # Not nn.Embedding(V, D): its own initialisation, on the meta device, imports torch._dynamo.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        kind = config.architecture
        self.layers = nn.ModuleList(kind.block(config, l) for l in range(config.num_hidden_layers))
        self.norm = kind.last_norm(config)
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

    def rope(self, positions):
        """int64 [...] -> what the layers are told of positions: cos, sin float32 [..., hd]"""
        return self.config.architecture.place(self.config, positions)

    def embed(self, ids):
        """ids [B, T] -> the stream that enters the first layer [B, T, D]"""
        return self.embed_tokens(ids)

    def hidden(self, ids, attend=None, *, rope=None):
        """ids [B, T] -> final normed states [B, T, D], in the weights' dtype. `attend` stands in
        for causal_attention: one function, or a list with one for each layer. `rope`: self.rope of
        the positions where the ids stand, if not from 0 on."""
        x, attend = self.embed(ids), attend or self.config.architecture.attend  # [B, T, D]
        place = rope or self.rope(torch.arange(ids.shape[1], device=ids.device))
        for layer, block in enumerate(self.layers):
            own = attend if callable(attend) else attend[layer]
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, *place, own, use_reentrant=False,
                               preserve_rng_state=False)
            else:
                x = block(x, *place, own)
        return self.norm(x)

    def hidden_at(self, ids, wanted):
        """Final normed states [N, D] where wanted [B, T] is true. No padding is read, nor anything
        else right of a row's last wanted place: what is left of all rows stands in one."""
        read = wanted.int().flip(1).cummax(1).values.flip(1).flatten()  # [B*T]
        places = read.nonzero()[:, 0]
        h = self.hidden_of_rows(ids.flatten()[places], places, ids.shape, places % ids.shape[1])
        return h[wanted.flatten()[places]]

    def hidden_of_rows(self, ids, places, shape, positions, attend=causal_attention):
        """Final normed states [N, D] of the ids [N] of B rows, side by side: id n stands at place
        places[n] of shape (B, T) laid out flat, and at positions[n] of its text. `attend`: the
        attention over the rows as they are laid out."""
        if not self.config.architecture.packs:  # a state runs through each row alone
            rows = ids.new_zeros(shape[0] * shape[1]).index_copy(0, places, ids)
            return self.hidden(rows.view(shape)).flatten(0, 1)[places]
        attend = partial(attention_of_rows, places, shape, attend=attend)
        return self.hidden(ids[None], attend, rope=self.rope(positions))[0]

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
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", *,
                        neurons: str = "output") -> "Transformer":
        """Load a HF folder (config.json and safetensors, whole or sharded; also in the original
        OLMo layout), tensor by tensor into dtype on device. UserError names what is missing,
        unexpected, misshapen or damaged."""
        folder = Path(path)
        with torch.device("meta"):
            model = cls(replace(Config.from_dir(folder), neurons=neurons))
        load_weights(model, folder, dtype, device)
        return model

    def save_pretrained(self, path, *, shard_bytes: int = 5_000_000_000):
        """Write a HF folder: config.json, generation_config.json, safetensors (bf16 stays bf16),
        split above shard_bytes. Each file appears under its name only when whole."""
        save_weights(self, Path(path), shard_bytes)


# --------------------------------------------------------------------------------- loading, saving

INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
HEAD, OLMO_HEAD = "lm_head.weight", "model.transformer.ff_out.weight"  # HF's, original OLMo's
# The original OLMo layout (allenai/OLMo-1B, not -hf) fuses tensors: name -> ours, whose rows follow
# one another in it.
OLMO_TENSORS = {"att_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "attn_out": ("self_attn.o_proj",), "ff_out": ("mlp.down_proj",),
                "ff_proj": ("mlp.up_proj", "mlp.gate_proj")}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # safetensors' names


def load_weights(model, folder: Path, dtype, device):
    """Fill a model on the meta device from a checkpoint."""
    contents = stored_tensors(model, is_original_olmo(read_json(folder / "config.json")))
    files, index = weight_files(folder)
    places = check_headers(model, contents, folder, files, index)
    for file in files:
        load_file(model, file, {n: contents[n] for n in places if places[n] == file}, dtype, device)
    for name in (HEAD, OLMO_HEAD):
        if model.lm_head is None and name in places:
            check_tied(model, name, places[name])


def hf_name(name: str) -> str:
    """Our parameter's name in a HF checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def tensor_shapes(config: Config) -> dict[str, torch.Size]:
    """Name and shape of every tensor that a HF checkpoint of this config holds."""
    with torch.device("meta"):
        return {config.architecture.stored(name): p.shape
                for name, p in Transformer(config).named_parameters()}


def stored_tensors(model, original_olmo: bool) -> dict[str, list[str]]:
    """Tensor of a checkpoint -> our parameters whose rows it holds. A tied head may be stored, and
    is none of our parameters."""
    head = [] if model.lm_head is None else ["lm_head.weight"]
    if not original_olmo:
        stored = model.config.architecture.stored
        return {stored(name): [name] for name, _ in model.named_parameters()} | {HEAD: head}
    blocks = {f"model.transformer.blocks.{i}.{name}.weight": [f"layers.{i}.{p}.weight" for p in own]
              for i in range(len(model.layers)) for name, own in OLMO_TENSORS.items()}
    return {"model.transformer.wte.weight": ["embed_tokens.weight"]} | blocks | {OLMO_HEAD: head}


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


def check_headers(model, contents: dict, folder: Path, files: list[Path],
                  index: dict) -> dict[str, Path]:
    """Tensor name -> its file, once the headers promise exactly what the config asks for."""
    ours = {name: p.shape for name, p in model.named_parameters()}
    stored = {name: parts or ["embed_tokens.weight"] for name, parts in contents.items()}
    want = {name: [sum(ours[p][0] for p in parts), *ours[parts[0]][1:]]
            for name, parts in stored.items()}
    places, faults = {}, {kind: [] for kind in ("missing", "unexpected", "misshapen", "not float")}
    for file in files:
        with open_tensors(file) as shard:
            names = set(shard.keys())
            lost = [n for n, f in index.items() if f == file.name and n not in names]
            if lost:
                raise UserError(f"{file}: the index puts {first_names(lost)} here, but the file "
                                "does not hold it; index and shards are of different models")
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
    found = [f"{kind}: {first_names(names)}" for kind, names in faults.items() if names]
    if found:
        raise UserError(f"{folder}: weights do not fit config.json; {'; '.join(found)}; "
                        "take both from the same model")
    return places


def first_names(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def load_file(model, file: Path, contents: dict[str, list[str]], dtype, device):
    """Put the tensors of one file into the model's parameters. It is opened for each anew: what is
    mapped counts as this process's memory until it is closed, which would double the peak."""
    for name, parts in contents.items():
        with open_tensors(file) as shard:
            sizes = [model.get_parameter(part).shape[0] for part in parts]
            mapped = shard.get_tensor(name)  # its memory is the file
            for part, source in zip(parts, mapped.split(sizes) if parts else ()):
                # A copy even where dtype and device agree: the file may change or go away.
                tensor = torch.empty(source.shape, dtype=dtype, device=device)
                tensor.copy_(source)
                low, high = tensor.aminmax()  # NaN passes; no temporary of the tensor's size
                if not (low.isfinite() and high.isfinite()):
                    raise UserError(f"{file}: {name} holds NaN or infinity in {dtype}; "
                                    "the checkpoint is damaged, or needs a wider dtype")
                module, _, leaf = part.rpartition(".")
                setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
            mapped = source = None  # or the mapping would outlive the file's closing


def check_tied(model, name: str, file: Path):
    """UserError unless the head stored beside a tied embedding is the embedding."""
    weight = model.embed_tokens.weight
    with open_tensors(file) as shard:
        if not torch.equal(shard.get_tensor(name).to(weight), weight):
            raise UserError(f"{file}: {name} is not the embedding, yet config.json says "
                            "tie_word_embeddings (or weight_tying); set it to false to use this "
                            "head")


def save_weights(model, folder: Path, shard_bytes: int):
    """What Transformer.save_pretrained writes; an older save in other shards is removed."""
    c = model.config
    tensors = {c.architecture.stored(name): p.detach() for name, p in model.named_parameters()}
    if {n: t.shape for n, t in tensors.items()} != tensor_shapes(c):
        raise ValueError("parameters differ from the config's: undo replaced modules first")
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


# ---------------------------------------------------------------------------------------- decoding

PROMPTS_AT_ONCE = 16  # prompts read in one pass: less padding, smaller activations
ALIKE = 16  # ids that prompts begin with, from which on they are read once
LOGITS = 1 << 25  # logits held at once: 128 MiB of float32
FIRST_DRAFT, LONGEST_DRAFT = 4, 32  # tokens read ahead, once a guess was right and at most


def generate(model, prompts, *, max_new_tokens=None, eos_id, max_total_tokens=None, drafts=None,
             batch_tokens=16384, progress=None) -> list[list[int]]:
    """Greedy continuations [D16] of `prompts` (lists of ids), in their order: new ids, without eos.
    A row ends at eos_id (None: never), after max_new_tokens, at max_total_tokens with its prompt,
    or at the model's context. A batch holds at most batch_tokens cached positions; `progress`
    names a tqdm bar. `drafts` holds for each prompt the ids it may say, or none: several tokens are
    then checked in one pass, and a wrong draft costs time but changes no token. In float32 a row's
    tokens do not depend on its company or draft; in bfloat16 rounding may decide a near tie.
    UserError for a prompt that is empty, too long or not in vocabulary."""
    limits = [new_tokens(model.config, i, prompt, max_new_tokens, max_total_tokens, batch_tokens)
              for i, prompt in enumerate(prompts)]
    drafts = [None] * len(prompts) if drafts is None else drafts
    if len(drafts) != len(prompts):
        raise UserError(f"{len(prompts)} prompts and {len(drafts)} drafts; each prompt takes one, "
                        "which may be empty")
    rows = [Row(prompt, limit, [i for i in draft or [] if 0 <= i < model.config.vocab_size])
            for prompt, limit, draft in zip(prompts, limits, drafts)]
    with tqdm(total=len(rows), desc=progress, unit="row", disable=progress is None) as bar:
        bar.update(limits.count(0))
        for together, group in row_groups([len(p) for p in prompts], limits, batch_tokens):
            decode(model, [rows[i] for i in group], together, eos_id, bar)
    return [row.ids[row.begin + len(prompt):] for row, prompt in zip(rows, prompts)]


class Row:
    """A text being decoded. `ids` holds prompt and draft, then from `begin` on the prompt again and
    what was said. The text is followed in its draft, or, where it leaves that, from the place where
    its last two ids last stood side by side: what comes there is the guess at what it says next."""

    def __init__(self, prompt: list[int], limit: int, draft: list[int]):
        before = prompt + draft if draft else []
        self.ids, self.begin = before + prompt, len(before)
        self.end = len(self.ids) + limit
        self.after = {pair_key(*pair): at for at, pair in enumerate(zip(self.ids, self.ids[1:]), 2)}
        self.at = len(prompt)  # where the guess stands
        self.ahead = 0  # guessed ids to read in the next pass

    def to_read(self) -> list[int]:
        """Ids of the next pass: the last one, which no pass has read yet, and those guessed."""
        if not self.ahead:
            return self.ids[-1:]
        wanted = min(self.ahead, self.end - len(self.ids) - 1)
        guess = self.ids[self.at:self.at + wanted]
        while len(guess) < wanted:  # a loop goes on as it began
            guess = (guess + guess)[:wanted]
        return self.ids[-1:] + guess

    def add(self, chosen: list[int], eos_id) -> bool:
        """Take the model's own choice after each id that was read, up to the first that was not
        guessed: what was read after it is not this text. False: the row has ended."""
        ids = self.ids
        for token in chosen:
            if token == eos_id:
                return False
            guessed = self.at < len(ids) and ids[self.at] == token
            key = pair_key(ids[-1], token)
            self.at = self.at + 1 if guessed else self.after.get(key, len(ids) + 1)
            ids.append(token)
            self.after[key] = len(ids)
            if not guessed:
                break
        # After a wrong guess nothing is read ahead until one comes true that was not read.
        self.ahead = min(LONGEST_DRAFT, max(FIRST_DRAFT, 2 * self.ahead)) if guessed else 0
        return len(ids) < self.end


def pair_key(first: int, second: int) -> int:
    """One number for two ids: many tuples would keep Python's garbage collector busy."""
    return first << 32 | second


class Cache:
    """Keys and values of at most B rows: in column p those of a row's p-th token, RoPE in them.
    Columns past a row's end may hold what a wrong guess or another row left; no query sees them,
    and later tokens overwrite them."""

    at_once = 1 + LONGEST_DRAFT  # tokens of a row in one pass

    def __init__(self, c: Config, B: int, columns: int, like):
        shape = (B, 2 * c.num_key_value_heads, columns, c.head_dim)  # keys, then values
        # Zeroed: a masked key weighs 0, but 0 times an uninitialised NaN would be NaN.
        self.whole = [like.new_zeros(shape) for _ in range(c.num_hidden_layers)]
        self.kv = [x[:0] for x in self.whole]  # of the rows that passes read
        self.end = 0  # columns in use
        self.steps = [partial(self.step, layer) for layer in range(c.num_hidden_layers)]
        self.column = torch.arange(columns, device=like.device)
        self.head = columns * torch.arange(shape[1], device=like.device)[:, None]
        self.line = columns * shape[1] * torch.arange(B, device=like.device)  # a row's first
        self.sharing = c.num_attention_heads // c.num_key_value_heads  # H/K

    def open(self, n: int):
        """From here to `close` the cache is that of n new rows, which then follow the others."""
        self.before, self.begun = (len(self.kv[0]), self.end), n
        self.kv = [x[self.before[0]:self.before[0] + n] for x in self.whole]

    def close(self):
        count, end = self.before
        self.kv = [x[:count + self.begun] for x in self.whole]
        self.end = max(self.end, end)

    def prompts(self, rows: slice, lengths: list[int]):
        """What stands in for attention in each layer while the prompts of some rows are read."""
        return [partial(self.prefill, rows, layer) for layer in range(len(self.kv))]

    def prefill(self, rows: slice, layer: int, q, k, v):
        """Causal attention over the prompts of some rows, whose keys and values are kept."""
        self.end = max(self.end, k.shape[2])
        self.kv[layer][rows, :, :k.shape[2]] = torch.cat((k, v), dim=1)
        return causal_attention(q, k, v)

    def place(self, begin: list[int], counts: list[int]):
        """Say that the next pass reads counts[b] tokens of row b, which stand from begin[b] on.
        Returns their positions, int64 [N]; `step` takes the N tokens as they are, unpadded."""
        B, N = len(self.kv[0]), sum(counts)
        first, n = torch.tensor([begin, counts]).to(self.column.device)
        self.end = max(map(sum, zip(begin, counts)))
        if N == B:
            self.rows, row, position = (), slice(B), first
        else:
            row = self.column.new_tensor(range(B)).repeat_interleave(n, output_size=N)
            slot = self.column.new_tensor(range(N)) - (n.cumsum(0) - n)[row]
            position = first[row] + slot
            self.pad(counts, n, row, slot, position)
        if len(self.rows) < B:
            self.mask = self.hide(first[:, None])
        self.lines = (self.head + self.line[row] + position).flatten()  # [2K * N]
        return position

    def pad(self, counts: list[int], n, row, slot, position):
        """Lay out the tokens of the M rows that read several, padded to the longest of them: the
        others would wait. Where most rows read several all are, for the keys of a few are copied."""
        several = n > 1
        if 2 * sum(count > 1 for count in counts) > len(counts):
            several = torch.ones_like(several)
        self.rows = several.nonzero()[:, 0]
        self.first = n.cumsum(0) - n  # [B], where in N a row's first token is
        self.token = several[row].nonzero()[:, 0]  # those of the M rows, and their places there
        self.home = (several.cumsum(0) - 1)[row[self.token]], slot[self.token]
        # [M, width], the last column that a slot may see; one without token sees column 0
        last = n.new_zeros(len(self.rows), max(counts))
        last[self.home] = position[self.token]
        self.masks = self.hide(last.repeat(1, self.sharing))  # as `attention` has its rows

    def hide(self, last):
        """What hides the columns past last [rows, width]: [rows, 1, width, end]"""
        unseen = self.column[:self.end] > last[..., None]
        return self.kv[0].new_zeros(unseen.shape).masked_fill_(unseen, -math.inf)[:, None]

    def step(self, layer: int, q, k, v):
        """Attention of the placed tokens, q [1, H, N, hd] and k, v [1, K, N, hd], on all that each
        may see -> [1, N, H*hd]"""
        kv = self.kv[layer]
        kv.view(-1, kv.shape[-1]).index_copy_(0, self.lines, torch.cat((k, v), dim=1).flatten(0, 2))
        seen, M = kv[:, :, :self.end], len(self.rows)
        if M == 0:  # N is B
            return attention(q.transpose(0, 2), *seen.chunk(2, dim=1), self.mask).transpose(0, 1)
        q = q[0].transpose(0, 1)  # [N, H, hd]
        mixed = q.new_empty(len(q), q[0].numel())  # [N, H*hd]
        if M < len(kv):
            alone = q[self.first][:, :, None]  # [B, H, 1, hd]
            mixed[self.first] = attention(alone, *seen.chunk(2, dim=1), self.mask)[:, 0]
            seen = seen[self.rows]
        padded = q.new_zeros(M, self.masks.shape[2] // self.sharing, *q.shape[1:])
        padded[self.home] = q[self.token]  # [M, width, H, hd]
        read = attention(padded.transpose(1, 2), *seen.chunk(2, dim=1), self.masks)
        mixed[self.token] = read[self.home]
        return mixed[None]

    def keep(self, rows):
        """Drop all rows but these (distinct int64 indices), which take this order. Those among
        the first len(rows) should stand at their own place: they are not copied."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for layer, x in enumerate(self.kv):
            x[moved, :, :self.end] = x[rows[moved], :, :self.end]
            self.kv[layer] = x[:len(rows)]


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
    longest = context if max_total is None else min(context, max_total)
    room = max(0, longest - len(prompt))
    room = room if max_new is None else min(room, max_new)
    if len(prompt) + room > batch_tokens:
        raise UserError(f"prompt {i} with its new tokens takes {len(prompt) + room} positions; a "
                        f"batch of {batch_tokens} tokens cannot hold it: raise the batch's tokens "
                        "or lower the number of new tokens")
    return room


def row_groups(lengths: list[int], limits: list[int], budget: int):
    """(how many rows fit at once, row numbers) of each group that shares a cache, the longest rows
    first: what does not fit in memory fails at once. None of a group is half as long as another,
    or the cache would stand half empty. Rows with no room are left out."""
    size = [a + b for a, b in zip(lengths, limits)]
    order = sorted((i for i, limit in enumerate(limits) if limit > 0),
                   key=lambda i: (-size[i], -lengths[i]))
    while order:
        longest = size[order[0]]
        group = [i for i in order if 2 * size[i] > longest]
        yield min(len(group), budget // longest), group
        order = order[len(group):]


@torch.inference_mode()
def decode(model, waiting: list[Row], together: int, eos_id, bar):
    """Let rows say all they will, so many together: once a quarter of them have ended, others take
    their places, or the last few would read all weights for a token each."""
    like, columns = model.embed_tokens.weight, max(row.end - row.begin for row in waiting)
    rope = model.rope(torch.arange(columns, device=like.device))  # [columns, hd]
    cache = (model.config.architecture.cache or Cache)(model.config, together, columns, like)
    rows, alike = [], 0
    if model.config.architecture.packs:
        alike = read_beginning(model, cache, [row.ids[row.begin:] for row in waiting])
    while rows or waiting:
        free = together - len(rows)
        if waiting and 4 * free >= together:
            new, waiting = waiting[:free], waiting[free:]
            cache.open(len(new))
            chosen = read_prompts(model, cache, new, alike, rope)
            cache.close()
            alive = [True] * len(rows) + [row.add(ids, eos_id) for row, ids in zip(new, chosen)]
            rows = rows + new
        else:
            chosen = read_on(model, cache, rows, rope)
            alive = [row.add(ids, eos_id) for row, ids in zip(rows, chosen)]
        if not all(alive):
            order = fill_gaps(alive)
            cache.keep(torch.tensor(order, dtype=torch.int64, device=like.device))
            rows = [rows[i] for i in order]
            bar.update(alive.count(False))


def fill_gaps(alive: list[bool]) -> list[int]:
    """An order of the rows that go on, in which those at the end fill the places of the finished:
    few rows move."""
    count = sum(alive)
    last = [i for i in range(count, len(alive)) if alive[i]]
    return [i if alive[i] else last.pop() for i in range(count)]


def read_beginning(model, cache: Cache, texts: list[list[int]]) -> int:
    """How many ids all prompts begin with (shots, a system turn). If they are many they are read
    here, once, into the place of the first row; else 0."""
    most = min(map(len, texts)) - 1  # each has a last id to choose after
    alike = next((n for n, ids in enumerate(zip(*texts)) if n == most or len(set(ids)) > 1), 0)
    if len(texts) == 1 or alike < ALIKE:
        return 0
    cache.open(1)
    ids = torch.tensor([texts[0][:alike]], device=model.embed_tokens.weight.device)
    model.hidden(ids, cache.prompts(slice(1), [alike]))
    cache.keep(ids.new_zeros(0))
    return alike


def read_prompts(model, cache: Cache, rows: list[Row], alike: int, rope) -> list[list[int]]:
    """Fill the cache of new rows. Returns the model's choice after each prompt, in a list of one.
    The `alike` ids that all begin with stand in the first row's place, whichever row has it now."""
    device, chosen = model.embed_tokens.weight.device, []
    texts = [row.ids[row.begin + alike:] for row in rows]
    if alike:
        for kv, whole in zip(cache.kv, cache.whole):
            kv[:, :, :alike] = whole[:1, :, :alike].clone()
        h = read_placed(model, cache, [alike] * len(rows), texts, rope)
        ends = torch.tensor(list(map(len, texts)), device=device).cumsum(0) - 1
        return [[token] for token in best_ids(model, h[ends])]
    for i in range(0, len(rows), PROMPTS_AT_ONCE):
        part = slice(i, i + PROMPTS_AT_ONCE)
        lengths = [len(text) for text in texts[part]]
        padded = [text + [0] * (max(lengths) - len(text)) for text in texts[part]]
        h = model.hidden(torch.tensor(padded, device=device), cache.prompts(part, lengths))
        last = torch.tensor(lengths, device=device) - 1
        chosen += best_ids(model, h[torch.arange(len(h), device=device), last])
    return [[token] for token in chosen]


def read_placed(model, cache: Cache, begin: list[int], read: list[list[int]], rope):
    """Final states [N, D] of the ids that each row reads next, which stand from begin on."""
    position = cache.place(begin, list(map(len, read)))
    ids = torch.tensor([[token for ids in read for token in ids]], device=position.device)
    return model.hidden(ids, cache.steps, rope=[x[position] for x in rope])[0]


def read_on(model, cache: Cache, rows: list[Row], rope) -> list[list[int]]:
    """One pass over each row's last id and what it may say next. Returns, for each row, the
    model's choice after each id that was read."""
    read = [row.to_read()[:cache.at_once] for row in rows]
    h = read_placed(model, cache, [len(row.ids) - row.begin - 1 for row in rows], read, rope)
    chosen = iter(best_ids(model, h))
    return [list(islice(chosen, len(ids))) for ids in read]


def best_ids(model, h) -> list[int]:
    """The likeliest next id after each of the states h [N, D]."""
    chunk = max(1, LOGITS // model.config.vocab_size)
    return [i for x in h.split(chunk) for i in model.logits(x).argmax(-1).tolist()]


# ------------------------------------------------------------------------------ checks of a config

HUGE = 1e30  # no constant of a model is larger; float32 must hold it
LARGEST_SIZE = 1 << 24  # far above any model's, and below what overflows or takes minutes before
MOST_LAYERS = 1 << 10  # the weights are found not to fit
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Keys that would change the numbers, and the one value of each that this code computes.
SUPPORTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
             "attention_dropout": 0, "partial_rotary_factor": 1, "quantization_config": None,
             "use_sliding_window": False}
# The original OLMo layout: its config's names for ours, and what its config must say.
OLMO_NAMES = {"d_model": "hidden_size", "n_layers": "num_hidden_layers",
              "n_heads": "num_attention_heads", "max_sequence_length": "max_position_embeddings"}
OLMO_SUPPORTED = {"activation_type": "swiglu", "block_type": "sequential", "rope": True,
                  "layer_norm_type": "default", "layer_norm_with_affine": False, "alibi": False,
                  "layer_norm_eps": OLMO_EPS, "attention_layer_norm": False, "include_bias": False,
                  "scale_logits": False, "norm_after": False}


def need(good: bool, config: Config, name: str, must: str):
    if not good:
        key = "rms_norm_eps" if name == "norm_eps" else name
        raise UserError(f"{key} = {reprlib.repr(getattr(config, name))}: must be {must}")


def is_int(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def is_positive(x) -> bool:
    number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return number and 0 < x < HUGE


def check_sizes(c: Config):
    need(c.model_type in list(ARCHITECTURES), c, "model_type",
         f"{' or '.join(ARCHITECTURES)}; no other architecture is supported")
    for name in SIZES:
        value = getattr(c, name)
        optional = value is None and name in ("num_key_value_heads", "head_dim")
        largest = MOST_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE
        need(optional or is_int(value) and 0 < value <= largest, c, name,
             f"a whole number above 0, at most {largest}")
    need(c.hidden_size % c.num_attention_heads == 0, c, "hidden_size",
         f"a multiple of num_attention_heads = {c.num_attention_heads}")


def check_values(c: Config):
    need(c.num_attention_heads * c.head_dim <= LARGEST_SIZE, c, "head_dim",
         f"at most {LARGEST_SIZE} over all heads")
    need(c.num_attention_heads % c.num_key_value_heads == 0, c, "num_key_value_heads",
         f"a divisor of num_attention_heads = {c.num_attention_heads}")
    need(c.head_dim % 2 == 0, c, "head_dim", "even, for RoPE turns pairs of channels")
    need(is_positive(c.norm_eps), c, "norm_eps", "a number above 0")
    need(is_positive(c.rope_theta), c, "rope_theta", "a number above 0")
    need(isinstance(c.tie_word_embeddings, bool), c, "tie_word_embeddings", "true or false")
    need(c.norm_eps == OLMO_EPS or not c.architecture.plain_norm, c, "norm_eps",
         f"{OLMO_EPS} for {c.model_type}, which fixes it")
    need(c.clip_qkv is None or c.architecture.clips, c, "clip_qkv",
         f"null for {c.model_type}, which does not clip")
    need(c.clip_qkv is None or is_positive(c.clip_qkv), c, "clip_qkv", "null or a number above 0")
    scaling = c.rope_scaling
    if scaling is not None:
        good = isinstance(scaling, dict) and all(is_positive(scaling.get(k)) for k in LLAMA3)
        need(good and scaling["low_freq_factor"] < scaling["high_freq_factor"], c, "rope_scaling",
             f"null, or llama3's with {', '.join(LLAMA3)} above 0, the low below the high one")
    check_token_ids(c)


def check_token_ids(c):
    for name in TOKEN_IDS:
        value = getattr(c, name)
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        good = all(i is None or is_int(i) and 0 <= i < c.vocab_size for i in ids)
        need(good, c, name, f"null or a token id below vocab_size = {c.vocab_size}")


def config_fields(content) -> dict:
    """The fields of Config in the content of a config.json."""
    if not isinstance(content, dict):
        raise UserError("must hold a JSON object; fetch it again")
    present = {key: value for key, value in content.items() if value is not None}
    if is_original_olmo(present):
        present = from_original_olmo(present)
    check_supported(present, SUPPORTED)
    kinds = present.get("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"layer_types = {reprlib.repr(kinds)} is not supported; only "
                        '"full_attention" is')
    own = {f.name: present[f.name] for f in fields(Config) if f.name in present}
    own.pop("norm_eps", None)
    own.pop("rope_scaling", None)
    own |= rope_fields(present)
    row = ARCHITECTURES.get(str(own.get("model_type")), Architecture(name=""))
    if not row.plain_norm:
        own["norm_eps"] = present.get("rms_norm_eps")
    if not row.clips:
        own.pop("clip_qkv", None)  # transformers' others know no such key either
    if row.window is not None:
        check_window(content.get("sliding_window", row.window), own.get("max_position_embeddings"))
    if own.get("pad_token_id") == -1:  # how old LLaMA exports say "none"
        del own["pad_token_id"]
    for f in fields(Config):
        if own.get(f.name, f.default) is MISSING or own.get(f.name, 0) is None:
            raise missing_key("rms_norm_eps" if f.name == "norm_eps" else f.name)
    return own


def need_keys(content: dict, keys):
    for key in keys:
        if key not in content:
            raise missing_key(key)


def missing_key(key: str) -> Exception:
    return UserError(f"{key} is missing; take the config.json the weights came with")


def check_supported(content: dict, supported: dict):
    for key, only in supported.items():
        if content.get(key, only) != only:
            raise UserError(f"{key} = {reprlib.repr(content[key])} is not supported; only "
                            f"{json.dumps(only)} is")


def check_window(window, context):
    """A window as wide as the context hides nothing; a narrower one is not computed here."""
    if window is None or is_int(context) and is_int(window) and window >= context:
        return
    raise UserError(f"sliding_window = {reprlib.repr(window)} is below max_position_embeddings = "
                    f"{reprlib.repr(context)} and not computed here; lower the latter to it in "
                    "config.json, if texts are that short")


def is_original_olmo(content) -> bool:
    """Is this the config.json of a checkpoint in the original OLMo layout?"""
    return isinstance(content, dict) and "d_model" in content


def from_original_olmo(content: dict) -> dict:
    """OLMo's own config in HF's names."""
    check_supported(content, OLMO_SUPPORTED)
    need_keys(content, (*OLMO_NAMES, "vocab_size"))
    up_and_gate = content.get("mlp_hidden_size")  # both halves of ff_proj
    if not up_and_gate:
        ratio, width = content.get("mlp_ratio", 4), content["d_model"]
        up_and_gate = ratio * width if is_int(ratio) and is_int(width) else None
    if not is_int(up_and_gate) or up_and_gate % 2:
        raise UserError("mlp_hidden_size, or mlp_ratio * d_model, must be an even whole number")
    heads = 1 if content.get("multi_query_attention") is True else content["n_heads"]
    same = ("clip_qkv", "rope_theta", *TOKEN_IDS)
    return {ours: content[key] for key, ours in OLMO_NAMES.items()} | {
        key: content[key] for key in same if key in content} | dict(
        model_type="olmo", intermediate_size=up_and_gate // 2,
        vocab_size=content.get("embedding_size") or content["vocab_size"],  # with rows that pad
        num_key_value_heads=content.get("n_kv_heads", heads),
        tie_word_embeddings=content.get("weight_tying", True))


def rope_fields(content: dict) -> dict:
    """RoPE's base (absent: 10000) and scaling, from their old place or from transformers 5's
    rope_parameters."""
    own = {"rope_theta": content.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):
        rope = content.get(key, {})
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


# ------------------------------------------------------------------------------------------- files

NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what no file name or UTF-8 file can hold


class UserError(Exception):
    """Something the person at the keyboard can put right: what is wrong, where, what to do."""


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


def has_types(value, types: dict[str, type]) -> bool:
    """Is a JSON value an object with fields of these types?"""
    return isinstance(value, dict) and all(type(value.get(k)) is t for k, t in types.items())


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, which gets its name `path` once all of it is on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.simu-partial")
    if beside.is_file() and not beside.is_symlink():
        beside.unlink()  # a killed process left it
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # never through a link that someone put there
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # not on every system
    try:
        file = open(os.open(beside, flags, 0o666), "wb")
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
    """Whole or not at all, in UTF-8; folders on the way are made."""
    with whole_file(path) as file:
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


def read_tensors(path, names) -> list[torch.Tensor]:
    """The named tensors of a safetensors file of our own; UserError if it lacks one."""
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError):
        raise UserError(f"{path} is missing or damaged; delete {Path(path).parent} and make it "
                        "again") from None


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
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, t in ordered:
            t = t.detach().to("cpu").contiguous()
            file.write(raw(t))
