"""model.py: parity with transformers (golden files, and live where it is installed), decoding,
loading, saving, and the faults of both."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import model as module
from model import (NEURONS, Architecture, Config, Transformer, UserError, generate,
                   save_tensors)
from pipeline import checkpoint
from pipeline.files import read_tensors

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "golden.json").read_text())
KINDS = ["llama-grouped", "llama-tied", "olmo-tied", "olmo-clip"]
SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=44, num_hidden_layers=3,
             num_attention_heads=4, max_position_embeddings=64)


def relative(ours, theirs) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def random_model(**changes) -> Transformer:
    """A small model with weights large enough that its greedy texts vary."""
    torch.manual_seed(0)
    llama = {"model_type": "llama", "num_key_value_heads": 2}
    model = Transformer(Config(**llama | SHAPE | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(15 if weight.dim() == 2 else 1)
    return model


def prompts_of(lengths, seed=1) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SHAPE["vocab_size"], (n,), generator=g).tolist() for n in lengths]


def slow_greedy(model, prompt, *, new, eos_id) -> list[int]:
    """Greedy decoding to the letter: a full pass per token, one prompt, no cache."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            token = model(torch.tensor([ids]))[0, -1].argmax().item()
        if token == eos_id:
            break
        ids.append(token)
    return ids[len(prompt):]


def an_eos(texts) -> int:
    """A token that ends some of these texts, and not all at the same step."""
    def stops(t):
        return {text.index(t) if t in text else -1 for text in texts}
    return max({t for text in texts for t in text}, key=lambda t: (len(stops(t)), -t))


# ------------------------------------------------------------------------------- golden parity


@pytest.mark.parametrize("kind", KINDS)
def test_golden_logits_and_tokens(kind):
    model = Transformer.from_pretrained(GOLDEN / kind)
    want = torch.tensor(EXPECTED[kind]["logits"])
    prompts, eos = EXPECTED["prompts"], EXPECTED["eos"]
    with torch.no_grad():
        assert relative(model(torch.tensor([prompts[2]]))[0, -3:], want) < 1e-5
    got = generate(model, prompts, max_new_tokens=EXPECTED["new"], eos_id=eos)
    assert got == EXPECTED[kind]["tokens"]


def test_golden_clip_bites():
    model = Transformer.from_pretrained(GOLDEN / "olmo-clip")
    ids = torch.tensor([EXPECTED["prompts"][2]])
    with torch.no_grad():
        clipped = model(ids)
        for block in model.layers:
            block.self_attn.clip = None
        assert relative(model(ids), clipped) > 0.01


# ------------------------------------------------------------------- parity with transformers


@pytest.fixture(scope="module", params=KINDS)
def theirs(request, tmp_path_factory):
    """A random checkpoint of transformers' own making: (its model, its folder, kind)."""
    hf = pytest.importorskip("transformers")

    def llama(**kw):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, rms_norm_eps=1e-5, **kw))

    def olmo(**kw):
        return hf.OlmoForCausalLM(hf.OlmoConfig(**SHAPE, eos_token_id=2, **kw))

    torch.manual_seed(3)
    model = {"llama-grouped": lambda: llama(num_key_value_heads=2, rope_parameters={
                 "rope_type": "default", "rope_theta": 500.0}),
             "llama-tied": lambda: llama(tie_word_embeddings=True, head_dim=12),
             "olmo-tied": lambda: olmo(tie_word_embeddings=True),
             "olmo-clip": lambda: olmo(clip_qkv=0.5)}[request.param]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3) if weight.dim() == 2 else weight.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="20KB" if "grouped" in request.param else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == ("grouped" in request.param)
    return model, folder, request.param


def their_greedy(model, prompt, *, new, eos_id):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                         do_sample=False, eos_token_id=eos_id, pad_token_id=0)
    out = out[0, len(prompt):].tolist()
    return out[:out.index(eos_id)] if eos_id in out else out


def test_logits_equal_transformers(theirs):
    model, folder, kind = theirs
    ours = Transformer.from_pretrained(folder)
    ids = torch.tensor(prompts_of([40, 40, 40]))
    with torch.no_grad():
        want = model(ids).logits
        assert relative(ours(ids), want) < 1e-5
        if kind == "olmo-clip":
            model.config.clip_qkv = None
            assert relative(model(ids).logits, want) > 0.01
            model.config.clip_qkv = 0.5


