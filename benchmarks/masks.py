"""Whose neurons are critical: a run's forget and retain masks against one another and chance.

    python benchmarks/masks.py RUN [OTHER]       prints Markdown tables from RUN/attribution

Chance: the Jaccard index expected of two masks with the same counts by layer, drawn at random.
OTHER: a run that forgets other rows; whose neurons both name are the model's own rather than a
forget set's. The last table leaves a layer's few largest scores out of its maximum M_l: a reading
to look at, not ours.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline  # noqa: E402, F401
import torch  # noqa: E402

import simu  # noqa: E402
from model import read_tensors  # noqa: E402
from pipeline.columns import table  # noqa: E402

THRESHOLDS = (0.1, 0.2, 0.3, 0.5, 0.7)
LEFT_OUT = (0, 1, 2, 5, 10)


def jaccard(a, b) -> tuple[float, float]:
    """Of masks [L, D], and by chance given their counts by layer."""
    both = (a.sum(1).double() * b.sum(1) / a.shape[1]).sum()
    return (((a & b).sum() / (a | b).sum()).item(), (both / (a.sum() + b.sum() - both)).item())


def correlation(a, b) -> float:
    """Of scores [L, D], the mean over layers."""
    return torch.stack([torch.corrcoef(torch.stack(x))[0, 1] for x in zip(a, b)]).mean().item()


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
          f"correlation within a layer {correlation(a, b):.2f}\n\n{table(head, rows)}\n")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    runs = {x.name: read_tensors(x / "attribution" / "scores.safetensors", ("forget", "retain"))
            for x in p.parse_args().runs}
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


if __name__ == "__main__":
    main()
