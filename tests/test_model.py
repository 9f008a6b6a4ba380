"""model.py and pipeline/checkpoint.py: golden files, decoding, loading, saving, and the faults of
both. Parity with transformers is in test_layouts.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import model as module
from model import (NEURONS, Config, Transformer, UserError, generate, read_json, save_tensors)
from pipeline import checkpoint

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


@pytest.mark.parametrize("prompts, message", [
    ([[5], []], "a prompt of 0 tokens"), ([[5], [1] * 65], "a prompt of 65 tokens.*context of 64"),
    ([[1] * 64], "a prompt of 64 tokens"), ([[3, 97]], "ids up to 97 of 97")])
def test_a_prompt_that_cannot_be_continued(prompts, message):
    with pytest.raises(UserError, match=message):
        generate(random_model(), prompts, max_new_tokens=8, eos_id=None)


# ------------------------------------------------------------------------------------- loading


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint to damage: untied LLaMA, one file."""
    random_model().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path):
    checkpoint.save_model(random_model(), tmp_path / "s", 20_000)
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


def refused(folder, message, load=checkpoint.load_model):
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


UP = "model.layers.1.mlp.up_proj.weight"


def set_value(name, place, value):
    def change(tensors):
        tensors[name][place] = value
    return change


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(UP), f"1 weights do not fit config.json: {UP} is missing; take"),
    (lambda t: t.update(extra=torch.ones(2)), "extra is unexpected; take"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
     "model.layers.0.self_attn.q_proj.bias is unexpected"),
    (lambda t: [t.pop(n) for n in list(t) if "layers.2" in n],
     r"9 weights .*: (model\.layers\.2\S+ is missing, ){3}model\.layers\.2\S+ is missing; take"),
    (lambda t: t.update({UP: t[UP].T.contiguous()}), rf"{UP} is \[32, 44\] .*, not \[44, 32\]"),
    (lambda t: t.update({UP: t[UP].to(torch.int32)}), rf"{UP} is \[44, 32\] of torch.int32, not"),
    (set_value(UP, (0, 3), float("nan")), f"{UP} holds NaN or infinity"),
    (set_value("model.norm.weight", 5, float("-inf")), "model.norm.weight holds NaN or infinity"),
])
@pytest.mark.parametrize("load", [checkpoint.load_model, Transformer.from_pretrained])
def test_tensor_faults(folder, load, change, message):
    load(folder)  # sound before the damage
    rewrite(folder, change)
    refused(folder, message, load)


def test_shards_load_as_one_file_does(folder, sharded):
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert all(f.stat().st_size < 25_000 for f in sharded.glob("model-*.safetensors"))
    one, parts = Transformer.from_pretrained(folder), Transformer.from_pretrained(sharded)
    for (name, a), b in zip(one.named_parameters(), parts.parameters()):
        assert torch.equal(a, b), name
    parts.bfloat16().save_pretrained(sharded / "narrow")
    stored = load_file(sharded / "narrow" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert read_json(sharded / "narrow" / "config.json")["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("load", [checkpoint.load_model, Transformer.from_pretrained])
@pytest.mark.parametrize("name", ["../m/model.safetensors", "/etc/model.safetensors",
                                  "sub/a.safetensors"])
def test_no_shard_is_read_outside_the_folder(folder, sharded, load, name):
    edit_json(sharded / module.INDEX, lambda index: index["weight_map"].update({UP: name}))
    refused(sharded, f"index.json names '{name}', which does not stand beside it", load)


def test_what_the_folder_had_is_saved_again(folder, tmp_path):
    """The dtype of its weights, and how its maker lets it speak."""
    rewrite(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    edit_json(folder / "config.json", lambda raw: raw.update(eos_token_id=[2, 13]))
    spoken = dict(eos_token_id=[2, 13], do_sample=True, temperature=0.6, top_p=0.9)
    (folder / "generation_config.json").write_text(json.dumps(spoken))
    model = Transformer.from_pretrained(folder)
    assert model.lm_head.weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again" / "generation_config.json") == spoken
    config = read_json(tmp_path / "again" / "config.json")
    assert config["torch_dtype"] == "bfloat16" and config["eos_token_id"] == [2, 13]
    stored = load_file(tmp_path / "again" / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())
    assert all(stored[name].dtype == tensor.dtype for name, tensor in before.items())


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


def test_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    random_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16).lm_head is None
    rewrite(tmp_path, set_value("lm_head.weight", (3, 3), 1.0))
    refused(tmp_path, "lm_head.weight is not the embedding.*tie_word_embeddings")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(2, 2)}))
    refused(tmp_path, r"lm_head.weight is \[2, 2\]")


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
            assert a.shape == (1, 3, width)
            stream, beta = block.up_to_beta(x, *m.rope(torch.arange(3)), module.causal_attention)
            assert beta.shape == a.shape
            assert torch.equal(block.add_beta(stream, beta), block(x, *m.rope(torch.arange(3))))
            for name in NEURONS[m.config.neurons].rows:  # row k of it is neuron k's
                assert len(getattr(mlp, name).weight) == width
            for name in NEURONS[m.config.neurons].columns:
                assert getattr(mlp, name).weight.shape[1] == width
            before = m(ids)
            mlp.intervene = lambda a: a * (torch.arange(width) != 5)
            changed = m(ids)
            mlp.intervene = None
            mlp.down_proj.weight[5 if width == 32 else (slice(None), 5)] = 0
            torch.testing.assert_close(m(ids), changed)  # a silent neuron: one of weights 0
            assert not torch.allclose(before, changed, atol=1e-3)


