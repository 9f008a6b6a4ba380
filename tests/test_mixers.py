"""Models whose layers are not attention and MLP: Mamba-2 against transformers, RWKV-7 against its
author's package; decoding, attribution, unlearning and the pipeline on both; their faults named."""

import dataclasses
import os
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import simu
from model import Transformer, UserError, read_json, write_json
from pipeline import checkpoint, reach, settings
from pipeline.__main__ import main
from pipeline.mixers import mamba2, rwkv7, states
from pipeline.reading import generate
from test_layouts import PROMPTS, check_same_text, hf  # noqa: F401
from test_pipeline import DEMO, MICRO
from test_simu import rows

IDS = dict(vocab_size=96, bos_token_id=1, eos_token_id=2)
CONFIGS = {
    "mamba2": mamba2.Mamba2Config(**IDS, hidden_size=32, num_hidden_layers=3, num_heads=8,
                                  head_dim=8, state_size=8, n_groups=2, tie_word_embeddings=True),
    "rwkv7": rwkv7.RWKV7Config(**IDS, hidden_size=128, intermediate_size=64, num_hidden_layers=3,
                               decay_low_rank_dim=8, gate_low_rank_dim=8, a_low_rank_dim=8,
                               v_low_rank_dim=8)}
both = pytest.mark.parametrize("kind", CONFIGS)


def ours(kind, **changes) -> Transformer:
    """Random weights with which every part bites."""
    torch.manual_seed(3)
    model = Transformer(dataclasses.replace(CONFIGS[kind], **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 2 else 0.2))
    return model


def relative(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("changes", [
    {}, dict(n_groups=1, tie_word_embeddings=False, conv_kernel=3)], ids=["grouped", "untied"])
def test_mamba2_is_transformers(hf, tmp_path, changes):  # noqa: F811
    """Logits beyond one chunk, greedy tokens, and both ways through a folder."""
    model = ours("mamba2", **changes)
    model.save_pretrained(tmp_path / "ours")
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(theirs).__name__ == "Mamba2ForCausalLM"
    ids = torch.randint(3, 96, (2, states.CHUNK + 20))
    with torch.no_grad():
        assert relative(model(ids), theirs(ids).logits) < 1e-5
    for prompt, said in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=12, eos_id=None)):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
                              eos_token_id=None, pad_token_id=0)
        assert out[0, len(prompt):].tolist() == said
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(checkpoint.load_model(tmp_path / "theirs")(ids), model(ids))


def native(tensors: dict) -> dict:
    """fla's names and shapes -> those of the author's .pth files."""
    names = {"model.layers.": "blocks.", "model.embeddings.": "emb.", "model.norm.": "ln_out.",
             "lm_head.": "head.", ".pre_norm.": ".ln0.", ".attn_norm.": ".ln1.", ".ffn_norm.":
             ".ln2.", ".attn.": ".att.", ".r_proj.": ".receptance.", ".k_proj.": ".key.",
             ".v_proj.": ".value.", ".o_proj.": ".output.", ".g_norm.": ".ln_x.",
             "_lora.lora.0.weight": "1", "_lora.lora.2.weight": "2", "_lora.lora.2.bias": "0"}
    out = {}
    for name, t in tensors.items():
        lora = "_lora" in name and t.dim() == 2
        for theirs, his in names.items():
            name = name.replace(theirs, his)
        out[name] = t.T.contiguous() if lora else t
    return out


def test_rwkv7_is_its_authors(tmp_path, monkeypatch):
    for name, value in dict(V7_ON="1", JIT_ON="0", CUDA_ON="0").items():
        monkeypatch.setitem(os.environ, f"RWKV_{name}", value)
    package = pytest.importorskip("rwkv.model")
    model = ours("rwkv7")
    model.save_pretrained(tmp_path)
    tensors = native(load_file(tmp_path / "model.safetensors"))  # his files are pickles
    monkeypatch.setattr(torch, "load", lambda *_, **__: tensors)
    theirs = package.RWKV(model=str(tmp_path / "native"), strategy="cpu fp32")
    ids = torch.randint(3, 96, (1, states.CHUNK + 20))
    with torch.no_grad():
        logits, _ = theirs.forward(ids[0].tolist(), None, full_output=True)
        assert relative(model(ids)[0], logits) < 1e-5
    for prompt, said in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=12, eos_id=None)):
        logits, state = theirs.forward(prompt, None)
        for token in said:
            assert int(logits.argmax()) == token
            logits, state = theirs.forward([token], state)


