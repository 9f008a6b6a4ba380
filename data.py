"""Rows to tensors: templates, encoding, batches; then where rows and tokenizers come from.

A row is an `Example`. `encode` turns it into token ids with the prompt's end found in them,
`collate` stacks rows into a `Batch` whose `targets` mark the tokens that count: the answer and one
eos [D14]. Rows are padded on the right, to the longest of their batch only; under causal attention
a token never sees what is right of it, so no attention mask is needed.

Not here: tools in chats, streaming, multi-process loading.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import re
import reprlib
import shutil
import signal
import unicodedata
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from model import NO_TEXT, Config, UserError, read_json, whole_file, write_json, write_text

IGNORE = -100  # a target that is not predicted; also cross_entropy's default
LONGEST_TOKEN = 1024  # characters: longer than any tokenizer's
CHAT_SECONDS, CHAT_BYTES = 5, 1 << 28  # that a chat template may take for one row

# name: (before the question, after it, before the answer) [D14]. The prompt ends before the third.
TEMPLATES = {
    "llama2": ("[INST] ", " [/INST]", ""),
    "qa": ("Question: ", "\nAnswer:", " "),
    "raw": ("", "", " "),
    "llama3": ("<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023"
               "\nToday Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", ""),
    "chat": None,  # the model's own, in jinja: see `render_chat`
}


# ---------------------------------------------------------------------------------------- settings


def option(default, effect: str, *, choices: tuple = ()):
    """A settings field: its default, and its effect or unit. What a number may be is checked where
    it comes from outside: pipeline/settings.py."""
    return field(default=default, metadata=dict(effect=effect, choices=choices))


def optional_package(name: str, needed_by, least: tuple = ()):
    """The module `name`, which one function alone needs; UserError if it is missing or older than
    the version `least`."""
    try:
        module = importlib.import_module(name)
        if least and [int(n) for n in re.findall(r"\d+", version(name))[:3]] < list(least):
            raise ImportError
    except ImportError:
        wanted = f"'{name}>={'.'.join(map(str, least))}'" if least else name.split(".")[0]
        raise UserError(f"{needed_by} needs a package: pip install "
                        f"{wanted.replace('_', '-')}") from None
    return module


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Which rows are forgotten and kept, and how they are put to the model."""

    seed: int = option(0, "seeds every draw: slice, initial weights, order, pairing")
    forget_split: str = option("forget10", "TOFU: file of the forget set")
    retain_split: str = option("retain90", "TOFU: file of the retain set")
    forget_groups: int = option(0, "forget only this many authors (TOFU) or documents per task "
                                "(LUME); 0: all")
    retain_groups: int = option(0, "retain only this many; 0: all")
    rows_per_author: int = option(20, "TOFU: consecutive rows that make one author")
    lume_fraction: float = option(0.4, "LUME: share of documents sampled [D15]")
    template: str = option("qa", "prompt template [D14]; chat: the model's own",
                           choices=tuple(TEMPLATES))


# -------------------------------------------------------------------- rows, templates, encoding


@dataclass(frozen=True)
class Example:
    """One row: a question and its answer, or a text all of which counts (kind "text")."""

    question: str
    answer: str
    id: str = ""     # "forget10:12" (file:row), or LUME's own
    task: str = ""   # "Task1".."Task3" for LUME
    kind: str = "qa"  # "qa", "sc" for LUME's sentence completion, or "text"
    group: str = ""  # author or document: the unit of slicing
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    perturbed_answers: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()  # (role, text) of a chat before the question


@dataclass(frozen=True)
class Encoded:
    """ids of prompt, answer and eos; the first n_prompt are the prompt's (bos counted in)."""

    ids: list[int]
    n_prompt: int

    @property
    def start(self) -> int:
        """Index of the first id that is predicted: the answer's first, but for a row that starts
        with its answer (no bos, empty prompt), where nothing precedes it: then its second."""
        return max(self.n_prompt, 1)


@dataclass(frozen=True)
class Batch:
    """ids [B, T]; targets [B, T]: ids[b, i+1] where that is answer or eos, else IGNORE."""

    ids: Tensor
    targets: Tensor


def prompt_text(question: str, tokenizer, template: str, *, turns=(), kind: str = "qa") -> str:
    """What an answer is generated from. A "text" row takes no template."""
    if template not in TEMPLATES:
        raise UserError(f"template {template!r} is unknown; choose {' or '.join(TEMPLATES)}")
    if kind == "text":
        return question
    if template == "chat":
        return render_chat(tokenizer, [*turns, ("user", question)], ask=True)
    before, after, lead = TEMPLATES[template]
    asked = {"user": (before, after), "assistant": (lead, "\n"), "system": ("", "\n")}
    return "".join(asked[role][0] + text + asked[role][1]
                   for role, text in [*turns, ("user", question)])


