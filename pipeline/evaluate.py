"""The evaluate stage: a saved model's generations.jsonl, its metrics.json, and whether they hold.

What is measured, and how, is eval.py's; here stand what it needs no run for (a killed evaluation
goes on, closeness by a sentence encoder) and the two files. generations.jsonl is what a model was
asked and said, and makes the stage. metrics.json follows from it: where the code that summarises
has changed, whoever reads it makes it again from the rows, in seconds.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch

import data
import eval as evaluation
from eval import CHOICE, choice_texts
from model import Transformer, UserError, read_json, write_json, write_text
from pipeline import checkpoint, slices
from pipeline.files import sha256
from pipeline.reach import code_digest
from pipeline.reading import generate, token_scores
from pipeline.resume import RESUME
from pipeline.settings import (Aside, Judging, Placement, Settings, Source, load_benchmark,
                               placement, read_settings)
from pipeline.stage import (Stage, content, data_inputs, differences, read_stage,
                            rewrite_derived, turn)
from pipeline.tokenizers import load_tokenizer

ROWS, METRICS = "generations.jsonl", "metrics.json"
KEEP_EVERY = 256  # generations between two writes of the file a killed evaluation goes on from

# --------------------------------------------------------------------------------- what is measured


def measured_rows(model: Transformer, tokenizer, benchmark: slices.Benchmark, s: Judging, *,
                  template: str, limit: int = 0, generate: Callable = generate,
                  token_scores: Callable = token_scores) -> list[dict]:
    """The rows of eval.evaluate_model, with closeness by an encoder where asked for."""
    device = model.embed_tokens.weight.device  # what is missing is told before the work
    encode = load_encoder(s.encoder, device) if s.closeness == "encoder" else None
    rows = evaluation.rows_of(benchmark, limit)
    known = evaluation.add_losses(rows, model, tokenizer, template, s, token_scores)
    evaluation.add_generations(rows, model, tokenizer, template, s, generate, known)
    if encode:
        add_closeness(rows, encode)
    return rows


def load_encoder(name: str, device) -> Callable:
    """A function from texts to unit vectors [n, E]. name: a folder or a hub name, as
    sentence-transformers takes them; its weights are read as safetensors alone."""
    sentence_transformers = data.optional_package("sentence_transformers", "--closeness encoder")
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~"))):
        raise UserError(f"--encoder {name} is not there; give a folder that is, or a hub name")
    try:
        model = sentence_transformers.SentenceTransformer(
            str(folder) if folder.is_dir() else name, device=str(device),
            model_kwargs=dict(use_safetensors=True))
    except Exception as e:  # the library raises whatever its parts do
        raise UserError(f"--encoder {name} cannot be loaded ({' '.join(str(e).split())[:200]}); "
                        "give a folder of sentence-transformers, or connect to the hub") from None
    return lambda texts: model.encode(texts, convert_to_tensor=True, normalize_embeddings=True,
                                      show_progress_bar=False).float().cpu()


def add_closeness(rows: list[dict], encode: Callable):
    """`closeness` of f and r: the cosines of g' and of a with a' and each w [D11]."""
    judged = ("paraphrased_generation", "answer")
    asked = [r for r in rows if CHOICE | {*judged} <= r.keys()]
    texts = list(dict.fromkeys(t for r in asked
                               for t in (*(r[k] for k in judged), *choice_texts(r))))
    vectors = dict(zip(texts, encode(texts))) if texts else {}
    for r in asked:
        held = torch.stack([vectors[t] for t in choice_texts(r)])  # [6, E]
        r["closeness"] = {k: (held @ vectors[r[k]]).tolist() for k in judged}
    rows[0]["closeness"] = "encoder"


def keeping(generate: Callable, path: Path) -> Callable:
    """`generate`, KEEP_EVERY prompts at a time, the longest first. What it says stands in the file
    at once; where that holds some already, it goes on from there."""
    def generate_in_parts(model, prompts, *, drafts, **options):
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        kept, out = whole_lines(path), [[]] * len(prompts)
        for n, start in enumerate(range(0, len(order), KEEP_EVERY)):
            part = order[start:start + KEEP_EVERY]
            if n == len(kept):
                kept.append(generate(model, [prompts[i] for i in part],
                                     drafts=[drafts[i] for i in part], **options))
                with open(path, "a", encoding="ascii") as file:
                    file.write(json.dumps(kept[n]) + "\n")
            for i, ids in zip(part, kept[n], strict=True):
                out[i] = ids
        return out
    return generate_in_parts


def whole_lines(path: Path) -> list:
    """JSON lines of a file; what a killed process left torn at its end is cut off."""
    if not path.is_file():
        return []
    text, values, end = path.read_text(encoding="ascii", errors="replace"), [], 0
    for line in text.splitlines(keepends=True):
        try:
            values.append(json.loads(line if line.endswith("\n") else ""))
        except ValueError:
            break
        end += len(line)
    if end < len(text):
        write_text(path, text[:end])
    return values


# ---------------------------------------------------------------------------------------- the stage


def evaluation_job(s: Settings, name: str, limit: int = 0) -> Stage:
    """The evaluation of a run's stage (eval-limit-N: a quick look)."""
    folder = s.run / name
    inputs = dict(model=content(folder)) | data_inputs(s)
    if s.closeness == "encoder":
        inputs |= folder_inputs("encoder", s.encoder)
    kind = f"eval-limit-{limit}" if limit else "eval"
    return Stage(evaluations_of(s, name) / kind, settings=s, inputs=inputs, code=(measured_rows,),
                 takes=(slices.Slice, Source, Placement, Aside, Judging),
                 also=dict(limit=limit))


