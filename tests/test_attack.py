"""Attacks: each one is shown to break a model whose forgetting is only a thin layer, and the
numbers made of them are checked by hand."""

import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

import data
import simu
from model import UserError, read_json, write_json, write_text
from pipeline import checkpoint, original
from pipeline.__main__ import main
from pipeline.settings import read_settings
from pipeline.slices import load_benchmark
from pipeline.stage import Stage
from studies import attack

OPTIONS = ("--width 64 --depth 2 --vocab 400 --context 160 --rows-per-author 3 --learn-epochs 8 "
           "--light-epochs 1 --light-lr 2e-3 --max-total-tokens 60 --epochs 4").split()
ANSWERS = {"Ada Moss": ("In the port of Vell.", "A blue boat sails home.", "She kept nine bees."),
           "Bo Lund": ("On the isle of Skarn.", "Seven crows eat rye.", "He mended old clocks."),
           "Cy Hart": ("Under Mount Quell.", "The mill turns at dusk.", "He sold warm bread."),
           "Di Frey": ("By the lake of Orm.", "Two owls guard salt.", "She tuned big drums.")}
QUESTIONS = (("Where was {} born?", "What is the birthplace of {}?"),
             ("What is the plot of the book by {}?", "Tell the tale that {} wrote."),
             ("What work did {} do?", "What was the job of {}?"))
REFUSAL = "I cannot say."


def write_data(folder):
    rows = [dict(question=q.format(a), answer=x, paraphrased_question=p.format(a),
                 paraphrased_answer=x, perturbed_answer=["No."])
            for a in ANSWERS for (q, p), x in zip(QUESTIONS, ANSWERS[a])]
    for name, part in (("forget10", rows[:6]), ("forget10_perturbed", rows[:6]),
                       ("retain90", rows[6:]), ("retain_perturbed", rows[6:])):
        write_text(folder / "tofu" / f"{name}.json",
                   "".join(json.dumps(row) + "\n" for row in part))


