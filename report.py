"""The report of a run: our rows in the paper's columns, and the published rows beneath.

`python eval.py report RUN` writes RUN/report.md and RUN/report.json from the evaluations in RUN's
stage folders. It stands apart from eval.py so that rewording a report makes no evaluation stale.
What each number means is defined once, at the top of eval.py, and repeated in every report.
"""

import dataclasses
import glob
import os
import re
import statistics
from pathlib import Path

import data
import eval as evaluation
import stage
from eval import (CHOICE, MIN_K, SPLITS, TASKS, check_fresh, has, ks_p_value, read_rows, spread,
                  summarise)
from stage import Settings, UserError

# --------------------------------------------------------------------------- what the paper reports

TOFU_COLUMNS = (  # Table 1: header, format, names of values
    ("Aggregate ↑", ".4f", ("aggregate",)), ("EM-Forget ↓", ".2%", ("forget.accuracy",)),
    ("ROUGE-L-Forget ↓", ".4f", ("forget.rouge_l",)), ("MIA ↓", ".4f", ("mia.auc",)),
    ("EM-Retain ↑", ".2%", ("retain.accuracy",)),
    ("ROUGE-L-Retain ↑", ".4f", ("retain.rouge_l",)),
    ("EM-WF ↑", ".2%", ("world_facts.accuracy",)),
    ("ROUGE-L-WF ↑", ".4f", ("world_facts.rouge_l",)))
LUME_COLUMNS = (  # Table 2
    ("Aggregate ↑", ".4f", ("aggregate",)),
    *((f"{x.replace('.', ' ')} ↓", ".4f", (f"{x}.rouge_l", f"{x}.exact_match"))
      for x in ("forget", *(f"forget.{task}" for task in TASKS))),
    ("MIA ↓", ".4f", ("mia.auc",)),
    *((f"{x.replace('.', ' ')} ↑", ".4f", (f"{x}.rouge_l", f"{x}.exact_match"))
      for x in ("retain", *(f"retain.{task}" for task in TASKS))))
MIA_COLUMNS = (
    ("AUC", ".4f", ("mia.auc",)), ("distance to 0.5 ↓", ".4f", ("mia.distance",)),
    ("score ↑", ".4f", ("mia.score",)),
    *((f"Min-{k}%", ".4f", (f"mia.min_{k}",)) for k in MIN_K))
SHORT = dict(zip(SPLITS, ("Forget", "Retain", "RA", "WF")))
MORE_COLUMNS = {  # by benchmark, the tables below the main one
    "tofu": (
        (("Aggregate, string EM ↑", ".4f", ("aggregate_exact_match",)),
         *((f"string EM-{SHORT[x]}", ".2%", (f"{x}.exact_match",)) for x in SPLITS),
         ("EM-RA ↑", ".2%", ("real_authors.accuracy",)),
         ("ROUGE-L-RA ↑", ".4f", ("real_authors.rouge_l",))),
        (("Model utility ↑", ".4f", ("model_utility",)),
         ("Forget quality ↑", ".3g", ("forget_quality",)),
         *((f"Prob-{SHORT[x]}", ".4f", (f"{x}.probability",)) for x in SPLITS),
         *((f"TR-{SHORT[x]}", ".4f", (f"{x}.truth_ratio",)) for x in SPLITS))),
    "lume": ((("SemEval task aggregate ↑", ".4f", ("task_aggregate",)),
              ("SemEval MIA score ↑", ".4f", ("mia.score",))),)}
COLUMNS = {"tofu": TOFU_COLUMNS, "lume": LUME_COLUMNS}
READING = {
    "tofu": "EM-* is `accuracy`: SOUL's nearest-of-six from the paraphrased question, containment "
            "for world facts [D11]; it is what enters the aggregate. String equality is below.",
    "lume": "Cells are Regurgitation / Knowledge: ROUGE-L recall on sentence completions / string "
            "equality on questions. The paper's own aggregates follow from no formula tried [D13]."}

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
# Table 5: critical of all neurons of the down-projections.
PUBLISHED_CRITICAL = {("lume", "llama2-7b"): (1870, 131072), ("tofu", "llama2-7b"): (722, 131072),
                      ("lume", "olmo-1b"): (23089, 32768), ("tofu", "olmo-1b"): (29554, 32768)}
LABELS = {"retain-only": "Retain-only (ideal)", "original": "Original",
          "fo-graddiff": "FO-GradDiff", "so-graddiff": "SO-GradDiff",
          "simu-graddiff": "SIMU-GradDiff"}


