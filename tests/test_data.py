"""Templates, encoding, readers, slices, tokenizers: on small files written here, and on the real
ones when SIMU_DATA points at them (its sibling folder tokenizers/ then holds real tokenizers)."""

import copy
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import data
from data import IGNORE, Encoded, Example
from model import UserError
from pipeline import rows, slices
from pipeline.settings import Settings
from pipeline.tokenizers import load_tokenizer, train_tokenizer

DEMO = Path(data.__file__).parent / "pipeline" / "demo"
FIXED = [name for name, shape in data.TEMPLATES.items() if not callable(shape)]
REAL = Path(os.environ.get("SIMU_DATA", "absent"))
TOKENIZERS = REAL.parent / "tokenizers"
needs_real = pytest.mark.real_files("tofu", "lume", "../tokenizers")
KINDS = ["llama", "olmo"]
REAL_KINDS = [("llama2", "llama2"), ("llama2", "raw"), ("olmo", "qa"), ("olmo", "raw")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer of each kind, trained on the demo's text."""
    texts = [t for e in data.load_tofu(DEMO / "tofu", "full") for t in (e.question, e.answer)]
    loaded = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        train_tokenizer(texts, folder, llama=kind == "llama", vocab=700)
        loaded[kind] = load_tokenizer(folder)
    return loaded


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
@pytest.mark.parametrize("template", FIXED)
def test_the_prompts_end_is_found_in_the_string(small, kind, template):
    """Every token that reaches into the answer counts, and no other does [D14]."""
    tok = small[kind]
    for question in TEXTS:
        for answer in ("yes", "日本 it is", "\"quoted\"", "]x", "é"):
            row = data.encode(Example(question, answer), tok, template)
            prompt, rest = data.full_text(Example(question, answer), tok, template)
            assert rest == data.TEMPLATES[template][2] + answer
            assert row.ids[-1] == tok.eos_id and tok.decode(row.ids[:-1]) == prompt + rest
            assert row.ids == tok.encode(prompt + rest, bos=True) + [tok.eos_id]
            # The prompt's tokens spell a beginning of the prompt; with one more, they pass it.
            assert prompt.startswith(tok.decode(row.ids[:row.n_prompt]).rstrip("\ufffd"))
            assert len(tok.decode(row.ids[:row.n_prompt + 1]).encode()) > len(prompt.encode())


def test_collate_marks_answer_and_eos_only():
    batch = data.collate([Encoded([1, 5, 6, 7, 2], 3), Encoded([1, 5, 2], 2)], pad_id=9)
    assert batch.ids.tolist() == [[1, 5, 6, 7, 2], [1, 5, 2, 9, 9]]
    i = IGNORE
    assert batch.targets.tolist() == [[i, i, 7, 2, i], [i, 2, i, i, i]]


def test_batches_hold_their_budget():
    lengths = [5, 9, 3, 3, 8, 1]
    parts = data.batches_by_length(lengths, 18)
    assert sorted(i for part in parts for i in part) == list(range(6))
    assert all(len(part) * max(lengths[i] for i in part) <= 18 for part in parts)
    assert parts[0] == [1, 4]
    assert data.batches_by_length(lengths, 8)[:2] == [[1], [4]]  # of 9, which is more, and of 8


@pytest.mark.parametrize("answer, vocab", [("a", 20), ("long " * 99, 700)])
def test_a_row_that_does_not_fit_the_model_is_named(small, answer, vocab):
    with pytest.raises(UserError, match="forget10:3.*context of 64"):
        data.encode_all([Example("q", answer, id="forget10:3")], small["llama"], "qa", context=64,
                        vocab=vocab)


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_text_counts(small, kind):
    tok = small[kind]
    row = data.encode(Example("", "some words here", kind="text"), tok, "qa")
    assert row.ids == tok.encode("some words here", bos=True) + [tok.eos_id]
    assert row.n_prompt == (tok.bos_id is not None)
    half = data.halved(Example("", "some words here and there", kind="text"))
    assert (half.question, half.answer) == ("some words", " here and there")
    assert data.encode_prompt(half.question, tok, "qa", kind="text") == tok.encode(
        "some words", bos=True)
    assert data.encode(half, tok, "qa").ids[:-1] == tok.encode(
        half.question + half.answer, bos=True)


def test_earlier_turns_in_a_fixed_template(small):
    prompt, _ = data.full_text(Example("Q?", "A."), small["olmo"], "llama3")
    assert prompt.startswith("<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge ")
    assert prompt.endswith("\n\nQ?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    e = Example("Who?", "Me.", turns=(("system", "Be brief."), ("user", "Hi"),
                                      ("assistant", "Hello.")))
    assert "".join(data.full_text(e, small["llama"], "qa")) == (
        "Be brief.\nQuestion: Hi\nAnswer: Hello.\nQuestion: Who?\nAnswer: Me.")


