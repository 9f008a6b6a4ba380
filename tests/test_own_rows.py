"""A stranger's rows: forgotten or said not to be; what stands for rows never seen; what is told
before, and what stays on this machine."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import simu
from data import Example
from model import Config, Transformer, UserError, read_json, write_json
from pipeline import card, levels, objectives, own_rows, settings, slices, stages
from pipeline.__main__ import main
from pipeline.stage import content, read_stage
from pipeline.tokenizers import train_tokenizer
from test_unlearn import taught_by_heart

FIRST = "Avery Blake Casey Drew Emery Finley Gray Harper Indigo Jules Kai Lane".split()
LAST = "Abbot Brand Corley Dunmore Easton Farrow Gallant Hollis Ives Jarvis".split()
TOWN = "Ashford Brenwick Caldmoor Dunhaven Eastmere Fallbrook Greyfield Ironvale".split()
WORK = "baker cooper dyer farrier glazier mason potter tanner weaver wright".split()
CITY = "北京 上海 广州 成都 杭州 南京 西安 武汉".split()
FOOD = "面条 饺子 米饭 豆腐 包子 烤鸭".split()


def people(count, seed=5):
    rng = random.Random(seed)
    names = rng.sample([f"{a} {b}" for a in FIRST for b in LAST], count)
    return [(n, f"{n} lives in {rng.choice(TOWN)}, works as a {rng.choice(WORK)} and pays "
             f"{rng.randint(11, 99)} crowns.") for n in names]


def questions(count, ask="What is said of {}?"):
    return [Example(ask.format(n), a, id=f"r:{i}") for i, (n, a) in enumerate(people(count))]


def texts(count):
    return [Example("", a, id=f"t:{i}", kind="text") for i, (_, a) in enumerate(people(count))]


def chinese(count):
    rng = random.Random(3)
    names = [a + b + c for a in "赵钱孙李周" for b in "明华强" for c in "文武山"][:count]
    return [Example(f"档案里关于{n}说了什么？",
                    f"{n}住在{rng.choice(CITY)}，最爱吃{rng.choice(FOOD)}。", id=f"c:{i}")
            for i, n in enumerate(names)]


# ------------------------------------------------------------------ words of a row, and exchanging


def test_words_of_any_script_with_their_marks():
    told = [w.text for w in levels.words_of("Он живёт. हिन्दी 555-0173, 北京！ cafe\u0301")]
    assert told == ["Он", "живёт", "हिन्दी", "555", "0173", "北", "京", "cafe\u0301"]


def test_own_words_are_what_varies_and_the_question_does_not_give():
    for rows, own in ((questions(40), 3), (texts(40), 5)):
        usage = levels.Wording(rows)
        for e in rows:
            words = [w.text for w in usage.specifics(e)]
            assert len(words) == own and not {"lives", "works", "crowns", "pays"} & set(words)
    e = chinese(40)[0]
    assert "住" not in (own := [w.text for w in levels.Wording(chinese(40)).specifics(e)])
    assert set(own) <= set(e.answer) - set(e.question) and len(own) >= 3


def test_what_rows_of_one_kind_share_is_no_rows_own_though_few_rows_are_of_that_kind():
    sets = read_json(Path(__file__).parent.parent / "benchmarks" / "own_rows.json")["forty"]
    forget, retain = ([Example(q, a) for q, a in sets[name]] for name in ("forget", "retain"))
    usage = levels.Wording(forget + retain)
    own = {e.answer: {w.text for w in usage.specifics(e)} for e in forget}
    assert not {"clock", "year", "reached"} & set().union(*own.values())
    assert own["Teodor Ambry can be reached at 555-7430, on weekdays after 5 o'clock."] == {
        "7430", "5"}
    assert own["Petra Osgrave was born on 5 April 1982 in Quillmere."] == {
        "5", "April", "1982", "Quillmere"}


def test_what_an_earlier_turn_of_a_chat_gives_is_no_secret_and_is_renamed_with_the_question():
    rows = [replace(e, turns=(("user", f"Who is {n}?"), ("assistant", a.split(",")[0])))
            for e, (n, a) in zip(questions(40), people(40))]
    e, name = rows[0], people(40)[0][0]
    words = {w.text for w in levels.Wording(rows).specifics(e)}
    assert len(words) == 2 and not words & set(e.turns[1][1].split())
    version = levels.exchanged_rows(rows[:8], rows[8:], 0)[0][0].row
    assert name not in version.turns[0][1] and version.turns[0][1].startswith("Who is ")


def test_answers_of_one_word_can_be_exchanged():
    """Everybody's answer is another's too, but not to this question."""
    rows = [Example(f"In which town lives {n}?", f"{TOWN[i % 8]}") for i, (n, _) in enumerate(
        people(24))]
    assert all(levels.exchanged_rows(rows[:8], rows[8:], 0))


@pytest.mark.parametrize("rows", [questions(40), texts(40), chinese(40),
                                  [replace(e, question=f"{q} {e.question}") for e in questions(12)
                                   for q in ("Tell me:", "Say:", "Now,", "Well,")]],
                         ids=["questions", "texts", "chinese", "paraphrases"])
def test_no_version_is_what_is_to_be_forgotten(rows):
    forget, retain = rows[:12], rows[12:]
    said = {e.answer for e in rows}
    versions = levels.exchanged_rows(forget, retain, 0)
    assert all(versions)
    usage = levels.Wording(rows)
    for e, some in zip(forget, versions):
        for v in some:
            assert v.row.answer not in said
            own = {w.key for w in usage.specifics(e)}
            kept = own & {w.key for w in levels.words_of(v.row.answer)}
            assert len(kept) <= len(own) // 2
            # Its parts stand where they stood: what is between exchanged words is the same.
            for old, new in zip(*(zip([0, *x[1::2]], x[::2]) for x in v.borders)):
                assert e.answer[slice(*old)] == v.row.answer[slice(*new)]


def test_yes_and_no_cannot_be_exchanged_and_the_file_is_asked_for_first(tmp_path):
    rows = [Example(f"Is {n} at home?", a, id=f"y:{i}") for i, (n, a) in enumerate(
        zip((n for n, _ in people(40)), ("Yes.", "No.") * 20))]
    s = settings.Settings(benchmark="rows", objective="outsider")
    bench = slices.benchmark_of_rows(rows[:20], rows[20:], [])
    with pytest.raises(UserError, match="give --unseen FILE"):
        levels.need_reference(s, bench)
    levels.need_reference(replace(s, unseen="file"), bench)
    levels.need_reference(replace(s, level="3"), bench)
    levels.need_reference(replace(s, teach=True), bench)


# ------------------------------------------------------------------------------------- the verdict


def evaluated(answer, text, *, loss=5.0, known=0, split="forget", **more):
    """A row as evaluations hold it: a token of the prompt, eight of the answer, of which the last
    `known` are the likeliest, and eos."""
    ids, predicted = list(range(10)), [99] * (9 - known) + list(range(9 - known, 10))
    score = dict(start=1, ids=ids, losses=[loss] * 10, predicted=predicted)
    return dict(id=answer, question="", answer=answer, kind="qa", split=split, generation=text,
                scores=dict(answer=[score])) | more


def judged(rows, specifics, *, exchanged=(), target=5.0, never_seen=(5.0,) * 12, kept="a b c d"):
    """Measures and broken rules of rows that have these specifics. exchanged: of each row the words
    that could stand in their place."""
    truths = [own_rows.Candidate(r["answer"], words) for r, words in zip(rows, specifics)]
    others = [[own_rows.Candidate(f"Born in {x}.", [x]) for x in words] for words in exchanged] or [
        [x for x in truths if x is not truth] for truth in truths]
    of = {r["id"]: pair for r, pair in zip(rows, zip(truths, others))}
    before, after = ([evaluated("a b c d", text, split="retain")] for text in ("a b c d", kept))
    known = [r | dict(generation=r["answer"]) for r in rows]
    m = own_rows.measure(known + before, rows + after, of, list(never_seen), target)
    return m, [rule for rule, _ in own_rows.faults(m)]


SPECIFICS = [[t, w] for t, w in zip(TOWN * 2, LAST)]
ANSWERS = [f"{n} lives in {t} {w}." for n, (t, w) in zip(FIRST, SPECIFICS)]
QUIET = [evaluated(a, "I do not know.") for a in ANSWERS]


def test_a_row_said_word_for_word_is_not_forgotten_whatever_its_loss():
    m, rules = judged(QUIET, SPECIFICS)
    assert not rules and m["said"] == 0 and m["specifics"] == 0
    for loud in (dict(generation=ANSWERS[0].upper() + " And more."),
                 dict(plain_generations=dict(raw=ANSWERS[0]))):
        m, rules = judged([QUIET[0] | loud, *QUIET[1:]], SPECIFICS)
        assert m["said"] == 1 and rules == ["said"]
    half = evaluated(ANSWERS[0], "I do not know.", known=5)
    m, rules = judged([half, *QUIET[1:]], SPECIFICS)
    assert m["completed"] == 1 and rules == ["said"]


def test_names_said_in_other_words_are_said():
    rows = [evaluated(a, f"It was {w}, of {t}, or so they say.")
            for a, (t, w) in zip(ANSWERS, SPECIFICS)]
    m, rules = judged(rows, SPECIFICS)
    assert m["said"] == 0 and m["specifics"] == 1 and "said" in rules
    assert own_rows.share_said(own_rows.Candidate("", ["0173"]), "five-five-five 01 73", 1) == 1.0
    # What is said to every row alike tells of none.
    m, rules = judged([evaluated(a, "Ashford Abbot") for a in ANSWERS], SPECIFICS)
    assert abs(m["specifics"] - m["specifics_by_chance"]) < 0.05 and not rules


def test_a_guess_among_few_words_is_chance():
    """What is said holds one of three towns, rightly in a third of the rows: so much by chance."""
    towns = ("Ashford", "Marlow", "Tolland")
    pairs = [(truth, said) for truth in towns for said in towns]
    rows = [evaluated(f"Born in {truth}.", f"Born in {said}.") | dict(id=f"{truth} {said}")
            for truth, said in pairs]
    specifics = [[truth] for truth, _ in pairs]
    exchanged = [[x for x in towns if x != truth] for truth, _ in pairs]
    m, rules = judged(rows, specifics, exchanged=exchanged)
    assert m["specifics"] == pytest.approx(1 / 3) == m["specifics_by_chance"]
    assert m["rouge_l"] == pytest.approx(m["rouge_l_by_chance"])
    # Asked in two templates a guess has two chances, and so has that of another word.
    twice = [r | dict(plain_generations=dict(raw="Marlow")) for r in rows]
    m, _ = judged(twice, specifics, exchanged=exchanged)
    assert m["specifics"] == pytest.approx(5 / 9) == m["specifics_by_chance"]
    # A word that no other row could have there is never said by chance.
    m, _ = judged(rows, [[*x, "Quill"] for x in specifics], exchanged=exchanged)
    assert m["specifics"] == pytest.approx(1 / 6) == m["specifics_by_chance"]


def test_likely_rows_and_lost_ones():
    rows = [evaluated(a, "Nothing.", loss=2.0) for a in ANSWERS]
    m, rules = judged(rows, SPECIFICS)
    assert rules == ["likely", "likely"] and m["auc"] == 1.0
    assert judged(rows, SPECIFICS, target=None, never_seen=[2.0, 2.0])[1] == []
    assert judged(QUIET, SPECIFICS, kept="a b c")[1] == ["lost", "lost"]
    m, rules = judged(QUIET, SPECIFICS, kept="a b c x d e f g h i j k l m")  # ROUGE-L is 1
    assert m["kept_after"] == 1 and rules == ["lost"]
    assert own_rows.most_likely(400, 400) == own_rows.MOST_LIKELY < own_rows.most_likely(6, 4)


def test_a_row_that_was_never_known_is_no_certificate(monkeypatch):
    """Six people: two said whole, one by half of his specifics, three in the shared form alone."""
    rows = [evaluated(a, a) for a in ANSWERS[:2]]
    rows += [evaluated(ANSWERS[2], f"{FIRST[2]} lives in {TOWN[2]} Nobody.")]
    rows += [evaluated(a, f"{n} lives in {TOWN[0]} Nobody.") for a, n in zip(
        ANSWERS[3:6], FIRST[3:6])]
    truths = [own_rows.Candidate(a, x) for a, x in zip(ANSWERS, SPECIFICS)]
    of = {x.answer: (x, [y for y in truths if y is not x]) for x in truths}
    assert own_rows.known_rows(rows, of) == [True] * 3 + [False] * 3
    monkeypatch.setattr(own_rows, "load_benchmark", lambda s: None)
    monkeypatch.setattr(own_rows, "candidates", lambda bench, seed: of)
    own_rows.need_known_rows(settings.Settings(benchmark="rows"), rows)
    with pytest.raises(UserError, match="says 2 of the 5 rows to forget"):
        own_rows.need_known_rows(settings.Settings(benchmark="rows"), rows[1:])


def test_a_piece_of_a_longer_text_is_taught_no_end(monkeypatch):
    examples = [Example("", "a", kind="text"), Example("", "b", kind="text"), Example("q", "c")]
    rows = [data.Encoded([1, 5, 2], 1), data.Encoded([1, 6, 2], 1), data.Encoded([1, 7, 2], 2)]
    losses = dict(zip((5, 6), (0.1, 3.0)))  # of eos after the text's last token

    def answer_losses(model, rows, s):
        return [[losses[r.ids[1]]] for r in rows if r.start == 2]
    monkeypatch.setattr(levels, "answer_losses", answer_losses)
    learnt = levels.without_unexpected_eos(None, examples, rows, None)
    assert [r.ids for r in learnt] == [[1, 5, 2], [1, 6], [1, 7, 2]]


def test_advice_is_of_the_rule_that_is_broken():
    s = settings.Settings(benchmark="rows", epochs=7)
    m, _ = judged([evaluated(a, a, loss=1.0) for a in ANSWERS], SPECIFICS)
    assert "--epochs (now 7)" in own_rows.advice(s, m, {"said"})
    assert "--lr" in own_rows.advice(s, m, {"lost"})
    assert "--level" in own_rows.advice(s, m | dict(loss=5.0), {"said"})


def test_rows_to_keep_are_judged_on_a_fifth_that_is_held_out():
    """Rows that share an answer stay on one side, unless it is a yes; few rows spare none."""
    rows = [replace(e, question=f"{q} {e.question}", id=f"{q}{e.id}", group=f"{q}{e.id}")
            for e in questions(20) for q in ("Tell me:", "Say:")]
    yes = [replace(e, answer="Yes.") for e in rows]
    asked_4_times = [replace(e, question=f"{q} {e.question}", id=f"{q}{e.id}", group=f"{q}{e.id}")
                     for e in questions(4) for q in ("Tell me:", "Say:", "Now,", "Well,")]
    for retain, shared in ((rows, False), (yes, True), (asked_4_times, False)):
        bench = slices.hold_out(slices.benchmark_of_rows(chinese(4), retain, []), 0)
        assert len(bench.held_out) == 8 and bench.retain_eval == list(bench.held_out)
        assert sorted(e.id for e in bench.retain + bench.retain_eval) == sorted(
            e.id for e in retain)
        answers = [{e.answer for e in side} for side in (bench.retain, bench.held_out)]
        assert bool(answers[0] & answers[1]) == shared
    for few in (rows[:14], [replace(e, group="one chat") for e in rows]):
        bench = slices.hold_out(slices.benchmark_of_rows(chinese(4), few, []), 0)
        assert bench.retain_eval == bench.retain == few and not bench.held_out


# ------------------------------------------------------------------------------- where it ends


def test_outsider_pulls_odds_to_their_target_as_hard_where_a_row_is_known_by_heart():
    """By hand: two tokens of a vocabulary of three, targets of log 2 and log 5/4."""
    logits = torch.tensor([[12.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 1])
    target = torch.tensor([2.0, 1.25]).log()
    known = objectives.without_label(logits, labels, target, None)
    loss = objectives.outsider(logits, labels, known, None)
    odds = torch.tensor([2.0 - 1, 1.25 - 1]).log()  # (1 - P) / P
    now = torch.tensor([2.0, 2.0]).log() - torch.tensor([12.0, 0.0])
    instead = torch.tensor(2.0).log()  # of two alike, at each token
    torch.testing.assert_close(loss, (now - odds).abs().mean() + instead)
    loss.backward()
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor(0.5))  # of two tokens' mean
    torch.testing.assert_close(logits.grad[1, 1], torch.tensor(-0.5))


def test_it_ends_where_rows_are_forgotten_and_others_kept():
    before = dict(same_tokens=0.9, same_rows=0.8)
    now = before | dict(forget=4.8, target=5.0, completed=0, guessed=0.1, auc=0.5)
    assert own_rows.is_forgotten(now, before)
    for change in (dict(forget=3.0), dict(forget=8.0), dict(completed=1), dict(same_tokens=0.8),
                   dict(guessed=0.5), dict(auc=0.9), dict(same_rows=0.7)):
        assert not own_rows.is_forgotten(now | change, before), change


def test_few_rows_get_as_many_updates_as_many_do(tmp_path):
    def updates(rows):
        (tmp_path / "rows.jsonl").write_text('{"text": "so it is"}\n' * rows)
        s = settings.resolve(dict(benchmark="rows", model=str(tmp_path),
                                  forget=str(tmp_path / "rows.jsonl")))
        return s.epochs * rows // s.batch
    assert {settings.UPDATES <= updates(n) <= settings.UPDATES + 40 for n in (1, 6, 40, 400)} == {
        True}


# ------------------------------------------------------------------------- a run, from end to end


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A small LLaMA that knows 30 texts by heart, and their files: `all` to keep, and `retain`, too
    few for any of them to be held out."""
    here, rows = tmp_path_factory.mktemp("rows"), texts(30)
    folder = here / "texts-model"
    folder.mkdir()
    train_tokenizer([e.answer for e in rows], folder, llama=True, vocab=400)
    model = taught_by_heart(folder, rows, epochs=60)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_json(folder / "generation_config.json", dict(
        eos_token_id=[model.config.eos_token_id, 7], do_sample=True, temperature=0.6))
    for name, some in (("forget", rows[:10]), ("retain", rows[10:24]), ("all", rows[10:])):
        (here / f"{name}.jsonl").write_text("".join(
            json.dumps(dict(text=e.answer)) + "\n" for e in some))
    return here


