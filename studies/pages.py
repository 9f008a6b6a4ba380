"""What a page says, held to the logs and CSVs that it says it of.

    python -m studies pages            writes every table between its marks, and names faults
    python -m studies pages --check    the same, and writes nothing

Tables stand between `<!-- table: NAME ... -->` and `<!-- end -->` (page_tables.py makes them). Any
other number of a page, in digits or in words (two to a hundred; a third, a fifth), must be part of
a line of benchmarks/results/claims.csv: a text that stands on the page, a file (the page itself:
its made tables), and a pattern, whose groups in that file must be the text's numbers, in order.

No numbers are what names and places are called: Mamba-2, 135M, Table 5, Section 2.1, [D4], 0e533ac,
the items of a list, addresses; nor commands, but their comments are looked at. Of code spans only
settings are: `5e-5`, `t = 0.6`, `--must-know 0`.
"""

import re
from decimal import ROUND_HALF_DOWN, ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path

from model import write_text
from pipeline.settings import HERE
from studies import common, objectives
from studies.common import chosen
from studies.page_tables import TABLES, printed

CLAIMS = common.RESULTS / "claims.csv"
BLOCK = re.compile(r"(<!-- table: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
IN_WORDS = {word: n for n, word in enumerate(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty".split(), 2)} | dict(
    thirty=30, forty=40, fifty=50, sixty=60, seventy=70, eighty=80, ninety=90, hundred=100,
    third=3, quarter=4, fifth=5, tenth=10)
WORD = rf"\b(?:{'|'.join(IN_WORDS)})s?\b"
# No part of a name, a version or an address.
NUMBER = (r"(?<![\w.])(?<![A-Za-z]-)(\d{1,3}(?:,\d{3})+|\d*\.?\d+(?:e-?\d+)?)"
          r"(?!\w|\.\d|,\d{3})")
FIGURE = re.compile(rf"{NUMBER}|({WORD})", re.IGNORECASE)
SETTING = re.compile(r"`((?:[\w.-]+ (?:= )?)?[\d.,e-]+)`")
COMMANDS = re.compile(r"```.*?```", re.DOTALL)
NO_NUMBER = re.compile(
    r"`[^`]*`|\]\([^)]*\)|\d{4}\.\d{5}|^ *\d+\. |"
    r"(?:Eqs?\.|[Tt]ables?|[Ff]igures?|Sections?) \d[.\d]*(?:(?:-|, | and )\d[.\d]*)*",
    re.DOTALL | re.MULTILINE)


def whole_pages() -> dict[Path, str]:
    """Pages that hold nothing but what a study prints."""
    return {out.with_suffix(".md"): printed(objectives.print_tables, out) + "\n"
            for out in (objectives.RESULTS / f"{x}-tiny-llama.csv" for x in ("demo", "tofu"))}


def with_tables(text: str) -> str:
    """A page with every table between its marks made again."""
    def made(match):
        name, *given = match[2].split()
        return f"{match[1]}\n{TABLES[name](*given)}\n\n{match[4]}"
    return BLOCK.sub(made, text)


# ---------------------------------------------------------------------------------------- numbers


def pages() -> list[Path]:
    """Every page whose numbers are held."""
    return [HERE / "README.md", HERE / "pipeline" / "README.md",
            *sorted(common.RESULTS.rglob("README.md"))]


@cache
def read(path: Path) -> str:
    return path.read_text()


@cache
def search(pattern: str, text: str) -> re.Match | None:
    return re.search(pattern, text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A page without its made tables, commands, links and names of places; settings and what is
    said of commands stay."""
    text = COMMANDS.sub(lambda m: "\n".join(re.findall("# .*", m[0])), BLOCK.sub("", text))
    return NO_NUMBER.sub(" ", SETTING.sub(r" \1 ", text))


def in_digits(figure: str) -> str:
    """A number of a text: `1,000` as 1000, `Five` as 5.

    >>> in_digits("1,508,480"), in_digits("Five"), in_digits("thirds"), in_digits("5e-6")
    ('1508480', '5', '3', '5e-6')
    """
    word = figure.lower()
    return str(IN_WORDS.get(word) or IN_WORDS.get(word.removesuffix("s")) or word.replace(",", ""))


def bare(number: str) -> str:
    """A number as those of `roundings` are written.

    >>> bare("0.50"), bare("5e-6"), bare("12")
    ('.50', '.000005', '12')
    """
    return f"{float(number):.15f}".strip("0") if "e" in number else number.lstrip("0")


def made_tables(text: str) -> str:
    return "".join(match[3] for match in BLOCK.finditer(text))


def roundings(number: str) -> set[str]:
    """A number and every shorter one that it rounds to; halves round either way.

    >>> sorted(roundings("0.5475"))
    ['.5', '.547', '.5475', '.548', '.55', '1']
    """
    if "e" in number:
        return {bare(number)}
    whole, _, digits = number.partition(".")
    value = Decimal(f"{whole or 0}.{digits}") if digits else Decimal(whole)
    return {f"{value.quantize(Decimal(1).scaleb(-n), rounding=how):f}".lstrip("0")
            for n in range(len(digits) + 1) for how in (ROUND_HALF_UP, ROUND_HALF_DOWN)}


def unfounded(page: Path, text: str, claims: list[dict]) -> list[str]:
    """The numbers of a page that are no claim's."""
    plain = " ".join(prose(text).split())
    for claim in claims_of(page, claims):
        plain = plain.replace(" ".join(prose(claim["text"]).split()), " ")
    return [f"{m[0]} in: ...{plain[max(0, m.start() - 30):m.end() + 20]}"
            for m in FIGURE.finditer(plain)]


# ----------------------------------------------------------------------------------------- claims


def claims_of(page: Path, claims: list[dict]) -> list[dict]:
    return chosen(claims, page=str(page.relative_to(HERE)))


def broken(page: Path, text: str, claims: list[dict], read=read) -> list[str]:
    """The claims of a page that it does not make, or that their files do not bear out."""
    out, plain = [], " ".join(text.split())
    for claim in claims_of(page, claims):
        said = [in_digits(m[0]) for m in FIGURE.finditer(prose(claim["text"]))]
        file = HERE / claim["file"]
        source = made_tables(text) if file == page else read(file)
        found = search(claim["pattern"], source)
        if " ".join(claim["text"].split()) not in plain:
            out.append(f"the page does not say: {claim['text']}")
        elif not found or len(found.groups()) != len(said) or not all(
                bare(a) in roundings(in_digits(b)) for a, b in zip(said, found.groups())):
            out.append(f"{claim['file']} does not say: {claim['text']}")
    return out


def faults(page: Path, text: str, read=read, claims: list[dict] | None = None) -> list[str]:
    """Whatever a page says that its sources do not."""
    claims = common.read_lines(CLAIMS) if claims is None else claims
    return broken(page, text, claims, read) + [
        f"no claim's: {x}" for x in unfounded(page, text, claims)]


def main(argv: list[str]):
    """Writes the tables of every page from CSVs and logs; names numbers without a source."""
    p = common.parser_of("pages", __doc__)
    p.add_argument("--check", action="store_true", help="write nothing; status 1 for faults")
    a, wrong = p.parse_args(argv), []
    made = whole_pages() | {page: with_tables(page.read_text()) for page in pages()}
    for page, text in made.items():
        name = page.relative_to(HERE)
        if text != page.read_text():
            wrong += [f"{name}: a table is not what its source says"] if a.check else []
            if not a.check:
                write_text(page, text)
                print(f"written: {name}")
    for page in pages():
        wrong += [f"{page.relative_to(HERE)}: {x}" for x in faults(page, made[page])]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if wrong and a.check:
        raise SystemExit(1)
