"""Methods over a grid of settings and seeds, judged alike, in one table.

    python -m pipeline sweep demo tiny-llama --seeds 3        in runs/sweep-demo-tiny-llama/
    python -m pipeline sweep demo tiny-llama --vary lr=1e-4,3e-4 --vary lam=1,2
    python -m pipeline sweep demo tiny-llama --part 2/8       every eighth point, from the second on

A *point* is one unlearned model: an arm (method, mask, objective) with its settings, judged on
every row of the slice by what the frontier needs and then dropped. Without --vary the points are
every arm at a range of learning rates, and SIMU at several m, t and masks; with it, every arm at
every combination of the values named.

A point's line in points.jsonl is never computed twice, unless what it depends on changed. seed<k>/
is a run like any other (original, attribution); seed<k>-steps=<m>/ is the same original attributed
with m nodes, seed<k>-width=<D>/ another original. At the end sweep.csv lists the points, scores.csv
the first seed's scores, settings.json the rest: all that figures.py reads.

The parts of an array job share the folder, and each appends to a points-K-of-N.jsonl of its own.
The same command without --part then makes the table of them all.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

import data
import eval as evaluation
import simu
from model import Transformer, UserError, write_json
from pipeline import objectives, reading, settings, slices
from pipeline.columns import table
from pipeline.files import has_types, read_tensors, sha256
from pipeline.original import original_stage
from pipeline.reach import code_digest
from pipeline.settings import (Aside, Level, Making, Placement, Settings, Source, load_benchmark,
                               placement, taken)
from pipeline.stage import claim, content, data_inputs, digest, lock, table_rows
from pipeline.levels import forget_targets
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
SLACK = 0.05  # of forget above retain-only's, within which a point has forgotten
BASELINES = ("original", "retain-only")
SWEEPS = ("baseline", "frontier", "vary", "m", "t", "mask")
VALUES = ("forget.rouge_l", "forget.exact_match", "retain.rouge_l", "retain.exact_match",
          "world_facts.rouge_l", "world_facts.exact_match", "mia.auc")
COLUMNS = ("sweep", "arm", "seed", "lr", "epochs", "threshold", "steps", "critical", "forget",
           "utility", "aggregate", *VALUES, "varied", "error")
OF_ORIGINAL = {f.name for t in (slices.Slice, Placement, Making) for f in fields(t)}
OF_ATTRIBUTION = {f.name for f in fields(simu.Attribution)}
OF_ARMS = ("method", "mask", "objective")
MAY_VARY = {f.name: f for t in (slices.Slice, Placement, Making, objectives.Recipe, Level,
                                evaluation.Limits)
            for f in fields(t) if f.name not in ("seed", *OF_ARMS)}


# ---------------------------------------------------------------------------------- what to compute


@dataclass(frozen=True)
class Point:
    """One model to judge. varied: what --vary set of it. key: digest of all its result depends on;
    known once its run's original and attribution are made."""

    sweep: str
    arm: str
    settings: Settings
    varied: dict = field(default_factory=dict, hash=False)
    wanted: bool = True  # False: in the table only if it is made already
    key: str = ""


@dataclass(frozen=True)
class Run:
    """A run folder of the sweep, and the one whose original it shares (its own, or its seed's)."""

    settings: Settings
    original: Path


def arm_settings(arm: str) -> dict:
    """method, mask and objective of an arm's name: simu, so-npo, simu-random, simu-soft-npo."""
    for method, mask, objective in itertools.product(simu.METHODS, simu.MASKS, simu.OBJECTIVES):
        names = [n for n in (method, mask, objective) if n not in ("dual", "graddiff")]
        if arm == "-".join(names) and (mask == "dual" or simu.METHODS[method].masked):
            return dict(method=method, mask=mask, objective=objective)
    raise UserError(f"arm {arm!r} is unknown; an arm is a method ({', '.join(simu.METHODS)}), of "
                    f"those with a mask another kind of it ({', '.join(list(simu.MASKS)[1:])}), "
                    f"and an objective ({', '.join(list(simu.OBJECTIVES)[1:])}), joined by dashes")


