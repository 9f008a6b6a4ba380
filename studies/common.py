"""What the studies share: tables that grow a line at a time, intervals, models under attack."""

import copy
import csv
import math
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

import eval as evaluation
from pipeline.settings import HERE
from pipeline.stages import answer_losses
from studies import attack

RESULTS = HERE / "benchmarks" / "results"
# The demo's recipe when its studies were made; it is shorter since.
STUDIED = {("demo", "tiny-llama"): dict(learn_epochs=30, epochs=40)}
# Upper 2.5% points of Student's t for 1 to 9 degrees of freedom; `student` counts the others.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def parser_of(name: str, text: str) -> ArgumentParser:
    return ArgumentParser(prog=f"python -m studies {name}", description=text,
                          formatter_class=RawDescriptionHelpFormatter)


def describe():
    """Print what a log is worth nothing without."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                         text=True, cwd=HERE)
    print("$ python -m studies", *sys.argv[1:])
    print(f"commit {git.stdout.strip() or 'unknown'}, torch {torch.__version__}, CPU, "
          f"{torch.get_num_threads()} of {os.cpu_count()} threads", flush=True)


# ------------------------------------------------------------------------------------------ tables


def read_lines(path: Path) -> list[dict]:
    """The lines of a CSV; none where there is none."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def append_lines(path: Path, header: tuple, lines: list):
    """Add lines to a CSV, which a header begins; floats to five digits."""
    new = [] if path.exists() else [header]
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [f"{x:.5g}" if isinstance(x, float) else x for x in line] for line in new + lines)


def chosen(rows, **wanted) -> list[dict]:
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def groups(rows, *names) -> dict:
    """{(values of names): the rows that have them}, in order."""
    out = {}
    for r in rows:
        out.setdefault(tuple(r[n] for n in names), []).append(r)
    return out


def numbers(rows, name: str) -> list[float]:
    """A column, without the rows in which it is empty."""
    return [float(r[name]) for r in rows if r[name]]


# --------------------------------------------------------------------------------------- intervals


def student(degrees: int) -> float:
    """The upper 2.5% point of Student's t: of the table, else by Cornish and Fisher's series in
    1/degrees, here right to 2e-4.

    >>> round(student(79), 3), round(student(10), 3)
    (1.99, 2.228)
    """
    if degrees <= len(T95):
        return T95[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = ((z ** 3 + z) / 4, (5 * z ** 5 + 16 * z ** 3 + 3 * z) / 96,
             (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / 384)
    return z + sum(x / degrees ** k for k, x in enumerate(terms, 1))


def interval(xs: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% t-interval; nan for fewer than two."""
    if len(xs) < 2:
        return (xs[0] if xs else math.nan), math.nan
    return statistics.mean(xs), student(len(xs) - 1) * statistics.stdev(xs) / math.sqrt(len(xs))


def cell(xs: list[float], sign: str = "", digits: int = 3) -> str:
    """Mean and interval as text; a dash where there is nothing."""
    middle, half = interval(xs)
    if math.isnan(middle):
        return "–"
    return f"{middle:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def compared(intervals: list[tuple[float, float]], over: str) -> str:
    """A sentence beneath a table of differences: how many, over what, how many by chance."""
    made = [(middle, half) for middle, half in intervals if not math.isnan(half)]
    apart = sum(abs(middle) > half for middle, half in made)
    return (f"{len(made)} comparisons, each a 95% t-interval over {over}: {apart} leave out zero, "
            f"where {0.05 * len(made):.1f} would by chance alone if nothing differed.")


# ----------------------------------------------------------------------------------------- models


def losses_of(rows: list[dict]) -> dict[str, list[float]]:
    """Mean loss of the answer of every forget row and of every row never seen."""
    return {split: [r["loss"] for r in rows if r["split"] == split]
            for split in ("forget", "nonmembers")}


def ks_distance(a: list[float], b: list[float]) -> float:
    """Largest difference of the two empirical distribution functions."""
    return max(abs(sum(x <= at for x in a) / len(a) - sum(x <= at for x in b) / len(b))
               for at in (*a, *b))


def attacked(model, name: str, bench, tokenizer, s, wanted: set[str]) -> dict[str, float]:
    """{row id: ROUGE-L recall} of forget rows after an attack, of the most successful variant;
    wanted: ids of the rows to ask, unless half are learnt again: then all of the other half."""
    probes = attack.input_probes(bench, tokenizer, s, model.config.max_position_embeddings)
    if name in attack.WEIGHTS:
        model = copy.deepcopy(model)
        attack.attack_weights(model, name, bench, tokenizer, s)
    if name == "relearn-half":
        _, wanted = attack.halves(bench.forget, s.seed)
    asked = [p for p in probes.get(name, probes["plain"])
             if p.split == "forget" and p.id in wanted]
    return attack.best(attack.answers_to(asked, model, tokenizer, s, name))


def mean_loss(model, rows: list, s) -> float:
    """Mean over rows of the answer's mean token loss."""
    return evaluation.mean(evaluation.mean(own)
                           for _, own in answer_losses(model, rows, s.eval_tokens))
