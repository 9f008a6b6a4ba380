"""The columns of every report: the paper's Tables 1 and 2 and what it printed in them, the
leaderboard's, and what stands beside them. What each number means is defined in eval.py."""

from pathlib import Path

import simu
from data import TASKS
from eval import MIN_K, SPLITS
from pipeline.settings import Settings
from pipeline.stage import read_stage

# --------------------------------------------------------------------------- what the paper reports

TOFU_COLUMNS = (  # Table 1: header, format, names of values
    ("Aggregate ↑", ".4f", ("aggregate",)), ("EM-Forget ↓", ".2%", ("forget.accuracy",)),
    ("ROUGE-L-Forget ↓", ".4f", ("forget.rouge_l",)), ("MIA ↓", ".4f", ("mia.auc",)),
    ("EM-Retain ↑", ".2%", ("retain.accuracy",)),
    ("ROUGE-L-Retain ↑", ".4f", ("retain.rouge_l",)),
    ("EM-WF ↑", ".2%", ("world_facts.accuracy",)),
    ("ROUGE-L-WF ↑", ".4f", ("world_facts.rouge_l",)))
SOUL_COLUMNS = (("MIA, SOUL's labels", ".4f", ("mia.soul",)),
                ("Aggregate with it", ".4f", ("aggregate_soul",)))
LUME_COLUMNS = (  # Table 2
    ("Aggregate ↑", ".4f", ("aggregate",)),
    *((f"{x.replace('.', ' ')} ↓", ".4f", (f"{x}.rouge_l", f"{x}.exact_match"))
      for x in ("forget", *(f"forget.{task}" for task in TASKS))),
    ("MIA ↓", ".4f", ("mia.auc",)),
    *((f"{x.replace('.', ' ')} ↑", ".4f", (f"{x}.rouge_l", f"{x}.exact_match"))
      for x in ("retain", *(f"retain.{task}" for task in TASKS))))
ROWS_COLUMNS = (
    ("Aggregate ↑", ".4f", ("aggregate",)), ("EM-Forget ↓", ".2%", ("forget.exact_match",)),
    ("ROUGE-L-Forget ↓", ".4f", ("forget.rouge_l",)), ("MIA ↓", ".4f", ("mia.auc",)),
    ("EM-Retain ↑", ".2%", ("retain.exact_match",)),
    ("ROUGE-L-Retain ↑", ".4f", ("retain.rouge_l",)))
COLUMNS = {"tofu": TOFU_COLUMNS, "lume": LUME_COLUMNS, "rows": ROWS_COLUMNS}
LEADERBOARD_COLUMNS = (  # of open-unlearning, on the forget set
    ("ROUGE", ".4f", ("forget.rouge_l",)), ("Prob", ".4f", ("forget.probability",)),
    ("TR", ".4f", ("forget.truth_ratio",)), ("EM", ".4f", ("forget.exact_memorisation",)),
    ("ES", ".4f", ("forget.extraction_strength",)), ("MIA", ".4f", ("mia.answer_auc",)),
    ("PrivLeak", ".2f", ("privleak",)), ("MU", ".4f", ("model_utility",)),
    ("FQ", ".3g", ("forget_quality",)))
MIA_COLUMNS = (
    ("distance to retain-only ↓", ".4f", ("mia.distance",)), ("AUC", ".4f", ("mia.auc",)),
    ("SemEval score ↑", ".4f", ("mia.score",)),
    *((f"Min-{k}%", ".4f", (f"mia.min_{k}",)) for k in MIN_K))
ANSWER_MIA_COLUMNS = tuple(
    (header, ".4f", (f"mia.answer_{name}",)) for header, name in (
        ("loss", "auc"), ("Min-40%", "min_40"), ("Min-40%++", "min_40_plus"), ("zlib", "zlib"),
        ("reference", "reference")))
SHORT = dict(zip(SPLITS, ("Forget", "Retain", "RA", "WF")))