def read_grid(given: list[str]) -> list[dict]:
    """The product of all --vary NAME=VALUE,...: [{name: value}]."""
    axes = {}
    for text in given:
        name, _, values = text.partition("=")
        name = name.replace("-", "_")
        if name not in MAY_VARY:
            raise UserError(f"--vary {text}: {name or 'nothing'} cannot be varied here; methods, "
                            "masks and objectives are --arms, seeds are --seeds, and a setting is "
                            "named as its option is: --vary lr=1e-4,3e-4")
        kind = MAY_VARY[name].type
        read = settings.number(kind) if kind in (int, float) else (
            {"true": True, "false": False}.__getitem__ if kind is bool else kind)
        try:
            axes[name] = list(dict.fromkeys(read(value) for value in values.split(",")))
        except (ValueError, KeyError):
            raise UserError(f"--vary {text}: values of {name} are {kind.__name__}s"
                            + (", true or false" if kind is bool else "")) from None
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def plan_run(given: dict, seed: int, changed: dict) -> Run:
    """The run of a seed, and beside it those of settings that its original or attribution sees."""
    base = settings.resolve(given | dict(seed=seed))
    changed = {k: v for k, v in changed.items() if v != getattr(base, k)}

    def folder(names):
        words = (f"{k}={re.sub(r'[^A-Za-z0-9_.+-]', '_', str(v))}" for k, v in changed.items()
                 if k in names)
        return base.run / "-".join((f"seed{seed}", *words))

    own = {k: v for k, v in changed.items() if k in OF_ORIGINAL | OF_ATTRIBUTION}
    s = settings.resolve(given | own | dict(seed=seed, out=str(folder(own))))
    return Run(s, folder(OF_ORIGINAL))


def plan_points(given: dict, *, arms, factors, seeds: int, variants: bool, grid: list[dict],
                earlier: list[dict]) -> tuple[list[Point], dict[Path, Run]]:
    """Every point, and the runs they are computed in. One point may stand in several sweeps.
    earlier: lines of points.jsonl; those of a frontier that still hold stand in it with the new."""
    runs = {}

    def point(sweep, arm, seed, *, factor=1.0, varied=(), wanted=True, **changed):
        changed |= dict(varied)
        run = plan_run(given, seed, changed)
        shared = plan_run(given, seed, {k: v for k, v in changed.items() if k in OF_ORIGINAL})
        for x in (shared, run):
            runs.setdefault(x.settings.run, x)
        kind = {} if arm in BASELINES else arm_settings(arm)
        s = settings.resolve(given | kind | changed | dict(seed=seed, out=run.settings.out))
        return Point(sweep, arm, dataclasses.replace(s, lr=s.lr * factor), dict(varied), wanted)

    every = range(seeds)
    points = [point("baseline", arm, k) for k in every for arm in BASELINES]
    points += [point("frontier", arm, k, factor=f) for k in every for arm in arms for f in factors]
    points += [point("vary", arm, k, varied=x) for k in every for arm in arms for x in grid]
    if variants:
        points += [point("m", "simu", 0, factor=VARIANT, steps=m) for m in STEPS]
        points += [point("t", "simu", 0, factor=VARIANT, threshold=t) for t in THRESHOLDS]
        points += [point("mask", "simu" if m == "dual" else f"simu-{m}", 0, factor=VARIANT)
                   for m in simu.MASKS]
    points += [point("frontier", x["arm"], x["seed"], lr=x["lr"], wanted=False)
               for x in earlier if x["frontier"] and x["seed"] < seeds]
    return points, runs


