"""Where each objective ends: methods x objectives x seeds on a tiny model, against retain-only.

    python -m studies objectives demo tiny-llama --seeds 5  into benchmarks/results/objectives/
    python -m studies objectives tofu tiny-llama --arms simu --objectives level --lr 4e-4

Every point is unlearned from its seed's original with the recipe's settings for the method, judged
on every row by the evaluation's own metrics, and attacked. A line of the CSV per point; a point
that stands there is not computed again. --table prints the tables (means over seeds with 95%
t-intervals), --figure draws the losses of forget rows beside those of rows never seen, both from
the CSVs alone.
"""

import statistics
from pathlib import Path

import torch

import data
import eval as evaluation
from model import Transformer
from pipeline import settings
from pipeline.columns import table
from pipeline.original import original_stage
from pipeline.reading import generate, token_scores
from pipeline.stages import attribute_stage
from studies import common, drawing, sweep
from studies.common import append_lines, cell, groups, numbers, read_lines

RESULTS = common.RESULTS / "objectives"
ARMS = ("fo", "so", "simu", "simu-random")
OBJECTIVES = ("level", "stranger", "graddiff", "undial", "ceiling", "npo", "simnpo")
VALUES = ("forget.rouge_l", "retain.rouge_l", "world_facts.rouge_l", "mia.answer_auc", "ks",
          "mia.answer_min_40", "mia.answer_min_40_plus", "forget.repetition", "forget.ended",
          "forget_quality", "model_utility")
ATTACKS = ("plain", "paraphrase", "shots", "prefix", "int4", "relearn-half")
HEADER = ("arm", "objective", "seed", "lr", *VALUES, *ATTACKS)
FAR = ("mia.answer_auc", "forget.rouge_l", "forget.repetition")  # how far from retain-only
LOSSES = ("arm", "objective", "split", "loss")
SHOWN = ("so", "simu")  # arms in the figure


def judge(model, s, reference=None) -> tuple[dict, list]:
    """Values of a model on the run's rows; reference: rows of retain-only."""
    _, rows = evaluation.evaluate_model(model, data.load_tokenizer(s.run / "original"),
                                        settings.load_benchmark(s), template=s.template, limits=s,
                                        generate=generate, token_scores=token_scores)
    values = evaluation.summarise(rows, reference)["values"]
    return values | dict(ks=common.ks_distance(*common.losses_of(rows).values())), rows


def seed_points(benchmark: str, name: str, seed: int, out: Path, arms, objectives, runs: Path,
                rate: dict):
    """Append every missing point of a seed to the CSV. rate: empty, or an lr for all arms."""
    made = {(x["arm"], x["objective"], x["seed"], x["lr"]) for x in read_lines(out)}
    given = dict(benchmark=benchmark, model=name, seed=seed, out=str(runs / f"seed{seed}"))
    given |= common.STUDIED.get((benchmark, name), {})
    s = settings.resolve(given)
    original_stage(s)
    attribute_stage(s)
    bench, tokenizer = settings.load_benchmark(s), data.load_tokenizer(s.run / "original")
    jobs = [(name, "-", s) for name in ("retain-only", "original")]
    for objective in objectives:
        for arm in arms:
            method, _, mask = arm.partition("-")
            jobs.append((arm, objective, settings.resolve(given | dict(
                method=method, mask=mask or "dual", objective=objective, lam=2.0) | rate)))
    reference = None
    for arm, objective, p in jobs:
        lr = p.lr if objective != "-" else 0
        if (arm, objective, str(seed), f"{lr:.5g}") in made:
            continue
        if reference is None:
            _, reference = judge(Transformer.from_pretrained(s.run / "retain-only"), s)
        model = (Transformer.from_pretrained(s.run / arm) if objective == "-" else
                 sweep.unlearned(p, arm)[0])
        values, rows = judge(model, p, reference)
        every = {e.id for e in bench.forget}
        values |= {name: evaluation.mean(common.attacked(
            model, name, bench, tokenizer, p, every).values()) for name in ATTACKS}
        if seed == 0 and not rate and arm in (*SHOWN, "retain-only", "original"):
            append_lines(out.with_suffix(".losses.csv"), LOSSES, [
                (arm, objective, split, x) for split, xs in common.losses_of(rows).items()
                for x in xs])
        append_lines(out, HEADER, [[arm, objective, seed, lr, *(
            "" if values.get(v) is None else float(values[v]) for v in HEADER[4:])]])


def distances(rows: list[dict], ideal: dict, value: str) -> list[float]:
    """How far each line's value is from its own seed's retain-only, ideal: {seed: its line}."""
    return [abs(float(r[value]) - float(ideal[r["seed"]][value])) for r in rows]


def print_tables(out: Path):
    """Where each ends; how far from its own seed's retain-only; what attacks bring back."""
    rows = read_lines(out)
    ideal = {r["seed"]: r for r in rows if r["arm"] == "retain-only"}
    ends, far, back = [], [], []
    for key, some in groups(rows, "objective", "arm", "lr").items():
        quality = numbers(some, "forget_quality")
        quality = f"{statistics.median(quality):.2g}" if quality else "nan"
        ends.append([*key, len(some), *(quality if v == "forget_quality" else cell(
            numbers(some, v)) for v in VALUES)])
        if attacked := numbers(some, ATTACKS[0]):
            back.append([*key, len(attacked), *(cell(numbers(some, v)) for v in ATTACKS)])
        far.append([*key, len(some), *(cell(distances(some, ideal, v)) for v in FAR)])
    head = ["objective", "arm", "lr", "seeds"]
    for title, columns, lines in (("", VALUES, ends), (
            "\nDistance to the same seed's retain-only\n", ("AUC", "forget ROUGE-L", "repetition"),
            far), ("\nROUGE-L on forget rows after attacks\n", ATTACKS, back)):
        print(*filter(None, (title, table([*head, *columns], lines))), sep="\n")
    print("\n± is half of a 95% t-interval over seeds, of which each line says how many.")


def draw(out: Path):
    """Seed 0's losses: forget rows beside those never seen, a panel for each objective."""
    rows = read_lines(out.with_suffix(".losses.csv"))
    keys = list(groups(rows, "objective", "arm"))[::-1]
    figure, ((axis,),) = drawing.canvas(1, 1, (7, 0.32 * len(keys) + 1))
    for y, key in enumerate(keys):
        for split, colour, up, label in (("forget", drawing.RED, 0.12, "forget rows"),
                                         ("nonmembers", drawing.BLUE, -0.12, "rows never seen")):
            own = common.chosen(rows, objective=key[0], arm=key[1], split=split)
            axis.plot(numbers(own, "loss"), [y + up] * len(own), "|", color=colour, ms=7,
                      label="" if y else label)
    axis.set_yticks(range(len(keys)), [" ".join(k).strip("- ") for k in keys])
    axis.set_xlabel("mean loss of the answer, nats per token")
    axis.legend(loc="upper right")
    drawing.save(figure, out.with_suffix(".png"))


def main(argv: list[str]):
    """Where each objective ends, on a tiny model over seeds."""
    p = common.parser_of("objectives", __doc__)
    p.add_argument("benchmark")
    p.add_argument("model")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--arms", nargs="+", default=ARMS)
    p.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    p.add_argument("--lr", type=float, help="a rate for all arms; default: each recipe's own")
    p.add_argument("--runs", type=Path, help="where originals are kept")
    p.add_argument("--table", action="store_true", help="only print the tables of the CSV")
    p.add_argument("--figure", action="store_true", help="only draw the CSV's figure")
    a = p.parse_args(argv)
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
