"""Attribution (Eq. 1-2): the exact fast path, the one-prefix-at-a-time loop, the usual shortcut.

    python benchmarks/attribution.py                          compare all three on a CPU
    python benchmarks/attribution.py --curve                  cost against pairs, steps, answers
    python benchmarks/attribution.py --forget10 400 --size llama2-7b --device cuda --dtype bfloat16

The loop is the definition, simu.attribute_loop: each answer token's prefix by itself, layer by
layer, node by node. The shortcut scales every position at once and sums the loss [D2].
Weights are random, times 6 so that every nonlinearity bites.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from common import (add_options, config, describe, random_model, random_rows, shapes_rate, timed,
                    tofu_lengths)
from torch.utils.flop_counter import FlopCounterMode

import simu
from data import IGNORE, batches_by_length, collate

SHARP = 6.0


def shortcut(model, batch, steps):
    """All positions scaled together, one summed loss: not the scores of Eq. 2."""
    scores = torch.zeros(len(model.layers), model.config.hidden_size, device=batch.ids.device)
    answer = batch.targets != IGNORE  # [B, T]
    for l, block in enumerate(model.layers):
        for j in range(1, steps + 1):
            kept = []

            def scale(y):
                kept.extend([y.detach(), (y.detach() * (j / steps)).requires_grad_()])
                return kept[1] * 1  # FlopCounterMode wants no leaf out of a module

            block.mlp.intervene = scale
            logits = model.logits(model.hidden(batch.ids)[answer])  # [N, V]
            log_p = -F.cross_entropy(logits, batch.targets[answer], reduction="sum")
            grad, = torch.autograd.grad(log_p, kept[1])
            scores[l] += (kept[0].float() * grad.float())[answer].sum(0) / steps
        block.mlp.intervene = None
    return scores


def flops(f):
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def compare(a):
    """Time, FLOPs and agreement of the three on the same pairs."""
    model = random_model(a, sharp=SHARP).requires_grad_(False)
    rows = random_rows(a, [(a.prompt, a.answer)] * a.pairs)
    batch = collate(rows, a.device)
    c = config(a)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, D {c.hidden_size}, "
          f"L {c.num_hidden_layers}; {a.pairs} pairs of {a.prompt} + {a.answer} tokens, "
          f"m {a.steps}")
    ways = {"fast": lambda: simu.attribute(model, batch, steps=a.steps),
            "shortcut": lambda: shortcut(model, batch, a.steps)}
    scores = {name: f() for name, f in ways.items()}  # warms up
    seconds, scores["loop"] = {"loop": [], "fast": [], "shortcut": []}, 0
    for row in rows:  # the ways take turns, so that a busy machine is busy for all of them
        took, part = timed(a, lambda: simu.attribute_loop(model, row, steps=a.steps))
        seconds["loop"].append(took * a.pairs)
        scores["loop"] = scores["loop"] + part
        for name, f in ways.items():
            seconds[name].append(timed(a, f)[0])
    counts = {name: flops(f) for name, f in ways.items()}
    # All pairs are of one length: the first one's FLOPs are everyone's.
    counts["loop"] = a.pairs * flops(
        lambda: simu.attribute_loop(model, rows[0], steps=a.steps))
    mean = {name: statistics.mean(s) for name, s in seconds.items()}
    for name in mean:
        print(f"  {name:9}{mean[name]:10.4f} s{counts[name]:12.3e} FLOP")
    ratios = sorted(x / y for x, y in zip(seconds["loop"], seconds["fast"]))
    print(f"  fast against loop: {mean['loop'] / mean['fast']:.0f} times faster (by turn: "
          f"{ratios[0]:.0f} to {ratios[-1]:.0f}), {counts['loop'] / counts['fast']:.0f} times "
          "fewer FLOP")
    exact, top = scores["loop"], scores["loop"].abs().max()
    print(f"  fast against loop: largest difference {(scores['fast'] - exact).abs().max():.1e} "
          f"where scores reach {top:.2g}")
    by_layer = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(scores["shortcut"], exact)]
    print("  shortcut against loop: correlation by layer "
          + " ".join(f"{r:.2f}" for r in by_layer)
          + f", largest difference {(scores['shortcut'] - exact).abs().max():.1e}")


def curve(a):
    """The fast path's cost, one quantity varied at a time."""
    model = random_model(a, sharp=SHARP).requires_grad_(False)
    base = dict(pairs=a.pairs, steps=a.steps, answer=a.answer)
    print(f"from {base} with {a.prompt} prompt tokens; ratios to the row above\n"
          f"{'':10}{'value':>6}{'seconds':>10}{'':>7}{'FLOP':>12}{'':>7}{'FLOP/token':>12}")
    for name, values in (("pairs", (1, 2, 4, 8, 16)), ("steps", (2, 3, 5, 9, 17)),
                         ("answer", (8, 16, 32, 64, 128))):
        last = None
        for value in values:
            now = base | {name: value}
            batch = collate(random_rows(a, [(a.prompt, now["answer"])] * now["pairs"]), a.device)

            def run():
                return simu.attribute(model, batch, steps=now["steps"])

            run()
            seconds = statistics.median(timed(a, run)[0] for _ in range(a.repeats))
            count = flops(run)
            rise = [f"x{x:.2f}" for x in (seconds / last[0], count / last[1])] if last else "  "
            print(f"{name:10}{value:6}{seconds:10.4f}{rise[0]:>7}{count:12.3e}{rise[1]:>7}"
                  f"{count / now['pairs'] / now['answer']:12.3e}")
            last = seconds, count


def forget10(a):
    """As many pairs as asked, of forget10's lengths, as the stage runs them."""
    model = random_model(a).requires_grad_(False)
    rows = random_rows(a, tofu_lengths(a.forget10, a.seed))
    samples = sum(len(r.ids) - r.n_prompt for r in rows)
    s = simu.Attribution(steps=a.steps, attribution_tokens=a.tokens)
    simu.attribute_rows(model, rows[:8], s, title="warm up")
    # FLOPs are counted on meta-sized work: a sample of batches, scaled by their tokens.
    parts = batches_by_length([len(r.ids) for r in rows], a.tokens // max(1, a.steps - 1))
    part = [rows[i] for i in parts[len(parts) // 2]]
    share = sum(len(r.ids) - r.n_prompt for r in part) / samples
    count = flops(lambda: simu.attribute(model, collate(part, a.device), steps=a.steps)) / share
    seconds, scores = timed(a, lambda: simu.attribute_rows(model, rows, s, title="attribute"))
    peak = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if a.device == "cuda" else ""
    rate = shapes_rate(a, a.tokens)
    print(f"{a.size}: {len(rows)} pairs, {samples} samples, L {len(model.layers)}, m {a.steps}: "
          f"{seconds:.1f} s, {samples / seconds:.0f} samples/s, {count:.2e} FLOP, "
          f"{count / seconds / 1e12:.3g} TFLOP/s, {count / seconds / rate:.0%} of the rate of its "
          f"matrices on {a.tokens} tokens{peak}; finite: {bool(scores.isfinite().all())}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(p)
    for name, value in dict(pairs=8, prompt=32, answer=32, steps=5, repeats=5, forget10=0,
                            tokens=simu.Attribution.attribution_tokens).items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--curve", action="store_true")
    a = p.parse_args()
    describe(a)
    (forget10 if a.forget10 else curve if a.curve else compare)(a)


if __name__ == "__main__":
    main()
