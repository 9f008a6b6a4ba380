"""What is run and where it is kept: settings, their command line, and stage folders.

Nothing of the method is here. A *stage* (original, attribution, mask, an unlearned model, an
evaluation) is one folder. It is made under a temporary name and renamed when it is whole, beside a
`stage.json` that says what made it: settings, inputs, code, time, memory. A stage whose fingerprint
(all of those but the last two) is unchanged is skipped; any other is made again. A killed stage
leaves its unfinished folder, and goes on from what resume.py kept there.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import tokenize
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

# torch says this, when imported, wherever NumPy is not installed; nothing here needs NumPy.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 5)  # the first with enable_gqa; run.sh asks for it too
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what no file name or UTF-8 file can hold
MOST = 2**31  # a number from here on is a slip of the hand, and overflows some kernel
LONGEST = 1000  # characters of an error message, which may quote a damaged file
HASHED = 1 << 25  # bytes: up to here a stage's file is known by sha256, above by its size alone
RESUME = "resume"  # in an unfinished stage: what a killed one goes on from; not part of the result


class UserError(Exception):
    """Something the person at the keyboard can put right: what is wrong, where, what to do."""


# ---------------------------------------------------------------------------------------- settings


def option(default, effect: str, *, ok=None, must: str = "", choices: tuple = ()):
    """A settings field: its default, its effect or unit, and what a value must satisfy."""
    return field(default=default, metadata=dict(effect=effect, ok=ok, must=must, choices=choices))


def at_least(low):
    return dict(ok=lambda x: low <= x < MOST, must=f"at least {low}, and below 2**31")


POSITIVE = dict(ok=lambda x: 0 < x < MOST, must="a positive number below 2**31")
FRACTION = dict(ok=lambda x: 0 < x <= 1, must="in (0, 1]")
DECAY = dict(ok=lambda x: 0 <= x < 1, must="in [0, 1)")

BENCHMARKS = ("demo", "tofu", "lume")
MODELS = ("llama2-7b", "olmo-1b", "tiny-llama", "tiny-olmo")
METHODS = ("fo", "so", "simu")
MASKS = ("dual", "forget-only", "soft", "random", "none", "all")
OBJECTIVES = ("graddiff", "ga", "retain", "npo", "po")


@dataclass(frozen=True)
class Settings:
    """Every setting of every stage. Recipes (simu.RECIPES) override these defaults, and the
    command line overrides both."""

    benchmark: str = option("demo", "what is forgotten", choices=BENCHMARKS)
    model: str = option("tiny-llama", "what forgets it", choices=MODELS)
    seed: int = option(0, "seeds every draw: slice, initial weights, order, pairing",
                       **at_least(0))
    data: str = option("", "folder holding tofu/ and lume/; default $SIMU_DATA, else downloaded; "
                       "demo/ for the demo")
    weights: str = option("", "the original model: a folder in HF layout, or hf:OWNER/NAME"
                          "[@REVISION]; default: as hub.ORIGINALS says, made here if tiny")
    out: str = option("", "run folder; default runs/<benchmark>-<model>")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "of the weights; auto: bfloat16 for real models on a GPU",
                        choices=("auto", "float32", "bfloat16"))
    deterministic: bool = option(False, "on a GPU: only kernels that give the same bits each time, "
                                 "slower; an operation that has none stops the run")
    force: bool = option(False, "make again what is already made")
    resume_cost: float = option(
        0.03, "share of a training's or attribution's time spent on checkpoints from which a "
        "killed one goes on; 1: one after every update; 0: none",
        ok=lambda x: 0 <= x <= 1, must="from 0 to 1")

    # What is forgotten and kept.
    forget_split: str = option("forget10", "TOFU: file of the forget set")
    retain_split: str = option("retain90", "TOFU: file of the retain set")
    forget_groups: int = option(0, "forget only this many authors (TOFU) or documents per task "
                                "(LUME); 0: all", **at_least(0))
    retain_groups: int = option(0, "retain only this many; 0: all", **at_least(0))
    rows_per_author: int = option(20, "TOFU: consecutive rows that make one author", **at_least(1))
    lume_fraction: float = option(0.4, "LUME: share of documents sampled [D15]", **FRACTION)
    template: str = option("qa", "prompt template [D14]", choices=("llama2", "qa", "raw"))

    # Step 1: attribution and mask (Section 2.1).
    steps: int = option(5, "m: nodes on the path from 0 to beta (Eq. 1)", **at_least(1))
    threshold: float = option(0.3, "t: critical if Att > t * max of the layer", **FRACTION)
    path: str = option("layer", "scale a layer's outputs together, or one neuron at a time [D4]",
                       choices=("layer", "neuron"))
    mask: str = option("dual", "dual keeps neurons critical for both sets [D6], forget-only drops, "
                       "soft weighs them; random: of equal size; none: attention only; all: no "
                       "mask on down_proj", choices=MASKS)
    attribution_tokens: int = option(4096, "tokens in one attribution pass, path nodes counted in",
                                     **at_least(1))

    # Step 2: unlearning (Section 2.2).
    method: str = option("simu", "AdamW on all weights, Sophia on all, or SIMU", choices=METHODS)
    objective: str = option("graddiff", "GradDiff; ga: ascent only; retain: fine-tuning on retain; "
                            "npo, po: as GradDiff, with NPO or refusals in place of the ascent",
                            choices=OBJECTIVES)
    npo_beta: float = option(0.1, "beta of NPO", **POSITIVE)
    lr: float = option(5e-6, "eta: peak learning rate", **POSITIVE)
    epochs: int = option(5, "passes over the forget set", **at_least(1))
    batch: int = option(16, "forget rows per update, each with one retain row", **at_least(1))
    micro_tokens: int = option(8192, "tokens in one forward-backward pass; a batch is cut to fit",
                               **at_least(1))
    lam: float = option(2.0, "lambda: weight of the retain loss",
                        **at_least(0))
    beta1: float = option(0.9, "of the first moment (Eq. 4)", **DECAY)
    beta2: float = option(0.95, "of the curvature (Eq. 4)", **DECAY)
    gamma: float = option(204.8, "damping (Eq. 3): SOUL's rho * bs = 0.04 * 5120 [D7]", **POSITIVE)
    eps: float = option(1e-15, "floor of gamma * H (Eq. 3)", **POSITIVE)
    adam_beta2: float = option(0.999, "AdamW's second moment (FO-GradDiff)", **DECAY)
    adam_eps: float = option(1e-8, "AdamW's epsilon (FO-GradDiff)", **POSITIVE)
    weight_decay: float = option(0.1, "decoupled, none on norms [D7]", **at_least(0))
    clip: float = option(1.0, "largest gradient norm over the weights that move", **POSITIVE)
    warmup: float = option(0.1, "share of updates with rising learning rate", **DECAY)
    state: str = option("float32", "optimiser state and master weights; bfloat16 rounds "
                        "stochastically [D10]", choices=("float32", "bfloat16"))
    checkpointing: bool = option(False, "recompute activations in the backward pass")
    eval_epochs: bool = option(False, "evaluate after every epoch of unlearning (epochs.jsonl)")

    # The original model, where it is made here (tiny ones from random weights; DESIGN section 7).
    vocab: int = option(2048, "pieces of a tiny model's tokenizer", **at_least(300))
    width: int = option(128, "D of a tiny model", **at_least(8))
    depth: int = option(4, "L of a tiny model", **at_least(1))
    context: int = option(512, "positions of a tiny model", **at_least(8))
    learn_batch: int = option(16, "rows per update while it is made", **at_least(1))
    learn_lr: float = option(2e-3, "peak rate while learning all but the forget set", **POSITIVE)
    learn_epochs: int = option(40, "epochs of that", **at_least(1))
    light_lr: float = option(5e-4, "peak rate while learning the forget set", **POSITIVE)
    light_epochs: int = option(10, "epochs of that", **at_least(1))
    light_retain: int = option(2, "retain rows beside each forget row in it", **at_least(0))

    # Evaluation.
    must_know: float = option(0.5, "least ROUGE-L of the original on the forget set, below which "
                              "run.sh stops before unlearning; 0: go on with any",
                              ok=lambda x: 0 <= x <= 1, must="in [0, 1]")
    max_new_tokens: int = option(0, "LUME: tokens generated at most; 0: no limit", **at_least(0))
    max_total_tokens: int = option(200, "TOFU: prompt and answer at most; 0: no limit [D16]",
                                   **at_least(0))
    eval_tokens: int = option(16384, "tokens in one evaluation pass", **at_least(1))

    def __post_init__(self):
        for f in fields(self):
            value, meta = getattr(self, f.name), f.metadata
            name = "--" + f.name.replace("_", "-")
            if isinstance(value, str) and NO_TEXT.search(value):
                raise UserError(f"{name} is {value!r}, which is not UTF-8 text; choose another")
            if meta["choices"] and value not in meta["choices"]:
                raise UserError(f"{name} is {value!r}; choose {' or '.join(meta['choices'])}")
            if meta["ok"] and not meta["ok"](value):
                raise UserError(f"{name} is {value}; it must be {meta['must']}")

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.out or HERE / "runs" / f"{self.benchmark}-{self.model}")

    @property
    def tiny(self) -> bool:
        """A model small enough to be made here, on a CPU, from random weights."""
        return self.model.startswith("tiny-")


class _Parser(argparse.ArgumentParser):
    """One whose errors are UserErrors, as are those of its subcommands."""

    def __init__(self, **given):
        super().__init__(**{"allow_abbrev": False} | given)

    def error(self, message):
        raise UserError(f"{message}; see: python {self.prog} --help")


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    return _Parser(prog=prog, description=description)


def add_options(to: argparse.ArgumentParser, *, skip: tuple = ()):
    """One option per settings field; an absent one stays absent, so that recipes can fill it."""
    for f in fields(Settings):
        if f.name in skip:
            continue
        flag, effect = "--" + f.name.replace("_", "-"), f.metadata["effect"].replace("%", "%%")
        if f.type is bool:
            to.add_argument(flag, action=argparse.BooleanOptionalAction, help=effect,
                            default=argparse.SUPPRESS)
        else:
            shown = f"{effect} (default {f.default!r})"
            to.add_argument(flag, type=f.type, help=shown, default=argparse.SUPPRESS,
                            choices=f.metadata["choices"] or None,
                            metavar=None if f.metadata["choices"] else f.type.__name__.upper())


def read_settings(run: Path) -> Settings:
    """The settings of a run, as its last `simu.py original` resolved them."""
    path = Path(run) / "settings.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: {run} is not a run folder; run `python simu.py "
                        "original` or `bash run.sh demo` first")
    values, wanted = read_json(path), {f.name: f.type for f in fields(Settings)}
    if not isinstance(values, dict) or set(values) != set(wanted) or not all(
            type(values[k]) in (t, int if t is float else t) for k, t in wanted.items()):
        raise UserError(f"{path} is not the settings of a run of this version; run "
                        "`python simu.py original` again")
    try:
        return Settings(**{**values, "out": str(run)})
    except UserError as e:
        raise UserError(f"{path}: {e}; run `python simu.py original` again") from None


def choose_device(s: Settings) -> torch.device:
    if s.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; check the driver, or use --device cpu")
    auto = "cuda" if torch.cuda.is_available() and not s.tiny else "cpu"
    return torch.device(auto if s.device == "auto" else s.device)


def choose_dtype(s: Settings) -> torch.dtype:
    if s.dtype != "auto":
        return getattr(torch, s.dtype)
    real = not s.tiny and choose_device(s).type == "cuda"
    return torch.bfloat16 if real else torch.float32


def placement(s: Settings) -> dict:
    """Where and in what a model is loaded: what Transformer.from_pretrained takes."""
    return dict(dtype=choose_dtype(s), device=choose_device(s))


def be_deterministic():
    """--deterministic, for this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matmul on a GPU
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def resolved(s: Settings, names: tuple[str, ...]) -> dict:
    """The named settings, with "auto" replaced by what it means on this machine."""
    auto = dict(device=lambda: choose_device(s).type, dtype=lambda: str(choose_dtype(s))[6:])
    return {n: auto[n]() if n in auto else getattr(s, n) for n in names}