def _each(header: str, style: str, name: str, splits=SPLITS) -> tuple:
    """One column for each split."""
    return tuple((f"{header}-{SHORT[x]}", style, (f"{x}.{name}",)) for x in splits)


OWN = SPLITS[:2]
SPEECH_COLUMNS = (*_each("Repetition", ".4f", "repetition", OWN),
                  *_each("Ended", ".2%", "ended", OWN))
PARAPHRASE_COLUMNS = (*_each("Paraphrased ROUGE-L", ".4f", "paraphrased_rouge_l", OWN),
                      *_each("Paraphrased Prob", ".4f", "paraphrased_probability", OWN))
MORE_COLUMNS = {  # by benchmark, the tables below the main ones
    "tofu": (
        (("Aggregate, string EM ↑", ".4f", ("aggregate_exact_match",)),
         *_each("string EM", ".2%", "exact_match"),
         ("EM-RA ↑", ".2%", ("real_authors.accuracy",)),
         ("ROUGE-L-RA ↑", ".4f", ("real_authors.rouge_l",)),
         *_each("EM, ties whole", ".2%", "accuracy_whole", OWN)),
        (("MU, arithmetic ↑", ".4f", ("model_utility_arithmetic",)),
         *_each("Prob", ".4f", "probability"), *_each("TR", ".4f", "truth_ratio")),
        _each("TR, arithmetic", ".4f", "truth_ratio_arithmetic"),
        (("EM-Retain (tokens)", ".4f", ("retain.exact_memorisation",)),
         ("ES-Retain", ".4f", ("retain.extraction_strength",)), *PARAPHRASE_COLUMNS),
        SPEECH_COLUMNS),
    "lume": ((("task aggregate ↑", ".4f", ("task_aggregate",)),
              ("MIA score ↑", ".4f", ("mia.score",))), SPEECH_COLUMNS),
    "rows": (_each("Prob", ".4f", "probability", OWN),
             (("EM-Retain (tokens)", ".4f", ("retain.exact_memorisation",)),
              ("ES-Retain", ".4f", ("retain.extraction_strength",))), SPEECH_COLUMNS)}
SOUL_READING = """\
The published MIA is most likely not an AUC of members against non-members: SOUL's code lays the
labels out in another order than the scores [D12], so that a perfect attack shows about .77 and its
reverse .23. The last two columns are our numbers computed that way, to be held against the
published ones."""


def reading(metrics: dict) -> str:
    """How the main table is to be read."""
    if metrics["benchmark"] == "lume":
        return ("Cells are Regurgitation / Knowledge: ROUGE-L recall on sentence completions / "
                "string equality on questions. The paper's own aggregates follow from no formula "
                "tried [D13].")
    if metrics["benchmark"] == "rows":
        return "EM-* is string equality."
    judge = {"rouge": "ROUGE-L", "encoder": "a sentence encoder"}[metrics["closeness"]]
    best = [number(metrics["values"][f"{x}.accuracy_ceiling"], ".2%") for x in OWN]
    return ("EM-* is `accuracy`: SOUL's nearest-of-six from the paraphrased question, judged by "
            f"{judge}, containment for world facts [D11]; it is what enters the aggregate. So "
            f"judged, the true answers themselves score {best[0]} on forget and {best[1]} on "
            "retain rows: no model that answers word for word can have more. String equality is "
            "below.")


