"""Run folders: stages are complete or absent, skipped if nothing changed, resumed if killed.

A *stage* (original, attribution, mask, an unlearned model, an evaluation) is one folder. It is made
under a temporary name and renamed when it is complete. Its stage.json says `why` it is what it is
(the settings that it takes, digests of its inputs and of its code) and names its files. A stage
that would be made of the same again is skipped, any other is made again. One made of something that
the run no longer holds is *stale*, and no report shows it.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import simu
from model import UserError, read_json, save_tensors, write_json, write_text
from pipeline import objectives, slices
from pipeline.code import code_digest
from pipeline.rows import NO_TEXT
from pipeline.settings import TINY_MODELS, Making, Settings, Source, flag, taken

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

OLDEST_TORCH = (2, 5)  # the first with enable_gqa; run.sh asks for it too
LOCK = ".simu-lock"  # also says that a folder is a run of ours
OLD, PARTIAL = ".simu-old-", ".simu-partial-"  # begin the temporary names of a stage's folder
SMALL = 1 << 25  # bytes: what is larger is not hashed again to see whether it was altered
LATER = ("README.md", "stage.json")  # written after all else of a stage
DISK_RATE = 5e8  # bytes digested and written in a second, until the first checkpoint is timed


# ---------------------------------------------------------------------------------------- digests


def digest(value) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path) -> str:
    """sha256 of a file. A large one that stays as it is, is read once, whatever links to it."""
    info = os.stat(path)
    if name := hub_digest(Path(path)):
        return name
    read = read_sha256 if info.st_size > SMALL else read_sha256.__wrapped__
    return read(os.path.realpath(path), info.st_size, info.st_mtime_ns)


def hub_digest(file: Path) -> str:
    """The sha256 by which the hub's cache names a large file that a link leads to; "" for others.
    It follows one link at a time: the last may lead to a store that names files otherwise."""
    while file.is_symlink():
        file = file.parent / os.readlink(file)
        if file.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", file.name):
            return file.name
    return ""


@functools.cache
def read_sha256(path: str, size: int, date: int) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def data_inputs(s: Settings) -> dict[str, str]:
    """The files that a run's rows come from, as a stage's inputs."""
    return {f"data/{name}": sha256(file) for name, file in slices.data_files(s).items()}


# ------------------------------------------------------------------------------- finished stages


def read_stage(folder: Path) -> dict:
    """stage.json of a finished stage. UserError if it was never finished, or if a file of it is not
    what it wrote: of another size, or, if it is not large, of other bytes."""
    path, again = Path(folder) / "stage.json", f"delete {folder} and run its stage again"
    if not path.is_file():
        raise UserError(f"{folder} is not a finished stage; run the stage that makes it first")
    info = read_json(path)
    try:
        files = [(path.parent / name, size, sha) for name, (size, sha) in info["files"].items()]
        info["why"]["settings"], info["why"]["inputs"], info["why"]["code"], info["notes"]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged, or of another version; {again}") from None
    for file, size, sha in files:
        if not file.is_file() or file.stat().st_size != size or (
                size <= SMALL and sha256(file) != sha):
            raise UserError(f"{file} is not what its stage wrote; {again}")
    return info


def seal(folder: Path) -> dict[str, list]:
    """File name -> [bytes, sha256] of what a stage wrote. Its model card is no part of that: every
    report writes it again."""
    return {p.name: [p.stat().st_size, sha256(p)] for p in sorted(folder.iterdir())
            if p.is_file() and not p.name.startswith(".") and p.name not in LATER}


def content(folder: Path) -> str:
    """Digest of what a finished stage holds: made again with the same bytes, it is the same."""
    return digest({name: sha for name, (_, sha) in read_stage(folder)["files"].items()})


def refuse_strangers(folder: Path):
    """UserError if a finished stage, or one inside it, holds a file that no stage wrote."""
    info = read_stage(folder)
    ours = {*info["files"], "stage.json"}
    ours |= {"README.md"} if "method" in info["why"]["settings"] else set()  # the model card
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
        if name.startswith("weights/"):  # of a base or a linked folder: the stage names its files
            continue
        if name.startswith("data/"):
            reasons += [f"{name} was another"] if inputs.get(name) != sha else []
        elif not (s.run / name / "stage.json").is_file():
            reasons.append(f"{name} is gone")
        elif content(s.run / name) != sha:
            reasons.append(f"{name} was another")
        else:
            reasons += [f"{name}'s {x}" for x in stale(s.run / name, s, inputs)]
    return list(dict.fromkeys(reasons))


def finished_models(run: Path) -> list[str]:
    """Names of the stage folders of a run that hold a model."""
    return sorted(p.parent.name for p in run.glob("*/config.json")
                  if (p.parent / "stage.json").is_file() and not p.parent.name.startswith("."))


# --------------------------------------------------------------------------------- their settings


def bare_names(values: dict) -> dict:
    """Settings with the names of files and folders alone: stage.json goes where a model goes, and
    what decides whether a file is the same is its digest."""
    return {k: Path(v).name if isinstance(v, str) and os.path.isabs(v) else v
            for k, v in values.items()}


def table_rows(s: Settings, takes: tuple) -> dict[str, str | None]:
    """Of each table that a fork edits, the row that a stage's settings name (see code.py)."""
    # A stage that makes an original cannot ask it which architecture it is.
    unknown = Making in takes and not s.tiny
    rows = dict(ARCHITECTURES=None if unknown else architecture(s), NEURONS=s.neurons)
    if slices.Slice in takes:
        rows |= dict(TEMPLATES=s.template, LAYOUTS=s.layout)
    if simu.Masking in takes:
        rows["MASKS"] = s.mask
    if objectives.Unlearning in takes:
        method = simu.METHODS[s.method]
        rows |= dict(OBJECTIVES=s.objective, METHODS=s.method, OPTIMISERS=method.optimiser,
                     MOVES=simu.moves_of(s))
    return rows


