"""The paper's Tables 1 and 2, their columns and the numbers printed there; tables as text."""

import statistics
from collections import namedtuple

from data import TASKS
from pipeline.settings import Settings

# names: of the values in a cell, written as the cell is: with " / " between them.
Column = namedtuple("Column", "header names style", defaults=[".4f"])


def by_task(split: str, arrow: str) -> tuple:
    """Table 2's columns of a split: both numbers over all of its rows, and over each task's."""
    parts = (split, *(f"{split}.{task}" for task in TASKS))
    return tuple(Column(f"{x.replace('.', ' ')} {arrow}", f"{x}.rouge_l / {x}.exact_match")
                 for x in parts)


MAIN = {  # by layout of the data; the numbers in PUBLISHED have the same order
    "tofu": (  # Table 1
        Column("Aggregate ↑", "aggregate"), Column("EM-Forget ↓", "forget.accuracy", ".2%"),
        Column("ROUGE-L-Forget ↓", "forget.rouge_l"), Column("MIA ↓", "mia.auc"),
        Column("EM-Retain ↑", "retain.accuracy", ".2%"),
        Column("ROUGE-L-Retain ↑", "retain.rouge_l"),
        Column("EM-WF ↑", "world_facts.accuracy", ".2%"),
        Column("ROUGE-L-WF ↑", "world_facts.rouge_l")),
    "lume": (  # Table 2
        Column("Aggregate ↑", "aggregate"), *by_task("forget", "↓"),
        Column("MIA ↓", "mia.auc"), *by_task("retain", "↑")),
    "rows": (
        Column("EM-Forget ↓", "forget.exact_match", ".2%"),
        Column("ROUGE-L-Forget ↓", "forget.rouge_l"), Column("MIA ↓", "mia.auc"),
        Column("EM-Retain ↑", "retain.exact_match", ".2%"),
        Column("ROUGE-L-Retain ↑", "retain.rouge_l"))}
PUBLISHED = {
    ("tofu", "llama2-7b"): {
        "Original": (0.4437, 0.8525, 0.9796, 0.7894, 0.8575, 0.9825, 0.8632, 0.8960),
        "FO-GradDiff": (0.4738, 0.7275, 0.5174, 0.7627, 0.7650, 0.6115, 0.7949, 0.8462),
        "SO-GradDiff": (0.7957, 0.1025, 0.0221, 0.2156, 0.7225, 0.5960, 0.8205, 0.8675),
        "SIMU-GradDiff": (0.7963, 0.20, 0.0241, 0.2440, 0.78, 0.6694, 0.8290, 0.8703)},
    ("tofu", "olmo-1b"): {
        "Original": (0.4227, 0.7750, 0.8503, 0.7727, 0.7875, 0.8239, 0.4871, 0.5537),
        "FO-GradDiff": (0.7059, 0.2650, 0.0214, 0.1957, 0.63, 0.3814, 0.0085, 0.0185),
        "SO-GradDiff": (0.8235, 0.2275, 0.0077, 0.1889, 0.78, 0.7614, 0.3846, 0.4518),
        "SIMU-GradDiff": (0.8438, 0.1025, 0.0029, 0.1923, 0.7550, 0.7616, 0.4274, 0.4896)},
    ("lume", "llama2-7b"): {
        "Original": (0.504, 0.9885, 0.7984, 1.0, 0.9137, 0.9575, 0.7333, 1.0, 0.9231, 0.458,
                     0.9859, 0.7741, 1.0, 0.8241, 0.96, 0.7280, 0.9957, 0.9111),
        "FO-GradDiff": (0.586, 0.5566, 0.2029, 0.7046, 0.1121, 0.6071, 0.20, 0.4027, 0.2867, 0.4769,
                        0.7825, 0.4463, 0.9134, 0.6483, 0.7032, 0.3220, 0.7524, 0.7703),
        "SO-GradDiff": (0.607, 0.0187, 0.0, 0.0, 0.0, 0.0674, 0.0, 0.0012, 0.0, 0.5391,
                        0.7714, 0.6212, 0.8176, 0.5495, 0.7102, 0.5780, 0.7857, 0.8296),
        "SIMU-GradDiff": (0.659, 0.0025, 0.0, 0.0, 0.0, 0.01, 0.0, 0.0, 0.0, 0.5333,
                          0.8295, 0.7149, 0.8180, 0.4725, 0.7885, 0.7260, 0.8672, 0.8370)},
    ("lume", "olmo-1b"): {
        "Original": (0.211, 0.9837, 0.8687, 1.0, 1.0, 0.9399, 0.80, 1.0, 0.9930, 1.0,
                     0.9857, 0.8623, 1.0, 1.0, 0.9534, 0.80, 1.0, 1.0),
        "FO-GradDiff": (0.512, 0.1605, 0.3681, 0.0564, 0.25, 0.4616, 0.4646, 0.0430, 0.1399, 0.9776,
                        0.3854, 0.7314, 0.1783, 0.7582, 0.7274, 0.7420, 0.2716, 0.6741),
        "SO-GradDiff": (0.728, 0.0055, 0.0, 0.0029, 0.0, 0.0033, 0.0, 0.0091, 0.0, 0.7035,
                        0.9244, 0.8499, 0.9781, 0.9670, 0.8271, 0.79, 0.9602, 0.9926),
        "SIMU-GradDiff": (0.740, 0.0015, 0.0, 0.0, 0.0, 0.0050, 0.0, 0.0004, 0.0, 0.6889,
                          0.9365, 0.8540, 0.9779, 0.9670, 0.8549, 0.7960, 0.9690, 0.9926)}}
