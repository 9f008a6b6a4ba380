"""How a row that the model never saw would look to it, where nobody gave such rows.

A row's *own words* are those of its answer (of a text: of the text) that neither its question nor
the other rows give away: names, numbers and rare words. Each forget row is read again as if of
something else: names in its question changed, its own words exchanged for other rows', like for
like, and never for those of a row that says the same. What the original then thinks of what stands
in their places is how likely words are that it never saw there. Nothing of such a row is what is to
be forgotten, and its parts stand where they stood, so that every token of the forget row has a
counterpart.
"""

import math
import random
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache

from data import Encoded, Example, encode_for, full_text, template_of
from eval import mean, rouge_words, spread

LARGEST = 1.15  # of a uniform guess's loss: more says only how sure of itself a model is
COPIES = 6  # exchanged versions of each row, whose losses are averaged
LENDERS = 2000  # rows to keep whose words are borrowed, at most
LETTERS = 3  # a rare word of fewer says little
RARE = 1 / 3  # share of the distinct answers in which a rare word may stand
USUAL = 1 / 2  # a word that stands in more than this share of the places like its own is no secret
SEEN_OFTEN = 3  # answers with such a place, before that says anything
SINGLE = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@dataclass(frozen=True)
class Word:
    """text[start:end], a run of letters or of digits; in scripts without spaces one character."""

    start: int
    end: int
    text: str
    kind: str  # "number", "name" (a capital within a sentence) or "word"

    @property
    def key(self) -> str:
        return self.text.casefold()


@lru_cache(maxsize=1 << 16)
def kind_of(c: str) -> str:
    """What a character is part of: "number", "word", "single" (a word of its own), "" (none)."""
    group = unicodedata.category(c)[0]
    if group == "N":
        return "number"
    if group not in "LM":
        return ""
    return "single" if group == "L" and unicodedata.name(c, "").startswith(SINGLE) else "word"


@lru_cache(maxsize=1 << 14)
def words_of(text: str) -> tuple[Word, ...]:
    """The words of a text, whatever its script."""
    words, start, n = [], 0, len(text)
    begins = True  # does a sentence begin here?
    while start < n:
        kind, end = kind_of(text[start]), start + 1
        if not kind:
            begins = begins or text[start] in ".!?:\n"
            start += 1
            continue
        while end < n and (unicodedata.category(text[end])[0] == "M" or (
                kind != "single" and kind_of(text[end]) == kind)):
            end += 1
        named = kind == "word" and text[start].isupper() and not begins
        words.append(Word(start, end, text[start:end], "number" if kind == "number" else
                          "name" if named else "word"))
        start, begins = end, False
    return tuple(words)


def neighbours(words: tuple[Word, ...], i: int) -> list[tuple]:
    """The places that a word stands in: after which two words, between which, before which two."""
    def at(k):
        return words[k].key if 0 <= k < len(words) else ""
    return [("after", at(i - 2), at(i - 1)), ("between", at(i - 1), at(i + 1)),
            ("before", at(i + 1), at(i + 2))]


class Usage:
    """In how many of the distinct answers of some rows each word stands, and in which places."""

    def __init__(self, rows: list[Example]):
        answers = dict.fromkeys(e.answer for e in rows)
        self.count, self.places = len(answers), defaultdict(Counter)
        self.answers = Counter()
        for text in answers:
            words = words_of(text)
            self.answers.update({w.key for w in words})
            for i, w in enumerate(words):
                for place in neighbours(words, i):
                    self.places[place][w.key] += 1

    def is_usual(self, words: tuple[Word, ...], i: int) -> bool:
        """Is this, in every place that often stands in the answers, the word that most have there?
        A place in which words vary shows one that is a row's own; but every answer has a first and
        a last word, whose places after or before nothing show nothing."""
        key = words[i].key
        shares = [self.places[place][key] / total for place in neighbours(words, i)
                  if any(place[1:]) and (
                      total := sum(self.places[place].values())) >= SEEN_OFTEN]
        return bool(shares) and min(shares) > USUAL

    def rare_words(self, text: str) -> list[Word]:
        """Numbers, names and words of a text that few answers hold."""
        return [w for w in words_of(text) if self.answers[w.key] <= max(1, RARE * self.count)
                and (w.kind != "word" or len(w.text) >= LETTERS or kind_of(w.text[0]) == "single")]

    def own_words(self, e: Example) -> list[Word]:
        """The own words of a row."""
        given, words = {w.key for w in words_of(e.question)}, words_of(e.answer)
        given |= set(rouge_words(e.question))
        rare = set(self.rare_words(e.answer))
        return [w for i, w in enumerate(words) if w in rare and w.key not in given
                and not given.intersection(rouge_words(w.text)) and not self.is_usual(words, i)]


