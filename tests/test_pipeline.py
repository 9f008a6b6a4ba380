"""The stages together, on the demo's data at a size that runs in seconds: what is made, what is
skipped, what is made again, and how mistakes end."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import data
import simu
from model import UserError, read_json
from pipeline import checkpoint, objectives, settings, slices, stage
from pipeline import __main__ as command_line
from pipeline.__main__ import main

ROOT = Path(simu.__file__).parent
DEMO = ROOT / "pipeline" / "demo"
MICRO = ("--width 64 --depth 2 --vocab 500 --learn-epochs 2 --light-epochs 2 --epochs 2 "
         "--max-total-tokens 48 --context 160 --forget-groups 2 --retain-groups 4").split()
FOLDERS = ("retain-only", "original", "fo-graddiff", "so-graddiff", "simu-graddiff")


def pipeline(out, *options, benchmark="demo", model="tiny-llama"):
    """What run.sh does, in this process."""
    for command in ("original", "attribute", "mask", "unlearn --method fo", "unlearn --method so",
                    "unlearn --method simu"):
        stage_of(command, out, *options, benchmark=benchmark, model=model)
    main(["evaluate", str(out), *FOLDERS])
    main(["report", str(out)])


def stage_of(command, out, *options, benchmark="demo", model="tiny-llama"):
    name, *rest = command.split()
    main([name, benchmark, model, "--out", str(out), *MICRO, "--data", str(DEMO), *options, *rest])


def tensors(folder):
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}


@pytest.fixture
def out(runs, tmp_path):
    """A copy of the demo's run."""
    return Path(shutil.copytree(runs["demo"], tmp_path / "run"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One micro run of each cell kind."""
    finished = {}
    for benchmark, model in (("demo", "tiny-llama"), ("lume", "tiny-olmo")):
        out = tmp_path_factory.mktemp(benchmark) / "run"
        pipeline(out, benchmark=benchmark, model=model)
        finished[benchmark] = out
    return finished


@pytest.mark.parametrize("cell", ["demo", "lume"])
def test_every_artefact_is_there_and_nothing_half_written(runs, cell):
    out = runs[cell]
    for folder in FOLDERS:
        for name in ("config.json", "model.safetensors", "log.jsonl", "stage.json",
                     "eval/generations.jsonl"):
            assert (out / folder / name).is_file(), f"{folder}/{name}"
    assert (out / "report.md").is_file() and (out / "report.json").is_file()
    assert not [p for p in out.rglob(".simu-*") if p.name != ".simu-lock"]
    info = read_json(out / "simu-graddiff" / "stage.json")
    assert info["seconds"] > 0 and info["peak_host"] > 1e6
    assert info["settings"]["lam"] == 2.0


@pytest.mark.parametrize("cell", ["demo", "lume"])
def test_only_what_simu_may_move_has_moved(runs, cell):
    out = runs[cell]
    old, new = tensors(out / "original"), tensors(out / "simu-graddiff")
    with safe_open(out / "mask" / "mask.safetensors", framework="pt") as file:
        mask = file.get_tensor("mask")
    assert old.keys() == new.keys()
    for name in old:
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if "self_attn" in name:
            assert not torch.equal(old[name], new[name]), name
        elif "down_proj" in name:
            assert torch.equal(old[name][~mask[layer]], new[name][~mask[layer]]), name
            assert not torch.equal(old[name], new[name]) or not mask[layer].any()
        else:
            assert torch.equal(old[name], new[name]), name
    for method in ("fo", "so"):
        other = tensors(out / f"{method}-graddiff")
        assert all(not torch.equal(old[k], other[k]) for k in old)


def test_the_mask_is_the_rule_on_the_scores(runs):
    out = runs["demo"]
    with safe_open(out / "attribution" / "scores.safetensors", framework="pt") as file:
        scores = {k: file.get_tensor(k) for k in file.keys()}
    with safe_open(out / "mask" / "mask.safetensors", framework="pt") as file:
        mask = file.get_tensor("mask")
    info = read_json(out / "mask" / "stage.json")
    threshold = info["settings"]["threshold"]
    assert scores["forget"].shape == scores["retain"].shape == mask.shape == (2, 64)
    assert torch.equal(mask, simu.critical_mask(scores["forget"], threshold))
    assert info["notes"]["critical"] == int(mask.sum()) and info["notes"]["total"] == 128


def test_a_second_run_does_nothing_and_a_changed_one_only_what_depends(out, capsys):
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    pipeline(out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before
    capsys.readouterr()
    pipeline(out, "--threshold", "0.9")
    printed = capsys.readouterr().out
    assert "[mask] made again: --threshold changed" in printed
    assert "[simu-graddiff] made again: mask changed" in printed
    for same in ("original", "attribution", "fo-graddiff", "so-graddiff", "fo-graddiff/eval"):
        assert f"[{same}] already made" in printed, same


def test_changed_data_makes_everything_again(out, tmp_path, capsys):
    shutil.copytree(DEMO / "tofu", tmp_path / "data" / "tofu")
    path = tmp_path / "data" / "tofu" / "world_facts.json"
    path.write_text(path.read_text() + "\n")
    stage_of("original", out, "--data", str(tmp_path / "data"))
    assert "[retain-only] made again: data/world_facts.json changed" in capsys.readouterr().out


def test_the_same_command_gives_the_same_bytes(runs, tmp_path):
    pipeline(tmp_path / "run")
    for name in ("original/model.safetensors", "attribution/scores.safetensors",
                 "mask/mask.safetensors", "simu-graddiff/model.safetensors",
                 "simu-graddiff/log.jsonl", "simu-graddiff/eval/generations.jsonl",
                 "fo-graddiff/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (runs["demo"] / name).read_bytes(), name


def test_attribution_does_not_depend_on_the_token_budget(out):
    scores = []
    for tokens in ("4096", "700"):
        stage_of("attribute", out, "--attribution-tokens", tokens)
        with safe_open(out / "attribution" / "scores.safetensors", framework="pt") as file:
            scores.append(file.get_tensor("forget"))
    assert (scores[0] - scores[1]).abs().max() <= 1e-4 * scores[0].abs().max()


@pytest.mark.parametrize("cell", ["demo", "lume"])
def test_saved_models_load_in_transformers(runs, cell):
    transformers = pytest.importorskip("transformers")
    from model import Transformer
    folder = runs[cell] / "simu-graddiff"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(Transformer.from_pretrained(folder)(ids), theirs(ids).logits,
                                   rtol=1e-5, atol=1e-5)


def test_weights_of_ones_own(runs, tmp_path):
    """--weights DIR: the original is linked, not copied and not made."""
    out, weights = tmp_path / "run", ("--weights", str(runs["demo"] / "original"))
    stage_of("original", out, *weights)
    assert (out / "original" / "model.safetensors").is_symlink()
    assert not (out / "retain-only").exists()
    stage_of("attribute", out, *weights)
    assert (out / "attribution" / "scores.safetensors").read_bytes() == (
        runs["demo"] / "attribution" / "scores.safetensors").read_bytes()


def test_cudnn_makes_no_plan_for_each_shape_of_attention(runs):
    torch.backends.cuda.enable_cudnn_sdp(True)
    checkpoint.load_model(runs["demo"] / "original")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_transformers_reads_the_tokenizer_as_we_do(runs):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    tokenizer = data.load_tokenizer(runs["demo"] / "simu-graddiff")
    theirs = transformers.AutoTokenizer.from_pretrained(runs["demo"] / "simu-graddiff")
    for text in ("Question: Who is it?\nAnswer:", "a  b", "na\u00efve"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=True)


# --------------------------------------------------------------------------------- what is refused


def test_models_made_at_once_are_those_made_one_by_one(runs, tmp_path, capfd):
    out, names = tmp_path / "run", ("fo-graddiff", "simu-graddiff")
    shutil.copytree(runs["demo"], out, ignore=lambda folder, _: names)
    stage_of("unlearn", out, "--each", "fo:graddiff", "simu:graddiff")
    printed = capfd.readouterr().out
    for name in names:
        for file in ("model.safetensors", "eval/generations.jsonl"):
            assert (out / name / file).read_bytes() == (runs["demo"] / name / file).read_bytes()
        lines = [line for line in printed.splitlines() if line.startswith(f"[{name}")]
        assert [line.split("]")[0] for line in lines] == [f"[{name}", f"[{name}/eval"]
    with pytest.raises(UserError, match="--objective is 'nothing'"):
        stage_of("unlearn", out, "--each", "fo:nothing", "simu:graddiff")


def test_a_report_leaves_out_what_is_of_another_mask(out, capsys):
    stage_of("mask --threshold 0.05", out)
    main(["report", str(out)])
    assert "mask was another" in capsys.readouterr().out
    text = (out / "report.md").read_text()
    table = text.split("##")[0]
    assert "| FO-GradDiff" in table and "| SIMU-GradDiff" not in table
    assert re.search(r"^- simu-graddiff: .*mask was another", text, re.M)


def test_forget_only_drops_what_the_retain_set_needs(out):
    stage_of("mask --mask forget-only --threshold 0.3", out)
    scores = load_file(out / "attribution" / "scores.safetensors")
    forget, retain = scores["forget"], scores["retain"]
    mask = load_file(out / "mask-forget-only" / "mask.safetensors")["mask"]
    dual, other = simu.critical_mask(forget, 0.3), simu.critical_mask(retain, 0.3)
    assert torch.equal(mask, dual & ~other) and (dual & other).any()
    assert not torch.equal(forget, retain)


# ---------------------------------------------------------------------------------------- mistakes


def command(*words, **environment):
    env = {k: v for k, v in os.environ.items() if k != "SIMU_DATA"} | environment
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env)


def test_a_run_in_use_is_refused(out):
    with open(out / stage.LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another process"):
            stage_of("mask --threshold 0.2", out)
    stage_of("mask --threshold 0.2", out)


@pytest.mark.parametrize("words, says", [
    ("", "COMMAND"), ("run", "demo|tofu"), ("run nonsense", "nonsense"), ("run tofu", "model"),
    ("run lume --seed 1", "model"), ("run unlearn tiny-llama", "FORGET"),
    ("run demo --seeds x", "--seeds"), ("run demo --seeds 0", "--seeds is 0"),
    ("run demo --seeds", "--seeds"), ("run demo --seeds 2 --seed 1", "drop --seed"),
    ("run demo --out", "--out"), ("run demo --out=", "--out: is empty"),
    ("run demo --ou x", "--ou"), ("run demo --treshold 1", "--treshold"),
    ("run demo --methods none", "none"), ("run demo --weights=", "--weights: is empty"),
    ("run unlearn tiny-llama f --methods fo so", "one method"), ("sweep", "benchmark"),
    ("attack", "run"), ("run tofu llama3", "llama3"), ("plan tofu llama3", "llama3"),
    ("original tofu tiny-llama --out OUT", "--data"),
    ("original demo tiny-llama --lr fast", "--lr"),
    ("original demo tiny-llama --path both", "--path"),
    ("original demo tiny-llama --config nowhere.json", "nowhere.json is missing"),
    ("original demo tiny-llama --seed 99999999999999", "--seed is 99999999999999"),
    ("original demo tiny-llama --vocab 300 --out OUT", "--vocab 300"),
    ("original demo tiny-llama --forget-split retain90 --out OUT", "every row of retain90")])
def test_a_run_that_cannot_be_refuses_before_its_first_stage(monkeypatch, tmp_path, words, says):
    monkeypatch.delenv("SIMU_DATA", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(command_line, "run_alone", None)
    with pytest.raises(UserError, match=re.escape(says)) as e:
        main(words.replace("OUT", str(tmp_path / "run")).split())
    assert "\n" not in str(e.value) and not list(tmp_path.rglob("model.safetensors"))


def stages_of(monkeypatch, *words):
    """The command lines of a run's stages."""
    stages = []
    monkeypatch.setattr(command_line, "main", stages.append)
    monkeypatch.setattr(command_line, "run_alone", stages.append)
    main(["run", *words])
    return stages


def test_a_tiny_model_runs_through_all_stages(monkeypatch, tmp_path):
    at = ["demo", "tiny-llama", f"--out={tmp_path}"]
    every = stages_of(monkeypatch, "demo", "--out", str(tmp_path), "--no-teach", "--seeds", "2")
    assert every[:6] == [
        ["original", *at, "--no-teach"], ["check", str(tmp_path)], ["attribute", *at, "--no-teach"],
        ["mask", *at, "--no-teach"],
        ["unlearn", *at, "--no-teach", "--each", "fo:graddiff", "so:graddiff", "simu:graddiff",
         "simu:stranger"], ["evaluate", str(tmp_path)]]
    assert every[6] == ["original", "demo", "tiny-llama", f"--out={tmp_path}-seed1", "--no-teach",
                        "--seed=1"]
    assert every[11:] == [["evaluate", f"{tmp_path}-seed1"], ["report", str(tmp_path)]]


def test_a_large_model_takes_a_process_for_each_stage(monkeypatch, tmp_path):
    every = stages_of(monkeypatch, "tofu", "olmo-1b", "--methods", "so", "simu", "--objectives",
                      "npo", "--attack", "--force", "--out", str(tmp_path), "--lr", "1e-4")
    at = ["tofu", "olmo-1b", "--lr=0.0001", f"--out={tmp_path}", "--force"]
    assert [sorted(words) for words in every[4:6]] == [
        sorted(["unlearn", *at, f"--method={method}", "--objective=npo"])
        for method in ("so", "simu")]
    assert every[6:] == [["evaluate", str(tmp_path), "--force"], ["attack", str(tmp_path)],
                         ["report", str(tmp_path)]]


def test_the_words_of_a_run_reach_its_stages_as_they_are(monkeypatch, tmp_path):
    """Nothing is read as an option, or by a shell."""
    for word in ("a b", "$(touch x)", "--help me", "-n", "x\ntouch x", "'\"", "*", "é\u202e"):
        (tmp_path / word).mkdir()
        at, *_ = stages_of(monkeypatch, "tofu", str(tmp_path / word), f"--out={tmp_path / word}",
                           f"--forget-split={word}")
        options = vars(command_line.parser_of_commands().parse_args(at))
        assert at[0] == "original" and options["forget_split"] == word
        assert options["model"] == options["out"] == str(tmp_path / word)


def test_run_sh_shows_its_help_and_may_be_a_link(tmp_path):
    (tmp_path / "link.sh").symlink_to(ROOT / "run.sh")
    done = command("bash", str(tmp_path / "link.sh"), "--help")
    assert done.returncode == 0 and "bash run.sh demo" in done.stdout and done.stderr == ""
    done = command("bash", str(tmp_path / "link.sh"), "demo", "--dry-run")
    assert done.returncode == 0 and "pipeline original demo tiny-llama" in done.stdout
    assert command("bash", "run.sh", "nonsense").stderr.startswith("error: 'nonsense' is not")


BLOCKED = """
import sys, importlib.abc
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tokenizers", "matplotlib", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {tests!r})
import warnings; warnings.simplefilter("ignore")
from test_pipeline import pipeline
pipeline({out!r}, "--forget-groups", "1", "--retain-groups", "2")
"""


def test_the_llama_demo_needs_no_optional_package(tmp_path):
    code = BLOCKED.format(tests=str(ROOT / "tests"), out=str(tmp_path / "run"))
    done = command(sys.executable, "-c", code, TQDM_DISABLE="1", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "report.json").read_text())


# The dataclass of settings that each stage takes first, and the settings that no stage takes, for
# they cannot change a result: where things lie, and how they are made.
TAKES = {"retain-only": (slices.Slice, settings.Source, settings.Placement, settings.Making),
         "attribution": (simu.Attribution,), "mask": (simu.Masking,),
         "unlearn": (objectives.Unlearning, settings.Level), "eval": (settings.Judging,)}
NOWHERE = {"data", "out", "name", "force", "deterministic", "resume_cost", "must_know", "forget",
           "retain", "unseen", "retain_only", "allow_near", "chosen"}
FIRST = dict(seed="retain-only", template="retain-only", learn_lr="retain-only",
             dtype="retain-only", steps="attribution", threshold="mask", mask="mask", lr="unlearn",
             objective="unlearn", gamma="unlearn", level="unlearn", max_new_tokens="eval",
             closeness="eval")


def test_every_setting_makes_the_right_stages_again():
    """No list of names is kept: a stage takes whole dataclasses. Files of rows count by their
    content."""
    named = {k: {f.name for t in classes for f in dataclasses.fields(t)}
             for k, classes in TAKES.items()}
    first = {f.name: next((k for k in named if f.name in named[k]), None)
             for f in dataclasses.fields(settings.Settings)}
    assert {name for name, stage in first.items() if stage is None} == NOWHERE
    assert {name: first[name] for name in FIRST} == FIRST


def test_a_runs_settings_repeat_it_and_leave_another_method_its_own_rate(tmp_path):
    def of(**named):
        return settings.resolve(dict(benchmark="demo", model="tiny-llama") | named)

    config = tmp_path / "settings.json"
    run = of(seed=3, epochs=7, lr=3e-4, out=str(tmp_path / "run"))
    config.write_text(json.dumps(dataclasses.asdict(run)))
    assert of(config=config, out=str(tmp_path / "run")) == run
    assert of(config=config, seed=1, method="fo") == of(seed=1, epochs=7, lr=3e-4, method="fo")
    config.write_text(json.dumps(dataclasses.asdict(of(epochs=7))))
    assert of(config=config, method="fo") == of(epochs=7, method="fo") != of(epochs=7)
    for other in (dict(benchmark="tofu"), dict(model="tiny-olmo")):
        with pytest.raises(UserError, match="is of .* (demo, not tofu|tiny-llama, not tiny-olmo)"):
            of(config=config, **other)


def test_each_request_has_a_default_folder_for_itself(tmp_path):
    def folder(model, text):
        (tmp_path / model).mkdir(exist_ok=True)
        (tmp_path / "rows.jsonl").write_text(json.dumps(dict(text=text)) + "\n")
        return settings.resolve(dict(benchmark="rows", model=str(tmp_path / model),
                                     forget=str(tmp_path / "rows.jsonl"))).run
    first = folder("m", "so it is")
    assert first == folder("m", "so it is") and first.name.startswith("rows-m-")
    assert len({first, folder("n", "so it is"), folder("m", "so it was")}) == 3
