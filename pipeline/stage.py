"""Run folders: stages are complete or absent, skipped if nothing changed, resumed if killed.

A *stage* (original, attribution, mask, an unlearned model, an evaluation) is one folder. It is made
under a temporary name and renamed when it is complete. Its stage.json says `why` it is what it is
(the settings that it takes, digests of its inputs and of its code) and names its files. A stage
that would be made of the same again is skipped, any other is made again. One made of something that
the run no longer holds is *stale*, and no report shows it.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import simu
from model import UserError, read_json, save_tensors, write_json
from pipeline import objectives, slices
from pipeline.code import code_digest
from pipeline.rows import NO_TEXT
from pipeline.settings import TINY_MODELS, Making, Settings, Source, flag, taken

LOCK = ".simu-lock"  # also says that a folder is a run of ours
OLD, PARTIAL = ".simu-old-", ".simu-partial-"  # begin the temporary names of a stage's folder
SMALL = 1 << 25  # bytes: what is larger is not read again to see whether it was altered
CARD = "README.md"  # of an unlearned model; every report writes it again
# What torch says, and a pool of processes one of which the system has ended.
NO_MEMORY = "DefaultCPUAllocator|Cannot allocate memory|_ALLOC_FAILED|terminated abruptly"
PLAIN = ("", "output", "dual", "moving")  # what the names of stages leave out


def digest(value) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path) -> str:
    """sha256 of a file, which the hub's cache names a large file by. UserError if a user's file is
    not where it was."""
    path = Path(path).resolve()
    if not path.exists():
        raise UserError(f"{path}, which the run is made of, is gone; put it back, or name its new "
                        "place in the command that made the run")
    if path.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", path.name):
        return path.name
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def data_inputs(s: Settings) -> dict[str, str]:
    """The files that a run's rows come from, as a stage's inputs."""
    return {f"data/{name}": sha256(file) for name, file in slices.data_files(s).items()}


def read_stage(folder: Path) -> dict:
    """stage.json of a finished stage. UserError if it was never finished, or if a file of it is not
    what it wrote: of another size, or, if it is not large, of other bytes."""
    path, again = Path(folder) / "stage.json", f"delete {folder} and run its stage again"
    if not path.is_file():
        raise UserError(f"{folder} is not a finished stage; run the stage that makes it first")
    info = read_json(path)
    if not isinstance(info, dict) or not {"why", "files", "notes"} <= set(info):
        raise UserError(f"{path} is damaged, or of another version; {again}")
    for name, (size, sha) in info["files"].items():
        file = path.parent / name
        if file.is_symlink() and not file.exists():
            sha256(file)  # which says what is gone
        if not file.is_file() or file.stat().st_size != size or (
                size <= SMALL and sha256(file) != sha):
            raise UserError(f"{file} is not what its stage wrote; {again}")
    return info


def content(folder: Path) -> str:
    """Digest of what a finished stage holds: made again with the same bytes, it is the same."""
    return digest({name: sha for name, (_, sha) in read_stage(folder)["files"].items()})


def refuse_strangers(folder: Path):
    """UserError if a finished stage, or one inside it, holds a file that no stage wrote."""
    info = read_stage(folder)
    ours = [*info["files"], "stage.json", *([CARD] if "method" in info["why"]["settings"] else [])]
    for path in sorted(Path(folder).iterdir()):
        if (path / "stage.json").is_file():
            refuse_strangers(path)
        elif path.name not in ours and not path.name.startswith((OLD, PARTIAL)):
            raise UserError(f"{path} is no file of the stage in {folder}, which is to be made "
                            "again and would take it along; move it elsewhere")


def stale(folder: Path, s: Settings, inputs: dict | None = None) -> list[str]:
    """What a finished stage, and those below it, was made of and the run no longer holds: its
    slice, template and seed; its data; other stages. inputs: data_inputs(s), if read before."""
    inputs = data_inputs(s) if inputs is None else inputs
    why, reasons = read_stage(folder)["why"], []
    for name, value in bare_names(taken(s, (slices.Slice, Source))).items():
        before = why["settings"].get(name, value)
        reasons += [f"{flag(name)} was {before!r}"] if before != value else []
    for name, sha in why["inputs"].items():
        below = s.run / name
        is_stage = (below / "stage.json").is_file()
        if name.startswith("weights/"):  # of a base or a linked folder: the stage names its files
            continue
        if (content(below) if is_stage else inputs.get(name)) != sha:
            reasons.append(f"{name} was another")
        elif is_stage:
            reasons += [f"{name}'s {x}" for x in stale(below, s, inputs)]
    return list(dict.fromkeys(reasons))


def finished_models(run: Path) -> list[str]:
    """Names of the stage folders of a run that hold a model."""
    return sorted(p.parent.name for p in run.glob("*/config.json")
                  if (p.parent / "stage.json").is_file() and not p.parent.name.startswith("."))


def bare_names(values: dict) -> dict:
    """Settings with the names of files and folders alone: stage.json goes where a model goes, and
    what decides whether a file is the same is its digest."""
    return {k: Path(v).name if isinstance(v, str) and os.path.isabs(v) else v
            for k, v in values.items()}


def table_rows(s: Settings, takes: tuple) -> dict[str, str | None]:
    """Of each table that a fork edits, the row that a stage's settings name; None where that is not
    known, as while an original is taught (see code.py)."""
    config, architecture = s.run / "original" / "config.json", None
    if s.tiny and not s.weights:
        architecture = TINY_MODELS[s.model]
    elif Making not in takes and config.is_file():
        architecture = read_json(config).get("model_type")
    rows = dict(ARCHITECTURES=architecture, NEURONS=s.neurons)
    if slices.Slice in takes:
        rows |= dict(TEMPLATES=s.template, LAYOUTS=s.layout)
    if simu.Masking in takes:
        rows["MASKS"] = s.mask
    if objectives.Unlearning in takes:
        rows |= dict(OBJECTIVES=s.objective, METHODS=s.method, MOVES=simu.moves_of(s),
                     OPTIMISERS=simu.METHODS[s.method].optimiser)
    return rows


def joined(*parts: str) -> str:
    return "-".join(x for x in parts if x not in PLAIN)


def attribution_name(s: Settings) -> str:
    """Folder of the scores: of the paper's neurons, or beside it of others."""
    return joined("attribution", s.neurons)


