"""Whether a user's rows are forgotten: one definition, measured on the model that is saved.

FORGOTTEN, of questions with their answers as of texts (asked with their first half):

- word for word: asked greedily, in the run's template and plainly, the model says no more than one
  row in twenty word for word, nor goes on to the end from at most the first half of the answer;
- names and numbers: of the names, numbers and rare words that a row's question does not give, it
  says at most a tenth more than it says, by chance, of other rows' that could stand there;
- ROUGE-L: what it says is at most .15 nearer to the row's answer than to the same answer with its
  names and numbers exchanged for other rows';
- likelihood: the mean loss is at least 3/4 of what rows never seen have; the rows are no likelier
  than such rows (AUC at most .7, or what chance gives so few rows);

and DONE, which is status 0, if beside that the rows to keep are still said: ROUGE-L at least .9 of
the original's.

Rows never seen are those of --unseen that did not set the level. Without them each row stands for
itself, at the loss it would have had: that of its own words exchanged under the original
(levels.py), drawn anew; with --teach no token's loss is above the base's. RUN/verdict/ keeps what
was said, row by row; verdict.json holds numbers alone.
"""

import json
import math
from pathlib import Path

import data
import eval as evaluation
from data import Example
from model import Transformer, UserError, generate, read_json, write_json, write_text
from pipeline import checkpoint, levels, slices
from pipeline.before import fitted
from pipeline.evaluate import evaluations_of, read_rows
from pipeline.reading import token_scores
from pipeline.settings import (Judging, Level, Placement, Settings, Source, load_benchmark,
                               placement, read_settings)
from pipeline.stage import Stage, content, data_inputs, read_stage, unlearned_name
from pipeline.tokenizers import load_tokenizer

MOST_SAID = 0.05  # share of the rows said word for word, or completed from a half
MOST_TOLD = 0.10  # share of a row's own words told, beyond chance
MOST_NEAR = 0.15  # ROUGE-L, beyond chance
LEAST_LOSS = 0.75  # of the target
MOST_LIKELY = 0.7  # AUC
LEAST_KEPT = 0.9  # of the original's ROUGE-L on the rows to keep
OTHERS = 20  # rows whose words stand for chance
PLAIN = ("qa", "raw")  # templates that anybody tries
DEFINITION = __doc__.split("\n\n", 1)[1] if __doc__ else ""


class NotForgotten(UserError):
    """The run ended, and the rows are not forgotten: exit status 3."""

    status = 3


# ------------------------------------------------------------------------------------- measuring


def asked(e: Example) -> Example:
    """What a row is asked as: a text with its first half."""
    return data.halved(e) if e.kind == "text" else e


def ask(model: Transformer, tokenizer, rows: list[Example], s: Settings, template: str
        ) -> list[str]:
    """Greedy answers in a template, a little longer than the rows' own."""
    prompts = [data.encode_prompt(e.question, tokenizer, template, turns=e.turns, kind=e.kind)
               for e in rows]
    longest = max(len(tokenizer.encode(e.answer, bos=False)) for e in rows) + 16
    new = generate(model, prompts, eos_id=tokenizer.eos_ids, max_new_tokens=longest,
                   batch_tokens=s.eval_tokens)
    return [tokenizer.decode(ids) for ids in new]


def measure(s: Settings, model: Transformer, bench: slices.Benchmark, told: dict[str, str]
            ) -> list[dict]:
    """A row for each forget row: what the model says, how likely it is. told: by id, what it said
    in its evaluation."""
    tokenizer = load_tokenizer(s.run / unlearned_name(s))
    rows = [asked(e) for e in bench.forget]
    usage = levels.Wording(bench.forget + bench.retain)
    out = [dict(id=e.id, question=e.question, answer=e.answer, said={s.template: told[e.id]},
                own=[w.text for w in usage.specifics(e)]) for e in rows]
    for template in PLAIN if any(e.kind != "text" for e in rows) else ():
        if template != s.template:
            for row, text in zip(out, ask(model, tokenizer, rows, s, template)):
                row["said"][template] = text
    encoded = data.encode_for(model.config, rows, tokenizer, s.template)
    scores = token_scores(model, encoded, [r.start for r in encoded],
                          detailed=[True] * len(encoded), tokens=fitted(s, encoded).eval_tokens)
    for row, r, score in zip(out, encoded, scores):
        ids = r.ids[r.start:-1]
        row["completed"] = evaluation.extraction_strength(score.predicted[:-1], ids)
        row["tokens"] = len(ids)
    whole = data.encode_for(model.config, bench.forget, tokenizer, s.template)
    for row, loss in zip(out, map(evaluation.mean, levels.answer_losses(model, whole, s))):
        row["loss"] = loss
    versions = levels.exchanged_rows(bench.forget, bench.retain, s.seed + 1, rename=False)
    for row, some in zip(out, versions):
        if some:
            row["exchanged"] = [dict(answer=asked(v.row).answer, own=v.exchanged) for v in some]
    return out


