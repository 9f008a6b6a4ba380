"""What only a card would show, shown on a CPU: CUDA's memory layout, tensors on the wrong device,
waits, how many shapes of attention a card is to plan for."""

import dataclasses

import pytest
import torch
from pretend import DEVICE, Card, OnCard
from test_simu import LLAMA, OLMO, rows, tiny

import eval as evaluation
import model as core
import simu
from data import collate
from pipeline import fused, objectives, reading

KINDS = pytest.mark.parametrize("kind", [LLAMA, OLMO], ids=["llama", "olmo"])
RECIPE = objectives.Recipe(batch=2, epochs=1, lr=1e-3, steps=2)
PROMPTS = [[5, 9, 11, 4], [7, 3], [12, 40, 8, 21, 6, 33]]


def decoded(model) -> list:
    return [core.generate(model, PROMPTS, max_new_tokens=8, eos_id=2)]


def scored(model) -> list:
    return [score(model, rows(5), [1] * 5, tokens=64, detailed=[True] * 5)
            for score in (evaluation.token_scores, reading.token_scores)]


def unlearned(model, objective: str, method: str, **changes) -> list[torch.Tensor]:
    c = model.config
    mask = torch.rand(c.num_hidden_layers, c.hidden_size,
                      generator=torch.Generator().manual_seed(0)) > 0.7
    recipe = dataclasses.replace(RECIPE, objective=objective, method=method, **changes)
    simu.unlearn(model, rows(4), rows(4, seed=1), mask, recipe, targets=3.0,
                 **fused.on(torch.device("cpu"), recipe.state))
    return [p.detach() for p in model.parameters()]


def on_cpu(x):
    return x.held if isinstance(x, OnCard) else x


def same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(on_cpu(a), b, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- CUDA's layout


@pytest.mark.parametrize("shared", [1, 2, 4], ids=lambda n: f"{n} kv heads")
def test_attention_that_answers_in_cudas_layout(cuda_layout, monkeypatch, shared):
    """Grouped heads, forward, backward, decoding and scores: equal to what the CPU's layout gives.
    SIMU_TEST_LAYOUT=cuda does the same to the whole suite."""
    def run():
        model = tiny(LLAMA | dict(num_key_value_heads=shared))
        simu.mean_nll(model, collate(rows())).backward()
        return ([p.grad for p in model.parameters()], decoded(model), scored(model),
                simu.attribute(model, collate(rows()), steps=2))

    grads, texts, scores, att = run()
    monkeypatch.undo()
    plain_grads, plain_texts, plain_scores, plain_att = run()
    assert texts == plain_texts
    same(grads, plain_grads)
    same([att], [plain_att])
    for form, plain_form in zip(scores, plain_scores):
        for a, b in zip(form, plain_form):
            assert a.losses == pytest.approx(b.losses, rel=1e-5)


# ------------------------------------------------------------------------------- on a device


def test_the_pretended_card_refuses_what_a_card_refuses():
    with Card():
        x = torch.ones(3, device=DEVICE)
        assert x.device == DEVICE and (x + 1).sum().item() == 6 and x.tolist() == [1, 1, 1]
        assert torch.equal(x.cpu(), torch.ones(3))
        with pytest.raises(RuntimeError, match="on the card and on the CPU"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="on the card and on the CPU"):
            torch.cat([x, torch.ones(3)])


@KINDS
def test_reading_is_on_the_models_device(kind):
    model = tiny(kind)
    texts, scores = decoded(model), scored(model)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]]))
    with Card() as card:
        model = card.put(model)
        assert decoded(model) == texts
        for form, plain in zip(scored(model), scores):
            for a, b in zip(form, plain):
                assert a.losses == pytest.approx(b.losses, rel=1e-5)
        with torch.no_grad():
            same([model(torch.tensor([PROMPTS[0]], device=DEVICE))], [logits])


@KINDS
@pytest.mark.parametrize("path", simu.PATHS)
def test_attribution_is_on_the_models_device(kind, path):
    recipe = dataclasses.replace(RECIPE, path=path)
    model = tiny(kind, num_hidden_layers=2)
    want, loop = simu.attribute_rows(model, rows(2), recipe), simu.attribute_loop(
        model, rows(1)[0], steps=1)
    with Card() as card:
        model = card.put(model)
        same([simu.attribute_rows(model, rows(2), recipe),
              simu.attribute_loop(model, rows(1)[0], steps=1)], [want, loop])


@pytest.mark.parametrize("objective", simu.OBJECTIVES)
def test_every_objective_is_on_the_models_device(objective):
    want = unlearned(tiny(), objective, "simu")
    with Card() as card:
        got = unlearned(card.put(tiny()), objective, "simu")
        assert all(isinstance(p, OnCard) for p in got)
        same(got, want)


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", simu.METHODS)
def test_every_method_is_on_the_models_device(method, state):
    want = unlearned(tiny().bfloat16(), "graddiff", method, state=state, checkpointing=True)
    with Card() as card:
        got = unlearned(card.put(tiny().bfloat16()), "graddiff", method, state=state,
                        checkpointing=True)
        assert [on_cpu(p).isfinite().all() for p in got]
        assert sum((on_cpu(a) - b).abs().sum() for a, b in zip(got, want)) < 1
    assert len(got) == len(want)


def test_an_update_waits_for_the_card_only_where_it_logs():
    """Three numbers: the norm, and the losses of forget and retain rows. Four rows make two
    updates; what is waited for once, before and after all, falls out of the difference."""
    waits = []
    for epochs in (1, 2):
        with Card() as card:
            unlearned(card.put(tiny()), "graddiff", "simu", epochs=epochs)
        waits.append(card.waits)
    assert waits[1] - waits[0] == 2 * 3


# ------------------------------------------------------------------------------- shapes


def attention_shapes(monkeypatch, run) -> list[tuple]:
    """The shapes of queries, keys and mask of each attention that run() computes."""
    shapes, plain = [], torch.nn.functional.scaled_dot_product_attention

    def seen(q, k, v, **options):
        mask = options.get("attn_mask")
        shapes.append((tuple(q.shape), tuple(k.shape), None if mask is None else tuple(mask.shape)))
        return plain(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    run()
    return shapes


def test_layers_share_a_shape_of_attention(monkeypatch):
    """Some backends plan for each shape anew, which on a card took five times the rest (FACTS.md
    section 9): a pass asks for one, whatever its layers, and decoding for no more than it has
    passes."""
    model = tiny()
    layers = len(model.layers)
    passes = []
    model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    for run in (lambda: decoded(model), lambda: unlearned(model, "graddiff", "fo"),
                lambda: scored(model)):
        passes.clear()
        shapes = attention_shapes(monkeypatch, run)
        monkeypatch.undo()
        assert len(shapes) >= layers * len(passes) > 0
        assert len(set(shapes)) <= 2 * len(passes)  # rows that read several tokens stand apart
