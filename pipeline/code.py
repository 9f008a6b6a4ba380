"""What code a result depends on: the functions that make it, and all of ours that these reach.

A digest of that code decides whether a stage is stale. Comments, docstrings and messages are left
out, because rewording one must not cost anyone a training run. Of a table that a fork edits (an
objective, an optimiser), only the row that the stage's own settings name counts, so that adding or
editing another row makes nothing again.
"""

import ast
import functools
import hashlib
import inspect
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FunctionType, ModuleType

import torch

ROOT = Path(__file__).resolve().parent.parent
# Modules whose code changes no number: settings, folders, plans, reports.
IGNORED = {f"pipeline.{name}" for name in (
    "settings", "stage", "code", "hub", "plan", "report", "columns", "card")}
TABLES = ("OBJECTIVES", "OPTIMISERS", "MOVES", "METHODS", "MASKS", "TEMPLATES", "ARCHITECTURES",
          "NEURONS", "LAYOUTS")
MESSAGES = ("print", "UserError", "NoAccess", "tqdm")  # calls whose arguments only people read
LABELS = ("title", "desc", "about")  # arguments and fields that only people read
PLAIN = (str, bytes, int, float, range, re.Pattern, torch.dtype, type(None))


def code_digest(functions: tuple, rows: dict[str, str | None]) -> str:
    """sha256 of all code that the functions reach. rows: of each table, the key of the row that
    counts; None for all of it; a table that is not named does not count."""
    texts, reached = set(), []
    describe(functions, reached)
    for thing in reached:  # which grows meanwhile
        for tree in trees_of(thing):
            texts.add(f"{thing.__module__}.{thing.__qualname__}: {text_of(tree)}")
            for name, value in names_in(tree, vars(sys.modules[thing.__module__])):
                if name in TABLES and isinstance(value, dict):
                    key = rows.get(name, "")
                    value = value if key is None else value.get(key)
                if name not in MESSAGES and (name.isupper() or is_code(inspect.unwrap(value))):
                    texts.add(f"{thing.__module__}, {name}: {describe(value, reached)}")
    return hashlib.sha256(repr(sorted(texts)).encode()).hexdigest()


def is_code(thing) -> bool:
    """Is it a function or a class of ours that can change a number? A dataclass of options cannot:
    a stage records the values that it takes."""
    if not isinstance(thing, (FunctionType, type)) or thing.__module__ in IGNORED:
        return False
    if is_dataclass(thing) and any("effect" in f.metadata for f in fields(thing)):
        return False
    return is_ours(sys.modules.get(thing.__module__))


def is_ours(module) -> bool:
    """Is a module a file of this repository, and of no environment inside it (.venv)?"""
    file = Path(getattr(module, "__file__", None) or "/")
    return file.is_relative_to(ROOT) and "site-packages" not in file.parts


def describe(value, reached: list) -> str:
    """A value as a text that is the same in every process. Functions and classes of ours in it are
    appended to `reached`, and stand by their names in the text."""
    value = inspect.unwrap(value)
    if is_code(value):
        reached += [] if value in reached else [value]
        return value.__qualname__
    if isinstance(value, functools.partial):
        return describe([value.func, value.args, value.keywords], reached)
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in LABELS}
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (set, frozenset)):
        return repr(sorted(describe(x, reached) for x in value))
    if isinstance(value, (list, tuple)):
        return repr([describe(x, reached) for x in value])
    return repr(value) if isinstance(value, PLAIN) else type(value).__name__


class Quiet(ast.NodeTransformer):
    """Drops what only people read: docstrings and messages."""

    def visit_Expr(self, node):
        return ast.Pass() if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        node.args = [] if name in MESSAGES else node.args
        node.keywords = [k for k in node.keywords if k.arg not in LABELS]
        return node


text_of = functools.cache(ast.unparse)  # stages share most of their functions


@functools.cache
def trees_in(file: str) -> list[tuple]:
    """(first line, syntax tree) of each class and function of a file."""
    nodes = ast.walk(Quiet().visit(ast.parse(Path(file).read_text(encoding="utf-8"))))
    return [(min(n.lineno for n in (node, *getattr(node, "decorator_list", ()))), node)
            for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Lambda))]


def trees_of(thing) -> list:
    """Syntax trees of a class, or of all functions that begin on a function's line."""
    trees = trees_in(sys.modules[thing.__module__].__file__)
    if isinstance(thing, type):
        return [tree for _, tree in trees if getattr(tree, "name", "") == thing.__name__]
    return [tree for line, tree in trees if line == thing.__code__.co_firstlineno]


def names_in(tree, names: dict):
    """(name, value) of every global, and every member of a module of ours, that a tree names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names:
            yield node.id, names[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, ModuleType) and is_ours(module):
                yield node.attr, vars(module).get(node.attr)
