"""Does the mask help a pretrained model? SmolLM2-135M on slices of TOFU, at equal forgetting.

    python -m pipeline attribute tofu smollm2-135m --teach --out RUN     the run, once
    python -m studies pretrained unlearn RUN [--arms fo simu ...]     into points.csv, rows.csv
    python -m studies pretrained attack RUN [--arms fo simu ...]      those models; attacks.csv
    python -m studies pretrained tables                               from the CSVs alone

An arm's model starts from RUN/original, ends, by the objective `level`, where rows never seen are,
and is kept in RUN/arms. A line of points.csv per model, of rows.csv and attacks.csv per row that it
was asked. What stands there is not made again. Text of neither benchmark: Python's own manual.
"""

import dataclasses
import time
from pathlib import Path

import torch

import data
import eval as evaluation
import simu
from model import Transformer
from pipeline import settings
from pipeline.reading import generate, token_scores
from pipeline.columns import table
from studies import common, drawing, sweep
from studies.common import append_lines, cell, chosen, groups, numbers

RESULTS = common.RESULTS / "tofu-smollm2-135m"
SIMU, FROZEN = dict(method="simu"), dict(method="simu", attention="frozen")
# What moves, and at which rate. One rate for each kind of arm, or masks would not be what differs.
ARMS = {
    "fo": dict(method="fo", lr=5e-5), "so": dict(method="so", lr=5e-5),
    "simu": SIMU | dict(lr=1e-4), "simu-random": SIMU | dict(lr=1e-4, mask="random"),
    "attention": SIMU | dict(lr=1e-4, mask="none"),
    "simu-frozen": FROZEN | dict(lr=1.5e-3),
    "random-frozen": FROZEN | dict(lr=1.5e-3, mask="random")}
PAIRS = (("simu", "simu-random"), ("simu", "attention"), ("simu", "so"), ("simu", "fo"),
         ("simu-frozen", "random-frozen"))
ASKED = 40  # rows of each split that a model is judged on, evenly spaced
SPLITS = ("forget", "retain", "real_authors", "world_facts")
ENDS = ("mia.answer_auc", "ks", "mia.answer_min_40_plus", "forget.repetition", "forget.ended")
POINTS = ("forget_set", "seed", "objective", "arm", "lr", "updates", "critical",
          *(f"{x}.rouge_l" for x in SPLITS), *ENDS, "manual", "cpu_seconds")
ROWS = ("forget_set", "objective", "arm", "lr", "split", "id", "rouge_l", "loss")
ATTACKS = ("plain", "paraphrase", "shots", "prefix", "int8", "int4", "relearn-half")
ATTACKED = 20  # forget rows that every attack asks; of relearning, one author: the other is learnt


def read(name: str) -> list[dict]:
    return common.read_lines(RESULTS / f"{name}.csv")


def append(name: str, header: tuple, lines: list):
    append_lines(RESULTS / f"{name}.csv", header, lines)


def manual(model: Transformer, tokenizer) -> list[data.Encoded]:
    """40 paragraphs of 40 to 80 words from the manual that comes with Python."""
    from pydoc_data.topics import topics
    every = [" ".join(p.split()) for name in sorted(topics) for p in topics[name].split("\n\n")]
    plain = [p for p in every if 40 <= len(p.split()) <= 80 and p[0].isupper() and p[-1] == "."
             and "::" not in p and ">>>" not in p]
    rows = [data.Example(question="", answer=p, id=str(i), kind="text")
            for i, p in enumerate(evaluation.spread(plain, ASKED))]
    return data.encode_for(model.config, rows, tokenizer, "raw")


