"""The stages of the method, in the order run.sh calls them: attribute, mask, unlearn."""

import dataclasses
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

import data
import simu
from model import Transformer, UserError, save_tensors
from pipeline import checkpoint, fused, objectives, slices
from pipeline.card import write_card, write_generation_config
from pipeline.levels import forget_targets, without_unexpected_eos
from pipeline.own_rows import until_forgotten
from pipeline.plan import fit_memory
from pipeline.settings import Level, Placement, Settings, Source, placement, read_settings
from pipeline.stage import (Stage, attribution_name, content, data_inputs, mask_name, stale,
                            unlearned_name)
from pipeline.tokenizers import load_tokenizer


def same_slice(s: Settings):
    """UserError if a stage is asked for other data than the run's original was made of."""
    read_settings(s.run)
    if reasons := stale(s.run / "original", s):
        raise UserError(f"of {s.run / 'original'}, {'; '.join(reasons)}; give the run's options "
                        "and files, or run `python -m pipeline original` with these first")


def encoded_rows(s: Settings, objective: str = "graddiff") -> tuple[slices.Benchmark, dict]:
    """The benchmark, and its forget rows, as the objective's loss takes them, and retain rows as
    the original's tokenizer spells them."""
    folder, bench = s.run / "original", slices.load_benchmark(s)
    tokenizer, config = load_tokenizer(folder), checkpoint.read_config(folder)
    examples = dict(forget=objectives.loss_examples(bench.forget, objective), retain=bench.retain)
    return bench, {name: data.encode_for(config, rows, tokenizer, s.template)
                   for name, rows in examples.items()}


def load_original(s: Settings, job: Stage, name: str, encoded: dict
                  ) -> tuple[Transformer, Settings]:
    """The original model, once the plan says that this stage will fit, and with which settings."""
    folder = s.run / "original"
    s, notes = fit_memory(s, checkpoint.read_config(folder), name,
                          encoded["forget"] + encoded["retain"])
    job.notes.update(notes)
    return checkpoint.load_model(folder, **placement(s)), s


def without_ends(s: Settings, bench: slices.Benchmark, encoded: dict, model: Transformer) -> dict:
    """Rows of a user's without the eos that the original does not expect; a benchmark's as they
    are."""
    if s.layout != "rows":
        return encoded
    return {name: without_unexpected_eos(model, getattr(bench, name), rows, s)
            for name, rows in encoded.items()}


# --------------------------------------------------------------------------------------- step 1


def attribution_job(s: Settings) -> Stage:
    return Stage(s.run / attribution_name(s), s, code=(make_attribution,),
                 inputs=dict(original=content(s.run / "original")) | data_inputs(s),
                 takes=(slices.Slice, Source, Placement, simu.Attribution))


def make_attribution(s: Settings, job: Stage, folder: Path):
    bench, encoded = encoded_rows(s)
    # As many retain rows as forget rows: scores only matter relative to their layer's maximum.
    model, s = load_original(s, job, "attribute", encoded)
    encoded = without_ends(s, bench, encoded, model)
    count = min(len(encoded["retain"]), len(encoded["forget"]))
    encoded["retain"] = random.Random(s.seed).sample(encoded["retain"], count)
    scores = {name: simu.attribute_rows(model, rows, s, title=f"attribute {name}",
                                        loop=job.loop).cpu() for name, rows in encoded.items()}
    save_tensors(folder / "scores.safetensors", scores)


def attribute_stage(s: Settings):
    """attribution/scores.safetensors: forget and retain, float32 [L, D]."""
    same_slice(s)
    attribution_job(s).ensure()


def mask_job(s: Settings) -> Stage:
    attribution_job(s).require()
    return Stage(s.run / mask_name(s), s, code=(make_mask,),
                 inputs={name: content(s.run / name) for name in [attribution_name(s)]},
                 takes=(simu.Masking,))