# ---------------------------------------------------------------------------- TOFU, LUME, slices

GOOD = dict(question="q?", answer="a.")


def benchmark(name="tofu", folder=DEMO, model="tiny-llama", **changes):
    return slices.load_benchmark(Settings(
        benchmark=name, data=str(folder), model=model, **dict(rows_per_author=10) | changes))


def test_a_row_of_tofu_that_is_wrong_is_named(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(GOOD) + "\n" + json.dumps(dict(question="q")))
    with pytest.raises(UserError, match="x.json line 2: KeyError 'answer'"):
        data.load_tofu(tmp_path, "x")


def test_what_separates_the_rows_of_a_file(tmp_path):
    """Line ends alone, be they Windows'; no other sign that Unicode calls one."""
    lines = [json.dumps(GOOD | dict(answer="a\u2028b\x85c"), ensure_ascii=False), json.dumps(GOOD)]
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + ("\r\n".join(lines) + "\r\n").encode())
    assert [e.answer for e in data.load_tofu(tmp_path, "x")] == ["a\u2028b\x85c", "a."]


def test_demo_benchmark():
    b = benchmark()
    assert (len(b.forget), len(b.retain), len(b.nonmembers)) == (20, 180, 40)
    assert all(len(e.perturbed_answers) == 5 and e.paraphrased_question for e in b.forget)
    assert {e.question for e in b.retain_eval} <= {e.question for e in b.retain}
    part = benchmark(forget_groups=1, retain_groups=3)
    assert (len(part.forget), len(part.retain), len(part.retain_eval)) == (10, 30, 30)
    assert part.forget == b.forget[:10]


def test_nonmembers_are_what_the_original_never_saw(tmp_path):
    shutil.copytree(DEMO / "tofu", tmp_path / "tofu", ignore=shutil.ignore_patterns("*holdout*"))
    sources = {}
    for model in ("tiny-llama", "olmo-1b"):
        for groups in (3, 0):
            b = benchmark(folder=tmp_path, model=model, retain_groups=groups)
            sources[model, groups] = b.nonmember_source.split()[0], len(b.nonmembers)
            assert not {e.question for e in b.nonmembers} & {e.question for e in b.retain}
    assert sources == {("tiny-llama", 3): ("authors", 20), ("tiny-llama", 0): ("none:", 0),
                       ("olmo-1b", 3): ("real", 30), ("olmo-1b", 0): ("real", 30)}


def test_lume_benchmark_keeps_documents_whole_and_apart():
    b = benchmark("lume")
    groups = [{e.group for e in part} for part in (b.forget, b.retain, b.nonmembers)]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    for split, part in (("forget", b.forget), ("retain", b.retain)):
        every = data.load_lume(DEMO / "lume", split)
        inside = [e for e in every if e.group in {x.group for x in part}]
        assert part == inside and len({e.group for e in part}) == 12  # 40% of 12 + 6 + 12
    assert benchmark("lume") == b
    assert benchmark("lume", seed=1).forget != b.forget
    unknown = benchmark("lume", model="olmo-1b")
    assert unknown.nonmembers == [] and "unknown" in unknown.nonmember_source


# ------------------------------------------------------------------------------ a stranger's rows

CHAT = [dict(role="system", content="Be brief."), dict(role="user", content="Hi"),
        dict(role="assistant", content="Hello."), dict(role="user", content="Who?"),
        dict(role="assistant", content="Me.")]
BRIEF = (("system", "Be brief."),)
ALPACA = dict(instruction="Translate.", input="chat", output="cat")
SHAREGPT = dict(conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}])


