"""The house: who imports whom, what the core needs, and what an edit makes again."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import objectives, reach, slices
from pipeline.evaluate import measured_rows
from pipeline.original import make_original, make_retain_only
from pipeline.settings import Judging, Settings
from pipeline.stage import table_rows
from pipeline.stages import make_attribution, make_mask, make_unlearned
import simu

ROOT = Path(simu.__file__).parent
CORE = ("model", "data", "simu", "eval")
CARD = {"torch", "sentencepiece", "safetensors", "tqdm", "tokenizers", "jinja2",
        "sentence_transformers"}
UNPORTABLE = {"fcntl", "resource", "pwd", "grp", "termios"}


def module_files():
    return {p.stem: p for p in ROOT.glob("*.py")} | {
        ".".join(p.relative_to(ROOT).with_suffix("").parts): p
        for room in ("pipeline", "studies") for p in (ROOT / room).rglob("*.py")
        if p.stem != "__init__"}


def imports(path, files) -> tuple[set, set]:
    """Our modules and other packages that a file imports, inside functions too."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            found = [f for f in files if name == f or name.startswith(f + ".")]
            ours.update(found)
            if not found and name.split(".")[0] not in ("pipeline", "studies"):
                others.add(name.split(".")[0])
    return ours, others


def test_no_import_circle_anywhere():
    files = module_files()
    edges = {m: imports(p, files)[0] for m, p in files.items()}
    while leaves := [m for m, needs in edges.items() if not needs & set(edges)]:
        for m in leaves:
            del edges[m]
    assert not edges, f"these import one another: {edges}"


def test_the_top_level_is_the_core_which_needs_the_card_alone():
    files = module_files()
    assert {m for m in files if "." not in m} == set(CORE)
    for m in CORE:
        ours, others = imports(files[m], files)
        assert ours <= set(CORE), m
        assert others <= CARD | set(sys.stdlib_module_names) - UNPORTABLE, m


def test_of_the_pipeline_only_its_command_line_knows_the_studies():
    files = module_files()
    assert {m for m, path in files.items() if not m.startswith("studies.") and any(
        x.startswith("studies.") for x in imports(path, files)[0])} == {"pipeline.__main__"}


def test_nobody_uses_anothers_underscore_names():
    files = module_files()
    for m, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {a.asname or a.name for node in ast.walk(tree) if isinstance(
            node, (ast.Import, ast.ImportFrom)) for a in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert not any(a.name.startswith("_") for a in node.names), m
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                assert not (private and node.value.id in modules & {
                    x.rpartition(".")[2] for x in files}), f"{m} uses {node.attr}"


def test_each_core_file_can_be_read_alone(tmp_path):
    """Copied into an empty folder, the four import without the repository and without fcntl."""
    for m in CORE:
        shutil.copy(ROOT / f"{m}.py", tmp_path)
    code = ("import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; "
            "import simu, model, data, eval; print(simu.__file__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split()[-1]).parent == tmp_path


# ------------------------------------------------------------------------------------- staleness

UNLEARNING = (slices.Slice, objectives.Unlearning)
STAGES = {"retain-only": ((make_retain_only,), (slices.Slice,)),
          "original": ((make_original,), (slices.Slice,)),
          "attribution": ((make_attribution,), (slices.Slice, simu.Attribution)),
          "mask": ((make_mask,), (simu.Masking,)),
          "fo-graddiff": ((make_unlearned,), UNLEARNING, dict(method="fo")),
          "so-graddiff": ((make_unlearned,), UNLEARNING, dict(method="so")),
          "simu-npo": ((make_unlearned,), UNLEARNING, dict(objective="npo")),
          "generations": ((measured_rows,), (slices.Slice, Judging))}
ABOVE = {"retain-only", "original", "attribution", "mask"}
UNLEARNED = set(STAGES) - ABOVE - {"generations"}


def forget_code():
    reach.read_module.cache_clear()
    reach.digest_of.cache_clear()


def digests():
    forget_code()
    out = {}
    for name, (code, takes, *changed) in STAGES.items():
        s = Settings(**(changed[0] if changed else {}))
        out[name] = reach.code_digest(code, table_rows(s, takes))
    return out


EDITS = [  # file, text, its replacement, stages made again
    ("simu.py", "    return -answers.nll.sum()", "    return -2 * answers.nll.sum()",
     {"fo-graddiff", "so-graddiff"}),
    ("pipeline/objectives.py", "recipe.npo_beta * F.softplus", "recipe.npo_beta * 2 * F.softplus",
     {"simu-npo"}),
    ("simu.py", "ratio = m / (gamma", "ratio = 2 * m / (gamma", {"so-graddiff", "simu-npo"}),
    ("simu.py", "return m.lerp(grad, 1 - beta1)", "return m.lerp(grad, 2 - beta1)",
     {"fo-graddiff"}),
    ("simu.py", "h = model.embed(ids)  #", "h = 2 * model.embed(ids)  #", {"attribution"}),
    ("simu.py", "(scores > threshold * top)", "(scores >= threshold * top)", {"mask"}),
    ("simu.py", "rise = max(1,", "rise = max(2,", UNLEARNED | {"retain-only", "original"}),
    ("model.py", "F.silu(", "F.gelu(", set(STAGES) - {"mask"}),
    ("simu.py", '    "ga": Objective(', '    "mine": Objective(descent),\n    "ga": Objective(',
     set()),
    ("pipeline/objectives.py", '    "po": Objective(', '    "mine": Objective(npo),\n    "po": '
     'Objective(', set()),
    ("simu.py", "nothing to attribute", "nothing whatever to attribute", set()),
    ("simu.py", '"""GradDiff as one loss', '"""GradDiff as a single loss', set()),
    ("simu.py", "# Eq. 4", "# Equation 4", set()),
    ("pipeline/objectives.py", 'npo_beta: float = option(0.1, "beta of NPO"', 'mine: int = option('
     '3, "own")\n    npo_beta: float = option(0.1, "the beta of NPO"', set()),
    ("eval.py", "is_exact(row) -> bool:\n    return", "is_exact(row) -> bool:\n    return not", set()),
    ("eval.py", '    "rouge_l": Metric(', '    "mine": Metric(is_exact),\n    "rouge_l": Metric(', set()),
    ("eval.py", "prompts.append(prompt)", "prompts.append(prompt[1:])", {"generations"}),
    ("eval.py", "log_p = model.logits(", "log_p = 2 * model.logits(", {"generations"}),
]


@pytest.mark.parametrize("file, old, new, again", EDITS, ids=[e[1][:40] for e in EDITS])
def test_what_an_edit_makes_again(tmp_path, monkeypatch, file, old, new, again):
    before = digests()
    copied = {}
    for name, path in reach.FOLLOWED.items():
        if path.is_file():
            copied[name] = tmp_path / path.relative_to(ROOT)
            copied[name].parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copied[name])
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    monkeypatch.setattr(reach, "FOLLOWED", copied)
    try:
        after = digests()
    finally:
        monkeypatch.undo()
        forget_code()
    assert {k for k in before if before[k] != after[k]} == again
