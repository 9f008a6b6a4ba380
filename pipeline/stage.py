"""Stage folders: made whole or not at all, skipped, resumed, sealed, locked.

A *stage* (original, attribution, mask, an unlearned model, an evaluation) is one folder. It is made
under a temporary name and renamed when it is whole, beside a `stage.json` that says what made it:
settings, inputs by content, code, time, memory. A stage that would be made of the same again is
skipped; any other is made again. A killed stage leaves its unfinished folder and goes on from what
resume.py kept there.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, fields
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
from safetensors import safe_open

import simu
from model import NO_TEXT, UserError, read_json, write_json, write_text
from pipeline import checkpoint, objectives, slices
from pipeline.files import has_types, sha256
from pipeline.reach import code_digest
from pipeline.resume import RESUME, Checkpoints
from pipeline.settings import (TINY_MODELS, Making, Settings, Source, data_digests, settings_of,
                               taken)

OLDEST_TORCH = (2, 5)  # the first with enable_gqa; run.sh asks for it too
LONGEST_MESSAGE = 1000  # characters of an error message, which may quote a damaged file
REHASHED = 1 << 25  # bytes: a larger file is hashed again only where its date changed
LOCK = ".simu-lock"  # also says that a folder is a run of ours
OURS = "simu-"  # begins, after a dot, the name of every temporary of ours


# ------------------------------------------------------------------------------- files and digests


def digest(value) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flush(path: Path):
    """Have the disk hold a file's bytes."""
    if path.is_file() and not path.is_symlink():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def seal(folder: Path) -> dict[str, list]:
    """File name -> [bytes, sha256, time of change] of a stage's own files."""
    later = ("stage.json", "README.md")  # the model card is written again by every report
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name not in later]
    return seal_files(files)


def seal_files(files: list[Path]) -> dict[str, list]:
    digests = digests_of(files)
    return {p.name: [p.stat().st_size, digests[p.name], p.stat().st_mtime_ns] for p in files}


digests_here = {}  # of large files read by this process: (device, inode, size, date) -> sha256


def file_digest(file: Path) -> str:
    """sha256 of a file; a large one, wherever it is linked or moved to, is read once."""
    now = file.stat()
    if now.st_size <= REHASHED:
        return sha256(file)
    key = now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns
    if key not in digests_here:
        digests_here[key] = sha256(file)
    return digests_here[key]


def digests_of(files: list[Path]) -> dict[str, str]:
    """File name -> sha256 of a folder's files; shards are read side by side."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip((p.name for p in files), pool.map(file_digest, files)))


def changed_file(file: Path, size: int, sha: str, when: int) -> bool:
    """Does a file hold other bytes than its stage wrote?"""
    now = file.stat()
    if now.st_size != size:
        return True
    return (size <= REHASHED or now.st_mtime_ns != when) and file_digest(file) != sha


STAGE_JSON = dict(fingerprint=str, why=dict, settings=dict, seconds=float, files=dict)
WHY = dict(settings=dict, inputs=dict, code=str)
SETTINGS = dict(benchmark=str, model=str, method=str, objective=str)
NOTES = dict(source=dict, torch=str, threads=int, critical=int, total=int, critical_per_layer=list,
             peak_host_bytes=int, peak_gpu_bytes=int, derived=dict)  # where a stage has them


def is_stage(made) -> bool:
    """Does a JSON value have the shape of a stage.json?"""
    return (has_types(made, STAGE_JSON) and has_types(made["why"], WHY)
            and has_types(made["settings"], SETTINGS)
            and has_types(made, {k: t for k, t in NOTES.items() if k in made})
            and isinstance(made["why"]["settings"].get("method", ""), str)
            and all(isinstance(x, str) for x in made["why"]["inputs"].values())
            and all(isinstance(x, list) and [type(v) for v in x] == [int, str, int]
                    and Path(name).name == name for name, x in made["files"].items()))


def read_stage(folder: Path, *, files: bool = True) -> dict:
    """stage.json of a finished stage; UserError if it was never finished, or if it or one of its
    files was changed or removed since."""
    path, again = Path(folder) / "stage.json", f"delete {folder} and run its stage again"
    if not path.is_file():
        raise UserError(f"{folder} is not a finished stage; run the stage that makes it first")
    made = read_json(path)
    try:
        whole = isinstance(made, dict) and made.pop("sha256", "") == digest(made)
    except RecursionError:
        whole = False
    if not whole or not is_stage(made):
        raise UserError(f"{path} is damaged, edited or of another version; {again}")
    for name, sealed in made["files"].items() if files else ():
        file = path.with_name(name)
        if not file.is_file():
            raise UserError(f"{file} is gone; {again}")
        if changed_file(file, *sealed):
            raise UserError(f"{file} is not what its stage wrote; {again}")
    return made


def foreign(folder: Path) -> Path | None:
    """A file in a finished stage, or in those inside it, that no stage made."""
    made = read_stage(folder, files=False)
    own = {*made["files"], *made.get("derived", {}), "stage.json"}
    own |= {"README.md"} if "method" in made["why"]["settings"] else set()
    for p in sorted(folder.iterdir()):
        if p.name in own or p.name.startswith(f".{OURS}"):
            continue
        if (p / "stage.json").is_file():
            if found := foreign(p):
                return found
        elif not p.is_dir() or any(p.iterdir()):
            return p
    return None


def discard(path: Path):
    """Remove a temporary folder of ours; a link in its place is no folder of ours, and only that
    is removed."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def write_stage(folder: Path, made: dict):
    """stage.json, with a digest of itself: a finished stage is not edited."""
    write_json(Path(folder) / "stage.json", made | {"sha256": digest(made)})


