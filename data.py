"""Rows to tensors: templates, encoding, batches; then files of rows, and tokenizers.

A row is an `Example`. `encode` turns it into token ids with the prompt's end found in them,
`collate` stacks rows into a `Batch` whose `targets` mark the tokens that count: the answer and one
eos [D14]. Rows are padded on the right, to the longest of their batch only; under causal attention
a token never sees what is right of it, so no attention mask is needed.

Not here: chat templates (pipeline/tokenizers.py), tools in chats, streaming, several processes.
"""

import contextlib
import csv
import importlib
import io
import itertools
import json
import os
import re
import reprlib
import shutil
import unicodedata
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from model import NO_TEXT, Config, UserError, read_json, write_json

IGNORE = -100  # a target that is not predicted; also cross_entropy's default
LONGEST_TOKEN = 1024  # characters: longer than any tokenizer's

# name: (before the question, after it, before the answer) [D14]. The prompt ends before the third.
TEMPLATES = {
    "llama2": ("[INST] ", " [/INST]", ""),
    "qa": ("Question: ", "\nAnswer:", " "),
    "raw": ("", "", " "),
    "verbatim": ("", "", ""),
    "llama3": ("<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023"
               "\nToday Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", ""),
    "chat": None,  # the model's chat template, in jinja: tokenizer.render_chat
}
TURN_END = {"llama3": "<|eot_id|>"}  # ends an answer where it is one of the model's eos tokens


# ---------------------------------------------------------------------------------------- settings


def option(default, effect: str, *, choices: tuple = (), low=None, above=None, high=None,
           below=None):
    """A settings field: its default, its effect or unit, and what it may be: one of `choices`, or
    a number x with low <= x, above < x, x <= high, x < below. pipeline/settings.py checks that,
    for only there do values come from outside."""
    limits = dict(low=low, above=above, high=high, below=below)
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    return field(default=default, metadata=dict(effect=effect, choices=choices, limits=limits))


def optional_package(name: str, needed_by, least: tuple = ()):
    """The module `name`, which only `needed_by` needs; UserError if it is missing or older than
    `least`."""
    try:
        module = importlib.import_module(name)
        if least and [int(n) for n in re.findall(r"\d+", version(name))[:3]] < list(least):
            raise ImportError
    except ImportError:
        wanted = f"'{name}>={'.'.join(map(str, least))}'" if least else name.split(".")[0]
        raise UserError(f"{needed_by} needs a package: pip install "
                        f"{wanted.replace('_', '-')}") from None
    return module


# -------------------------------------------------------------------- rows, templates, encoding


@dataclass(frozen=True)
class Example:
    """One row: a question and its answer, or (kind "text") a text whose every token counts."""

    question: str
    answer: str
    id: str = ""     # "forget10:12" (file:row), or the id that LUME gives it
    task: str = ""   # "Task1".."Task3" for LUME
    kind: str = "qa"  # "sc": LUME's completions; "text", "verbatim": put in no template
    group: str = ""  # author or document: the unit of slicing
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    perturbed_answers: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()  # (role, text) of a chat before the question
    where: str = field(default="", compare=False)  # file and line


@dataclass(frozen=True)
class Encoded:
    """ids of prompt, answer and eos; the first n_prompt are the prompt's (bos counted in)."""

    ids: list[int]
    n_prompt: int

    @property
    def start(self) -> int:
        """Index of the first id that is predicted: the answer's first, or its second where no bos
        and no prompt precede it."""
        return max(self.n_prompt, 1)


@dataclass(frozen=True)
class Batch:
    """ids [B, T]; targets [B, T]: ids[b, i+1] where that is answer or eos, else IGNORE."""

    ids: Tensor
    targets: Tensor


def template_of(template: str, kind: str) -> str:
    """The template of a row: none but "verbatim" for rows of the kinds "text" and "verbatim"."""
    if template not in TEMPLATES:
        raise UserError(f"template {template!r} is unknown; choose {' or '.join(TEMPLATES)}")
    return "verbatim" if kind in ("text", "verbatim") else template


def render_chat(tokenizer, turns: list[tuple[str, str]], *, ask: bool) -> str:
    """(role, text) turns in the model's chat template; ask: with the start of the answer's turn."""
    if not hasattr(tokenizer, "render_chat"):
        raise UserError("--template chat needs a tokenizer that renders chats: load it by "
                        "pipeline.tokenizers.load_tokenizer")
    return tokenizer.render_chat(turns, ask=ask)