def test_greedy_tokens_equal_transformers(theirs):
    model, folder, _ = theirs
    ours = Transformer.from_pretrained(folder)
    prompts = prompts_of([5, 1, 17, 9, 9, 30, 2])
    free = generate(ours, prompts, max_new_tokens=24, eos_id=None)
    assert {len(text) for text in free} == {24}
    eos = an_eos(free)
    got = generate(ours, prompts, max_new_tokens=24, eos_id=eos)
    assert len({len(text) for text in got}) > 1
    assert got == [their_greedy(model, p, new=24, eos_id=eos) for p in prompts]


@pytest.mark.parametrize("shard_bytes", [10 ** 9, 20_000])
def test_saved_model_loads_in_transformers(theirs, tmp_path, shard_bytes):
    hf = pytest.importorskip("transformers")
    model, folder, _ = theirs
    Transformer.from_pretrained(folder).save_pretrained(tmp_path, shard_bytes=shard_bytes)
    again, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    ids = torch.tensor(prompts_of([20]))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.eos_token_id == model.config.eos_token_id
    assert again.config.dtype == torch.float32
    files = sorted(file.name for file in tmp_path.iterdir())
    assert "config.json" in files and "generation_config.json" in files
    assert not any("partial" in name for name in files)
    assert ("model.safetensors.index.json" in files) == (shard_bytes == 20_000)


def test_bfloat16_close_to_transformers(theirs):
    hf = pytest.importorskip("transformers")
    _, folder, _ = theirs
    ours = Transformer.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.tensor(prompts_of([20]))
    with torch.no_grad():
        logits = ours(ids)
        assert logits.dtype == torch.float32
        assert relative(logits, model(ids).logits.float()) < 0.05  # both round at 2^-8 per step


# -------------------------------------------------------------------------------- our own model


def test_seed_decides_fresh_weights():
    config = Config(model_type="llama", **SHAPE)
    torch.manual_seed(5)
    first = Transformer(config)
    torch.manual_seed(5)
    second = Transformer(config)
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(a, b), name
    assert first.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    residual = first.layers[0].mlp.down_proj.weight.std().item()
    assert residual == pytest.approx(0.02 / 6**0.5, rel=0.1)


def test_olmo_norm_has_no_weights_and_is_float32():
    model = Transformer(Config(model_type="olmo", **SHAPE)).bfloat16()
    assert not any("norm" in name for name, _ in model.named_parameters())
    x = (torch.randn(2, 3, 32) + 100).bfloat16()
    wide = x.float()
    want = (wide - wide.mean(-1, keepdim=True)) / (
        wide.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(model.norm(x).float(), want, atol=0.02)


def test_causal_right_padding_cannot_be_seen():
    model = random_model()
    ids = torch.tensor(prompts_of([12]))
    with torch.no_grad():
        short, long = model(ids[:, :7]), model(ids)
    assert torch.allclose(short, long[:, :7], atol=1e-5)
    assert not torch.allclose(short[:, 6], long[:, 7], atol=1e-2)


def test_intervene_changes_only_later_layers_and_positions():
    model = random_model(num_hidden_layers=4)
    ids = torch.tensor(prompts_of([10]))

    def states():
        seen, hooks = [], []
        for block in model.layers:
            hooks.append(block.register_forward_hook(lambda _, __, out: seen.append(out)))
        with torch.no_grad():
            logits = model(ids)
        for hook in hooks:
            hook.remove()
        return [*seen, logits]

    def halve(beta):
        assert beta.shape == (1, 10, 32)
        out = beta.clone()
        out[:, 6] *= 0.5
        return out

    clean = states()
    model.layers[2].mlp.intervene = halve
    changed = states()
    model.layers[2].mlp.intervene = None
    for layer, (a, b) in enumerate(zip(clean, changed)):  # the last entry is the logits
        assert torch.equal(a[:, :6], b[:, :6])
        assert torch.equal(a[:, 6:], b[:, 6:]) == (layer < 2)
        if layer == 2:  # from the next layer on, attention carries it to later positions
            assert torch.equal(a[:, 7:], b[:, 7:])
        if layer > 2:
            assert not torch.equal(a[:, 7:], b[:, 7:])
    # beta itself is what is scaled: the layer's change is half its MLP output.
    kept = []
    model.layers[2].mlp.intervene = lambda beta: kept.append(beta) or beta
    assert torch.equal(states()[-1], clean[-1])
    assert torch.allclose(clean[2][:, 6] - changed[2][:, 6], kept[0][:, 6] / 2, atol=1e-5)


def test_qkv_are_what_attention_uses():
    model = random_model(model_type="olmo", clip_qkv=0.3)
    ids = torch.tensor(prompts_of([9]))
    attention = model.layers[0].self_attn
    with torch.no_grad():
        cos, sin = model.rope(torch.arange(9))
        x = model.layers[0].input_layernorm(model.embed_tokens(ids))
        q, k, v = attention.qkv(x, cos, sin)
        each = model.rope(torch.arange(9)[None])  # positions per row: [B, T]
        assert all(torch.equal(a, b) for a, b in zip((q, k, v), attention.qkv(x, *each)))
    assert q.shape == (1, 4, 9, 8) and k.shape == v.shape == (1, 2, 9, 8)
    assert v.abs().max() == 0.3
    # RoPE turns pairs (j, j + hd/2): their length stays, and position 0 is not turned.
    raw = attention.k_proj(x).clamp(-0.3, 0.3).view(1, 9, 2, 8).transpose(1, 2)  # [B, K, T, hd]
    assert torch.allclose(k[:, :, 0], raw[:, :, 0], atol=1e-6)
    length, turned = (y[..., :4] ** 2 + y[..., 4:] ** 2 for y in (raw, k))
    assert torch.allclose(length, turned, atol=1e-6)
    assert not torch.allclose(k[:, :, 1:], raw[:, :, 1:], atol=1e-2)


def test_checkpointing_gives_the_same_gradients(monkeypatch):
    model = random_model()
    ids = torch.tensor(prompts_of([16, 16]))
    runs = []
    inner = module.Block.forward
    monkeypatch.setattr(module.Block, "forward",
                        lambda self, *a, **kw: runs.append(1) or inner(self, *a, **kw))

    def gradients(on):
        runs.clear()
        model.checkpoint = on
        model.zero_grad()
        model(ids).logsumexp(-1).mean().backward()
        return [p.grad.clone() for p in model.parameters()], len(runs)

    (plain, once), (saved, twice) = gradients(False), gradients(True)
    assert (once, twice) == (3, 6)  # each block ran again in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(plain, saved))
    assert any(grad.abs().max() > 0 for grad in plain)


# ---------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 4, "tie_word_embeddings": True},
    {"model_type": "olmo", "clip_qkv": 0.7, "num_key_value_heads": 1}])
