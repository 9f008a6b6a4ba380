"""Every method over a grid of learning rates and seeds, and SIMU over m, t and masks, in one table.

    python simu.py sweep demo tiny-llama --seeds 3        in runs/sweep-demo-tiny-llama/

A *point* is one unlearned model: an arm (method, mask, objective) with its settings, judged on
every row of the slice by what the frontier needs and then dropped. Its line in points.jsonl is
never computed twice, unless what it depends on changed. seed<k>/ is a run like any other (original,
attribution); seed<k>-m<m>/ is the same original attributed with m nodes. At the end sweep.csv lists
the points, scores.csv the first seed's scores, settings.json the rest: all that figures.py reads.
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import stage  # before torch: it silences a warning of torch's import

import torch
from tqdm import tqdm

import data
import eval as evaluation
import simu
from model import Transformer
from stage import MASKS, OBJECTIVES, Settings, UserError

ARMS = ("fo", "so", "simu", "simu-random")
# Of the recipe's rate for the arm's method: close where forgetting sets in, and far beyond it,
# where FO and SO, whose recipes are lower, can be at their best again.
FACTORS = (0.0625, 0.0884, 0.125, 0.177, 0.25, 0.354, 0.5, 1, 2, 4)
VARIANT = 0.0884  # for m, t and masks: there forgetting is not yet complete, and shows what they do
STEPS = (2, 3, 5, 8, 10)  # m of Figure 2
THRESHOLDS = tuple(i / 10 for i in range(1, 11))  # t of Figure 3
BASELINES = ("original", "retain-only")
SWEEPS = ("baseline", "frontier", "m", "t", "mask")
VALUES = ("forget.rouge_l", "forget.exact_match", "retain.rouge_l", "retain.exact_match",
          "world_facts.rouge_l", "world_facts.exact_match", "mia.auc")
COLUMNS = ("sweep", "arm", "seed", "lr", "epochs", "threshold", "steps", "critical", "forget",
           "utility", "aggregate", *VALUES, "error")
DEPENDS = simu.UNLEARN + ("threshold", "steps", "path", "mask", "max_new_tokens",
                          "max_total_tokens")


def arm_settings(arm: str) -> dict:
    """method, mask and objective of an arm's name: simu, so-npo, simu-random, simu-soft-npo."""
    for method, mask, objective in itertools.product(stage.METHODS, MASKS, OBJECTIVES):
        names = [n for n in (method, mask, objective) if n not in ("dual", "graddiff")]
        if arm == "-".join(names) and (mask == "dual" or method == "simu"):
            return dict(method=method, mask=mask, objective=objective)
    raise UserError(f"arm {arm!r} is unknown; an arm is fo, so or simu, for simu with a mask "
                    f"({', '.join(MASKS[1:])}), and an objective ({', '.join(OBJECTIVES[1:])})")


def plan_points(given: dict, arms, factors, seeds: int, variants: bool,
                earlier: list[dict]) -> list[dict]:
    """sweep, arm and settings of every point; one point may stand in several sweeps. earlier:
    lines of points.jsonl; those of a frontier that still hold stand in it with the new ones."""
    def point(sweep, arm, seed, factor=1.0, **changed):
        kind = {} if arm in BASELINES else arm_settings(arm)
        s = simu.resolve(given | kind | changed | dict(seed=seed))
        steps = f"-m{s.steps}" if "steps" in changed else ""
        s = dataclasses.replace(s, lr=s.lr * factor, out=str(s.run / f"seed{seed}{steps}"))
        return dict(sweep=sweep, arm=arm, settings=s, wanted=True)

    bases = BASELINES[:1] if given.get("weights") else BASELINES  # no retain-only of --weights
    points = [point("baseline", arm, k) for k in range(seeds) for arm in bases]
    points += [point("frontier", arm, k, f) for k in range(seeds) for arm in arms for f in factors]
    if variants:
        points += [point("m", "simu", 0, VARIANT, steps=m) for m in STEPS]
        points += [point("t", "simu", 0, VARIANT, threshold=t) for t in THRESHOLDS]
        points += [point("mask", "simu" if m == "dual" else f"simu-{m}", 0, VARIANT)
                   for m in MASKS]
    return points + [point("frontier", x["arm"], x["seed"], lr=x["lr"]) | dict(wanted=False)
                     for x in earlier if x.get("frontier") and x["seed"] < seeds]


def prepare(s: Settings):
    """original/ and attribution/ of one seed, or of one m beside its seed's original."""
    source = s.run.with_name(f"seed{s.seed}")
    if s.run == source:
        simu.original_stage(s)
    else:
        s.run.mkdir(exist_ok=True)
        for name in ("original", "settings.json"):
            (s.run / name).unlink(missing_ok=True)
            (s.run / name).symlink_to(Path("..") / source.name / name)
    simu.attribute_stage(s)


