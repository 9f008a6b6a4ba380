"""What every stage will need, before anything is downloaded: memory, disk, passes.

Nothing is modelled by formula: the real code runs on torch's `meta` device, where tensors have
shapes but no memory, and `LiveBytes` counts what would be alive.

GB is 10^9 bytes. Not counted: torch itself, CUDA's context, the allocator's rounding.
"""

import os
import re
import shutil
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import simu
from data import Encoded
from model import Config, KVCache, Transformer, UserError
from pipeline import checkpoint, hub, pace, reading
from pipeline.settings import (AUTO, LIMIT, Settings, choose_device, choose_dtype, flag, is_on_gpu, load_benchmark,
                               tiny_config, with_choices)
from pipeline.stage import mask_name, read_stage

GB = 1e9
RESERVE = GB  # of a GPU's free memory: library workspaces and the allocator's rounding
CARD = 80 * GB  # what is compared with where no GPU is at hand
CARDS = (24, 48, 80)  # GB, whose settings the plan names
PASSES = (8192, 4096, 2048, 1024, 512)  # tokens of a pass that AUTO chooses from
FEW_LAYERS = (3, 5)  # traced of a deeper model: a pass grows by the same for each

LLAMA2 = dict(model_type="llama", vocab_size=32000, max_position_embeddings=4096)
CONFIGS = {  # of models that need not be at hand; also found in the name of an hf: repository
    "llama2-7b": Config(**LLAMA2, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                        num_attention_heads=32),
    "llama2-13b": Config(**LLAMA2, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                         num_attention_heads=40),
    "llama2-70b": Config(**LLAMA2, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                         num_attention_heads=64, num_key_value_heads=8),
    "llama3.2-1b": Config(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        max_position_embeddings=131072, tie_word_embeddings=True),
    "smollm2-135m": Config(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, tie_word_embeddings=True),
    "olmo-1b": Config(
        model_type="olmo", vocab_size=50304, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_attention_heads=16, max_position_embeddings=2048,
        tie_word_embeddings=True),
    "olmo-1b-0724": Config(  # the 1B that LUME's own checkpoint grew from
        model_type="olmo", vocab_size=50304, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_attention_heads=16, max_position_embeddings=4096, clip_qkv=8.0),
}
CRITICAL = {("tofu", "llama2-7b"): 722, ("lume", "llama2-7b"): 1870,  # Table 5
            ("tofu", "olmo-1b"): 29554, ("lume", "olmo-1b"): 23089}
# Tokens of the longest row and of the longest answer, eos counted, in the files and recipes used.
LONGEST = {("tofu", "llama2-7b"): (164, 105), ("tofu", "olmo-1b"): (142, 91),
           ("lume", "llama2-7b"): (478, 176), ("lume", "olmo-1b"): (421, 155),
           ("demo", "tiny-llama"): (66, 41), ("demo", "tiny-olmo"): (65, 41),
           ("tofu", "tiny-llama"): (126, 95), ("tofu", "tiny-olmo"): (122, 94),
           ("lume", "tiny-llama"): (432, 108), ("lume", "tiny-olmo"): (413, 103)}
UNKNOWN = (512, 256)  # of rows of one's own, until they are encoded
MEAN = {("tofu", "llama2-7b"): (73, 45), ("tofu", "olmo-1b"): (61, 38),  # of the forget rows
        ("lume", "llama2-7b"): (89, 26), ("lume", "olmo-1b"): (72, 20),
        ("demo", "tiny-llama"): (52, 30), ("demo", "tiny-olmo"): (52, 31),
        ("tofu", "tiny-llama"): (76, 44), ("tofu", "tiny-olmo"): (73, 43),
        ("lume", "tiny-llama"): (87, 25), ("lume", "tiny-olmo"): (85, 25)}
TOFU_ROWS = {"forget01": 40, "forget05": 200, "forget10": 400}
TOFU_RETAIN_EVAL, TOFU_FACTS, LUME_ROWS = 400, 217, 2732  # rows asked about; forget rows
STAGES = (("attribute", None), *(("unlearn", method) for method in simu.METHODS),
          ("evaluate", None))
