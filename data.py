"""Rows to tensors: templates, encoding, batches; then files of rows, and tokenizers.

A row is an `Example`. `encode` turns it into token ids with the prompt's end found in them,
`collate` stacks rows into a `Batch` whose `targets` mark the tokens that count: the answer and one
eos [D14]. Rows are padded on the right, to the longest of their batch: under causal attention no
token sees what is right of it, so no attention mask is needed.
"""

import json
import reprlib
import shutil
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import sentencepiece
import torch

from model import Config, UserError, read_json

IGNORE = -100  # a target that is not predicted; also cross_entropy's default
TASKS = ("Task1", "Task2", "Task3")  # LUME's: stories, private data, encyclopedia entries
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# name: what stands before the question, after it, and before the answer [D14]. The prompt ends
# after the second; the third already counts as the answer's.
TEMPLATES = {
    "llama2": ("[INST] ", " [/INST]", ""),
    "qa": ("Question: ", "\nAnswer:", " "),
    "raw": ("", "", " "),
    "verbatim": ("", "", ""),
}  # or a function (tokenizer, turns, answer) that gives what `full_text` does
TURN_END = {}  # template: the token by which a model ends a turn (pipeline/tokenizers.py)


def option(default, effect: str, *, choices: tuple = (), **limits):
    """A settings field: its default, its effect or unit, and what it may be: one of `choices`, or
    a number x with low <= x, above < x, x <= high, x < below. Whoever reads values checks that."""
    return field(default=default, metadata=dict(effect=effect, choices=choices, limits=limits))


@dataclass(frozen=True)
class Example:
    """One row: a question and its answer, or (kind "text") a text whose every token counts."""

    question: str
    answer: str
    id: str = ""     # "forget10:12" (file:row), or the id that LUME gives it
    task: str = ""   # "Task1".."Task3" for LUME
    kind: str = "qa"  # or "sc", LUME's completions; "text" and "plain" are put in no template
    group: str = ""  # author or document: the unit of slicing
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    perturbed_answers: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()  # (role, text) of a chat before the question
    where: str = field(default="", compare=False)  # file and line, for messages


@dataclass(frozen=True)
class Encoded:
    """ids of prompt, answer and eos; the first n_prompt are the prompt's (bos counted in)."""

    ids: list[int]
    n_prompt: int

    @property
    def start(self) -> int:
        """Index of the first predicted id: the answer's first; its second if nothing precedes."""
        return max(self.n_prompt, 1)


@dataclass(frozen=True)
class Batch:
    """ids [B, T]; targets [B, T]: ids[b, i+1] where that is answer or eos, else IGNORE."""

    ids: torch.Tensor
    targets: torch.Tensor


def template_of(template: str, kind: str):
    """The entry of TEMPLATES for a row: "verbatim" for the kinds that are put in no template."""
    if template not in TEMPLATES:
        raise UserError(f"template {template!r} is unknown; choose {' or '.join(TEMPLATES)}")
    return TEMPLATES["verbatim" if kind in ("text", "plain") else template]


def full_text(example: Example, tokenizer, template: str) -> tuple[str, str]:
    """The prompt, and all that follows it: the answer with what the template puts around it."""
    e, shape = example, template_of(template, example.kind)
    if callable(shape):
        return shape(tokenizer, [*e.turns, ("user", e.question)], e.answer)
    before, after, lead = shape
    texts = []
    for role, text in [*e.turns, ("user", e.question), ("assistant", e.answer)]:
        if role == "user":
            texts.append(before + text + after)
        elif role == "assistant":  # one space where both bring one
            texts.append((lead.rstrip(" ") if text.startswith(" ") else lead) + text + "\n")
        else:  # the system's
            texts.append(text + "\n")
    return "".join(texts[:-1]), texts[-1].removesuffix("\n")


def encode_prompt(question, tokenizer, template: str, *, turns=(), kind="qa") -> list[int]:
    """ids from which an answer is generated. A chat template writes bos itself, if it wants one."""
    prompt, _ = full_text(Example(question, "", turns=turns, kind=kind), tokenizer, template)
    return tokenizer.encode(prompt, bos=not callable(template_of(template, kind)))


def encode(example: Example, tokenizer, template: str) -> Encoded:
    """Prompt, answer and eos, encoded as one string [D14]: encoded apart they can give other tokens
    where they meet. A token that reaches into the answer counts as the answer's."""
    prompt, rest = full_text(example, tokenizer, template)
    ids, ends = tokenizer.ends(prompt + rest)
    n_prompt = sum(end <= len(prompt.encode()) for end in ends)
    answer = ids[n_prompt:]
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    turn_end = tokenizer.added.get(TURN_END.get(template))
    eos = [turn_end if turn_end in tokenizer.eos_ids else tokenizer.eos_id]
    if callable(template_of(template, example.kind)):
        bos = []  # the chat template writes it, and mostly an eos: what follows that is left out
        last = max((i for i, x in enumerate(answer) if x in tokenizer.eos_ids), default=None)
        if last is not None:
            answer, eos = answer[:last], [answer[last]]
    if not answer:
        raise UserError(f"row {example.id}: its answer {reprlib.repr(example.answer)} has no token")
    return Encoded(bos + ids[:n_prompt] + answer + eos, len(bos) + n_prompt)