def find_key(p: Point, contents: dict) -> str:
    """Digest of all that a point's numbers depend on. contents: digests of folders read so far."""
    s, parts = p.settings, ["original"]
    takes = [slices.Slice, Source, Placement, Aside, evaluation.Limits]
    if p.arm in BASELINES:
        parts = [p.arm]
    else:
        takes.append(objectives.Unlearning)
        if simu.METHODS[s.method].masked:
            takes.append(simu.Masking)
            parts.append("attribution")
        if simu.OBJECTIVES[s.objective].targeted:
            takes.append(Level)
            parts += ["retain-only"] if s.level == "retain-only" else []
    for folder in (s.run / part for part in parts):
        if folder not in contents:
            contents[folder] = content(folder)
    if s.run not in contents:
        contents[s.run] = data_inputs(s)
    return digest([p.arm, taken(s, tuple(takes)), [contents[s.run / part] for part in parts],
                   contents[s.run], code_digest((make_point,), table_rows(s, tuple(takes)))])


# -------------------------------------------------------------------------------------- one point


def prepare(run: Run):
    """original/ and attribution/ of a run. Waits where another part of an array job makes them."""
    claim(run.settings.run)
    while True:
        try:
            with lock(run.settings.run):
                return prepare_held(run)
        except UserError as e:
            if "in use by another process" not in str(e):
                raise
        time.sleep(1)


def prepare_held(run: Run):
    folder = run.settings.run
    if folder == run.original:
        original_stage(run.settings)
    else:
        for name in ("original", "settings.json"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(Path("..") / run.original.name / name)
    attribute_stage(run.settings)


def bare(rows: list[data.Example]) -> list[data.Example]:
    """The rows without what only `accuracy` and truth ratios need."""
    return [dataclasses.replace(e, paraphrased_question="", paraphrased_answer="",
                                perturbed_answers=()) for e in rows]


def lean(bench: slices.Benchmark) -> slices.Benchmark:
    """The benchmark without what only `accuracy`, truth ratios and real authors need."""
    return dataclasses.replace(bench, forget=bare(bench.forget), retain_eval=bare(
        bench.retain_eval), world_facts=bare(bench.world_facts), real_authors=[])


def judge(model: Transformer, bench: slices.Benchmark, s: Settings) -> dict:
    """The metrics of a model of run s that have a value."""
    tokenizer = load_tokenizer(s.run / "original")
    metrics, _ = evaluation.evaluate_model(model, tokenizer, lean(bench), template=s.template,
                                           limits=s, generate=reading.generate,
                                           token_scores=reading.token_scores)
    return {k: v for k, v in metrics["values"].items() if v is not None}


def mask_for(s: Settings):
    """M [L, D] where the method of s wants one."""
    return mask_of_scores(s) if simu.METHODS[s.method].masked else None


def unlearned(s: Settings, title: str = "unlearn") -> tuple[Transformer, list[dict]]:
    """The run's original, unlearned as s says, and the log of it."""
    bench, rows = encoded_rows(s, s.objective)
    model = Transformer.from_pretrained(s.run / "original", **placement(s))
    targets = None
    if simu.OBJECTIVES[s.objective].targeted:
        targets, _ = forget_targets(s, bench, rows["forget"], model, s.seed)
    return model, simu.unlearn(model, rows["forget"], rows["retain"], mask_for(s), s,
                               targets=targets, title=title)


def make_point(p: Point) -> dict:
    """Unlearn and judge one point: what its line of points.jsonl says of the result."""
    s, result = p.settings, {}
    if p.arm in BASELINES:
        model = Transformer.from_pretrained(s.run / p.arm, **placement(s))
    else:
        if (mask := mask_for(s)) is not None:
            result["critical"] = int((mask != 0).sum())
        try:
            model, _ = unlearned(s)
        except UserError as e:
            if "not finite" not in str(e):
                raise
            return result | dict(error="diverged", values={})
    return result | dict(values=judge(model, load_benchmark(s), s))


def run_point(p: Point) -> dict:
    """The line of points.jsonl."""
    start = time.monotonic()
    if p.settings.tiny and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as the stages do
    about = dict(key=p.key, arm=p.arm, seed=p.settings.seed, lr=p.settings.lr,
                 frontier=p.sweep == "frontier")
    return about | make_point(p) | dict(seconds=round(time.monotonic() - start, 1))


# ------------------------------------------------------------------------------------- many points


LINE = dict(key=str, arm=str, seed=int, frontier=bool, values=dict)  # of points.jsonl
NOTES = dict(critical=int, error=str)  # where a line has them
BEGINS = '{"key": "'  # each line, also a torn one


def is_line(line) -> bool:
    """Does a JSON value have the shape, and the digest, of a line that a sweep wrote?"""
    return (has_types(line, LINE) and has_types(line, {k: NOTES[k] for k in NOTES if k in line})
            and line.pop("digest", "") == digest(line) and 0 <= line["seed"] < settings.LIMIT
            and (line["arm"] in BASELINES or bool(arm_settings(line["arm"])))
            and all(type(x) in (int, float) and math.isfinite(x)
                    for x in (line.get("lr"), *line["values"].values())))


def read_lines(path: Path) -> list[dict]:
    """The lines of a points*.jsonl. One that a killed process tore at the file's end is left out;
    UserError for any other that no sweep wrote."""
    if not path.is_file() or path.is_symlink():  # a pipe would be waited for
        raise UserError(f"{path} is not a plain file; delete it")
    whole, _, torn = path.read_text(encoding="ascii", errors="replace").rpartition("\n")
    lines = []
    if not torn.startswith(BEGINS[:len(torn)]):
        whole += torn
    for n, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            good = is_line(line)
        except (ValueError, RecursionError, UserError):
            good = False
        if not good:
            raise UserError(f"{path} line {n} is damaged, edited or of another version; delete it, "
                            "and the same command makes its point again")
        lines.append(line)
    return lines


def open_lines(path: Path):
    """A points*.jsonl to append to, without what a killed process tore."""
    if path.is_file():
        end = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, end)
    return open(path, "a", encoding="ascii")


