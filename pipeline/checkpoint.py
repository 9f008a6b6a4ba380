"""A stranger's folder, and models too large for one file.

The core (Transformer.from_pretrained) refuses what would compute other numbers. Here every value of
config.json is looked at first, so that a damaged file ends in one line that names it.
"""

from dataclasses import MISSING, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import (ARCHITECTURES, INDEX, LLAMA3, Config, Transformer, UserError, read_json,
                   save_tensors, shard_files, stored_parameters, write_json)

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
LARGEST_SIZE = 1 << 24  # far above any model's, and below what overflows
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARD_BYTES = 5_000_000_000  # as transformers cuts its own

def read_config(path) -> Config:
    """Config.from_dir, every value looked at."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        raise UserError(f"{path} is not a folder; give the folder that holds config.json")
    content = read_json(file)
    try:
        check_values(content)
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
    config = Config.from_dir(path)
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % shared or config.head_dim % 2:
        raise UserError(f"{file}: num_key_value_heads = {shared} must divide num_attention_heads = "
                        f"{heads}, and head_dim = {config.head_dim} must be even")
    return config


def check_values(content):
    """UserError unless the values of a config.json are present and of their types."""
    need({"config.json": content}, ["config.json"], [dict], "a JSON object")
    need(content, ["model_type"], [str], "a text")
    required = [f.name for f in fields(Config) if f.default is MISSING]
    architecture = ARCHITECTURES.get(content.get("model_type"))
    if architecture and not architecture.plain_norm:
        required.append("rms_norm_eps")
    for key in required:
        if content.get(key) is None:
            raise UserError(f"{key} is missing; take the config.json the weights came with")
    need(content, SIZES, [int], f"a whole number from 1 to {LARGEST_SIZE}", LARGEST_SIZE)
    need(content, ["rms_norm_eps", "rope_theta", "clip_qkv", "sliding_window"], [int, float],
         "a number above 0")
    need(content, ["tie_word_embeddings"], [bool], "true or false")
    need(content, ["layer_types"], [list], "a list")
    need(content, ["rope_scaling", "rope_parameters"], [dict], "an object")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = content.get(key) or {}
        need(scaling, ["rope_theta", *LLAMA3], [int, float], "a number above 0")
        if "llama3" in (scaling.get("rope_type"), scaling.get("type")) and not all(
                map(scaling.get, LLAMA3)):
            raise UserError(f"{key} = {scaling}: must hold {', '.join(LLAMA3)}")
    for key in TOKEN_IDS:
        value = content.get(key)
        for i in value if isinstance(value, list) else [value]:
            # -1 is how old LLaMA exports say "none".
            if i is not None and not (type(i) is int and -1 <= i < content["vocab_size"]):
                raise UserError(f"{key} = {value!r}: must be null or a token id below vocab_size = "
                                f"{content['vocab_size']}")


def need(content: dict, keys, types: list, must: str, most: float = 1e18):
    """UserError unless the values of these keys, where not null, are of one of the types, and
    numbers above 0 and at most `most`."""
    for key in keys:
        value = content.get(key)
        in_range = type(value) not in (int, float) or 0 < value <= most
        if value is not None and not (type(value) in types and in_range):
            raise UserError(f"{key} = {value!r}: must be {must}")


def load_model(path, dtype=torch.float32, device="cpu", *, neurons="output") -> Transformer:
    """Transformer.from_pretrained of a folder whose config and index are looked at first."""
    # cuDNN's attention makes a plan, up to 40 ms, for every shape; ours hardly ever repeat.
    torch.backends.cuda.enable_cudnn_sdp(False)
    read_config(path)
    weight_files(Path(path))
    return Transformer.from_pretrained(path, dtype, device, neurons=neurons)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. UserError if one is missing or cut."""
    index, adapter = folder / INDEX, folder / "adapter_config.json"
    if adapter.is_file():
        raise UserError(f"{adapter}: an adapter beside the weights is not read, and transformers "
                        "would use it; merge it into them, or move that file elsewhere")
    if not (folder / "model.safetensors").is_file():
        if not index.is_file():
            raise UserError(f"{folder} has neither model.safetensors nor {INDEX}; finish the "
                            "download, or convert pickled weights (.bin, .pt) where you trust "
                            "them: they can run code and are never read")
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or {type(x) for x in shards.values()} != {str}:
            raise UserError(f"{index}: weight_map must map tensors to files; download it again")
    files = shard_files(folder)
    for file in files:
        try:
            safe_open(file, framework="pt")
        except (OSError, SafetensorError) as e:
            raise UserError(f"{file} is not a whole safetensors file ({e!r}); finish the "
                            "download, or fetch it again") from None
    return files


def save_model(model: Transformer, folder: Path, shard_bytes: int = SHARD_BYTES):
    """Transformer.save_pretrained, in several files and their index above shard_bytes. The weights
    are stored in the dtype of the folder that the model came from."""
    if model.stored_dtype:
        model.to(model.stored_dtype)
    shards, room = [{}], shard_bytes
    for name, weight in stored_parameters(model).items():
        if weight.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = weight
        room -= weight.nbytes
    if len(shards) == 1:
        return model.save_pretrained(folder)
    shard_of = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_tensors(folder / file, shard, {"format": "pt"})
        shard_of |= dict.fromkeys(shard, file)
    total = sum(p.nbytes for p in model.parameters())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": shard_of})
    write_json(folder / "config.json", model.config.to_hf(model.embed_tokens.weight.dtype))
    if model.generation_config is not None:
        write_json(folder / "generation_config.json", model.generation_config)
    (folder / "model.safetensors").unlink(missing_ok=True)  # an older save would be read instead
