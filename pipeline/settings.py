"""Every setting of every stage: its default, its range, its effect; the recipe of each cell; the
command line made of them.

A value comes from the first that has it: the command line, --config, the recipe, the default.
`Settings` is the union of what the core's functions take (simu.Recipe, eval.Limits) and of what
only a run needs. A stage depends on the dataclasses below as they are, so a field that is added to
one cannot be forgotten.
"""

import argparse
import hashlib
import operator
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

import eval as evaluation
import simu
from data import option
from model import Transformer, UserError, read_json
from pipeline import checkpoint, objectives, slices
from pipeline.rows import NO_TEXT, load_rows
from pipeline.tokenizers import chat_template

HERE = Path(__file__).resolve().parent.parent  # the repository
DOWNLOADS = HERE / "downloads" / "data"  # --data, where neither it nor SIMU_DATA is set
BENCHMARKS = ("demo", "tofu", "lume", "rows")  # rows: files of the user's
TINY_MODELS = {"tiny-llama": "llama", "tiny-olmo": "olmo"}  # of this model_type, initialised here
MODELS = ("llama2-7b", "olmo-1b", "llama3.2-1b", "smollm2-135m", *TINY_MODELS)
# Of an unlearned model's folder. It is no other stage's, and a disk may not tell A from a.
NAME = re.compile("(?!original|retain-only|attribution|mask|figures|evaluations|verdict|settings|"
                  "report|attack)[a-z0-9][a-z0-9_.-]{,99}", re.I)

AUTO = 0  # tokens of a pass: as many as the GPU's memory lets
PASSES = ("micro_tokens", "learn_tokens")  # what may be AUTO
PATHS = ("data", "weights", "out", "forget", "retain", "unseen", "retain_only")


# ------------------------------------------------------------------------------------- settings


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and in what a model computes."""

    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "of the weights; auto: bfloat16 for real models on a GPU",
                        choices=("auto", "float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a run is about."""

    benchmark: str = option("demo", "what is forgotten", choices=BENCHMARKS)
    model: str = option("tiny-llama", f"what forgets it: {', '.join(MODELS)}, a folder in HF "
                        "layout, or hf:OWNER/NAME[@REVISION]")
    weights: str = option("", "the original: a folder in HF layout, or hf:OWNER/NAME[@REVISION]; "
                          "default: MODEL's (hub.ORIGINALS); a tiny one is trained here")
    teach: bool = option(False, "MODEL does not know the benchmark yet: teach it first")


@dataclass(frozen=True, kw_only=True)
class Making:
    """How an original is trained, where that happens here."""

    vocab: int = option(2048, "pieces of a tiny model's tokenizer", low=300)
    width: int = option(128, "D of a tiny model", low=8)
    depth: int = option(4, "L of a tiny model", low=1)
    context: int = option(512, "positions of a tiny model", low=8)
    learn_batch: int = option(16, "rows per update while an original is trained", low=1)
    learn_lr: float = option(2e-3, "peak rate while learning all but the forget set", above=0)
    learn_epochs: int = option(40, "epochs of that", low=1)
    learn_decay: float = option(0.1, "weight decay while an original is trained", low=0)
    learn_warmup: float = option(0.1, "share of updates with rising rate meanwhile", low=0, below=1)
    learn_tokens: int = option(8192, "tokens in one pass meanwhile; 0: as micro-tokens", low=0)
    learn_state: str = option("float32", "optimiser state meanwhile",
                              choices=("float32", "bfloat16"))
    learn_checkpointing: bool = option(False, "recompute activations meanwhile")
    learn_retain_only: bool = option(False, "also teach a copy of the base all but the forget set")
    light_lr: float = option(5e-4, "peak rate while learning the forget set", above=0)
    light_epochs: int = option(10, "epochs of that", low=1)
    light_retain: int = option(2, "retain rows beside each forget row in it", low=0)


@dataclass(frozen=True, kw_only=True)
class Level:
    """Where forgetting ends, for the objectives that end somewhere."""

    level: str = option("unseen", "what such an objective gives each forget row: the loss of a row "
                        "never seen; that of retain-only on the same row (retain-only); or a "
                        "number of nats per token")


@dataclass(frozen=True, kw_only=True)
class Judging(evaluation.Limits):
    """What an evaluation measures besides, and by what."""

    closeness: str = option("rouge", "what judges which answer is closest [D11]; encoder needs "
                            "sentence-transformers", choices=("rouge", "encoder"))
    encoder: str = option("paraphrase-MiniLM-L6-v2", "the sentence encoder (SOUL's): a folder, or "
                          "a name on the hub")