TIMED = 500_000_000  # weights up to which a pass is timed on a CPU: seconds, and a run that may be
ANY_NUMBER = 1 << 30  # of rows, where only tokens limit a batch
NEEDS = {}  # of what was asked before: for the table, for advice, for each card
WIDTHS = (9, 11, 8, 13, 8)  # of the table's columns


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it, and of those it is given, while they live:
    `now` and the highest `peak`. Tensors that share memory count once. Works on any device."""

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
    asked = repr((s, config, name, method, dtype, critical, longest, answer))
    if asked not in NEEDS:
        NEEDS[asked] = traced(s, config, name, method, dtype, critical, longest, answer)
    return NEEDS[asked]


def traced(s, config, name, method, dtype, critical, longest, answer) -> Need:
    if name == "learn":  # fine-tuning moves every weight, as FO does
        own = replace(s, method="fo", micro_tokens=s.learn_tokens, state=s.learn_state,
                      checkpointing=s.learn_checkpointing)
        return _unlearning(own, config, dtype, critical, longest, answer, s.learn_batch)
    if name == "unlearn":
        return _unlearning(replace(s, method=method), config, dtype, critical, longest, answer,
                           _rows_of_update(s))
    model = _meta(config, dtype).requires_grad_(False)
    weights = sum(p.nbytes for p in model.parameters())
    if name == "attribute":
        return Need(weights, 0, 0, _trace_attribution(model, s, longest, answer))
    if name == "evaluate":
        return Need(weights, 0, 0, _trace_evaluation(model, s, longest, answer))
    raise ValueError(f"no plan for stage {name!r}")


def _meta(config: Config, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        return Transformer(config).to(dtype)


def _weights(config: Config, dtype: torch.dtype) -> int:
    """Bytes of a model."""
    return sum(p.numel() for p in _meta(config, dtype).parameters()) * dtype.itemsize


class _Fused(torch.autograd.Function):
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
def _fused_attention(s: Settings):
    """Puts it in the place of torch's, wherever a model calls for that, also when it recomputes."""
    own = F.scaled_dot_product_attention

    def fused(q, k, v, **_):
        wide = not is_on_gpu(s) and q.dtype == torch.bfloat16  # as causal_attention has it there
        return _Fused.apply(*(x.float() if wide else x for x in (q, k, v))).to(q.dtype)

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _ids(B: int, T: int):
    return torch.zeros(B, T, dtype=torch.int64, device="meta")


def _rows_of_update(s: Settings) -> int:
    """Rows of an update that a pass may hold: on a GPU both kinds (fused.backward_together)."""
    objective = simu.OBJECTIVES[s.objective]
    joined = is_on_gpu(s) and objective.forget and objective.weight != 0 and not objective.read
    return 2 * s.batch if joined else s.batch


def _unlearning(s, config, dtype, critical, longest, answer, most) -> Need:
    """One update of `unlearn`, from the pass that finds all gradients already there; a pass holds
    at most so many rows."""
    L, mask = config.num_hidden_layers, _spread_mask(config, critical)
    low, high = FEW_LAYERS if L > FEW_LAYERS[1] else (L, L)
    fewer, at_most = (_trace_unlearning(s, replace(config, num_hidden_layers=n), dtype, mask[:n],
                                        longest, answer, most) for n in (low, high))
    passes, update = at_most
    per_layer = (passes - fewer[0]) // max(1, high - low)
    return Need(*_sizes_held(s, config, dtype, mask), max(passes + (L - high) * per_layer, update))


