"""Are a user's rows forgotten? When unlearning them ends, and the verdict: one definition, computed
from the evaluations of the original and of the result.

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
the original's, and of those said word for word nine in ten. They are judged on a fifth of them that
was held out of training; fewer than 15 are all trained on, and nothing tells what else is lost.

Rows never seen are those of --unseen that did not set the level. Without them each row stands for
itself, at the loss that it would have had (pipeline/levels.py), drawn once more. verdict.json holds
numbers and digests, and no row's text.
"""

import math
from dataclasses import dataclass

import torch

import data
import eval as evaluation
from data import Encoded, Example
from model import Transformer, UserError
from pipeline import levels, reading
from pipeline.settings import Settings
from pipeline.slices import load_benchmark
from pipeline.stage import content, data_inputs, read_stage, unlearned_name

DEFINITION = (__doc__ or "").partition("\n\n")[2]  # python -OO drops docstrings
MOST_SAID = 0.05  # share of the rows said word for word, or completed from a half
MOST_SPECIFICS = 0.10  # share of a row's specifics said, beyond chance
MOST_NEAR = 0.15  # ROUGE-L, beyond chance
LEAST_LOSS = 0.75  # of the target
MOST_LIKELY = 0.7  # AUC
LEAST_KEPT = 0.9  # of the original's ROUGE-L on the rows to keep
KNOWN = 0.25  # share of a row's specifics said beyond chance, from which on it is known
OTHERS = 20  # rows whose words stand for chance, where a row's cannot be exchanged
CHANCES = 2400  # exchanged versions of all rows, at least COPIES of each, which tell of chance


class NotForgotten(UserError):
    """The run ended, and the rows are not forgotten, or others were lost: exit status 3."""

    status = 3


# ------------------------------------------------------------------ unlearning until it is enough

LOOKS = 16  # at the model, in as many updates as there may be
LOOKED_AT = 64  # rows of each kind
NEAR = 0.15  # of the target: how far the mean loss of the forget rows may be from it
LIKELY = 0.62  # AUC of the forget rows against their targets, at which they are no likelier
HARD = 1.0  # target loss from which on a row never seen does not say a token
GUESSED = 0.15  # share of these tokens that may be the likeliest all the same, by chance
SAME_TOKENS = 0.99  # of the share of their tokens that are the likeliest, at which rows are kept
SAME_ROWS = 0.97  # of the share of these rows that are said to the end


def look(model: Transformer, forget: list[Encoded], retain: list[Encoded],
         targets: list[torch.Tensor], tokens: int) -> dict:
    """How near the forget rows are to their targets, and what became of the rows to keep. targets:
    of each forget row, the losses that its answer's tokens are to have [A]; tokens: in one pass."""
    of_forget, of_retain = (reading.token_scores(
        model, rows, [r.start for r in rows], tokens=tokens, detailed=[True] * len(rows))
        for rows in (forget, retain))
    completed = [is_completed(x.predicted, r.ids[r.start:]) for x, r in zip(of_forget, forget)]
    guessed = [p == i for x, r, target in zip(of_forget, forget, targets)
               for p, i, loss in zip(x.predicted, r.ids[r.start:], target.tolist())
               if loss > HARD]
    losses = [evaluation.mean(x.losses) for x in of_forget]
    aims = [x.mean().item() for x in targets]
    same = [evaluation.exact_memorisation(x.predicted, r.ids[r.start:])
            for x, r in zip(of_retain, retain)]
    return dict(
        forget=evaluation.mean(losses), target=evaluation.mean(aims), rows=len(losses),
        completed=sum(completed), guessed=evaluation.mean(guessed or [0]),
        auc=evaluation.auc([-x for x in losses], [-x for x in aims]),
        retain=evaluation.mean([evaluation.mean(x.losses) for x in of_retain] or [0]),
        same_tokens=evaluation.mean(same or [1]),
        same_rows=evaluation.mean([x == 1 for x in same] or [1]))


def is_completed(predicted: list[int], ids: list[int]) -> bool:
    """Does a model go on to the end of an answer from at most its first half?"""
    return len(ids) > 3 and evaluation.extraction_strength(predicted, ids) > 0.5


def is_forgotten(now: dict, before: dict) -> bool:
    """May unlearning end here, by a look now and one at the original?"""
    return (abs(now["forget"] - now["target"]) <= NEAR * now["target"]
            and not now["completed"] and now["auc"] <= LIKELY and now["guessed"] <= GUESSED
            and now["same_tokens"] >= SAME_TOKENS * before["same_tokens"]
            and now["same_rows"] >= SAME_ROWS * before["same_rows"])


