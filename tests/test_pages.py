"""Every figure on a page is its log's: tables are what CSVs and logs make, numbers in the text
stand in a source, and a change of either is noticed."""

import inspect
import re
import shutil
from functools import cache

import pytest

import eval as evaluation
import simu
from studies import common, figures, objectives, page_tables, pages, pretrained

PAGES = {str(page.relative_to(pages.HERE)): page for page in pages.pages()}
CLAIMS = common.read_lines(pages.CLAIMS)


def other(number: str, first: int = 0) -> str:
    """A number with other digits from the first-th on, or another word."""
    if number[-1].isalpha():
        return "nineteen" if number.lower() != "nineteen" else "eighteen"
    return number[:first] + re.sub(r"\d", lambda d: str((int(d[0]) + 5) % 10), number[first:])


@pytest.mark.parametrize("name", PAGES)
def test_a_pages_tables_and_numbers_are_its_sources(name):
    text = PAGES[name].read_text()
    assert pages.with_tables(text) == text, "run `python -m studies pages`"
    assert pages.faults(PAGES[name], text) == []


def test_pages_of_tables_alone_are_what_the_study_prints():
    for page, text in pages.whole_pages().items():
        assert page.read_text() == text


def commands(text: str) -> list[tuple[int, int]]:
    """The spans of a page's commands without their comments."""
    found = []
    for block in pages.COMMANDS.finditer(text):
        at = block.start()
        for comment in re.finditer("# .*", block[0]):
            found.append((at, block.start() + comment.start()))
            at = block.start() + comment.end()
        found.append((at, block.end()))
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_number_that_is_changed_on_a_page_is_noticed(name):
    """The last digit, or the word, of each number in turn, but in made tables, commands, links and
    names of places."""
    page, text = PAGES[name], PAGES[name].read_text()
    settings = {m.start() for m in pages.SETTING.finditer(text)}
    skipped = commands(text) + [
        m.span() for pattern in (pages.BLOCK, pages.NO_NUMBER) for m in pattern.finditer(text)
        if m.start() not in settings]
    places = [m.span() for m in pages.FIGURE.finditer(text)
              if not any(a <= m.start() < b for a, b in skipped)]
    missed = []
    for start, end in places:
        changed = text[:start] + other(text[start:end], end - start - 1) + text[end:]
        if not pages.faults(page, changed, claims=CLAIMS):
            missed.append(text[max(0, start - 40):end + 20])
    assert places and missed == []


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c["text"][:40])
def test_a_claim_breaks_with_its_file(claim):
    """Each number that its pattern takes from the file, changed there."""
    page, file = pages.HERE / claim["page"], pages.HERE / claim["file"]
    text = page.read_text()
    held = pages.made_tables(text) if file == page else file.read_text()
    found = re.search(claim["pattern"], held, re.DOTALL | re.MULTILINE)
    assert pages.broken(page, text, [claim]) == []
    for i in range(1, len(found.groups()) + 1):
        start, end = found.span(i)
        changed = held[:start] + other(found[i]) + held[end:]
        if file == page:
            told = pages.broken(page, swapped(text, changed), [claim])
        else:
            told = pages.broken(page, text, [claim], lambda path: changed)
        assert told, found[i]


def swapped(text: str, tables: str) -> str:
    """A page whose made tables, laid end to end, are `tables`."""
    at = 0

    def part(match):
        nonlocal at
        own = tables[at:at + len(match[3])]
        at += len(match[3])
        return f"{match[1]}{own}{match[4]}"
    return pages.BLOCK.sub(part, text)


@pytest.mark.parametrize("folder, module, file, column", [
    ("objectives", objectives, "tofu-tiny-llama.csv", "retain.rouge_l"),
    ("tofu-smollm2-135m", pretrained, "points.csv", "manual"),
    ("tofu-smollm2-135m", pretrained, "rows.csv", "rouge_l")])
def test_a_changed_csv_changes_its_pages_tables(folder, module, file, column, tmp_path,
                                                monkeypatch):
    copy = tmp_path / folder
    shutil.copytree(module.RESULTS, copy)
    monkeypatch.setattr(module, "RESULTS", copy)
    text = (copy / "README.md").read_text()
    assert pages.with_tables(text) == text
    head, *rows = [line.split(",") for line in (copy / file).read_text().splitlines()]
    row = next(r for r in rows if "level" in r)
    row[head.index(column)] = "0.123"
    (copy / file).write_text("\n".join(",".join(r) for r in (head, *rows)) + "\n")
    assert pages.with_tables(text) != text


def test_a_changed_log_changes_the_readmes_table(tmp_path, monkeypatch):
    text = PAGES["README.md"].read_text()
    shutil.copytree(page_tables.LOGS, tmp_path / "logs")
    monkeypatch.setattr(page_tables, "LOGS", tmp_path / "logs")
    log = tmp_path / "logs" / "demo-tiny-llama.txt"
    assert pages.with_tables(text) == text
    shown = page_tables.table_of_log(log.stem, "Retain-only")[-1][3]  # ROUGE-L of the last line
    log.write_text(log.read_text().replace(shown, other(shown)))
    assert pages.with_tables(text) != text