def joined(lead: str, text: str) -> str:
    """A template's lead and a text, with one space between them where both bring one."""
    return (lead.rstrip(" ") if text.startswith(" ") else lead) + text


def prompt_text(question: str, tokenizer, template: str, *, turns=(), kind: str = "qa") -> str:
    """What an answer is generated from."""
    template = template_of(template, kind)
    if template == "chat":
        return render_chat(tokenizer, [*turns, ("user", question)], ask=True)
    before, after, lead = TEMPLATES[template]
    write = {"user": lambda text: before + text + after, "system": lambda text: text + "\n",
             "assistant": lambda text: joined(lead, text) + "\n"}
    return "".join(write[role](text) for role, text in [*turns, ("user", question)])


def full_text(example: Example, tokenizer, template: str) -> tuple[str, str]:
    """The prompt, and all that follows it: the answer with what the template puts around it."""
    e = example
    prompt = prompt_text(e.question, tokenizer, template, turns=e.turns, kind=e.kind)
    template = template_of(template, e.kind)
    if template != "chat":
        return prompt, joined(TEMPLATES[template][2], e.answer)
    turns = [*e.turns, ("user", e.question), ("assistant", e.answer)]
    text = render_chat(tokenizer, turns, ask=False)
    if not text.startswith(prompt):
        raise UserError("the model's chat template puts the answer elsewhere than after the prompt "
                        "that it writes; choose another --template")
    return prompt, text[len(prompt):]


def encode_prompt(question: str, tokenizer, template: str, *, turns=(),
                  kind: str = "qa") -> list[int]:
    """ids from which an answer is generated. A chat template writes bos itself, if it wants one."""
    prompt = prompt_text(question, tokenizer, template, turns=turns, kind=kind)
    return tokenizer.encode(prompt, bos=template_of(template, kind) != "chat")


def turn_end(tokenizer, template: str) -> int:
    """The token that ends an answer in a template that does not write one itself."""
    named = tokenizer.encode(TURN_END[template], bos=False) if template in TURN_END else []
    return named[0] if len(named) == 1 and named[0] in tokenizer.eos_ids else tokenizer.eos_id


def encode(example: Example, tokenizer, template: str) -> Encoded:
    """Prompt, answer and eos, encoded as one string [D14]: prompt and answer encoded separately
    can give other tokens where they meet. A token that reaches into the answer counts as the
    answer's. A chat template writes an eos itself: what it puts after that is left out."""
    e, prompt_and_rest = example, full_text(example, tokenizer, template)
    template = template_of(template, e.kind)
    ids, ends = tokenizer.ends("".join(prompt_and_rest))
    prompt_bytes = len(prompt_and_rest[0].encode())
    n_prompt = sum(end <= prompt_bytes for end in ends)
    has_eos = template == "chat" and not set(tokenizer.eos_ids).isdisjoint(ids[n_prompt:])
    while has_eos and ids[-1] not in tokenizer.eos_ids:
        ids.pop()
    if n_prompt == len(ids) - has_eos:
        raise UserError(f"row {e.id or reprlib.repr(e.question)}: its answer "
                        f"{reprlib.repr(e.answer)} gives no token; use another tokenizer")
    bos = [] if template == "chat" or tokenizer.bos_id is None else [tokenizer.bos_id]
    if not bos and n_prompt == 0 and len(e.answer) < 2:
        raise UserError(f"row {e.id}: nothing stands before its text {e.answer!r}, of "
                        "one letter, for a model without bos to go on from; drop the row")
    eos = [] if has_eos else [turn_end(tokenizer, template)]
    return Encoded(bos + ids + eos, len(bos) + n_prompt)


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
        if size <= context * LONGEST_TOKEN:  # a longer row cannot fit: not worth encoding
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
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > tokens:
            raise UserError(f"a budget of {tokens} tokens per pass cannot hold a row of "
                            f"{lengths[i]}; raise --micro-tokens, or --attribution-tokens "
                            "(which the m - 1 nodes of the path share: or lower --steps)")
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def halved(example: Example) -> Example:
    """A "text" row with its first half, cut between words, as the question: does a model go on
    with the second half?"""
    text = example.answer
    spaces = [i for i in range(1, len(text) - 1) if text[i].isspace()]
    middle = min(spaces, key=lambda i: abs(i - len(text) / 2), default=len(text) // 2)
    return replace(example, question=text[:middle], answer=text[middle:])


# ------------------------------------------------------------------------------------ files of rows

ROW_SHAPES = ("{question, answer}, {prompt, completion}, {instruction, input, output}, {input, "
              "output}, {text} or {messages: [{role, content}, ...]} with the assistant's turn "
              "last, after a user's")
PAIRS = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"),
         ("instruction", "response"), ("input", "output"))
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant"}  # ShareGPT's and Gemini's
# Keys that change what a model is asked, or how much a row counts: refused where they are not used.
MEANINGFUL = {"system", "system_prompt", "context", "instruction", "input", "passage", "document",
              "documents", "history", "tools", "functions", "tool_calls", "function_call", "weight",
              "images", "image", "audio", "thinking", "reasoning", "reasoning_content"}


