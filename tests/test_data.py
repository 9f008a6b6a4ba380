"""Templates, encoding, readers, tokenizers: on small files of our own, and on the real ones when
SIMU_DATA points at them (its sibling folder tokenizers/ then holds the real tokenizers)."""

import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tokenizers

import data
from data import IGNORE, Encoded, Example
from model import UserError
from pipeline import rows, slices
from pipeline.settings import Settings
from pipeline.tokenizers import load_tokenizer, train_tokenizer

DEMO = Path(data.__file__).parent / "pipeline" / "demo"
FIXED = [name for name in data.TEMPLATES if name != "chat"]
REAL = Path(os.environ.get("SIMU_DATA", "absent"))
TOKENIZERS = REAL.parent / "tokenizers"
needs_real = pytest.mark.real_files("tofu", "lume", "../tokenizers")
KINDS = ["llama", "olmo"]
REAL_KINDS = [("llama2", "llama2"), ("llama2", "raw"), ("olmo", "qa"), ("olmo", "raw")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer of each kind, trained on the demo's text."""
    texts = [t for e in data.load_tofu(DEMO / "tofu", "full") for t in (e.question, e.answer)]
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        train_tokenizer(texts, folder, llama=kind == "llama", vocab=700)
        made[kind] = load_tokenizer(folder)
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
@pytest.mark.parametrize("template", FIXED)
def test_the_prompts_end_is_found_in_the_whole(small, kind, template):
    """Every token that reaches into the answer counts, and no other does."""
    tok = small[kind]
    for question in TEXTS:
        for answer in ("yes", "日本 it is", "\"quoted\"", "]x", "é"):
            row = data.encode(Example(question, answer), tok, template)
            prompt, rest = data.full_text(Example(question, answer), tok, template)
            assert rest == data.TEMPLATES[template][2] + answer
            whole = prompt + rest
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
        train_tokenizer(texts, tmp_path / name, llama=kind == "llama", vocab=400)
        made.append([p.read_bytes() for p in sorted((tmp_path / name).iterdir())])
    assert made[0] == made[1]


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
    with pytest.raises(UserError, match="cannot hold a row of 9"):
        data.batches_by_length(lengths, 8)


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
    ("[1, 2]\n", "row 1 is not a JSON object"),
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


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    rows = [GOOD, dict(GOOD, question="another?")]
    text = "\r\n".join(map(json.dumps, rows)) + "\r\n"
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [e.question for e in data.load_tofu(tmp_path, "x")] == ["q?", "another?"]


def benchmark(name="tofu", folder=DEMO, made_here=True, **changes):
    return slices.load_benchmark(folder / name, slices.Slice(**dict(rows_per_author=10) | changes),
                               layout=name, made_here=made_here)


def test_demo_benchmark():
    b = benchmark()
    assert (len(b.forget), len(b.retain), len(b.nonmembers)) == (20, 180, 40)
    assert all(len(e.perturbed_answers) == 5 and e.paraphrased_question for e in b.forget)
    assert {e.question for e in b.retain_eval} <= {e.question for e in b.retain}
    part = benchmark(forget_groups=1, retain_groups=3)
    assert (len(part.forget), len(part.retain), len(part.retain_eval)) == (10, 30, 30)
    assert part.forget == b.forget[:10]


def test_nonmembers_are_what_the_original_never_saw(tmp_path):
    (tmp_path / "tofu").mkdir()
    for file in (DEMO / "tofu").iterdir():
        if "holdout" not in file.name:
            (tmp_path / "tofu" / file.name).write_bytes(file.read_bytes())
    sources = {}
    for made_here in (True, False):
        for groups in (3, 0):
            b = benchmark(folder=tmp_path, made_here=made_here, retain_groups=groups)
            sources[made_here, groups] = b.nonmember_source.split()[0], len(b.nonmembers)
            assert not {e.question for e in b.nonmembers} & {e.question for e in b.retain}
    assert sources == {(True, 3): ("authors", 20), (True, 0): ("none:", 0),
                       (False, 3): ("real", 30), (False, 0): ("real", 30)}


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
    given = benchmark("lume", made_here=False)
    assert given.nonmembers == [] and "unknown" in given.nonmember_source


def test_overlap_is_counted_and_told(tmp_path, capsys):
    folder = tmp_path / "tofu"
    folder.mkdir()
    for name in ("forget10", "retain90", "retain_perturbed"):
        (folder / f"{name}.json").write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match="every row of forget10 is in retain90"):
        benchmark(folder=tmp_path)
    more = json.dumps(GOOD) + "\n" + json.dumps(dict(GOOD, question="another?"))
    (folder / "forget10.json").write_text(more)
    benchmark(folder=tmp_path)
    assert "1 of 2 rows of the forget set are in the retain set" in capsys.readouterr().out