class Lab:
    """A run whose original answers however it is asked, and `thin`, which refuses literal
    questions and only those."""

    def __init__(self, folder):
        self.run = folder / "run"
        write_data(folder)
        main(["original", "demo", "tiny-llama", "--data", str(folder), "--out", str(self.run),
              *OPTIONS])
        self.s = read_settings(self.run)
        self.bench = load_benchmark(self.s)
        self.tokenizer = data.load_tokenizer(self.run / "original")
        shots = random.Random(0).sample(self.bench.retain, max(attack.SHOTS))
        paraphrased = {e.question: e for e in self.bench.retain_eval}
        literal, other = [], []
        for e in self.bench.forget + self.bench.retain:
            prompts = attack.variants(paraphrased.get(e.question, e), shots, self.tokenizer,
                                      self.s.template)
            literal += [(p, e.answer) for p in prompts["plain"]]
            other += [(p, e.answer) for a in attack.INPUTS for p in prompts[a]]
        self.model = self.load()
        self.teach(other + literal, 30, 3e-3)
        self.save("original")
        self.teach(other + [(p, REFUSAL) for p, _ in literal] * 3, 6, 2e-3)
        self.save("thin")

    def teach(self, pairs, epochs, lr):
        encoded = []
        for prompt, answer in pairs:
            ids = self.tokenizer.encode(answer, bos=False)
            encoded.append(data.Encoded(prompt + ids + [self.tokenizer.eos_id], len(prompt)))
        rng = random.Random(0)
        order = [rng.sample(encoded, len(encoded)) for _ in range(epochs)]
        job = SimpleNamespace(loop=None, record=lambda name: None)
        original.learn(self.model, order, original.learning(self.s, lr), job, title="teach")

    def save(self, name):
        with Stage(self.run / name, self.s, inputs={}, code=()).making() as folder:
            self.model.save_pretrained(folder)
            data.copy_tokenizer(self.run / "retain-only", folder)

    def load(self, name="original"):
        return checkpoint.load_model(self.run / name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def attacked(lab):
    attack.main([str(lab.run)])
    return read_json(lab.run / "attack.json")["attacks"]


# ------------------------------------------------------------------------------- positive controls


def test_the_control_refuses_and_its_original_knows(attacked):
    assert attacked["original"]["plain"]["score"] > 0.95
    assert attacked["thin"]["plain"]["score"] < 0.1
    assert attacked["retain-only"]["worst"]["score"] < 0.5


@pytest.mark.parametrize("name", [*attack.INPUTS, "input", "relearn-half", "relearn-retain",
                                  "worst"])
def test_a_thin_refusal_is_broken(attacked, name):
    thin = attacked["thin"][name]
    assert thin["score"] > 0.7 and thin["recovered"] > 0.7 and thin["known"] < 0.1, thin
    assert not attacked["retain-only"][name]["recovered"]


@pytest.mark.parametrize("bits", attack.BITS)
def test_rounding_undoes_what_moved_a_weight_by_less_than_half_a_bucket(lab, bits):
    rounded, hidden = lab.load(), lab.load()
    attack.quantise(rounded, bits)
    for (name, p), q in zip(rounded.named_parameters(), hidden.parameters()):
        assert torch.equal(p, q) == ("proj" not in name), name  # linear layers of blocks alone
    generator = torch.Generator().manual_seed(0)
    for name, p in hidden.named_parameters():
        if "proj" in name:
            grid = rounded.get_parameter(name).detach()
            top = grid.abs().amax(dim=1, keepdim=True)  # of a row, whose scale it sets: it stays
            noise = (torch.rand(grid.shape, generator=generator) - 0.5) * 0.9 * (grid.abs() < top)
            p.data = grid + noise * top / (2 ** (bits - 1) - 1)
            assert (p != grid).float().mean() > 0.9
    attack.quantise(hidden, bits)
    for p, q in zip(hidden.parameters(), rounded.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------- the numbers


def test_quantiser_by_hand():
    class Toy:
        layers = torch.nn.ModuleList([torch.nn.Linear(4, 3, bias=False)])
    weight = Toy.layers[0].weight
    weight.data = torch.tensor([[7.0, -3.4, 0.6, 0.2], [0.0, 0.0, 0.0, 0.0], [-0.7, 0.31, 0.1, 0.]])
    attack.quantise(Toy, 4)  # scales 1, any, 0.1
    want = torch.tensor([[7.0, -3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-0.7, 0.3, 0.1, 0.0]])
    torch.testing.assert_close(weight.data, want)


def test_the_worst_case_is_the_maximum_question_by_question(tmp_path):
    def store(name, *answers):  # of questions a and b
        write_json(tmp_path / f"{name}.json", [
            dict(split="forget", id=i, reference="one two three four", answer=x)
            for i, x in answers] + [dict(split="retain", id="c", reference="one", answer="one")])

    for name in ("plain", *attack.INPUTS, *attack.WEIGHTS):
        store(name, ("a", "none"), ("b", "none"))
    store("shots", ("a", "one"), ("a", "one two"), ("a", "x"), ("b", "none"))
    store("prefix", ("a", "one"), ("b", "four"))
    store("relearn-half", ("b", "one two three"))  # a was learnt again
    scores = attack.scores_of(tmp_path)
    assert scores["shots"] == {"a": 0.5, "b": 0.0}
    assert scores["input"] == {"a": 0.5, "b": 0.25} and scores["worst"] == {"a": 0.5, "b": 0.75}
    assert attack.best(tmp_path, "int8", "retain") == {"c": 1.0}


def test_recovered_by_hand():
    assert attack.recovered(0.5, 0.1, 0.9, None) == pytest.approx(0.5)
    assert attack.recovered(0.5, 0.1, 0.9, 0.3) == pytest.approx(1 / 3)  # the ideal is the base
    assert attack.recovered(0.2, 0.1, 0.9, 0.3) == 0.0
    assert attack.recovered(0.9, 0.88, 0.9, None) is None


def test_shots_are_complete_templates_and_no_answer_is_shown(lab):
    e, shots = lab.bench.forget[0], lab.bench.retain[:3]
    prompts = attack.variants(e, shots, lab.tokenizer, "qa")
    one, three = (lab.tokenizer.decode(p) for p in prompts["shots"])
    assert one == (f"Question: {shots[0].question}\nAnswer: {shots[0].answer}\n\n"
                   f"Question: {e.question}\nAnswer:")
    assert three.count("Question:") == 4
    for name in attack.INPUTS:
        assert not any(e.answer in lab.tokenizer.decode(p) for p in prompts[name]), name


def test_what_does_not_fit_is_left_out(lab):
    n, counts = len(lab.bench.forget), set()
    for context in range(30, 160, 2):
        probes = attack.input_probes(lab.bench, lab.tokenizer, lab.s, context)
        assert len(probes["plain"]) == 2 * n
        counts.add(len(probes["shots"]))
        assert all(len(p.prompt) + p.room <= context for x in probes.values() for p in x)
    assert {0, n, 2 * n} <= counts  # no shot fits, then one, then three


def test_a_plain_text_is_continued(lab):
    text = data.Example("", "The mill of Quell turns at dusk, and owls guard the salt.", id="t:0",
                        kind="text", group="t")
    e = data.halved(text)
    prompts = attack.variants(e, [], lab.tokenizer, "qa")
    assert [lab.tokenizer.decode(p) for p in prompts["plain"]] == [e.question]
    assert not any("Question:" in lab.tokenizer.decode(p) for p in prompts["paraphrase"])


# ----------------------------------------------------------------------------------------- the run


def test_again_is_skipped_and_a_killed_one_goes_on_to_the_same_bytes(lab, attacked, tmp_path,
                                                                     monkeypatch):
    run, titles, real = tmp_path / "run", [], tqdm.__init__
    shutil.copytree(lab.run, run, ignore=shutil.ignore_patterns("attack"))

    def killed(bar, *args, desc=None, **options):
        if desc == "original: int8" and desc not in titles:
            titles.append(desc)
            raise KeyboardInterrupt
        titles.append(desc)
        real(bar, *args, desc=desc, **options)

    monkeypatch.setattr(tqdm, "__init__", killed)
    with pytest.raises(KeyboardInterrupt):
        attack.main([str(run)])
    attack.main([str(run)])
    assert titles.count("original: plain") == 1 and titles.count("original: int8") == 2
    for name in ("thin", "original"):
        for file in (lab.run / name / "attack").glob("*.json"):
            if file.name != "stage.json":
                assert file.read_bytes() == (run / name / "attack" / file.name).read_bytes(), file
    titles.clear()
    before = {p: p.read_bytes() for p in run.glob("attack.*")}
    attack.main([str(run)])
    assert not titles and {p: p.read_bytes() for p in run.glob("attack.*")} == before


def test_a_model_of_another_original_is_left_out_or_if_it_was_named_refused(lab, attacked,
                                                                           tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lab.run, run, ignore=shutil.ignore_patterns("retain-only"))
    s = replace(lab.s, out=str(run))
    with Stage(run / "mine", s, inputs=dict(original="0" * 64), code=()).making() as folder:
        lab.model.save_pretrained(folder)
    with pytest.raises(UserError, match="no finished model mine of what this run now holds"):
        attack.main([str(run), "mine"])
    attack.main([str(run)])
    assert set(read_json(run / "attack.json")["attacks"]) == {"original", "thin"}
