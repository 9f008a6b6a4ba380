"""How much hangs on our readings of Eq. 1-2 [D2, D3, D4]: the scores and mask of each alternative
beside ours, and the frontier that its mask leads to.

    python benchmarks/readings.py RUN            RUN: a tiny run or a sweep's seed0, attributed

J is Jaccard's index with our mask: at the same threshold, and with as many neurons per layer as
ours. r is the correlation of scores, by layer. forget and utility are those of `sweep`.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import simu  # noqa: E402
from data import IGNORE, collate  # noqa: E402
from model import Transformer  # noqa: E402
from pipeline import figures, sweep  # noqa: E402
from pipeline.columns import table  # noqa: E402
from pipeline.settings import read_settings, resolve  # noqa: E402
from pipeline.stage import run_cli  # noqa: E402
from pipeline.stages import encoded_rows  # noqa: E402

RATES = (5e-5, 7e-5, 1e-4)
LEVEL = 0.2  # of forget, where utilities are compared


def by_sample(model, batch, nodes, *, probability=False, absolute=False):
    """Att [L, D] from one row per sample: our reading, written for comparison and not for speed."""
    with simu.frozen(model):
        clean = simu.clean_run(model, batch)
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
                    log_p = -simu.nll_sum(model, batch)
                grad, = torch.autograd.grad(log_p, seen["a"])
                att = att + (seen["beta"] * grad).sum((0, 1)) / len(nodes)
            rows.append(att)
    return torch.stack(rows)


def jaccard(a, b) -> float:
    return int((a & b).sum()) / max(1, int((a | b).sum()))


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
        r = " ".join(f"{torch.corrcoef(torch.stack(pair))[0, 1]:.2f}"
                     for pair in zip(score, reference))
    points = [judged(s, own, lr) for lr in rates]
    at = figures.utility_at(figures.pareto(points + [original]), LEVEL) if points else None
    print("done:", name, flush=True)
    return [name, int(own.sum()), *(f"{jaccard(x, mask):.2f}" for x in (own, same)), r,
            *(f"{f:.3f} / {u:.3f}" for f, u in points), "–" if at is None else f"{at:.3f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=0, help="forget rows for the scores; 0: all")
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    args = parser.parse_args()
    common.describe(argparse.Namespace(device="cpu", dtype="float32"))
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


if __name__ == "__main__":
    run_cli(main)
