"""How long each step takes, and how much of a card's memory, beside the plain way to do the same.

    python benchmarks/speed.py                              tiny, on a CPU, in two minutes
    python benchmarks/speed.py --size 7b --device cuda      one large GPU; nothing is downloaded

step         way, the plain one first
-----------  ---------------------------------------------------------------------------------------
attribution  loop: simu.attribute_loop, a prefix, a layer and a node at a time; fast: attribute_rows
losses       transformers: padded batches, all logits of a batch at once; ours: reading.token_scores
decoding     transformers: generate on one padded batch, with its cache; ours: model.generate
updates      transformers: as public code does, on rows padded to 512 tokens; fo, so, simu: unlearn

Weights and rows are random, of TOFU's lengths, and both ways have the same tensors. Seconds are
medians, on a CPU of its time; ways take turns, so that a busy machine is busy for all. `check`: the
largest difference as a share of the largest number, or how many texts are equal.
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import simu  # noqa: E402
from data import Encoded  # noqa: E402
from model import Config, Transformer, generate  # noqa: E402
from pipeline import fused, reading  # noqa: E402
from pipeline.columns import table  # noqa: E402
from pipeline.plan import CONFIGS  # noqa: E402

TINY = Config(model_type="llama", vocab_size=1024, hidden_size=64, intermediate_size=256,
              num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
              max_position_embeddings=1024)
# The model, its critical neurons in Table 5, and what its updates are set to.
SIZES = {"tiny": (TINY, 64, dict(batch=4, micro_tokens=1024)),
         "1b": (CONFIGS["olmo-1b"], 29554, dict(batch=16, micro_tokens=4096)),
         "7b": (CONFIGS["llama2-7b"], 722, dict(batch=16, micro_tokens=2048))}
# Lengths of TOFU's forget10 in LLaMA2 tokens, eos counted: deciles of prompts and of answers.
LENGTHS = ((19, 43), (22, 48), (24, 52), (25, 57), (26, 65), (27, 96), (29, 9), (30, 25), (32, 32),
           (36, 36), (68, 39))
PADDED = 512  # the fixed length of public code
PASS = 4  # rows of a padded pass, for which all logits are held
NEW, UPDATES, REPEATS = 64, 3, 3  # tokens of a decoded answer


def random_model(config: Config, device: str) -> Transformer:
    torch.manual_seed(0)
    with torch.device(device):
        return Transformer(config).to(torch.bfloat16 if device == "cuda" else torch.float32)


def transformers_model(model: Transformer):
    """transformers' model over the very tensors of ours."""
    from transformers import AutoConfig, AutoModelForCausalLM
    values = model.config.to_hf(torch.float32)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with model.embed_tokens.weight.device:
        theirs = AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict({name if name.startswith("lm_head") else f"model.{name}": p
                            for name, p in model.named_parameters()}, strict=False, assign=True)
    theirs.tie_weights()
    return theirs


def random_rows(config: Config, count: int) -> list[Encoded]:
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(count):
        prompt, answer = LENGTHS[i % len(LENGTHS)]
        ids = torch.randint(3, config.vocab_size, (prompt + answer,), generator=generator)
        rows.append(Encoded(ids.tolist(), prompt))
    return rows