@dataclass(frozen=True, kw_only=True)
class Settings(Source, Placement, slices.Slice, objectives.Recipe, Making, Level, Judging):
    """Every setting of every stage."""

    micro_tokens: int = option(
        simu.Unlearning.micro_tokens, "tokens in one forward-backward pass; a batch is cut to fit; "
        "0, the default on a GPU: as many as its memory lets (on a CPU: the recipe's)", low=0)
    data: str = option("", "folder holding tofu/ and lume/; default $SIMU_DATA, else downloaded; "
                       "the embedded one for the demo")
    forget: str = option("", "rows: file of the rows to forget")
    retain: str = option("", "rows: file of the rows to keep")
    unseen: str = option("", "file of rows like the forget rows that the model never saw")
    allow_near: bool = option(False, "rows: go on although a row to keep says almost what a row to "
                              "forget says")
    retain_only: str = option("", "a model that never saw the forget set: a folder or "
                              "hf:OWNER/NAME[@REVISION]")
    out: str = option("", "run folder; default runs/<benchmark>-<model>, of rows with a digest of "
                      "them and of the model's path")
    name: str = option("", "folder and report row of an unlearned model; default <method>[-<mask>]"
                       "-<objective>, so that any setting may vary within a run")
    deterministic: bool = option(False, "on a GPU: only kernels that give the same bits each time, "
                                 "slower; an operation that has none stops the run")
    force: bool = option(False, "run finished stages again")
    resume_cost: float = option(
        0.03, "share of a training's or attribution's time spent on checkpoints from which a "
        "killed one goes on; 1: one after every update; 0: none", low=0, high=1)
    must_know: float = option(0.5, "least ROUGE-L of the original on the forget set, below which "
                              "run.sh stops before unlearning; 0: go on with any", low=0, high=1)
    chosen: tuple = field(default=(), compare=False)  # names of what a user set

    def __post_init__(self):
        for f in OPTIONS:
            check_value(f, getattr(self, f.name))
        if not re.fullmatch(r"unseen|retain-only|\d{1,2}(\.\d+)?", self.level):
            raise UserError(f"--level is {self.level}; it must be unseen, retain-only, or a loss "
                            "in nats per token")
        if self.name and not NAME.fullmatch(self.name):
            raise UserError(f"--name {self.name!r} must be letters, digits, dots, dashes and "
                            "underscores, at most 100, and not begin as that of another stage")

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.out or HERE / "runs" / f"{self.benchmark}-{self.label}")

    @property
    def label(self) -> str:
        """The model's name as it may stand in a file name."""
        if self.model.startswith("hf:"):
            return self.model.removeprefix("hf:").replace("/", "--")
        return Path(self.model).name

    @property
    def tiny(self) -> bool:
        """Is the model small enough to be trained here, on a CPU, from random weights?"""
        return self.model in TINY_MODELS

    @property
    def layout(self) -> str:
        """Which benchmark's file layout the data have."""
        return "tofu" if self.benchmark == "demo" else self.benchmark


OPTIONS = [f for f in fields(Settings) if "effect" in f.metadata]
LIMIT = 2**31  # a number from here on is a slip of the hand, and overflows some kernel
LEAST = 2.0 ** -126  # what is smaller may be 0 in float32, where everything is computed
RANGES = dict(low=("at least", operator.ge), above=("above", operator.gt),
              high=("at most", operator.le), below=("below", operator.lt))


def check_value(f, value):
    """UserError if an option's field may not hold this value."""
    choices, limits, must_be = f.metadata["choices"], f.metadata["limits"], ""
    if type(value) not in ((int, float) if f.type is float else (f.type,)):
        must_be = f"of type {f.type.__name__}"
    elif f.type is str and NO_TEXT.search(value):
        must_be = "UTF-8 text"
    elif choices and value not in choices:
        must_be = " or ".join(choices)
    elif f.type in (int, float) and value != 0 and not LEAST <= abs(value) < LIMIT:  # NaN too
        must_be = "0, or from 2**-126 to below 2**31"
    elif not all(RANGES[name][1](value, limit) for name, limit in limits.items()):
        must_be = range_in_words(f)
    if must_be:
        raise UserError(f"{flag(f.name)} is {value!r}; it must be {must_be}")


def range_in_words(f) -> str:
    return " and ".join(f"{RANGES[name][0]} {limit:g}"
                        for name, limit in f.metadata["limits"].items())


def flag(name: str) -> str:
    """A field's option on the command line."""
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------- recipes by cell

