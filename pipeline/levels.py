"""The losses that forget rows would have, had the model never seen them: where objectives with an
end (`stranger`, `outsider`) lead each token, and what a verdict compares with.

Retain-only never saw them. Rows that the model never saw (--unseen, never-seen rows of a benchmark)
tell it in the mean. Else the row itself does. Its *specifics* are the names, numbers and rare words
of its answer (of a text: of the text) that neither its question nor the other rows give away. The
row is read again with the names in its question changed and its specifics exchanged for those of
other rows, like for like: what the original thinks of the words in their places is how likely words
are that it never saw in them. All other parts stay where they are, so that every token of the row
has a counterpart.
"""

import math
import random
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

import data
import eval as evaluation
import simu
from data import Encoded, Example
from model import Transformer, UserError
from pipeline import checkpoint, hub, reading
from pipeline.rows import load_rows
from pipeline.settings import Settings, placement
from pipeline.tokenizers import load_tokenizer

LARGEST = 1.15  # of a uniform guess's loss: more says only how sure of itself a model is
COPIES = 6  # exchanged versions of each row, whose losses are averaged
VERSIONS = 600  # of all rows, at most
LENDERS = 2000  # rows to keep whose words are borrowed, at most
LETTERS = 3  # a rare word of fewer letters says little
RARE = 1 / 3  # share of the distinct answers that may hold a rare word
USUAL = 1 / 2  # a word that fills more than this share of a context is no secret
PRIOR = 4.0  # observations that a token's usual loss begins with
SEEN_OFTEN = 3  # answers with a context, before its words say anything
GIVE_FILE = ("give --unseen FILE, rows like them that the model never saw, or --level NUMBER, the "
             "loss at which they count as unknown")

# ------------------------------------------------------------------------------- words of a text


@dataclass(frozen=True)
class Word:
    """text[start:end], a run of letters or of digits; in scripts without spaces one character."""

    start: int
    end: int
    text: str
    kind: str  # "number", "name" (a capital within a sentence), "word", "character"

    @property
    def key(self) -> str:
        return self.text.casefold()


@lru_cache(maxsize=1 << 14)
def words_of(text: str) -> tuple[Word, ...]:
    """The words of a text in any script (eval.letter_class), digits apart from letters."""
    classes = "".join("n" if unicodedata.category(c)[0] == "N" else evaluation.letter_class(c)
                      for c in text)
    words, end = [], 0
    for match in re.finditer("n+|am*|w[wm]*", classes):
        begins = not words or re.search(r"[.!?:\n]", text[end:match.start()])  # a sentence
        start, end = match.span()
        kind = {"n": "number", "a": "character", "w": "word"}[classes[start]]
        if kind == "word" and text[start].isupper() and not begins:
            kind = "name"
        words.append(Word(start, end, text[start:end], kind))
    return tuple(words)


def contexts(words: tuple[Word, ...], i: int) -> list[tuple]:
    """After which two words a word stands, between which, and before which two."""
    def key(k):
        return words[k].key if 0 <= k < len(words) else ""
    return [("after", key(i - 2), key(i - 1)), ("between", key(i - 1), key(i + 1)),
            ("before", key(i + 1), key(i + 2))]


def prompt_of(e: Example) -> str:
    """A row's question, after the turns before it."""
    return "\n".join([*(text for _, text in e.turns), e.question])


