"""Kills a micro run of the whole pipeline with SIGKILL, again and again, lets the same command go
on, and compares what it ends with, byte for byte, with what an undisturbed run made.

    python tests/kill.py [RUNS | --short]    default 30; also measures what going on costs

Each of the runs is killed twice. Once on the clock: at a random moment of one stage, every stage in
turn, by the durations of the undisturbed run. Once at a random file operation (open to write,
rename, remove, make or empty a folder): there lie the few microseconds in which a stage's end can
be torn, which a clock would never hit. Odd runs are killed the other way round. After that the
command runs to its end.

Compared: every file of the run. Wall times and memory differ from run to run, so these and nothing
else are left out: `seconds`, `spent` and `peak_*` in stage.json and in report.json's costs,
`seconds` in points.jsonl, the digests of those lines and files of themselves, the dates of files in
stage.json, and the rows of the table "Time and memory" in report.md. A file too many or too few
counts as a difference.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fuzz  # noqa: E402
import torch._dynamo  # noqa: E402, F401  attribution loads it: here once, not in every fork

import simu  # noqa: E402
from pipeline import resume  # noqa: E402
from pipeline.__main__ import main as command_line  # noqa: E402

SIZE = ("--data {data} --width 64 --depth 2 --vocab 400 --context 96 --max-total-tokens 40 "
        "--max-new-tokens 12 --rows-per-author 1 --steps 2 --learn-epochs 8 --light-epochs 4 "
        "--attribution-tokens 100 --learn-batch 4 --learn-state bfloat16 --batch 2 "
        "--resume-cost 0.2")
COMMANDS = ("original", "attribute", "mask --mask soft",
            "unlearn --method so --objective npo --epochs 8 --state bfloat16",
            "unlearn --method simu --mask soft --epochs 6")
SHORT = ("original", "attribute", "mask", "unlearn --method simu --epochs 16")
EMPTIES = {"os.remove", "os.rmdir"}
TOUCHES = EMPTIES | {"os.rename", "os.mkdir", "os.truncate", "shutil.rmtree"}
MADE = re.compile(r"\[([\w/-]+)\] ([\d.]+ s,|already)")


def stages(run: Path, benchmark: str, size: list[str], commands):
    for command in commands:
        name, *options = command.split()
        command_line([name, benchmark, "tiny-llama", "--out", str(run), *size, *options])


def micro(folder: Path) -> list[str]:
    """SIZE, with the data beside the folder that is killed in."""
    return SIZE.format(data=folder.parent / "data").split()


def pipeline(folder: Path):
    """What run.sh does, in this process: a run, its attacks, and a sweep."""
    run, sweep = str(folder / "run"), str(folder / "sweep")
    stages(folder / "run", "tofu", micro(folder), COMMANDS)
    command_line(["evaluate", run, "original", "simu-soft-graddiff"])
    command_line(["attack", run, "simu-soft-graddiff"])
    command_line(["report", run])  # last: it tells of all there is, also of attacks made before
    command_line(["sweep", "tofu", "tiny-llama", "--out", sweep, *micro(folder), "--seeds", "1",
                  *"--jobs 1 --arms fo simu --factors 1 --no-variants --epochs 4".split()])


def short_pipeline(run: Path):
    stages(run, "tofu", micro(run), SHORT)


def die_at(operation: int, run: Path) -> list[int]:
    """Have SIGKILL end this process before its so-manieth operation on the run's files (0: never).
    Returns a list whose only item counts them."""
    count = [0]

    def hook(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (
            os.O_WRONLY | os.O_RDWR)
        # Inside rmtree names are bare, and a folder is open.
        ours = args and (str(args[0]).startswith(str(run)) or event in EMPTIES and args[-1] != -1)
        if ours and (writes or event in TOUCHES):
            count[0] += 1
            if count[0] == operation:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return count


class Child:
    """A process that runs the pipeline, forked so that torch is imported once only. `lines` gives
    what it prints."""

    def __init__(self, work, run: Path, *, operation: int = 0):
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(write, 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            status, operations = 1, die_at(operation, run)
            try:
                work(run)
                print("operations", operations[0])
                status = 0
            except BaseException:
                traceback.print_exc(file=sys.stdout)
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(write)
        self.lines, self.told = os.fdopen(read, encoding="utf-8"), []

    def read(self, stages: int = -1):
        """Lines until so many stages are made or skipped; -1: until the process ends."""
        while stages and (line := self.lines.readline()):
            self.told.append(line.rstrip())
            stages -= bool(MADE.match(line))

    def end(self, *, kill: bool = False) -> bool:
        """Whether SIGKILL ended it (its own or ours)."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        self.read()
        self.lines.close()
        _, status = os.waitpid(self.pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and status:
            raise SystemExit("the pipeline failed:\n" + "\n".join(self.told[-5:]))
        return killed

    @property
    def made(self) -> list[str]:
        return [m[1] for line in self.told if (m := MADE.match(line))]


def undisturbed(work, run: Path):
    """Stages in order, the seconds each took, and the file operations of a whole run."""
    child, names, seconds, start = Child(work, run), [], [], time.monotonic()
    while True:
        child.read(1)
        seconds.append(time.monotonic() - start - sum(seconds))
        if child.made == names:  # the process has ended: that was all after the last stage
            break
        names = child.made
    child.end()
    return [*names, "sweep"], seconds, int(child.told[-1].split()[1])


def snapshot(run: Path) -> dict[str, object]:
    """Every file's bytes, without wall times and memory."""
    files = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.name in ("stage.json", "report.json"):
            content = json.loads(content)
            content.pop("sha256", None)  # of the file's own content, wall times included
            for part in content.get("costs", [content]):
                for key in [k for k in part if k in ("seconds", "spent") or k.startswith("peak_")]:
                    del part[key]
            for sealed in content.get("files", {}).values() if path.name == "stage.json" else ():
                del sealed[2]  # when the file was written
        if path.name == "points.jsonl":
            content = [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "digest")}
                       for line in content.splitlines()]
        if path.name == "report.md":
            content = re.sub(rb"## Time and memory\n.*?\n(?=## )", b"", content, flags=re.S)
        files[str(path.relative_to(run))] = content
    return files


