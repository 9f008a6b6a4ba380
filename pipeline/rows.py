"""A stranger's rows: chats, Alpaca, pairs, texts, as JSON lines, a JSON array or a table; the marks
that scripts write around them; and which of them say nearly the same."""

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
          "last, and each of its turns after a user's")
PAIRS = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"),
         ("instruction", "response"), ("input", "output"))
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant"}  # ShareGPT's and Gemini's
ASKING = {"system", "system_prompt", "context", "instruction", "input", "passage", "document",
          "documents", "history", "tools", "functions", "tool_calls", "function_call", "images",
          "image", "audio", "thinking", "reasoning", "reasoning_content", "choices", "options"}
COUNTING = re.compile(r"(\b|_|(?<=[a-z])(?=[A-Z]))(?i:loss|mask|train|label|weight)")


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
            examples += examples_of(row, f"{path.stem}:{number}", where)
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
    if path.suffix.lower() in (".csv", ".tsv"):
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
                           delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        return [(f"{path} line {table.line_num}", {k: v or None for k, v in row.items()})
                for row in table]
    except csv.Error as e:
        raise UserError(f"{path} line {table.line_num} is not CSV ({e}); save it again") from None


def examples_of(row: dict, name: str, where: str) -> list[Example]:
    """The rows that a row of a user's file makes: one, but of a chat one for each answer. An
    instruction is joined with its input by a line end; a completion follows its prompt with nothing
    between."""
    names = dict(id=name, group=name, where=where)
    pair = next((p for p in PAIRS if p[0] in row and p[1] in row), ())
    if pair == ("prompt", "completion"):  # the prompt is all that is asked
        refuse_unused(row, pair)
        return [Example(text_at(row, "prompt"), text_at(row, "completion"), kind="plain", **names)]
    if not pair and "text" in row:
        refuse_unused(row, ("text",))
        if len(text_at(row, "text")) < 2:
            raise UserError("has a text of one letter, which nothing can be asked of; drop it")
        return [Example("", row["text"], kind="text", **names)]
    refuse_unused(row, {"system", "input", *pair} if "instruction" in pair else {"system", *pair})
    turns = [("system", text_at(row, "system"))] if row.get("system") else []
    if not pair:
        return chat_rows(row, turns, names)
    question, answer = (text_at(row, key) for key in pair)
    if pair[0] == "instruction" and row.get("input"):
        question += "\n" + text_at(row, "input")
    if pair == ("question", "answer"):
        names |= other_answers(row)
    return [Example(question, answer, turns=tuple(turns), **names)]


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
    """UserError for a key that changes what a model is asked, or what of a row counts."""
    for key in (k for k in row if k not in used and row[k] not in ("", [], {})):
        if key.lower() in ASKING:
            raise UserError(f"has {key!r}, which changes what a model is asked and is not used; "
                            "put it into the question, or drop it")
        if COUNTING.search(key):
            raise UserError(f"has {key!r}, which says what of a row counts, or how much; every "
                            "answer counts here: drop the key, and the rows that should not count")


def chat_rows(row: dict, turns: list[tuple[str, str]], names: dict) -> list[Example]:
    """A row for each of the assistant's turns, with all turns before it as its prompt. turns: what
    stands before the chat's."""
    key = next((k for k in ("messages", "conversations") if k in row), None)
    if key is None:
        raise UserError(f"has the keys {reprlib.repr(sorted(map(str, row)))}; a row must be "
                        f"{SHAPES}")
    for message in row[key] if isinstance(row[key], list) else []:
        if not isinstance(message, dict):
            raise UserError(f"has {reprlib.repr(message)} in {key!r}; a row must be {SHAPES}")
        message = {k: v for k, v in message.items() if v is not None}
        refuse_unused(message, ())
        name, content = ("from", "value") if "from" in message else ("role", "content")
        role = str(message.get(name))
        turns.append((SPEAKERS.get(role, role), text_at(message, content)))
    roles = [role for role, _ in turns]
    answers = [i for i, role in enumerate(roles) if role == "assistant"]
    if roles[-1:] != ["assistant"] or set(roles) - {"system", "user", "assistant"} or any(
            roles[i - 1] != "user" for i in answers):
        raise UserError(f"has the roles {reprlib.repr(roles)} in {key!r}; a row must be {SHAPES}")
    rows = [Example(turns[i - 1][1], turns[i][1], turns=tuple(turns[:i - 1]), **names)
            for i in answers]
    return rows if len(rows) == 1 else [
        replace(e, id=f"{e.id}.{n}", where=f"{e.where} turn {n}") for n, e in enumerate(rows, 1)]


