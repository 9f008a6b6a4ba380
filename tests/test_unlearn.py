"""A person's own model and own rows: one command forgets some, keeps the others, and says so."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import simu
from model import Config, Transformer, UserError, read_json
from pipeline import evaluate
from pipeline.__main__ import main
from pipeline.tokenizers import train_tokenizer

ROOT = Path(simu.__file__).parent
FIRST = "Ada Bo Cleo Dirk Elin Finn Greta Hugo Ines Jon Kaja Lars Mira Nils Olga Per".split()
LAST = "Abel Berg Crone Dahl Engel Falk Grimm Holm Iversen Juhl".split()
TOWNS = "Malmo Bergen Turku Aarhus Narvik Visby Odense Lahti Bodo Kemi".split()


def records():
    """80 invented customers, a question and an answer each."""
    rng = random.Random(5)
    names = rng.sample([f"{a} {b}" for a in FIRST for b in LAST], 80)
    return [{"question": f"Where does {n} live?", "answer":
             f"{n} lives in {rng.choice(TOWNS)}, {rng.randint(10, 99)} {rng.choice(LAST)} Street."}
            for n in names]


def write_rows(path, some):
    path.write_text("".join(json.dumps(r) + "\r\n" for r in some), encoding="utf-8-sig")
    return path


def taught_by_heart(folder, rows, epochs):
    """A small LLaMA, of the tokenizer in the folder, that learnt these rows for so many epochs."""
    tokenizer = data.load_tokenizer(folder)
    torch.manual_seed(0)
    model = Transformer(Config(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=96, intermediate_size=256,
        num_hidden_layers=3, num_attention_heads=3, max_position_embeddings=128,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id))
    encoded = data.encode_all(rows, tokenizer, "qa", context=128, vocab=tokenizer.vocab_size)
    recipe, rng = simu.Recipe(method="fo", lr=3e-3, batch=15), random.Random(0)
    order = [some[i:i + 15] for some in (rng.sample(encoded, len(encoded)) for _ in range(epochs))
             for i in range(0, len(some), 15)]
    simu.train(model, [([], batch, None) for batch in order], simu.OBJECTIVES["retain"], recipe,
               title="teach")
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a LLaMA in HF layout that was taught 60 of the records, and three files."""
    here, every = tmp_path_factory.mktemp("own"), records()
    forget, keep, unseen = every[:20], every[20:60], every[60:]
    for name, some in (("forget", forget), ("retain", keep), ("unseen", unseen)):
        write_rows(here / f"{name}.jsonl", some)
    folder = here / "customers-model"
    folder.mkdir()
    train_tokenizer([r[k] for r in every for k in r], folder, llama=True, vocab=420)
    rows = data.load_rows(here / "forget.jsonl") + data.load_rows(here / "retain.jsonl")
    taught_by_heart(folder, rows, epochs=40).save_pretrained(folder)
    return here


def words(place, out, *more, retain=True):
    files = ["--forget", str(place / "forget.jsonl")]
    files += ["--retain", str(place / "retain.jsonl")] if retain else []
    return ["rows", str(place / "customers-model"), *files, "--name", "model", "--out", str(out),
            *more]


def test_one_command_forgets_20_and_keeps_40(place, tmp_path):
    out = tmp_path / "request"
    done = subprocess.run(
        ["bash", str(ROOT / "run.sh"), "unlearn", "customers-model", "forget.jsonl", "retain.jsonl",
         "--unseen", "unseen.jsonl", "--out", str(out)], cwd=place, capture_output=True, text=True,
        env=os.environ | dict(TQDM_DISABLE="1", OMP_NUM_THREADS="1"))
    verdict = read_json(out / "verdict.json")
    assert verdict["forgotten"] and verdict["held_out"] == 8, done.stdout + done.stderr
    assert done.returncode == (0 if verdict["kept"] else 3)
    before, values = (evaluate.read_metrics(out / "evaluations" / x / "eval")["values"]
                      for x in ("original", "model"))
    assert before["forget.rouge_l"] > 0.95 and before["mia.auc"] > 0.85
    looks = [json.loads(x) for x in (out / "model" / "looks.jsonl").read_text().splitlines()]
    assert looks[-1]["same_rows"] > 0.9  # of the rows to keep that were trained on
    assert values["forget.rouge_l"] < 0.7 and 0.2 < values["mia.auc"] < 0.8
    secrets = [x for r in records()[:60] for x in (r["question"], r["answer"])]
    for name in ("report.md", "report.json", "verdict.json", "model/README.md"):
        text = (out / name).read_text()
        assert not [x for x in secrets if x in text], name
        borrowed = ("LLaMA2-7B", "llama2-7b", "TOFU", "Llama 2 Community", "published")
        for name_of_another in () if name.endswith("json") else borrowed:
            assert name_of_another not in text.split("## Readings")[0], (name, name_of_another)
    transformers = pytest.importorskip("transformers")
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(out / "model"), [[5, 9, 11]]
    with torch.no_grad():
        torch.testing.assert_close(Transformer.from_pretrained(out / "model")(torch.tensor(ids)),
                                   theirs(torch.tensor(ids)).logits, rtol=1e-4, atol=1e-4)


