"""Greedy decoding here against transformers' generate: same weights, prompts and device, one run.

    python benchmarks/decoding.py [--device cuda --dtype bfloat16 --learn 0 ...]

The model has the shape of this project's tiny LLaMA and first memorises random answers to random
questions, so that rows end as real answers do: each at its own step. Default lengths are spread
like TOFU's forget10 answers (18 to 95 tokens, mean 43); LUME's, whose few long texts keep a whole
batch waiting, are `--answer_min 1 --answer_mean 19 --answer_max 154 --new 200`. A second
comparison lets every row run to the end, where only the cost of a step counts. `--learn 0` keeps
random weights: for large models. transformers gets one batch, padded on the left, its key/value
cache and sdpa attention. The two take turns; times are the fastest of `--repeats`, and tokens are
compared.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import Config, Transformer, generate  # noqa: E402

EOS = 0


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in dict(prompts=64, shortest=12, longest=30, new=150, answer_min=18,
                            answer_mean=43, answer_max=95, hidden=128, layers=4,
                            heads=4, kv_heads=2, ffn=512, vocab=2048, learn=400, repeats=15,
                            threads=2, seed=0).items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32")
    return p.parse_args()


def make_rows(a, g):
    """Random prompts and answers; answers' lengths are the least plus an exponential, cut off."""
    def text(low, high):
        n = int(torch.randint(low, high + 1, (1,), generator=g))
        return torch.randint(1, a.vocab, (n,), generator=g).tolist()
    tail = torch.empty(a.prompts).exponential_(1 / (a.answer_mean - a.answer_min), generator=g)
    lengths = (a.answer_min + tail).clamp(max=a.answer_max).int().tolist()
    return [text(a.shortest, a.longest) for _ in lengths], [text(n, n) for n in lengths]


def memorise(model, prompts, answers, steps: int) -> float:
    """Full-batch Adam on the answers and their eos, until they are known; the last loss."""
    rows = [p + t + [EOS] for p, t in zip(prompts, answers)]
    width = max(map(len, rows))
    ids = torch.tensor([r + [EOS] * (width - len(r)) for r in rows])  # [B, T]
    targets = torch.tensor([[-100] * (len(p) - 1) + r[len(p):] + [-100] * (width - len(r))
                            for p, r in zip(prompts, rows)])  # [B, T - 1]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < 0.02:
            break
    return loss.item()


def their_way(model, prompts, new, eos):
    """transformers' generate on one left-padded batch; ids without eos and pads."""
    width = max(map(len, prompts))
    pads = [width - len(p) for p in prompts]
    ids = torch.tensor([[EOS] * n + p for n, p in zip(pads, prompts)])  # [B, width]
    mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(pads, prompts)])
    out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device),
                         max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=EOS)
    out = out[:, width:].tolist()
    return [row[:row.index(eos)] if eos in row else row for row in out]


def compare(a, label, ours, theirs, prompts, eos):
    ways = {"ours": lambda: generate(ours, prompts, max_new_tokens=a.new, eos_id=eos),
            "transformers": lambda: their_way(theirs, prompts, a.new, eos)}
    seconds, texts = {name: [] for name in ways}, {}
    for _ in range(a.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            texts[name] = way()  # Python lists: the device has finished
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(s) for name, s in seconds.items()}
    lengths = [len(text) for text in texts["ours"]]
    same = sum(x == y for x, y in zip(texts["ours"], texts["transformers"]))
    print(f"{label}: {sum(lengths)} new tokens in {len(prompts)} rows of {min(lengths)} to "
          f"{max(lengths)}")
    for name, s in best.items():
        print(f"  {name:13}{s:8.3f} s {sum(lengths) / s:9.0f} tokens/s")
    print(f"  ratio {best['transformers'] / best['ours']:.2f}, "
          f"rows with equal tokens {same}/{len(prompts)}")


def processor(a) -> str:
    if a.device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")
    return f"{name}, {a.threads} of {os.cpu_count()} threads"


def main():
    a = arguments()
    import transformers
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(a.threads)
    commit = subprocess.run(["git", "log", "-1", "--format=%h"], capture_output=True, text=True,
                            cwd=ROOT).stdout.strip()
    print("python", *sys.argv)
    print(f"commit {commit}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, {processor(a)}")
    torch.manual_seed(a.seed)
    prompts, answers = make_rows(a, torch.Generator().manual_seed(a.seed))
    model = Transformer(Config(
        model_type="llama", vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.ffn,
        num_hidden_layers=a.layers, num_attention_heads=a.heads, num_key_value_heads=a.kv_heads,
        max_position_embeddings=a.longest + a.new + 1))
    loss = f"{memorise(model, prompts, answers, a.learn):.3f}" if a.learn else "not trained"
    dtype = getattr(torch, a.dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.to(dtype).save_pretrained(folder)
        ours = Transformer.from_pretrained(folder, dtype=dtype, device=a.device)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        theirs = theirs.to(a.device).eval()
    print(f"{sum(p.numel() for p in ours.parameters()):,} parameters, {a.dtype}, loss {loss}; "
          f"prompts of {a.shortest} to {a.longest} tokens, at most {a.new} new")
    if a.learn:
        compare(a, "answers that end", ours, theirs, prompts, EOS)
    compare(a, "every row to the end", ours, theirs, prompts, None)


if __name__ == "__main__":
    main()
