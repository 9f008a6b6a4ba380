"""What a page says, held to the logs and CSVs that it says it of.

    python -m studies pages            writes every table between its marks; names what has no source
    python -m studies pages --check    the same, and writes nothing

Tables stand between `<!-- table: NAME ... -->` and `<!-- end -->` and are made of CSVs and logs. A
decimal number anywhere else on a page must be the number, or the rounding of a longer one, of a
table that is made so on the same page, or of a log or page of tables that the page links; a number
with its interval must stand there with it. What is surer, or is no decimal number, is a line of
benchmarks/results/claims.csv: a text that stands on a page, a file, and a pattern, whose groups in
that file must be the numbers of the text, in order.
"""

import contextlib
import io
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

from model import write_text
from pipeline.columns import table
from pipeline.settings import HERE
from studies import common, figures, known_memory_page, objectives, pretrained, readings
from studies.common import cell, chosen, groups, numbers

CLAIMS = common.RESULTS / "claims.csv"
BLOCK = re.compile(r"(<!-- table: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NUMBER = r"(?<![\w.])(\d*\.\d+)(?!\w|\.\d)"  # no part of a name, a version or an address
PAIR = re.compile(rf"{NUMBER}\s*±\s*{NUMBER}")
NO_NUMBER = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|Sections? \d[.\d]*|\d{4}\.\d{5}", re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+\.(?:txt|md|csv|json))\)")

# ----------------------------------------------------------------------------------------- tables


def demo_table() -> str:
    """The first run of the demo's log, the columns that a first reader needs."""
    shown = ("ROUGE-L-Forget ↓", "ROUGE-L-Retain ↑", "ROUGE-L-WF ↑", "MIA ↓")
    log = (HERE / "benchmarks" / "logs" / "demo-tiny-llama.txt").read_text()
    made = next(x for x in re.findall(r"(?:^\|.*\n)+", log, re.MULTILINE) if "Retain-only" in x)
    head, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in made.splitlines()]
    return table(["", "ROUGE-L forget ↓", "retain ↑", "world facts ↑", "MIA (ideal: retain-only's)"],
                 [[row[0], *(row[head.index(name)] for name in shown)] for row in rows])


ARMS = {"fo": "FO-GradDiff", "so": "SO-GradDiff", "simu": "SIMU", "simu-random": "SIMU, random mask"}


def level_name(level: str) -> str:
    return "as much as retain-only's" if level.startswith("retain") else level.replace(
        "forget = ", "ROUGE-L ")


def at_equal_forgetting(folder: str) -> dict:
    """{level: {arm: its line}} of a stored sweep."""
    rows = common.read_lines(common.RESULTS / folder / "figures" / "equal-forgetting.csv")
    return {level: {r["arm"]: r for r in own} for (level,), own in groups(rows, "level").items()}


def with_interval(row: dict, value: str, half: str, most: int, sign: str = "") -> str:
    """A cell of a frontier's table; in brackets how many of `most` seeds reach the level."""
    if not row[half]:
        return "–"
    fewer = "" if int(row["seeds"]) == most or sign else f" ({row['seeds']})"
    return f"{float(row[value]):{sign}.3f} ± {float(row[half]):.3f}{fewer}"


def frontier_lines(folder: str, levels: dict, arms: tuple, against: tuple) -> list[list[str]]:
    most = max(int(r["seeds"]) for own in levels.values() for r in own.values())
    return [[level_name(level), *(with_interval(own[a], "utility", "half_interval", most)
                                  for a in arms),
             *(with_interval(own[a], "simu_minus_arm", "difference_half_interval", most, "+")
               for a in against)] for level, own in levels.items()]


FIRST = "What is left of the forget set"


def frontier_table(folder: str) -> str:
    return table([FIRST, *(ARMS[a] for a in ("fo", "so", "simu", "simu-random")), "SIMU - random",
                  "SIMU - SO", "SIMU - FO"], frontier_lines(
        folder, at_equal_forgetting(folder), tuple(ARMS), ("simu-random", "so", "fo")))


def beyond_table() -> str:
    cells = {"tiny-mamba": "demo-tiny-mamba", "tiny-rwkv": "demo-tiny-rwkv",
             "tiny-llama, TOFU": "tofu-tiny-llama"}
    made = {name: {line[0]: line[1:] for line in frontier_lines(
        folder, at_equal_forgetting(folder), ("so", "simu", "simu-random"), ("simu-random", "so"))}
        for name, folder in cells.items()}
    levels = [level_name(x) for x in ("retain-only's", *(f"forget = {y}" for y in (0.1, 0.2, 0.5)))]
    return table([FIRST, "model", "SO-GradDiff", "SIMU", "SIMU, random mask", "SIMU - random",
                  "SIMU - SO"], [[level, name, *own[level]] for level in levels
                                 for name, own in made.items()])


