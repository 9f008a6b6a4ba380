"""Every setting of every stage, its default for each cell, and the command line made of them.

`Settings` is the union of what is asked for by the core (simu.Recipe, eval.Limits), by slices.Slice
and by what only a run needs. A stage depends on whole dataclasses of it, so a field that is added
to one cannot be forgotten.
"""

import argparse
import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

import data
import eval as evaluation
import simu
from data import option
from model import NO_TEXT, Config, Transformer, UserError, read_json
from pipeline import checkpoint, objectives, slices
from pipeline.files import json_digests, sha256

HERE = Path(__file__).resolve().parent.parent  # the repository
BENCHMARKS = ("demo", "tofu", "lume", "rows")  # rows: files of the user's own
TINY_MODELS = {"tiny-llama": "llama", "tiny-olmo": "olmo"}  # made here, of this model_type
MODELS = ("llama2-7b", "olmo-1b", "llama3.2-1b", "smollm2-135m", *TINY_MODELS)
# Folders of a run that hold no unlearned model; a disk may not tell A from a.
RESERVED = re.compile("(original|retain-only|written-retain|attribution(-.*)?|mask(-.*)?|"
                      r"figures|evaluations|verdict|"
                      r"(settings|report|attack|request)\..*)", re.I)


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
                          "default: MODEL's own (hub.ORIGINALS), made here if tiny")
    teach: bool = option(False, "MODEL does not know the benchmark yet: teach it first")


@dataclass(frozen=True, kw_only=True)
class Making:
    """How the original is made, where it is made here."""

    vocab: int = option(2048, "pieces of a tiny model's tokenizer")
    width: int = option(128, "D of a tiny model")
    depth: int = option(4, "L of a tiny model")
    context: int = option(512, "positions of a tiny model")
    learn_batch: int = option(16, "rows per update while it is made")
    learn_lr: float = option(2e-3, "peak rate while learning all but the forget set")
    learn_epochs: int = option(40, "epochs of that")
    learn_decay: float = option(0.1, "weight decay while it is made")
    learn_warmup: float = option(0.1, "share of updates with rising rate while it is made")
    learn_tokens: int = option(8192, "tokens in one pass while it is made; 0 as micro-tokens")
    learn_state: str = option("float32", "optimiser state while it is made",
                              choices=("float32", "bfloat16"))
    learn_checkpointing: bool = option(False, "recompute activations while it is made")
    learn_retain_only: bool = option(False, "also teach a copy of the base all but the forget set")
    light_lr: float = option(5e-4, "peak rate while learning the forget set")
    light_epochs: int = option(10, "epochs of that")
    light_retain: int = option(2, "retain rows beside each forget row in it")


@dataclass(frozen=True, kw_only=True)
class Aside:
    """Which never-seen rows membership is not measured on."""

    level_share: float = option(
        0.0, "share of the never-seen rows, whole authors, that set the level; membership is "
        "measured on the others")


@dataclass(frozen=True, kw_only=True)
class Level(Aside):
    """Where forgetting ends, for the objectives that end somewhere."""

    level: str = option("unseen", "what such an objective gives each forget row: the loss of a row "
                        "never seen; that of retain-only on the same row (retain-only); or a "
                        "number")


@dataclass(frozen=True, kw_only=True)
class Judging(evaluation.Limits):
    """What an evaluation measures besides, and by what."""

    closeness: str = option("rouge", "what judges which answer is closest [D11]; encoder needs "
                            "sentence-transformers", choices=("rouge", "encoder"))
    encoder: str = option("paraphrase-MiniLM-L6-v2", "the sentence encoder (SOUL's): a folder, or "
                          "a name on the hub")
    judge: int = option(400, "rows: ask at most this many of the rows to keep, spread evenly over "
                        "them, what the model says; 0: all")


AUTO = 0  # tokens of a pass: as many as the GPU's memory lets
LIMIT = 2**31  # a number from here on is a slip of the hand, and overflows some kernel
LEAST = 2.0 ** -126  # what is smaller may be 0 in float32, where everything is computed