def write_line(file, line: dict):
    file.write(json.dumps(line | dict(digest=digest(line))) + "\n")
    file.flush()


def made_before(out: Path) -> dict[str, dict]:
    """{key: line} of every points*.jsonl in a sweep's folder."""
    return {line["key"]: line for path in sorted(out.glob("points*.jsonl"))
            for line in read_lines(path)}


def prepare_runs(runs: list[Run], jobs: int):
    """Those with an original of their own first: others link to it."""
    for own in (True, False):
        some = [r for r in runs if (r.settings.run == r.original) == own]
        for _ in run_each(prepare, some, jobs, "originals and attribution"):
            pass


def make_points(points: list[Point], made: dict[str, dict], file: Path, jobs: int) -> list[Point]:
    """Compute what is missing in `made`, which is filled, and append it to `file`. Returns the
    points of the table, each once a sweep, with their keys."""
    contents, keyed = {}, {}
    for p in points:
        if p.arm in BASELINES and not (p.settings.run / p.arm).is_dir():
            continue  # not every run has a retain-only
        p = dataclasses.replace(p, key=find_key(p, contents))
        if p.wanted or p.key in made:
            keyed.setdefault((p.sweep, p.key), p)
    # A frontier's points first: what is in a frontier and in a sweep of t is marked as the former.
    missing = {p.key: p for p in sorted(keyed.values(), key=lambda p: p.sweep != "frontier")
               if p.key not in made}
    print(f"{len({key for _, key in keyed})} points, {len(missing)} to make", flush=True)
    with open_lines(file) as out:
        for line in run_each(run_point, list(missing.values()), jobs, "points"):
            made[line["key"]] = line
            write_line(out, line)
    return list(keyed.values())


# -------------------------------------------------------------------------------------- the table


