"""Where the memory is known: does attribution find it, and does the mask then help?

    python -m studies known_memory find demo tiny-llama      into results/known-memory/
    python -m studies known_memory help demo tiny-llama --memories held-0.25 --objective level
    python -m studies known_memory_page                     tables and figure, from the CSVs

The forget set is learnt into known weights (`pipeline plant`) or anywhere (the ordinary original).
`find` holds scores of neurons against the known ones. `help` unlearns each memory with masks of
known quality and judges them at equal forgetting; with --stay the models are then attacked. A line
of a CSV per number; what stands there is not computed again, so any command may be stopped and
given again, and more seeds, arms or memories are added by naming them.
"""

import copy
import dataclasses
import random
import shutil
import time
from functools import cache
from pathlib import Path

import torch

import data
import eval as evaluation
import simu
from model import Transformer, UserError, read_json, write_json
from pipeline import settings
from pipeline.files import read_tensors
from pipeline.original import original_stage
from pipeline.stages import answer_losses, encoded_rows, forget_targets
from studies import attack, common, plant, readings, sweep
from studies.common import mean_loss

RESULTS = common.RESULTS / "known-memory"
CELL = ("benchmark", "model", "memory", "seed")
POINT = (*CELL, "objective", "mask", "attention", "lr")
FILES = {  # name of a CSV: its columns that name a number, and the others
    "memory": (CELL, ("told", "updates", "share_of_memory", "seconds")),
    "finding": ((*CELL, "score"), ("layer", "planted", "auc", "precision", "seconds")),
    "helping": (POINT, ("rows", "updates", "forget", "retain", "world", "utility", "loss_forget",
                        "loss_kept", "auc", "seconds")),
    "staying": (POINT, ("attack", "questions", "before", "after", "loss_before", "loss_after"))}
# What is planted and forgotten: one author's rows, as few rows of down_proj hold no more; the base
# withholds two. The TOFU slice is that of benchmarks/results/README.md.
TOFU = dict(forget_groups=2, retain_groups=4, learn_epochs=14, light_epochs=15)
BASES = {"demo": {}, "tofu": TOFU | dict(learn_batch=8, light_retain=1)}
SLICES = {"demo": dict(forget_groups=1, learn_batch=20, light_retain=1),
          "tofu": TOFU | dict(forget_groups=1, learn_batch=20, light_retain=1)}
MEMORIES = ("held-0.25", "rows-0.25", "layers-0.25", "spread-0.5", "spread-0.25", "original",
            "inner-0.05")
MASKS = ("oracle", "random-oracle", "critical", "random", "forget-only", "soft", "all", "none")
METHODS = ("fo", "so")
ATTACKS = ("int8", "int4", "relearn-half")
STAYING = ("original", "retain-only", "oracle", "critical", "random", "all", *METHODS)
KEPT = 50  # retain rows that models are judged on, and the facts beside them
# (rate, epochs at most): the same for every mask, or masks would not be what differs.
RATES = dict(graddiff=dict(frozen=(2e-3, 150), moving=(1e-4, 150), fo=(2e-4, 150), so=(1e-4, 150)),
             level=dict(frozen=(5e-3, 40), moving=(2e-4, 40), fo=(2e-4, 40), so=(1e-4, 40)))


# ------------------------------------------------------------------------------------------- files


def append(name: str, row: list):
    common.append_lines(RESULTS / f"{name}.csv", sum(FILES[name], ()), [row])


def made(name: str) -> set[tuple]:
    """The keys of a CSV's lines."""
    return set(common.groups(common.read_lines(RESULTS / f"{name}.csv"), *FILES[name][0]))


def resolved(a, seed: int, **more) -> settings.Settings:
    return settings.resolve(dict(
        benchmark=a.benchmark, model=a.model, seed=seed,
        out=str(a.runs / f"{a.benchmark}-{a.model}" / f"seed{seed}"))
        | common.STUDIED.get((a.benchmark, a.model), {}) | SLICES[a.benchmark] | more)