def is_level(level: str) -> bool:
    try:
        return level in ("unseen", "retain-only") or 0 < float(level) < 100
    except ValueError:
        return False


def at_least(low) -> tuple:
    return lambda x: low <= x < LIMIT, f"at least {low}, and below 2**31"


# What each setting must be, however it is given: names, a test of the value, and the test in words.
RANGES = (
    ("seed simnpo_margin lam weight_decay forget_groups retain_groups max_new_tokens "
     "max_total_tokens learn_decay light_retain retain_from_model micro_tokens learn_tokens "
     "judge", *at_least(0)),
    ("steps attribution_tokens epochs batch rows_per_author eval_tokens depth learn_batch "
     "learn_epochs light_epochs", *at_least(1)),
    ("width context", *at_least(8)),
    ("vocab", *at_least(300)),
    ("threshold lume_fraction", lambda x: 0 < x <= 1, "in (0, 1]"),
    ("resume_cost must_know", lambda x: 0 <= x <= 1, "in [0, 1]"),
    ("beta1 beta2 adam_beta2 warmup learn_warmup level_share", lambda x: 0 <= x < 1, "in [0, 1)"),
    ("npo_beta simnpo_beta", lambda x: 1e-6 <= x <= 1e6, "from 1e-6 to 1e6"),
    ("undial_strength lr gamma eps adam_eps clip learn_lr light_lr", lambda x: LEAST <= x < LIMIT,
     "at least 2**-126, and below 2**31"),
    ("level", is_level, "unseen, retain-only, or a loss in nats per token"),
)
RANGE_OF = {name: tuple(test) for names, *test in RANGES for name in names.split()}


def check_ranges(settings):
    """UserError if a field of a dataclass made of `option`s holds what it must not."""
    for f in fields(settings):
        value, choices, name = getattr(settings, f.name), f.metadata["choices"], flag(f.name)
        if f.type in (bool, int, float, str) and type(value) not in (
                f.type, int if f.type is float else f.type):
            raise UserError(f"{name} is {value!r}; it must be of type {f.type.__name__}")
        if isinstance(value, str) and NO_TEXT.search(value):
            raise UserError(f"{name} is {value!r}, which is not UTF-8 text; choose another")
        if choices and value not in choices:
            raise UserError(f"{name} is {value!r}; choose {' or '.join(choices)}")
        good, must = RANGE_OF.get(f.name, (None, ""))
        if good and not good(value):
            raise UserError(f"{name} is {value}; it must be {must}")