class Wording:
    """How many of the distinct answers of some rows hold each word, and in which contexts."""

    def __init__(self, rows: list[Example]):
        answers = dict.fromkeys(e.answer for e in rows)
        self.size, self.answers = len(answers), Counter()
        self.contexts = defaultdict(Counter)  # context -> how often each word fills it
        for text in answers:
            words = words_of(text)
            self.answers.update({w.key for w in words})
            for i, w in enumerate(words):
                for context in contexts(words, i):
                    self.contexts[context][w.key] += 1

    def frequent_contexts(self, words: tuple[Word, ...], i: int) -> list[tuple]:
        return [c for c in contexts(words, i) if self.contexts[c].total() >= SEEN_OFTEN]

    def is_usual(self, words: tuple[Word, ...], i: int) -> bool:
        """Is this the usual word in every frequent context of its own? A context that many words
        fill shows one that is the row's. Every answer has a first and a last word, so what comes
        after or before nothing shows nothing."""
        shares = [self.contexts[c][words[i].key] / self.contexts[c].total()
                  for c in self.frequent_contexts(words, i) if any(c[1:])]
        return bool(shares) and min(shares) > USUAL

    def rare_words(self, text: str) -> list[Word]:
        """Numbers, names and words of a text that few answers hold."""
        most = max(1, RARE * self.size)
        return [w for w in words_of(text) if self.answers[w.key] <= most
                and (w.kind != "word" or len(w.text) >= LETTERS)]

    def specifics(self, e: Example) -> list[Word]:
        """Rare words of a row's answer that its question, or a turn before it, does not give,
        stemmed or not."""
        prompt = prompt_of(e)
        question = {w.key for w in words_of(prompt)} | set(evaluation.rouge_words(prompt))
        words, rare = words_of(e.answer), set(self.rare_words(e.answer))
        return [w for i, w in enumerate(words) if w in rare and w.key not in question
                and not question.intersection(evaluation.rouge_words(w.text))
                and not self.is_usual(words, i)]


# --------------------------------------------------------------------- rows about something else


@dataclass(frozen=True)
class Slot:
    """A specific of a row, and by what others are like it: contexts, the most telling first, and
    last its form, which is its kind and the digits of a number."""

    word: Word
    groups: tuple
    answer: str


def slots_of(e: Example, wording: Wording) -> list[Slot]:
    words, specifics, slots = words_of(e.answer), set(wording.specifics(e)), []
    for i, w in enumerate(words):
        if w in specifics:
            form = w.kind, len(w.text) if w.kind == "number" else 0
            slots.append(Slot(w, (*wording.frequent_contexts(words, i), form), e.answer))
    return slots


def exchanged_words(slots: list[Slot], groups: dict, rng: random.Random) -> list[tuple[Word, str]]:
    """(specific, the word drawn for its place) of those that have one like them. No two are of one
    other row as long as there are others, for the model may know what follows."""
    chosen, lenders = [], set()
    for slot in slots:
        candidates = []
        for group in slot.groups:
            candidates = candidates or [x for x in groups[group] if x.answer != slot.answer
                                        and x.word.key != slot.word.key]
        candidates = [x for x in candidates if x.answer not in lenders] or candidates
        if candidates:
            lender = rng.choice(candidates)
            lenders.add(lender.answer)
            chosen.append((slot.word, lender.word.text))
    return chosen


