"""The report of a run: our rows in the paper's columns, and the published rows beneath.

`python -m pipeline report RUN` writes RUN/report.md and RUN/report.json from the evaluations in
RUN's stage folders, and the model cards again. What each number means is defined once, at the top
of eval.py, and repeated in every report.
"""

import dataclasses
import glob
import os
import statistics
from functools import partial
from pathlib import Path

import eval as evaluation
import simu
from eval import spread, summarise
from model import UserError, write_json, write_text
from pipeline import objectives, slices, verdict
from pipeline.card import write_cards
from pipeline.columns import (ANSWER_MIA_COLUMNS, COLUMNS, LEADERBOARD_COLUMNS, MIA_COLUMNS,
                              MORE_COLUMNS, PUBLISHED, SOUL_COLUMNS, SOUL_READING, definitions,
                              label, leaderboard, mask_line, optimiser_of, reading, table, table_of,
                              with_values)
from pipeline.evaluate import (evaluated_stages, evaluations_of, newest_evaluation, read_metrics,
                               read_rows, stale_because)
from pipeline.settings import Settings, read_settings, taken
from pipeline.stage import data_inputs, differences, read_stage, turn

# ---------------------------------------------------------------------------- report: what there is


def find_evaluations(s: Settings, reference: list[dict] | None = None, *,
                     recompute: bool = False) -> tuple[list[dict], dict[str, str]]:
    """name, label, metrics, rows of every evaluated stage of a run, in the paper's order, and the
    stages left out as stale, each with the reason. A stage with only a partial evaluation is
    marked. reference: rows of retain-only; default: the run's own."""
    jobs = {name: job for name in evaluated_stages(s) if (job := newest_evaluation(s, name))}
    found, stale = [], {}
    for name in sorted(jobs, key=lambda name: _place(s.run / name)):
        if why := stale_because(s, name, jobs[name]):
            stale[name] = "; ".join(why)
            print(f"left out: {s.run / name}: {stale[name]}; run its stages again", flush=True)
        else:
            found.append(_read_evaluation(s.run / name, jobs[name].folder, recompute))
    if not found:
        again = f"run `python -m pipeline evaluate {s.run} {' '.join(stale) or 'STAGE'}`"
        raise UserError(f"{s.run} holds no evaluation"
                        + (f" of what it now holds ({next(iter(stale.values()))})" if stale else "")
                        + f"; {again}")
    own = next((e["rows"] for e in found if e["name"] == "retain-only"), None)
    for e in found:
        e["metrics"] = summarise(e["rows"], reference or own)
        if e["name"] == "retain-only" and e["metrics"]["values"]["mia.auc"] is not None:
            e["metrics"]["notes"].pop("mia.auc", None)  # it cannot be over-unlearned
    return found, stale


def _place(folder: Path) -> tuple:
    """Sorts stages: retain-only, original, then by method in the order of simu's table."""
    method, first = read_stage(folder)["why"]["settings"].get("method"), ("retain-only", "original")
    if method is None:
        return 0, first.index(folder.name) if folder.name in first else len(first), folder.name
    methods = list(simu.METHODS)
    return 1, methods.index(method) if method in methods else len(methods), folder.name


def _read_evaluation(folder: Path, evaluation_folder: Path, recompute: bool) -> dict:
    metrics, rows = read_metrics(evaluation_folder), read_rows(evaluation_folder)
    if recompute and summarise(rows) != metrics:
        raise UserError(f"{evaluation_folder}: metrics.json does not follow from generations.jsonl;"
                        " one of them was changed; delete the folder and evaluate again")
    part = f" (partial: {metrics['partial']})" if metrics["partial"] else ""
    return dict(name=folder.name, label=label(folder.name) + part, metrics=metrics, rows=rows,
                made=_made_of(folder, evaluation_folder))


def unlearned(run: Path, found: list[dict]) -> dict[str, dict]:
    """Stage name -> the settings it was made with, of those models that some method unlearned; of a
    masked one, its mask's and attribution's too."""
    made = {e["name"]: read_stage(run / e["name"]) for e in found}
    below = [f.name for t in (simu.Masking, simu.Attribution) for f in dataclasses.fields(t)]
    return {name: {k: x["settings"].get(k) for k in below if _masked(x)} | x["why"]["settings"]
            for name, x in made.items() if "method" in x["why"]["settings"]}


