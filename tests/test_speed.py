"""benchmarks/speed.py at a micro size: it runs, and what it compares is the same work."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_every_step_stands_in_the_table_beside_the_plain_way():
    pytest.importorskip("transformers")
    script = Path(__file__).parent.parent / "benchmarks" / "speed.py"
    done = subprocess.run([sys.executable, script, "--rows", "3"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, _, *lines = done.stdout.splitlines()
    assert head.startswith("tiny on ")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [(step.split(",")[0], way) for step, way, *_ in table] == [
        ("attribution", "loop"), ("attribution", "fast"), ("attribution", "fast"),
        ("losses", "transformers"), ("losses", "ours"), ("decoding", "transformers"),
        ("decoding", "ours"), *(("3 updates", x) for x in ("transformers", "fo", "so", "simu"))]
    checks = [line[-1] for line in table]
    assert float(checks[0]) < 1e-5 and float(checks[3]) < 1e-5 and checks[5] == "3 texts equal"
