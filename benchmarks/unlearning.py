"""One update of unlearning: FO, SO and SIMU here, and the peer's way on the same rows and weights.

    python benchmarks/unlearning.py [--size llama2-7b --device cuda --dtype bfloat16 ...]
    python benchmarks/unlearning.py --passes [--before OLD] [--profile] --size smollm2-135m ...

The peer's way is what public code does: transformers' model, every row padded to 512 tokens, the
head run on all of them, both losses in one graph, dense Sophia on every weight with its moments in
the weights' dtype. Rows are random ids of TOFU's lengths, weights random. Peak bytes are those of
live tensors (on a GPU, of its allocator); `planned` is what plan.py foretells for the same run.

--passes: one forward-backward pass over a batch instead, all weights moving, as a share of the rate
at which the model's own matrices are multiplied in the same run; OLD, an older checkout, takes
turns with it. Counted is what no way can save: each token that is read through each layer's
matrices, each answer token through the head. --profile: where the time goes.
"""

import argparse
import gc
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (add_options, clock, config, describe, older, random_model, random_rows,
                    shapes_rate, synchronize, timed, tofu_lengths)

import simu
from data import IGNORE
from pipeline import plan
from pipeline.plan import LiveBytes
from pipeline.settings import Settings

PADDED = 512  # the peer's fixed length
WAYS = "fo,so,simu,peer"


def settings(a, method: str) -> Settings:
    return Settings(method=method, batch=a.batch, epochs=1, state=a.state,
                    micro_tokens=a.micro_tokens, checkpointing=a.checkpointing, seed=a.seed)


def all_rows(a):
    n = a.batch * (a.updates + 1)
    rows = random_rows(a, tofu_lengths(2 * n, a.seed))
    return rows[:n], rows[n:]