OBJECTIVE_LINES = {
    "demo": (("-", "retain-only"), *(("graddiff", x) for x in ("fo", "so", "simu")),
             *((x, "simu") for x in ("npo", "undial", "ceiling")),
             *((x, y) for x in ("level", "stranger") for y in ("fo", "so", "simu"))),
    "tofu": (("-", "retain-only"),
             *((x, y) for x in ("level", "stranger") for y in ("fo", "so", "simu")))}


def objective_rows(benchmark: str) -> dict:
    """{(objective, arm): its lines} at the recipes' rates: the first of an arm's."""
    rows = common.read_lines(objectives.RESULTS / f"{benchmark}-tiny-llama.csv")
    out = {}
    for (objective, arm, _), own in groups(rows, "objective", "arm", "lr").items():
        out.setdefault((objective, arm), own)
    return out


def objectives_table() -> str:
    lines = []
    for benchmark, keys in OBJECTIVE_LINES.items():
        made = objective_rows(benchmark)
        ideal = {r["seed"]: r for r in made["-", "retain-only"]}
        for key in keys:
            mean = {v: f"{common.interval(numbers(made[key], v))[0]:.3f}" for v in objectives.VALUES
                    if numbers(made[key], v)}
            far = [f"{common.interval(objectives.distances(made[key], ideal, v))[0]:.3f}"
                   if key[0] != "-" else "–" for v in ("mia.answer_auc", "forget.rouge_l")]
            lines.append([benchmark, *key, mean["mia.answer_auc"], far[0], mean["forget.rouge_l"],
                          far[1], *(mean[f"{x}"] for x in (
                              "retain.rouge_l", "world_facts.rouge_l", "mia.answer_min_40_plus",
                              "forget.repetition"))])
    return table(["rows", "objective", "arm", "AUC", "distance to retain-only's", "ROUGE-L forget",
                  "distance", "retain", "world facts", "Min-40%++", "repetition"], lines)


NAMED = {"original": "original", "retain-only": "retain-only", "fo": "FO", "so": "SO",
         "simu": "SIMU", "simu-random": "random mask", "attention": "attention",
         "simu-frozen": "frozen, critical", "random-frozen": "frozen, random"}
MOVES = {"fo": "all, AdamW", "so": "all, Sophia", "simu": "attention, critical rows",
         "simu-random": "attention, as many random rows", "attention": "attention alone",
         "simu-frozen": "critical rows alone", "random-frozen": "random rows alone"}


def set_by_set(points: list, value: str, digits: int = 2) -> str:
    return " / ".join(f"{float(r[value]):.{digits}f}" for r in points)


def arms_table() -> str:
    """The pretrained model's arms where `level` ends them."""
    rows, points = pretrained.read("rows"), pretrained.read("points")
    return table(["arm", "moves", *(x.replace("_", " ") for x in pretrained.SPLITS), "AUC", "manual"],
                 [[name, MOVES.get(arm, ""), *(
                     cell(numbers(chosen(of_arm(rows, arm), split=x), "rouge_l"))
                     for x in pretrained.SPLITS), *(
                     set_by_set(of_arm(points, arm), v) for v in ("mia.answer_auc", "manual"))]
                  for arm, name in NAMED.items()])


def of_arm(rows: list, arm: str) -> list:
    return [r for r in chosen(rows, arm=arm) if r["objective"] in ("-", "level")]


def grid_table() -> str:
    """The same by GradDiff, at several rates, on one forget set."""
    rows, points = (chosen(pretrained.read(x), objective="graddiff") for x in ("rows", "points"))
    return table(["arm", "rate", "forget", "retain", "world facts", "AUC"], [
        [NAMED[arm], lr, *(cell(numbers(chosen(own, split=x), "rouge_l"))
                           for x in ("forget", "retain", "world_facts")),
         set_by_set(chosen(points, arm=arm, lr=lr), "mia.answer_auc")]
        for (arm, lr), own in groups(rows, "arm", "lr").items()])


def attacked_table() -> str:
    rows = pretrained.read("attacks")
    return table(["arm", *pretrained.ATTACKS], [
        [name, *(cell(numbers(chosen(of_arm(rows, arm), attack=x), "rouge_l"))
                 for x in pretrained.ATTACKS)] for arm, name in NAMED.items()])


RELEARNT = (("-", "-", "retain-only", "retain-only"), ("level", "-", "fo", "FO"),
            ("level", "-", "so", "SO"), ("level", "moving", "critical", "SIMU"),
            ("level", "frozen", "critical", "SIMU, attention frozen"))
HELD = {"original": "10 rows, learnt anywhere", "held-0.25": "10 rows, planted"}