def padded_nll(theirs, rows: list[Encoded], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-log P of every id but the first [B, width - 1], and which of them are answers: as public
    code has them, from padded rows and all logits."""
    ids = torch.zeros(len(rows), width, dtype=torch.int64, device=theirs.device)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for b, row in enumerate(rows):
        n = len(row.ids)
        ids[b, :n], mask[b, :n] = torch.tensor(row.ids), 1
        answers[b, row.n_prompt:n] = True
    logits = theirs(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nll.view(len(rows), -1), answers[:, 1:]


def run(function, device: str) -> tuple[float, float, object]:
    """Seconds, peak memory of a card in GB, and what function() returns."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start, torch.cuda.max_memory_allocated() / 1e9, result


def measure(step: str, tokens: int, ways: dict, a, compare=None) -> list[list]:
    """Entries of the table. The first way is what the others are compared with: by their seconds
    and, where there is something to compare, by what they return."""
    seconds, peaks, results = {way: [] for way in ways}, {}, {}
    for _ in range(1 + REPEATS):
        for way, function in ways.items():
            took, peaks[way], results[way] = run(function, a.device)
            seconds[way].append(took)
    seconds = {way: statistics.median(x[1:]) for way, x in seconds.items()}  # the first warms up
    plain, *_ = seconds.values()
    check = compare(*results.values()) if compare else ""
    return [[step, way, f"{x:.4g}", f"{tokens / x:.0f}", f"{plain / x:.2f}", f"{peaks[way]:.1f}",
             check] for way, x in seconds.items()]


def difference(reference, numbers) -> str:
    reference, numbers = torch.as_tensor(reference).cpu(), torch.as_tensor(numbers).cpu()
    return f"{(numbers - reference).abs().max() / reference.abs().max():.0e}"


# -------------------------------------------------------------------------------------- the steps


def attribution(model: Transformer, a) -> list[list]:
    """Eq. 1-2: both forms on one pair of few answer tokens, and the fast one on many rows."""
    rows, recipe = random_rows(model.config, a.rows), simu.Attribution(steps=5)
    pair = Encoded(rows[0].ids[:rows[0].n_prompt + 4], rows[0].n_prompt)
    ways = {"loop": lambda: simu.attribute_loop(model, pair, steps=5),
            "fast": lambda: simu.attribute_rows(model, [pair], recipe)}
    lines = measure("attribution, one pair", 4, ways, a, difference)
    samples = sum(len(r.ids) - r.n_prompt for r in rows)
    ways = {"fast": lambda: simu.attribute_rows(model, rows, recipe)}
    return lines + measure(f"attribution, {a.rows} rows", samples, ways, a)


def losses(model: Transformer, theirs, a) -> list[list]:
    """-log P of every token."""
    rows = random_rows(model.config, a.rows)

    def token_scores():
        scores = reading.token_scores(model, rows, [1] * len(rows), tokens=4096)
        return [x for score in scores for x in score.losses]

    @torch.inference_mode()
    def padded_passes():
        numbers = []
        for start in range(0, len(rows), PASS):
            part = rows[start:start + PASS]
            nll, _ = padded_nll(theirs, part, max(len(r.ids) for r in part))
            numbers += [x for row, line in zip(part, nll.tolist()) for x in line[:len(row.ids) - 1]]
        return numbers

    ways = {"transformers": padded_passes, "ours": token_scores}
    return measure(f"losses, {a.rows} rows", sum(len(r.ids) for r in rows), ways, a, difference)


def decoding(model: Transformer, theirs, a) -> list[list]:
    """Greedy answers, all of one length: random weights seldom say that a text ends."""
    prompts = [r.ids[:r.n_prompt] for r in random_rows(model.config, a.rows)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=a.device)  # [B, T]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=a.device)

    def padded_batch():
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
                              eos_token_id=None, pad_token_id=0)
        return out[:, width:].tolist()

    ways = {"transformers": padded_batch,
            "ours": lambda: generate(model, prompts, eos_id=None, max_new_tokens=NEW)}
    return measure(f"decoding, {a.rows} rows", a.rows * NEW, ways, a,
                   lambda x, y: f"{sum(p == q for p, q in zip(x, y))} texts equal")


def update(model: Transformer, theirs, a) -> list[list]:
    """Some updates of unlearning. They move the weights, so they come last."""
    _, critical, changes = SIZES[a.size]
    recipe = simu.Recipe(epochs=1, **changes)
    rows = random_rows(model.config, 2 * UPDATES * recipe.batch)
    forget, retain = rows[::2], rows[1::2]
    scores = torch.rand(model.config.num_hidden_layers, model.config.hidden_size)
    mask = scores < critical / scores.numel()
    # At 7B the baselines, which move everything, fit one card in bfloat16 alone.
    on_device = fused.on(torch.device(a.device), "bfloat16" if a.size == "7b" else "float32")
    ways = {"transformers": partial(public_updates, theirs, forget, retain, recipe)}
    for method in ("fo", "so", "simu"):
        ways[method] = partial(simu.unlearn, model, forget, retain, mask,
                               replace(recipe, method=method), **on_device)
    return measure(f"{UPDATES} updates, {recipe.batch} + {recipe.batch} rows",
                   sum(len(r.ids) for r in rows), ways, a)


def public_updates(theirs, forget: list[Encoded], retain: list[Encoded], recipe):
    """As public code makes them: both losses in one graph, dense Sophia on every weight, its
    moments in the weights' dtype."""
    weights = list(theirs.parameters())
    m, h = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    constants = {k: getattr(recipe, k)
                 for k in ("lr", "beta1", "beta2", "gamma", "eps", "weight_decay")}
    for batch in range(0, len(forget), recipe.batch):
        for start in range(batch, batch + recipe.batch, PASS):
            part = slice(start, start + PASS)
            forget_nll, f = padded_nll(theirs, forget[part], PADDED)
            retain_nll, r = padded_nll(theirs, retain[part], PADDED)
            loss = -forget_nll[f].mean() + recipe.lam * retain_nll[r].mean()
            (loss * PASS / recipe.batch).backward()
        torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
        with torch.no_grad():
            for p, x, y in zip(weights, m, h):
                simu.sophia_update(p, p.grad, x, y, **constants)
        theirs.zero_grad()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=32, help="attributed, scored and asked")
    a = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    name = torch.cuda.get_device_name() if a.device == "cuda" else "CPU"
    print(f"{a.size} on {name}; commit {commit}, torch {torch.__version__}", flush=True)
    model = random_model(SIZES[a.size][0], a.device)
    theirs = transformers_model(model)
    lines = attribution(model, a) + losses(model, theirs, a) + decoding(model, theirs, a)
    lines += update(model, theirs, a)
    print(table(["step", "way", "seconds", "tokens/s", "times as fast", "peak GB", "check"], lines))


if __name__ == "__main__":
    main()