def lean(bench: data.Benchmark) -> data.Benchmark:
    """The rows without what only `accuracy`, truth ratios and real authors need."""
    def bare(rows):
        return [dataclasses.replace(e, paraphrased_question="", paraphrased_answer="",
                                    perturbed_answers=()) for e in rows]

    return dataclasses.replace(bench, forget=bare(bench.forget), retain_eval=bare(
        bench.retain_eval), world_facts=bare(bench.world_facts), real_authors=[])


def run_point(job: tuple[str, str, Settings]) -> dict:
    """Unlearn and judge one point: the line of points.jsonl."""
    fingerprint, arm, s = job
    start = time.monotonic()
    bench, encoded = simu.encoded_rows(s, objective=s.objective)
    folder = s.run / (arm if arm in BASELINES else "original")
    model = Transformer.from_pretrained(folder, **stage.placement(s))
    line, mask = dict(fingerprint=fingerprint, arm=arm, seed=s.seed, lr=s.lr), None
    if arm not in BASELINES:
        if s.method == "simu":
            scores = simu.read_tensors(s.run / "attribution" / "scores.safetensors",
                                       ("forget", "retain"))
            mask = simu.make_mask(s.mask, *scores, threshold=s.threshold, seed=s.seed)
            line["critical"] = int((mask != 0).sum())
        try:
            with tempfile.TemporaryDirectory() as log:
                simu.unlearn(model, encoded["forget"], encoded["retain"], mask, s,
                             Path(log) / "log.jsonl")
        except UserError as e:
            if "not finite" not in str(e):
                raise
            return line | dict(error="diverged", values={})
    metrics, _ = evaluation.evaluate_model(model, data.load_tokenizer(folder), lean(bench), s)
    return line | dict(values={k: v for k, v in metrics["values"].items() if v is not None},
                       seconds=round(time.monotonic() - start, 1))


def fingerprint(arm: str, s: Settings, digests: dict, code: str) -> str:
    inputs = {name: stage.fingerprint(s.run / name) for name in ("original", "attribution")}
    why = [arm, stage.resolved(s, DEPENDS), inputs, digests, code]
    return hashlib.sha256(json.dumps(why, sort_keys=True).encode()).hexdigest()[:16]


def _start_worker(threads: int):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says it once
    sys.stderr = open(os.devnull, "w")  # bars of its own; what it raises, the parent shows
    torch.set_num_threads(threads)


def _each(function, items: list, jobs: int, title: str):
    """function of each item, as they come, `jobs` processes at a time, with a bar."""
    with tqdm(total=len(items), desc=title) as bar:
        if jobs == 1 or not items:
            for item in items:
                yield function(item)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // jobs)
        with context.Pool(min(jobs, len(items)), _start_worker, (threads,)) as pool:
            for result in pool.imap_unordered(function, items):
                yield result
                bar.update()
            pool.close()
            pool.join()


def sweep(out: Path, points: list[dict], lines: list[dict], jobs: int):
    """Make what is missing of `points` in `out`; sweep.csv, scores.csv, settings.json; the table.
    lines: those of points.jsonl."""
    runs = {p["settings"].run: p["settings"] for p in reversed(points)}  # the baseline's settings
    runs = dict(reversed(runs.items()))
    seeds = [s for run, s in runs.items() if "-m" not in run.name]
    for some in (seeds, [s for s in runs.values() if s not in seeds]):  # seeds first
        for _ in _each(prepare, some, jobs, "originals and attribution"):
            pass
    digests, code = data.data_digests(seeds[0]), stage.code_digest(simu.CODE + ("eval", "sweep"))
    for p in points:
        p["fingerprint"] = fingerprint(p["arm"], p["settings"], digests, code)
    made = {x["fingerprint"]: x for x in lines}
    points = {(p["sweep"], p["fingerprint"]): p for p in reversed(points)  # the wanted ones win
              if p["wanted"] or p["fingerprint"] in made}
    points = list(reversed(points.values()))
    missing = {p["fingerprint"]: (p["fingerprint"], p["arm"], p["settings"]) for p in points
               if p["fingerprint"] not in made}
    print(f"{len({p['fingerprint'] for p in points})} points, {len(missing)} to make", flush=True)
    frontier = {p["fingerprint"] for p in points if p["sweep"] == "frontier"}
    with open(out / "points.jsonl", "a", encoding="ascii") as file:
        for line in _each(run_point, list(missing.values()), jobs, "points"):
            line["frontier"] = line["fingerprint"] in frontier
            made[line["fingerprint"]] = line
            file.write(json.dumps(line) + "\n")
            file.flush()
    arms = list(dict.fromkeys(p["arm"] for p in points))
    points.sort(key=lambda p: (SWEEPS.index(p["sweep"]), arms.index(p["arm"]),
                               p["settings"].seed, p["settings"].lr))
    rows = [table_row(p, made[p["fingerprint"]]) for p in points]
    about = dataclasses.asdict(seeds[0])  # what the points have in common, for figures.py
    stage.write_json(out / "settings.json", {k: v for k, v in about.items() if k not in (
        "seed", "method", "mask", "objective", "lr", "lam", "data", "weights", "out")})
    write_csv(out / "sweep.csv", COLUMNS, rows)
    scores = simu.read_tensors(seeds[0].run / "attribution" / "scores.safetensors",
                               ("forget", "retain"))
    write_csv(out / "scores.csv", ("layer", "neuron", "forget", "retain"), [
        (l, k, f"{f:.6g}", f"{r:.6g}") for l, pair in enumerate(zip(*(x.tolist() for x in scores)))
        for k, (f, r) in enumerate(zip(*pair))])
    print_table(rows)