def encode_for(config: Config, examples: list[Example], tokenizer, template: str) -> list[Encoded]:
    """encode_all for a model of this config."""
    return encode_all(examples, tokenizer, template, context=config.max_position_embeddings,
                      vocab=config.vocab_size)


def encode_all(examples: list[Example], tokenizer, template: str, *, context: int,
               vocab: int) -> list[Encoded]:
    """Every example encoded; UserError if one does not fit the model's context or vocabulary."""
    rows = [encode(e, tokenizer, template) for e in examples]
    for e, row in zip(examples, rows):
        if len(row.ids) > context or max(row.ids) >= vocab:
            raise UserError(f"row {e.id}: {len(row.ids)} tokens up to id {max(row.ids)} do not fit "
                            f"the model's context of {context} and {vocab} tokens; drop the row, "
                            "or copy the tokenizer that the weights came with")
    return rows


def halved(example: Example) -> Example:
    """A "text" row with its first half, cut between words, as the question."""
    text = example.answer
    spaces = [i for i in range(1, len(text) - 1) if text[i].isspace()]
    middle = min(spaces, key=lambda i: abs(i - len(text) / 2), default=len(text) // 2)
    return replace(example, question=text[:middle], answer=text[middle:])


def collate(rows: list[Encoded], device="cpu", pad_id: int = 0) -> Batch:
    """Stack rows, padded on the right to the longest."""
    width = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), width), pad_id)  # [B, T]
    targets = torch.full((len(rows), width), IGNORE)  # [B, T]
    for b, row in enumerate(rows):
        ids[b, :len(row.ids)] = torch.tensor(row.ids)
        targets[b, row.start - 1:len(row.ids) - 1] = torch.tensor(row.ids[row.start:])
    return Batch(ids.to(device), targets.to(device))


def batches_by_length(lengths: list[int], tokens: int) -> list[list[int]]:
    """Indices of rows, longest first, cut so that rows times longest stays within `tokens`, and the
    longest within 1.25 times the shortest: padding would cost more than another pass. A row of more
    tokens is a batch of its own."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= tokens and longest <= 1.25 * lengths[i]:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


# ------------------------------------------------------------------------------------ files of rows


def examples_of(path: Path, make) -> list[Example]:
    """make(row, number) of each row of a file of JSON lines; UserError names a wrong row's line."""
    examples = []
    for n, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        try:
            if line.strip():
                examples.append(make(json.loads(line), len(examples)))
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} line {n}: {type(e).__name__} {e}; mend the row") from None
    return examples


def qa_row(row: dict, **more) -> Example:
    """A row {question, answer}, with TOFU's paraphrases and wrong answers where it has them."""
    other = {key: row[key] for key in ("paraphrased_question", "paraphrased_answer") if key in row}
    return Example(row["question"], row["answer"], **other, **more,
                   perturbed_answers=tuple(row.get("perturbed_answer", ())))


def load_tofu(folder, split: str, *, rows_per_author: int = 20) -> list[Example]:
    """The rows of `<folder>/<split>.json` (JSON lines)."""
    return examples_of(Path(folder) / f"{split}.json", lambda row, n: qa_row(
        row, id=f"{split}:{n}", group=f"{split}/{n // rows_per_author}"))


def load_lume(folder, split: str) -> list[Example]:
    """The rows of `<folder>/<split>.jsonl`, LUME's: an id is <document>sc1 or <document>qa0."""
    return examples_of(Path(folder) / f"{split}.jsonl", lambda row, n: Example(
        row["input"], row["output"], id=row["id"], task=row["task"], kind=row["id"][-3:-1],
        group=row["id"][:-3]))


def load_rows(file) -> list[Example]:
    """The rows of a user's file of JSON lines: {question, answer}; {prompt, completion}, which
    follow one another with nothing between; or {text}."""
    def make(row, n):
        more = dict(id=f"{Path(file).stem}:{n}", group=f"{Path(file).stem}:{n}")
        if "text" in row:
            return Example("", row["text"], kind="text", **more)
        if "prompt" in row:
            return Example(row["prompt"], row["completion"], kind="plain", **more)
        return qa_row(row, **more)
    return examples_of(Path(file), make)