def _spread_mask(config, critical: int):
    """A mask [L, D] of so many neurons, spread over the layers."""
    mask = torch.zeros(config.num_hidden_layers * config.neuron_count, dtype=torch.bool)
    mask[torch.arange(critical) * len(mask) // max(1, critical)] = True
    return mask.view(config.num_hidden_layers, -1)


def _sizes_held(s, config, dtype, mask) -> tuple[int, int, int]:
    """Bytes of weights, critical rows counted in, of gradients and of optimiser state."""
    with _all_moving(_meta(config, dtype), s, mask) as (weights, moving):
        return (sum(p.nbytes for p in weights), sum(w.weight.grad.nbytes for w in moving),
                sum(w.m.nbytes + w.h.nbytes + w.master.nbytes * (w.master.dtype != dtype)
                    for w in moving))


@contextmanager
def _all_moving(model, s, mask):
    """All weights, critical rows too, and those of them that move, each with its gradient."""
    model.checkpoint = s.checkpointing
    own = {id(p): p for p in model.parameters()}
    with simu.moving_weights(model, s, mask, getattr(torch, s.state)) as moving:
        for w in moving:
            w.weight.grad = torch.empty_like(w.weight)
        yield [*(own | {id(w.weight): w.weight for w in moving}).values()], moving


def _trace_unlearning(s, config, dtype, mask, longest, answer, most) -> tuple[int, int]:
    """Bytes beside weights, gradients and state at the highest point of the largest pass, and of
    the update."""
    model = _meta(config, dtype)
    with _all_moving(model, s, mask) as (weights, moving):
        state = [t for w in moving for t in (w.weight.grad, w.master, w.m, w.h)]
        with LiveBytes(*weights, *state) as live, _fused_attention(s):
            held = live.now
            _trace_pass(model, s, longest, answer, most)
            passes, live.peak = live.peak, live.now
            del state
            # Its count stays a tensor, for meta tensors have no values.
            simu.apply_updates(moving, simu.OPTIMISERS[simu.METHODS[s.method].optimiser], s,
                               lr=s.lr, step=1, shrink=1.0)
    return passes - held, live.peak - held


def _widest(budget: int, longest: int, most: int) -> tuple[int, int]:
    """Rows and their tokens in the fullest batch that `batches_by_length` may cut: rows a little
    shorter than the longest can fill a budget better."""
    rows = max(1, min(most, -(-budget // longest)))
    return rows, longest if rows == 1 else min(longest, budget // rows)


def _trace_pass(model, s, longest, answer, most):
    """The largest pass of an objective's summands, of at most so many rows."""
    B, longest = _widest(s.micro_tokens, longest, most)
    answer = min(answer, longest)
    # As mean_nll, which must know what is padding.
    n = torch.arange(B * answer, device="meta")
    hidden = model.hidden(_ids(B, longest)).flatten(0, 1)[n]  # [B * answer, D]
    F.cross_entropy(model.logits(hidden), n, reduction="sum").backward()


def _trace_attribution(model, s, longest, answer) -> int:
    """Bytes beside the weights of `attribute` where it is widest: the lowest layer's path goes
    through all layers above."""
    B, longest = _widest(s.attribution_tokens // max(1, s.steps - 1), longest, most=ANY_NUMBER)
    pos = _ids(B, min(answer, longest))
    with LiveBytes(*model.parameters()) as live, _fused_attention(s):
        clean = simu.clean_pass(model, _ids(B, longest), pos, pos)
        simu.last_node(clean)
        if s.steps > 1:
            simu.lower_nodes(clean, 0, s.steps, s.path)
    return live.peak - sum(p.nbytes for p in model.parameters())


@torch.no_grad()
def _trace_evaluation(model, s, longest, answer) -> int:
    """Bytes beside the weights of scoring, a pass of `eval_tokens` (reading.py), or of decoding, a
    cache of so many and the pass that reads the prompts, whichever takes more."""
    tokens = s.eval_tokens if is_on_gpu(s) else min(s.eval_tokens, max(reading.CPU_PASS, longest))
    scored = _widest(tokens, longest, most=ANY_NUMBER)
    B, T = _widest(s.eval_tokens, longest, most=ANY_NUMBER)
    return max(_scoring_bytes(model, s, *scored),
               _decoding_bytes(model, s, B, max(1, T - answer), T))


def _scoring_bytes(model, s, B: int, T: int) -> int:
    """Of a pass over B texts that share nothing, its logits or their log-softmax counted in."""
    texts = reading.Pass([0] * (B * T), [*range(T)] * B, {
        b: [*range(b * T, b * T + T)] for b in range(B)})
    with LiveBytes(*model.parameters()) as live, _fused_attention(s):
        held = live.now
        h = reading.read_pass(model, texts)
        model.logits(h[:max(1, reading.LOGITS // model.config.vocab_size)]).log_softmax(-1)
    return live.peak - held


def _decoding_bytes(model, s, B: int, T: int, columns: int) -> int:
    """Of keys and values of B rows of so many columns, and of the pass that reads B prompts."""
    with LiveBytes(*model.parameters()) as live, _fused_attention(s):
        held = live.now
        cache = KVCache(model.config, B, columns, model.embed_tokens.weight)
        ids, positions = _ids(B, T), _ids(1, B)[0]  # as model.decode holds them
        model.logits(model.hidden(ids, cache.prompts())[cache.rows, positions])
    return live.peak - held


# ------------------------------------------------------------------------------------ will it fit


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


def config_of(s: Settings) -> Config:
    """The shape of a run's model: its own config.json, or what it will be."""
    for folder in (s.run / "original", hub.given_model(s)):
        if folder and os.path.isfile(os.path.join(folder, "config.json")):
            return checkpoint.read_config(folder)
    if s.tiny:
        return tiny_config(s, SimpleNamespace(vocab_size=s.vocab, bos_id=1, eos_id=2))
    name = "olmo-1b-0724" if (s.benchmark, s.model) == ("lume", "olmo-1b") else s.model
    own = re.sub("llama-", "llama", (s.weights or name).lower())  # as Llama-2-13b-hf is spelled
    known = [x for x in CONFIGS if x == name or own.startswith("hf:") and x in own]
    if not known:
        raise UserError(f"the shape of {s.model} is not known before it is here; run `python -m "
                        "pipeline original` first, or name a folder that holds its config.json")
    return CONFIGS[max(known, key=len)]


def critical_count(s: Settings, config: Config) -> int:
    """Critical neurons: of the run's mask, else Table 5's, else all."""
    made = s.run / mask_name(s)
    if (made / "stage.json").is_file():
        return read_stage(made)["notes"]["critical"]
    return CRITICAL.get((s.benchmark, s.model), config.num_hidden_layers * config.neuron_count)


def fit_memory(s: Settings, config: Config, name: str, method: str | None = None, *,
               rows: list[Encoded] = ()) -> tuple[Settings, dict]:
    """Settings of a stage about to load its model, with passes as large as its device's memory lets
    where they are AUTO, and notes for its stage.json; UserError if it does not fit. rows: what it
    will read, instead of the benchmark's known longest row."""
    device = choose_device(s)
    given = dict(dtype=choose_dtype(s), critical=critical_count(s, config), **_lengths(s, rows))
    free, auto = room(device), tokens_name(name)
    chosen, n = with_passes(s, config, name, method, free, given)
    if n.peak > free:
        advice = _advice(chosen, config, name, method, free, given)
        raise UserError(f"{method or name} needs {n.peak / GB:.1f} GB and {device.type} has "
                        f"{free / GB:.1f} GB left; {advice}")
    notes = dict(predicted_bytes=n.peak)
    if chosen != s:
        notes[auto] = getattr(chosen, auto)
        print(f"passes of {notes[auto]} tokens ({flag(auto)}), the most that {device.type}'s "
              f"{free / GB:.1f} GB and the rows ask for", flush=True)
    return chosen, notes


def tokens_name(name: str) -> str:
    """The setting that says how many tokens a stage's passes hold."""
    return "learn_tokens" if name == "learn" else "micro_tokens"


def with_passes(s: Settings, config: Config, name: str, method, free: int, given: dict
                ) -> tuple[Settings, Need]:
    """s with AUTO passes resolved: the largest of PASSES that fits, no larger than all rows of an
    update need; the smallest where none does. And what a stage then needs."""
    auto = tokens_name(name)
    if name not in ("learn", "unlearn") or getattr(s, auto) != AUTO:
        return s, need(s, config, name, method, **given)
    longest = given["longest"]
    whole = longest * (s.learn_batch if name == "learn" else _rows_of_update(s))
    sizes = [n for n in PASSES if n >= longest] or [longest]
    sizes = sizes[sum(n >= whole for n in sizes[1:]):]
    for way in (replace(s, **{auto: n}) for n in sizes):
        n = need(way, config, name, method, **given)
        if n.peak <= free:
            break
    return way, n


def _lengths(s: Settings, rows=()) -> dict:
    longest, answer = LONGEST.get((s.benchmark, s.model)) or max(
        (x for (benchmark, _), x in LONGEST.items() if benchmark == s.benchmark),
        default=UNKNOWN)
    if rows:
        longest = max(len(r.ids) for r in rows)
        answer = max(len(r.ids) - r.start for r in rows)
    return dict(longest=longest, answer=answer)


def _advice(s, config, name, method, free: int, given: dict) -> str:
    """The first settings, the cheapest in time and faith first, with which a stage would fit."""
    longest = given["longest"]
    if name == "attribute":  # a pass holds all nodes of the path of one row
        least = longest * max(1, s.steps - 1)
        ways = [dict(attribution_tokens=min(least, LIMIT - 1))]
    elif name == "evaluate":
        most = max(longest + s.max_new_tokens, s.max_total_tokens)
        ways = [dict(eval_tokens=min(most, LIMIT - 1))]
    else:
        auto, first = tokens_name(name), "learn_" if name == "learn" else ""
        small = {auto: min(getattr(s, auto), max(PASSES[-1], longest))}
        again, narrow = {f"{first}checkpointing": True}, {f"{first}state": "bfloat16"}
        less = [small, again, small | again]
        ways = [*less, narrow, *(narrow | way for way in less)]
    if given["dtype"] == torch.float32:
        ways += [dict(dtype="bfloat16") | way for way in ({}, *ways)]

    def peak(way):
        changed = {**given, "dtype": torch.bfloat16} if "dtype" in way else given
        return need(replace(s, **way), config, name, method, **changed).peak

    least = ways[-1]  # all of them at once
    if _weights(config, torch.bfloat16) > free or peak(least) > free:
        if name == "attribute" and peak(dict(attribution_tokens=longest, steps=2)) <= free:
            return "lower --steps"
        return (f"no setting makes it fit: use a larger device; the least, {_flags(least)}, needs "
                f"{peak(least) / GB:.1f} GB")
    way = next(way for way in ways if peak(way) <= free)
    return f"{_flags(way)} would need {peak(way) / GB:.1f} GB"


def _flags(way: dict) -> str:
    """Settings as options of the command line."""
    return " ".join(flag(k) + ("" if v is True else f" {v}") for k, v in way.items())


# -------------------------------------------------------------------------------------- the table


def plan_command(s: Settings):
    """Print what each stage of a run needs, and whether it fits the device at hand."""
    config, here, own_dtype = config_of(s), choose_device(s), choose_dtype(s)
    no_gpu = here.type == "cpu" and not s.tiny and s.device == "auto"
    dtype = torch.bfloat16 if no_gpu and s.dtype == "auto" else own_dtype
    if no_gpu:
        s = replace(s, device="cuda")  # whose attention keeps less
    given = dict(dtype=dtype, critical=critical_count(s, config), **_lengths(s))
    count = _weights(config, dtype) // dtype.itemsize
    print(f"{s.benchmark} {s.model}: {count:,} weights, {str(dtype)[6:]}; rows of at most "
          f"{given['longest']} tokens, {given['answer']} of them answer; {given['critical']} of "
          f"{config.num_hidden_layers * config.neuron_count} neurons critical")
    free = CARD if no_gpu else room(here)
    where = ("no GPU here: compared with one card of" if no_gpu else
             f"{torch.cuda.get_device_name() if here.type == 'cuda' else 'CPU'}, room for")
    print(f"{where} {free / GB:.1f} GB\n")
    sources = hub.original_sources(s)
    chosen, too_large = _print_needs(s, config, given, free, learns=bool(sources.base))
    disk, lacking = _disk(s, config, count, dtype, sources)
    sizes = _sizes(s)
    print("", *_work(s, config, given, chosen, sizes), disk, sep="\n")
    if here.type != "cpu" or count <= TIMED:
        print(_time(s, config, given, here, own_dtype, chosen, sizes))
    if not s.tiny:
        print("", *_cards(s, config, given, bool(sources.base)), sep="\n")
    if too_large or lacking:
        print("does not fit: " + "; ".join(too_large + lacking))


def _print_needs(s: Settings, config: Config, given: dict, free: int, *, learns: bool
                 ) -> tuple[dict, list[str]]:
    """Print a row of bytes per stage. Returns of each stage or method its settings, its passes
    chosen, and its Need; and the stages that do not fit, each with what would help."""
    unit, size = ("MB", 1e6) if s.tiny else ("GB", GB)
    heads = zip(("weights", "gradients", "state", "activations", "peak"), WIDTHS)
    print(f"{unit:10}{''.join(f'{head:>{w}}' for head, w in heads)}  fits")
    chosen, too_large = {}, {}
    for name, method in ((("learn", None),) if learns else ()) + STAGES:
        own, n = with_passes(_for_method(s, method), config, name, method, free, given)
        chosen[method or name] = own, n
        parts = (n.weights, n.gradients, n.state, n.activations, n.peak)
        cells = (f"{x / size:{w}.2f}" for x, w in zip(parts, WIDTHS))
        print(f"{method or name:10}{''.join(cells)}  {'yes' if n.peak <= free else 'no'}")
        if n.peak > free:
            advice = _advice(own, config, name, method, free, given)
            too_large.setdefault(advice, []).append(method or name)
    return chosen, [f"{', '.join(names)} ({advice})" for advice, names in too_large.items()]


def _for_method(s: Settings, method: str | None) -> Settings:
    """s as its recipe has it for another method, with what the user changed."""
    return with_choices(s, method=method or s.method, device=s.device)


def _cards(s: Settings, config: Config, given: dict, learns: bool) -> list[str]:
    """A line per size of card: of each stage the first settings, the cheapest in faith and time
    first, with which it fits."""
    lines = {card: [] for card in CARDS}
    for name, method in ((("learn", None),) if learns else ()) + STAGES:
        own, peaks = _for_method(replace(s, device="cuda"), method), {}
        ways = [(way, replace(own, **way)) for way in _ways(own, name, given["longest"])]
        held = [_held_bytes(x, config, name, method, given) for _, x in ways]
        for card in CARDS:
            for i, (way, x) in enumerate(ways):
                if held[i] <= card * GB and i not in peaks:  # the least that it can take
                    peaks[i] = need(x, config, name, method, **given).peak
                if peaks.get(i, card * GB + 1) <= card * GB:
                    what = _flags(way) or "as it is"
                    break
            else:
                what = "does not fit"
            lines[card].append(f"{method or name} {what}")
    return [f"a card of {card} GB: {'; '.join(line)}" for card, line in lines.items()]


def _held_bytes(s, config, name, method, given) -> int:
    """Weights, gradients and state of a stage, which no setting of its passes changes."""
    if name not in ("learn", "unlearn"):
        return _weights(config, given["dtype"])
    state = s.learn_state if name == "learn" else s.state
    own = replace(s, method=method or "fo", state=state)
    mask = _spread_mask(config, given["critical"])
    return sum(_sizes_held(own, config, given["dtype"], mask))


def _ways(s: Settings, name: str, longest: int) -> list[dict]:
    """Settings of a stage that change what it takes, in the order in which they are preferred."""
    if name == "attribute":
        return [{}, dict(attribution_tokens=longest * max(1, s.steps - 1))]
    if name == "evaluate":
        return [{}, dict(eval_tokens=max(longest + s.max_new_tokens, s.max_total_tokens))]
    first, auto = "learn_" if name == "learn" else "", tokens_name(name)
    own = {k: getattr(s, first + k) for k in ("state", "checkpointing")}
    sizes = [getattr(s, auto)] if getattr(s, auto) != AUTO else [
        n for n in PASSES if n >= longest] or [longest]
    kinds = [dict(state=state, checkpointing=again)
             for state in dict.fromkeys((own["state"], "bfloat16"))
             for again in dict.fromkeys((own["checkpointing"], True))]
    return [{auto: n} | {first + k: x for k, x in kind.items() if x != own[k]}
            for kind in kinds for n in sizes]


def _work(s: Settings, config: Config, given: dict, chosen: dict, sizes: tuple) -> list[str]:
    """A line per stage: how often the model runs. chosen: as `_print_needs` has it; sizes: as
    `_sizes`."""
    (forget, retain, questions), lines = sizes, []
    each = pace.attribution_passes(s, config)
    if "learn" in chosen:
        updates = s.learn_epochs * -(-(forget + retain) // s.learn_batch)
        lines.append(f"learn: {updates} updates, {s.learn_batch} rows each")
    lines.append(f"attribute: {forget + min(forget, retain)} pairs, {each:.1f} forward-backward "
                 "passes of a pair's answer rows each")
    for method in simu.METHODS:
        own, _ = chosen[method]
        most = _rows_of_update(own)  # of the two kinds, or of each
        passes = 2 * own.batch // most * -(-most // max(1, own.micro_tokens // given["longest"]))
        lines.append(f"{method}: {own.epochs * forget // own.batch} updates of at most {passes} "
                     "forward-backward passes")
    return [*lines, f"evaluate: {questions} generations for each model"]


def _time(s: Settings, config: Config, given: dict, device: torch.device, dtype: torch.dtype,
          chosen: dict, sizes: tuple) -> str:
    """How long each stage will take on a device. chosen: as `_print_needs` has it; sizes: as
    `_sizes`."""
    forget, retain, questions = sizes
    mean = MEAN.get((s.benchmark, s.model), (given["longest"] / 2, given["answer"] / 2))
    rows, keep = pace.Rows(forget, *mean), pace.Rows(retain, *mean)
    try:
        here = pace.measured(s, config, device, dtype, rows)
    except (torch.OutOfMemoryError, MemoryError):
        return "time: not measured, for lack of memory"
    told = []
    source = hub.wanted_data(s)
    if s.tiny and not s.weights and (not source or hub.have(source)):
        passed, every = _rows_that_teach(s), chosen["fo"][1].gradients // given["dtype"].itemsize
        time = (passed * mean[0] / here.tokens
                + passed / s.learn_batch * every / here.weights["adamw"])
        told.append(f"original and retain-only {pace.in_words(time)}")
    for name, (own, n) in chosen.items():
        moving = n.gradients // given["dtype"].itemsize
        time = pace.seconds(own, config, here, name, rows, keep, asked=questions,
                            updates=own.epochs * forget // own.batch, moving=moving)
        told.append(f"{name} {pace.in_words(time)}" + " a model" * (name == "evaluate"))
    return (f"time, roughly, at {here.tokens:,.0f} tokens a second in a pass measured on this "
            f"{'GPU' if device.type == 'cuda' else 'CPU'}: "
            + ", ".join(told))


def _rows_that_teach(s: Settings) -> int:
    """How often a tiny model reads a row until it is the original (original.py)."""
    b = load_benchmark(s)

    def paraphrased(rows):
        return sum(bool(e.paraphrased_question) for e in rows)
    known = len(b.retain + b.world_facts + b.real_authors) + paraphrased(b.retain_eval)
    forget = len(b.forget) + paraphrased(b.forget)
    light = forget + min(known, s.light_retain * forget)
    return known * s.learn_epochs + light * s.light_epochs


def _sizes(s: Settings) -> tuple[int, int, int]:
    """Forget rows, retain rows, questions: of the data where it is at hand, else as published."""
    source = hub.wanted_data(s)
    if not source or hub.have(source):
        b = load_benchmark(s)
        asked = b.forget + b.retain_eval
        again = sum(bool(e.paraphrased_question) for e in asked)
        facts = len(b.world_facts) + len(b.real_authors)
        return len(b.forget), len(b.retain), len(asked) + again + facts
    if s.benchmark == "lume":
        forget = int(LUME_ROWS * s.lume_fraction)
        return forget, forget, 2 * forget
    forget = TOFU_ROWS.get(s.forget_split, TOFU_ROWS["forget10"])
    return forget, 4000 - forget, 2 * (forget + TOFU_RETAIN_EVAL) + TOFU_FACTS


def _disk(s: Settings, config: Config, count: int, dtype: torch.dtype,
          sources: hub.Sources) -> tuple[str, list[str]]:
    """What a run writes, in a line; and what of it the run's disk has no room for."""
    kind, repo = ("base", sources.base) if sources.base else ("original", sources.original)
    folder = Path(hub.given_model(s) or s.run / "original")
    sizes = (repo.files.items() if repo else
             ((file.name, file.stat().st_size) for file in folder.glob("*.safetensors")))
    first = sum(size for name, size in sizes if name.endswith(".safetensors"))
    first = first or count * 4  # made here, or of unknown size
    models = len(simu.METHODS) + (1 if sources.base else 0)
    made = models * count * dtype.itemsize
    made += config.num_hidden_layers * config.neuron_count * 9  # scores, two of float32; a mask
    there = next(p for p in (s.run, *s.run.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    line = (f"disk: {(first + made) / GB:.2f} GB ({kind} {first / GB:.2f}, {models} models made "
            f"here {made / GB:.2f}), {free / GB:.0f} GB free; a model made again needs "
            f"{made / models / GB:.2f} more meanwhile")
    return line, [f"{made / GB:.0f} GB in {s.run} (free that much)"] if made > free else []