@pytest.mark.parametrize("kind, faster", [("mamba2", 0), ("mamba2", 2), ("rwkv7", 0), ("rwkv7", 9)])
def test_where_chunks_end_changes_nothing(kind, faster, monkeypatch):
    """One position at a time is the recurrence as it is defined; forgetting as fast as can be puts
    the largest numbers into a chunk."""
    model, some = ours(kind), rows(3)
    for name, p in model.named_parameters():
        if name.endswith(("w_lora.offset", "A_log")):
            p.data += faster
    batch, found = data.collate(some), []
    ids = torch.randint(3, 96, (2, 70))
    for chunk in (1, 5, 64):
        monkeypatch.setattr(states, "CHUNK", chunk)
        model.zero_grad()
        loss = simu.mean_nll(model, data.Batch(ids, ids.roll(-1, 1)))
        loss.backward()
        found.append([model(ids), simu.attribute(model, batch, steps=3),
                      *(p.grad.clone() for p in model.parameters())])
    for other in found[1:]:
        assert all(relative(a, b) < 1e-4 for a, b in zip(other, found[0]))


def test_fresh_weights_are_drawn_as_the_authors_draw_them():
    layer = Transformer(CONFIGS["mamba2"]).layers[0].mixer
    step = F.softplus(layer.dt_bias)
    assert 1e-3 <= step.min() < step.max() <= 0.1001


@both
def test_tokens_depend_on_neither_company_nor_draft(kind):
    model = ours(kind)
    alone = [generate(model, [p], max_new_tokens=9, eos_id=None)[0] for p in PROMPTS]
    assert len({tuple(x) for x in alone}) == len(PROMPTS)
    assert generate(model, PROMPTS, max_new_tokens=9, eos_id=None) == alone
    assert generate(model, PROMPTS, max_new_tokens=9, eos_id=None, drafts=alone) == alone
    eos = alone[0][3]  # rows end at different times, and the others go on
    ended = generate(model, PROMPTS, max_new_tokens=9, eos_id=eos)
    assert ended == [x[:x.index(eos)] if eos in x else x for x in alone]
    few = 2 * (max(map(len, PROMPTS)) + 9)  # two at a time: others take their places
    assert generate(model, PROMPTS, max_new_tokens=9, eos_id=eos, batch_tokens=few) == ended


@both
def test_bfloat16_and_checkpointing(kind):
    model, ids = ours(kind), torch.randint(3, 96, (2, 11))
    batch = data.Batch(ids, ids.roll(-1, 1))
    grads = []
    for model.checkpoint in (False, True):
        simu.mean_nll(model, batch).backward()
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert all(g.abs().max() > 0 for g in grads[0])
    with torch.no_grad():
        exact = model(ids)
        assert relative(model.bfloat16()(ids), exact) < 0.1


# -------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("kind, path, count", [
    ("mamba2", "layer", 3), ("mamba2", "neuron", 1), ("rwkv7", "layer", 2)])
def test_attribution_is_the_literal_loop(kind, path, count):
    """The second stream starts from the clean state before each answer position."""
    model, some = ours(kind), rows(count)
    got = simu.attribute(model, data.collate(some), steps=2, path=path)
    wanted = sum(simu.attribute_loop(model, r, steps=2, path=path) for r in some)
    assert relative(got, wanted) < 1e-5 and got.abs().max() > 1e-3


MOVED = {"mamba2": set(), "rwkv7": {"r_proj", "k_proj", "v_proj", "o_proj"}}