def judge(model: Transformer, s) -> tuple[dict, list[dict]]:
    """Values of a model, and the rows it was asked."""
    bench, tokenizer = settings.load_benchmark(s), data.load_tokenizer(s.run / "original")
    bench = dataclasses.replace(bench, forget=sweep.bare(bench.forget), **{
        name: sweep.bare(evaluation.spread(getattr(bench, name), ASKED))
        for name in ("retain_eval", "real_authors", "world_facts")})
    metrics, rows = evaluation.evaluate_model(model, tokenizer, bench, template=s.template,
                                              limits=s, generate=generate,
                                              token_scores=token_scores)
    values = metrics["values"] | dict(
        ks=common.ks_distance(*common.losses_of(rows).values()),
        manual=common.mean_loss(model, manual(model, tokenizer), s))
    return values, [r for r in rows if r["split"] in SPLITS]


def unlearn(a):
    """The arms of one run that the CSVs lack."""
    run = settings.read_settings(a.run)
    jobs = [(name, "-", dict(lr=0.0)) for name in ("original", "retain-only")]
    jobs += [(arm, a.objective, ARMS[arm] | (dict(lr=lr) if lr else {}))
             for arm in a.arms for lr in a.lr or [None]]
    made = {(r["forget_set"], *key_of(r)) for r in read("points")}
    for arm, objective, how in jobs:
        key = (run.forget_split, objective, arm, f"{how['lr']:.5g}")
        if key in made:
            continue
        began, critical, log, own = time.process_time(), "", [], run
        if objective == "-":
            model = Transformer.from_pretrained(run.run / arm, **settings.placement(run))
        else:
            own = dataclasses.replace(run, objective=objective, lam=2.0, epochs=a.epochs, **how)
            model, log = sweep.unlearned(own, arm)
            if (mask := sweep.mask_for(own)) is not None:
                critical = int((mask != 0).sum())
            model.save_pretrained(folder_of(run, *key[1:]))
        took = time.process_time() - began
        values, rows = judge(model, own)
        append("rows", ROWS, [[*key, r["split"], r["id"], evaluation.rouge_l(
            r["answer"], r["generation"]).recall, r["loss"]] for r in rows])
        told = ["" if values.get(v) is None else values[v] for v in POINTS[7:-1]]
        append("points", POINTS, [[
            key[0], run.seed, *key[1:], len(log), critical, *told, took]])


def folder_of(run, objective: str, arm: str, lr: str) -> Path:
    return run.run / (arm if objective == "-" else f"arms/{arm}-{objective}-{lr}")


def attack_models(a):
    """Ask forget rows of every model of a run under each attack that the CSV lacks."""
    run = settings.read_settings(a.run)
    bench, tokenizer = settings.load_benchmark(run), data.load_tokenizer(run.run / "original")
    made = {(r["forget_set"], *key_of(r), r["attack"]) for r in read("attacks")}
    for point in read("points"):
        key = (point["forget_set"], *key_of(point))
        if key[0] != run.forget_split or key[2] not in (*a.arms, "original", "retain-only"):
            continue
        model = Transformer.from_pretrained(folder_of(run, *key[1:]), **settings.placement(run))
        some = {e.id for e in evaluation.spread(bench.forget, ATTACKED)}
        for name in [x for x in ATTACKS if (*key, x) not in made]:
            scores = common.attacked(model, name, bench, tokenizer, run, some)
            append("attacks", (*ROWS[:4], "attack", "id", "rouge_l"),
                   [[*key, name, *x] for x in scores.items()])


KEY = ("objective", "arm", "lr")


def key_of(row: dict) -> tuple:
    return tuple(row[k] for k in KEY)


def ends_table() -> str:
    """ROUGE-L over the rows of all forget sets; what has one value in each, set by set."""
    lines, rows = [], groups(read("rows"), *KEY)
    for key, some in groups(read("points"), *KEY).items():
        lines.append([*key, *("/".join(r[v] for r in some) for v in ("updates", "critical")), *(
            cell(numbers(chosen(rows[key], split=x), "rouge_l")) for x in SPLITS), *(
            " / ".join(f"{float(r[v]):.3f}" if r[v] else "-" for r in some)
            for v in (*ENDS, "manual"))])
    return table([*KEY, "updates", "critical", *SPLITS, *ENDS, "manual"], lines) + (
        "\n\n± is half of a 95% t-interval over the rows of the forget sets together, not over "
        "models.")


