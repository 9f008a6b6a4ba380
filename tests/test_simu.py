"""The method: attribution against the loop it restates, Sophia by hand, what moves and what not."""

import contextlib
import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F

import simu
from data import IGNORE, Encoded, collate
from model import Config, Transformer, UserError
from pipeline import fused, objectives
from pipeline import settings as pipeline_settings

LLAMA = dict(model_type="llama", num_key_value_heads=2)
OLMO = dict(model_type="olmo", tie_word_embeddings=True, clip_qkv=0.4)


def tiny(kind=LLAMA, *, seed=0, sharp=6.0, **changes):
    """A random model whose weights are large enough that every nonlinearity bites."""
    torch.manual_seed(seed)
    c = Config(**(dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                       num_attention_heads=4, max_position_embeddings=64, eos_token_id=2) | kind
                  | changes))
    model = Transformer(c)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p *= sharp
    return model


def rows(n=4, *, seed=0, vocab=61):
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        prompt, answer = rng.randint(2, 6), rng.randint(1, 9)
        ids = [rng.randrange(3, vocab) for _ in range(prompt + answer)]
        out.append(Encoded(ids + [2], prompt))
    return out


@pytest.mark.parametrize("kind", [LLAMA, OLMO], ids=["llama", "olmo"])
@pytest.mark.parametrize("path, steps", [("layer", 1), ("layer", 5), ("neuron", 3)])
def test_attribute_equals_the_loop(kind, path, steps, monkeypatch):
    monkeypatch.setattr(simu, "LOGITS", 3 * 61)  # three rows of logits at a time
    model = tiny(kind, num_hidden_layers=2 if path == "neuron" else 3)
    pairs = rows(1 if path == "neuron" else 3)
    expected = sum(simu.attribute_loop(model, r, steps=steps, path=path) for r in pairs)
    got = simu.attribute(model, collate(pairs), steps=steps, path=path)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("path", ["layer", "neuron"])
def test_the_loop_is_eq_1_and_2_by_finite_differences(path):
    """beta * (d log P / da) at a = beta / 2 and beta, in float64, without autograd or our hook."""
    model, row, l, k, step = tiny().double(), Encoded([5, 9, 11, 2], 2), 1, 7, 1e-5
    down = model.layers[l].mlp.down_proj.forward
    expected = 0.0
    for n in (2, 3):
        def log_p(change):
            model.layers[l].mlp.down_proj.forward = lambda x: change(down(x))
            with torch.no_grad():
                return model.double()(torch.tensor([row.ids[:n]])).double()[0, -1].log_softmax(
                    -1)[row.ids[n]]

        seen = []
        log_p(lambda y: seen.append(y[0, -1].clone()) or y)
        beta = seen[0]
        for j in (1, 2):
            def put(moved):
                a = beta * j / 2 if path == "layer" else beta.clone()
                a[k] = beta[k] * j / 2 + moved
                return lambda y: torch.cat([y[:, :-1], a[None, None]], dim=1)
            slope = (log_p(put(step)) - log_p(put(-step))) / (2 * step)
            expected += float(beta[k] * slope / 2)
    model.layers[l].mlp.down_proj.forward = down
    got = simu.attribute_loop(model, row, steps=2, path=path)[l, k]
    # float32 logits bound what a difference quotient can show
    assert float(got) == pytest.approx(expected, rel=2e-2, abs=2e-2 * abs(expected) + 1e-4)


@pytest.mark.parametrize("kind", [LLAMA, OLMO], ids=["llama", "olmo"])
def test_completeness(kind):
    """As m grows the scores of a layer sum to log P(beta) - log P(0): the path integral."""
    model, row = tiny(kind, sharp=3.0), rows(1, seed=3)[0]
    change = torch.zeros(len(model.layers))
    for n in range(row.n_prompt, len(row.ids)):
        prefix = torch.tensor([row.ids[:n]])
        with torch.no_grad():
            before = model(prefix)[0, -1].log_softmax(-1)[row.ids[n]]
            for l, block in enumerate(model.layers):
                block.mlp.intervene = lambda y: torch.cat([y[:, :-1], 0 * y[:, -1:]], dim=1)
                change[l] += before - model(prefix)[0, -1].log_softmax(-1)[row.ids[n]]
                block.mlp.intervene = None
    errors = [(simu.attribute(model, collate([row]), steps=m).sum(1) - change).abs().max()
              for m in (20, 320)]
    assert errors[1] < 0.1 * errors[0] and errors[1] < 0.02 * change.abs().max()


