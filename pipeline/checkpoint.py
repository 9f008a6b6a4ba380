"""A stranger's folder: what a config.json, an index and headers may hold, and OLMo's own layout.

The core (Transformer.from_pretrained) refuses what would compute other numbers. Here every value is
looked at first, so that a damaged or hostile file ends in one line that names it.
"""

import re
import reprlib
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

from model import (INDEX, LLAMA3, NO_TEXT, OLMO_EPS, SIZES, TOKEN_IDS, Config, Transformer,
                   UserError, check_supported, load_weights, need_keys, open_tensors, read_json,
                   first_names, shard_files)

HUGE = 1e30  # no constant of a model is larger; float32 must hold it
LARGEST_SIZE = 1 << 24  # far above any model's, and below what overflows or takes minutes before
MOST_LAYERS = 1 << 10  # the weights are found not to fit

# The original OLMo layout (allenai/OLMo-1B, not -hf): its config's names for ours, what its config
# must say, and its fused tensors: name -> ours, whose rows follow one another in it.
OLMO_NAMES = {"d_model": "hidden_size", "n_layers": "num_hidden_layers",
              "n_heads": "num_attention_heads", "max_sequence_length": "max_position_embeddings"}
OLMO_SUPPORTED = {"activation_type": "swiglu", "block_type": "sequential", "rope": True,
                  "layer_norm_type": "default", "layer_norm_with_affine": False, "alibi": False,
                  "layer_norm_eps": OLMO_EPS, "attention_layer_norm": False, "include_bias": False,
                  "scale_logits": False, "norm_after": False}
OLMO_TENSORS = {"att_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "attn_out": ("self_attn.o_proj",), "ff_out": ("mlp.down_proj",),
                "ff_proj": ("mlp.up_proj", "mlp.gate_proj")}
OLMO_HEAD = "model.transformer.ff_out.weight"


# ---------------------------------------------------------------------------------------- config


def read_config(path, **changes) -> Config:
    """Config.from_dir, every value looked at; also of the original OLMo layout."""
    file = Path(path) / "config.json"
    content = read_json(file) if file.is_file() else None
    if is_original_olmo(content):
        try:
            config = Config.from_hf(from_original_olmo(content), **changes)
        except UserError as e:
            raise UserError(f"{file}: {e}") from None
    else:
        config = Config.from_dir(path, **changes)
    try:
        if isinstance(config, Config):  # those of mixers check themselves
            check_config(config)
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
    return config


def check_config(c: Config):
    """UserError unless all values are of their type, within bounds, and what is computed here."""
    for name in SIZES:
        largest = MOST_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE
        need(getattr(c, name) <= largest, c, name, f"a whole number above 0, at most {largest}")
    need(c.num_attention_heads * c.head_dim <= LARGEST_SIZE, c, "head_dim",
         f"at most {LARGEST_SIZE} over all heads")
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


def need(good: bool, config, name: str, must: str):
    if not good:
        key = "rms_norm_eps" if name == "norm_eps" else name
        raise UserError(f"{key} = {reprlib.repr(getattr(config, name))}: must be {must}")


def is_int(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def is_positive(x) -> bool:
    number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return number and 0 < x < HUGE


def is_original_olmo(content) -> bool:
    """Is this the config.json of a checkpoint in the original OLMo layout?"""
    return isinstance(content, dict) and "d_model" in content


def from_original_olmo(content: dict) -> dict:
    """OLMo's own config in HF's names."""
    content = {key: value for key, value in content.items() if value is not None}
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


# --------------------------------------------------------------------------------------- weights

SECONDS = Counter()  # "loading" and "saving" models since a stage began (stage.py)


@contextmanager
def clocked(kind: str):
    """Adds to SECONDS how long a block, or a function that this decorates, takes."""
    start = time.monotonic()
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        SECONDS[kind] += time.monotonic() - start


@clocked("saving")
def save_model(model: Transformer, folder: Path):
    model.save_pretrained(folder)


@clocked("loading")
def load_model(path, dtype=torch.float32, device="cpu", *, neurons="output") -> Transformer:
    """Transformer.from_pretrained, index and config looked at first; also of OLMo's own layout."""
    folder = Path(path)
    with torch.device("meta"):
        model = Transformer(read_config(folder, neurons=neurons))
    check_index(folder)
    contents = None
    if is_original_olmo(read_json(folder / "config.json")):
        contents = {"model.transformer.wte.weight": ["embed_tokens.weight"]}
        for i in range(len(model.layers)):
            contents |= {f"model.transformer.blocks.{i}.{name}.weight": [
                f"layers.{i}.{p}.weight" for p in parts] for name, parts in OLMO_TENSORS.items()}
        if model.lm_head is not None:
            contents[OLMO_HEAD] = ["lm_head.weight"]
    load_weights(model, folder, dtype, device, contents)
    return model


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a checkpoint, all of them there, and its index: tensor name -> file
    name."""
    index = folder / INDEX
    if (folder / "model.safetensors").is_file():
        return shard_files(folder), {}
    if not index.is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise UserError(f"{folder} has only pickled weights (.bin, .pt), which can run code "
                            "and are never read; convert them (transformers: save_pretrained)")
        return shard_files(folder), {}  # tells what is missing
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
    return shard_files(folder), where


def check_index(folder: Path):
    """UserError if a shard lacks what the index puts there."""
    files, index = weight_files(folder)
    for file in files if index else ():
        with open_tensors(file) as shard:
            held = set(shard.keys())
        if lost := [n for n, f in index.items() if f == file.name and n not in held]:
            raise UserError(f"{file}: the index puts {first_names(lost)} here, but the file "
                            "does not hold it; index and shards are of different models")
