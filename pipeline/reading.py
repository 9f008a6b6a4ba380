"""The fast twins of model.generate and eval.token_scores: the same tokens and losses, fewer passes.

generate: rows that have ended make room for others; a draft, or what the row itself said before, is
checked several tokens to a pass; what all prompts begin with is read once. token_scores: what texts
begin with alike is read once, and nothing is padded. tests/test_reading.py holds them to the plain
ones. In float32 a row's tokens depend neither on its company nor on its draft; in bfloat16 rounding
may decide a near tie.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from eval import TokenScores
from model import LOGITS, Config, Transformer, UserError, causal_attention

PROMPTS_AT_ONCE = 16  # prompts read in one pass: less padding, smaller activations
LEAST_SHARED = 16  # ids that all prompts must begin with to be worth a pass of their own
FIRST_DRAFT, LONGEST_DRAFT = 4, 32  # tokens read ahead, once a guess was right and at most
ATTENDED = 2048  # tokens whose attention is computed at once: texts of like length, little padding
CPU_PASS = 1024  # tokens in one pass on a CPU, whose caches hold no larger activations


# -------------------------------------------------------------------------------------- decoding


def attention(q, k, v, mask=None):
    """q [B, H, T, hd] on k, v [B, K, S, hd] -> [B, T, H*hd]. `mask` [B, 1, H/K * T or 1, S] is
    added to the scores; without one S is T, and a position sees itself and what is before it."""
    B, H, T, hd = q.shape
    if mask is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != k.shape[1])
    else:  # heads that share keys become rows of queries, so that no key is copied
        q = q.reshape(B, k.shape[1], -1, hd)  # [B, K, H/K * T, hd]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.reshape(B, H, T, hd)  # not view: a card's kernels lay memory out in another order
    return y.transpose(1, 2).flatten(2)  # [B, T, H*hd]


def eos_ids(eos_id) -> frozenset[int]:
    """The ids that end a row: none, one, or several."""
    return frozenset([] if eos_id is None else [eos_id] if isinstance(eos_id, int) else eos_id)


def new_tokens(c: Config, i: int, prompt: list[int], max_new, max_total, batch_tokens) -> int:
    """How many tokens prompt i may get; UserError if the prompt cannot be continued."""
    context = c.max_position_embeddings
    if not prompt:
        raise UserError(f"prompt {i} is empty; there is nothing to continue")
    if len(prompt) >= context:
        raise UserError(f"prompt {i} has {len(prompt)} tokens, which leaves no room in the model's "
                        f"context of {context}; shorten it")
    if min(prompt) < 0 or max(prompt) >= c.vocab_size:
        raise UserError(f"prompt {i} has token ids outside the model's vocabulary of "
                        f"{c.vocab_size}; is this the model's own tokenizer?")
    room = max(0, (context if max_total is None else min(max_total, context)) - len(prompt))
    room = room if max_new is None else min(room, max_new)
    if len(prompt) + room > batch_tokens:
        raise UserError(f"prompt {i} with its new tokens takes {len(prompt) + room} positions; a "
                        f"batch of {batch_tokens} tokens cannot hold it: raise the batch's tokens "
                        "or lower the number of new tokens")
    return room


def generate(model, prompts, *, max_new_tokens=None, eos_id, max_total_tokens=None, drafts=None,
             batch_tokens=16384, progress=None) -> list[list[int]]:
    """model.generate, fast. `drafts` holds for each prompt the ids it may say, or none: several are
    then checked in one pass, and a wrong draft costs time but changes no token."""
    room = [new_tokens(model.config, i, prompt, max_new_tokens, max_total_tokens, batch_tokens)
            for i, prompt in enumerate(prompts)]
    drafts = [None] * len(prompts) if drafts is None else drafts
    if len(drafts) != len(prompts):
        raise UserError(f"{len(prompts)} prompts and {len(drafts)} drafts; each prompt takes one, "
                        "which may be empty")
    rows = [Row(prompt, n, [i for i in draft or [] if 0 <= i < model.config.vocab_size])
            for prompt, n, draft in zip(prompts, room, drafts)]
    with tqdm(total=len(rows), desc=progress, unit="row", disable=progress is None) as bar:
        bar.update(room.count(0))
        for together, group in row_groups([len(p) for p in prompts], room, batch_tokens):
            decode(model, [rows[i] for i in group], together, eos_ids(eos_id), bar)
    return [row.ids[row.start + len(prompt):] for row, prompt in zip(rows, prompts)]


class Row:
    """A text being decoded, and the guess at what it says next.

    `ids` holds prompt and draft, then from `start` on the prompt again and what was said. The guess
    is what stands from `guess` on in `ids`: the draft, while the text follows it. Where the text
    leaves it, the guess moves to where the text's last two ids last stood side by side."""

    def __init__(self, prompt: list[int], room: int, draft: list[int]):
        before = prompt + draft if draft else []
        self.ids, self.start = before + prompt, len(before)
        self.end = len(self.ids) + room
        self.seen_at = {pair_key(*pair): at
                        for at, pair in enumerate(zip(self.ids, self.ids[1:]), 2)}
        self.guess = len(prompt)
        self.ahead = 0  # how many guessed ids to read in the next pass

    def to_read(self) -> list[int]:
        """Ids of the next pass: the last one, which no pass has read yet, and those guessed."""
        if not self.ahead:
            return self.ids[-1:]
        wanted = min(self.ahead, self.end - len(self.ids) - 1)
        guessed = self.ids[self.guess:self.guess + wanted]
        while len(guessed) < wanted:  # a loop goes on as it began
            guessed = (guessed + guessed)[:wanted]
        return self.ids[-1:] + guessed

    def add(self, chosen: list[int], ends: frozenset[int]) -> bool:
        """Take the model's own choice after each id that was read, up to the first that was not
        guessed: what was read after it is not this text. False: the row has ended."""
        ids = self.ids
        for token in chosen:
            if token in ends:
                return False
            guessed = self.guess < len(ids) and ids[self.guess] == token
            pair = pair_key(ids[-1], token)
            self.guess = self.guess + 1 if guessed else self.seen_at.get(pair, len(ids) + 1)
            ids.append(token)
            self.seen_at[pair] = len(ids)
            if not guessed:
                break
        # After a wrong guess nothing is read ahead until one comes true that was not read.
        self.ahead = min(LONGEST_DRAFT, max(FIRST_DRAFT, 2 * self.ahead)) if guessed else 0
        return len(ids) < self.end