@pytest.mark.parametrize("bad", [dict(steps=0), dict(path="both")])
def test_attribute_refuses(bad):
    with pytest.raises(UserError):
        simu.attribute(tiny(), collate(rows(1)), **bad)


def test_critical_mask():
    scores = torch.tensor([[1.0, 3.0, 10.0, -5.0], [-1.0, -2.0, -3.0, -4.0], [0.0, 0.0, 0.0, 0.0]])
    mask = simu.critical_mask(scores, 0.3)
    # 3 is exactly t * max and the rule is strict; layers whose maximum is not positive have none.
    assert mask.tolist() == [[False, False, True, False], [False] * 4, [False] * 4]
    assert simu.critical_mask(scores, 0.29)[0].tolist() == [False, True, True, False]
    assert not simu.critical_mask(scores, 1.0).any()
    for t in (0, 1.1, -1, math.nan):
        with pytest.raises(UserError):
            simu.critical_mask(scores, t)
    with pytest.raises(UserError):
        simu.critical_mask(torch.tensor([[1.0, math.nan]]), 0.5)


# ---------------------------------------------------------------------------------------- Sophia

SOPHIA = dict(lr=0.1, beta1=0.9, beta2=0.95, gamma=2.0, eps=1e-15, weight_decay=0.5)


def test_sophia_by_hand():
    p, g = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -4.0])
    m, h = torch.tensor([0.2, 0.0]), torch.tensor([0.5, 2.0])
    simu.sophia_update(p, g, m, h, **SOPHIA)
    # m = .9*.2 + .1*1 = .28; h = .95*.5 + .05*1 = .525; ratio = .28 / (2*.525) = .26667
    # m = -.4; h = 1.9 + .05*16 = 2.7; ratio = -.4 / 5.4 = -.074074
    torch.testing.assert_close(m, torch.tensor([0.28, -0.4]))
    torch.testing.assert_close(h, torch.tensor([0.525, 2.7]))
    torch.testing.assert_close(p, torch.tensor([0.95 - 0.1 * 0.28 / 1.05, 0.95 + 0.1 * 0.4 / 5.4]))
    # From rest, m = .1 g and h = .05 g^2: small gradients are clipped to a step of lr, and a zero
    # curvature meets eps instead of a division by zero.
    p, g = torch.zeros(3), torch.tensor([1e-3, -1e-3, 0.0])
    simu.sophia_update(p, g, torch.zeros(3), torch.zeros(3), **SOPHIA)
    torch.testing.assert_close(p, torch.tensor([-0.1, 0.1, 0.0]))


def test_the_mask_acts_on_both_moments_and_on_the_update():
    torch.manual_seed(0)
    p, m, h = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3)
    old = [x.clone() for x in (p, m, h)]
    mask = torch.tensor([True, False, True, False])[:, None]
    free = [x.clone() for x in (p, m, h)]
    g = torch.randn(4, 3)
    simu.sophia_update(free[0], g, *free[1:], **SOPHIA)
    simu.sophia_update(p, g, m, h, mask=mask, **SOPHIA)
    for now, before, alone in zip((p, m, h), old, free):
        assert torch.equal(now[1::2], before[1::2])  # weight decay included
        assert torch.equal(now[::2], alone[::2])
    assert not torch.equal(p[::2], old[0][::2])


def test_a_real_valued_mask_blends():
    p, m, h = torch.ones(2), torch.zeros(2), torch.zeros(2)
    simu.sophia_update(p, torch.tensor([1.0, 1.0]), m, h, mask=torch.tensor([0.25, 1.0]), **SOPHIA)
    torch.testing.assert_close(m, torch.tensor([0.025, 0.1]))
    torch.testing.assert_close(h, torch.tensor([0.0125, 0.05]))
    torch.testing.assert_close(p, torch.tensor([0.25 * 0.85 + 0.75, 0.85]))


def test_adamw_equals_torch():
    torch.manual_seed(0)
    ours = torch.randn(5)
    theirs = torch.nn.Parameter(ours.clone())
    m, h = torch.zeros(5), torch.zeros(5)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.1)
    for step in range(1, 8):
        theirs.grad = torch.randn(5)
        rules = simu.adamw(simu.Recipe(), 0.01, 0.1, step)
        simu.masked_update(ours, theirs.grad, m, h, rules, None)
        reference.step()
    torch.testing.assert_close(ours, theirs.detach())


# ------------------------------------------------------------------------------------- unlearning