@pytest.mark.parametrize("given, told", [
    (dict(seed=-1), "--seed is -1; it must be at least 0"), (dict(template="x"), "choose llama2"),
    (dict(lume_fraction=float("nan")), "--lume-fraction is nan"), (dict(seed="1"), "of type int"),
    (dict(seed=True), "of type int"), (dict(forget_split="a\ud800"), "not UTF-8"),
    (dict(rows_per_author=2**31), "below 2"), (dict(lume_fraction=1), None)])
def test_settings_check_the_fields_of_a_slice(given, told):
    if told is None:
        assert Settings(**given).lume_fraction == 1
        return
    with pytest.raises(UserError, match=re.escape(told)):
        Settings(**given)


# -------------------------------------------------------------------------------- rows of one's own

CHAT = [dict(role="system", content="Be brief."), dict(role="user", content="Hi"),
        dict(role="assistant", content="Hello."), dict(role="user", content="Who?"),
        dict(role="assistant", content="Me.")]


def rows_file(folder, *rows):
    (folder / "mine.jsonl").write_text("\n".join(
        x if isinstance(x, str) else json.dumps(x) for x in rows), encoding="utf-8")
    return folder / "mine.jsonl"


def test_each_shape_of_row_is_read(tmp_path):
    file = rows_file(tmp_path, dict(GOOD, paraphrased_question="other?", perturbed_answer=["w"]),
                     dict(prompt="p", completion="c"), dict(input="i", output="o"),
                     dict(text="all of it"), dict(messages=CHAT), dict(messages=CHAT[1:3]))
    rows = rows.load_rows(file)
    assert [(e.question, e.answer, e.kind) for e in rows] == [
        ("q?", "a.", "qa"), ("p", "c", "verbatim"), ("i", "o", "qa"), ("", "all of it", "text"),
        ("Who?", "Me.", "qa"), ("Hi", "Hello.", "qa")]
    assert rows[0].paraphrased_question == "other?" and rows[0].perturbed_answers == ("w",)
    assert rows[4].turns == (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."))
    assert [e.id for e in rows] == [f"mine:{n}" for n in range(6)] and not rows[5].turns
    assert len({e.group for e in rows}) == 6


@pytest.mark.parametrize("row, told", [
    (dict(question="q"), "has the keys ['question']; a row must be {question, answer}, {prompt"),
    (dict(question="q", answer=""), "'answer' is not a filled text"), ({}, "has the keys []"),
    (dict(prompt=CHAT[:1], completion=CHAT[-1:]), "'prompt' is not a filled text"),
    (dict(text=["a"]), "'text' is not"), (dict(messages="Hi"), "has the roles []"),
    (dict(messages=CHAT[:2]), "roles ['system', 'user']; a row must be"),
    (dict(messages=CHAT[-1:]), "['assistant']"),
    (dict(messages=[CHAT[1], CHAT[2], CHAT[4]]), "['user', 'assistant', 'assistant']"),
    (dict(messages=[dict(role="tool", content="x"), *CHAT[1:3]]), "['tool', 'user', 'assistant']"),
    (dict(messages=[dict(role=["user"], content="x"), CHAT[2]]), "[['user'], 'assistant']"),
    (dict(messages=[3, *CHAT[1:3]]), "roles"), (dict(messages=[dict(role="user"), CHAT[2]]),
                                                "no 'content'"),
    ('{"text": "x"', "is not a JSON object"), ('{"a": ' + "[" * 100_000, "not a JSON object"),
    ('{"a": ' + "1" * 9_999, "is not a JSON object"), ('{"text": "\\ud800"}', "not a filled text"),
    ({f"k{n}": "x" * 9_999 for n in range(99)}, "has the keys ['k0', 'k1'"),
], ids=lambda x: x[:20] if isinstance(x, str) else "")
def test_a_row_of_another_shape_is_named(tmp_path, row, told):
    file = rows_file(tmp_path, GOOD, "", row)
    with pytest.raises(UserError) as e:
        rows.load_rows(file)
    message = str(e.value)
    assert f"{file} line 3" in message and told in message
    assert "\n" not in message and len(message) < 1000


@pytest.mark.parametrize("make, told", [
    (lambda f: f.write_text("\ufeff\n \n"), "holds no rows"), (lambda f: f.mkdir(), "is a folder"),
    (lambda f: None, "is missing"), (lambda f: os.mkfifo(f), "is not a plain file"),
    (lambda f: f.symlink_to(f), "is missing"), (lambda f: f.write_bytes(b"\0\xff"), "not UTF-8")])
def test_files_without_rows(tmp_path, make, told):
    make(tmp_path / "mine.jsonl")
    with pytest.raises(UserError, match=told):
        rows.load_rows(tmp_path / "mine.jsonl")


def test_ten_megabytes_in_one_row_are_one_line(small, tmp_path):
    row, = rows.load_rows(rows_file(tmp_path, dict(text="ten megabytes " * 750_000)))
    with pytest.raises(UserError, match="mine:0 has 10500000 characters, more than the mod") as e:
        data.encode_all([row], small["olmo"], "qa", context=512, vocab=700)
    assert len(str(e.value)) < 200


def test_rows_of_ones_own_make_a_benchmark():
    a, b, c, d = (Example(f"q{n}", "a", id=f"x:{n}") for n in range(4))
    made = slices.benchmark_of_rows([a], [b, c], [d])
    assert (made.kind, made.forget, made.retain, made.retain_eval, made.nonmembers) == (
        "rows", [a], [b, c], [b, c], [d])
    assert "none" in slices.benchmark_of_rows([a], [b], []).nonmember_source
    assert slices.benchmark_of_rows([a, a], [b], []).forget == [a, a]
    for parts in (([a], [b, a], []), ([a], [b], [a]), ([a], [b], [b])):
        with pytest.raises(UserError, match="leave it in one of the two"):
            slices.benchmark_of_rows(*parts)


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
    whole = tok.encode(half.question + half.answer, bos=True)
    assert data.encode(half, tok, "qa").ids[:-1] == whole


def test_earlier_turns_in_a_fixed_template(small):
    e = Example("Who?", "Me.", turns=(("system", "Be brief."), ("user", "Hi"),
                                      ("assistant", "Hello.")))
    assert "".join(data.full_text(e, small["llama"], "qa")) == (
        "Be brief.\nQuestion: Hi\nAnswer: Hello.\nQuestion: Who?\nAnswer: Me.")


# ---------------------------------------------------------------------- a model's own chat template

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


@dataclass
class Kind:
    """A tokenizer with a chat template: where the template stands, and its special tokens."""

    template: str
    special: tuple[str, ...] = ()
    bos: str = ""
    eos: str = ""
    place: str = "tokenizer_config.json"
    legacy: bool = False


CHATS = {
    "smollm2": Kind(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_start|>", "<|im_end|>"),
    "llama3": Kind(LLAMA3, ("<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"), "<|begin|>",
                   "<|eot|>", place="chat_template.jinja"),
    "mistral": Kind(MISTRAL), "mistral-legacy": Kind(MISTRAL, legacy=True),
    "zephyr": Kind(CHATML, ("<|im_start|>", "<|im_end|>"), "<s>", "<|im_end|>", legacy=True),
}


@pytest.fixture(scope="module", params=CHATS)
def chat(request, tmp_path_factory):
    """A folder with a tokenizer of each kind, as its publisher would lay it out."""
    kind, folder = CHATS[request.param], tmp_path_factory.mktemp(request.param)
    llama = request.param not in ("smollm2", "llama3")
    texts = [t for e in data.load_tofu(DEMO / "tofu", "retain90") for t in (e.question, e.answer)]
    train_tokenizer(texts, folder, llama=llama, vocab=700)
    names = json.loads((folder / "tokenizer_config.json").read_text()) | dict(legacy=kind.legacy)
    names |= {f"{k}_token": v for k, v in dict(bos=kind.bos, eos=kind.eos).items() if v}
    if llama:
        size = load_tokenizer(folder).vocab_size
        names["added_tokens_decoder"] = {
            str(size + n): dict(content=x, special=True, normalized=False, lstrip=False,
                                rstrip=False, single_word=False)
            for n, x in enumerate(kind.special)}
    else:
        import tokenizers
        tok = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tok.add_special_tokens(list(kind.special))
        tok.save(str(folder / "tokenizer.json"))
    if kind.place == "tokenizer_config.json":
        names["chat_template"] = kind.template
    else:
        (folder / kind.place).write_text(kind.template)
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


TURNS = [(), (("user", "Where was she born?"), ("assistant", "In Łódź, she says."))]


@pytest.mark.parametrize("turns", TURNS, ids=["one turn", "three turns"])
def test_a_chat_is_what_transformers_writes(chat, turns):
    """Text and ids: the prompt's, and the whole up to the eos that ends the answer."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(chat), load_tokenizer(chat)
    for question, answer in (("Who is she?", "She is naïve (日本 🙂)."), ("[x]\n", "a  b")):
        e = Example(question, answer, turns=turns)
        messages = [dict(role=role, content=text) for role, text in (
            *turns, ("user", question), ("assistant", answer))]
        today = dict(date_string="26 Jul 2024", tokenize=False)
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, **today)
        whole = theirs.apply_chat_template(messages, **today)
        assert data.full_text(e, ours, "chat") == (asked, whole[len(asked):])
        ids = theirs(whole, add_special_tokens=False).input_ids
        while ids[-1] != theirs.eos_token_id:
            ids.pop()
        row = data.encode(e, ours, "chat")
        assert row.ids == ids and ours.eos_id == theirs.eos_token_id
        prompt = theirs(asked, add_special_tokens=False).input_ids
        assert data.encode_prompt(question, ours, "chat", turns=turns) == prompt
        assert row.ids[:row.n_prompt] == prompt[:row.n_prompt] and len(prompt) - row.n_prompt <= 1
        assert ours.decode(row.ids[row.n_prompt:]).strip() == answer


def test_what_a_model_says_itself_today_it_says_tomorrow(chat, monkeypatch):
    tok = load_tokenizer(chat)
    text = data.prompt_text("q", tok, "chat")
    assert ("26 Jul 2024" in text) == ("Today" in tok.chat_template)


def with_template(small, template):
    tok = small["olmo"]
    tok.chat_template, tok.special_tokens = template, {}
    return tok


@pytest.mark.parametrize("template, told", [
    ("", "the tokenizer has no chat template"), ("{% for %}", "cannot write the turns user"),
    ("{{ raise_exception('no\nroles') }}", "(no roles)"), ("{{ 1 / 0 }}", "division by zero"),
    ("{{ messages.__class__.__mro__ }}", "unsafe"), ("{{ messages.append(1) }}", "unsafe"),
    ("{{ messages[9].content }}", "no element 9"), ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ("{% for i in range(9999999) %}{% endfor %}", "too big"), ("{{ open('x') }}", "undefined")])
def test_a_template_that_cannot_be_used_is_one_line(small, template, told):
    with pytest.raises(UserError) as e:
        data.encode(Example("q", "a"), with_template(small, template), "chat")
    assert told in str(e.value) and "\n" not in str(e.value) and "--template" in str(e.value)


def test_a_chat_that_ends_without_eos_gets_one(small):
    tok = with_template(small, "{% for m in messages %}{{ m.content }}|{% endfor %}")
    row = data.encode(Example("q", "a"), tok, "chat")
    assert row.ids == tok.encode("q|a|", bos=False) + [tok.eos_id]
    tok = with_template(small, "{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(UserError, match="puts the answer elsewhere"):
        data.encode(Example("q", "a"), tok, "chat")


def test_the_llama3_row_is_open_unlearnings(small):
    prompt, answer = data.full_text(Example("Q?", "A."), small["olmo"], "llama3")
    assert answer == "A." and prompt == (
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nQ?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


# -------------------------------------------------------------------------------- broken tokenizers


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_broken_tokenizers(tmp_path, name):
    with pytest.raises(UserError, match="neither tokenizer.model nor"):
        load_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(b"not a tokenizer")
    with pytest.raises(UserError, match=name):
        load_tokenizer(tmp_path)


def split(regex):
    return dict(type="Split", pattern=dict(Regex=regex), behavior="Isolated", invert=False)


def replacing(regex):
    return dict(type="Replace", pattern=dict(Regex=regex), content="")


WORDS = dict(type="WordLevel", unk_token="[UNK]", vocab={"a": 0, "<|endoftext|>": 1})
ROW = Example("x" * 40, "a café, 한국어")


@pytest.mark.parametrize("change, told", [
    (dict(pre_tokenizer=split("(x+x+)+y")), "cannot encode a text"),
    (dict(pre_tokenizer=split("((")), "is not a tokenizer.json"),
    (dict(normalizer=replacing(".*")), "drops "), (dict(normalizer=replacing("é")), "drops 'é'"),
    (dict(normalizer=replacing("(a|aa)+$")), None),
    (dict(pre_tokenizer=dict(type="Whitespace"), decoder=None), "drops '한국어'"),
    (dict(model=WORDS, pre_tokenizer=dict(type="Whitespace")), "cannot encode a text"),
    (dict(normalizer=dict(type="Precompiled", precompiled_charsmap="AAAA")), "is not a tok"),
    (dict(model=dict(dropout=0.1)), "BPE dropout"), (dict(model=dict(dropout=0.0)), None),
    (dict(post_processor=dict(type="TemplateProcessing", pair=[], special_tokens={}, single=[
        dict(SpecialToken=dict(id="[CLS]", type_id=0))])), "is not a tokenizer.json"),
    (dict(normalizer=dict(type="NFC")), None), (dict(normalizer=dict(type="Lowercase")), None),
    (dict(truncation=dict(direction="Right", max_length=2, strategy="LongestFirst", stride=0)),
     None)], ids=lambda x: (list(x) or "")[0] if isinstance(x, dict) else "")
def test_a_tokenizer_json_that_encodes_badly_is_one_line(small, tmp_path, capfd, change, told):
    """Panics of the library included: they write to stderr themselves."""
    whole = json.loads(small["olmo"].path.read_text())
    model = change.pop("model", {})
    whole |= dict(change, model=whole["model"] | model if "type" not in model else model)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')

    def try_it():
        row = data.encode(ROW, load_tokenizer(tmp_path), "qa")
        data.encode(Example("e\u0301", "ᄀ\u1161 e\u0301"), load_tokenizer(tmp_path), "qa")
        assert 0 < row.n_prompt < len(row.ids) - 1
    if told is None:
        return try_it()
    with pytest.raises(UserError) as e:
        try_it()
    assert told in str(e.value) and "tokenizer.json" in str(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepieces_own_sign_for_a_space_is_only_a_sign(small, kind):
    tok = small[kind]
    text = "a\u2581b é\u2581\u2581x"
    ids, ends = tok.ends(text)
    assert ends[-1] == len(text.encode()) and ends == sorted(ends)
    row = data.encode(Example("who\u2581is", "she\u2581is"), tok, "qa")
    plain = data.encode(Example("who is", "she is"), tok, "qa")
    assert kind == "olmo" or row == plain


ODD = dict(chat_template=3, bos_token=[], legacy="x",
           added_tokens_decoder={"x": 1, "9": "", "-1": {}})


@pytest.mark.parametrize("names", ["[]", "3", "pipe", "folder", json.dumps(ODD)])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_tokenizer_configs(small, tmp_path, kind, names):
    data.copy_tokenizer(small[kind].path.parent, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir}.get(names, lambda f: f.write_text(names))(file)
    if names[0] != "{":
        with pytest.raises(UserError, match="tokenizer_config.json does not hold a JSON object"):
            load_tokenizer(tmp_path)
    else:
        tok = load_tokenizer(tmp_path)
        assert tok.chat_template == "" and tok.decode(tok.encode("a b", bos=True)) == "a b"


# --------------------------------------------- tokenizer folders as old and odd exports leave them

CHATML_TEXT = "<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"
OLD = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="<|im_end|>",
           unk_token="<unk>", legacy=False, add_bos_token=True)
ODD_TEXTS = [CHATML_TEXT, "Who? <|im_end|> Me  \n<|im_start|>x", "a</s>b <s> c<unk>", "é 你好 🙂 x",
             " lead", "<|im_end|>", "x\n\n<|im_end|>\n\n", "ab<|im_end|>ab <|im_end|>."]


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


def same_as_transformers(folder, texts):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = ours.encode(text, bos=True)
        assert ids == theirs(text).input_ids, text
        plain, ends = ours.ends(text)
        assert plain == ours.encode(text, bos=False) and ends[-1:] in ([len(text.encode())], [])
        assert ends == sorted(ends) and max(ids, default=0) < ours.vocab_size
    assert ours.eos_id == theirs.eos_token_id == ours.eos_ids[0]
    return ours, theirs


@pytest.mark.parametrize("kind", MODEL_FOLDERS)
def test_a_tokenizer_model_with_other_files_beside_it(small, tmp_path, kind):
    shutil.copy(small["llama"].path, tmp_path)
    names, files = MODEL_FOLDERS[kind](small["llama"].vocab_size)
    for name, content in {"tokenizer_config.json": names, **files}.items():
        (tmp_path / name).write_text(json.dumps(content))
    texts = [t for t in ODD_TEXTS if not (kind.startswith("plain") and t == " lead")]
    ours, _ = same_as_transformers(tmp_path, texts)
    assert ours.decode(ours.encode("Who is it? Me", bos=True)) == "Who is it? Me"
    # The same folder as transformers saves it: a tokenizer.json, used though a model is beside it.
    transformers = pytest.importorskip("transformers")
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    shutil.copy(small["llama"].path, tmp_path / "saved")
    same_as_transformers(tmp_path / "saved", [*ODD_TEXTS, "Me  and  you"])


@pytest.mark.parametrize("names, told", [
    (OLD | dict(add_eos_token=True), "no answer goes on after it"),
    (OLD | beyond("<|im_end|>", start=9_999), "the id 9999, where transformers has"),
    (OLD | beyond("<|im_end|>", start=1), "the id 1, where transformers has")])
def test_a_folder_that_contradicts_itself_is_one_line(small, tmp_path, names, told):
    shutil.copy(small["llama"].path, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match=told) as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("post, config, put", [
    (None, {}, []), (None, dict(add_bos_token=True), []), ("<s> $A", dict(add_bos_token=None), [1]),
    ("<s> $A", dict(add_bos_token=False), [1]), ("<s> $A </s>", {}, None),
    ("<s> <s> $A", {}, None)])
def test_bos_is_what_the_post_processor_of_a_tokenizer_json_puts(tmp_path, post, config, put):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator([CHATML_TEXT], trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if post:
        tok.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[("<s>", 1), ("</s>", 2)])
    tok.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's: not looked at
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>") | config))
    if put is None:
        with pytest.raises(UserError, match="an answer goes on after its prompt"):
            load_tokenizer(tmp_path)
    else:
        ours, _ = same_as_transformers(tmp_path, ["Who is it?", "a  b", " x"])
        assert ours.encode("Who", bos=True) == put + ours.encode("Who", bos=False)


def test_a_sentencepiece_model_without_dummy_prefix(tmp_path):
    import io
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Who is it? It is me, and nobody else, said the cat."] * 3),
        model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        hard_vocab_limit=False, minloglevel=2, add_dummy_prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    names = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match="puts no space before a text"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | dict(
        add_prefix_space=False)))
    same_as_transformers(tmp_path, ["Who is it?", "cat said"])


# ------------------------------------------------------------------------------ where a turn ends


@pytest.mark.parametrize("config, generation, want", [
    (2, None, [2]), ([2, 9], None, [2, 9]), (9, [9, 11, 2], [2, 9, 11]), (None, 7, [2, 7]),
    (True, [-1, "x", 5], [2, 5])])
def test_every_end_that_a_folder_names(small, tmp_path, config, generation, want):
    data.copy_tokenizer(small["llama"].path.parent, tmp_path)
    for name, ends in (("config", config), ("generation_config", generation)):
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(eos_token_id=ends)))
    tok = load_tokenizer(tmp_path)
    assert (tok.eos_id, list(tok.eos_ids)) == (2, want)


def test_a_chats_answer_ends_as_its_template_ends_it(chat, tmp_path):
    """Also where every file names another eos: decoding stops there, and nothing is added."""
    shutil.copytree(chat, tmp_path / "t")
    names = json.loads((chat / "tokenizer_config.json").read_text())
    end = load_tokenizer(chat).eos_id
    other = "<s>" if names.get("bos_token", "<s>") == "<s>" else names["bos_token"]
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(names | dict(
        eos_token=other)))
    tok = load_tokenizer(tmp_path / "t")
    if "eos_token" in tok.chat_template:
        return  # the template ends with whatever is named
    row = data.encode(Example("Who?", "Me."), tok, "chat")
    assert row.ids[-1] == end and end in tok.eos_ids and tok.eos_id != end
    assert row == data.encode(Example("Who?", "Me."), load_tokenizer(chat), "chat")


# ------------------------------------------------------------------------ rows as people have them


def test_a_prompt_and_its_completion_are_one_string(small, tmp_path):
    rows = rows.load_rows(rows_file(tmp_path, dict(prompt="### Response:\n", completion="Me."),
                                    dict(prompt="Who? ->", completion=" Me.")))
    for e, whole in zip(rows, ("### Response:\nMe.", "Who? -> Me.")):
        for template in data.TEMPLATES:
            assert "".join(data.full_text(e, small["llama"], template)) == whole
            assert data.encode(e, small["llama"], template) == data.encode(
                replace(e, kind="qa"), small["llama"], "verbatim")
    assert "".join(data.full_text(Example("Who?", " Me."), small["llama"], "qa")) == (
        "Question: Who?\nAnswer: Me.")


ALPACA = dict(instruction="Translate.", input="chat", output="cat")
SHAREGPT = dict(conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}])


@pytest.mark.parametrize("row, question, answer, turns", [
    (ALPACA, "Translate.\nchat", "cat", ()), (ALPACA | dict(input=""), "Translate.", "cat", ()),
    (ALPACA | dict(input=None, system="Be brief."), "Translate.", "cat",
     (("system", "Be brief."),)), (SHAREGPT, "Hi", "Yes.", ()),
    (SHAREGPT | dict(system="Be brief."), "Hi", "Yes.", (("system", "Be brief."),)),
    (dict(GOOD, id=3, source="x", text=None, context="", tools=[], weight=None), "q?", "a.", ())])
def test_other_shapes_and_keys_that_change_nothing(tmp_path, row, question, answer, turns):
    e, = rows.load_rows(rows_file(tmp_path, row))
    assert (e.question, e.answer, e.turns, e.kind) == (question, answer, turns, "qa")
    assert e.where.endswith("mine.jsonl line 1")


@pytest.mark.parametrize("row, key", [
    (dict(GOOD, context="c"), "context"), (dict(GOOD, tools=[{}]), "tools"),
    (dict(GOOD, weight=0), "weight"), (dict(GOOD, Instruction="x"), "Instruction"),
    (dict(prompt="p", completion="c", system="s"), "system"),
    (dict(text="t", system="s"), "system"),
    (dict(input="i", output="o", context="c"), "context"),
    (dict(messages=[dict(CHAT[1], weight=0), CHAT[2]]), "weight"),
    (dict(messages=CHAT[1:3], tools=["t"]), "tools")])
def test_keys_that_change_what_is_asked_are_refused_by_name(tmp_path, row, key):
    with pytest.raises(UserError, match=f"line 2: '{key}' changes what a model is asked"):
        rows.load_rows(rows_file(tmp_path, GOOD, row))


def test_of_several_wrong_rows_the_first_is_told_and_the_rest_are_counted(tmp_path):
    with pytest.raises(UserError, match=r"line 2 .*\(2 more rows of the file are wrong\)"):
        rows.load_rows(rows_file(tmp_path, GOOD, {}, GOOD, "{", dict(GOOD, weight=3)))


@pytest.mark.parametrize("name, text", [
    ("a.json", '[\n {"question": "q?", "answer": "a."},\n {"question": "é", "answer": "b\\nc"}\n]'),
    ("a.csv", 'question,answer,paraphrased_question\r\nq?,a.,\r\né,"b\nc",\r\n'),
    ("a.tsv", 'question\tanswer\nq?\ta.\né\t"b\nc"\n')])
def test_an_array_and_a_table_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    rows = rows.load_rows(tmp_path / name)
    assert [(e.question, e.answer) for e in rows] == [("q?", "a."), ("é", "b\nc")]
    assert rows[1].id == "a:1" and not rows[0].paraphrased_question


@pytest.mark.parametrize("text, told", [
    ("question,answer\nq?\n", "line 2 has the keys ['question']"),
    ('question,answer\n"q', "not CSV"),
    ("question,answer\nq,a,b\n", "line 2"), ("question,answer\n", "holds no rows")])
def test_tables_that_are_wrong(tmp_path, text, told):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=re.escape(told)):
        rows.load_rows(tmp_path / "a.csv")


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


# --------------------------------------------------------------------------------------- real data


def all_rows(folder):
    splits = sorted(path.stem for path in (folder / "tofu").glob("*.json"))
    tofu = [data.load_tofu(folder / "tofu", split) for split in splits]
    lume = [data.load_lume(folder / "lume", split) for split in ("forget", "retain")]
    return [e for part in tofu + lume for e in part]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["llama2", "qa", "raw"])
def test_tokenizers_round_trip_the_demo(small, kind, template):
    round_trip(small[kind], template, all_rows(DEMO))


@needs_real
@pytest.mark.parametrize("kind, template", REAL_KINDS)
def test_real_tokenizers_round_trip_tofu_and_lume(kind, template):
    round_trip(load_tokenizer(TOKENIZERS / kind), template, all_rows(REAL))


def round_trip(tok, template, rows):
    seen = set()
    for e in rows[::4]:
        row = data.encode(e, tok, template)
        assert tok.decode(row.ids[:-1]) == "".join(data.full_text(e, tok, template))
        assert len(row.ids) > row.n_prompt > 0
        for text in (e.paraphrased_question, e.paraphrased_answer, *e.perturbed_answers):
            if text not in seen:
                seen.add(text)
                assert tok.decode(tok.encode(text, bos=True)) == text


@needs_real
def test_real_tokenizers_by_their_known_facts():
    llama = load_tokenizer(TOKENIZERS / "llama2")
    assert (llama.vocab_size, llama.bos_id, llama.eos_id) == (32000, 1, 2)
    assert llama.encode(" The", bos=False)[0] == 29871
    olmo = load_tokenizer(TOKENIZERS / "olmo")
    assert (olmo.vocab_size, olmo.bos_id, olmo.eos_id) == (50280, None, 50279)
    own = tokenizers.Tokenizer.from_file(str(TOKENIZERS / "olmo" / "tokenizer.json"))
    for e in data.load_tofu(REAL / "tofu", "forget01"):
        assert olmo.encode(e.answer, bos=True) == own.encode(e.answer).ids


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
