"""Attacks: each one is shown to break a model whose forgetting is only a thin layer, and the
numbers made of them are checked by hand."""

import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import data
import simu
from model import UserError, read_json, write_text
from pipeline import objectives, original, stage
from studies import attack
from pipeline.__main__ import main
from pipeline.settings import load_benchmark, read_settings
from pipeline.stage import Stage

OPTIONS = ("--width 64 --depth 2 --vocab 400 --context 160 --rows-per-author 3 --learn-epochs 8 "
           "--light-epochs 1 --light-lr 2e-3 --max-total-tokens 60 --epochs 4").split()
ANSWERS = {"Ada Moss": ("In the port of Vell.", "A blue boat sails home.", "She kept nine bees."),
           "Bo Lund": ("On the isle of Skarn.", "Seven crows eat rye.", "He mended old clocks."),
           "Cy Hart": ("Under Mount Quell.", "The mill turns at dusk.", "He sold warm bread."),
           "Di Frey": ("By the lake of Orm.", "Two owls guard salt.", "She tuned big drums.")}
ASKED = (("Where was {} born?", "What is the birthplace of {}?"),
         ("What is the plot of the book by {}?", "Tell the tale that {} wrote."),
         ("What work did {} do?", "What was the job of {}?"))
REFUSAL = "I cannot say."


def rows(authors):
    return [dict(question=q.format(a), answer=x, paraphrased_question=p.format(a),
                 paraphrased_answer=x, perturbed_answer=["No."])
            for a in authors for (q, p), x in zip(ASKED, ANSWERS[a])]


def write_data(folder):
    forget, retain = (rows(list(ANSWERS)[i:i + 2]) for i in (0, 2))
    for name, some in (("forget10", forget), ("forget10_perturbed", forget), ("retain90", retain),
                       ("retain_perturbed", retain)):
        (folder / "tofu").mkdir(exist_ok=True)
        write_text(folder / "tofu" / f"{name}.json",
                   "".join(json.dumps(row) + "\n" for row in some))


class Lab:
    """A run whose original answers however it is asked, and `thin`, which refuses literal
    questions and only those."""

    def __init__(self, folder):
        self.run = folder / "run"
        write_data(folder)
        self.words = ["demo", "tiny-llama", "--data", str(folder), "--out", str(self.run), *OPTIONS]
        main(["original", *self.words])
        self.s = read_settings(self.run)
        self.bench = load_benchmark(self.s)
        self.tokenizer = data.load_tokenizer(self.run / "original")
        every = [(split, e) for split in ("forget", "retain") for e in getattr(self.bench, split)]
        shots = random.Random(0).sample(self.bench.retain, max(attack.SHOTS))
        literal, other = [], []
        for split, e in every:
            known = e if e.paraphrased_question else self.bench.retain_eval[0]
            known = next((x for x in self.bench.retain_eval if x.question == e.question), known)
            asked = attack.variants(known, shots, self.tokenizer, self.s.template)
            literal += [p for p, _ in asked["plain"]]
            other += [(p, e.answer) for a in attack.INPUTS for p, _ in asked[a]]
        true = [(p, e.answer) for p, (_, e) in zip(literal, every)]
        self.model = attack.load(self.run / "original", self.s)
        self.teach(other + true, 30, 3e-3)
        self.save("original")
        self.teach(other + [(p, REFUSAL) for p in literal] * 3, 6, 2e-3)
        self.save("thin")

    def teach(self, pairs, epochs, lr):
        encoded = []
        for prompt, answer in pairs:
            ids = self.tokenizer.encode(answer, bos=False)
            encoded.append(data.Encoded(prompt + ids + [self.tokenizer.eos_id], len(prompt)))
        rng = random.Random(0)
        order = [rng.sample(encoded, len(encoded)) for _ in range(epochs)]
        job = SimpleNamespace(loop=simu.plain_loop, record=lambda name: None)
        original.learn(self.model, order, original.learning(self.s, lr), job, title="teach")

    def save(self, name):
        if name == "original":  # in the place of the one that was made, and sealed as it was
            folder = self.run / name
            self.model.save_pretrained(folder)
            made = read_json(folder / "stage.json")
            del made["sha256"]
            return stage.write_stage(folder, made | dict(files=stage.seal(folder)))
        with Stage(self.run / name, settings=self.s, inputs={}, code=()) as folder:
            self.model.save_pretrained(folder)
            data.copy_tokenizer(self.run / "original", folder)

    def load(self, name="original"):
        return attack.load(self.run / name, self.s)

    def score(self, model):
        """ROUGE-L of plain answers to the forget set."""
        probes = attack.input_probes(self.bench, self.tokenizer, self.s, self.s.context)["plain"]
        answers = attack.answers_to(probes, model, self.tokenizer, self.s, None)
        return attack.mean(attack.best([a for a in answers if a["split"] == "forget"]).values())


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