def critical(a):
    """bool [L, D]: as many neurons as asked, spread over the layers."""
    c = config(a)
    mask = torch.zeros(c.num_hidden_layers, c.hidden_size, dtype=torch.bool)
    count = a.critical or mask.numel() // 100
    mask.view(-1)[torch.arange(count) * (mask.numel() // count)] = True
    return mask


def measured_peak(a, tensors, f) -> int:
    """Bytes alive at the highest point of f(), `tensors` counted in."""
    if a.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        f()
        return torch.cuda.max_memory_allocated()
    with LiveBytes(*tensors) as live:
        f()
    return live.peak


def report(name, seconds, state, peak, planned="") -> float:
    """A line of the table; the median of the seconds."""
    median = statistics.median(seconds)
    print(f"  {name:6}{median:10.4f}{state / 1e6:12.1f}{peak / 1e6:12.1f}{planned:>12}", flush=True)
    return median


def ours(a, method) -> float:
    """Median seconds of an update of FO, SO or SIMU."""
    model, mask = random_model(a), critical(a)
    forget, retain = all_rows(a)
    times = []

    def run(record=None):
        simu.unlearn(model, forget, retain, mask, settings(a, method), record=record)

    def look_at_the_clock(row):
        synchronize(a)
        times.append(clock(a)())

    if a.device == "cpu":  # counting slows, so what is counted is not timed
        peak = measured_peak(a, list(model.parameters()), run)
        run(look_at_the_clock)
    else:
        peak = measured_peak(a, (), lambda: run(look_at_the_clock))
    longest = max(len(r.ids) for r in forget + retain)
    answer = max(len(r.ids) - r.n_prompt for r in forget + retain)
    planned = plan.need(settings(a, method), config(a), "unlearn", method,
                        dtype=getattr(torch, a.dtype), critical=int(mask.sum()), longest=longest,
                        answer=answer)
    # The first update also warms up: it is not counted.
    return report(method, [y - x for x, y in zip(times, times[1:])], planned.state,
                  peak, f"{planned.peak / 1e6:.1f}")


def padded(a, rows):
    """ids, labels and attention mask [B, 512] as transformers wants them."""
    ids = torch.zeros(len(rows), PADDED, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    seen = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        n = len(row.ids)
        ids[b, :n] = torch.tensor(row.ids)
        labels[b, row.n_prompt:n] = ids[b, row.n_prompt:n]
        seen[b, :n] = 1
    return dict(input_ids=ids.to(a.device), attention_mask=seen.to(a.device)), labels.to(a.device)


def their_model(a):
    """transformers' model with the weights of ours."""
    from transformers import AutoConfig, AutoModelForCausalLM
    dtype = getattr(torch, a.dtype)
    given = config(a).to_hf(dtype)
    with torch.device(a.device):
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(given.pop("model_type"), **given), dtype=dtype)
    own = {n if n.startswith("lm_head") else f"model.{n}": p
           for n, p in random_model(a).named_parameters()}
    missing = theirs.load_state_dict(own, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    return theirs.train()


def peer(a) -> float:
    """Median seconds of an update the peer's way."""
    model = their_model(a)
    weights = list(model.parameters())
    m, h = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    forget, retain = all_rows(a)
    s = settings(a, "so")

    def mean_nll(rows):
        given, labels = padded(a, rows)
        logits = model(**given, use_cache=False).logits[:, :-1].float()  # [B, 511, V]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    def update(step):
        for start in range(step * a.batch, (step + 1) * a.batch, a.peer_rows):
            part = slice(start, start + a.peer_rows)
            loss = -mean_nll(forget[part]) + s.lam * mean_nll(retain[part])
            (loss * a.peer_rows / a.batch).backward()
        torch.nn.utils.clip_grad_norm_(weights, s.clip)
        with torch.no_grad():
            for p, x, y in zip(weights, m, h):
                simu.sophia_update(p, p.grad, x, y, lr=s.lr, beta1=s.beta1, beta2=s.beta2,
                                   gamma=s.gamma, eps=s.eps, weight_decay=s.weight_decay)
        model.zero_grad()

    peak = measured_peak(a, [*weights, *m, *h], lambda: update(0))
    times = [timed(a, lambda: update(step))[0] for step in range(1, a.updates + 1)]
    return report("peer", times, sum(t.nbytes for t in (*m, *h)), peak)


def passes(a):
    """Time, share of the matmul rate and agreement of passes over one batch."""
    rows, c, model = all_rows(a)[0][:a.batch], config(a), random_model(a)
    read, longest = sum(len(r.ids) - 1 for r in rows), max(len(r.ids) for r in rows)
    ways = {"now": (model, simu)}
    if a.before:
        module, old = older(a.before, "model", "simu")
        same = module.Transformer(config(a)).to(getattr(torch, a.dtype))
        same.load_state_dict(model.state_dict())
        ways["before"] = same, old
    seconds, grads = {name: [] for name in ways}, {}
    for turn in range(a.updates + 1):
        for name, (own, method) in ways.items():
            own.zero_grad()
            took, _ = timed(a, lambda: method.backward_mean_nll(own, rows, 1.0, a.micro_tokens))
            seconds[name] += [took] * (turn > 0)  # the first one warms up
            if a.before:
                grads[name] = [p.grad.float() for p in own.parameters()]
    answers = simu.answer_tokens(rows)
    layers = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    flop = 6 * (layers * read + c.vocab_size * c.hidden_size * answers)
    rate = shapes_rate(a, read)
    print(f"{a.size}, {a.batch} rows: {read} tokens to read, {answers} to predict; a padded batch "
          f"holds {a.batch * longest}; {flop:.3g} FLOP\nits matrices on {read} tokens: "
          f"{rate / 1e9:.0f} GFLOP/s")
    for name, s in seconds.items():
        print(f"  {name:7}{statistics.median(s):8.3f} s {read / statistics.median(s):7.0f} tokens/s"
              f" {flop / statistics.median(s) / rate:5.0%} of that rate")
    if a.before:
        ratio = statistics.median(x / y for x, y in zip(seconds["before"], seconds["now"]))
        off = sum((x - y).norm() ** 2 for x, y in zip(*grads.values())) ** 0.5
        norm = sum(x.norm() ** 2 for x in grads["before"]) ** 0.5
        print(f"  now {ratio:.2f} times faster (median by turn); gradients differ by "
              f"{off / norm:.1e} of their norm")
    if a.profile:
        profile(lambda: simu.backward_mean_nll(model, rows, 1.0, a.micro_tokens))


def profile(run, shown: int = 12):
    """The kernels that take most of a pass's time."""
    with torch.profiler.profile() as seen:
        run()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
    whole = sum(e.self_cpu_time_total for e in events)
    for e in events[:shown]:
        print(f"  {e.self_cpu_time_total / whole:6.1%} {e.count:6} times {e.key}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(p)
    for name, value in dict(batch=16, updates=3, micro_tokens=Settings.micro_tokens, critical=0,
                            peer_rows=16).items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    p.add_argument("--state", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--passes", action="store_true")
    p.add_argument("--before", type=Path)
    p.add_argument("--profile", action="store_true")
    p.add_argument("--ways", default=WAYS, help=f"which, comma between; methods: "
                   f"{', '.join(simu.METHODS)}")
    a = p.parse_args()
    describe(a)
    if a.passes:
        return passes(a)
    c = config(a)
    print(f"{a.size}, D {c.hidden_size}, L {c.num_hidden_layers}, {a.batch} forget and {a.batch} "
          f"retain rows an update, {int(critical(a).sum())} critical neurons, state {a.state}\n"
          f"  {'':6}{'s/update':>10}{'state MB':>12}{'peak MB':>12}{'planned MB':>12}")
    medians = {}
    for way in a.ways.split(","):
        medians[way] = peer(a) if way == "peer" else ours(a, way)
        gc.collect()
        if a.device == "cuda":
            torch.cuda.empty_cache()
    for way in medians:
        if "peer" in medians and way != "peer":
            print(f"  {way}: {medians['peer'] / medians[way]:.1f} times faster than the peer's way")


if __name__ == "__main__":
    main()
