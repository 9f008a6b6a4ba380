"""Tokenizers, readers, templates, encoding: on small files of our own, and on the real ones when
SIMU_DATA points at them (its sibling folder tokenizers/ then holds the real tokenizers)."""

import json
import os
from pathlib import Path

import pytest

import data
from data import IGNORE, Encoded, Example
from stage import Settings, UserError

DEMO = Path(data.__file__).parent / "demo"
REAL = Path(os.environ.get("SIMU_DATA", "absent"))
TOKENIZERS = REAL.parent / "tokenizers"
needs_real = pytest.mark.skipif(not (REAL / "tofu").is_dir() or not TOKENIZERS.is_dir(),
                                reason="SIMU_DATA is not set")
KINDS = ["llama", "olmo"]
REAL_KINDS = [("llama2", "llama2"), ("llama2", "raw"), ("olmo", "qa"), ("olmo", "raw")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer of each kind, trained on the demo's text."""
    texts = [t for e in data.load_tofu(DEMO / "tofu", "full") for t in (e.question, e.answer)]
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        data.train_tokenizer(texts, folder, llama=kind == "llama", vocab=700)
        made[kind] = data.load_tokenizer(folder)
    return made


TEXTS = ["plain words", "  two  spaces ", "naïve Łódź 日本 🙂", "line\nbreak\ttab", "é", " x", "\"q\""]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_round_trip(small, kind):
    tok = small[kind]
    for text in TEXTS:
        ids = tok.encode(text, bos=False)
        assert tok.decode(ids) == text
        assert tok.encode(text, bos=True) == [tok.bos_id] * (tok.bos_id is not None) + ids
        assert tok.decode([tok.eos_id] + ids + [tok.eos_id, tok.vocab_size + 3]) == text
    assert (tok.bos_id is None) == (kind == "olmo")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", data.TEMPLATES)
def test_the_prompts_end_is_found_in_the_whole(small, kind, template):
    """Every token that reaches into the answer counts, and no other does."""
    tok = small[kind]
    for question in TEXTS:
        for answer in ("yes", "日本 it is", "\"quoted\"", "]x", "é"):
            row = data.encode(Example(question, answer), tok, template)
            prompt = data._prompt(question, template)
            whole = prompt + data.TEMPLATES[template][2] + answer
            assert row.ids[-1] == tok.eos_id and tok.decode(row.ids[:-1]) == whole
            assert row.ids == tok.encode(whole, bos=True) + [tok.eos_id]
            # The prompt's tokens spell a beginning of the prompt; with one more, they pass it.
            assert prompt.startswith(tok.decode(row.ids[:row.n_prompt]).rstrip("\ufffd"))
            assert len(tok.decode(row.ids[:row.n_prompt + 1]).encode()) > len(prompt.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_training_a_tokenizer_twice_gives_the_same_bytes(small, kind, tmp_path):
    texts = ["some words to count", "other words"] * 50
    made = []
    for name in "ab":
        (tmp_path / name).mkdir()
        data.train_tokenizer(texts, tmp_path / name, llama=kind == "llama", vocab=400)
        made.append([p.read_bytes() for p in sorted((tmp_path / name).iterdir())])
    assert made[0] == made[1]


def test_collate_marks_answer_and_eos_only():
    batch = data.collate([Encoded([1, 5, 6, 7, 2], 3), Encoded([1, 5, 2], 2)], pad_id=9)
    assert batch.ids.tolist() == [[1, 5, 6, 7, 2], [1, 5, 2, 9, 9]]
    i = IGNORE
    assert batch.targets.tolist() == [[i, i, 7, 2, i], [i, 2, i, i, i]]


def test_batches_hold_their_budget():
    rows = [Encoded([0] * n, 1) for n in (5, 9, 3, 3, 8, 1)]
    parts = data.batches_by_length(rows, 18)
    assert sorted(i for part in parts for i in part) == list(range(6))
    assert all(len(part) * max(len(rows[i].ids) for i in part) <= 18 for part in parts)
    assert parts[0] == [1, 4]
    with pytest.raises(UserError, match="cannot hold a row of 9"):
        data.batches_by_length(rows, 8)


def test_a_tokenizer_of_another_model_is_told(small):
    with pytest.raises(UserError, match="not of one model"):
        data.encode_all([Example("q", "a")], small["llama"], "qa", context=64, vocab=20)


def test_a_row_longer_than_the_context_is_named(small):
    with pytest.raises(UserError, match="forget10:3"):
        data.encode_all([Example("q", "long " * 99, id="forget10:3")], small["llama"], "qa",
                        context=64, vocab=700)


# ----------------------------------------------------------------------------------------- readers

GOOD = dict(question="q?", answer="a.")
LUME = dict(id="d1qa0", input="i", output="o", task="Task1")


@pytest.mark.parametrize("content, told", [
    ("", "holds no rows"),
    ("\n \n", "holds no rows"),
    (json.dumps(GOOD) + "\n" + '{"question": "q", "ans', "line 2 is not a JSON object"),
    ("[1, 2]\n", "line 1 is not a JSON object"),
    (json.dumps(dict(question="q")), "line 1 has no 'answer'"),
    (json.dumps(dict(GOOD, answer=3)), "'answer' is not a filled text"),
    (json.dumps(dict(GOOD, answer="  ")), "'answer' is not a filled text"),
    (json.dumps(dict(GOOD, answer="a\0b")), "'answer' is not a filled text"),
    (json.dumps(dict(GOOD, perturbed_answer="x")), "'perturbed_answer' is not a list"),
    (json.dumps(dict(GOOD, paraphrased_question=None)), "'paraphrased_question' is not"),
    (b"\xff\xfe" + json.dumps(GOOD).encode(), "not UTF-8"),
    (None, "is missing"),
])
def test_bad_tofu_files(tmp_path, content, told):
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "forget10.json").write_bytes(raw)
    with pytest.raises(UserError, match=told) as e:
        data.load_tofu(tmp_path, "forget10")
    assert "forget10.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("row, told", [
    (dict(LUME, id="d1xx0"), "does not end in sc or qa"),
    (dict(LUME, task="Task9"), "task 'Task9'"),
    ({k: v for k, v in LUME.items() if k != "output"}, "no 'output'"),
])
def test_bad_lume_rows(tmp_path, row, told):
    (tmp_path / "forget.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=told):
        data.load_lume(tmp_path, "forget")
    (tmp_path / "forget.jsonl").write_text((json.dumps(LUME) + "\n") * 2)
    with pytest.raises(UserError, match="stands twice"):
        data.load_lume(tmp_path, "forget")


def test_unicode_line_separators_inside_a_row_do_not_split_it(tmp_path):
    row = dict(GOOD, answer="a\u2028b\x85c")
    (tmp_path / "x.json").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert data.load_tofu(tmp_path, "x")[0].answer == row["answer"]


def settings(**changes):
    return Settings(**(dict(benchmark="demo", rows_per_author=10) | changes))


def test_demo_benchmark():
    b = data.load_benchmark(settings())
    assert (len(b.forget), len(b.retain), len(b.nonmembers)) == (20, 180, 40)
    assert all(len(e.perturbed_answers) == 5 and e.paraphrased_question for e in b.forget)
    assert {e.question for e in b.retain_eval} <= {e.question for e in b.retain}
    part = data.load_benchmark(settings(forget_groups=1, retain_groups=3))
    assert (len(part.forget), len(part.retain), len(part.retain_eval)) == (10, 30, 30)
    assert part.forget == b.forget[:10]


def test_lume_benchmark_keeps_documents_whole_and_apart():
    s = settings(benchmark="lume", data=str(DEMO))
    b = data.load_benchmark(s)
    groups = [{e.group for e in part} for part in (b.forget, b.retain, b.nonmembers)]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    for split, part in (("forget", b.forget), ("retain", b.retain)):
        every = data.load_lume(DEMO / "lume", split)
        inside = [e for e in every if e.group in {x.group for x in part}]
        assert part == inside and len({e.group for e in part}) == 12  # 40% of 12 + 6 + 12
    assert data.load_benchmark(s) == b
    other = data.load_benchmark(settings(benchmark="lume", data=str(DEMO), seed=1))
    assert other.forget != b.forget
    given = data.load_benchmark(settings(benchmark="lume", data=str(DEMO), weights="somewhere"))
    assert given.nonmembers == [] and "unknown" in given.nonmember_source


def test_overlap_is_counted_and_told(tmp_path, capsys):
    folder = tmp_path / "tofu"
    folder.mkdir()
    for name in ("forget10", "retain90", "retain_perturbed"):
        (folder / f"{name}.json").write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match="every row of forget10 is in retain90"):
        data.load_benchmark(settings(data=str(tmp_path)))
    more = json.dumps(GOOD) + "\n" + json.dumps(dict(GOOD, question="another?"))
    (folder / "forget10.json").write_text(more)
    data.load_benchmark(settings(data=str(tmp_path)))
    assert "1 of 2 rows of the forget set are in the retain set" in capsys.readouterr().out