def test_what_counts_as_a_number_and_its_rounding():
    assert pages.roundings("0.5475") == {"1", ".5", ".55", ".547", ".548", ".5475"}
    assert pages.roundings("12") == {"12"}
    plain = pages.prose("`t = 0.6`, torch 2.13.0, Section 2.1, llama3.2-1b, Mamba-2, Figures 2, 3 "
                        "and 5, `run.sh --seeds 5`, 2510.07822: .5; 135M, five, 5e-6, 1,024.")
    assert [pages.in_digits(m[0]) for m in pages.FIGURE.finditer(plain)] == [
        "0.6", ".5", "5", "5e-6", "1024"]


def test_the_front_page_is_short():
    assert len(PAGES["README.md"].read_text().split()) <= 1000


# ------------------------------------------------- the front page's names for places of the paper

PLACE = re.compile(r"(?:Eq\.|Section|Tables?) \d(?:\.\d)?[ab]?(?:-\d)?(?!\w)|A\.\d")
MAPPED = re.compile(rf"({PLACE.pattern})[^:`]*: `(?:simu\.)?(\w+)`(?:; fast: `(\w+)`)?")


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


@cache
def heading(name: str) -> str:
    """The comment that begins the part of simu.py in which a name is defined."""
    before = re.split(rf"^(?:def )?{name}\b", inspect.getsource(simu), flags=re.MULTILINE)[0]
    return re.findall(r"^# [-=]{5}.*\n(?:#.*\n)*", before, re.MULTILINE)[-1]


def said_of(name: str) -> list[str]:
    """The places of the paper that a name's docstring tells, or else the heading above it."""
    value = getattr(simu, name)
    own = PLACE.findall(value.__doc__ or "") if callable(value) else []
    return own or PLACE.findall(heading(name))


@cache
def code_beside_tags() -> dict[str, str]:
    """Each [D#] of the code: the lines that name it, each with its neighbours."""
    found = {}
    for path in (*pages.HERE.glob("*.py"), *(pages.HERE / "pipeline").rglob("*.py")):
        lines = path.read_text().splitlines()
        for i, line in enumerate(lines):
            for tag in re.findall(r"D\d+", " ".join(re.findall(r"\[D\d[D\d, ]*\]", line))):
                found[tag] = "\n".join([found.get(tag, ""), *lines[max(0, i - 1):i + 2]])
    return found


def astray(text: str) -> list[str]:
    """What the front page says of the paper's places that the code does not say."""
    there, wrong = section(text, "Where the paper is in the code"), []
    mapped = MAPPED.findall(there)
    for place, name, fast in mapped:
        if said_of(name)[0] != place:
            wrong.append(f"{name} is {said_of(name)[0]}, not {place}")
        if fast and name not in (getattr(simu, fast).__doc__ or "") + heading(fast):
            wrong.append(f"{fast} is not that of {name}")
    tables, of_run, of_sweep = re.fullmatch(
        r"(Tables .*?): a run's .*?(Table .*?):\n.*?(Figures .*?): first .*--variants.*",
        there.strip().rpartition("\n\n")[2], re.DOTALL).groups()
    if tables not in evaluation.__doc__.splitlines()[0]:
        wrong.append(f"eval.py does not define {tables}")
    for place, function in ((of_run, figures.masks), (of_sweep, figures.variants)):
        drawn = re.findall(r"(?:figure|table)(\d)", inspect.getsource(function))
        if set(re.findall(r"\d", place)) != set(drawn):
            wrong.append(f"{place}: {drawn} are drawn")
    readings = re.findall(r"\*\*(D\d+)\*\*([^*]*)", section(text, "Readings of the paper"))
    tagged = code_beside_tags()
    wrong += [f"{x} is on the page or in the code alone"
              for x in set(tagged) ^ {tag for tag, _ in readings}]
    return wrong + [f"{place} is not beside [{tag}]" for tag, reading in readings
                    for place in PLACE.findall(reading)
                    if place not in PLACE.findall(tagged.get(tag, ""))]


def test_the_front_page_names_places_of_the_paper_as_the_code_does():
    """Each name's place, each tag; and any other digit in one of them is noticed."""
    text = PAGES["README.md"].read_text()
    assert astray(text) == [] and len(MAPPED.findall(text)) == 8
    for title in ("Where the paper is in the code", "Readings of the paper"):
        part = section(text, title)
        places = rf"{PLACE.pattern}|Figures? [\d, and]+\d|\*\*D\d+"
        for at in (i for m in re.finditer(places, part) for i in range(*m.span())):
            for digit in "123456789" if part[at].isdigit() else "":
                changed = part[:at] + digit + part[at + 1:]
                assert changed == part or astray(text.replace(part, changed)), changed
