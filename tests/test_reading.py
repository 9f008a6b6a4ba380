"""pipeline/reading.py: the fast scorer gives what the plain one gives, over every architecture,
with fewer tokens read; on a card's memory layout too. What holds for model.generate and the loops
of simu.py on such a layout stands here as well."""

import ast
import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

import data
import eval as evaluation
import simu
from model import Transformer, generate
from pipeline import reading
from test_model import prompts_of, random_model

ROOT = Path(__file__).resolve().parent.parent
KINDS = {  # of random models
    "llama": {}, "llama, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral"}, "qwen2": {"model_type": "qwen2"},
    "olmo": {"model_type": "olmo", "clip_qkv": 0.7, "num_key_value_heads": 1},
    "olmo2": {"model_type": "olmo2"}, "inner": {"neurons": "inner"}}


# ---------------------------------------------------------------------------------- plain is fast


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_scores(kind, monkeypatch):
    model = random_model(**KINDS[kind])
    texts = [[7] * (i % 4 * 3) + p for i, p in enumerate(prompts_of([5 + i % 9
                                                                     for i in range(20)]))]
    rows = [data.Encoded(ids, 2) for ids in texts]
    first, detailed = [1 + i % 2 for i in range(20)], [i % 3 > 0 for i in range(20)]
    plain = evaluation.token_scores(model, rows, first, tokens=90, detailed=detailed)
    for attended, tokens in ((reading.ATTENDED, 90), (1, 90), (1, 40)):  # 1: texts one at a time
        monkeypatch.setattr(reading, "ATTENDED", attended)
        fast = reading.token_scores(model, rows, first, tokens=tokens, detailed=detailed)
        for a, b, row, n, wanted in zip(plain, fast, rows, first, detailed, strict=True):
            assert len(b.losses) == len(row.ids) - n and b.predicted == a.predicted
            assert bool(b.predicted) == bool(b.standard) == wanted
            assert b.losses == pytest.approx(a.losses, rel=1e-5, abs=2e-6)
            assert b.standard == pytest.approx(a.standard, rel=1e-3, abs=1e-3)
    log_p = model(torch.tensor([texts[3]]))[0].log_softmax(-1)
    assert plain[3].losses == pytest.approx(
        [-log_p[t - 1, texts[3][t]].item() for t in range(first[3], len(texts[3]))], rel=1e-5)


def test_logits_a_few_at_a_time_are_the_same(monkeypatch):
    model, rows = random_model(), [data.Encoded(p, 1) for p in prompts_of([9, 4, 7])]
    options = dict(tokens=99, detailed=[True] * 3)
    once = reading.token_scores(model, rows, [1, 1, 1], **options)
    monkeypatch.setattr(reading, "LOGITS", 3 * model.config.vocab_size)
    for a, b in zip(once, reading.token_scores(model, rows, [1, 1, 1], **options)):
        assert a.predicted == b.predicted and a.losses == pytest.approx(b.losses, rel=1e-5)
    assert reading.token_scores(model, [], [], tokens=99) == []


def test_a_text_longer_than_a_pass_is_one_of_its_own():
    model, rows = random_model(), [data.Encoded(p, 1) for p in prompts_of([9, 4, 7, 3])]
    short, long = (reading.token_scores(model, rows, [1] * 4, tokens=n) for n in (7, 99))
    for a, b in zip(short, long, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-5)


def test_texts_with_one_beginning_are_read_together():
    texts = [[1, 2, 3, 4], [7], [1, 2, 9], [1, 2], [1, 2, 9, 5, 6]]
    part, = reading.passes_that_share(texts, 100)
    assert part == reading.Pass([1, 2, 3, 4, 9, 5, 6, 7], [0, 1, 2, 3, 2, 3, 4, 0], {
        3: [0, 1], 0: [0, 1, 2, 3], 2: [0, 1, 4], 4: [0, 1, 4, 5, 6], 1: [7]})
    parts = reading.passes_that_share(texts, 5)
    assert [list(p.texts) for p in parts] == [[3, 0, 2], [4], [1]]
    assert parts[1] == reading.Pass([1, 2, 9, 5, 6], [0, 1, 2, 3, 4], {4: [0, 1, 2, 3, 4]})


# ---------------------------------------------------------------------- memory, layout and device


def tensor_bytes() -> int:
    """Of all tensors that hold memory; a compiler's fake ones of other tests do not."""
    return sum(x.nbytes for x in gc.get_objects()
               if issubclass(type(x), torch.Tensor) and not isinstance(x, FakeTensor))