# -------------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """What both kinds share: vocab_size (the largest id + 1), bos_id (None: it puts none), eos_id,
    eos_ids (all that end a turn, eos_id first), added (id of each text that is one token wherever
    it stands) and special (those of them that no row should spell)."""

    def encode(self, text: str, *, bos: bool) -> list[int]:
        ids, _ = self.ends(text)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        """ids without bos, and where each ends, in UTF-8 bytes of text."""
        for token in self.special:
            if token in text:
                raise UserError(f"{token!r} in {reprlib.repr(text)} is a token of {self.path}, and "
                                "no text: take it out")
        return self.spans(text)


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model, as LLaMA's, by the package sentencepiece."""

    def __init__(self, path: Path):
        self.path = path
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = len(self.sp)
        self.bos_id = self.sp.bos_id()
        self.eos_id = self.sp.eos_id()
        self.added = {self.sp.id_to_piece(i): i for i in range(self.vocab_size)
                      if self.sp.is_control(i) or self.sp.is_unknown(i)}
        self.special = {*self.added, "\u2581"}  # the last is a piece's sign for a space

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        ids = self.sp.encode(text)
        # A character outside the vocabulary is spelled in bytes, a piece each.
        widths = [1 if self.sp.is_byte(i) else
                  len(self.sp.id_to_piece(i).replace("\u2581", " ").encode()) for i in ids]
        ends = list(accumulate(widths, initial=-1))  # a space is put before the text
        if text and ends[-1] != len(text.encode()):
            raise UserError(f"{self.path} rewrites {reprlib.repr(text)}: its prompt's end is lost")
        return ids, ends[1:]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens, and ids beyond the vocabulary, have none."""
        return self.sp.decode([i for i in ids if i < self.vocab_size])


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, as OLMo's: `tok` is a Tokenizer of the package tokenizers."""

    def __init__(self, path: Path, tok):
        self.path = path
        self.tok = tok
        tok.no_padding()
        tok.no_truncation()
        example = tok.encode("a")
        if sum(example.special_tokens_mask[1:]):
            raise UserError(f"{path} puts {' '.join(example.tokens)} for a text, but an answer goes"
                            " on after its prompt: leave one bos at most in its post_processor")
        self.bos_id = example.ids[0] if example.special_tokens_mask[:1] == [1] else None
        tok.post_processor = None  # it would cut spaces off a token's offsets
        self.vocab_size = max(tok.get_vocab().values()) + 1
        tokens = tok.get_added_tokens_decoder()
        self.added = {token.content: i for i, token in tokens.items()}
        self.eos_id = self.added.get("<|endoftext|>", self.added.get("</s>"))  # until one is named
        self.special = {token.content for token in tokens.values() if token.special}

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        coded = self.tok.encode(text, add_special_tokens=False)
        size = list(accumulate((len(c.encode()) for c in text), initial=0))
        # Of a character split over several tokens, the first may have an empty offset.
        return coded.ids, [size[end] if end > start else size[start] + 1
                           for start, end in coded.offsets]

    def decode(self, ids: list[int]) -> str:
        return self.tok.decode([i for i in ids if i < self.vocab_size and i not in self.eos_ids])


def json_object(path: Path) -> dict:
    """The JSON object in a file of a model's folder; empty if there is no such file."""
    return read_json(path) if path.exists() else {}


def token_text(token) -> str:
    """The text of a token as tokenizer_config.json has it: plain, or in an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def name_ends(tokenizer: Tokenizer, folder: Path, eos_token: str):
    """Set eos_ids: what ends a text by the tokenizer's files, then by the model's; and eos_id."""
    config = json_object(folder / "config.json")
    ends = [tokenizer.added.get(eos_token)]
    for file in (config, json_object(folder / "generation_config.json")):
        value = file.get("eos_token_id")
        ends += value if isinstance(value, list) else [value]
    if config.get("model_type") == "olmo":
        ends.append(ends.pop(0))  # its tokenizers disagree on <|endoftext|>: the model decides
    ids = tuple(dict.fromkeys(i for i in ends if i is not None)) or (tokenizer.eos_id,)
    if ids == (None,):
        raise UserError(f"{folder} names no token that ends a text: its config.json must")
    tokenizer.eos_ids = ids
    tokenizer.eos_id = ids[0]


def load_tokenizer(path) -> Tokenizer:
    """The tokenizer of a model folder: its tokenizer.json, or else its tokenizer.model. UserError
    if the folder's other files add tokens to that, or change how it encodes."""
    folder = Path(path)
    config = json_object(folder / "tokenizer_config.json")
    names = json_object(folder / "special_tokens_map.json") | config
    changes = []
    if (folder / "tokenizer.json").is_file():
        import tokenizers
        file = folder / "tokenizer.json"
        tokenizer = JsonTokenizer(file, tokenizers.Tokenizer.from_file(str(file)))
    else:
        tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
        changes += [key for key, odd in (("add_eos_token", True), ("add_prefix_space", False))
                    if config.get(key) is odd]
        if config and not config.get("add_bos_token"):
            tokenizer.bos_id = None  # as in transformers; without this file it is put, as by Meta
    tokens = [token for key, token in names.items() if key.endswith("_token")]
    tokens += json_object(folder / "added_tokens.json")
    tokens += config.get("added_tokens_decoder", {}).values()
    tokens += config.get("additional_special_tokens", config.get("extra_special_tokens")) or []
    changes += [x for x in map(token_text, tokens) if x and x not in tokenizer.added]
    if changes:
        raise UserError(f"{folder} changes {tokenizer.path.name} by {changes}, which is not read; "
                        "save the tokenizer by transformers' save_pretrained, and use that folder")
    name_ends(tokenizer, folder, token_text(names.get("eos_token")))
    return tokenizer


def copy_tokenizer(source, target):
    """Copy a tokenizer's files."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
