"""How much memory each stage will take, before its weights are downloaded, loaded or trained.

Nothing is modelled by formula: the real code runs on torch's `meta` device, where tensors have
shapes but no memory, and `LiveBytes` counts what would be alive in an update of `unlearn`, in
`attribute`, and where an evaluation decodes. GB is 10^9 bytes. Not counted: torch itself, CUDA's
context, the allocator's rounding.
"""

import os
import re
import weakref
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import simu
from model import Config, KVCache, Transformer, UserError
from pipeline import checkpoint, fused, hub
from pipeline.columns import PUBLISHED_CRITICAL
from pipeline.settings import (AUTO, TINY_MODELS, Settings, choose_device, choose_dtype, flag,
                               is_on_gpu, with_choices)
from pipeline.slices import Benchmark, load_benchmark
from pipeline.stage import mask_name, read_stage
from pipeline.tokenizers import load_tokenizer

GB = 1e9
RESERVE = GB  # of a GPU's free memory: library workspaces and the allocator's rounding
CARD = 80 * GB  # what is compared with where no GPU is at hand
PASSES = (8192, 4096, 2048, 1024, 512)  # tokens of a pass that AUTO chooses from
PASS_OF = dict(learn="learn_tokens", unlearn="micro_tokens")  # settings that may be AUTO


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are created inside it, and of those it starts with,
    while they live: `now` and the highest `peak`. Tensors that share memory count once."""

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


def need(s: Settings, config: Config, name: str, *, dtype: torch.dtype, critical: int,
         longest: int, answer: int) -> dict[str, int]:
    """Bytes that stage `name` ("learn", "attribute", "unlearn", "evaluate") needs, by what they
    hold, were every row `longest` tokens and every answer `answer` tokens long. Activations are all
    else that is alive at the highest point; the sum is the peak."""
    if name == "learn":  # fine-tuning moves every weight, as FO does
        s = replace(s, method="fo", micro_tokens=s.learn_tokens, state=s.learn_state,
                    batch=s.learn_batch, checkpointing=s.learn_checkpointing)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    if name in PASS_OF:
        return trace_update(model, s, critical, longest, answer)
    trace = {"attribute": trace_attribution, "evaluate": trace_evaluation}[name]
    with LiveBytes(*model.requires_grad_(False).parameters()) as live, fused_attention(s):
        weights = live.now
        trace(model, s, longest, answer)
    return dict(weights=weights, gradients=0, state=0, activations=live.peak - weights)


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


def fused_attention(s: Settings):
    """Puts it in the place of torch's, wherever a model calls for that, also when it recomputes."""
    def stand_in(q, k, v, **_):
        wide = not is_on_gpu(s) and q.dtype == torch.bfloat16  # as causal_attention has it on a CPU
        return FusedAttention.apply(*(x.float() if wide else x for x in (q, k, v))).to(q.dtype)

    return patch.object(F, "scaled_dot_product_attention", stand_in)


