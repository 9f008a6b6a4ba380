"""The checkpoints people bring: LLaMA in all its spellings, OLMo, Llama 3.2, Mistral, Qwen2.5,
OLMo-2. Each against transformers; attribution and unlearning on them; and our own export read back
by transformers, tokenizer and text included."""

import copy
import dataclasses
import warnings

import pytest
import torch

import data
import model as module
import simu
from model import Config, Transformer, generate, read_json, write_json
from pipeline import checkpoint, settings, slices
from pipeline.__main__ import main
from pipeline.tokenizers import load_tokenizer
from test_pipeline import DEMO, MICRO
from test_simu import rows

SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
OURS = {  # layout: what makes one of ours
    "llama": dict(model_type="llama", num_key_value_heads=2),
    "llama-3.2": dict(model_type="llama", num_key_value_heads=2, tie_word_embeddings=True,
                      rope_theta=5e5, rope_scaling=LLAMA3),
    "qwen2.5": dict(model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": dict(model_type="mistral", num_key_value_heads=2),
    "olmo": dict(model_type="olmo", clip_qkv=0.4),
    "olmo2": dict(model_type="olmo2", num_key_value_heads=2)}
PROMPTS = [[5, 9, 27, 3], [11], [40, 2, 6, 18, 5, 33, 21, 90], [8, 8, 30]]


@pytest.fixture(scope="module")
def hf():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def randomize(model, seed=3):
    """Weights, norms and biases with which every part of the model bites."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3) if weight.dim() == 2 else weight.uniform_(0.5, 1.5)
    return model


def ours(kind, **changes) -> Transformer:
    return randomize(Transformer(Config(**SHAPE | dict(eos_token_id=2) | OURS[kind] | changes)))


def relative(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def their_greedy(model, prompt, *, new, eos_id):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                         do_sample=False, eos_token_id=eos_id, pad_token_id=0)[0, len(prompt):]
    out = out.tolist()
    return out[:out.index(eos_id)] if eos_id in out else out


def check_parity(mine, theirs, *, new=12):
    ids = torch.tensor([PROMPTS[2] * 5])
    with torch.no_grad():
        assert relative(mine(ids), theirs(ids).logits) < 1e-5
    free = generate(mine, PROMPTS, max_new_tokens=new, eos_id=None)
    eos = free[0][new // 2]
    want = [their_greedy(theirs, p, new=new, eos_id=eos) for p in PROMPTS]
    assert generate(mine, PROMPTS, max_new_tokens=new, eos_id=eos) == want


# --------------------------------------------------------------------- parity with transformers


THEIRS = {  # layout: a class of transformers, and what its config has beside SHAPE
    "llama": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama-3.2": ("Llama", dict(tie_word_embeddings=True,
                                rope_parameters=LLAMA3 | {"rope_theta": 5e5})),
    "mistral": ("Mistral", dict(sliding_window=64)),
    "mistral, no window": ("Mistral", dict(sliding_window=None, head_dim=12)),
    "qwen2.5": ("Qwen2", dict(tie_word_embeddings=True, sliding_window=8,
                              use_sliding_window=False)),
    "qwen2.5, untied": ("Qwen2", dict(rope_parameters={"rope_type": "default",
                                                       "rope_theta": 1e6})),
    "olmo2": ("Olmo2", {}),
    "olmo2, tied": ("Olmo2", dict(num_key_value_heads=4, tie_word_embeddings=True,
                                  rms_norm_eps=1e-6)),
    "olmo, tied": ("Olmo", dict(tie_word_embeddings=True)),
    "olmo, clipped": ("Olmo", dict(clip_qkv=8.0)),
    "qwen3": ("Qwen3", dict(head_dim=12))}  # which norms q and k of each head: a row of a fork's


def their_model(hf, kind):
    """A random checkpoint of transformers' own class."""
    name, changes = THEIRS[kind]
    shape = SHAPE | dict(num_key_value_heads=2, eos_token_id=2, pad_token_id=None) | changes
    model = getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**shape))
    randomize(model.eval())
    if "clip" in kind:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.v_proj.weight *= 20  # so that 8, OLMo's own bound, bites
    return model


@pytest.mark.parametrize("kind", THEIRS)
def test_parity_and_the_way_back(hf, kind, tmp_path, monkeypatch):
    monkeypatch.setitem(module.ARCHITECTURES, "qwen3", module.Architecture(
        name="Qwen3ForCausalLM", norms_qk="head"))
    theirs = their_model(hf, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = checkpoint.load_model(tmp_path / "theirs")
    check_parity(mine, theirs)
    checkpoint.save_model(mine, tmp_path / "ours", 40_000)
    assert checkpoint.read_config(tmp_path / "ours") == mine.config
    again, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours",
                                                            output_loading_info=True)
    assert type(again) is type(theirs) and not any(report.values())
    ids = torch.tensor([PROMPTS[2] * 5])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
        if kind == "llama-3.2":  # the scaling is not for show
            mine.config = dataclasses.replace(mine.config, rope_scaling=None)
            assert relative(mine(ids), theirs(ids).logits) > 1e-3
        if kind == "olmo, clipped":
            for block in mine.layers:
                block.self_attn.clip = None
            assert relative(mine(ids), theirs(ids).logits) > 1e-3


@pytest.mark.parametrize("most, dtype, old, pad_row", [
    ("1MB", torch.float16, True, False), ("30KB", torch.float16, True, True),
    ("20KB", torch.bfloat16, False, True), ("40KB", torch.float32, True, False)])