def flag(name: str) -> str:
    """A field's option on the command line."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Settings(Source, Placement, slices.Slice, objectives.Recipe, Making, Level, Judging):
    """Every setting of every stage. A cell's recipe overrides these defaults, and the command line
    overrides both."""

    micro_tokens: int = option(
        simu.Unlearning.micro_tokens, "tokens in one forward-backward pass; a batch is cut to fit; "
        "0, the default on a GPU: as many as its memory lets (on a CPU: the recipe's)")
    data: str = option("", "folder holding tofu/ and lume/; default $SIMU_DATA, else downloaded; "
                       "the embedded one for the demo")
    forget: str = option("", "rows: file of the rows to forget")
    retain: str = option("", "rows: file of the rows to keep")
    unseen: str = option("", "file of rows like the forget rows that the model never saw")
    retain_from_model: int = option(0, "rows: keep this many texts that the original writes")
    allow_near: bool = option(False, "rows: go on although a row to keep says almost what a row to "
                              "forget says")
    retain_only: str = option("", "a model that never saw the forget set: a folder or "
                              "hf:OWNER/NAME[@REVISION]")
    out: str = option("", "run folder; default runs/<benchmark>-<model>")
    name: str = option("", "folder and report row of an unlearned model; default <method>[-<mask>]"
                       "-<objective>, so that any setting may vary within a run")
    deterministic: bool = option(False, "on a GPU: only kernels that give the same bits each time, "
                                 "slower; an operation that has none stops the run")
    force: bool = option(False, "make again what is already made")
    resume_cost: float = option(
        0.03, "share of a training's or attribution's time spent on checkpoints from which a "
        "killed one goes on; 1: one after every update; 0: none")
    eval_epochs: bool = option(False, "evaluate after every epoch of unlearning (epochs.jsonl)")
    must_know: float = option(0.5, "least ROUGE-L of the original on the forget set, below which "
                              "run.sh stops before unlearning; 0: go on with any")

    def __post_init__(self):
        check_ranges(self)
        if self.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{,99}", self.name):
            raise UserError(f"--name {self.name!r} must be letters, digits, dots, dashes and "
                            "underscores, at most 100, and begin with a letter or digit")
        if RESERVED.fullmatch(self.name):
            raise UserError(f"--name {self.name} is that of another stage; choose another")

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.out or HERE / "runs" / f"{self.benchmark}-{self.label}")

    @property
    def label(self) -> str:
        """The model's name as it may stand in a file name."""
        return self.model if self.model in MODELS else Path(
            self.model.removeprefix("hf:").replace("/", "--") if self.model.startswith("hf:")
            else self.model).name

    @property
    def tiny(self) -> bool:
        """A model small enough to be made here, on a CPU, from random weights."""
        return self.model.startswith("tiny-")

    @property
    def layout(self) -> str:
        """Which benchmark's file layout the data have."""
        return {"demo": "tofu"}.get(self.benchmark, self.benchmark)

    @property
    def data_folder(self) -> Path:
        """The folder of the benchmark's files."""
        root = self.data or (HERE / "pipeline" / "demo" if self.benchmark == "demo"
                             else os.environ.get("SIMU_DATA") or default_data())
        folder = Path(root) / self.layout
        if not folder.is_dir():
            raise UserError(f"{folder} is missing; --data or SIMU_DATA must hold {self.layout}/")
        return folder


def row_files(s: Settings) -> dict[str, str]:
    """The files of a run on rows: name -> path."""
    retain = s.retain
    if s.retain_from_model and not retain:
        retain = str(s.run / "written-retain" / "rows.jsonl")
    weight = simu.OBJECTIVES[s.objective].weight
    if not retain and (s.lam if weight is None else weight):
        raise UserError("no rows to keep are given, and this objective must know what is to stay: "
                        "give a second file; or --retain-from-model N, texts that the model "
                        "itself writes; or --objective npo --lam 0, which does less damage alone")
    files = dict(forget=s.forget, retain=retain, unseen=s.unseen)
    return {name: file for name, file in files.items() if file}


def load_benchmark(s: Settings) -> slices.Benchmark:
    """The forget and retain sets of a run."""
    if s.layout == "rows":
        parts = {name: data.load_rows(file) for name, file in row_files(s).items()}
        bench = slices.benchmark_of_rows(
            *(parts.get(k, []) for k in ("forget", "retain", "unseen")), allow_near=s.allow_near)
        bench = replace(bench, retain_eval=evaluation.spread(bench.retain_eval, s.judge))
    else:
        bench = slices.load_benchmark(s.data_folder, s, layout=s.layout, made_here=made_here(s))
    return slices.set_aside(bench, s.level_share, s.seed)


def data_digests(s: Settings) -> dict[str, str]:
    """sha256 of every file that the rows come from."""
    if s.layout == "rows":
        return {name: sha256(file) for name, file in row_files(s).items()}
    return json_digests(s.data_folder)


def made_here(s: Settings) -> bool:
    """Was the original trained on this slice here, so that what it never saw is known?"""
    if s.weights and not s.teach:
        return False
    return s.tiny or (s.run / "original" / "log.jsonl").is_file()


def downloads() -> Path:
    """The folder that holds everything fetched."""
    given = os.environ.get("SIMU_DOWNLOADS")
    return Path(absolute(given, "SIMU_DOWNLOADS") if given else HERE / "downloads")


def default_data() -> str:
    """--data where neither it nor SIMU_DATA is given."""
    return str(downloads() / "data")