def recipe(**changes):
    return objectives.Recipe(**(dict(lr=1e-2, epochs=2, batch=4) | changes))


def run(model, s, mask, **options):
    simu.unlearn(model, rows(6), rows(10, seed=1), mask, s, **options)
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_graddiff_is_minus_forget_plus_lambda_retain():
    model = tiny()
    forget, retain = collate(rows(2)), collate(rows(3, seed=1))

    def by_hand(batch):
        logits = model(batch.ids).flatten(0, 1)
        return F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE)

    got = simu.graddiff_loss(model, forget, retain, 0.3)
    torch.testing.assert_close(got, -by_hand(forget) + 0.3 * by_hand(retain))


def test_the_summands_are_the_gradient_of_graddiff_loss(monkeypatch):
    """In passes of at most 32 tokens, and of at most 12 rows of logits."""
    model, f, r, s = tiny(), rows(5), rows(5, seed=1), recipe(micro_tokens=32)
    simu.graddiff_loss(model, collate(f), collate(r), s.lam).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(simu, "LOGITS", 12 * 61)
    summands = [loss.backward() for _, loss, _ in simu.graddiff(model, f, r, None, s)]
    assert len(summands) > 4
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [LLAMA, OLMO], ids=["llama", "olmo"])
@pytest.mark.parametrize("dtype, state", [("float32", "float32"), ("bfloat16", "float32"),
                                          ("bfloat16", "bfloat16")])
def test_simu_moves_attention_and_critical_rows_and_nothing_else(kind, dtype, state):
    model = tiny(kind).to(getattr(torch, dtype))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = torch.rand(3, 32) < 0.3
    mask[1] = False  # a layer without a critical neuron
    after = run(model, recipe(), mask, **fused.on(torch.device("cpu"), state))
    for name, new in after.items():
        old = before[name]
        if "self_attn" in name:
            assert not torch.equal(new, old), name
        elif "down_proj" in name:
            critical = mask[int(name.split(".")[1])]
            assert torch.equal(new[~critical], old[~critical]), name
            assert (new[critical] != old[critical]).any(1).all(), name
        else:
            assert torch.equal(new, old), name


@pytest.mark.parametrize("method", ["fo", "simu"])
def test_what_its_owner_froze_is_frozen_again(method):
    """Also where moving_weights refuses: SIMU without a mask."""
    model = tiny()
    model.norm.weight.requires_grad_(False)
    with pytest.raises(UserError) if method == "simu" else contextlib.nullcontext():
        run(model, recipe(method=method), None)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["norm.weight"]


def test_optimiser_state_is_held_only_for_what_moves():
    model, mask = tiny(), torch.zeros(3, 32, dtype=torch.bool)
    mask[0, :5] = mask[2, 7] = True
    with simu.moving_weights(model, recipe(), mask) as moving:
        shapes = {w.name: tuple(w.m.shape) for w in moving}
        attention = sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n)
        assert sum(w.m.numel() for w in moving) == attention + 6 * 48
        assert shapes["layers.0.mlp.down_proj.part"] == (5, 48)
        simu.mean_nll(model, collate(rows(2))).backward()
        dense = [n for n, p in model.named_parameters() if p.grad is not None and ".mlp." in n]
        assert sorted(dense) == ["layers.0.mlp.down_proj.part", "layers.2.mlp.down_proj.part"]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in tiny().named_parameters()]


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_a_small_update_is_never_lost_in_bfloat16(state):
    """400 updates of 5e-6 on a weight of 0.25, whose bfloat16 neighbours are 1e-3 apart [D10]."""
    model, mask = tiny().bfloat16(), torch.zeros(3, 32, dtype=torch.bool)
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight.fill_(0.25)
    ways = dict(apply=simu.apply_updates) | fused.on(torch.device("cpu"), state)

    def plain(recipe, lr, decay, step):
        return (lambda g, m, h: (g, h)), (lambda p, m, h: p - lr * m)

    with simu.moving_weights(model, recipe(), mask, getattr(torch, state)) as moving:
        w = next(w for w in moving if w.name == "layers.0.self_attn.q_proj.weight")
        for step in range(400):
            w.weight.grad = torch.ones_like(w.weight)
            ways["apply"]([w], plain, recipe(), lr=5e-6, step=step, shrink=1.0)
        moved = 0.25 - w.master.float().mean()
    naive = torch.tensor(0.25, dtype=torch.bfloat16) - 5e-6
    assert naive == 0.25  # without care nothing would have moved
    assert float(moved) == pytest.approx(400 * 5e-6, rel=0.1 if state == "bfloat16" else 1e-2)