def mask_of_scores(s: Settings) -> torch.Tensor:
    """M [L, D] as s wants it, from the run's attribution."""
    scores = load_file(s.run / attribution_name(s) / "scores.safetensors")
    mask = simu.MASKS[s.mask](scores["forget"], scores["retain"], s.threshold, s.seed)
    if mask.shape != scores["forget"].shape:
        raise UserError(f"mask {s.mask} has the shape {list(mask.shape)}; it must be that of the "
                        f"scores, {list(scores['forget'].shape)}")
    return mask


def make_mask(s: Settings, job: Stage, folder: Path):
    mask = mask_of_scores(s)
    per_layer = (mask != 0).sum(1).tolist()
    save_tensors(folder / "mask.safetensors", {"mask": mask})
    job.notes.update(critical=sum(per_layer), total=mask.numel(), critical_per_layer=per_layer)
    print(f"{sum(per_layer)} of {mask.numel()} neurons are critical; by layer: "
          f"{' '.join(map(str, per_layer))}")


def mask_stage(s: Settings):
    """mask/mask.safetensors (mask-<kind>/ unless dual): M [L, D]; counts in stage.json."""
    same_slice(s)
    mask_job(s).ensure()


# --------------------------------------------------------------------------------------- step 2


def aim(s: Settings, job: Stage, bench: slices.Benchmark, encoded: dict, model: Transformer
        ) -> tuple:
    """The losses that the forget rows are to have, and the loop: of all updates; of a user's rows
    it ends where they are forgotten."""
    # Of a user's rows drawn twice, because what a model was led to must not also judge it.
    seeds = (s.seed, s.seed + 1) if s.layout == "rows" else (s.seed,)
    (targets, *judges), source = forget_targets(s, bench, encoded["forget"], model, seeds)
    job.notes["level_from"] = source
    print(f"[{job.name}] loss of rows never seen: {source}", flush=True)
    if not judges:
        return targets, job.loop
    job.notes["never_seen"] = [losses.mean().item() for losses in judges[0]]
    return targets, until_forgotten(model, encoded, targets, s, job)


def unlearn_job(s: Settings) -> Stage:
    inputs = dict(original=content(s.run / "original")) | data_inputs(s)
    takes = (slices.Slice, Source, Placement, objectives.Unlearning)
    if simu.OBJECTIVES[s.objective].targeted:
        takes += (Level,)
        if s.level == "retain-only":
            inputs["retain-only"] = content(s.run / "retain-only")
    if simu.METHODS[s.method].masked:
        mask_job(s).require()
        inputs[mask_name(s)] = content(s.run / mask_name(s))
    return Stage(s.run / unlearned_name(s), s, inputs=inputs, takes=takes, code=(make_unlearned,))


def make_unlearned(s: Settings, job: Stage, folder: Path):
    mask, targets, loop = None, None, job.loop
    if simu.METHODS[s.method].masked:
        mask = load_file(s.run / mask_name(s) / "mask.safetensors")["mask"]
    bench, encoded = encoded_rows(s, s.objective)
    model, s = load_original(s, job, "unlearn", encoded)
    encoded = without_ends(s, bench, encoded, model)
    if simu.OBJECTIVES[s.objective].targeted:
        targets, loop = aim(s, job, bench, encoded, model)
    simu.unlearn(model, encoded["forget"], encoded["retain"], mask, s, targets=targets,
                 title=unlearned_name(s), loop=loop, record=job.record("log.jsonl"),
                 **fused.on(model.embed_tokens.weight.device, s.state))
    checkpoint.save_model(model, folder)
    data.copy_tokenizer(s.run / "original", folder)
    write_generation_config(folder, job.s)
    write_card(folder, job.name, job.s, dataclasses.asdict(job.s))


def unlearn_stage(s: Settings):
    """<method>-<objective>/: the unlearned model in HF layout, its tokenizer, log.jsonl."""
    same_slice(s)
    unlearn_job(s).ensure()
