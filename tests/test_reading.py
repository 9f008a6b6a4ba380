"""pipeline/reading.py: the fast twins say what the plain ones say, over every architecture, drafts,
shared beginnings, several eos and limits, with fewer passes; on a card's memory layout too."""

import ast
import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import data
import eval as evaluation
import model as module
import simu
from model import Transformer, UserError
from pipeline import fused, reading
from pipeline.reading import generate
from test_model import an_eos, prompts_of, random_model, slow_greedy

ROOT = Path(__file__).resolve().parent.parent
GROUPED = {"num_key_value_heads": 2}
KINDS = {  # of random models
    "llama": {}, "llama, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral"}, "qwen2": {"model_type": "qwen2"},
    "olmo": {"model_type": "olmo", "clip_qkv": 0.7, "num_key_value_heads": 1},
    "olmo2": {"model_type": "olmo2"}, "inner": {"neurons": "inner"}}


def make(kind) -> Transformer:
    """Random weights with which greedy texts vary."""
    return random_model(**KINDS[kind])


def cut_at(texts, ends):
    return [text[:min([text.index(e) for e in ends if e in text], default=len(text))]
            for text in texts]


def wrong_at(texts, place):
    return [text[:place] + [(text[place] + 1) % 97] + text[place + 1:] for text in texts]


# ---------------------------------------------------------------------------------- plain is fast


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens(kind):
    model = make(kind)
    prompts = prompts_of([3, 20, 1, 8, 30, 2])
    free = [slow_greedy(model, p, new=14, eos_id=None) for p in prompts]
    assert len({tuple(text) for text in free}) == len(free)
    eos = an_eos(free)
    for ends, options in ((None, {}), (eos, dict(batch_tokens=100)), ((eos, free[0][5]), {})):
        want = free if ends is None else cut_at(free, [ends] if ends == eos else ends)
        assert len({len(text) for text in want}) > 1 or ends is None
        limits = dict(max_new_tokens=14, eos_id=ends, **options)
        assert module.generate(model, prompts, drafts=free, **limits) == want
        for drafts in (None, free, want, wrong_at(free, 5), [None, []] * 3):
            assert generate(model, prompts, drafts=drafts, **limits) == want


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_after_a_shared_beginning_and_at_every_limit(kind):
    model = make(kind)
    prompts = [[7] * 20 + p for p in prompts_of([3, 1, 9, 30, 43, 9])]  # context 64
    for limits in (dict(max_new_tokens=9), dict(max_total_tokens=40), dict(), dict(
            max_new_tokens=5, max_total_tokens=30), dict(max_new_tokens=0)):
        want = module.generate(model, prompts, eos_id=None, **limits)
        assert generate(model, prompts, eos_id=None, **limits) == want
        assert generate(model, prompts, eos_id=None, drafts=want, **limits) == want
        assert want[0] == slow_greedy(model, prompts[0], new=len(want[0]), eos_id=None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_scores(kind, monkeypatch):
    model = make(kind)
    some = [[7] * (i % 4 * 3) + p for i, p in enumerate(prompts_of([5 + i % 9 for i in range(20)]))]
    rows = [data.Encoded(ids, 2) for ids in some]
    first, detailed = [1 + i % 2 for i in range(20)], [i % 3 > 0 for i in range(20)]
    want = evaluation.token_scores(model, rows, first, tokens=90, detailed=detailed)
    for attended, tokens in ((reading.ATTENDED, 90), (1, 90), (1, 40)):  # 1: texts one at a time
        monkeypatch.setattr(reading, "ATTENDED", attended)
        got = reading.token_scores(model, rows, first, tokens=tokens, detailed=detailed)
        for a, b, row, n, wanted in zip(want, got, rows, first, detailed, strict=True):
            assert len(b.losses) == len(row.ids) - n and b.predicted == a.predicted
            assert bool(b.predicted) == bool(b.standard) == wanted
            assert b.losses == pytest.approx(a.losses, rel=1e-5, abs=2e-6)
            assert b.standard == pytest.approx(a.standard, rel=1e-3, abs=1e-3)
    direct = model(torch.tensor([some[3]]))[0].log_softmax(-1)
    assert want[3].losses == pytest.approx(
        [-direct[t - 1, some[3][t]].item() for t in range(first[3], len(some[3]))], rel=1e-5)


def test_a_text_that_no_pass_holds():
    model = random_model()
    reading.token_scores(model, [data.Encoded([1] * 9, 1)], [1], tokens=8)
    with pytest.raises(UserError, match="--eval-tokens 7 cannot hold a text of 9 tokens"):
        reading.token_scores(model, [data.Encoded([1] * 9, 1)], [1], tokens=7)


def test_texts_that_begin_alike_are_read_together():
    texts = [[1, 2, 3, 4], [7], [1, 2, 9], [1, 2], [1, 2, 9, 5, 6]]
    part, = reading.passes_that_share(texts, 100)
    assert part == reading.Pass([1, 2, 3, 4, 9, 5, 6, 7], [0, 1, 2, 3, 2, 3, 4, 0], {
        3: [0, 1], 0: [0, 1, 2, 3], 2: [0, 1, 4], 4: [0, 1, 4, 5, 6], 1: [7]})
    parts = reading.passes_that_share(texts, 5)
    assert [list(p.texts) for p in parts] == [[3, 0, 2], [4], [1]]
    assert parts[1] == reading.Pass([1, 2, 9, 5, 6], [0, 1, 2, 3, 4], {4: [0, 1, 2, 3, 4]})


def test_drafts_must_be_as_many_as_prompts():
    with pytest.raises(UserError, match="2 prompts and 1 drafts"):
        generate(random_model(), [[5], [6]], max_new_tokens=8, eos_id=None, drafts=[[7]])


def test_the_bar_counts_rows(capsys):
    generate(random_model(), prompts_of([3, 4, 5]), max_new_tokens=2, eos_id=None, progress="say")
    assert "3/3" in capsys.readouterr().err


# ---------------------------------------------------------------------- memory, layout and device


def tensor_bytes() -> int:
    """Of all tensors that hold memory; a compiler's fake ones of other tests do not."""
    return sum(x.nbytes for x in gc.get_objects()
               if issubclass(type(x), torch.Tensor) and not isinstance(x, FakeTensor))


@pytest.mark.parametrize("kind", ["llama"])
@pytest.mark.parametrize("way", [generate, module.generate])
def test_a_decoding_leaves_nothing_alive(kind, way):
    """On a card, what waits for Python's collector is a cache of gigabytes."""
    model, prompts = make(kind), prompts_of([5, 1, 17, 2])
    say = lambda: way(model, prompts, max_new_tokens=9, eos_id=None, drafts=said)
    said = None
    said = say()
    gc.collect()
    gc.disable()
    try:
        before = tensor_bytes()
        assert say() == said
        assert tensor_bytes() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["llama"])
