"""Models whose layers are not attention and MLP, one file each. Importing this package registers
them as kinds of Transformer; a stage's code digest finds the file by its model_type (reach.py)."""

from pipeline.mixers import mamba2, rwkv7

TINY = {"mamba2": mamba2.tiny_config, "rwkv7": rwkv7.tiny_config}  # of a tiny model's config