@both
def test_what_moves(kind):
    model = ours(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    mask = torch.zeros(3, model.config.hidden_size, dtype=torch.bool)
    mask[0, 5] = mask[2, :2] = True
    some = rows()
    simu.unlearn(model, some[:2], some[2:], mask, simu.Unlearning(lr=1e-2, batch=2, epochs=2))
    for name, p in model.named_parameters():
        changed = (p != before[name]).flatten(1).any(1) if p.dim() == 2 else p != before[name]
        if name.endswith("mlp.down_proj.weight"):
            assert torch.equal(changed, mask[int(name.split(".")[1])])
        else:
            whole = ".self_attn." in name and name.split(".")[-2] in MOVED[kind]
            assert changed.any() == whole, name


# --------------------------------------------------------------------------------------- the faults


@both
@pytest.mark.parametrize("fault, says", [
    ("lost", "missing: {}"), ("more", "unexpected: x.weight"), ("cut", r"misshapen: {} \[1")])
def test_a_bad_checkpoint_is_named(kind, fault, says, tmp_path):
    model = ours(kind)
    model.save_pretrained(tmp_path)
    name = model.stored_name("layers.1.mlp.down_proj.weight")
    assert name in ("backbone.layers.1.mixer.out_proj.weight", "model.layers.1.ffn.value.weight")
    tensors = load_file(tmp_path / "model.safetensors")
    if fault == "lost":
        del tensors[name]
    else:
        tensors["x.weight" if fault == "more" else name] = tensors[name][:1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=says.format(re.escape(name))):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize("kind, change, says", [
    ("mamba2", dict(num_heads=7), "num_heads"), ("mamba2", dict(state_size=...), "state_size is m"),
    ("mamba2", dict(hidden_act="relu"), "hidden_act"), ("mamba2", dict(n_groups=3), "n_groups = 3"),
    ("mamba2", dict(time_step_limit=[0, 1]), "time_step"), ("mamba2", dict(expand="2"), "expand"),
    ("mamba2", dict(vocab_size=-1), "vocab_size = -1"), ("rwkv7", dict(attn={"l": [1]}), "attn"),
    ("rwkv7", dict(head_dim=60), "head_dim = 60"), ("rwkv7", dict(value_dim=[4] * 3), "value_dim"),
    ("rwkv7", dict(hidden_size="x"), "hidden_size = 'x'"), ("rwkv7", dict(eos_token_id=96), "eos_"),
    ("rwkv7", dict(gate_low_rank_dim=...), "gate_low_rank_dim is missing")])
def test_a_bad_config_is_named(kind, change, says, tmp_path):
    ours(kind).save_pretrained(tmp_path)
    content = read_json(tmp_path / "config.json") | change
    write_json(tmp_path / "config.json", {k: v for k, v in content.items() if v is not ...})
    with pytest.raises(UserError, match=f"config.json: .*{says}"):
        checkpoint.load_model(tmp_path)


# ------------------------------------------------------------------------------------- the pipeline


@pytest.mark.parametrize("name", ["tiny-mamba", "tiny-rwkv"])
def test_the_pipeline_from_plan_to_report(hf, name, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("tokenizers")
    out = tmp_path / "run"
    words = ["demo", name, "--out", str(out), *MICRO, "--data", str(DEMO), "--learn-epochs", "4",
             *"--forget-groups 1 --retain-groups 4 --max-total-tokens 96".split()]
    for command in ("plan", "original", "attribute", "mask", "unlearn"):
        main([command, *words])
    assert "attribute" in capsys.readouterr().out
    main(["evaluate", str(out), "original", "simu-graddiff", "--limit", "4"])
    main(["report", str(out)])
    assert "| SIMU-GradDiff" in (out / "report.md").read_text()
    if name == "tiny-mamba":
        check_same_text(hf, out / "simu-graddiff", settings.read_settings(out), card=True)


def test_an_edit_of_a_mixer_makes_its_own_models_again(tmp_path, monkeypatch):
    from test_house import forget_code

    def digests():
        forget_code()
        return [reach.code_digest((simu.attribute,), dict(ARCHITECTURES=kind))
                for kind in ("mamba2", "rwkv7", "llama")]

    before = digests()
    path = reach.FOLLOWED["pipeline.mixers.mamba2"]
    edited = tmp_path / "mamba2.py"
    edited.write_text(path.read_text().replace("F.softplus(", "F.relu("))
    monkeypatch.setitem(reach.FOLLOWED, "pipeline.mixers.mamba2", edited)
    after = digests()
    monkeypatch.undo()
    forget_code()
    assert [a == b for a, b in zip(before, after)] == [False, True, True]