def full_text(example: Example, tokenizer, template: str) -> tuple[str, str]:
    """The prompt, and all that follows it: the answer with what the template puts around it."""
    e = example
    prompt = prompt_text(e.question, tokenizer, template, turns=e.turns, kind=e.kind)
    if e.kind == "text":
        return prompt, e.answer
    if template != "chat":
        return prompt, TEMPLATES[template][2] + e.answer
    turns = [*e.turns, ("user", e.question), ("assistant", e.answer)]
    whole = render_chat(tokenizer, turns, ask=False)
    if not whole.startswith(prompt):
        raise UserError("the model's chat template puts the answer elsewhere than after the prompt "
                        "that it writes; choose another --template")
    return prompt, whole[len(prompt):]


def has_own_ends(template: str, kind: str) -> bool:
    """Does the template itself write bos and eos, where the model wants them?"""
    return template == "chat" and kind != "text"


def encode_prompt(question: str, tokenizer, template: str, *, turns=(),
                  kind: str = "qa") -> list[int]:
    """ids from which an answer is generated."""
    prompt = prompt_text(question, tokenizer, template, turns=turns, kind=kind)
    return tokenizer.encode(prompt, bos=not has_own_ends(template, kind))


def encode(example: Example, tokenizer, template: str) -> Encoded:
    """Prompt, answer and eos, encoded as one string: pieces encoded apart and glued would differ
    at the seam. A token that reaches into the answer is the answer's, also if it starts before.
    A chat template writes an eos of its own: what it puts after that is left out, as no answer
    goes on from there."""
    prompt, rest = full_text(example, tokenizer, template)
    ids, ends = tokenizer.ends(prompt + rest)
    border = len(prompt.encode())
    n_prompt = sum(end <= border for end in ends)
    own = has_own_ends(template, example.kind)
    own_eos = own and tokenizer.eos_id in ids[n_prompt:]
    while own_eos and ids[-1] != tokenizer.eos_id:
        ids.pop()
    if n_prompt == len(ids) - own_eos:
        raise UserError(f"row {example.id or reprlib.repr(example.question)}: its answer "
                        f"{reprlib.repr(example.answer)} gives no token; use another tokenizer")
    bos = [] if own or tokenizer.bos_id is None else [tokenizer.bos_id]
    if not bos and example.kind == "text" and len(example.answer) < 2:
        raise UserError(f"row {example.id}: nothing stands before its text {example.answer!r}, of "
                        "one letter, for a model without bos to go on from; drop the row")
    return Encoded(bos + ids + [tokenizer.eos_id] * (not own_eos), len(bos) + n_prompt)


def encode_for(config: Config, examples: list[Example], tokenizer, template: str) -> list[Encoded]:
    """encode_all for a model of this config."""
    return encode_all(examples, tokenizer, template, context=config.max_position_embeddings,
                      vocab=config.vocab_size)


def encode_all(examples: list[Example], tokenizer, template: str, *, context: int,
               vocab: int) -> list[Encoded]:
    """Every example encoded; UserError if one does not fit the model's context or vocabulary."""
    rows = []
    for e in examples:
        size, unit = len(e.question) + len(e.answer), "characters"
        if size <= context * LONGEST_TOKEN:  # else megabytes would be encoded only to be refused
            rows.append(encode(e, tokenizer, template))
            size, unit = len(rows[-1].ids), "tokens"
        if unit == "characters" or size > context:
            raise UserError(f"row {e.id or reprlib.repr(e.question)} has {size} {unit}, more than "
                            f"the model's context of {context} tokens can hold; drop the row")
        if max(rows[-1].ids) >= vocab:
            raise UserError(f"the tokenizer gives token {max(rows[-1].ids)}, the model has {vocab}:"
                            " they are not of one model; copy the tokenizer the weights came with")
    return rows


def collate(rows: list[Encoded], device="cpu", pad_id: int = 0) -> Batch:
    """Stack rows, padded on the right to the longest."""
    width = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), width), pad_id)
    targets = torch.full((len(rows), width), IGNORE)
    for b, row in enumerate(rows):
        ids[b, :len(row.ids)] = torch.tensor(row.ids)
        targets[b, row.start - 1:len(row.ids) - 1] = torch.tensor(row.ids[row.start:])
    return Batch(ids.to(device), targets.to(device))


