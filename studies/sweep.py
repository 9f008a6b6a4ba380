"""Methods over a grid of settings and seeds, all judged by the same numbers, in one table.

    python -m pipeline sweep demo tiny-llama --seeds 3        in runs/sweep-demo-tiny-llama/
    python -m pipeline sweep demo tiny-llama --vary lr=1e-4,3e-4 --vary lam=1,2

A *point* is one unlearned model: an arm (method, mask, objective) with its settings, judged on
every row of the slice by what the frontier needs and then dropped. Without --vary the points are
every arm at a range of learning rates, and SIMU at several m, t and masks; with it, every arm at
every combination of the values named.

points.json holds each computed point, which is not computed again unless what it depends on
changed. seed<k>/ is a run like any other (original, attribution); seed<k>-steps=<m>/ is the same
original attributed with m nodes. At the end sweep.csv lists the points, scores.csv the first seed's
scores, settings.json its settings: all that figures.py reads. What the original depends on (rows,
width, teaching) cannot be varied: another sweep, with another --out, does that.
"""

import argparse
import dataclasses
import itertools
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

import data
import eval as evaluation
import simu
from model import Transformer, UserError, read_json, write_json
from pipeline import fused, objectives, reading, settings, slices
from pipeline.columns import table
from pipeline.evaluate import splits_of
from pipeline.levels import forget_targets
from pipeline.original import original_stage
from pipeline.settings import Level, Placement, Settings, Source, placement
from pipeline.stage import Stage, bare_names, content, data_inputs, digest, lock
from pipeline.stages import attribute_stage, encoded_rows, mask_of_scores
from pipeline.tokenizers import load_tokenizer
from pipeline.workers import run_each
from studies.drawing import write_csv

ARMS = ("fo", "so", "simu", "simu-random")
# Of the recipe's rate for the arm's method: close where forgetting sets in, and far beyond it,
# where FO and SO, whose recipes are lower, can be at their best again.
FACTORS = (0.0625, 0.0884, 0.125, 0.177, 0.25, 0.354, 0.5, 1, 2, 4)
VARIANT = 0.0884  # for m, t and masks: there forgetting is not yet complete, and shows what they do
STEPS = (2, 3, 5, 8, 10)  # m of Figure 2
THRESHOLDS = tuple(i / 10 for i in range(1, 11))  # t of Figure 3
BASELINES = ("original", "retain-only")
VALUES = ("forget.rouge_l", "forget.exact_match", "retain.rouge_l", "retain.exact_match",
          "world_facts.rouge_l", "world_facts.exact_match", "mia.auc")
COLUMNS = ("sweep", "arm", "seed", "lr", "epochs", "threshold", "steps", "critical", "forget",
           "utility", "aggregate", *VALUES, "varied", "error")
SHOWN = ("sweep", "arm", "seed", "lr", "varied", "forget", "utility", "aggregate", "error")
OF_ARMS = ("method", "mask", "objective")
OF_ATTRIBUTION = [f.name for f in fields(simu.Attribution) if f.name != "seed"]
MAY_VARY = {f.name for t in (objectives.Recipe, Level, evaluation.Limits) for f in fields(t)}
MAY_VARY -= {"seed", *OF_ARMS}


# ---------------------------------------------------------------------------------- what to compute


@dataclass(frozen=True)
class Point:
    """One model to judge. changes: its settings beside those of all."""

    sweep: str
    arm: str
    changes: dict
    settings: Settings  # out: the run that holds its attribution


def arm_settings(arm: str) -> dict:
    """method, mask and objective of an arm's name: simu, so-npo, simu-random, simu-soft-npo."""
    for method, mask, objective in itertools.product(simu.METHODS, simu.MASKS, simu.OBJECTIVES):
        names = [n for n in (method, mask, objective) if n not in ("dual", "graddiff")]
        if arm == "-".join(names) and (mask == "dual" or simu.METHODS[method].masked):
            return dict(method=method, mask=mask, objective=objective)
    raise UserError(f"arm {arm!r} is unknown; an arm is a method ({', '.join(simu.METHODS)}), of "
                    f"those with a mask another kind of it ({', '.join(list(simu.MASKS)[1:])}), "
                    f"and an objective ({', '.join(list(simu.OBJECTIVES)[1:])}), joined by dashes")


