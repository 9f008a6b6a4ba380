"""Every figure of the paper, and the frontier, from what a run or a sweep left in its folder.

    python -m pipeline figures                        every folder of benchmarks/results/
    python -m pipeline figures runs/demo-tiny-llama   this one: all that it has the data for

what       reads                               writes to FOLDER/figures/, each with its CSV
---------  ----------------------------------  ------------------------------------------------
frontier   sweep.csv: sweeps frontier and      frontier, equal-forgetting.csv: utility at the
           baseline                            same forgetting, interpolated, with intervals
masks      scores.csv of a sweep, or a run's   figure6 (where critical neurons lie), figure4 (how
           attribution/scores.safetensors      many at which t), layers.csv, table5.csv
variants   sweep.csv: sweeps m, t and mask     figure2, figure3, figure5
losses     of a run: each model's log.jsonl    losses: of forget and retain rows by update

The frontier of one seed: of an arm's points and the original, those that no other beats in both
forgetting and utility, joined by straight lines. Intervals are 95% t-intervals over seeds; a
difference is taken seed by seed, as both arms start from the same original.
"""

import argparse
import csv
import json
import math
import statistics
from pathlib import Path

import torch
from safetensors.torch import load_file

import simu
from model import UserError, read_json
from pipeline.columns import PUBLISHED_CRITICAL, table
from pipeline.settings import HERE, Parser, read_settings
from pipeline.stage import finished_models, read_stage, stale
from studies.drawing import BLACK, BLUE, RED, SKY, STYLES, canvas, save, style_of, write_csv
from studies.sweep import BASELINES, COLUMNS

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5)  # of forget: where utilities are compared
CURVE = tuple(i / 200 for i in range(201))  # of forget: where the frontier is drawn
T_GRID = tuple(i / 20 for i in range(1, 21))
# Upper 2.5% points of Student's t for 1 to 30 degrees of freedom. Beyond, the last one serves:
# intervals are then up to 4% too wide.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
       2.052, 2.048, 2.045, 2.042)


def title_of(about: dict) -> str:
    return f"{about['benchmark']}, {Path(about['model']).name}"


def read_csv(path: Path, columns: tuple) -> list[dict]:
    """The lines of a sweep's table: {column: text}."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or not set(columns) <= lines[0].keys():
        raise UserError(f"{path} has no lines or lacks columns; run its sweep again")
    return lines


def number(point: dict, name: str) -> float:
    """A cell as a number, nan where it is empty."""
    return float(point[name] or "nan")


def read_scores(folder: Path, about: dict):
    """Forget and retain scores [L, D]."""
    if (folder / "scores.csv").is_file():
        neurons = read_csv(folder / "scores.csv", ("layer", "neuron", "forget", "retain"))
        L = 1 + int(neurons[-1]["layer"])
        return [torch.tensor([float(x[name]) for x in neurons]).view(L, -1)  # [L, D]
                for name in ("forget", "retain")]
    s, attribution = read_settings(folder), folder / "attribution"
    if why := stale(attribution, s):
        raise UserError(f"{attribution}: {'; '.join(why)}; run its stages again")
    about["steps"] = read_stage(attribution)["why"]["settings"]["steps"]
    scores = load_file(attribution / "scores.safetensors")
    return scores["forget"], scores["retain"]


# ----------------------------------------------------------------------------------------- frontier


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(forget, utility) that no other point equals or beats in both, forget rising."""
    front = []
    for forget, utility in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or utility > front[-1][1]:
            front.append((forget, utility))
    return front


def utility_at(front: list[tuple[float, float]], forget: float) -> float | None:
    """Utility that the frontier allows at so much left of the forget set; None where no point
    forgets that far."""
    if not front or forget < front[0][0]:
        return None
    for (x0, y0), (x1, y1) in zip(front, front[1:]):
        if forget <= x1:
            return y0 + (y1 - y0) * (forget - x0) / (x1 - x0)
    return front[-1][1]


def utilities_at(fronts: dict, level: dict) -> dict:
    """{seed: utility} of one arm, of the seeds that forget as far as their level {seed: forget}."""
    utilities = {seed: utility_at(front, level[seed]) for seed, front in fronts.items()}
    return {seed: u for seed, u in utilities.items() if u is not None}


