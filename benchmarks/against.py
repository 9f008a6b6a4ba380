"""This checkout against an older one: CPU seconds of the same work, and whether runs hold the same
bytes.

    python benchmarks/against.py OLD MODEL           OLD: a checkout; MODEL: a folder of the demo's
    python benchmarks/against.py --bytes RUNS RUNS   two folders of runs, made by either

A process each, one thread, in turns, the best of all. What moved since has two addresses.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TURNS, REPEATS = 3, 3
COMPARED = ("model.safetensors", "scores.safetensors", "mask.safetensors", "generations.jsonl",
            "metrics.json", "log.jsonl")


def work(checkout: str, folder: str) -> dict[str, float]:
    """Seconds of each job in this process, which imports that checkout."""
    sys.path.insert(0, checkout)
    import pipeline  # noqa: F401  before torch: it silences a warning of torch's import
    import torch
    import data
    import eval as evaluation
    import model as core
    import simu
    try:
        from pipeline.reading import generate, token_scores
    except ImportError:  # an older house
        generate, token_scores = core.generate, evaluation.token_scores
    torch.set_num_threads(1)
    model, tokenizer = core.Transformer.from_pretrained(folder), data.load_tokenizer(folder)
    rows = data.encode_all(data.load_tofu(f"{checkout}/pipeline/demo/tofu", "full")[:200],
                           tokenizer, "qa", context=512, vocab=tokenizer.vocab_size)
    drafts = [r.ids[r.n_prompt:] for r in rows[:64]]
    ask = dict(eos_id=tokenizer.eos_id, max_new_tokens=60)
    prompts = [r.ids[:r.n_prompt] for r in rows[:64]]
    recipe = simu.Recipe(lr=1e-6, epochs=1, batch=4)
    mask = torch.rand(4, 128, generator=torch.Generator().manual_seed(0)) < 0.3

    def unlearn(method: str):
        some = core.Transformer.from_pretrained(folder)
        simu.unlearn(some, rows[:40], rows[40:120], mask,
                     dataclasses.replace(recipe, method=method))

    jobs = {"attribution": lambda: simu.attribute_rows(model, rows[:40], recipe),
            "decoding": lambda: generate(model, prompts, **ask),
            "decoding, drafted": lambda: generate(model, prompts, drafts=drafts, **ask),
            "losses": lambda: token_scores(model, rows, [r.start for r in rows], tokens=8192)}
    jobs |= {f"unlearning, {x}": lambda x=x: unlearn(x) for x in ("fo", "so", "simu")}
    return {name: min(seconds(job) for _ in range(REPEATS)) for name, job in jobs.items()}


def seconds(job) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def speed(old: str, folder: str):
    found = {old: [], str(HERE): []}
    for _ in range(TURNS):
        for checkout, turns in found.items():
            done = subprocess.run([sys.executable, __file__, "--work", checkout, folder],
                                  capture_output=True, text=True, check=True)
            turns.append(json.loads(done.stdout.splitlines()[-1]))
    for job in found[old][0]:
        before, now = (min(t[job] for t in turns) for turns in found.values())
        print(f"  {job:18} {before:6.3f} s before, {now:6.3f} s now: {now / before:.2f}")


def values(path: Path) -> list:
    """What a file of JSON, or of JSON lines, says, its fields in any order."""
    return [json.loads(line) for line in
            (path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()])]


def same_bytes(before: Path, now: Path):
    differ, same, other = [], 0, 0
    for path in sorted(p for p in before.rglob("*") if p.name in COMPARED and p.is_file()):
        found = now / path.relative_to(before)
        if found.is_file() and found.read_bytes() == path.read_bytes():
            same += 1
        elif found.is_file() and ".json" in path.suffix and values(found) == values(path):
            other += 1
        else:
            differ.append(str(path.relative_to(before)))
    print(f"  {same} files hold the same bytes, {other} the same values with their fields in "
          f"another order, {len(differ)} do not")
    print(*(f"    {x}" for x in differ), sep="\n")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bytes", action="store_true")
    p.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("first")
    p.add_argument("second")
    a = p.parse_args()
    if a.work:
        print(json.dumps(work(a.first, a.second)))
    elif a.bytes:
        same_bytes(Path(a.first), Path(a.second))
    else:
        speed(a.first, a.second)


if __name__ == "__main__":
    main()
