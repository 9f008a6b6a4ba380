"""Files of a run: what has changed since (digests), what a stored JSON value must hold, tensors."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import UserError


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_digests(folder) -> dict[str, str]:
    """sha256 of every JSON file in a folder, by name: they decide whether a stage is stale."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*.json*") if p.is_file())
    return {str(p.relative_to(folder)): sha256(p) for p in files}


def has_types(value, types: dict[str, type]) -> bool:
    """Is a JSON value an object with fields of these types?"""
    return isinstance(value, dict) and all(type(value.get(k)) is t for k, t in types.items())


def read_tensors(path, names) -> list[torch.Tensor]:
    """The named tensors of a safetensors file that a stage wrote; UserError if it lacks one."""
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError):
        raise UserError(f"{path} is missing or damaged; delete {Path(path).parent} and make it "
                        "again") from None