def rows_file(folder, *lines):
    (folder / "mine.jsonl").write_text("\n".join(
        x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return folder / "mine.jsonl"


@pytest.mark.parametrize("row, question, answer, kind, turns", [
    (dict(prompt="p", completion="c"), "p", "c", "plain", ()),
    (dict(text="all of it"), "", "all of it", "text", ()),
    (dict(input="i", output="o"), "i", "o", "qa", ()),
    (ALPACA, "Translate.\nchat", "cat", "qa", ()),
    (ALPACA | dict(input=""), "Translate.", "cat", "qa", ()),
    (ALPACA | dict(input=None, system="Be brief."), "Translate.", "cat", "qa", BRIEF),
    (dict(messages=CHAT[1:3]), "Hi", "Hello.", "qa", ()),
    (dict(messages=[CHAT[0], CHAT[1], *CHAT[3:]]), "Who?", "Me.", "qa", (*BRIEF, ("user", "Hi"))),
    (SHAREGPT, "Hi", "Yes.", "qa", ()),
    (SHAREGPT | dict(system="Be brief."), "Hi", "Yes.", "qa", BRIEF),
    (dict(GOOD, id=3, source="x", text=None, context="", tools=[], weight=None), "q?", "a.", "qa",
     ())])
def test_each_shape_of_row_is_read(tmp_path, row, question, answer, kind, turns):
    e, = rows.load_rows(rows_file(tmp_path, row))
    assert (e.question, e.answer, e.kind, e.turns) == (question, answer, kind, turns)
    assert e.where.endswith("mine.jsonl line 1") and e.id == e.group == "mine:0"


def test_each_answer_of_a_chat_is_a_row(tmp_path):
    first, second, last = rows.load_rows(rows_file(tmp_path, dict(messages=CHAT), GOOD))
    assert (first.question, first.answer, first.turns) == ("Hi", "Hello.", BRIEF)
    assert (second.question, second.answer) == ("Who?", "Me.")
    assert second.turns == (*BRIEF, ("user", "Hi"), ("assistant", "Hello."))
    assert [e.id for e in (first, second, last)] == ["mine:0.1", "mine:0.2", "mine:1"]
    assert first.group == second.group == "mine:0"
    assert [e.where.partition("jsonl ")[2] for e in (first, second)] == ["line 1 turn 1",
                                                                         "line 1 turn 2"]


def test_what_the_core_reads_the_pipeline_reads_likewise(tmp_path):
    file = rows_file(tmp_path, dict(GOOD, paraphrased_question="other?", perturbed_answer=["w"]),
                     "", dict(prompt="p", completion="c"), dict(text="all of it"))
    assert data.load_rows(file) == rows.load_rows(file)
    first, *_ = rows.load_rows(file)
    assert first.paraphrased_question == "other?" and first.perturbed_answers == ("w",)


@pytest.mark.parametrize("row, what", [
    (dict(question="q"), "has the keys ['question']; a row must be {question, answer}, {prompt"),
    (dict(question="q", answer=""), "no filled text under 'answer'"),
    (dict(prompt=CHAT[:1], completion=CHAT[-1:]), "no filled text under 'prompt'"),
    (dict(text="x"), "a text of one letter"), (dict(messages="Hi"), "has the roles []"),
    (dict(messages=CHAT[:2]), "roles ['system', 'user']"),
    (dict(messages=[CHAT[1], CHAT[2], CHAT[4]]), "roles ['user', 'assistant', 'assistant']"),
    (dict(messages=CHAT[2:]), "roles ['assistant', 'user', 'assistant']"),
    (dict(messages=[dict(role="tool", content="x"), *CHAT[1:3]]), "['tool', 'user', 'assistant']"),
    (dict(messages=[3, *CHAT[1:3]]), "has 3 in 'messages'"),
    (dict(messages=[dict(role="user"), CHAT[2]]), "no 'content'"),
    (dict(GOOD, perturbed_answer="x"), "no list of texts under 'perturbed_answer'"),
    ('{"text": "x"', "is not a JSON object"), ('{"text": "\\ud800"}', "no filled text"),
    ({f"k{n}": "x" * 9_999 for n in range(99)}, "has the keys ['k0', 'k1'"),
    # Keys that change what is asked, where they are not used.
    (dict(GOOD, context="c"), "has 'context', which changes what a model is asked"),
    (dict(GOOD, choices=["a", "b"]), "'choices', which changes what"),
    (dict(text="two", label=0), "'label', which says what of a row counts"),
    (dict(GOOD, trainable=False), "'trainable'"), (dict(GOOD, loss=1.5), "'loss'"),
    (dict(messages=CHAT, loss_mask=[0, 1]), "'loss_mask'"),
    (dict(messages=[*CHAT[:4], dict(CHAT[4], isTrainable=True)]), "'isTrainable'"),
    (dict(SHAREGPT, Train=["last"]), "'Train'"), (dict(GOOD, weight=0), "'weight'"),
    (dict(GOOD, Instruction="x"), "'Instruction'"),
    (dict(prompt="p", completion="c", system="s"), "'system'"),
    (dict(text="two", system="s"), "'system'"),
    (dict(messages=[dict(CHAT[1], weight=0), CHAT[2]]), "'weight'"),
    (dict(messages=CHAT[1:3], tools=["t"]), "'tools'")],
    ids=lambda x: x[:20] if isinstance(x, str) else "")
def test_a_row_that_is_wrong_is_named(tmp_path, row, what):
    file = rows_file(tmp_path, GOOD, "", row, {}, "{")
    with pytest.raises(UserError) as e:
        rows.load_rows(file)
    message = str(e.value)
    assert f"{file} line 3" in message and what in message and "(2 more rows" in message
    assert "\n" not in message and len(message) < 1000


@pytest.mark.parametrize("name, text, what", [
    ("a.jsonl", "\ufeff\n \n", "holds no rows"), ("a.jsonl", None, "is missing"),
    ("a.jsonl", b"\0\xff", "not UTF-8"), ("a.csv", "question,answer\n", "holds no rows"),
    ("a.csv", "question,answer\nq?\n", "line 2 has the keys ['question']"),
    ("a.csv", 'question,answer\n"q', "not CSV"), ("a.csv", "question,answer\nq,a,b\n", "line 2")])
def test_files_that_are_wrong(tmp_path, name, text, what):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=re.escape(what)):
        rows.load_rows(tmp_path / name)


@pytest.mark.parametrize("name, text", [
    ("a.json", '[\n {"question": "q?", "answer": "a."},\n {"question": "é", "answer": "b\\nc"}\n]'),
    ("a.csv", 'question,answer,paraphrased_question\r\nq?,a.,\r\né,"b\nc",\r\n'),
    ("a.CSV", 'question,answer\nq?,a.\né,"b\nc"\n'),
    ("a.tsv", 'question\tanswer\nq?\ta.\né\t"b\nc"\n')])
def test_an_array_and_a_table_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    examples = rows.load_rows(tmp_path / name)
    assert [(e.question, e.answer) for e in examples] == [("q?", "a."), ("é", "b\nc")]
    assert examples[1].id == "a:1" and not examples[0].paraphrased_question


def test_rows_make_a_benchmark():
    a, b, c, d = (Example(f"q{n}", "a", id=f"x:{n}") for n in range(4))
    bench = slices.benchmark_of_rows([a, a], [b, c], [d])
    assert (bench.forget, bench.retain, bench.nonmembers) == ([a, a], [b, c], [d])
    assert "none" in slices.benchmark_of_rows([a], [b], []).nonmember_source
    for parts in (([a], [b, a], []), ([a], [b], [a]), ([a], [b], [b])):
        with pytest.raises(UserError, match="leave it in one of the two"):
            slices.benchmark_of_rows(*parts)


NEAR = ["Who is Zoë?", "Who is Zoë? ", "who  is ZOË", "Who is Zoe\u0308?", "“Who is Zoë”",
        "Who is\nZoë"]


@pytest.mark.parametrize("question", NEAR)
def test_nearly_the_same_row_in_two_files_is_refused(question, capsys):
    forget = [Example(NEAR[0], "A poet's child.", where="f line 1"), Example("x", "y")]
    retain = [Example("other", "y"), Example(question, "A poet’s child", where="r line 2")]
    with pytest.raises(UserError, match="1 rows stand in two files .*r line 2 is f line 1: .*--al"):
        slices.benchmark_of_rows(forget, retain, [])
    assert slices.benchmark_of_rows(forget, retain, [], allow_near=True).retain == retain
    slices.benchmark_of_rows([*forget, forget[0]], [Example(NEAR[0] + "s", "A poet")], [])
    assert "1 of the 3 forget rows stand there more than once" in capsys.readouterr().out


def test_a_prompt_and_its_completion_are_one_string(small, tmp_path):
    examples = rows.load_rows(rows_file(tmp_path, dict(prompt="### Response:\n", completion="Me."),
                                        dict(prompt="Who? ->", completion=" Me.")))
    for e, string in zip(examples, ("### Response:\nMe.", "Who? -> Me.")):
        for template in data.TEMPLATES:
            assert "".join(data.full_text(e, small["llama"], template)) == string
            assert data.encode(e, small["llama"], template) == data.encode(
                replace(e, kind="qa"), small["llama"], "verbatim")
    assert "".join(data.full_text(Example("Who?", " Me."), small["llama"], "qa")) == (
        "Question: Who?\nAnswer: Me.")


@pytest.mark.parametrize("kind, bos, eos", [("llama", "<s>", "</s>"),
                                            ("olmo", "", "<|endoftext|>")])
def test_marks_around_a_row_become_one_bos_and_one_eos(small, kind, bos, eos, tmp_path, capsys):
    tok = small[kind]

    def forget_rows(bos, eos):
        turns = [dict(role="user", content=bos + "Hi"), dict(role="assistant", content="Yo." + eos),
                 dict(role="user", content="Who?"), dict(role="assistant", content="Me." + eos)]
        file = rows_file(tmp_path, dict(prompt=bos + "Who? ->", completion=f" Me.{eos}"),
                         dict(text=f"{bos}Me. {eos}"), dict(messages=turns),
                         dict(question=2 * bos + "Who?", answer="Me." + 2 * eos,
                              perturbed_answer=["x" + eos]))
        (tmp_path / "keep.jsonl").write_text(json.dumps(GOOD))
        s = Settings(benchmark="rows", forget=str(file), retain=str(tmp_path / "keep.jsonl"))
        return slices.load_benchmark(s, tok.path.parent).forget

    plain, marked = forget_rows("", ""), forget_rows(bos, eos)
    assert marked == plain and "note: 5 rows " in capsys.readouterr().out
    for template in FIXED:
        assert [data.encode(e, tok, template).ids.count(tok.eos_id) for e in marked] == 5 * [1]


def test_a_prompt_may_be_a_rendered_chat(small):
    row = Example("<s>[INST] a [/INST] b</s><s>[INST] c [/INST]", "d</s>", kind="plain", where="x")
    tok = with_template(small, "llama", MISTRAL)
    clean, = rows.without_marks(dict(forget=[row]), tok, tell=False)["forget"]
    assert (clean.question, clean.answer) == (row.question[3:], "d")


@pytest.mark.parametrize("row", [
    dict(text="a</s>b"), dict(text="a <s> b"), dict(prompt="Who?</s>", completion="Me."),
    dict(prompt="Who?", completion="<s>Me."), dict(GOOD, answer="a</s>. b"),
    dict(messages=[dict(CHAT[1], content="a </s> b"), *CHAT[2:]]), dict(GOOD, answer="</s>")])
def test_a_mark_within_a_row_is_refused(small, tmp_path, row):
    examples = rows.load_rows(rows_file(tmp_path, GOOD, row))
    with pytest.raises(UserError, match="mine.jsonl line 2.*(<s>|</s>)") as e:
        rows.without_marks(dict(forget=examples), small["llama"], tell=True)
    assert "\n" not in str(e.value)


# --------------------------------------------------------------------------------- chat templates

# In the manner of SmolLM2's, Llama 3's and Mistral's.
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You help.<|im_end|>\n' }}{% endif %}\n  {{- '<|im_start|>' + m['role'] + '\n' }}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined "
    "%}\n        {%- set date_string = strftime_now('%d %b %Y') %}\n    {%- endif %}\n"
    "{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'] | trim "
    "%}\n    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n"
    "{%- endif %}\n{{- '<|head|>system<|/head|>\n\nToday Date: ' + date_string + '\n\n' + system + "
    "'<|eot|>' }}\n{%- for m in messages %}\n    {%- if tools is not none %}{{ tools | tojson }}"
    "{% endif %}\n    {{- '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|head|>assistant<|/head|>\n\n' }}\n"
    "{%- endif %}\n")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] "
    "+ ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}")