def rewrite_derived(folder: Path, name: str, value, code: str):
    """Write a JSON file of a finished stage that follows from its other files again, by code of
    that digest. A kill at any line leaves a whole stage, in which the file counts as stale."""
    made = read_stage(folder)
    files, derived = made["files"], made.get("derived", {})
    others = {k: sealed for k, sealed in files.items() if k != name}
    write_stage(folder, made | dict(files=others, derived=derived | {name: ""}))
    write_json(folder / name, value)
    write_stage(folder, made | dict(files=files | seal_files([folder / name]),
                                    derived=derived | {name: code}))


def content(folder: Path) -> str:
    """Digest of what a finished stage holds: made again with the same bytes, it is the same."""
    return digest({name: sealed[1] for name, sealed in read_stage(folder)["files"].items()})


def data_inputs(s: Settings) -> dict[str, str]:
    """The benchmark's files as a stage's inputs."""
    return {f"data/{name}": sha for name, sha in data_digests(s).items()}


def differences(folder: Path, s: Settings, inputs: dict[str, str]) -> list[str]:
    """What of a finished stage, and of the stages below it, is not this run's: its slice, template
    and seed; its data; the stages it was made of. inputs: data_inputs(s)."""
    why, found = read_stage(folder)["why"], []
    for name, value in taken(s, (slices.Slice, Source)).items():
        if why["settings"].get(name, value) != value:
            found.append(f"--{name.replace('_', '-')} was {why['settings'][name]!r}")
    for name, sha in why["inputs"].items():
        if name.startswith("data/"):
            if inputs.get(name) != sha:
                found.append(f"{name} was another")
        elif name.startswith("weights/"):
            continue  # of a base or a linked folder: what the stage holds of it is sealed
        elif not (s.run / name / "stage.json").is_file():
            found.append(f"{name} is gone")
        elif content(s.run / name) != sha:
            found.append(f"{name} was another")
        else:
            found += [f"{name}'s {x}" for x in differences(s.run / name, s, inputs)]
    return list(dict.fromkeys(found))


def finished_models(run: Path) -> list[str]:
    """Names of the stage folders of a run that hold a model."""
    return sorted(p.parent.name for p in run.glob("*/config.json")
                  if (p.parent / "stage.json").is_file() and not p.parent.name.startswith("."))


# ------------------------------------------------------------------------------------------ stages


