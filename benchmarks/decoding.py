"""Greedy decoding here against transformers' generate: same weights, prompts and device, one run.

    python benchmarks/decoding.py [--size llama2-7b --device cuda --dtype bfloat16 --learn 0 ...]

Three models: one that has memorised random answers to random questions, each ending at its own
step; the same one collapsed by gradient ascent on them, so that it repeats itself; and random
weights, which no draft ever fits. Lengths are those of TOFU's forget10. The drafts are the answers.
`--learn 0` leaves out the first two: for large models. `--models RUN/original RUN/so-graddiff`:
models of a run instead, asked its own forget and retain rows.

transformers gets one batch, padded on the left, its key/value cache and sdpa attention. `--before`
names an older checkout, whose generate takes its turn too. All take turns; times are the fastest of
`--repeats`. Tokens are compared with transformers', passes counted, and the work that no way can
save (each token of prompt and text through each matrix once) set against the matmul rate.
"""

import argparse
import tempfile
from pathlib import Path

from common import (
    add_options, config, describe, matmul_rate, older, random_model, random_rows, timed,
    tofu_lengths)

import torch
import torch.nn.functional as F

import data
import eval as evaluation
from model import Config, Transformer
from pipeline.reading import generate
from pipeline.settings import load_benchmark, read_settings

EOS = 0


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(p)
    p.set_defaults(size="small")
    for name, value in dict(prompts=64, new=150, learn=400, collapse=40, repeats=7,
                            threads=1).items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--before", type=Path, help="an older checkout of this repository")
    p.add_argument("--models", type=Path, nargs="+", help="folders of one run")
    return p.parse_args()


def descend(model, rows, steps: int, lr: float, sign: float, enough) -> float:
    """Full-batch Adam on sign * the loss of answers and eos; stops where enough(loss)."""
    batch = data.collate(rows, model.embed_tokens.weight.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        loss = F.cross_entropy(model(batch.ids).flatten(0, 1), batch.targets.flatten())
        if enough(loss):
            break
        optimizer.zero_grad()
        (sign * loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def ask_transformers(model, prompts, new, eos):
    """transformers' generate on one left-padded batch; ids without eos and pads."""
    width = max(map(len, prompts))
    pads = [width - len(p) for p in prompts]
    ids = torch.tensor([[EOS] * n + p for n, p in zip(pads, prompts)])  # [B, width]
    mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(pads, prompts)])
    out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device),
                         max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=EOS)
    out = out[:, width:].tolist()
    return [row[:row.index(eos)] if eos in row else row for row in out]


def count_passes(model) -> list[int]:
    """A list that grows by one at each of the model's passes."""
    passes = []
    model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    return passes


def compare(a, label, model, prompts, drafts, eos):
    """Let every way decode the same prompts with the same weights, in turns."""
    import transformers
    dtype = getattr(torch, a.dtype)
    options = dict(max_new_tokens=a.new, eos_id=eos)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = Transformer.from_pretrained(folder, dtype=dtype, device=a.device)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        theirs = theirs.to(a.device).eval()
        counted = {"drafted": count_passes(ours)}
        ways = {"transformers": lambda: ask_transformers(theirs, prompts, a.new, eos),
                "drafted": lambda: generate(ours, prompts, drafts=drafts, **options)}
        if a.before:
            module, = older(a.before, "model")
            before = module.Transformer.from_pretrained(folder, dtype=dtype, device=a.device)
            counted["before"] = count_passes(before)
            ways["before"] = lambda: module.generate(before, prompts, **options)
    seconds, texts = {name: [] for name in ways}, {}
    for _ in range(a.repeats):
        for name, way in ways.items():
            s, texts[name] = timed(a, way)
            seconds[name].append(s)
    lengths = [len(text) for text in texts["drafted"]]
    matrices = sum(p.numel() for p in ours.parameters() if p.dim() == 2)
    if ours.lm_head is not None:
        matrices -= ours.embed_tokens.weight.numel()  # looked up, not multiplied
    flop, rate = 2 * matrices * (sum(lengths) + sum(map(len, prompts))), matmul_rate(a)
    print(f"{label}: {sum(lengths)} new tokens in {len(prompts)} rows of {min(lengths)} to "
          f"{max(lengths)}")
    for name, s in seconds.items():
        same = sum(x == y for x, y in zip(texts[name], texts["transformers"]))
        passes = f"{len(counted[name]) // a.repeats} passes" if name in counted else ""
        print(f"  {name:13}{min(s):8.3f} s {sum(lengths) / min(s):8.0f} tokens/s "
              f"{min(seconds['transformers']) / min(s):6.2f} times transformers "
              f"{flop / min(s) / rate:5.0%} of the matmul rate, {same}/{len(prompts)} rows equal"
              f"{passes and ', ' + passes}")


def compare_models(a):
    """The models of a run on rows that its original was taught."""
    s = read_settings(a.models[0].parent)
    bench, tokenizer = load_benchmark(s), data.load_tokenizer(a.models[0])
    some = evaluation.spread(bench.forget + bench.retain, a.prompts)
    rows = data.encode_for(Config.from_dir(a.models[0]), some, tokenizer, s.template)
    for folder in a.models:
        compare(a, folder.name, Transformer.from_pretrained(folder),
                [row.ids[:row.n_prompt] for row in rows],
                [row.ids[row.n_prompt:-1] for row in rows], tokenizer.eos_id)


def main():
    a = arguments()
    import transformers
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(a.threads)
    describe(a)
    if a.models:
        return compare_models(a)
    rows = random_rows(a, tofu_lengths(a.prompts, a.seed))
    for row in rows:
        row.ids.append(EOS)
    prompts = [row.ids[:row.n_prompt] for row in rows]
    answers = [row.ids[row.n_prompt:-1] for row in rows]
    print(f"transformers {transformers.__version__}; {a.size}, "
          f"{sum(p.numel() for p in Transformer(config(a)).parameters()):,} weights; at most "
          f"{a.new} new tokens")
    if a.learn:
        model = random_model(a)
        loss = descend(model, rows, a.learn, 3e-3, 1.0, lambda loss: loss < 0.02)
        compare(a, f"memorised (loss {loss:.3f})", model, prompts, answers, EOS)
        loss = descend(model, rows, a.collapse, 1e-3, -1.0, lambda loss: loss > 20)
        compare(a, f"collapsed (loss {loss:.3f})", model, prompts, answers, EOS)
    compare(a, "random weights, every row to the end", random_model(a, sharp=12.0), prompts,
            answers, None)


if __name__ == "__main__":
    main()
