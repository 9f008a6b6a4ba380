"""Whose neurons are critical, and how much hangs on our readings of Eq. 1-2 [D2, D3, D4].

    python -m studies readings RUN           RUN: a tiny run or a sweep's seed0, attributed
    python -m studies masks RUN [OTHER]      from RUN/attribution alone

`readings`: the scores and mask of each alternative beside ours, and the frontier that its mask
leads to. J is Jaccard's index with our mask: at the same threshold, and with as many neurons per
layer as ours. r is the correlation of scores, by layer. forget and utility are those of `sweep`.

`masks`: a run's forget and retain masks against one another and chance, the Jaccard index expected
of two masks with the same counts by layer, drawn at random. OTHER: a run that forgets other rows;
whose neurons both name are the model's own rather than a forget set's. The last table leaves a
layer's few largest scores out of its maximum M_l: a reading to look at, not ours.
"""

import dataclasses
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import simu
from data import IGNORE, collate
from model import Transformer
from pipeline.columns import table
from pipeline.files import read_tensors
from pipeline.settings import read_settings, resolve
from pipeline.stages import encoded_rows
from studies import common, figures, sweep

RATES = (5e-5, 7e-5, 1e-4)
LEVEL = 0.2  # of forget, where utilities are compared
THRESHOLDS = (0.1, 0.2, 0.3, 0.5, 0.7)
LEFT_OUT = (0, 1, 2, 5, 10)  # largest scores of each layer


def by_sample(model, batch, nodes, *, probability=False, absolute=False):
    """Att [L, D] from one row per sample: our reading, written for comparison and not for speed."""
    with simu.frozen(model):
        clean = simu.clean_samples(model, batch)
        rows = []
        for l, beta in enumerate(clean.beta):
            att = torch.zeros_like(beta)  # [B, A, D]: one row per sample
            for node in nodes:
                with torch.enable_grad():
                    a = (node * beta).requires_grad_()
                    x = model.layers[l].add_beta(clean.mid[l], a)
                    x = simu.upper_layers(clean, l, x)
                    log_p = model.logits(model.norm(x)).log_softmax(-1)  # [B, A, V]
                    log_p = log_p.gather(-1, clean.labels.clamp_min(0)[..., None]).squeeze(-1)
                    log_p = log_p[clean.labels != IGNORE]
                    grad, = torch.autograd.grad((log_p.exp() if probability else log_p).sum(), a)
                att += beta * grad / len(nodes)
            rows.append((att.abs() if absolute else att).sum((0, 1)))
        return torch.stack(rows)


def everything_scaled(model, batch, nodes, *, inner=False):
    """The usual shortcut: a layer scaled at every position at once, one loss for all tokens.
    inner: the MLP's F inner neurons, what goes into down_proj, instead of what comes out."""
    rows = []
    with simu.frozen(model):
        for block in model.layers:
            att, down = 0.0, block.mlp.down_proj
            for node in nodes:
                seen = {}

                def scale(y):
                    seen["beta"] = y.detach()
                    seen["a"] = (node * y.detach()).requires_grad_()
                    return seen["a"]

                hook = (down.register_forward_pre_hook(lambda _, x: scale(*x)) if inner else
                        down.register_forward_hook(lambda _, x, y: scale(y)))
                with hook, torch.enable_grad():
                    log_p = -F.cross_entropy(
                        model(batch.ids).flatten(0, 1), batch.targets.flatten(),
                        ignore_index=IGNORE, reduction="sum")
                grad, = torch.autograd.grad(log_p, seen["a"])
                att = att + (seen["beta"] * grad).sum((0, 1)) / len(nodes)
            rows.append(att)
    return torch.stack(rows)


def jaccard(a, b) -> tuple[float, float]:
    """Of masks [L, D], and by chance given their counts by layer."""
    both = float((a.sum(1).double() * b.sum(1) / a.shape[1]).sum())
    shared, either = int((a & b).sum()), int((a | b).sum())
    return shared / max(1, either), both / max(1, int(a.sum() + b.sum()) - both)


def correlations(a, b) -> list[float]:
    """Of scores [L, D], layer by layer."""
    return [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(a, b)]


def largest(scores, counts):
    """The counts[l] highest scores of each layer."""
    rank = scores.argsort(1, descending=True).argsort(1)
    return rank < torch.tensor(counts)[:, None]


def judged(s, mask, lr):
    """(forget, utility) of SIMU with this mask; without one, of the original."""
    bench, rows = encoded_rows(s)
    model = Transformer.from_pretrained(s.run / "original")
    if mask is not None:
        simu.unlearn(model, rows["forget"], rows["retain"], mask, dataclasses.replace(s, lr=lr))
    return sweep.axes(sweep.judge(model, bench, s), s.layout)


def summed(rows: list, score):
    """score(batch) over all rows: [L, D]."""
    return sum(score(collate([rows[i] for i in part]))
               for part in data.batches_by_length([len(r.ids) for r in rows], 1024)).cpu()


