"""The model that knows everything: found, fine-tuned, or made from random weights.

Nothing of the method is here. A published original is linked (hub.py fetches it). Where nobody
published one, a base model is fine-tuned on forget and retain rows together. A tiny one is made in
two stages, as real ones are: first all but the forget set, which is kept as retain-only, the ideal
that unlearning is judged against; then lightly the forget set.
"""

import dataclasses
import random
from pathlib import Path

import stage  # before torch: it silences a warning of torch's import

import torch

import data
import hub
import simu
from data import Encoded
from model import Config, Transformer, weight_files
from simu import SLICE
from stage import Settings, Stage, UserError

LEARN = SLICE + ("learn_batch", "micro_tokens", "beta1", "adam_beta2", "adam_eps", "weight_decay",
                 "clip", "warmup", "vocab", "width", "depth", "context", "learn_lr", "learn_epochs")
LIGHT = LEARN + ("light_lr", "light_epochs", "light_retain")
FINE_TUNE = LEARN + ("state", "checkpointing")
CODE = (*simu.CODE, "original")


# ------------------------------------------------------------------------------------ tiny ones


def tiny_config(s: Settings, tokenizer) -> Config:
    """A small LLaMA (grouped kv heads) or OLMo (tied head), of s.width and s.depth."""
    llama, head = s.model == "tiny-llama", 32
    if s.width % (2 * head):
        raise UserError(f"--width {s.width} is not a multiple of {2 * head}")
    return Config(
        model_type="llama" if llama else "olmo", vocab_size=tokenizer.vocab_size,
        hidden_size=s.width, intermediate_size=4 * s.width, num_hidden_layers=s.depth,
        num_attention_heads=s.width // head, head_dim=head,
        num_key_value_heads=s.width // head // (2 if llama else 1),
        max_position_embeddings=s.context, norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=not llama, clip_qkv=None, bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id, pad_token_id=None)


def learn(model: Transformer, epochs: list[list[Encoded]], s: Settings, *, lr: float, log: Path,
          title: str):
    """AdamW on the mean answer loss. epochs: for each epoch, its rows in order."""
    order = [rows[i:i + s.learn_batch] for rows in epochs
             for i in range(0, len(rows), s.learn_batch)]
    state = torch.float32 if s.tiny else getattr(torch, s.state)
    with simu.moving_weights(model, "fo", None, state) as moving:
        simu.train(model, moving, order,
                   lambda rows: dict(loss=simu.backward_mean_nll(model, rows, 1.0, s.micro_tokens)),
                   simu.adamw(s), s=s, lr=lr, warmup=s.warmup, log=log, title=title)


def paraphrased(examples: list[data.Example]) -> list[data.Example]:
    """The same answers asked for in other words, as `accuracy` [D11] asks. A tiny model has no
    English but its rows', so it is taught what real checkpoints understand unasked."""
    return [dataclasses.replace(e, question=e.paraphrased_question) for e in examples
            if e.paraphrased_question]


def known_rows(bench: data.Benchmark) -> list[data.Example]:
    """What a tiny model knows before it sees the forget set."""
    return (bench.retain + bench.world_facts + bench.real_authors
            + paraphrased(bench.retain_eval))


def make_retain_only(s: Settings, bench: data.Benchmark, folder: Path):
    """First stage of a tiny original: everything but the forget set, from random weights."""
    every = known_rows(bench) + bench.forget + paraphrased(bench.forget) + bench.nonmembers
    texts = [t for e in every for t in (e.question, e.answer)]
    data.train_tokenizer(texts, folder, llama=s.model == "tiny-llama", vocab=s.vocab)
    tokenizer = data.load_tokenizer(folder)
    torch.manual_seed(s.seed)
    model = Transformer(tiny_config(s, tokenizer)).to(stage.choose_device(s))
    rows = data.encode_all(known_rows(bench), tokenizer, s.template, context=s.context,
                           vocab=tokenizer.vocab_size)
    rng = random.Random(s.seed)
    epochs = [rng.sample(rows, len(rows)) for _ in range(s.learn_epochs)]
    learn(model, epochs, s, lr=s.learn_lr, log=folder / "log.jsonl", title="learn the retain set")
    model.save_pretrained(folder)


def make_original(s: Settings, bench: data.Benchmark, retain_only: Path, folder: Path):
    """Second stage: the forget set, lightly, with a sample of what is already known beside it."""
    tokenizer = data.load_tokenizer(retain_only)
    model = Transformer.from_pretrained(retain_only, device=stage.choose_device(s))
    forget, known = (
        data.encode_all(x, tokenizer, s.template, context=s.context, vocab=tokenizer.vocab_size)
        for x in (bench.forget + paraphrased(bench.forget), known_rows(bench)))
    rng = random.Random(s.seed + 1)
    beside = min(len(known), s.light_retain * len(forget))
    epochs = []
    for _ in range(s.light_epochs):
        rows = forget + rng.sample(known, beside)
        epochs.append(rng.sample(rows, len(rows)))
    learn(model, epochs, s, lr=s.light_lr, log=folder / "log.jsonl", title="learn the forget set")
    model.save_pretrained(folder)
    data.copy_tokenizer(retain_only, folder)