def batches_by_length(lengths: list[int], tokens: int) -> list[list[int]]:
    """Indices of rows, longest first, cut so that rows times longest stays within `tokens`."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    out = []
    for i in order:
        if lengths[i] > tokens:
            raise UserError(f"a budget of {tokens} tokens per pass cannot hold a row of "
                            f"{lengths[i]}; raise --micro-tokens, or --attribution-tokens "
                            "(which the m - 1 nodes of the path share: or lower --steps)")
        if out and (len(out[-1]) + 1) * lengths[out[-1][0]] <= tokens:
            out[-1].append(i)
        else:
            out.append([i])
    return out


@lru_cache(maxsize=4)
def _compiled_chat(source: str):
    """A chat template as transformers compiles it. It comes with the model, from a stranger: it
    runs in jinja's sandbox."""
    jinja2 = optional_package("jinja2", "--template chat", (3, 1, 6))  # whose sandbox holds
    sandbox = optional_package("jinja2.sandbox", "--template chat")

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **layout):
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = {"**"}  # one operation that would run for ever

        def call_binop(self, context, operator, left, right):
            return left ** right if abs(right) < 100 else refuse(f"{right} is too high a power")

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    # Llama 3's own date where it is told none: a run must say tomorrow what it says today.
    today = date(2024, 7, 26).strftime
    env.globals |= dict(raise_exception=refuse, strftime_now=today)
    # transformers marks an assistant's part with a tag of its own, which writes nothing.
    source = re.sub(r"(\{%-?)\s*generation\s*(-?%\})", r"\1 if true \2", source)
    return env.from_string(re.sub(r"(\{%-?)\s*endgeneration\s*(-?%\})", r"\1 endif \2", source))


