"""The live pages say what is so: their links, commands and names exist, the line counts
of the front page are near, and its one table follows from its log."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import simu
from pipeline.__main__ import STUDIES, parser_of_commands

ROOT = Path(simu.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "pipeline" / "README.md"]
FRONT = PAGES[0].read_text("utf-8")
EXAMPLES = dict(MODEL="tiny-llama", BENCHMARK="demo", RUN="runs/x", FILE="rows.jsonl")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_parse(page):
    text = page.read_text("utf-8")
    commands = re.findall(r"(bash run\.sh|python -m pipeline) ([a-z][^`\n#]*)", text)
    assert commands or page != PAGES[0]
    for program, words in commands:
        words = [EXAMPLES.get(word, word) for word in shlex.split(words)]
        if words[0] not in STUDIES and words != ["test"]:
            kind = ["run"] if program == "bash run.sh" else []
            parser_of_commands().parse_args([*kind, *words])


def test_names_exist():
    paper = FRONT[FRONT.index("- Eq. 1-2"):FRONT.index("- Tables 1-2")]
    names = re.findall(r"`(simu|model|data|eval)\.([A-Za-z]\w+)`", FRONT)
    names += [("simu", name) for name in re.findall(r"`(\w+)`", paper)]
    assert len(names) > 15
    for module, name in names:
        assert name == "py" or hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for page in PAGES:
        for path in re.findall(r"`([\w/]+\.py)`", page.read_text("utf-8")):
            assert (ROOT / path).is_file() or (ROOT / "tests" / path).is_file(), path


def test_a_file_imports_only_files_that_stand_above_it():
    table = re.findall(r"^\| (`.*?) \|", PAGES[1].read_text("utf-8"), re.MULTILINE)
    order = re.findall(r"`(\w+)`", " ".join(table))
    assert sorted(order) == sorted(p.stem for p in (ROOT / "pipeline").glob("*.py")
                                   if p.stem != "__init__")
    for i, name in enumerate(order):
        text = (ROOT / "pipeline" / f"{name}.py").read_text("utf-8")
        for line in re.findall(r"from pipeline(?:\.(\w+))? import (\([^)]*\)|.*)", text):
            used = [line[0]] if line[0] else re.findall(r"\w+", line[1].split("#")[0])
            assert not set(used) & set(order[i:]), f"{name} imports {used}"


def test_the_front_page_is_short_and_its_counts_are_near():
    assert len(FRONT.split()) <= 1000
    for name, count in re.findall(r"`(\w+\.py)`,? (\d+)", FRONT.replace(" lines", "")):
        lines = len((ROOT / name).read_text("utf-8").splitlines())
        assert abs(lines - int(count)) <= 0.1 * lines, f"{name} has {lines}"
    folders = re.sub(r"\]\([^)]*\)", "", FRONT)
    for folder, count in re.findall(r"`(\w+)/`[,(]* \(?([\d,]+)", folders):
        lines = sum(len(x.read_text("utf-8").splitlines()) for x in (ROOT / folder).glob("*.py"))
        assert abs(lines - int(count.replace(",", ""))) <= 0.1 * lines, f"{folder} has {lines}"


def cells_of(text: str) -> dict[str, list[str]]:
    """Name -> cells of each line of the Markdown tables in a text; the last of a name."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
             if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_the_demos_table_follows_from_its_log():
    log = cells_of((ROOT / "benchmarks/logs/demo-tiny-llama.txt").read_text("utf-8"))
    names = ("ROUGE-L-Forget ↓", "ROUGE-L-Retain ↑", "ROUGE-L-WF ↑", "MIA ↓")
    columns = [log["Approach"].index(name) for name in names]
    table = cells_of(FRONT[FRONT.index("## What the demo shows"):])
    shown = {name: cells for name, cells in table.items() if name and name.strip("-")}
    assert list(shown) == ["Retain-only (ideal)", "Original", "FO-GradDiff", "SO-GradDiff",
                           "SIMU-GradDiff", "simu-stranger"]
    for name, cells in shown.items():
        assert cells == [log[name][i] for i in columns], name