# Tables 1 and 2, as printed; numbers in the order of the columns above.
PUBLISHED = {
    ("tofu", "llama2-7b"): {
        "Original": (0.4437, 0.8525, 0.9796, 0.7894, 0.8575, 0.9825, 0.8632, 0.8960),
        "FO-GradDiff": (0.4738, 0.7275, 0.5174, 0.7627, 0.7650, 0.6115, 0.7949, 0.8462),
        "SO-GradDiff": (0.7957, 0.1025, 0.0221, 0.2156, 0.7225, 0.5960, 0.8205, 0.8675),
        "SIMU-GradDiff": (0.7963, 0.20, 0.0241, 0.2440, 0.78, 0.6694, 0.8290, 0.8703)},
    ("tofu", "olmo-1b"): {
        "Original": (0.4227, 0.7750, 0.8503, 0.7727, 0.7875, 0.8239, 0.4871, 0.5537),
        "FO-GradDiff": (0.7059, 0.2650, 0.0214, 0.1957, 0.63, 0.3814, 0.0085, 0.0185),
        "SO-GradDiff": (0.8235, 0.2275, 0.0077, 0.1889, 0.78, 0.7614, 0.3846, 0.4518),
        "SIMU-GradDiff": (0.8438, 0.1025, 0.0029, 0.1923, 0.7550, 0.7616, 0.4274, 0.4896)},
    ("lume", "llama2-7b"): {
        "Original": (0.504, 0.9885, 0.7984, 1.0, 0.9137, 0.9575, 0.7333, 1.0, 0.9231, 0.458,
                     0.9859, 0.7741, 1.0, 0.8241, 0.96, 0.7280, 0.9957, 0.9111),
        "FO-GradDiff": (0.586, 0.5566, 0.2029, 0.7046, 0.1121, 0.6071, 0.20, 0.4027, 0.2867, 0.4769,
                        0.7825, 0.4463, 0.9134, 0.6483, 0.7032, 0.3220, 0.7524, 0.7703),
        "SO-GradDiff": (0.607, 0.0187, 0.0, 0.0, 0.0, 0.0674, 0.0, 0.0012, 0.0, 0.5391,
                        0.7714, 0.6212, 0.8176, 0.5495, 0.7102, 0.5780, 0.7857, 0.8296),
        "SIMU-GradDiff": (0.659, 0.0025, 0.0, 0.0, 0.0, 0.01, 0.0, 0.0, 0.0, 0.5333,
                          0.8295, 0.7149, 0.8180, 0.4725, 0.7885, 0.7260, 0.8672, 0.8370)},
    ("lume", "olmo-1b"): {
        "Original": (0.211, 0.9837, 0.8687, 1.0, 1.0, 0.9399, 0.80, 1.0, 0.9930, 1.0,
                     0.9857, 0.8623, 1.0, 1.0, 0.9534, 0.80, 1.0, 1.0),
        "FO-GradDiff": (0.512, 0.1605, 0.3681, 0.0564, 0.25, 0.4616, 0.4646, 0.0430, 0.1399, 0.9776,
                        0.3854, 0.7314, 0.1783, 0.7582, 0.7274, 0.7420, 0.2716, 0.6741),
        "SO-GradDiff": (0.728, 0.0055, 0.0, 0.0029, 0.0, 0.0033, 0.0, 0.0091, 0.0, 0.7035,
                        0.9244, 0.8499, 0.9781, 0.9670, 0.8271, 0.79, 0.9602, 0.9926),
        "SIMU-GradDiff": (0.740, 0.0015, 0.0, 0.0, 0.0, 0.0050, 0.0, 0.0004, 0.0, 0.6889,
                          0.9365, 0.8540, 0.9779, 0.9670, 0.8549, 0.7960, 0.9690, 0.9926)}}
# open-unlearning's own evaluations of its originals, partners and GradDiff on forget10, in
# LEADERBOARD_COLUMNS' order: copies in nxZhai/BalDRO, and its docs/repro.md.
LEADERBOARD = {
    "llama3.2-1b": {
        "Original": (.820, .880, .476, .974, .706, .996, None, .599, 3.9e-22),
        "Retain-only (ideal)": (.379, .116, .628, .585, .059, .387, None, .591, 1.0),
        "GradDiff": (*[None] * 7, .49, 1e-239)},
    "hf:open-unlearning/tofu_Llama-2-7b-chat-hf_full": {
        "Original": (.976, .990, .519, .999, .982, .999, None, .628, 4.3e-25),
        "Retain-only (ideal)": (.399, .148, .681, .665, .070, .392, None, .613, 1.0),
        "GradDiff": (*[None] * 7, .58, 2e-229)}}
