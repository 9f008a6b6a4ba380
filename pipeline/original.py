"""The model that knows everything: published, fine-tuned, or made from random weights.

Nothing of the method is here. A published original is linked (hub.py fetches it). Where nobody
published one, a base model is fine-tuned on forget and retain rows together. A tiny one is made in
two stages, as real ones are: first all but the forget set, which stays as retain-only, the ideal
that unlearning is judged against; then lightly the forget set.
"""

import dataclasses
import random
from pathlib import Path

import torch

import data
import simu
from data import Encoded
from model import Transformer, UserError, read_json, write_json
from pipeline import checkpoint, fused, hub, objectives, slices
from pipeline.levels import need_reference
from pipeline.plan import fit_memory, outlook, tiny_config
from pipeline.settings import (Making, Placement, Settings, Source, choose_device, placement,
                               with_choices)
from pipeline.stage import Stage, content, data_inputs, finished_models, sha256
from pipeline.tokenizers import load_tokenizer, train_tokenizer

DECIDING = (slices.Slice, Source, Placement, Making)  # settings of a model made here

def learning(s: Settings, lr: float) -> objectives.Unlearning:
    """The constants of AdamW while an original is made."""
    return objectives.Unlearning(
        method="fo", seed=s.seed, lr=lr, batch=s.learn_batch, weight_decay=s.learn_decay,
        warmup=s.learn_warmup, micro_tokens=s.learn_tokens, state=s.learn_state,
        checkpointing=s.learn_checkpointing)


def answer_loss(model: Transformer, forget: list, rows: list[Encoded], known, recipe):
    for nll in simu.nll_parts(model, rows, recipe.micro_tokens):
        yield "loss", nll, nll


LEARNING = simu.Objective(answer_loss, about="the mean answer loss")


def learn(model: Transformer, epochs: list[list[Encoded]], recipe: objectives.Unlearning,
          job: Stage, *, title: str) -> list[dict]:
    """AdamW on the mean answer loss; returns the log. epochs: for each, its rows in order."""
    batches = [([], rows[i:i + recipe.batch], None) for rows in epochs
               for i in range(0, len(rows), recipe.batch)]
    return simu.train(model, batches, LEARNING, recipe, title=title, loop=job.loop,
                      record=job.record("log.jsonl"),
                      **fused.on(model.embed_tokens.weight.device, recipe.state))


def shuffled(s: Settings, rows: list[Encoded]) -> list[list[Encoded]]:
    """The rows in a random order for each epoch."""
    rng = random.Random(s.seed)
    return [rng.sample(rows, len(rows)) for _ in range(s.learn_epochs)]


def paraphrased(examples: list[data.Example]) -> list[data.Example]:
    """The same answers asked for in other words, as `accuracy` [D11] asks. A tiny model has no
    English but its rows', so it is taught what real checkpoints understand unasked."""
    return [dataclasses.replace(e, question=e.paraphrased_question) for e in examples
            if e.paraphrased_question]


def known_rows(bench: slices.Benchmark) -> list[data.Example]:
    """What a tiny model knows before it sees the forget set."""
    return (bench.retain + bench.world_facts + bench.real_authors
            + paraphrased(bench.retain_eval))


def make_retain_only(s: Settings, job: Stage, folder: Path):
    """First stage of a tiny original: everything but the forget set, from random weights."""
    bench = slices.load_benchmark(s)
    never_seen = bench.nonmembers + list(bench.level_rows)
    every = known_rows(bench) + bench.forget + paraphrased(bench.forget) + never_seen
    texts = [t for e in every for t in (e.question, e.answer)]
    train_tokenizer(texts, folder, llama=s.model == "tiny-llama", vocab=s.vocab)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(s.seed)
    config = tiny_config(s, tokenizer.vocab_size, bos_token_id=tokenizer.bos_id,
                         eos_token_id=tokenizer.eos_id)
    model = Transformer(config).to(choose_device(s))
    rows = data.encode_for(config, known_rows(bench), tokenizer, s.template)
    learn(model, shuffled(s, rows), learning(s, s.learn_lr), job, title="learn the retain set")
    checkpoint.save_model(model, folder)


def make_original(s: Settings, job: Stage, folder: Path):
    """Second stage: the forget set, lightly, with a sample of what is already known beside it."""
    base, bench = s.run / "retain-only", slices.load_benchmark(s)
    tokenizer, model = load_tokenizer(base), checkpoint.load_model(base, device=choose_device(s))
    forget, known = (data.encode_for(model.config, x, tokenizer, s.template)
                     for x in (bench.forget + paraphrased(bench.forget), known_rows(bench)))
    rng, epochs = random.Random(s.seed + 1), []
    for _ in range(s.light_epochs):
        rows = forget + rng.sample(known, min(len(known), s.light_retain * len(forget)))
        epochs.append(rng.sample(rows, len(rows)))
    learn(model, epochs, learning(s, s.light_lr), job, title="learn the forget set")
    checkpoint.save_model(model, folder)
    data.copy_tokenizer(base, folder)