def trace_update(model, s: Settings, critical: int, longest: int, answer: int) -> dict:
    """The largest pass of an objective's summands, with all gradients alive; and the update."""
    layers, neurons = model.config.num_hidden_layers, model.config.neuron_count
    mask = torch.zeros(layers * neurons, dtype=torch.bool)
    mask[torch.arange(critical) * len(mask) // max(1, critical)] = True  # spread over the layers
    B, T = widest(s.micro_tokens, longest, s.batch)
    n = torch.arange(B * min(answer, T), device="meta")  # of the answers, which mean_nll picks
    optimiser = simu.OPTIMISERS[simu.METHODS[s.method].optimiser]
    apply = fused.on(torch.device("meta"), s.state).get("apply", simu.apply_updates)
    model.checkpoint = s.checkpointing
    with simu.moving_weights(model, s, mask.view(layers, -1), getattr(torch, s.state)) as moving:
        for w in moving:
            w.weight.grad = torch.empty_like(w.weight)
        weights, grads = [*model.parameters()], [w.weight.grad for w in moving]
        state = [t for w in moving for t in (w.master, w.m, w.h)]  # a master may be the weight
        sizes = [sum(t.nbytes for t in tensors) for tensors in (weights, grads)]
        with LiveBytes(*weights, *grads, *state) as live, fused_attention(s):
            before = live.now
            del grads  # the update frees them one by one
            h = model.hidden(zeros(B, T)).flatten(0, 1)[n]  # [B * answer, D]
            F.cross_entropy(model.logits(h), n, reduction="sum").backward()
            del h
            apply(moving, optimiser, s, lr=s.lr, step=1, shrink=1.0)
    return dict(weights=sizes[0], gradients=sizes[1], state=before - sum(sizes),
                activations=live.peak - before)


def widest(budget: int, longest: int, most: int = 1 << 30) -> tuple[int, int]:
    """Rows and their tokens in the fullest batch that `batches_by_length` may cut: rows a little
    shorter than the longest can fill a budget better."""
    rows = max(1, min(most, -(-budget // longest)))
    return rows, longest if rows == 1 else min(longest, budget // rows)


def trace_attribution(model, s: Settings, longest: int, answer: int):
    """`attribute` where it is widest: the lowest layer's path goes through all layers above."""
    B, longest = widest(s.attribution_tokens // max(1, s.steps - 1), longest)
    pos = zeros(B, min(answer, longest))
    clean = simu.Clean(model, zeros(B, longest), pos, pos)
    simu.last_node(clean)
    if s.steps > 1:
        simu.lower_nodes(clean, 0, s.steps, simu.scaled_together(model, s.steps, s.path)[0])


@torch.no_grad()
def trace_evaluation(model, s: Settings, longest: int, answer: int):
    """Decoding: a cache of `eval_tokens` and the pass that reads the prompts."""
    B, T = widest(s.eval_tokens, longest)
    cache, prompt = KVCache(model.config, B, T, model.embed_tokens.weight), max(1, T - answer)
    ids, positions = zeros(B, prompt), zeros(1, prompt).expand(B, prompt)  # as model.decode
    h = model.hidden(ids, cache.attends(positions, prompt), cos_sin=model.rope(positions))
    model.logits(h[cache.rows, cache.rows])


# ------------------------------------------------------------------------------------ will it fit

def fit_memory(s: Settings, config: Config, name: str, rows: list) -> tuple[Settings, dict]:
    """Settings of a stage about to load its model and to read these encoded rows, with passes as
    large as its device's memory lets where they are AUTO; and notes for its stage.json. UserError
    if it does not fit."""
    device = choose_device(s)
    free = room(device)
    chosen, sizes = with_passes(
        s, config, name, free, dtype=choose_dtype(s), critical=critical_count(s, config),
        longest=max(len(r.ids) for r in rows), answer=max(len(r.ids) - r.start for r in rows))
    peak = sum(sizes.values())
    if peak > free:
        raise UserError(f"{name} needs {peak / GB:.1f} GB and {device.type} has {free / GB:.1f} GB "
                        "left; lower --micro-tokens, --learn-tokens or --attribution-tokens, add "
                        "--checkpointing, --state bfloat16 or --dtype bfloat16")
    notes = dict(predicted_bytes=peak)
    if chosen != s:
        notes[PASS_OF[name]] = tokens = getattr(chosen, PASS_OF[name])
        print(f"passes of {tokens} tokens ({flag(PASS_OF[name])}), for {device.type} has "
              f"{free / GB:.1f} GB left", flush=True)
    return chosen, notes


def room(device: torch.device) -> int:
    """Bytes that a stage may still take on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] - RESERVE)
    about = Path("/proc/meminfo")
    if not about.exists():  # not Linux: all memory there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(re.search(r"MemAvailable: *(\d+)", about.read_text("ascii"))[1]) * 1024


def with_passes(s: Settings, config: Config, name: str, free, **about) -> tuple[Settings, dict]:
    """s with AUTO passes resolved, to the largest of PASSES that fits, or else to the smallest; and
    what the stage then needs."""
    auto, choices = PASS_OF.get(name), [s]
    if auto and getattr(s, auto) == AUTO:
        choices = [replace(s, **{auto: tokens}) for tokens in PASSES]
    for chosen in choices:
        sizes = need(chosen, config, name, **about)
        if sum(sizes.values()) <= free:
            break
    return chosen, sizes


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
    every = config.num_hidden_layers * config.neuron_count
    return PUBLISHED_CRITICAL.get((s.benchmark, s.model), (every, every))[0]


def config_of(s: Settings) -> Config:
    """The shape of a run's model. Of one that is not the paper's, config.json may be fetched."""
    for folder in (s.run / "original", Path(hub.chosen_model(s))):
        if (folder / "config.json").is_file():
            return checkpoint.read_config(folder)
    if s.tiny:
        return tiny_config(s, s.vocab)
    name = "olmo-1b-0724" if (s.benchmark, s.model) == ("lume", "olmo-1b") else s.model
    if name in CONFIGS:
        return CONFIGS[name]
    repo = hub.original_sources(s).base or hub.original_sources(s).original
    folder = hub.download(repo, ["config.json"]) if repo else hub.chosen_model(s)
    return checkpoint.read_config(Path(folder))


def plan_command(s: Settings):
    """Print what memory each stage of a run needs, and whether it fits the device at hand."""
    folder = Path(hub.chosen_model(s))
    if s.layout == "rows" and (folder / "config.json").is_file():
        return outlook(s, folder, load_benchmark(s, folder))
    config, device, dtype = config_of(s), choose_device(s), choose_dtype(s)
    free, where = room(device), f"{device.type}, room for"
    if device.type == "cpu" and not s.tiny and s.device == "auto":
        s = with_choices(s, device="cuda")  # whose attention keeps less
        dtype = torch.bfloat16 if s.dtype == "auto" else dtype
        free, where = CARD, "no GPU here: compared with one card of"
    longest, answer = LONGEST[s.benchmark]
    critical = critical_count(s, config)
    print(f"{s.benchmark} {s.model}, {str(dtype)[6:]}; rows of at most {longest} tokens, {answer} "
          f"of them answer; {critical} neurons critical\n{where} {free / GB:.1f} GB\n")
    header = ("weights", "gradients", "state", "activations", "peak")
    print("GB".ljust(10), *(x.rjust(11) for x in header), " fits")
    first = ["learn"] if hub.original_sources(s).base else []
    for name in (*first, "attribute", *simu.METHODS, "evaluate"):
        stage, method = ("unlearn", name) if name in simu.METHODS else (name, s.method)
        sizes = with_passes(with_choices(s, method=method, device=s.device), config, stage, free,
                            dtype=dtype, critical=critical, longest=longest, answer=answer)[1]
        peak = sum(sizes.values())
        print(name.ljust(10), *(f"{x / GB:11.4g}" for x in (*sizes.values(), peak)),
              " yes" if peak <= free else " no")


def outlook(s: Settings, folder: Path, bench: Benchmark):
    """Print how many rows of a user's a run will read, before anything is trained; UserError if the
    model's context or the memory to unlearn them does not suffice. folder: the model's."""
    tokenizer, config = load_tokenizer(folder), checkpoint.read_config(folder)
    beside = [*bench.held_out, *bench.nonmembers, *bench.level_rows]
    rows = data.encode_for(config, bench.forget + bench.retain + beside, tokenizer, s.template)
    peak = fit_memory(s, config, "unlearn", rows)[1]["predicted_bytes"]
    print(f"rows to forget: {len(bench.forget)}, to keep: {len(bench.retain)}, of at most "
          f"{max(len(r.ids) for r in rows)} tokens in the template {s.template}; memory: "
          f"{peak / GB:.1f} GB at most", flush=True)


# ------------------------------------------------------------------------------------------ tables

CONFIGS = {  # of the paper's models, which need not be at hand
    "llama2-7b": Config(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
        num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=4096),
    "olmo-1b": Config(
        model_type="olmo", vocab_size=50304, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_attention_heads=16, max_position_embeddings=2048,
        tie_word_embeddings=True)}
CONFIGS["olmo-1b-0724"] = replace(  # which LUME's checkpoint grew from
    CONFIGS["olmo-1b"], max_position_embeddings=4096, clip_qkv=8.0, tie_word_embeddings=False)
# Tokens of the longest row and of the longest answer, eos counted; of a user's until they are read.
LONGEST = dict(tofu=(164, 105), lume=(478, 176), demo=(66, 41), rows=(512, 256))