def all_readings(model: Transformer, rows: list, m: int) -> dict:
    """{reading: scores [L, D]}, ours first."""
    ours, left = [[j / m for j in range(k, k + m)] for k in (1, 0)]
    readings = {
        "ours: exact samples, log P, signed, layer, j/m": lambda b: by_sample(model, b, ours),
        "every position scaled at once [D2]": lambda b: everything_scaled(model, b, ours),
        "P instead of log P [D3]": lambda b: by_sample(model, b, ours, probability=True),
        "|Att| of each sample summed [D3]": lambda b: by_sample(model, b, ours, absolute=True),
        "one neuron at a time [D4]": lambda b: simu.attribute(model, b, steps=m, path="neuron"),
        "nodes (j-1)/m": lambda b: by_sample(model, b, left)}
    scores = {name: summed(rows, score) for name, score in readings.items()}
    ours = next(iter(scores))
    return scores | {"-log P, the sign that Eq. 1b prints [D3]": -scores[ours]}


def line_of(name: str, score, reference, s, rates, original) -> list:
    """A row of the table. score: None for random neurons; original: (forget, utility) of it."""
    mask = simu.critical_mask(reference, s.threshold)
    if score is None:
        own = same = simu.make_mask("random", reference, reference, threshold=s.threshold,
                                    seed=s.seed)
        r = "–"
    else:
        own = simu.critical_mask(score, s.threshold)
        same = largest(score, mask.sum(1).tolist())
        r = " ".join(f"{x:.2f}" for x in correlations(score, reference))
    points = [judged(s, own, lr) for lr in rates]
    at = figures.utility_at(figures.pareto(points + [original]), LEVEL) if points else None
    print("done:", name, flush=True)
    return [name, int(own.sum()), *(f"{jaccard(x, mask)[0]:.2f}" for x in (own, same)), r,
            *(f"{f:.3f} / {u:.3f}" for f, u in points), "–" if at is None else f"{at:.3f}"]


def main(argv: list[str]):
    """How much hangs on our readings of Eq. 1-2."""
    parser = common.parser_of("readings", __doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=0, help="forget rows for the scores; 0: all")
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    args = parser.parse_args(argv)
    common.describe()
    of_run = dataclasses.asdict(read_settings(args.run))
    s = resolve({k: v for k, v in of_run.items() if k not in ("lr", "lam")}
                | dict(method="simu", mask="dual", objective="graddiff"))
    _, encoded = encoded_rows(s)
    rows = encoded["forget"][:args.rows or None]
    model = Transformer.from_pretrained(s.run / "original")
    scores = all_readings(model, rows, s.steps)
    reference = next(iter(scores.values()))
    check = summed(rows, lambda b: simu.attribute(model, b, steps=s.steps))
    print(f"simu.attribute differs from the loop by {(check - reference).abs().max():.1e} of "
          f"{reference.abs().max():.3g}; {len(rows)} forget rows, m = {s.steps}, t = "
          f"{s.threshold}, seed {s.seed}, {s.epochs} epochs", flush=True)
    original = judged(s, None, 0) if args.rates else None
    lines = [line_of(name, score, reference, s, args.rates, original)
             for name, score in [*scores.items(), ("random neurons of equal number", None)]]
    print(table(["reading", "critical", "J at t", "J equal size", "r by layer",
                 *(f"forget / utility, {lr:g}" for lr in args.rates),
                 f"utility at forget {LEVEL}"], lines))


def overlap(title: str, pair: dict):
    """Table of two scores [L, D] by name, at every t."""
    rows = []
    for t in THRESHOLDS:
        a, b = (simu.critical_mask(x, t) for x in pair.values())
        found, chance = jaccard(a, b)
        rows.append([t, int(a.sum()), int(b.sum()), f"{found:.3f}", f"{chance:.3f}"])
    head = ["t", *(f"critical, {name}" for name in pair), "Jaccard", "chance"]
    a, b = pair.values()
    equal = int((a.argmax(1) == b.argmax(1)).sum())
    print(f"{title}: in {equal} of {len(a)} layers one neuron has the largest score of both; "
          f"correlation within a layer {sum(correlations(a, b)) / len(a):.2f}\n\n"
          f"{table(head, rows)}\n")


def masks(argv: list[str]):
    """Whose neurons are critical: forget and retain masks against one another and chance."""
    p = common.parser_of("masks", __doc__)
    p.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    runs = {x.name: read_tensors(x / "attribution" / "scores.safetensors", ("forget", "retain"))
            for x in p.parse_args(argv).runs}
    for name, (forget, retain) in runs.items():
        overlap(f"{name}: forget and retain set, of {forget.numel()} neurons",
                dict(forget=forget, retain=retain))
    for (one, a), (other, b) in itertools.combinations(runs.items(), 2):
        overlap("The forget sets", {one: a[0], other: b[0]})
        overlap("The retain sets", {one: a[1], other: b[1]})
    forget, retain = next(iter(runs.values()))
    print("The neuron with each layer's largest score, and the critical ones at t = 0.3\n")
    print(table(["layer", "forget", "retain", "critical"], [
        [l, int(f.argmax()), int(r.argmax()), int(m.sum())] for l, (f, r, m) in enumerate(
            zip(forget, retain, simu.critical_mask(forget, 0.3)))]))
    print("\nWithout a layer's largest scores in its maximum, t = 0.3\n")
    tops = [forget.sort(1, descending=True).values[:, n:n + 1] for n in LEFT_OUT]
    print(table(["left out in every layer", "critical"], [
        [n, int(((forget > 0.3 * top) & (top > 0)).sum())] for n, top in zip(LEFT_OUT, tops)]))
