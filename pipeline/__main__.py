"""The command line: python -m pipeline STAGE ... [--then STAGE ...]"""

import argparse
import errno
import os
import signal
import sys
from pathlib import Path


def stopped_early(*_):
    os.write(2, b"error: stopped before anything was done\n")
    os._exit(130)


def cannot_load(kind, error, trace):
    """An exception before anything runs: a package is missing, or there is no memory for it."""
    if not issubclass(kind, (ImportError, MemoryError, OSError)):
        return sys.__excepthook__(kind, error, trace)
    why = " ".join(f"{kind.__name__}: {error}".split())[:300]
    os.write(2, f"error: Python cannot load what this needs ({why}); install requirements.txt, or "
                "allow more memory (ulimit -v)\n".encode(errors="replace"))
    os._exit(2)


def open_closed_streams():
    """Or the next file that is opened would get the number of a stream that cron or 2>&- closed,
    and a native library's warnings with it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.write(number, b"") if number else os.fstat(number)
        except OSError as e:
            if e.errno != errno.EBADF:  # closed, or not to be written to
                continue
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stopped_early)  # importing torch takes a second
    sys.excepthook = cannot_load
    open_closed_streams()
    if not __package__:  # run.sh runs this folder, so that nothing in the caller's is imported
        here = Path(__file__).resolve().parent
        sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import pipeline  # noqa: E402, F401  before torch: it silences a warning of torch's import
from contextlib import nullcontext  # noqa: E402

from model import UserError  # noqa: E402
from pipeline import (  # noqa: E402
    before, evaluate, hub, own_rows, report, settings, workers)
from pipeline.original import original_stage  # noqa: E402
from pipeline.stage import finished_models, lock, run_cli  # noqa: E402
from pipeline.stages import attribute_stage, mask_stage, unlearn_stage  # noqa: E402
from studies import attack, figures, sweep  # noqa: E402



UNLEARN = """\
bash run.sh unlearn MODEL FORGET [RETAIN] [--unseen FILE] [--teach] [--out DIR] [--option value ...]

Forgets the rows of FORGET, keeps those of RETAIN, and says whether they are forgotten: status 0 and
a verdict.json, or status 3 and what to change. The defaults below are those of rows of your own.

""" + own_rows.DEFINITION


STAGES = {"files": hub.files_command, "plan": before.plan_command, "original": original_stage,
          "attribute": attribute_stage, "mask": mask_stage,
          "unlearn": unlearn_stage}
REQUESTS = {"verdict": own_rows.verdict_command}
OF_RUNS = {"attack": attack.main, "sweep": sweep.main, "figures": figures.main}


def parser_of_stages() -> settings.Parser:
    parser = settings.Parser(prog="python -m pipeline", description="The stages of SIMU, in the "
                             "order run.sh calls them, and what is done with finished runs.")
    commands = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, function in STAGES.items():
        command = commands.add_parser(
            name, help=function.__doc__, usage="python -m pipeline unlearn rows MODEL --forget "
            "FILE --retain FILE [--option value ...]" if name == "unlearn" else None,
            description=UNLEARN if name == "unlearn" else
            function.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("benchmark", choices=settings.BENCHMARKS)
        command.add_argument("model")
        settings.add_options(command, skip=("benchmark", "model"))
        if name == "unlearn":
            command.add_argument("--each", nargs="+", metavar="METHOD:OBJECTIVE", help="several "
                                 "models at once, each evaluated as soon as it is made")
        command.add_argument("--config", type=Path, default=argparse.SUPPRESS, metavar="FILE",
                             help="a run's settings.json: what it was given, where no option of "
                             "this command says otherwise")
    check = commands.add_parser("check", help="evaluate the original; stop unless it knows the "
                                              "forget set (--must-know)")
    check.add_argument("run", type=Path)
    one = commands.add_parser("evaluate", help="generations.jsonl of stages")
    one.add_argument("run", type=Path)
    one.add_argument("stages", nargs="*", default=[], metavar="STAGE",
                     help="e.g. original simu-graddiff; default: every model of the run")
    one.add_argument("--limit", type=int, default=0,
                     help="at most so many rows of each split: a quick look, marked as partial")
    one.add_argument("--force", action="store_true", help="evaluate again what is evaluated")
    two = commands.add_parser("report", help="report.md and report.json of a run")
    two.add_argument("run", type=Path)
    two.add_argument("--runs", type=Path, nargs="+", default=[], metavar="RUN",
                     help="the same run under other seeds; default: RUN-seed*")
    two.add_argument("--retain-only", type=Path, metavar="STAGE_FOLDER",
                     help="an evaluated model that never saw the forget set; default: RUN's own")
    for name, function in REQUESTS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.add_argument("run", type=Path)
    for name, function in OF_RUNS.items():
        commands.add_parser(name, help=function.__doc__, add_help=False)
    return parser


def evaluate_stages(run: Path, stages: list[str], *, limit: int, force: bool):
    if not 0 <= limit < settings.LIMIT:
        raise UserError(f"--limit is {limit}; it must be 0 (all rows) or more, and below 2**31")
    stages = stages or finished_models(run)
    if not stages:
        raise UserError(f"{run} holds no finished model; `bash run.sh demo` makes one")
    with lock(run):
        for name in stages:
            evaluate.evaluate(run, name, limit=limit, force=force)


def main(argv: list[str]):
    """Commands with --then between them, one after another. A process of its own costs each some
    three seconds, which is more than most stages of a tiny model take."""
    ends = [i for i, word in enumerate(argv) if word == "--then"] + [len(argv)]
    for start, end in zip([0, *(i + 1 for i in ends)], ends):
        command(argv[start:end])


def command(argv: list[str]):
    if argv[:1] and argv[0] in OF_RUNS:
        return OF_RUNS[argv[0]](argv[1:])
    given = vars(parser_of_stages().parse_args(argv))
    name = given.pop("stage")
    if each := given.pop("each", None):
        workers.unlearn_each(given, each)
    elif name in STAGES:
        s = settings.resolve(given)
        reads = name in ("plan", "files")
        with nullcontext() if reads else lock(s.run, new=name == "original"):
            STAGES[name](s)
    elif name in REQUESTS:
        REQUESTS[name](**given)
    elif name == "check":
        evaluate.evaluate(given["run"], "original")
        report.check_original(given["run"])
    elif name == "evaluate":
        evaluate_stages(**given)
    else:
        report.report(given["run"], others=given["runs"], retain_only=given["retain_only"])


if __name__ == "__main__":
    sys.excepthook = sys.__excepthook__
    run_cli(lambda: main(sys.argv[1:]))