def pair_key(first: int, second: int) -> int:
    """One number for two ids: many tuples would keep Python's garbage collector busy."""
    return first << 32 | second


def row_groups(lengths: list[int], room: list[int], budget: int):
    """(how many rows fit at once, row numbers) of each group that shares a cache, the longest rows
    first: what does not fit in memory fails at once. None of a group is half as long as another,
    or the cache would stand half empty. Rows with no room are left out."""
    size = [a + b for a, b in zip(lengths, room)]
    order = sorted((i for i, n in enumerate(room) if n > 0), key=lambda i: (-size[i], -lengths[i]))
    while order:
        longest = size[order[0]]
        group = [i for i in order if 2 * size[i] > longest]
        yield min(len(group), budget // longest), group
        order = order[len(group):]


@torch.inference_mode()
def decode(model, waiting: list[Row], together: int, ends: frozenset[int], bar):
    """Let rows say all they will, so many together: once a quarter of them have ended, others take
    their places, or the last few would read all weights for a token each."""
    like, columns = model.embed_tokens.weight, max(row.end - row.start for row in waiting)
    cos_sin = model.rope(torch.arange(columns, device=like.device))  # [columns, hd]
    cache = new_cache(model, together, columns)
    shared_prefix = read_shared_prefix(model, cache, [r.ids[r.start:] for r in waiting])
    rows = []
    while rows or waiting:
        free = together - len(rows)
        if waiting and 4 * free >= together:
            new, waiting = waiting[:free], waiting[free:]
            with cache.new_rows(len(new)):
                chosen = read_prompts(model, cache, new, shared_prefix, cos_sin)
            alive = [True] * len(rows) + [row.add(ids, ends) for row, ids in zip(new, chosen)]
            rows = rows + new
        else:
            chosen = read_on(model, cache, rows, cos_sin)
            alive = [row.add(ids, ends) for row, ids in zip(rows, chosen)]
        if not all(alive):
            order = fill_gaps(alive)
            cache.keep(order)
            rows = [rows[i] for i in order]
            bar.update(alive.count(False))


def new_cache(model, B: int, columns: int):
    return Cache(model.config, B, columns, model.embed_tokens.weight)


def fill_gaps(alive: list[bool]) -> list[int]:
    """An order of the rows that go on, in which those at the end fill the places of the finished:
    few rows move."""
    count = sum(alive)
    last = [i for i in range(count, len(alive)) if alive[i]]
    return [i if alive[i] else last.pop() for i in range(count)]


def read_shared_prefix(model, cache: "Cache", texts: list[list[int]]) -> int:
    """How many ids all prompts begin with (shots, a system turn). If they are many they are read
    here, once, into the cache of the first row; else 0."""
    most = min(map(len, texts)) - 1  # each needs a last id of its own, to choose after
    shared = next((n for n, ids in enumerate(zip(*texts)) if n == most or len(set(ids)) > 1), 0)
    if len(texts) == 1 or shared < LEAST_SHARED:
        return 0
    with cache.new_rows(1):
        ids = torch.tensor([texts[0][:shared]], device=model.embed_tokens.weight.device)
        model.hidden(ids, cache.prefills(slice(1), [shared]))
        cache.keep([])
    return shared


def read_prompts(model, cache: "Cache", rows: list[Row], shared_prefix: int, cos_sin):
    """Fill the cache of new rows. Returns the model's choice after each prompt, in a list."""
    device, chosen = model.embed_tokens.weight.device, []
    texts = [row.ids[row.start + shared_prefix:] for row in rows]
    if shared_prefix:
        cache.copy_prefix(shared_prefix)
        h = read_tokens(model, cache, [shared_prefix] * len(rows), texts, cos_sin)
        last = torch.tensor(list(accumulate(map(len, texts))), device=device) - 1
        return [[token] for token in best_ids(model, h[last])]
    for i in range(0, len(rows), PROMPTS_AT_ONCE):
        part = slice(i, i + PROMPTS_AT_ONCE)
        lengths = [len(text) for text in texts[part]]
        padded = [text + [0] * (max(lengths) - len(text)) for text in texts[part]]
        h = model.hidden(torch.tensor(padded, device=device), cache.prefills(part, lengths))
        last = torch.tensor(lengths, device=device) - 1
        chosen += best_ids(model, h[torch.arange(len(h), device=device), last])
    return [[token] for token in chosen]


def read_on(model, cache: "Cache", rows: list[Row], cos_sin) -> list[list[int]]:
    """One pass over each row's last id and what it may say next. Returns, for each row, the
    model's choice after each id that was read."""
    read = [row.to_read()[:cache.most_ids] for row in rows]
    h = read_tokens(model, cache, [len(row.ids) - row.start - 1 for row in rows], read, cos_sin)
    chosen = iter(best_ids(model, h))
    return [list(islice(chosen, len(ids))) for ids in read]


def read_tokens(model, cache: "Cache", starts: list[int], read: list[list[int]], cos_sin):
    """Final states [N, D] of the ids that each row reads next, which stand from starts[b] on."""
    input_pos, attends = cache.steps(starts, list(map(len, read)))
    ids = torch.tensor([[token for ids in read for token in ids]], device=input_pos.device)
    return model.hidden(ids, attends, cos_sin=[x[input_pos] for x in cos_sin])[0]


def best_ids(model, h) -> list[int]:
    """The likeliest next id after each of the states h [N, D]: a pass's one wait for the device."""
    chunk = max(1, LOGITS // model.config.vocab_size)
    return torch.cat([model.logits(x).argmax(-1) for x in h.split(chunk)]).tolist()


# ----------------------------------------------------------------------------- keys and values


@dataclass
class Layout:
    """How the N tokens of a pass over B rows stand for attention: the M rows that read several are
    padded to the longest of them, the others are by themselves."""

    lines: torch.Tensor  # [2K * N], where keys and values go in the cache, seen as [.., hd] lines
    mask: torch.Tensor | None  # for the first token of each row; None: all rows read several
    padded_rows: torch.Tensor | None = None  # [M]; None: each row reads one token
    first: torch.Tensor | None = None  # [B], which of the N is a row's first
    tokens: torch.Tensor | None = None  # which of the N are those of the M rows,
    slots: tuple = ()  # and where each stands: (row of M, slot)
    padded_mask: torch.Tensor | None = None  # for the M rows


class Cache:
    """Keys and values of at most B rows: in column p those of a row's p-th token, RoPE in them.
    Columns past a row's end may hold what a wrong guess or another row left; no query sees them,
    and later tokens overwrite them. It holds no method of itself: nothing but Python's cycle
    collector would free that, and on a card gigabytes would wait for it."""

    most_ids = 1 + LONGEST_DRAFT  # of a row in one pass

    def __init__(self, c, B: int, columns: int, like):
        shape = (B, 2 * c.num_key_value_heads, columns, c.head_dim)  # keys, then values
        # Zeroed: a masked key weighs 0, but 0 times an uninitialised NaN would be NaN.
        self.whole = [like.new_zeros(shape) for _ in range(c.num_hidden_layers)]
        self.kv = [x[:0] for x in self.whole]  # of the rows that passes read
        self.end = 0  # columns in use
        self.column = torch.arange(columns, device=like.device)
        self.head_lines = columns * torch.arange(shape[1])[:, None]  # on the host, as layouts are
        self.row_lines = columns * shape[1] * torch.arange(B)
        self.sharing = c.num_attention_heads // c.num_key_value_heads  # H/K

    @contextmanager
    def new_rows(self, n: int):
        """In here the cache is that of n new rows, which then follow the others."""
        count, end = len(self.kv[0]), self.end
        self.kv = [x[count:count + n] for x in self.whole]
        yield
        self.kv = [x[:count + len(self.kv[0])] for x in self.whole]
        self.end = max(self.end, end)

    def copy_prefix(self, shared: int):
        """What all prompts begin with, from the first row, whichever text has that by now."""
        for kv, whole in zip(self.kv, self.whole):
            kv[:, :, :shared] = whole[:1, :, :shared].clone()

    def prefills(self, rows: slice, lengths: list[int]) -> list:
        """For each layer, what stands in for attention while the prompts of some rows are read."""
        return [partial(self.prefill, rows, layer) for layer in range(len(self.kv))]

    def prefill(self, rows: slice, layer: int, q, k, v):
        """Causal attention over the prompts of some rows, whose keys and values are kept."""
        self.end = max(self.end, k.shape[2])
        self.kv[layer][rows, :, :k.shape[2]] = torch.cat((k, v), dim=1)
        return causal_attention(q, k, v)

    def steps(self, starts: list[int], counts: list[int]):
        """For a pass that reads counts[b] tokens of row b, which stand from starts[b] on: their
        input_pos, int64 [N], and for each layer what stands in for attention."""
        self.end = max(map(sum, zip(starts, counts)))
        input_pos, layout = self.lay_out(starts, counts)
        return input_pos, [partial(self.step, layout, layer) for layer in range(len(self.kv))]

    def lay_out(self, starts: list[int], counts: list[int]):
        """Worked out on the host and sent in one go: nothing here waits for the device."""
        B, N, device = len(counts), sum(counts), self.column.device
        start, n = torch.tensor([starts, counts])
        row = torch.arange(B).repeat_interleave(n, output_size=N)  # [N]
        first = n.cumsum(0) - n  # [B]
        slot = torch.arange(N) - first[row]
        input_pos = start[row] + slot
        lines = (self.head_lines + self.row_lines[row] + input_pos).flatten()  # [2K * N]
        if N == B:
            start, lines = send(device, start, lines)
            return start, Layout(lines, self.hide(start[:, None]))
        several = n > 1
        if 2 * int(several.sum()) > B:  # then all rows: to pick most of them would copy their keys
            several = torch.ones_like(several)
        padded_rows = several.nonzero()[:, 0]  # [M]
        tokens = several[row].nonzero()[:, 0]
        padded_row, slot = (several.cumsum(0) - 1)[row[tokens]], slot[tokens]
        # [M, width], the last column that a slot may see; one without token sees column 0
        last = n.new_zeros(len(padded_rows), max(counts))
        last[padded_row, slot] = input_pos[tokens]
        input_pos, lines, start, last, padded_rows, first, tokens, padded_row, slot = send(
            device, input_pos, lines, start, last, padded_rows, first, tokens, padded_row, slot)
        return input_pos, Layout(
            lines, self.hide(start[:, None]) if len(padded_rows) < B else None, padded_rows, first,
            tokens, (padded_row, slot), self.hide(last.repeat(1, self.sharing)))

    def hide(self, last):
        """What hides the columns past last [rows, width]: [rows, 1, width, end]"""
        unseen = self.column[:self.end] > last[..., None]
        return self.kv[0].new_zeros(unseen.shape).masked_fill_(unseen, -math.inf)[:, None]

    def step(self, layout: Layout, layer: int, q, k, v):
        """Attention of a pass's tokens, q [1, H, N, hd] and k, v [1, K, N, hd], on all that each
        may see -> [1, N, H*hd]"""
        kv = self.kv[layer]
        kv.view(-1, kv.shape[-1]).index_copy_(  # a view: what is written stays in the cache
            0, layout.lines, torch.cat((k, v), dim=1).flatten(0, 2))
        seen = kv[:, :, :self.end]
        if layout.padded_rows is None:  # N is B
            return attention(q.transpose(0, 2), *seen.chunk(2, dim=1), layout.mask).transpose(0, 1)
        q = q[0].transpose(0, 1)  # [N, H, hd]
        mixed = q.new_empty(len(q), q[0].numel())  # [N, H*hd]
        if layout.mask is not None:
            alone = q[layout.first][:, :, None]  # [B, H, 1, hd]
            mixed[layout.first] = attention(alone, *seen.chunk(2, dim=1), layout.mask)[:, 0]
            seen = seen[layout.padded_rows]
        width = layout.padded_mask.shape[2] // self.sharing
        padded = q.new_zeros(len(seen), width, *q.shape[1:])
        padded[layout.slots] = q[layout.tokens]  # [M, width, H, hd]
        read = attention(padded.transpose(1, 2), *seen.chunk(2, dim=1), layout.padded_mask)
        mixed[layout.tokens] = read[layout.slots]
        return mixed[None]

    def keep(self, order: list[int]):
        """Drop all rows but these, which take this order. Those that stay where they are should be
        most of them: they are not copied."""
        moved = [(to, row) for to, row in enumerate(order) if to != row]
        if moved:
            to, row = torch.tensor(moved, device=self.column.device).T
        for layer, x in enumerate(self.kv):
            if moved:
                x[to, :, :self.end] = x[row, :, :self.end]
            self.kv[layer] = x[:len(order)]


def send(device, *tensors) -> list:
    """Integer tensors of the host on the device, in one copy."""
    packed = torch.cat([t.flatten() for t in tensors]).to(device)
    return [x.view(t.shape) for x, t in zip(packed.split([t.numel() for t in tensors]), tensors)]


# --------------------------------------------------------------------------------------- scoring


@dataclass
class Pass:
    """Texts that are read together: what several begin with stands in `ids` once."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # where each id stands in its texts
    texts: dict[int, list[int]] = field(default_factory=dict)  # number -> which of `ids` it is


@torch.inference_mode()
def token_scores(model: Transformer, rows: list[data.Encoded], first: list[int], *, tokens: int,
                 detailed: list[bool] | None = None) -> list[TokenScores]:
    """eval.token_scores, fast. A pass reads at most `tokens`; only the positions asked for reach
    the lm_head."""
    out, detailed = [None] * len(rows), detailed or [False] * len(rows)
    longest = max((len(r.ids) - 1 for r in rows), default=0)  # the last token is but predicted
    if longest > tokens:
        raise UserError(f"--eval-tokens {tokens} cannot hold a text of {longest + 1} tokens; "
                        "raise it")
    if model.embed_tokens.weight.device.type == "cpu":
        tokens = min(tokens, max(CPU_PASS, longest))
    with tqdm(total=len(rows), desc="losses", unit="text") as bar:
        for part in passes_that_share([r.ids[:-1] for r in rows], tokens):
            asked = torch.tensor([(which[t - 1], rows[i].ids[t], detailed[i]) for i, which in
                                  part.texts.items() for t in range(first[i], len(rows[i].ids))])
            scores = asked_scores(model, read_pass(model, part), asked)
            sizes = [len(rows[i].ids) - first[i] for i in part.texts]
            for i, *values in zip(part.texts, *(x.cpu().split(sizes) for x in scores)):
                losses, *details = (x.tolist() for x in values)
                out[i] = TokenScores(losses, *(details if detailed[i] else ([], [])))
            bar.update(len(part.texts))
    return out


def passes_that_share(texts: list[list[int]], tokens: int) -> list[Pass]:
    """Texts in passes of at most `tokens` ids. They are sorted: of all texts before one, the last
    begins with most of it."""
    passes, last, path = [], [], []
    for i in sorted(range(len(texts)), key=texts.__getitem__):
        text = texts[i]
        shared = next((n for n, (x, y) in enumerate(zip(text, last)) if x != y),
                      min(len(text), len(last)))
        if not passes or len(passes[-1].ids) + len(text) - shared > tokens:
            passes.append(Pass())
            shared = 0
        now = passes[-1]
        now.texts[i] = path = path[:shared] + list(
            range(len(now.ids), len(now.ids) + len(text) - shared))
        now.ids += text[shared:]
        now.positions += range(shared, len(text))
        last = text
    return passes


def read_pass(model: Transformer, part: Pass) -> torch.Tensor:
    """Final states [N, D] of a pass's N ids, nothing padded: a token sees what stands before it in
    its own text, and nothing of the texts beside it."""
    device, texts = model.embed_tokens.weight.device, list(part.texts.values())
    ids, positions = torch.tensor([part.ids, part.positions]).to(device)
    groups, slot_of, taken = [], [0] * len(ids), 0
    for some in data.batches_by_length(list(map(len, texts)), max(ATTENDED, *map(len, texts))):
        width = len(texts[some[0]])
        groups.append(torch.tensor([texts[i] + [0] * (width - len(texts[i])) for i in some],
                                   device=device))  # [B, T]; what pads stand for does not matter
        for i in some:
            for slot, n in enumerate(texts[i], taken):
                slot_of[n] = slot
            taken += width
    attend = partial(attention_of_texts, groups, torch.tensor(slot_of, device=device))
    attends = [attend] * len(model.layers)
    return model.hidden(ids[None], attends, cos_sin=model.rope(positions))[0]


def attention_of_texts(groups: list[torch.Tensor], slot_of: torch.Tensor, q, k, v):
    """Causal attention within texts that share tokens, q [1, H, N, hd] and k, v [1, K, N, hd] ->
    [1, N, H*hd]. A group [B, T] says which tokens B texts are made of, padded after their ends; of
    all slots of all groups, token n's attention is taken from slot_of[n]."""
    mixed = [causal_attention(*(x[0, :, group].transpose(0, 1) for x in (q, k, v))).flatten(0, 1)
             for group in groups]  # each [B*T, H*hd]
    return torch.cat(mixed)[slot_of][None]


def asked_scores(model: Transformer, h, asked) -> list[torch.Tensor]:
    """Losses, predicted ids and standardised log P [N] of tokens, asked [N, 3]: which of the states
    h it follows, its id, whether all is wanted. Texts that part after a state share its logits."""
    which, labels, wanted = asked.to(h.device).T
    states, row = which.unique(return_inverse=True)
    scores = [h.new_zeros(len(row), dtype=t) for t in (torch.float, torch.long, torch.float)]
    chunk = max(1, LOGITS // model.config.vocab_size)
    for start in range(0, len(states), chunk):
        here = ((row >= start) & (row < start + chunk)).nonzero()[:, 0]
        found = chunk_scores(model.logits(h[states[start:start + chunk]]), row[here] - start,
                             labels[here], wanted[here])
        for whole, some in zip(scores, found):
            whole[here] = some
    return scores


def chunk_scores(logits, row, labels, wanted):
    """logits [n, V]; of N tokens, the row of each in them, its id, and whether all is wanted [N] ->
    losses, predicted ids and standardised log P [N]; the last two where wanted, else 0."""
    log_p = logits.log_softmax(-1)
    label_log_p = log_p[row, labels]
    predicted, standard = torch.zeros_like(labels), torch.zeros_like(label_log_p)
    for i in wanted.nonzero()[:, 0].split(max(1, len(logits) // 8)):  # the logits' size again
        some = log_p[row[i]]
        p, predicted[i] = some.exp(), some.argmax(1)
        average = (p * some).sum(1)
        variance = (p * some.square()).sum(1) - average.square()
        standard[i] = (label_log_p[i] - average) / variance.clamp(min=1e-6).sqrt()
    return -label_log_p, predicted, standard
