"""A deletion request against a model of one's own: what `run.sh unlearn` adds to the stages.

request.json is its audit trail: digests of the forget file, the original and the result, settings
and time, and no text of any row. `python -m pipeline verify RUN` checks all of it again.
"""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import data
from model import UserError, read_json, write_json
from pipeline import verdict
from pipeline.settings import PLACES, Settings, read_settings
from pipeline.stage import content, data_inputs, digest, stale, unlearned_name


def write_request(run: Path):
    """RUN/request.json, once the rows are forgotten; else exit status 3, and what to change."""
    s = read_settings(run)
    if s.layout != "rows":
        raise UserError(f"{run} is of the benchmark {s.benchmark}; a request is of rows of your "
                        "own: bash run.sh unlearn MODEL FORGET")
    name = unlearned_name(s)
    found = stale(s.run / name, s)
    if found:
        raise UserError(f"{s.run / name} is not of this request: {found[0]}; run it again")
    judged = verdict.verdict(run)
    if not judged["forgotten"]:
        (s.run / "request.json").unlink(missing_ok=True)  # of an earlier result
        raise verdict.NotForgotten(f"not forgotten: {'; '.join(judged['reasons'])}; "
                                   f"{judged['change']}; no request.json is written")
    write_json(s.run / "request.json", sealed(dict(
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), files=data_inputs(s),
        forget_rows=len(data.load_rows(s.forget)), original=content(s.run / "original"),
        result=content(s.run / name), folder=name, verdict=judged,
        settings=without_places(asdict(s)))))
    print(f"request: {s.run / 'request.json'}; the model: {s.run / name}")


def without_places(settings: dict) -> dict:
    """Settings without the folders of this machine: the names of files and folders alone."""
    return {k: Path(v).name if k in (*PLACES, "model", "encoder") and isinstance(v, str)
            and os.path.isabs(v) else v for k, v in settings.items()}


def sealed(request: dict) -> dict:
    return request | {"sha256": digest(request)}


def verify(run: Path):
    """Check a request again: its own record, the rows' files, the original and the result."""
    path = Path(run) / "request.json"
    request = read_json(path)
    if sealed({k: v for k, v in request.items() if k != "sha256"}) != request:
        raise UserError(f"{path} was changed since it was written, or is no request; what it says "
                        "cannot be trusted")
    s = read_settings(run)
    now = dict(files=data_inputs(s), original=content(s.run / "original"),
               result=content(s.run / str(request["folder"])))
    for name, value in now.items():
        if request.get(name) != value:
            raise UserError(f"{path}: {name} is not what it was when the request was served; the "
                            "record does not hold for what is here now")
    found = stale(s.run / request["folder"], s)
    if found:
        raise UserError(f"{path}: of the result, {found[0]}; the record does not hold")
    if verdict.derived_again(s) != request.get("verdict") or not request["verdict"]["forgotten"]:
        raise UserError(f"{path}: the verdict does not follow from what the model said, in "
                        f"{s.run / 'verdict'}; run the request again")
    print(f"verified: {request['forget_rows']} rows, served {request['when']}; their file, the "
          "original and the result are those of the record, and the verdict follows again from "
          f"what the result said then (sealed in {s.run / 'verdict'})")
