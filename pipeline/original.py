"""The model that knows everything: published, fine-tuned, or made from random weights.

Nothing of the method is here. A published original is linked (hub.py fetches it). Where nobody
published one, a base model is fine-tuned on forget and retain rows together. A tiny one is made in
two stages, as real ones are: first all but the forget set, which is kept as retain-only, the ideal
that unlearning is judged against; then lightly the forget set.
"""

import dataclasses
import random
import shutil
from pathlib import Path

import torch

import data
import simu
from data import Encoded
from model import Transformer, UserError, write_json
from pipeline import checkpoint, fused, hub, objectives, slices
from pipeline.levels import need_reference
from pipeline.plan import fit_memory, outlook, tiny_config
from pipeline.settings import (Making, Placement, Settings, Source, choose_device, placement,
                               read_settings, with_choices)
from pipeline.stage import (Stage, content, data_inputs, finished_models, read_stage, sha256,
                            stored_dtype)
from pipeline.tokenizers import load_tokenizer, train_tokenizer

DECIDING = (slices.Slice, Source, Placement, Making)  # settings of a model made here

# ------------------------------------------------------------------------------------ tiny ones


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
    model.checkpoint = recipe.checkpointing
    ways = fused.on(model.embed_tokens.weight.device, recipe.state)
    with simu.moving_weights(model, recipe, None, ways.pop("state", torch.float32)) as moving:
        return simu.train(model, moving, batches, LEARNING, recipe, title=title, loop=job.loop,
                          record=job.record("log.jsonl"), **ways)


def paraphrased(examples: list[data.Example]) -> list[data.Example]:
    """The same answers asked for in other words, as `accuracy` [D11] asks. A tiny model has no
    English but its rows', so it is taught what real checkpoints understand unasked."""
    return [dataclasses.replace(e, question=e.paraphrased_question) for e in examples
            if e.paraphrased_question]


def known_rows(bench: slices.Benchmark) -> list[data.Example]:
    """What a tiny model knows before it sees the forget set."""
    return (bench.retain + bench.world_facts + bench.real_authors
            + paraphrased(bench.retain_eval))


def make_retain_only(s: Settings, bench: slices.Benchmark, job: Stage, folder: Path):
    """First stage of a tiny original: everything but the forget set, from random weights."""
    never_seen = bench.nonmembers + list(bench.level_rows)
    every = known_rows(bench) + bench.forget + paraphrased(bench.forget) + never_seen
    texts = [t for e in every for t in (e.question, e.answer)]
    train_tokenizer(texts, folder, llama=s.model == "tiny-llama", vocab=s.vocab)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(s.seed)
    model = Transformer(tiny_config(s, tokenizer.vocab_size, bos_token_id=tokenizer.bos_id,
                                    eos_token_id=tokenizer.eos_id)).to(choose_device(s))
    rows = data.encode_all(known_rows(bench), tokenizer, s.template, context=s.context,
                           vocab=tokenizer.vocab_size)
    rng = random.Random(s.seed)
    epochs = [rng.sample(rows, len(rows)) for _ in range(s.learn_epochs)]
    learn(model, epochs, learning(s, s.learn_lr), job, title="learn the retain set")
    checkpoint.save_model(model, folder)


def make_original(s: Settings, bench: slices.Benchmark, job: Stage, folder: Path):
    """Second stage: the forget set, lightly, with a sample of what is already known beside it."""
    retain_only = s.run / "retain-only"
    tokenizer = load_tokenizer(retain_only)
    model = checkpoint.load_model(retain_only, device=choose_device(s))
    forget, known = (
        data.encode_all(x, tokenizer, s.template, context=s.context, vocab=tokenizer.vocab_size)
        for x in (bench.forget + paraphrased(bench.forget), known_rows(bench)))
    rng = random.Random(s.seed + 1)
    beside = min(len(known), s.light_retain * len(forget))
    epochs = []
    for _ in range(s.light_epochs):
        rows = forget + rng.sample(known, beside)
        epochs.append(rng.sample(rows, len(rows)))
    learn(model, epochs, learning(s, s.light_lr), job, title="learn the forget set")
    checkpoint.save_model(model, folder)
    data.copy_tokenizer(retain_only, folder)


# -------------------------------------------------------------- those that nobody published


def teach(s: Settings, examples: list[data.Example], job: Stage, base: Path, folder: Path):
    """A model that never saw the benchmark, taught some of its rows in one go."""
    tokenizer, config = load_tokenizer(base), checkpoint.read_config(base)
    rows = data.encode_for(config, examples, tokenizer, s.template)
    s, notes = fit_memory(s, config, "learn", rows)
    job.notes.update(notes)
    model = checkpoint.load_model(base, **placement(s))
    rng = random.Random(s.seed)
    epochs = [rng.sample(rows, len(rows)) for _ in range(s.learn_epochs)]
    learn(model, epochs, learning(s, s.learn_lr), job, title=f"learn {job.name}")
    checkpoint.save_model(model.to(stored_dtype(base)), folder)
    data.copy_tokenizer(base, folder)
    if (base / "generation_config.json").is_file():  # how its maker lets it speak stays
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")