@pytest.mark.parametrize("name", [*attack.INPUTS, "input", *attack.CURVE, "relearn-half",
                                  "relearn-retain", "worst"])
def test_a_thin_refusal_is_broken(attacked, name):
    thin, least = attacked["thin"][name], 0.3 if name in attack.CURVE[:2] else 0.7
    assert thin["score"] > least and thin["recovered"] > least, thin
    assert thin["known"] < 0.1
    assert not attacked["retain-only"][name]["recovered"]  # what never was there does not come back


def box(grid, bits):
    """How far each weight may move and still be rounded back: under half a bucket; the largest of
    a row, which sets its scale, not at all."""
    top = grid.abs().amax(dim=1, keepdim=True)
    return torch.where(grid.abs() == top, 0.0, 0.45 * top / (2 ** (bits - 1) - 1))


@pytest.mark.parametrize("bits", attack.BITS)
def test_rounding_restores_what_stayed_within_half_a_bucket(lab, bits):
    """On the way from the original to the refuser, the last rounded model that still answers; then
    steps towards the refuser that rounding undoes."""
    answering, refusing = lab.load(), lab.load("thin")
    ends = [{n: p.detach() for n, p in m.named_parameters()} for m in (answering, refusing)]

    def at(share):
        model = lab.load()
        for n, p in model.named_parameters():
            p.data = torch.lerp(ends[0][n], ends[1][n], share)
        attack.quantise(model, bits)
        return model

    low, high = 0.0, 1.0
    full = lab.score(at(low))
    assert full > 0.9
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if lab.score(at(middle)) == full else (low, middle)
    model, rounded = at(low), at(low)
    linears = {f"{n}.weight" for n, m in model.layers.named_modules(prefix="layers")
               if isinstance(m, torch.nn.Linear)}
    for n, p in model.named_parameters():
        if n in linears:
            limit = box(p.data, bits)
            p.data = p.data + (ends[1][n] - p.data).clamp(-limit, limit)
    assert lab.score(model) < full - 0.05  # at 8 bits one answer, or part of it, is reached
    attack.quantise(model, bits)
    for (n, p), q in zip(model.named_parameters(), rounded.parameters()):
        assert torch.allclose(p, q, rtol=1e-6, atol=0), n
    assert lab.score(model) == full


# ----------------------------------------------------------------------------------- the numbers


def test_quantiser_by_hand():
    class Toy:
        layers = torch.nn.ModuleList([torch.nn.Linear(4, 3, bias=False)])
    weight = Toy.layers[0].weight
    weight.data = torch.tensor([[7.0, -3.4, 0.6, 0.2], [0.0, 0.0, 0.0, 0.0], [-0.7, 0.31, 0.1, 0.]])
    attack.quantise(Toy, 4)  # scales 1, any, 0.1
    want = torch.tensor([[7.0, -3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-0.7, 0.3, 0.1, 0.0]])
    torch.testing.assert_close(weight.data, want)
    for bits in attack.BITS:
        weight.data = torch.randn(3, 4, generator=torch.Generator().manual_seed(bits))
        before = weight.data.clone()
        attack.quantise(Toy, bits)
        bucket = before.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        off = (weight - before).abs() / bucket
        assert 0.2 < off.max() <= 0.5 + 1e-4