def loops() -> dict:
    """What the stages do with a model for long."""
    rows = [data.Encoded(p + [3, 4], len(p)) for p in prompts_of([5, 1, 17, 2])]
    recipe = simu.Recipe(method="simu", epochs=1, batch=2, steps=2, lr=1e-4)

    def mask(model):
        return torch.ones(len(model.layers), model.config.neuron_count, dtype=torch.bool)

    return {"decoding": lambda m: generate(m, prompts_of([5, 1, 17]), max_new_tokens=9,
                                           eos_id=None),
            "scoring": lambda m: reading.token_scores(m, rows, [r.start for r in rows], tokens=99),
            "attribution": lambda m: simu.attribute_rows(m, rows, recipe),
            "unlearning": lambda m: simu.unlearn(m, rows[:2], rows[2:], mask(m), recipe)}


@pytest.mark.parametrize("loop", loops())
def test_no_loop_leaves_anything_alive(loop):
    """On a card, what waits for Python's collector is a cache of gigabytes."""
    model, run = random_model(), loops()[loop]
    run(model)
    gc.collect()
    gc.disable()
    try:
        before = tensor_bytes()
        run(model)
        assert tensor_bytes() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "olmo"])
def test_a_cards_memory_layout(kind, monkeypatch):
    """Attention that answers in [B, T, H, hd] memory, as CUDA's fused kernels do."""
    model, prompts = random_model(**KINDS[kind]), prompts_of([5, 1, 17, 30])
    rows = [data.Encoded(p + [3, 4], len(p)) for p in prompts]

    def everything():
        model.zero_grad()
        simu.mean_nll(model, data.collate(rows)).backward()
        return [*(p.grad.clone() for p in model.parameters()), model(torch.tensor([prompts[3]])),
                simu.attribute(model, data.collate(rows), steps=2),
                *(torch.tensor(x.losses) for way in (evaluation.token_scores, reading.token_scores)
                  for x in way(model, rows, [1] * 4, tokens=99)),
                *map(torch.tensor, generate(model, prompts, max_new_tokens=9, eos_id=None))]

    before, kernel = everything(), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: kernel(
        *a, **k).transpose(1, 2).contiguous().transpose(1, 2))
    for a, b in zip(before, everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def on_another_device(kind, monkeypatch) -> Transformer:
    """A model on `meta`, which mixes with the CPU as little as a card does, and every choice 0."""
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: [0] * len(self))
    config = random_model(**KINDS[kind]).config
    with torch.device("meta"):
        return Transformer(config).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_put_on_the_wrong_device(kind, monkeypatch):
    model = on_another_device(kind, monkeypatch)
    assert model(torch.arange(14, device="meta").view(2, 7)).is_meta
    assert generate(model, [[5] * 3, [6] * 7], max_new_tokens=4, eos_id=None) == [[0] * 4] * 2
    part, = reading.passes_that_share([[1, 2, 3], [1, 2, 9, 4]], 99)
    assert reading.read_pass(model, part).is_meta


def test_that_would_be_seen(monkeypatch):
    model, rope = on_another_device("llama", monkeypatch), Transformer.rope
    monkeypatch.setattr(Transformer, "rope", lambda self, positions: rope(
        self, torch.arange(positions.shape[-1])))
    with pytest.raises(RuntimeError, match="device"):
        generate(model, [[5] * 3, [6] * 7], max_new_tokens=4, eos_id=None)


def test_every_new_tensor_names_its_device():
    """torch.arange and the like, which else are made on the CPU. On the host on purpose: a fresh
    model's weights, and what is moved at once."""
    makers = {"arange", "zeros", "ones", "tensor", "empty", "full", "rand", "randn"}
    functions = set()
    for file in ("model.py", "pipeline/reading.py"):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        moved = {id(x.func.value) for x in ast.walk(tree) if isinstance(x, ast.Call)
                 and isinstance(x.func, ast.Attribute) and x.func.attr == "to"}
        for function in (x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)):
            calls = [x for x in ast.walk(function) if isinstance(x, ast.Call)
                     and ast.unparse(x.func) in {f"torch.{name}" for name in makers}]
            functions |= {(file, function.name) for x in calls if id(x) not in moved
                          and "device" not in {k.arg for k in x.keywords}}
    assert functions == {("model.py", "__init__")}