def read_grid(texts: list[str]) -> list[dict]:
    """The product of all --vary NAME=VALUE,...: [{name: value}]."""
    parser = settings.Parser(prog="python -m pipeline sweep")
    settings.add_options(parser)
    axes = []
    for text in texts:
        name, _, values = text.partition("=")
        if name.replace("-", "_") not in MAY_VARY:
            raise UserError(f"--vary {text}: {name} cannot be varied; choose of "
                            f"{', '.join(sorted(MAY_VARY))}")
        axes.append([vars(parser.parse_args([settings.flag(name), value]))
                     for value in values.split(",")])
    return [{k: v for values in combination for k, v in values.items()}
            for combination in itertools.product(*axes)]


def plan_point(options: dict, home: Settings, sweep: str, arm: str, changes: dict, factor: float
               ) -> Point:
    """A point of the seed whose run has the settings `home`, at a factor of its learning rate."""
    kind = {} if arm in BASELINES else arm_settings(arm)
    s = settings.resolve(options | kind | changes | dict(seed=home.seed))
    words = [f"-{name}={getattr(s, name)}" for name in OF_ATTRIBUTION
             if getattr(s, name) != getattr(home, name)]
    return Point(sweep, arm, changes, replace(s, lr=s.lr * factor, out=home.out + "".join(words)))


def plan_points(options: dict, homes: list[Settings], arms, factors, variants: bool,
                grid: list[dict]) -> list[Point]:
    """Every point, in the order of sweep.csv; one model may stand in several sweeps."""
    plans = [(home, "baseline", arm, {}, 1.0) for arm in BASELINES for home in homes]
    for arm, home in itertools.product(arms, homes):
        plans += [(home, "frontier", arm, {}, factor) for factor in sorted(factors)]
        plans += [(home, "vary", arm, changes, 1.0) for changes in grid]
    if variants:
        kinds = ["simu" if mask == "dual" else f"simu-{mask}" for mask in simu.MASKS]
        plans += [(homes[0], "m", "simu", dict(steps=m), VARIANT) for m in STEPS]
        plans += [(homes[0], "t", "simu", dict(threshold=t), VARIANT) for t in THRESHOLDS]
        plans += [(homes[0], "mask", kind, {}, VARIANT) for kind in kinds]
    return [plan_point(options, *plan) for plan in plans]


def key_of(p: Point) -> str:
    """Digest of all that a point's numbers depend on."""
    s, inputs = p.settings, [p.arm]
    takes = [slices.Slice, Source, Placement, evaluation.Limits]
    if p.arm not in BASELINES:
        inputs = [name for name in BASELINES if (s.run / name).is_dir()]
        takes += [objectives.Unlearning, Level]
        if simu.METHODS[s.method].masked:
            takes.append(simu.Masking)
            inputs.append("attribution")
    job = Stage(s.run / p.arm, s, code=(make_point,), takes=tuple(takes),
                inputs={name: content(s.run / name) for name in inputs} | data_inputs(s),
                also=dict(arm=p.arm))
    return digest(job.why)


# ---------------------------------------------------------------------------------------- one point


def prepare(s: Settings):
    """original/ and attribution/ of a run. One that has another attribution than its seed's run
    shares the original of that, by links."""
    home = s.run.with_name(f"seed{s.seed}")
    with lock(s.run, new=True):
        if s.run == home:
            original_stage(s)
        else:
            for name in (*BASELINES, "settings.json"):
                (s.run / name).unlink(missing_ok=True)
                if (home / name).exists():
                    (s.run / name).symlink_to(Path("..", home.name, name))
        attribute_stage(s)