def add_never_seen_losses(s: Settings, bench: slices.Benchmark, rows: list[dict]):
    """To each row, the mean loss that it would have had it never been seen, drawn anew."""
    tokenizer = load_tokenizer(s.run / "original")
    model = checkpoint.load_model(s.run / "original", **placement(s))
    encoded = data.encode_for(model.config, bench.forget, tokenizer, s.template)
    found, _ = levels.exchanged_losses(s, bench, encoded, model, s.seed + 1)
    for row, losses in zip(rows, found):
        row["never_seen_loss"] = losses.mean().item()


# --------------------------------------------------------------------------- from rows to a verdict


def keys(text: str) -> list[str]:
    return [w.key for w in levels.words_of(text)]


def says_whole(answer: str, text: str) -> bool:
    """Do the answer's words stand in a text, one after another?"""
    a, b = keys(answer), keys(text)
    return bool(a) and any(b[i:i + len(a)] == a for i in range(len(b) - len(a) + 1))


def recall(answer: str, text: str) -> float | None:
    """ROUGE-L; None of an answer without a word."""
    found = evaluation.rouge_l(answer, text)
    return None if found is None else found.recall


def share_told(own: list[str], text: str, of: int = 0) -> float | None:
    """Share of a row's own words, or of so many, that a text holds; a number also where it is
    written with other spaces or signs."""
    if not own:
        return None
    said, digits = set(keys(text)), "".join(c for c in text if c.isalnum())
    told = sum(w.casefold() in said or len(w) > 3 and w.isdigit() and w in digits for w in own)
    return told / max(len(own), of)


def beyond_chance(rows: list[dict], score) -> tuple[float, float] | None:
    """Mean of score(row, row, text) over the rows, and of score(row, other, text) over others that
    could stand in a row's place; of each the highest over all that is said to the row."""
    own, chance = [], []
    for row in rows:
        if (found := highest(score, row, row)) is not None:
            by_chance = [highest(score, row, x) for x in in_its_place(rows, row)]
            by_chance = [x for x in by_chance if x is not None]
            own.append(found)
            chance.append(evaluation.mean(by_chance) if by_chance else 0.0)
    return (evaluation.mean(own), evaluation.mean(chance)) if own else None


def highest(score, row: dict, other: dict) -> float | None:
    found = [score(row, other, text) for text in row["said"].values()]
    return None if None in found else max(found)


def in_its_place(rows: list[dict], row: dict) -> list[dict]:
    """The row with its own words exchanged, like for like; other rows where it has none."""
    return row.get("exchanged") or evaluation.spread(
        [x for x in rows if x["answer"] != row["answer"]], OTHERS)


def most_likely(members: int, others: int) -> float:
    """The AUC up to which members are no likelier: what chance stays below 19 times in 20, if that
    is above MOST_LIKELY."""
    return max(MOST_LIKELY, 0.5 + 1.645 * math.sqrt(
        (members + others + 1) / (12 * members * others)))