def prepared(a, seed: int) -> settings.Settings:
    """The settings of a seed's run: the base's two models, and the slice that is planted."""
    s = resolved(a, seed)
    base = a.runs / f"base-{s.run.parent.name}" / s.run.name
    original_stage(settings.resolve(dict(benchmark=a.benchmark, model=a.model, seed=seed,
                                         out=str(base))
                                    | common.STUDIED.get((a.benchmark, a.model), {})
                                    | BASES[a.benchmark]))
    for name in ("original", "retain-only"):
        there = s.run / name / "stage.json"
        if not there.is_file() or there.read_bytes() != (base / name / "stage.json").read_bytes():
            shutil.rmtree(s.run / name, ignore_errors=True)
            shutil.copytree(base / name, s.run / name)
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


def is_inner(memory: str) -> bool:
    """Does it lie in DEPN's F inner neurons, and not in SIMU's D?"""
    return memory.startswith("inner")


def vectors(block, inner: bool, of=lambda weight: weight):
    """Each neuron's weights, or what `of` makes of them, side by side: [D, F] or [F, 3D]."""
    down = of(block.mlp.down_proj.weight)
    if not inner:
        return down
    return torch.cat([of(block.mlp.gate_proj.weight), of(block.mlp.up_proj.weight), down.T], dim=1)


def true_neurons(s, memory: str, counts=None) -> torch.Tensor:
    """bool [L, D] or [L, F]: the planted ones; of an original, whose memory may be anywhere, the
    rows of down_proj that learning the forget set changed most, counts[l] of each layer."""
    if memory != "original":
        folder = s.run / plant.planted_name(planted_settings(s, memory))
        return read_tensors(folder / "mask.safetensors", ("mask",))[0]
    after, before = load(s, "original"), load(s, "retain-only")
    change = torch.stack([(x.mlp.down_proj.weight - y.mlp.down_proj.weight).detach().norm(dim=1)
                          for x, y in zip(after.layers, before.layers)])
    each = max(1, round(0.25 * change.shape[1]))
    return readings.largest(change, counts or [each] * len(change))


@torch.no_grad()
def share_of_memory(model, s, truth, rows, inner: bool) -> float:
    """How much of what the model knows and retain-only does not is gone once the true neurons are
    put back to retain-only's, by the answer's loss."""
    before, knows = load(s, "retain-only"), mean_loss(model, rows, s)
    without = copy.deepcopy(model)
    for new, old, own in zip(without.layers, before.layers, truth):
        for name in ("gate_proj", "up_proj", "down_proj") if inner else ("down_proj",):
            where = (slice(None), own) if inner and name == "down_proj" else own
            getattr(new.mlp, name).weight[where] = getattr(old.mlp, name).weight[where]
    return (mean_loss(without, rows, s) - knows) / (mean_loss(before, rows, s) - knows)


def note_memory(a, s, key: tuple, model, truth, rows):
    """A line of memory.csv: is it known, and how much of it do the true neurons hold?"""
    start, memory = time.process_time(), key[2]
    bench, tokenizer = settings.load_benchmark(s), data.load_tokenizer(s.run / "original")
    if memory == "original":
        updates = len((s.run / memory / "log.jsonl").read_text().splitlines())
    else:
        folder = s.run / plant.planted_name(planted_settings(s, memory))
        updates = read_json(folder / "stage.json")["updates"]
    append("memory", [*key, plant.told(model, bench.forget, tokenizer, s), updates,
                      share_of_memory(model, s, truth, rows, is_inner(memory)),
                      time.process_time() - start])


# --------------------------------------------------------------------------------------- 1 finding


def of_weights(model, rows, inner: bool) -> list:
    """Scores [L, D or F] of each neuron's weights, from one gradient of the forget loss: its norm,
    sum of |weight * gradient|, the weights' norm."""
    model.zero_grad()
    simu.backward_mean_nll(model, rows, 1.0, 8192)
    found = [torch.stack([vectors(block, inner, of).norm(dim=1, p=p).detach()
                          for block in model.layers])
             for of, p in ((lambda w: w.grad, 2), (lambda w: w * w.grad, 1), (lambda w: w, 2))]
    model.zero_grad()
    return found


