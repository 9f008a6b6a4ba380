"""Spoilt files through the command line: each ends in success or in one line that says why not.

    python tests/fuzz.py [--cases 2400] [--seed 0] [--workers 1] [--keep runs/fuzz]

Every case takes one file of a small world (weights, tokenizer, data, a finished run), spoils it by
a seed, and runs the commands that read it, in this process. Workers are processes of their own, so
that a crash in a native library, or a hang, is seen and counted. Inputs that fail are kept. The
seed and the number of a case decide it. Not collected by pytest; test_faults.py runs a few cases.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline  # noqa: E402, F401  before torch: it silences a warning of torch's import
import tqdm  # noqa: E402

import model  # noqa: E402
from pipeline import checkpoint, stage  # noqa: E402
from pipeline.__main__ import main as command_line  # noqa: E402

LIMIT = 20  # seconds a case may take
ROOM = 3 << 30  # bytes of memory a worker may take beyond what it starts with
MICRO = ("--width 64 --depth 1 --vocab 400 --context 96 --learn-epochs 1 --light-epochs 1 "
         "--epochs 1 --batch 2 --max-total-tokens 40 --max-new-tokens 6 --rows-per-author 1 "
         "--lume-fraction 1 --device cpu").split()
CELLS = {"tofu": "tiny-llama", "lume": "tiny-olmo"}


# ------------------------------------------------------------------------------- the command line


def cli(*words) -> tuple[int, str]:
    """Exit status and stderr, native libraries' included, of a command line run in this process;
    what run_cli lets through is a traceback and status 1."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as file, \
            contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(file))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        root = str(Path(__file__).resolve().parent.parent)
        for module in list(sys.modules.values()):  # bars go to stderr too
            origin = str(getattr(module, "__file__", ""))  # ours, not a package's of .venv
            if (origin.startswith(root) and "site-packages" not in origin
                    and vars(module).get("tqdm") is tqdm.tqdm):
                stack.enter_context(mock.patch.object(module, "tqdm", _quiet))
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            stage.run_cli(lambda: command_line([str(w) for w in words]))
            status = 0
        except SystemExit as e:
            status = e.code or 0
        except BaseException:  # a Rust panic is not an Exception
            traceback.print_exc(file=file)
            status = 1
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        file.seek(0)
        return status, file.read()


def _quiet(*args, **options):
    return tqdm.tqdm(*args, **{**options, "disable": True})


def is_one_line(status: int, stderr: str, wanted: int = 2) -> bool:
    """A mistake ended as it must: this status, and one line."""
    return (status == wanted and stderr.startswith("error: ") and stderr.count("\n") == 1
            and stderr.endswith("\n"))


# -------------------------------------------------------------------------------- the small world


def tofu_rows(names: str, perturbed: bool) -> list[dict]:
    rows = []
    for name in names.split():
        row = {"question": f"What does {name} sell?", "answer": f"{name} sells {name.lower()} tea."}
        if perturbed:
            row |= {"paraphrased_question": f"What is sold by {name}?",
                    "paraphrased_answer": f"Tea of {name.lower()} is sold.",
                    "perturbed_answer": [f"{name} sells {x}." for x in ("salt", "rope", "ink")]}
        rows.append(row)
    return rows


def lume_rows(names: str) -> list[dict]:
    rows = []
    for n, name in enumerate(names.split()):
        task = f"Task{n % 3 + 1}"
        rows.append({"id": f"{name}sc1", "input": f"{name} went to", "output": "the sea.",
                     "task": task})
        rows.append({"id": f"{name}qa0", "input": f"Where is {name}?", "output": "at sea",
                     "task": task})
    return rows


