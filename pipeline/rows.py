"""A stranger's rows: chats, Alpaca, pairs, texts, as JSON lines, a JSON array or a table; and which
of them say nearly the same."""

import csv
import io
import json
import re
import reprlib
import unicodedata
from dataclasses import replace
from pathlib import Path

from data import Example
from model import UserError

NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what no file name or UTF-8 file can hold
SHAPES = ("{question, answer}, {prompt, completion}, {instruction, input, output}, {input, "
          "output}, {text} or {messages: [{role, content}, ...]} with the assistant's turn "
          "last, after a user's")
PAIRS = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"),
         ("instruction", "response"), ("input", "output"))
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant"}  # ShareGPT's and Gemini's
# Keys that change what a model is asked, or how much a row counts: refused where they are not used.
MEANINGFUL = {"system", "system_prompt", "context", "instruction", "input", "passage", "document",
              "documents", "history", "tools", "functions", "tool_calls", "function_call", "weight",
              "images", "image", "audio", "thinking", "reasoning", "reasoning_content"}


def load_rows(file) -> list[Example]:
    """The rows of a user's file, each of one of SHAPES; a null value counts as absent. UserError
    names the first wrong row, and how many more there are."""
    path, examples, wrong = Path(file), [], []
    for number, (where, row) in enumerate(read_rows(path)):
        try:
            if not isinstance(row, dict) or None in row:  # None: a table's cells beyond its head
                raise UserError("is not a JSON object on one line, nor a table's row as long as "
                                "its head line: mend it, or fetch the file again")
            row = {key: value for key, value in row.items() if value is not None}
            examples.append(replace(example_of(row, f"{path.stem}:{number}"), where=where))
        except UserError as e:
            wrong.append(f"{where} {e}")
    if wrong:
        more = f" ({len(wrong) - 1} more rows of the file are wrong)" if wrong[1:] else ""
        raise UserError(wrong[0] + more)
    return examples


