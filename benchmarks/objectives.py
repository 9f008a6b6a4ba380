"""Where each objective ends: methods x objectives x seeds on a tiny model, against retain-only.

    python benchmarks/objectives.py demo tiny-llama --seeds 5      into benchmarks/results/objectives/

Every point is unlearned from its seed's original with the recipe's settings for the method and judged
on every row by the evaluation's own metrics. A line of the CSV per point; a point that stands there is
not computed again. At the end the table: means over seeds with 95% t-intervals.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline  # noqa: E402, F401
import torch  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import simu  # noqa: E402
from model import Transformer  # noqa: E402
from pipeline import settings  # noqa: E402
from pipeline.columns import table  # noqa: E402
from pipeline.figures import interval  # noqa: E402
from pipeline.original import original_stage  # noqa: E402
from pipeline.stages import (  # noqa: E402
    attribute_stage, encoded_rows, forget_targets, mask_of_scores)

RESULTS = Path(__file__).resolve().parent / "results" / "objectives"
ARMS = ("fo", "so", "simu", "simu-random")
OBJECTIVES = ("graddiff", "npo", "undial", "ceiling", "level", "stranger")
VALUES = ("forget.rouge_l", "retain.rouge_l", "world_facts.rouge_l", "mia.answer_auc",
          "mia.answer_min_40", "mia.answer_min_40_plus", "forget.repetition", "forget.ended",
          "forget_quality", "model_utility")
HEADER = ("arm", "objective", "seed", "lr", *VALUES)


def judge(model, s, reference=None) -> tuple[dict, list]:
    """Values of a model on the run's rows; reference: rows of retain-only."""
    _, rows = evaluation.evaluate_model(model, data.load_tokenizer(s.run / "original"),
                                        settings.load_benchmark(s), template=s.template, limits=s)
    return evaluation.summarise(rows, reference)["values"], rows


def unlearned(s, arm: str):
    """The model of one point."""
    bench, encoded = encoded_rows(s, s.objective)
    model, mask, targets = Transformer.from_pretrained(s.run / "original"), None, None
    if simu.METHODS[s.method].masked:
        mask = mask_of_scores(s)
    if simu.OBJECTIVES[s.objective].targeted:
        targets, _ = forget_targets(s, bench, encoded["forget"], model)
    simu.unlearn(model, encoded["forget"], encoded["retain"], mask, s, targets=targets, title=arm)
    return model


def seed_points(benchmark: str, name: str, seed: int, out: Path, arms, objectives, runs: Path):
    """Append every missing point of a seed to the CSV."""
    made = {tuple(row[:3]) for row in csv.reader(out.open())} if out.exists() else set()
    given = dict(benchmark=benchmark, model=name, seed=seed, out=str(runs / f"seed{seed}"))
    s = settings.resolve(given)
    original_stage(s)
    attribute_stage(s)
    values, reference = judge(Transformer.from_pretrained(s.run / "retain-only"), s)
    baselines = {"retain-only": lambda: evaluation.summarise(reference, reference)["values"],
                 "original": lambda: judge(Transformer.from_pretrained(s.run / "original"), s,
                                           reference)[0]}
    jobs = [(k, "-", v, 0.0) for k, v in baselines.items()]
    for objective in objectives:
        for arm in arms:
            method, _, mask = arm.partition("-")
            p = settings.resolve(given | dict(method=method, mask=mask or "dual",
                                              objective=objective, lam=2.0))
            jobs.append((arm, objective, lambda p=p, arm=arm: judge(unlearned(p, arm), p,
                                                                    reference)[0], p.lr))
    for arm, objective, values_of, lr in jobs:
        if (arm, objective, str(seed)) not in made:
            values = values_of()
            with out.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(
                    [arm, objective, seed, lr, *("" if values.get(v) is None else
                                                 f"{values[v]:.5g}" for v in VALUES)])


def print_table(out: Path):
    rows = list(csv.DictReader(out.open()))
    lines = []
    for key in dict.fromkeys((r["objective"], r["arm"]) for r in rows):
        some = [r for r in rows if (r["objective"], r["arm"]) == key]
        cells = []
        for v in VALUES:
            xs = [float(r[v]) for r in some if r[v]]
            middle, half = interval(xs) if xs else (float("nan"), float("nan"))
            if v == "forget_quality" and xs:
                middle, half = statistics.median(xs), float("nan")
            cells.append(f"{middle:.3f}" + (f" ± {half:.3f}" if half == half else ""))
        lines.append([*key, len(some), *cells])
    print(table(["objective", "arm", "seeds", *(v.replace("forget_quality", "FQ (median)")
                                                for v in VALUES)], lines))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("benchmark")
    p.add_argument("model")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--arms", nargs="+", default=ARMS)
    p.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    p.add_argument("--runs", type=Path, help="where originals are kept")
    p.add_argument("--table", action="store_true", help="only print the table of the CSV")
    a = p.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"{a.benchmark}-{a.model}.csv"
    if not out.exists():
        out.write_text(",".join(HEADER) + "\n")
    runs = a.runs or settings.HERE / "runs" / f"objectives-{a.benchmark}-{a.model}"
    if not a.table:
        for seed in range(a.seeds):
            seed_points(a.benchmark, a.model, seed, out, a.arms, a.objectives, runs)
    print_table(out)


if __name__ == "__main__":
    main()
