"""The learning-rate grid behind the tiny recipes: every method at every rate, judged alike.

    python benchmarks/grid.py demo tiny-llama   # after simu.py original, attribute and mask

For each method the rate kept is the one with the highest utility (mean of the ROUGE-L columns other
than forget, as the paper's Table 1 counts retain and world facts) among those that forget:
ROUGE-L on the forget set at most 0.05 above that of the retain-only model, which never saw it.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tempfile

import torch

import data
import eval as evaluation
import simu
import stage
from model import Transformer, generate

RATES = (2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
SLACK = 0.05


def rouge(model, tokenizer, examples, s) -> float:
    """Mean ROUGE-L recall of greedy answers."""
    prompts = [data.encode_prompt(e.question, tokenizer, s.template) for e in examples]
    new = generate(model, prompts, eos_id=tokenizer.eos_id,
                   max_new_tokens=s.max_new_tokens or None,
                   max_total_tokens=s.max_total_tokens or None)
    scores = [evaluation.rouge_l(e.answer, tokenizer.decode(ids)).recall
              for e, ids in zip(examples, new)]
    return sum(scores) / len(scores)


def main(benchmark, name, *options):
    given = dict(o.lstrip("-").replace("-", "_").split("=") for o in options)
    out = given.pop("out", "")
    given = {k: type(getattr(stage.Settings(), k))(v) for k, v in given.items()}
    s = simu.resolve(dict(benchmark=benchmark, model=name, out=out) | given)
    bench = data.load_benchmark(s)
    tokenizer = data.load_tokenizer(s.run / "original")
    mask = None
    with simu.safe_open(s.run / "mask" / "mask.safetensors", framework="pt") as file:
        mask = file.get_tensor("mask")
    sets = dict(forget=bench.forget, retain=bench.retain_eval[:100], world=bench.world_facts)
    sets = {k: v for k, v in sets.items() if v}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    print(f"command: python benchmarks/grid.py {' '.join(sys.argv[1:])}\ncommit: "
          f"{commit.stdout.strip()}\ntorch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"critical neurons: {int(mask.sum())} of {mask.numel()}; "
          f"seed {s.seed}; {s.epochs} epochs")
    print("| model | lr | " + " | ".join(f"ROUGE-L {k}" for k in sets) + " |")
    print("|---|---|" + "---|" * len(sets))
    baseline = None
    for folder in ("retain-only", "original"):
        model = Transformer.from_pretrained(s.run / folder)
        got = [rouge(model, tokenizer, e, s) for e in sets.values()]
        baseline = got[0] if folder == "retain-only" else baseline
        print(f"| {folder} | | " + " | ".join(f"{g:.3f}" for g in got) + " |", flush=True)
    for method in stage.METHODS:
        kept = None
        for lr in RATES:
            m = simu.resolve(dict(benchmark=benchmark, model=name, out=out, method=method, lr=lr)
                             | given)
            model = Transformer.from_pretrained(s.run / "original")
            context = model.config.max_position_embeddings
            rows = [data.encode_all(x, tokenizer, s.template, context=context,
                                    vocab=model.config.vocab_size)
                    for x in (bench.forget, bench.retain)]
            with tempfile.TemporaryDirectory() as folder:
                simu.unlearn(model, *rows, mask, m, Path(folder) / "log.jsonl")
            got = [rouge(model, tokenizer, e, s) for e in sets.values()]
            cells = " | ".join(f"{g:.3f}" for g in got)
            print(f"| {method} | {lr:g} | {cells} |", flush=True)
            utility = sum(got[1:]) / len(got[1:])
            if got[0] <= baseline + SLACK and (kept is None or utility > kept[1]):
                kept = (lr, utility)
        told = "none forgets" if kept is None else f"{kept[0]:g} (utility {kept[1]:.3f})"
        print(f"kept for {method}: {told}", flush=True)


if __name__ == "__main__":
    stage.run_cli(lambda: main(*sys.argv[1:]))