TOFU = dict(max_total_tokens=200, max_new_tokens=0)
LUME = dict(max_total_tokens=0, max_new_tokens=256, template="raw")
# The baselines, which move everything, fit one card of 80 GB at 7B in this state alone. Tokens are
# a CPU's: on a GPU `plan` chooses them (AUTO).
FIT_7B = dict(micro_tokens=512, learn_tokens=512, fo=dict(state="bfloat16"),
              so=dict(state="bfloat16"))
# As TOFU trained its models: 5 epochs, the first of them warm-up, 32 rows per update, at the rate
# of its model of this size, phi-1.5. How LUME's was trained is not known to us: the rate of TOFU's
# 7B, and more epochs, because its rows are to be known by heart.
LEARN_TOFU = dict(learn_lr=2e-5, learn_epochs=5, learn_batch=32, learn_decay=0.01, learn_warmup=0.2)
LEARN_LUME = LEARN_TOFU | dict(learn_lr=1e-5, learn_epochs=10, learn_warmup=0.1)
# As open-unlearning evaluates its models: https://github.com/locuslab/open-unlearning.
CHAT_1B = dict(template="llama3", epochs=10, lr=1e-5, batch=32)
# Taught here. Rates between the tiny models' and the paper's, not swept: in the one run that was
# tried, those of SO and SIMU went far past retain-only (benchmarks/results/tofu-smollm2-135m).
SMOLLM2 = dict(template="qa", forget_groups=2, retain_groups=8, learn_epochs=12, learn_lr=1e-4,
               learn_batch=8, learn_decay=0.01, learn_tokens=1024, micro_tokens=1024,
               dtype="bfloat16", lr=1e-4, epochs=10, batch=8, level_share=0.5,
               learn_retain_only=True, fo=dict(lam=0.3, lr=3e-5), so=dict(lr=5e-5))
# Tiny models, trained here on a CPU. Their learning rates come from the grid in benchmarks/.
TINY = dict(threshold=0.6, steps=5, epochs=40, batch=4, lam=2.0, lr=8e-4, eval_tokens=8192,
            level_share=0.5, fo=dict(lam=0.3, lr=2e-4), so=dict(lr=1e-4))
TINY_ON = {
    "demo": TOFU | dict(rows_per_author=10, learn_epochs=30, light_epochs=15),
    "tofu": TOFU | dict(forget_groups=2, retain_groups=15, learn_epochs=25, light_epochs=15,
                        epochs=20),
    "lume": LUME | dict(forget_groups=3, retain_groups=8, learn_epochs=60, light_lr=1e-3,
                        light_epochs=40, epochs=20)}
# `bash run.sh demo`: as few epochs as teach every row, for it should end within two minutes.
DEMO = dict(learn_epochs=18, epochs=32)
# Over the paper's row, if it has one. A key naming a method holds what only that one overrides.
CELLS = {
    ("tofu", "llama2-7b"): TOFU | FIT_7B | dict(template="llama2"),
    ("tofu", "olmo-1b"): TOFU | LEARN_TOFU,
    ("lume", "llama2-7b"): LUME | FIT_7B | LEARN_LUME | dict(learn_state="bfloat16"),
    ("lume", "olmo-1b"): LUME | LEARN_LUME,
    ("tofu", "llama3.2-1b"): TOFU | CHAT_1B,
    ("tofu", "smollm2-135m"): TOFU | SMOLLM2,
    ("lume", "smollm2-135m"): LUME | SMOLLM2 | dict(template="raw"),
} | {(benchmark, model): TINY | recipe for benchmark, recipe in TINY_ON.items()
     for model in TINY_MODELS}
CELLS["demo", "tiny-llama"] |= DEMO


def recipe_of(s: Settings, folder: Path | None = None) -> dict:
    """What is set, over the defaults, for the benchmark, model, method and device of s. folder:
    where the model is; default: where it is if nothing has to be fetched."""
    cell = s.benchmark, s.model
    if s.benchmark == "rows" or s.model not in MODELS:
        recipe = recipe_by_size(s, folder or folder_of_model(s))
    elif cell in CELLS:
        paper = cell in simu.TABLES_3_AND_4
        recipe = (asdict(simu.paper_recipe(*cell, s.method)) if paper else {}) | CELLS[cell]
    else:
        known = ", ".join(" ".join(cell) for cell in CELLS)
        raise UserError(f"there is no recipe for {s.benchmark} {s.model}; there is one for {known};"
                        " or name a folder or hf:OWNER/NAME as the model")
    recipe = recipe | recipe.get(s.method, {})
    recipe = {name: value for name, value in recipe.items() if name not in simu.METHODS}
    if s.benchmark in ("tofu", "lume"):
        recipe["data"] = path_at(os.environ.get("SIMU_DATA") or str(DOWNLOADS))
    if is_on_gpu(s) and not s.tiny:  # a stage sees to its memory (plan.fit_memory)
        recipe |= dict.fromkeys(PASSES, AUTO)
    return recipe


