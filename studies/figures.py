"""Every figure of the paper, and the frontier, from what a run or a sweep left in its folder.

    python -m pipeline figures                        every folder of benchmarks/results/
    python -m pipeline figures runs/demo-tiny-llama   all that this folder has the data for
    python -m pipeline figures frontier runs/sweep-demo-tiny-llama

what       reads                               writes to FOLDER/figures/, each with its CSV
---------  ----------------------------------  ------------------------------------------------
masks      scores.csv of a sweep, or a run's   layers (critical neurons by layer, as bars),
           attribution/scores.safetensors      figure6 (where they lie), figure4 (how many at
                                               which t), table5.csv
losses     of a run: each model's log.jsonl    losses: of forget and retain rows by update
kept       of a run: each model's eval/        kept: what is kept against what is forgotten
variants   sweep.csv: sweeps m, t and mask     figure2, figure3, figure5
varied     sweep.csv: sweep vary               varied: every metric against the first setting of
                                               --vary, a line per arm and value of the others
frontier   sweep.csv: sweeps frontier and      frontier, equal-forgetting.csv: utility at the
           baseline                            same forgetting, interpolated, with intervals

The frontier of one seed: of an arm's points and the original, those that no other beats in both
forgetting and utility, joined by straight lines. Intervals are 95% t-intervals over seeds; a
difference is taken seed by seed, as both arms start from the same original. Nothing is trained
here, and matplotlib is needed only to draw.
"""

import argparse
import csv
import math
import statistics
from pathlib import Path

import torch

import simu
from model import UserError, read_json
from pipeline.columns import PUBLISHED_CRITICAL, table
from pipeline.files import read_tensors, sha256
from pipeline.settings import HERE, Parser, read_settings
from pipeline.stage import data_inputs, differences, digest, read_stage
from studies import run_figures
from studies.drawing import (BLACK, BLUE, NAMES, RED, SKY, STYLES, canvas, look_of, save_both,
                             title_of, write_csv)
from studies.sweep import COLUMNS

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5)  # of forget: where utilities are compared
CELLS = 512  # of a heat map at most: more neurons are put together
T_GRID = tuple(i / 20 for i in range(1, 21))
# Upper 2.5% points of Student's t for 1 to 9 degrees of freedom; `student` counts the others.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)



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


def compared(intervals: list[tuple[float, float]], over: str) -> str:
    """A sentence beneath a table of differences: how many, over what, how many by chance."""
    made = [(middle, half) for middle, half in intervals if not math.isnan(half)]
    apart = sum(abs(middle) > half for middle, half in made)
    return (f"{len(made)} comparisons, each a 95% t-interval over {over}: {apart} leave out zero, "
            f"where {0.05 * len(made):.1f} would by chance alone if nothing differed.")


# ------------------------------------------------------------------------------------------ reading


SWEEP_AGAIN = "run its sweep again: what is in points.jsonl is not computed twice"


def read_about(folder: Path) -> dict:
    """settings.json of a run or sweep, as far as titles and masks need it."""
    if not (folder / "settings.json").is_file():
        raise UserError(f"{folder}/settings.json is missing; name the folder of a run or a sweep")
    about = read_json(folder / "settings.json")
    kinds = dict(benchmark=str, model=str, threshold=float, steps=int)
    if not isinstance(about, dict) or any(type(about.get(k)) is not kinds[k] for k in kinds):
        raise UserError(f"{folder}/settings.json is not that of a run or sweep; {SWEEP_AGAIN}")
    known = about.get("sha256")  # a sweep's, but for those of an older version
    if isinstance(known, dict) and known.get("settings") not in (
            None, digest({k: v for k, v in about.items() if k != "sha256"})):
        raise UserError(f"{folder}/settings.json is not what its sweep wrote; {SWEEP_AGAIN}")
    return about


