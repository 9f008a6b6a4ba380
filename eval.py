"""What a model still knows: metrics, the evaluation of a saved model, and the report.

Every number we print, defined once. f = forget, r = retain, RA = real authors, WF = world facts;
a, a' = answer and its paraphrase, w = a wrong answer, g = the greedy generation; loss(a) = mean
over the tokens of a (and one eos) of -log P(token | what comes before); p(a) = exp(-loss(a)).

name            formula                                               range  better        source
--------------  ----------------------------------------------------  -----  ------------  ---------
rouge_l         LCS(a, g) / |a| in stemmed words: ROUGE-L recall.     0..1   f low r high  TOFU,
                LUME: on sentence completions ("regurgitation")                            SemEval
exact_match     strip(a) = strip(g), case-folded.                     0..1   f low r high  SemEval
                LUME: on questions ("knowledge")
accuracy [D11]  f, r: asked the paraphrased question, g' is closest   0..1   f low r high  SOUL
                (ROUGE-L F1) to a' among a' and five w; ties share.
                RA, WF: a occurs in g, case-folded. Table 1's "EM";
                blind guessing gives about 1/6 on f and r
probability     f, r: p(a).  RA, WF: p(a) / (p(a) + sum p(w))         0..1   f low r high  TOFU
truth_ratio     R = mean p(w) / p(a'), a for a' on RA and WF.         0..1   high          TOFU
                f: mean min(R, 1/R).  others: mean max(0, 1 - R)
model_utility   harmonic mean of rouge_l, probability, truth_ratio    0..1   high          TOFU
                on r, RA, WF: nine numbers, six where RA is missing
forget_quality  p-value, two-sample KS test: forget rows of this      0..1   high          TOFU code
                model against those of retain-only, each row giving
                mean loss(w) - loss(a')
mia.auc [D12]   AUC of score = -loss(text); members = forget rows,    0..1   0.5 (paper:   SemEval
                non-members = text never trained on; text = prompt           low)
                and answer, all tokens but the first, no eos
mia.min_k       the same AUC for score = mean of the k% lowest        0..1   0.5           SOUL
                log P in the text, k = 10..60
mia.distance    |mia.auc - 0.5|                                       0..0.5 0             ours
mia.score       1 - 2 |mia.auc - 0.5|                                 0..1   high          SemEval
aggregate       mean(1 - EM_f, 1 - RL_f, 1 - mia.auc, EM_r, RL_r);    0..1   high          SIMU,
  [D13]         RL = rouge_l; EM = accuracy on TOFU, exact_match on                        Table 2
                LUME. aggregate_exact_match: exact_match on TOFU too
task_aggregate  harmonic mean of rouge_l and exact_match on three     0..1   high          SemEval
                LUME tasks, 1 - x for those of f; 0 if any is 0

SOUL judges closeness with a sentence encoder, we with ROUGE-L, which needs no second model. The
MIA text is the whole document, as in SemEval and SOUL: it is what was or was not trained on.
A metric whose data are missing is None, with the reason beside it; 0.0 always means zero.
"""

import dataclasses
import json
import math
import re
import sys
from bisect import bisect_left, bisect_right
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

import stage  # before torch: it silences a warning of torch's import

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import Encoded, Example
from model import Transformer, generate
from stage import Settings, Stage, UserError

MIN_K = (10, 20, 30, 40, 50, 60)  # percent
CHANCE = 0.5  # AUC of an attack that learns nothing
SPLITS = ("forget", "retain", "real_authors", "world_facts")
FACTS = ("real_authors", "world_facts")
TASKS = ("Task1", "Task2", "Task3")
LOGITS = 1 << 25  # logits held at once: 128 MiB of float32
KEEP_EVERY = 256  # generations between two writes of the file a killed evaluation goes on from