def table_rows(s: Settings, takes: tuple) -> dict[str, str | None]:
    """Of each table that a fork edits, the row that a stage's settings name (see reach.py)."""
    # A stage that makes an original cannot ask it which architecture it is.
    made = Making in takes and not s.tiny
    rows = dict(ARCHITECTURES=None if made else architecture(s))
    if slices.Slice in takes:
        rows["TEMPLATES"] = s.template
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
    given = [Path(x) for x in (s.weights, s.model) if Path(x).is_absolute()]
    for folder in (s.run / "original", *given):
        if (folder / "config.json").is_file():
            raw = read_json(folder / "config.json")
            kind = raw.get("model_type") if isinstance(raw, dict) else None
            return kind if isinstance(kind, str) else None
    return None


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


def stored_dtype(folder: Path) -> torch.dtype:
    """What the weights of a folder are stored in."""
    file = sorted(Path(folder).glob("*.safetensors"))[0]
    with safe_open(file, framework="pt") as tensors:
        name = next(iter(tensors.keys()))
        return tensors.get_tensor(name).dtype


class Stage:
    """One stage folder. `is_made` says whether it is already there; as a context manager it gives
    the folder to write into, and makes it final when the block ends well.

    takes: dataclasses of settings that the result depends on; also: other values it depends on.
    inputs: name -> content of what is read. code: the functions that make it. rows: over the table
    rows that `takes` name."""

    def __init__(self, folder: Path, *, settings: Settings, inputs: dict[str, str], code: tuple,
                 takes: tuple = (), also: dict | None = None, rows: dict | None = None):
        self.folder, self.settings = Path(folder), settings
        self.partial, self.old = (self.folder.with_name(f".{OURS}{kind}-{self.folder.name}")
                                  for kind in ("partial", "old"))
        self.name = str(self.folder.relative_to(settings.run))
        self.takes = takes
        for name in inputs:  # refused before the work, not when stage.json is written
            if NO_TEXT.search(name):
                raise UserError(f"the name of the file {name!r} is not UTF-8 text; rename it")
        self.why = dict(
            settings=taken(settings, takes) | (also or {}), inputs=inputs,
            code=code_digest(code, table_rows(settings, takes) | (rows or {})))
        self.fingerprint = digest(self.why)
        self.notes = {}  # anything else the stage wants to leave in stage.json
        self.checkpoints = None  # of the loop that runs now
        self.quiet = False  # say nothing where nobody asked for it again

    def is_made(self) -> bool:
        """Is the folder there, made of what we would make it of? Prints which, and why not."""
        self._recover()
        if not (self.folder / "stage.json").is_file():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"{self.folder} is in the way: it is no finished stage; move or "
                                "delete it, or choose another --out")
            return False
        changed = ["--force"] if self.settings.force else [f"{x} changed" for x in self.changed()]
        if changed and (path := foreign(self.folder)):
            raise UserError(f"{path} is not {self.name}'s own, which is to be made again "
                            f"({' and '.join(changed)}) and would take it along; move it elsewhere")
        if changed or not self.quiet:
            print(f"[{self.name}] " + (f"made again: {' and '.join(changed)}" if changed else
                                       "already made; skipped"), flush=True)
        return not changed

    def changed(self) -> list[str]:
        """Which of settings, inputs and code differ from what made the folder, and whether any of
        its files is gone. UserError if one was altered."""
        made = read_stage(self.folder, files=False)
        old, new = made["why"], self.why
        defaults = {f.name: f.default for t in self.takes for f in fields(t)
                    if f.default is not MISSING}
        then = defaults | old["settings"]
        changed = [f"--{k.replace('_', '-')}" for k, v in new["settings"].items()
                   if then.get(k) != v]
        names = [*new["inputs"], *(k for k in old["inputs"] if k not in new["inputs"])]
        changed += [k for k in names if old["inputs"].get(k) != new["inputs"].get(k)]
        changed += ["code"] if old["code"] != new["code"] else []
        changed += [name for name in made["files"] if not (self.folder / name).is_file()]
        if not changed:
            read_stage(self.folder)
        return changed

    def require(self):
        """UserError unless the folder is there and made of what we would make it of."""
        if changed := self.changed():
            raise UserError(f"{self.folder} was made with other {' and '.join(changed)} than this "
                            "run now has; run its stage again, with the same options")

    def __enter__(self) -> Path:
        self._held = contextlib.ExitStack()
        self._held.enter_context(lock(self.settings.run))
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        mark = self.partial / RESUME / "fingerprint"
        goes_on = mark.is_file() and mark.read_bytes() == self.fingerprint.encode()
        logs = (p.is_symlink() for p in self.partial.rglob("*.jsonl"))  # they are appended to
        if self.partial.is_symlink() or not goes_on or any(logs):
            discard(self.partial)
            mark.parent.mkdir(parents=True)
            write_text(mark, self.fingerprint)
        if self.settings.deterministic:
            be_deterministic()
        if self.settings.tiny and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # no slower on matrices so small; same bytes anywhere
        self._start = time.monotonic()
        checkpoint.SECONDS.clear()
        forget_peak_memory()
        return self.partial

    def __exit__(self, kind, error, trace):
        with self._held:
            if kind is not None:
                if isinstance(error, OSError) and not error.filename:  # a full disk names no file
                    error.filename = str(self.partial)
                if isinstance(error, UserError) and self.checkpoints and self.checkpoints.newest:
                    error.args = (f"{error}; {self.checkpoints.newest} is the last good "
                                  "checkpoint",)
                return
            self._seal()
            self._recover()

    def _seal(self):
        memory = peak_memory()
        with checkpoint.clocked("saving"):
            for path in list(self.partial.iterdir()):
                if path.name.startswith(".") and path.name.endswith("." + OURS + "partial"):
                    path.unlink()  # a killed process was writing it
                else:
                    flush(path)
            files = seal(self.partial)
        seconds, spent = time.monotonic() - self._start, checkpoint.SECONDS
        spent = dict(loading=spent["loading"], computing=seconds - sum(spent.values()),
                     saving=spent["saving"])
        write_stage(self.partial, dict(
            fingerprint=self.fingerprint, why=self.why, settings=asdict(self.settings),
            seconds=round(seconds, 3), spent={k: round(x, 3) for k, x in spent.items()},
            **memory, torch=torch.__version__, threads=torch.get_num_threads(), **self.notes,
            files=files))
        peak = ", ".join(f"peak {k.split('_')[1]} {v / 2**30:.2f} GiB" for k, v in memory.items())
        if "peak_gpu_bytes" in memory and "predicted_bytes" in self.notes:
            peak += f" (predicted {self.notes['predicted_bytes'] / 2**30:.2f})"
        parts = ", ".join(f"{kind} {x:.1f}" for kind, x in spent.items())
        print(f"[{self.name}] {seconds:.1f} s ({parts}), {peak}", flush=True)

    def _recover(self):
        """Put a whole unfinished folder in its place: at a stage's end, or where a kill came after
        its stage.json. A kill may come after any line here; the next call then does the rest."""
        whole = (self.partial / "stage.json").is_file() and not self.partial.is_symlink()
        if whole and read_stage(self.partial)["fingerprint"] == self.fingerprint:
            shutil.rmtree(self.partial / RESUME, ignore_errors=True)
            if self.folder.exists():
                discard(self.old)
                os.replace(self.folder, self.old)
            os.replace(self.partial, self.folder)
        if self.folder.exists():
            discard(self.old)

    def loop(self, title: str, steps: int, tensors: dict):
        """simu.plain_loop that goes on where a killed stage was, and keeps checkpoints."""
        self.checkpoints = Checkpoints(self.partial, title, tensors, self.settings.resume_cost)
        for step in range(self.checkpoints.restore() + 1, steps + 1):
            yield step
            self.checkpoints.keep(step)

    def record(self, name: str):
        """A function that appends a row to the stage's log `name` (*.jsonl)."""
        def write(row: dict):
            with open(self.partial / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return write


def be_deterministic():
    """--deterministic, for this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matmul on a GPU
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def forget_peak_memory():
    """So that what an earlier stage of this process took is not counted again."""
    with contextlib.suppress(OSError):  # only Linux can
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """Bytes at the highest point so far: of this process, and of the GPU if one was used."""
    try:
        status = Path("/proc/self/status").read_text()
        host = int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024
    except (OSError, TypeError):  # TypeError: there is no such line
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        host *= 1 if sys.platform == "darwin" else 1024
    memory = dict(peak_host_bytes=host)
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        memory["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return memory


# ---------------------------------------------------------------------------------- run folders


def is_run(run: Path) -> bool:
    """Is a folder a run, or a sweep, of ours?"""
    path = Path(run) / "settings.json"
    try:  # those of an older version have no lock file
        points = Path(run) / "points.jsonl"
        if (Path(run) / LOCK).is_file() or points.is_file() and b'"digest"' in points.read_bytes():
            return True
        return bool(settings_of(read_json(path), path))
    except UserError:
        return False


def claim(run: Path):
    """Make a run folder. UserError if it exists and is not ours: its files are somebody's own."""
    run = Path(run)
    if run.is_dir() and any(run.iterdir()) and not is_run(run):
        raise UserError(f"{run} is not empty and no run folder; choose another --out")
    run.mkdir(parents=True, exist_ok=True)
    os.close(open_lock(run / LOCK))


def open_lock(path: Path) -> int:
    """A lock file, never through a link that somebody put there. Closing it frees the lock."""
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)


