"""Where the memory is known: does attribution find it, and does the mask then help?

    python benchmarks/known_memory.py find demo tiny-llama      into results/known-memory/
    python benchmarks/known_memory.py help demo tiny-llama --memories rows-0.25 original
    python benchmarks/known_memory.py tables demo tiny-llama    and the figure, from the CSVs alone

The forget set is learnt into known rows of down_proj (`pipeline plant`), into known rows and
attention, or anywhere (the ordinary original). `find` holds scores of neurons against the known
rows. `help` unlearns each with masks of known quality and judges them at equal forgetting; models
that the `level` objective made, which end equally forgotten, are then attacked. A line of a CSV per
number; what stands there is not computed again.
"""

import argparse
import copy
import csv
import dataclasses
import random
import shutil
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline  # noqa: E402, F401
import torch  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import readings  # noqa: E402
import simu  # noqa: E402
from model import Transformer, UserError, read_json, read_tensors, write_json  # noqa: E402
from pipeline import attack, figures, plant, settings, sweep  # noqa: E402
from pipeline.columns import table  # noqa: E402
from pipeline.figures import interval  # noqa: E402
from pipeline.original import original_stage  # noqa: E402
from pipeline.stage import run_cli  # noqa: E402
from pipeline.stages import (  # noqa: E402
    answer_losses, encoded_rows, forget_targets)

RESULTS = Path(__file__).resolve().parent / "results" / "known-memory"
FOUND = ("benchmark", "model", "memory", "seed", "score", "layer", "planted", "auc", "precision")
HELPED = ("benchmark", "model", "memory", "seed", "objective", "mask", "attention", "lr", "rows",
          "updates", "forget", "retain", "world", "utility", "loss_forget", "loss_kept", "auc")
STAYED = ("benchmark", "model", "memory", "seed", "objective", "mask", "attention", "attack",
          "questions", "before", "after", "loss_before", "loss_after")
MEMORY = ("benchmark", "model", "memory", "seed", "told", "updates", "share_of_memory")
# What is planted and forgotten: one author's rows, as few rows of down_proj hold no more; the base
# withholds two. The TOFU slice is that of benchmarks/results/README.md.
TOFU = dict(forget_groups=2, retain_groups=4, learn_epochs=14, light_epochs=15)
BASES = {"demo": {}, "tofu": TOFU | dict(learn_batch=8, light_retain=1)}
SLICES = {"demo": dict(forget_groups=1, learn_batch=20, light_retain=1),
          "tofu": TOFU | dict(forget_groups=1, learn_batch=20, light_retain=1)}
DEAR = "Att, one neuron at a time [D4]"  # D times the time of the others
SCORES = ("Att (ours)", "Att, sign as printed [D3]", "gradient of the row, norm",
          "weight times gradient, absolute", "weights of the row, norm", "chance",
          "size of the activation", "Att, m = 1", "Att(forget) - Att(retain)", "Att of retain rows",
          "Att, absolute by sample [D3]", "Att, P for log P [D3]", "Att, nodes (j-1)/m",
          "Att, all positions at once [D2]")
MEMORIES = ("rows-0.25", "layers-0.25", "spread-0.25", "original")
ATTACKS = ("int8", "int4", "relearn-half")


# ------------------------------------------------------------------------------------------- files


def append(name: str, header: tuple, row: list):
    path = RESULTS / f"{name}.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([header] * new + [[f"{x:.5g}" if isinstance(x, float) else x
                                            for x in row]])


def made(name: str, keys: int) -> set:
    path = RESULTS / f"{name}.csv"
    return {tuple(row[:keys]) for row in csv.reader(path.open())} if path.exists() else set()


def resolved(a, seed: int, **more) -> settings.Settings:
    return settings.resolve(dict(
        benchmark=a.benchmark, model=a.model, seed=seed,
        out=str(a.runs / f"{a.benchmark}-{a.model}" / f"seed{seed}")) | SLICES[a.benchmark] | more)


def prepared(a, seed: int) -> settings.Settings:
    """The settings of a seed's run: the base's two models, and the slice that is planted."""
    s = resolved(a, seed)
    base = a.runs / f"base-{s.run.parent.name}" / s.run.name
    if not (s.run / "settings.json").is_file():
        if not (base / "settings.json").is_file():
            original_stage(settings.resolve(dict(benchmark=a.benchmark, model=a.model, seed=seed,
                                                 out=str(base)) | BASES[a.benchmark]))
        shutil.copytree(base, s.run, dirs_exist_ok=True)
        write_json(s.run / "settings.json", dataclasses.asdict(s))
    return s