def test_batched_cached_decoding_equals_one_full_pass_per_token(changes):
    model = random_model(**changes)
    prompts = prompts_of([3, 20, 1, 8, 8, 13, 31, 2, 5, 40])
    eos = an_eos([slow_greedy(model, p, new=20, eos_id=None) for p in prompts])
    want = [slow_greedy(model, p, new=20, eos_id=eos) for p in prompts]
    assert len({len(text) for text in want}) > 1
    assert generate(model, prompts, max_new_tokens=20, eos_id=eos) == want
    assert generate(model, prompts, max_new_tokens=20, eos_id=eos, batch_tokens=100) == want
    alone = [generate(model, [p], max_new_tokens=20, eos_id=eos)[0] for p in prompts]
    assert alone == want


def test_limits():
    model = random_model()  # context 64
    prompts = prompts_of([10, 60, 3])

    def lengths(**kw):
        return [len(text) for text in generate(model, prompts, eos_id=None, **kw)]

    assert lengths(max_new_tokens=2) == [2, 2, 2]
    assert lengths(max_new_tokens=8) == [8, 4, 8]
    assert lengths(max_total_tokens=20) == [10, 0, 17]
    assert lengths(max_new_tokens=12, max_total_tokens=20) == [10, 0, 12]
    assert lengths() == [54, 4, 61]
    assert lengths(max_new_tokens=0) == [0, 0, 0]
    assert generate(model, [], max_new_tokens=5, eos_id=0) == []


def test_intervene_reaches_decoding():
    model = random_model()
    prompts = prompts_of([6, 9])
    before = generate(model, prompts, max_new_tokens=8, eos_id=None)
    model.layers[1].mlp.intervene = torch.zeros_like
    assert generate(model, prompts, max_new_tokens=8, eos_id=None) != before