def read_csv(folder: Path, name: str, columns: tuple, about: dict) -> list[dict]:
    """Rows of a sweep's table; UserError if it is missing, is not one, or was altered since."""
    path, known = folder / name, about.get("sha256")
    if not path.is_file():
        raise UserError(f"{path} is missing; {SWEEP_AGAIN}")
    if isinstance(known, dict) and known.get(name) != sha256(path):
        raise UserError(f"{path} is not what its sweep wrote; {SWEEP_AGAIN}")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error):
        rows = []
    if not rows or any(None in (row.get(c) for c in columns) for row in rows):
        raise UserError(f"{path} has no rows or lacks columns; {SWEEP_AGAIN}")
    return rows


def read_sweep(folder: Path, about: dict) -> list[dict]:
    return read_csv(folder, "sweep.csv", COLUMNS, about)


def number(row: dict, name: str, kind=float):
    """A cell as a number, None where it is empty."""
    try:
        value = kind(row[name]) if row[name] else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise UserError(f"{name} is {row[name]!r}, not a number, in a row of a sweep's table; "
                        f"{SWEEP_AGAIN}")
    return value


def read_scores(folder: Path, about: dict):
    """Forget and retain scores [L, D]."""
    if not (folder / "scores.csv").is_file():
        s = read_settings(folder)
        if why := differences(folder / "attribution", s, data_inputs(s)):
            raise UserError(f"{folder / 'attribution'} is not of what this run now holds: "
                            f"{'; '.join(why)}; run its stages again")
        about["steps"] = read_stage(folder / "attribution")["why"]["settings"]["steps"]
        return read_tensors(folder / "attribution" / "scores.safetensors", ("forget", "retain"))
    rows = read_csv(folder, "scores.csv", ("layer", "neuron", "forget", "retain"), about)
    depth = 1 + max(number(r, "layer", int) or 0 for r in rows)
    places = [(l, k) for l in range(depth) for k in range(len(rows) // depth)]
    if [(number(r, "layer", int), number(r, "neuron", int)) for r in rows] != places or not all(
            r["forget"] and r["retain"] for r in rows):
        raise UserError(f"{folder}/scores.csv does not hold a score of every neuron of every layer "
                        f"in order; {SWEEP_AGAIN}")
    return [torch.tensor([number(r, name) for r in rows]).view(depth, -1)  # [L, D]
            for name in ("forget", "retain")]


# -------------------------------------------------------------------------------- masks (C.2, C.3)


def binned(mask, width: int) -> list[list[float]]:
    """Share of true among each `width` neighbours of mask [L, D]."""
    return [[part.float().mean().item() for part in row.split(width)] for row in mask]


def figure6(folder: Path, about: dict, forget, retain):
    """Layer by neuron: forget-only, dual, both, and which set claims which neuron."""
    f, r = (simu.critical_mask(x, about["threshold"]) for x in (forget, retain))
    L, D = f.shape
    width = -(-D // CELLS)
    panels = (("(a) forget-only mask", f & ~r), ("(b) dual mask", f), ("(c) critical for both",
                                                                      f & r))
    figure, axes = canvas(4, 1, (9, 1.2 + 4 * max(1.1, 0.1 * L)))
    for ax, (name, mask) in zip(axes[:, 0], panels):
        image = ax.imshow(binned(mask, width), aspect="auto", cmap="Greys", vmin=0, vmax=1,
                          interpolation="nearest", extent=(0, D, L - 0.5, -0.5))
        ax.set_title(f"{name}: {int(mask.sum())} of {L * D}", loc="left", fontsize=10)
    if width > 1:
        figure.colorbar(image, ax=axes[:3, 0], label=f"share of {width} neighbours")
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch
    kinds = ((RED, "forget alone", f & ~r), (SKY, "retain alone", r & ~f), (BLACK, "both", f & r),
             ("#FFFFFF", "neither", ~f & ~r))
    shares = [binned(mask, width) for _, _, mask in kinds]  # a cell's colour is their mixture
    colours = torch.tensor([to_rgb(colour) for colour, _, _ in kinds])  # [4, 3]
    axes[3, 0].imshow((torch.tensor(shares).movedim(0, -1) @ colours).clamp(0, 1).tolist(),
                      aspect="auto", interpolation="nearest", extent=(0, D, L - 0.5, -0.5))
    axes[3, 0].set_title("(d) overlap", loc="left", fontsize=10)
    figure.legend(handles=[Patch(facecolor=colour, edgecolor=BLACK, label=f"{name} "
                                 f"({int(mask.sum())})") for colour, name, mask in kinds],
                  ncols=4, fontsize=9, loc="outside lower center")
    for ax in axes[:, 0]:
        ax.grid(False)
        ax.set_ylabel("layer")
        ax.set_yticks(range(0, L, max(1, L // 8)))
    axes[3, 0].set_xlabel("neuron of the layer")
    figure.suptitle(f"Critical neurons, t = {about['threshold']}, m = {about['steps']}: "
                    f"{title_of(about)}", fontsize=11)
    save_both(folder, "figure6", figure, ("layer", "neuron", "forget", "retain"),
              [(l, k, int(f[l, k]), int(r[l, k])) for l in range(L) for k in range(D)
               if f[l, k] or r[l, k]])


def layers(folder: Path, about: dict, forget, retain):
    """How many neurons of each layer are critical, and for which set: bars."""
    f, r = (simu.critical_mask(x, about["threshold"]) for x in (forget, retain))
    kinds = (("forget alone", RED, f & ~r), ("both", BLACK, f & r), ("retain alone", SKY, r & ~f))
    counts = [mask.sum(1) for _, _, mask in kinds]  # [L] each
    L, D = f.shape
    figure, ((ax,),) = canvas(1, 1, (max(6, 0.32 * L), 4))
    under = torch.zeros(L, dtype=torch.int64)
    for (name, colour, mask), count in zip(kinds, counts):
        bars = ax.bar(range(L), count.tolist(), 0.75, under.tolist(), color=colour,
                      label=f"{name} ({int(mask.sum())})")
        if L <= 8:
            ax.bar_label(bars, [n or "" for n in count.tolist()], label_type="center", fontsize=9,
                         color="white" if colour == BLACK else BLACK)
        under += count
    ax.set_xticks(range(0, L, max(1, L // 16)))
    ax.grid(axis="x", visible=False)
    ax.set(xlabel="layer", ylabel=f"critical neurons of its {D}", title="Critical neurons by "
           f"layer, t = {about['threshold']}, m = {about['steps']}: {title_of(about)}")
    figure.legend(*ax.get_legend_handles_labels(), ncols=3, fontsize=9, title="critical for",
                  loc="outside lower center")
    save_both(folder, "layers", figure, ("layer", "forget_alone", "both", "retain_alone"),
              [(l, *row) for l, row in enumerate(zip(*(x.tolist() for x in counts)))])


def figure4(folder: Path, about: dict, forget, retain):
    """Number of critical neurons against t."""
    rows = []
    for t in T_GRID:
        f, r = (simu.critical_mask(x, t) for x in (forget, retain))
        rows.append((t, int(f.sum()), int((f & ~r).sum()), *f.sum(1).tolist()))
    figure, axes = canvas(1, 1, (5.5, 3.8))
    ax = axes[0, 0]
    for column, (colour, marker), name in ((1, STYLES["simu"], "dual (all forget-critical)"),
                                           (2, STYLES["simu-forget-only"], "forget-only")):
        ax.plot(T_GRID, [row[column] for row in rows], color=colour, marker=marker, ms=4,
                label=name)
    ax.axvline(about["threshold"], color=BLACK, lw=0.8, ls=":", label=f"t = {about['threshold']}")
    ax.set(xlabel="threshold t", ylabel=f"critical neurons of {forget.numel()}", ylim=(0, None),
           title=f"Figure 4: {title_of(about)}")
    ax.legend()
    save_both(folder, "figure4", figure, ("t", "dual", "forget_only", *(
        f"dual_layer_{l}" for l in range(len(forget)))), rows)


def masks(folder: Path, about: dict):
    """Critical neurons by layer, Figures 4 and 6, Table 5."""
    forget, retain = read_scores(folder, about)
    layers(folder, about, forget, retain)
    figure6(folder, about, forget, retain)
    figure4(folder, about, forget, retain)
    critical = int(simu.critical_mask(forget, about["threshold"]).sum())
    rows = [("SO-GradDiff", forget.numel(), forget.numel()),
            ("SIMU-GradDiff", forget.numel(), critical)]
    rows += [(f"SIMU-GradDiff, published, {b} {m}", total, n)
             for (b, m), (n, total) in PUBLISHED_CRITICAL.items() if b == about["benchmark"]]
    header = ("Method", "Total MLP neurons", "Critical MLP neurons")
    write_csv(folder / "figures" / "table5.csv", header, rows)
    print(table(list(header), rows))


# ---------------------------------------------------------------------------- variants (C.1 to C.3)

PANELS = ((("retain.rouge_l", "ROUGE-L retain"), ("retain.exact_match", "EM retain")),
          (("forget", "forget (lower is better)"),), (("mia.auc", "MIA (0.5 is ideal)"),),
          (("aggregate", "aggregate"),))


def lines(folder: Path, about: dict, rows: list[dict], sweep: str, x: str, name: str, label: str):
    """Figures 2 and 3: what changes with m or t."""
    own = sorted((r for r in rows if r["sweep"] == sweep and not r["error"]),
                 key=lambda r: number(r, x))
    if not own:
        return print(f"{folder}: no sweep over {sweep}; {name} not drawn")
    figure, axes = canvas(1, len(PANELS), (13, 3.3))
    for ax, panel in zip(axes[0], PANELS):
        for (value, legend), look in zip(panel, (dict(color=BLUE, marker="s", ms=9, mfc="none"),
                                                 dict(color=RED, marker="D", ms=5))):
            ax.plot([number(r, x) for r in own], [number(r, value) for r in own], label=legend,
                    **look)
        if panel[0][0] == "mia.auc":
            ax.axhline(0.5, color=BLACK, lw=0.8, ls=":")
        low, high = ax.get_ylim()
        spare = max(0, 0.1 - (high - low)) / 2  # so that noise does not fill the picture
        ax.set_ylim(low - spare, high + spare)
        ax.set(xlabel=label, title=" and ".join(legend for _, legend in panel))
        ax.title.set_fontsize(10)
        if len(panel) > 1:
            ax.legend(fontsize=9)
    critical = sorted(number(r, "critical", int) or 0 for r in own)
    figure.suptitle(f"Figure {name[-1]}: {title_of(about)}, SIMU, seed {own[0]['seed']}; "
                    f"{critical[0]} to {critical[-1]} critical neurons", fontsize=11)
    columns = [x, "critical", *(v for panel in PANELS for v, _ in panel)]
    save_both(folder, name, figure, columns, [[r[c] for c in columns] for r in own])


def figure5(folder: Path, about: dict, rows: list[dict]):
    """Forget-only against dual masks, and the other kinds beside them."""
    own = [r for r in rows if r["sweep"] == "mask" and not r["error"]]
    if not own:
        return print(f"{folder}: no sweep over masks; figure5 not drawn")
    values = [v for panel in PANELS for v in panel]
    figure, axes = canvas(1, 1, (10, 4))
    ax, width = axes[0, 0], 0.8 / len(own)
    for i, r in enumerate(own):
        at = [x + (i - (len(own) - 1) / 2) * width for x in range(len(values))]
        ax.bar(at, [number(r, v) or 0 for v, _ in values], width * 0.92,
               color=look_of(r["arm"], i)[0], edgecolor=BLACK, lw=0.4,
               hatch=("", "//", "..", "\\\\", "xx", "--")[i % 6],
               label=f"{r['arm'].removeprefix('simu-').replace('simu', 'dual')} ({r['critical']})")
    ax.set_xticks(range(len(values)), [name.replace(" (", "\n(") for _, name in values])
    ax.grid(axis="x", visible=False)
    ax.set(ylim=(0, 1.02), title=f"Figure 5: masks (neurons that move), {title_of(about)}, "
           f"seed {own[0]['seed']}, one learning rate")
    ax.legend(ncols=1, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    columns = ["arm", "critical", *(v for v, _ in values)]
    save_both(folder, "figure5", figure, columns, [[r[c] for c in columns] for r in own])


def variants(folder: Path, about: dict):
    """Figures 2, 3 and 5."""
    rows = read_sweep(folder, about)
    lines(folder, about, rows, "m", "steps", "figure2", "m")
    lines(folder, about, rows, "t", "threshold", "figure3", "t")
    figure5(folder, about, rows)


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


def frontiers(rows: list[dict]) -> tuple[dict, dict]:
    """{arm: {seed: front}} and {baseline: {seed: (forget, utility)}}."""
    base, points = {}, {}
    for r in rows:
        if r["sweep"] in ("baseline", "frontier") and not r["error"]:
            at = number(r, "forget"), number(r, "utility")
            if r["sweep"] == "baseline":
                base.setdefault(r["arm"], {})[r["seed"]] = at
            else:
                points.setdefault(r["arm"], {}).setdefault(r["seed"], []).append(at)
    if not points or "original" not in base:
        raise UserError("sweep.csv holds no frontier; `python -m pipeline sweep` makes one")
    return {arm: {seed: pareto(some + [base["original"][seed]]) for seed, some in own.items()}
            for arm, own in points.items()}, base


def equal_forgetting(fronts: dict, levels: dict) -> list[list]:
    """For every level and arm: utility, its interval, seeds that reach it; and, where another arm
    is compared with simu, simu minus that arm, seed by seed."""
    out = []
    for name, at in levels.items():  # at: {seed: forget}
        reached = {arm: {seed: u for seed, front in own.items()
                         if (u := utility_at(front, at[seed])) is not None}
                   for arm, own in fronts.items()}
        for arm, own in reached.items():
            both = [seed for seed in own if seed in reached.get("simu", {})]
            difference = [reached["simu"][k] - own[k] for k in both] if arm != "simu" else []
            out.append([name, arm, len(own), *interval(list(own.values())), *interval(difference)])
    return out


def seed_by_seed(fronts: dict, forget: float) -> dict:
    """{seed: utility} of the seeds whose frontier reaches so far."""
    return {seed: u for seed, front in fronts.items()
            if (u := utility_at(front, forget)) is not None}


def band(ax, curve: list[tuple[float, float, float]], look: dict, label: str):
    """A line of (forget, mean, half interval) with its band."""
    x = [1 - c[0] for c in curve]
    ax.plot(x, [c[1] for c in curve], label=label, **look)
    ax.fill_between(x, [c[1] - c[2] for c in curve], [c[1] + c[2] for c in curve],
                    color=look["color"], alpha=0.13, lw=0)


def draw_frontier(folder: Path, about: dict, rows: list[dict], fronts: dict, base: dict):
    """Retained utility against forgetting, and simu's minus the other arms', a curve per arm."""
    figure, axes = canvas(1, 2, (12.5, 5))
    (ax, beside), grid, curve_rows = axes[0], [i / 200 for i in range(201)], []
    for i, (arm, own) in enumerate(fronts.items()):
        colour, marker = look_of(arm, i)
        look = dict(color=colour, lw=1.8, marker=marker, markevery=(2 * i, 20), ms=6)
        curve = [(x, u) for x in grid if len(u := seed_by_seed(own, x)) == len(own)]
        band(ax, [(x, *interval(list(u.values()))) for x, u in curve], look, NAMES.get(arm, arm))
        curve_rows += [(arm, f"{x:.3f}", *(f"{v:.5f}" for v in interval(list(u.values()))))
                       for x, u in curve]
        dots = [r for r in rows if r["sweep"] == "frontier" and r["arm"] == arm and not r["error"]]
        ax.scatter([1 - number(r, "forget") for r in dots], [number(r, "utility") for r in dots],
                   color=colour, marker=marker, s=10, alpha=0.5, lw=0)
        if arm != "simu" and "simu" in fronts:
            other = fronts["simu"]
            gap = [(x, [theirs[k] - u[k] for k in u]) for x, u in curve
                   if len(theirs := seed_by_seed(other, x)) == len(u)]
            band(beside, [(x, *interval(d)) for x, d in gap], look,
                 f"minus {NAMES.get(arm, arm)}")
    for name, marker in (("original", "*"), ("retain-only", "p")):
        if name in base:
            ax.scatter([1 - x for x, _ in base[name].values()], [y for _, y in base[name].values()],
                       color=BLACK, marker=marker, s=45, label=name, zorder=5)
    beside.axhline(0, color=BLACK, lw=0.8)
    ax.set(ylabel="retained utility", ylim=(None, 1.02), title="mean over seeds")
    beside.set(ylabel="difference in utility", title="SIMU (critical mask) minus another, by seed")
    for one, left in ((ax, -0.02), (beside, 0.5)):
        one.set(xlabel="forgetting: 1 - what is left of the forget set", xlim=(left, 1.01))
        if one.get_legend_handles_labels()[0]:
            one.legend(fontsize=9, loc="lower left")
    figure.suptitle(f"Utility against forgetting, 95% bands: {title_of(about)}, "
                    f"{len(base['original'])} seeds", fontsize=11)
    save_both(folder, "frontier", figure, ("arm", "forget", "utility", "half_interval"),
              curve_rows)


def frontier(folder: Path, about: dict):
    """The frontier's picture, and utility at equal forgetting."""
    rows = read_sweep(folder, about)
    fronts, base = frontiers(rows)
    draw_frontier(folder, about, rows, fronts, base)
    seeds = list(base["original"])
    levels = {f"forget = {x}": dict.fromkeys(seeds, x) for x in LEVELS}
    if "retain-only" in base:
        levels = {"retain-only's": {k: v[0] for k, v in base["retain-only"].items()}} | levels
    found = equal_forgetting(fronts, levels)
    write_csv(folder / "figures" / "equal-forgetting.csv", (
        "level", "arm", "seeds", "utility", "half_interval", "simu_minus_arm",
        "difference_half_interval"),
        [[*r[:3], *("" if math.isnan(x) else f"{x:.5f}" for x in r[3:])] for r in found])
    print(table(["At equal forgetting", "arm", "seeds", "utility, 95% t-interval",
                 "SIMU minus it, seed by seed"],
                [[r[0], NAMES.get(r[1], r[1]), r[2], with_interval(*r[3:5]),
                  with_interval(*r[5:], sign="+")] for r in found]))
    print(compared([(r[5], r[6]) for r in found], "seeds; levels of one arm share their runs"))


def with_interval(mean: float, half: float, sign: str = "") -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:{sign}.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")


# ------------------------------------------------------------------------------------------ varied


METRICS = [metric for panel in PANELS for metric in panel]


def varied_lines(rows: list[dict]) -> tuple[str, dict]:
    """Of the sweep `vary`: the name of its first setting, and {(arm, the other settings): {value:
    {metric: numbers of all seeds}}}."""
    name, lines = "", {}
    for r in rows:
        if r["sweep"] == "vary" and not r["error"]:
            first, _, others = r["varied"].partition(" ")
            name, _, value = first.partition("=")
            seen = lines.setdefault((r["arm"], others), {}).setdefault(
                value, {m: [] for m, _ in METRICS})
            for m, _ in METRICS:
                seen[m] += [x] if (x := number(r, m)) is not None else []
    if not lines:
        raise UserError("sweep.csv holds nothing varied; `python -m pipeline sweep` with --vary "
                        "NAME=VALUE,... makes it")
    return name, lines


def places_of(values: list[str]) -> dict[str, float]:
    """Where each value stands on the axis: its number, or, if one is none, its place."""
    try:
        return {v: float(v) for v in values}
    except ValueError:
        return {v: float(i) for i, v in enumerate(values)}


def varied(folder: Path, about: dict):
    """Every metric against what was varied: means over seeds, with the seeds' range."""
    name, lines = varied_lines(read_sweep(folder, about))
    place = places_of(list(dict.fromkeys(v for line in lines.values() for v in line)))
    low, high = min(place.values()), max(place.values())
    figure, axes = canvas(1, len(METRICS), (3.2 * len(METRICS), 3.8))
    every = sorted({others for _, others in lines})
    for ax, (metric, title) in zip(axes[0], METRICS):
        for i, ((arm, others), line) in enumerate(lines.items()):
            seen = {place[v]: line[v][metric] for v in sorted(line, key=place.get)}
            seen = {at: numbers for at, numbers in seen.items() if numbers}
            colour, marker = look_of(arm, i)
            ax.plot(list(seen), [statistics.mean(x) for x in seen.values()], color=colour, ms=5,
                    marker=marker, ls=("-", "--", ":", "-.")[every.index(others) % 4],
                    label=" ".join(filter(None, (NAMES.get(arm, arm), others))))
            ax.fill_between(list(seen), [min(x) for x in seen.values()],
                            [max(x) for x in seen.values()], color=colour, alpha=0.13, lw=0)
        ax.set(title=title, xlabel=name, xscale="log" if low > 0 and high >= 5 * low else "linear")
        ax.set_xticks(list(place.values()), list(place), fontsize=8)
        ax.minorticks_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=4, fontsize=9,
                  loc="outside lower center")
    figure.suptitle(f"Against {name}, means over seeds and their range: {title_of(about)}",
                    fontsize=11)
    save_both(folder, "varied", figure, ("arm", "others", name, *(m for m, _ in METRICS)), [
        (*key, v, *(f"{statistics.mean(x):.5f}" if x else "" for x in line[v].values()))
        for key, line in lines.items() for v in line])


# --------------------------------------------------------------------------------------------- main

SCORES = ("scores.csv", "attribution/scores.safetensors")
FIGURES = {"masks": masks, "losses": run_figures.losses, "kept": run_figures.kept,
           "variants": variants, "frontier": frontier, "varied": varied}


def drawable(folder: Path, about: dict) -> list[str]:
    """The figures for which a folder holds the data."""
    found = ["masks"] if any((folder / x).is_file() for x in SCORES) else []
    found += run_figures.drawable(folder)
    if (folder / "sweep.csv").is_file():
        sweeps = {r["sweep"] for r in read_sweep(folder, about)}
        found += ["variants"] if sweeps & {"m", "t", "mask"} else []
        found += [name for name, sweep in (("frontier", "frontier"), ("varied", "vary"))
                  if sweep in sweeps]
    return found


def draw(what: str, folder: Path):
    """The figures that `what` names, or all for which the folder holds the data."""
    about = read_about(folder)
    names = drawable(folder, about) if what == "all" else [what]
    if not names:
        raise UserError(f"{folder} holds neither a sweep's tables nor attribution scores; name the "
                        "folder of a run or a sweep")
    for name in names:
        print(f"== {folder}: {name}")
        FIGURES[name](folder, about)


def main(argv: list[str]):
    """The paper's figures and the frontier, from stored runs and sweeps."""
    parser = Parser(prog="python -m pipeline figures", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", *FIGURES), default="all",
                        help="default: all that a folder has the data for")
    parser.add_argument("folders", nargs="*", default=[], type=Path, metavar="FOLDER",
                        help="a run or a sweep; default: every folder of benchmarks/results/")
    if argv and argv[0] not in ("all", *FIGURES) and not argv[0].startswith("-"):
        argv = ["all", *argv]
    args = parser.parse_args(argv)
    stored = HERE / "benchmarks" / "results"
    folders = args.folders or sorted(p.parent for p in stored.glob("*/sweep.csv"))
    if not folders:
        raise UserError(f"{stored} holds no stored sweep; name the folder of a run or sweep")
    for folder in folders:
        draw(args.what, folder)