def architecture(s: Settings) -> str | None:
    """The run's model_type, where it is known already."""
    if s.tiny and not s.weights:
        return TINY_MODELS[s.model]
    config = s.run / "original" / "config.json"
    return read_json(config).get("model_type") if config.is_file() else None


def attribution_name(s: Settings) -> str:
    """Folder of the scores: of the paper's neurons, or beside it of others."""
    return "attribution" if s.neurons == "output" else f"attribution-{s.neurons}"


def mask_name(s: Settings) -> str:
    """Folder of the mask: mask for the paper's dual, mask-<kind> for the others beside it."""
    kinds = [s.neurons if s.neurons != "output" else "", s.mask if s.mask != "dual" else ""]
    return "-".join(filter(None, ["mask", *kinds]))


def unlearned_name(s: Settings) -> str:
    """Folder of an unlearned model: so-graddiff, simu-random-npo, or --name."""
    masked = simu.METHODS[s.method].masked
    parts = [s.method, s.neurons if masked and s.neurons != "output" else "",
             s.mask if masked and s.mask != "dual" else "",
             "frozen" if masked and s.attention == "frozen" else "", s.objective]
    return s.name or "-".join(filter(None, parts))


# ---------------------------------------------------------------------------------------- a stage


class Stage:
    """One stage folder. `is_made` says whether it exists already; `making` gives the folder to
    write into, and makes it final when its block ends well.

    inputs: name -> digest of what is read. code: the functions that make it. takes: dataclasses of
    settings that the result depends on; also: other values that it depends on."""

    def __init__(self, folder: Path, s: Settings, *, inputs: dict[str, str], code: tuple,
                 takes: tuple = (), also: dict | None = None):
        for name in inputs:  # refused before the work, not when stage.json is written
            if NO_TEXT.search(name):
                raise UserError(f"the name of the file {name!r} is not UTF-8 text; rename it")
        self.folder, self.s, self.takes = Path(folder), s, takes
        self.partial, self.old = (self.folder.with_name(x + self.folder.name)
                                  for x in (PARTIAL, OLD))
        self.name = str(self.folder.relative_to(s.run))
        self.why = dict(settings=bare_names(taken(s, takes)) | (also or {}), inputs=inputs,
                        code=code_digest(code, table_rows(s, takes)))
        self.notes = {}  # anything else that is to stand in stage.json
        self.logs = []  # names of the logs that `record` began

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
        """Which settings, inputs and code differ from what made the folder. A setting that it does
        not name, because it is newer, had its default."""
        old, new = read_stage(self.folder)["why"], self.why
        defaults = {f.name: f.default for part in self.takes for f in fields(part)}
        settings, inputs = defaults | old["settings"], old["inputs"]
        changed = [flag(k) for k, v in new["settings"].items() if settings.get(k) != v]
        changed += [k for k in inputs | new["inputs"] if inputs.get(k) != new["inputs"].get(k)]
        return changed + (["code"] if old["code"] != new["code"] else [])

    def require(self):
        """UserError unless the folder exists and is made of what we would make it of."""
        if changed := self.changed():
            raise UserError(f"{self.folder} was made with other {' and '.join(changed)} than this "
                            "run now has; run its stage again, with the same options")

    @contextlib.contextmanager
    def making(self):
        """The folder to write into. What a killed process left there stays if it was made of the
        same."""
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
        seconds, peaks = round(time.monotonic() - start, 3), peak_memory()
        write_json(self.partial / "stage.json", dict(
            why=self.why, settings=bare_names(asdict(self.s)), seconds=seconds, **peaks,
            torch=torch.__version__, files=seal(self.partial), notes=self.notes))
        self.settle()
        print(f"[{self.name}] {seconds:.1f} s, " + ", ".join(
            f"{name.replace('_', ' ')} {x / 2**30:.2f} GiB" for name, x in peaks.items()),
            flush=True)

    def settle(self):
        """Put a complete folder in its place. A kill may come after any line of this; the next call
        then does the rest."""
        if (self.partial / "stage.json").is_file():
            for file in self.partial.glob(".*"):  # checkpoints, and what a killed process began
                file.unlink()
            if (self.folder / "stage.json").is_file():
                refuse_strangers(self.folder)
                shutil.rmtree(self.old, ignore_errors=True)
                os.replace(self.folder, self.old)
            os.replace(self.partial, self.folder)
        if self.folder.exists():
            shutil.rmtree(self.old, ignore_errors=True)

    def record(self, name: str):
        """A function that appends a row to the stage's log `name` (*.jsonl), which begins empty."""
        write_text(self.partial / name, "")
        self.logs.append(name)

        def write(row: dict):
            with open(self.partial / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return write

    def loop(self, title: str, steps: int, tensors: dict):
        """simu.train's loop, going on where a killed stage was. A checkpoint holds what the loop
        changes in place and the stage's logs, and is written so seldom that it costs a set share of
        the time. Whatever else decides a step, such as its rows and its random bits, has
        to be a function of the step alone: then the bytes are those of an undisturbed run."""
        path = self.partial / f".{title.replace(' ', '-')}.safetensors"
        share, last = self.s.resume_cost, time.monotonic()
        cost = sum(t.nbytes for t in tensors.values()) / DISK_RATE  # seconds for one
        for step in range(self.restore(path, title, tensors) + 1, steps + 1):
            yield step
            start = time.monotonic()
            if not share or (start - last) * share < cost * (1 - share):
                continue
            logs = {name: (self.partial / name).read_text("utf-8") for name in self.logs}
            try:
                save_tensors(path, tensors, dict(about=json.dumps([step, logs])))
            except OSError as e:  # the stage itself may need no more room, so it goes on
                share = 0
                print(f"no more checkpoints: {path}: {e.strerror}", flush=True)
            last = time.monotonic()
            cost = last - start

    def restore(self, path: Path, title: str, tensors: dict) -> int:
        """How many steps a checkpoint holds, 0 without one; tensors and logs are then as they were
        after these."""
        try:
            with safe_open(path, "pt") as file:
                step, logs = json.loads(file.metadata()["about"])
                stored = {name: file.get_tensor(name) for name in tensors}  # mapped, not read
        except (OSError, SafetensorError):
            return 0
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])
        for name, text in logs.items():
            write_text(self.partial / name, text)
        print(f"{title} goes on after step {step}", flush=True)
        return step


