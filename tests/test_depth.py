"""The Unlearning Depth Score: by hand, and against hooks on transformers' models."""

import pytest
import torch

from model import Transformer
from studies import depth
from test_model import random_model

ROWS = [([1, 5, 9, 27, 3, 40, 2], [2, 3, 4]), ([1, 8, 30, 11, 2], [1, 2])]  # ids, positions


def test_the_score_of_a_row_by_hand():
    d1 = [0.01, 0.5, 1.0, 1.5]
    assert depth.depth_score(d1, d1) == 1.0 and depth.depth_score(d1, [0.0] * 4) == 0.0
    # 0.04 counts no layer; 0.25 / 0.5, 2 / 1 clipped to 1, -1 / 1.5 clipped to 0.
    assert depth.depth_score(d1, [9.0, 0.25, 2.0, -1.0]) == pytest.approx((0.25 + 1.0) / 3.0)
    assert depth.depth_score([0.04, -1.0], [1.0, 1.0]) is None


def their_depths(original, source, ids, at):
    """d(l, source) of one row by layer, each replacement by a forward hook."""
    tokens, streams = torch.tensor([ids]), []
    hooks = [layer.register_forward_hook(
        lambda module, args, out: streams.append(out if torch.is_tensor(out) else out[0]))
        for layer in source.model.layers]
    source(tokens)
    for hook in hooks:
        hook.remove()

    def mean_log_p():
        log_p = original(tokens).logits[0, at].log_softmax(-1)
        return log_p.gather(1, tokens[0, [i + 1 for i in at]][:, None]).mean().item()
    full, depths = mean_log_p(), []
    for layer, stream in zip(original.model.layers, streams):
        def replace(module, args, out, stream=stream):
            hidden = (out if torch.is_tensor(out) else out[0]).clone()
            hidden[:, at] = stream[:, at]
            return hidden if torch.is_tensor(out) else (hidden, *out[1:])
        hook = layer.register_forward_hook(replace)
        depths.append(full - mean_log_p())
        hook.remove()
    return depths


def test_depths_equal_those_of_hooks_on_transformers_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    models = {}
    for seed, name in enumerate(("original", "source")):
        model = random_model(num_hidden_layers=3, num_key_value_heads=2)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
        model.save_pretrained(tmp_path / name)
        models[name] = (Transformer.from_pretrained(tmp_path / name),
                        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval())
    (original, theirs), (source, their_source) = models.values()
    for ids, at in ROWS:
        with torch.no_grad():
            expected = their_depths(theirs, their_source, ids, at)
        assert depth.row_depths(original, source, ids, at) == pytest.approx(expected, abs=1e-4)
        assert depth.row_depths(original, original, ids, at) == [0.0] * 3
        assert max(map(abs, expected)) > 1e-2
