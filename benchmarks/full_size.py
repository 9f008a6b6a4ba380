"""OLMo-1B at its full size, random weights, through every stage on a CPU: planned and measured.

    python benchmarks/full_size.py OUT --tokenizer FOLDER [--data FOLDER] [--layers 2]

FOLDER holds OLMo's tokenizer.json. The rows are a few of TOFU's; weights and optimiser state are in
bfloat16. Planned is what `python -m pipeline plan` counts, and what Python and torch take before
any model is there, which no plan counts. What OUT holds already is kept.
"""

import argparse
import multiprocessing
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from common import describe, random_model

import torch

import data
from model import Config
from pipeline import plan
from pipeline.columns import table
from pipeline.settings import resolve
from pipeline.stage import read_stage, run_cli

GB = 1e9
OPTIONS = dict(dtype="bfloat16", state="bfloat16", forget_groups=1, retain_groups=1,
               rows_per_author=4, epochs=1, batch=4, micro_tokens=512, attribution_tokens=1024,
               eval_tokens=1024, max_total_tokens=80, level_share=0.5)
LIMIT = 2  # rows of each split in an evaluation
METHODS = ("fo", "so", "simu")


def make_weights(a, folder: Path):
    model = random_model(a)
    model.config = replace(model.config, eos_token_id=data.load_tokenizer(a.tokenizer).eos_id)
    model.save_pretrained(folder, shard_bytes=500_000_000)
    data.copy_tokenizer(a.tokenizer, folder)


def run(*args):
    """One command of the pipeline; shows what its stages print of themselves."""
    print("$ python -m pipeline", *args, flush=True)
    out = subprocess.run([sys.executable, "-m", "pipeline", *map(str, args)], check=True, text=True,
                         stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parent.parent).stdout
    print(*(x for x in out.splitlines() if x.startswith("[") or "critical" in x), sep="\n",
          flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--tokenizer", type=Path, required=True)
    p.add_argument("--data", help="the folder that holds tofu/; default: as for run.sh tofu")
    p.add_argument("--layers", type=int, help="fewer of them, for a quick look")
    a = p.parse_args()
    a.device, a.dtype, a.size, a.seed = "cpu", "bfloat16", "olmo-1b", 0
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    describe(a)
    weights, folder = a.out / "weights", (a.out / "run").absolute()
    if not weights.is_dir():  # in another process: a peak here would count as each stage's own
        maker = multiprocessing.Process(target=make_weights, args=(a, weights))
        maker.start()
        maker.join()
    given = OPTIONS | (dict(data=a.data) if a.data else {})
    flags = [x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", v)]
    cell = ("tofu", "olmo-1b", "--weights", weights.absolute(), *flags, "--out", folder)
    for stage in ("original", "attribute", "mask"):
        run(stage, *cell)
    for method in METHODS:
        run("unlearn", *cell, "--method", method)
    run("evaluate", folder, "--limit", LIMIT)
    run("report", folder)

    s = resolve(dict(benchmark="tofu", model="olmo-1b", out=str(folder)) | given)
    evaluation = plan.need(s, Config.from_dir(weights), "evaluate", dtype=torch.bfloat16,
                           critical=0, longest=OPTIONS["max_total_tokens"], answer=64).peak
    lines = []
    for name in ("attribution", *(x for m in METHODS for x in (f"{m}-graddiff",
                                                               f"{m}-graddiff/eval-limit-{LIMIT}"))):
        made = read_stage(folder / name)
        planned = made.get("predicted_bytes", evaluation) + base
        lines.append([name, f"{made['seconds']:.0f}", f"{planned / GB:.2f}",
                      f"{made['peak_host_bytes'] / GB:.2f}",
                      f"{made['peak_host_bytes'] / planned - 1:+.0%}"])
    print(f"Python and torch alone: {base / GB:.2f} GB")
    print(table(["stage", "seconds", "planned GB", "measured GB", "off by"], lines))


if __name__ == "__main__":
    run_cli(main)
