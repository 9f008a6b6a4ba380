"""A small world of weights, data and finished runs for the tests that spoil it, and the command
line as a program would run it, in this process."""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import checkpoint, stage  # noqa: E402  first: it silences a warning of torch's import
from pipeline.__main__ import main as command_line  # noqa: E402
import model  # noqa: E402
import tqdm  # noqa: E402

bar = tqdm.tqdm.__init__
tqdm.tqdm.__init__ = lambda self, *a, **options: bar(self, *a, **options | dict(disable=True))
MICRO = ("--width 64 --depth 1 --vocab 400 --context 96 --learn-epochs 1 --light-epochs 1 "
         "--epochs 1 --batch 2 --max-total-tokens 40 --max-new-tokens 6 --rows-per-author 1 "
         "--lume-fraction 1 --device cpu").split()
CELLS = {"tofu": "tiny-llama", "lume": "tiny-olmo"}


def cli(*words) -> tuple[int, str]:
    """Exit status and stderr, native libraries' included, of a command line run in this process;
    what run_cli lets through is a traceback and status 1."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as file, \
            contextlib.redirect_stderr(file), contextlib.redirect_stdout(io.StringIO()):
        stderr = os.dup(2)
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
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        return status, file.read()


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
    """data/, run-tofu/, run-lume/ (finished), and their originals as weights-*/, sharded-*/."""
    make_data(world)
    for cell in CELLS:
        out = world / f"run-{cell}"
        for words in (["original"], ["attribute"], ["mask"], ["unlearn", "--method", "fo"],
                      ["unlearn", "--method", "simu"]):
            command_line([words[0], *options(world, cell, out), *words[1:]])
        command_line(["evaluate", str(out), "original", "simu-graddiff"])
        command_line(["report", str(out)])
        for folder in ("weights", "sharded"):
            shutil.copytree(out / "original", world / f"{folder}-{cell}",
                            ignore=shutil.ignore_patterns("eval", "stage.json", "log.jsonl"))
        loaded = model.Transformer.from_pretrained(world / f"sharded-{cell}")
        checkpoint.save_model(loaded, world / f"sharded-{cell}", shard_bytes=100_000)


def write_rows(path: Path, rows: list[dict]):
    model.write_text(path, "".join(json.dumps(r) + "\n" for r in rows))


def options(world: Path, cell: str, out: Path) -> list[str]:
    return [cell, CELLS[cell], *MICRO, "--data", str(world / "data"), "--out", str(out)]


# ---------------------------------------------------------------------- spoiling a stranger's file

ODD = (None, True, -1, 0, 1.5, 10**6, 1e308, float("nan"), "", "\0", "\ud800", "x" * 5000,
       "../../etc/passwd", "$(id)", [], {}, [None], [[[[[[[[1]]]]]]]])


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bits turned, a part cut out, doubled, or put in the place of another."""
    content, n = bytearray(content), len(content)
    a, b = sorted((rng.randrange(n + 1), rng.randrange(n + 1)))
    how = rng.randrange(5)
    if how <= 1:  # they get furthest
        for _ in range(rng.choice((1, 2, 8))):
            content[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif how == 2:
        del content[a:b]
    elif how == 3:
        content[b:b] = content[a:b]
    else:
        content[a:a] = rng.choice((b"\0", b"\xff", b"[", b'"')) * rng.choice((1, 8, 300))
    return bytes(content)


def spoil_json(content: bytes, rng: random.Random) -> bytes:
    """One of the values of a JSON object replaced by an odd one, or dropped."""
    value = json.loads(content)
    name = rng.choice([*value])
    if rng.random() < 0.2:
        del value[name]
    else:
        value[name] = rng.choice(ODD)
    return json.dumps(value).encode()


def spoil_header(content: bytes, rng: random.Random) -> bytes:
    """The JSON at the head of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    head = spoil_bytes(content[8:8 + size], rng)
    return len(head).to_bytes(8, "little") + head + content[8 + size:]


# File, and how it is spoilt. Those of a tofu world's weights and data.
SPOILT = [("weights-tofu/model.safetensors", spoil_header),
          ("weights-tofu/model.safetensors", spoil_bytes),
          ("weights-tofu/config.json", spoil_json), ("weights-tofu/config.json", spoil_bytes),
          ("weights-tofu/tokenizer.model", spoil_bytes),
          ("weights-lume/tokenizer.json", spoil_bytes), ("weights-lume/config.json", spoil_json),
          ("data/tofu/forget10.json", spoil_bytes), ("data/lume/forget.jsonl", spoil_bytes)]