def axes(values: dict, layout: str) -> tuple[float | None, float | None]:
    """`forget` and `utility`, the axes of the frontier: ROUGE-L of the forget rows, and its mean
    over retain rows and, where there are any, world facts; on LUME the mean of ROUGE-L and exact
    match, of forget and of retain rows. Exact match is string equality throughout."""
    names = (("forget.rouge_l",), ("retain.rouge_l", "world_facts.rouge_l"))
    if layout == "lume":
        names = tuple((f"{x}.rouge_l", f"{x}.exact_match") for x in ("forget", "retain"))
    there = [[values[n] for n in some if n in values] for some in names]
    return tuple(evaluation.mean(x) if x else None for x in there)


def table_row(p: Point, line: dict) -> list:
    """A point as a row of COLUMNS."""
    s, v = p.settings, line["values"]
    aggregate = v.get("aggregate_exact_match", v.get("aggregate"))
    numbers = (*axes(v, s.layout), aggregate, *(v.get(n) for n in VALUES))
    return [p.sweep, p.arm, s.seed, f"{s.lr:.4g}", s.epochs, s.threshold, s.steps,
            line.get("critical", ""), *("" if x is None else f"{x:.5f}" for x in numbers),
            " ".join(f"{k}={v}" for k, v in p.varied.items()), line.get("error", "")]


def write_tables(out: Path, points: list[Point], made: dict[str, dict], first: Settings):
    """sweep.csv, scores.csv of the first run, settings.json: what the points have in common, and
    digests of all three; the means on stdout."""
    arms = list(dict.fromkeys(p.arm for p in points))
    points = sorted(points, key=lambda p: (SWEEPS.index(p.sweep), arms.index(p.arm),
                                           p.settings.seed, p.settings.lr))
    rows = [table_row(p, made[p.key]) for p in points]
    scores = read_tensors(first.run / "attribution" / "scores.safetensors", ("forget", "retain"))
    write_csv(out / "sweep.csv", COLUMNS, rows)
    write_csv(out / "scores.csv", ("layer", "neuron", "forget", "retain"), [
        (l, k, f"{f:.6g}", f"{r:.6g}") for l, pair in enumerate(zip(*(x.tolist() for x in scores)))
        for k, (f, r) in enumerate(zip(*pair))])
    own = {"seed", "lr", "lam", *OF_ARMS, *settings.PLACES}.union(*(p.varied for p in points))
    of_scores = ("threshold", "steps")  # of the first run, varied or not: masks are drawn with them
    common = {k: v for k, v in dataclasses.asdict(first).items() if k not in own or k in of_scores}
    tables = {name: sha256(out / name) for name in ("sweep.csv", "scores.csv")}
    write_json(out / "settings.json", common | dict(sha256=tables | dict(settings=digest(common))))
    print_means(rows)


def print_means(rows: list[list]):
    """Means over seeds, a line per sweep, arm and setting, and what a recipe would keep of them."""
    shown = ("sweep", "arm", "lr", "epochs", "threshold", "steps", "varied")
    groups, lines = {}, []
    for row in (dict(zip(COLUMNS, row)) for row in rows):
        groups.setdefault(tuple(str(row[k]) for k in shown), []).append(row)
    for key, some in groups.items():
        line = dict(zip(shown, key)) | dict(seeds=len(some))
        for name in ("forget", "utility", "aggregate"):
            there = [float(row[name]) for row in some if row[name]]
            line[name] = f"{evaluation.mean(there):.3f}" if there else some[0]["error"] or "–"
        lines.append(line)
    print(table(list(lines[0]), [list(line.values()) for line in lines]))
    print_kept(lines)


def print_kept(lines: list[dict]):
    """Of each arm, the line of most utility among those that leave at most SLACK more of the forget
    set than retain-only does."""
    ideal = [x for x in lines if x["arm"] == "retain-only" and x["forget"][0].isdigit()]
    tried = [x for x in lines if x["sweep"] in ("frontier", "vary")]
    for arm in dict.fromkeys(x["arm"] for x in tried if ideal):
        forgot = [x for x in tried if x["arm"] == arm and x["utility"][0].isdigit()
                  and float(x["forget"]) <= float(ideal[0]["forget"]) + SLACK]
        best = max(forgot, key=lambda x: float(x["utility"]), default=None)
        print(f"kept for {arm}: " + (
            f"lr {best['lr']} {best['varied']} (utility {best['utility']})" if best else
            "none forgets as far as retain-only"))