@dataclass(frozen=True)
class OwnWord:
    """An own word of a row, and those of its places in which words vary."""

    word: Word
    slots: tuple
    answer: str

    @property
    def form(self):
        """What must agree where no slot says more: the kind, and the digits of a number."""
        return self.word.kind, len(self.word.text) if self.word.kind == "number" else 0


def own_words_in_place(e: Example, usage: Usage) -> list[OwnWord]:
    words, own = words_of(e.answer), set(usage.own_words(e))
    return [OwnWord(w, tuple(p for p in neighbours(words, i)
                             if sum(usage.places[p].values()) >= SEEN_OFTEN), e.answer)
            for i, w in enumerate(words) if w in own]


class Exchange:
    """Draws other rows' own words for a row's: from the same slot, else of the same form."""

    def __init__(self, own: list[list[OwnWord]], rng: random.Random):
        self.rng, self.groups = rng, defaultdict(list)
        for w in (w for row in own for w in row):
            for group in (*w.slots, w.form):
                self.groups[group].append(w)

    def draw(self, own: list[OwnWord]) -> dict[Word, str]:
        """Own word -> what stands in its place, for those of a row that have a like: no two words
        of one other row, as long as there are others, for the model may know what follows."""
        out, used = {}, set()
        for w in own:
            choices = []
            for group in (*w.slots, w.form):
                choices = choices or [x for x in self.groups[group] if x.answer != w.answer
                                      and x.word.key != w.word.key]
            choices = [x for x in choices if x.answer not in used] or choices
            if choices:
                x = self.rng.choice(choices)
                used.add(x.answer)
                out[w.word] = x.word.text
        return out


@dataclass(frozen=True)
class Version:
    """A row as if of something else: words of its question exchanged there and in the answer, and
    its own words. The borders are where its parts meet in both answers: characters at which
    exchanged words begin and end, as many here as there."""

    row: Example
    own_borders: list[int]
    new_borders: list[int]

    @property
    def exchanged(self) -> list[str]:
        """What stands in the exchanged words' places."""
        ends = iter(self.new_borders)
        return [self.row.answer[start:end] for start, end in zip(ends, ends)]