def test_no_stages_loop_leaves_anything_alive(kind):
    model = make(kind)
    rows = [data.Encoded(p + [3, 4], len(p)) for p in prompts_of([5, 1, 17, 2])]
    mask = torch.ones(len(model.layers), model.config.neuron_count, dtype=torch.bool)
    recipe = simu.Recipe(method="simu", epochs=1, batch=2, steps=2, lr=1e-4)
    loops = (lambda: reading.token_scores(model, rows, [len(r.ids) - 2 for r in rows], tokens=99),
             lambda: simu.attribute_rows(model, rows, recipe),
             lambda: simu.unlearn(model, rows[:2], rows[2:], mask, recipe),
             lambda: simu.unlearn(model, rows[:2], rows[2:], mask, recipe,
                                  backward=fused.backward_together))
    for loop in loops:
        loop()
        gc.collect()
        gc.disable()
        try:
            before = tensor_bytes()
            loop()
            assert tensor_bytes() == before
        finally:
            gc.enable()


def as_on_a_card(monkeypatch):
    """Attention that answers in [B, T, H, hd] memory, as CUDA's fused kernels do."""
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: kernel(
        *a, **k).transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "olmo"])
def test_a_cards_memory_layout(kind, monkeypatch):
    model, prompts = make(kind), prompts_of([5, 1, 17, 30])
    rows = [data.Encoded(p + [3, 4], len(p)) for p in prompts]
    said = module.generate(model, prompts, max_new_tokens=9, eos_id=None)

    def everything():
        model.zero_grad()
        simu.mean_nll(model, data.collate(rows)).backward()
        return ([p.grad.clone() for p in model.parameters()], model(torch.tensor([prompts[3]])),
                simu.attribute(model, data.collate(rows), steps=2),
                *(way(model, prompts, max_new_tokens=9, eos_id=None, drafts=drafts)
                  for way, drafts in ((module.generate, None), (generate, None), (generate, said),
                                      (generate, [said[0], *[None] * 3]))),
                *(way(model, rows, [1] * 4, tokens=99)
                  for way in (evaluation.token_scores, reading.token_scores)))

    grads, logits, scores, *spoken = everything()
    as_on_a_card(monkeypatch)
    their_grads, their_logits, their_scores, *their_spoken = everything()
    assert spoken[:4] == [said] * 4 == their_spoken[:4]
    for a, b in ((logits, their_logits), (scores, their_scores), *zip(grads, their_grads)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(spoken[4:], their_spoken[4:]):
        for x, y in zip(a, b):
            assert x.losses == pytest.approx(y.losses, rel=1e-5)


def on_another_device(kind, monkeypatch) -> Transformer:
    """A model on `meta`, which mixes with the CPU as little as a card does, and every choice 0."""
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: [0] * len(self))
    config = make(kind).config
    with torch.device("meta"):
        return Transformer(config).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_made_on_the_wrong_device(kind, monkeypatch):
    model = on_another_device(kind, monkeypatch)
    slots = torch.arange(14, device="meta")
    assert model(slots.view(2, 7)).is_meta
    assert model.hidden_of_rows(slots, slots, (2, 7), slots % 7).is_meta
    for way in (module.generate, generate):
        assert way(model, [[5] * 3, [6] * 7], max_new_tokens=4, eos_id=None) == [[0] * 4] * 2
    # With what several begin with, and drafts of unlike lengths.
    prompts, drafts = [[5] * n for n in (20, 22, 25)], [[0] * 9, [], [0] * 3]
    said = generate(model, prompts, max_new_tokens=8, eos_id=None, drafts=drafts)
    assert said == [[0] * 8] * 3
    part, = reading.passes_that_share([[1, 2, 3], [1, 2, 9, 4]], 99)
    assert reading.read_pass(model, part).is_meta


