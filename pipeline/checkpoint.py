"""A stranger's folder: what a config.json, an index and headers may hold.

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
                   UserError, first_names, load_weights, open_tensors, read_json, shard_files)

HUGE = 1e30  # no constant of a model is larger; float32 must hold it
LARGEST_SIZE = 1 << 24  # far above any model's, and below what overflows or takes minutes before
MOST_LAYERS = 1 << 10  # the weights are found not to fit

# ---------------------------------------------------------------------------------------- config


def read_config(path, **changes) -> Config:
    """Config.from_dir, every value looked at."""
    config = Config.from_dir(path, **changes)
    try:
        check_config(config)
    except UserError as e:
        raise UserError(f"{Path(path) / 'config.json'}: {e}") from None
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
    """Transformer.from_pretrained, index and config looked at first."""
    folder = Path(path)
    with torch.device("meta"):
        model = Transformer(read_config(folder, neurons=neurons))
    check_index(folder)
    load_weights(model, folder, dtype, device)
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
