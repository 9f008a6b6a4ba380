"""TOFU, LUME and a stranger's rows, cut by whole authors or documents [D15] into what is forgotten,
what is retained, and what the model has never seen.

`s` is the settings of a run (settings.Settings), which hold those of Slice."""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from data import TASKS, Example, load_lume, load_tofu, option
from model import UserError
from pipeline.rows import NO_TEXT, load_rows, normalised, refuse_shared, without_marks
from pipeline.tokenizers import TEMPLATES, load_tokenizer


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
                           choices=TEMPLATES)
    level_share: float = option(
        0.0, "share of the never-seen rows, in complete groups, that set the level; membership is "
        "measured on the others", low=0, below=1)


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
    comparable: bool = True       # non-members are of the forget rows' kind
    shared: int = 0               # rows of D_f that are in D_r too
    level_rows: tuple = ()        # never-seen rows that set a level; not among the non-members
    held_out: tuple = ()          # a user's rows to keep that are judged and not trained on


# ------------------------------------------------------------------------------------------ files


def data_folder(s) -> Path:
    """The folder of a benchmark's files."""
    embedded = Path(__file__).parent / "demo" if s.benchmark == "demo" else ""
    folder = Path(s.data or embedded) / s.layout
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; --data or SIMU_DATA must hold {s.layout}/")
    return folder


def data_files(s) -> dict[str, Path | str]:
    """The files that a run's rows come from, by name."""
    if s.layout != "rows":
        folder = data_folder(s)
        return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*.json*"))}
    if not s.retain and s.lam:
        raise UserError("no rows to keep are given, and this objective must know what is to stay: "
                        "give a second file; or --objective npo --lam 0, which does less damage "
                        "alone")
    files = dict(forget=s.forget, retain=s.retain, unseen=s.unseen)
    return {name: file for name, file in files.items() if file}


def read_split(folder: Path, name: str, load) -> list[Example]:
    """The rows that load() gives of a file of a folder; UserError names what is wrong with it."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing; point --data or SIMU_DATA at the folder that holds "
                        f"{folder.name}/{name}")
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


# ------------------------------------------------------------------------------------------- cuts


def groups_of(rows: list[Example]) -> list[str]:
    """Authors or documents, in order of appearance."""
    return list(dict.fromkeys(r.group for r in rows))


def first_groups(rows: list[Example], count: int) -> list[Example]:
    """Rows of the first `count` groups in order of appearance; all for 0."""
    groups = groups_of(rows)
    first = set(groups[:count] if count else groups)
    return [r for r in rows if r.group in first]


def pair(row: Example) -> tuple[str, str]:
    return row.question, row.answer


def count_shared(forget: list[Example], retain: list[Example]) -> int:
    """How many forget rows are to be retained too; warns if any are."""
    retained = set(map(pair, retain))
    count = sum(pair(r) in retained for r in forget)
    if count:
        print(f"warning: {count} of {len(forget)} rows of the forget set are in the retain set "
              "too: they are pulled both ways", flush=True)
    return count


def learnt_slice(s) -> bool:
    """Was the original trained on this slice of the files, so that what it never saw is known?"""
    if s.weights and not s.teach:
        return False
    return s.tiny or (s.run / "original" / "log.jsonl").is_file()


def read_tofu(s, split: str, *, required: bool = True) -> list[Example]:
    """The rows of one of TOFU's files; none where it is missing and not required."""
    folder = data_folder(s)
    if not required and not (folder / f"{split}.json").exists():
        return []
    return read_split(folder, f"{split}.json", lambda: load_tofu(
        folder, split, rows_per_author=s.rows_per_author))


def tofu_benchmark(s) -> Benchmark:
    every, authors = read_tofu(s, s.forget_split), read_tofu(s, s.retain_split)
    perturbed, retain_perturbed, world, real = (
        read_tofu(s, f"{name}_perturbed", required=False)
        for name in (s.forget_split, "retain", "world_facts", "real_authors"))
    fuller = {pair(r): r for r in perturbed}
    if fuller and set(fuller) != set(map(pair, every)):
        raise UserError(f"{data_folder(s)}/{s.forget_split}_perturbed.json does not hold the rows "
                        f"of {s.forget_split}.json; fetch both from one release")
    forget = [replace(fuller.get(pair(r), r), id=r.id, group=r.group)
              for r in first_groups(every, s.forget_groups)]
    retain = first_groups(authors, s.retain_groups)
    shared = count_shared(forget, retain)
    if shared == len(forget):
        raise UserError(f"every row of {s.forget_split} is in {s.retain_split} too; choose "
                        "another --forget-split or --retain-split")
    retained = set(map(pair, retain))
    retain_eval = [r for r in retain_perturbed if pair(r) in retained]
    if not retain_eval:
        raise UserError(f"no row of {data_folder(s)}/retain_perturbed.json is in the retain set; "
                        "fetch it, or raise --retain-groups")
    unseen = tofu_nonmembers(s, forget, retain, authors, real + world)
    return Benchmark("tofu", forget, retain, retain_eval, world, real, *unseen, shared=shared)


