"""The evaluate stage: what a saved model says and how likely it finds each text, a row a line.

What is measured, and how, is eval.py's and metrics.py's; beside them stand closeness by a sentence
encoder and the stage. generations.jsonl holds the rows, stage.json what no row can say (`about`):
from the two every metric is computed whenever it is read, so that none can be out of date.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import data
import eval as evaluation
from eval import NO_ATTACK, SPLITS
from model import Transformer, UserError, generate, write_text
from pipeline import checkpoint, metrics, slices  # noqa: F401  metrics adds to eval's tables
from pipeline.reading import token_scores
from pipeline.settings import Judging, Placement, Settings, Source, placement, read_settings
from pipeline.stage import Stage, content, data_inputs, read_stage, sha256, stale
from pipeline.tokenizers import load_tokenizer, optional_package

ROWS = "generations.jsonl"


def splits_of(bench: slices.Benchmark) -> dict[str, list[data.Example]]:
    """The rows of a benchmark that are measured, by split; of LUME's non-members its documents."""
    return dict(forget=bench.forget, retain=bench.retain_eval, real_authors=bench.real_authors,
                world_facts=bench.world_facts, nonmembers=[
                    e for e in bench.nonmembers if bench.kind != "lume" or e.kind == "sc"])


def measured_rows(model: Transformer, tokenizer, bench: slices.Benchmark, s: Judging, *,
                  template: str, limit: int = 0) -> list[dict]:
    """The rows of eval.collect_rows, with closeness by an encoder if that is to judge."""
    if s.closeness == "encoder":  # loaded before the work, so that a missing one ends it at once
        encode = load_encoder(s.encoder, model.embed_tokens.weight.device)
    rows = evaluation.collect_rows(model, tokenizer, splits_of(bench), benchmark=bench.kind,
                                   template=template, limits=s, limit=limit, scorer=token_scores)
    if s.closeness == "encoder":
        add_closeness(rows, encode)
    if bench.kind == "rows":
        for other in ("qa", "raw"):  # that anybody tries
            if other != template:
                add_plain_answers(rows, model, tokenizer, other, s.eval_tokens)
    return rows


def add_plain_answers(rows: list[dict], model: Transformer, tokenizer, template: str, tokens: int):
    """To each forget row, what the model says to its question in another template. A text, and a
    row that is asked as it stands, has none. tokens: of a pass."""
    questions = [r for r in rows if r["split"] == "forget" and r["kind"] not in ("text", "plain")]
    if not questions:
        return
    prompts = [data.encode_prompt(r["question"], tokenizer, template, turns=r["turns"])
               for r in questions]
    longest = max(len(tokenizer.encode(r["answer"], bos=False)) for r in questions) + 16
    texts = generate(model, prompts, eos_id=tokenizer.eos_ids, max_new_tokens=longest,
                     batch_tokens=tokens)
    for row, ids in zip(questions, texts):
        row.setdefault("plain_generations", {})[template] = tokenizer.decode(ids)


def load_encoder(name: str, device) -> Callable:
    """A function from texts to unit vectors [n, E]. name: a folder or a hub name, as
    sentence-transformers takes them; its weights are read as safetensors alone."""
    sentence_transformers = optional_package("sentence_transformers", "--closeness encoder")
    try:
        model = sentence_transformers.SentenceTransformer(
            name, device=str(device), model_kwargs=dict(use_safetensors=True))
    except Exception as e:  # the library raises whatever its parts do
        raise UserError(f"--encoder {name} cannot be loaded ({' '.join(str(e).split())[:200]}); "
                        "give a folder of sentence-transformers, or connect to the hub") from None
    return lambda texts: model.encode(texts, convert_to_tensor=True, normalize_embeddings=True,
                                      show_progress_bar=False).float().cpu()


def add_closeness(rows: list[dict], encode: Callable):
    """`closeness` of f and r: the cosines of g' and of a with a' and each w [D11]."""
    judged = ("paraphrased_generation", "answer")
    for row in rows:
        if judged[0] in row and row["paraphrased_answer"] and row["perturbed_answers"]:
            choices = encode([row["paraphrased_answer"], *row["perturbed_answers"]])  # [6, E]
            texts = encode([row[name] for name in judged])  # [2, E]
            row["closeness"] = dict(zip(judged, (texts @ choices.T).tolist()))