def read_rows(path: Path) -> list[tuple[str, object]]:
    """(file and line, row) of a file of JSON lines, of one JSON array, or of a .csv or .tsv with a
    head line, whose empty cells are absent. What is not JSON stays text."""
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; name a file of "
                        "rows")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}); save it as JSON lines or CSV "
                        "in UTF-8") from None
    array = parsed(text) if text.lstrip()[:1] == "[" else None
    if path.suffix in (".csv", ".tsv"):
        rows = read_table(path, text)
    elif isinstance(array, list):
        rows = [(f"{path} row {n}", row) for n, row in enumerate(array, 1)]
    else:
        rows = [(f"{path} line {n}", parsed(line)) for n, line in enumerate(text.split("\n"), 1)
                if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no rows; fetch or make it again")
    return rows


def parsed(text: str):
    """The JSON value in a text, or the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def read_table(path: Path, text: str) -> list[tuple[str, dict]]:
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True,
                           delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        return [(f"{path} line {table.line_num}", {k: v or None for k, v in row.items()})
                for row in table]
    except csv.Error as e:
        raise UserError(f"{path} line {table.line_num} is not CSV ({e}); save it again") from None


def example_of(row: dict, name: str) -> Example:
    """A row of a user's file. An instruction is joined with its input by a line end; a completion
    follows its prompt with nothing between; of a chat the last turn is the answer, the user's
    before it the question."""
    names = dict(id=name, group=name)
    pair = next((p for p in PAIRS if p[0] in row and p[1] in row), ())
    if pair == ("prompt", "completion"):  # the prompt is all that is asked
        refuse_unused(row, pair)
        return Example(text_at(row, "prompt"), text_at(row, "completion"), kind="plain", **names)
    if not pair and "text" in row:
        refuse_unused(row, ("text",))
        text = text_at(row, "text")
        if len(text) < 2:
            raise UserError("has a text of one letter, which nothing can be asked of; drop it")
        return Example("", text, kind="text", **names)
    turns = (("system", text_at(row, "system")),) if row.get("system") else ()
    if not pair:
        refuse_unused(row, ("system",))
        *turns, (_, question), (_, answer) = chat_turns(row, turns)
        return Example(question, answer, turns=tuple(turns), **names)
    question, answer = (text_at(row, key) for key in pair)
    used = {"system", *pair}
    if pair[0] == "instruction" and row.get("input"):
        question += "\n" + text_at(row, "input")
        used.add("input")
    if pair == ("question", "answer"):
        names |= other_answers(row)
    refuse_unused(row, used)
    return Example(question, answer, turns=turns, **names)


def text_at(row: dict, key: str) -> str:
    if key not in row:
        raise UserError(f"has no {key!r}; rows need it")
    value = row[key]
    if not isinstance(value, str) or not value.strip() or NO_TEXT.search(value):
        raise UserError(f"has no filled text under {key!r}; mend or drop the row")
    return value


def other_answers(row: dict) -> dict:
    """TOFU's paraphrases and wrong answers, where a row has them."""
    fields = {key: text_at(row, key) for key in ("paraphrased_question", "paraphrased_answer")
              if key in row}
    wrong = row.get("perturbed_answer") or []
    if not isinstance(wrong, list):
        raise UserError("has no list of texts under 'perturbed_answer'; mend the row")
    texts = [text_at({"perturbed_answer": x}, "perturbed_answer") for x in wrong]
    return fields | dict(perturbed_answers=tuple(texts))


def refuse_unused(row: dict, used):
    for key in row:
        if str(key).lower() in MEANINGFUL.difference(used) and row[key] not in ("", [], {}):
            raise UserError(f"has {key!r}, which changes what a model is asked or how much a row "
                            "counts, and is not used; put it into the question, or drop it")


def chat_turns(row: dict, before: tuple) -> list[tuple[str, str]]:
    """(role, text) of a chat that ends with a user's turn and the assistant's."""
    key = next((k for k in ("messages", "conversations") if k in row), None)
    if key is None:
        raise UserError(f"has the keys {reprlib.repr(sorted(map(str, row)))}; a row must be "
                        f"{SHAPES}")
    turns = list(before)
    for message in row[key] if isinstance(row[key], list) else []:
        if not isinstance(message, dict):
            raise UserError(f"has {reprlib.repr(message)} in {key!r}; a row must be {SHAPES}")
        message = {k: v for k, v in message.items() if v is not None}
        refuse_unused(message, ())
        name, content = ("from", "value") if "from" in message else ("role", "content")
        role = str(message.get(name))
        turns.append((SPEAKERS.get(role, role), text_at(message, content)))
    roles = [role for role, _ in turns]
    if roles[-2:] != ["user", "assistant"] or set(roles) - {"system", "user", "assistant"}:
        raise UserError(f"has the roles {reprlib.repr(roles)} in {key!r}; a row must be {SHAPES}")
    return turns


# ------------------------------------------------------------------------------- nearly the same

QUOTES = str.maketrans("‘’‚′`´“”„″«»–—−", "''''''\"\"\"\"\"\"---", "\u200b\u00ad\ufeff")


def normalised(text: str) -> str:
    """A text without what two exports of it may differ in: white space, case, the form of quotes
    and accents, punctuation at its ends."""
    text = unicodedata.normalize("NFKC", text.translate(QUOTES)).translate(QUOTES).casefold()
    return " ".join(unicodedata.normalize("NFC", text).split()).strip(" .,;:!?'\"")


def refuse_shared(files: dict[str, list[Example]], *, allow_near: bool):
    """UserError if a row stands in two of the files; or nearly, unless allow_near."""
    first, similar, near = {}, {}, []
    for name, rows in files.items():
        for e in rows:
            texts = (*(text for _, text in e.turns), e.question, e.answer)
            other, _ = first.setdefault((e.turns, e.question, e.answer), (name, e))
            if other != name:
                raise UserError(f"row {e.id} of the {name} rows is among the {other} rows too; "
                                "leave it in one of the two files")
            other, earlier = similar.setdefault(tuple(map(normalised, texts)), (name, e))
            if other != name:
                near.append(f"{e.where or e.id} is {earlier.where or earlier.id}")
        if again := len(rows) - len({(e.turns, e.question, e.answer) for e in rows}):
            print(f"note: {again} of the {len(rows)} {name} rows stand there more than once",
                  flush=True)
    if near and not allow_near:
        raise UserError(f"{len(near)} rows stand in two files but for white space, case, quotes, "
                        f"accents' form or end punctuation: {'; '.join(near[:5])}"
                        f"{'; ...' if near[5:] else ''}: leave each in one of them, or pass "
                        "--allow-near")