def _masked(made: dict) -> bool:
    return any(name.startswith("mask") for name in made["why"]["inputs"])


def _made_of(folder: Path, evaluation_folder: Path) -> dict:
    """What must agree between seeds: the settings a model was made with, and the data files."""
    settings = read_stage(folder)["why"]["settings"]
    inputs = read_stage(evaluation_folder)["why"]["inputs"]
    return ({k: v for k, v in settings.items() if k != "seed"}
            | {k: v for k, v in inputs.items() if k.startswith("data/")})


def _reference_rows(folder: Path, s: Settings) -> list[dict]:
    """Rows of a retain-only model evaluated in another run: as its folder now is, on our data."""
    run, name = folder.resolve().parent, folder.resolve().name
    own = (run / "settings.json").is_file() and evaluations_of(read_settings(run), name)
    if not ((own or folder) / "eval" / "stage.json").is_file():
        raise UserError(f"--retain-only {folder} is no evaluated model; it takes RUN/STAGE of a "
                        "run of ours, after `python -m pipeline evaluate RUN STAGE`")
    t = read_settings(run)
    if why := stale_because(t, name, newest_evaluation(t, name)):
        raise UserError(f"--retain-only {folder}: {'; '.join(why)}; run its stages again")
    ours, theirs = (taken(x, (slices.Slice,)) | data_inputs(x)
                    | dict(benchmark=x.benchmark, model=x.model) for x in (s, t))
    if differs := [k for k in ours | theirs if ours.get(k) != theirs.get(k)]:
        raise UserError(f"--retain-only {folder} is not comparable: its run differs in "
                        f"{', '.join(differs)}; evaluate it on the same data, asked the same way")
    return read_rows(evaluations_of(t, name) / "eval")


def _differences(s: Settings, t: Settings) -> list[str]:
    """Settings, the seed aside, in which two runs differ."""
    return [f.name for f in dataclasses.fields(s) if f.name not in ("seed", "out")
            and getattr(s, f.name) != getattr(t, f.name)]


def seed_siblings(run: Path, s: Settings) -> list[Path]:
    """RUN-seed* beside a run; those of an older set of options are told and left out."""
    fit = []
    for path in sorted(run.resolve().parent.glob(f"{glob.escape(run.resolve().name)}-seed*")):
        if (path / "settings.json").is_file():
            differs = _differences(s, read_settings(path))
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
        t = read_settings(other)
        if differs := _differences(s, t):
            raise UserError(f"{other} differs from {run} in {', '.join(differs)}; a mean over "
                            "seeds needs runs that differ in nothing else")
        if t.seed in runs:
            raise UserError(f"{other} has seed {t.seed}, as another of these runs; leave one out")
        runs[t.seed], _ = find_evaluations(t)
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


def _notes(found: list[dict], footnotes: dict) -> str:
    """Each remark once, with its number in the tables, and what and whom it is about."""
    said = {}  # (split or name, note) -> names, labels; used as ordered sets
    for e in found:
        for name, note in e["metrics"]["notes"].items():
            names, labels = said.setdefault((name.split(".")[0], note), ({}, {}))
            names[name] = labels[e["label"]] = None
    lines = []
    for (group, note), (names, labels) in said.items():
        what = group if len(names) > 1 else next(iter(names))
        who = "every row" if len(labels) == len(found) else ", ".join(labels)
        mark = f"({footnotes.pop(note)}) " if note in footnotes else ""
        lines.append(f"- {mark}{what} ({who}): {note}")
    lines += [f"- ({number}) {note}" for note, number in footnotes.items()]
    return "\n".join(lines)