def until_forgotten(model: Transformer, encoded: dict, targets: list[torch.Tensor], s: Settings,
                    job):
    """A loop for `simu.unlearn` that ends where the rows are forgotten, at two looks running, for
    what is said goes up and down. It depends on updates and weights alone, so that a run that was
    killed ends at the same update."""
    looked_at = [evaluation.spread(x, LOOKED_AT)
                 for x in (encoded["forget"], encoded["retain"], targets)]
    before, record = look(model, *looked_at, s.eval_tokens), job.record("looks.jsonl")

    def loop(title, steps, tensors):
        every, forgotten = max(1, steps // LOOKS), torch.zeros(1)  # looks running
        for step in job.loop(title, steps, tensors | {"forgotten looks": forgotten}):
            yield step
            if step % every and step < steps:
                continue
            now = look(model, *looked_at, s.eval_tokens)
            forgotten.copy_(forgotten + 1 if is_forgotten(now, before) else forgotten * 0)
            job.notes["ended"] = dict(step=step, of=steps, forgotten=int(forgotten), **now)
            record(job.notes["ended"])
            print(f"update {step} of at most {steps}: loss of the rows to forget "
                  f"{now['forget']:.2f} (target {now['target']:.2f}), {now['completed']} of "
                  f"{now['rows']} completed from a half, {now['guessed']:.0%} of their secrets "
                  f"guessed; of the rows to keep {now['retain']:.2f} (was {before['retain']:.2f}),"
                  f" {now['same_tokens']:.1%} of their tokens the likeliest", flush=True)
            if forgotten >= 2:
                break
    return loop


# ------------------------------------------------------------------------------- what a row says


def answers_to(row: dict) -> list[str]:
    """All that a model says to a row."""
    return [row["generation"], *row.get("plain_generations", {}).values()]


def row_loss(row: dict) -> float:
    """Mean loss of what of a row is to be forgotten: its answer, or the whole of a text."""
    text = row["scores"]["answer"][0]
    return evaluation.mean(text["losses"] if row["kind"] == "text"
                           else text["losses"][text["start"]:])


def keys(text: str) -> list[str]:
    return [w.key for w in levels.words_of(text)]


def says_all(answer: str, text: str) -> bool:
    """Do the answer's words stand in a text, one after another?"""
    a, b = keys(answer), keys(text)
    return bool(a) and any(b[i:i + len(a)] == a for i in range(len(b) - len(a) + 1))


@dataclass
class Candidate:
    """An answer to a row, its own or one that could stand in its place, and its specifics."""

    answer: str
    specifics: list[str]


def recall(candidate: Candidate, text: str, count: int) -> float | None:
    """ROUGE-L recall of the answer in a text; None of an answer without a word."""
    score = evaluation.rouge_recall(dict(answer=candidate.answer, generation=text))
    return score if isinstance(score, float) else None


def share_said(candidate: Candidate, text: str, count: int) -> float | None:
    """Share of the specifics, or of `count` if that is more, that a text holds: a number also where
    it is written with other spaces or signs. None where there are none."""
    if not candidate.specifics:
        return None
    words, letters = set(keys(text)), "".join(c for c in text if c.isalnum())
    said = sum(w.casefold() in words or len(w) > 3 and w.isdigit() and w in letters
               for w in candidate.specifics)
    return said / max(len(candidate.specifics), count)


def candidates(bench, seed: int) -> dict[str, tuple[Candidate, list[Candidate]]]:
    """Of each forget row by id: the truth, and what could stand in its place, which is the row with
    its specifics exchanged, like for like; other rows where it has none."""
    wording, rows = levels.Wording(bench.forget + bench.retain), map(question_of, bench.forget)
    truths = {e.id: Candidate(e.answer, [w.text for w in wording.specifics(e)]) for e in rows}
    copies = max(levels.COPIES, CHANCES // len(bench.forget))
    versions = levels.exchanged_rows(bench.forget, bench.retain, seed, copies=copies,
                                     rename=False)
    out = {}
    for (name, truth), row_versions in zip(truths.items(), versions):
        exchanged = [Candidate(question_of(v.row).answer, v.words) for v in row_versions]
        others = [x for x in truths.values() if x.answer != truth.answer]
        out[name] = truth, exchanged or evaluation.spread(others, OTHERS)
    return out


def question_of(e: Example) -> Example:
    """A row as it is asked: a text with its first half."""
    return data.halved(e) if e.kind == "text" else e


def beyond_chance(rows: list[dict], of: dict, score) -> tuple[float | None, float | None]:
    """Means over the rows of score(candidate, text, number of the truth's specifics), for the truth
    and for what could stand in its place. Of all that is said to a row the highest counts."""
    truly, by_chance = [], []
    for row in rows:
        truth, others = of[row["id"]]

        def highest(candidate):
            return max(score(candidate, text, len(truth.specifics)) for text in answers_to(row))
        if score(truth, "", 1) is not None:
            truly.append(highest(truth))
            by_chance.append(evaluation.mean(
                [highest(x) for x in others if score(x, "", 1) is not None] or [0]))
    return (evaluation.mean(truly), evaluation.mean(by_chance)) if truly else (None, None)


def known_rows(rows: list[dict], of: dict) -> list[bool]:
    """Of each forget row of an evaluation: does the model say it whole, or its specifics beyond
    what it says by chance of others that could stand in their place?"""
    known = []
    for row in (r for r in rows if r["split"] == "forget"):
        specifics, by_chance = beyond_chance([row], of, share_said)
        said = any(says_all(row["answer"], text) for text in answers_to(row))
        known.append(said or specifics is not None and specifics - by_chance > KNOWN)
    return known


def need_known_rows(s: Settings, rows: list[dict]):
    """UserError where the original knows too few of the forget rows for anything to be forgotten:
    what it never said, it says no more afterwards. rows: of its evaluation."""
    known = known_rows(rows, candidates(load_benchmark(s), s.seed + 1))
    if sum(known) < s.must_know * len(known):
        first = next(r["id"] for r, knows in zip(rows, known) if not knows)
        raise UserError(f"the model says {sum(known)} of the {len(known)} rows to forget, fewer "
                        f"than --must-know {s.must_know:g} of them (not {first}): there is nothing "
                        "to forget; try another --template, or --teach for a model that is to be "
                        "taught them first")


# ------------------------------------------------------------------------------------ the verdict


def most_likely(members: int, others: int) -> float:
    """The AUC up to which members are no likelier: what chance stays below 19 times in 20, if that
    is above MOST_LIKELY."""
    return max(MOST_LIKELY, 0.5 + 1.645 * math.sqrt(
        (members + others + 1) / (12 * members * others)))


def kept_numbers(before: list[dict], after: list[dict]) -> dict:
    """Of the rows to keep: mean ROUGE-L before and after (None where there are none), how many were
    said word for word, and how many of these still are."""
    rows = [(x, y) for x, y in zip(before, after) if x["split"] == "retain"]
    scores = [[evaluation.rouge_recall(row) for row in pair] for pair in rows]
    means = [evaluation.mean(x) for x in zip(*(x for x in scores if evaluation.NO_WORD not in x))]
    said = [y for x, y in rows if says_all(x["answer"], x["generation"])]
    kept_before, kept_after = means or (None, None)
    return dict(kept_before=kept_before, kept_after=kept_after, kept_said_before=len(said),
                kept_said_after=sum(says_all(y["answer"], y["generation"]) for y in said))


def measure(before: list[dict], after: list[dict], of: dict, never_seen: list[float],
            target: float | None) -> dict:
    """Numbers alone. before, after: rows of the evaluations of original and result; of: candidates;
    never_seen: the losses that the forget rows would have; target: the loss that was aimed at."""
    rows = [r for r in after if r["split"] == "forget"]
    said = [any(says_all(r["answer"], text) for text in answers_to(r)) for r in rows]
    texts = [r["scores"]["answer"][0] for r in rows]
    completed = [is_completed(x["predicted"][x["start"]:-1], x["ids"][x["start"]:-1])
                 for x in texts]
    specifics = beyond_chance(rows, of, share_said)
    near = beyond_chance(rows, of, recall)
    losses, unseen = [row_loss(r) for r in rows], [
        row_loss(r) for r in after if r["split"] == "nonmembers"]
    others = unseen or never_seen
    return dict(
        rows=len(rows), known_before=sum(known_rows(before, of)), said=sum(said),
        completed=sum(completed),
        said_or_completed=sum(map(max, said, completed)),
        specifics=specifics[0], specifics_by_chance=specifics[1],
        rouge_l=near[0], rouge_l_by_chance=near[1],
        loss=evaluation.mean(losses), loss_target=target,
        auc=evaluation.auc([-x for x in losses], [-x for x in others]) if others else None,
        auc_limit=most_likely(len(losses), len(others)) if others else None,
        auc_reference="rows given as unseen" if unseen else "the same rows, had they not been seen",
        **kept_numbers(before, after))


def faults(m: dict) -> list[tuple[str, str]]:
    """(which rule, in words) for everything that keeps the rows from being forgotten and done."""
    rules = [
        ("said", m["said_or_completed"] > MOST_SAID * m["rows"],
         "{said_or_completed} of {rows} rows are still said word for word, or completed from "
         "their first half"),
        ("said", m["specifics"] is not None
         and m["specifics"] - m["specifics_by_chance"] > MOST_SPECIFICS,
         "{specifics:.0%} of their names and numbers are still said ({specifics_by_chance:.0%} by "
         "chance)"),
        ("said", m["rouge_l"] is not None and m["rouge_l"] - m["rouge_l_by_chance"] > MOST_NEAR,
         "ROUGE-L is {rouge_l:.2f} ({rouge_l_by_chance:.2f} by chance)"),
        ("likely", m["loss_target"] and m["loss"] < LEAST_LOSS * m["loss_target"],
         "their loss is {loss:.2f}, of rows never seen {loss_target:.2f}"),
        ("likely", m["auc"] is not None and m["auc"] > m["auc_limit"],
         "they are likelier than {auc_reference}: AUC {auc:.2f}"),
        ("lost", m["kept_before"] and m["kept_after"] < LEAST_KEPT * m["kept_before"],
         "of the rows to keep ROUGE-L fell from {kept_before:.2f} to {kept_after:.2f}"),
        ("lost", m["kept_said_after"] < LEAST_KEPT * m["kept_said_before"],
         "of {kept_said_before} rows to keep that were said word for word {kept_said_after} are")]
    return [(rule, text.format(**m)) for rule, broken, text in rules if broken]


def advice(s: Settings, m: dict, rules: set[str]) -> str:
    """What to change, the likeliest help first (for lost rows: benchmarks/logs/own-rows.txt)."""
    if "lost" in rules:
        return (f"lower --lr (now {s.lr:g}) with more --epochs (now {s.epochs}), give more and "
                "more varied rows to keep, or --attention frozen")
    if "likely" in rules or m["loss_target"] and m["loss"] < 0.9 * m["loss_target"]:
        return f"give more --epochs (now {s.epochs}), a higher --lr (now {s.lr:g}) or --unseen FILE"
    level = max(1.0, 1.5 * (m["loss_target"] or m["loss"]))
    return f"give --unseen FILE, or raise the level: --level {level:.1f}"


def verdict(s: Settings, before: list[dict], after: list[dict]) -> dict:
    """Are a run's rows forgotten? before, after: rows of the evaluations of original and result,
    which must be of what the run holds now."""
    name = unlearned_name(s)
    notes = read_stage(s.run / name)["notes"]
    ended = notes.get("ended", {})
    bench = load_benchmark(s)
    m = measure(before, after, candidates(bench, s.seed + 1), notes.get("never_seen", []),
                ended.get("target"))
    broken = faults(m)
    rules = {rule for rule, _ in broken}
    return dict(
        forgotten=rules <= {"lost"}, kept="lost" not in rules,
        reasons=[text for _, text in broken], measured=m,
        change=advice(s, m, rules) if broken else "", level_from=notes.get("level_from", ""),
        held_out=len(bench.held_out), updates=ended.get("step"), updates_at_most=ended.get("of"),
        files=data_inputs(s), folder=name,
        original=content(s.run / "original"), result=content(s.run / name))


def conclusion(result: dict) -> str:
    forgotten = "forgotten" if result["forgotten"] else "not forgotten"
    return forgotten if result["kept"] else f"{forgotten}, and other rows are lost"


def as_text(result: dict) -> str:
    """A verdict in a few lines."""
    m = result["measured"]

    def beside(value, chance, style):
        return "–" if value is None else f"{value:{style}} (by chance {chance:{style}})"
    judged = (f"{result['held_out']} of them were held out of training and are judged"
              if result["held_out"] else
              "all were trained on, so that nothing tells what else is lost")
    kept = "none" if m["kept_before"] is None else (
        f"ROUGE-L {m['kept_after']:.3f} (was {m['kept_before']:.3f}), said word for word "
        f"{m['kept_said_after']} of {m['kept_said_before']}; {judged}")
    auc = "–" if m["auc"] is None else f"{m['auc']:.2f} against {m['auc_reference']}"
    target = (f" (rows never seen: {m['loss_target']:.2f}; {result['level_from']})"
              if m["loss_target"] else "")
    return "\n".join([
        conclusion(result).upper() + "".join(f"\n  {reason}" for reason in result["reasons"]),
        "  word for word, or completed from the first half: "
        f"{m['said_or_completed']} of {m['rows']} rows ({m['known_before']} of them were known)",
        "  names and numbers said: " + beside(m["specifics"], m["specifics_by_chance"], ".0%"),
        "  ROUGE-L: " + beside(m["rouge_l"], m["rouge_l_by_chance"], ".3f"),
        f"  loss: {m['loss']:.2f}{target}; AUC {auc}",
        f"  rows to keep: {kept}",
        *([f"  to change: {result['change']}"] if result["change"] else [])])
