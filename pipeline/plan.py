"""How much memory each stage will take, before anything is downloaded, loaded or trained.

Nothing is modelled by formula: the real code runs on torch's `meta` device, where tensors have
shapes but no memory, and `LiveBytes` counts what would be alive. Three traces: the largest pass and
the update of `unlearn`, `attribute`, and an evaluation.

GB is 10^9 bytes. Not counted: torch itself, CUDA's context, the allocator's rounding.
"""

import os
import re
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import simu
from data import Encoded
from model import Config, KVCache, Transformer, UserError
from pipeline import checkpoint, fused, hub, reading
from pipeline.settings import (AUTO, TINY_MODELS, Settings, choose_device, choose_dtype, flag,
                               is_on_gpu, with_choices)
from pipeline.slices import Benchmark, load_benchmark
from pipeline.stage import mask_name, read_stage
from pipeline.tokenizers import load_tokenizer

GB = 1e9
RESERVE = GB  # of a GPU's free memory: library workspaces and the allocator's rounding
CARD = 80 * GB  # what is compared with where no GPU is at hand
PASSES = (8192, 4096, 2048, 1024, 512)  # tokens of a pass that AUTO chooses from
FEW_LAYERS = (3, 5)  # traced of a deeper model: a pass grows by the same for each
MANY = 1 << 30  # of rows, where only tokens limit a batch


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are created inside it, and of those it starts with,
    while they live: `now` and the highest `peak`. Tensors that share memory count once. Works on
    any device."""

    def __init__(self, *tensors):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}
        for t in tensors:
            self._add(t)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._add(t)
        return out

    def _add(self, t):
        memory = t.untyped_storage()
        key, size = memory._cdata, memory.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(memory, lambda _: self._drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key, size):
        del self.known[key]
        self.now -= size


# ----------------------------------------------------------------------------- what a stage needs


@dataclass(frozen=True)
class Need:
    """Bytes. activations: everything else that is alive at the highest point, be it in the passes
    or in the update."""

    weights: int
    gradients: int
    state: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.state + self.activations


def need(s: Settings, config: Config, name: str, method: str | None = None, *, dtype: torch.dtype,
         critical: int, longest: int, answer: int) -> Need:
    """Of stage `name` ("learn", "attribute", "unlearn" with a method, "evaluate"), were every row
    `longest` tokens and every answer `answer` tokens long."""
    if name == "learn":  # fine-tuning moves every weight, as FO does
        s = replace(s, method="fo", micro_tokens=s.learn_tokens, state=s.learn_state,
                    batch=s.learn_batch, checkpointing=s.learn_checkpointing)
    if name in ("learn", "unlearn"):
        s = replace(s, method=method or s.method)
        return need_of_updates(s, config, dtype, critical, longest, answer)
    model = on_meta(config, dtype).requires_grad_(False)
    trace = {"attribute": trace_attribution, "evaluate": trace_evaluation}[name]
    return Need(nbytes(model.parameters()), 0, 0, trace(model, s, longest, answer))


def on_meta(config: Config, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        return Transformer(config).to(dtype)


def nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


def zeros(B: int, T: int):
    return torch.zeros(B, T, dtype=torch.int64, device="meta")


class FusedAttention(torch.autograd.Function):
    """Stands in for fused attention, which `meta` would spell out: keeps what its kernels keep."""

    @staticmethod
    def forward(ctx, q, k, v):
        B, H, T, hd = q.shape
        y = q.new_empty(B, T, H, hd).transpose(1, 2)  # [B, H, T, hd]
        ctx.save_for_backward(q, k, v, y, q.new_empty(B, H, T, dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextmanager
def fused_attention(s: Settings):
    """Puts it in the place of torch's, wherever a model calls for that, also when it recomputes."""
    attention = F.scaled_dot_product_attention

    def fused(q, k, v, **_):
        wide = not is_on_gpu(s) and q.dtype == torch.bfloat16  # as causal_attention has it on a CPU
        return FusedAttention.apply(*(x.float() if wide else x for x in (q, k, v))).to(q.dtype)

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


