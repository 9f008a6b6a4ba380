"""The tables of the pages, each a function that makes its text of CSVs and logs alone: `pages`
writes them between their marks."""

import contextlib
import io
import re
from collections.abc import Callable

from model import UserError
from pipeline.columns import table
from studies import common, figures, known_memory_page, objectives, pretrained, readings
from studies.common import cell, chosen, groups, numbers, read_lines

LOGS = common.RESULTS.parent / "logs"

# ------------------------------------------------------------------------------------------- logs


def lines_of_table(text: str) -> list[list[str]]:
    """The cells of every line of a Markdown table but the rule below its header."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()
            if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-")]


def table_of_log(name: str, having: str) -> list[list[str]]:
    """The first table of a log that holds a text."""
    made = re.findall(r"(?:^\|.*\n)+", (LOGS / f"{name}.txt").read_text(), re.MULTILINE)
    if not (found := [x for x in made if having in x]):
        raise UserError(f"{LOGS / name}.txt holds no table with {having}")
    return lines_of_table(found[0])


def demo_table() -> str:
    """The demo's first run, the columns that a first reader needs."""
    head, *rows = table_of_log("demo-tiny-llama", "Retain-only")
    shown = [head.index(x) for x in ("ROUGE-L-Forget ↓", "ROUGE-L-Retain ↑", "ROUGE-L-WF ↑",
                                     "MIA ↓")]
    return table(["", "ROUGE-L forget ↓", "retain ↑", "world facts ↑", "MIA"],
                 [[row[0], *(row[i] for i in shown)] for row in rows])


def own_rows_table() -> str:
    head, *rows = table_of_log("unlearn-own-rows", "word for word")
    return table(head, rows)


def readings_table() -> str:
    """Without the columns that were unlearned with another lambda."""
    head, *rows = table_of_log("readings-tiny-llama", "one neuron at a time")
    return table(["reading", *head[1:5], head[-1]],
                 [[" ".join(row[:-7]).strip() or row[0], *row[-7:-3], row[-1]] for row in rows])


def mamba_grid() -> str:
    """Forget / retain / world facts by rate and method; in bold what the rule kept."""
    text = (LOGS / "grid-demo-tiny-mamba.txt").read_text()
    kept = {(m, f"{float(lr):g}") for m, lr in  # the last that is said of each method
            dict(re.findall(r"kept for (\w+): (\S+)", text)).items()}
    rows = {(row[0], f"{float(row[1]):g}"): " / ".join(row[2:])
            for row in lines_of_table(text) if row[0] in ("fo", "so", "simu")}
    rates = sorted({lr for _, lr in rows}, key=float)
    return table(["rate", "FO", "SO", "SIMU"], [[lr, *(
        f"**{rows[m, lr]}**" if (m, lr) in kept else rows.get((m, lr), "")
        for m in ("fo", "so", "simu"))] for lr in rates])


def stages_table(name: str) -> str:
    """Seconds and peak memory of every stage that a log tells of."""
    made = re.findall(r"^\[(\S+)\] ([\d.]+) s, peak host ([\d.]+) GiB",
                      (LOGS / f"{name}.txt").read_text(), re.MULTILINE)
    return table(["stage", "seconds", "peak, GiB"], [list(x) for x in made])


# ----------------------------------------------------------------------------------------- sweeps

ARMS = {"fo": "FO-GradDiff", "so": "SO-GradDiff", "simu": "SIMU",
        "simu-random": "SIMU, random mask"}


def level_name(level: str) -> str:
    return "as much as retain-only's" if level.startswith("retain") else level.replace(
        "forget = ", "ROUGE-L ")


def at_equal_forgetting(folder: str) -> dict:
    """{level: {arm: its line}} of a stored sweep."""
    rows = read_lines(common.RESULTS / folder / "figures" / "equal-forgetting.csv")
    return {level: {r["arm"]: r for r in own} for (level,), own in groups(rows, "level").items()}