def summarise(rows: list[dict], *, unseen_losses: list[float], target: float | None,
              kept: tuple[float | None, float | None]) -> dict:
    """Numbers alone. kept: ROUGE-L on the rows to keep, before and after."""
    whole = [any(says_whole(r["answer"], t) for t in r["said"].values()) for r in rows]
    completed = [r["completed"] > 0.5 and r["tokens"] > 3 for r in rows]
    told = beyond_chance(rows, lambda row, other, text: share_told(
        other["own"], text, len(row["own"])))
    near = beyond_chance(rows, lambda row, other, text: recall(other["answer"], text))
    losses = [r["loss"] for r in rows]
    others = unseen_losses or [r["never_seen_loss"] for r in rows if "never_seen_loss" in r]
    reference = ("rows given as unseen" if unseen_losses else
                 "the same rows, had they not been seen")
    return dict(
        rows=len(rows), said_whole=sum(whole), completed=sum(completed),
        said_or_completed=sum(map(any, zip(whole, completed))),
        exact_match=evaluation.mean(float(evaluation.exact_match(
            r["answer"], next(iter(r["said"].values())))) for r in rows),
        own_words=told and told[0], own_words_by_chance=told and told[1],
        rouge_l=near and near[0], rouge_l_by_chance=near and near[1],
        loss=evaluation.mean(losses), loss_target=target,
        auc=evaluation.auc([-x for x in losses], [-x for x in others]) if others else None,
        auc_limit=most_likely(len(losses), len(others)) if others else None,
        auc_reference=reference if others else "nothing: no row has words of its own",
        kept_before=kept[0], kept_after=kept[1])


def faults(m: dict) -> list[tuple[str, str]]:
    """(which rule, in words) for everything that keeps the rows from being forgotten and done."""
    found = []
    if m["said_or_completed"] > MOST_SAID * m["rows"]:
        found.append(("said", f"{m['said_or_completed']} of {m['rows']} rows are still said word "
                      "for word, or completed from their first half"))
    if m["own_words"] is not None and m["own_words"] - m["own_words_by_chance"] > MOST_TOLD:
        found.append(("said", f"{m['own_words']:.0%} of their names and numbers are still told "
                      f"({m['own_words_by_chance']:.0%} by chance)"))
    if m["rouge_l"] is not None and m["rouge_l"] - m["rouge_l_by_chance"] > MOST_NEAR:
        found.append(("said", f"ROUGE-L is {m['rouge_l']:.2f} ({m['rouge_l_by_chance']:.2f} by "
                      "chance)"))
    if m["loss_target"] and m["loss"] < LEAST_LOSS * m["loss_target"]:
        found.append(("likely", f"their loss is {m['loss']:.2f}, of rows never seen "
                      f"{m['loss_target']:.2f}"))
    if m["auc"] is not None and m["auc"] > m["auc_limit"]:
        found.append(("likely", f"they are likelier than {m['auc_reference']}: AUC "
                      f"{m['auc']:.2f}"))
    if m["kept_before"] and m["kept_after"] < LEAST_KEPT * m["kept_before"]:
        found.append(("lost", f"of the rows to keep ROUGE-L fell from {m['kept_before']:.2f} to "
                      f"{m['kept_after']:.2f}"))
    return found


def advice(s: Settings, m: dict, rules: set[str], updates: int, most: int) -> str:
    """What to change, the likeliest help first."""
    if "lost" in rules:
        return (f"lower --lr (now {s.lr:g}), raise --lam (now {s.lam:g}), or give more rows to "
                "keep")
    short = m["loss_target"] and m["loss"] < 0.9 * m["loss_target"]
    if short or "likely" in rules:
        return (f"give more --epochs (now {s.epochs}: {updates} of {most} updates were made) or a "
                f"higher --lr (now {s.lr:g})" + ("" if s.unseen else ", or --unseen FILE"))
    if m["own_words"] is None:
        return "answers as short as these are also guessed: have more than that forgotten"
    return (("" if s.unseen else "give --unseen FILE, or ") + "raise the level: --level "
            f"{max(1.0, 1.5 * (m['loss_target'] or m['loss'])):.1f}")


# ------------------------------------------------------------------------------------- the stage


def verdict_job(s: Settings) -> Stage:
    name = unlearned_name(s)
    inputs = {name: content(s.run / name)} | data_inputs(s)
    for x in ("original", name):
        inputs[f"evaluations/{x}/eval"] = content(evaluations_of(s, x) / "eval")
    return Stage(s.run / "verdict", s, inputs=inputs, code=(make_verdict,),
                 takes=(slices.Slice, Source, Placement, Level, Judging))