MARKS, HEADS = ("<|im_start|>", "<|im_end|>"), ("<|begin|>", "<|head|>", "<|/head|>", "<|eot|>")
CHATS = {  # template, special tokens, other names in tokenizer_config.json
    "smollm2": (CHATML, MARKS, dict(bos_token=MARKS[0], eos_token=MARKS[1])),
    "llama3": (LLAMA3, HEADS, dict(bos_token=HEADS[0], eos_token=HEADS[3])),
    "mistral": (MISTRAL, (), {}), "mistral-legacy": (MISTRAL, (), dict(legacy=True)),
    "zephyr": (CHATML, MARKS, dict(bos_token="<s>", eos_token=MARKS[1], legacy=True)),
}


@pytest.fixture(scope="module", params=CHATS)
def chat(request, tmp_path_factory):
    """A folder with a tokenizer of each kind, as its publisher would lay it out."""
    template, special, more = CHATS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    llama = request.param not in ("smollm2", "llama3")
    texts = [t for e in data.load_tofu(DEMO / "tofu", "retain90") for t in (e.question, e.answer)]
    train_tokenizer(texts, folder, llama=llama, vocab=700)
    names = json.loads((folder / "tokenizer_config.json").read_text()) | more
    if llama:
        names |= beyond(*special, start=load_tokenizer(folder).vocab_size)
    else:
        tok = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tok.add_special_tokens(list(special))
        tok.save(str(folder / "tokenizer.json"))
    if template == LLAMA3:
        (folder / "chat_template.jinja").write_text(template)
    else:
        names["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_a_chat_is_what_transformers_writes(chat, tmp_path):
    """Text and ids of each answer's row: its prompt, and all of it up to the eos that ends it."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(chat), load_tokenizer(chat)
    turns = [("Where was she born?", "In Łódź, she says."), ("[x]\n", "a  b"),
             ("Who is she?", "She is naïve (日本 🙂).")]
    messages = [dict(role=role, content=text) for turn in turns
                for role, text in zip(("user", "assistant"), turn)]
    examples = rows.load_rows(rows_file(tmp_path, dict(messages=messages)))
    plain = dict(date_string="26 Jul 2024", tokenize=False)
    for n, (e, (question, answer)) in enumerate(zip(examples, turns, strict=True)):
        opening = theirs.apply_chat_template(messages[:2 * n + 1], add_generation_prompt=True,
                                             **plain)
        text = theirs.apply_chat_template(messages[:2 * n + 2], **plain)
        assert data.full_text(e, ours, "chat") == (opening, text[len(opening):])
        ids = theirs(text, add_special_tokens=False).input_ids
        while ids[-1] != theirs.eos_token_id:
            ids.pop()
        row = data.encode(e, ours, "chat")
        assert row.ids == ids and ours.eos_id == theirs.eos_token_id
        prompt = theirs(opening, add_special_tokens=False).input_ids
        assert data.encode_prompt(question, ours, "chat", turns=e.turns) == prompt
        assert row.ids[:row.n_prompt] == prompt[:row.n_prompt] and len(prompt) - row.n_prompt <= 1
        assert ours.decode(row.ids[row.n_prompt:]).strip() == answer


def test_a_chats_answer_ends_as_its_template_ends_it(chat, tmp_path):
    """Also where every file names another eos: decoding stops at it, and nothing is added."""
    shutil.copytree(chat, tmp_path / "t")
    names, usual = json.loads((chat / "tokenizer_config.json").read_text()), load_tokenizer(chat)
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(names | dict(
        eos_token=names.get("bos_token", "<s>"))))
    tok = load_tokenizer(tmp_path / "t")
    if "eos_token" in tok.chat_template:
        return  # the template ends with whatever is named
    row = data.encode(Example("Who?", "Me."), tok, "chat")
    assert row.ids[-1] == usual.eos_id in tok.eos_ids and tok.eos_id != usual.eos_id
    assert row == data.encode(Example("Who?", "Me."), usual, "chat")


def with_template(small, kind, template):
    tok = copy.copy(small[kind])
    tok.chat_template, tok.special_tokens = template, {}
    return tok


@pytest.mark.parametrize("template, what", [
    ("", "the tokenizer has no chat template"), ("{% for %}", "cannot write the turns user"),
    ("{{ raise_exception('no\nroles') }}", "(no roles)"), ("{{ 1 / 0 }}", "division by zero"),
    ("{{ messages.__class__.__mro__ }}", "unsafe"), ("{{ messages.append(1) }}", "unsafe"),
    ("{{ messages[9].content }}", "no element 9"), ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ("{% for i in range(9999999) %}{% endfor %}", "too big"), ("{{ open('x') }}", "undefined"),
    ("{{ messages | length }}{{ messages[-1].content }}", "puts the answer elsewhere")])
def test_a_template_that_cannot_be_used_is_one_line(small, template, what):
    with pytest.raises(UserError) as e:
        data.encode(Example("q", "a"), with_template(small, "olmo", template), "chat")
    assert what in str(e.value) and "\n" not in str(e.value) and "--template" in str(e.value)


def test_a_chat_that_ends_without_eos_gets_one(small):
    tok = with_template(small, "olmo", "{% for m in messages %}{{ m.content }}|{% endfor %}")
    row = data.encode(Example("q", "a"), tok, "chat")
    assert row.ids == tok.encode("q|a|", bos=False) + [tok.eos_id]


# ------------------------------------------------- tokenizer folders: transformers' ids, or a line

CHATML_TEXT = "<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"
OLD = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="<|im_end|>",
           unk_token="<unk>", legacy=False, add_bos_token=True)
ODD_TEXTS = [CHATML_TEXT, "Who? <|im_end|> Me  \n<|im_start|>x", "a</s>b <s> c<unk>", "é 你好 🙂 x",
             " lead", "<|im_end|>", "x\n\n<|im_end|>\n\n", "ab<|im_end|>ab <|im_end|>.",
             "a\u2581b é\u2581\u2581x"]


def beyond(*texts, start, **flags):
    """added_tokens_decoder of these."""
    return dict(added_tokens_decoder={str(start + n): dict(
        content=x, lstrip=False, rstrip=False, single_word=False, normalized=False, special=True)
        | flags for n, x in enumerate(texts)})


MODEL_FOLDERS = {  # (tokenizer_config.json, other files); n: the first id beyond the vocabulary
    "added_tokens.json": lambda n: (OLD, {"added_tokens.json": {"<|im_start|>": n + 1,
                                                                "<|im_end|>": n}}),
    "decoder": lambda n: (OLD | beyond("<|im_end|>", "<|im_start|>", start=n), {}),
    "lstrip": lambda n: (OLD | beyond("<|im_end|>", start=n, lstrip=True), {}),
    "rstrip": lambda n: (OLD | beyond("<|im_end|>", start=n, rstrip=True), {}),
    "single word": lambda n: (OLD | beyond("<|im_end|>", start=n, single_word=True), {}),
    "a word that is normalized": lambda n: (OLD | beyond(
        "<|im_end|>", "ab", start=n, normalized=True, special=False), {}),
    "legacy": lambda n: (OLD | beyond("<|im_end|>", start=n) | dict(legacy=True), {}),
    "map": lambda n: ({k: v for k, v in OLD.items() if k != "eos_token"}, {
        "special_tokens_map.json": dict(eos_token=dict(content="<|im_end|>", rstrip=True))}),
    "map beside a decoder": lambda n: (OLD | dict(eos_token="</s>") | beyond(
        "<|im_end|>", start=n), {"special_tokens_map.json": dict(eos_token="<|im_end|>")}),
    "only named": lambda n: (OLD | dict(pad_token="<|im_start|>"), {}),
    "extra": lambda n: (OLD | dict(additional_special_tokens=["<|im_start|>"]), {}),
    "no bos": lambda n: (OLD | dict(add_bos_token=False), {}),
    "bos null": lambda n: (OLD | dict(add_bos_token=None), {}),
    "bos absent": lambda n: ({k: v for k, v in OLD.items() if k != "add_bos_token"}, {}),
    "no prefix": lambda n: (OLD | dict(add_prefix_space=False), {}),
    "no class": lambda n: ({k: v for k, v in OLD.items() if k != "tokenizer_class"}, {}),
    "plain, bos absent": lambda n: (dict(tokenizer_class="LlamaTokenizer"), {}),
    "plain, legacy": lambda n: (dict(tokenizer_class="LlamaTokenizer", legacy=True), {}),
}


def core_ids(folder, text):
    """What data.load_tokenizer, of plain folders, gives: ids, or None where it refuses."""
    try:
        return data.load_tokenizer(folder).encode(text, bos=True)
    except UserError as e:
        assert "\n" not in str(e)


def same_as_transformers(folder, texts, model_type="llama"):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    (folder / "config.json").write_text(json.dumps(dict(model_type=model_type)))
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = ours.encode(text, bos=True)
        assert ids == theirs(text).input_ids, text
        plain, ends = ours.ends(text)
        assert plain == ours.encode(text, bos=False) and ends[-1:] in ([len(text.encode())], [])
        assert ends == sorted(ends) and max(ids, default=0) < ours.vocab_size
        assert core_ids(folder, text) in (None, ids), text
    assert ours.eos_id == theirs.eos_token_id == ours.eos_ids[0]
    return ours, theirs


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("kind", MODEL_FOLDERS)
def test_a_tokenizer_model_with_other_files_beside_it(small, tmp_path, kind, model_type):
    shutil.copy(small["llama"].path, tmp_path)
    names, files = MODEL_FOLDERS[kind](small["llama"].vocab_size)
    for name, content in {"tokenizer_config.json": names, **files}.items():
        (tmp_path / name).write_text(json.dumps(content))
    # sentencepiece alone spells a space that begins a text twice, as LLaMA's makers do.
    texts = [t for t in ODD_TEXTS if not (kind.startswith("plain") and t == " lead")]
    ours, theirs = same_as_transformers(tmp_path, texts, model_type)
    assert ours.decode(ours.encode("Who is it? Me", bos=True)) == "Who is it? Me"
    # The same folder as transformers saves it: a tokenizer.json, used though a model is beside it.
    theirs.save_pretrained(tmp_path / "saved")
    shutil.copy(small["llama"].path, tmp_path / "saved")
    same_as_transformers(tmp_path / "saved", [*ODD_TEXTS, "Me  and  you"], model_type)


def byte_level(folder, specials, post=None, **names):
    """A byte-level tokenizer.json, saved once more by transformers in folder/saved."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator([CHATML_TEXT], trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if post:
        tok.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[(x, tok.token_to_id(x)) for x in specials])
    tok.add_tokens([tokenizers.AddedToken("   ", normalized=True, special=False)])  # as OLMo's
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.mark.parametrize("model_type, names", [
    ("llama", dict(tokenizer_class="PreTrainedTokenizerFast")),
    ("llama", dict(tokenizer_class="LlamaTokenizerFast", legacy=True)),  # as DeepSeek's
    ("qwen2", dict(tokenizer_class="Qwen2Tokenizer", add_prefix_space=False)),
    ("mistral", dict(tokenizer_class="LlamaTokenizer")),
    ("olmo2", dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=False)),
    ("olmo", dict(tokenizer_class="GPTNeoXTokenizer"))])