def test_progress_bar_counts_rows(capsys):
    generate(random_model(), prompts_of([3, 4, 5]), max_new_tokens=2, eos_id=None,
             progress="reading")
    err = capsys.readouterr().err
    assert "reading" in err and "3/3" in err
    generate(random_model(), prompts_of([3]), max_new_tokens=2, eos_id=None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("prompts, limits, told", [
    ([[5], []], {}, "prompt 1 is empty"),
    ([[5], [1] * 65], {}, "prompt 1 has 65 tokens.*context of 64"),
    ([[1] * 64], {}, "prompt 0 has 64 tokens.*context of 64"),
    ([[3, 97]], {}, "prompt 0 has token ids outside.*97"),
    ([[3, -1]], {}, "prompt 0 has token ids outside"),
    ([[1] * 30], {"batch_tokens": 20}, "prompt 0 .* 38 positions; a batch of 20 tokens"),
])
def test_generate_faults(prompts, limits, told):
    with pytest.raises(UserError, match=told):
        generate(random_model(), prompts, max_new_tokens=8, eos_id=None, **limits)


# ------------------------------------------------------------------------------------- loading


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint to damage: untied LLaMA, one file."""
    random_model().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path):
    random_model().save_pretrained(tmp_path / "s", shard_bytes=20_000)
    return tmp_path / "s"


def rewrite(folder, change, file="model.safetensors"):
    """Apply change(tensors) to a safetensors file, in place."""
    tensors = load_file(folder / file)
    change(tensors)
    save_tensors(folder / file, {name: t.clone() for name, t in tensors.items()})


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refused(folder, told):
    with pytest.raises(UserError, match=told) as caught:
        checkpoint.load_model(folder)
    assert "\n" not in str(caught.value)


UP = "model.layers.1.mlp.up_proj.weight"


def set_value(name, place, value):
    def change(tensors):
        tensors[name][place] = value
    return change


@pytest.mark.parametrize("change, told", [
    (lambda t: t.pop(UP), f"missing: {UP}; take"),
    (lambda t: t.update(extra=torch.ones(2)), "unexpected: extra; take"),
    (lambda t: t.update({UP: t[UP].T.contiguous()}),
     rf"misshapen: {UP} \[32, 44\], not \[44, 32\]"),
    (lambda t: t.update({"model.up": t.pop(UP)}), f"missing: {UP}; unexpected: model.up"),
    (lambda t: [t.pop(n) for n in list(t) if "layers.2" in n],
     r"missing: (model\.layers\.2\S+, ){3}model\.layers\.2\S+ and 5 more; take"),
    (lambda t: t.update({UP: t[UP].to(torch.int32)}), rf"not float: {UP} \(I32\)"),
    (lambda t: t.update({UP: t[UP].to(torch.int8), "model.norm.weight": torch.ones(3)}),
     rf"misshapen: model.norm.weight \[3\], not \[32\]; not float: {UP} \(I8\)"),
    (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
    (set_value(UP, (0, 3), float("nan")), f"{UP} holds NaN or infinity"),
    (set_value("model.norm.weight", 5, float("-inf")), "model.norm.weight holds NaN or infinity"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
     "unexpected: model.layers.0.self_attn.q_proj.bias"),
])
def test_tensor_faults(folder, change, told):
    Transformer.from_pretrained(folder)  # whole before the damage
    rewrite(folder, change)
    refused(folder, told)


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize("damage, told", [
    (lambda f: cut(f, f.stat().st_size - 40), "not a whole safetensors file"),
    (lambda f: cut(f, 100), "not a whole safetensors file"),
    (lambda f: cut(f, 0), "not a whole safetensors file"),
    (lambda f: f.write_bytes(b"\xff" * 7 + b"\x7f" + f.read_bytes()[8:]), "not a whole"),
    (lambda f: f.write_bytes(b"<html>rate limited, please try again later</html>"), "not a whole"),
    (lambda f: f.write_bytes(f.read_bytes()[:8] + b"x" + f.read_bytes()[9:]), "not a whole"),
    (lambda f: (f.unlink(), f.mkdir()), "no model.safetensors"),
    (lambda f: f.unlink(), "no model.safetensors"),
    (lambda f: f.rename(f.with_name("pytorch_model.bin")), "only pickled weights.*never read"),
])
def test_file_faults(folder, damage, told):
    damage(folder / "model.safetensors")
    refused(folder, told)


def test_shards_load_as_the_whole(folder, sharded):
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert all(f.stat().st_size < 25_000 for f in sharded.glob("model-*.safetensors"))
    whole, parts = Transformer.from_pretrained(folder), Transformer.from_pretrained(sharded)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("place", [
    "../m/model.safetensors", "/etc/model.safetensors", "sub/a.safetensors", "..\\a.safetensors",
    "weights.bin", "", 7, None, ".."])
def test_shard_names_stay_in_their_folder(folder, sharded, place):
    edit_json(sharded / module.INDEX, lambda index: index["weight_map"].update({UP: place}))
    refused(sharded, f"{UP} is said to be in .*must be a .safetensors file beside the index")


@pytest.mark.parametrize("change, told", [
    (lambda i: i["weight_map"].update({UP: "model-00009-of-00009.safetensors"}),
     f"model-00009-of-00009.safetensors is missing .*puts {UP} there"),
    (lambda i: i["weight_map"].update(ghost=i["weight_map"][UP]), "the index puts ghost here"),
    (lambda i: i.pop("weight_map"), "weight_map must map"),
    (lambda i: i.update(weight_map=[]), "weight_map must map"),
])
def test_index_faults(sharded, change, told):
    edit_json(sharded / module.INDEX, change)
    refused(sharded, told)


def test_index_that_is_no_json(sharded):
    (sharded / module.INDEX).write_text('{"weight_map": ')
    refused(sharded, "index.json is not valid JSON")


def test_links_are_followed_as_in_hf_cache(sharded, tmp_path):
    blob = next(sharded.glob("model-00001*"))
    target = tmp_path / "blobs" / "abc"
    target.parent.mkdir()
    blob.rename(target)
    blob.symlink_to(target)
    Transformer.from_pretrained(sharded)


def test_inv_freq_is_ignored_and_other_dtypes_convert(folder):
    before = Transformer.from_pretrained(folder)

    def old_export(tensors):
        for name in tensors:
            tensors[name] = tensors[name].half()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    rewrite(folder, old_export)
    after = Transformer.from_pretrained(folder)
    for (name, a), b in zip(before.named_parameters(), after.parameters()):
        assert b.dtype == torch.float32 and torch.equal(a.half().float(), b), name


def test_overflow_on_the_way_to_a_narrower_dtype_is_refused(folder):
    rewrite(folder, set_value(UP, (0, 0), 1e6))
    Transformer.from_pretrained(folder)
    with pytest.raises(UserError, match=f"{UP} holds NaN or infinity in torch.float16.*wider"):
        Transformer.from_pretrained(folder, dtype=torch.float16)


def test_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    random_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16).lm_head is None
    rewrite(tmp_path, set_value("lm_head.weight", (3, 3), 1.0))
    refused(tmp_path, "lm_head.weight is not the embedding.*tie_word_embeddings")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(2, 2)}))
    refused(tmp_path, r"misshapen: lm_head.weight \[2, 2\]")


def test_loaded_weights_do_not_live_in_the_file(folder):
    model = Transformer.from_pretrained(folder)
    before = [p.clone() for p in model.parameters()]
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# ------------------------------------------------------------------------------------- neurons


def test_inner_neurons_are_what_down_proj_reads(tmp_path):
    """The same model cut elsewhere: same logits, and `intervene` acts on the F activations."""
    model = random_model()
    model.save_pretrained(tmp_path)
    assert "neurons" not in (tmp_path / "config.json").read_text()
    inner = Transformer.from_pretrained(tmp_path, neurons="inner")
    ids = torch.tensor(prompts_of([10]))
    assert model.config.neuron_count == 32 and inner.config.neuron_count == 44
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        assert torch.equal(inner(ids), model(ids))
        for m, width in ((model, 32), (inner, 44)):
            block, mlp = m.layers[1], m.layers[1].mlp
            a = mlp.neurons(x)
            assert a.shape == (1, 3, width) and torch.equal(mlp.write(a), mlp(x))
            stream, beta = block.up_to_beta(x, *m.rope(torch.arange(3)), module.causal_attention)
            assert beta.shape == a.shape
            assert torch.equal(block.add_beta(stream, beta), block(x, *m.rope(torch.arange(3))))
            for name in NEURONS[m.config.neurons].rows:  # row k of it is neuron k's
                assert len(getattr(mlp, name).weight) == width
            for name in NEURONS[m.config.neurons].columns:
                assert getattr(mlp, name).weight.shape[1] == width
            silent = torch.zeros(width)
            silent[5] = 1
            before = m(ids)
            mlp.intervene = lambda a: a * (1 - silent)
            changed = m(ids)
            mlp.intervene = None
            matrix = mlp.down_proj.weight
            kept, line = matrix.clone(), (5 if width == 32 else (slice(None), 5))
            matrix[line] = 0  # a neuron that does not fire is one whose weights are 0
            torch.testing.assert_close(m(ids), changed)
            matrix.copy_(kept)
            assert not torch.allclose(before, changed, atol=1e-3)
    with pytest.raises(UserError, match="neurons = 'all': must be output or inner"):
        Transformer.from_pretrained(tmp_path, neurons="all")


# -------------------------------------------------------------------------------- the core alone


def test_an_architecture_is_a_row(monkeypatch, tmp_path):
    """Qwen3, which norms q and k of each head: one row, and equal to transformers'."""
    hf = pytest.importorskip("transformers")
    monkeypatch.setitem(module.ARCHITECTURES, "qwen3", Architecture(
        name="Qwen3ForCausalLM", norms_qk="head", more_keys=module.NO_BIAS))
    torch.manual_seed(3)
    theirs = hf.Qwen3ForCausalLM(hf.Qwen3Config(
        **SHAPE, head_dim=12, num_key_value_heads=2, pad_token_id=None)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=0.3) if weight.dim() == 2 else weight.uniform_(0.5, 1.5)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = Transformer.from_pretrained(tmp_path / "theirs")
        ids = torch.tensor(prompts_of([20]))
        assert relative(ours(ids), theirs(ids).logits) < 1e-5
        ours.save_pretrained(tmp_path / "ours")
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert type(again) is type(theirs) and torch.equal(again(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("change, told", [
    (lambda t, c: t.pop(UP), f"missing: {UP}; take"),
    (lambda t, c: t.update(extra=torch.ones(2)), "unexpected: extra"),
    (lambda t, c: t.update({UP: t[UP].T.contiguous()}), f"misshapen: {UP}"),
    (lambda t, c: t.update({UP: t[UP].int()}), f"not float: {UP}"),
    (lambda t, c: c.pop("hidden_size"), "config.json: hidden_size is missing"),
    (lambda t, c: c.update(hidden_size="32"), "hidden_size = '32': must be a whole number"),
    (lambda t, c: c.update(model_type="gpt2"), "model_type = 'gpt2': must be llama or"),
    (lambda t, c: c.update(hidden_act="gelu"), "hidden_act = 'gelu' is not supported"),
    (lambda t, c: c.update(rope_scaling={"type": "yarn"}), "only plain RoPE"),
    (lambda t, c: c.update(layer_types=["sliding_attention"] * 3), "layer_types = "),
    (lambda t, c: c.update(num_key_value_heads=3), "num_key_value_heads = 3: must be a divisor"),
])
def test_the_core_alone_refuses_in_one_line(folder, change, told):
    content = json.loads((folder / "config.json").read_text())
    rewrite(folder, lambda tensors: change(tensors, content))
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=told) as caught:
        Transformer.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["../m/model.safetensors", "/etc/x.safetensors", 7, "a.bin", ""])
def test_the_core_alone_reads_no_shard_elsewhere(folder, sharded, place):
    edit_json(sharded / module.INDEX, lambda index: index["weight_map"].update({UP: place}))
    with pytest.raises(UserError, match="must map each tensor to a .safetensors file"):
        Transformer.from_pretrained(sharded)


def test_a_shard_that_is_lost_or_cut(sharded):
    last = sorted(sharded.glob("model-*.safetensors"))[-1]
    cut(last, 60)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Transformer.from_pretrained(sharded)
    last.unlink()
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Transformer.from_pretrained(sharded)


def test_copied_alone_the_core_loads_and_refuses(folder, tmp_path):
    """Without the pipeline beside it, on a checkpoint of HF's layout."""
    for name in ("model", "data", "simu", "eval"):
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    code = ("import sys, torch, simu, data, eval; from model import *\n"
            f"m = Transformer.from_pretrained({str(folder)!r})\n"
            "print(generate(m, [[3, 9]], max_new_tokens=4, eos_id=None))\n"
            "print(eval.token_scores(m, [data.Encoded([3, 9, 27], 1)], [1], tokens=9)[0].losses)\n"
            f"try: Transformer.from_pretrained({str(folder.parent)!r})\n"
            "except UserError as e: print(e)\nprint(any('pipeline' in x for x in sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    said, losses, refusal, pipeline = done.stdout.splitlines() or [done.stderr]
    assert json.loads(said) == generate(random_model(), [[3, 9]], max_new_tokens=4, eos_id=None)
    assert len(json.loads(losses)) == 2 and "config.json is missing" in refusal
    assert pipeline == "False"


# -------------------------------------------------------------------------------------- config


def test_old_and_new_configs_agree(folder):
    config = Config.from_dir(folder)
    assert config == random_model().config

    def new_style(raw):
        raw["dtype"] = raw.pop("torch_dtype")
        raw["rope_parameters"] = {"rope_theta": raw.pop("rope_theta"), "rope_type": "default"}
    edit_json(folder / "config.json", new_style)
    assert Config.from_dir(folder) == config
    edit_json(folder / "config.json", lambda raw: raw["rope_parameters"].update(rope_theta=5e5))
    assert Config.from_dir(folder).rope_theta == 5e5

    def oldest_style(raw):  # LLaMA's first exports: no theta, no kv heads, -1 for "no pad"
        for key in ("rope_parameters", "head_dim", "dtype"):
            del raw[key]
        raw.update(pad_token_id=-1, num_key_value_heads=None, rope_scaling=None)
    edit_json(folder / "config.json", oldest_style)
    assert Config.from_dir(folder) == Config(model_type="llama", **SHAPE)


@pytest.mark.parametrize("key, value, told", [
    ("model_type", "gpt2",
     "model_type = 'gpt2': must be llama or mistral or olmo or olmo2 or qwen2"),
    ("model_type", None, "model_type is missing"),
    ("vocab_size", None, "vocab_size is missing"),
    ("rms_norm_eps", None, "rms_norm_eps is missing"),
    ("hidden_size", True, "hidden_size = True: must be a whole number"),
    ("hidden_size", 32.0, "hidden_size = 32.0: must be a whole number"),
    ("hidden_size", "32", "hidden_size = '32': must be a whole number"),
    ("hidden_size", -32, "hidden_size = -32: must be a whole number above 0"),
    ("num_hidden_layers", 0, "num_hidden_layers = 0: must be a whole number above 0"),
    ("hidden_size", 30, "hidden_size = 30: must be a multiple of num_attention_heads = 4"),
    ("num_key_value_heads", 3, "num_key_value_heads = 3: must be a divisor"),
    ("num_key_value_heads", 0, "num_key_value_heads = 0: must be a whole number above 0"),
    ("head_dim", 7, "head_dim = 7: must be even"),
    ("head_dim", [8], r"head_dim = \[8\]: must be a whole number"),
    ("rms_norm_eps", "1e-5", "rms_norm_eps = '1e-5': must be a number above 0"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps = nan: must be a number above 0"),
    ("rope_theta", 0, "rope_theta = 0: must be a number above 0"),
    ("rope_theta", True, "rope_theta = True: must be a number above 0"),
    ("tie_word_embeddings", 1, "tie_word_embeddings = 1: must be true or false"),
    ("bos_token_id", 97, "bos_token_id = 97: must be null or a token id below vocab_size = 97"),
    ("eos_token_id", "</s>", "eos_token_id = '</s>': must be null or a token id"),
    ("eos_token_id", [1, -2], r"eos_token_id = \[1, -2\]: must be null or a token id"),
    ("hidden_act", "gelu", "hidden_act = 'gelu' is not supported; only \"silu\" is"),
    ("attention_bias", True, "attention_bias = True is not supported; only false is"),
    ("mlp_bias", True, "mlp_bias = True is not supported"),
    ("attention_dropout", 0.1, "attention_dropout = 0.1 is not supported; only 0 is"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor = 0.5 is not supported"),
    ("quantization_config", {"bits": 4}, "quantization_config = .* is not supported"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling = .*only plain RoPE"),
    ("rope_scaling", {"rope_type": "llama3"},
     "rope_scaling = .*must be null, or llama3's with factor"),
    ("rope_scaling", "linear", "rope_scaling = 'linear': must be null or an object"),
    ("rope_parameters", {"rope_type": "yarn"}, "rope_parameters = .*only plain RoPE"),
])
def test_config_faults(folder, key, value, told):
    edit_json(folder / "config.json", lambda raw: raw.update({key: value}))
    refused(folder, f"config.json: {told}")


@pytest.mark.parametrize("changes, told", [
    ({"model_type": "llama", "clip_qkv": 8.0},
     "clip_qkv = 8.0: must be null for llama, which does not clip"),
    ({"model_type": "olmo", "clip_qkv": -1}, "clip_qkv = -1: must be null or a number above 0"),
    ({"model_type": "olmo", "norm_eps": 1e-6}, "rms_norm_eps = 1e-06: must be 1e-05 for olmo"),
])
def test_config_made_in_code_is_checked_too(changes, told):
    with pytest.raises(UserError, match=told):
        checkpoint.check_config(Config(**SHAPE | changes))


@pytest.mark.parametrize("window, good", [
    (None, True), (64, True), (4096, True), (63, False), (8, False), ("64", False)])
def test_a_sliding_window_below_the_context_is_refused(window, good, tmp_path):
    random_model(model_type="mistral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sliding_window"] is None and "attention_bias" not in config
    edit_json(tmp_path / "config.json", lambda raw: raw.update(sliding_window=window))
    if good:
        assert Transformer.from_pretrained(tmp_path).config == random_model(
            model_type="mistral").config
    else:
        refused(tmp_path, f"config.json: sliding_window = '?{window}'? is below "
                          "max_position_embeddings = 64 and not computed here; lower")


def test_a_window_that_is_not_named_is_the_one_transformers_takes(tmp_path):
    random_model(model_type="mistral", max_position_embeddings=4097).save_pretrained(tmp_path)
    Config.from_dir(tmp_path)
    edit_json(tmp_path / "config.json", lambda raw: raw.pop("sliding_window"))
    refused(tmp_path, "sliding_window = 4096 is below max_position_embeddings = 4097")
    edit_json(tmp_path / "config.json", lambda raw: raw.update(max_position_embeddings=4096))
    Config.from_dir(tmp_path)


@pytest.mark.parametrize("text, told", [
    ("{", "config.json is not valid JSON"), ("[1]", "config.json: must hold a JSON object"),
    (None, "config.json is missing")])
def test_config_file_faults(folder, text, told):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refused(folder, told)


def test_folder_faults(tmp_path, folder):
    refused(tmp_path / "nowhere", "nowhere is not a folder")
    refused(folder / "config.json", "config.json is not a folder")


# -------------------------------------------------------------------------------------- saving


def test_save_tensors_is_safetensors(tmp_path):
    tensors = {"mask": torch.tensor([[True, False, True]]), "half": torch.randn(3, 5).bfloat16(),
               "scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "ids": torch.arange(7),
               "view": torch.randn(4, 6).T}
    save_tensors(tmp_path / "t.safetensors", tensors, metadata={"format": "pt"})
    back = load_file(tmp_path / "t.safetensors")
    assert set(back) == set(tensors)
    for name, want in tensors.items():
        assert back[name].dtype == want.dtype and torch.equal(back[name], want), name
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_read_tensors_names_what_is_wrong(tmp_path):
    file = tmp_path / "t.safetensors"
    save_tensors(file, {"a": torch.arange(3), "b": torch.ones(2)})
    b, a = read_tensors(file, ("b", "a"))
    assert a.tolist() == [0, 1, 2] and b.tolist() == [1, 1]
    for damage in (lambda: read_tensors(file, ("c",)), lambda: cut(file, 20) or read_tensors(
            file, ("a",)), lambda: file.unlink() or read_tensors(file, ("a",))):
        with pytest.raises(UserError, match="t.safetensors is missing or damaged; delete"):
            damage()


@pytest.mark.parametrize("write", [
    lambda path: module.write_text(path, "new\n"),
    lambda path: save_tensors(path, {"a": torch.ones(3)})])
def test_files_are_written_beside_and_renamed(write, tmp_path):
    path, beside = tmp_path / "deep" / "x", tmp_path / "deep" / ".x.simu-partial"
    write(path)
    whole = path.read_bytes()
    path.write_text("old\n")
    beside.write_text("what a killed process left")
    write(path)
    assert path.read_bytes() == whole and not beside.exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("not ours")
    beside.symlink_to(elsewhere)  # someone else's folder: nothing is written through their link
    with pytest.raises(UserError, match="partial is in the way of x; delete it"):
        write(path)
    assert elsewhere.read_text() == "not ours" and beside.is_symlink()


def test_a_save_that_fails_leaves_the_old_file(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError):
        random_model(vocab_size=50).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_saving_again_replaces_other_layouts(folder, sharded):
    model = random_model()
    with torch.no_grad():
        model.norm.weight.fill_(2)
    model.save_pretrained(folder, shard_bytes=20_000)
    model.save_pretrained(sharded)
    for path in (folder, sharded):
        assert torch.equal(Transformer.from_pretrained(path).norm.weight, model.norm.weight)
    assert not (folder / "model.safetensors").exists()
    assert [f.name for f in sharded.glob("*.safetensors*")] == ["model.safetensors"]


def test_replaced_modules_must_be_undone_before_saving(tmp_path):
    model = random_model()
    model.layers[0].mlp.down_proj = torch.nn.Sequential(model.layers[0].mlp.down_proj)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))  # any module of the same call signature serves
    with pytest.raises(ValueError, match="replaced"):
        model.save_pretrained(tmp_path / "m")
    assert not list((tmp_path / "m").glob("*.safetensors"))


def test_saved_bfloat16_stays(tmp_path):
    model = random_model().bfloat16()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    back = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in back.values()} == {torch.bfloat16}


def test_no_numpy_needed(tmp_path):
    """The product does not depend on numpy, which safetensors' own writer would import."""
    code = (f"import sys; sys.modules['numpy'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
            "from model import Transformer, generate\n"
            f"m = Transformer.from_pretrained({str(GOLDEN / 'llama-grouped')!r})\n"
            f"m.save_pretrained({str(tmp_path)!r}, shard_bytes=9000)\n"
            f"m = Transformer.from_pretrained({str(tmp_path)!r})\n"
            "print(generate(m, [[3, 9, 27]], max_new_tokens=16, eos_id=7))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout) == EXPECTED["llama-grouped"]["tokens"][:1], done.stderr
