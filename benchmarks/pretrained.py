"""Does the mask help a pretrained model? SmolLM2-135M on slices of TOFU, at equal forgetting.

    python -m pipeline attribute tofu smollm2-135m --teach --out RUN     the run, once
    python benchmarks/pretrained.py unlearn RUN [--arms fo simu ...]     into points.csv, rows.csv
    python benchmarks/pretrained.py attack RUN [--arms fo simu ...]      those models; attacks.csv
    python benchmarks/pretrained.py tables                               from the CSVs alone

An arm's model starts from RUN/original, ends, by the objective `level`, where rows never seen are,
and is kept in RUN/arms. A line of points.csv per model, of rows.csv and attacks.csv per row that it
was asked. What stands there is not made again. Text of neither benchmark: Python's own manual.
"""

import argparse
import copy
import csv
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline  # noqa: E402, F401
import torch  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import objectives  # noqa: E402
import simu  # noqa: E402
from common import append  # noqa: E402
from model import Transformer  # noqa: E402
from objectives import cell  # noqa: E402
from pipeline import attack, settings, sweep  # noqa: E402
from pipeline.columns import table  # noqa: E402
from pipeline.stages import answer_losses  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "tofu-smollm2-135m"
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
    path = RESULTS / f"{name}.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


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
                                              limits=s)
    text = answer_losses(model, manual(model, tokenizer), s.eval_tokens)
    values = metrics["values"] | dict(
        ks=objectives.ks_distance(*objectives.losses_of(rows).values()),
        manual=evaluation.mean(evaluation.mean(own) for _, own in text))
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
        began, mask, log, own = time.process_time(), None, [], run
        if objective == "-":
            model = Transformer.from_pretrained(run.run / arm, **settings.placement(run))
        else:
            own = dataclasses.replace(run, objective=objective, lam=2.0, epochs=a.epochs, **how)
            model, mask, log = objectives.unlearned(own, arm)
            model.save_pretrained(folder_of(run, *key[1:]))
        took = time.process_time() - began
        values, rows = judge(model, own)
        append(RESULTS / "rows.csv", ROWS, [[*key, r["split"], r["id"], evaluation.rouge_l(
            r["answer"], r["generation"]).recall, r["loss"]] for r in rows])
        critical = "" if mask is None else int((mask != 0).sum())
        told = ["" if values.get(v) is None else values[v] for v in POINTS[7:-1]]
        append(RESULTS / "points.csv", POINTS,
               [[key[0], run.seed, *key[1:], len(log), critical, *told, took]])


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
        _, tested = attack.halves(bench.forget, run.seed)
        some = {e.id for e in evaluation.spread(bench.forget, ATTACKED)}
        probes = attack.input_probes(bench, tokenizer, run, model.config.max_position_embeddings)
        for name in [x for x in ATTACKS if (*key, x) not in made]:
            victim, only = model, tested if name == "relearn-half" else some
            if name in attack.WEIGHTS:
                victim = copy.deepcopy(model)
                attack.attack_weights(victim, name, bench, tokenizer, run)
            asked = [p for p in probes[name if name in probes else "plain"]
                     if p.split == "forget" and p.id in only]
            scores = attack.best(attack.answers_to(asked, victim, tokenizer, run, name))
            append(RESULTS / "attacks.csv", (*ROWS[:4], "attack", "id", "rouge_l"),
                   [[*key, name, *x] for x in scores.items()])


def key_of(row: dict) -> tuple:
    return row["objective"], row["arm"], row["lr"]


def ends_table() -> str:
    """ROUGE-L over the rows of all forget sets; what has one value in each, set by set."""
    points, rows, lines = read("points"), read("rows"), []
    for key in dict.fromkeys(map(key_of, points)):
        some = [r for r in points if key_of(r) == key]
        own = [r for r in rows if key_of(r) == key]
        lines.append([*key, *("/".join(r[v] for r in some) for v in ("updates", "critical")), *(
            cell([float(r["rouge_l"]) for r in own if r["split"] == x]) for x in SPLITS), *(
            " / ".join(f"{float(r[v]):.3f}" if r[v] else "-" for r in some)
            for v in (*ENDS, "manual"))])
    return table(["objective", "arm", "lr", "updates", "critical", *SPLITS, *ENDS, "manual"], lines)


def paired_table(objective: str = "level") -> str:
    """Differences row by row, over the rows of both forget sets."""
    rows, lines = [r for r in read("rows") if r["objective"] == objective], []
    for one, other in PAIRS:
        for split in SPLITS:
            cells = []
            for value in ("rouge_l", "loss"):
                of = lambda arm: {(r["forget_set"], r["id"]): float(r[value]) for r in rows
                                  if r["arm"] == arm and r["split"] == split}
                a, b = of(one), of(other)
                cells.append([a[k] - b[k] for k in a if k in b])
            if cells[0]:
                lines.append([f"{one} - {other}", split, len(cells[0]),
                              *(cell(c, "+") for c in cells)])
    return table(["difference", "split", "rows", "ROUGE-L", "loss"], lines)


def attacks_table() -> str:
    """ROUGE-L recall of the forget rows that each attack asked: of the most successful variant."""
    found, lines = read("attacks"), []
    for key in dict.fromkeys(map(key_of, found)):
        lines.append([*key, *(cell([float(r["rouge_l"]) for r in found if key_of(r) == key
                                    and r["attack"] == name]) for name in ATTACKS)])
    return table(["objective", "arm", "lr", *ATTACKS], lines)


def draw():
    """ROUGE-L of every arm on every split; retain-only as a dashed line."""
    from matplotlib import pyplot as plt
    points = [r for r in read("points") if r["objective"] in ("-", "level")]
    arms = [x for x in ("original", *ARMS) if any(r["arm"] == x for r in points)]
    figure, axes = plt.subplots(1, len(SPLITS), figsize=(11, 0.35 * len(arms) + 1.2), sharey=True,
                                layout="constrained")
    for axis, split in zip(axes, SPLITS):
        for marker, colour, name in zip("os", attack.COLOURS, ("forget10", "forget05")):
            own = {r["arm"]: float(r[f"{split}.rouge_l"]) for r in points
                   if r["forget_set"] == name}
            there = [x for x in arms if x in own]
            axis.plot([own[x] for x in there], [-arms.index(x) for x in there], marker,
                      color=colour, alpha=0.8, label=f"two authors of {name}")
            if "retain-only" in own:
                axis.axvline(own["retain-only"], color=colour, ls="--", lw=0.8)
        axis.set(title=split.replace("_", " "), xlabel="ROUGE-L", xlim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0].set_yticks([-i for i in range(len(arms))], arms)
    axes[0].legend(fontsize=7)
    figure.savefig(RESULTS / "arms.png", dpi=110)


def tables(a):
    for title, text in {"Where each arm ends": ends_table(),
                        "Differences by row": paired_table(),
                        "ROUGE-L on forget rows under attack": attacks_table()}.items():
        print(f"## {title}\n\n{text}\n")
    draw()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("what", choices=("unlearn", "attack", "tables"))
    p.add_argument("run", type=Path, nargs="?")
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    p.add_argument("--objective", default="level", choices=simu.OBJECTIVES)
    p.add_argument("--lr", nargs="+", type=float, help="other rates than the arms' own")
    p.add_argument("--epochs", type=int, default=10)
    a = p.parse_args()
    torch.set_num_threads(1)
    dict(unlearn=unlearn, attack=attack_models, tables=tables)[a.what](a)


if __name__ == "__main__":
    main()