def render_chat(tokenizer, turns: list[tuple[str, str]], *, ask: bool) -> str:
    """(role, text) turns in the model's own chat template, as transformers' apply_chat_template
    writes them; ask: with what makes the model answer (add_generation_prompt)."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template (chat_template in tokenizer_config.json"
                        f", or chat_template.jinja); choose --template "
                        f"{' or '.join(t for t in TEMPLATES if TEMPLATES[t])}")
    most = 100_000 + 10 * sum(len(text) for _, text in turns)  # characters
    try:
        with _seconds(CHAT_SECONDS), _memory(CHAT_BYTES):
            parts, size = [], 0
            for part in _compiled_chat(tokenizer.chat_template).generate(
                    messages=[dict(role=role, content=text) for role, text in turns],
                    add_generation_prompt=ask, tools=None, documents=None,
                    **tokenizer.special_tokens):
                parts.append(part)
                size += len(part)
                if size > most:
                    raise ValueError(f"it writes more than {most} characters")
            return "".join(parts)
    except UserError:
        raise
    except Exception as e:  # whatever a stranger's template does
        roles = ", ".join(role for role, _ in turns)
        raise UserError(f"the model's chat template cannot write the turns {roles} "
                        f"({one_line(e) or type(e).__name__}); choose another --template, or mend "
                        "the rows") from None


@contextlib.contextmanager
def _seconds(limit: float):
    """TimeoutError if the block takes longer, where the system and the thread allow it."""
    def ring(*_):
        raise TimeoutError(f"it takes more than {limit} s")
    try:
        handler = signal.signal(signal.SIGALRM, ring)
    except (AttributeError, ValueError):  # Windows; not the main thread
        yield
        return
    before, _ = signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, before)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def _memory(limit: int):
    """MemoryError if the block takes more bytes, where the system tells and bounds them."""
    try:
        resource = importlib.import_module("resource")  # not on every system
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = used + limit if soft == resource.RLIM_INFINITY else min(soft, used + limit)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def one_line(error: BaseException) -> str:
    """What an error of a library says, short enough to be quoted in ours."""
    return " ".join(str(error).split())[:200]


# ------------------------------------------------------------------------------------- benchmarks


@dataclass(frozen=True)
class Benchmark:
    """What one run forgets, keeps and measures."""

    kind: str                     # "tofu", "lume" or "rows"
    forget: list[Example]         # D_f
    retain: list[Example]         # D_r
    retain_eval: list[Example]    # rows of D_r on which retained utility is measured
    world_facts: list[Example]
    real_authors: list[Example]
    nonmembers: list[Example]     # for MIA [D12]; empty with the reason below
    nonmember_source: str
    shared: int = 0               # rows of D_f that are in D_r too
    alike: bool = True            # non-members are of the forget rows' kind
    level_rows: tuple = ()        # never-seen rows that set a level; not among the non-members


def load_benchmark(folder, slice_: Slice, *, layout: str, made_here: bool) -> Benchmark:
    """The forget and retain sets in a folder of the layout "tofu" or "lume", cut by whole authors
    or documents. made_here: the original learnt exactly these, so what it never saw is known."""
    load = {"tofu": _tofu_benchmark, "lume": _lume_benchmark}[layout]
    return load(Path(folder), slice_, made_here)


def set_aside(bench: Benchmark, share: float, seed: int) -> Benchmark:
    """With this share of the non-members, whole groups drawn by seed, as level_rows instead: what
    decides how far a model forgets must not also judge whether it forgot as far as that."""
    groups = list(dict.fromkeys(r.group for r in bench.nonmembers))
    count = round(share * len(groups)) if bench.alike else 0
    drawn = set(random.Random(seed).sample(groups, count))
    return replace(bench, nonmembers=[r for r in bench.nonmembers if r.group not in drawn],
                   level_rows=tuple(r for r in bench.nonmembers if r.group in drawn))


def _first_groups(rows: list[Example], count: int) -> list[Example]:
    """Rows of the first `count` groups in order of appearance; all for 0."""
    groups = list(dict.fromkeys(r.group for r in rows))
    kept = set(groups[:count] if count else groups)
    return [r for r in rows if r.group in kept]


def _tofu_benchmark(folder: Path, cut: Slice, made_here: bool) -> Benchmark:
    def load(split):
        return load_tofu(folder, split, rows_per_author=cut.rows_per_author)

    def load_if_there(split):
        return load(split) if (folder / f"{split}.json").exists() else []

    every = load(cut.forget_split)
    known = {(r.question, r.answer): r for r in load_if_there(f"{cut.forget_split}_perturbed")}
    if known and set(known) != {(r.question, r.answer) for r in every}:
        raise UserError(f"{folder}/{cut.forget_split}_perturbed.json does not hold the rows of "
                        f"{cut.forget_split}.json; fetch both from one release")
    forget = [replace(known.get((r.question, r.answer), r), id=r.id, group=r.group)
              for r in _first_groups(every, cut.forget_groups)]
    authors = load(cut.retain_split)
    retain = _first_groups(authors, cut.retain_groups)
    shared = _count_shared(forget, retain)
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
        last = list(dict.fromkeys(r.group for r in rest))[-len({r.group for r in forget}):]
        nonmembers, source = [r for r in rest if r.group in last], "authors outside the slice"
    elif made_here:
        nonmembers, source = [], "none: the original learnt every row here; slice them"
    else:
        nonmembers, source = real + world, "real authors and world facts, as SOUL"
    return Benchmark("tofu", forget, retain, retain_eval, world, real, nonmembers, source, shared,
                     alike=bool(held_out) or made_here)


def _count_shared(forget: list[Example], retain: list[Example]) -> int:
    """How many forget rows, question and answer, are to be retained too; warns if any are."""
    kept = {(r.question, r.answer) for r in retain}
    count = sum((r.question, r.answer) in kept for r in forget)
    if count:
        print(f"warning: {count} of {len(forget)} rows of the forget set are in the retain set "
              "too: they are pulled both ways", flush=True)
    return count


TASKS = ("Task1", "Task2", "Task3")  # LUME's: stories, private data, encyclopedia entries


def _lume_benchmark(folder: Path, cut: Slice, made_here: bool) -> Benchmark:
    rng, sampled, rest = random.Random(cut.seed), {}, []
    for split, count in (("forget", cut.forget_groups), ("retain", cut.retain_groups)):
        rows, kept = load_lume(folder, split), set()
        for task in TASKS:
            documents = list(dict.fromkeys(r.group for r in rows if r.task == task))
            rng.shuffle(documents)
            share = documents[:round(cut.lume_fraction * len(documents))]  # [D15]
            kept.update(share[:count] if count else share)
        sampled[split] = [r for r in rows if r.group in kept]
        if not sampled[split]:
            raise UserError(f"--lume-fraction {cut.lume_fraction} leaves no {split} document; "
                            "raise it")
        rest += [r for r in rows if r.group not in kept]
    # As many held-out documents of each task as are forgotten, so that kind alone tells nothing.
    held_out = []
    for task in TASKS:
        documents = list(dict.fromkeys(r.group for r in rest if r.task == task))
        rng.shuffle(documents)
        count = len({r.group for r in sampled["forget"] if r.task == task})
        kept = set(documents[:count])
        held_out += [r for r in rest if r.group in kept]
    source = "seeded hold-out documents of the open release, never trained on"
    if not made_here:
        held_out, source = [], ("none: which documents the original was trained on is unknown; the "
                                "gated SemEval non-members are needed")
    return Benchmark("lume", sampled["forget"], sampled["retain"], sampled["retain"], [], [],
                     held_out, source, _count_shared(sampled["forget"], sampled["retain"]))


def benchmark_of_rows(forget: list[Example], retain: list[Example],
                      unseen: list[Example]) -> Benchmark:
    """A user's own rows. unseen: rows the model never saw. No row may stand in two of them."""
    parts, place = dict(forget=forget, retain=retain, unseen=unseen), {}
    for name, rows in parts.items():
        for e in rows:
            other = place.setdefault((e.turns, e.question, e.answer), name)
            if other != name:
                raise UserError(f"row {e.id} of the {name} rows is among the {other} rows too; "
                                "leave it in one of the two files")
    return Benchmark("rows", forget, retain, retain, [], [], unseen,
                     "rows given as unseen" if unseen else "none: no unseen rows are given")