# -------------------------------------------------------------------------------- the core alone


@pytest.mark.parametrize("change, message", [
    (dict(model_type="gpt2"), "model_type = 'gpt2' is not supported; only llama"),
    (dict(hidden_act="gelu"), "hidden_act = 'gelu' is not supported"),
    (dict(attention_bias=True, mlp_bias=True), "attention_bias = True; mlp_bias = True is not"),
    (dict(quantization_config={"bits": 4}), "quantization_config = .* is not supported"),
    (dict(use_sliding_window=True), "use_sliding_window = True is not supported"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types = "),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "RoPE of .*linear.* is not supported"),
    (dict(rope_parameters={"rope_type": "yarn"}), "RoPE of .*yarn.* is not supported"),
    (dict(model_type="mistral", sliding_window=63), "sliding_window = 63, below max_position")])
@pytest.mark.parametrize("load", [checkpoint.load_model, Transformer.from_pretrained])
def test_what_would_be_computed_otherwise_is_refused(folder, load, change, message):
    edit_json(folder / "config.json", lambda content: content.update(change))
    refused(folder, message, load)


def test_a_window_that_is_not_named_is_the_one_transformers_takes(tmp_path):
    random_model(model_type="mistral", max_position_embeddings=4097).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] is None
    Config.from_dir(tmp_path)
    edit_json(tmp_path / "config.json", lambda raw: raw.pop("sliding_window"))
    refused(tmp_path, "sliding_window = 4096, below max_position_embeddings")
    edit_json(tmp_path / "config.json", lambda raw: raw.update(max_position_embeddings=4096))
    Config.from_dir(tmp_path)


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


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)


@pytest.mark.parametrize("key, value, message", [
    ("model_type", ["llama"], r"model_type = \['llama'\]: must be a text"),
    ("vocab_size", None, "vocab_size is missing"),
    ("rms_norm_eps", None, "rms_norm_eps is missing"),
    ("hidden_size", True, "hidden_size = True: must be a whole number"),
    ("hidden_size", "32", "hidden_size = '32': must be a whole number"),
    ("hidden_size", 10 ** 12, "hidden_size = 1000000000000: must be a whole number from 1 to 1677"),
    ("num_hidden_layers", 0, "num_hidden_layers = 0: must be a whole number"),
    ("num_key_value_heads", 3, "num_key_value_heads = 3 must divide"),
    ("head_dim", 7, ".*head_dim = 7 must be even"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps = nan: must be a number above 0"),
    ("rope_theta", 10 ** 400, "rope_theta = 10.*: must be a number above 0"),
    ("sliding_window", "64", "sliding_window = '64': must be a number"),
    ("tie_word_embeddings", 1, "tie_word_embeddings = 1: must be true or false"),
    ("bos_token_id", 97, "bos_token_id = 97: must be null or a token id below vocab_size = 97"),
    ("eos_token_id", [1, -2], r"eos_token_id = \[1, -2\]: must be null or a token id"),
    ("layer_types", 3, "layer_types = 3: must be a list"),
    ("rope_scaling", "linear", "rope_scaling = 'linear': must be an object"),
    ("rope_scaling", LLAMA3 | {"factor": None}, "rope_scaling = .*must hold factor"),
])
def test_config_faults(folder, key, value, message):
    edit_json(folder / "config.json", lambda raw: raw.update({key: value}))
    refused(folder, f"config.json: {message}")


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


@pytest.mark.parametrize("write", [
    lambda path: module.write_text(path, "new\n"),
    lambda path: save_tensors(path, {"a": torch.ones(3)})])
def test_files_are_written_beside_and_renamed(write, tmp_path, monkeypatch):
    path, beside = tmp_path / "deep" / "x", tmp_path / "deep" / ".x.simu-partial"
    write(path)
    content = path.read_bytes()
    path.write_text("old\n")
    beside.write_text("what a killed process left")
    write(path)
    assert path.read_bytes() == content and not beside.exists()

    def full(*_):
        raise OSError(28, "No space left on device")

    path.write_text("old\n")
    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError):
        write(path)
    assert path.read_text() == "old\n" and not beside.exists()


def test_loading_takes_no_more_memory_than_the_weights(tmp_path):
    """Each file is mapped for one tensor at a time, or the mapping would count beside the copy."""
    with torch.device("meta"):
        model = Transformer(Config(model_type="llama", **SHAPE | dict(
            hidden_size=512, intermediate_size=4096, vocab_size=99)))
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.fill_(1)
    model.save_pretrained(tmp_path)
    # Not getrusage, whose peak is also that of the process which started this one.
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from model import Transformer\n"
            "def peak():\n"
            "    status = open('/proc/self/status').read()\n"
            "    return 1024 * int(status.split('VmHWM:')[1].split()[0])\n"
            f"Transformer.from_pretrained({str(GOLDEN / 'llama-tied')!r}); before = peak()\n"
            f"model = Transformer.from_pretrained({str(tmp_path)!r})\n"
            "print((peak() - before) / sum(p.nbytes for p in model.parameters()))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert float(done.stdout) < 1.3, done.stderr  # 2 if the file stayed mapped