def bare(rows: list[data.Example]) -> list[data.Example]:
    """The rows without what only `accuracy` and truth ratios need."""
    return [replace(e, paraphrased_question="", paraphrased_answer="", perturbed_answers=())
            for e in rows]


def judge(model: Transformer, s: Settings) -> dict:
    """The metrics of a model of run s that have a value; real authors are not asked about."""
    bench = slices.load_benchmark(s)
    bench = replace(bench, forget=bare(bench.forget), retain_eval=bare(bench.retain_eval),
                    world_facts=bare(bench.world_facts), real_authors=[])
    metrics, _ = evaluation.evaluate_model(
        model, load_tokenizer(s.run / "original"), splits_of(bench), benchmark=bench.kind,
        template=s.template, limits=s, scorer=reading.token_scores)
    return {k: v for k, v in metrics["values"].items() if v is not None}


def make_point(p: Point) -> dict:
    """Unlearn and judge one point: what points.json says of it."""
    s, result, mask, targets = p.settings, {}, None, None
    folder = s.run / (p.arm if p.arm in BASELINES else "original")
    model = Transformer.from_pretrained(folder, **placement(s))
    if p.arm not in BASELINES:
        if simu.METHODS[s.method].masked:
            mask = mask_of_scores(s)
            result["critical"] = int((mask != 0).sum())
        bench, encoded = encoded_rows(s, s.objective)
        if simu.OBJECTIVES[s.objective].targeted:
            (targets,), _ = forget_targets(s, bench, encoded["forget"], model, (s.seed,))
        try:
            simu.unlearn(model, encoded["forget"], encoded["retain"], mask, s, targets=targets,
                         **fused.on(model.embed_tokens.weight.device, s.state))
        except UserError as e:
            if "not finite" not in str(e):
                raise
            return result | dict(error="diverged", values={})
    return result | dict(values=judge(model, s))


def run_point(keyed: tuple[str, Point]) -> tuple[str, dict]:
    key, p = keyed
    if p.settings.tiny and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as the stages do
    return key, make_point(p)


def make_points(points: list[Point], file: Path, jobs: int) -> list[dict]:
    """The lines of sweep.csv, a point once a sweep. What points.json lacks is computed."""
    results = read_json(file) if file.is_file() else {}
    # Not every run has a retain-only.
    points = [p for p in points if p.arm not in BASELINES or (p.settings.run / p.arm).is_dir()]
    keyed = {(p.sweep, key_of(p)): p for p in points}
    missing = {key: p for (_, key), p in keyed.items() if key not in results}
    print(f"{len({key for _, key in keyed})} points, {len(missing)} to make", flush=True)
    for key, result in run_each(run_point, list(missing.items()), jobs, "points"):
        results[key] = result
        write_json(file, results)
    return [table_line(p, results[key]) for (_, key), p in keyed.items()]


# ---------------------------------------------------------------------------------------- the table


def axes(values: dict, layout: str) -> tuple[float | None, float | None]:
    """`forget` and `utility`, the axes of the frontier: ROUGE-L of the forget rows, and its mean
    over retain rows and, if the data have any, world facts; on LUME the mean of ROUGE-L and exact
    match, of forget and of retain rows. Exact match is string equality throughout."""
    names = (("forget.rouge_l",), ("retain.rouge_l", "world_facts.rouge_l"))
    if layout == "lume":
        names = tuple((f"{x}.rouge_l", f"{x}.exact_match") for x in ("forget", "retain"))
    numbers = [[values[n] for n in axis if n in values] for axis in names]
    return tuple(evaluation.mean(x) if x else None for x in numbers)