# ---------------------------------------------------------------------------- report: what there is


def find_evaluations(run: Path, s: Settings, *, recompute: bool = False) -> list[dict]:
    """name, label, metrics, rows of every evaluated stage of a run, in the paper's order. A stage
    with only a partial evaluation stands there, marked."""
    names = {p.parent.parent.name for p in run.glob("*/eval*/stage.json")
             if re.fullmatch(r"eval(-limit-[0-9]+)?", p.parent.name)}
    found = []
    for name in [n for n in LABELS if n in names] + sorted(names - set(LABELS)):
        folder = run / name
        limits = sorted(int(p.name.rpartition("-")[2]) for p in folder.glob("eval-limit-*")
                        if p.name.rpartition("-")[2].isdecimal())
        whole = (folder / "eval" / "stage.json").is_file()
        evaluation = folder / ("eval" if whole else f"eval-limit-{limits[-1]}")
        check_fresh(run, s, folder, evaluation)
        metrics, rows = stage.read_json(evaluation / "metrics.json"), read_rows(evaluation)
        if recompute and summarise(rows) != metrics:
            raise UserError(f"{evaluation}: metrics.json does not follow from generations.jsonl; "
                            "one of them was changed; delete the folder and evaluate again")
        if name == "retain-only" and metrics["values"]["mia.auc"] is not None:
            metrics["notes"].pop("mia.auc", None)  # it cannot be over-unlearned
        label = LABELS.get(name, name)
        if metrics["partial"]:
            label += f" (partial: {metrics['partial']})"
        code = stage.read_stage(evaluation)["why"]["code"]
        found.append(dict(name=name, label=label, metrics=metrics, rows=rows, code=code,
                          made=_made_of(folder, evaluation)))
    if not found:
        raise UserError(f"{run} holds no evaluation; run `python eval.py evaluate {run} STAGE`")
    if len({e["code"] for e in found}) > 1:
        raise UserError(f"the evaluations in {run} are of different versions of eval.py, model.py "
                        "or data.py; run `python eval.py evaluate` on every stage again")
    return found


def unlearned(found: list[dict]) -> list[dict]:
    """Those evaluations that are of a model some method unlearned."""
    return [e for e in found if e["name"].startswith(tuple(f"{m}-" for m in stage.METHODS))]


def _made_of(folder: Path, evaluation: Path) -> dict:
    """What must agree between seeds: the settings a model was made with, and the data files."""
    settings = stage.read_stage(folder)["why"]["settings"]
    inputs = stage.read_stage(evaluation)["why"]["inputs"]
    return {k: v for k, v in (settings | inputs).items() if k not in ("seed", "model")}


def _quality_statistics(rows: list[dict]) -> dict[str, float]:
    """Per forget row, what TOFU's forget quality compares: mean loss(w) - loss(a')."""
    return {r["id"]: statistics.fmean(r["perturbed_losses"]) - r["paraphrased_loss"]
            for r in rows if r["split"] == "forget" and has(r, "perturbed_losses", *CHOICE)}


def _reference_rows(folder: Path, s: Settings) -> list[dict]:
    """Rows of a retain-only model evaluated in another run: as its folder now is, on our data."""
    if not (folder / "eval" / "stage.json").is_file():
        raise UserError(f"--retain-only {folder} is no evaluated model; it takes RUN/STAGE of a "
                        "run of ours, after `python eval.py evaluate RUN STAGE`")
    t = stage.read_settings(folder.resolve().parent)
    check_fresh(folder.resolve().parent, t, folder, folder / "eval")
    data_of = [stage.resolved(x, ("benchmark", "model", "template")) | data.data_digests(x)
               for x in (s, t)]
    if differs := [k for k in data_of[0] | data_of[1] if data_of[0].get(k) != data_of[1].get(k)]:
        raise UserError(f"--retain-only {folder} is not comparable: its run differs in "
                        f"{', '.join(differs)}; evaluate it on the same data, asked the same way")
    return read_rows(folder / "eval")


def add_forget_quality(found: list[dict], reference: list[dict] | None):
    """Forget quality of each evaluation against the rows of a retain-only model."""
    ideal = _quality_statistics(reference or [])
    for e in found:
        values, notes, own = e["metrics"]["values"], e["metrics"]["notes"], {}
        values["forget_quality"] = None
        if reference is None:
            notes["forget_quality"] = ("no retain-only model: evaluate one that never saw the "
                                       "forget set, then report with --retain-only ITS_FOLDER")
        elif not ideal or set(own := _quality_statistics(e["rows"])) != set(ideal):
            notes["forget_quality"] = ("retain-only was evaluated on other forget rows, or these "
                                       "have no paraphrase or wrong answers")
        else:
            values["forget_quality"] = ks_p_value(list(own.values()), list(ideal.values()))