def scores_of(model, forget: list, retain: list, s, inner: bool) -> dict:
    """{name: function to scores}, oriented as its authors mean it: larger, more critical."""
    m = s.steps
    nodes, left = [[j / m for j in range(k, k + m)] for k in (1, 0)]

    @cache
    def att(of="forget", steps=m, path="layer"):
        rows = dict(forget=forget, retain=retain)[of]
        if inner:  # as DEPN does it: every position scaled at once
            return everywhere([j / steps for j in range(1, steps + 1)], rows)
        return readings.summed(rows, lambda b: simu.attribute(model, b, steps=steps, path=path))

    def everywhere(nodes, rows=forget):
        return readings.summed(rows, lambda b: readings.everything_scaled(model, b, nodes,
                                                                          inner=inner))

    def reading(nodes, **how):
        return readings.summed(forget, lambda b: readings.by_sample(model, b, nodes, **how))

    def activation():
        return readings.summed(forget, lambda b: torch.stack(
            [x.abs().sum((0, 1)) for x in simu.clean_samples(model, b).beta]))

    weights = cache(lambda: of_weights(model, forget, inner))
    both = {
        "Att (ours)": att,
        "Att, sign as printed [D3]": lambda: -att(),
        "Att(forget) - Att(retain)": lambda: att() - att("retain"),
        "Att of retain rows": lambda: att("retain"),
        "Att, m = 1": lambda: att(steps=1),
        "gradient, norm": lambda: weights()[0],
        "weight times gradient, absolute": lambda: weights()[1],
        "weights, norm": lambda: weights()[2],
        "chance": lambda: torch.rand(weights()[0].shape,
                                     generator=torch.Generator().manual_seed(s.seed))}
    return both if inner else both | {
        "size of the activation": activation,
        "Att, all positions at once [D2]": lambda: everywhere(nodes),
        "Att, P for log P [D3]": lambda: reading(nodes, probability=True),
        "Att, absolute by sample [D3]": lambda: reading(nodes, absolute=True),
        "Att, nodes (j-1)/m": lambda: reading(left),
        DEAR: lambda: att(path="neuron")}


DEAR = "Att, one neuron at a time [D4]"  # D times the time of the others: only where asked for


def held_against(score, truth) -> list[tuple]:
    """(layer, planted, AUC, precision at the planted count), over all neurons and by layer."""
    out = []
    for layer, own, there in [("all", score.flatten(), truth.flatten()),
                              *((l, *pair) for l, pair in enumerate(zip(score, truth)))]:
        if 0 < (n := int(there.sum())) < len(there):
            out.append((layer, n, evaluation.auc(own[there].tolist(), own[~there].tolist()),
                        there[own.topk(n).indices].float().mean().item()))
    return out


def find(a, seed: int, memory: str):
    """Scores against the known neurons: finding.csv; how much of the memory they hold:
    memory.csv."""
    key, inner = (a.benchmark, a.model, memory, str(seed)), is_inner(memory)
    s, there = prepared(a, seed), made("finding")
    model, (_, rows) = load(s, memory), encoded_rows(s)
    truth, forget = true_neurons(s, memory), rows["forget"]
    if key not in made("memory"):
        note_memory(a, s, key, model, truth, forget)
    retain = random.Random(seed).sample(rows["retain"], len(forget))
    for name, score in scores_of(model, forget, retain, s, inner).items():
        if (*key, name) not in there and (name != DEAR or a.dear):
            start = time.process_time()
            held = held_against(score(), truth)
            for values in held:
                append("finding", [*key, name, *values, time.process_time() - start])


# ---------------------------------------------------------------------------- 2 helping, 3 staying


def masks_of(model, s, memory: str, rows: dict) -> dict:
    """{name: M [L, D]}: the true rows (oracle), ours (critical), and controls of their sizes, drawn
    by seed: random is as large as critical, random-oracle as oracle. t is the recipe's."""
    retain = random.Random(s.seed).sample(rows["retain"], len(rows["forget"]))
    scores = [readings.summed(x, lambda b: simu.attribute(model, b, steps=s.steps))
              for x in (rows["forget"], retain)]
    found = {name: simu.make_mask(dict(critical="dual").get(name, name), *scores,
                                  threshold=s.threshold, seed=s.seed)
             for name in MASKS if "oracle" not in name}
    found["oracle"] = true_neurons(s, memory, found["critical"].sum(1).tolist())
    draw = torch.rand(scores[0].shape, generator=torch.Generator().manual_seed(s.seed))
    found["random-oracle"] = readings.largest(draw, found["oracle"].sum(1).tolist())
    return found


def judged(model, s, bench, rows) -> list:
    values = sweep.judge(model, bench, s)
    forget, utility = sweep.axes(values, s.layout)
    losses = [mean_loss(model, rows[name], s) for name in ("forget", "kept")]
    return [forget, values["retain.rouge_l"], values.get("world_facts.rouge_l", float("nan")),
            utility, *losses, values.get("mia.answer_auc", float("nan"))]