def relearning_table() -> str:
    """What half of the forget rows, learnt again, brings back of the other half after `level`: of
    the demo's rows under the protocols of both studies."""
    made, lines = objective_rows("demo"), []
    for key, name in ((("-", "retain-only"), "retain-only"), (("level", "fo"), "FO"),
                      (("level", "so"), "SO"), (("level", "simu"), "SIMU")):
        lines.append(["20 rows, learnt anywhere", name, *(
            cell(numbers(made[key], x)) for x in ("plain", "relearn-half")), "–", "–", "–"])
    staying = known_memory_page.lines("staying", benchmark="demo", model="tiny-llama",
                                      attack="relearn-half")
    for memory, rows in HELD.items():
        for objective, attention, mask, name in RELEARNT:
            own = chosen(staying, memory=memory, objective=objective, attention=attention, mask=mask)
            seeds = {x: known_memory_page.by_seed(own, x)
                     for x in ("before", "after", "loss_before", "loss_after")}
            if len(seeds["before"]) >= known_memory_page.SEEDS:
                back = known_memory_page.less(seeds["loss_before"], seeds["loss_after"])
                lines.append([rows, name, *(cell(list(x.values())) for x in (*seeds.values(), back))])
    return table(["forget rows", "arm", "told before", "told after", "loss before", "loss after",
                  "loss won back"], lines)


def printed(function: Callable, *given) -> str:
    """What a study prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*given)
    return out.getvalue().strip()


def masks_tables() -> str:
    return printed(readings.masks, [str(pretrained.RESULTS / x) for x in ("forget10", "forget05")])


TABLES = {"demo": demo_table, "frontier": frontier_table, "beyond-attention": beyond_table,
          "objectives": objectives_table, "pretrained-arms": arms_table,
          "pretrained-differences": pretrained.paired_table, "pretrained-graddiff": grid_table,
          "pretrained-attacks": attacked_table, "pretrained-masks": masks_tables,
          "known-memory": known_memory_page.tables, "relearning": relearning_table}


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


def read(path: Path) -> str:
    return path.read_text()


def prose(text: str) -> str:
    """A page without its made tables, code, links and numbers of sections."""
    return NO_NUMBER.sub(" ", BLOCK.sub("", text))


def sources(page: Path, text: str, read=read) -> str:
    """What a page's numbers may come from: its own made tables, the logs it links, and the made
    tables of pages it links."""
    found = [match[3] for match in BLOCK.finditer(text)]
    for link in dict.fromkeys(LINK.findall(text)):
        other = (page.parent / link).resolve()
        if other.name == "README.md":
            found += [match[3] for match in BLOCK.finditer(read(other))]
        elif other.is_file():
            found.append(read(other))
    return "\n".join(found)


def is_rounding(short: str, long: str) -> bool:
    """Is the number `short` the number `long`, or its rounding?

    >>> is_rounding(".55", "0.5475"), is_rounding("0.54", "0.5475"), is_rounding("0.550", "0.55")
    (True, False, False)
    """
    digits = len(short.partition(".")[2])
    if len(long.partition(".")[2]) < digits:
        return False
    return abs(Decimal(short) - Decimal(long)) * 2 <= Decimal(1).scaleb(-digits)


def stands(number: tuple[str, ...], among: set[tuple[str, ...]]) -> bool:
    return any(all(map(is_rounding, number, other)) for other in among)


def unfounded(page: Path, text: str, claims: list[dict], read=read) -> list[str]:
    """The decimal numbers of a page that stand in none of its sources and are no claim's."""
    plain, source = " ".join(prose(text).split()), sources(page, text, read)
    for claim in claims_of(page, claims):
        plain = plain.replace(" ".join(prose(claim["text"]).split()), " ")
    pairs, single = set(PAIR.findall(source)), {(x,) for x in re.findall(NUMBER, source)}
    missing = [" ± ".join(pair) for pair in PAIR.findall(plain) if not stands(pair, pairs)]
    return missing + [x for x in re.findall(NUMBER, PAIR.sub(" ", plain)) if not stands((x,), single)]


# ----------------------------------------------------------------------------------------- claims


def claims_of(page: Path, claims: list[dict]) -> list[dict]:
    return chosen(claims, page=str(page.relative_to(HERE)))


def broken(page: Path, text: str, claims: list[dict], read=read) -> list[str]:
    """The claims of a page that it does not make, or that their files do not bear out."""
    out, plain = [], " ".join(text.split())
    for claim in claims_of(page, claims):
        said = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+", claim["text"])
        found = re.search(claim["pattern"], read(HERE / claim["file"]), re.DOTALL)
        if " ".join(claim["text"].split()) not in plain:
            out.append(f"the page does not say: {claim['text']}")
        elif not found or len(found.groups()) != len(said) or not all(
                is_rounding(a.replace(",", ""), b.replace(",", ""))
                for a, b in zip(said, found.groups())):
            out.append(f"{claim['file']} does not say: {claim['text']}")
    return out


def faults(page: Path, text: str, read=read, claims: list[dict] | None = None) -> list[str]:
    """Whatever a page says that its sources do not."""
    claims = common.read_lines(CLAIMS) if claims is None else claims
    return broken(page, text, claims, read) + [
        f"{x} stands in no source of the page" for x in unfounded(page, text, claims, read)]


def main(argv: list[str]):
    """Writes the tables of every page from CSVs and logs; names numbers without a source."""
    p = common.parser_of("pages", __doc__)
    p.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is wrong")
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
