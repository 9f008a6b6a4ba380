"""Tables and figure of `known_memory`, from its CSVs alone.

    python -m studies pages                writes the tables into the study's README
    python -m studies known_memory_page    draws the figure

A number is shown once SEEDS seeds have it, with its 95% t-interval over seeds. Differences are
taken seed by seed.
"""

from functools import cache

from pipeline.columns import table
from studies import common, drawing
from studies.common import chosen, compared, groups, interval
from studies.known_memory import ATTACKS, RESULTS

SEEDS = 5
CELLS = (("demo", "tiny-llama"), ("demo", "tiny-olmo"))
CONTROL = {"oracle": "random-oracle", "critical": "random", "soft": "random"}  # of its own size
CURVE = ("Att (ours)", "weights, norm", "size of the activation", "gradient, norm", "chance")


@cache
def read(name: str) -> list[dict]:
    return common.read_lines(RESULTS / f"{name}.csv")


def lines(name: str, **wanted) -> list[dict]:
    """Of the memories that SEEDS seeds could be taught."""
    cell = ("benchmark", "model", "memory")
    taught = groups(read("memory"), *cell)
    return [r for r in chosen(read(name), **wanted)
            if len(taught[tuple(r[k] for k in cell)]) >= SEEDS]


def by_seed(rows: list[dict], value: str) -> dict[str, float]:
    """{seed: mean of a column over the seed's lines}; empty where nothing stands."""
    seeds = groups((r for r in rows if r[value]), "seed")
    return {k: sum(float(r[value]) for r in own) / len(own) for (k,), own in seeds.items()}


def less(one: dict, other: dict) -> dict[str, float]:
    """Differences by seed."""
    return {k: one[k] - other[k] for k in one if k in other}


def shown(values: dict, sign: str = "") -> str:
    return common.cell(list(values.values()), sign) if len(values) >= SEEDS else "–"


def count(gaps: list[dict]) -> str:
    """How many differences by seed a table holds, and how many of them leave out zero."""
    return "\n\n" + compared([interval(list(gap.values())) for gap in gaps if len(gap) >= SEEDS],
                             f"{SEEDS} seeds")


def matrix(rows: list[dict], down: str, across: str, value: str) -> str:
    """Values of `value`: a line for each of `down`, a column for each of `across`."""
    columns = list(groups(rows, across))
    return table([down, *(c for c, in columns)], [
        [name, *(shown(by_seed(chosen(own, **{across: c}), value)) for c, in columns)]
        for (name,), own in groups(rows, down).items()])


def memory_table(cell: dict) -> str:
    return table(["memory", "told", "updates", "share of the memory in the true neurons"], [
        [memory, *(shown(by_seed(rows, v)) for v in ("told", "updates", "share_of_memory"))]
        for (memory,), rows in groups(lines("memory", **cell), "memory").items()])


def finding_tables(cell: dict) -> str:
    rows = lines("finding", **cell)
    whole, inside = chosen(rows, layer="all"), [r for r in rows if r["layer"] != "all"]
    out = ["AUC within a layer, where the mask is drawn:", matrix(inside, "score", "memory", "auc"),
           "Precision at the planted count, within a layer:",
           matrix(inside, "score", "memory", "precision"),
           "AUC over all neurons at once:", matrix(whole, "score", "memory", "auc")]
    if held := [r for r in inside if r["memory"].startswith("held")]:
        out += ["AUC by layer, norms held:", matrix(held, "score", "layer", "auc")]
    return "\n\n".join(out)


def helping_table(cell: dict) -> str:
    every, out, gaps = lines("helping", **cell), [], []
    keys = ("memory", "objective", "attention", "mask", "lr")
    for key, rows in sorted(groups(every, *keys).items(), key=lambda x: x[0][:2]):
        if len(by_seed(rows, "forget")) < SEEDS:
            continue
        memory, objective, attention, mask, lr = key
        same = dict(memory=memory, objective=objective)
        control = chosen(every, **same, attention=attention, mask=CONTROL.get(mask, ""))
        moving = chosen(every, **same, attention="moving" if attention == "frozen" else "",
                        mask=mask)
        kept = by_seed(rows, "loss_kept")
        three = [less(by_seed(rows, "utility"), by_seed(control, "utility")),
                 less(kept, by_seed(control, "loss_kept")),
                 less(kept, by_seed(moving, "loss_kept"))]
        out.append([*key, *(shown(by_seed(rows, v)) for v in (
            "rows", "updates", "forget", "utility", "loss_forget", "loss_kept")),
            *(shown(gap, "+") for gap in three)])
        gaps += three
    return table([*keys[:-1], "rate", "rows", "updates", "forget", "utility", "loss, forget",
                  "loss, kept", "utility minus control's", "loss, kept, minus control's",
                  "loss, kept, minus moving's"], out) + count(gaps)