def test_no_data_says_where_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv("SIMU_DATA", raising=False)
    with pytest.raises(UserError, match="huggingface.co/datasets/locuslab/TOFU"):
        data.data_folder(settings(benchmark="tofu"))
    with pytest.raises(UserError, match="must hold tofu/"):
        data.data_folder(settings(benchmark="tofu", data=str(tmp_path)))


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_broken_tokenizers(tmp_path, name):
    with pytest.raises(UserError, match="neither tokenizer.model nor"):
        data.load_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(b"not a tokenizer")
    with pytest.raises(UserError, match=name):
        data.load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------- real data


def real_rows():
    tofu = [data.load_tofu(REAL / "tofu", p.stem) for p in sorted((REAL / "tofu").glob("*.json"))]
    lume = [data.load_lume(REAL / "lume", split) for split in ("forget", "retain")]
    return [e for part in tofu + lume for e in part]


@needs_real
@pytest.mark.parametrize("kind, template", REAL_KINDS)
def test_real_tokenizers_round_trip_all_of_tofu_and_lume(kind, template):
    tok = data.load_tokenizer(TOKENIZERS / kind)
    seen = set()
    for e in real_rows():
        row = data.encode(e, tok, template)
        prompt = data._prompt(e.question, template)
        assert tok.decode(row.ids[:-1]) == prompt + data.TEMPLATES[template][2] + e.answer
        assert len(row.ids) > row.n_prompt > 0
        for text in (e.paraphrased_question, e.paraphrased_answer, *e.perturbed_answers):
            if text not in seen:
                seen.add(text)
                assert tok.decode(tok.encode(text, bos=True)) == text