# ------------------------------------------------------------------------------------ the memories


def planted_settings(s, memory: str):
    where, share = memory.split("-")
    return dataclasses.replace(s, where=where, share=float(share))


def load(s, memory: str) -> Transformer:
    """The model that holds a memory, made if need be."""
    if memory in ("original", "retain-only"):
        return Transformer.from_pretrained(s.run / memory)
    p = planted_settings(s, memory)
    plant.plant_stage(p)
    return Transformer.from_pretrained(s.run / plant.planted_name(p))


def true_rows(s, memory: str, counts=None) -> torch.Tensor:
    """bool [L, D]: the planted rows; of an original, whose memory may be anywhere, the rows of
    down_proj that learning the forget set changed most, counts[l] of each layer."""
    if memory != "original":
        folder = s.run / plant.planted_name(planted_settings(s, memory))
        return read_tensors(folder / "mask.safetensors", ("mask",))[0]
    after, before = load(s, "original"), load(s, "retain-only")
    change = torch.stack([(x.mlp.down_proj.weight - y.mlp.down_proj.weight).detach().norm(dim=1)
                          for x, y in zip(after.layers, before.layers)])
    each = max(1, round(0.25 * change.shape[1]))
    return readings.largest(change, counts or [each] * len(change))


def mean_loss(model, rows: list, s) -> float:
    """Mean over rows of the answer's mean token loss."""
    return evaluation.mean(evaluation.mean(own)
                           for _, own in answer_losses(model, rows, s.eval_tokens))


@torch.no_grad()
def share_of_memory(model, s, truth, rows) -> float:
    """How much of what the original knows and retain-only does not is gone once the true rows are
    put back to retain-only's, by the answer's loss."""
    before, knows = load(s, "retain-only"), mean_loss(model, rows, s)
    without = copy.deepcopy(model)
    for new, old, own in zip(without.layers, before.layers, truth):
        new.mlp.down_proj.weight[own] = old.mlp.down_proj.weight[own]
    return (mean_loss(without, rows, s) - knows) / (mean_loss(before, rows, s) - knows)


# --------------------------------------------------------------------------------------- 1 finding


def of_weights(model, rows):
    """Scores [L, D] of each row of down_proj from one gradient of the forget loss."""
    model.zero_grad()
    simu.backward_mean_nll(model, rows, 1.0, 8192)
    downs = [block.mlp.down_proj.weight for block in model.layers]
    found = (torch.stack([w.grad.norm(dim=1) for w in downs]),
             torch.stack([(w * w.grad).abs().sum(1) for w in downs]).detach(),
             torch.stack([w.norm(dim=1) for w in downs]).detach())
    model.zero_grad()
    return found


def scores_of(model, forget: list, retain: list, s) -> dict:
    """{name: function to scores [L, D]}, oriented as its authors mean it: larger, more critical."""
    m = s.steps
    nodes, left = [[j / m for j in range(k, k + m)] for k in (1, 0)]

    @cache
    def att(of="forget", steps=m, path="layer"):
        rows = dict(forget=forget, retain=retain)[of]
        return readings.summed(rows, lambda b: simu.attribute(model, b, steps=steps, path=path))

    def reading(nodes, **how):
        return readings.summed(forget, lambda b: readings.by_sample(model, b, nodes, **how))

    weights = cache(lambda: of_weights(model, forget))
    return {
        "Att (ours)": att,
        "Att, sign as printed [D3]": lambda: -att(),
        "gradient of the row, norm": lambda: weights()[0],
        "weight times gradient, absolute": lambda: weights()[1],
        "weights of the row, norm": lambda: weights()[2],
        "chance": lambda: torch.rand(att().shape, generator=torch.Generator().manual_seed(s.seed)),
        "size of the activation": lambda: readings.summed(forget, lambda b: torch.stack(
            [x.abs().sum((0, 1)) for x in simu.clean_run(model, b).beta])),
        "Att, m = 1": lambda: att(steps=1),
        "Att(forget) - Att(retain)": lambda: att() - att("retain"),
        "Att of retain rows": lambda: att("retain"),
        "Att, absolute by sample [D3]": lambda: reading(nodes, absolute=True),
        "Att, P for log P [D3]": lambda: reading(nodes, probability=True),
        "Att, nodes (j-1)/m": lambda: reading(left),
        "Att, all positions at once [D2]": lambda: readings.summed(
            forget, lambda b: readings.everything_scaled(model, b, nodes)),
        DEAR: lambda: att(path="neuron")}