def read_rows(path: Path) -> list[tuple[str, object]]:
    """(file and line, row) of a file of JSON lines, of one JSON array, or of a .csv or .tsv with a
    head line, whose empty cells are absent. What is not JSON stays text."""
    if not path.is_file():
        what = ("is a folder, not a file; name the file" if path.is_dir() else
                ("is not a plain file" if path.exists() else "is missing") + "; name another, or "
                f"point --data or SIMU_DATA at the folder that holds "
                f"{path.parent.name}/{path.name}")
        raise UserError(f"{path} {what}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}); save it as JSON lines or CSV "
                        "in UTF-8") from None

    def parsed(text):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    if path.suffix in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True,
                               delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            rows = [(f"{path} line {table.line_num}", {k: v or None for k, v in row.items()})
                    for row in table]
        except csv.Error as e:
            raise UserError(f"{path} line {table.line_num} is not CSV ({e}); save it "
                            "again") from None
    elif text.lstrip()[:1] == "[" and isinstance(array := parsed(text), list):
        rows = [(f"{path} row {n}", row) for n, row in enumerate(array, 1)]
    else:
        rows = [(f"{path} line {n}", parsed(line)) for n, line in enumerate(text.split("\n"), 1)
                if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no rows; fetch or make it again")
    return rows


def examples_of(path: Path, make) -> list[Example]:
    """make(row, where, number) of every row of a file. UserError tells the first wrong row, and how
    many more there are."""
    examples, wrong = [], []
    for number, (where, row) in enumerate(read_rows(path)):
        try:
            if not isinstance(row, dict) or None in row:  # None: a table's cells beyond its head
                raise UserError(f"{where} is not a JSON object on one line, nor a table's row as "
                                "long as its head line: mend it, or fetch the file again")
            examples.append(replace(make(row, where, number), where=where))
        except UserError as e:
            wrong.append(str(e))
    if wrong:
        raise UserError(wrong[0] + (f" ({len(wrong) - 1} more rows of the file are wrong)"
                                    if wrong[1:] else ""))
    return examples


def text_at(row: dict, key: str, where: str) -> str:
    value = row.get(key)
    if key not in row:
        raise UserError(f"{where} has no {key!r}; rows need it")
    if not isinstance(value, str) or not value.strip() or NO_TEXT.search(value):
        raise UserError(f"{where}: {key!r} is not a filled text; mend or drop the row")
    return value


def tofu_row(row: dict, where: str, **more) -> Example:
    """A row of TOFU's files, with paraphrases and wrong answers where it has them."""
    extra = {k: text_at(row, k, where) for k in ("paraphrased_question", "paraphrased_answer")
             if k in row}
    if wrong := row.get("perturbed_answer"):
        if not isinstance(wrong, list):
            raise UserError(f"{where}: 'perturbed_answer' is not a list of texts; mend the row")
        extra["perturbed_answers"] = tuple(
            text_at({"perturbed_answer": x}, "perturbed_answer", where) for x in wrong)
    return Example(text_at(row, "question", where), text_at(row, "answer", where), **extra, **more)


def load_tofu(folder, split: str, *, rows_per_author: int = 20) -> list[Example]:
    """The rows of `<folder>/<split>.json` (JSON lines)."""
    return examples_of(Path(folder) / f"{split}.json", lambda row, where, n: tofu_row(
        row, where, id=f"{split}:{n}", group=f"{split}/{n // rows_per_author}"))


TASKS = ("Task1", "Task2", "Task3")  # LUME's: stories, private data, encyclopedia entries


def load_lume(folder, split: str) -> list[Example]:
    """The rows of `<folder>/<split>.jsonl`: LUME's open release, split forget or retain."""
    seen = set()

    def make(row, where, _):
        name, asked, answer, task = (text_at(row, k, where) for k in ("id", "input", "output",
                                                                      "task"))
        kind = name[:-1][-2:]  # the id is <document>sc1 or <document>qa0
        if kind not in ("sc", "qa"):
            raise UserError(f"{where}: id {name!r} does not end in sc or qa and a digit")
        if task not in TASKS:
            raise UserError(f"{where}: task {task!r} is not {' or '.join(TASKS)}")
        if name in seen:
            raise UserError(f"{where}: id {name!r} stands twice in the file; drop one")
        seen.add(name)
        return Example(asked, answer, id=name, task=task, kind=kind, group=name[:-3])

    return examples_of(Path(folder) / f"{split}.jsonl", make)


def load_rows(file) -> list[Example]:
    """The rows of a user's file, each of one of ROW_SHAPES; a null value counts as absent."""
    return examples_of(Path(file), lambda row, where, n: user_row(
        {k: v for k, v in row.items() if v is not None}, where, f"{Path(file).stem}:{n}"))


def refuse_unused(row: dict, used: set, where: str):
    for key in row:
        if str(key).lower() in MEANINGFUL - used and row[key] not in ("", [], {}):
            raise UserError(f"{where}: {key!r} changes what a model is asked or how much a row "
                            "counts, and is not used here; put it into the question, or drop it")


def user_row(row: dict, where: str, name: str) -> Example:
    """A row of a user's file. An instruction is joined with its input by a line end; a completion
    follows its prompt with nothing between; of a chat the last turn is the answer, the user's
    before it the question."""
    more, used = dict(id=name, group=name), {"system"}
    turns = ((("system", text_at(row, "system", where)),) if row.get("system") else ())
    pair = next((p for p in PAIRS if p[0] in row and p[1] in row), None)
    if pair:
        used |= set(pair)
    if pair == ("question", "answer"):
        example = tofu_row(row, where, turns=turns, **more)
    elif pair == ("prompt", "completion"):
        used -= {"system"}  # the prompt is all that is asked
        example = Example(*(text_at(row, k, where) for k in pair), kind="verbatim", **more)
    elif pair:
        question, answer = (text_at(row, k, where) for k in pair)
        if pair[0] == "instruction" and row.get("input"):
            used |= {"input"}
            question += "\n" + text_at(row, "input", where)
        example = Example(question, answer, turns=turns, **more)
    elif "text" in row:
        used -= {"system"}
        example = Example("", text_at(row, "text", where), kind="text", **more)
    else:
        key = next((k for k in ("messages", "conversations") if k in row), None)
        if key is None:
            raise UserError(f"{where} has the keys {reprlib.repr(sorted(map(str, row)))}; a row "
                            f"must be {ROW_SHAPES}")
        *turns, (_, question), (_, answer) = chat_turns(row[key], key, where, turns)
        example = Example(question, answer, turns=tuple(turns), **more)
    refuse_unused(row, used, where)
    return example


def chat_turns(messages, key: str, where: str, before: tuple) -> list[tuple[str, str]]:
    """(role, text) of a chat that ends with a user's turn and the assistant's."""
    turns = list(before)
    for m in messages if isinstance(messages, list) else []:
        m = {k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else {"role": ""}
        refuse_unused(m, set(), where)
        role, content = ("from", "value") if "from" in m else ("role", "content")
        role = m.get(role)
        turns.append((SPEAKERS.get(role, role) if isinstance(role, str) else role,
                      text_at(m, content, where) if role else ""))
    roles = [role for role, _ in turns]
    if roles[-2:] != ["user", "assistant"] or not all(
            role in ("system", "user", "assistant") for role in roles):
        raise UserError(f"{where}: {key!r} has the roles {reprlib.repr(roles)}; a row must be "
                        f"{ROW_SHAPES}")
    return turns


# -------------------------------------------------------------------------------------- tokenizers


class SentencePieceTokenizer:
    """A `tokenizer.model` without added tokens, as LLaMA's, by the package sentencepiece."""

    def __init__(self, path: Path, config: dict):
        self.path, self._sp = path, sentencepiece_model(path, config)
        self.vocab_size, self.eos_id = self._sp.get_piece_size(), self._sp.eos_id()
        # transformers puts bos where a tokenizer_config.json says so; without one, Meta does.
        self.bos_id = self._sp.bos_id() if config["add_bos_token"] else None
        self._special = special_pieces(self._sp)  # each is one token wherever it stands in a text
        longest_first = sorted(filter(None, self._special), key=len, reverse=True)
        self._splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # legacy: a space is put after a special token too.
        self._legacy, self._is_llama = config["legacy"], config["is_llama"]

    def _pieces(self, text: str) -> list[tuple[int, int]]:
        """Token ids of a text, and the width of each in its UTF-8 bytes."""
        pieces = []
        for n, part in enumerate(self._splitter.split(text)):
            if part in self._special:
                pieces.append((self._special[part], len(part.encode())))
                continue
            # sentencepiece puts a space before any text; transformers puts none after a special
            # token. There a NUL is encoded in front, and it and its space are dropped.
            spaced = n == 0 or self._legacy and not (self._is_llama and part.startswith(" "))
            ids = self._sp.encode(part) if spaced else self._sp.encode("\0" + part)[2:]
            for k, i in enumerate(ids if part else []):
                # A character outside the vocabulary is spelled in bytes.
                width = 1 if self._sp.is_byte(i) else len(
                    self._sp.id_to_piece(i).replace("\u2581", " ").encode())
                pieces.append((i, width - (spaced and k == 0)))
        return pieces

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return [self.bos_id] * (bos and self.bos_id is not None) + [
            i for i, _ in self._pieces(text)]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens, and ids beyond the tokenizer's vocabulary, have none."""
        return self._sp.decode([i for i in ids if 0 <= i < self.vocab_size])

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        """ids without bos, and where each ends, in UTF-8 bytes of text."""
        # sentencepiece's sign for a space, three bytes, is a space to it also where it stands in
        # a text: ends are counted in plain, and at[i] is where byte i of plain lies in text.
        plain, at = text.replace("\u2581", " "), [0]
        for c in text:
            at += [at[-1] + 3] if c == "\u2581" else range(at[-1] + 1, at[-1] + 1 + len(c.encode()))
        pieces = self._pieces(plain)
        ends = list(itertools.accumulate((width for _, width in pieces), initial=0))
        if ends[-1] != len(plain.encode()):
            raise UserError(f"{self.path} rewrites text (normalisation other than identity): "
                            "where a prompt ends cannot be found; use a LLaMA tokenizer")
        return [i for i, _ in pieces], [at[end] for end in ends[1:]]


class JsonTokenizer:
    """A `tokenizer.json`, or a `tokenizer.model` with added tokens, by the package tokenizers."""

    def __init__(self, path: Path, config: dict, added: list):
        tokenizers = optional_package("tokenizers", path)  # sentencepiece cannot read these
        self.path = path
        with self._library("is not a tokenizer.json"):
            self._tok = tok = tokenizers.Tokenizer.from_str(json_text(path, config))
            tok.no_padding()
            tok.no_truncation()
            known = {t.content for t in tok.get_added_tokens_decoder().values()}
            for declared_id, token in added:
                if declared_id is None and token["content"] in known:
                    continue
                tok.add_tokens([tokenizers.AddedToken(**token)])
                id_ = tok.token_to_id(token["content"])
                if declared_id not in (None, id_):
                    raise UserError(f"the folder of {path} gives {token['content']!r} the id "
                                    f"{declared_id}, where transformers has {id_}; make its files "
                                    "agree: fetch them again")
            with_special = tok.encode("a")
            # A post-processor would cut spaces off a token's offsets; bos is put by `encode`.
            tok.post_processor = None
            self.vocab_size = max(tok.get_vocab().values()) + 1
            self.eos_id = tok.token_to_id(config["eos_token"])
            named_bos = tok.token_to_id(config["bos_token"])
        if getattr(tok.model, "dropout", None):
            raise UserError(f"{path} encodes a text differently each time (BPE dropout); set its "
                            "model.dropout to null")
        special = with_special.special_tokens_mask
        if sum(special) > 1 or special[-1:] == [1]:
            raise UserError(f"{path} puts {' '.join(with_special.tokens)} for a text: an answer "
                            "goes on after its prompt, not after an end; leave one bos in "
                            "post_processor")
        self.bos_id = with_special.ids[0] if special[:1] == [1] else None
        if path.suffix != ".json" and config.get("add_bos_token"):
            self.bos_id = named_bos

    def usual_ends(self) -> tuple[int, ...]:
        """The id that ends a text where neither tokenizer nor model names one."""
        found = map(self._tok.token_to_id, ("<|endoftext|>", "</s>"))
        return tuple(i for i in found if i is not None)[:1]

    @contextlib.contextmanager
    def _library(self, what: str):
        """UserError for any error of the library: it raises bare Exceptions, and where it panics a
        BaseException, after lines on stderr, which are dropped."""
        try:
            with muted_stderr():
                yield
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as e:
            raise UserError(f"{self.path} {what} ({one_line(e)}); fetch it again, or use the "
                            "tokenizer the weights came with") from None

    def _encode(self, text: str):
        with self._library("cannot encode a text"):
            return self._tok.encode(text, add_special_tokens=False)

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return [self.bos_id] * (bos and self.bos_id is not None) + self._encode(text).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens, and ids beyond the tokenizer's vocabulary, have none."""
        kept = [i for i in ids if 0 <= i < self.vocab_size and i not in self.eos_ids]
        with self._library("cannot decode what a model said"):
            return self._tok.decode(kept, skip_special_tokens=True)

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        """ids without bos, and where each ends, in UTF-8 bytes of text."""
        coded, reached, lost = self._encode(text), 0, ""
        size = list(itertools.accumulate((len(c.encode()) for c in text), initial=0))
        for start, end in [*coded.offsets, (len(text), len(text))]:
            lost = lost or text[reached:start].strip()
            reached = max(reached, end)
        # A text that is not in NFC has holes between offsets where nothing is lost.
        if lost and unicodedata.is_normalized("NFC", text):
            raise UserError(f"{self.path} drops {reprlib.repr(lost)} from a text, for which its "
                            "vocabulary or normaliser has no place; use the tokenizer the weights "
                            "came with, or drop the row")
        # Of a character split over several tokens, the first may have an empty offset.
        return coded.ids, [size[end] if end > start else size[start] + 1
                           for start, end in coded.offsets]


def sentencepiece_model(path: Path, config: dict):
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, ValueError):
        raise UserError(f"{path} is not a sentencepiece model; fetch it again, with the "
                        "tokenizer.json that stands beside it") from None
    if min(sp.bos_id(), sp.eos_id()) < 0:
        raise UserError(f"{path} has no bos or no eos piece; use a LLaMA tokenizer")
    puts_space = sp.id_to_piece(sp.encode("a")[0]).startswith("\u2581")
    if not puts_space and config.get("add_prefix_space") is not False:
        raise UserError(f"{path} puts no space before a text, where transformers puts one; set "
                        "add_prefix_space to false in tokenizer_config.json")
    return sp


def special_pieces(sp) -> dict[str, int]:
    return {sp.id_to_piece(i): i for i in range(sp.get_piece_size())
            if sp.is_control(i) or sp.is_unknown(i)}


def needs_no_other(path: Path, config: dict, added: list) -> bool:
    """Does sentencepiece alone give transformers' ids of a tokenizer.model: the folder adds no
    token and changes none?"""
    sp = sentencepiece_model(path, config)
    special = special_pieces(sp)
    ends = all(config[f"{key}_token"] in ("", sp.id_to_piece(i)) for key, i in (
        ("bos", sp.bos_id()), ("eos", sp.eos_id())))
    return ends and config.get("add_prefix_space") is not False and all(
        token["content"] in special and declared_id in (None, special[token["content"]])
        and not any(token.get(k) for k in ("lstrip", "rstrip", "single_word"))
        for declared_id, token in added)


def json_text(path: Path, config: dict) -> str:
    """The tokenizer.json that transformers would use. For its class LlamaTokenizer, unless it is
    byte-level, that is the given vocabulary and merges (of a tokenizer.model: made from its pieces)
    with LLaMA's own rules around them."""
    if path.suffix == ".json":
        text = path.read_text(encoding="utf-8")
        if not config["is_llama"] or "ByteLevel" in text:
            return text
        spec = json.loads(text)
        if spec["model"].get("type", "BPE") != "BPE":
            return text
        model = {k: spec["model"][k] for k in ("vocab", "merges")}
        if "added_tokens_decoder" in config:
            spec["added_tokens"] = []
    else:
        sp = sentencepiece_model(path, config)
        model = vocab_and_merges(sp, config["is_llama"])
        flags = dict(special=True, lstrip=False, rstrip=False, single_word=False, normalized=False)
        control = [i for i in range(sp.get_piece_size()) if sp.is_control(i)]
        spec = dict(added_tokens=[dict(id=i, content=sp.id_to_piece(i), **flags) for i in control
                                  if not config["extra"]])  # as transformers does
    scheme = ("never" if config.get("add_prefix_space") is False else
              "always" if config.get("legacy") else "first")
    decoders = [dict(type="Replace", pattern=dict(String="\u2581"), content=" "),
                dict(type="ByteFallback"), dict(type="Fuse"),
                dict(type="Strip", content=" ", start=1, stop=0)]
    normalizer = None if config["is_llama"] else dict(type="Sequence", normalizers=[
        dict(type="Replace", pattern=dict(String=" "), content="\u2581"),
        *[dict(type="Replace", pattern=dict(Regex=r"\A\u2581"), content="\u2581\u2581")]
        * bool(config.get("legacy"))])
    return json.dumps(spec | dict(
        normalizer=normalizer, model=dict(type="BPE", fuse_unk=True, byte_fallback=True, **model),
        pre_tokenizer=dict(type="Metaspace", replacement="\u2581", prepend_scheme=scheme,
                           split=False),
        decoder=dict(type="Sequence", decoders=decoders[:3 + (scheme != "never")])))


def vocab_and_merges(sp, is_llama: bool) -> dict:
    """The BPE model that merges to the pieces of a sentencepiece model."""
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    # transformers' LlamaTokenizer ranks merges by id, and it alone.
    rank = vocab.get if is_llama else lambda x: (-sp.get_score(vocab[x]), vocab[x])
    merges = sorted((rank(piece), n, len(piece) - n, piece) for piece in vocab
                    for n in range(1, len(piece)) if piece[:n] in vocab and piece[n:] in vocab)
    return dict(vocab=vocab, merges=[[piece[:n], piece[n:]] for _, n, _, piece in merges])


@contextlib.contextmanager
def muted_stderr():
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


def one_line(error: BaseException) -> str:
    """A library's message on one line, cut short, to be quoted in ours."""
    return " ".join(str(error).split())[:200]


def json_beside(path: Path, name: str) -> dict:
    """The JSON object in a file beside another; empty if it is not there."""
    file = path.with_name(name)
    if not file.exists():
        return {}
    value = read_json(file) if file.is_file() else None  # a pipe would be waited for
    if not isinstance(value, dict):
        raise UserError(f"{file} does not hold a JSON object; fetch it again")
    return value


def token_text(token) -> str:
    """The text of a special token as tokenizer_config.json has it: plain, or in an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def read_tokenizer_config(path: Path) -> tuple[dict, list]:
    """What the files beside a tokenizer say, as transformers reads them: tokenizer_config.json with
    its defaults filled in; then (declared id or None, token) of every token to be added."""
    config = json_beside(path, "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder")
    if "added_tokens_decoder" not in config:  # older folders have files beside it instead
        others = json_beside(path, "special_tokens_map.json")
        config = config | {k: v for k, v in others.items() if k.endswith("_token")}
        decoder = {str(i): text for text, i in json_beside(path, "added_tokens.json").items()}
    is_llama = (str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
                and json_beside(path, "config.json").get("model_type") != "mistral")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    extra = extra if isinstance(extra, list) else []
    tokens = {f"{key}_token": config.get(f"{key}_token") for key in (
        "bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    if is_llama or path.suffix != ".json":
        usual = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        tokens |= {k: tokens[k] or usual[k] for k in usual}
    special = set(map(token_text, tokens.values()))
    decoder = decoder if isinstance(decoder, dict) else {}
    declared = [(int(i), t) for i, t in decoder.items() if i.isascii() and i.isdigit()]
    added = {}
    for id_, token in sorted(declared, key=lambda x: x[0]):
        add_token(added, id_, token, token_text(token) in special)
    for token in [*tokens.values(), *extra]:
        add_token(added, None, token, True)
    if path.suffix != ".json" and not is_llama:
        for _, token in added.values():
            token["normalized"] = False
    defaults = dict(legacy=not is_llama,
                    add_bos_token=not path.with_name("tokenizer_config.json").exists())
    texts = {k: token_text(v) for k, v in tokens.items()}
    return defaults | config | dict(is_llama=is_llama, extra=extra) | texts, list(added.values())


def add_token(added: dict, id_: int | None, token, special: bool):
    """Put a token, a text or an object with flags, into added: text -> (id, fields of AddedToken),
    unless its text is there."""
    if (text := token_text(token)) and text not in added:
        given = token if isinstance(token, dict) else {}
        flags = {k: given[k] for k in ("lstrip", "rstrip", "single_word", "normalized", "special")
                 if isinstance(given.get(k), bool)}
        fields = dict(special=special, normalized=not special) | flags
        added[text] = id_, fields | dict(content=text)


def load_tokenizer(path):
    """The tokenizer of a model folder (tokenizer.json, else tokenizer.model), or such a file.

    Has encode(text, *, bos) -> ids, decode(ids) -> text, ends(text), bos_id (or None), eos_id,
    eos_ids (all that end a turn, eos_id first), vocab_size (largest id + 1), chat_template ("" if
    the model has none) and special_tokens (bos_token, ...)."""
    path = Path(path)
    if path.is_dir():
        found = [path / n for n in ("tokenizer.json", "tokenizer.model") if (path / n).is_file()]
        if not found:
            raise UserError(f"{path} has neither tokenizer.model nor tokenizer.json; copy it there "
                            "from where the weights came from")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path} is missing: no tokenizer there")
    with open(path, "rb"):  # what may not be read is no fault of its content
        pass
    config, added = read_tokenizer_config(path)
    if path.suffix != ".json" and config.get("add_eos_token"):
        raise UserError(f"{path.with_name('tokenizer_config.json')} puts eos after every text "
                        "(add_eos_token): no answer goes on after it; set it to false")
    if path.suffix != ".json" and needs_no_other(path, config, added):
        tokenizer = SentencePieceTokenizer(path, config)
    else:
        tokenizer = JsonTokenizer(path, config, added)
    model_config = json_beside(path, "config.json")
    ends = []  # of the model
    for value in (model_config.get("eos_token_id"),
                  json_beside(path, "generation_config.json").get("eos_token_id")):
        ends += [i for i in (value if isinstance(value, list) else [value])
                 if type(i) is int and i >= 0]
    named = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    # OLMo's two tokenizers disagree on <|endoftext|> (0 or 50279): there the model decides.
    model_first = model_config.get("model_type") in ("olmo", "hf_olmo")
    ends = ends + named if model_first else named + ends
    tokenizer.eos_ids = tuple(dict.fromkeys(ends)) or tokenizer.usual_ends()
    if not tokenizer.eos_ids:
        raise UserError(f"{path} config no end-of-text token; set eos_token_id in config.json")
    tokenizer.eos_id = tokenizer.eos_ids[0]
    tokenizer.chat_template = chat_template(path, config)
    tokenizer.special_tokens = {k: token_text(v) for k, v in config.items()
                                if k.endswith("_token") and token_text(v)}
    return tokenizer


def chat_template(path: Path, config: dict) -> str:
    """The text of a model's chat template, "" if it has none."""
    file, template = path.with_name("chat_template.jinja"), config.get("chat_template")
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8 text; fetch it again") from None
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template
                         if isinstance(t, dict) and t.get("name") == "default"), None)
    return template if isinstance(template, str) else ""


TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# How transformers must read tokenizer.json to get the same ids.
PLAIN_IN_TRANSFORMERS = dict(tokenizer_class="PreTrainedTokenizerFast",
                             model_input_names=["input_ids", "attention_mask"],
                             clean_up_tokenization_spaces=False)


def copy_tokenizer(source: Path, target: Path):
    """Copy a tokenizer's files; what would make transformers fetch and run code stays behind."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
    config = json_beside(Path(target) / "tokenizer.json", "tokenizer_config.json")
    if config.pop("auto_map", None):  # the original OLMo layout's
        write_json(Path(target) / "tokenizer_config.json", config | PLAIN_IN_TRANSFORMERS)