# ------------------------------------------------------------------------------------ files of rows


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def data_digests(folder) -> dict[str, str]:
    """sha256 of every JSON file in a folder, by name: they decide whether a stage is stale."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*.json*") if p.is_file())
    return {str(p.relative_to(folder)): sha256(p) for p in files}


def _json_lines(path: Path) -> list[tuple[str, dict]]:
    """(where, row) of a file with one JSON object a line; Windows line ends and a byte-order mark
    are accepted."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file; name the file")
    if not path.is_file():
        what = "is not a plain file" if path.exists() else "is missing"
        raise UserError(f"{path} {what}; name another, or point --data or SIMU_DATA at the folder "
                        f"that holds {path.parent.name}/{path.name}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}); save it as that") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{where} is not a JSON object on one line; mend it, or fetch the file "
                            "again") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object; each line must be one row")
        rows.append((where, row))
    if not rows:
        raise UserError(f"{path} holds no rows; fetch or make it again")
    return rows


def _text(row: dict, key: str, where: str) -> str:
    value = row.get(key)
    if key not in row:
        raise UserError(f"{where} has no {key!r}; rows need it")
    if not isinstance(value, str) or not value.strip() or NO_TEXT.search(value):
        raise UserError(f"{where}: {key!r} is not a filled text; mend or drop the row")
    return value