# ---------------------------------------------------------------------------------- command line


def part_of(text: str) -> tuple[int, int]:
    """K/N, the K-th of N parts."""
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
    if not found or int(found[1]) > int(found[2]):
        raise UserError(f"--part {text} must be K/N with K from 1 to N, such as 2/8")
    return int(found[1]), int(found[2])


def read_options(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """Options of the sweep, and the settings given."""
    parser = settings.Parser(prog="python -m pipeline sweep", description=__doc__,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=settings.BENCHMARKS)
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1 (default 3)")
    parser.add_argument("--arms", nargs="+", default=ARMS, metavar="ARM",
                        help=f"METHOD[-MASK][-OBJECTIVE] (default {' '.join(ARMS)}); methods: "
                             f"{', '.join(simu.METHODS)}")
    parser.add_argument("--factors", nargs="+", type=float, metavar="X", help="learning rates, as "
                        "multiples of the recipe's for the arm's method; none by default with "
                        f"--vary, else {' '.join(map(str, FACTORS))}")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME=VALUE,...",
                        help="a setting and its values; of several, every combination")
    parser.add_argument("--variants", action=argparse.BooleanOptionalAction,
                        help=f"also m, t and masks at {VARIANT} of the rate, on seed 0; by default "
                             "unless --vary is given")
    parser.add_argument("--jobs", type=int, default=0, help="processes; default: one per core for "
                        "tiny models, else one")
    parser.add_argument("--part", type=part_of, metavar="K/N", help="make every N-th point alone, "
                        "from the K-th on; no table")
    settings.add_options(parser, skip=("benchmark", "model", "seed", "name", "eval_epochs",
                                       *OF_ARMS))
    given = vars(parser.parse_args(argv))
    own = argparse.Namespace(**{k: given.pop(k) for k in (
        "seeds", "arms", "factors", "vary", "variants", "jobs", "part")})
    own.grid = read_grid(own.vary) if own.vary else []
    own.factors = own.factors or (() if own.vary else FACTORS)
    own.variants = not own.vary if own.variants is None else own.variants
    if not (1 <= own.seeds < 10000 and own.jobs >= 0 and all(0 < f < 1e6 for f in own.factors)):
        raise UserError("--seeds must be 1 to 9999, --jobs 0 or more, --factors positive")
    return own, given


def main(argv: list[str]):
    """Every method over learning rates, seeds and any setting that --vary names, in one table."""
    own, given = read_options(argv)
    base = settings.resolve(given)
    out = Path(base.out or settings.HERE / "runs" / f"sweep-{base.benchmark}-{base.label}")
    given |= dict(out=str(out))
    grid = dict(arms=own.arms, factors=own.factors, seeds=own.seeds, variants=own.variants,
                grid=own.grid)
    plan_points(given, **grid, earlier=[])  # refuses before anything is made
    claim(out)
    jobs = own.jobs or ((os.cpu_count() or 1) if base.tiny else 1)
    with nullcontext() if own.part else lock(out):
        made = made_before(out)
        points, runs = plan_points(given, **grid, earlier=[] if own.part else made.values())
        name = "points.jsonl"
        if own.part:
            k, n = own.part
            points, name = list(dict.fromkeys(points))[k - 1::n], f"points-{k}-of-{n}.jsonl"
        needed = {p.settings.run for p in points}
        needed |= {runs[folder].original for folder in needed}
        prepare_runs([run for folder, run in runs.items() if folder in needed], jobs)
        points = make_points(points, made, out / name, jobs)
        if own.part:
            return print(f"part {k} of {n} is made; without --part the command makes the table")
        write_tables(out, points, made, runs[out / "seed0"].settings)