# ------------------------------------------------------------------------- from a model's folder


def teach(s: Settings, job: Stage, folder: Path, base: Path, examples: list[data.Example]):
    """A model that never saw the benchmark, taught some of its rows in one go."""
    tokenizer, config = load_tokenizer(base), checkpoint.read_config(base)
    rows = data.encode_for(config, examples, tokenizer, s.template)
    s, notes = fit_memory(s, config, "learn", rows)
    job.notes.update(notes)
    model = checkpoint.load_model(base, **placement(s))
    learn(model, shuffled(s, rows), learning(s, s.learn_lr), job, title=f"learn {job.name}")
    checkpoint.save_model(model, folder)
    data.copy_tokenizer(base, folder)


def link(s: Settings, job: Stage, folder: Path, source: Path):
    """Links to the files of a folder, in place of those that lead nowhere."""
    for p in model_files(source):
        if not (folder / p.name).exists():
            (folder / p.name).unlink(missing_ok=True)
            (folder / p.name).symlink_to(p)


def model_files(folder: Path) -> list[Path]:
    """The files of a model's folder that a run reads, its tokenizer's among them."""
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != "stage.json"
             and p.suffix in (".json", ".safetensors", ".model", ".jinja")]
    tokenizer = hub.tokenizer_folder(folder)
    if tokenizer != folder:
        files += [tokenizer / x for x in data.TOKENIZER_FILES if (tokenizer / x).is_file()]
    return files


def refuse_weights(s: Settings, source: Path):
    """UserError unless a folder outside the run holds a model that we can read."""
    checkpoint.read_config(source)
    checkpoint.weight_files(source)
    load_tokenizer(hub.tokenizer_folder(source))
    run = s.run.resolve()
    if any(p.resolve().is_relative_to(run) for p in (source, *source.iterdir())):
        raise UserError(f"{source} lies in {s.run}, whose stages are to be made from it and would "
                        "replace it; choose another --out")


def refuse_other_request(s: Settings, job: Stage):
    """UserError if the run holds the result of other rows or of another model, which this one would
    replace."""
    results = set(finished_models(s.run)) - {"original", "retain-only"}
    if results and [x for x in job.changed() if "/" in x and x != "data/unseen"]:
        raise UserError(f"{s.run / min(results)} is the result of other rows or of another model, "
                        "and would be replaced; choose another --out, or move it elsewhere")


def original_stage(s: Settings):
    """original/, and retain-only/ where there is one. Downloads what is not at hand."""
    hub.download_data(s)
    if s.tiny and not s.weights:
        stage_of(s, "retain-only", make_retain_only)
        stage_of(s, "original", make_original,
                 **{"retain-only": content(s.run / "retain-only")})
    else:
        (folder, ready), partner = hub.find_original(s), hub.find_retain_only(s)
        for source in filter(None, (folder, partner)):
            refuse_weights(s, source)
        if hub.chosen_model(s).startswith("hf:"):  # its size and its template are known now
            s = with_choices(s, folder)
        bench = slices.load_benchmark(s, hub.tokenizer_folder(folder))
        if s.layout == "rows" and (s.force or not (s.run / "original" / "stage.json").is_file()):
            need_reference(s, bench)
            outlook(s, folder, bench)
        if ready:
            stage_of(s, "original", link, folder)
        else:  # nobody published one
            stage_of(s, "original", teach, folder, [*bench.forget, *bench.retain, *bench.held_out])
            if s.learn_retain_only:
                stage_of(s, "retain-only", teach, folder, bench.retain)
        if partner:
            stage_of(s, "retain-only", link, partner)
    write_json(s.run / "settings.json", dataclasses.asdict(s) | dict(force=False))


def stage_of(s: Settings, name: str, make, *args, **inputs):
    """A stage that holds a model. args: of `make`, the folder first that its model is from."""
    folder, inputs = s.run / name, inputs | data_inputs(s)
    if args:
        inputs |= {f"weights/{p.name}": sha256(p) for p in model_files(args[0])}
    job = Stage(folder, s, inputs=inputs, code=(make,),
                takes=(slices.Slice, Source) if make is link else DECIDING)
    if args:
        job.notes["source"] = hub.origin(args[0])
    if (folder / "stage.json").is_file():
        before = read_json(folder / "stage.json").get("why", {}).get("inputs")
        if make is link and before == inputs:  # the same files, which may have moved
            link(s, job, folder, *args)
        if s.layout == "rows":
            refuse_other_request(s, job)
    job.ensure(*args)
