"""The fast twin of eval.token_scores. What several texts begin with, as the six answers to one
question do, is read once, and nothing is padded. In float32 the scores are equal to rounding.
"""

from dataclasses import dataclass, field
from functools import partial
from os.path import commonprefix

import torch
from tqdm import tqdm

import data
from eval import TokenScores
from model import Transformer, causal_attention

ATTENDED = 2048  # tokens whose attention is computed at once: texts of like length, little padding
CPU_PASS = 1024  # tokens in one pass on a CPU, whose caches hold no larger activations
LOGITS = 1 << 25  # logits held at once: 128 MiB of float32


@dataclass
class Pass:
    """Texts that are read together: what several begin with stands in `ids` once."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # where each id stands in its texts
    texts: dict[int, list[int]] = field(default_factory=dict)  # number -> which of `ids` it is


@torch.inference_mode()
def token_scores(model: Transformer, rows: list[data.Encoded], first: list[int], *, tokens: int,
                 detailed: list[bool] | None = None) -> list[TokenScores]:
    """eval.token_scores, fast. A pass reads at most `tokens`, or one text of more. Only states that
    a scored token follows reach the lm_head."""
    scores, detailed = [None] * len(rows), detailed or [False] * len(rows)
    device = model.embed_tokens.weight.device
    tokens = min(tokens, CPU_PASS) if device.type == "cpu" else tokens
    for part in tqdm(passes_that_share([row.ids[:-1] for row in rows], tokens), desc="losses"):
        scored = []  # of each scored token: which state it follows, its id, details or not
        for i, states in part.texts.items():
            for t in range(first[i], len(rows[i].ids)):
                scored.append((states[t - 1], rows[i].ids[t], detailed[i]))
        scored = torch.tensor(scored).to(device)  # [N, 3]
        values = scores_after(model, read_pass(model, part), *scored.T)
        sizes = [len(rows[i].ids) - first[i] for i in part.texts]
        for i, *columns in zip(part.texts, *(x.cpu().split(sizes) for x in values)):
            losses, predicted, standard = (x.tolist() for x in columns)
            if not detailed[i]:
                predicted, standard = [], []
            scores[i] = TokenScores(losses, predicted, standard)
    return scores


def passes_that_share(texts: list[list[int]], tokens: int) -> list[Pass]:
    """Texts in passes of at most `tokens` ids. They are sorted: of all texts before one, the last
    begins with most of it."""
    passes, previous, path = [], [], []
    for i in sorted(range(len(texts)), key=texts.__getitem__):
        text = texts[i]
        shared = len(commonprefix([text, previous]))
        if not passes or len(passes[-1].ids) + len(text) - shared > tokens:
            passes.append(Pass())
            shared = 0
        part = passes[-1]
        new = range(len(part.ids), len(part.ids) + len(text) - shared)
        part.texts[i] = path = path[:shared] + list(new)
        part.ids += text[shared:]
        part.positions += range(shared, len(text))
        previous = text
    return passes


def read_pass(model: Transformer, part: Pass) -> torch.Tensor:
    """Final states [N, D] of a pass's N ids: a token sees what stands before it in its own text,
    and nothing of the texts beside it."""
    device, texts = model.embed_tokens.weight.device, list(part.texts.values())
    ids, positions = torch.tensor([part.ids, part.positions]).to(device)  # [N]
    groups, slot_of, slots = [], [0] * len(part.ids), 0
    for group in data.batches_by_length(list(map(len, texts)), ATTENDED):
        width = len(texts[group[0]])
        groups.append(torch.tensor([texts[i] + [0] * (width - len(texts[i])) for i in group],
                                   device=device))  # [B, T]; which token pads does not matter
        for i in group:
            for slot, n in enumerate(texts[i], slots):
                slot_of[n] = slot
            slots += width
    attend = partial(attention_of_texts, groups, torch.tensor(slot_of, device=device))
    attends = [attend] * len(model.layers)
    return model.hidden(ids[None], attends, cos_sin=model.rope(positions))[0]


def attention_of_texts(groups: list[torch.Tensor], slot_of: torch.Tensor, q, k, v):
    """Causal attention within texts that share tokens, q [1, H, N, hd] and k, v [1, K, N, hd] ->
    [1, N, H*hd]. A group [B, T] says which tokens B texts consist of, padded after their ends; of
    all slots of all groups, token n's attention is taken from slot_of[n]."""
    mixed = []
    for group in groups:
        of_texts = (x[0, :, group].transpose(0, 1) for x in (q, k, v))  # each [B, heads, T, hd]
        mixed.append(causal_attention(*of_texts).flatten(0, 1))  # [B*T, H*hd]
    return torch.cat(mixed)[slot_of][None]


def scores_after(model: Transformer, h, states, labels, wanted) -> list[torch.Tensor]:
    """Losses, predicted ids and standardised log P [N] of tokens: which of the states h [.., D]
    each follows, its id, and whether details are wanted, [N] each; without, the last two are 0.
    Texts that part after a state share its logits, which are computed LOGITS at a time."""
    states, line = states.unique(return_inverse=True)  # token n is scored by the logits' line[n]
    losses, standard = h.new_zeros(2, len(line), dtype=torch.float)
    predicted = torch.zeros_like(labels)
    chunk = max(1, LOGITS // model.config.vocab_size)
    for start in range(0, len(states), chunk):
        log_p = model.logits(h[states[start:start + chunk]]).log_softmax(-1)  # [chunk, V]
        inside = (line >= start) & (line < start + chunk)
        n = inside.nonzero()[:, 0]
        losses[n] = -log_p[line[n] - start, labels[n]]
        detailed = (inside & (wanted > 0)).nonzero()[:, 0]
        for n in detailed.split(max(1, len(log_p) // 8)):  # or it takes the logits' memory again
            of_token = log_p[line[n] - start]  # [n, V]
            p, predicted[n] = of_token.exp(), of_token.argmax(1)
            average = (p * of_token).sum(1)
            variance = (p * of_token.square()).sum(1) - average.square()
            standard[n] = (-losses[n] - average) / variance.clamp(min=1e-6).sqrt()
    return [losses, predicted, standard]