@pytest.mark.parametrize("name, wrong", [
    ("rope", lambda self, positions: module.rope(self.config, torch.arange(positions.shape[-1]))),
    ("embed", lambda self, ids: torch.zeros(*ids.shape, 32))])
def test_that_would_be_seen(name, wrong, monkeypatch):
    model = on_another_device("llama", monkeypatch)
    monkeypatch.setattr(Transformer, name, wrong)
    for way in (module.generate, generate):
        with pytest.raises(RuntimeError, match="device"):
            way(model, [[5] * 3, [6] * 7], max_new_tokens=4, eos_id=None)


def test_every_new_tensor_names_its_device():
    """torch.arange and the like, which else are made on the CPU. On the host on purpose: what
    Cache.lay_out works out and sends in one go, a fresh model's weights, and what is moved at once.
    """
    makers = {"arange", "zeros", "ones", "tensor", "empty", "full", "rand", "randn"}
    found = []
    for file in ("model.py", "pipeline/reading.py"):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        moved = {id(x.func.value) for x in ast.walk(tree) if isinstance(x, ast.Call)
                 and isinstance(x.func, ast.Attribute) and x.func.attr == "to"}
        for function in (x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)):
            found += [(file, function.name) for x in ast.walk(function) if isinstance(x, ast.Call)
                      and isinstance(x.func, ast.Attribute) and x.func.attr in makers
                      and isinstance(x.func.value, ast.Name) and x.func.value.id == "torch"
                      and id(x) not in moved and "device" not in {k.arg for k in x.keywords}]
    assert set(found) == {("model.py", "__init__"), ("pipeline/reading.py", "__init__"),
                          ("pipeline/reading.py", "lay_out"), ("pipeline/reading.py",
                                                               "token_scores")}