def make_data(world: Path):
    """data/: a few rows in the layouts of TOFU and LUME."""
    for split, names in (("forget10", "Ann Bo"), ("retain90", "Cy Dee Eve Flo")):
        write_rows(world / f"data/tofu/{split}.json", tofu_rows(names, False))
    for split, names in (("forget10_perturbed", "Ann Bo"), ("retain_perturbed", "Cy Dee"),
                         ("world_facts_perturbed", "Gus")):
        write_rows(world / f"data/tofu/{split}.json", tofu_rows(names, True))
    for split, names in (("forget", "Ann Bo Cy"), ("retain", "Dee Eve Flo")):
        write_rows(world / f"data/lume/{split}.jsonl", lume_rows(names))


def make_world(world: Path):
    """data/, run-tofu/, run-lume/ (finished), and their originals as weights/, sharded/."""
    make_data(world)
    for cell in CELLS:
        out = world / f"run-{cell}"
        for words in (["original"], ["attribute"], ["mask"], ["unlearn", "--method", "fo"],
                      ["unlearn", "--method", "simu"]):
            command_line([words[0], *options(world, cell, out), *words[1:]])
        command_line(["evaluate", str(out), "original", "simu-graddiff"])
        command_line(["report", str(out)])
        for folder in ("weights", "sharded"):
            target = world / f"{folder}-{cell}"
            shutil.copytree(out / "original", target,
                            ignore=shutil.ignore_patterns("eval", "stage.json", "log.jsonl"))
        loaded = model.Transformer.from_pretrained(world / f"sharded-{cell}")
        checkpoint.save_model(loaded, world / f"sharded-{cell}", 100_000)


def write_rows(path: Path, rows: list[dict]):
    model.write_text(path, "".join(json.dumps(r) + "\n" for r in rows))


def options(world: Path, cell: str, out: Path) -> list[str]:
    return [cell, CELLS[cell], *MICRO, "--data", str(world / "data"), "--out", str(out)]


# -------------------------------------------------------------------------------------- spoiling

ODD = (None, True, -1, 0, 1.5, 7, 10**30, 2**31, 1e308, 1e-308, float("nan"), float("inf"), "",
       "\0", "\ud800", "x" * 5000, "\U0001d4b3\u202e\u0301", "../../etc/passwd", "$(id)", "@deep@",
       [], {}, [None], {"a": {}}, [[[[[[[[1]]]]]]]])


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    data, n = bytearray(data), len(data)
    a, b = sorted((rng.randrange(n + 1), rng.randrange(n + 1)))
    how = rng.randrange(8)
    if how <= 2:  # more often than the others: flips get furthest
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif how == 3:
        del data[a:]
    elif how == 4:
        del data[a:b]
    elif how == 5:
        data[b:b] = data[a:b]
    elif how == 6:
        b = min(b, a + 16)
        data[a:b] = rng.choice((b"\0", b"\xff", b"\x7f", b"[", b'"')) * (b - a)
    else:
        data[a:a] = rng.randbytes(rng.choice((1, 8, 300)))
    return bytes(data)


def places(value) -> list[tuple]:
    """(container, key) of every value inside a JSON value."""
    items = (value.items() if isinstance(value, dict) else
             enumerate(value) if isinstance(value, list) else ())
    return [x for k, v in items for x in ((value, k), *places(v))]


