"""Whose neurons are critical: a run's forget and retain masks against one another and against chance.

    python benchmarks/masks.py RUN        prints Markdown tables from RUN/attribution

Chance: the Jaccard index expected of two masks with the same counts by layer, drawn at random. The last
table leaves a layer's few largest scores out of its maximum M_l: a reading to look at, not the method's.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline  # noqa: E402, F401

import simu  # noqa: E402
from model import read_tensors  # noqa: E402
from pipeline.columns import table  # noqa: E402

THRESHOLDS = (0.1, 0.2, 0.3, 0.5, 0.7)
LEFT_OUT = (0, 1, 2, 5, 10)


def jaccard(a, b) -> tuple[float, float]:
    """Of masks [L, D], and by chance given their counts by layer."""
    both = (a.sum(1).double() * b.sum(1) / a.shape[1]).sum()
    return (((a & b).sum() / (a | b).sum()).item(), (both / (a.sum() + b.sum() - both)).item())


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", type=Path)
    file = p.parse_args().run / "attribution" / "scores.safetensors"
    forget, retain = read_tensors(file, ("forget", "retain"))
    rows = []
    for t in THRESHOLDS:
        a, b = (simu.critical_mask(x, t) for x in (forget, retain))
        found, chance = jaccard(a, b)
        rows.append([t, int(a.sum()), int(b.sum()), f"{found:.3f}", f"{chance:.3f}"])
    print(f"{forget.numel()} neurons\n")
    print(table(["t", "critical, forget", "critical, retain", "Jaccard", "chance"], rows))
    print("\nThe neuron with each layer's largest score, and the critical ones at t = 0.3\n")
    print(table(["layer", "forget", "retain", "critical"], [
        [l, int(f.argmax()), int(r.argmax()), int(m.sum())] for l, (f, r, m) in enumerate(
            zip(forget, retain, simu.critical_mask(forget, 0.3)))]))
    print("\nWithout a layer's largest scores in its maximum, t = 0.3\n")
    tops = [forget.sort(1, descending=True).values[:, n:n + 1] for n in LEFT_OUT]
    print(table(["left out in every layer", "critical"], [
        [n, int(((forget > 0.3 * top) & (top > 0)).sum())] for n, top in zip(LEFT_OUT, tops)]))


if __name__ == "__main__":
    main()