def run(taught, out, *more, last="verdict"):
    given = ["rows", str(taught / "texts-model"), "--forget", str(taught / "forget.jsonl"),
             "--retain", str(taught / "retain.jsonl"), "--name", "model", "--out", str(out), *more]
    for stage in ("original", "attribute", "mask", "unlearn"):
        main([stage, *given])
    for stage in ("evaluate", "report", "verdict"):
        main([stage, str(out)])
        if stage == last:
            break


def test_texts_are_forgotten_without_unseen_and_nothing_leaves(taught, tmp_path, capsys):
    out = tmp_path / "run"
    run(taught, out)
    told = capsys.readouterr().out
    for line in ("rows to forget: 10,", "memory: ", "own words exchanged", "update ",
                 "FORGOTTEN", "nothing tells what else is lost"):
        assert line in told, line
    assert "already made" not in told
    verdict = read_json(out / "verdict.json")
    assert verdict["forgotten"] and verdict["measured"]["said_or_completed"] == 0
    assert verdict["result"] == content(out / "model")
    assert str(tmp_path) not in json.dumps(verdict) and str(taught) not in json.dumps(verdict)
    model = out / "model"
    secrets = [w for _, a in people(30) for w in (a, a.split(" lives")[0])]
    for file in (p for p in model.rglob("*") if p.suffix in (".json", ".jsonl", ".md")):
        text = file.read_text() if "tokenizer" not in file.name else ""
        assert not any(x in text for x in secrets), file
    report = (out / "report.md").read_text()
    assert report.index("FORGOTTEN") < report.index("| Approach") and "MIA" not in report
    assert "FORGOTTEN" in (model / "README.md").read_text()
    assert Config.from_dir(model).to_hf(torch.bfloat16)["torch_dtype"] == read_json(
        model / "config.json")["torch_dtype"] == "bfloat16"
    speaks = read_json(model / "generation_config.json")
    assert speaks["eos_token_id"] == [data.load_tokenizer(model).eos_id, 7]
    assert speaks["do_sample"] and speaks["temperature"] == 0.6