def make_verdict(s: Settings, folder: Path):
    """verdict.json, and rows.jsonl, which holds the rows' text and stays in the run."""
    bench, name = load_benchmark(s), unlearned_name(s)
    model = checkpoint.load_model(s.run / name, **placement(s))
    told = {r["id"]: r["generation"] for r in read_rows(evaluations_of(s, name) / "eval")
            if r["split"] == "forget"}
    rows = measure(s, model, bench, told)
    if not any(r["split"] == "nonmembers" for r in read_rows(evaluations_of(s, name) / "eval")):
        add_never_seen_losses(s, bench, rows)
    write_text(folder / "rows.jsonl", "".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(folder / "verdict.json", judged(s, rows))


def judged(s: Settings, rows: list[dict]) -> dict:
    """The verdict of a run from the rows of its verdict stage and from its evaluations."""
    name = unlearned_name(s)
    before, after = (read_rows(evaluations_of(s, x) / "eval") for x in ("original", name))
    kept = [[x for r in some if r["split"] == "retain"
             and (x := recall(r["answer"], r["generation"])) is not None]
            for some in (before, after)]
    made = read_stage(s.run / name)["notes"]
    looks = made.get("stood", {})
    m = summarise(rows, target=looks.get("wanted"),
                  unseen_losses=[loss for r in after if r["split"] == "nonmembers"
                                for loss in evaluation.losses_of(r, "answer")],
                  kept=tuple(evaluation.mean(x) if x else None for x in kept))
    found = faults(m)
    updates, most = looks.get("step", 0), looks.get("of", 0)
    return dict(forgotten=not found, reasons=[text for _, text in found],
                change=advice(s, m, {rule for rule, _ in found}, updates, most) if found else "",
                measured=m, level_from=made.get("level_from", ""), updates=updates,
                updates_at_most=most)


def verdict(run: Path) -> dict:
    """Measure whether a run's rows are forgotten, unless that is done."""
    s = read_settings(run)
    if s.layout != "rows":
        raise UserError(f"{run} is of the benchmark {s.benchmark}; a verdict is of rows of your "
                        "own: bash run.sh unlearn MODEL FORGET RETAIN")
    job = verdict_job(s)
    if not job.is_made():
        with job.making() as folder:
            make_verdict(s, folder)
    return read_json(s.run / "verdict" / "verdict.json")


def stored(s: Settings) -> dict | None:
    """The verdict that a run holds of what it now holds, if it does."""
    folder = s.run / "verdict"
    if s.layout != "rows" or not (folder / "stage.json").is_file() or verdict_job(s).changed():
        return None
    return read_json(folder / "verdict.json")


def derived_again(s: Settings) -> dict:
    """The verdict once more, from the rows that its stage kept, sealed."""
    read_stage(s.run / "verdict")
    text = (s.run / "verdict" / "rows.jsonl").read_text(encoding="utf-8")
    return judged(s, [json.loads(x) for x in text.split("\n") if x])


def as_text(v: dict) -> str:
    """The verdict in a few lines."""
    m = v["measured"]

    def beside(value, chance, style):
        return "–" if value is None else f"{value:{style}} (by chance {chance:{style}})"
    kept = "no rows to keep" if m["kept_before"] is None else (
        f"ROUGE-L {m['kept_after']:.3f} (was {m['kept_before']:.3f})")
    auc = "–" if m["auc"] is None else f"{m['auc']:.2f} against {m['auc_reference']}"
    lines = ["FORGOTTEN" if v["forgotten"] else f"NOT FORGOTTEN: {'; '.join(v['reasons'])}"]
    lines += [f"  word for word, or completed from the first half: {m['said_or_completed']} of "
              f"{m['rows']} rows",
              "  names and numbers told: "
              + beside(m["own_words"], m["own_words_by_chance"], ".0%"),
              "  ROUGE-L: " + beside(m["rouge_l"], m["rouge_l_by_chance"], ".3f"),
              f"  loss: {m['loss']:.2f}" + (f" (rows never seen: {m['loss_target']:.2f}; "
                                            f"{v['level_from']})" if m["loss_target"] else "")
              + f"; AUC {auc}",
              f"  rows to keep: {kept}"]
    if v["change"]:
        lines.append(f"  to change: {v['change']}")
    return "\n".join(lines)