# ----------------------------------------------------------------------------------- few passes


@pytest.fixture
def passes():
    """A model and the list that gets, at each of its passes, how many tokens the pass read."""
    model, read = random_model(), []
    model.layers[0].register_forward_hook(lambda _, args, __: read.append(args[0].shape[1]))
    return model, read


def test_finished_rows_leave_the_batch(monkeypatch):
    model = random_model()
    prompts = prompts_of([4] * 12)
    free = generate(model, prompts, max_new_tokens=30, eos_id=None)
    eos = an_eos(free)
    rows = []
    inner = reading.Cache.step

    def step(self, layout, layer, q, k, v):
        rows.append(len(self.kv[layer]))
        return inner(self, layout, layer, q, k, v)

    monkeypatch.setattr(reading.Cache, "step", step)
    got = generate(model, prompts, max_new_tokens=30, eos_id=eos)
    assert got == [text[:text.index(eos)] if eos in text else text for text in free]
    assert rows[0] > rows[-1] and rows == sorted(rows, reverse=True)


@pytest.mark.parametrize("shared", [0, 20])
def test_rows_take_the_places_of_those_that_ended(passes, shared, monkeypatch):
    """Also where what all prompts begin with is read once, for those that come later too."""
    (model, read), whole, inner = passes, [], reading.Cache.prefill
    monkeypatch.setattr(reading.Cache, "prefill", lambda self, rows, layer, q, k, v: whole.append(
        k.shape[2]) or inner(self, rows, layer, q, k, v))
    prompts = [[5] * shared + p for p in prompts_of([4 + i % 5 for i in range(24)])]
    free = [slow_greedy(model, p, new=30, eos_id=None) for p in prompts]
    eos = an_eos(free)
    want = [text[:text.index(eos)] if eos in text else text for text in free]
    room = 6 * (shared + 8 + 30)
    for drafts in (None, want, free[::-1]):
        read.clear()
        whole.clear()
        assert generate(model, prompts, max_new_tokens=30, eos_id=eos, batch_tokens=room,
                        drafts=drafts) == want
        if drafts is None:  # six at a time without it: each six as long as its longest
            order = sorted(range(24), key=lambda i: -len(prompts[i]))
            apart = [max(len(want[i]) for i in order[n:n + 6]) for n in range(0, 24, 6)]
            assert len(read) < sum(apart)
        assert whole == [shared] * len(model.layers) or not shared


def test_a_short_row_does_not_take_the_place_of_a_long_one():
    assert list(reading.row_groups([9, 1, 5, 30, 2], [1, 0, 1, 2, 1], 64)) == [
        (1, [3]), (2, [0, 2]), (1, [4])]
    assert list(reading.row_groups([20] * 5, [10] * 5, 64)) == [(2, [0, 1, 2, 3, 4])]


def said(model, read, prompts, **options):
    """The texts, and how many passes followed the reading of the prompts."""
    read.clear()
    texts = generate(model, prompts, **dict(max_new_tokens=40, eos_id=None) | options)
    return texts, len(read) - -(-len(prompts) // reading.PROMPTS_AT_ONCE)


def test_a_right_draft_is_checked_in_few_passes(passes):
    prompts = prompts_of([5, 1, 17, 2])
    free, steps = said(*passes, prompts)
    drafted, few = said(*passes, prompts, drafts=free)
    assert drafted == free and few <= 5 < steps <= 39
    # One token to believe in the draft, then 1 + 4, 1 + 8, 1 + 16, and what is left.
    assert passes[1][1:] == [4 * n for n in (5, 9, 17, 8)]


def test_what_all_prompts_begin_with_is_read_once(passes):
    model, read = passes
    shots, *ends = prompts_of([30, 5, 1, 9, 5])
    prompts = [shots + end for end in ends] + [shots + ends[0]]
    got = generate(model, prompts, max_new_tokens=20, eos_id=None)
    assert read[:2] == [30, 5 + 1 + 9 + 5 + 5]
    assert got == [slow_greedy(model, p, new=20, eos_id=None) for p in prompts]
    short = [shots[:reading.LEAST_SHARED - 1] + end for end in ends]  # not worth a pass of its own
    read.clear()
    generate(model, short, max_new_tokens=1, eos_id=None)
    assert read == [reading.LEAST_SHARED - 1 + 9]
    generate(model, [shots, shots], max_new_tokens=1, eos_id=None)
    assert read[1:] == [29, 2]


@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 4, "tie_word_embeddings": True}, {"model_type": "mistral"},
    {"model_type": "olmo", "clip_qkv": 0.7, "num_key_value_heads": 1}, {"model_type": "olmo2"}])