def attacked(model, s, bench, key: tuple, tokenizer):
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
        append("staying", [*key, name, len(asked), before, after, loss, later])


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
    model, targets, loop, record = copy.deepcopy(start), None, None, None
    if own.objective == "level":
        targets, _ = forget_targets(own, bench, rows["forget"], model)
    else:
        loop, record = stop_at(ideal)
    return model, len(simu.unlearn(model, rows["forget"], rows["retain"], mask, own,
                                   targets=targets, loop=loop, record=record))


def missing(a, plain: tuple) -> list[tuple]:
    """Keys of the points that helping.csv lacks (or staying.csv, where it is asked for): the arms,
    and the two models to hold them against."""
    arms = [(a.objective, mask, attention) for attention in a.attention for mask in a.masks
            if (mask, attention) != ("none", "frozen")] + [(a.objective, x, "-") for x in a.methods]
    keys = [(*plain, "-", name, "-", "0") for name in ("original", "retain-only")]
    for objective, arm, attention in arms:
        lr, _ = RATES[objective][arm if attention == "-" else attention]
        keys.append((*plain, objective, arm, attention, f"{lr:g}"))
    there, stood = made("helping"), made("staying")
    return [key for key in keys if key not in there
            or a.stay and key[5] in STAYING and key not in stood]


def help_(a, seed: int, memory: str):
    """Models unlearned to equal forgetting: helping.csv; attacks on them: staying.csv."""
    jobs, there = missing(a, (a.benchmark, a.model, memory, str(seed))), made("helping")
    if not jobs:
        return
    s = prepared(a, seed)
    start, tokenizer = load(s, memory), data.load_tokenizer(s.run / "original")
    bench, rows = encoded_rows(s)
    bench = dataclasses.replace(bench, retain_eval=evaluation.spread(bench.retain_eval, KEPT))
    rows["kept"] = data.encode_for(start.config, bench.retain_eval + bench.world_facts, tokenizer,
                                   s.template)
    ideal = load(s, "retain-only")
    reached = evaluation.mean(x for _, own in answer_losses(ideal, rows["forget"], s.eval_tokens)
                              for x in own)  # over tokens, as the log has it
    masks = masks_of(start, s, memory, rows)
    for key in jobs:
        print(" ".join(key), flush=True)
        *_, objective, arm, attention, _ = key
        began, mask, updates = time.process_time(), masks.get(arm), 0
        if objective == "-":
            model = {"original": start, "retain-only": ideal}[arm]
        else:
            lr, epochs = RATES[objective][arm if attention == "-" else attention]
            own = resolved(a, seed, objective=objective, lam=2.0, batch=len(rows["forget"]), lr=lr,
                           epochs=epochs, **dict(method=arm) if attention == "-" else dict(
                               attention=attention))
            try:
                model, updates = unlearned(own, start, rows, bench, mask, reached)
            except UserError as e:
                print(f"{arm}: {e}", flush=True)
                continue
        line = [*key, "" if mask is None else int((mask != 0).sum()), updates,
                *judged(model, s, bench, rows), time.process_time() - began]
        if a.stay and arm in STAYING:
            attacked(model, s, bench, key, tokenizer)
        if key not in there:
            append("helping", line)


def main(argv: list[str]):
    """Where the memory is known: does attribution find it, and does the mask then help?"""
    p = common.parser_of("known_memory", __doc__)
    p.add_argument("what", choices=("find", "help"))
    p.add_argument("benchmark", nargs="?", default="demo")
    p.add_argument("model", nargs="?", default="tiny-llama")
    p.add_argument("--seeds", type=int, nargs="+", default=range(5))
    p.add_argument("--memories", nargs="+", default=MEMORIES, metavar="WHERE-SHARE")
    p.add_argument("--dear", action="store_true", help=f"find: also '{DEAR}'")
    p.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    p.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    p.add_argument("--attention", nargs="+", default=("frozen", "moving"))
    p.add_argument("--objective", choices=RATES, default="graddiff")
    p.add_argument("--stay", action="store_true", help="also attack what was unlearned")
    p.add_argument("--runs", type=Path, default=settings.HERE / "runs" / "known-memory")
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in a.seeds:
        for memory in a.memories:
            {"find": find, "help": help_}[a.what](a, seed, memory)
