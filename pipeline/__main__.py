"""The command line: `python -m pipeline run demo|tofu|lume|unlearn ...`, all stages of a run in
order; `python -m pipeline COMMAND ...`, one of them."""

import argparse
import importlib
import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

if not __package__:  # run.sh starts this folder, and no module of the caller's may be imported
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Before torch, because importing the package silences a warning of torch's import.
from pipeline import evaluate, hub, own_rows, plan, report, settings, workers
from pipeline.original import original_stage
from pipeline.stage import finished_models, lock, run_cli
from pipeline.stages import attribute_stage, mask_stage, unlearn_stage
from model import UserError
import simu

# ------------------------------------------------------------------ a run: its stages, in order


def stages_of(options: dict, models: list[dict]) -> list[list[str]]:
    """The stages of one seed, in order, each as words of a command line. models: settings of each
    model to unlearn."""
    at, run = words_of(options), options["out"]
    stages = [["original", *at], ["check", run], ["attribute", *at], ["mask", *at]]
    if options["model"] in settings.TINY_MODELS:  # all at once
        stages.append(["unlearn", *at, "--each", *(":".join(model.values()) for model in models)])
    else:  # one at a time fits
        stages += [["unlearn", *at, *words_of(model)] for model in models]
    return [*stages, ["evaluate", run, *(["--force"] if options.get("force") else [])]]


def models_of(kind: str, methods: list[str] | None, objectives: list[str] | None) -> list[dict]:
    """The settings of each model that `run KIND` unlearns."""
    if kind == "unlearn" and max(len(methods or ()), len(objectives or ())) > 1:
        raise UserError("rows of your own are forgotten by one model: name one method and one "
                        "objective")
    if kind == "unlearn" and not objectives:  # its recipe names the objective
        return [dict(method=methods[0] if methods else "simu")]
    models = [dict(method=method, objective=objective)
              for method in methods or (["simu"] if kind == "unlearn" else ["fo", "so", "simu"])
              for objective in objectives or ["graddiff"]]
    if kind == "demo" and not objectives:  # beside the paper's
        models.append(dict(method="simu", objective="stranger"))
    return models


def run_command(kind: str, methods, objectives, seeds: int, attack: bool, dry_run: bool, **options):
    """All stages of a run, in order."""
    if not 1 <= seeds < 10_000:
        raise UserError(f"--seeds is {seeds}; it must be 1 to 9999")
    if seeds > 1 and "seed" in options:
        raise UserError(f"--seeds {seeds} chooses the seeds 0 to {seeds - 1}; drop --seed")
    named = dict(benchmark="rows", name="model") if kind == "unlearn" else dict(benchmark=kind)
    # Not by argparse, which takes the value of an option that it does not know for MODEL.
    options = named | options | dict(model=settings.model_at(options["model"]))
    models, s = models_of(kind, methods, objectives), settings.resolve(options)
    stages = stages_of(options | dict(out=str(s.run)), models)
    for seed in range(1, seeds):
        stages += stages_of(options | dict(out=f"{s.run}-seed{seed}", seed=seed), models)
    stages += [["attack", str(s.run)]] if attack else []
    # The verdict, which writes the report, ends with status 3 where the rows are not forgotten.
    stages.append(["verdict" if kind == "unlearn" else "report", str(s.run)])
    if dry_run:
        hub.files_command(s)
        plan.plan_command(s)
        for words in stages:
            print(shlex.join(["python", "-m", "pipeline", *words]))
        return
    for words in stages:
        if s.tiny:  # one process for all: each would import torch for longer than it computes
            main(words)
        else:
            run_alone(words)


def run_alone(words: list[str]):
    """A stage as a process, which gives the memory of a large model back."""
    child = subprocess.Popen([sys.executable, str(settings.HERE / "pipeline"), *words])
    # Ctrl-C reaches the child too, which then ends with a line; clusters send SIGTERM to us alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    status = child.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if status < 0:
        raise UserError(f"the system ended `{words[0]}` by signal {-status}, most likely for want "
                        "of memory; free some, and the same command goes on from where it was")
    if status:
        sys.exit(status)


def words_of(options: dict) -> list[str]:
    """Settings as words of a command line: benchmark and model, where they are named, first."""
    words = [options[name] for name in ("benchmark", "model") if name in options]
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(settings.flag(name if value else f"no_{name}"))
        elif name not in ("benchmark", "model"):
            words.append(f"{settings.flag(name)}={value}")
    return words


# ---------------------------------------------------------------------------------- one command


def check_command(run: Path):
    """Evaluate the original; stop unless it knows the forget set (--must-know)."""
    evaluate.evaluate(run, "original")
    report.check_original(run)


