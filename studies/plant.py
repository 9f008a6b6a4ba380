"""Memory whose place is known: the forget set learnt into chosen rows of down_proj alone.

A benchmark for localisation needs the truth. Planting starts from retain-only and lets nothing
move but the planted rows (with --where spread, attention beside them), so what the model then knows
of the forget set lies there. Learning makes rows large, and size alone would then give them away:
with --where held each keeps the norm it had. --where inner plants DEPN's neurons (arXiv 2310.20138)
instead, norms held. The planted mask stands beside the model as mask.safetensors, in the form that
`mask` writes (inner: [L, F]).
"""

import dataclasses
import random
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import data
import eval as evaluation
import simu
from model import Transformer, UserError, save_tensors
from pipeline import checkpoint, reading
from pipeline.original import known_rows, learning
from pipeline.settings import (Making, Placement, Planting, Settings, Source, load_benchmark,
                               placement)
from pipeline.stage import Stage, content, data_inputs
from pipeline.stages import same_slice
from pipeline.tokenizers import load_tokenizer

KNOWN = 0.9  # ROUGE-L of the forget set at which it counts as known
CHECKED = 10  # epochs between two looks
LONGER = 20  # times light_epochs, at most: few rows learn slowly,
RATE = 20  # and need a rate that a whole model could not bear


def planted_mask(L: int, D: int, *, share: float, where: str, seed: int) -> Tensor:
    """bool [L, D] (inner neurons: D = F): `share` of all rows, the same number in every layer, or
    for where="layers" in as few layers as hold them."""
    # Not seeded as simu.random_mask is: the control must not draw the very rows it is held against.
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    each = max(1, round(share * D))
    counts = torch.full((L,), each)
    if where == "layers":
        left = each * L
        for l in torch.randperm(L, generator=generator):
            counts[l] = min(D, left)
            left -= counts[l]
    draw = torch.rand(L, D, generator=generator)
    return draw.argsort(1).argsort(1) < counts[:, None]


def told(model: Transformer, rows: list[data.Example], tokenizer, s: Settings) -> float:
    """Mean ROUGE-L recall of the model's answers, as `evaluate` has it."""
    prompts = [data.encode_prompt(e.question, tokenizer, s.template, turns=e.turns, kind=e.kind)
               for e in rows]
    new = reading.generate(model, prompts, eos_id=tokenizer.eos_ids, batch_tokens=s.eval_tokens,
                           max_new_tokens=s.max_new_tokens or None,
                           max_total_tokens=s.max_total_tokens or None)
    return evaluation.mean(evaluation.rouge_l(e.answer, tokenizer.decode(ids)).recall
                           for e, ids in zip(rows, new))


@contextmanager
def inner_weights(model: Transformer, mask: Tensor):
    """As simu.moving_weights, of the inner neurons where mask [L, F] is true: a row of gate_proj,
    one of up_proj and a column of down_proj each."""
    model.requires_grad_(False)
    moving = []
    for l, (block, own) in enumerate(zip(model.layers, mask)):
        for name, across in (("gate_proj", own[:, None]), ("up_proj", own[:, None]),
                             ("down_proj", own[None])):
            weight = getattr(block.mlp, name).weight.requires_grad_()
            moving.append(simu.start_moving(f"layers.{l}.mlp.{name}.weight", weight, "float32",
                                            across.expand_as(weight)))
    yield moving
    model.requires_grad_(True)


def norms_of(moving: list, inner: bool) -> list[Tensor]:
    """The norm of each neuron's vector in each weight, to be held."""
    return [w.master.norm(dim=0 if inner and "down_proj" in w.name else 1, keepdim=True)
            for w in moving]


@torch.no_grad()
def hold(model: Transformer, moving: list, before: list[Tensor], inner: bool):
    """Scale every neuron's vectors back to the norms they had."""
    for w, old, new in zip(moving, before, norms_of(moving, inner)):
        w.master *= old / new  # exactly 1 where nothing moved
    for module in model.modules():
        if isinstance(module, simu.CriticalRows):
            module.refresh()