def peak_memory() -> dict[str, int]:
    """Bytes at the highest point: of this process so far (on Linux), and of the GPU if one was used
    by this stage."""
    peaks = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        peaks["peak_host"] = 1024 * int(next(x for x in lines if x.startswith("VmHWM:")).split()[1])
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        peaks["peak_gpu"] = torch.cuda.max_memory_allocated()
    return peaks


def stored_dtype(folder: Path) -> torch.dtype:
    """What the weights of a folder are stored in."""
    file = sorted(Path(folder).glob("*.safetensors"))[0]
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(next(iter(tensors.keys()))).dtype


# ------------------------------------------------------------------------- run folders, the command


def claim(run: Path):
    """Make a run folder. UserError if it exists and is not ours: its files are somebody's."""
    run = Path(run)
    if run.is_dir() and any(run.iterdir()) and not (run / LOCK).is_file():
        raise UserError(f"{run} is not empty and no run folder; choose another --out")
    run.mkdir(parents=True, exist_ok=True)
    (run / LOCK).touch()


@contextlib.contextmanager
def lock(run: Path, *, new: bool = False):
    """Hold a run folder against other processes; the system lets go of it even if this one is
    killed. new: make it if it does not exist."""
    if new:
        claim(run)
    path = Path(run) / LOCK
    with open(path) if fcntl and path.is_file() else contextlib.nullcontext() as file:
        try:
            if file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run} is in use by another process; wait for it, or use --out"
                            ) from None
        except OSError as e:
            print(f"warning: {run} cannot be locked ({e.strerror}); let one process at a time "
                  "use it", flush=True)
        yield


# What torch says where memory runs out and it raises no OutOfMemoryError.
NO_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory", "_ALLOC_FAILED",
             "Storage size calculation overflowed")


def run_cli(main):
    """Run a command line: what the user can put right ends in one line and exit status 2."""
    for name in (signal.SIGINT, signal.SIGTERM):  # clusters send SIGTERM: as Ctrl-C
        signal.signal(name, signal.default_int_handler)
    try:
        if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
            raise UserError(f"torch {torch.__version__} is too old; install "
                            f"{'.'.join(map(str, OLDEST_TORCH))} or later")
        main()
    except UserError as e:
        stop(str(e), getattr(e, "status", 2))
    except KeyboardInterrupt:
        stop("stopped; the same command goes on from where it stopped", 130)
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is a RuntimeError
        if type(e) not in (MemoryError, torch.OutOfMemoryError) and not any(
                text in str(e) for text in NO_MEMORY):
            raise
        stop("out of memory; `python -m pipeline plan` says what each stage needs; lower "
             "--micro-tokens, --attribution-tokens or --eval-tokens, or add --checkpointing", 2)
    except OSError as e:  # disk full, no permission, read-only
        where = f"{e.filename}: " if e.filename else ""
        stop(f"{where}{e.strerror or e}; free space there, see to its permissions, or choose "
             "another --out", 2)


def stop(message: str, status: int):
    print("error: " + " ".join(message.split())[:1000], file=sys.stderr)
    sys.exit(status)