def _texts(row: dict, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(row[key], list) or not row[key]:
        raise UserError(f"{where}: {key!r} is not a list of texts; mend or drop the row")
    return tuple(_text({key: v}, key, where) for v in row[key])


def _tofu_row(row: dict, where: str, **more) -> Example:
    """A row of TOFU's files, with paraphrases and wrong answers where it has them."""
    extra = {k: _text(row, k, where) for k in ("paraphrased_question", "paraphrased_answer")
             if k in row}
    if "perturbed_answer" in row:
        extra["perturbed_answers"] = _texts(row, "perturbed_answer", where)
    return Example(_text(row, "question", where), _text(row, "answer", where), **extra, **more)


def load_tofu(folder, split: str, *, rows_per_author: int = 20) -> list[Example]:
    """The rows of `<folder>/<split>.json` (JSON lines)."""
    return [_tofu_row(row, where, id=f"{split}:{n}", group=f"{split}/{n // rows_per_author}")
            for n, (where, row) in enumerate(_json_lines(Path(folder) / f"{split}.json"))]


def load_lume(folder, split: str) -> list[Example]:
    """The rows of `<folder>/<split>.jsonl`: LUME's open release, split forget or retain."""
    examples, seen = [], set()
    for where, row in _json_lines(Path(folder) / f"{split}.jsonl"):
        name, asked, answer, task = (_text(row, key, where)
                                     for key in ("id", "input", "output", "task"))
        kind = name[:-1][-2:]  # the id is <document>sc1 or <document>qa0
        if kind not in ("sc", "qa"):
            raise UserError(f"{where}: id {name!r} does not end in sc or qa and a digit")
        if task not in TASKS:
            raise UserError(f"{where}: task {task!r} is not {' or '.join(TASKS)}")
        if name in seen:
            raise UserError(f"{where}: id {name!r} stands twice in the file; drop one")
        seen.add(name)
        examples.append(Example(asked, answer, id=name, task=task, kind=kind, group=name[:-3]))
    return examples


ROW_SHAPES = ("{question, answer}, {prompt, completion}, {input, output}, {text} or {messages: "
              "[{role, content}, ...]} with the assistant's turn last, after a user's")


def load_rows(file) -> list[Example]:
    """The rows of a user's own file (JSON lines), each of one of ROW_SHAPES. Of a chat the last
    turn is the answer and the user's before it the question; `turns` are those before."""
    stem = Path(file).stem
    return [_row(row, where, f"{stem}:{n}")
            for n, (where, row) in enumerate(_json_lines(Path(file)))]


def _row(row: dict, where: str, name: str) -> Example:
    if "question" in row and "answer" in row:
        return _tofu_row(row, where, id=name, group=name)
    for asked, answer in (("prompt", "completion"), ("input", "output")):
        if asked in row and answer in row:
            return Example(_text(row, asked, where), _text(row, answer, where), id=name, group=name)
    if "text" in row:
        return Example("", _text(row, "text", where), id=name, group=name, kind="text")
    if "messages" not in row:
        raise UserError(f"{where} has the keys {reprlib.repr(sorted(row))}; a row must be "
                        f"{ROW_SHAPES}")
    messages = row["messages"] if isinstance(row["messages"], list) else []
    turns = tuple((m.get("role"), _text(m, "content", where)) if isinstance(m, dict) else ("", "")
                  for m in messages)
    roles = [role for role, _ in turns]
    if roles[-2:] != ["user", "assistant"] or not all(
            role in ("system", "user", "assistant") for role in roles):
        raise UserError(f"{where}: 'messages' has the roles {reprlib.repr(roles)}; a row must be "
                        f"{ROW_SHAPES}")
    return Example(turns[-2][1], turns[-1][1], id=name, group=name, turns=turns[:-2])


def halved(example: Example) -> Example:
    """A "text" row with its first half as the prompt, cut between words: what is asked of a model
    to see whether it goes on with the rest."""
    text = example.answer
    spaces = [i for i in range(1, len(text) - 1) if text[i].isspace()]
    middle = min(spaces, key=lambda i: abs(i - len(text) / 2), default=len(text) // 2)
    return replace(example, question=text[:middle], answer=text[middle:])


# -------------------------------------------------------------------------------------- tokenizers


class LlamaTokenizer:
    """A sentencepiece `tokenizer.model`. names: the content of tokenizer_config.json."""

    def __init__(self, path: Path, names: dict):
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, ValueError):
            raise UserError(f"{path} is not a sentencepiece model; fetch it again") from None
        self.path, self.bos_id, self.eos_id = path, self._sp.bos_id(), self._sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{path} has no bos or no eos piece; use a LLaMA tokenizer")
        self.vocab_size = self._sp.get_piece_size()
        # Names that mean a token of their own wherever they stand in a text, as in transformers.
        self._special = {self._sp.id_to_piece(i): i for i in range(self.vocab_size)
                         if self._sp.is_control(i) or self._sp.is_unknown(i)}
        self._special |= _added_tokens(names)
        self.eos_id = self._special.get(_token_text(names.get("eos_token")), self.eos_id)
        longest_first = sorted(filter(None, self._special), key=len, reverse=True)
        self._splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._legacy = names.get("legacy") is True  # a space also after a special token

    def _pieces(self, text: str) -> list[tuple[int, int]]:
        """Token ids of a text, and the width of each in its UTF-8 bytes."""
        out = []
        for n, part in enumerate(self._splitter.split(text)):
            if part in self._special:
                out.append((self._special[part], len(part.encode())))
            elif part and (n == 0 or self._legacy):
                out += self._spell(self._sp.encode(part), extra=1)  # the space put before it
            elif part:  # after a special token no space is put: NUL joins with nothing, and goes
                out += self._spell(self._sp.encode("\0" + part)[2:], extra=0)
        return out

    def _spell(self, ids: list[int], *, extra: int):
        """Widths of ids; `extra` bytes of the first are not the text's."""
        for i in ids:
            # A character outside the vocabulary is spelled in bytes.
            width = 1 if self._sp.is_byte(i) else len(
                self._sp.id_to_piece(i).replace("\u2581", " ").encode())
            yield i, width - extra
            extra = 0

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return [self.bos_id] * bos + [i for i, _ in self._pieces(text)]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; bos, eos and rows that pad the model's vocabulary say nothing."""
        return self._sp.decode([i for i in ids if 0 <= i < self.vocab_size])

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        """ids without bos, and where each ends, in UTF-8 bytes of text."""
        plain = text.replace("\u2581", " ")  # sentencepiece takes its own sign for a space
        ids, ends = [], [0]
        for i, width in self._pieces(plain):
            ids.append(i)
            ends.append(ends[-1] + width)
        if ends[-1] != len(plain.encode()):
            raise UserError(f"{self.path} rewrites text (normalisation other than identity): "
                            "where a prompt ends cannot be found; use a LLaMA tokenizer")
        if plain != text:
            place = [0]  # by byte of plain: where it lies in text
            for c in text:
                size = len(c.encode())
                place += [place[-1] + size] if c == "\u2581" else [
                    place[-1] + k for k in range(1, size + 1)]
            ends = [place[end] for end in ends]
        return ids, ends[1:]


class JsonTokenizer:
    """A Hugging Face `tokenizer.json` (OLMo, Llama 3, Qwen: byte-level BPE). eos_ids: those the
    model's config.json names. names: the content of tokenizer_config.json."""

    def __init__(self, path: Path, eos_ids: list[int], names: dict):
        tokenizers = optional_package("tokenizers", path)  # sentencepiece cannot read this format
        self.path = path
        with self._library("is not a tokenizer.json"):
            self._tok = tokenizers.Tokenizer.from_file(str(path))
            self._tok.no_padding()
            self._tok.no_truncation()
            self.bos_id = self._bos(names)
            # A post-processor would cut spaces off a token's place in the text; bos we add.
            self._tok.post_processor = None
            # Added tokens count: some models add a <pad> that their embedding has no row for.
            self.vocab_size = self._tok.get_vocab_size()
        if getattr(self._tok.model, "dropout", None):
            raise UserError(f"{path} encodes a text differently each time (BPE dropout); set its "
                            "model.dropout to null")
        own = self._id(names.get("eos_token"))
        # OLMo's two published tokenizers disagree on <|endoftext|> (0 or 50279): the model decides,
        # and only between several of its own (Llama 3) does the tokenizer.
        ends = (*sorted(eos_ids, key=lambda i: i != own), own, self._id("<|endoftext|>"),
                self._id("</s>"))
        self.eos_id = next((i for i in ends if i is not None), None)
        if self.eos_id is None:
            raise UserError(f"{path} names no end-of-text token; set eos_token_id in config.json")

    @contextlib.contextmanager
    def _library(self, what: str):
        """The library raises bare Exceptions. Where it panics, it raises what is not even one, and
        writes to stderr itself: nothing of that passes."""
        try:
            with _muted_stderr():
                yield
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as e:
            raise UserError(f"{self.path} {what} ({one_line(e)}); fetch it again, or use the "
                            "tokenizer the weights came with") from None

    def _id(self, token) -> int | None:
        return self._tok.token_to_id(_token_text(token))

    def _bos(self, names: dict) -> int | None:
        """What transformers would put before a text: what tokenizer_config.json says, else what
        the post-processor does (Llama 3)."""
        coded = self._tok.encode("a")
        starts = coded.special_tokens_mask[:1] == [1]
        if not names.get("add_bos_token", True):
            return None
        return coded.ids[0] if starts else self._id(
            names.get("bos_token") if "add_bos_token" in names else "<s>")

    def _encode(self, text: str):
        with self._library("cannot encode a text"):
            return self._tok.encode(text, add_special_tokens=False)

    def encode(self, text: str, *, bos: bool) -> list[int]:
        start = [self.bos_id] if bos and self.bos_id is not None else []
        return start + self._encode(text).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens and rows that pad the model's vocabulary say nothing."""
        kept = [i for i in ids if 0 <= i < self.vocab_size and i != self.eos_id]
        with self._library("cannot decode what a model said"):
            return self._tok.decode(kept, skip_special_tokens=True)

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        """ids without bos, and where each ends, in UTF-8 bytes of text."""
        coded = self._encode(text)
        size, reached, lost = [0], 0, ""
        for c in text:
            size.append(size[-1] + len(c.encode()))
        for start, end in [*coded.offsets, (len(text), len(text))]:
            lost = lost or text[reached:start].strip()
            reached = max(reached, end)
        # Composing characters (NFC) leaves holes where nothing is lost.
        if lost and unicodedata.is_normalized("NFC", text):
            raise UserError(f"{self.path} drops {reprlib.repr(lost)} from a text, for which its "
                            "vocabulary or normaliser has no place; use the tokenizer the weights "
                            "came with, or drop the row")
        # A character split over several tokens gives the first of them no width of its own.
        return coded.ids, [size[end] if end > start else size[start] + 1
                           for start, end in coded.offsets]


@contextlib.contextmanager
def _muted_stderr():
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # stderr is closed
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _token_text(token) -> str:
    """The text of a special token as tokenizer_config.json has it: plain, or in an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _added_tokens(names: dict) -> dict[str, int]:
    added = names.get("added_tokens_decoder")
    return {_token_text(token): int(i) for i, token in added.items()
            if i.isascii() and i.isdigit() and _token_text(token)} if isinstance(
                added, dict) else {}


def _json_beside(path: Path, name: str) -> dict:
    """The JSON object in a file beside another; empty if it is not there."""
    file = path.with_name(name)
    if not file.exists():
        return {}
    value = read_json(file) if file.is_file() else None  # a pipe would be waited for
    if not isinstance(value, dict):
        raise UserError(f"{file} does not hold a JSON object; fetch it again")
    return value


def _chat_template(path: Path, names: dict) -> str:
    """The text of a model's chat template, "" if it has none."""
    file, own = path.with_name("chat_template.jinja"), names.get("chat_template")
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8 text; fetch it again") from None
    if isinstance(own, list):  # several, by name
        own = next((t.get("template") for t in own
                    if isinstance(t, dict) and t.get("name") == "default"), None)
    return own if isinstance(own, str) else ""


def load_tokenizer(path):
    """The tokenizer of a model folder (tokenizer.model, else tokenizer.json), or such a file.

    Has encode(text, *, bos) -> ids, decode(ids) -> text, ends(text), bos_id (or None), eos_id,
    vocab_size, chat_template ("" if the model has none) and special_tokens (bos_token, ...)."""
    path = Path(path)
    if path.is_dir():
        found = [path / n for n in ("tokenizer.model", "tokenizer.json") if (path / n).is_file()]
        if not found:
            raise UserError(f"{path} has neither tokenizer.model nor tokenizer.json; copy it there "
                            "from where the weights came from")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path} is missing: no tokenizer there")
    with open(path, "rb"):  # what may not be read is no fault of its content
        pass
    names = _json_beside(path, "tokenizer_config.json")
    if path.suffix != ".json":
        tokenizer = LlamaTokenizer(path, names)
    else:
        eos = _json_beside(path, "config.json").get("eos_token_id")
        eos = eos if isinstance(eos, list) else [eos]
        tokenizer = JsonTokenizer(path, [i for i in eos if type(i) is int and i >= 0], names)
    tokenizer.chat_template = _chat_template(path, names)
    named = _json_beside(path, "special_tokens_map.json") | names
    tokenizer.special_tokens = {k: _token_text(v) for k, v in named.items()
                                if k.endswith("_token") and _token_text(v)}
    return tokenizer


TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def copy_tokenizer(source: Path, target: Path):
    """Copy a tokenizer's files; what would make transformers fetch and run code stays behind."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
    names = _json_beside(Path(target) / "tokenizer.json", "tokenizer_config.json")
    if names.pop("auto_map", None):  # the original OLMo layout's
        write_json(Path(target) / "tokenizer_config.json", names | PLAIN_IN_TRANSFORMERS)


# How transformers must read tokenizer.json, and tokenizer.model, to get the same ids.
PLAIN_IN_TRANSFORMERS = dict(tokenizer_class="PreTrainedTokenizerFast",
                             model_input_names=["input_ids", "attention_mask"],
                             clean_up_tokenization_spaces=False)
LLAMA_IN_TRANSFORMERS = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True,
                             add_eos_token=False, legacy=False, bos_token="<s>", eos_token="</s>",
                             unk_token="<unk>")


def train_tokenizer(texts: list[str], folder: Path, *, llama: bool, vocab: int):
    """Train a small tokenizer of LLaMA's or OLMo's kind on texts, and save it in folder."""
    (_train_llama if llama else _train_olmo)(texts, Path(folder), vocab)


def _train_llama(texts: list[str], folder: Path, vocab: int):
    text = sorted({line for t in texts for line in t.splitlines() if line.strip()})
    model = io.BytesIO()  # a file name would be written into the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=model, vocab_size=vocab, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, character_coverage=1.0, hard_vocab_limit=False,
            num_threads=1, minloglevel=2)
    except RuntimeError as e:
        raise UserError(f"--vocab {vocab} does not suit this text ({e}); raise it") from None
    with whole_file(folder / "tokenizer.model") as file:
        file.write(model.getvalue())
    write_text(folder / "tokenizer_config.json", json.dumps(LLAMA_IN_TRANSFORMERS))


def _train_olmo(texts: list[str], folder: Path, vocab: int):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, show_progress=False,
                                  special_tokens=["<|endoftext|>", "<|padding|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(sorted(set(texts)), trainer)
    # Not tok.save: on a full disk the library's own writer says nothing of what happened.
    write_text(folder / "tokenizer.json", tok.to_str(pretty=True))
    names = dict(eos_token="<|endoftext|>", pad_token="<|padding|>")
    write_text(folder / "tokenizer_config.json", json.dumps(names | PLAIN_IN_TRANSFORMERS))