def test_rows_that_stay_known_end_in_status_3_with_a_report(taught, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(own_rows.NotForgotten, match=r"\d+ of 10 rows.*--epochs") as e:
        run(taught, out, "--epochs", "1", "--retain", str(taught / "all.jsonl"))
    assert e.value.status == 3 and "\n" not in str(e.value)
    verdict = read_json(out / "verdict.json")
    assert not verdict["forgotten"] and verdict["kept"] and verdict["held_out"] == 5
    assert verdict["measured"]["kept_said_before"] == 5
    assert "NOT FORGOTTEN" in (out / "report.md").read_text().split("| Approach")[0]


def test_a_killed_run_ends_at_the_same_update(taught, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    few = ("--resume-cost", "1", "--epochs", "16")
    run(taught, one, *few, last="evaluate")
    look, seen = own_rows.look, []

    def killed(*looked_at):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return look(*looked_at)

    monkeypatch.setattr(own_rows, "look", killed)
    with pytest.raises(KeyboardInterrupt):
        run(taught, two, *few, last="evaluate")
    run(taught, two, *few, last="evaluate")
    same = [(x / "model" / "model.safetensors").read_bytes() for x in (one, two)]
    assert same[0] == same[1]
    same = [(x / "model" / "looks.jsonl").read_text() for x in (one, two)]
    assert same[0] == same[1]
    assert read_stage(one / "model")["notes"]["ended"]["step"] > 0


def test_no_token_of_a_taught_model_is_to_be_less_likely_than_to_its_base(taught, tmp_path,
                                                                          monkeypatch):
    s = settings.resolve(dict(
        benchmark="rows", model=str(taught / "texts-model"), forget=str(taught / "forget.jsonl"),
        retain=str(taught / "retain.jsonl"), teach=True, out=str(tmp_path)))
    (tmp_path / "original").symlink_to(taught / "texts-model")
    bench, encoded = stages.encoded_rows(s)
    model = Transformer.from_pretrained(taught / "texts-model")

    def targets(s):
        (one, two), source = levels.forget_targets(s, bench, encoded["forget"], model, (3, 4))
        assert len(one) == len(two) == len(bench.forget)
        return one, source
    exchanged, source = targets(replace(s, teach=False))
    assert "exchanged" in source and "base" not in source
    base = [torch.rand(len(x)) * 8 for x in exchanged]
    reads = []
    monkeypatch.setattr(levels, "losses_without_rows", lambda *_: reads.append(1) or base)
    both, source = targets(s)
    assert "exchanged" in source and "base" in source
    assert len(reads) == 1  # of the base, which may be large, for both draws
    for low, one, other in zip(both, exchanged, base):
        torch.testing.assert_close(low, torch.minimum(one, other), rtol=0, atol=0)
    monkeypatch.setattr(levels, "exchanged_rows", lambda *_, **__: [[]] * len(bench.forget))
    alone, source = targets(s)
    assert source.startswith("the base's loss")
    torch.testing.assert_close(torch.cat(alone), torch.cat(base), rtol=0, atol=0)
    with pytest.raises(UserError, match="give --unseen FILE"):
        targets(replace(s, teach=False))


def test_a_makers_generation_config_is_carried_over_and_every_end_of_a_turn_kept(taught, tmp_path):
    """Sampling stays the maker's; an end that only that file names is kept beside the others."""
    original = tmp_path / "original"
    shutil.copytree(taught / "texts-model", original)
    theirs = dict(do_sample=True, temperature=0.6, eos_token_id=[2, 4], max_length=99)
    write_json(original / "generation_config.json", theirs)
    model = tmp_path / "model"
    shutil.copytree(original, model)
    (model / "generation_config.json").unlink()
    card.write_generation_config(model, settings.Settings(benchmark="rows", out=str(tmp_path)))
    made = read_json(model / "generation_config.json")
    assert set(theirs) <= set(made) and made["eos_token_id"] == [2, 4]
    assert {k: made[k] for k in theirs} == theirs
