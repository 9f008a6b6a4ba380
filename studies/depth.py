"""How deep did it forget? The Unlearning Depth Score (UDS, arXiv 2605.24614) of a run's models.

    python -m pipeline depth RUN [STAGE ...]

The original reads a forget row and its answer while the stream that leaves its layer l is replaced,
where it predicts the answer's tokens (without eos), by the stream of another model, the source:

    d(l, source) = mean log P(unchanged) - mean log P(layer l replaced)
    UDS of a row = sum clip(d2 / d1, 0, 1) d1 / sum d1   over the layers with d1 > 0.05

d1 = d(l, retain-only), d2 = d(l, unlearned). 0: as known as ever; 1: erased down to where a model
stands that never saw the row, or beyond: clip does not tell. A row without such a layer has none.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

import data
from eval import mean
from model import Transformer, UserError, write_json, write_text
from pipeline import checkpoint, levels, settings
from pipeline.columns import as_code, label, number, table
from pipeline.slices import load_benchmark
from pipeline.stage import lock
from pipeline.tokenizers import load_tokenizer
from studies.attack import models_to_attack


def streams_above(model: Transformer, l: int, hidden: torch.Tensor) -> list[torch.Tensor]:
    """The stream hidden [1, T, D] as it left layer l, and as it then leaves each layer above."""
    streams, cos_sin = [hidden], model.rope(torch.arange(hidden.shape[1], device=hidden.device))
    for block in model.layers[l + 1:]:
        streams.append(block(streams[-1], *cos_sin))
    return streams


@torch.inference_mode()
def row_depths(original: Transformer, source: Transformer, ids: list, at: list) -> list[float]:
    """d(l, source) of a row by layer; at: where the tokens that count are predicted."""
    device = original.embed_tokens.weight.device
    ids, at = torch.tensor([ids], device=device), torch.tensor(at, device=device)
    clean, other = (streams_above(m, -1, m.embed_tokens(ids))[1:] for m in (original, source))

    def mean_log_p(hidden):  # [1, T, D] that left the last layer
        logits = original.logits(original.norm(hidden)[0, at])  # [N, V]
        return -torch.nn.functional.cross_entropy(logits, ids[0, at + 1]).item()
    patched = [hidden.index_copy(1, at, new[:, at]) for hidden, new in zip(clean, other)]
    return [mean_log_p(clean[-1]) - mean_log_p(streams_above(original, l, hidden)[-1])
            for l, hidden in enumerate(patched)]


def depth_score(d1: list[float], d2: list[float]) -> float | None:
    """UDS of a row; None where retain-only loses next to nothing at every layer."""
    pairs = [(x, y) for x, y in zip(d1, d2) if x > 0.05]  # nats per token
    weighted = sum(min(max(y / x, 0), 1) * x for x, y in pairs)
    return weighted / sum(x for x, _ in pairs) if pairs else None


def rows_to_patch(s: settings.Settings, config, tokenizer, answers: str) -> list[tuple]:
    """(ids, at) of the forget rows; answers: all tokens of theirs but eos count, or "own" ones."""
    bench = load_benchmark(s)
    wording, rows = levels.Wording(bench.forget + bench.retain), []
    for e, row in zip(bench.forget, data.encode_for(config, bench.forget, tokenizer, s.template)):
        borders = [x for w in wording.specifics(e) for x in (w.start, w.end)]
        parts = levels.answer_parts(e, row, tokenizer, s.template, borders)
        numbers = [i for part in parts if answers == "all" or part % 2 for i in parts[part]]
        at = [row.start + i - 1 for i in numbers if row.ids[row.start + i] not in tokenizer.eos_ids]
        rows += [(row.ids, at)] if at else []
    return rows


def main(argv: list[str]):
    """How deep did it forget? The Unlearning Depth Score of a run's models."""
    parser = settings.Parser(prog="python -m pipeline depth", description=__doc__,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("stages", nargs="*", default=[], metavar="STAGE", help="default: all")
    parser.add_argument("--answers", choices=("all", "own"), default="all",
                        help="own: only the names, numbers and rare words of an answer")
    args = parser.parse_args(argv)
    with lock(args.run):
        s, lines, results = settings.read_settings(args.run), [], {}
        names = models_to_attack(s, args.stages)
        if names[0] != "retain-only":
            raise UserError(f"{s.run} holds no retain-only model; see --learn-retain-only")
        original = checkpoint.load_model(s.run / "original", **settings.placement(s))
        tokenizer = load_tokenizer(s.run / "original")
        rows = rows_to_patch(s, original.config, tokenizer, args.answers)
        for name in names:
            source = checkpoint.load_model(s.run / name, **settings.placement(s))
            d2 = [row_depths(original, source, *row) for row in tqdm(rows, name)]
            d1 = d2 if name == "retain-only" else d1
            scores = [x for x in map(depth_score, d1, d2) if x is not None]
            uds, by_layer = mean(scores) if scores else None, [mean(x) for x in zip(*d2)]
            results[name] = dict(uds=uds, rows=len(scores), by_layer=by_layer)
            layers = " ".join(f"{d:.2f}" for d in by_layer)
            lines.append([label(name), number(uds, ".3f"), len(scores), layers])
        shown = table(["Approach", "UDS", "rows", "d by layer"], lines)
        write_json(s.run / "depth.json", results)
        write_text(s.run / "depth.md", f"# How deep it forgot\n\n{as_code(__doc__)}\n\n{shown}\n")
        print(shown)