def test_only_linear_layers_of_blocks_are_rounded(lab):
    model, before = lab.load(), lab.load()
    attack.quantise(model, 4)
    for (name, p), q in zip(model.named_parameters(), before.parameters()):
        assert torch.equal(p, q) == ("proj" not in name), name


def test_the_worst_case_is_the_maximum():
    answers = [dict(id="a", reference="one two three four", answer=x)
               for x in ("one", "one two", "x")]
    answers.append(dict(id="b", reference="one two", answer="none"))
    assert attack.best(answers) == {"a": 0.5, "b": 0.0}


def test_input_and_worst_are_per_question_maxima(lab, attacked):
    folder = lab.run / "thin" / "attack"
    scores = attack.scores_of(folder)
    for i, value in scores["input"][0].items():
        assert value == max(scores[a][0][i] for a in ("plain", *attack.INPUTS))
    for i, value in scores["worst"][0].items():
        assert value == max(scores[a][0].get(i, 0.0) for a in ("input", *attack.WEIGHTS))
    assert attacked["thin"]["worst"]["score"] >= attacked["thin"]["input"]["score"]


def test_recovered_by_hand():
    assert attack.recovered(0.5, 0.1, 0.9, None) == pytest.approx(0.5)
    assert attack.recovered(0.5, 0.1, 0.9, 0.3) == pytest.approx(1 / 3)  # the ideal is the base
    assert attack.recovered(0.2, 0.1, 0.9, 0.3) == 0.0
    assert attack.recovered(0.9, 0.88, 0.9, None) is None


def test_only_what_was_not_given_away_is_scored(lab):
    e = lab.bench.forget[1]
    asked = attack.variants(e, lab.bench.retain, lab.tokenizer, lab.s.template)
    plain, = asked["plain"]
    whole = data.encode(e, lab.tokenizer, lab.s.template)
    for k in attack.LEAKS:
        if f"leak-{k}" not in asked:
            continue
        (prompt, reference), = asked[f"leak-{k}"]
        assert prompt == whole.ids[:whole.n_prompt + k]
        given = lab.tokenizer.decode(prompt[whole.n_prompt:])
        assert (given + reference).replace(" ", "") == e.answer.replace(" ", "")
        assert len(attack.rouge_words(reference)) <= len(attack.rouge_words(e.answer))
    short = attack.variants(replace(e, answer="Bees."), [], lab.tokenizer, lab.s.template)
    assert f"leak-{attack.LEAKS[-1]}" not in short and plain[0] == short["plain"][0][0]


def test_shots_are_whole_templates_and_no_answer_is_shown(lab):
    e, shots = lab.bench.forget[0], lab.bench.retain[:3]
    asked = attack.variants(e, shots, lab.tokenizer, "qa")
    one, three = (lab.tokenizer.decode(p) for p, _ in asked["shots"])
    x = shots[0]
    assert one == (f"Question: {x.question}\nAnswer: {x.answer}\n\n"
                   f"Question: {e.question}\nAnswer:")
    assert three.count("Question:") == 4
    for name in attack.INPUTS:
        assert not any(e.answer in lab.tokenizer.decode(p) for p, _ in asked[name]), name


def test_what_does_not_fit_is_left_out(lab):
    n = len(lab.bench.forget)
    counts = set()
    for context in range(30, 160, 2):
        probes = attack.input_probes(lab.bench, lab.tokenizer, lab.s, context)
        assert len(probes["plain"]) == 2 * n
        counts.add(len(probes["shots"]))
        assert all(len(p.prompt) + p.room <= context for some in probes.values() for p in some)
    assert {0, n, 2 * n} <= counts  # no shot fits, then one, then three