def area(score, truth) -> float:
    """ROC-AUC of scores against bools, of any one shape."""
    return evaluation.auc(score[truth].tolist(), score[~truth].tolist())


def held_against(score, truth) -> list[tuple]:
    """(layer, planted, AUC, precision at the planted count), by layer and over all neurons."""
    n, out = int(truth.sum()), []
    top = score.flatten().topk(n).indices
    out.append(("all", n, area(score, truth), truth.flatten()[top].float().mean().item()))
    for l, (own, there) in enumerate(zip(score, truth)):
        if 0 < (n := int(there.sum())) < len(there):
            out.append((l, n, area(own, there), there[own.topk(n).indices].float().mean().item()))
    return out


def find(a):
    """Scores against the known rows: finding.csv; how much of the memory they hold: memory.csv."""
    for seed in range(a.first_seed, a.seeds):
        for memory in a.memories:
            key = (a.benchmark, a.model, memory, str(seed))
            there = made("finding", 5)
            wanted = [x for x in a.scores if (*key, x) not in there]
            if not wanted:
                continue
            s = prepared(a, seed)
            model, truth, (_, rows) = load(s, memory), true_rows(s, memory), encoded_rows(s)
            some = evaluation.spread(rows["forget"], a.rows)
            retain = random.Random(seed).sample(rows["retain"], len(some))
            if key not in made("memory", 4):
                append("memory", MEMORY, [*key, *plant_note(s, memory),
                                          share_of_memory(model, s, truth, rows["forget"])])
            every = scores_of(model, some, retain, s)
            for name in wanted:
                for values in held_against(every[name](), truth):
                    append("finding", FOUND, [*key, name, *values])


def plant_note(s, memory: str) -> tuple:
    """(ROUGE-L of the forget set, updates) of a memory."""
    model, bench = load(s, memory), settings.load_benchmark(s)
    known = plant.told(model, bench.forget, data.load_tokenizer(s.run / "original"), s)
    if memory == "original":
        return known, len((s.run / "original" / "log.jsonl").read_text().splitlines())
    folder = s.run / plant.planted_name(planted_settings(s, memory))
    return known, read_json(folder / "stage.json")["updates"]


# ---------------------------------------------------------------------------- 2 helping, 3 staying


def masks_of(model, s, memory: str, rows: dict) -> dict:
    """{name: M [L, D]}: the true rows (oracle), ours (critical), and controls of their sizes, drawn
    by seed: random is as large as critical, random-oracle as oracle. t is the recipe's."""
    retain = random.Random(s.seed).sample(rows["retain"], len(rows["forget"]))
    scores = [readings.summed(x, lambda b: simu.attribute(model, b, steps=s.steps))
              for x in (rows["forget"], retain)]

    def mask(kind):
        return simu.make_mask(kind, *scores, threshold=s.threshold, seed=s.seed)

    found = {name: mask(kind) for name, kind in dict(
        critical="dual", random="random", all="all", none="none", soft="soft",
        **{"forget-only": "forget-only"}).items()}
    found["oracle"] = true_rows(s, memory, found["critical"].sum(1).tolist())
    draw = torch.rand(scores[0].shape, generator=torch.Generator().manual_seed(s.seed))
    found["random-oracle"] = readings.largest(draw, found["oracle"].sum(1).tolist())
    return found


def judged(model, s, bench, rows) -> list:
    values = sweep.judge(model, bench, s)
    forget, utility = sweep.axes(values, s.layout)
    losses = [mean_loss(model, rows[name], s) for name in ("forget", "kept")]
    return [forget, values["retain.rouge_l"], values.get("world_facts.rouge_l", float("nan")),
            utility, *losses, values.get("mia.answer_auc", float("nan"))]


def attacked(model, s, bench, key: list, tokenizer):
    """Lines of staying.csv for one unlearned model, which is left as it was."""
    _, tested = attack.halves(bench.forget, s.seed)
    for name in ATTACKS:
        asked = [e for e in bench.forget if name != "relearn-half" or e.id in tested]
        rows = data.encode_for(model.config, asked, tokenizer, s.template)
        changed, numbers = copy.deepcopy(model), []
        attack.attack_weights(changed, name, bench, tokenizer, s)
        for m in (model, changed):
            numbers.append((plant.told(m, asked, tokenizer, s), mean_loss(m, rows, s)))
        (before, loss), (after, later) = numbers
        append("staying", STAYED, [*key, name, len(asked), before, after, loss, later])