def spliced(a: str, b: str) -> str:
    """A name that is neither: how the one begins and the other ends."""
    end = b[-(-len(b) // 2):]
    return a[:max(1, len(a) // 2)] + (end if a[:1].isupper() or not b[:1].isupper() else
                                      end.casefold())


def other_names(e: Example, asked: Usage, questions: list[Example], rng: random.Random
                ) -> dict[str, str]:
    """For the words of a question that few questions have, others: parts of two other rows' such
    words, so that the question is nobody's."""
    names = {}
    for w in asked.rare_words(e.question):
        alike = [x.text for other in rng.sample(questions, min(40, len(questions)))
                 for x in asked.rare_words(other.question)
                 if x.kind == w.kind and x.key != w.key and len(x.text) > 1]
        if w.kind == "number":
            names[w.key] = rng.choice(alike) if alike else w.text[:-1] + str(rng.randrange(10))
        elif w.kind == "name" and alike:
            names[w.key] = spliced(w.text, rng.choice(alike))
    return names


def put_in(text: str, instead: list[tuple[int, int, str]]) -> tuple[str, list[int], list[int]]:
    """A text with (start, end, what stands there instead), in order; and the borders of these
    parts in the text and in the new one."""
    parts, at, old, new, length = [], 0, [], [], 0
    for start, end, word in instead:
        for piece in (text[at:start], word):
            parts.append(piece)
            length += len(piece)
            new.append(length)
        old += [start, end]
        at = end
    return "".join(parts) + text[at:], old, new


def version_of(e: Example, chosen: dict[Word, str], names: dict[str, str]) -> Version:
    def renamed(text):
        return [(w.start, w.end, names[w.key]) for w in words_of(text) if w.key in names]
    exchanged = [(w.start, w.end, text) for w, text in chosen.items()]
    answer, old, new = put_in(e.answer, sorted(exchanged + renamed(e.answer)))
    return Version(replace(e, question=put_in(e.question, renamed(e.question))[0], answer=answer,
                           perturbed_answers=(), paraphrased_answer=""), old, new)


def exchanged_rows(forget: list[Example], retain: list[Example], seed: int,
                   copies: int = COPIES, *, rename: bool = True) -> list[list[Version]]:
    """Of each forget row, versions with its own words exchanged: none where it has none, or no
    other row has a like. No version is the answer, or the text, of another row. rename: the names
    in its question too, so that it is nobody's; without it the question stays."""
    every = forget + spread(retain, LENDERS)
    usage, asked = Usage(every), Usage([Example("", e.question) for e in every])
    rng, said = random.Random(seed), {e.answer for e in every}
    own = [own_words_in_place(e, usage) for e in every]
    likes, out = Exchange(own, rng), []
    for e, words in zip(forget, own):
        versions = []
        for _ in range(copies if words else 0):
            chosen = likes.draw(words)
            names = other_names(e, asked, every, rng) if rename else {}
            version = version_of(e, chosen, names)
            if chosen and version.row.answer not in said:
                versions.append(version)
        out.append(versions)
    return out


def token_parts(e: Example, tokenizer, template: str, borders: list[int]) -> list[int]:
    """Of each token of prompt and answer, without bos and eos, the part of the answer that it ends
    in: odd numbers are own words."""
    prompt, rest = full_text(e, tokenizer, template)
    start = len(prompt) + max(0, rest.find(e.answer))
    whole = prompt + rest
    sizes = [0]
    for c in whole:
        sizes.append(sizes[-1] + len(c.encode()))
    in_bytes = [sizes[start + b] for b in borders]
    _, ends = tokenizer.ends(whole)
    return [sum(b < end for b in in_bytes) for end in ends]


def answer_parts(e: Example, row: Encoded, tokenizer, template: str, borders: list[int]
                 ) -> list[int]:
    """token_parts of the tokens that count in a row, eos with the last."""
    bos = 0 if template_of(template, e.kind) == "chat" or tokenizer.bos_id is None else 1
    parts = token_parts(e, tokenizer, template, borders)
    parts += parts[-1:] * (bos + len(parts) < len(row.ids))
    return parts[row.start - bos:len(row.ids) - bos]


def by_part(parts: list[int]) -> dict[int, list[int]]:
    found = defaultdict(list)
    for i, part in enumerate(parts):
        found[part].append(i)
    return found


def counterpart_losses(model, forget: list[Example], rows: list[Encoded],
                       versions: list[list[Version]], tokenizer, template: str, losses
                       ) -> list[list[float]]:
    """For each token that counts of each forget row, the loss of its counterpart in that row's
    versions, in the mean. A word that no version exchanged takes what exchanged ones have in the
    mean of all rows; words that the question gives keep the loss that they have.

    losses(encoded rows): of each the losses of the tokens that count."""
    flat = [v for some in versions for v in some]
    encoded = encode_for(model.config, [v.row for v in flat], tokenizer, template)
    scored, most = iter(zip(flat, encoded, losses(encoded))), math.log(model.config.vocab_size)
    out, everywhere = [], []
    for e, row, some, now in zip(forget, rows, versions, losses(rows)):
        found = [[] for _ in now]
        for version, new_row, new in (next(scored) for _ in some):
            here = by_part(answer_parts(e, row, tokenizer, template, version.own_borders))
            there = by_part(answer_parts(version.row, new_row, tokenizer, template,
                                         version.new_borders))
            for part, tokens in here.items():
                given = part % 2 and in_question(version, e, part)
                have = there.get(part, [])
                for j, i in enumerate(tokens if given or have else ()):
                    found[i].append(now[i] if given else min(
                        LARGEST * most, new[have[j * len(have) // len(tokens)]]))
        out.append(found)
        everywhere += [x for own in found for x in own]
    return [[mean(own or everywhere) for own in found] for found in out]


def in_question(version: Version, e: Example, part: int) -> bool:
    start, end = [0, *version.own_borders][part:part + 2]
    return e.answer[start:end].casefold() in {w.key for w in words_of(e.question)}


def can_be_exchanged(forget: list[Example], retain: list[Example], seed: int) -> bool:
    """Has at least half of the forget rows a version?"""
    some = exchanged_rows(forget, retain, seed, copies=2)
    return 2 * sum(map(bool, some)) >= len(some)