@needs_real
def test_real_tokenizers_by_their_known_facts():
    llama = data.load_tokenizer(TOKENIZERS / "llama2")
    assert (llama.vocab_size, llama.bos_id, llama.eos_id) == (32000, 1, 2)
    assert llama.encode(" The", bos=False)[0] == 29871
    olmo = data.load_tokenizer(TOKENIZERS / "olmo")
    assert (olmo.vocab_size, olmo.bos_id, olmo.eos_id) == (50280, None, 50279)
    library = pytest.importorskip("tokenizers")
    own = library.Tokenizer.from_file(str(TOKENIZERS / "olmo" / "tokenizer.json"))
    for e in data.load_tofu(REAL / "tofu", "forget01"):
        assert olmo.encode(e.answer, bos=True) == own.encode(e.answer).ids


@needs_real
def test_real_files_by_their_known_counts():
    counts = dict(full=4000, forget10=400, retain90=3600, retain_perturbed=400, world_facts=117,
                  real_authors=100)
    assert {k: len(data.load_tofu(REAL / "tofu", k)) for k in counts} == counts
    assert [len(data.load_lume(REAL / "lume", k)) for k in ("forget", "retain")] == [2732, 2734]
    b = data.load_benchmark(settings(benchmark="tofu", data=str(REAL), rows_per_author=20,
                                     forget_groups=2, retain_groups=20))
    assert (len(b.forget), len(b.retain), len(b.retain_eval), len(b.nonmembers)) == (40, 400, 400,
                                                                                    40)
    lume = data.load_benchmark(settings(benchmark="lume", data=str(REAL)))
    assert len(lume.forget) == 1092  # the paper says 1094 [D15]
