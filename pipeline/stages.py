"""The stages of the method, in the order run.sh calls them: attribute, mask, unlearn."""

import dataclasses
import random
from pathlib import Path

import torch

import data
import eval as evaluation
import simu
from model import Transformer, UserError, read_tensors, save_tensors
from pipeline import checkpoint, fused, objectives, reading
from pipeline.card import write_card, write_generation_config
from pipeline.evaluate import measured_rows
from pipeline.plan import fit_memory
from pipeline.settings import (Judging, Level, Placement, Settings, Source, flag, load_benchmark,
                               placement, read_settings, taken)
from pipeline.stage import (Stage, attribution_name, content, data_inputs, mask_name, read_stage,
                            unlearned_name)
from pipeline.tokenizers import load_tokenizer


def same_slice(s: Settings):
    """UserError if a stage is asked for other data than the run's original was made of."""
    here, there = (taken(x, (data.Slice, Source)) for x in (s, read_settings(s.run)))
    for name, value in here.items():
        if value != there[name]:
            raise UserError(f"--{name.replace('_', '-')} is {value!r} here and {there[name]!r} in "
                            f"{s.run}; give the run's options, or run `python -m pipeline "
                            "original` with these first")
    made = read_stage(s.run / "original")["why"]["inputs"]
    for name, sha in data_inputs(s).items():
        if made.get(name) != sha:
            raise UserError(f"{name} is not the file that {s.run}/original was made of; give that, "
                            "or run `python -m pipeline original` again")


def encoded_rows(s: Settings, objective: str = "graddiff") -> tuple[data.Benchmark, dict]:
    """The benchmark, and its forget rows, as the objective's loss takes them, and retain rows as
    the original's tokenizer spells them."""
    folder, bench = s.run / "original", load_benchmark(s)
    tokenizer, config = load_tokenizer(folder), checkpoint.read_config(folder)
    examples = dict(forget=objectives.loss_examples(bench.forget, objective), retain=bench.retain)
    return bench, {name: data.encode_for(config, some, tokenizer, s.template)
                   for name, some in examples.items()}


def load_original(s: Settings, job: Stage, name: str, encoded: dict, method: str | None = None
                  ) -> tuple[Transformer, Settings]:
    """The original model, once the plan says that this stage will fit, and with which settings."""
    folder = s.run / "original"
    s, notes = fit_memory(s, checkpoint.read_config(folder), name, method,
                          rows=encoded["forget"] + encoded["retain"])
    job.notes.update(notes)
    return checkpoint.load_model(folder, **placement(s)), s


# --------------------------------------------------------------------------------------- step 1


def attribution_job(s: Settings) -> Stage:
    return Stage(s.run / attribution_name(s), settings=s, code=(make_attribution,),
                 inputs=dict(original=content(s.run / "original")) | data_inputs(s),
                 takes=(data.Slice, Source, Placement, simu.Attribution))


def make_attribution(s: Settings, job: Stage, folder: Path):
    _, encoded = encoded_rows(s)
    # As many retain rows as forget rows: scores only matter relative to their layer's maximum.
    count = min(len(encoded["retain"]), len(encoded["forget"]))
    encoded["retain"] = random.Random(s.seed).sample(encoded["retain"], count)
    model, s = load_original(s, job, "attribute", encoded)
    scores = {name: simu.attribute_rows(model, rows, s, title=f"attribute {name}",
                                        loop=job.loop).cpu() for name, rows in encoded.items()}
    save_tensors(folder / "scores.safetensors", scores)


def attribute_stage(s: Settings):
    """attribution/scores.safetensors: forget and retain, float32 [L, D]."""
    same_slice(s)
    job = attribution_job(s)
    if not job.is_made():
        with job as folder:
            make_attribution(s, job, folder)


def mask_job(s: Settings) -> Stage:
    attribution_job(s).require()
    return Stage(s.run / mask_name(s), settings=s, code=(make_mask,),
                 inputs={name: content(s.run / name) for name in [attribution_name(s)]},
                 takes=(simu.Masking,))


