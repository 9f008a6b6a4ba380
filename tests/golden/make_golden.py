"""Make the golden checkpoints and what transformers computes from them.

    python tests/golden/make_golden.py

Run once, with transformers (5.x) installed; the files are committed, so that tests/test_model.py
holds where transformers is not. Weights are random, stored in float16 to be small.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OlmoConfig,
                          OlmoForCausalLM)

HERE = Path(__file__).resolve().parent
EOS = 7
SHAPE = dict(vocab_size=48, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=EOS,
             pad_token_id=0)
KINDS = {
    "llama-grouped": LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "llama-tied": LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "olmo-tied": OlmoForCausalLM(OlmoConfig(**SHAPE, tie_word_embeddings=True)),
    "olmo-clip": OlmoForCausalLM(OlmoConfig(**SHAPE, clip_qkv=0.5)),
}
PROMPTS = [[3, 9, 27], [11], [40, 2, 6, 18, 5, 33, 21], [8, 8, 30, 14, 2]]


def expected(folder: Path) -> dict:
    """Logits of the longest prompt and the greedy continuation of each, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[2]])).logits[0, -3:]
    tokens = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16,
                             do_sample=False, eos_token_id=EOS)[0, len(prompt):].tolist()
        tokens.append(new[:new.index(EOS)] if EOS in new else new)
    return {"logits": [[round(x, 6) for x in row] for row in logits.tolist()], "tokens": tokens}


if __name__ == "__main__":
    golden = {"prompts": PROMPTS, "eos": EOS, "new": 16}
    for seed, (name, model) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        for weight in model.parameters():  # larger than usual: texts that vary, a clip that bites
            torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.4)
        shutil.rmtree(HERE / name, ignore_errors=True)
        size = "8KB" if name == "llama-grouped" else "5GB"
        model.half().save_pretrained(HERE / name, max_shard_size=size)
        golden[name] = expected(HERE / name)
    (HERE / "golden.json").write_text(json.dumps(golden) + "\n")
