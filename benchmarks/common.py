"""What the benchmarks share: sizes, rows of TOFU's lengths, clocks, the head of a log."""

import importlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Encoded  # noqa: E402
from model import Config, Transformer  # noqa: E402
from pipeline.plan import CONFIGS  # noqa: E402

SMALL = Config(model_type="llama", vocab_size=2048, hidden_size=128, intermediate_size=512,
               num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=1024)
SIZES = {"tiny": replace(SMALL, hidden_size=64, intermediate_size=256, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=32, vocab_size=1024),
         "small": SMALL, **CONFIGS}  # small: the demo's model
# Deciles of forget10's prompt and answer lengths in LLaMA2 tokens, eos counted: 72.9 in the mean.
PROMPTS = (19, 22, 24, 25, 26, 27, 29, 30, 32, 36, 68)
ANSWERS = (9, 25, 32, 36, 39, 43, 48, 52, 57, 65, 96)


def describe(a):
    """Print what a measurement is worth nothing without."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                         text=True, cwd=Path(__file__).parent)
    commit = git.stdout.strip() or os.environ.get("SIMU_COMMIT", "unknown")
    cuda = a.device == "cuda"
    info = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    hardware = torch.cuda.get_device_name() if cuda else (
        f"{(names or ['CPU'])[0]}, {torch.get_num_threads()} of {os.cpu_count()} threads")
    print("$ python", *sys.argv)
    print(f"commit {commit}, torch {torch.__version__}, {hardware}, seconds by "
          f"{clock(a).__name__}")
    print(f"matmul {a.dtype}: {matmul_rate(a) / 1e12:.3g} TFLOP/s")


def matmul_rate(a) -> float:
    """FLOP/s of one large square matrix product, the best of ten."""
    n = 8192 if a.device == "cuda" else 1024
    x = torch.randn(n, n, device=a.device, dtype=getattr(torch, a.dtype))
    return 2 * n ** 3 / min(timed(a, lambda: x @ x)[0] for _ in range(10))


def shapes_rate(a, tokens: int) -> float:
    """FLOP/s of the model's own matrices on so many tokens: each of a layer's, and the head."""
    c, dtype = config(a), getattr(torch, a.dtype)
    wide, narrow = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    D, F, V = c.hidden_size, c.intermediate_size, c.vocab_size
    shapes = [(wide, D), (narrow, D), (narrow, D), (D, wide), (F, D), (F, D), (D, F)]
    times = {s: 0.0 for s in (*shapes, (V, D))}
    for out, width in times:
        w, x = (torch.randn(n, width, device=a.device, dtype=dtype) for n in (out, tokens))
        times[out, width] = min(timed(a, lambda: x @ w.T)[0] for _ in range(5))
    passes = [*shapes * c.num_hidden_layers, (V, D)]
    return sum(2 * tokens * o * w for o, w in passes) / sum(times[s] for s in passes)


def older(folder, *names: str):
    """Modules of an older checkout, which import one another and not ours."""
    core = ("model", "data", "simu", "eval", "stage")
    ours = {name: sys.modules.pop(name) for name in core if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in core:
            sys.modules.pop(name, None)
        sys.modules.update(ours)


def synchronize(a):
    if a.device == "cuda":
        torch.cuda.synchronize()


def clock(a):
    """time.perf_counter, or, on a single CPU thread, this process's own CPU time, on which other
    work of a shared machine has little say."""
    alone = a.device == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def timed(a, f):
    """(seconds, result) of f()."""
    synchronize(a)
    start = clock(a)()
    result = f()
    synchronize(a)
    return clock(a)() - start, result


def add_options(p):
    p.add_argument("--size", choices=SIZES, default="tiny")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--layers", type=int, help="instead of the size's own number")
    p.add_argument("--seed", type=int, default=0)


def config(a) -> Config:
    c = SIZES[a.size]
    return replace(c, num_hidden_layers=a.layers or c.num_hidden_layers)


def random_model(a, *, sharp: float = 1.0) -> Transformer:
    """Random weights, made on the device in the dtype wanted; sharp multiplies the matrices."""
    torch.manual_seed(a.seed)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, a.dtype))
        with torch.device(a.device):
            model = Transformer(config(a))
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p *= sharp
    return model


def random_rows(a, lengths) -> list[Encoded]:
    """Rows of random ids; lengths: (prompt, answer) of each."""
    g = torch.Generator().manual_seed(a.seed)
    vocab = config(a).vocab_size
    return [Encoded(torch.randint(3, vocab, (p + n,), generator=g).tolist(), p)
            for p, n in lengths]


def tofu_lengths(n: int, seed: int) -> list[tuple[int, int]]:
    """(prompt, answer) of n rows, each drawn from forget10's deciles."""
    g = torch.Generator().manual_seed(seed)

    def draw(deciles):
        x = (torch.arange(n) + 0.5) / n * (len(deciles) - 1)  # evenly spread, then shuffled
        low, d = x.long(), torch.tensor(deciles).float()
        values = d[low] + (x - low) * (d[low + 1] - d[low])
        return values.round().long()[torch.randperm(n, generator=g)].tolist()

    return list(zip(draw(PROMPTS), draw(ANSWERS)))