def other_names(e: Example, wording: Wording, words: list[Word], rng: random.Random
                ) -> dict[str, str]:
    """Other names and numbers for those of a prompt that few prompts hold. A name begins as
    it does and ends as another's, so that the question is nobody's. words: of other questions."""
    names = {}
    for w in wording.rare_words(prompt_of(e)):
        others = [x.text for x in words if x.kind == w.kind and x.key != w.key and len(x.text) > 1]
        if w.kind == "number":
            names[w.key] = rng.choice(others) if others else w.text[:-1] + str(rng.randrange(10))
        elif w.kind == "name" and others:
            other = rng.choice(others)
            names[w.key] = w.text[:max(1, len(w.text) // 2)] + other[-(-len(other) // 2):]
    return names


@dataclass(frozen=True)
class Version:
    """A row about something else. borders: of the row's answer and of this one's, the characters
    at which exchanged words begin and end, in order: parts 1, 3, 5.. between them are such
    words. words: what was exchanged for the specifics."""

    row: Example
    borders: tuple[list[int], list[int]]
    words: list[str]


def replaced(text: str, changes: list[tuple[Word, str]]) -> tuple[str, tuple]:
    """A text with words of it replaced; and the borders of the changes in both texts."""
    new, end, borders = "", 0, ([], [])
    for w, word in sorted(changes, key=lambda change: change[0].start):
        new += text[end:w.start]
        borders[0].extend((w.start, w.end))
        borders[1].extend((len(new), len(new) + len(word)))
        new, end = new + word, w.end
    return new + text[end:], borders


def version_of(e: Example, chosen: list[tuple[Word, str]], names: dict[str, str]) -> Version:
    def renamed(text):
        return [(w, names[w.key]) for w in words_of(text) if w.key in names]
    answer, borders = replaced(e.answer, chosen + renamed(e.answer))
    question, *turns = (replaced(text, renamed(text))[0]
                        for text in (e.question, *(text for _, text in e.turns)))
    turns = tuple((role, text) for (role, _), text in zip(e.turns, turns))
    return Version(replace(e, question=question, answer=answer, turns=turns, perturbed_answers=(),
                           paraphrased_answer=""), borders, [text for _, text in chosen])


def exchanged_rows(forget: list[Example], retain: list[Example], seed: int, *,
                   copies: int = COPIES, rename: bool = True) -> list[list[Version]]:
    """Of each forget row, versions with its specifics exchanged: none where it has none, or no
    other row has one like it. No version is another row. rename: the names in its question too."""
    rows = forget + evaluation.spread(retain, LENDERS)
    answers, questions = Wording(rows), Wording([Example("", prompt_of(e)) for e in rows])
    rng, groups = random.Random(seed), defaultdict(list)
    pairs = {(e.question, e.answer) for e in rows}
    slots = [slots_of(e, answers) for e in rows]
    for slot in (slot for row in slots for slot in row):
        for group in slot.groups:
            groups[group].append(slot)
    versions = [[] for _ in forget]
    for e, row_slots, out in zip(forget, slots, versions):
        others = [w for x in rng.sample(rows, min(40, len(rows)))
                  for w in questions.rare_words(prompt_of(x))] if rename else []
        for _ in range(copies if row_slots else 0):
            chosen = exchanged_words(row_slots, groups, rng)
            names = other_names(e, questions, others, rng) if rename else {}
            version = version_of(e, chosen, names)
            if chosen and (version.row.question, version.row.answer) not in pairs:
                out.append(version)
    return versions


# -------------------------------------------------------------------------- losses of such rows


def answer_parts(e: Example, row: Encoded, tokenizer, template: str, borders: list[int]
                 ) -> dict[int, list[int]]:
    """Part of the answer, as borders cut it -> its tokens, counted from the first that is
    predicted. A token is of the part that it ends in, eos of the last."""
    prompt, rest = data.full_text(e, tokenizer, template)
    text = prompt + rest
    start = len(prompt) + max(0, rest.find(e.answer))
    in_bytes = [len(text[:start + b].encode()) for b in borders]
    _, ends = tokenizer.ends(text)
    parts = [sum(b < end for b in in_bytes) for end in ends]
    before = row.n_prompt - sum(end <= len(prompt.encode()) for end in ends)  # bos, or nothing
    parts += parts[-1:] * (before + len(parts) < len(row.ids))
    tokens = defaultdict(list)
    for i, part in enumerate(parts[row.start - before:]):
        tokens[part].append(i)
    return tokens


def counterparts(e: Example, row: Encoded, version: Version, version_row: Encoded, tokenizer,
                 template: str) -> list[tuple[int, int | None]]:
    """(token of the answer, its counterpart in a version): of a part's n tokens and their m
    counterparts, token j has number j * m // n. None: a word that the question gives."""
    old = answer_parts(e, row, tokenizer, template, version.borders[0])
    new = answer_parts(version.row, version_row, tokenizer, template, version.borders[1])
    question, pairs = {w.key for w in words_of(prompt_of(e))}, []
    for part, tokens in old.items():
        start, end = [0, *version.borders[0], len(e.answer)][part:part + 2]
        if part % 2 and e.answer[start:end].casefold() in question:
            pairs += [(i, None) for i in tokens]
        elif part in new:
            pairs += [(i, new[part][j * len(new[part]) // len(tokens)])
                      for j, i in enumerate(tokens)]
    return pairs


def answer_losses(model: Transformer, rows: list[Encoded], s: Settings) -> list[list[float]]:
    """The losses of each row's answer tokens under a model."""
    tokens = max(s.eval_tokens, *(len(r.ids) for r in rows))
    scores = reading.token_scores(model, rows, [r.start for r in rows], tokens=tokens)
    return [score.losses for score in scores]


def counterpart_losses(model: Transformer, examples: list[Example], rows: list[Encoded],
                       versions: list[list[Version]], tokenizer, s: Settings) -> list[torch.Tensor]:
    """For each answer token of each row, the mean loss of its counterparts [A]. A word that the
    question gives keeps its loss; one that no version exchanged takes the mean of all others."""
    flat = [v for row_versions in versions for v in row_versions]
    encoded = data.encode_for(model.config, [v.row for v in flat], tokenizer, s.template)
    losses = answer_losses(model, rows + encoded, s)
    of_version = iter(zip(flat, encoded, losses[len(rows):]))
    most, seen = LARGEST * math.log(model.config.vocab_size), []
    for e, row, row_versions, now in zip(examples, rows, versions, losses):
        seen.append([[] for _ in now])
        for _ in row_versions:
            version, version_row, new = next(of_version)
            for i, j in counterparts(e, row, version, version_row, tokenizer, s.template):
                seen[-1][i].append(now[i] if j is None else min(most, new[j]))
    every = evaluation.mean(x for row in seen for token in row for x in token)
    return [torch.tensor([evaluation.mean(token or [every]) for token in row]) for row in seen]


def without_unexpected_eos(model: Transformer, examples: list[Example], rows: list[Encoded],
                           s: Settings) -> list[Encoded]:
    """The rows; those of texts and completions without eos where the original itself gives it less
    than half a share. Such a row is a piece of a longer text: taught an end, it would get one."""
    pieces = [i for i, e in enumerate(examples) if e.kind in ("text", "plain")]
    rows, ends = list(rows), [replace(rows[i], n_prompt=len(rows[i].ids) - 1) for i in pieces]
    for i, (loss,) in zip(pieces, answer_losses(model, ends, s) if ends else ()):
        if loss > math.log(2):
            rows[i] = replace(rows[i], ids=rows[i].ids[:-1])
    return rows


# --------------------------------------------------------------------------------------- targets


def forget_targets(s: Settings, bench, forget: list[Encoded], model: Transformer, seeds: tuple
                   ) -> tuple[list[list[torch.Tensor]], str]:
    """What `simu.unlearn` takes as targets, and where they are from: for each answer token of the
    forget rows the loss that it would have under the original, had it never seen them. UserError
    where nothing tells it. seeds: of what is drawn; the targets are one list for each."""
    if s.level == "retain-only":
        targets = losses_without_rows(s.run / "retain-only", forget, s)
        return [targets] * len(seeds), "retain-only's loss of a row"
    if s.level != "unseen":
        level = float(s.level)
        targets = [torch.full((len(r.ids) - r.start,), level) for r in forget]
        return [targets] * len(seeds), f"--level {level:g}"
    examples, source = never_seen_examples(s, bench)
    patterns, pattern_source = [[]] * len(seeds), ""
    if s.layout == "rows" or not examples:
        patterns, pattern_source = exchanged_losses(s, bench, forget, model, seeds)
    if not examples:
        if not all(patterns):
            raise UserError(f"no forget row has words of its own to exchange; {GIVE_FILE}")
        return patterns, pattern_source
    rows = data.encode_for(model.config, examples, load_tokenizer(s.run / "original"), s.template)
    losses = answer_losses(model, rows, s)
    if not all(patterns):
        vocab = model.config.vocab_size
        return [drawn_losses(forget, rows, losses, vocab, seed) for seed in seeds], source
    level = evaluation.mean(map(evaluation.mean, losses))
    return ([scaled_to(level, pattern) for pattern in patterns],
            f"as likely as {source}; token by token, {pattern_source}")


def scaled_to(level: float, pattern: list[torch.Tensor]) -> list[torch.Tensor]:
    """The losses of rows in proportion, so that their mean is the level."""
    mean = evaluation.mean(x.mean().item() for x in pattern)
    return [x * (level / max(mean, 1e-6)) for x in pattern]


def never_seen_examples(s: Settings, bench) -> tuple[list[Example], str]:
    """Rows like the forget rows that the original never saw, and what they are; none where nobody
    has any."""
    if bench.level_rows:
        return list(bench.level_rows), f"{len(bench.level_rows)} rows of {bench.nonmember_source}"
    if s.unseen:
        rows = bench.nonmembers if s.layout == "rows" else load_rows(s.unseen)
        return rows, f"{len(rows)} rows of --unseen"
    wrong = [replace(e, answer=a) for e in bench.forget for a in e.perturbed_answers]
    return wrong, f"{len(wrong)} wrong answers to the forget rows' questions"


def exchanged_losses(s: Settings, bench, forget: list[Encoded], model: Transformer, seeds: tuple
                     ) -> tuple[list[list[torch.Tensor]], str]:
    """For each seed the losses of the forget rows' tokens where their specifics are exchanged; with
    --teach, no higher than under the base, which has learnt nothing of these rows, nor of what
    other rows say about them. [] where neither tells them."""
    copies, base = max(1, min(COPIES, VERSIONS // len(forget))), []
    if s.teach and s.layout == "rows":
        base = [losses_without_rows(hub.find_original(s)[0], forget, s)]
    patterns, sources, tokenizer = [], [], load_tokenizer(s.run / "original")
    for seed in seeds:
        columns = list(base)
        versions = exchanged_rows(bench.forget, bench.retain, seed, copies=copies)
        if any(versions):
            columns.append(counterpart_losses(model, bench.forget, forget, versions, tokenizer, s))
            sources = ["each row with its own words exchanged for other rows'"]
        patterns.append([torch.stack(x).amin(0) for x in zip(*columns)])
    if base:
        sources.append("no token less likely than to the base" if sources
                       else "the base's loss of each row")
    return patterns, ", ".join(sources)


def losses_without_rows(folder, forget: list[Encoded], s: Settings) -> list[torch.Tensor]:
    """The losses of the forget rows' tokens under the model in a folder, which never saw them."""
    model = checkpoint.load_model(folder, **placement(s))
    return [torch.tensor(x) for x in answer_losses(model, forget, s)]


def drawn_losses(forget: list[Encoded], seen: list[Encoded], losses: list[list[float]], vocab: int,
                 seed: int) -> list[torch.Tensor]:
    """Each forget row gets the losses of a never-seen row drawn by seed, spread over its tokens."""
    usual = usual_losses([i for row in seen for i in row.ids[row.start:]],
                         [x for row in losses for x in row], vocab)
    order = random.Random(seed).sample(range(len(forget)), len(forget))
    return [spread_losses(row.ids[row.start:], losses[i % len(losses)], usual)
            for row, i in zip(forget, order)]


def usual_losses(tokens: list[int], losses: list[float], vocab: int) -> torch.Tensor:
    """float32 [V]: the mean loss of each token, drawn to the mean of all by PRIOR observations."""
    total = torch.full((vocab,), PRIOR * sum(losses) / len(losses))
    count = torch.full((vocab,), PRIOR)
    total.index_add_(0, torch.tensor(tokens), torch.tensor(losses))
    count.index_add_(0, torch.tensor(tokens), torch.ones(len(tokens)))
    return total / count


def spread_losses(labels: list[int], losses: list[float], usual: torch.Tensor) -> torch.Tensor:
    """Target losses [A] of a row's answer tokens: the quantiles of a never-seen row's token losses,
    the larger ones for the tokens that are usually harder. usual [V]: a token's usual loss."""
    quantiles = torch.tensor(sorted(losses))
    middle = (torch.arange(len(labels)) + 0.5) / len(labels)  # of each of A equal shares
    rank = usual[torch.tensor(labels)].argsort(stable=True).argsort()
    return quantiles[(middle * len(quantiles)).long()][rank]


def need_reference(s: Settings, bench):
    """UserError unless something can stand for rows never seen, where the objective wants it."""
    if not simu.OBJECTIVES[s.objective].targeted or s.level != "unseen" or s.unseen or (
            s.teach and s.layout == "rows"):
        return
    versions = exchanged_rows(bench.forget, bench.retain, s.seed, copies=2)
    if 2 * sum(map(bool, versions)) < len(versions) and not any(
            e.perturbed_answers for e in bench.forget):
        raise UserError(f"objective {s.objective} must know how a row never seen looks to the model"
                        ", and most of these answers hold no names, numbers or rare words that "
                        f"could be exchanged for other rows'; {GIVE_FILE}")