def with_interval(row: dict, value: str, half: str, most: int, sign: str = "") -> str:
    """A cell of a frontier's table; in brackets how many of `most` seeds reach the level."""
    if not row[half]:
        return "–"
    fewer = "" if int(row["seeds"]) == most or sign else f" ({row['seeds']})"
    return f"{float(row[value]):{sign}.3f} ± {float(row[half]):.3f}{fewer}"


def frontier_lines(folder: str, levels: dict, arms: tuple, against: tuple) -> list[list[str]]:
    most = max(int(r["seeds"]) for own in levels.values() for r in own.values())
    return [[level_name(level), *(with_interval(own[a], "utility", "half_interval", most)
                                  for a in arms),
             *(with_interval(own[a], "simu_minus_arm", "difference_half_interval", most, "+")
               for a in against)] for level, own in levels.items()]


FIRST = "What is left of the forget set"


def frontier_table(folder: str) -> str:
    levels, against = at_equal_forgetting(folder), ("simu-random", "so", "fo")
    made = table([FIRST, *ARMS.values(), *(f"SIMU - {x}" for x in ("random", "SO", "FO"))],
                 frontier_lines(folder, levels, tuple(ARMS), against))
    gaps = [tuple(float(own[a][x] or "nan") for x in ("simu_minus_arm", "difference_half_interval"))
            for own in levels.values() for a in against]
    return f"{made}\n\n{common.compared(gaps, 'seeds')}"


def beyond_table() -> str:
    cells = {"tiny-mamba": "demo-tiny-mamba", "tiny-rwkv": "demo-tiny-rwkv",
             "tiny-llama, TOFU": "tofu-tiny-llama"}
    made = {name: {line[0]: line[1:] for line in frontier_lines(
        folder, at_equal_forgetting(folder), ("so", "simu", "simu-random"), ("simu-random", "so"))}
        for name, folder in cells.items()}
    levels = [level_name(x) for x in ("retain-only's", *(f"forget = {y}" for y in (0.1, 0.2, 0.5)))]
    return table([FIRST, "model", "SO-GradDiff", "SIMU", "SIMU, random mask", "SIMU - random",
                  "SIMU - SO"], [[level, name, *own[level]] for level in levels
                                 for name, own in made.items()])

def one_rate_table(folder: str, *rates: str) -> str:
    """Where each arm of a sweep stands at the same rate, means over its seeds."""
    rows = read_lines(common.RESULTS / folder / "sweep.csv")
    lines = [["retain-only", "–", chosen(rows, sweep="baseline", arm="retain-only")]]
    lines += [[ARMS[arm], rate, [r for r in chosen(rows, sweep="frontier", arm=arm)
                                 if f"{float(r['lr']):g}" == rate]]
              for rate in rates for arm in ARMS]
    return table(["arm", "rate", "seeds", "forget", "utility"], [
        [arm, rate, len(own), *(cell(numbers(own, x)) for x in ("forget", "utility"))]
        for arm, rate, own in lines if own])


def layers_table(folder: str) -> str:
    """Critical neurons by layer, and how forget and retain scores correlate there."""
    scores = figures.read_scores(common.RESULTS / folder, figures.read_about(
        common.RESULTS / folder))
    rows = read_lines(common.RESULTS / folder / "figures" / "layers.csv")
    return table(["layer", "forget alone", "both", "retain alone", "correlation of scores"], [
        [*r.values(), f"{x:.2f}"] for r, x in zip(rows, readings.correlations(*scores))])


def varied_table(folder: str) -> str:
    """One seed with other m, t and masks: Figures 2, 3 and 5."""
    out = []
    for figure, column in (("figure2", "steps"), ("figure3", "threshold"), ("figure5", "arm")):
        rows = read_lines(common.RESULTS / folder / "figures" / f"{figure}.csv")
        name = dict(steps="m", threshold="t", arm="mask")[column]
        out += [[name, r[column].replace("simu-", "").replace("simu", "dual"), r["critical"],
                 *(f"{float(r[x]):.3f}" for x in ("forget", "retain.rouge_l", "aggregate"))]
                for r in rows]
    return table(["varied", "value", "neurons that move", "forget", "retain", "aggregate"], out)