# -------------------------------------------------------------------------------------- Porter stem
# NLTK's dialect of the Porter stemmer (the one rouge_score uses): Porter (1980) with a few
# irregular words and softer rules. A word's shape is a string of c and v, one per letter.

IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing",
    "cannings": "canning", "canning": "canning", "howe": "howe", "proceed": "proceed",
    "exceed": "exceed", "succeed": "succeed",
}
STEP2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble",
    "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate",
    "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous",
    "aliti": "al", "iviti": "ive", "biliti": "ble", "fulli": "ful", "logi": "log",
}
STEP3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "",
         "ness": ""}
STEP4 = dict.fromkeys("al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive "
                      "ize".split(), "")


def _shape(word: str) -> str:
    """'toy' -> 'cvc': y is a vowel after a consonant, a consonant otherwise."""
    shape = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and shape[-1:] == "c")
        shape += "v" if vowel else "c"
    return shape


def _measure(stem: str) -> int:
    """Porter's m: how often a vowel is followed by a consonant."""
    return _shape(stem).count("vc")


def _short(stem: str) -> bool:
    """Porter's *o, 'hop' or 'of': a final e belongs on such a stem."""
    return _shape(stem) == "vc" or (_shape(stem)[-3:] == "cvc" and stem[-1] not in "wxy")


def _swap(word: str, table: dict[str, str], least: int) -> str:
    """Replace the longest suffix found in the table if the stem before it has measure >= least."""
    for size in range(min(7, len(word)), 1, -1):
        stem, suffix = word[:-size], word[-size:]
        if suffix in table:
            measured = stem + "l" if suffix == "logi" else stem  # so that 'geologi' loses its i
            allowed = suffix != "ion" or stem[-1:] in ("s", "t")
            return stem + table[suffix] if allowed and _measure(measured) >= least else word
    return word


def _plural(word: str) -> str:  # step 1a
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:  # step 1b
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    size = 2 if word.endswith("ed") else 3 if word.endswith("ing") else 0
    stem = word[:-size] if size else ""
    if "v" not in _shape(stem):
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1:] == stem[-2:-1] and _shape(stem)[-1] == "c":
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _short(stem) else stem


def _final_y(word: str) -> str:  # step 1c
    turns = word.endswith("y") and len(word) > 2 and _shape(word)[-2] == "c"
    return word[:-1] + "i" if turns else word


def _derived(word: str) -> str:  # step 2
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _derived(word[:-2])  # 'rationalli' -> 'rational' -> 'ration'
    return _swap(word, STEP2, 1)