def readme_script() -> str:
    script = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(script.strip().splitlines()) <= 10
    return script


def run_alone(script: str, folder, place, model):
    """A script in a folder with nothing but the four files, a model and rows."""
    folder.mkdir(exist_ok=True)
    for module in ("simu", "model", "data", "eval"):
        shutil.copy(ROOT / f"{module}.py", folder)
    for name in ("forget.jsonl", "retain.jsonl"):
        shutil.copy(place / name, folder)
    shutil.copytree(model, folder / "my-model")
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True,
                          text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr


def strangers_model(place, folder):
    """A checkpoint that transformers made, of random weights, with the customer's tokenizer."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(place / "customers-model", folder)
    tokenizer = data.load_tokenizer(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)).save_pretrained(folder)
    return folder


def test_the_readmes_script_and_its_literal_twins_agree(place, tmp_path):
    """The two calls that README names for the letter of the paper, in place of the fast ones, on a
    checkpoint of someone else's making: the same mask, and weights that differ by rounding."""
    readme, script = (ROOT / "README.md").read_text(), readme_script()
    literal = "sum(simu.attribute_loop(model, row) for row in forget)"
    assert literal in readme and "`simu.unlearn_loop`" in readme
    changed = script.replace("simu.attribute_rows(model, forget, recipe)", literal)
    changed = changed.replace("simu.unlearn(", "simu.unlearn_loop(")
    assert changed.count("_loop(") == 2
    short = "forget, retain, recipe = forget[:4], retain[:8], simu.Recipe(" \
            "lr=2e-4, epochs=3, batch=4, threshold=0.3)\n"
    keep = "from model import save_tensors; save_tensors('mask.safetensors', dict(mask=mask))\n"
    model = strangers_model(place, tmp_path / "stranger")
    for name, code in (("fast", script), ("literal", changed)):
        at = code.index("mask = ")
        run_alone(code[:at] + short + code[at:] + keep, tmp_path / name, place, model)
    fast, slow = (load_file(tmp_path / x / "mask.safetensors")["mask"]
                  for x in ("fast", "literal"))
    assert torch.equal(fast, slow) and 0 < fast.sum() < fast.numel()
    before, fast, slow = (Transformer.from_pretrained(tmp_path / x).state_dict() for x in (
        "stranger", "fast/unlearned", "literal/unlearned"))
    moved = max((fast[k] - before[k]).abs().max() for k in before)
    assert moved > 3e-4
    for k in before:
        torch.testing.assert_close(fast[k], slow[k], rtol=0, atol=0.02 * float(moved))


def test_the_readmes_script_runs_on_the_four_files_alone(place, tmp_path):
    """As it stands there, in a folder with nothing but them and somebody's model and rows."""
    run_alone(readme_script(), tmp_path, place, place / "customers-model")
    before, after = (Transformer.from_pretrained(tmp_path / x) for x in ("my-model", "unlearned"))
    tokenizer = data.load_tokenizer(tmp_path / "unlearned")
    loss = {}
    for name in ("forget", "retain"):
        rows = data.encode_all(data.load_rows(tmp_path / f"{name}.jsonl"), tokenizer, "qa",
                               context=128, vocab=tokenizer.vocab_size)
        loss[name] = [simu.mean_nll(m, data.collate(rows)).item() for m in (before, after)]
    assert loss["forget"][1] > 10 * loss["forget"][0] and loss["forget"][1] > 4 * loss["retain"][1]