def table_line(p: Point, result: dict) -> dict:
    """A point as a line of sweep.csv: {column: value}."""
    s, values = p.settings, result["values"]
    forget, utility = axes(values, s.layout)
    aggregate = values.get("aggregate_exact_match", values.get("aggregate"))
    numbers = dict(forget=forget, utility=utility, aggregate=aggregate)
    numbers |= {name: values.get(name) for name in VALUES}
    cells = {name: "" if x is None else f"{x:.5f}" for name, x in numbers.items()}
    return cells | dict(
        sweep=p.sweep, arm=p.arm, seed=s.seed, lr=f"{s.lr:.4g}", epochs=s.epochs,
        threshold=s.threshold, steps=s.steps, critical=result.get("critical", ""),
        varied=" ".join(f"{k}={v}" for k, v in p.changes.items()), error=result.get("error", ""))


def write_tables(out: Path, lines: list[dict], first: Settings):
    """sweep.csv; scores.csv of the first run; settings.json of that run."""
    write_csv(out / "sweep.csv", COLUMNS, [[line[c] for c in COLUMNS] for line in lines])
    scores = load_file(first.run / "attribution" / "scores.safetensors")
    forget, retain = scores["forget"], scores["retain"]
    write_csv(out / "scores.csv", ("layer", "neuron", "forget", "retain"), [
        (l, k, f"{forget[l, k]:.6g}", f"{retain[l, k]:.6g}")
        for l, k in itertools.product(*map(range, forget.shape))])
    write_json(out / "settings.json", bare_names(dataclasses.asdict(first)))
    print(table(list(SHOWN), [[line[c] for c in SHOWN] for line in lines]))


# ------------------------------------------------------------------------------------- command line


def read_options(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """Options of the sweep, and settings."""
    parser = settings.Parser(prog="python -m pipeline sweep", description=__doc__,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=settings.BENCHMARKS)
    parser.add_argument("model", nargs="?", default="tiny-llama")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1 (default 3)")
    parser.add_argument("--arms", nargs="+", default=ARMS, metavar="ARM",
                        help=f"METHOD[-MASK][-OBJECTIVE] (default {' '.join(ARMS)})")
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS, metavar="X",
                        help="learning rates, as multiples of the recipe's for the arm's method")
    parser.add_argument("--variants", action=argparse.BooleanOptionalAction, default=True,
                        help=f"also m, t and masks at {VARIANT} of the rate, on seed 0")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME=VALUE,...",
                        help="in place of factors and variants: a setting and its values; of "
                             "several, every combination")
    parser.add_argument("--jobs", type=int, default=0, help="processes; default: as the model fits")
    settings.add_options(parser, skip=("benchmark", "model", "seed", "name", *OF_ARMS))
    options = vars(parser.parse_args(argv))
    options["model"] = settings.model_at(options["model"])
    if options["benchmark"] == "demo":
        options.setdefault("epochs", 10)  # so that it ends in half an hour
    sweep = argparse.Namespace(**{name: options.pop(name) for name in (
        "seeds", "arms", "factors", "variants", "vary", "jobs")})
    if sweep.seeds < 1 or sweep.jobs < 0 or min(sweep.factors) <= 0:
        raise UserError("--seeds must be 1 or more, --jobs 0 or more, --factors positive")
    return sweep, options


def main(argv: list[str]):
    """Every method over learning rates, seeds and any setting that --vary names, in one table."""
    sweep, options = read_options(argv)
    base = settings.resolve(options)
    out = Path(base.out or settings.HERE / "runs" / f"sweep-{base.benchmark}-{base.label}")
    homes = [settings.resolve(options | dict(seed=seed, out=str(out / f"seed{seed}")))
             for seed in range(sweep.seeds)]
    if sweep.vary:
        points = plan_points(options, homes, sweep.arms, (), False, read_grid(sweep.vary))
    else:
        points = plan_points(options, homes, sweep.arms, sweep.factors, sweep.variants, [])
    runs = {p.settings.run: p.settings for p in points} | {home.run: home for home in homes}
    jobs = sweep.jobs or ((os.cpu_count() or 1) if base.tiny else 1)
    with lock(out, new=True):
        for part in (homes, [s for s in runs.values() if s not in homes]):
            list(run_each(prepare, part, jobs, "originals and attribution"))
        write_tables(out, make_points(points, out / "points.json", jobs), homes[0])