# ------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def naming(path: Path):
    """Errors of the system that name no file, as a full disk's do not, name this one."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


def write_text(path: Path, text: str):
    """Whole or not at all: written beside, flushed to disk, renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    with naming(path), open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path):
    """The JSON value in a file; UserError says which file is missing or broken."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file") from None
    except (ValueError, RecursionError) as e:
        what = str(e).splitlines()[0]
        raise UserError(f"{path} is not valid JSON ({what}); fetch or make it again") from None


def flush(path: Path):
    """Have the disk hold a file; a folder or a link says nothing of its own."""
    if path.is_file() and not path.is_symlink():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def code_digest(modules: tuple[str, ...]) -> str:
    """Digest of our own modules without their comments and blank lines: rewording a comment
    must not cost anyone a training run."""
    digest = hashlib.sha256()
    idle = (tokenize.COMMENT, tokenize.NL)
    for module in modules:
        source = (HERE / f"{module}.py").read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        digest.update("\0".join(t.string for t in tokens if t.type not in idle).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ stages


def digest(value) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(folder: Path) -> dict[str, list]:
    """File name -> [bytes, sha256] of a folder's own files; no sha256 for those above HASHED."""
    later = ("stage.json", "README.md")  # the model card is written again by every report
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name not in later]
    sizes = {p: p.stat().st_size for p in files}
    return {p.name: [n, sha256(p) if n <= HASHED else ""] for p, n in sizes.items()}