def differences(a: dict, b: dict) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def disturb(work, run: Path, number: int, names, seconds, operations, rng):
    """Kill a fresh run, and the one that goes on from it, and let the next finish. Returns where
    the kills came, and what later processes said of going on."""
    hits, on, left = [], [], 1.0
    for way in ("clock", "operation")[::1 if number % 2 == 0 else -1]:
        if way == "clock":
            child, target = Child(work, run), number % len(names)
            child.read(target)
            time.sleep(rng.random() * seconds[target])
        else:
            child = Child(work, run, operation=rng.randint(1, max(1, int(operations * left))))
        if child.end(kill=way == "clock"):
            hits.append((way, names[len(child.made)]))
        left = 0.5 * (1 - len(child.made) / len(names))  # so that most second kills come
        on += [line for line in child.told if " goes on " in line]
    last = Child(work, run)
    last.end()
    return hits, on + [line for line in last.told if " goes on " in line]


# ------------------------------------------------------------------------------- what it costs

COST = ("demo", ["--learn-epochs", "10"], ("original",))  # retain-only at the demo's own size


def timed_stage(run: Path):
    """The first stage, telling of each update and of the seconds each checkpoint took."""
    apply_updates, keep = simu.apply_updates, resume.Checkpoints.keep

    def told_update(*a, **k):
        out = apply_updates(*a, **k)
        print("update")
        return out

    def told_keep(self, step):
        start, newest = time.monotonic(), self.newest
        keep(self, step)
        if self.newest != newest:
            print("kept", time.monotonic() - start)

    simu.apply_updates, resume.Checkpoints.keep = told_update, told_keep
    stages(run, *COST)


def measure(run: Path, stops: list[int]):
    """A stage killed after so many updates have been made in all: its seconds, the updates made,
    the seconds of each checkpoint, and the seconds up to the first update of each process."""
    shutil.rmtree(run, ignore_errors=True)
    begin, updates, kept, starts = time.monotonic(), 0, [], []
    for stop in [*stops, None]:
        child, start, waiting = Child(timed_stage, run), time.monotonic(), True
        while updates != stop and not (line := child.lines.readline()).startswith("[retain-only]"):
            updates += line == "update\n"
            if line.startswith("kept"):
                kept.append(float(line.split()[1]))
            if waiting and line == "update\n":
                starts.append(time.monotonic() - start)
                waiting = False
        child.end(kill=True)
    return time.monotonic() - begin, updates, kept, starts


def cost(run: Path, rng, kills: int = 3):
    whole, needed, kept, first = measure(run, [])
    print(f"\nretain-only of the demo, {needed} updates, default --resume-cost: {whole:.1f} s, of "
          f"which {len(kept)} checkpoints took {sum(kept):.2f} s ({sum(kept) / whole:.1%})")
    each = (whole - sum(kept) - first[0]) / needed
    _, made, kept, starts = measure(run, sorted(rng.sample(range(1, needed), kills)))
    again = (made - needed) * each
    print(f"killed {kills} times: {made - needed} updates made again, about {again:.2f} s, and "
          f"{len(kept)} checkpoints, {sum(kept):.2f} s: together {(again + sum(kept)) / whole:.1%} "
          f"of the stage; the {kills} new starts, without that of Python, {sum(starts[1:]):.2f} s")


def main():
    sys.stdout.reconfigure(line_buffering=True)  # a fork must find nothing unwritten
    short, rng = sys.argv[1:] == ["--short"], random.Random(0)
    count = 1 if short else int(sys.argv[1]) if len(sys.argv) > 1 else 30
    work = short_pipeline if short else pipeline
    with tempfile.TemporaryDirectory() as folder:
        run, begin = Path(folder) / "run", time.monotonic()
        fuzz.make_data(Path(folder))
        names, seconds, operations = undisturbed(work, run)
        print(f"undisturbed: {sum(seconds):.1f} s, {len(names)} stages, {operations} operations "
              "on files")
        wanted, good, kills = snapshot(run), 0, []
        for number in range(count):
            shutil.rmtree(run)
            hits, on = disturb(work, run, number, names, seconds, operations, rng)
            differ = differences(wanted, snapshot(run))
            good, kills = good + (not differ), kills + hits
            print(f"{number + 1:3}  {', '.join(f'{where} ({way})' for way, where in hits)}; "
                  f"{'; '.join(on) or 'no checkpoint needed'}; "
                  f"{'DIFFERENT: ' + ' '.join(differ) if differ else 'same bytes'}")
        met = [where for _, where in kills]
        print(f"kills by stage: {', '.join(f'{name} {met.count(name)}' for name in names)}")
        print(f"{len(wanted)} files equal after {len(kills)} kills: {good} of {count} runs; "
              f"{time.monotonic() - begin:.0f} s")
        if not short:
            cost(run, rng)
    sys.exit(good != count)


if __name__ == "__main__":
    main()