def taught(model, batches, s, title="teach"):
    """`train` on batches of rows, by descent alone."""
    simu.train(model, [([], x, None) for x in batches], simu.OBJECTIVES["retain"], s, title=title)


def test_decay_spares_norms_and_is_decoupled(monkeypatch):
    """[D7] through the loop itself: with a zero gradient an update is the decay alone."""
    s, model = recipe(method="fo", lr=0.5, weight_decay=0.1, warmup=0.0), tiny()
    old = {n: p.detach().clone() for n, p in model.named_parameters()}

    def without_gradient(*args):
        moments, weights = simu.adamw(*args)
        return (lambda g, m, h: moments(torch.zeros_like(g), m, h)), weights

    monkeypatch.setitem(simu.OPTIMISERS, "adamw", without_gradient)
    taught(model, [rows(4)], s)
    for name, p in model.named_parameters():
        factor = 1 if "norm" in name else 1 - 0.5 * 0.1
        torch.testing.assert_close(p.detach(), old[name] * factor, msg=name)


def test_unlearning_forgets_and_keeps():
    """On a model that knows both sets, SIMU raises the forget loss far more than the retain
    loss; without unlearning neither moves (the control is the loss before)."""
    model, forget, retain = tiny(sharp=1.0), rows(6), rows(10, seed=1)
    taught(model, [forget + retain] * 60, recipe(method="fo"))
    scores = simu.attribute(model, collate(forget))
    mask = simu.critical_mask(scores, 0.3)
    before = [simu.mean_nll(model, collate(x)).item() for x in (forget, retain)]
    simu.unlearn(model, forget, retain, mask, recipe(lr=4e-3, epochs=20))
    after = [simu.mean_nll(model, collate(x)).item() for x in (forget, retain)]
    assert before[0] < 0.1 and before[1] < 0.1
    assert after[0] > 1.0 and after[0] > 10 * after[1]


def test_order_pairs_each_forget_row_with_a_retain_row():
    s = recipe(epochs=3, batch=4)
    order = simu.unlearning_order(10, 50, s)
    assert len(order) == 7  # floor(3 * 10 / 4), as SOUL counts
    flat = [i for f, _ in order for i in f]
    assert sorted(flat[:10]) == list(range(10)) and sorted(flat[10:20]) == list(range(10))
    assert all(len(f) == len(r) == 4 and max(r) < 50 for f, r in order)
    assert order == simu.unlearning_order(10, 50, s)
    with pytest.raises(UserError):
        simu.unlearning_order(3, 5, recipe(epochs=1, batch=4))


def test_schedule():
    rates = [simu.learning_rate(i, 100, 1.0, 0.1) for i in range(1, 101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[-1] == pytest.approx(1 / 91) and all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_a_diverged_run_stops():
    model = tiny()
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.fill_(1e38)
    with pytest.raises(UserError, match="not finite"):
        run(model, recipe(method="so"), None)


# ---------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("cell, t, m, lr, epochs", [
    (("tofu", "llama2-7b"), 0.3, 5, 5e-6, (5, 5, 5)),
    (("tofu", "olmo-1b"), 0.1, 5, 5e-6, (20, 20, 20)),
    (("lume", "llama2-7b"), 0.1, 3, 9e-6, (20, 20, 20)),
    (("lume", "olmo-1b"), 0.3, 5, 5e-6, (5, 10, 10))])
def test_recipes_are_tables_3_and_4(cell, t, m, lr, epochs):
    row = simu.RECIPES[cell]
    assert (row.threshold, row.steps, row.batch, row.lr, row.epochs) == (t, m, 16, lr, epochs[2])
    for method, n, lam in zip(("fo", "so", "simu"), epochs, (0.3, 2.0, 2.0)):
        s = pipeline_settings.resolve(dict(benchmark=cell[0], model=cell[1], method=method))
        assert (s.threshold, s.steps, s.batch, s.lr, s.epochs, s.lam) == (t, m, 16, lr, n, lam)
        assert (s.gamma, s.beta1, s.beta2, s.eps, s.weight_decay) == (204.8, 0.9, 0.95, 1e-15, 0.1)
    given = pipeline_settings.resolve(dict(benchmark=cell[0], model=cell[1], lr=1e-3,
                                           threshold=0.9))
    assert (given.lr, given.threshold) == (1e-3, 0.9)
    assert dataclasses.replace(row, method="so", lr=1e-3).lr == 1e-3