def _costs(run: Path) -> list[dict]:
    """Wall time and peak memory of every finished stage, oldest first."""
    made = sorted((p for p in run.rglob("stage.json")
                   if not any(x.startswith(".") for x in p.relative_to(run).parts)),  # unfinished
                  key=lambda p: p.stat().st_mtime_ns)
    return [dict(stage=str(p.parent.relative_to(run)), **{
        k: v for k, v in read_stage(p.parent).items()
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
    """The same prompts answered by every approach, forget and retain (Tables 6 and 7). Of a user's
    own rows numbers alone: a report may be shown to those who may not read them."""
    private = found[0]["metrics"]["benchmark"] == "rows"
    by_id = [{(r["split"], r["id"]): r for r in e["rows"] if "generation" in r} for e in found]
    shared = [key for key in by_id[0] if all(key in rows for rows in by_id)]
    picked = []
    for split in ("forget", "retain"):
        own = [k for k in shared if k[0] == split]
        tasks = sorted({by_id[0][k].get("task", "") for k in own})
        some = max(1, each // max(1, len(tasks)))
        for task in tasks:
            picked += spread([k for k in own if by_id[0][k].get("task", "") == task],
                             5 * some if private else some)
    if private:
        return [dict(split=k[0], id=k[1], numbers={
            e["name"]: dict(loss=rows[k].get("loss"), rouge_l=_number(
                evaluation.rouge_score(rows[k]))) for e, rows in zip(found, by_id)})
                for k in picked]
    return [dict(split=k[0], id=k[1], question=by_id[0][k]["question"],
                 answer=by_id[0][k]["answer"],
                 generations={e["name"]: rows[k]["generation"] for e, rows in zip(found, by_id)})
            for k in picked]


def _number(score) -> float | None:
    """A row's score, if it is a number and not why there is none."""
    return score if isinstance(score, float) else None


def _row_numbers(row: dict) -> str:
    return ", ".join("–" if row[k] is None else f"{row[k]:.2f}" for k in ("loss", "rouge_l"))


def _qualitative_text(examples: list[dict], found: list[dict]) -> str:
    labels, parts = {e["name"]: e["label"] for e in found}, []
    if examples and "numbers" in examples[0]:
        return table(["Row", *(f"{x}: loss, ROUGE-L" for x in labels.values())],
                     [[x["id"], *map(_row_numbers, x["numbers"].values())] for x in examples])
    for x in examples:
        rows = [["*answer*", _shown(x["answer"])]]
        rows += [[labels[name], _shown(text)] for name, text in x["generations"].items()]
        task = f"**{x['split']}**, {_shown(x['id'])}: {_shown(x['question'], 600)}"
        parts.append(f"{task}\n\n{table(['Approach', 'Says'], rows)}")
    return "\n\n".join(parts)


READINGS = """\
D1 neuron = output channel of down_proj. D2 one sample per answer token. D3 attribution to log P.
D4 a layer's outputs are scaled together. D5 strict threshold per layer. D6 the mask keeps dual
neurons. D7 one EMA each of g and g^2; SOUL's constants, which the paper does not give. D9 only
attention and critical rows move. D10 weights that move keep full precision underneath. D11 Table
1's "EM" is nearest-of-six accuracy, judged as said above. D12 MIA by mean token loss; retain-only's
is ideal. D13 aggregate as captioned. D15 LUME is sampled by documents, as the
paper's split is unknown. The README gives the evidence for each."""


def _mask_of(run: Path, s: Settings) -> str:
    """A line on each mask of a run, unless it is of something that the run no longer holds."""
    lines, inputs = [], data_inputs(s)
    for folder in sorted(p.parent for p in run.glob("mask*/stage.json")) or [run / "mask"]:
        made = (folder / "stage.json").is_file()
        why = differences(folder, s, inputs) if made else []
        line = mask_line(folder, s) if not why else (
            f"the mask is not of what this run now holds: {'; '.join(why)}")
        lines.append(line if folder.name == "mask" else f"{folder.name}: {line}")
    return "\n\n".join(lines)


# What may differ from model to model: it is told of each.
OF_MODELS = [f.name for f in dataclasses.fields(objectives.Recipe) if f.name != "seed"] + ["dtype"]


def _recipes_table(run: Path, found: list[dict]) -> str:
    """What each unlearned model was made with: objective, optimiser and their constants."""
    labels = {e["name"]: e["label"] for e in found}
    used = unlearned(run, found)
    if not used:
        return ""
    rows = [["optimiser", *(optimiser_of(x) for x in used.values())]]
    rows += [[k, *(x.get(k, "–") for x in used.values())] for k in OF_MODELS]
    return table(["Setting", *(labels[name] for name in used)], rows)


# ------------------------------------------------------------------------------------------- report


def main_columns(s: Settings, kind: str) -> tuple[tuple, dict]:
    """The paper's columns, beside Table 1 with SOUL's MIA, and what it printed for this cell."""
    published = PUBLISHED.get((s.benchmark, s.model), {})
    if kind == "rows":
        return tuple(c for c in COLUMNS[kind] if "Aggregate" not in c[0]), {}
    return COLUMNS[kind] + (SOUL_COLUMNS if published and kind == "tofu" else ()), published


def check_original(run: Path):
    """Print the evaluated original beside the paper's; UserError unless it knows the forget set,
    for then there is nothing to unlearn and every number after it means nothing."""
    s = read_settings(run)
    folder = evaluations_of(s, "original") / "eval"
    metrics = read_metrics(folder)
    columns, published = main_columns(s, metrics["benchmark"])
    columns = with_values(columns, [dict(metrics=metrics)])
    print(table_of(columns, [dict(label=label("original"), metrics=metrics)],
                   {k: v for k, v in published.items() if k == "Original"}), flush=True)
    measure, known = what_is_known(metrics)
    if known is not None and known < s.must_know:
        raise UserError(
            f"the original does not know the forget set: {measure} {known:.4f}, less than "
            f"--must-know {s.must_know}; see {folder}/generations.jsonl: "
            f"{why_unknown(metrics['values'])}; --must-know 0 goes on")


def what_is_known(metrics: dict) -> tuple[str, float | None]:
    """By what --must-know judges an original, and its value: ROUGE-L where answers hold words."""
    values, note = metrics["values"], metrics["notes"].get("forget.rouge_l", "")
    if values["forget.rouge_l"] is not None:
        return "ROUGE-L" + f" ({note})" * bool(note), values["forget.rouge_l"]
    return f"exact match (no ROUGE-L: {note})", values["forget.exact_match"]


def why_unknown(values: dict) -> str:
    """The likeliest cause why an original does not say its forget rows, and what to change."""
    ended, seen = values.get("forget.ended"), values.get("forget.exact_memorisation")
    if ended is not None and ended < 0.5:
        return (f"{1 - ended:.0%} of the answers were cut off before the model ended them: raise "
                "--max-total-tokens, or give a model that was taught to end its answers")
    if seen is not None and seen > 0.9:
        return (f"{seen:.0%} of the answers' tokens are the likeliest where what precedes them is "
                "given, so it was taught them, but asked otherwise: try another --template")
    return "another --template, --weights or more --learn-epochs may be needed"


def report(run: Path, *, others: list[Path] = (), retain_only: Path | None = None,
           recompute: bool = False):
    """RUN/report.md and RUN/report.json, and the main table on stdout."""
    s = read_settings(run)
    reference = _reference_rows(retain_only, s) if retain_only else None
    found, stale = find_evaluations(s, reference, recompute=recompute)
    others = list(others) or seed_siblings(run, s)
    seeds = over_seeds(run, s, others, found) if others else None
    examples, costs, mask = qualitative(found), _costs(run), _mask_of(run, s)
    columns, published = main_columns(s, found[0]["metrics"]["benchmark"])
    columns, judged = with_values(columns, found), verdict.stored(s)
    told = verdict.as_text(judged) if judged else ""
    kept = [{k: v for k, v in e.items() if k not in ("rows", "made")} for e in found]
    compose = partial(_compose_rows, told) if s.layout == "rows" else _compose
    with turn(run):
        write_text(run / "report.md", compose(s, found, stale, seeds, examples, costs, mask))
        write_json(run / "report.json", dict(
            **(dict(verdict=judged) if judged else {}),
            settings=dataclasses.asdict(s), evaluations=kept, stale=stale, columns=columns,
            published=published or None, seeds=seeds, critical=mask, costs=costs,
            qualitative=examples))
        write_cards(s, found, unlearned(run, found), told)
    print(table_of(columns, found, published))
    if recompute:
        print("every number recomputed from generations.jsonl: equal")
    print(f"report: {os.path.relpath(run / 'report.md')}")


def _compose(s: Settings, found, stale: dict, seeds, examples, costs, mask: str) -> str:
    """report.md."""
    metrics, footnotes = found[0]["metrics"], {}
    kind = metrics["benchmark"]
    columns, published = main_columns(s, kind)
    show = lambda columns, published=None: table_of(columns, found, published, footnotes)
    general = [[k, v] for k, v in dataclasses.asdict(s).items()
               if k not in {*OF_MODELS, "out", "data", "weights"} - {"dtype"}]
    parts = [f"# {s.benchmark}, {s.label}, seed {s.seed}", show(columns, published),
             reading(metrics), SOUL_READING if columns != COLUMNS[kind] else ""]
    if (s.run / "attack.md").is_file():
        parts.append("What comes back when these models are attacked: [attack.md](attack.md).")
    if stale:
        parts.append("Left out, because they are not of what this run now holds:\n\n" + "\n".join(
            f"- {name}: {why}" for name, why in stale.items()))
    parts += ["## In the leaderboard's columns", show(LEADERBOARD_COLUMNS, leaderboard(s)),
              "On the forget set, as open-unlearning defines them: EM is by tokens here, MIA is of "
              "the answer alone, TR and MU are geometric." + (
                  " Its published rows are of forget10 whole, members against holdout10."
                  if leaderboard(s) else "")]
    if seeds:
        parts += [f"## Mean ± standard deviation over seeds {', '.join(map(str, seeds['seeds']))}",
                  _seeds_table(COLUMNS[kind], seeds, found)]
    parts += ["## Beside these columns", *(show(columns) for columns in MORE_COLUMNS[kind])]
    parts += ["## Membership inference", show(MIA_COLUMNS), show(ANSWER_MIA_COLUMNS),
              "Above, attacks on the whole text; below, on the answer alone. "
              f"Members: {metrics['members']}. Non-members: {metrics['nonmembers']}. An attack "
              "that learns nothing has 0.5, but the two sets differ as text: what a model that "
              "never saw the forget set has is the ideal, and the distance to it the headline. The "
              "paper's 1 - AUC in the aggregate also rewards going below it.",
              "## Critical neurons", mask,
              "## Same prompts, different models", _qualitative_text(examples, found),
              "## Time and memory", _costs_table(costs),
              "## Settings", _recipes_table(s.run, found),
              table(["Setting of the run", "Value"], general),
              "## Readings of the paper", READINGS,
              "## Definitions", definitions(evaluation.__doc__)]
    parts.insert(parts.index(reading(metrics)) + 1, _notes(found, footnotes))
    return "\n\n".join(p for p in parts if p) + "\n"


def _compose_rows(told: str, s: Settings, found, stale: dict, seeds, examples, costs, mask: str
                  ) -> str:
    """report.md of a user's own rows: whether they are forgotten (told: the verdict, if there is
    one), and how that was found."""
    columns = with_values(main_columns(s, "rows")[0], found)
    count = found[0]["metrics"]["counts"]["forget"]
    parts = [f"# {s.label}: {count} rows to forget",
             f"```\n{told}\n```" if told else
             "Not judged yet: `python -m pipeline verdict RUN`.",
             table_of(columns, found), reading(found[0]["metrics"])]
    if stale:
        parts.append("Left out, because they are not of what this run now holds:\n\n" + "\n".join(
            f"- {name}: {why}" for name, why in stale.items()))
    if (s.run / "attack.md").is_file():
        parts.append("What comes back when the model is attacked: [attack.md](attack.md).")
    if seeds:
        parts += [f"## Mean ± standard deviation over seeds {', '.join(map(str, seeds['seeds']))}",
                  _seeds_table(columns, seeds, found)]
    more = [with_values(c, found) for c in MORE_COLUMNS["rows"]]
    parts += ["## Beside these columns", *(table_of(c, found) for c in more if c),
              "## Row by row", _qualitative_text(examples, found),
              "## Critical neurons", mask, "## Time and memory", _costs_table(costs),
              "## Settings", _recipes_table(s.run, found),
              "## What forgotten means", f"```\n{verdict.DEFINITION.strip()}\n```",
              "The other numbers are defined at the head of eval.py."]
    return "\n\n".join(p for p in parts if p) + "\n"