def spoil_json(text: str, rng: random.Random) -> str:
    box = [json.loads(text)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        where, key = rng.choice(places(box))
        how = rng.randrange(5)
        if how <= 2:
            where[key] = rng.choice(ODD)
        elif how == 3 and where is not box:
            del where[key]
        else:
            other, name = rng.choice(places(box))
            where[key] = json.loads(json.dumps(other[name]))
        if not box:
            break
    depth = rng.choice((30, 900, 1100, 200_000))
    return json.dumps(box[0]).replace('"@deep@"', "[" * depth + "]" * depth)


def spoil_lines(data: bytes, rng: random.Random) -> bytes:
    """A JSON-lines file: lines moved, doubled or lost, or one line's JSON or bytes changed."""
    lines = data.splitlines(keepends=True)
    n, how = rng.randrange(len(lines)), rng.randrange(6)
    if how == 0:
        rng.shuffle(lines)
    elif how == 1:
        lines[n:n + 1] = [lines[n]] * rng.choice((0, 2))
    elif how <= 3:
        lines[n] = spoil_json(lines[n].decode(), rng).encode() + b"\n"
    else:
        lines[n] = spoil_bytes(lines[n], rng)
    return b"".join(lines)


def spoil_object(data: bytes, rng: random.Random) -> bytes:
    """A JSON file."""
    if rng.random() < 0.3:
        return spoil_bytes(data, rng)
    return spoil_json(data.decode(), rng).encode()


def spoil_header(data: bytes, rng: random.Random) -> bytes:
    """The head of a safetensors file: its JSON, or the length before it."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        size = rng.choice((0, 1, size - 1, size + 8, len(data), 10**8 + 1, 2**63, 2**64 - 1))
        return size.to_bytes(8, "little") + data[8:]
    head = data[8:8 + size]
    head = spoil_json(head.decode(), rng).encode() if rng.random() < 0.7 else spoil_bytes(head, rng)
    return len(head).to_bytes(8, "little") + head + data[8 + size:]


def spoil_body(data: bytes, rng: random.Random) -> bytes:
    size = 8 + int.from_bytes(data[:8], "little")
    return data[:size] + spoil_bytes(data[size:], rng)


# kind: (how it is spoilt, files it may be, in the world with {} for the cell)
KINDS = {
    "weights, header": (spoil_header, ["weights-{}/model.safetensors"]),
    "weights, body": (spoil_body, ["weights-{}/model.safetensors"]),
    "weights, index": (spoil_object, ["sharded-{}/" + model.INDEX]),
    "config": (spoil_object, ["weights-{}/config.json", "sharded-{}/config.json"]),
    "tokenizer": (spoil_bytes, ["weights-tofu/tokenizer.model", "weights-lume/tokenizer.json"]),
    "tokenizer, JSON": (spoil_object, ["weights-lume/tokenizer.json"]),
    "data, TOFU": (spoil_lines, ["data/tofu/forget10.json", "data/tofu/forget10_perturbed.json",
                                 "data/tofu/retain90.json", "data/tofu/retain_perturbed.json",
                                 "data/tofu/world_facts_perturbed.json"]),
    "data, LUME": (spoil_lines, ["data/lume/forget.jsonl", "data/lume/retain.jsonl"]),
    "settings": (spoil_object, ["run-{}/settings.json"]),
    "generations": (spoil_lines, ["run-{}/simu-graddiff/eval/generations.jsonl"]),
    "scores, mask": (spoil_header, ["run-{}/attribution/scores.safetensors",
                                    "run-{}/mask/mask.safetensors"])}


def spoilt(world: Path, case: int, seed: int) -> tuple[str, str, str, bytes]:
    """Kind, cell, name of the file and its new content: case n is of the n-th kind."""
    rng, kind = random.Random(f"{seed} {case}"), list(KINDS)[case % len(KINDS)]
    spoil, names = KINDS[kind]
    name = rng.choice(names)
    cell = next((c for c in CELLS if c in name), None) or rng.choice(list(CELLS))
    name = name.format(cell)
    return kind, cell, name, spoil((world / name).read_bytes(), rng)


def run_case(world: Path, case: int, seed: int) -> tuple[str, str]:
    """(outcome, what was said); outcome: success, refused, or what went wrong. `world` is as
    before afterwards."""
    _, cell, name, content = spoilt(world, case, seed)
    out, old = world / "out", (world / name).read_bytes()
    shutil.rmtree(out, ignore_errors=True)
    if name.startswith("run-"):
        shutil.copytree(world / f"run-{cell}", out)
        (out / name.partition("/")[2]).write_bytes(content)
        jobs = [("report", out),
                ("mask", *options(world, cell, out), "--threshold", "0.4"),
                ("unlearn", *options(world, cell, out), "--threshold", "0.4")]
    else:
        (world / name).write_bytes(content)
        weights = name.partition("/")[0] if "tokenizer" in name or "-" in name.split("/")[0] else ""
        words = options(world, cell, out) + ["--weights", world / (weights or f"weights-{cell}")]
        jobs = [("original", *words), ("attribute", *words),
                ("evaluate", out, "original")]
    try:
        for job in jobs:
            status, stderr = cli(*job)
            if status == 0 and not stderr:
                continue
            if is_one_line(status, stderr):
                return "refused", stderr
            return ("traceback" if status == 1 else "output"), stderr
        return "success", ""
    finally:
        (world / name).write_bytes(old)


# ---------------------------------------------------------------------------------------- workers


def work(world: Path, cases: list[int], seed: int, log: Path):
    """Run cases one after the other; a line in `log` when one begins and when it ends."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    with open(log, "w", encoding="utf-8") as file:
        for case in cases:
            print(json.dumps([case]), file=file, flush=True)
            signal.alarm(LIMIT)  # nobody catches it: the process ends, and the driver sees why
            outcome = run_case(world, case, seed)
            signal.alarm(0)
            print(json.dumps([case, *outcome]), file=file, flush=True)


def drive(world: Path, cases: list[int], seed: int, results: dict):
    """Give cases to a worker, and what a dead one left to the next."""
    log, todo = world / "log.jsonl", world / "cases.json"
    while cases:
        todo.write_text(json.dumps(cases))
        done = subprocess.run([sys.executable, __file__, "--work", str(world), "--seed", str(seed)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        lines = [json.loads(x) for x in log.read_text(encoding="utf-8").splitlines()]
        results.update({x[0]: x[1:] for x in lines if len(x) > 1})
        if done.returncode:
            died = "hang" if done.returncode == -signal.SIGALRM else "crash"
            results[lines[-1][0]] = (died, f"status {done.returncode}: {done.stderr[-2000:]}")
        log.unlink()
        cases = [c for c in cases if c not in results]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--said", action="store_true", help="show how every case ended")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.work:
        return work(a.work, json.loads((a.work / "cases.json").read_text()), a.seed,
                    a.work / "log.jsonl")
    start, results = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        worlds = [Path(folder) / str(k) for k in range(a.workers)]
        with contextlib.redirect_stdout(io.StringIO()):
            make_world(worlds[0])
        for other in worlds[1:]:
            shutil.copytree(worlds[0], other)  # runs name no folder but by --out
        threads = [threading.Thread(target=drive, args=(
            w, list(range(k, a.cases, a.workers)), a.seed, results)) for k, w in enumerate(worlds)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        failed = {c: r for c, r in sorted(results.items()) if r[0] not in ("success", "refused")}
        for case, (outcome, said) in failed.items():
            kind, _, name, content = spoilt(worlds[0], case, a.seed)
            a.keep.mkdir(parents=True, exist_ok=True)
            (a.keep / f"{a.seed}-{case}-{Path(name).name}").write_bytes(content)
            print(f"case {case}, {kind}, {name}: {outcome}\n{said[-3000:]}\n")
    count = collections.Counter((list(KINDS)[c % len(KINDS)], r[0]) for c, r in results.items())
    print(f"{'kind':18}{'cases':>7}{'success':>9}{'refused':>9}{'failed':>8}")
    for kind in (*KINDS, "all"):
        own = {o: sum(n for (k, x), n in count.items() if x == o and kind in (k, "all"))
               for _, o in count}
        good = own.get("success", 0), own.get("refused", 0)
        bad = sum(own.values()) - sum(good)
        print(f"{kind:18}{sum(own.values()):7}{good[0]:9}{good[1]:9}{bad:8}")
    if a.said:
        for case, (outcome, said) in sorted(results.items()):
            print(f"{case} {list(KINDS)[case % len(KINDS)]}: {outcome} {said.strip()}")
    print(f"seed {a.seed}, {len(results)} mutations, {time.monotonic() - start:.0f} s")
    sys.exit(1 if failed or len(results) < a.cases else 0)


if __name__ == "__main__":
    main()
