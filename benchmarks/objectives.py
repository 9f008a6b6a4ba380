"""Where each objective ends: methods x objectives x seeds on a tiny model, against retain-only.

    python benchmarks/objectives.py demo tiny-llama --seeds 5  into benchmarks/results/objectives/
    python benchmarks/objectives.py tofu tiny-llama --arms simu --objectives level --lr 4e-4

Every point is unlearned from its seed's original with the recipe's settings for the method, judged
on every row by the evaluation's own metrics, and attacked. A line of the CSV per point; a point
that stands there is not computed again. --table prints the tables (means over seeds with 95%
t-intervals), --figure draws the losses of forget rows beside those of rows never seen, both from
the CSVs alone.
"""

import argparse
import copy
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
from common import STUDIED, append  # noqa: E402
from model import Transformer  # noqa: E402
from pipeline import attack, settings  # noqa: E402
from pipeline.columns import table  # noqa: E402
from pipeline.figures import interval  # noqa: E402
from pipeline.original import original_stage  # noqa: E402
from pipeline.stages import (  # noqa: E402
    attribute_stage, encoded_rows, forget_targets, mask_of_scores)

RESULTS = Path(__file__).resolve().parent / "results" / "objectives"
ARMS = ("fo", "so", "simu", "simu-random")
OBJECTIVES = ("level", "stranger", "graddiff", "undial", "ceiling", "npo", "simnpo")
VALUES = ("forget.rouge_l", "retain.rouge_l", "world_facts.rouge_l", "mia.answer_auc", "ks",
          "mia.answer_min_40", "mia.answer_min_40_plus", "forget.repetition", "forget.ended",
          "forget_quality", "model_utility")
ATTACKS = ("plain", "paraphrase", "shots", "prefix", "int4", "relearn-half")
HEADER = ("arm", "objective", "seed", "lr", *VALUES, *ATTACKS)
LOSSES = ("arm", "objective", "split", "loss")
SHOWN = ("so", "simu")  # arms in the figure


def judge(model, s, reference=None) -> tuple[dict, list]:
    """Values of a model on the run's rows; reference: rows of retain-only."""
    _, rows = evaluation.evaluate_model(model, data.load_tokenizer(s.run / "original"),
                                        settings.load_benchmark(s), template=s.template, limits=s)
    values = evaluation.summarise(rows, reference)["values"]
    return values | dict(ks=ks_distance(*losses_of(rows).values())), rows


def losses_of(rows: list[dict]) -> dict[str, list[float]]:
    """Mean loss of the answer of every forget row and of every row never seen."""
    return {split: [r["loss"] for r in rows if r["split"] == split]
            for split in ("forget", "nonmembers")}


def ks_distance(a: list[float], b: list[float]) -> float:
    """Largest difference of the two empirical distribution functions."""
    return max(abs(sum(x <= at for x in a) / len(a) - sum(x <= at for x in b) / len(b))
               for at in (*a, *b))


def attacked(model, s) -> dict[str, float]:
    """ROUGE-L recall on the forget rows after each attack; of the most successful variant."""
    bench, tokenizer = settings.load_benchmark(s), data.load_tokenizer(s.run / "original")
    probes = attack.input_probes(bench, tokenizer, s, model.config.max_position_embeddings)
    _, tested = attack.halves(bench.forget, s.seed)
    found = {}
    for name in ATTACKS:
        victim, asked = model, probes.get(name, probes["plain"])
        if name in attack.WEIGHTS:
            victim = copy.deepcopy(model)
            attack.attack_weights(victim, name, bench, tokenizer, s)
        asked = [p for p in asked if p.split == "forget" and (name != "relearn-half"
                                                              or p.id in tested)]
        answers = attack.answers_to(asked, victim, tokenizer, s, name)
        found[name] = evaluation.mean(attack.best(answers).values())
    return found


def unlearned(s, arm: str):
    """(model, mask, log) of one point."""
    bench, encoded = encoded_rows(s, s.objective)
    model = Transformer.from_pretrained(s.run / "original", **settings.placement(s))
    mask, targets = None, None
    if simu.METHODS[s.method].masked:
        mask = mask_of_scores(s)
    if simu.OBJECTIVES[s.objective].targeted:
        targets, _ = forget_targets(s, bench, encoded["forget"], model)
    return model, mask, simu.unlearn(model, encoded["forget"], encoded["retain"], mask, s,
                                     targets=targets, title=arm)


