"""How every picture looks: colours that all can tell apart, headless, the same bytes again; and the
table beside it."""

import csv
import io
import itertools
from pathlib import Path

from model import UserError, atomic_file, write_text

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers say the same again.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2",
                                              "#D55E00", "#CC79A7")
COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY)  # of what has no style of its own
STYLES = {"fo": (ORANGE, "o"), "so": (BLUE, "s"), "simu": (RED, "D"), "simu-random": (GREEN, "^"),
          "simu-forget-only": (SKY, "v"), "simu-soft": (PINK, "P"), "simu-none": (BLACK, "X"),
          "simu-all": ("#999999", "h")}
NAMES = {"fo": "FO-GradDiff", "so": "SO-GradDiff", "simu": "SIMU (critical mask)",
         "simu-random": "SIMU, random mask", "simu-forget-only": "SIMU, forget-only mask",
         "simu-soft": "SIMU, soft mask", "simu-none": "SIMU, attention only",
         "simu-all": "SIMU, all of down_proj"}
MARKS = "osD^vPXhd<>*"


def canvas(rows: int, columns: int, size: tuple[float, float], **how):
    """(figure, axes as rows of columns), headless."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3,
                            "axes.spines.top": False, "axes.spines.right": False,
                            "axes.axisbelow": True, "axes.titlesize": 11})
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **how)


def save(figure, path: Path):
    """PNG without the date and version that would make equal pictures differ."""
    from matplotlib import pyplot
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    print(f"wrote {path}")


def write_csv(path: Path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def save_both(folder: Path, name: str, figure, header, rows):
    """A picture and its numbers, in FOLDER/figures/."""
    save(figure, folder / "figures" / f"{name}.png")
    write_csv(folder / "figures" / f"{name}.csv", header, rows)


def title_of(about: dict) -> str:
    return f"{about['benchmark']}, {Path(about['model']).name}"


def look_of(arm: str, index: int) -> tuple[str, str]:
    """Colour and marker of an arm; index: its place among those drawn."""
    return STYLES.get(arm, list(STYLES.values())[index % len(STYLES)])


def looks(arms) -> dict[str, tuple]:
    """{arm: (colour, marker)}; of an arm without a style of its own, one that is not drawn yet."""
    arms = list(dict.fromkeys(arms))
    spare = [STYLES[x] for x in STYLES if x not in arms and STYLES[x][0] != BLACK]
    more = itertools.cycle(spare or STYLES.values())
    return {arm: STYLES.get(arm) or next(more) for arm in arms}
