"""Kills a micro run of the whole pipeline with SIGKILL, again and again, lets the same command go
on, and compares what it ends with, byte for byte, with what an undisturbed run made.

    python tests/kill.py [RUNS | --short]    default 30 runs, each killed twice

A kill comes before a random operation on the run's files (open to write, rename, remove, make or
empty a folder), and never by the clock: how fast a machine is decides nothing. As every update
writes a line of a log or a checkpoint, all of a run is met. A process that had less to do than that
many operations just ends.

Compared: every file of the run. Wall times and memory differ from run to run, so these and nothing
else are left out: `seconds` and `peak_*` in stage.json, and the table "Time and memory" in
report.md. A file too many or too few counts as a difference.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import world  # noqa: E402
import torch._dynamo  # noqa: E402, F401  attribution loads it: here once, not in every fork

from pipeline.__main__ import main as command_line  # noqa: E402

SIZE = ("--data {data} --width 64 --depth 2 --vocab 400 --context 96 --max-total-tokens 40 "
        "--max-new-tokens 12 --rows-per-author 1 --steps 2 --learn-epochs 8 --light-epochs 4 "
        "--attribution-tokens 100 --learn-batch 4 --learn-state bfloat16 --batch 2 "
        "--resume-cost 1")
STAGES = ("original", "attribute", "mask --mask soft",
          "unlearn --method so --objective npo --epochs 8 --state bfloat16",
          "unlearn --method simu --mask soft --epochs 6")
SHORT = ("original", "attribute", "mask", "unlearn --method simu --epochs 4")
REMOVES = {"os.remove", "os.rmdir"}
TOUCHES = REMOVES | {"os.rename", "os.mkdir", "os.truncate", "shutil.rmtree"}


def make_runs(folder: Path, short: bool):
    """A run; unless short also its attacks and report, and a sweep."""
    run, size = str(folder / "run"), SIZE.format(data=folder.parent / "data").split()
    for stage in SHORT if short else STAGES:
        name, *options = stage.split()
        command_line([name, "tofu", "tiny-llama", "--out", run, *size, *options])
    if short:
        return
    command_line(["evaluate", run, "original", "simu-soft-graddiff"])
    command_line(["attack", run, "simu-soft-graddiff"])
    command_line(["report", run])
    grid = "--seeds 1 --jobs 1 --arms fo simu --factors 1 --no-variants --epochs 4".split()
    command_line(["sweep", "tofu", "tiny-llama", "--out", str(folder / "sweep"), *size, *grid])


def die_at(operation: int, folder: Path) -> list[int]:
    """Have SIGKILL end this process before an operation on a folder's files, by its number (0:
    never). Returns a list whose only item counts them."""
    count = [0]

    def hook(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (
            os.O_WRONLY | os.O_RDWR)
        # Inside rmtree names are bare, and a folder is open.
        inside = args and (str(args[0]).startswith(str(folder))
                           or event in REMOVES and args[-1] != -1)
        if inside and (writes or event in TOUCHES):
            count[0] += 1
            if count[0] == operation:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return count


def run_child(folder: Path, short: bool, operation: int = 0) -> bool:
    """Make the runs in a fork, so that torch is imported once only. Was it ended by SIGKILL? If
    not, the file `operations` counts its operations."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            count = die_at(operation, folder)
            with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                make_runs(folder, short)
            (folder.parent / "operations").write_text(str(count[0]))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if status and not killed:
        raise SystemExit("the pipeline failed")
    return killed


def snapshot(folder: Path) -> dict[str, object]:
    """Every file's bytes, without wall times and memory."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.name == "stage.json":
            content = {k: v for k, v in json.loads(content).items()
                       if k != "seconds" and not k.startswith("peak_")}
        if path.name == "report.md":
            content = re.sub(rb"## Time and memory\n.*?\n(?=## )", b"", content, flags=re.S)
        files[str(path.relative_to(folder))] = content
    return files


def main():
    short, rng, good, kills = sys.argv[1:] == ["--short"], random.Random(0), 0, 0
    count = 1 if short else int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "killed"
        world.make_data(Path(home))
        run_child(folder, short)
        expected, operations = snapshot(folder), int((folder.parent / "operations").read_text())
        print(f"undisturbed: {operations} operations on files")
        for number in range(1, count + 1):
            shutil.rmtree(folder)
            for most in (operations, max(1, operations // 3)):  # a fresh run, and the next
                kills += run_child(folder, short, rng.randint(1, most))
            run_child(folder, short)
            result = snapshot(folder)
            differ = [name for name in expected | result
                      if expected.get(name) != result.get(name)]
            good += not differ
            print(f"{number:3}  " + " ".join(["DIFFERENT:", *differ] if differ else ["same bytes"]))
    print(f"{len(expected)} files equal after {kills} kills: {good} of {count} runs")
    sys.exit(good != count)


if __name__ == "__main__":
    main()
