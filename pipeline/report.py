"""The report of a run: its evaluations in the paper's columns, and the published numbers beneath.

A report is a list of titled tables of columns by evaluations. What was made of something that the
run no longer holds is named, and stands in no table.
"""

import glob
import os
from dataclasses import asdict
from pathlib import Path

import eval as evaluation
import simu
from model import UserError, write_json, write_text
from pipeline import metrics, own_rows, slices
from pipeline.card import critical_neurons, recipe_of, write_card
from pipeline.columns import (PUBLISHED_CRITICAL, SOUL_READING, as_code, label, main_columns,
                              number, published, reading, table, table_by_name, table_of)
from pipeline.evaluate import (evaluated_stages, evaluation_job, evaluations_of, newest_evaluation,
                               metrics_of, read_metrics, read_rows, stale_because)
from pipeline.settings import Settings, read_settings, taken
from pipeline.stage import data_inputs, read_stage, stale, unlearned_name


def report(run: Path, *, retain_only: Path | None = None) -> dict | None:
    """RUN/report.md and RUN/report.json, and the main table on stdout; of a user's rows that were
    evaluated before and after, RUN/verdict.json. Returns the verdict. retain_only: RUN/STAGE of a
    model that never saw the forget set."""
    s = read_settings(run)
    evaluations, left_out = read_evaluations(s, retain_only and reference_rows(retain_only, s))
    rows = {e["name"]: e["rows"] for e in evaluations if not e["metrics"]["partial"]}
    verdict, verdict_text = None, ""
    if s.layout == "rows" and {"original", unlearned_name(s)} <= rows.keys():
        verdict = own_rows.verdict(s, rows["original"], rows[unlearned_name(s)])
        verdict_text = as_code(own_rows.as_text(verdict))
        write_json(s.run / "verdict.json", verdict)
    lines = [(e["label"], e["metrics"]["values"]) for e in evaluations]
    main, seeds = table_of(main_columns(s), lines + published(s)), over_seeds(s, evaluations)
    sections = [("", verdict_text), ("", main), *sections_of(s, evaluations, left_out, seeds)]
    text = "\n\n".join(f"## {title}\n\n{x}" if title else x for title, x in sections if x)
    write_text(s.run / "report.md", f"# {s.benchmark}, {s.label}, seed {s.seed}\n\n{text}\n")
    write_json(s.run / "report.json", dict(
        settings=asdict(s), verdict=verdict, stale=left_out, seeds=seeds, evaluations=[
            {k: v for k, v in e.items() if k != "rows"} for e in evaluations]))
    for e in evaluations:
        if e["settings"].get("method") in simu.METHODS:  # else of a fork whose method is gone
            shown = [x for x in evaluations if x["name"] in ("original", e["name"])]
            write_card(s.run / e["name"], e["name"], s, e["settings"], shown, verdict_text)
    print(main, f"report: {os.path.relpath(s.run / 'report.md')}", sep="\n", flush=True)
    return verdict


def verdict_command(run: Path):
    """The report, and verdict.json: are rows forgotten, and others kept? Status 3 where not."""
    if not (verdict := report(run)):
        raise UserError(f"{run} does not hold evaluations of rows of your own before and after: "
                        "bash run.sh unlearn MODEL FORGET RETAIN")
    print(own_rows.as_text(verdict), flush=True)
    if verdict["reasons"]:
        raise own_rows.NotForgotten(f"{own_rows.conclusion(verdict)}: "
                                    f"{'; '.join(verdict['reasons'])}; {verdict['change']}")


def sections_of(s: Settings, evaluations: list[dict], left_out: dict, seeds: dict | None) -> list:
    """(title, text) of each part of report.md below the main table; without text it is left out."""
    first = evaluations[0]["metrics"]
    of_seeds = [(label(name), x) for name, x in seeds["values"].items()] if seeds else []
    numbers = [(e["label"], {name: number(x, ".4g") for name, x in e["metrics"]["values"].items()
                             if x is not None}) for e in evaluations]
    settings = [(e["label"], e["settings"]) for e in evaluations]
    if s.layout == "rows":  # which hold no text: others may read a report than may read the rows
        about = [("What forgotten means", as_code(own_rows.DEFINITION))]
    else:
        about = [("Membership inference", f"Members are {first['members']}, non-members "
                  f"{first['nonmembers']}. The ideal is what a model that never saw the forget set "
                  "has; mia.distance, from there, is the headline."),
                 ("Same prompts, different models", answers_to_the_same(evaluations)),
                 ("Definitions", f"{as_code(evaluation.__doc__)}\n\n{as_code(metrics.__doc__)}")]
    return [
        ("", reading(first)),
        ("", SOUL_READING if s.layout == "tofu" and published(s) else ""),
        ("Left out, because they are not of what this run now holds",
         "\n".join(f"- {name}: {why}" for name, why in left_out.items())),
        (f"Mean ± standard deviation over seeds {seeds and seeds['seeds']}",
         table_of(main_columns(s), of_seeds)),
        ("Every number, by its name in eval.py", table_by_name("Metric", numbers)),
        ("", notes(evaluations)), ("Critical neurons", masks(s)), *about,
        ("Settings", table_by_name("Setting", settings))]