def paired_table(objective: str = "level") -> str:
    """Differences row by row, over the rows of both forget sets."""
    rows, lines, made = chosen(read("rows"), objective=objective), [], ([], [])
    for one, other in PAIRS:
        for split in SPLITS:
            a, b = ({(r["forget_set"], r["id"]): r for r in chosen(rows, arm=arm, split=split)}
                    for arm in (one, other))
            pairs = [(a[k], b[k]) for k in a if k in b]
            if pairs:
                gaps = [[float(x[v]) - float(y[v]) for x, y in pairs] for v in ("rouge_l", "loss")]
                lines.append([f"{one} - {other}", split, len(pairs), *(cell(g, "+") for g in gaps)])
                for intervals, gap in zip(made, gaps):
                    intervals.append(common.interval(gap))
    over = "rows (of two models; not over models)"
    return "\n\n".join((
        table(["difference", "split", "rows", "ROUGE-L", "loss"], lines),
        *(f"{name}: {common.compared(x, over)}" for name, x in zip(("ROUGE-L", "Loss"), made))))


def attacks_table() -> str:
    """ROUGE-L recall of the forget rows that each attack asked: of the most successful variant."""
    return table([*KEY, *ATTACKS], [
        [*key, *(cell(numbers(chosen(own, attack=name), "rouge_l")) for name in ATTACKS)]
        for key, own in groups(read("attacks"), *KEY).items()])


def draw():
    """ROUGE-L of every arm on every split; retain-only as a dashed line."""
    points = [r for r in read("points") if r["objective"] in ("-", "level")]
    arms = [x for x in ("original", *ARMS) if chosen(points, arm=x)]
    figure, (axes,) = drawing.canvas(1, len(SPLITS), (11, 0.35 * len(arms) + 1.2))
    for axis, split in zip(axes, SPLITS):
        for marker, colour, name in zip("os", drawing.COLOURS, ("forget10", "forget05")):
            own = {r["arm"]: float(r[f"{split}.rouge_l"]) for r in chosen(points, forget_set=name)}
            there = [x for x in arms if x in own]
            axis.plot([own[x] for x in there], [-arms.index(x) for x in there], marker,
                      color=colour, alpha=0.8, label=f"two authors of {name}")
            if "retain-only" in own:
                axis.axvline(own["retain-only"], color=colour, ls="--", lw=0.8,
                             label=f"retain-only, {name}")
        axis.set(title=split.replace("_", " "), xlabel="ROUGE-L", xlim=(-0.03, 1.03))
        axis.set_yticks([-i for i in range(len(arms))], arms if axis is axes[0] else [])
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=4,
                  loc="outside lower center")
    drawing.save(figure, RESULTS / "arms.png")


def tables(a):
    for title, text in {"Where each arm ends": ends_table(),
                        "Differences by row": paired_table(),
                        "ROUGE-L on forget rows under attack": attacks_table()}.items():
        print(f"## {title}\n\n{text}\n")
    draw()


def main(argv: list[str]):
    """Does the mask help a pretrained model? SmolLM2-135M on TOFU, at equal forgetting."""
    p = common.parser_of("pretrained", __doc__)
    p.add_argument("what", choices=("unlearn", "attack", "tables"))
    p.add_argument("run", type=Path, nargs="?")
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    p.add_argument("--objective", default="level", choices=simu.OBJECTIVES)
    p.add_argument("--lr", nargs="+", type=float, help="other rates than the arms' own")
    p.add_argument("--epochs", type=int, default=10)
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    dict(unlearn=unlearn, attack=attack_models, tables=tables)[a.what](a)
