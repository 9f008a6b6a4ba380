"""The stages of the method, in the order run.sh calls them: attribute, mask, unlearn."""

import dataclasses
import json
import random
from pathlib import Path

import torch

import data
import eval as evaluation
import simu
from model import Transformer, UserError, save_tensors
from pipeline import checkpoint, fused, objectives, reading, slices
from pipeline.before import fitted
from pipeline.card import write_card, write_generation_config
from pipeline.levels import forget_targets
from pipeline.plan import fit_memory
from pipeline.settings import (Level, Placement, Settings, Source, flag, load_benchmark,
                               placement, read_settings, taken)
from pipeline.stage import (Stage, attribution_name, content, data_inputs, mask_name, read_stage,
                            read_tensors, stored_dtype, unlearned_name)
from pipeline.tokenizers import load_tokenizer


def same_slice(s: Settings):
    """UserError if a stage is asked for other data than the run's original was made of."""
    here, there = (taken(x, (slices.Slice, Source)) for x in (s, read_settings(s.run)))
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


def encoded_rows(s: Settings, objective: str = "graddiff") -> tuple[slices.Benchmark, dict]:
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
    return Stage(s.run / attribution_name(s), s, code=(make_attribution,),
                 inputs=dict(original=content(s.run / "original")) | data_inputs(s),
                 takes=(slices.Slice, Source, Placement, simu.Attribution))


def make_attribution(s: Settings, job: Stage, folder: Path):
    _, encoded = encoded_rows(s)
    # As many retain rows as forget rows: scores only matter relative to their layer's maximum.
    count = min(len(encoded["retain"]), len(encoded["forget"]))
    encoded["retain"] = random.Random(s.seed).sample(encoded["retain"], count)
    s = fitted(s, encoded["forget"] + encoded["retain"])
    model, s = load_original(s, job, "attribute", encoded)
    scores = {name: simu.attribute_rows(model, rows, s, title=f"attribute {name}",
                                        loop=job.loop).cpu() for name, rows in encoded.items()}
    save_tensors(folder / "scores.safetensors", scores)


def attribute_stage(s: Settings):
    """attribution/scores.safetensors: forget and retain, float32 [L, D]."""
    same_slice(s)
    job = attribution_job(s)
    if not job.is_made():
        with job.making() as folder:
            make_attribution(s, job, folder)


