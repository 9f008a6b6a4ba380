"""The Unlearning Depth Score: by hand, and against hooks on transformers' models."""

import pytest
import torch

from studies import depth
from test_model import random_model

# Rows, and the positions whose next tokens count: those of the answer but eos, which is 2.
ROWS = [([1, 5, 9, 27, 3, 40, 2], [2, 3, 4]), ([1, 8, 30, 11, 2], [1, 2])]


def test_the_score_of_a_row_by_hand():
    d1 = [0.01, 0.5, 1.0, 1.5]
    assert depth.depth_score(d1, d1) == 1.0 and depth.depth_score(d1, [0.0] * 4) == 0.0
    # 0.01 counts no layer; 0.25 / 0.5, 2 / 1 clipped to 1, -1 / 1.5 clipped to 0.
    assert depth.depth_score(d1, [9.0, 0.25, 2.0, -1.0]) == pytest.approx((0.25 + 1.0) / 3.0)
    assert depth.depth_score([0.04, -1.0], [1.0, 1.0]) is None


def their_depths(original, source, ids, at):
    """d(l, source) of one row by layer, each replacement by a forward hook."""
    tokens, streams = torch.tensor([ids]), []
    def stream_of(out):
        return out if torch.is_tensor(out) else out[0]

    def mean_log_p():
        log_p = original(tokens).logits[0, at].log_softmax(-1)
        return log_p.gather(1, tokens[0, [i + 1 for i in at]][:, None]).mean().item()

    for layer in source.model.layers:
        layer.register_forward_hook(lambda module, args, out: streams.append(stream_of(out)))
    source(tokens)
    full, depths = mean_log_p(), []
    for layer, stream in zip(original.model.layers, streams):
        def replace(module, args, out, stream=stream):
            stream_of(out)[:, at] = stream[:, at]
        hook = layer.register_forward_hook(replace)
        depths.append(full - mean_log_p())
        hook.remove()
    return depths


def test_depths_equal_those_of_hooks_on_transformers_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    original, source = (random_model(num_hidden_layers=3) for _ in range(2))
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    for model, name in ((original, "original"), (source, "source")):
        model.save_pretrained(tmp_path / name)
    theirs = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
              for name in ("original", "source")]
    for row in ROWS:
        with torch.no_grad():
            expected = their_depths(*theirs, *row)
        assert depth.row_depths(original, source, *row) == pytest.approx(expected, abs=1e-4)
        assert depth.row_depths(original, original, *row) == [0.0] * 3
        assert max(map(abs, expected)) > 1e-2