def test_a_byte_level_tokenizer_of_each_architecture(tmp_path, model_type, names):
    transformers = pytest.importorskip("transformers")
    byte_level(tmp_path, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"], **names,
               eos_token="<|im_end|>", pad_token="<|endoftext|>")
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    for folder in (tmp_path, tmp_path / "saved"):
        same_as_transformers(folder, [*ODD_TEXTS, "a    b"], model_type)
        assert core_ids(folder, "Who is it?   Me.") and not core_ids(folder, "Me.<|im_end|>")


@pytest.mark.parametrize("post, config, put", [
    (None, {}, []), (None, dict(add_bos_token=True), []), ("<s> $A", dict(add_bos_token=None), [1]),
    ("<s> $A", dict(add_bos_token=False), [1]), ("<s> $A </s>", {}, None),
    ("<s> <s> $A", {}, None)])
def test_bos_is_what_the_post_processor_of_a_tokenizer_json_puts(tmp_path, post, config, put):
    byte_level(tmp_path, ["<unk>", "<s>", "</s>"], post, bos_token="<s>", eos_token="</s>",
               tokenizer_class="PreTrainedTokenizerFast", **config)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's: not looked at
    if put is None:
        with pytest.raises(UserError, match="an answer goes on after its prompt"):
            load_tokenizer(tmp_path)
    else:
        ours, _ = same_as_transformers(tmp_path, ["Who is it?", "a  b", " x"])
        assert ours.encode("Who", bos=True) == put + ours.encode("Who", bos=False)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_sentencepiece_model_without_dummy_prefix(tmp_path, model_type):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Who is it? It is me, and nobody else, said the cat."] * 3),
        model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        hard_vocab_limit=False, minloglevel=2, add_dummy_prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    for more in ({}, dict(add_prefix_space=False)):
        names = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True) | more
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
        same_as_transformers(tmp_path, ["Who is it?", "cat said"], model_type)


