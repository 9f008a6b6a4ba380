"""TOFU, LUME and a stranger's rows, cut by whole authors or documents [D15] into what is forgotten,
what is retained, and what the model has never seen."""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from data import TASKS, Example, load_lume, load_tofu, option
from model import UserError
from pipeline.rows import NO_TEXT, normalised, refuse_shared
from pipeline.tokenizers import TEMPLATES


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Which rows are forgotten and retained, and how they are put to the model."""

    seed: int = option(0, "seeds every draw: slice, initial weights, order, pairing", low=0)
    forget_split: str = option("forget10", "TOFU: file of the forget set")
    retain_split: str = option("retain90", "TOFU: file of the retain set")
    forget_groups: int = option(0, "forget only this many authors (TOFU) or documents per task "
                                "(LUME); 0: all", low=0)
    retain_groups: int = option(0, "retain only this many; 0: all", low=0)
    rows_per_author: int = option(20, "TOFU: consecutive rows that make one author", low=1)
    lume_fraction: float = option(0.4, "LUME: share of documents sampled [D15]", above=0,
                                  high=1)
    template: str = option("qa", "prompt template [D14]; chat: the model's own",
                           choices=tuple(TEMPLATES))


@dataclass(frozen=True)
class Benchmark:
    """What one run forgets, retains and measures."""

    kind: str                     # "tofu", "lume" or "rows"
    forget: list[Example]         # D_f
    retain: list[Example]         # D_r
    retain_eval: list[Example]    # rows of D_r on which retained utility is measured
    world_facts: list[Example]
    real_authors: list[Example]
    nonmembers: list[Example]     # for MIA [D12]; empty with the reason below
    nonmember_source: str
    shared: int = 0               # rows of D_f that are in D_r too
    comparable: bool = True       # non-members are of the forget rows' kind
    level_rows: tuple = ()        # never-seen rows that set a level; not among the non-members
    held_out: tuple = ()          # a user's rows to keep that are judged and not trained on


def load_benchmark(folder, slice_: Slice, *, layout: str, made_here: bool) -> Benchmark:
    """The forget and retain sets in a folder of the layout "tofu" or "lume", cut by whole authors
    or documents. made_here: the original learnt exactly these, so what it never saw is known."""
    load = {"tofu": tofu_benchmark, "lume": lume_benchmark}[layout]
    return load(Path(folder), slice_, made_here)


def set_aside(bench: Benchmark, share: float, seed: int) -> Benchmark:
    """With this share of the non-members, whole groups drawn by seed, as level_rows instead: what
    decides how far a model forgets must not also judge whether it forgot as far as that."""
    groups = groups_of(bench.nonmembers)
    count = round(share * len(groups)) if bench.comparable else 0
    drawn = set(random.Random(seed).sample(groups, count))
    return replace(bench, nonmembers=[r for r in bench.nonmembers if r.group not in drawn],
                   level_rows=tuple(r for r in bench.nonmembers if r.group in drawn))


def read_split(folder: Path, name: str, load) -> list[Example]:
    """The rows that load() gives of a file of a folder; UserError names what is wrong with it."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; point --data or "
                        f"SIMU_DATA at the folder that holds {folder.name}/{name}")
    try:
        rows = load()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; fetch it again") from None
    if not rows:
        raise UserError(f"{path} holds no rows; fetch it again")
    for e in rows:
        texts = [e.question, e.answer, e.paraphrased_question, e.paraphrased_answer,
                 *e.perturbed_answers]
        if not all(isinstance(x, str) and not NO_TEXT.search(x) for x in texts) or not (
                e.answer.strip()):
            raise UserError(f"{path}: row {e.id} has a value that is not a filled text; mend or "
                            "drop the row")
        if e.kind not in ("qa", "sc") or e.task not in ("", *TASKS):
            raise UserError(f"{path}: row {e.id} of task {e.task!r} is none of LUME's: ids end in "
                            f"sc or qa and a digit, tasks are {', '.join(TASKS)}")
    return rows


def first_groups(rows: list[Example], count: int) -> list[Example]:
    """Rows of the first `count` groups in order of appearance; all for 0."""
    groups = groups_of(rows)
    first = set(groups[:count] if count else groups)
    return [r for r in rows if r.group in first]


def groups_of(rows: list[Example]) -> list[str]:
    """Authors or documents, in order of appearance."""
    return list(dict.fromkeys(r.group for r in rows))


def tofu_benchmark(folder: Path, cut: Slice, made_here: bool) -> Benchmark:
    def load(split):
        return read_split(folder, f"{split}.json", lambda: load_tofu(
            folder, split, rows_per_author=cut.rows_per_author))

    def load_if_there(split):
        return load(split) if (folder / f"{split}.json").exists() else []

    every = load(cut.forget_split)
    known = {(r.question, r.answer): r for r in load_if_there(f"{cut.forget_split}_perturbed")}
    if known and set(known) != {(r.question, r.answer) for r in every}:
        raise UserError(f"{folder}/{cut.forget_split}_perturbed.json does not hold the rows of "
                        f"{cut.forget_split}.json; fetch both from one release")
    forget = [replace(known.get((r.question, r.answer), r), id=r.id, group=r.group)
              for r in first_groups(every, cut.forget_groups)]
    authors = load(cut.retain_split)
    retain = first_groups(authors, cut.retain_groups)
    shared = count_shared(forget, retain)
    if shared == len(forget):
        raise UserError(f"every row of {cut.forget_split} is in {cut.retain_split} too; choose "
                        "another --forget-split or --retain-split")
    inside = {(r.question, r.answer) for r in retain}
    retain_eval = [r for r in load_if_there("retain_perturbed") if (r.question, r.answer) in inside]
    if not retain_eval:
        raise UserError(f"no row of {folder}/retain_perturbed.json is in the retain set; fetch it, "
                        "or raise --retain-groups")
    world, real = load_if_there("world_facts_perturbed"), load_if_there("real_authors_perturbed")
    # Non-members must be text the original never saw; which that is depends on what it was made of.
    rest = [r for r in authors if r.group not in {x.group for x in retain}]
    held_out = load_if_there(cut.forget_split.replace("forget", "holdout"))
    if held_out and "forget" in cut.forget_split:
        nonmembers, source = held_out, "hold-out authors"
    elif made_here and rest:
        last = groups_of(rest)[-len(groups_of(forget)):]
        nonmembers, source = [r for r in rest if r.group in last], "authors outside the slice"
    elif made_here:
        nonmembers, source = [], "none: the original learnt every row here; slice them"
    else:
        nonmembers, source = real + world, "real authors and world facts, as SOUL"
    return Benchmark("tofu", forget, retain, retain_eval, world, real, nonmembers, source, shared,
                     comparable=bool(held_out) or made_here)


