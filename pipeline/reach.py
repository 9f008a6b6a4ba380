"""What code a result can depend on: the functions that make it, and all of ours that these reach.

A digest of that code decides whether a stage is stale. Comments, docstrings, messages and checks
that only raise are left out: rewording one must not cost anyone a training run. Of a table that a
fork edits (an objective, an optimiser), only the row that the stage's own settings name counts, so
adding or editing another row makes nothing again.
"""

import ast
import hashlib
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Modules whose code can change a number. Plans, reports and folders are not among them.
FOLLOWED = {name: ROOT / f"{name.replace('.', '/')}.py" for name in (
    "model", "data", "simu", "eval", "pipeline.reading", "pipeline.checkpoint", "pipeline.fused",
    "pipeline.objectives", "pipeline.original", "pipeline.stages",
    "pipeline.evaluate", "studies.attack", "studies.sweep",
    "pipeline.tokenizers", "pipeline.slices", "pipeline.levels",
    "pipeline.own_rows", "pipeline.before")}
ADDED = {"simu": ("pipeline.objectives",)}  # files whose rows are added to a module's tables
TABLES = ("OBJECTIVES", "OPTIMISERS", "MOVES", "METHODS", "MASKS", "TEMPLATES", "ARCHITECTURES")
MESSAGES = ("print", "UserError", "NoAccess", "tqdm")  # calls whose arguments only people read


@lru_cache
def read_module(module: str) -> tuple[dict, dict]:
    """Top-level name -> its syntax tree, and imported name -> (module, name or None)."""
    tree = ast.parse(FOLLOWED[module].read_text(encoding="utf-8"))
    defined, imported = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {a.asname or a.name: (a.name, None) for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            for a in node.names:
                whole = f"{node.module}.{a.name}"
                imported[a.asname or a.name] = ((whole, None) if whole in FOLLOWED
                                                else (node.module, a.name))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            defined |= dict.fromkeys(names, node)
    return defined, imported


class Silent(ast.NodeTransformer):
    """Drops what cannot change a number: docstrings, messages, checks that only raise."""

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Constant):
            return None
        if isinstance(node.value, ast.Call):
            name = called(node.value)
            if name in ("print", "need") or name.startswith(("check_", "need_")):
                return None
        return self.generic_visit(node)

    def visit_Raise(self, node):
        return ast.Raise(exc=None, cause=None)

    def visit_Call(self, node):
        if called(node) in MESSAGES:
            return ast.Call(func=node.func, args=[], keywords=[])
        self.generic_visit(node)
        node.keywords = [k for k in node.keywords if k.arg not in ("title", "desc", "about")]
        return node


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def is_settings(module: str, node) -> bool:
    """A dataclass of options: a stage records the values it takes, so the class is no code."""
    if not isinstance(node, ast.ClassDef):
        return False
    options = any(isinstance(x, ast.AnnAssign) and isinstance(x.value, ast.Call)
                  and called(x.value) == "option" for x in node.body)
    defined, _ = read_module(module)
    bases = (defined.get(getattr(base, "id", "")) for base in node.bases)
    return options or any(is_settings(module, base) for base in bases)


def table_row(node, key: str | None):
    """The syntax tree of one row of a table, None if it is not there, or that of all of it if no
    row is named or it is no literal."""
    if key is None or not isinstance(node.value, ast.Dict):
        return node
    rows = {k.value: v for k, v in zip(node.value.keys, node.value.values)
            if isinstance(k, ast.Constant)}
    return rows.get(key)


def code_digest(functions: tuple, rows: dict[str, str | None]) -> str:
    """sha256 of all code that the functions reach. rows: of each table, the key of the row that
    counts; None for all of it; a table that is not named does not count."""
    return digest_of(functions, frozenset(rows.items()))


@lru_cache  # a sweep asks for the same again at every point
def digest_of(functions: tuple, row_items: frozenset) -> str:
    rows = dict(row_items)
    found, left = {}, [(f.__module__, f.__qualname__.split(".")[0]) for f in functions]
    while left:
        at = module, name = left.pop()
        if at in found or module not in FOLLOWED:
            continue
        defined, imported = read_module(module)
        if name in imported and name not in defined:
            left.append(imported[name])
            continue
        node = defined.get(name)
        if node is None or is_settings(module, node):
            continue
        if name in TABLES:
            if name not in rows:
                continue
            left += [(other, name) for other in ADDED.get(module, ())]
            node = table_row(node, rows[name])
            if node is None:  # it is in one of the others
                continue
        found[at] = node
        left += references(node, module, defined, imported)
    digest = hashlib.sha256()
    for (module, name), node in sorted(found.items(), key=lambda item: item[0]):
        digest.update(f"{module}.{name}\0{quiet_source(node)}\0".encode())
    return digest.hexdigest()


@lru_cache(maxsize=None)  # stages share most of their functions
def quiet_source(node) -> str:
    """A syntax tree's code without what `Silent` drops. The tree itself is left whole."""
    return ast.unparse(Silent().visit(ast.parse(ast.unparse(node))))


def references(node, module: str, defined: dict, imported: dict) -> list[tuple[str, str]]:
    """(module, name) of everything of ours that a syntax tree names."""
    out = []
    for x in ast.walk(node):
        if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name):
            target, name = imported.get(x.value.id, (None, None))
            if target in FOLLOWED and name is None:
                out.append((target, x.attr))
        elif isinstance(x, ast.Name) and x.id in imported and imported[x.id][1]:
            out.append(imported[x.id])
        elif isinstance(x, ast.Name) and x.id in defined:
            out.append((module, x.id))
    return out