# ------------------------------------------------------------------------ the evaluations of a run


def read_evaluations(s: Settings, reference: list | None = None) -> tuple[list, dict[str, str]]:
    """Of each evaluated stage of a run, in the paper's order, a dict of name, label, metrics, rows
    and settings; and the stages that are left out as stale, with the reason. reference: the rows of
    a retain-only model; default: of the run's."""
    jobs = {name: job for name in evaluated_stages(s) if (job := newest_evaluation(s, name))}
    left_out = {name: "; ".join(why) for name, job in jobs.items()
                if (why := stale_because(s, name, job))}
    for name, why in left_out.items():
        print(f"left out: {s.run / name}: {why}; run its stages again", flush=True)
    current = sorted(jobs.keys() - left_out.keys(), key=lambda name: table_order(s.run / name))
    if not current:
        why = f" of what it now holds ({next(iter(left_out.values()))})" if left_out else ""
        raise UserError(f"{s.run} holds no evaluation{why}; run `python -m pipeline evaluate "
                        f"{s.run} {' '.join(left_out) or 'STAGE'}`")
    if not reference and "retain-only" in current:
        reference = read_rows(jobs["retain-only"].folder)
    evaluations = [read_evaluation(s.run / name, jobs[name].folder, reference) for name in current]
    return evaluations, left_out


def table_order(folder: Path) -> tuple:
    """Sorts stages: retain-only, original, then by method in the order of simu's table."""
    kind = read_stage(folder)["why"]["settings"].get("method", folder.name)
    order = ["retain-only", "original", *simu.METHODS]
    return order.index(kind) if kind in order else len(order), folder.name


def read_evaluation(folder: Path, evaluated: Path, reference: list[dict] | None) -> dict:
    """One stage. settings: all that its numbers depend on, how it was made and evaluated."""
    rows, stage = read_rows(evaluated), read_stage(folder)
    evaluation_stage = read_stage(evaluated)
    summary = metrics_of(rows, evaluation_stage["notes"]["about"], reference)
    partial = f" (partial: {summary['partial']})" if summary["partial"] else ""
    settings = stage["why"]["settings"]
    if settings.get("method") in simu.METHODS:
        settings = recipe_of(stage["settings"]) | settings
    return dict(name=folder.name, label=label(folder.name) + partial, metrics=summary,
                rows=rows, settings=evaluation_stage["why"]["settings"] | settings)


def reference_rows(folder: Path, s: Settings) -> list[dict]:
    """Rows of a retain-only model evaluated in another run: as its folder now is, on our data."""
    folder = folder.resolve()
    t = read_settings(folder.parent)
    job = evaluation_job(t, folder.name)
    why = stale_because(t, folder.name, job)
    if names := differing(data_of(s), data_of(t)):
        why.append(f"its run differs in {names}")
    if why:
        raise UserError(f"--retain-only {folder} is not comparable: {'; '.join(why)}; evaluate it "
                        "as it now is on the same data, asked the same way")
    return read_rows(job.folder)


def data_of(s: Settings) -> dict:
    """Which rows a run is about, and how they are put to which model."""
    return taken(s, (slices.Slice,)) | data_inputs(s) | dict(benchmark=s.benchmark, model=s.model)


def differing(one: dict, other: dict, aside: tuple = ()) -> str:
    """The keys in which two dicts differ, as text; "" if they do not."""
    return ", ".join(k for k in one | other if one.get(k) != other.get(k) and k not in aside)