# ------------------------------------------------------------------------------------- objectives

OBJECTIVE_LINES = {
    "demo": (("-", "retain-only"), *(("graddiff", x) for x in ("fo", "so", "simu")),
             *((x, "simu") for x in ("npo", "undial", "ceiling")),
             *((x, y) for x in ("level", "stranger") for y in ("fo", "so", "simu"))),
    "tofu": (("-", "retain-only"),
             *((x, y) for x in ("level", "stranger") for y in ("fo", "so", "simu")))}


def objective_rows(benchmark: str) -> dict:
    """{(objective, arm): its lines} at the recipes' rates: the first of an arm's."""
    rows = read_lines(objectives.RESULTS / f"{benchmark}-tiny-llama.csv")
    out = {}
    for (objective, arm, _), own in groups(rows, "objective", "arm", "lr").items():
        out.setdefault((objective, arm), own)
    return out


def objectives_table() -> str:
    lines = []
    for benchmark, keys in OBJECTIVE_LINES.items():
        made = objective_rows(benchmark)
        ideal = {r["seed"]: r for r in made["-", "retain-only"]}
        for key in keys:
            mean = {v: f"{common.interval(numbers(made[key], v))[0]:.3f}" for v in objectives.VALUES
                    if numbers(made[key], v)}
            far = [f"{common.interval(objectives.distances(made[key], ideal, v))[0]:.3f}"
                   if key[0] != "-" else "–" for v in ("mia.answer_auc", "forget.rouge_l")]
            lines.append([benchmark, *key, mean["mia.answer_auc"], far[0], mean["forget.rouge_l"],
                          far[1], *(mean[f"{x}"] for x in (
                              "retain.rouge_l", "world_facts.rouge_l", "mia.answer_min_40_plus",
                              "forget.repetition"))])
    return table(["rows", "objective", "arm", "AUC", "distance to retain-only's", "ROUGE-L forget",
                  "distance", "retain", "world facts", "Min-40%++", "repetition"], lines)


# ------------------------------------------------------------------------------------- pretrained


NAMED = {"original": "original", "retain-only": "retain-only", "fo": "FO", "so": "SO",
         "simu": "SIMU", "simu-random": "random mask", "attention": "attention",
         "simu-frozen": "frozen, critical", "random-frozen": "frozen, random"}
MOVES = {"fo": "all, AdamW", "so": "all, Sophia", "simu": "attention, critical rows",
         "simu-random": "attention, as many random rows", "attention": "attention alone",
         "simu-frozen": "critical rows alone", "random-frozen": "random rows alone"}


def set_by_set(points: list, value: str, digits: int = 2) -> str:
    return " / ".join(f"{float(r[value]):.{digits}f}" for r in points)


def arms_table() -> str:
    """The pretrained model's arms where `level` ends them."""
    rows, points = pretrained.read("rows"), pretrained.read("points")
    splits = [x.replace("_", " ") for x in pretrained.SPLITS]
    return table(["arm", "moves", *splits, "AUC", "manual"],
                 [[name, MOVES.get(arm, ""), *(
                     cell(numbers(chosen(of_arm(rows, arm), split=x), "rouge_l"))
                     for x in pretrained.SPLITS), *(
                     set_by_set(of_arm(points, arm), v) for v in ("mia.answer_auc", "manual"))]
                  for arm, name in NAMED.items()])


def sets_table() -> str:
    """Forget and retain rows of each forget set's model."""
    points, sets = pretrained.read("points"), ("forget10", "forget05")
    return table(["arm", *(f"{x}: {y}" for x in sets for y in ("forget", "retain"))], [
        [name, *(set_by_set(chosen(of_arm(points, arm), forget_set=x), f"{y}.rouge_l", 3)
                 for x in sets for y in ("forget", "retain"))] for arm, name in NAMED.items()])


def of_arm(rows: list, arm: str) -> list:
    return [r for r in chosen(rows, arm=arm) if r["objective"] in ("-", "level")]