def stop_at(loss: float):
    """(loop, record) of simu.unlearn that end at the first update that finds the forget rows' mean
    loss where it is to be; every batch holds all of them, so the log's own number is that mean."""
    log = []

    def loop(title, steps, tensors):
        for step in range(1, steps + 1):
            yield step
            if log[-1]["loss_forget"] >= loss:
                return
    return loop, log.append


def unlearned(own, start, rows, bench, mask, ideal: float):
    """(model, updates) of one point. GradDiff knows no end, so it is stopped where retain-only's
    mean loss is; `level` ends at never-seen rows' by itself."""
    model = copy.deepcopy(start)
    if own.objective == "level":
        targets, _ = forget_targets(own, bench, rows["forget"], model)
        return model, len(simu.unlearn(model, rows["forget"], rows["retain"], mask, own,
                                       targets=targets))
    loop, record = stop_at(ideal)
    return model, len(simu.unlearn(model, rows["forget"], rows["retain"], mask, own, loop=loop,
                                   record=record))


def missing(a, seed: int, memory: str) -> list[tuple]:
    """(key, arm, attention, rate and epochs) of the points that helping.csv lacks."""
    arms = [(mask, attention) for attention in a.attention for mask in a.masks
            if (mask, attention) != ("none", "frozen")] + [(x, "-") for x in a.methods]
    there, out = made("helping", 8), []
    for arm, attention in arms:
        for lr, epochs in RATES[a.objective][arm if attention == "-" else attention]:
            key = (a.benchmark, a.model, memory, str(seed), a.objective, arm, attention,
                   f"{lr:.5g}")
            if key not in there:
                out.append((key, arm, attention, dict(lr=lr, epochs=epochs)))
    return out


def help_seed(a, seed: int, memory: str):
    s, jobs = prepared(a, seed), missing(a, seed, memory)
    if not jobs:
        return
    start, tokenizer = load(s, memory), data.load_tokenizer(s.run / "original")
    bench, rows = encoded_rows(s)
    bench = dataclasses.replace(bench, retain_eval=evaluation.spread(bench.retain_eval, a.kept))
    rows["kept"] = data.encode_for(start.config, bench.retain_eval + bench.world_facts, tokenizer,
                                   s.template)
    ideal = load(s, "retain-only")
    reached = evaluation.mean(x for _, own in answer_losses(ideal, rows["forget"], s.eval_tokens)
                              for x in own)  # over tokens, as the log has it
    plain = (a.benchmark, a.model, memory, str(seed))
    for name, model in (("original", start), ("retain-only", ideal)):
        if (*plain, "-", name, "-", "0") not in made("helping", 8):
            append("helping", HELPED, [*plain, "-", name, "-", "0", 0, 0,
                                       *judged(model, s, bench, rows)])
            if a.stay:
                attacked(model, s, bench, [*plain, "-", name, "-"], tokenizer)
    masks = masks_of(start, s, memory, rows)
    for key, arm, attention, how in jobs:
        print(" ".join(key), flush=True)
        own = resolved(a, seed, objective=a.objective, lam=2.0, **how,
                       **dict(method=arm) if attention == "-" else dict(attention=attention),
                       **dict(batch=len(rows["forget"])) if a.objective == "graddiff" else {})
        mask = masks.get(arm)
        try:
            model, updates = unlearned(own, start, rows, bench, mask, reached)
        except UserError as e:
            print(f"{arm}: {e}", flush=True)
            continue
        count = "" if mask is None else int((mask != 0).sum())
        append("helping", HELPED, [*key, count, updates, *judged(model, s, bench, rows)])
        if a.stay and arm in STAYING:
            attacked(model, s, bench, [*key[:7]], tokenizer)


STAYING = ("oracle", "critical", "random", "all", "fo", "so")
# (rate, epochs at most): the same for every mask of a kind, or masks would not be what differs.
RATES = dict(graddiff=dict(frozen=((5e-3, 60), (2e-3, 150)), moving=((4e-4, 60),),
                           fo=((4e-4, 60),), so=((2e-4, 60),)),
             level=dict(frozen=((2e-3, 20),), moving=((2e-4, 20),), fo=((2e-4, 20),),
                        so=((1e-4, 20),)))