def seed_points(benchmark: str, name: str, seed: int, out: Path, arms, objectives, runs: Path,
                rate: dict):
    """Append every missing point of a seed to the CSV. rate: empty, or an lr for all arms."""
    made = {tuple(row[:4]) for row in csv.reader(out.open())} if out.exists() else set()
    given = dict(benchmark=benchmark, model=name, seed=seed, out=str(runs / f"seed{seed}"))
    given |= STUDIED.get((benchmark, name), {})
    s = settings.resolve(given)
    original_stage(s)
    attribute_stage(s)
    load = lambda name: Transformer.from_pretrained(s.run / name)
    jobs = [(name, "-", s, lambda name=name: load(name)) for name in ("retain-only", "original")]
    for objective in objectives:
        for arm in arms:
            method, _, mask = arm.partition("-")
            p = settings.resolve(given | dict(method=method, mask=mask or "dual",
                                              objective=objective, lam=2.0) | rate)
            jobs.append((arm, objective, p, lambda p=p, arm=arm: unlearned(p, arm)[0]))
    reference = None
    for arm, objective, p, model_of in jobs:
        lr = p.lr if objective != "-" else 0
        if (arm, objective, str(seed), f"{lr:.5g}") in made:
            continue
        if reference is None:
            _, reference = judge(load("retain-only"), s)
        model = model_of()
        values, rows = judge(model, p, reference)
        values |= attacked(model, p)
        if seed == 0 and not rate and arm in (*SHOWN, "retain-only", "original"):
            append(out.with_suffix(".losses.csv"), LOSSES, [
                (arm, objective, split, x) for split, xs in losses_of(rows).items() for x in xs])
        append(out, HEADER, [[arm, objective, seed, lr, *(
            "" if values.get(v) is None else float(values[v]) for v in HEADER[4:])]])


def cell(xs: list[float], sign: str = "") -> str:
    if not xs:
        return "–"
    middle, half = interval(xs)
    return f"{middle:{sign}.3f}" + (f" ± {half:.3f}" if half == half else "")


def print_tables(out: Path):
    """Where each ends; how far from its own seed's retain-only; what attacks bring back."""
    rows = list(csv.DictReader(out.open()))
    ideal = {r["seed"]: r for r in rows if r["arm"] == "retain-only"}
    ends, far, back = [], [], []
    for key in dict.fromkeys((r["objective"], r["arm"], r["lr"]) for r in rows):
        some = [r for r in rows if (r["objective"], r["arm"], r["lr"]) == key]
        of = lambda v: [float(r[v]) for r in some if r[v]]
        quality = statistics.median(of("forget_quality")) if of("forget_quality") else float("nan")
        ends.append([*key, len(some), *(f"{quality:.2g}" if v == "forget_quality" else cell(of(v))
                                        for v in VALUES)])
        if of(ATTACKS[0]):
            back.append([*key, len(of(ATTACKS[0])), *(cell(of(v)) for v in ATTACKS)])
        gap = lambda v: cell([abs(float(r[v]) - float(ideal[r["seed"]][v])) for r in some])
        far.append([*key, len(some), *map(gap, ("mia.answer_auc", "forget.rouge_l",
                                                "forget.repetition"))])
    head = ["objective", "arm", "lr", "seeds"]
    print(table([*head, *VALUES], ends))
    print("\nDistance to the same seed's retain-only\n")
    print(table([*head, "AUC", "forget ROUGE-L", "repetition"], far))
    print("\nROUGE-L on forget rows after attacks\n")
    print(table([*head, *ATTACKS], back))


def draw(out: Path):
    """Seed 0's losses: forget rows beside those never seen, a panel for each objective."""
    from matplotlib import pyplot as plt
    rows = list(csv.DictReader(out.with_suffix(".losses.csv").open()))
    keys = list(dict.fromkeys((r["objective"], r["arm"]) for r in rows))
    figure, axis = plt.subplots(figsize=(7, 0.32 * len(keys) + 1), layout="constrained")
    for y, key in enumerate(reversed(keys)):
        for split, colour, up in (("forget", "tab:red", 0.12), ("nonmembers", "tab:blue", -0.12)):
            xs = [float(r["loss"]) for r in rows
                  if (r["objective"], r["arm"], r["split"]) == (*key, split)]
            axis.plot(xs, [y + up] * len(xs), "|", color=colour, ms=7, label="" if y else
                      dict(forget="forget rows", nonmembers="rows never seen")[split])
    axis.set_yticks(range(len(keys)), [" ".join(k).strip("- ") for k in reversed(keys)])
    axis.set_xlabel("mean loss of the answer, nats per token")
    axis.legend(loc="upper right")
    figure.savefig(out.with_suffix(".png"), dpi=110)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("benchmark")
    p.add_argument("model")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--arms", nargs="+", default=ARMS)
    p.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    p.add_argument("--lr", type=float, help="a rate for all arms; default: each recipe's own")
    p.add_argument("--runs", type=Path, help="where originals are kept")
    p.add_argument("--table", action="store_true", help="only print the tables of the CSV")
    p.add_argument("--figure", action="store_true", help="only draw the CSV's figure")
    a = p.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"{a.benchmark}-{a.model}.csv"
    runs = a.runs or settings.HERE / "runs" / f"objectives-{a.benchmark}-{a.model}"
    if a.figure:
        return draw(out)
    for seed in () if a.table else range(a.seeds):
        seed_points(a.benchmark, a.model, seed, out, a.arms, a.objectives, runs,
                    dict(lr=a.lr) if a.lr else {})
    print_tables(out)


if __name__ == "__main__":
    main()