def evaluations_of(s: Settings, name: str) -> Path:
    """The folder of a stage's evaluations: the model's own, so that they go where it goes; of a
    user's own rows RUN/evaluations/STAGE, for their text must not be uploaded with the model."""
    return s.run / "evaluations" / name if s.layout == "rows" else s.run / name


def evaluated_stages(s: Settings) -> list[str]:
    """Names of a run's stages that have an evaluation."""
    root = s.run / "evaluations" if s.layout == "rows" else s.run
    return sorted({p.parent.parent.name for p in root.glob("*/eval*/stage.json")})


def folder_inputs(name: str, folder: str) -> dict[str, str]:
    """The files of a folder that an evaluation reads, if it is one."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file()) if folder else []
    return {f"{name}/{p.relative_to(folder)}": sha256(p) for p in files}


def make_evaluation(s: Settings, model_folder: Path, job: Stage, folder: Path, limit: int):
    """generations.jsonl and metrics.json of a model."""
    tokenizer = load_tokenizer(model_folder)
    model = checkpoint.load_model(model_folder, **placement(s))
    rows = measured_rows(model, tokenizer, load_benchmark(s), s, template=s.template, limit=limit,
                         generate=keeping(generate, folder / RESUME / ROWS))
    write_text(folder / ROWS, "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n")
    write_json(folder / METRICS, evaluation.summarise(rows))
    job.notes["derived"] = {METRICS: summary_code()}


def evaluate(run: Path, name: str, *, limit: int = 0, force: bool = False, quiet: bool = False):
    """Evaluate a run's stage unless that is done. limit: at most so many rows of each split. quiet:
    nobody asked for this stage by name, and nothing is said where it is done."""
    s = dataclasses.replace(read_settings(run), force=force)
    if Path(name).name != name:
        raise UserError(f"{name} is not the bare name of a stage in {run}, such as original")
    job = evaluation_job(s, name, limit)
    job.quiet = quiet and s.layout == "rows"
    if other := differences(s.run / name, s, data_inputs(s)):
        print(f"warning: {s.run / name} is not of what this run now holds, and no report will show "
              f"it: {'; '.join(other)}", flush=True)
    if job.is_made():
        read_metrics(job.folder)
        return
    with job as folder:
        make_evaluation(s, s.run / name, job, folder, limit)


def summary_code() -> str:
    """Digest of the code that makes metrics.json of rows."""
    return code_digest((evaluation.summarise,), {})


def read_metrics(folder: Path) -> dict:
    """metrics.json of a finished evaluation, made again from its rows if what summarises them is
    no longer what it was. UserError where a file was changed by other hands."""
    if read_stage(folder).get("derived", {}).get(METRICS) != summary_code():
        with turn(folder):  # another process may be at it
            if read_stage(folder).get("derived", {}).get(METRICS) != summary_code():
                metrics = evaluation.summarise(read_rows(folder))
                rewrite_derived(folder, METRICS, metrics, summary_code())
                print(f"[{folder.parent.name}/{folder.name}] {METRICS} made again from {ROWS}: "
                      "the code that summarises changed", flush=True)
    return read_json(folder / METRICS)


def read_rows(folder: Path) -> list[dict]:
    """The rows of an evaluation folder's generations.jsonl."""
    path = folder / ROWS
    try:
        rows = [json.loads(x) for x in path.read_text(encoding="utf-8").split("\n") if x]
        if rows[0]["split"] == "about":
            return rows
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run `python -m pipeline evaluate` on that "
                        "stage") from None
    except (ValueError, LookupError, TypeError):
        pass
    raise UserError(f"{path} is not what an evaluation writes; delete {folder} and evaluate again")


def newest_evaluation(s: Settings, name: str) -> Stage | None:
    """The whole evaluation of a stage, else the one of most rows; None if there is none."""
    folder = evaluations_of(s, name)
    limits = [p.name.rpartition("-")[2] for p in folder.glob("eval-limit-*")
              if (p / "stage.json").is_file()]
    if (folder / "eval" / "stage.json").is_file():
        return evaluation_job(s, name)
    limits = sorted(int(x) for x in limits if x.isdecimal())
    return evaluation_job(s, name, limits[-1]) if limits else None


def stale_because(s: Settings, name: str, job: Stage) -> list[str]:
    """Why an evaluation's numbers are not of what the run now holds; empty if they are. Where they
    were computed does not matter: a report may be written on another machine."""
    read_stage(job.folder)
    changed = [x for x in job.changed() if x not in ("--device", "--dtype")]
    why = [f"it was evaluated with other {' and '.join(changed)}"] if changed else []
    return why + [f"of its model, {x}" for x in differences(s.run / name, s, data_inputs(s))]