def write_stage(folder: Path, made: dict):
    """stage.json, with a digest of itself: a finished stage is not edited."""
    write_json(Path(folder) / "stage.json", made | {"sha256": digest(made)})


def fingerprint(folder: Path) -> str:
    """Fingerprint of a finished stage; UserError if it was never finished."""
    return read_stage(folder)["fingerprint"]


def read_stage(folder: Path, *, files: bool = True) -> dict:
    """stage.json of a finished stage; UserError if it was never finished, or if it or one of the
    files beside it was changed since. Of a file that is gone, whoever reads it will tell."""
    path, again = Path(folder) / "stage.json", f"delete {folder} and run its stage again"
    if not path.is_file():
        raise UserError(f"{folder} is not a finished stage; run the stage that makes it first")
    made = read_json(path)
    try:
        whole = isinstance(made, dict) and made.pop("sha256", "") == digest(made)
    except RecursionError:
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged, edited or of another version; {again}")
    for name, (size, sha) in made["files"].items() if files else ():
        file = path.with_name(name)
        if file.is_file() and (file.stat().st_size != size or sha and sha256(file) != sha):
            raise UserError(f"{file} is not what its stage wrote; {again}")
    return made


def finished_models(run: Path) -> list[str]:
    """Names of the stage folders of a run that hold a model."""
    return sorted(p.parent.name for p in run.glob("*/config.json")
                  if (p.parent / "stage.json").is_file()
                  and not p.parent.name.endswith((".partial", ".old")))