def help_(a):
    """Models unlearned to equal forgetting: helping.csv; attacks on them: staying.csv."""
    for seed in range(a.first_seed, a.seeds):
        for memory in a.memories:
            help_seed(a, seed, memory)


# --------------------------------------------------------------------------------- tables, figure


def lines(name: str, a) -> list[dict]:
    path = RESULTS / f"{name}.csv"
    rows = csv.DictReader(path.open()) if path.exists() else []
    return [r for r in rows if (r["benchmark"], r["model"]) == (a.benchmark, a.model)]


def by_seed(rows: list[dict], value: str) -> dict[str, float]:
    """{seed: mean of a column over the seed's lines}"""
    seeds = dict.fromkeys(r["seed"] for r in rows)
    return {k: evaluation.mean(float(r[value]) for r in rows if r["seed"] == k) for k in seeds}


def shown(xs, sign: str = "") -> str:
    middle, half = interval(list(xs))
    return "–" if middle != middle else f"{middle:{sign}.3f}" + (
        "" if half != half else f" ± {half:.3f}")


def less(one: dict, other: dict) -> list[float]:
    """Differences by seed."""
    return [one[k] - other[k] for k in one if k in other]


def chosen(rows, **wanted) -> list[dict]:
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def groups(rows, *names):
    """((values of names), rows that have them), in order."""
    for key in dict.fromkeys(tuple(r[n] for n in names) for r in rows):
        yield key, chosen(rows, **dict(zip(names, key)))


def finding_table(a) -> str:
    out = []
    for (memory, score), rows in groups(lines("finding", a), "memory", "score"):
        whole = [r for r in rows if r["layer"] == "all"]
        inside = [r for r in rows if r["layer"] != "all"]
        layers = [shown(by_seed(some, "auc").values()) for _, some in
                  sorted(groups(inside, "layer"))] if memory.startswith("rows") else []
        out.append([memory, score, len(whole), *(shown(by_seed(some, value).values()) for some in (
            whole, inside) for value in ("auc", "precision")), ", ".join(layers)])
    return table(["memory", "score", "seeds", "AUC, all neurons", "precision", "AUC within a layer",
                  "precision", "AUC by layer"], out)


def control_of(every, mask: str, **wanted) -> list[dict]:
    """The lines of the random mask that is as large as this one."""
    sizes = {(r["seed"], r["rows"]) for r in chosen(every, mask=mask, **wanted)}
    drawn = (chosen(every, mask=x, **wanted) for x in ("random", "random-oracle"))
    return next((some for some in drawn if sizes & {(r["seed"], r["rows"]) for r in some}), [])


def helping_table(a) -> str:
    every, out = lines("helping", a), []
    for (memory, objective, attention, mask, lr), rows in groups(
            every, "memory", "objective", "attention", "mask", "lr"):
        control = control_of(every, mask, memory=memory, objective=objective,
                             attention=attention, lr=lr)
        values = [shown(by_seed(rows, v).values()) if rows[0][v] else "–" for v in (
            "rows", "updates", "forget", "utility", "loss_forget", "loss_kept")]
        gains = ["–" if mask in ("random", "random-oracle") else shown(
            less(by_seed(rows, v), by_seed(control, v)), "+") for v in ("utility", "loss_kept")]
        out.append([memory, attention, mask, lr, len(rows), *values, *gains])
    return table(["memory", "attention", "mask", "rate", "seeds", "rows", "updates", "forget",
                  "utility", "loss, forget", "loss, kept", "utility minus random's",
                  "loss, kept, minus random's"], out)


def staying_table(a) -> str:
    every, out = lines("staying", a), []
    for (memory, objective, attention, mask), rows in groups(every, "memory", "objective",
                                                             "attention", "mask"):
        cells = []
        for name in ATTACKS:
            own = chosen(rows, attack=name)
            control = chosen(every, memory=memory, objective=objective, attention=attention,
                             mask="random", attack=name)
            cells += [shown(by_seed(own, "after").values()),
                      shown(by_seed(own, "loss_after").values()),
                      shown(less(by_seed(own, "loss_after"), by_seed(control, "loss_after")), "+")]
        out.append([memory, objective, attention, mask, len(by_seed(rows, "after")), *cells])
    return table(["memory", "objective", "attention", "mask", "seeds", *(
        f"{name}: {x}" for name in ATTACKS for x in ("told", "loss", "loss minus random's"))], out)