def staying_table(cell: dict) -> str:
    every, out, gaps = lines("staying", **cell), [], []
    keys = ("memory", "objective", "attention", "mask")
    for key, rows in groups(every, *keys).items():
        control = chosen(every, **dict(zip(keys, key)) | dict(
            mask={"so": "fo"}.get(key[-1], "random" if key[-1] != "random" else "")))
        line = [*key]
        for name in ATTACKS:
            back = {}
            for who, some in (("own", rows), ("control", control)):
                some = chosen(some, attack=name)
                back[who] = less(by_seed(some, "loss_before"), by_seed(some, "loss_after"))
            own = chosen(rows, attack=name)
            three = [less(by_seed(own, "after"), by_seed(own, "before")), back["own"],
                     less(back["own"], back["control"])]
            line += [shown(gap, "+") for gap in three]
            gaps += three
        if set(line[len(keys):]) != {"–"}:
            out.append(line)
    return table([*keys, *(f"{name}: {x}" for name in ATTACKS for x in (
        "more told", "loss won back", "minus control's"))], out) + count(gaps)


def seconds(cell: dict) -> str:
    """CPU time of the numbers above."""
    scored = sum(float(r["seconds"]) for r in lines("finding", **cell, layer="all"))
    models = [float(r["seconds"]) for r in lines("helping", **cell) if float(r["lr"])]
    return (f"CPU time: {scored:.0f} s for the scores, {sum(models):.0f} s for the {len(models)} "
            "unlearned models; originals, planting and attacks not counted.")


def curve(ax, place: dict, values_of, label: str, i: int):
    """Means with intervals against the share of the memory that the true neurons hold."""
    at, middle, half = [], [], []
    for memory, share in place.items():
        if len(values := values_of(memory)) >= SEEDS:
            m, h = interval(list(values.values()))
            at.append(share + 0.012 * (i - 2))
            middle.append(m)
            half.append(h)
    ax.errorbar(at, middle, half, label=label, fmt="osD^vP"[i], capsize=3, color=drawing.COLOURS[i])


def draw(cell: dict):
    """Finding, and what the mask gains, against how concentrated the memory is."""
    figure, ((left, right),) = drawing.canvas(1, 2, (12.5, 4.6))
    place = {m: interval(list(by_seed(rows, "share_of_memory").values()))[0]
             for (m,), rows in groups(lines("memory", **cell), "memory").items()
             if not m.startswith(("inner", "rows", "layers"))}
    found = [r for r in lines("finding", **cell) if r["layer"] != "all"]
    helped = lines("helping", objective="graddiff", **cell)
    for i, score in enumerate(CURVE):
        curve(left, place, lambda m: by_seed(chosen(found, memory=m, score=score), "auc"), score, i)
    for i, (mask, attention) in enumerate((m, a) for m in ("oracle", "critical")
                                          for a in ("frozen", "moving")):
        some = chosen(helped, attention=attention)
        curve(right, place, lambda m: less(
            by_seed(chosen(some, memory=m, mask=CONTROL[mask]), "loss_kept"),
            by_seed(chosen(some, memory=m, mask=mask), "loss_kept")),
            f"{mask}, attention {attention}", i)
    left.axhline(0.5, color="black", lw=0.8)
    right.axhline(0, color="black", lw=0.8)
    left.set(ylabel="ROC-AUC within a layer", title="finding", ylim=(-0.03, 1.03))
    right.set(ylabel="loss on kept rows: the random mask's minus its own",
              title="helping, at equal forgetting (above 0: the mask helps)")
    for ax in (left, right):
        ax.set(xlabel="share of the memory that the true rows hold")
        ax.legend(fontsize=8, loc="lower center")
        for memory, share in place.items():
            ax.annotate(memory, (share, ax.get_ylim()[0]), fontsize=7, rotation=90, ha="right",
                        va="bottom")
    title = ", ".join(cell.values())
    figure.suptitle(f"{title}: means over {SEEDS} seeds, 95% t-intervals", fontsize=11)
    drawing.save(figure, RESULTS / f"{'-'.join(cell.values())}.png")


def tables() -> str:
    """Every table of the page."""
    out = []
    for benchmark, model in CELLS:
        cell = dict(benchmark=benchmark, model=model)
        out.append(f"## Tables: {benchmark}, {model}")
        for name, make in dict(Memory=memory_table, Finding=finding_tables, Helping=helping_table,
                               Staying=staying_table).items():
            if lines(name.lower(), **cell):
                out += [f"### {name}", make(cell)]
        out.append(seconds(cell))
    return "\n\n".join(x for x in out if x)


def main(argv: list[str]):
    """The figure of the known-memory page, from its CSVs."""
    common.parser_of("known_memory_page", __doc__).parse_args(argv)
    for benchmark, model in CELLS:
        cell = dict(benchmark=benchmark, model=model)
        if len(groups(lines("memory", **cell), "memory")) > 1:
            draw(cell)