def _final_e(word: str) -> str:  # step 5
    if word.endswith("e"):
        m = _measure(word[:-1])
        if m > 1 or (m == 1 and not _short(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


@lru_cache(maxsize=1 << 16)  # looping generations repeat a few words thousands of times
def porter_stem(word: str) -> str:
    """The Porter stem, as nltk.stem.PorterStemmer() gives it: 'relational' -> 'relat'."""
    word = word.lower()
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = _derived(_final_y(_past(_plural(word))))
    return _final_e(_swap(_swap(word, STEP3, 1), STEP4, 2))


# ------------------------------------------------------------------------------------- text metrics

Rouge = namedtuple("Rouge", "precision recall f1")


def rouge_words(text: str) -> list[str]:
    """Lower-case runs of ASCII letters and digits, stemmed if longer than three."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [porter_stem(w) if len(w) > 3 else w for w in words]


def _lcs(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a row of the usual table at once: bit i of `row` is
    0 where the row's value rises at a[i] (Hyyro's recurrence)."""
    where = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        match = row & where.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()


def rouge_l(reference: str, candidate: str) -> Rouge:
    """ROUGE-L over stemmed words, equal to rouge_score's `rougeL` with use_stemmer=True."""
    a, b = rouge_words(reference), rouge_words(candidate)
    common = _lcs(a, b)
    if not common:
        return Rouge(0.0, 0.0, 0.0)
    precision, recall = common / len(b), common / len(a)
    return Rouge(precision, recall, 2 * precision * recall / (precision + recall))


def exact_match(reference: str, candidate: str) -> bool:
    """Same string but for case and surrounding white space."""
    return reference.strip().casefold() == candidate.strip().casefold()


def contains(reference: str, candidate: str) -> bool:
    """The reference occurs in the candidate, whatever the case."""
    return reference.strip().casefold() in candidate.casefold()


def closest(truth: str, wrong: list[str], candidate: str) -> float:
    """1 if the candidate is closer (ROUGE-L F1) to the truth than to any wrong answer, else 0; a
    tie of n gives 1/n, so that an empty or senseless candidate scores what guessing would. [D11]"""
    ours = rouge_l(truth, candidate).f1
    others = [rouge_l(w, candidate).f1 for w in wrong]
    return 0.0 if max(others) > ours else 1 / (1 + others.count(ours))


# ----------------------------------------------------------------------------- membership inference


def auc(members: list[float], nonmembers: list[float]) -> float:
    """P(a member's score > a non-member's) + half P(equal): area under the ROC curve."""
    others = sorted(nonmembers)
    twice = sum(bisect_left(others, x) + bisect_right(others, x) for x in members)
    return twice / (2 * len(members) * len(others))


def min_k_score(losses: list[float], percent: int) -> float:
    """Min-K%: mean log-probability of the least likely k% of the tokens, at least one."""
    worst = sorted(losses, reverse=True)[: max(1, len(losses) * percent // 100)]
    return -math.fsum(worst) / len(worst)


def mia_score(area: float) -> float:
    """SemEval-2025 Task 4: 1 where the attack learns nothing, 0 where it never errs (or always)."""
    return 1 - 2 * abs(area - CHANCE)


# ----------------------------------------------------------------------------------- TOFU's metrics


def log_truth_ratio(paraphrased_loss: float, perturbed_losses: list[float]) -> float:
    """log R; kept in logs because unlearned models give losses whose exp(-loss) underflows."""
    least = min(perturbed_losses)
    total = math.fsum(math.exp(least - x) for x in perturbed_losses)
    return paraphrased_loss - least + math.log(total / len(perturbed_losses))


def choice_probability(loss: float, wrong_losses: list[float]) -> float:
    """p(a) / (p(a) + sum p(w)), without underflow."""
    least = min(loss, *wrong_losses)
    return math.exp(least - loss) / math.fsum(math.exp(least - x) for x in [loss, *wrong_losses])


def ks_p_value(a: list[float], b: list[float]) -> float:
    """Exact two-sided p-value of the two-sample Kolmogorov-Smirnov test, counted in integers.

    Orderings of the pooled samples are lattice paths from (0, 0) to (n, m); the p-value is the
    share of paths that somewhere stray from the diagonal at least as far as the observed one.
    """
    a, b, n, m = sorted(a), sorted(b), len(a), len(b)
    d = max(abs(bisect_right(a, x) * m - bisect_right(b, x) * n) for x in a + b)  # n * m * KS
    if d == 0:
        return 1.0
    inside = [0] * (m + 1)  # paths to (i, j) that stay strictly within d of the diagonal
    for i in range(n + 1):
        before = 0
        for j in range(m + 1):
            here = inside[j] + before if i or j else 1
            before = inside[j] = here if abs(i * m - j * n) < d else 0
    total = math.comb(n + m, n)
    return (total - inside[m]) / total


def harmonic_mean(values: list[float]) -> float:
    """0 if any value is 0."""
    return 0.0 if min(values) <= 0 else len(values) / math.fsum(1 / x for x in values)


# --------------------------------------------------------------------------------------- aggregates


def aggregate(*, em_forget: float, rouge_forget: float, mia: float, em_retain: float,
              rouge_retain: float) -> float:
    """The paper's aggregate score, from fractions (not percent). [D13]"""
    terms = (1 - em_forget, 1 - rouge_forget, 1 - mia, em_retain, rouge_retain)
    return math.fsum(terms) / len(terms)


def task_aggregate(forget: list[float], retain: list[float]) -> float:
    """SemEval-2025 Task 4: harmonic mean of the retain scores and of 1 - the forget scores."""
    return harmonic_mean([1 - x for x in forget] + list(retain))


# -------------------------------------------------------------------------------- what a model says


def evaluate_model(model: Transformer, tokenizer, benchmark: data.Benchmark, s: Settings, *,
                   limit: int = 0, resume: Path | None = None) -> tuple[dict, list[dict]]:
    """(metrics, rows): `metrics` is `summarise(rows)`, and rows[0] says what was evaluated.

    limit: at most so many rows of each split, spread evenly; marked as partial. resume: a file
    that keeps the generations so far, from which a killed evaluation goes on."""
    parts = {"forget": benchmark.forget, "retain": benchmark.retain_eval,
             "real_authors": benchmark.real_authors, "world_facts": benchmark.world_facts,
             "nonmembers": benchmark.nonmembers}
    rows = [{"split": "about", "benchmark": benchmark.kind, "limit": limit,
             "sizes": {k: len(v) for k, v in parts.items()},
             "nonmember_source": benchmark.nonmember_source, "shared": benchmark.shared}]
    document = "sc" if benchmark.kind == "lume" else "qa"  # kind of row the MIA is about [D12]
    for split, examples in parts.items():
        if split == "nonmembers":
            examples = [e for e in examples if e.kind == document]
        for e in spread(examples, limit):
            filled = {k: v for k, v in dataclasses.asdict(e).items() if v or k == "id"}
            if e.perturbed_answers:
                filled["perturbed_answers"] = list(e.perturbed_answers)  # as JSON gives it back
            rows.append({"split": split, **filled})
    _add_generations(rows, model, tokenizer, s, resume)
    _add_losses(rows, model, tokenizer, s, document)
    return summarise(rows), rows


def spread(examples: list, limit: int) -> list:
    """At most `limit` of them (0: all), evenly spaced: every task and author has its share."""
    n = len(examples)
    return [examples[i * n // limit] for i in range(limit)] if 0 < limit < n else examples


def _add_generations(rows, model, tokenizer, s: Settings, resume: Path | None):
    """Greedy answers, one for each question and one for each paraphrased question that accuracy
    needs [D16]. Longest prompts first, KEEP_EVERY at a time; `generate` makes the batches."""
    jobs = []
    for row in rows:
        if row["split"] in SPLITS:
            jobs.append((row, "generation", row["question"]))
            if row["split"] not in FACTS and has(row, "paraphrased_question", *CHOICE):
                jobs.append((row, "paraphrased_generation", row["paraphrased_question"]))
    prompts = [data.encode_prompt(question, tokenizer, s.template) for _, _, question in jobs]
    order = sorted(range(len(jobs)), key=lambda i: -len(prompts[i]))
    kept = _whole_lines(resume)
    for n, start in enumerate(range(0, len(order), KEEP_EVERY)):
        part = order[start:start + KEEP_EVERY]
        if n == len(kept):
            new = generate(model, [prompts[i] for i in part], eos_id=tokenizer.eos_id,
                           max_new_tokens=s.max_new_tokens or None,
                           max_total_tokens=s.max_total_tokens or None,
                           batch_tokens=s.eval_tokens, progress="generate")
            kept.append([tokenizer.decode(ids) for ids in new])
            if resume:
                with open(resume, "a", encoding="ascii") as file:
                    file.write(json.dumps(kept[-1]) + "\n")
        for i, text in zip(part, kept[n], strict=True):
            jobs[i][0][jobs[i][1]] = text


def _whole_lines(path: Path | None) -> list:
    """JSON lines of a file; what a killed process left torn at its end is cut off."""
    if path is None or not path.is_file():
        return []
    text, values, end = path.read_text(encoding="ascii", errors="replace"), [], 0
    for line in text.splitlines(keepends=True):
        try:
            values.append(json.loads(line if line.endswith("\n") else ""))
        except ValueError:
            break
        end += len(line)
    if end < len(text):
        stage.write_text(path, text[:end])
    return values


def _add_losses(rows, model, tokenizer, s: Settings, document: str):
    """Teacher-forced passes: `loss` of the answer, of its paraphrase and of the wrong answers
    (nats per token, eos counted), and `mia`, what the attack sees of a text."""
    jobs = []  # (row, key, answer, whether the prompt's tokens count too)
    for row in rows[1:]:
        attacked = row["split"] in ("forget", "nonmembers") and row["kind"] == document
        if attacked or (row["split"] in SPLITS and document == "qa"):
            jobs.append((row, "loss", row["answer"], attacked))
        if row["split"] in SPLITS:
            if "paraphrased_answer" in row:
                jobs.append((row, "paraphrased_loss", row["paraphrased_answer"], False))
            for wrong in row.get("perturbed_answers", []):
                jobs.append((row, "perturbed_losses", wrong, False))
    examples = [Example(row["question"], answer, id=row["id"]) for row, _, answer, _ in jobs]
    encoded = data.encode_all(examples, tokenizer, s.template,
                              context=model.config.max_position_embeddings,
                              vocab=model.config.vocab_size)
    first = [1 if job[3] else max(1, e.n_prompt) for job, e in zip(jobs, encoded)]
    losses = token_losses(model, encoded, first, tokens=s.eval_tokens)
    for (row, key, _, attacked), e, start, values in zip(jobs, encoded, first, losses):
        if not all(map(math.isfinite, values)):
            raise UserError(f"the model's loss on row {row['id']} is not a number: its weights "
                            "are broken; make or fetch it again")
        loss = mean(values[max(1, e.n_prompt) - start:])
        if key == "perturbed_losses":
            row.setdefault(key, []).append(loss)
        else:
            row[key] = loss
        if attacked:
            text = values[:-1]  # no eos: a document need not end where its excerpt does
            row["mia"] = {"loss": mean(text),
                          "min_k": {str(k): min_k_score(text, k) for k in MIN_K}}


@torch.inference_mode()
def token_losses(model: Transformer, rows: list[Encoded], first: list[int], *,
                 tokens: int) -> list[list[float]]:
    """-log P of each row's tokens from index first[i] (at least 1) to its end. Batches of like
    length hold at most `tokens`; only the positions asked for reach the lm_head."""
    device = model.embed_tokens.weight.device
    chunk = max(1, LOGITS // model.config.vocab_size)
    out = [[] for _ in rows]
    with tqdm(total=len(rows), desc="losses", unit="text") as bar:
        for part in data.batches_by_length(rows, tokens):
            ids = data.collate([rows[i] for i in part], device).ids  # [B, T]
            sizes = [len(rows[i].ids) - first[i] for i in part]
            b = torch.arange(len(part)).repeat_interleave(torch.tensor(sizes))
            t = torch.cat([torch.arange(first[i], len(rows[i].ids)) for i in part])
            h = model.hidden(ids)[b, t - 1]  # [sum of sizes, D]
            labels = ids[b, t]
            losses = torch.cat([F.cross_entropy(model.logits(x), y, reduction="none")
                                for x, y in zip(h.split(chunk), labels.split(chunk))])
            for i, values in zip(part, losses.split(sizes)):
                out[i] = values.tolist()
            bar.update(len(part))
    return out


# ----------------------------------------------------------------------------- from rows to metrics

CHOICE = ("paraphrased_answer", "perturbed_answers")


def has(row: dict, *keys: str) -> bool:
    return all(k in row for k in keys)


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _rouge(row):
    return rouge_l(row["answer"], row["generation"]).recall


def _exact(row):
    return float(exact_match(row["answer"], row["generation"]))


def _accuracy(row):
    if row["split"] in FACTS:
        return float(contains(row["answer"], row["generation"]))
    if not has(row, "paraphrased_generation", *CHOICE):
        return None
    return closest(row["paraphrased_answer"], row["perturbed_answers"],
                   row["paraphrased_generation"])


def _probability(row):
    if row["split"] not in FACTS:
        return math.exp(-row["loss"])
    if not has(row, "perturbed_losses"):
        return None
    return choice_probability(row["loss"], row["perturbed_losses"])


def _truth_ratio(row):
    if not has(row, "perturbed_losses"):
        return None
    log_r = log_truth_ratio(row.get("paraphrased_loss", row["loss"]), row["perturbed_losses"])
    if row["split"] == "forget":
        return math.exp(-abs(log_r))
    return max(0.0, -math.expm1(min(log_r, 0.0)))


TOFU_METRICS = {"rouge_l": _rouge, "exact_match": _exact, "accuracy": _accuracy,
                "probability": _probability, "truth_ratio": _truth_ratio}


def summarise(rows: list[dict]) -> dict:
    """Every metric of an evaluation from its rows alone, those of generations.jsonl.

    `values` maps a name like "forget.rouge_l" to a number or None, `notes` says why it is None."""
    about, values, notes = rows[0], {}, {}
    fill = _lume_values if about["benchmark"] == "lume" else _tofu_values
    fill(rows, values, notes)
    _mia_values(rows, about, values, notes)
    _aggregates(about["benchmark"], values, notes)
    if about.get("shared"):
        notes["forget"] = f"{about['shared']} of these rows are in the retain set too"
    counts = {split: sum(r["split"] == split for r in rows) for split in about["sizes"]}
    what = "sentence completions" if about["benchmark"] == "lume" else "questions with answers"
    members = sum("mia" in r for r in rows if r["split"] == "forget")
    return dict(benchmark=about["benchmark"],
                partial=f"at most {about['limit']} rows of each split" if about["limit"] else "",
                counts=counts, members=f"{members} {what} of the forget set",
                nonmembers=f"{counts['nonmembers']} {what}: {about['nonmember_source']}",
                values=values, notes=notes)


def _put(name: str, rows: list[dict], metric, values: dict, notes: dict):
    """The mean of a metric over rows, or None and why."""
    scores = [metric(row) for row in rows]
    missing = scores.count(None)
    values[name] = mean(scores) if rows and not missing else None
    if not rows:
        notes[name] = "no such rows"
    elif missing:
        notes[name] = (f"{missing} of {len(rows)} rows have no paraphrase or no wrong answers: "
                       "the _perturbed file is missing")


def _tofu_values(rows, values, notes):
    for split in SPLITS:
        own = [r for r in rows if r["split"] == split]
        for name, metric in TOFU_METRICS.items():
            _put(f"{split}.{name}", own, metric, values, notes)
    factors = [[values[f"{split}.{m}"] for m in ("rouge_l", "probability", "truth_ratio")]
               for split in SPLITS[1:]]
    if factors[1] == [None] * 3:  # the demo has no real authors
        del factors[1]
        notes["model_utility"] = "harmonic mean of six: there are no real authors"
    factors = [x for part in factors for x in part]
    if None in factors:
        values["model_utility"] = None
        notes["model_utility"] = "needs rouge_l, probability, truth_ratio of retain and world facts"
    else:
        values["model_utility"] = harmonic_mean(factors)


def _lume_values(rows, values, notes):
    for split in ("forget", "retain"):
        own = [r for r in rows if r["split"] == split]
        for task in (None, *TASKS):
            prefix = f"{split}.{task}" if task else split
            some = [r for r in own if task in (None, r["task"])]
            completions, questions = ([r for r in some if r["kind"] == k] for k in ("sc", "qa"))
            _put(f"{prefix}.rouge_l", completions, _rouge, values, notes)
            _put(f"{prefix}.exact_match", questions, _exact, values, notes)
    scores = [[values[f"{split}.{task}.{m}"] for task in TASKS for m in ("rouge_l", "exact_match")]
              for split in ("forget", "retain")]
    values["task_aggregate"] = None
    if None in scores[0] + scores[1]:
        notes["task_aggregate"] = "needs both scores of all three tasks, forget and retain"
    else:
        values["task_aggregate"] = task_aggregate(*scores)


def _mia_values(rows, about, values, notes):
    members = [r["mia"] for r in rows if r["split"] == "forget" and "mia" in r]
    others = [r["mia"] for r in rows if r["split"] == "nonmembers"]
    names = ["mia.auc", "mia.distance", "mia.score", *(f"mia.min_{k}" for k in MIN_K)]
    if not members or not others:
        lacks = about["nonmember_source"] if not others else "the forget rows hold no document"
        values.update(dict.fromkeys(names))
        notes.update(dict.fromkeys(names, lacks))
        return
    area = auc([-m["loss"] for m in members], [-m["loss"] for m in others])  # [D12]
    values.update({"mia.auc": area, "mia.distance": abs(area - CHANCE),
                   "mia.score": mia_score(area)})
    for k in MIN_K:
        values[f"mia.min_{k}"] = auc(*([m["min_k"][str(k)] for m in x] for x in (members, others)))
    if area < CHANCE:
        notes["mia.auc"] = "below 0.5: over-unlearned, the forgetting itself is detectable"


def _aggregates(benchmark: str, values, notes):
    tofu = benchmark == "tofu"
    kinds = {"aggregate": "accuracy" if tofu else "exact_match"}  # [D11], [D13]
    if tofu:
        kinds["aggregate_exact_match"] = "exact_match"
    for name, em in kinds.items():
        terms = dict(em_forget=f"forget.{em}", rouge_forget="forget.rouge_l", mia="mia.auc",
                     em_retain=f"retain.{em}", rouge_retain="retain.rouge_l")
        known = {term: values[source] for term, source in terms.items()}
        lacking = [source for source in terms.values() if values[source] is None]
        values[name] = None if lacking else aggregate(**known)
        if lacking:
            notes[name] = f"needs {', '.join(lacking)}"


# ------------------------------------------------------------------------- evaluating a run's model

DEPENDS = ("benchmark", "model", "seed", "dtype", "forget_split", "retain_split", "forget_groups",
           "retain_groups", "rows_per_author", "lume_fraction", "template", "weights",
           "max_new_tokens", "max_total_tokens")


def _inputs(model_folder: Path, s: Settings) -> dict[str, str]:
    return dict(model=stage.fingerprint(model_folder), **data.data_digests(s))


def evaluate(run: Path, name: str, *, limit: int = 0, force: bool = False):
    """RUN/STAGE/eval (eval-limit-N for a quick look): metrics.json and generations.jsonl."""
    s = dataclasses.replace(stage.read_settings(run), force=force)
    if Path(name).name != name:
        raise UserError(f"{name} is not the bare name of a stage in {run}, such as original")
    folder = run / name
    job = Stage(folder / (f"eval-limit-{limit}" if limit else "eval"), settings=s, fields=DEPENDS,
                inputs=_inputs(folder, s), modules=("data", "model", "eval"))
    if job.done:
        return
    with job as made:
        benchmark, tokenizer = data.load_benchmark(s), data.load_tokenizer(folder)
        model = Transformer.from_pretrained(folder, **stage.placement(s))
        so_far = made / stage.RESUME / "generations.jsonl"
        metrics, rows = evaluate_model(model, tokenizer, benchmark, s, limit=limit, resume=so_far)
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        stage.write_text(made / "generations.jsonl", "\n".join(lines) + "\n")
        stage.write_json(made / "metrics.json", metrics)


def read_rows(folder: Path) -> list[dict]:
    """The rows of an evaluation folder's generations.jsonl."""
    path = folder / "generations.jsonl"
    try:
        rows = [json.loads(x) for x in path.read_text(encoding="utf-8").split("\n") if x]
        if rows[0]["split"] == "about":
            return rows
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run `python eval.py evaluate` on that stage") from None
    except (ValueError, LookupError, TypeError):
        pass
    raise UserError(f"{path} is not what an evaluation writes; delete {folder} and evaluate again")


def check_fresh(run: Path, s: Settings, folder: Path, evaluation: Path):
    """Refuse numbers of another model, other data or other settings than the folder now holds."""
    limit = evaluation.name.partition("limit-")[2]
    again = f"run `python eval.py evaluate {run} {folder.name}" + (
        f" --limit {limit}` again" if limit else "` again")
    made = stage.read_stage(evaluation)["why"]
    now = _inputs(folder, s)
    for name in made["inputs"] | now:
        if made["inputs"].get(name) != now.get(name):
            what = "the model now in its folder" if name == "model" else f"today's {name}"
            raise UserError(f"{evaluation} is not of {what}; {again}")
    if made["settings"] != stage.resolved(s, DEPENDS):
        raise UserError(f"{evaluation} was made under other settings than {run}/settings.json; "
                        f"{again}")
    made_of = stage.read_stage(folder)["why"]["inputs"]
    for source in made_of:
        if (source == "original" or source.split("-")[0] == "mask") and (
                made_of[source] != stage.fingerprint(run / source)):
            raise UserError(f"{folder} was unlearned with another {source} than {run}/{source}; "
                            "run that stage again")


# --------------------------------------------------------------------------------------------- main


def main(argv=None):
    parser = stage.parser("eval.py", "Evaluate the models of a run, and lay them side by side.")
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="evaluate|check|report")
    one = commands.add_parser("evaluate", help="metrics.json and generations.jsonl of stages")
    one.add_argument("run", type=Path)
    one.add_argument("stages", nargs="*", default=[], metavar="STAGE",
                     help="e.g. original simu-graddiff; default: every model of the run")
    one.add_argument("--limit", type=int, default=0,
                     help="at most so many rows of each split: a quick look, marked as partial")
    one.add_argument("--force", action="store_true", help="evaluate again what is evaluated")
    check = commands.add_parser("check", help="evaluate the original; stop unless it knows the "
                                              "forget set (--must-know)")
    check.add_argument("run", type=Path)
    two = commands.add_parser("report", help="report.md and report.json of a run")
    two.add_argument("run", type=Path)
    two.add_argument("--runs", type=Path, nargs="+", default=[], metavar="RUN",
                     help="the same run under other seeds; default: RUN-seed*")
    two.add_argument("--retain-only", type=Path, metavar="STAGE_FOLDER",
                     help="an evaluated model that never saw the forget set; default: RUN's own")
    two.add_argument("--recompute", action="store_true",
                     help="compute every number again from generations.jsonl, and compare")
    args = parser.parse_args(argv)
    if args.command == "report":
        from report import report  # builds on this module
        return report(args.run, others=args.runs, retain_only=args.retain_only,
                      recompute=args.recompute)
    if args.command == "check":
        from report import check_original
        evaluate(args.run, "original")
        return check_original(args.run)
    if args.limit < 0:
        raise UserError(f"--limit is {args.limit}; it must be 0 (all rows) or more")
    stages = args.stages or stage.finished_models(args.run)
    if not stages:
        raise UserError(f"{args.run} holds no finished model; `bash run.sh demo` makes one")
    with stage.lock(args.run):
        for name in stages:
            evaluate(args.run, name, limit=args.limit, force=args.force)


if __name__ == "__main__":
    stage.run_cli(lambda: main(sys.argv[1:]))