def test_llama_as_hubs_hold_it(hf, most, dtype, old, pad_row, tmp_path):
    """old: inv_freq stored, and no rope_theta, kv heads or head_dim in the config."""
    pad = dict(vocab_size=97, pad_token_id=96) if pad_row else {}
    theirs = randomize(hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE | pad))).to(dtype).eval()
    tensors = theirs.state_dict()
    if old:
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4)
                    for i in range(2)}
    theirs.save_pretrained(tmp_path, state_dict=tensors, max_shard_size=most)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (most != "1MB")
    if old:
        raw = read_json(tmp_path / "config.json")
        for key in ("rope_parameters", "rope_theta", "num_key_value_heads", "head_dim"):
            raw.pop(key, None)
        write_json(tmp_path / "config.json", raw)
    mine = checkpoint.load_model(tmp_path)
    assert mine.config.vocab_size == 96 + pad_row
    # Not theirs.float(): casting that model has cast its RoPE frequencies too.
    check_parity(mine, hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_bfloat16_is_close_to_transformers(hf, tmp_path):
    ours("llama-3.2").save_pretrained(tmp_path)
    mine = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        logits = mine(ids)
        assert logits.dtype == torch.float32
        assert relative(logits, theirs(ids).logits.float()) < 0.05  # both round at 2^-8 per layer


# ------------------------------------------------------------------ the method on other models


@pytest.mark.parametrize("kind, path, steps", [
    ("llama-3.2", "layer", 4), ("qwen2.5", "layer", 4), ("olmo2", "layer", 4),
    ("olmo2", "neuron", 2)])
def test_attribution_equals_the_loop(kind, path, steps):
    model, pairs = ours(kind), rows(2 if path == "layer" else 1, vocab=96)
    want = sum(simu.attribute_loop(model, r, steps=steps, path=path) for r in pairs)
    got = simu.attribute(model, data.collate(pairs), steps=steps, path=path)
    assert relative(got, want) < 2e-5


@pytest.mark.parametrize("kind", ["qwen2.5", "olmo2"])
def test_projections_and_their_biases_move_and_norms_do_not(kind):
    model = ours(kind)
    before = copy.deepcopy(dict(model.named_parameters()))
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[0, 5] = True
    recipe = simu.Recipe(epochs=1, batch=2, lr=1e-2)
    with simu.moving_weights(model, recipe, mask) as moving:
        names = {w.name for w in moving}
    assert {n.split(".", 2)[2] for n in names if "self_attn" in n} == {
        f"self_attn.{x}_proj.weight" for x in "qkvo"} | (
        {f"self_attn.{x}_proj.bias" for x in "qkv"} if kind == "qwen2.5" else set())
    rest, = (n for n in names if "self_attn" not in n)
    assert rest.startswith("layers.0.mlp.down_proj.")
    with simu.moving_weights(model, dataclasses.replace(recipe, method="fo"), None) as moving:
        assert {w.name for w in moving} == set(before)
    simu.unlearn(model, rows(2, vocab=96), rows(2, seed=1, vocab=96), mask, recipe)
    for name, now in model.named_parameters():
        old = before[name]
        if "_proj" in name and "self_attn" in name:
            assert not torch.equal(now, old), name
        elif name == "layers.0.mlp.down_proj.weight":
            moved = (now != old).any(1)
            assert moved.tolist() == mask[0].tolist()
        else:
            assert torch.equal(now, old), name


# ----------------------------------------------------------------------------------- export


def unlearned(out, name, *options):
    """The stages up to a report, SIMU alone, in this process."""
    words = ["demo", name, "--out", str(out), *MICRO, "--data", str(DEMO),
             *"--forget-groups 1 --retain-groups 4 --learn-epochs 6 --max-total-tokens 96".split(),
             *options]
    for command in ("original", "attribute", "mask", "unlearn"):
        main([command, *words])
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {name: unlearned(tmp_path_factory.mktemp(name) / "run", name)
            for name in ("tiny-llama", "tiny-olmo")}


def check_same_text(hf, folder, s, card: bool):
    """From one string to the same greedy text: ours, and transformers' with its own defaults."""
    tok, mine = load_tokenizer(folder), checkpoint.load_model(folder)
    their_tok = hf.AutoTokenizer.from_pretrained(folder)
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder)
    lengths = {} if card else dict(max_length=s.max_total_tokens)
    ids = []
    for e in slices.load_benchmark(s).retain[:40:10]:
        text = f"Question: {e.question}\nAnswer: {e.answer[:len(e.answer) // 2]}"
        prompt = data.encode_prompt(text, tok, "raw")
        encoded = their_tok(text, return_tensors="pt")
        assert encoded["input_ids"].tolist() == [prompt]
        with torch.no_grad():
            assert relative(mine(torch.tensor([prompt])), theirs(**encoded).logits) < 1e-5
        out = theirs.generate(**encoded, **lengths)[0].tolist()
        got, = generate(mine, [prompt], eos_id=tok.eos_id, max_total_tokens=s.max_total_tokens)
        assert got == [i for i in out[len(prompt):] if i != tok.eos_id]
        assert their_tok.decode(out, skip_special_tokens=True) == tok.decode(prompt + got)
        ids += got
    assert len(set(ids)) > 1


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-olmo"])
def test_transformers_says_what_we_say(hf, runs, name):
    if name == "tiny-llama":
        pytest.importorskip("google.protobuf")
    s = settings.read_settings(runs[name])
    check_same_text(hf, runs[name] / "original", s, card=False)
    check_same_text(hf, runs[name] / "simu-graddiff", s, card=True)