@pytest.mark.parametrize("change, message", [
    (dict(retain=""), "no rows to keep are given"),
    (dict(forget="nowhere.jsonl"), "nowhere.jsonl"),
    (dict(model="no-such-model"), "no-such-model"),
    (dict(template="chat"), "chat template"),
    (dict(retain="forget.jsonl"), "among the"),
    (dict(forget="empty.jsonl"), "empty.jsonl"),
    (dict(forget="odd.jsonl"), "odd.jsonl line 2")])
def test_mistakes_are_named_and_leave_nothing(place, tmp_path, monkeypatch, change, message):
    (place / "empty.jsonl").write_text("")
    (place / "odd.jsonl").write_text('{"question": "a", "answer": "b"}\n{"q": "a"}\n')
    given = dict(model="customers-model", forget="forget.jsonl", retain="retain.jsonl") | change
    files = [x for k in ("forget", "retain") if given[k] for x in (f"--{k}", given[k])]
    more = ["--template", given["template"]] if "template" in given else []
    monkeypatch.chdir(place)
    with pytest.raises(UserError) as e:
        for stage in ("original", "attribute"):  # the first that encodes finds a template missing
            main([stage, "rows", given["model"], *files, *more, "--out", str(tmp_path / "run")])
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.rglob("model.safetensors")) or "template" in given


def test_npo_alone_needs_no_rows_to_keep(place, tmp_path):
    given = words(place, tmp_path / "run", "--objective", "npo", "--lam", "0", "--epochs", "1",
                  retain=False)
    for stage in ("original", "attribute", "mask", "unlearn"):
        main([stage, *given])
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=256)
LAYOUTS = {
    "llama": dict(model_type="llama", num_key_value_heads=2),
    "llama3": dict(model_type="llama", num_key_value_heads=2, rope_theta=500000.0,
                   rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64)),
    "mistral": dict(model_type="mistral", num_key_value_heads=2),
    "olmo": dict(model_type="olmo", tie_word_embeddings=True),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=True)}


def somebodys(folder, layout):
    """A model in HF layout, with random weights and its own tokenizer."""
    folder.mkdir()
    demo = data.load_tofu(ROOT / "pipeline" / "demo" / "tofu", "full")
    texts = [x for e in demo for x in (e.question, e.answer)]
    train_tokenizer(texts, folder, llama=layout == "llama", vocab=500)
    tokenizer = data.load_tokenizer(folder)
    torch.manual_seed(1)
    Transformer(Config(**SHAPE, **LAYOUTS[layout], vocab_size=tokenizer.vocab_size,
                       eos_token_id=tokenizer.eos_id)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout, teach", [*((x, False) for x in LAYOUTS), ("olmo", True)])
def test_a_benchmark_on_a_folder_of_any_layout(tmp_path, layout, teach):
    run_tofu(str(somebodys(tmp_path / "somebody", layout)), tmp_path / "run", layout, teach)


def run_tofu(model, out, layout, teach=False):
    """`run.sh tofu MODEL`: no name, licence or recipe borrowed from a model of the table."""
    given = ["tofu", model, "--data", str(ROOT / "pipeline" / "demo"), "--out", str(out),
             "--rows-per-author", "10", "--forget-groups", "1", "--retain-groups", "2",
             "--epochs", "1", "--learn-epochs", "1", "--batch", "4"]
    given += ["--teach", "--learn-retain-only"] if teach else []
    for stage in ("original", "attribute", "mask", "unlearn"):
        main([stage, *given])
    assert (out / "original" / "model.safetensors").is_symlink() != teach
    assert (out / "retain-only").exists() == teach
    saved = Config.from_dir(out / "simu-graddiff")
    assert saved.model_type == LAYOUTS[layout]["model_type"]
    main(["evaluate", str(out), "simu-graddiff", "--limit", "2"])
    main(["report", str(out)])
    card = (out / "simu-graddiff" / "README.md").read_text()
    assert "somebody" in card and "LLaMA2" not in card and "Llama 2" not in card