def over_seeds(s: Settings, evaluations: list[dict]) -> dict | None:
    """Seeds, and {stage: {value: [one per seed]}}, of this run and of those beside it, RUN-seed*,
    that differ in nothing else; None if there are none."""
    run, runs = s.run.resolve(), {s.seed: evaluations}
    ours = {e["name"]: e["settings"] for e in evaluations}
    for path in sorted(run.parent.glob(f"{glob.escape(run.name)}-seed*/settings.json")):
        try:
            t = read_settings(path.parent)
            theirs, _ = read_evaluations(t)
            pairs = [(ours[e["name"]], e["settings"]) for e in theirs if e["name"] in ours]
            pairs.append((data_of(s), data_of(t)))
            if names := [x for pair in pairs if (x := differing(*pair, ("seed", "device")))]:
                raise UserError(f"{t.run} differs from {s.run} in {', '.join(names)}")
            runs.setdefault(t.seed, theirs)
        except UserError as e:
            print(f"left out of the mean over seeds: {e}", flush=True)
    by_seed = [{e["name"]: e["metrics"]["values"] for e in x if not e["metrics"]["partial"]}
               for x in runs.values()]
    shared = [e["name"] for e in evaluations if all(e["name"] in x for x in by_seed)]
    values = {name: {k: [x[name][k] for x in by_seed] for k in by_seed[0][name]}
              for name in shared}
    return dict(seeds=list(runs), values=values) if len(runs) > 1 else None


def check_original(run: Path):
    """Print the evaluated original beside the paper's; UserError unless it knows what to forget."""
    s = read_settings(run)
    folder = evaluations_of(s, "original") / "eval"
    values = read_metrics(folder)["values"]
    print(table_of(main_columns(s), [(label("original"), values), *published(s)[:1]]), flush=True)
    if s.layout == "rows":
        return own_rows.need_known_rows(s, read_rows(folder))
    known = values["forget.rouge_l"]
    if known is not None and known < s.must_know:
        raise UserError(
            f"the original does not know the forget set: its ROUGE-L is {known:.4f}, less than "
            f"--must-know {s.must_know}; see {folder}/generations.jsonl: {why_unknown(values)}; "
            "--must-know 0 goes on")


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


# ------------------------------------------------------------------------------------- the sections


def notes(evaluations: list[dict]) -> str:
    """Why a value is missing or how to read it: each remark once, on a value or on a split."""
    about = {}  # (split or name, remark) -> names, in order
    for e in evaluations:
        for name, remark in e["metrics"]["notes"].items():
            about.setdefault((name.split(".")[0], remark), {})[name] = None
    return "\n".join(f"- {split if len(names) > 1 else next(iter(names))}: {remark}"
                     for (split, remark), names in about.items())


def masks(s: Settings) -> str:
    """A line on each mask of a run, which says so of one that is made of something that the run no
    longer holds; and Table 5's, also where there is no mask."""
    lines = []
    for folder in sorted(path.parent for path in s.run.glob("mask*/stage.json")):
        why = "; ".join(stale(folder, s))
        lines.append(f"{folder.name}: " + (f"not of what this run now holds: {why}" if why else
                                           critical_neurons(folder)))
    if (s.benchmark, s.model) in PUBLISHED_CRITICAL:
        critical, total = PUBLISHED_CRITICAL[s.benchmark, s.model]
        lines.append(f"published (Table 5): {critical} of {total}")
    return "\n\n".join(lines)


def answers_to_the_same(evaluations: list[dict], each: int = 3) -> str:
    """The same prompts answered by every approach (Tables 6 and 7): of the forget and of the retain
    set `each` that all of them answered, spread over LUME's tasks."""
    by_key = [{(r["split"], r["id"]): r for r in e["rows"] if "generation" in r}
              for e in evaluations]
    shared = [key for key in by_key[0] if all(key in rows for rows in by_key)]
    shared.sort(key=lambda key: by_key[0][key].get("task", ""))
    parts = []
    for split in ("forget", "retain"):
        for key in evaluation.spread([key for key in shared if key[0] == split], each):
            row = by_key[0][key]
            says = [[e["label"], in_a_cell(rows[key]["generation"])]
                    for e, rows in zip(evaluations, by_key)]
            parts += [f"**{split}**, {in_a_cell(key[1])}: {in_a_cell(row['question'], 600)}",
                      table(["Approach", "Says"], [["*answer*", in_a_cell(row["answer"])], *says])]
    return "\n\n".join(parts)


def in_a_cell(text: str, most: int = 300) -> str:
    """Text as it may stand in a Markdown table cell."""
    text = " ".join(text.split())
    text = text if len(text) <= most else text[:most] + " {…}"
    for special in "\\|*_`<[#~$":
        text = text.replace(special, "\\" + special)
    return text or "(empty)"