def mask_name(s: Settings) -> str:
    """Folder of the mask: mask for the paper's dual, mask-<kind> for the others beside it."""
    return joined("mask", s.neurons, s.mask)


def unlearned_name(s: Settings) -> str:
    """Folder of an unlearned model: so-graddiff, simu-random-npo, or --name."""
    masking = (s.neurons, s.mask, s.attention) if simu.METHODS[s.method].masked else ()
    return s.name or joined(s.method, *masking, s.objective)


# ---------------------------------------------------------------------------------------- a stage


class Stage:
    """One stage folder. `ensure` makes it unless it is made of the same already.

    inputs: name -> digest of what is read. code: the function that makes it, and others that it
    calls. takes: dataclasses of settings that the result depends on; also: other values that it
    depends on."""

    def __init__(self, folder: Path, s: Settings, *, inputs: dict[str, str], code: tuple,
                 takes: tuple = (), also: dict | None = None):
        for name in inputs:
            if NO_TEXT.search(name):
                raise UserError(f"the name of the file {name!r} is not UTF-8 text; rename it")
        self.folder, self.s, self.code = Path(folder), s, code
        self.partial = self.folder.with_name(PARTIAL + self.folder.name)
        self.name = str(self.folder.relative_to(s.run))
        self.why = dict(settings=bare_names(taken(s, takes)) | (also or {}), inputs=inputs,
                        code=code_digest(code, table_rows(s, takes)))
        self.notes = {}  # anything else that is to stand in stage.json

    def ensure(self, *args):
        """Make the folder, unless that is done, by the first function of `code`."""
        if not self.is_made():
            with self.making() as folder:
                self.code[0](self.s, self, folder, *args)

    def is_made(self) -> bool:
        """Does the folder exist, made of what we would make it of? Prints which, and why not.
        UserError if it is to be made again and holds a file that no stage wrote."""
        self.settle()
        if not (self.folder / "stage.json").is_file():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"{self.folder} is in the way: it is no finished stage; move or "
                                "delete it, or choose another --out")
            return False
        reasons = ["--force"] if self.s.force else [f"{x} changed" for x in self.changed()]
        if reasons:
            refuse_strangers(self.folder)
        print(f"[{self.name}] " + (f"made again: {' and '.join(reasons)}" if reasons else
                                   "already made; skipped"), flush=True)
        return not reasons

    def changed(self) -> list[str]:
        """Which settings, inputs and code differ from what made the folder."""
        old, new = read_stage(self.folder)["why"], self.why
        before, now = old["inputs"], new["inputs"]
        changed = [flag(k) for k, v in new["settings"].items() if old["settings"].get(k) != v]
        changed += [k for k in before | now if before.get(k) != now.get(k)]
        return changed + (["code"] if old["code"] != new["code"] else [])

    def require(self):
        """UserError unless the folder exists and is made of what we would make it of."""
        if changed := self.changed():
            raise UserError(f"{self.folder} was made with other {' and '.join(changed)} than this "
                            "run now has; run its stage again, with the same options")

    @contextlib.contextmanager
    def making(self):
        """The folder to write into, which becomes final when the block ends well. What a killed
        process left in it stays if it was made of the same."""
        mark = self.partial / ".why.json"
        if not mark.is_file() or read_json(mark) != self.why:
            shutil.rmtree(self.partial, ignore_errors=True)
            write_json(mark, self.why)
        if self.s.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by the first matmul
            torch.use_deterministic_algorithms(True)
        if self.s.tiny and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # no slower on matrices so small; same bytes anywhere
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        yield self.partial
        seconds = round(time.monotonic() - start, 3)
        files = {}
        for p in sorted(self.partial.glob("[!.]*")):
            linked = self.why["inputs"].get(f"weights/{p.name}") if p.is_symlink() else None
            if p.name != CARD:
                files[p.name] = [p.stat().st_size, linked or sha256(p)]
        write_json(self.partial / "stage.json", dict(
            why=self.why, settings=bare_names(asdict(self.s)), seconds=seconds, **peak_memory(),
            torch=torch.__version__, files=files, notes=self.notes))
        self.settle()
        print(f"[{self.name}] {seconds:.1f} s", flush=True)

    def settle(self):
        """Put a complete folder in its place. A kill may come after any line of this; the next call
        then does the rest."""
        old = self.folder.with_name(OLD + self.folder.name)
        if (self.partial / "stage.json").is_file():
            for file in self.partial.glob(".*"):  # checkpoints, and what a killed process began
                file.unlink()
            if (self.folder / "stage.json").is_file():
                refuse_strangers(self.folder)
                os.replace(self.folder, old)
            os.replace(self.partial, self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def record(self, name: str):
        """A function that appends a row to the stage's log `name` (*.jsonl)."""
        def write(row: dict):
            with open(self.partial / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return write

    def loop(self, title: str, steps: int, tensors: dict):
        """simu.train's loop, going on where a killed stage was. A checkpoint holds what the loop
        changes in place and the lengths of the logs, and is written so seldom that it costs a set
        share of the time. Whatever else decides a step, such as its rows and its random bits, has
        to be a function of the step alone: then the bytes are those of an undisturbed run."""
        path = self.partial / f".{title.replace(' ', '-')}.safetensors"
        share = self.s.resume_cost
        pause = 1 / share - 1 if share else math.inf  # seconds, for each that a checkpoint takes
        due = time.monotonic() + pause  # the first is taken to need one
        for step in range(self.restore(path, title, tensors) + 1, steps + 1):
            yield step
            start = time.monotonic()
            if start < due or step == steps:
                continue
            logs = {log.name: log.stat().st_size for log in self.partial.glob("*.jsonl")}
            save_tensors(path, tensors, dict(about=json.dumps([step, logs])))
            due = time.monotonic() + pause * (time.monotonic() - start)

    def restore(self, path: Path, title: str, tensors: dict) -> int:
        """How many steps a checkpoint holds, 0 without one; tensors and logs are then as they were
        after these. Of a stage's loops at most one writes logs."""
        step, logs = 0, {}
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            step, logs = json.loads(file.metadata()["about"])
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
            print(f"{title} goes on after step {step}", flush=True)
        for log in self.partial.glob("*.jsonl"):
            os.truncate(log, logs.get(log.name, 0))
        return step


def peak_memory() -> dict[str, int]:
    """Bytes at the highest point: of this process so far, and of the GPU by this stage."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes, or KiB
    peaks = dict(peak_host=unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    if torch.cuda.is_available():
        peaks["peak_gpu"] = torch.cuda.max_memory_allocated()
    return peaks


# ------------------------------------------------------------------------- run folders, the command


@contextlib.contextmanager
def lock(run: Path, *, new: bool = False):
    """Hold a run folder against other processes; the system lets go of it even if this one is
    killed. new: make it if it does not exist; UserError if its files are somebody's."""
    run, path = Path(run), Path(run) / LOCK
    if new:
        if run.is_dir() and any(run.iterdir()) and not path.is_file():
            raise UserError(f"{run} is not empty and no run folder; choose another --out")
        run.mkdir(parents=True, exist_ok=True)
        path.touch()
    if not path.is_file():
        yield
        return
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run} is in use by another process; wait, or use --out") from None
        except OSError:  # a disk that cannot lock; the user lets one process at a time use it
            pass
        yield


def run_cli(main):
    """Run a command line: what the user can put right ends in one line and exit status 2."""
    for name in (signal.SIGINT, signal.SIGTERM):  # clusters send SIGTERM: as Ctrl-C
        signal.signal(name, signal.default_int_handler)
    status = 2
    try:
        return main()
    except UserError as e:
        message, status = str(e), getattr(e, "status", 2)
    except KeyboardInterrupt:
        message, status = "stopped; the same command goes on from where it stopped", 130
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is a RuntimeError
        no_memory = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not no_memory and not re.search(NO_MEMORY, str(e)):
            raise
        message = ("out of memory; `python -m pipeline plan` says what each stage needs; lower "
                   "--micro-tokens, --attribution-tokens, --eval-tokens or --jobs, or add "
                   "--checkpointing")
    except OSError as e:  # disk full, no permission, read-only
        message = (f"{e.filename or ''}: {e.strerror or e}; free space there, see to its "
                   "permissions, or choose another --out")
    print("error: " + " ".join(message.split())[:1000], file=sys.stderr)
    sys.exit(status)
