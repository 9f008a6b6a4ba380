"""How every picture looks: colours that all readers can tell apart, no screen needed, the same
bytes again; and the table beside it."""

import csv
import io
from pathlib import Path

from model import UserError, atomic_file, write_text

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers say the same again.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"
STYLES = {"fo": (ORANGE, "o"), "so": (BLUE, "s"), "simu": (RED, "D"), "simu-random": (GREEN, "^"),
          "simu-forget-only": (SKY, "v"), "simu-soft": (PINK, "P"), "simu-none": (BLACK, "X"),
          "simu-all": (GREY, "h")}


def canvas(tall: int, wide: int, size: tuple[float, float], **options):
    """(figure, axes) of tall * wide panels, axes as nested lists; size in inches."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")  # draws to files, without a screen
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3,
                            "axes.spines.top": False, "axes.spines.right": False,
                            "axes.axisbelow": True, "axes.titlesize": 11})
    return pyplot.subplots(tall, wide, figsize=size, squeeze=False, layout="constrained", **options)


def style_of(arm: str, index: int) -> tuple[str, str]:
    """Colour and marker of an arm; index: how many are drawn before it."""
    return STYLES.get(arm, list(STYLES.values())[index % len(STYLES)])


def write_csv(path: Path, header, lines):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    write_text(path, text.getvalue())


def save(folder: Path, name: str, figure, header, lines):
    """A picture and its numbers in folder/figures/. The PNG leaves out the date and the version,
    which would make equal pictures differ."""
    from matplotlib import pyplot
    path = folder / "figures" / f"{name}.png"
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    write_csv(path.with_suffix(".csv"), header, lines)
    print(f"wrote {path}")
