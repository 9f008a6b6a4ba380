"""Multiple-choice questions (--mmlu): read from files, put to a model, each choice scored.

They are MMLU's CSV files, or JSON lines of one's own. What is made of the scores is eval.py's.
"""

import csv
import io
import json
from pathlib import Path

import data
from data import Encoded, Example
from eval import check_finite, token_scores
from model import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def load_choices(folder: Path) -> list[dict]:
    """Questions of MMLU's CSV files (question, A, B, C, D, letter; of its test/ where it has one)
    and of JSON-lines files of {question, choices, answer}, where answer is the index, the letter or
    the text of a choice. UserError names file and line."""
    if not folder.is_dir():
        raise UserError(f"--mmlu {folder} is not a folder; it holds MMLU's *.csv, or *.jsonl")
    tests = folder / "test" if (folder / "test").is_dir() else folder
    rows = [row for path in sorted(tests.glob("*.csv")) for row in _mmlu_rows(path)]
    rows += [row for path in sorted(folder.glob("*.jsonl")) for row in _choice_rows(path)]
    if not rows:
        raise UserError(f"--mmlu {folder} holds no *.csv and no *.jsonl with questions")
    return rows


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}); save it again") from None


def _mmlu_rows(path: Path) -> list[dict]:
    subject, rows = path.stem.removesuffix("_test"), []
    lines = csv.reader(io.StringIO(_text_of(path), newline=""))
    try:
        for cells in filter(None, lines):
            where = f"{path} line {lines.line_num}"
            if len(cells) != 6:
                raise UserError(f"{where} has {len(cells)} columns; MMLU's have 6: question, four "
                                "choices, the answer's letter")
            rows.append(_question(f"{path.stem}:{len(rows)}", cells[0], cells[1:5], cells[5], where,
                                  subject=subject))
    except csv.Error as e:
        raise UserError(f"{path} line {lines.line_num} is not CSV ({e}); fetch it again") from None
    return rows


def _choice_rows(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
            question, choices, answer = (row[k] for k in ("question", "choices", "answer"))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{where} is not a JSON object with question, choices and "
                            "answer") from None
        rows.append(_question(f"{path.stem}:{len(rows)}", question, choices, answer, where))
    return rows


def _question(name: str, question, choices, answer, where: str, subject: str = "") -> dict:
    """A question's row; UserError unless its answer is one of its choices."""
    if not (isinstance(question, str) and question.strip() and isinstance(choices, list)
            and len(choices) > 1 and all(isinstance(c, str) and c.strip() for c in choices)):
        raise UserError(f"{where}: a question needs a text, and at least two choices of text")
    names = [*choices, *LETTERS[:len(choices)]]  # of the choices, then their letters
    index = names.index(answer) % len(choices) if answer in names else answer
    if type(index) is not int or not 0 <= index < len(choices):
        raise UserError(f"{where}: the answer {answer!r} is not one of its {len(choices)} choices")
    return dict(split="choices", id=name, question=question, choices=choices, answer=index,
                subject=subject)


def choice_examples(row: dict) -> list[Example]:
    """What is put to the model: of MMLU's CSV files the question in MMLU's own words, answered by a
    letter (0-shot); else the question in the run's template, answered by each choice."""
    if not row["subject"]:
        return [Example(row["question"], c, id=row["id"]) for c in row["choices"]]
    subject = row["subject"].replace("_", " ")
    listed = "\n".join(f"{x}. {c}" for x, c in zip(LETTERS, row["choices"]))
    asked = (f"The following are multiple choice questions (with answers) about {subject}.\n\n"
             f"{row['question'].strip()}\n{listed}\nAnswer:")
    return [Example(asked, x, id=row["id"]) for x in LETTERS[:len(row["choices"])]]


def add_choice_scores(rows: list[dict], model, tokenizer, template: str, tokens: int,
                      token_scores=token_scores) -> list[dict]:
    """The rows with `scores`: log P of each choice, its eos not counted."""
    context, texts = model.config.max_position_embeddings, []
    for row in rows:
        encoded = [data.encode(e, tokenizer, "raw" if row["subject"] else template)
                   for e in choice_examples(row)]
        cut = max(0, max(len(e.ids) - 1 for e in encoded) - context)  # of a long question's start
        if cut >= min(e.n_prompt for e in encoded):
            raise UserError(f"question {row['id']}: a choice is longer than the model's context of "
                            f"{context}; drop the question")
        texts += [Encoded(e.ids[cut:-1], e.n_prompt - cut) for e in encoded]
    found = iter(token_scores(model, texts, [e.n_prompt for e in texts], tokens=tokens))
    rows = [row | dict(scores=[-sum(next(found).losses) for _ in row["choices"]]) for row in rows]
    for row in rows:
        check_finite(row["scores"], row["id"])
    return rows