def _differences(s: Settings, t: Settings) -> list[str]:
    """Settings, the seed aside, in which two runs differ."""
    return [f.name for f in dataclasses.fields(s) if f.name not in ("seed", "out")
            and getattr(s, f.name) != getattr(t, f.name)]


def seed_siblings(run: Path, s: Settings) -> list[Path]:
    """RUN-seed* beside a run; those of an older set of options are told and left out."""
    fit = []
    for path in sorted(run.resolve().parent.glob(f"{glob.escape(run.resolve().name)}-seed*")):
        if (path / "settings.json").is_file():
            differs = _differences(s, stage.read_settings(path))
            if differs:
                print(f"left out of the mean over seeds: {path.name} differs in "
                      f"{', '.join(differs)}")
            else:
                fit.append(path)
    return fit


def over_seeds(run: Path, s: Settings, others: list[Path], found: list[dict]) -> dict:
    """{stage: {value: [one per run]}} of runs that differ in nothing but their seed."""
    runs = {s.seed: found}
    for other in others:
        t = stage.read_settings(other)
        if differs := _differences(s, t):
            raise UserError(f"{other} differs from {run} in {', '.join(differs)}; a mean over "
                            "seeds needs runs that differ in nothing else")
        if t.seed in runs:
            raise UserError(f"{other} has seed {t.seed}, as another of these runs; leave one out")
        runs[t.seed] = find_evaluations(other, t)
        for one, first in ((o, f) for o in runs[t.seed] for f in found if f["name"] == o["name"]):
            if changed := [k for k in one["made"] | first["made"]
                           if one["made"].get(k) != first["made"].get(k)]:
                raise UserError(f"{other / one['name']} was made with other {', '.join(changed)} "
                                f"than {run / one['name']}; a mean over seeds needs runs that "
                                "differ in nothing else")
    whole = [{e["name"]: e["metrics"]["values"] for e in one if not e["metrics"]["partial"]}
             for one in runs.values()]
    shared = [e["name"] for e in found if all(e["name"] in one for one in whole)]
    return dict(seeds=list(runs), values={
        name: {k: [one[name].get(k) for one in whole] for k in whole[0][name]} for name in shared})


# ---------------------------------------------------------------------------------- report: as text