# ------------------------------------------------------------------------------------- the stage


def original_stage(s: Settings):
    """original/, and retain-only/ where there is one. Downloads what is not at hand."""
    hub.download_data(s)
    if s.tiny and not s.weights:
        stage_of_tiny(s, "retain-only", make_retain_only)
        stage_of_tiny(s, "original", make_original)
    else:
        folder, ready = hub.find_original(s)
        if hub.chosen_model(s).startswith("hf:"):  # its size and its template are known now
            s = with_choices(s, folder)
        bench = slices.load_benchmark(s, hub.tokenizer_folder(folder))
        if s.layout == "rows":
            refuse_other_request(s)
        if s.layout == "rows" and (s.force or not (s.run / "original" / "stage.json").is_file()):
            need_reference(s, bench)
            outlook(s, folder, bench)
        if ready:
            link_model(s, "original", folder)
        else:  # nobody published one
            stage_of_taught(s, "original", bench.forget + bench.retain + list(bench.held_out), folder)
            if s.learn_retain_only:
                stage_of_taught(s, "retain-only", bench.retain, folder)
        if partner := hub.find_retain_only(s):
            link_model(s, "retain-only", partner)
    write_json(s.run / "settings.json", dataclasses.asdict(s) | dict(force=False))


def refuse_other_request(s: Settings):
    """UserError if the run holds the result of other rows or of another model, which this one would
    replace."""
    inputs = data_inputs(s)
    for name in finished_models(s.run):
        why, before = read_stage(s.run / name)["why"], read_settings(s.run)
        if "method" not in why["settings"]:  # no result: original or retain-only
            continue
        other = [file for file in ("data/forget", "data/retain")
                 if why["inputs"].get(file) != inputs.get(file)]
        if other or (before.model, before.weights) != (s.model, s.weights):
            raise UserError(f"{s.run / name} is the result of other rows or of another model, and "
                            "would be replaced; choose another --out, or move it elsewhere")


def stage_of_tiny(s: Settings, name: str, make):
    inputs = data_inputs(s)
    if name == "original":
        inputs["retain-only"] = content(s.run / "retain-only")
    job = Stage(s.run / name, s, inputs=inputs, code=(make,), takes=DECIDING)
    if not job.is_made():
        with job.making() as folder:
            make(s, slices.load_benchmark(s), job, folder)


def stage_of_taught(s: Settings, name: str, examples: list[data.Example], base: Path):
    job = Stage(s.run / name, s, inputs=weight_inputs(base) | data_inputs(s), code=(teach,),
                takes=DECIDING)
    job.notes["source"] = hub.origin(base)
    if not job.is_made():
        with job.making() as folder:
            teach(s, examples, job, base, folder)


def model_files(folder: Path) -> list[Path]:
    """The files of a model's folder that a run reads, its tokenizer's among them."""
    files = [p for p in sorted(folder.iterdir())
             if p.is_file() and p.suffix in (".json", ".safetensors", ".model", ".jinja")]
    tokenizer = hub.tokenizer_folder(folder)
    if tokenizer != folder:
        files += [tokenizer / x for x in data.TOKENIZER_FILES if (tokenizer / x).is_file()]
    return files


def weight_inputs(folder: Path) -> dict[str, str]:
    return {f"weights/{p.name}": sha256(p) for p in model_files(folder)}


def link_model(s: Settings, name: str, source: Path):
    """original/ or retain-only/ as links to the files of a folder."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; a model is a name of the table, a folder in "
                        "Hugging Face layout, or hf:OWNER/NAME[@REVISION]")
    run = s.run.resolve()
    if any(p.resolve().is_relative_to(run) for p in (source, *source.iterdir())):
        raise UserError(f"{source} lies in {s.run}, whose stages are to be made from it and would "
                        "replace it; choose another --out")
    checkpoint.read_config(source)
    checkpoint.weight_files(source)
    load_tokenizer(hub.tokenizer_folder(source))
    if name == "original" and (s.run / "retain-only").exists() and not hub.find_retain_only(s):
        raise UserError(f"{s.run} holds a retain-only model that is not of {source}; choose "
                        "another --out, or delete that folder")
    job = Stage(s.run / name, s, inputs=data_inputs(s) | weight_inputs(source), code=(),
                takes=(slices.Slice, Source))
    job.notes["source"] = hub.origin(source)
    if not job.is_made():
        with job.making() as folder:
            for p in model_files(source):
                (folder / p.name).unlink(missing_ok=True)
                (folder / p.name).symlink_to(p)