def mask_of_scores(s: Settings) -> torch.Tensor:
    """M [L, D] as s wants it, from the run's attribution."""
    scores = read_tensors(s.run / attribution_name(s) / "scores.safetensors",
                          ("forget", "retain"))
    return simu.make_mask(s.mask, *scores, threshold=s.threshold, seed=s.seed)


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
    job = mask_job(s)
    if not job.is_made():
        with job as folder:
            make_mask(s, job, folder)


# --------------------------------------------------------------------------------------- step 2


def level_examples(s: Settings, bench: data.Benchmark) -> tuple[list[data.Example], str]:
    """Rows like the forget rows that the original never saw, and what they are."""
    if bench.level_rows:
        return list(bench.level_rows), f"{len(bench.level_rows)} rows of {bench.nonmember_source}"
    if s.unseen:
        rows = data.load_rows(s.unseen)
        return rows, f"{len(rows)} rows of --unseen"
    wrong = [dataclasses.replace(e, answer=a) for e in bench.forget for a in e.perturbed_answers]
    if wrong:
        return wrong, f"{len(wrong)} wrong answers to the forget rows' questions"
    if len(bench.forget) > 1:  # each question with another row's answer
        answers = [e.answer for e in bench.forget[1:] + bench.forget[:1]]
        return ([dataclasses.replace(e, answer=a) for e, a in zip(bench.forget, answers)],
                "the forget rows' questions with each other's answers")
    raise UserError(f"objective {s.objective} must know how a row never seen looks to the model: "
                    "give --unseen FILE, --level-share 0.5 where the benchmark has hold-out rows, "
                    "or --level NUMBER")


def answer_losses(model: Transformer, rows: list[data.Encoded], tokens: int):
    """(ids of the answer's tokens, their losses under the model) of each row."""
    first = [r.start for r in rows]
    scores = reading.token_scores(model, rows, first, tokens=tokens)
    return [(r.ids[i:], own.losses) for r, i, own in zip(rows, first, scores)]


def forget_targets(s: Settings, bench: data.Benchmark, forget: list[data.Encoded],
                   model: Transformer) -> tuple[object, str]:
    """What `simu.unlearn` takes as targets, and where they are from. Each forget row gets the
    losses of a never-seen row drawn by seed, spread over its own tokens."""
    if s.level not in ("unseen", "retain-only"):
        return float(s.level), f"--level {s.level}"
    if s.level == "retain-only":
        ideal = checkpoint.load_model(s.run / "retain-only", **placement(s))
        own = answer_losses(ideal, forget, s.eval_tokens)
        return [torch.tensor(losses) for _, losses in own], "retain-only's loss of each row"
    examples, source = level_examples(s, bench)
    rows = data.encode_for(model.config, examples, load_tokenizer(s.run / "original"),
                           s.template)
    seen = answer_losses(model, rows, s.eval_tokens)
    usual = objectives.usual_losses([i for ids, _ in seen for i in ids],
                              [x for _, own in seen for x in own], model.config.vocab_size)
    order = random.Random(s.seed).sample(range(len(forget)), len(forget))
    return [objectives.spread_losses(row.ids[row.start:], seen[i % len(seen)][1], usual)
            for row, i in zip(forget, order)], source


def unlearn_job(s: Settings) -> Stage:
    inputs = dict(original=content(s.run / "original")) | data_inputs(s)
    code, also = (make_unlearned,), dict(eval_epochs=s.eval_epochs)
    takes = (data.Slice, Source, Placement, objectives.Unlearning)
    if simu.OBJECTIVES[s.objective].targeted:
        takes += (Level,)
        code += (forget_targets,)
        if s.level == "retain-only":
            inputs["retain-only"] = content(s.run / "retain-only")
    if simu.METHODS[s.method].masked:
        mask_job(s).require()
        inputs[mask_name(s)] = content(s.run / mask_name(s))
    if s.eval_epochs:  # the evaluation's results are then part of the stage
        code += (epoch_evaluator,)
        also |= taken(s, (Judging,))
    return Stage(s.run / unlearned_name(s), settings=s, inputs=inputs, code=code, also=also,
                 takes=takes)