# -------------------------------------------------------------- those that nobody published


def learning(s: Settings) -> Settings:
    """The settings with which the original is fine-tuned: the recipe's "original" over s."""
    return dataclasses.replace(s, **simu.RECIPES[s.benchmark, s.model].get("original", {}))


def fine_tune(s: Settings, bench: data.Benchmark, job: Stage, base: Path, folder: Path):
    """A model that never saw the benchmark, taught its forget and retain rows in one go."""
    from plan import check  # the plan runs this module's code without data
    tokenizer, config = data.load_tokenizer(base), Config.from_dir(base)
    rows = data.encode_all(bench.forget + bench.retain, tokenizer, s.template,
                           context=config.max_position_embeddings, vocab=config.vocab_size)
    job.notes["predicted_bytes"] = check(s, config, "learn", rows=rows)
    model = Transformer.from_pretrained(base, **stage.placement(s))
    model.checkpoint = s.checkpointing
    rng = random.Random(s.seed)
    learn(model, [rng.sample(rows, len(rows)) for _ in range(s.learn_epochs)], s, lr=s.learn_lr,
          log=folder / "log.jsonl", title="learn the forget and the retain set")
    model.save_pretrained(folder)
    data.copy_tokenizer(base, folder)


# ------------------------------------------------------------------------------------- the stage


def make_or_find(s: Settings):
    """The original stage."""
    if source := hub.wanted_data(s):
        hub.download(source)
    bench, digests = data.load_benchmark(s), data.data_digests(s)
    if s.tiny and not s.weights:
        make_tiny(s, bench, digests)
    else:
        folder, source, ready = hub.find_original(s)
        if ready:
            link_original(s, folder, source)
        else:
            make_fine_tuned(s, bench, digests, folder, source)
    stage.write_json(s.run / "settings.json", dataclasses.asdict(s) | dict(force=False))


def make_fine_tuned(s: Settings, bench: data.Benchmark, digests: dict, base: Path, source: dict):
    """original/ of a real model of which no original was published."""
    s = learning(s)
    job = Stage(s.run / "original", settings=s, fields=FINE_TUNE, modules=CODE,
                inputs=source["sha256"] | digests)
    job.notes["source"] = source
    if not job.done:
        with job as folder:
            fine_tune(s, bench, job, base, folder)


def make_tiny(s: Settings, bench: data.Benchmark, digests: dict):
    """retain-only/ and original/ of a tiny model."""
    first = Stage(s.run / "retain-only", settings=s, fields=LEARN, inputs=digests, modules=CODE)
    if not first.done:
        with first as folder:
            make_retain_only(s, bench, folder)
    inputs = dict(retain_only=first.fingerprint)
    second = Stage(s.run / "original", settings=s, fields=LIGHT, inputs=inputs, modules=CODE)
    if not second.done:
        with second as folder:
            make_original(s, bench, first.folder, folder)


def link_original(s: Settings, source: Path, origin: dict):
    """original/ as links to the files of a folder; origin: its SOURCE, if it was downloaded."""
    if not source.is_dir():
        raise UserError(f"--weights {s.weights} is not a folder; a model of the Hugging Face hub "
                        "is named hf:OWNER/NAME[@REVISION]")
    run = s.run.resolve()
    if any(p.resolve().is_relative_to(run) for p in (source, *source.iterdir())):
        raise UserError(f"--weights {s.weights} lies in {s.run}, whose stages are to be made from "
                        "it and would replace it; choose another --out")
    Config.from_dir(source)
    weight_files(source)
    data.load_tokenizer(source)
    if (s.run / "retain-only").exists():
        raise UserError(f"{s.run} holds a retain-only model that is not of --weights; choose "
                        "another --out, or delete that folder")
    names = [p for p in sorted(source.iterdir()) if p.suffix in (".json", ".safetensors", ".model")]
    inputs = origin.get("sha256") or {
        p.name: f"{p.stat().st_size} {p.stat().st_mtime_ns}" for p in names}
    job = Stage(s.run / "original", settings=s, fields=("weights",), inputs=inputs, modules=())
    job.notes["source"] = origin
    if not job.done:
        with job as folder:
            for p in names:
                (folder / p.name).unlink(missing_ok=True)
                (folder / p.name).symlink_to(p)