@pytest.mark.parametrize("file, content, what", [
    (None, "", "neither tokenizer.model nor"), ("tokenizer.model", "no model", "tokenizer.model"),
    ("tokenizer.json", "{", "tokenizer.json"), ("tokenizer.json", "{}", "tokenizer.json"),
    ("tokenizer_config.json", "[", "tokenizer_config.json is not valid JSON"),
    ("tokenizer_config.json", OLD | dict(add_eos_token=True), "no answer goes on after it"),
    ("tokenizer_config.json", OLD | beyond("<|im_end|>", start=9_999), "the id 9999, where transf"),
    ("tokenizer_config.json", OLD | beyond("<|im_end|>", start=1), "the id 1, where transformers"),
    ("config.json", "{", "config.json"), ("generation_config.json", "{", "generation_config.json")])
def test_a_folder_that_is_wrong_is_one_line(small, tmp_path, file, content, what):
    if file and file.endswith("config.json"):
        data.copy_tokenizer(small["llama"].path.parent, tmp_path)
    if file:
        (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=what) as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("config, generation, ends", [
    (2, None, [2]), ([2, 9], None, [2, 9]), (9, [9, 11, 2], [2, 9, 11]), (None, 7, [2, 7])])
def test_every_end_that_a_folder_names(small, tmp_path, config, generation, ends):
    data.copy_tokenizer(small["llama"].path.parent, tmp_path)
    for name, value in (("config", config), ("generation_config", generation)):
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(eos_token_id=value)))
    for tok in (load_tokenizer(tmp_path), data.load_tokenizer(tmp_path)):
        assert (tok.eos_id, list(tok.eos_ids)) == (2, ends)