UPDATES = 320  # of unlearning a user's rows at most: it ends where the rows are forgotten
LEARNING = 120  # least updates of teaching


def recipe_by_size(s: Settings, folder: Path) -> dict:
    """Settings for a model that nobody tuned, from its number of weights.

    The rate falls with size as it does from our tiny models' grid (1.5 million weights, 8e-4) to
    the paper's 7B (5e-6): a power of -0.6. AdamW and Sophia on all weights move far more of them
    and take a quarter and an eighth, as in that grid. Epochs follow from updates, so that few rows
    get as many as many do: of a user's rows a limit, which most runs do not reach. A batch is small
    where there are few rows. Attention and the paper's t decide the rest."""
    size, rows = count_weights(folder), len(load_rows(s.forget)) if s.forget else 400
    lr = float(f"{8e-4 * (size / 1.5e6) ** -0.6:.1g}")
    batch = 4 if rows < 100 else 16
    recipe = dict(threshold=0.3, lr=lr, batch=batch, micro_tokens=1024 if size > 5e7 else 8192,
                  template=template_of(folder, s.benchmark), learn_lr=lr, learn_batch=8,
                  learn_tokens=1024, learn_decay=0.01, fo=dict(lr=lr / 4), so=dict(lr=lr / 8))
    if s.benchmark == "rows":
        return recipe | dict(
            max_total_tokens=0, max_new_tokens=256, level_share=0.5, objective="outsider",
            attribution_tokens=1024, epochs=max(5, -(-UPDATES * batch // rows)),
            learn_epochs=max(12, -(-LEARNING * 8 // (2 * rows))))
    epochs = min(40, max(5, round(200 * batch / rows)))
    limits = LUME if s.benchmark == "lume" else TOFU
    return limits | recipe | dict(epochs=epochs, learn_epochs=12)


def folder_of_model(s: Settings) -> Path:
    """Where the model of a run is: linked in its original, or the user's folder."""
    linked = s.run / "original"
    return linked if (linked / "config.json").is_file() else Path(s.weights or s.model)


def count_weights(folder: Path) -> float:
    """Weights of the model in a folder; of one that is not fetched yet, a guess."""
    if not (folder / "config.json").is_file():
        return 1e9
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(checkpoint.read_config(folder)).parameters())


def template_of(folder: Path, benchmark: str) -> str:
    """The model's chat template where it has one, else qa; LUME's rows are continuations."""
    if benchmark == "lume":
        return "raw"
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    has_one = isinstance(config, dict) and chat_template(folder, config)
    return "chat" if has_one else "qa"


# --------------------------------------------------------------------------------- the one merge


def resolve(named: dict, folder: Path | None = None) -> Settings:
    """Settings from what a command names: defaults | recipe | config | named. `config` is the
    settings.json of a run, of which its user's choices count. folder: see recipe_of."""
    chosen = {k: value for k, value in named.items() if k != "config"}
    if "config" in named:
        chosen = choices_of(named["config"], chosen) | chosen
    # A pass that is AUTO is as one that is not named: the recipe knows what that means here.
    chosen = {k: value for k, value in chosen.items() if not (k in PASSES and value == AUTO)}
    s = Settings(**chosen)
    if s.benchmark == "rows" and not s.out:
        s = replace(s, out=run_of_rows(s))
    recipe = dict(out=s.out) | recipe_of(s, folder)
    return Settings(**recipe | chosen, chosen=tuple(sorted(chosen)))


def with_choices(s: Settings, folder: Path | None = None, **choices) -> Settings:
    """A user's choices and these; the rest as the recipe then has it, which depends on the method
    and the device, and on the model in `folder`."""
    chosen = {name: getattr(s, name) for name in ("benchmark", "model", *s.chosen)}
    return resolve(chosen | choices, folder)


def run_of_rows(s: Settings) -> str:
    """The default run folder of a user's rows: another for other rows or another model, so that no
    result is replaced."""
    key = hashlib.sha256((s.weights or s.model).encode())
    for file in (s.forget, s.retain):
        if Path(file).is_file():
            key.update(Path(file).read_bytes())
    return str(HERE / "runs" / f"rows-{s.label}-{key.hexdigest()[:8]}")


def choices_of(config: Path, named: dict) -> dict:
    """What the user of another run chose, from its settings.json. Its folder and method are not
    taken, so that another method gets the rate of its recipe, unless the run was given one."""
    s = settings_in(config)
    for name in ("benchmark", "model"):
        if named.get(name, getattr(s, name)) != getattr(s, name):
            raise UserError(f"--config {config} is of {name} {getattr(s, name)}, not "
                            f"{named[name]}; name another file, or that")
    return {name: getattr(s, name) for name in s.chosen
            if name not in ("out", "name", "method", "force")}


def read_settings(run: Path) -> Settings:
    """The settings of a run, as its last `original` stage resolved them."""
    path = Path(run) / "settings.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: {run} is not a run folder; run `bash run.sh demo` or "
                        "`python -m pipeline original` first")
    return replace(settings_in(path), out=str(run))


def settings_in(path: Path) -> Settings:
    """The settings that a file of ours holds; UserError names the file."""
    values = read_json(path)
    try:
        return Settings(**values | dict(chosen=tuple(values["chosen"])))
    except (UserError, TypeError, KeyError) as e:
        raise UserError(f"{path} does not hold the settings of a run of this version ({e}); run "
                        "`python -m pipeline original` again") from None


# ------------------------------------------------------------------------------ where to compute


def choose_device(s: Settings) -> torch.device:
    if s.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; check the driver, or use --device cpu")
    return torch.device("cuda" if is_on_gpu(s) else "cpu")


def is_on_gpu(s: Settings) -> bool:
    """Will it be computed on a GPU, or, where there is none, would it be?"""
    return s.device == "cuda" or (s.device == "auto" and torch.cuda.is_available() and not s.tiny)


def choose_dtype(s: Settings) -> torch.dtype:
    if s.dtype != "auto":
        return getattr(torch, s.dtype)
    real = not s.tiny and choose_device(s).type == "cuda"
    return torch.bfloat16 if real else torch.float32


def placement(s: Settings) -> dict:
    """Where, in what and with which neurons a model is loaded: what checkpoint.load_model takes."""
    return dict(dtype=choose_dtype(s), device=choose_device(s), neurons=s.neurons)


def taken(s: Settings, takes: tuple) -> dict:
    """The fields of s that the dataclasses `takes` name, with "auto" replaced by what it means on
    this machine."""
    values = {f.name: getattr(s, f.name) for t in takes for f in fields(t)}
    if Placement in takes:
        values |= dict(device=choose_device(s).type, dtype=str(choose_dtype(s))[6:])
    return values


# ---------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """One whose errors are UserErrors, as are those of its subcommands."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message):
        raise UserError(f"{message}; see: {self.prog} --help")


def path_at(text: str) -> str:
    """An absolute path, for a run must be readable from any folder; hf:OWNER/NAME as it is."""
    if not text:  # an empty variable in a script, most likely
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return text if text.startswith("hf:") else str(Path(os.path.expanduser(text)).absolute())


def model_at(text: str) -> str:
    """A name of the table, hf:OWNER/NAME[@REVISION], or the absolute path of a folder."""
    if text in MODELS or text.startswith("hf:") or os.path.isdir(path_at(text)):
        return text if text in MODELS else path_at(text)
    raise UserError(f"MODEL {text} is no name of the table ({', '.join(MODELS)}), no folder, and "
                    "not hf:OWNER/NAME[@REVISION]")


def encoder_at(text: str) -> str:
    """A name on the hub, or the absolute path of a folder, which must exist before the work."""
    if os.path.isdir(path_at(text)):
        return path_at(text)
    if text[0] in "~./":
        raise argparse.ArgumentTypeError(f"{text} is not a folder; name another")
    return text


TYPES = dict.fromkeys(PATHS, path_at) | dict(model=model_at, encoder=encoder_at)


def add_options(to: argparse.ArgumentParser, *, skip: tuple = ()):
    """One option per field. One that is not named stays absent, so that recipes can fill it."""
    for f in OPTIONS:
        if f.name in skip:
            continue
        effect, choices = f.metadata["effect"], f.metadata["choices"]
        if f.name == "objective":
            effect += ": " + "; ".join(f"{k}: {v.about}" for k, v in simu.OBJECTIVES.items())
        options = dict(action=argparse.BooleanOptionalAction)
        if f.type is not bool:
            effect += f" (default {f.default!r}; {range_in_words(f)})".replace("; )", ")")
            options = dict(type=TYPES.get(f.name, f.type), choices=choices or None,
                           metavar=None if choices else f.type.__name__.upper())
        to.add_argument(flag(f.name), help=effect.replace("%", "%%"), default=argparse.SUPPRESS,
                        **options)
    to.add_argument("--config", type=Path, default=argparse.SUPPRESS, metavar="FILE",
                    help="a settings.json of a run: what its user chose, unless named here")