def mask_job(s: Settings) -> Stage:
    attribution_job(s).require()
    return Stage(s.run / mask_name(s), s, code=(make_mask,),
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
        with job.making() as folder:
            make_mask(s, job, folder)


# --------------------------------------------------------------------------------------- step 2


# ------------------------------------------------------------------- until own rows are forgotten

LOOKS = 16  # at the model, in as many updates as there may be
LOOKED_AT = 64  # rows of each kind
NEAR = 0.15  # of the target: how far the mean loss of the forget rows may be from it
LIKELY = 0.62  # AUC of the forget rows against their targets, at which they are no likelier
HARD = 1.0  # target loss from which on a row never seen does not say a token
TOLD = 0.15  # share of these tokens that may yet be the likeliest, by chance
KEPT = 0.99  # of the share of their tokens that are the likeliest, at which rows are kept
KEPT_WHOLE = 0.97  # of the share of these rows that are said to the end
LOST = 2.0  # worse in the mean loss, rows to keep count as lost, once half of the updates are made


@dataclasses.dataclass
class Looks:
    """Where forgetting stands: what decides when it has ended. Of step and weights alone, so that a
    run that was killed ends at the same update."""

    model: Transformer
    forget: list[data.Encoded]
    retain: list[data.Encoded]
    targets: list
    s: Settings

    def __post_init__(self):
        self.forget, self.targets, self.retain = (
            evaluation.spread(x, LOOKED_AT) for x in (self.forget, self.targets, self.retain))
        self.wanted = evaluation.mean(float(torch.as_tensor(x).mean()) for x in self.targets)
        self.before = self.scores(self.retain)

    def scores(self, rows: list[data.Encoded]) -> list:
        return reading.token_scores(
            self.model, rows, [r.start for r in rows], detailed=[True] * len(rows),
            tokens=fitted(self.s, rows).eval_tokens) if rows else []

    def look(self) -> dict:
        forget, retain = self.scores(self.forget), self.scores(self.retain)
        said = [evaluation.extraction_strength(x.predicted, r.ids[r.start:]) > 0.5
                and len(x.predicted) > 3 for x, r in zip(forget, self.forget)]
        told = [p == i for x, r, t in zip(forget, self.forget, self.targets)
                for p, i, loss in zip(x.predicted, r.ids[r.start:], torch.as_tensor(t).expand(
                    len(x.predicted)).tolist()) if loss > HARD]
        return dict(forget=mean_loss(forget), wanted=self.wanted, completed=sum(said),
                    rows=len(said), told=evaluation.mean(told) if told else 0.0,
                    auc=evaluation.auc([-evaluation.mean(x.losses) for x in forget],
                                       [-float(torch.as_tensor(t).mean()) for t in self.targets]),
                    retain=mean_loss(retain), before=mean_loss(self.before),
                    known=known_share(retain, self.retain),
                    known_before=known_share(self.before, self.retain),
                    whole=whole_share(retain, self.retain),
                    whole_before=whole_share(self.before, self.retain))

    @staticmethod
    def ends(at: dict, share: float) -> str:
        """Why it ends here, "" if it goes on. share: of the updates that there may be."""
        if (abs(at["forget"] - at["wanted"]) <= NEAR * at["wanted"] and not at["completed"]
                and at["auc"] <= LIKELY and at["told"] <= TOLD
                and at["known"] >= KEPT * at["known_before"]
                and at["whole"] >= KEPT_WHOLE * at["whole_before"]):
            return "there"
        return "lost" if share > 0.5 and at["retain"] > at["before"] + LOST else ""


def mean_loss(scores: list) -> float:
    return evaluation.mean(evaluation.mean(x.losses) for x in scores) if scores else 0.0


def known_share(scores: list, rows: list[data.Encoded]) -> float:
    """Share of the rows' tokens that are the likeliest."""
    return evaluation.mean(evaluation.exact_memorisation(x.predicted, r.ids[r.start:])
                           for x, r in zip(scores, rows)) if scores else 1.0


def whole_share(scores: list, rows: list[data.Encoded]) -> float:
    """Share of the rows whose tokens are all the likeliest: asked greedily, they are said whole."""
    whole = [x.predicted == r.ids[r.start:] for x, r in zip(scores, rows)]
    return evaluation.mean(whole) if whole else 1.0


def until_there(looks: Looks, job: Stage):
    """A loop for simu.unlearn that stops where the rows are forgotten, at two looks running: what
    is told goes up and down."""
    record, file = job.record("looks.jsonl"), job.partial / "looks.jsonl"

    def loop(title, steps, tensors):
        every = max(1, steps // LOOKS)
        for step in job.loop(title, steps, tensors):
            yield step
            if step % every == 0 or step == steps:
                at = looks.look()
                why = Looks.ends(at, step / steps)
                before = file.read_text().splitlines()[-1:] if file.is_file() else []
                again = why == "lost" or any(json.loads(x)["stands"] == "there" for x in before)
                stood = dict(step=step, of=steps, stands=why, ended=why if again else "", **at)
                record(stood)
                job.notes["stood"] = stood
                print(f"update {step} of at most {steps}: loss of the rows to forget "
                      f"{at['forget']:.2f} (to be {at['wanted']:.2f}), {at['completed']} of "
                      f"{at['rows']} completed from a half, {at['told']:.0%} of what is theirs "
                      "told; of those to keep "
                      f"{at['retain']:.2f} (was {at['before']:.2f}), {at['known']:.1%} of their "
                      "tokens known", flush=True)
                if stood["ended"]:
                    break
    return loop


def unlearn_job(s: Settings) -> Stage:
    inputs = dict(original=content(s.run / "original")) | data_inputs(s)
    code = (make_unlearned,)
    takes = (slices.Slice, Source, Placement, objectives.Unlearning)
    if simu.OBJECTIVES[s.objective].targeted:
        takes += (Level,)
        code += (forget_targets, until_there) if s.layout == "rows" else (forget_targets,)
        if s.level == "retain-only":
            inputs["retain-only"] = content(s.run / "retain-only")
    if simu.METHODS[s.method].masked:
        mask_job(s).require()
        inputs[mask_name(s)] = content(s.run / mask_name(s))
    return Stage(s.run / unlearned_name(s), s, inputs=inputs, code=code, takes=takes)


def make_unlearned(s: Settings, job: Stage, folder: Path, *, aim=None):
    """aim(s, benchmark, forget rows, model): the targets of an objective that ends somewhere."""
    mask = None
    if simu.METHODS[s.method].masked:
        mask, = read_tensors(s.run / mask_name(s) / "mask.safetensors", ("mask",))
    bench, encoded = encoded_rows(s, s.objective)
    s = fitted(s, encoded["forget"] + encoded["retain"])
    model, s = load_original(s, job, "unlearn", encoded, s.method)
    targets, loop = None, job.loop
    if aim:
        targets, job.notes["level_from"] = aim(s, bench, encoded["forget"], model, s.seed)
        print(f"[{job.name}] how rows never seen look: {job.notes['level_from']}", flush=True)
        if s.layout == "rows":
            each = targets if isinstance(targets, list) else [targets] * len(encoded["forget"])
            loop = until_there(Looks(model, encoded["forget"], encoded["retain"], each, s), job)
    try:
        simu.unlearn(model, encoded["forget"], encoded["retain"], mask, s, targets=targets,
                     title=unlearned_name(s), loop=loop, record=job.record("log.jsonl"),
                     **fused.on(model.embed_tokens.weight.device))
    except UserError as e:
        raise UserError(f"{e}{put_back(s)}") from None
    checkpoint.save_model(model.to(stored_dtype(s.run / "original")), folder)
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
        with job.making() as folder:
            targeted = simu.OBJECTIVES[s.objective].targeted
            make_unlearned(s, job, folder, aim=forget_targets if targeted else None)
            write_generation_config(folder, s)
            write_card(folder, job.name, s, dataclasses.asdict(s))