def _number(x: float | None, style: str = ".4f") -> str:
    return "–" if x is None else format(x, style)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well in a terminal."""
    rows = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |"
                     for row in rows)


def _cells(columns, values: dict) -> list[str]:
    return [" / ".join(_number(values.get(n), style) for n in names) for _, style, names in columns]


def _table_of(columns, found: list[dict], published: dict | None = None) -> str:
    rows = [[e["label"], *_cells(columns, e["metrics"]["values"])] for e in found]
    for label, numbers in (published or {}).items():
        names = [n for _, _, some in columns for n in some]
        rows.append([f"{label}, published", *_cells(columns, dict(zip(names, numbers)))])
    return table(["Approach", *(header for header, _, _ in columns)], rows)


def _seeds_table(columns, seeds: dict, found: list[dict]) -> str:
    def cell(values, names, style):
        parts = []
        for n in names:
            xs = values[n]
            parts.append("–" if None in xs else f"{format(statistics.mean(xs), style)} ± "
                                                f"{format(statistics.stdev(xs), style)}")
        return " / ".join(parts)

    labels = {e["name"]: e["label"] for e in found}
    rows = [[labels[name], *(cell(values, names, style) for _, style, names in columns)]
            for name, values in seeds["values"].items()]
    return table(["Approach", *(header for header, _, _ in columns)], rows)


def _notes(found: list[dict]) -> str:
    """Each remark once, with the numbers and the approaches it is about."""
    said = {}  # (split or name, note) -> names, labels; used as ordered sets
    for e in found:
        for name, note in e["metrics"]["notes"].items():
            names, labels = said.setdefault((name.split(".")[0], note), ({}, {}))
            names[name] = labels[e["label"]] = None
    lines = []
    for (group, note), (names, labels) in said.items():
        what = group if len(names) > 1 else next(iter(names))
        who = "every row" if len(labels) == len(found) else ", ".join(labels)
        lines.append(f"- {what} ({who}): {note}")
    return "\n".join(lines)


def _costs(run: Path) -> list[dict]:
    """Wall time and peak memory of every finished stage, oldest first."""
    made = sorted((p for p in run.rglob("stage.json")
                   if not {parent.suffix for parent in p.parents} & {".partial", ".old"}),
                  key=lambda p: p.stat().st_mtime_ns)
    return [dict(stage=str(p.parent.relative_to(run)), **{
        k: v for k, v in stage.read_stage(p.parent).items()
        if k in ("seconds", "peak_host_bytes", "peak_gpu_bytes", "threads", "torch")})
        for p in made]


def _costs_table(costs: list[dict]) -> str:
    gib = lambda c, k: f"{c[k] / 2**30:.2f}" if k in c else "–"
    return table(["Stage", "Seconds", "Peak host GiB", "Peak GPU GiB"], [
        [c["stage"], f"{c['seconds']:.1f}", gib(c, "peak_host_bytes"), gib(c, "peak_gpu_bytes")]
        for c in costs])


def _shown(text: str, most: int = 300) -> str:
    """Text as it may stand in a Markdown table cell."""
    text = " ".join(text.split())
    text = text if len(text) <= most else text[:most] + " {…}"
    for special in "\\|*_`<[#~$":
        text = text.replace(special, "\\" + special)
    return text or "(empty)"


def qualitative(found: list[dict], each: int = 3) -> list[dict]:
    """The same prompts answered by every approach, forget and retain (Tables 6 and 7)."""
    by_id = [{(r["split"], r["id"]): r for r in e["rows"] if "generation" in r} for e in found]
    shared = [key for key in by_id[0] if all(key in rows for rows in by_id)]
    picked = []
    for split in ("forget", "retain"):
        own = [k for k in shared if k[0] == split]
        tasks = sorted({by_id[0][k].get("task", "") for k in own})
        some = max(1, each // max(1, len(tasks)))
        for task in tasks:
            picked += spread([k for k in own if by_id[0][k].get("task", "") == task], some)
    return [dict(split=k[0], id=k[1], question=by_id[0][k]["question"],
                 answer=by_id[0][k]["answer"],
                 generations={e["name"]: rows[k]["generation"] for e, rows in zip(found, by_id)})
            for k in picked]


def _qualitative_text(examples: list[dict], found: list[dict]) -> str:
    labels, parts = {e["name"]: e["label"] for e in found}, []
    for x in examples:
        rows = [["*answer*", _shown(x["answer"])]]
        rows += [[labels[name], _shown(text)] for name, text in x["generations"].items()]
        task = f"**{x['split']}**, {_shown(x['id'])}: {_shown(x['question'], 600)}"
        parts.append(f"{task}\n\n{table(['Approach', 'Says'], rows)}")
    return "\n\n".join(parts)


# What may differ between the methods of one run: taken from each stage's own stage.json.
RECIPE = ("lr", "epochs", "batch", "lam", "beta1", "beta2", "gamma", "eps", "adam_beta2",
          "adam_eps", "weight_decay", "clip", "warmup", "state")
READINGS = """\
D1 neuron = output channel of down_proj. D2 one sample per answer token. D3 attribution to log P.
D4 a layer's outputs are scaled together. D5 strict threshold per layer. D6 the mask keeps dual
neurons. D7 one EMA each of g and g^2; SOUL's constants, which the paper does not give. D9 only
attention and critical rows move. D10 weights that move keep full precision underneath. D11 Table
1's "EM" is nearest-of-six accuracy, judged by ROUGE-L instead of a sentence encoder. D12 MIA by
mean token loss; 0.5 is ideal. D13 aggregate as captioned. D15 LUME is sampled by documents, as the
paper's split is unknown. The README gives the evidence for each."""


def _recipes_table(run: Path, found: list[dict]) -> str:
    """Hyperparameters with which each method was run."""
    used = {e["label"]: stage.read_stage(run / e["name"])["settings"] for e in unlearned(found)}
    if not used:
        return ""
    return table(["Setting", *used], [[k, *(x[k] for x in used.values())] for k in RECIPE])


def mask_line(mask: Path, s: Settings) -> str:
    """What a mask's folder holds, beside the published count."""
    lines = []
    if (mask / "stage.json").is_file():
        note = stage.read_stage(mask)
        per_layer = " ".join(map(str, note["critical_per_layer"]))
        lines.append(f"{note['critical']} of {note['total']}: "
                     f"{note['critical'] / note['total']:.2%}; by layer {per_layer}")
    if (s.benchmark, s.model) in PUBLISHED_CRITICAL:
        lines.append("published (Table 5): {} of {}".format(
            *PUBLISHED_CRITICAL[s.benchmark, s.model]))
    return "; ".join(lines) or "no mask in this run"