def tiny_config(s: Settings, tokenizer) -> Config:
    """A small LLaMA (grouped kv heads) or OLMo (tied head), of s.width and s.depth."""
    kind, head = TINY_MODELS[s.model], 32
    if s.width % (2 * head):
        raise UserError(f"--width {s.width} is not a multiple of {2 * head}")
    llama = kind == "llama"
    return Config(
        model_type=kind, vocab_size=tokenizer.vocab_size,
        hidden_size=s.width, intermediate_size=4 * s.width, num_hidden_layers=s.depth,
        num_attention_heads=s.width // head, head_dim=head,
        num_key_value_heads=s.width // head // (2 if llama else 1),
        max_position_embeddings=s.context, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=not llama, clip_qkv=None, bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id, pad_token_id=None)


# --------------------------------------------------------------------------- defaults by cell

TOFU = dict(max_total_tokens=200, max_new_tokens=0)
LUME = dict(max_total_tokens=0, max_new_tokens=256, template="raw")
# The baselines, which move everything, fit one card of 80 GB at 7B in this state alone. Tokens are
# a CPU's: on a GPU `plan` chooses them (AUTO).
FIT_7B = dict(micro_tokens=512, learn_tokens=512, fo=dict(state="bfloat16"),
              so=dict(state="bfloat16"))
# As TOFU made its own: 5 epochs, the first of them warm-up, 32 rows per update, at the rate of its
# model of this size, phi-1.5. How LUME's was made is not known to us: the rate of TOFU's 7B, and
# more epochs, as its rows are to be known by heart.
LEARN_TOFU = dict(learn_lr=2e-5, learn_epochs=5, learn_batch=32, learn_decay=0.01, learn_warmup=0.2)
LEARN_LUME = LEARN_TOFU | dict(learn_lr=1e-5, learn_epochs=10, learn_warmup=0.1)
# As open-unlearning evaluates its own: https://github.com/locuslab/open-unlearning.
CHAT_1B = dict(template="llama3", epochs=10, lr=1e-5, batch=32)
# Taught here. Rates between the tiny models' and the paper's, not swept: in the one run made, those
# of SO and SIMU went far past retain-only (benchmarks/results/tofu-smollm2-135m).
SMOLLM2 = dict(template="qa", forget_groups=2, retain_groups=8, learn_epochs=12, learn_lr=1e-4,
               learn_batch=8, learn_decay=0.01, learn_tokens=1024, micro_tokens=1024,
               dtype="bfloat16", lr=1e-4, epochs=10, batch=8, level_share=0.5,
               learn_retain_only=True, fo=dict(lam=0.3, lr=3e-5), so=dict(lr=5e-5))
# Tiny models, made here on a CPU. Their learning rates come from the grid in benchmarks/.
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
} | {(benchmark, model): TINY | own for benchmark, own in TINY_ON.items()
     for model in TINY_MODELS}
CELLS["demo", "tiny-llama"] |= DEMO


def cell_defaults(benchmark: str, model: str, method: str) -> dict:
    """What a cell's recipe sets for a method, over the dataclasses' own defaults."""
    if (benchmark, model) not in CELLS:
        known = ", ".join(f"{b} {m}" for b, m in CELLS)
        raise UserError(f"there is no recipe for {benchmark} {model}; there is one for {known}; "
                        "or name a folder or hf:OWNER/NAME as the model")
    own, paper = CELLS[benchmark, model], {}
    if (benchmark, model) in simu.TABLES_3_AND_4:
        row, plain = simu.paper_recipe(benchmark, model, method), simu.Recipe()
        paper = {f.name: getattr(row, f.name) for f in fields(row)
                 if getattr(row, f.name) != getattr(plain, f.name)}
    return paper | for_method(own, method)


def for_method(recipe: dict, method: str) -> dict:
    """What a recipe sets for a method: what is common to all, and over it the method's own."""
    common = {k: v for k, v in recipe.items() if not isinstance(v, dict)}
    return common | recipe.get(method, {})


UPDATES = 320  # of unlearning own rows at most: it ends where the rows are forgotten
LEARNING = 120  # least updates of teaching


