"""The whole suite, a pytest process per file, as many at once as there are cores.

A line per file; of one that fails, everything it said. Exit status 1 if any did. To choose tests,
call pytest itself: `bash run.sh test -k sophia`.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
LONGEST = ("test_pipeline.py", "test_hub.py", "test_attack.py")  # started first, to end together


def run(file: Path):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", str(file)], text=True,
                          cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return file, done.returncode, done.stdout.strip()


def main():
    files = sorted(HERE.glob("test_*.py"), key=lambda p: (p.name not in LONGEST, -p.stat().st_size))
    start, failed = time.monotonic(), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job in as_completed([pool.submit(run, f) for f in files]):
            file, status, said = job.result()
            lines = said.splitlines()
            skipped = [x for x in lines if x.startswith("SKIPPED")]
            print("\n".join([f"{file.name}: {lines[-1]}", *skipped] if not status else [said]),
                  flush=True)
            if status:
                failed.append(file.name)
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    outcome = f"failed: {', '.join(failed)}" if failed else "all passed"
    print(f"{outcome}, in {minutes} min {seconds} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