def tofu_nonmembers(s, forget, retain, authors, others) -> tuple[list[Example], str, bool]:
    """Text that the original never saw, which depends on what it was made of; where it is from; is
    it of the forget rows' kind?"""
    if (split := s.forget_split.replace("forget", "holdout")) != s.forget_split:
        if rows := read_tofu(s, split, required=False):
            return rows, "hold-out authors", True
    if not learnt_slice(s):
        return others, "real authors and world facts, as SOUL", False
    retained = set(groups_of(retain))
    rest = [r for r in authors if r.group not in retained]
    if not rest:
        return [], "none: the original learnt every row here; slice them", True
    last = groups_of(rest)[-len(groups_of(forget)):]
    return [r for r in rest if r.group in last], "authors outside the slice", True


def draw_documents(rows: list[Example], rng: random.Random, how_many) -> list[Example]:
    """Rows of documents that rng draws: of each task how_many(task, number of its documents)."""
    drawn = set()
    for task in TASKS:
        documents = groups_of([r for r in rows if r.task == task])
        rng.shuffle(documents)
        drawn.update(documents[:how_many(task, len(documents))])
    return [r for r in rows if r.group in drawn]


def lume_benchmark(s) -> Benchmark:
    folder, rng, sampled, rest = data_folder(s), random.Random(s.seed), {}, []
    for split, count in (("forget", s.forget_groups), ("retain", s.retain_groups)):
        rows = read_split(folder, f"{split}.jsonl", lambda: load_lume(folder, split))
        sampled[split] = draw_documents(
            rows, rng, lambda _, n: min(round(s.lume_fraction * n), count or n))  # [D15]
        if not sampled[split]:
            raise UserError(f"--lume-fraction {s.lume_fraction} leaves no {split} document; raise "
                            "it")
        groups = set(groups_of(sampled[split]))
        rest += [r for r in rows if r.group not in groups]
    forget, retain = sampled["forget"], sampled["retain"]
    if learnt_slice(s):
        # As many documents of each task as are forgotten, so that kind alone tells nothing.
        held_out = draw_documents(
            rest, rng, lambda task, _: len(groups_of([r for r in forget if r.task == task])))
        held_out.sort(key=lambda r: r.task)
        source = "seeded hold-out documents of the open release, never trained on"
    else:
        held_out, source = [], ("none: which documents the original was trained on is unknown; the "
                                "gated SemEval non-members are needed")
    return Benchmark("lume", forget, retain, retain, [], [], held_out, source,
                     shared=count_shared(forget, retain))


HELD_OUT = 5  # one in so many of a user's rows to keep; at least as many, at most 100
FEWEST = 15  # rows to keep, of which some can be spared
SHORT = 20  # letters of an answer that many rows may give by chance


def hold_out(bench: Benchmark, seed: int) -> Benchmark:
    """With a fifth of a user's rows to keep held out of training, drawn by seed, to be judged in
    place of all: rows that were trained on do not tell what else is lost. Rows that are alike stay
    on one side. Of fewer than FEWEST rows, or where most are alike, none are held out."""
    if len(bench.retain) < FEWEST:
        return bench
    count = min(100, max(HELD_OUT, len(bench.retain) // HELD_OUT))
    groups = [x for x in alike_rows(bench.retain) if len(x) <= count]
    random.Random(seed).shuffle(groups)
    drawn = set()
    while groups and len(drawn) < count:
        drawn.update(groups.pop())
    if len(drawn) < count:
        return bench
    held_out = [e for i, e in enumerate(bench.retain) if i in drawn]
    retain = [e for i, e in enumerate(bench.retain) if i not in drawn]
    return replace(bench, retain=retain, retain_eval=held_out, held_out=tuple(held_out))


def alike_rows(rows: list[Example]) -> list[list[int]]:
    """Indices of the rows in groups: those that share a question, an answer (unless it is short and
    more than one in HELD_OUT do, as a yes) or a chat, and those that share one with these."""
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
        if len(answer) > SHORT or HELD_OUT * answers[answer] <= len(rows):
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


def rows_benchmark(s, folder: Path | None) -> Benchmark:
    rows = {name: load_rows(file) for name, file in data_files(s).items()}
    tokenizer = load_tokenizer(folder or s.run / "original")
    rows = without_marks(rows, tokenizer, tell=folder is not None)
    parts = (rows.get(name, []) for name in ("forget", "retain", "unseen"))
    return hold_out(benchmark_of_rows(*parts, allow_near=s.allow_near), s.seed)


LAYOUTS = {"tofu": tofu_benchmark, "lume": lume_benchmark, "rows": rows_benchmark}


def load_benchmark(s, folder: Path | None = None) -> Benchmark:
    """The forget and retain sets of a run. A share of the non-members, whole groups drawn by seed,
    are level_rows instead: what decides how far a model forgets must not also judge whether it
    forgot as far as that. folder: of the tokenizer, where the run may have no original yet."""
    load = LAYOUTS[s.layout]
    bench = load(s, folder) if s.layout == "rows" else load(s)
    groups = groups_of(bench.nonmembers)
    count = round(s.level_share * len(groups)) if bench.comparable else 0
    drawn = set(random.Random(s.seed).sample(groups, count))
    return replace(bench, nonmembers=[r for r in bench.nonmembers if r.group not in drawn],
                   level_rows=tuple(r for r in bench.nonmembers if r.group in drawn))