def own_recipe(benchmark: str, folder: Path, rows: int) -> dict:
    """Settings for a model that nobody tuned, from its number of weights.

    The rate falls with size as it does from our tiny models' grid (1.5 million weights, 8e-4) to
    the paper's 7B (5e-6): a power of -0.6. AdamW and Sophia on all weights move far more of them
    and take a quarter and an eighth, as in that grid. Epochs follow from updates, so that few rows
    get as many as many do: on one's own rows a limit, which most runs do not reach. A batch is
    small where there are few rows. Attention and the paper's t decide the rest."""
    size, own = count_weights(folder) or 1e9, benchmark == "rows"
    lr = float(f"{8e-4 * (size / 1.5e6) ** -0.6:.1g}")
    batch = 4 if rows < 100 else 16
    epochs = max(5, -(-UPDATES * batch // max(1, rows))) if own else min(
        40, max(5, round(200 * batch / max(1, rows))))
    factor = {"fo": 0.25, "so": 0.125}
    limits = dict(rows=dict(max_total_tokens=0, max_new_tokens=256), tofu=TOFU, lume=LUME)
    return limits.get(benchmark, TOFU) | dict(
        threshold=0.3, lr=lr, batch=batch, epochs=epochs, micro_tokens=1024 if size > 5e7 else 8192,
        level_share=0.5 if own else 0.0, template=own_template(folder, benchmark),
        learn_lr=lr, learn_batch=8, learn_tokens=1024, learn_decay=0.01,
        learn_epochs=max(12, -(-LEARNING * 8 // max(1, 2 * rows))) if own else 12,
        **(dict(objective="outsider", attribution_tokens=1024) if own else {}),
        **(dict(dtype="bfloat16") if own and size > 5e7 and fast_bfloat16() else {}),
        **{method: dict(lr=lr * x) for method, x in factor.items()})


def fast_bfloat16() -> bool:
    """Does a CPU multiply bfloat16 faster than float32? Only Linux tells."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return bool(re.search(r"avx512_bf16|amx_bf16", flags))


def count_weights(folder: Path) -> int:
    """Weights of the model in a folder; 0 where it is not here yet."""
    if not (folder / "config.json").is_file():
        return 0
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(checkpoint.read_config(folder)).parameters())


def own_template(folder: Path, benchmark: str) -> str:
    """The model's own chat template where it has one, else qa; LUME's rows are continuations."""
    if benchmark == "lume":
        return "raw"
    names = folder / "tokenizer_config.json"
    own = read_json(names) if names.is_file() else {}
    chat = (folder / "chat_template.jinja").is_file() or (
        isinstance(own, dict) and own.get("chat_template"))
    return "chat" if chat else "qa"


def own_defaults(base: Settings) -> dict:
    """own_recipe of a run's model, wherever it lies already."""
    given = base.weights or base.model
    folders = [base.run / "original", *([] if given.startswith("hf:") else [Path(given)])]
    folder = next((f for f in folders if (f / "config.json").is_file()), folders[-1])
    rows = len(data.load_rows(base.forget)) if base.forget else 400
    return for_method(own_recipe(base.benchmark, folder, rows), base.method)


def resolve(given: dict) -> Settings:
    """Settings from defaults, then the cell's recipe for the method, then what was given: first by
    `config`, the settings.json of a run, then by name."""
    if config := given.get("config"):
        given = {k: v for k, v in given.items() if k != "config"}
        given = given_to(config, given) | given
    for place in PLACES:  # a run must be readable from any folder
        if given.get(place) and not given[place].startswith("hf:"):
            given = given | {place: absolute(given[place])}
    encoder = given.get("encoder", "")  # a folder, or a name on the hub
    if encoder.startswith(("~", ".", "/")) or encoder and Path(encoder).is_dir():
        given = given | dict(encoder=absolute(encoder))
    base = Settings(**{k: given[k] for k in (
        "benchmark", "model", "method", "out", "weights", "forget") if k in given})
    own = base.benchmark == "rows" or base.model not in MODELS
    if own and not base.model.startswith("hf:") and base.model not in MODELS:
        given = given | dict(model=absolute(base.model))
        if not base.weights and not Path(given["model"]).is_dir():
            raise UserError(f"MODEL {base.model} is no name of the table ({', '.join(MODELS)}), no "
                            "folder, and not hf:OWNER/NAME[@REVISION]")
        base = replace(base, model=given["model"])
    recipe = (own_defaults(base) if own else
              cell_defaults(base.benchmark, base.model, base.method))
    values = recipe | given
    if base.benchmark not in ("demo", "rows") and not values.get("data"):
        folder = os.environ.get("SIMU_DATA")
        values["data"] = absolute(folder, "SIMU_DATA") if folder else default_data()
    s = Settings(**values)
    s = replace(s, **auto_passes(recipe, given, is_on_gpu(s) and not s.tiny))
    check_folders(s, s.weights or (s.model if own else ""))
    return s


def given_to(config: Path, given: dict) -> dict:
    """What the run of a settings.json was given beside its recipe: so that another method has that
    method's own rate, unless the run was given one. Where it lay and its names are not taken."""
    if not config.is_file():
        raise UserError(f"--config {config} is no file; name the settings.json of a run")
    told = vars(settings_of(read_json(config), config))
    for name in ("benchmark", "model"):
        own = given[name] if name == "benchmark" or given[name] in MODELS or \
            given[name].startswith("hf:") else absolute(given[name])
        if own != told[name]:
            raise UserError(f"--config {config} is of {name} {told[name]}, not {given[name]}; name "
                            "another file, or that")
    recipe = vars(resolve({k: told[k] for k in (
        "benchmark", "model", "method", "weights", "forget") if told[k]}))
    return {k: v for k, v in told.items()
            if v != recipe[k] and k not in ("out", "name", "method", "force")}
def auto_passes(recipe: dict, given: dict, on_gpu: bool) -> dict:
    """Tokens of a pass that nobody gave, or gave as AUTO. On a GPU they stay AUTO: a stage sees to
    its memory (plan.fit_memory). On a CPU, where a pass's size decides bits and hardly time, they
    are the recipe's."""
    plain = {name: AUTO if on_gpu else recipe.get(name, Settings.__dataclass_fields__[name].default)
             for name in ("micro_tokens", "learn_tokens")}
    return {name: tokens for name, tokens in plain.items() if given.get(name, AUTO) == AUTO}


PLACES = ("data", "weights", "out", "forget", "retain", "unseen", "retain_only")


def absolute(path: str, name: str = "") -> str:
    """The whole path of what the option or variable `name` holds."""
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:  # ~nosuchuser
        raise UserError(f"{name and name + ' is '}{path}: there is no such user here; give the "
                        "folder's whole path") from None


def check_folders(s: Settings, weights: str):
    """UserError, before anything is made, for a folder that would be found wrong only after it."""
    downloads()  # SIMU_DOWNLOADS too
    if Path(s.encoder).is_absolute() and not Path(s.encoder).is_dir():
        raise UserError(f"--encoder {s.encoder} is not a folder; name one that is there")
    for folder, pattern in ((s.data and Path(s.data, s.layout), "**/*.json*"),
                            (s.encoder, "**/*"), (s.retain_only, "*"), (weights, "*")):
        if folder:
            check_names(Path(folder).glob(pattern))


def check_names(paths):
    """UserError if one of these has a name that the JSON of a run cannot hold."""
    for path in paths:
        if NO_TEXT.search(str(path)):
            raise UserError(f"the name of the file {str(path)!r} is not UTF-8 text; rename it, or "
                            "move it elsewhere")


def read_settings(run: Path) -> Settings:
    """The settings of a run, as its last `original` stage resolved them. What an older version did
    not know has its default."""
    path = Path(run) / "settings.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: {run} is not a run folder; run `bash run.sh demo` or "
                        "`python -m pipeline original` first")
    check_names(path.parent.glob("*"))
    return settings_of(read_json(path), path, out=str(run))


def settings_of(values, path: Path, **changed) -> Settings:
    """Settings from what a file of ours says of them; UserError names the file."""
    known = {f.name: f.type for f in fields(Settings)}
    named = {"benchmark", "model", "seed"}  # without which it is no run's
    if not isinstance(values, dict) or not named <= set(values) <= set(known) or not all(
            type(values[k]) in (known[k], int if known[k] is float else known[k]) for k in values):
        raise UserError(f"{path} does not hold the settings of a run of this version; run "
                        "`python -m pipeline original` again")
    try:
        return Settings(**values | changed)
    except UserError as e:
        raise UserError(f"{path}: {e}; run `python -m pipeline original` again") from None


# ------------------------------------------------------------------------------ where to compute


def choose_device(s: Settings) -> torch.device:
    if s.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; check the driver, or use --device cpu")
    if is_on_gpu(s):
        # cuDNN's attention makes a plan, up to 40 ms, for every shape; ours hardly ever repeat.
        torch.backends.cuda.enable_cudnn_sdp(False)
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

    def __init__(self, **given):
        super().__init__(**{"allow_abbrev": False} | given)
        for kind in (int, float):
            self.register("type", kind, number(kind))

    def error(self, message):
        raise UserError(f"{message}; see: {self.prog} --help")


def number(kind):
    """int or float from plain digits: Python's own also take 1_0, and digits of other scripts."""
    def read(text: str):
        if not re.fullmatch(r"[\w.+-]+", text, re.A) or "_" in text:
            raise ValueError
        return kind(text)
    return read


# What own_recipe sets, in words, and the options that matter most where rows are one's own.
OWN_DEFAULTS = dict(
    objective="outsider", epochs=f"as many as {UPDATES} updates take, at least 5; it ends where "
    "the rows are forgotten", lr="by size: 8e-4 at 1.5 million weights, 5e-6 at 7 billion",
    batch="4; 16 from 100 rows on", template="chat where the model has a template of its own, "
    "else qa", max_new_tokens=256, max_total_tokens=0, level_share=0.5, threshold=0.3,
    learn_lr="as --lr",
    learn_batch=8, learn_tokens=1024, learn_decay=0.01, attribution_tokens=1024,
    micro_tokens="8192; 1024 from 50 million weights on",
    learn_epochs=f"12, or as many as {LEARNING} updates take")
OWN_FIRST = ("unseen", "teach", "epochs", "lr", "level", "template")


def add_options(to: argparse.ArgumentParser, *, skip: tuple = (), own: bool = False):
    """One option per settings field; an absent one stays absent, so that recipes can fill it. own:
    in groups, those that matter on rows of one's own first, with the defaults that they have."""
    groups = {}
    if own:
        first = to.add_argument_group("what matters on rows of your own")
        parts = dict(run=Settings, benchmarks=slices.Slice, teaching=Making,
                     attribution=simu.Attribution, mask=simu.Masking,
                     unlearning=objectives.Unlearning, level=Level, evaluation=Judging,
                     place=Placement)
        made = {name: to.add_argument_group(name) for name in parts}
        for name, part in parts.items():
            groups |= {f.name: made[name] for f in fields(part)}
        groups |= dict.fromkeys(OWN_FIRST, first)
    for f in sorted(fields(Settings), key=lambda f: f.name not in OWN_FIRST):
        if f.name in skip:
            continue
        place, choices = groups.get(f.name, to), tuple(f.metadata["choices"])
        effect = f.metadata["effect"]
        if f.name == "objective":
            effect += ": " + "; ".join(f"{k}: {v.about}" for k, v in simu.OBJECTIVES.items())
        effect = effect.replace("%", "%%")
        if f.type is bool:
            place.add_argument(flag(f.name), help=effect, default=argparse.SUPPRESS,
                               action=argparse.BooleanOptionalAction)
        else:
            default = repr(f.default)
            if own and f.name in OWN_DEFAULTS:
                default = str(OWN_DEFAULTS[f.name])
            shown = f"{effect} (default {default})"
            place.add_argument(
                flag(f.name), type=f.type, help=shown, default=argparse.SUPPRESS,
                choices=choices or None, metavar=None if choices else f.type.__name__.upper())