def table_row(point: dict, line: dict) -> list:
    """A point as a row of COLUMNS. `forget` and `utility` are the axes of the frontier: on TOFU
    ROUGE-L of the forget rows, and its mean over retain and world facts; on LUME ROUGE-L and exact
    match, averaged, of forget and of retain rows. EM is string equality throughout."""
    s, v = point["settings"], line["values"]
    lume = s.benchmark == "lume"
    axes = (("forget.rouge_l", "forget.exact_match"), ("retain.rouge_l", "retain.exact_match")
            ) if lume else (("forget.rouge_l",), ("retain.rouge_l", "world_facts.rouge_l"))
    forget, utility = (evaluation.mean(v[n] for n in names) if v else None for names in axes)
    aggregate = v.get("aggregate" if lume else "aggregate_exact_match")
    known = [point["sweep"], point["arm"], s.seed, f"{s.lr:.4g}", s.epochs, s.threshold, s.steps,
             line.get("critical", "")]
    return known + ["" if x is None else f"{x:.5f}" for x in (
        forget, utility, aggregate, *(v.get(n) for n in VALUES))] + [line.get("error", "")]


def write_csv(path: Path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    stage.write_text(path, text.getvalue())


def print_table(rows: list[list]):
    """Means over seeds, a line per sweep, arm and setting."""
    from report import table
    groups = {}
    for row in rows:
        groups.setdefault(tuple(map(str, row[:2] + row[3:7])), []).append(row)
    lines = []
    for key, some in groups.items():
        whole = [r for r in some if r[8]]
        means = [f"{evaluation.mean(float(r[i]) for r in whole):.3f}" if whole else "diverged"
                 for i in (8, 9, 10)]
        lines.append([*key, len(some), *means])
    print(table(["sweep", "arm", "lr", "epochs", "t", "m", "seeds", "forget", "utility",
                 "aggregate"], lines))


def main(argv: list[str]):
    """Every method over learning rates and seeds, and SIMU over m, t and masks."""
    parser = stage.parser("simu.py sweep", main.__doc__)
    parser.add_argument("benchmark", choices=stage.BENCHMARKS)
    parser.add_argument("model", choices=stage.MODELS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1 (default 3)")
    parser.add_argument("--arms", nargs="+", default=ARMS, metavar="ARM",
                        help=f"METHOD[-MASK][-OBJECTIVE] (default {' '.join(ARMS)})")
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS, metavar="X",
                        help="learning rates, as multiples of the recipe's for the arm's method")
    parser.add_argument("--variants", action=argparse.BooleanOptionalAction, default=True,
                        help=f"also m, t and masks at {VARIANT} of the rate, on seed 0")
    parser.add_argument("--jobs", type=int, default=0, help="processes; default: one per core for "
                        "tiny models, else one")
    stage.add_options(parser, skip=("benchmark", "model", "seed", "method", "mask", "objective",
                                    "eval_epochs"))
    given = vars(parser.parse_args(argv))
    own = {k: given.pop(k) for k in ("seeds", "arms", "factors", "variants", "jobs")}
    if not (1 <= own["seeds"] < 10000 and own["jobs"] >= 0
            and all(0 < f < 1e6 for f in own["factors"])):
        raise UserError("--seeds must be 1 to 9999, --jobs 0 or more, --factors positive")
    for arm in own["arms"]:
        arm_settings(arm)  # refuses before anything is made
    out = Path(given.get("out") or stage.HERE / "runs" / f"sweep-{given['benchmark']}-"
               f"{given['model']}").expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    tiny = given["model"].startswith("tiny-")
    jobs = own["jobs"] or ((os.cpu_count() or 1) if tiny else 1)
    with stage.lock(out):
        lines = evaluation._whole_lines(out / "points.jsonl")
        points = plan_points(given | dict(out=str(out)), own["arms"], own["factors"],
                             own["seeds"], own["variants"], lines)
        sweep(out, points, lines, jobs)