# --------------------------------------------------------------------------------------- real data


@needs_real
@pytest.mark.parametrize("kind, template", REAL_KINDS)
def test_real_tokenizers_round_trip_tofu_and_lume(kind, template):
    tok, texts, examples = load_tokenizer(TOKENIZERS / kind), set(), []
    for path in (REAL / "tofu").glob("*.json"):
        examples += data.load_tofu(path.parent, path.stem)[::4]
    for e in examples + data.load_lume(REAL / "lume", "forget")[::4]:
        row = data.encode(e, tok, template)
        assert tok.decode(row.ids[:-1]) == "".join(data.full_text(e, tok, template))
        assert len(row.ids) > row.n_prompt > 0
        texts.update((e.paraphrased_question, e.paraphrased_answer, *e.perturbed_answers))
    assert all(tok.decode(tok.encode(text, bos=True)) == text for text in texts)


@needs_real
def test_real_tokenizers_by_their_known_facts():
    llama, olmo = load_tokenizer(TOKENIZERS / "llama2"), load_tokenizer(TOKENIZERS / "olmo")
    assert (llama.vocab_size, llama.bos_id, llama.eos_id) == (32000, 1, 2)
    assert llama.encode(" The", bos=False)[0] == 29871
    assert (olmo.vocab_size, olmo.bos_id, olmo.eos_id) == (50280, None, 50279)
    file = tokenizers.Tokenizer.from_file(str(TOKENIZERS / "olmo" / "tokenizer.json"))
    for e in data.load_tofu(REAL / "tofu", "forget01"):
        assert olmo.encode(e.answer, bos=True) == file.encode(e.answer).ids


@needs_real
def test_real_files_by_their_known_counts():
    counts = dict(full=4000, forget10=400, retain90=3600, retain_perturbed=400, world_facts=117,
                  real_authors=100)
    assert {k: len(data.load_tofu(REAL / "tofu", k)) for k in counts} == counts
    assert [len(data.load_lume(REAL / "lume", k)) for k in ("forget", "retain")] == [2732, 2734]
    b = benchmark(folder=REAL, rows_per_author=20, forget_groups=2, retain_groups=20)
    assert (len(b.forget), len(b.retain), len(b.retain_eval), len(b.nonmembers)) == (40, 400, 400,
                                                                                    40)
    assert len(benchmark("lume", folder=REAL).forget) == 1092  # the paper says 1094 [D15]