locked_here = set()  # run folders that this process holds


@contextlib.contextmanager
def lock(run: Path):
    """Hold a run folder, if it is there, against other processes. The system lets go of it even if
    this one is killed. A command holds it throughout; its stages' own holds then do nothing."""
    run = Path(run).resolve()
    if run in locked_here or not is_run(run) or fcntl is None:  # a lock would make it a run
        yield
        return
    file = open_lock(run / LOCK)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            os.close(file)
            raise UserError(f"{run} is in use by another process; wait for it, or use "
                            "--out") from None
        print(f"warning: {run} cannot be locked ({e.strerror}); let one process at a time use it",
              flush=True)
    locked_here.add(run)
    try:
        yield
    finally:
        locked_here.remove(run)
        os.close(file)


@contextlib.contextmanager
def turn(folder: Path):
    """Wait for other processes that have their turn in a folder. Nothing is left there; where the
    system or its disk knows no locks, nobody waits."""
    file = None
    try:
        with contextlib.suppress(OSError):
            if fcntl:
                file = os.open(folder, os.O_RDONLY)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        if file is not None:
            os.close(file)


# ------------------------------------------------------------------------------- the command's end

# What torch says where memory runs out and it raises no OutOfMemoryError.
NO_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory", "_ALLOC_FAILED",
             "Storage size calculation overflowed")
