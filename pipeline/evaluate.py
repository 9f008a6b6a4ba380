"""The evaluate stage: a saved model's metrics.json and generations.jsonl, and whether they hold.

What is measured, and how, is eval.py's.
"""

import dataclasses
import json
from pathlib import Path

import data
import eval as evaluation
from model import Transformer, UserError, write_json, write_text
from pipeline.resume import RESUME
from pipeline.settings import (Aside, Judging, Placement, Settings, Source, load_benchmark,
                               placement, read_settings)
from pipeline.stage import Stage, content, data_inputs, differences, read_stage


def evaluation_job(s: Settings, name: str, limit: int = 0) -> Stage:
    """The evaluation of a run's stage (eval-limit-N: a quick look)."""
    folder = s.run / name
    inputs = dict(model=content(folder)) | data_inputs(s) | folder_inputs("mmlu", s.mmlu)
    if s.closeness == "encoder":
        inputs |= folder_inputs("encoder", s.encoder)
    kind = f"eval-limit-{limit}" if limit else "eval"
    return Stage(evaluations_of(s, name) / kind, settings=s, inputs=inputs,
                 code=(make_evaluation,),
                 takes=(data.Slice, Source, Placement, Aside, Judging, evaluation.Limits),
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
    return {f"{name}/{p.relative_to(folder)}": data.sha256(p) for p in files}


def make_evaluation(s: Settings, model_folder: Path, folder: Path, limit: int):
    """metrics.json and generations.jsonl of a model."""
    tokenizer = data.load_tokenizer(model_folder)
    model = Transformer.from_pretrained(model_folder, **placement(s))
    metrics, rows = evaluation.evaluate_model(
        model, tokenizer, load_benchmark(s), template=s.template, limits=s, limit=limit,
        resume=folder / RESUME / "generations.jsonl")
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(folder / "generations.jsonl", "\n".join(lines) + "\n")
    write_json(folder / "metrics.json", metrics)


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
    if not job.is_made():
        with job as folder:
            make_evaluation(s, s.run / name, folder, limit)


def read_rows(folder: Path) -> list[dict]:
    """The rows of an evaluation folder's generations.jsonl."""
    path = folder / "generations.jsonl"
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