def grid_table() -> str:
    """The same by GradDiff, at several rates, on one forget set."""
    rows, points = (chosen(pretrained.read(x), objective="graddiff") for x in ("rows", "points"))
    return table(["arm", "rate", "forget", "retain", "world facts", "AUC"], [
        [NAMED[arm], lr, *(cell(numbers(chosen(own, split=x), "rouge_l"))
                           for x in ("forget", "retain", "world_facts")),
         set_by_set(chosen(points, arm=arm, lr=lr), "mia.answer_auc")]
        for (arm, lr), own in groups(rows, "arm", "lr").items()])


def attacked_table() -> str:
    rows = pretrained.read("attacks")
    return table(["arm", *pretrained.ATTACKS], [
        [name, *(cell(numbers(chosen(of_arm(rows, arm), attack=x), "rouge_l"))
                 for x in pretrained.ATTACKS)] for arm, name in NAMED.items()])


def printed(function: Callable, *given) -> str:
    """What a study prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*given)
    return out.getvalue().strip()


def masks_tables() -> str:
    return printed(readings.masks, [str(pretrained.RESULTS / x) for x in ("forget10", "forget05")])


def time_of_models() -> str:
    made = [float(r["cpu_seconds"]) for r in pretrained.read("points") if r["objective"] != "-"]
    return (f"All {len(made)} unlearned models took {sum(made) / 3600:.2f} hours of one core, "
            f"{min(made):.0f} to {max(made):.0f} s each.")


# ---------------------------------------------------------------------------------- what they join

RELEARNT = (("-", "-", "retain-only", "retain-only"), ("level", "-", "fo", "FO"),
            ("level", "-", "so", "SO"), ("level", "moving", "critical", "SIMU"),
            ("level", "frozen", "critical", "SIMU, attention frozen"))
AGAIN = "5 of an author's 10 rows relearnt, the other 5 asked"
HELD = {"original": f"learnt anywhere; {AGAIN}", "held-0.25": f"planted; {AGAIN}"}


def relearning_table() -> str:
    """What half of the forget rows, learnt again, brings back of the other half after `level`: of
    the demo's rows under the protocols of both studies."""
    made, lines = objective_rows("demo"), []
    for key, name in ((("-", "retain-only"), "retain-only"), (("level", "fo"), "FO"),
                      (("level", "so"), "SO"), (("level", "simu"), "SIMU")):
        lines.append(["learnt anywhere; one author relearnt, another asked", name, *(
            cell(numbers(made[key], x)) for x in ("plain", "relearn-half")), "–", "–", "–"])
    staying = known_memory_page.lines("staying", benchmark="demo", model="tiny-llama",
                                      attack="relearn-half")
    for memory, rows in HELD.items():
        for objective, attention, mask, name in RELEARNT:
            own = chosen(staying, memory=memory, objective=objective, attention=attention,
                         mask=mask)
            seeds = {x: known_memory_page.by_seed(own, x)
                     for x in ("before", "after", "loss_before", "loss_after")}
            if len(seeds["before"]) >= known_memory_page.SEEDS:
                back = known_memory_page.less(seeds["loss_before"], seeds["loss_after"])
                lines.append([rows, name, *(cell(list(x.values()))
                                            for x in (*seeds.values(), back))])
    return table(["memory; what was relearnt and asked", "arm", "told before", "told after",
                  "loss before", "loss after", "loss won back"], lines)


TABLES = {
    "demo": demo_table, "own-rows": own_rows_table, "readings": readings_table,
    "mamba-grid": mamba_grid, "stages": stages_table, "frontier": frontier_table,
    "beyond-attention": beyond_table,
    "one-rate": one_rate_table, "layers": layers_table, "varied": varied_table,
    "objectives": objectives_table, "pretrained-arms": arms_table,
    "pretrained-sets": sets_table, "pretrained-differences": pretrained.paired_table,
    "pretrained-graddiff": grid_table,
    "pretrained-attacks": attacked_table, "pretrained-masks": masks_tables,
    "pretrained-time": time_of_models, "known-memory": known_memory_page.tables,
    "relearning": relearning_table}
