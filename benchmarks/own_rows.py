"""Rows of one's own on a real pretrained model: SmolLM2-135M taught six invented facts, and forty.

    python benchmarks/own_rows.py MODEL OUT [--only six forty] [--dtype bfloat16]

For each, `bash run.sh unlearn MODEL forget.jsonl retain.jsonl --teach` with the defaults, with and
without --unseen; then transformers alone asks every forget row (Question: ... Answer:, greedy).
A line per run, and the verdicts as the runs gave them. MODEL: ../shared/tools/smollm2.py makes one.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = json.loads(Path(__file__).with_suffix(".json").read_text())  # invented: question, answer


def write(folder, sets):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps(dict(question=q, answer=a)) + "\n" for q, a in rows))


def still_told(folder, rows):
    """How many rows transformers hears word for word."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    tokenizer, same = AutoTokenizer.from_pretrained(folder), 0
    for question, answer in rows:
        ids = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")
        want = len(tokenizer(" " + answer).input_ids)
        with torch.no_grad():
            new = model.generate(**ids, max_new_tokens=want + 5, do_sample=False, pad_token_id=2)
        said = tokenizer.decode(new[0, ids.input_ids.shape[1]:], skip_special_tokens=True)
        same += said.strip() == answer.strip()
    return same


def one(model, out, name, sets, more):
    folder = out / "rows" / name
    write(folder, sets)
    told = {}
    for given in (False, True):
        run = out / f"{name}{'-unseen' if given else ''}"
        words = ["bash", ROOT / "run.sh", "unlearn", model, folder / "forget.jsonl",
                 folder / "retain.jsonl", "--teach", "--out", run, *more]
        words += ["--unseen", folder / "unseen.jsonl"] if given else []
        start = time.time()
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        minutes = (time.time() - start) / 60
        print(f"$ {' '.join(Path(str(w)).name for w in words)}\n{done.stdout}{done.stderr[-600:]}"
              f"status {done.returncode}, {minutes:.1f} min\n", flush=True)
        found = json.loads((run / "verdict" / "verdict.json").read_text())
        told[given] = row_of(name, given, found, still_told(run / "model", sets["forget"]), minutes)
        print(told[given], flush=True)
    return list(told.values())


def row_of(name, given, found, same, minutes):
    m = found["measured"]
    auc = "-" if m["auc"] is None else f"{m['auc']:.2f}"
    said = "forgotten" if found["forgotten"] else "not"
    return (f"| {name} | {'yes' if given else 'no'} | {said} | {same} of {m['rows']} | "
            f"{m['rouge_l']:.3f} ({m['rouge_l_by_chance']:.3f}) | "
            f"{m['own_words']:.0%} ({m['own_words_by_chance']:.0%}) | {m['kept_after']:.3f} | "
            f"{auc} | {m['loss']:.2f} ({m['loss_target']:.2f}) | {found['updates']} | "
            f"{minutes:.0f} |")


HEADER = ("| rows | --unseen | verdict | word for word | ROUGE-L (chance) | names (chance) | "
          "retained | AUC | loss (target) | updates | minutes |\n|" + 11 * "---|")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=["six", "forty"], choices=["six", "forty"])
    a, more = parser.parse_known_args()
    table = [HEADER]
    for name, sets in ROWS.items():
        if name in a.only:
            table += one(a.model, a.out, name, sets, more)
    print("\n".join(table))


if __name__ == "__main__":
    sys.exit(main())