def test_no_draft_changes_a_token(changes):
    model = random_model(**changes)
    prompts = prompts_of([3, 20, 1, 8, 8, 13, 30, 2])
    free = [slow_greedy(model, p, new=30, eos_id=None) for p in prompts]
    eos = an_eos(free)
    want = [text[:text.index(eos)] if eos in text else text for text in free]
    for drafts in (free[::-1], *(wrong_at(free, place) for place in (0, 1, 9)), [[], None] * 4,
                   [text * 3 for text in free], [text[:i] for i, text in enumerate(free)],
                   [*free[:3], *[None] * 5],  # few read ahead: the others do not wait for them
                   [[5] * 40] * 8, [[97, -1, 10 ** 9]] * 8):
        for options in ({}, {"batch_tokens": 120}):
            got = generate(model, prompts, max_new_tokens=30, eos_id=eos, drafts=drafts, **options)
            assert got == want


def test_a_wrong_draft_costs_no_pass(passes):
    prompts = prompts_of([5, 9])
    free, steps = said(*passes, prompts)
    for drafts in ([[1] * 40] * 2, wrong_at(free, 0)):
        got, count = said(*passes, prompts, drafts=drafts)
        assert got == free and count <= steps


def test_a_row_that_left_its_draft_finds_back(passes):
    prompts = prompts_of([5])
    free, _ = said(*passes, prompts)
    _, alone = said(*passes, prompts, drafts=free)
    got, back = said(*passes, prompts, drafts=wrong_at(free, 9))
    assert got == free and back <= alone + 5


def test_a_collapsed_row_is_its_own_draft(passes):
    model, read = passes
    for block in model.layers:  # the next token depends on the last one alone: every text loops
        block.self_attn.o_proj.weight.data.zero_()
    prompts = prompts_of([4, 11, 2])
    texts, few = said(model, read, prompts, max_new_tokens=50)
    assert texts == [slow_greedy(model, p, new=50, eos_id=None) for p in prompts]
    period = max(len(set(text)) for text in texts)
    assert few < period + 12 < 49


@pytest.mark.parametrize("after", [[], [3], [4, 9, 2, 60, 3] * 4])
def test_eos_inside_a_draft_ends_the_row(passes, after):
    prompts = prompts_of([6, 3])
    free, _ = said(*passes, prompts)
    for place in (0, 1, 7, 20):
        eos = free[0][place]
        want = [text[:text.index(eos)] if eos in text else text for text in free]
        drafts = [text + [eos] + after for text in want]
        assert said(*passes, prompts, drafts=drafts, eos_id=eos)[0] == want
        assert said(*passes, prompts, drafts=free, eos_id=eos)[0] == want


def test_drafts_keep_to_limits_and_context(passes):
    prompts = prompts_of([10, 60, 3])  # context 64
    free, _ = said(*passes, prompts, max_new_tokens=None)
    assert [len(text) for text in free] == [54, 4, 61]
    drafts = [text + [1] * 50 for text in free]
    assert said(*passes, prompts, max_new_tokens=None, drafts=drafts)[0] == free
    for new in (0, 1, 2, 6, 7):
        got, _ = said(*passes, prompts, max_new_tokens=new, drafts=drafts)
        assert got == [text[:new] for text in free]


def test_rows_advance_each_by_its_own_count(passes):
    prompts = prompts_of([7] * 6)
    free, steps = said(*passes, prompts)
    got, count = said(*passes, prompts, drafts=free[:3] + [None] * 3)
    assert got == free and count == steps
    read = passes[1][1:]
    assert read[0] == 3 * 5 + 3 and read[-1] == 3  # the finished three have left
