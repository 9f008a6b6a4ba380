"""What stands in for keys and values where layers hand on a state instead.

Where an attention layer calls attend(q, k, v), such a layer calls attend(op, *u): u [B, T, ...] is
what each position gives, and op(state, before, *u) -> y [B, T, ...], states. `state` is what the
past left, a list of tensors [B, ...] (None: nothing); `states` is what stands before the positions
`before` [B, A], each from 0 to T (None: nobody asks), a list of tensors [B, A, ...].
"""

from contextlib import contextmanager
from dataclasses import fields
from functools import partial

import torch
from torch import nn

from pipeline.checkpoint import (LARGEST_SIZE, MOST_LAYERS, check_token_ids, is_int, is_positive,
                                 need)


def from_nothing(op, *u):
    """Transformer.attend: whole texts."""
    return op(None, None, *u)[0]


class StatePrefixes:
    """In place of simu.Prefixes: the clean states before the positions pos [B, A] of one layer, and
    rows that start from them."""

    def __init__(self, pos):
        self.pos, self.states = pos, {}

    def keep(self, op, *u):
        y, self.states[op] = op(None, self.pos, *u)
        return y

    def attend(self, op, *u):
        """Rows u [B, R, ...], the ends of A prefixes each R / A times -> y [B, R, ...]"""
        B, R = u[0].shape[:2]
        state = [s.repeat(1, R // s.shape[1], *[1] * (s.dim() - 2)).flatten(0, 1)  # [B * R, ...]
                 for s in self.states[op]]
        y, _ = op(state, None, *(x.flatten(0, 1)[:, None] for x in u))  # [B * R, 1, ...]
        return y.view(B, R, *y.shape[2:])


class StateCache:
    """In place of KVCache and reading.Cache: the states of rows, each after its last token."""

    most_ids = 1  # of a row in one pass: what was read on a wrong guess could not be taken back

    def __init__(self, c, B: int, columns: int, like):
        self.device, self.B, self.states = like.device, B, {}

    def attends(self, input_pos, counts):
        """What stands in for attention while a pass reads the first counts[b] of row b's tokens."""
        return partial(self.read_rows, counts[:, None])

    def read_rows(self, counts, op, *u):
        y, states = op(self.states.get(op), counts, *u)
        self.states[op] = [s[:, 0] for s in states]
        return y

    @contextmanager
    def new_rows(self, n: int):
        """In here the cache is that of n new rows, which then follow the others."""
        before, self.states, self.B = self.states, {}, n
        yield
        none = {op: [s[:0] for s in kept] for op, kept in self.states.items()}
        self.states = {op: [torch.cat(pair) for pair in zip((none | before)[op], kept)]
                       for op, kept in self.states.items()}

    def prefills(self, rows: slice, lengths: list[int]):
        """What stands in for attention while the prompts of some of the new rows are read."""
        return partial(self.prefill, rows, torch.tensor(lengths, device=self.device)[:, None])

    def prefill(self, rows: slice, ends, op, *u):
        """ends [b, 1]: what pads a prompt leaves no state."""
        y, states = op(None, ends, *u)
        kept = self.states.setdefault(op, [s.new_zeros(self.B, *s.shape[2:]) for s in states])
        for whole, s in zip(kept, states):
            whole[rows] = s[:, 0]
        return y

    def steps(self, starts: list[int], counts: list[int]):
        """counts are all 1: the next pass reads one token of each row, at the positions starts."""
        one = torch.ones(len(starts), 1, dtype=torch.int64, device=self.device)
        return torch.tensor(starts, device=self.device), partial(self.step, one)

    def step(self, one, op, *u):
        """u [1, B, ...], a position of each row -> y [1, B, ...]"""
        return self.read_rows(one, op, *(x.transpose(0, 1) for x in u)).transpose(0, 1)

    def keep(self, order: list[int]):
        rows = torch.tensor(order, dtype=torch.int64, device=self.device)
        self.states = {op: [s[rows] for s in kept] for op, kept in self.states.items()}


class StateBlock(nn.Module):
    """A layer, by the up_to_beta(x, attend) and add_beta(x, beta) that its kind gives."""

    prefixes = StatePrefixes  # what SIMU's second stream starts from

    def forward(self, x, attend):
        return self.add_beta(*self.up_to_beta(x, attend))


class StateModel:
    """Before Transformer among a model's bases: its blocks hand on states."""

    cache_class = StateCache
    packs = False  # a state runs through each text alone
    attend = staticmethod(from_nothing)

    def rope(self, positions):
        return ()


CHUNK = 64  # positions worked out at once


def in_chunks(scan, S, before, *u):
    """An op's y [B, T, ...] and state, the latter at the positions `before` alone [B, A, ...], from
    scan(S, *u of at most CHUNK positions) -> their y, and a function that gives the states before
    positions [B, A] counted from the first of them, where S [B, ...] stands."""
    ys, kept = [], None
    for start in range(0, u[0].shape[1], CHUNK):
        if start:
            S = states(torch.full((len(S), 1), CHUNK, device=S.device))[:, 0]
        y, states = scan(S, *(x[:, start:start + CHUNK] for x in u))
        ys.append(y)
        if before is not None:  # a later chunk's states replace those of what it starts after
            here = states((before - start).clamp(0, CHUNK))
            later = (before > start).view(*before.shape, *[1] * (here.dim() - 2))
            kept = here if kept is None else torch.where(later, here, kept)
    return torch.cat(ys, dim=1), kept


def gather_before(x, before):
    """x [B, T + 1, ...], before [B, A] -> [B, A, ...]"""
    index = before.view(*before.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


NO_LIMIT = 1 << 24  # positions, where nothing is said: a state is no longer for a longer text


def check_fields(c):
    """UserError unless a config's whole numbers, numbers, flags and token ids are such."""
    need(c.neurons == "output", c, "neurons", f"output for {c.model_type}")
    for f in fields(c):
        value = getattr(c, f.name)
        if f.type is int:
            largest = MOST_LAYERS if f.name == "num_hidden_layers" else LARGEST_SIZE
            need(is_int(value) and 0 < value <= largest, c, f.name,
                 f"a whole number above 0, at most {largest}")
        elif f.type is float:
            need(is_positive(value), c, f.name, "a number above 0")
        elif f.type is bool:
            need(isinstance(value, bool), c, f.name, "true or false")
    check_token_ids(c)