def make_unlearned(s: Settings, job: Stage, folder: Path, *, aim=None, watch=None):
    """aim(s, benchmark, forget rows, model): the targets of an objective that ends somewhere.
    watch(model, benchmark, s, job): gives the function that records a row of the log."""
    mask = None
    if simu.METHODS[s.method].masked:
        mask, = read_tensors(s.run / mask_name(s) / "mask.safetensors", ("mask",))
    bench, encoded = encoded_rows(s, s.objective)
    model, s = load_original(s, job, "unlearn", encoded, s.method)
    record, targets = watch(model, bench, s, job) if watch else job.record("log.jsonl"), None
    if aim:
        targets, job.notes["level_from"] = aim(s, bench, encoded["forget"], model)
    try:
        simu.unlearn(model, encoded["forget"], encoded["retain"], mask, s, targets=targets,
                     title=unlearned_name(s), loop=job.loop, record=record,
                     **fused.on(model.embed_tokens.weight.device))
    except UserError as e:
        raise UserError(f"{e}{put_back(s)}") from None
    checkpoint.save_model(model, folder)
    data.copy_tokenizer(s.run / "original", folder)


CONSTANTS = ("beta1", "beta2", "gamma", "eps", "adam_beta2", "adam_eps", "clip", "npo_beta",
             "simnpo_beta", "simnpo_margin", "undial_strength", "weight_decay")


def put_back(s: Settings) -> str:
    """What may be to blame where numbers overflow: constants that no recipe sets, if changed."""
    changed = [f"{flag(f.name)} (now {getattr(s, f.name):g})" for f in dataclasses.fields(s)
               if f.name in CONSTANTS and getattr(s, f.name) != f.default]
    return f", or put back {' and '.join(changed)}" if changed else ""


def unlearn_stage(s: Settings):
    """<method>-<objective>/: the unlearned model in HF layout, its tokenizer, log.jsonl."""
    same_slice(s)
    job = unlearn_job(s)
    if not job.is_made():
        with job as folder:
            make_unlearned(
                s, job, folder, watch=epoch_evaluator if s.eval_epochs else
                loss_reporter if s.layout == "rows" else None,
                aim=forget_targets if simu.OBJECTIVES[s.objective].targeted else None)
            write_generation_config(folder, s)
            write_card(folder, s, dataclasses.asdict(s))


def loss_reporter(model: Transformer, bench: data.Benchmark, s: Settings, job: Stage):
    """`record` of simu.train: also prints, eight times in all, the mean loss of at most 8 rows of
    each kind, so that a person sees where forgetting stands."""
    tokenizer = load_tokenizer(s.run / "original")
    record, updates = job.record("log.jsonl"), len(bench.forget) * s.epochs // s.batch
    kinds = {name: data.encode_for(model.config, evaluation.spread(some, 8), tokenizer, s.template)
             for name, some in (("forget", bench.forget), ("retain", bench.retain),
                                ("never seen", bench.nonmembers)) if some}

    def report(row: dict):
        record(row)
        if row["step"] % max(1, updates // 8) == 0:
            means = {name: evaluation.mean(evaluation.mean(own) for _, own in answer_losses(
                model, rows, s.eval_tokens)) for name, rows in kinds.items()}
            print(f"update {row['step']} of {updates}: loss of " + ", ".join(
                f"{name} rows {x:.2f}" for name, x in means.items()), flush=True)
    return report


def epoch_evaluator(model: Transformer, bench: data.Benchmark, s: Settings, job: Stage):
    """`record` of simu.train: also a line of metrics in epochs.jsonl whenever an epoch has ended.
    epoch: passes over the forget set so far, a whole number only where batches fill it."""
    tokenizer, n = load_tokenizer(s.run / "original"), len(bench.forget)
    record, record_epoch = job.record("log.jsonl"), job.record("epochs.jsonl")

    def evaluate_after(row: dict):
        record(row)
        step = row["step"]
        if step * s.batch // n > (step - 1) * s.batch // n:
            rows = measured_rows(model, tokenizer, bench, s, template=s.template)
            record_epoch(dict(epoch=round(step * s.batch / n, 3), step=step,
                              **evaluation.summarise(rows)))
    return evaluate_after
