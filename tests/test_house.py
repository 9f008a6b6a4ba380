"""The house: who imports whom, what the core needs, and what an edit makes again."""

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import simu
from pipeline import code

ROOT = Path(simu.__file__).parent
CORE = ("model", "data", "simu", "eval")
NEEDED = {"torch", "sentencepiece", "safetensors", "tqdm", "tokenizers"}
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
            matches = [f for f in files if name == f or name.startswith(f + ".")]
            ours.update(matches)
            if not matches and name.split(".")[0] not in ("pipeline", "studies"):
                others.add(name.split(".")[0])
    return ours, others


def test_no_import_circle_anywhere():
    files = module_files()
    edges = {m: imports(p, files)[0] for m, p in files.items()}
    while leaves := [m for m, needs in edges.items() if not needs & set(edges)]:
        for m in leaves:
            del edges[m]
    assert not edges, f"these import one another: {edges}"


def test_the_core_imports_itself_and_five_packages():
    files = module_files()
    assert {m for m in files if "." not in m} == set(CORE)
    for m in CORE:
        ours, others = imports(files[m], files)
        assert ours <= set(CORE), m
        assert others <= NEEDED | set(sys.stdlib_module_names) - UNPORTABLE, m


def test_only_the_studies_import_studies():
    files = module_files()
    assert not {m for m, path in files.items() if not m.startswith("studies.") and any(
        x.startswith("studies.") for x in imports(path, files)[0])}


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

# Stage -> the function that makes it, the dataclasses of settings that it takes, settings.
UNLEARN = "pipeline.stages.make_unlearned", "pipeline.slices.Slice pipeline.objectives.Unlearning"
STAGES = {"retain-only": ("pipeline.original.make_retain_only", "pipeline.slices.Slice"),
          "original": ("pipeline.original.make_original", "pipeline.slices.Slice"),
          "attribution": ("pipeline.stages.make_attribution",
                          "pipeline.slices.Slice simu.Attribution"),
          "mask": ("pipeline.stages.make_mask", "simu.Masking"),
          "fo-graddiff": (*UNLEARN, dict(method="fo")),
          "so-graddiff": (*UNLEARN, dict(method="so")),
          "simu-npo": (*UNLEARN, dict(objective="npo")),
          "generations": ("pipeline.evaluate.measured_rows",
                          "pipeline.slices.Slice pipeline.settings.Judging")}
UNLEARNED = {"fo-graddiff", "so-graddiff", "simu-npo"}


def named(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def digests(folder: Path) -> dict[str, str]:
    """Code digest of each stage, by the code in a folder, which is imported beside ours."""
    ours = {name: module for name, module in sys.modules.items() if str(ROOT) in str(
        getattr(module, "__file__", "")) and name.split(".")[0] in (*CORE, "pipeline", "studies")}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        out = {}
        for stage, (code, takes, *changed) in STAGES.items():
            s = named("pipeline.settings.Settings")(**(changed[0] if changed else {}))
            rows = named("pipeline.stage.table_rows")(s, tuple(map(named, takes.split())))
            out[stage] = named("pipeline.code.code_digest")((named(code),), rows)
        return out
    finally:
        sys.path.remove(str(folder))
        for name in [x for x in sys.modules if x.split(".")[0] in (*CORE, "pipeline", "studies")]:
            del sys.modules[name]
        sys.modules.update(ours)


EDITS = [  # file, text, its replacement, stages made again
    ("simu.py", 'yield "loss_forget", -nll, nll', 'yield "loss_forget", -2 * nll, nll',
     {"fo-graddiff", "so-graddiff"}),
    ("pipeline/objectives.py", "recipe.npo_beta * F.softplus", "recipe.npo_beta * 2 * F.softplus",
     {"simu-npo"}),
    ("simu.py", "ratio = m / (gamma", "ratio = 2 * m / (gamma", {"so-graddiff", "simu-npo"}),
    ("simu.py", "return m.lerp(grad, 1 - beta1)", "return m.lerp(grad, 2 - beta1)",
     {"fo-graddiff"}),
    ("simu.py", "x, cos_sin = model.embed_tokens(", "x, cos_sin = 2 * model.embed_tokens(",
     {"attribution"}),
    ("simu.py", "(scores > threshold * top)", "(scores >= threshold * top)", {"mask"}),
    ("simu.py", "rise = max(1,", "rise = max(2,", UNLEARNED | {"retain-only", "original"}),
    ("model.py", "F.silu(", "F.gelu(", set(STAGES) - {"mask"}),
    ("simu.py", '    "graddiff": Objective(', '    "mine": Objective(graddiff),\n    "graddiff": '
     'Objective(',
     set()),
    ("pipeline/objectives.py", '    "po": Objective(', '    "mine": Objective(npo),\n    "po": '
     'Objective(', set()),
    ("simu.py", "nothing to attribute", "nothing whatever to attribute", set()),
    ("simu.py", '"""GradDiff as one loss', '"""GradDiff as a single loss', set()),
    ("simu.py", "# Eq. 4", "# Equation 4", set()),
    ("pipeline/objectives.py", 'npo_beta: float = option(0.1, "beta of NPO"', 'mine: int = option('
     '3, "own")\n    npo_beta: float = option(0.1, "the beta of NPO"', set()),
    ("eval.py", "is_exact(row) -> bool:\n    return", "is_exact(row) -> bool:\n    return not",
     set()),  # metrics are computed when they are read
    ("eval.py", '    "rouge_l": Metric(', '    "mine": Metric(is_exact),\n    "rouge_l": Metric(',
     set()),
    ("eval.py", "prompts.append(prompt)", "prompts.append(prompt[1:])", {"generations"}),
    ("eval.py", "log_p = model.logits(", "log_p = 2 * model.logits(", {"generations"}),
]


@pytest.fixture(scope="module")
def before():
    return digests(ROOT)


@pytest.mark.parametrize("file, old, new, again", EDITS, ids=[e[1][:40] for e in EDITS])
def test_what_an_edit_makes_again(tmp_path, before, file, old, new, again):
    for path in [*ROOT.glob("*.py"), *ROOT.glob("pipeline/*.py")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    after = digests(tmp_path)
    assert {stage for stage in before if before[stage] != after[stage]} == again


def test_packages_in_the_repositorys_environment_are_no_code_of_ours():
    """run.sh makes .venv inside the repository, and compiled files there cannot be read."""
    inside = ROOT / ".venv" / "lib" / "python3" / "site-packages" / "torch" / "_C.so"
    assert not code.is_ours(SimpleNamespace(__file__=str(inside)))
    assert code.is_ours(simu) and not code.is_ours(SimpleNamespace())
