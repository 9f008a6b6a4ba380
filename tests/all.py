"""The whole suite, a pytest process per file, as many at once as there are cores.

The processes are forks of this one, which has imported what is slow to import. A line per file; of
one that fails, everything it printed. The last line counts the tests; exit status 1 if any failed.
To choose tests, call pytest itself: `bash run.sh test -k sophia`.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ["TQDM_DISABLE"] = "1"  # tests read what else is printed; tqdm asks when it is imported

import pipeline  # noqa: E402, F401  before torch: it silences a warning of torch's import
import pytest  # noqa: E402
import torch._dynamo  # noqa: E402, F401  every plan of memory loads it

import transformers  # noqa: E402, F401

# Started first, so that all end together.
LONGEST = ("test_pipeline.py", "test_unlearn.py", "test_hub.py", "test_attack.py",
           "test_figures.py", "test_faults.py", "test_plan.py", "test_house.py",
           "test_fused.py", "test_unlearn_rows.py", "test_reading.py")
COUNTED = {"passed": ("passed",), "failed": ("failed", "error", "errors"), "skipped": ("skipped",),
           "left out": ("deselected",)}


def start(file: Path):
    """Run the tests of a file in a child. Returns its process id, and the file it prints into."""
    printed = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    sys.stdout.flush()
    if child := os.fork():
        return child, printed
    os.dup2(printed.fileno(), 1)
    os.dup2(printed.fileno(), 2)
    # transformers imports anyio, which is a plugin too; pytest cannot rewrite its assertions now.
    status = pytest.main(["-q", "-rs", "-W", "ignore:Module already imported", str(file)])
    sys.stdout.flush()
    os._exit(status)


def tell(file: Path, failed: bool, printed, totals: dict):
    """Print what became of a file, and add to the totals."""
    printed.seek(0)
    text = printed.read().strip()
    lines = text.splitlines() or ["printed nothing"]
    skipped = [x for x in lines if x.startswith("SKIPPED")]
    print("\n".join([f"{file.name}: {lines[-1]}", *skipped] if not failed else [text]), flush=True)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", lines[-1])}
    for total, words in COUNTED.items():
        totals[total] += sum(counts.get(w, 0) for w in words)
    if failed and not any(counts.get(w) for w in COUNTED["failed"]):
        totals["failed"] += 1  # it ended before it counted


def main():
    left = sorted(HERE.glob("test_*.py"), key=lambda p: (p.name not in LONGEST, -p.stat().st_size))
    begun, totals, running = time.monotonic(), dict.fromkeys(COUNTED, 0), {}
    while left or running:
        while left and len(running) < (os.cpu_count() or 1):
            file = left.pop(0)
            child, printed = start(file)
            running[child] = file, printed
        child, status = os.wait()
        file, printed = running.pop(child)
        tell(file, bool(status), printed, totals)
    minutes, seconds = divmod(int(time.monotonic() - begun), 60)
    print(f"in {minutes} min {seconds} s")
    if n := totals.pop("left out"):
        print(f"{n} more can only run on the real files: see SIMU_DATA in pipeline/README.md")
    print(", ".join(f"{n} {word}" for word, n in totals.items()))
    sys.exit(bool(totals["failed"]))


if __name__ == "__main__":
    main()