def memory_table(a) -> str:
    return table(["memory", "seeds", "told", "updates", "share of the memory in the true rows"], [
        [memory, len(rows), *(shown(by_seed(rows, v).values())
                              for v in ("told", "updates", "share_of_memory"))]
        for (memory,), rows in groups(lines("memory", a), "memory")])


def draw(a):
    """Finding, and what the mask gains, against how concentrated the memory is."""
    figure, axes = figures.canvas(1, 2, (12.5, 4.6))
    (left, right), helped = axes[0], lines("helping", a)
    place = {memory: by_seed(rows, "share_of_memory")
             for (memory,), rows in groups(lines("memory", a), "memory")}

    def points(ax, values_of, label, i, shift):
        at, middle, half = [], [], []
        for memory, x in place.items():
            if len(values := values_of(memory)) > 1:
                m, h = interval(list(values))
                at.append(interval(list(x.values()))[0] + shift)
                middle.append(m)
                half.append(h)
        ax.errorbar(at, middle, half, label=label, fmt="osD^vP"[i], capsize=3,
                    color=attack.COLOURS[i])

    found = lines("finding", a)
    for i, score in enumerate(("Att (ours)", "Att of retain rows", "gradient of the row, norm",
                               "size of the activation", "chance")):
        points(left, lambda m: by_seed([r for r in chosen(found, memory=m, score=score)
                                        if r["layer"] != "all"], "auc").values(), score, i,
               0.012 * (i - 2))
    pairs = [("oracle", "frozen"), ("critical", "frozen"), ("oracle", "moving"),
             ("critical", "moving")]
    for i, (mask, attention) in enumerate(pairs):
        how = dict(objective="graddiff", attention=attention,
                   lr=f"{RATES['graddiff'][attention][0][0]:.5g}")
        points(right, lambda m: less(
            by_seed(control_of(helped, mask, memory=m, **how), "loss_kept"),
            by_seed(chosen(helped, memory=m, mask=mask, **how), "loss_kept")),
            f"{mask}, attention {attention}", i, 0.012 * (i - 1.5))
    left.axhline(0.5, color="black", lw=0.8)
    right.axhline(0, color="black", lw=0.8)
    left.set(ylabel="ROC-AUC within a layer", title="finding", ylim=(-0.03, 1.03))
    right.set(ylabel="loss on kept rows: the random mask's minus its own",
              title="helping, at equal forgetting (above 0: the mask helps)")
    for ax in (left, right):
        ax.set(xlabel="share of the memory that the true rows hold")
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    for memory, x in place.items():
        left.annotate(memory, (interval(list(x.values()))[0], 0.02), fontsize=7, rotation=90,
                      ha="right")
    figure.suptitle(f"{a.benchmark}, {a.model}: means over seeds, 95% t-intervals", fontsize=11)
    figures.save(figure, RESULTS / f"{a.benchmark}-{a.model}.png")


def tables(a):
    """Everything above from the CSVs alone."""
    for title, make in dict(Memory=memory_table, Finding=finding_table, Helping=helping_table,
                            Staying=staying_table).items():
        if lines(title.lower(), a):
            print(f"## {title}\n\n{make(a)}\n")
    draw(a)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("what", choices=("find", "help", "tables"))
    p.add_argument("benchmark", nargs="?", default="demo")
    p.add_argument("model", nargs="?", default="tiny-llama")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--first-seed", type=int, default=0)
    p.add_argument("--memories", nargs="+", default=MEMORIES)
    p.add_argument("--masks", nargs="+", default=("oracle", "critical", "random",
                                                  "random-oracle", "all", "none", "forget-only",
                                                  "soft"))
    p.add_argument("--methods", nargs="*", default=("fo", "so"))
    p.add_argument("--attention", nargs="+", default=("frozen", "moving"))
    p.add_argument("--objective", choices=RATES, default="graddiff")
    p.add_argument("--rows", type=int, default=10, help="forget rows that scores are taken from")
    p.add_argument("--kept", type=int, default=50, help="retain rows that models are judged on")
    p.add_argument("--stay", action="store_true", help="also attack what was unlearned")
    p.add_argument("--scores", nargs="+", default=SCORES, help=f"default: all but '{DEAR}'")
    p.add_argument("--runs", type=Path, default=settings.HERE / "runs" / "known-memory")
    a = p.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    {"find": find, "help": help_, "tables": tables}[a.what](a)


if __name__ == "__main__":
    run_cli(main)