# --------------------------------------------------------------------------- marks around a row


def texts_of(e: Example) -> tuple[str, ...]:
    """What a row says, in order."""
    return (*(text for _, text in e.turns), e.question, e.answer)


def without_marks(files: dict[str, list[Example]], tokenizer, *, tell: bool
                  ) -> dict[str, list[Example]]:
    """The rows of files without the bos before a text and the eos after it that scripts write,
    because encoding puts both. tell: say in a line that some do."""
    marks = {i: re.escape(text) for text, i in tokenizer.added.items()}
    bos = marks.get(tokenizer.bos_id, "(?!)")  # which matches nothing
    eos = "|".join(marks[i] for i in tokenizer.eos_ids if i in marks) or "(?!)"
    opening, ending = re.compile(rf"\A(\s*{bos})+"), re.compile(rf"(({eos})\s*)+\Z")

    def bare(text: str) -> str:
        return ending.sub("", opening.sub("", text))

    def bare_row(e: Example) -> Example:
        if e.kind == "plain":  # its prompt and its completion are one text
            return replace(e, question=opening.sub("", e.question), answer=ending.sub("", e.answer))
        return replace(e, question=bare(e.question), answer=bare(e.answer),
                       paraphrased_question=bare(e.paraphrased_question),
                       paraphrased_answer=bare(e.paraphrased_answer),
                       perturbed_answers=tuple(map(bare, e.perturbed_answers)),
                       turns=tuple((role, bare(text)) for role, text in e.turns))

    pairs = {name: [(e, bare_row(e)) for e in rows] for name, rows in files.items()}
    marked = sum(e != new for rows in pairs.values() for e, new in rows)
    if marked and tell:
        print(f"note: {marked} rows already begin with bos or end with eos, as scripts write them; "
              "each is put once", flush=True)
    bare_files = {name: [new for _, new in rows] for name, rows in pairs.items()}
    for e in sum(bare_files.values(), []):
        refuse_marks(e, re.compile(f"{bos}|{eos}"), tokenizer)
    return bare_files


def refuse_marks(e: Example, mark: re.Pattern, tokenizer):
    """UserError where a mark stands within a text of a row, or where nothing else stood there."""
    texts = texts_of(e)
    if not e.answer.strip() or e.kind != "text" and not all(map(str.strip, texts)):
        raise UserError(f"{e.where} holds a text of nothing but marks, as <s> or </s>; drop it")
    if e.kind == "plain" and tokenizer.chat_template:
        # The prompt may be a chat as the template writes it, with marks between its turns.
        texts = (e.answer,)
    # Where the tokenizer puts no bos, a mark that a row begins with is the only one.
    start = 1 if tokenizer.bos_id is None and e.kind in ("text", "plain") else 0
    for text in texts:
        if match := mark.search(text, start):
            raise UserError(f"{e.where} has {match[0]!r} within a text, where a model reads its "
                            "beginning or end; divide the row there, or take it out")


# ------------------------------------------------------------------------------- nearly the same

QUOTES = str.maketrans("‘’‚′`´“”„″«»–—−", "''''''\"\"\"\"\"\"---", "\u200b\u00ad\ufeff")


def normalised(text: str) -> str:
    """A text without what two exports of it may differ in: white space, case, the form of quotes
    and accents, punctuation at its ends."""
    text = unicodedata.normalize("NFKC", text.translate(QUOTES)).translate(QUOTES).casefold()
    return " ".join(unicodedata.normalize("NFC", text).split()).strip(" .,;:!?'\"")


def refuse_shared(files: dict[str, list[Example]], *, allow_near: bool):
    """UserError if a row stands in two of the files; or nearly, unless allow_near."""
    first, near = {}, []
    for name, rows in files.items():
        for e in rows:
            for form in (str, normalised):
                other, earlier = first.setdefault((form, *map(form, texts_of(e))), (name, e))
                if other != name and form is str:
                    raise UserError(f"row {e.id} of the {name} rows is among the {other} rows too; "
                                    "leave it in one of the two files")
                if other != name:
                    near.append(f"{e.where or e.id} is {earlier.where or earlier.id}")
        if again := len(rows) - len(set(map(texts_of, rows))):
            print(f"note: {again} of the {len(rows)} {name} rows stand there more than once",
                  flush=True)
    if near and not allow_near:
        raise UserError(f"{len(near)} rows stand in two files but for white space, case, quotes, "
                        f"accents' form or end punctuation: {'; '.join(near[:5])}"
                        f"{'; ...' if near[5:] else ''}: leave each in one of them, or pass "
                        "--allow-near")