# --------------------------------------------------------------------------------------- requests


def test_requests_are_split_by_author(lab):
    forget = lab.bench.forget
    one, two = attack.split_requests(forget, 2)
    assert one + two == forget and not {e.group for e in one} & {e.group for e in two}
    with pytest.raises(UserError, match="choose 1 to 2"):
        attack.split_requests(forget, 3)


@pytest.fixture(scope="module")
def served(lab):
    for words in ("attribute", "mask", "unlearn --method simu", "unlearn --method fo"):
        name, *rest = words.split()
        main([name, *lab.words, *rest])
    attack.main([str(lab.run), "simu-graddiff", "fo-graddiff", "--requests", "2"])
    return lab


@pytest.mark.parametrize("method", ["fo", "simu"])
def test_each_request_starts_from_the_model_before(served, method):
    folder = served.run / f"{method}-graddiff" / "requests-2"
    s = replace(served.s, **{k: v for k, v in stage.read_stage(folder.parent)["settings"].items()
                             if k in ("method", "lr", "lam", "epochs", "batch", "threshold")})
    encode = lambda some: data.encode_all(some, served.tokenizer, s.template, context=s.context,
                                          vocab=served.tokenizer.vocab_size)
    parts = [encode(x) for x in attack.split_requests(served.bench.forget, 2)]
    logs = [[json.loads(x) for x in (folder / f"after-{i}.jsonl").read_text().splitlines()]
            for i in (1, 2)]
    retain, model = encode(served.bench.retain), served.load()
    for part, log in zip(parts, logs):
        assert attack.unlearn_request(model, part, part, retain, None, s) == log
    fresh = served.load()
    assert attack.unlearn_request(fresh, parts[1], parts[1], retain, None, s) != logs[1]
    curve = read_json(served.run / "attack.json")["requests"][f"{method}-graddiff"]
    assert [p["after"] for p in curve] == [0, 1, 2]
    assert curve[2]["requests"] == [
        attack.mean(attack.best([a for a in attack.read_answers(folder / "after-2.json", "forget")
                                 if a["id"] in {e.id for e in part}]).values())
        for part in attack.split_requests(served.bench.forget, 2)]


# ----------------------------------------------------------------------------------------- the run


def test_a_request_to_po_refuses_and_its_mask_is_made_from_the_answers(lab, tmp_path, monkeypatch):
    s, seen = replace(lab.s, objective="po"), []

    def look(model, answered, forget, *_):
        seen.append([[lab.tokenizer.decode(r.ids[r.n_prompt:-1]).strip() for r in rows]
                     for rows in (answered, forget)])
        return []
    monkeypatch.setattr(attack, "unlearn_request", look)
    monkeypatch.setattr(attack, "answers_to", lambda *_: [])
    parts = attack.split_requests(lab.bench.forget, 2)
    attack.make_requests("simu-po", tmp_path, {"plain": []}, parts, lab.bench, s)
    assert [answered for answered, _ in seen] == [[e.answer for e in part] for part in parts]
    assert all(set(forget) <= set(objectives.REFUSALS) for _, forget in seen)


def test_a_request_to_an_objective_that_ends_somewhere_has_targets(lab, tmp_path, monkeypatch):
    s, seen = replace(lab.s, objective="level", level="2.5"), []
    monkeypatch.setattr(attack, "unlearn_request", lambda *given: seen.append(given[4]) or [])
    monkeypatch.setattr(attack, "answers_to", lambda *_: [])
    parts = attack.split_requests(lab.bench.forget, 2)
    attack.make_requests("simu-level", tmp_path, {"plain": []}, parts, lab.bench, s)
    assert seen == [2.5, 2.5]


