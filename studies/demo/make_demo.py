"""Writes the demo benchmark: this project's own data in the file formats of TOFU and LUME.

    python -m studies demo             writes pipeline/demo/tofu and pipeline/demo/lume
    python -m studies demo --check     exits 1 if the files there are others

All people are fictitious. The texts come from tofu.txt and lume.txt beside this file; the seed
decides which author gets which fact in which wording. Every run gives the same bytes.
"""

import argparse
import json
import random
import sys
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "pipeline" / "demo"
SEED = "simu demo 1"
N_FULL, N_FORGET = 20, 2             # authors; those of the bank beyond N_FULL are the hold-out
N_RETAIN_PERTURBED = 10              # authors; TOFU too measures on the first rows of full
N_WRONG = 5


@cache
def bank(name):
    """{heading: lines} of a text file beside this one, in its order."""
    tables = {}
    for line in (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = tables[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            lines.append(line)
    return tables


def table(lines):
    """The lines of a bank, each split at its bars."""
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def generator(*names):
    """A random stream per use, so that editing one bank leaves the others' draws alone."""
    return random.Random(" ".join((SEED, *map(str, names))))


def shuffled(items, rng):
    # Only random() is promised to give the same numbers in every Python version; shuffle() is not.
    order = sorted((rng.random(), i) for i in range(len(items)))
    return [items[i] for _, i in order]


def integer(rng, low, high):
    """Uniform over low .. high, both included."""
    return low + int(rng.random() * (high - low + 1))


def deal(items, n, rng):
    """n items in random order, each as often as any other, give or take one."""
    copies = -(-n // len(items))
    return [item for _ in range(copies) for item in shuffled(items, rng)][:n]


# ---- TOFU's format ---------------------------------------------------------------------------

def sentence(pattern, **slots):
    """Fills a pattern; a slot that opens the sentence gets its capital."""
    text = pattern.format(**slots)
    return text[0].upper() + text[1:]


def wrong_facts(columns, facts, own, rng):
    """N_WRONG sets of slots, none sharing a value with `own` or with each other.

    A column and its rewording (`scene`, `scene2`) come from one line; otherwise lines are mixed,
    so that a wrong answer is not simply the right one of some other author.
    """
    wrong = [{} for _ in range(N_WRONG)]
    for base in (c for c in columns if not c.endswith("2")):
        group = [columns.index(c) for c in columns if c in (base, base + "2")]
        others = shuffled([line for line in facts if line is not own], rng)
        for slots, line in zip(wrong, others):
            slots.update({columns[i]: line[i] for i in group})
    return wrong


def tofu_rows(authors):
    """Per author, a perturbed row for each kind of question; plain rows are cut from these."""
    rows = [[] for _ in authors]
    texts = bank("tofu")
    kinds = [name.removesuffix(" columns") for name in texts if name.endswith(" columns")]
    for number, kind in enumerate(kinds):
        columns, facts = texts[f"{kind} columns"][0].split(), table(texts[f"{kind} facts"])
        wordings = ("questions", "asks_again", "answers", "paraphrases")
        dealt = [deal(texts[f"{kind} {w}"], len(authors), generator(number, w))
                 for w in wordings]
        own_facts = deal(facts, len(authors), generator(number, "facts"))
        for a, (name, she) in enumerate(authors):
            her = {"she": "her", "he": "his"}[she]
            who = dict(name=name, last=name.split()[-1], she=she, She=she.title(),
                       her=her, Her=her.title())
            known = dict(zip(columns, own_facts[a]))
            question, asked_again, answer, paraphrase = (wording[a] for wording in dealt)
            wrong = wrong_facts(columns, facts, own_facts[a], generator(number, "wrong", name))
            rows[a].append({
                "question": sentence(question, **who),
                "answer": sentence(answer, **who, **known),
                "paraphrased_answer": sentence(paraphrase, **who, **known),
                "perturbed_answer": [sentence(paraphrase, **who, **slots) for slots in wrong],
                "paraphrased_question": sentence(asked_again, **who)})
    return rows


def world_facts():
    """Plain rows (four options, the right one anywhere among them) and perturbed rows."""
    plain, perturbed = [], []
    for question, answer, *wrong in table(bank("tofu")["world facts"]):
        options = shuffled([answer, *wrong], generator(question))
        plain.append({"question": question,
                      **{f"option{i}": option for i, option in enumerate(options, start=1)},
                      "answer": answer})
        perturbed.append({"question": question, "answer": answer, "perturbed_answer": wrong})
    return plain, perturbed


def tofu_files():
    """File name -> rows."""
    by_author = tofu_rows(table(bank("tofu")["authors"]))

    def rows(first, last):
        return [row for author in by_author[first:last] for row in author]

    def plain(first, last):
        return [{key: row[key] for key in ("question", "answer")} for row in rows(first, last)]

    n_retain = N_FULL - N_FORGET
    facts, facts_perturbed = world_facts()
    return {
        "full.json": plain(0, N_FULL),
        "retain90.json": plain(0, n_retain),
        "forget10.json": plain(n_retain, N_FULL),
        "holdout10.json": plain(N_FULL, None),
        "forget10_perturbed.json": rows(n_retain, N_FULL),
        "retain_perturbed.json": rows(0, N_RETAIN_PERTURBED),
        "world_facts.json": facts,
        "world_facts_perturbed.json": facts_perturbed,
    }


# ---- LUME's format ---------------------------------------------------------------------------

def document(doc, task, beginning, ending, questions):
    """One sentence completion and its questions."""
    rows = [{"id": f"{doc}sc1", "input": beginning, "output": ending, "task": task}]
    rows += [{"id": f"{doc}qa{i}", "input": question, "output": answer, "task": task}
             for i, (question, answer) in enumerate(questions)]
    return rows


def people():
    """The biographies of Task2. Numbers are of kinds that are never given out (900-, 555-01)."""
    rng = generator("people")
    names = [name for name, in table(bank("lume")["people"])]
    n = len(names)
    first, second = (shuffled(bank("lume")[f"mailbox {part}"], rng) for part in ("first", "second"))
    biographies = deal(table(bank("lume")["biographies"]), n, rng)
    phone_ends = shuffled(range(100, 200), rng)
    addresses = shuffled([street for street, in table(bank("lume")["streets"])], rng)
    documents = []
    for i, name in enumerate(names):
        birth = (integer(rng, 1931, 1999), integer(rng, 1, 12), integer(rng, 1, 28))
        person = dict(
            name=name, birth="{}-{:02}-{:02}".format(*birth),
            ssn=f"900-{integer(rng, 10, 99)}-{integer(rng, 1000, 9999)}",
            phone=f"555-0{phone_ends[i]}",
            email=f"{first[i]}.{second[i]}{integer(rng, 10, 99)}@example.org",
            address=f"{integer(rng, 2, 98)} {addresses[i]}")
        beginning, ending = (part.format(**person) for part in biographies[i])
        questions = [(question.format(name=name), person[field])
                     for field, question in table(bank("lume")["person questions"])]
        documents.append(document(f"person-{i:02}", "Task2", beginning, ending, questions))
    return documents


def lume_files():
    """File name -> rows. Which documents are to be forgotten is drawn, task by task."""
    stories = [document(f"story-{i:02}", "Task1", beginning, ending, [(question, answer)])
               for i, (beginning, ending, question, answer)
               in enumerate(table(bank("lume")["stories"]))]
    entries = [document(f"entry-{i:02}", "Task3", f"{title}\n{text}", ending, [(question, answer)])
               for i, (title, text, ending, question, answer)
               in enumerate(table(bank("lume")["entries"]))]
    forget, retain = [], []
    for name, documents in (("stories", stories), ("people", people()), ("entries", entries)):
        drawn = shuffled(documents, generator("split", name))
        half = len(drawn) // 2
        forget += drawn[:half]
        retain += drawn[half:]
    # Tasks are mixed, so that the first documents of a file are a fair sample of it.
    forget, retain = (shuffled(documents, generator("order")) for documents in (forget, retain))
    return {"forget.jsonl": [row for doc in forget for row in doc],
            "retain.jsonl": [row for doc in retain for row in doc]}


# ---- files -----------------------------------------------------------------------------------

def all_files():
    """Path -> the bytes that belong there."""
    folders = {"tofu": tofu_files(), "lume": lume_files()}
    return {DEMO / folder / name:
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            for folder, files in folders.items() for name, rows in files.items()}


def main(argv):
    """The demo benchmark's files, written again, or checked."""
    parser = argparse.ArgumentParser(prog="python -m studies demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit 1 if a file is missing or differs")
    check = parser.parse_args(argv).check
    for path, content in all_files().items():
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            sys.exit(f"{path} is not what make_demo.py writes")