def count_shared(forget: list[Example], retain: list[Example]) -> int:
    """How many forget rows, question and answer, are to be retained too; warns if any are."""
    retained = {(r.question, r.answer) for r in retain}
    count = sum((r.question, r.answer) in retained for r in forget)
    if count:
        print(f"warning: {count} of {len(forget)} rows of the forget set are in the retain set "
              "too: they are pulled both ways", flush=True)
    return count


def lume_benchmark(folder: Path, cut: Slice, made_here: bool) -> Benchmark:
    rng, sampled, rest = random.Random(cut.seed), {}, []
    for split, count in (("forget", cut.forget_groups), ("retain", cut.retain_groups)):
        rows = read_split(folder, f"{split}.jsonl", lambda: load_lume(folder, split))
        chosen = set()
        for task in TASKS:
            documents = groups_of([r for r in rows if r.task == task])
            rng.shuffle(documents)
            share = documents[:round(cut.lume_fraction * len(documents))]  # [D15]
            chosen.update(share[:count] if count else share)
        sampled[split] = [r for r in rows if r.group in chosen]
        if not sampled[split]:
            raise UserError(f"--lume-fraction {cut.lume_fraction} leaves no {split} document; "
                            "raise it")
        rest += [r for r in rows if r.group not in chosen]
    # As many held-out documents of each task as are forgotten, so that kind alone tells nothing.
    held_out = []
    for task in TASKS:
        documents = groups_of([r for r in rest if r.task == task])
        rng.shuffle(documents)
        count = len(groups_of([r for r in sampled["forget"] if r.task == task]))
        chosen = set(documents[:count])
        held_out += [r for r in rest if r.group in chosen]
    source = "seeded hold-out documents of the open release, never trained on"
    if not made_here:
        held_out, source = [], ("none: which documents the original was trained on is unknown; the "
                                "gated SemEval non-members are needed")
    return Benchmark("lume", sampled["forget"], sampled["retain"], sampled["retain"], [], [],
                     held_out, source, count_shared(sampled["forget"], sampled["retain"]))


HELD_OUT = 5  # one in so many of a user's rows to keep; at least as many, at most 100
FEWEST = 15  # rows to keep, of which some can be spared


def hold_out(bench: Benchmark, seed: int) -> Benchmark:
    """With a fifth of a user's rows to keep held out of training, drawn by seed, to be judged in
    place of all: rows that were trained on do not tell what else is lost. Rows that are alike stay
    on one side. Of fewer than FEWEST rows, or where most are alike, none are held out."""
    count = min(100, max(HELD_OUT, len(bench.retain) // HELD_OUT))
    groups = [x for x in alike_rows(bench.retain) if len(x) <= count]
    random.Random(seed).shuffle(groups)
    drawn = set()
    while groups and len(drawn) < count:
        drawn.update(groups.pop())
    if len(bench.retain) < FEWEST or len(drawn) < count:
        return bench
    held_out = [e for i, e in enumerate(bench.retain) if i in drawn]
    retain = [e for i, e in enumerate(bench.retain) if i not in drawn]
    return replace(bench, retain=retain, retain_eval=held_out, held_out=tuple(held_out))


def alike_rows(rows: list[Example]) -> list[list[int]]:
    """Indices of the rows in groups: those that share a question, an answer (unless more than one
    in HELD_OUT do, as a yes) or a chat, and those that share one with these."""
    answers = Counter(normalised(e.answer) for e in rows)
    group, first = list(range(len(rows))), {}  # an earlier row of the same group; a key's first row

    def root(i):
        while group[i] != i:
            i = group[i]
        return i
    for i, e in enumerate(rows):
        answer, keys = normalised(e.answer), [("chat", e.group)]
        if e.question:
            keys.append(("question", e.turns, normalised(e.question)))
        if HELD_OUT * answers[answer] <= len(rows):
            keys.append(("answer", answer))
        for key in keys:
            a, b = root(first.setdefault(key, i)), root(i)
            group[max(a, b)] = min(a, b)
    members = defaultdict(list)
    for i in range(len(rows)):
        members[root(i)].append(i)
    return list(members.values())


def benchmark_of_rows(forget: list[Example], retain: list[Example], unseen: list[Example], *,
                      allow_near: bool = False) -> Benchmark:
    """A user's rows. unseen: rows the model never saw. No row may stand in two of the files; nor
    nearly, unless allow_near."""
    refuse_shared(dict(forget=forget, retain=retain, unseen=unseen), allow_near=allow_near)
    return Benchmark("rows", forget, retain, retain, [], [], unseen,
                     "rows given as unseen" if unseen else "none: no unseen rows are given")