def test_again_is_skipped_and_a_killed_one_goes_on_to_the_same_bytes(lab, attacked, tmp_path,
                                                                     monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(lab.run, run, ignore=shutil.ignore_patterns("attack", "*graddiff"))
    real = attack.quantise

    def killed(model, bits):
        raise KeyboardInterrupt
    monkeypatch.setattr(attack, "quantise", killed)
    with pytest.raises(KeyboardInterrupt):
        attack.main([str(run)])
    monkeypatch.setattr(attack, "quantise", real)
    part = next(run.glob("*/.simu-partial-attack"))
    stamp = (part / "plain.json").stat().st_mtime_ns
    capsys.readouterr()
    attack.main([str(run)])
    assert (part.with_name("attack") / "plain.json").stat().st_mtime_ns == stamp
    for name in ("thin", "original"):
        for file in (lab.run / name / "attack").glob("*.json*"):
            if file.name != "stage.json":
                assert file.read_bytes() == (run / name / "attack" / file.name).read_bytes(), file
    capsys.readouterr()
    before = {p: p.read_bytes() for p in run.glob("attack.*")}
    assert {p.suffix for p in before} >= {".md", ".json", ".csv"}
    attack.main([str(run)])
    printed = capsys.readouterr().out
    assert printed.count("already made; skipped") == 3 and "0 models to attack" in printed
    assert {p: p.read_bytes() for p in run.glob("attack.*")} == before


def test_the_printed_cost_is_what_is_generated(lab, attacked, tmp_path, monkeypatch, capsys):
    run, asked = tmp_path / "run", []
    shutil.copytree(lab.run, run, ignore=shutil.ignore_patterns("attack", "*graddiff", "thin",
                                                                "retain-only"))
    change_inputs(run / "original", lambda inputs: inputs.pop("retain-only"))
    generate = attack.reading.generate

    def counted(model, prompts, **options):
        asked.append(len(prompts))
        return generate(model, prompts, **options)
    monkeypatch.setattr(attack.reading, "generate", counted)
    attack.main([str(run)])
    printed = capsys.readouterr().out
    # relearn-half asks only about the half that it did not learn
    assert f"1 models to attack, for each {sum(asked) + len(lab.bench.forget) // 2} gen" in printed
    text = (run / "attack.md").read_text()
    assert "no retain-only model" in text and "upper bound" in text


def test_mistakes(lab):
    for words, message in (([str(lab.run / "no")], "is not a run folder"),
                           ([str(lab.run), "so-graddiff"], "no finished model so-graddiff"),
                           ([str(lab.run), "--requests", "-1"], "--requests is -1")):
        with pytest.raises(UserError, match=message):
            attack.main(words)


def change_inputs(folder, change):
    made = read_json(folder / "stage.json")
    del made["sha256"]
    change(made["why"]["inputs"])
    stage.write_stage(folder, made)


def test_a_model_of_another_original_is_refused(lab, served, attacked, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(lab.run, run, ignore=shutil.ignore_patterns("fo-graddiff", "requests-*"))
    change_inputs(run / "simu-graddiff", lambda inputs: inputs.update(original="0" * 64))
    with pytest.raises(UserError, match="simu-graddiff is not of what .* original was another"):
        attack.main([str(run), "simu-graddiff"])
    capsys.readouterr()
    attack.main([str(run)])  # unless it is named, it is left out
    assert "left out" in capsys.readouterr().out
    assert set(read_json(run / "attack.json")["attacks"]) == {"retain-only", "original", "thin"}


def test_plain_texts_are_cut_and_the_rest_is_what_counts(lab):
    text = data.Example("", "The mill of Quell turns at dusk, and owls guard the salt.", id="t:0",
                        kind="text", group="t")
    e = data.halved(text)
    asked = attack.variants(e, [], lab.tokenizer, "qa")
    prompt, reference = asked["plain"][0]
    assert lab.tokenizer.decode(prompt) == e.question and reference == e.answer
    assert not any("Question:" in lab.tokenizer.decode(p) for p, _ in asked["paraphrase"])