OUT_OF_MEMORY = ("out of memory; `python -m pipeline plan` says what each stage needs; lower "
                 "--micro-tokens, --attribution-tokens or --eval-tokens, or add --checkpointing")


def run_cli(main):
    """Run a command line: what the user can put right ends in one line and exit status 2."""
    for name in ("stdout", "stderr"):
        with contextlib.suppress(AttributeError):  # replaced by tests
            getattr(sys, name).reconfigure(line_buffering=True, errors="replace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clusters send it: as Ctrl-C
    try:
        if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
            raise UserError(f"torch {torch.__version__} is too old; install "
                            f"{'.'.join(map(str, OLDEST_TORCH))} or later")
        main()
    except UserError as e:
        stop(str(e), getattr(e, "status", 2))
    except KeyboardInterrupt:
        stop("stopped; the same command goes on from where it stopped", 130)
    except (torch.OutOfMemoryError, MemoryError):
        stop(OUT_OF_MEMORY, 2)
    except RuntimeError as e:
        if "Symlink loop" in str(e):  # pathlib's, before Python 3.13
            stop(f"{e}; delete that link, or name another place", 2)
        if not any(part in str(e) for part in NO_MEMORY):
            raise
        stop(OUT_OF_MEMORY, 2)
    except BrokenPipeError:  # as other tools end whose reader, say `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as e:  # disk full, no permission, read-only
        where = f"{e.filename}: " if e.filename else ""
        stop(f"{where}{e.strerror or e}; free space there, see to its permissions, or choose "
             "another --out", 2)


def stop(message: str, status: int):
    message = " ".join(message.split())
    if len(message) > LONGEST_MESSAGE:
        message = message[:LONGEST_MESSAGE] + " ..."
    with contextlib.suppress(OSError):  # a stderr that takes nothing must not hide the status
        print("error: " + message, file=sys.stderr)
    sys.exit(status)