PUBLISHED_CRITICAL = {  # Table 5: critical of all neurons of the down-projections
    ("lume", "llama2-7b"): (1870, 131072), ("tofu", "llama2-7b"): (722, 131072),
    ("lume", "olmo-1b"): (23089, 32768), ("tofu", "olmo-1b"): (29554, 32768)}
SOUL_COLUMNS = (Column("MIA, SOUL's labels", "mia.soul"),
                Column("Aggregate with it", "aggregate_soul"))
SOUL_READING = """\
SOUL's code most likely lays the labels out in another order than the scores [D12]: a perfect attack
shows about .77, its reverse .23. So computed, our numbers are the last two columns."""


def published(s: Settings) -> list[tuple[str, dict]]:
    """(label, values) of what the paper printed for a run's benchmark and model, if it has them."""
    names = " / ".join(c.names for c in MAIN[s.layout]).split(" / ")
    return [(f"{approach}, published", dict(zip(names, numbers)))
            for approach, numbers in PUBLISHED.get((s.benchmark, s.model), {}).items()]


def main_columns(s: Settings) -> tuple:
    """The paper's; beside a published Table 1 also SOUL's MIA."""
    return MAIN[s.layout] + (SOUL_COLUMNS if s.layout == "tofu" and published(s) else ())


def reading(metrics: dict) -> str:
    """How the main table is to be read."""
    if metrics["benchmark"] == "lume":
        return "Cells are ROUGE-L recall on sentence completions / string equality on questions."
    if metrics["benchmark"] == "rows":
        return "EM-* is string equality."
    parts = ("forget", "retain")
    best = [number(metrics["values"][f"{x}.accuracy_ceiling"], ".2%") for x in parts]
    return (f"EM-* is `accuracy` [D11], judged by {metrics['closeness']}; the true answers have "
            f"{best[0]} on forget and {best[1]} on retain rows. String equality is exact_match.")


def label(name: str) -> str:
    """An approach as the paper spells it, if it has it, else its folder's name."""
    if name == "retain-only":
        return "Retain-only (ideal)"
    return next((x for x in PUBLISHED["tofu", "llama2-7b"] if x.lower() == name), name)


def number(x: float | list | None, style: str = ".4f") -> str:
    """A value as text; of a list, which has one for each seed, mean and standard deviation."""
    if x is None or (isinstance(x, list) and None in x):
        return "–"
    if isinstance(x, list):
        return f"{format(statistics.mean(x), style)} ± {format(statistics.stdev(x), style)}"
    return format(x, style)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well in a terminal."""
    rows = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |"
                     for row in rows)


def table_of(columns: tuple, lines: list[tuple[str, dict]]) -> str:
    """A table of columns by lines, a line being (label, values by name). Columns in which no line
    has a value are left out; "" if that is all of them."""
    present = {name for _, values in lines for name, value in values.items() if value is not None}
    shown = [c for c in columns if present & set(c.names.split(" / "))]
    if not shown:
        return ""
    cells = [[title, *(" / ".join(number(values.get(x), c.style) for x in c.names.split(" / "))
                       for c in shown)] for title, values in lines]
    return table(["Approach", *(c.header for c in shown)], cells)


def table_by_name(header: str, columns: list[tuple[str, dict]]) -> str:
    """A table with a line for each name that one of the columns, (label, values by name), has."""
    names = dict.fromkeys(name for _, values in columns for name in values)
    return table([header, *(title for title, _ in columns)],
                 [[name, *(values.get(name, "–") for _, values in columns)] for name in names])


def as_code(text: str | None) -> str:
    """A docstring, which `python -OO` leaves out, as a part of a report."""
    return f"```\n{(text or 'see the head of the file').strip()}\n```"