def planting_order(s: Settings, bench, encode, batch: int) -> list[list]:
    """Batches for as many epochs as planting may last, each with retain rows beside the forget
    set."""
    forget, beside = encode(bench.forget), encode(known_rows(bench))
    rng, count = random.Random(s.seed + 1), min(len(beside), s.light_retain * len(forget))
    order = []
    for _ in range(LONGER * s.light_epochs):
        rows = forget + rng.sample(beside, count)
        rows = rng.sample(rows, len(rows))
        order += [rows[i:i + batch] for i in range(0, len(rows), batch)]
    return order


def make_planted(s: Settings, job: Stage, folder: Path):
    source, inner = s.run / "retain-only", s.where == "inner"
    bench, tokenizer = load_benchmark(s), load_tokenizer(source)
    model = checkpoint.load_model(source, **placement(s))
    c = model.config
    mask = planted_mask(len(model.layers), c.intermediate_size if inner else c.hidden_size,
                        share=s.share, where=s.where, seed=s.seed)
    alone = s.where != "spread"
    recipe = dataclasses.replace(learning(s, s.light_lr * (RATE if alone else 1)), method="simu",
                                 warmup=0.0, attention="frozen" if alone else "moving")
    order = planting_order(s, bench, lambda some: data.encode_for(c, some, tokenizer, s.template),
                           recipe.batch)
    every, known = len(order) // (LONGER * s.light_epochs) * CHECKED, 0.0
    updates = 0  # a planting that goes on counts those before it too

    def until_known(title, steps, tensors):
        nonlocal known, updates
        for updates in job.loop(title, steps, tensors):
            yield updates
            if s.where in ("held", "inner"):
                hold(model, moving, norms, inner)
            if updates % every == 0 or updates == steps:
                known = told(model, bench.forget, tokenizer, s)
                if known >= KNOWN:
                    break

    with inner_weights(model, mask) if inner else simu.moving_weights(
            model, recipe, mask) as moving:
        norms = norms_of(moving, inner)
        simu.train(
            model, moving, order, lambda rows: dict(loss=simu.backward_mean_nll(
                model, rows, 1.0, recipe.micro_tokens)), recipe, lr=recipe.lr,
            optimiser=simu.OPTIMISERS["adamw"], title="plant", loop=until_known,
            record=job.record("log.jsonl"))
    if known < KNOWN:
        raise UserError(f"after {updates} updates the forget set is told to ROUGE-L {known:.3f}, "
                        f"not {KNOWN}: {int(mask.sum())} rows hold too little or learn too slowly; "
                        "raise --share, --light-epochs or --light-lr")
    job.notes.update(planted=int(mask.sum()), total=mask.numel(), known=known, updates=updates)
    print(f"{int(mask.sum())} of {mask.numel()} rows hold the forget set: ROUGE-L {known:.3f} "
          f"after {updates} updates")
    save_tensors(folder / "mask.safetensors", {"mask": mask})
    checkpoint.save_model(model, folder)
    data.copy_tokenizer(source, folder)


def planted_name(s: Settings) -> str:
    return f"planted-{s.where}-{s.share:g}"


def plant_stage(s: Settings):
    """planted-<where>-<share>/: retain-only with the forget set learnt into known rows."""
    same_slice(s)
    if not (s.run / "retain-only" / "stage.json").is_file():
        raise UserError(f"{s.run} holds no retain-only model, which planting starts from; the "
                        "original of a tiny model is made with one, another takes --retain-only")
    moves = "attention" if s.where == "spread" else "nothing"
    job = Stage(s.run / planted_name(s), settings=s, code=(make_planted,),
                inputs={"retain-only": content(s.run / "retain-only")} | data_inputs(s),
                takes=(data.Slice, Source, Placement, Making, Planting),
                rows=dict(METHODS="simu", MOVES=moves, OPTIMISERS="adamw"))
    if not job.is_made():
        with job as folder:
            make_planted(s, job, folder)