def interval(xs: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% t-interval; nan for fewer than two."""
    if len(xs) < 2:
        return (xs[0] if xs else math.nan), math.nan
    t = T95[min(len(xs) - 1, len(T95)) - 1]
    return statistics.mean(xs), t * statistics.stdev(xs) / math.sqrt(len(xs))


def frontiers(points: list[dict]) -> tuple[dict, dict]:
    """{arm: {seed: front}} and {baseline: {seed: (forget, utility)}}."""
    baselines, arms = {}, {}
    for p in points:
        at = number(p, "forget"), number(p, "utility")
        if p["sweep"] == "baseline":
            baselines.setdefault(p["arm"], {})[p["seed"]] = at
        elif p["sweep"] == "frontier" and not p["error"]:
            arms.setdefault(p["arm"], {}).setdefault(p["seed"], []).append(at)
    original = baselines["original"]
    return {arm: {seed: pareto([*pairs, original[seed]]) for seed, pairs in by_seed.items()}
            for arm, by_seed in arms.items()}, baselines


def equal_forgetting(fronts: dict, levels: dict) -> list[list]:
    """For every level and arm: how many seeds reach it, their utility with its interval, and
    simu's utility minus the arm's, seed by seed, with its interval."""
    lines = []
    for name, level in levels.items():  # level: {seed: forget}
        simu_utilities = utilities_at(fronts.get("simu", {}), level)
        for arm, by_seed in fronts.items():
            utilities = utilities_at(by_seed, level)
            differences = [simu_utilities[seed] - u for seed, u in utilities.items()
                           if arm != "simu" and seed in simu_utilities]
            lines.append([name, arm, len(utilities), *interval(list(utilities.values())),
                          *interval(differences)])
    return lines


def draw_frontier(folder: Path, about: dict, fronts: dict, baselines: dict):
    """Retained utility against forgetting: each arm's mean, as far as all of its seeds reach."""
    figure, ((ax,),) = canvas(1, 1, (8, 5))
    lines = []
    for i, (arm, by_seed) in enumerate(fronts.items()):
        colour, marker = style_of(arm, i)
        curve = []
        for x in CURVE:
            utilities = utilities_at(by_seed, dict.fromkeys(by_seed, x))
            if len(utilities) == len(by_seed):
                curve.append((x, *interval(list(utilities.values()))))
        forget, means, halves = torch.tensor(curve).view(-1, 3).T
        ax.plot(1 - forget, means, color=colour, lw=1.8, marker=marker, markevery=(2 * i, 20),
                label=arm)
        ax.fill_between(1 - forget, means - halves, means + halves, color=colour, alpha=0.13, lw=0)
        lines += [(arm, f"{x:.3f}", f"{mean:.5f}", f"{half:.5f}") for x, mean, half in curve]
    for name, marker in zip(BASELINES, "*p"):
        forget, utility = torch.tensor(list(baselines.get(name, {}).values())).view(-1, 2).T
        ax.scatter(1 - forget, utility, color=BLACK, marker=marker, s=45, label=name, zorder=5)
    ax.set(xlabel="forgetting: 1 - what is left of the forget set", ylabel="retained utility",
           xlim=(-0.02, 1.01), ylim=(None, 1.02), title=f"Mean of {len(baselines['original'])} "
           f"seeds, 95% bands: {title_of(about)}")
    ax.legend(fontsize=9, loc="lower left")
    save(folder, "frontier", figure, ("arm", "forget", "utility", "half_interval"), lines)


def frontier(folder: Path, about: dict):
    """The frontier's picture, and utility at equal forgetting."""
    fronts, baselines = frontiers(read_csv(folder / "sweep.csv", COLUMNS))
    draw_frontier(folder, about, fronts, baselines)
    levels = {}
    if "retain-only" in baselines:
        levels["retain-only's"] = {k: v[0] for k, v in baselines["retain-only"].items()}
    levels |= {f"forget = {x}": dict.fromkeys(baselines["original"], x) for x in LEVELS}
    header = ("level", "arm", "seeds", "utility", "half_interval", "simu_minus_arm",
              "difference_half_interval")
    compared = equal_forgetting(fronts, levels)
    lines = []
    for line in compared:
        numbers = ["" if math.isnan(x) else f"{x:.5f}" for x in line[3:]]
        lines.append([*line[:3], *numbers])
    write_csv(folder / "figures" / "equal-forgetting.csv", header, lines)
    print(table(list(header), lines))
    gaps = [(gap, half) for *_, gap, half in compared if not math.isnan(half)]
    apart = sum(abs(gap) > half for gap, half in gaps)
    print(f"{len(gaps)} comparisons, each a 95% t-interval over seeds; levels of one arm share "
          f"their runs: {apart} leave out zero, where {0.05 * len(gaps):.1f} would by chance alone "
          "if nothing differed.")


# -------------------------------------------------------------------------------- masks (C.2, C.3)


def figure6(folder: Path, about: dict, kinds: dict, f, r):
    """Layer by neuron: forget-only, dual, both, and which set claims which neuron. f, r: bool
    [L, D], the critical neurons of either set."""
    L, D = f.shape
    figure, axes = canvas(4, 1, (9, 1.2 + 4 * max(1.1, 0.1 * L)), sharex=True)
    panels = {"(a) forget-only mask": ["forget alone"], "(b) dual mask": ["forget alone", "both"],
              "(c) critical for both": ["both"], "(d) overlap": list(kinds)}
    for (ax,), (title, names) in zip(axes, panels.items()):
        for name in names:  # a mark for each neuron: a heat map of 4096 would lose single ones
            colour, mask = kinds[name]
            layer, neuron = mask.nonzero(as_tuple=True)
            ax.scatter(neuron, layer, color=colour, marker="|", s=72 * 4 / L, label=name)
        count = sum(int(kinds[name][1].sum()) for name in names)
        ax.set_title(f"{title}: {count} of {L * D}", loc="left", fontsize=10)
        ax.set(ylabel="layer", ylim=(L - 0.5, -0.5), xlim=(-1, D))
    axes[3, 0].set_xlabel("neuron of the layer")
    figure.legend(*axes[3, 0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    figure.suptitle(f"Critical neurons, t = {about['threshold']}, m = {about['steps']}: "
                    f"{title_of(about)}", fontsize=11)
    save(folder, "figure6", figure, ("layer", "neuron", "forget", "retain"),
         [(l, k, int(f[l, k]), int(r[l, k])) for l, k in (f | r).nonzero().tolist()])


def figure4(folder: Path, about: dict, forget, retain):
    """Number of critical neurons against t."""
    lines = []
    for t in T_GRID:
        f, r = (simu.critical_mask(scores, t) for scores in (forget, retain))
        lines.append((t, int(f.sum()), int((f & ~r).sum()), *f.sum(1).tolist()))
    figure, ((ax,),) = canvas(1, 1, (5.5, 3.8))
    for column, arm, name in ((1, "simu", "dual (all forget-critical)"),
                              (2, "simu-forget-only", "forget-only")):
        colour, marker = STYLES[arm]
        ax.plot(T_GRID, [x[column] for x in lines], color=colour, marker=marker, ms=4, label=name)
    ax.axvline(about["threshold"], color=BLACK, lw=0.8, ls=":", label=f"t = {about['threshold']}")
    ax.set(xlabel="threshold t", ylabel=f"critical neurons of {forget.numel()}", ylim=(0, None),
           title=f"Figure 4: {title_of(about)}")
    ax.legend()
    save(folder, "figure4", figure, ("t", "dual", "forget_only", *(
        f"dual_layer_{l}" for l in range(len(forget)))), lines)


def masks(folder: Path, about: dict):
    """Critical neurons by layer, Figures 4 and 6, Table 5."""
    forget, retain = read_scores(folder, about)
    f, r = (simu.critical_mask(scores, about["threshold"]) for scores in (forget, retain))
    kinds = {"forget alone": (RED, f & ~r), "both": (BLACK, f & r), "retain alone": (SKY, r & ~f)}
    counts = [mask.sum(1).tolist() for _, mask in kinds.values()]  # [L] each
    write_csv(folder / "figures" / "layers.csv", ("layer", "forget_alone", "both", "retain_alone"),
              [(l, *by_kind) for l, by_kind in enumerate(zip(*counts))])
    figure6(folder, about, kinds, f, r)
    figure4(folder, about, forget, retain)
    lines = [("SO-GradDiff", f.numel(), f.numel()), ("SIMU-GradDiff", f.numel(), int(f.sum()))]
    lines += [(f"SIMU-GradDiff, published, {b} {m}", total, n)
              for (b, m), (n, total) in PUBLISHED_CRITICAL.items() if b == about["benchmark"]]
    header = ("Method", "Total MLP neurons", "Critical MLP neurons")
    write_csv(folder / "figures" / "table5.csv", header, lines)
    print(table(list(header), lines))


# ---------------------------------------------------------------------------- variants (C.1 to C.3)

PANELS = ((("retain.rouge_l", "ROUGE-L retain"), ("retain.exact_match", "EM retain")),
          (("forget", "forget (lower is better)"),), (("mia.auc", "MIA (0.5 is ideal)"),),
          (("aggregate", "aggregate"),))


def draw_against(folder: Path, about: dict, points: list[dict], setting: str, name: str):
    """What changes with m, with t, or with the kind of mask (the arm)."""
    figure, axes = canvas(1, len(PANELS), (13, 3.8))
    xs = [p[setting] if setting == "arm" else number(p, setting) for p in points]
    for ax, panel in zip(axes[0], PANELS):
        for (value, label), colour, marker, size in zip(panel, (BLUE, RED), "sD", (9, 5)):
            ax.plot(xs, [number(p, value) for p in points], label=label, color=colour,
                    marker=marker, ms=size)
        ax.set(xlabel=setting, ylim=(-0.02, 1.02))  # or noise would fill the picture
        ax.tick_params(axis="x", rotation=90)
        ax.legend(fontsize=9)
    figure.suptitle(f"Figure {name[-1]}: {title_of(about)}, SIMU, seed {points[0]['seed']}")
    columns = [setting, "critical", *(value for panel in PANELS for value, _ in panel)]
    save(folder, name, figure, columns, [[p[c] for c in columns] for p in points])


def variants(folder: Path, about: dict):
    """Figures 2, 3 and 5."""
    points = [p for p in read_csv(folder / "sweep.csv", COLUMNS) if not p["error"]]
    for sweep, setting, name in (("m", "steps", "figure2"), ("t", "threshold", "figure3"),
                                 ("mask", "arm", "figure5")):
        chosen = [p for p in points if p["sweep"] == sweep]
        if chosen:
            draw_against(folder, about, chosen, setting, name)


# ------------------------------------------------------------------------------------------- losses


def losses(folder: Path, about: dict):
    """Losses by update of a run's unlearned models: where forgetting sets in, and what it costs."""
    s, lines = read_settings(folder), []
    names = [x for x in finished_models(folder) if x not in BASELINES and not stale(folder / x, s)]
    figure, ((ax,),) = canvas(1, 1, (8, 4.2))
    for i, name in enumerate(names):
        text = (folder / name / "log.jsonl").read_text(encoding="utf-8")
        log = [json.loads(line) for line in text.splitlines()]
        for key, dashes in (("loss_forget", "-"), ("loss_retain", ":")):
            by_step = {update["step"]: update[key] for update in log if key in update}
            ax.plot(list(by_step), list(by_step.values()), color=style_of(name, i)[0], ls=dashes,
                    label=f"{name}, {key[5:]}")
        lines += [(name, update["step"], update.get("loss_forget", ""),
                   update.get("loss_retain", "")) for update in log]
    ax.set(xlabel="update", ylabel="loss in nats a token", yscale="log",
           title=f"Losses by update: {title_of(about)}")
    ax.legend(fontsize=8)
    save(folder, "losses", figure, ("model", "update", "loss_forget", "loss_retain"), lines)


def drawable(folder: Path) -> list:
    """Those of the functions above for which a folder holds the data."""
    swept, scores = folder / "sweep.csv", ("scores.csv", "attribution/scores.safetensors")
    sweeps = {p["sweep"] for p in read_csv(swept, COLUMNS)} if swept.is_file() else set()
    has_data = {frontier: "frontier" in sweeps,
                masks: any((folder / name).is_file() for name in scores),
                variants: not sweeps.isdisjoint(("m", "t", "mask")),
                losses: not set(finished_models(folder)) <= set(BASELINES)}
    return [figure for figure, has in has_data.items() if has]


def main(argv: list[str]):
    """The paper's figures and the frontier, from stored runs and sweeps."""
    parser = Parser(prog="python -m pipeline figures", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=[], type=Path, metavar="FOLDER",
                        help="a run or a sweep; default: every folder of benchmarks/results/")
    stored = sorted((HERE / "benchmarks" / "results").glob("*/sweep.csv"))
    for folder in parser.parse_args(argv).folders or [p.parent for p in stored]:
        about, figures = read_json(folder / "settings.json"), drawable(folder)
        if not figures:
            raise UserError(f"{folder} holds nothing to draw; name a run's or a sweep's folder")
        for figure in figures:
            print(f"== {folder}: {figure.__name__}")
            figure(folder, about)