class Stage:
    """One stage folder. `done` says whether it is already there; as a context manager it gives the
    folder to write into, and makes it final when the block ends well.

    fields: names of the settings the result depends on. inputs: name -> fingerprint or sha256 of
    what is read. modules: our own code that computes it.
    """

    def __init__(self, folder: Path, *, settings: Settings, fields: tuple[str, ...],
                 inputs: dict[str, str], modules: tuple[str, ...]):
        self.folder, self.settings = Path(folder), settings
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.name = str(self.folder.relative_to(settings.run))
        self.why = dict(settings=resolved(settings, fields), inputs=inputs,
                        code=code_digest(modules))
        self.fingerprint = digest(self.why)
        self.notes = {}  # anything else the stage wants to leave in stage.json

    @property
    def done(self) -> bool:
        self._recover()
        if not (self.folder / "stage.json").is_file():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"{self.folder} is in the way: it is no finished stage; move or "
                                "delete it, or choose another --out")
            return False
        changed = ["--force"] if self.settings.force else [f"{x} changed" for x in self._changed()]
        print(f"[{self.name}] " + (f"made again: {' and '.join(changed)}" if changed else
                                   "already made; skipped"), flush=True)
        return not changed

    def _changed(self) -> list[str]:
        """Which of settings, inputs and code differ from what made the folder, and whether any of
        its files is gone."""
        old = read_stage(self.folder, files=False)
        changed = [k for k in self.why if old["why"][k] != self.why[k]]
        if not all((self.folder / name).is_file() for name in old["files"]):
            changed.append("files")
        if not changed:
            read_stage(self.folder)  # UserError if a file was altered
        return changed

    def require(self):
        """UserError unless the folder is there and made of what we would make it of."""
        if changed := self._changed():
            raise UserError(f"{self.folder} was made with other {' and '.join(changed)} than this "
                            "run now has; run its stage again, with the same options")

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(lock(self.settings.run))
        mark = self.partial / RESUME / "fingerprint"
        if not (mark.is_file() and mark.read_bytes() == self.fingerprint.encode()):
            shutil.rmtree(self.partial, ignore_errors=True)
            mark.parent.mkdir(parents=True)
            write_text(mark, self.fingerprint)
        if self.settings.deterministic:
            be_deterministic()
        if self.settings.tiny and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # no slower on matrices so small; same bytes anywhere
        self._start = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self.partial

    def __exit__(self, kind, error, trace):
        with self._lock:
            if kind is not None:
                if isinstance(error, OSError) and not error.filename:  # a full disk names no file
                    error.filename = str(self.partial)
                return
            seconds, memory = time.monotonic() - self._start, peak_memory()
            for path in list(self.partial.iterdir()):
                if path.name.startswith(".") and path.suffix == ".partial":
                    path.unlink()  # a killed process was writing it
                else:
                    flush(path)
            write_stage(self.partial, dict(
                fingerprint=self.fingerprint, why=self.why,
                settings=dataclasses.asdict(self.settings), seconds=round(seconds, 3), **memory,
                torch=torch.__version__, threads=torch.get_num_threads(), **self.notes,
                files=seal(self.partial)))
            self._recover()
        peak = ", ".join(f"peak {k.split('_')[1]} {v / 2**30:.2f} GiB" for k, v in memory.items())
        if "peak_gpu_bytes" in memory and "predicted_bytes" in self.notes:
            peak += f" (predicted {self.notes['predicted_bytes'] / 2**30:.2f})"
        print(f"[{self.name}] {seconds:.1f} s, {peak}", flush=True)

    def _recover(self):
        """Put a whole unfinished folder in its place: at a stage's end, or where a kill came after
        its stage.json. Each line may be the last one reached."""
        old = self.folder.with_name(self.folder.name + ".old")
        whole = (self.partial / "stage.json").is_file()
        if whole and fingerprint(self.partial) == self.fingerprint:
            shutil.rmtree(self.partial / RESUME, ignore_errors=True)
            if self.folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.folder, old)
            os.replace(self.partial, self.folder)
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def peak_memory() -> dict[str, int]:
    """Bytes at the highest point so far: of this process, and of the GPU if one was used."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = dict(peak_host_bytes=kib * (1 if sys.platform == "darwin" else 1024))
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        memory["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return memory


def mask_name(s: Settings) -> str:
    """Folder of the mask: mask for the paper's dual, mask-<kind> for the others beside it."""
    return "mask" if s.mask == "dual" else f"mask-{s.mask}"


