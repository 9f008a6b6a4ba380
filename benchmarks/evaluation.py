"""The whole evaluation of a model, as an older checkout does it and as it is done now, in turns.

    python benchmarks/evaluation.py MODEL --before OLD [--data FOLDER] [--limit 2] [--repeats 1]

MODEL is a folder in Hugging Face layout, the rows are TOFU's (a slice of two forget authors and
eight others), at most --limit of each split. Every token that goes through the layers is counted,
padding too, and every pass, and held against what no exact evaluation can do without: each distinct
prefix of a text that is scored or said, once, through the layers' matrices at the rate of a large
matrix product. What metrics are made of, texts and losses, is compared.
"""

import argparse
import statistics
from pathlib import Path

import torch
from common import describe, matmul_rate, older, timed

import data
import eval as evaluation
from model import Transformer
from pipeline import reading
from pipeline.settings import load_benchmark, resolve

LOSSES = ("loss", "paraphrased_loss", "perturbed_losses")


def counter(model) -> list[int]:
    """Grows by each pass's tokens."""
    read = []
    model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _, args, out: read.append(args[0].shape[:-1].numel()))
    return read


def prefixes() -> tuple:
    """A dict that grows by the distinct prefixes of what is scored and said, and the scorer and the
    decoder that fill it; the last token of a text, which need not be read, is left out."""
    seen = {}

    def add(ids: list[int]):
        at = 0
        for token in ids[:-1]:
            at = seen.setdefault((at, token), len(seen) + 1)

    def scored(model, rows, *rest, **named):
        for row in rows:
            add(row.ids)
        return reading.token_scores(model, rows, *rest, **named)

    def said(model, prompts, **named):
        found = reading.generate(model, prompts, **named)
        for prompt, text in zip(prompts, found):
            add(prompt + text)
        return found

    return seen, dict(token_scores=scored, generate=said)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--before", type=Path, required=True, help="a checkout of f8e4b7a")
    p.add_argument("--data", help="the folder that holds tofu/; default: as for run.sh tofu")
    p.add_argument("--limit", type=int, default=2)
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    a = p.parse_args()
    a.device, dtype = "cpu", getattr(torch, a.dtype)
    describe(a)
    s = resolve(dict(benchmark="tofu", model="smollm2-135m", forget_groups=2, retain_groups=8)
                | (dict(data=a.data) if a.data else {}))
    bench = load_benchmark(s)
    module, old, stage = older(a.before, "model", "eval", "stage")
    their_s = stage.Settings(benchmark="tofu", model="tiny-llama", template=s.template,
                             max_total_tokens=s.max_total_tokens)
    models = {"now": Transformer.from_pretrained(a.model, dtype=dtype),
              "before": module.Transformer.from_pretrained(a.model, dtype=dtype)}
    tokenizer = data.load_tokenizer(a.model)
    seen, fast = prefixes()
    ways = {"now": lambda: evaluation.evaluate_model(models["now"], tokenizer, bench, limits=s,
                                                     template=s.template, limit=a.limit,
                                                     **fast),
            "before": lambda: old.evaluate_model(models["before"], tokenizer, bench, their_s,
                                                 limit=a.limit)}
    read, seconds, found = {k: counter(m) for k, m in models.items()}, {k: [] for k in ways}, {}
    for _ in range(a.repeats):
        for name, way in ways.items():
            read[name].clear()
            took, found[name] = timed(a, way)
            seconds[name].append(took)
    for name, s in seconds.items():
        print(f"  {name:7}{statistics.median(s):8.1f} s, {len(read[name])} passes, "
              f"{sum(read[name])} tokens read")
    weights = sum(p.numel() for p in models["now"].layers.parameters() if p.dim() == 2)
    least = 2 * weights * len(seen) / matmul_rate(a)
    print(f"  {len(seen)} tokens at least, the distinct prefixes of what is scored or said: "
          f"{least:.1f} s at the matmul rate, at most "
          f"{statistics.median(seconds['before']) / least:.1f} times faster")
    ratio = statistics.median(x / y for x, y in zip(seconds["before"], seconds["now"]))
    texts = [[r.get(k) for r in rows for k in ("generation", "paraphrased_generation")]
             for _, rows in found.values()]
    losses = [[x for r in rows for k in LOSSES if k in r
               for x in (r[k] if isinstance(r[k], list) else [r[k]])] for _, rows in found.values()]
    off = max(abs(x - y) for x, y in zip(*losses, strict=True))
    print(f"  now {ratio:.2f} times faster; the same texts: {texts[0] == texts[1]}; "
          f"{len(losses[0])} losses differ by at most {off:.1e}")


if __name__ == "__main__":
    main()