def need_of_updates(s, config, dtype, critical, longest, answer) -> Need:
    """One update of `unlearn`, from the pass that comes when all gradients are alive already."""
    L = config.num_hidden_layers
    mask = torch.zeros(L * config.neuron_count, dtype=torch.bool)
    mask[torch.arange(critical) * len(mask) // max(1, critical)] = True  # spread over the layers
    mask = mask.view(L, -1)  # [L, D]
    low, high = FEW_LAYERS if L > FEW_LAYERS[1] else (L, L)
    fewer, more = (trace_update(s, replace(config, num_hidden_layers=n), dtype, mask[:n], longest,
                                answer) for n in (low, high))
    per_layer = (more[0] - fewer[0]) // max(1, high - low)
    with all_moving(on_meta(config, dtype), s, mask) as (weights, moving):
        state = nbytes(t for w in moving for t in (w.m, w.h))
        state += nbytes(w.master for w in moving if w.master.dtype != dtype)
        return Need(nbytes(weights), nbytes(w.weight.grad for w in moving), state,
                    max(more[0] + (L - high) * per_layer, more[1]))


@contextmanager
def all_moving(model, s, mask):
    """All weights, critical rows too, and those of them that move, each with its gradient."""
    model.checkpoint = s.checkpointing
    weights = {id(p): p for p in model.parameters()}
    with simu.moving_weights(model, s, mask, getattr(torch, s.state)) as moving:
        for w in moving:
            w.weight.grad = torch.empty_like(w.weight)
            weights[id(w.weight)] = w.weight
        yield [*weights.values()], moving


def trace_update(s, config, dtype, mask, longest, answer) -> tuple[int, int]:
    """Bytes beside weights, gradients and state at the highest point of the largest pass, and of
    the update."""
    model, optimiser = on_meta(config, dtype), simu.OPTIMISERS[simu.METHODS[s.method].optimiser]
    apply = fused.on(torch.device("meta"), s.state).get("apply", simu.apply_updates)
    with all_moving(model, s, mask) as (weights, moving):
        state = [t for w in moving for t in (w.weight.grad, w.master, w.m, w.h)]
        with LiveBytes(*weights, *state) as live, fused_attention(s):
            before = live.now
            trace_pass(model, s, longest, answer)
            passes, live.peak = live.peak, live.now
            del state
            # Its count stays a tensor, for meta tensors have no values.
            apply(moving, optimiser, s, lr=s.lr, step=1, shrink=1.0)
    return passes - before, live.peak - before


def widest(budget: int, longest: int, most: int) -> tuple[int, int]:
    """Rows and their tokens in the fullest batch that `batches_by_length` may cut: rows a little
    shorter than the longest can fill a budget better."""
    rows = max(1, min(most, -(-budget // longest)))
    return rows, longest if rows == 1 else min(longest, budget // rows)


def trace_pass(model, s, longest, answer):
    """The largest pass of an objective's summands."""
    B, longest = widest(s.micro_tokens, longest, s.batch)
    # As mean_nll, which must know what is padding.
    n = torch.arange(B * min(answer, longest), device="meta")
    h = model.hidden(zeros(B, longest)).flatten(0, 1)[n]  # [B * answer, D]
    F.cross_entropy(model.logits(h), n, reduction="sum").backward()


def trace_attribution(model, s, longest, answer) -> int:
    """Bytes beside the weights of `attribute` where it is widest: the lowest layer's path goes
    through all layers above."""
    B, longest = widest(s.attribution_tokens // max(1, s.steps - 1), longest, most=MANY)
    pos = zeros(B, min(answer, longest))
    with LiveBytes(*model.parameters()) as live, fused_attention(s):
        before = live.now
        clean = simu.Clean(model, zeros(B, longest), pos, pos)
        simu.last_node(clean)
        if s.steps > 1:
            simu.lower_nodes(clean, 0, s.steps, s.path)
    return live.peak - before


@torch.no_grad()
def trace_evaluation(model, s, longest, answer) -> int:
    """Bytes beside the weights of scoring, a pass of `eval_tokens` (reading.py), or of decoding, a
    cache of so many and the pass that reads the prompts, whichever takes more."""
    tokens = s.eval_tokens if is_on_gpu(s) else min(s.eval_tokens, max(reading.CPU_PASS, longest))
    B, T = widest(tokens, longest, most=MANY)
    texts = reading.Pass([0] * (B * T), [*range(T)] * B, {  # that share nothing
        b: [*range(b * T, b * T + T)] for b in range(B)})
    with LiveBytes(*model.parameters()) as live, fused_attention(s):
        before = live.now
        h = reading.read_pass(model, texts)  # [B * T, D]
        model.logits(h[:max(1, reading.LOGITS // model.config.vocab_size)]).log_softmax(-1)
        del h
        B, T = widest(s.eval_tokens, longest, most=MANY)
        cache, prompt = KVCache(model.config, B, T, model.embed_tokens.weight), max(1, T - answer)
        ids, positions = zeros(B, prompt), zeros(1, prompt).expand(B, prompt)  # as model.decode
        h = model.hidden(ids, cache.attends(positions, prompt), cos_sin=model.rope(positions))
        model.logits(h[cache.rows, cache.rows])
    return live.peak - before


# ------------------------------------------------------------------------------------ will it fit


def fit_memory(s: Settings, config: Config, name: str, method: str | None = None, *,
               rows: list[Encoded] = ()) -> tuple[Settings, dict]:
    """Settings of a stage about to load its model, with passes as large as its device's memory lets
    where they are AUTO, and notes for its stage.json; UserError if it does not fit. rows: what it
    will read, instead of the benchmark's known longest row."""
    device = choose_device(s)
    free, auto = room(device), passes_of(name)
    lengths = dict(dtype=choose_dtype(s), critical=critical_count(s, config), **lengths_of(s, rows))
    chosen, n = with_passes(s, config, name, method, free, lengths)
    if n.peak > free:
        raise UserError(f"{method or name} needs {n.peak / GB:.1f} GB and {device.type} has "
                        f"{free / GB:.1f} GB left; {HELPS[name]}")
    notes = dict(predicted_bytes=n.peak)
    if chosen != s:
        notes[auto] = getattr(chosen, auto)
        print(f"passes of {notes[auto]} tokens ({flag(auto)}), the most that {device.type}'s "
              f"{free / GB:.1f} GB and the rows ask for", flush=True)
    return chosen, notes


HELPS = dict(
    learn="lower --learn-tokens, or add --learn-checkpointing, --learn-state bfloat16 or --dtype "
          "bfloat16",
    attribute="lower --attribution-tokens or --steps, or add --dtype bfloat16",
    unlearn="lower --micro-tokens, or add --checkpointing, --state bfloat16 or --dtype bfloat16",
    evaluate="lower --eval-tokens, or add --dtype bfloat16")


def room(device: torch.device) -> int:
    """Bytes that a stage may still take on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] - RESERVE)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: all memory there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def passes_of(name: str) -> str:
    """The setting that says how many tokens a stage's passes hold."""
    return "learn_tokens" if name == "learn" else "micro_tokens"


def with_passes(s: Settings, config: Config, name: str, method, free: int, lengths: dict
                ) -> tuple[Settings, Need]:
    """s with AUTO passes resolved: the largest of PASSES that fits, no larger than all rows of an
    update need; the smallest where none does. And what a stage then needs."""
    auto = passes_of(name)
    if name not in ("learn", "unlearn") or getattr(s, auto) != AUTO:
        return s, need(s, config, name, method, **lengths)
    longest = lengths["longest"]
    all_rows = longest * (s.learn_batch if name == "learn" else s.batch)
    sizes = [n for n in PASSES if n >= longest] or [longest]
    while len(sizes) > 1 and sizes[1] >= all_rows:
        sizes.pop(0)
    for size in sizes:
        chosen = replace(s, **{auto: size})
        n = need(chosen, config, name, method, **lengths)
        if n.peak <= free:
            break
    return chosen, n


def lengths_of(s: Settings, rows: list[Encoded] = ()) -> dict:
    if rows:
        return dict(longest=max(len(r.ids) for r in rows),
                    answer=max(len(r.ids) - r.start for r in rows))
    longest, answer = LONGEST.get((s.benchmark, s.model)) or max(
        (x for (benchmark, _), x in LONGEST.items() if benchmark == s.benchmark), default=UNKNOWN)
    return dict(longest=longest, answer=answer)


def config_of(s: Settings) -> Config:
    """The shape of a run's model: its own config.json, or what it will be."""
    for folder in (s.run / "original", hub.chosen_model(s)):
        if folder and os.path.isfile(os.path.join(folder, "config.json")):
            return checkpoint.read_config(Path(folder))
    if s.tiny:
        return tiny_config(s, s.vocab)
    name = "olmo-1b-0724" if (s.benchmark, s.model) == ("lume", "olmo-1b") else s.model
    repo = re.sub("llama-", "llama", (s.weights or name).lower())  # as Llama-2-7b-hf is spelled
    known = [x for x in CONFIGS if x == name or repo.startswith("hf:") and x in repo]
    if not known:
        raise UserError(f"the shape of {s.model} is not known before it is here; run `python -m "
                        "pipeline original` first, or name a folder that holds its config.json")
    return CONFIGS[max(known, key=len)]


def tiny_config(s: Settings, vocab: int, **token_ids) -> Config:
    """A small LLaMA (grouped kv heads) or OLMo (tied head), of s.width and s.depth."""
    kind, heads = TINY_MODELS[s.model], s.width // 32
    if s.width % 64:
        raise UserError(f"--width {s.width} is not a multiple of 64")
    return Config(model_type=kind, vocab_size=vocab, hidden_size=s.width,
                  intermediate_size=4 * s.width, num_hidden_layers=s.depth,
                  num_attention_heads=heads,
                  num_key_value_heads=heads // 2 if kind == "llama" else heads,
                  max_position_embeddings=s.context, tie_word_embeddings=kind == "olmo",
                  **token_ids)


def critical_count(s: Settings, config: Config) -> int:
    """Critical neurons: of the run's mask, else Table 5's, else all."""
    folder = s.run / mask_name(s)
    if (folder / "stage.json").is_file():
        return read_stage(folder)["notes"]["critical"]
    return CRITICAL.get((s.benchmark, s.model), config.num_hidden_layers * config.neuron_count)


# ---------------------------------------------------------------------------------------- in print


def plan_command(s: Settings):
    """Print what memory each stage of a run needs, and whether it fits the device at hand."""
    folder = Path(hub.chosen_model(s))
    if s.layout == "rows" and (folder / "config.json").is_file():
        return outlook(s, folder, load_benchmark(s))
    config, device, dtype = config_of(s), choose_device(s), choose_dtype(s)
    free, where = room(device), f"{device.type}, room for"
    if device.type == "cpu" and not s.tiny and s.device == "auto":
        s = with_choices(s, device="cuda")  # whose attention keeps less
        dtype = torch.bfloat16 if s.dtype == "auto" else dtype
        free, where = CARD, "no GPU here: compared with one card of"
    about = dict(dtype=dtype, critical=critical_count(s, config), **lengths_of(s))
    count = sum(p.numel() for p in on_meta(config, dtype).parameters())
    print(f"{s.benchmark} {s.model}: {count:,} weights, {str(dtype)[6:]}; rows of at most "
          f"{about['longest']} tokens, {about['answer']} of them answer; {about['critical']} of "
          f"{config.num_hidden_layers * config.neuron_count} neurons critical")
    print(f"{where} {free / GB:.1f} GB\n")
    unit, size = ("MB", 1e6) if s.tiny else ("GB", GB)
    print(f"{unit:10}  weights  gradients   state  activations    peak  fits")
    learns = [("learn", None)] if hub.original_sources(s).base else []
    updates = [("unlearn", method) for method in simu.METHODS]
    for name, method in (*learns, ("attribute", None), *updates, ("evaluate", None)):
        of_method = with_choices(s, method=method or s.method, device=s.device)
        _, n = with_passes(of_method, config, name, method, free, about)
        parts = [x / size for x in (n.weights, n.gradients, n.state, n.activations, n.peak)]
        print("{:10}{:9.2f}{:11.2f}{:8.2f}{:13.2f}{:8.2f}".format(method or name, *parts),
              "yes" if n.peak <= free else f"no: {HELPS[name]}", sep="  ")


def outlook(s: Settings, folder: Path, bench: Benchmark):
    """Print, before anything of a run on a user's rows is trained, how many they are, how often
    they are read, and the memory that takes; UserError if it does not fit. folder: the model's."""
    tokenizer, config, rows = load_tokenizer(folder), checkpoint.read_config(folder), []
    for name, examples in (("to forget", bench.forget), ("to keep", bench.retain),
                           ("to keep, held out of training", bench.held_out),
                           ("never seen", [*bench.nonmembers, *bench.level_rows])):
        encoded = data.encode_for(config, examples, tokenizer, s.template)
        sizes = [len(r.ids) for r in encoded] or [0]
        print(f"rows {name}: {len(encoded):,}, {sum(sizes):,} tokens, the longest {max(sizes):,}")
        rows += encoded
    print(f"template {s.template}; at most {max(1, s.epochs * len(bench.forget) // s.batch)} "
          f"updates of {s.batch} + {s.batch} rows; the model answers "
          f"{len(bench.forget) + len(bench.retain_eval)} rows before and after")
    stages = [("unlearn", s.method), *([("learn", None)] if s.teach else [])]
    needs = [fit_memory(s, config, *stage, rows=rows)[1] for stage in stages]
    print(f"memory: {max(n['predicted_bytes'] for n in needs) / GB:.1f} GB at most", flush=True)


# ------------------------------------------------------------------------------------------ tables

LLAMA2_7B = Config(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                   num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=4096)
OLMO_1B = Config(model_type="olmo", vocab_size=50304, hidden_size=2048, intermediate_size=8192,
                 num_hidden_layers=16, num_attention_heads=16, max_position_embeddings=2048,
                 tie_word_embeddings=True)
CONFIGS = {  # of models that need not be at hand; also where the name of an hf: repository says so
    "llama2-7b": LLAMA2_7B,
    "llama3.2-1b": Config(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        max_position_embeddings=131072, tie_word_embeddings=True),
    "smollm2-135m": Config(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, tie_word_embeddings=True),
    "olmo-1b": OLMO_1B,
    "olmo-1b-0724": replace(OLMO_1B, max_position_embeddings=4096, clip_qkv=8.0,
                            tie_word_embeddings=False)}  # the 1B that LUME's checkpoint grew from
CRITICAL = {("tofu", "llama2-7b"): 722, ("lume", "llama2-7b"): 1870,  # Table 5
            ("tofu", "olmo-1b"): 29554, ("lume", "olmo-1b"): 23089}
# Tokens of the longest row and of the longest answer, eos counted, in the files and recipes used.
LONGEST = {("tofu", "llama2-7b"): (164, 105), ("tofu", "olmo-1b"): (142, 91),
           ("lume", "llama2-7b"): (478, 176), ("lume", "olmo-1b"): (421, 155),
           ("demo", "tiny-llama"): (66, 41), ("demo", "tiny-olmo"): (65, 41),
           ("tofu", "tiny-llama"): (126, 95), ("tofu", "tiny-olmo"): (122, 94),
           ("lume", "tiny-llama"): (432, 108), ("lume", "tiny-olmo"): (413, 103)}
UNKNOWN = (512, 256)  # of rows of a user's, until they are encoded