def evaluation_job(s: Settings, name: str, limit: int = 0) -> Stage:
    """The evaluation of a run's stage (eval-limit-N: a quick look)."""
    inputs = dict(model=content(s.run / name)) | data_inputs(s)
    if s.closeness == "encoder":  # a name on the hub has no files
        inputs |= {f"encoder/{p.name}": sha256(p) for p in Path(s.encoder).rglob("*.safetensors")}
    return Stage(evaluations_of(s, name) / (f"eval-limit-{limit}" if limit else "eval"), s,
                 inputs=inputs, code=(measured_rows,), also=dict(limit=limit),
                 takes=(slices.Slice, Source, Placement, Judging))


def evaluations_of(s: Settings, name: str) -> Path:
    """The folder of a stage's evaluations: the model's, so that they go where it goes; of a user's
    rows RUN/evaluations/STAGE, because their text must not be uploaded with the model."""
    return s.run / "evaluations" / name if s.layout == "rows" else s.run / name


def evaluated_stages(s: Settings) -> list[str]:
    """Names of a run's stages that have an evaluation."""
    root = s.run / "evaluations" if s.layout == "rows" else s.run
    return sorted({p.parent.parent.name for p in root.glob("*/eval*/stage.json")})


def evaluate(run: Path, name: str, *, limit: int = 0, force: bool = False):
    """Evaluate a run's stage unless that is done. limit: at most so many rows of each split."""
    s = dataclasses.replace(read_settings(run), force=force)
    source, job = s.run / name, evaluation_job(s, name, limit)
    if other := stale(source, s):
        print(f"warning: {source} is not of what this run now holds, and no report will show it: "
              f"{'; '.join(other)}", flush=True)
    if job.is_made():
        return
    with job.making() as folder:
        tokenizer, bench = load_tokenizer(source), slices.load_benchmark(s)
        model = checkpoint.load_model(source, **placement(s))
        rows = measured_rows(model, tokenizer, bench, s, template=s.template, limit=limit)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(folder / ROWS, "\n".join(lines) + "\n")
        job.notes["about"] = dict(limit=limit, closeness=s.closeness, shared=bench.shared,
                                  nonmember_source=bench.nonmember_source)


def read_metrics(folder: Path, reference: list[dict] | None = None) -> dict:
    """Every metric of a finished evaluation, computed from its rows. reference: the rows of a
    retain-only model."""
    return metrics_of(read_rows(folder), read_stage(folder)["notes"]["about"], reference)


def metrics_of(rows: list[dict], about: dict, reference: list[dict] | None = None) -> dict:
    """eval.summarise, with `about`, which no row can say. counts: rows by split."""
    summary, kind = evaluation.summarise(rows, reference), rows[0]["benchmark"]
    notes, splits = summary["notes"], [row["split"] for row in rows]
    counts = {split: splits.count(split) for split in (*SPLITS, "nonmembers")}
    for name, note in notes.items():
        if note == NO_ATTACK.reason and not counts["nonmembers"]:
            notes[name] = about["nonmember_source"]
    if about["shared"]:
        notes["forget"] = f"{about['shared']} of these rows are in the retain set too"
    members = sum(row["split"] == "forget" and (kind != "lume" or row["kind"] == "sc")
                  for row in rows)
    what = "sentence completions" if kind == "lume" else "rows"
    partial = f"at most {about['limit']} rows of each split" if about["limit"] else ""
    return dict(benchmark=kind, closeness=about["closeness"], counts=counts, partial=partial,
                members=f"{members} {what} of the forget set",
                nonmembers=f"{counts['nonmembers']} {what}: {about['nonmember_source']}",
                values=summary["values"], notes=notes)


def read_rows(folder: Path) -> list[dict]:
    """The rows of a finished evaluation; UserError where a file was changed by other hands."""
    read_stage(folder)
    return [json.loads(x) for x in (folder / ROWS).read_text(encoding="utf-8").split("\n") if x]


def newest_evaluation(s: Settings, name: str) -> Stage | None:
    """The whole evaluation of a stage, else the one of most rows; None if there is none."""
    folder = evaluations_of(s, name)
    limits = sorted(int(p.parent.name.rpartition("-")[2])
                    for p in folder.glob("eval-limit-*/stage.json"))
    limits += [0] if (folder / "eval" / "stage.json").is_file() else []
    return evaluation_job(s, name, limits[-1]) if limits else None


def stale_because(s: Settings, name: str, job: Stage) -> list[str]:
    """Why an evaluation's numbers are not of what the run now holds; empty if they are. Where they
    were computed does not matter: a report may be written on another machine."""
    changed = [x for x in job.changed() if x not in ("--device", "--dtype")]
    why = [f"it was evaluated with other {' and '.join(changed)}"] if changed else []
    return why + [f"of its model, {x}" for x in stale(s.run / name, s)]