def unlearned_name(s: Settings) -> str:
    """Folder of an unlearned model: so-graddiff, simu-graddiff, simu-random-graddiff, simu-npo."""
    kind = f"-{s.mask}" if s.method == "simu" and s.mask != "dual" else ""
    return f"{s.method}{kind}-{s.objective}"


_locked = set()  # run folders this process holds


@contextlib.contextmanager
def lock(run: Path):
    """Hold a run folder, if it is there, against other processes. The system lets go of it even if
    this one is killed. A command holds it throughout; its stages' own holds are then no-ops."""
    run = Path(run).resolve()
    if run in _locked or not run.is_dir():
        yield
        return
    with open(run / ".lock", "w") as file:  # closing it frees the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run} is in use by another process; wait for it, or use "
                            "--out") from None
        _locked.add(run)
        try:
            yield
        finally:
            _locked.remove(run)


# -------------------------------------------------------------------------------------------- main


# What torch says where memory runs out and it raises no OutOfMemoryError.
NO_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory", "_ALLOC_FAILED",
             "Storage size calculation overflowed")
OUT_OF_MEMORY = ("out of memory; `python simu.py plan` says what each stage needs; lower "
                 "--micro-tokens, --attribution-tokens or --eval-tokens, or add --checkpointing")


def run_cli(main):
    """Run a command line: what the user can put right ends in one line and exit status 2."""
    with contextlib.suppress(AttributeError):  # a replaced stdout (tests, notebooks) has none
        sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clusters send it: as Ctrl-C
    try:
        if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
            raise UserError(f"torch {torch.__version__} is too old; install "
                            f"{'.'.join(map(str, OLDEST_TORCH))} or later")
        main()
    except UserError as e:
        _stop(str(e), 2)
    except KeyboardInterrupt:
        _stop("stopped; the same command goes on from where it stopped", 130)
    except (torch.OutOfMemoryError, MemoryError):
        _stop(OUT_OF_MEMORY, 2)
    except RuntimeError as e:
        if not any(said in str(e) for said in NO_MEMORY):
            raise
        _stop(OUT_OF_MEMORY, 2)
    except BrokenPipeError:  # as other tools end whose reader, say `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as e:  # disk full, no permission, read-only
        where = f"{e.filename}: " if e.filename else ""
        _stop(f"{where}{e.strerror or e}; free space there, see to its permissions, or choose "
              "another --out", 2)


def _stop(message: str, status: int):
    message = " ".join(message.split())
    print("error: " + (message if len(message) <= LONGEST else message[:LONGEST] + " ..."),
          file=sys.stderr)
    sys.exit(status)