def evaluate_command(run: Path, stages: list[str], limit: int, force: bool):
    """Ask models of a run, and keep what they say."""
    if not 0 <= limit < settings.LIMIT:
        raise UserError(f"--limit is {limit}; it must be 0 (all rows) or more, and below 2**31")
    stages = stages or finished_models(run)
    if not stages:
        raise UserError(f"{run} holds no finished model; `bash run.sh demo` makes one")
    with lock(run):
        for name in stages:
            evaluate.evaluate(run, name, limit=limit, force=force)


STAGES = {"files": hub.files_command, "plan": plan.plan_command, "original": original_stage,
          "attribute": attribute_stage, "mask": mask_stage, "unlearn": unlearn_stage}
OF_RUNS = {"check": check_command, "evaluate": evaluate_command, "report": report.report,
           "verdict": report.verdict_command}
STUDIES = dict(attack="what of a run stays forgotten under attack",
               sweep="every method over learning rates and seeds",
               figures="figures of finished sweeps and runs", depth="how deep forgetting goes")


def main(words: list[str]):
    """Run one command."""
    if words and words[0] in STUDIES:
        return importlib.import_module(f"studies.{words[0]}").main(words[1:])
    options = vars(parser_of_commands().parse_args(words))
    command, each = options.pop("command"), options.pop("each", None)
    if command == "run":
        run_command(**options)
    elif command in OF_RUNS:
        OF_RUNS[command](**options)
    elif each:
        workers.unlearn_each(options, each)
    else:
        s = settings.resolve(options)
        reads = command in ("plan", "files")
        with nullcontext() if reads else lock(s.run, new=command == "original"):
            STAGES[command](s)


UNLEARN = """\
Forgets the rows of FORGET, keeps those of RETAIN, and says whether they are forgotten: status 0, or
status 3 and what to change. The defaults below are a benchmark's: for your rows the rate, the
epochs, the batch and more follow from the model's size and the number of rows.

""" + own_rows.DEFINITION


@lru_cache  # each stage of a tiny model asks for it
def parser_of_commands() -> settings.Parser:
    parser = settings.Parser(prog="python -m pipeline", description="All stages of a run, or one "
                             "of them; a finished stage is skipped, a killed one goes on.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    kinds = commands.add_parser("run", help=run_command.__doc__).add_subparsers(
        dest="kind", required=True, metavar="demo|tofu|lume|unlearn")
    for kind, words in dict(demo="[MODEL]", tofu="MODEL", lume="MODEL",
                            unlearn="MODEL FORGET [RETAIN]").items():
        add_run(kinds.add_parser(kind, prog=f"bash run.sh {kind}",
                                 usage=f"%(prog)s {words} [--option value ...]",
                                 formatter_class=argparse.RawDescriptionHelpFormatter,
                                 description=UNLEARN if kind == "unlearn" else None), kind)
    for name, function in STAGES.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.add_argument("benchmark", choices=settings.BENCHMARKS)
        command.add_argument("model", type=settings.model_at)
        if name == "unlearn":
            command.add_argument("--each", nargs="+", metavar="METHOD:OBJECTIVE", help="several "
                                 "models at once, each evaluated as soon as it is finished")
        settings.add_options(command, skip=("benchmark", "model"))
    for name, function in OF_RUNS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.add_argument("run", type=Path)
        if name == "evaluate":
            command.add_argument("stages", nargs="*", metavar="STAGE", help="e.g. original "
                                 "simu-graddiff; default: every model of the run")
            command.add_argument("--limit", type=int, default=0, help="at most so many rows of "
                                 "each split: a quick look, marked as partial")
            command.add_argument("--force", action="store_true", help="ask again")
        if name == "report":
            command.add_argument("--retain-only", type=Path, metavar="STAGE_FOLDER", help="an "
                                 "evaluated model that never saw the forget set; default: RUN's")
    for name, about in STUDIES.items():
        commands.add_parser(name, help=about, add_help=False)
    return parser


def add_run(run: settings.Parser, kind: str):
    """The options of `run KIND`."""
    optional = dict(nargs="?", default="tiny-llama") if kind == "demo" else {}
    run.add_argument("model", help="a folder in Hugging Face layout, hf:OWNER/NAME[@REVISION], or "
                     f"{', '.join(settings.MODELS)}", **optional)
    if kind == "unlearn":
        run.add_argument("forget", metavar="FORGET", type=settings.path_at,
                         help="file of the rows to forget")
        run.add_argument("retain", metavar="RETAIN", type=settings.path_at, nargs="?",
                         default=argparse.SUPPRESS, help="file of the rows to keep")
    run.add_argument("--methods", "--method", nargs="+", choices=simu.METHODS)
    run.add_argument("--objectives", "--objective", nargs="+", choices=simu.OBJECTIVES)
    run.add_argument("--seeds", type=int, default=1, help="run seeds 0 to N-1")
    run.add_argument("--attack", action="store_true", help="and attack the models")
    run.add_argument("--dry-run", action="store_true", help="print the files to fetch, the memory "
                     "that is needed and the stages; do nothing")
    settings.add_options(run, skip=("benchmark", "model", "method", "objective"))


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