# Table 5: critical of all neurons of the down-projections.
PUBLISHED_CRITICAL = {("lume", "llama2-7b"): (1870, 131072), ("tofu", "llama2-7b"): (722, 131072),
                      ("lume", "olmo-1b"): (23089, 32768), ("tofu", "olmo-1b"): (29554, 32768)}


def leaderboard(s: Settings) -> dict:
    """What the leaderboard printed for the original of this run, and beside it."""
    known = LEADERBOARD.get(s.weights.partition("@")[0] or s.model, {})
    return known if s.benchmark == "tofu" else {}


def label(name: str) -> str:
    """An approach as the paper spells it, if it has it, else its folder's name."""
    if name == "retain-only":
        return "Retain-only (ideal)"
    return next((x for x in PUBLISHED["tofu", "llama2-7b"] if x.lower() == name), name)


# ------------------------------------------------------------------------------------------ as text


def number(x: float | None, style: str = ".4f") -> str:
    return "–" if x is None else format(x, style)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well in a terminal."""
    rows = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |"
                     for row in rows)


def cells(columns, metrics: dict, footnotes: dict | None = None) -> list[str]:
    """One text per column. footnotes: reason -> its number; a cell without a value then names the
    reason's, and a new reason takes the next."""
    def cell(name: str, style: str) -> str:
        value = metrics["values"].get(name)
        if value is not None or footnotes is None:
            return number(value, style)
        why = metrics.get("notes", {}).get(name, "not measured on this benchmark")
        return f"– ({footnotes.setdefault(why, len(footnotes) + 1)})"
    return [" / ".join(cell(n, style) for n in names) for _, style, names in columns]


def with_values(columns: tuple, found: list[dict]) -> tuple:
    """Of the columns of a user's own rows, those in which there is a number."""
    if found[0]["metrics"]["benchmark"] != "rows":
        return columns
    return tuple(c for c in columns if any(
        e["metrics"]["values"].get(name) is not None for e in found for name in c[2]))


def table_of(columns, found: list[dict], published: dict | None = None,
             footnotes: dict | None = None) -> str:
    """Our rows, and the published ones beneath: label -> numbers, in the order of the columns."""
    rows = [[e["label"], *cells(columns, e["metrics"], footnotes)] for e in found]
    for approach, numbers in (published or {}).items():
        names = [n for _, _, some in columns for n in some]
        values = dict(zip(names, numbers))
        rows.append([f"{approach}, published", *cells(columns, dict(values=values))])
    return table(["Approach", *(header for header, _, _ in columns)], rows)


def definitions(docstring: str | None) -> str:
    """A module's docstring, which `python -OO` leaves out, as a part of a report."""
    return f"```\n{(docstring or 'see the head of the file that computes them').strip()}\n```"


def mask_line(mask: Path, s: Settings) -> str:
    """What a mask's folder holds, beside the published count."""
    lines = []
    note = read_stage(mask) if (mask / "stage.json").is_file() else {}
    if note.get("total"):
        per_layer = " ".join(map(str, note["critical_per_layer"]))
        lines.append(f"{note['critical']} of {note['total']}: "
                     f"{note['critical'] / note['total']:.2%}; by layer {per_layer}")
    if (s.benchmark, s.model) in PUBLISHED_CRITICAL:
        lines.append("published (Table 5): {} of {}".format(
            *PUBLISHED_CRITICAL[s.benchmark, s.model]))
    return "; ".join(lines) or "no mask in this run"


def optimiser_of(settings: dict) -> str:
    """Name of the optimiser that a model's settings stand for."""
    method = simu.METHODS.get(settings["method"])
    return method.optimiser if method else "of a method that is no longer there"