# ------------------------------------------------------------------------------------------- report


def check_original(run: Path):
    """Print the evaluated original beside the paper's; UserError unless it knows the forget set,
    for then there is nothing to unlearn and every number after it means nothing."""
    s, metrics = stage.read_settings(run), stage.read_json(run / "original/eval/metrics.json")
    columns = COLUMNS[metrics["benchmark"]]
    published = PUBLISHED.get((s.benchmark, s.model), {})
    print(_table_of(columns, [dict(label=LABELS["original"], metrics=metrics)],
                    {k: v for k, v in published.items() if k == "Original"}), flush=True)
    known = metrics["values"]["forget.rouge_l"]
    if known is not None and known < s.must_know:
        raise UserError(
            f"the original does not know the forget set: ROUGE-L {known:.4f}, less than "
            f"--must-know {s.must_know}; see {run}/original/eval/generations.jsonl: another "
            "--template, --weights or more --learn-epochs may be needed; --must-know 0 goes on")


def report(run: Path, *, others: list[Path] = (), retain_only: Path | None = None,
           recompute: bool = False):
    """RUN/report.md and RUN/report.json, and the main table on stdout."""
    s = stage.read_settings(run)
    found = find_evaluations(run, s, recompute=recompute)
    if retain_only:
        reference = _reference_rows(retain_only, s)
    else:
        reference = next((e["rows"] for e in found if e["name"] == "retain-only"), None)
    if found[0]["metrics"]["benchmark"] == "tofu":
        add_forget_quality(found, reference)
    others = list(others) or seed_siblings(run, s)
    seeds = over_seeds(run, s, others, found) if others else None
    published = PUBLISHED.get((s.benchmark, s.model))
    examples, costs = qualitative(found), _costs(run)
    columns = COLUMNS[found[0]["metrics"]["benchmark"]]
    main_table = _table_of(columns, found, published)
    text = _compose(run, s, found, main_table, seeds, examples, costs)
    stage.write_text(run / "report.md", text)
    kept = [{k: v for k, v in e.items() if k not in ("rows", "made")} for e in found]
    stage.write_json(run / "report.json", dict(
        settings=dataclasses.asdict(s), evaluations=kept, columns=columns, published=published,
        seeds=seeds, critical=mask_line(run / "mask", s), costs=costs, qualitative=examples))
    from card import write_cards  # builds on this module
    write_cards(run, s, found)
    print(main_table)
    if recompute:
        print("every number recomputed from generations.jsonl: equal")
    print(f"report: {os.path.relpath(run / 'report.md')}")


def _compose(run: Path, s: Settings, found, main_table: str, seeds, examples, costs) -> str:
    """report.md."""
    metrics = found[0]["metrics"]
    kind = metrics["benchmark"]
    parts = [f"# {s.benchmark}, {s.model}, seed {s.seed}", main_table, READING[kind],
             _notes(found)]
    if (run / "attack.md").is_file():
        parts.append("What comes back when these models are attacked: [attack.md](attack.md).")
    if seeds:
        parts += [f"## Mean ± standard deviation over seeds {', '.join(map(str, seeds['seeds']))}",
                  _seeds_table(COLUMNS[kind], seeds, found)]
    general = [[k, v] for k, v in dataclasses.asdict(s).items()
               if k not in (*RECIPE, "method", "out", "data", "weights")]
    parts += ["## Beside the paper's columns",
              *(_table_of(columns, found) for columns in MORE_COLUMNS[kind]),
              "## Membership inference", _table_of(MIA_COLUMNS, found),
              f"Members: {metrics['members']}. Non-members: {metrics['nonmembers']}. An attack "
              "that learns nothing has 0.5; the paper's 1 - AUC in the aggregate also rewards "
              "going below it. Retain-only's AUC need not be 0.5: the two sets differ as text.",
              "## Critical neurons", mask_line(run / "mask", s),
              "## Same prompts, different models", _qualitative_text(examples, found),
              "## Time and memory", _costs_table(costs),
              "## Settings", _recipes_table(run, found),
              table(["Setting of the run", "Value"], general),
              "## Readings of the paper", READINGS,
              "## Definitions", f"```\n{evaluation.__doc__.strip()}\n```"]
    return "\n\n".join(p for p in parts if p) + "\n"
