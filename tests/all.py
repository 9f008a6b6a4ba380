"""The whole suite, a pytest process per file, as many at once as there are cores.

A line per file; of one that fails, everything it printed. The last line counts the tests; exit
status 1 if any failed. To choose tests, call pytest itself: `bash run.sh test -k sophia`.
"""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Started first, so that all end together.
LONGEST = ("test_pipeline.py", "test_unlearn.py", "test_hub.py", "test_attack.py",
           "test_figures.py", "test_faults.py", "test_mixers.py", "test_plan.py", "test_house.py")
COUNTED = {"passed": ("passed",), "failed": ("failed", "error", "errors"), "skipped": ("skipped",)}


def run(file: Path):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", str(file)], text=True,
                          cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return file, done.returncode, done.stdout.strip()


def main():
    files = sorted(HERE.glob("test_*.py"), key=lambda p: (p.name not in LONGEST, -p.stat().st_size))
    start, totals = time.monotonic(), dict.fromkeys(COUNTED, 0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job in as_completed([pool.submit(run, f) for f in files]):
            file, status, printed = job.result()
            lines = printed.splitlines() or ["printed nothing"]
            skipped = [x for x in lines if x.startswith("SKIPPED")]
            print("\n".join([f"{file.name}: {lines[-1]}", *skipped] if not status else [printed]),
                  flush=True)
            counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", lines[-1])}
            for total, words in COUNTED.items():
                totals[total] += sum(counts.get(w, 0) for w in words)
            if status and not any(counts.get(w) for w in COUNTED["failed"]):
                totals["failed"] += 1  # it ended before it counted
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    print(f"in {minutes} min {seconds} s")
    print(", ".join(f"{n} {word}" for word, n in totals.items()))
    sys.exit(bool(totals["failed"]))


if __name__ == "__main__":
    main()
