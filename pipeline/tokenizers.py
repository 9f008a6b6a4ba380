"""A tokenizer of any folder, with transformers' ids; chat templates in jinja's sandbox; tiny
tokenizers. Importing this adds the templates "llama3" and "chat" to data.TEMPLATES."""

import contextlib
import functools
import importlib
import io
import json
import re
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import sentencepiece

import data
from data import TEMPLATES, json_object, token_text
from model import UserError, atomic_file, write_text

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA_NAMES = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of an added token
SPACE = "\u2581"  # how a piece of a sentencepiece model spells a space
LLAMA_IN_TRANSFORMERS = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True,
                             add_eos_token=False, legacy=False, **LLAMA_NAMES)
# How transformers must read a tokenizer.json to get the same ids.
PLAIN_IN_TRANSFORMERS = dict(tokenizer_class="PreTrainedTokenizerFast",
                             model_input_names=["input_ids", "attention_mask"],
                             clean_up_tokenization_spaces=False)


def optional_package(name: str, needed_by, least: tuple = ()):
    """The module `name`, which only `needed_by` needs; UserError if it is missing or older than
    `least`."""
    try:
        module = importlib.import_module(name)
        if least and [int(n) for n in re.findall(r"\d+", version(name))[:3]] < list(least):
            raise ImportError
    except ImportError:
        wanted = f"'{name}>={'.'.join(map(str, least))}'" if least else name.split(".")[0]
        raise UserError(f"{needed_by} needs a package: pip install "
                        f"{wanted.replace('_', '-')}") from None
    return module


def one_line(error: BaseException) -> str:
    """A library's message on one line, cut short, to be quoted in ours."""
    return " ".join(str(error).split())[:200]


# --------------------------------------------------------------------------- what a folder says


@dataclass
class Source:
    """What the files of a tokenizer say, as transformers reads them."""

    file: Path             # tokenizer.json, else tokenizer.model
    text: str              # of the tokenizer.json
    sp: sentencepiece.SentencePieceProcessor | None  # the tokenizer.model
    config: dict           # tokenizer_config.json
    names: dict[str, str]  # bos_token, eos_token, ...: its text, or ""
    added: dict[str, tuple[int | None, dict]]  # a token to be added: its declared id, its flags
    is_llama: bool         # transformers' LlamaTokenizer, whose rules replace the file's


def read_source(folder: Path) -> Source:
    """What the files of a folder say of its tokenizer."""
    file = folder / "tokenizer.json"
    text, sp = "", None
    if file.is_file():
        text = file.read_text("utf-8")
    else:
        file = folder / "tokenizer.model"
        sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
    config = json_object(folder / "tokenizer_config.json")
    named = config
    decoder = config.get("added_tokens_decoder")
    if decoder is None:  # older folders have files beside it instead
        named = config | json_object(folder / "special_tokens_map.json")
        decoder = {i: token for token, i in json_object(folder / "added_tokens.json").items()}
    is_llama = (str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
                and json_object(folder / "config.json").get("model_type") != "mistral"
                and "ByteLevel" not in text and '"Unigram"' not in text)
    tokens = {name: named.get(name) for name in NAMES}
    if is_llama or sp:
        tokens |= {name: tokens[name] or usual for name, usual in LLAMA_NAMES.items()}
    names = {name: token_text(token) for name, token in tokens.items()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if sp and not extra:
        extra = [sp.id_to_piece(i) for i in range(len(sp)) if sp.is_control(i)]
    source = Source(file, text, sp, config, names, {}, is_llama)
    for i in sorted(decoder, key=int):
        add_token(source, decoder[i], int(i), token_text(decoder[i]) in names.values())
    for token in [*tokens.values(), *extra]:
        add_token(source, token, None, True)
    return source


def add_token(source: Source, token, declared: int | None, special: bool):
    """Put a token, a text or an object with flags, among those to be added, unless it is there."""
    text = token_text(token)
    if text and text not in source.added:
        flags = dict(special=special, normalized=not special)
        if isinstance(token, dict):
            flags |= {k: token[k] for k in FLAGS if isinstance(token.get(k), bool)}
        if source.sp and not source.is_llama:
            flags["normalized"] = False
        source.added[text] = declared, flags


# ---------------------------------------------------------------------------- texts to ids and back


def load_tokenizer(path) -> data.Tokenizer:
    """The tokenizer of a model's folder, whatever is beside its file: with the ids that
    transformers gives, else UserError. It also has chat_template ("" if the model has none) and
    special_tokens (bos_token, ...); eos_ids holds the token too by which the chat template ends an
    answer."""
    folder = Path(path)
    file = next((folder / name for name in ("tokenizer.json", "tokenizer.model")
                 if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has neither tokenizer.model nor tokenizer.json; copy it there "
                        "from where the weights came from")
    try:
        return read_tokenizer(folder)
    except UserError:
        raise
    except Exception as e:  # the libraries' are of every class
        raise UserError(f"{file}, with the files beside it, cannot be read ({type(e).__name__} "
                        f"{one_line(e)}); fetch them again") from None


def read_tokenizer(folder: Path) -> data.Tokenizer:
    source = read_source(folder)
    if source.sp and source.config.get("add_eos_token"):
        raise UserError(f"{folder}/tokenizer_config.json puts eos after every text (add_eos_token):"
                        " no answer goes on after it; set it to false")
    tokenizer = SentencePieceTokenizer(source) if source.sp else None
    if tokenizer is None or tokenizer.is_changed():
        tokenizer = json_tokenizer(source)
    if source.sp:  # transformers puts bos where the config says so; without a config, Meta does
        puts_bos = source.config.get("add_bos_token", not source.config)
        tokenizer.bos_id = tokenizer.added.get(source.names["bos_token"]) if puts_bos else None
    data.name_ends(tokenizer, folder, source.names["eos_token"])
    tokenizer.chat_template = chat_template(folder, source.config)
    tokenizer.special_tokens = {name: text for name, text in source.names.items() if text}
    add_turn_end(tokenizer)
    return tokenizer


class SentencePieceTokenizer(data.SentencePieceTokenizer):
    """A tokenizer.model. A text that spells one of its tokens is encoded by the package tokenizers,
    as transformers does."""

    def __init__(self, source: Source):
        super().__init__(source.file)
        self.source = source

    def is_changed(self) -> bool:
        """Do the files beside it add tokens, or is the space before a text not as sentencepiece
        puts it?"""
        new = [text for text, (declared, _) in self.source.added.items()
               if text not in self.added or declared not in (None, self.added[text])]
        return bool(new) or not puts_space(self.sp) or prefix_scheme(self.source) == "never"

    @functools.cached_property
    def converted(self) -> data.JsonTokenizer:
        return json_tokenizer(self.source)

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        if any(token in text for token in self.special):
            return self.converted.ends(text)
        return self.spans(text)


def json_tokenizer(source: Source) -> data.JsonTokenizer:
    """A tokenizer of the package tokenizers, with the folder's added tokens, also in a text."""
    tokenizers = optional_package("tokenizers", source.file)
    if source.sp or source.is_llama:
        tok = converted(source)
    else:
        tok = tokenizers.Tokenizer.from_str(source.text)
    known = {token.content for token in tok.get_added_tokens_decoder().values()}
    for text, (declared, flags) in source.added.items():
        if declared is not None or text not in known:
            tok.add_tokens([tokenizers.AddedToken(text, **flags)])
        if declared not in (None, tok.token_to_id(text)):
            raise UserError(f"{source.file.parent} gives {text!r} the id {declared}, where "
                            f"transformers has {tok.token_to_id(text)}; fetch its files again")
    tokenizer = data.JsonTokenizer(source.file, tok)
    tokenizer.special = set()
    return tokenizer


def converted(source: Source):
    """As transformers makes its LlamaTokenizer: the vocabulary and merges of the file, with LLaMA's
    rules around them; and any other of a tokenizer.model."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    if source.sp:
        vocab, merges = vocab_and_merges(source)
        tok = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    else:
        spec = json.loads(source.text)
        if "added_tokens_decoder" in source.config:
            spec["added_tokens"] = []
        spec["model"] |= dict(fuse_unk=True, byte_fallback=True)
        tok = Tokenizer.from_str(json.dumps(spec))
    scheme = prefix_scheme(source)
    spaces = [normalizers.Replace(" ", SPACE)]
    if scheme == "always":
        spaces.append(normalizers.Replace(Regex(rf"\A{SPACE}"), 2 * SPACE))
    tok.normalizer = None if source.is_llama else normalizers.Sequence(spaces)
    tok.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme != "never":
        steps.append(decoders.Strip(" ", 1, 0))
    tok.decoder = decoders.Sequence(steps)
    return tok


def puts_space(sp) -> bool:
    return sp.id_to_piece(sp.encode("a")[0]).startswith(SPACE)


def prefix_scheme(source: Source) -> str:
    """Where transformers puts a space: before a text, also after each special token (legacy), or
    nowhere."""
    if source.is_llama and source.config.get("add_prefix_space") is False:
        return "never"
    if not source.is_llama and not puts_space(source.sp):
        return "never"
    return "always" if source.config.get("legacy", not source.is_llama) else "first"


def vocab_and_merges(source: Source) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The BPE model that merges to the pieces of a tokenizer.model, the best merge first. UserError
    if they do not come of merges: those have scores 0, -1, -2, ..."""
    sp = source.sp
    scores = [sp.get_score(i) for i in range(len(sp))
              if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    if scores.count(0) > 1 or any(score % 1 for score in scores):
        raise UserError(f"{source.file} is no plain BPE model, and tokens are added to it or stand "
                        "in a text; save it by transformers' save_pretrained, and use that folder")
    vocab = {sp.id_to_piece(i): i for i in range(len(sp))}
    merges = []
    for piece, i in vocab.items():
        # transformers' LlamaTokenizer ranks merges by id, and it alone.
        rank = i if source.is_llama else -sp.get_score(i)
        merges += [(rank, i, n, piece[:n], piece[n:]) for n in range(1, len(piece))
                   if piece[:n] in vocab and piece[n:] in vocab]
    return vocab, [(left, right) for *_, left, right in sorted(merges)]


# ---------------------------------------------------------------------------------- chat templates


def chat_template(folder: Path, config: dict) -> str:
    """The text of a model's chat template, "" if it has none."""
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    elif isinstance(template, list):  # several, by name
        template = {t.get("name"): t.get("template") for t in template}.get("default")
    return template or ""


def add_turn_end(tokenizer: data.Tokenizer):
    """Put the token by which the chat template ends an answer among eos_ids, whatever the model's
    files name."""
    if not tokenizer.chat_template:
        return
    with contextlib.suppress(UserError):  # raised again where the template is used
        _, rest = write_chat(tokenizer, [("user", "?")], "\u2603")
        after = rest[rest.index("\u2603") + 1:]
        ends = [i for token, i in tokenizer.added.items()
                if after.startswith(token) and not tokenizer.decode([i])]  # a special one
        tokenizer.eos_ids = tuple(dict.fromkeys([*tokenizer.eos_ids, *ends]))


@functools.lru_cache(maxsize=4)
def compiled_chat(source: str):
    """A chat template as transformers compiles it: in a sandbox, for a stranger wrote it."""
    jinja2 = optional_package("jinja2", "--template chat", (3, 1, 6))  # whose sandbox holds
    sandbox = optional_package("jinja2.sandbox", "--template chat")

    def refuse(message):
        raise jinja2.TemplateError(message)

    env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    # Llama 3's default date, so that a run says tomorrow what it says today.
    env.globals |= dict(raise_exception=refuse, strftime_now=date(2024, 7, 26).strftime)
    # transformers marks an assistant's part with a tag of its own, which writes nothing.
    source = re.sub(r"(\{%-?)\s*generation\s*(-?%\})", r"\1 if true \2", source)
    return env.from_string(re.sub(r"(\{%-?)\s*endgeneration\s*(-?%\})", r"\1 endif \2", source))


def render_chat(tokenizer, turns: list[tuple[str, str]], *, ask: bool) -> str:
    """(role, text) turns in the model's chat template, as transformers' apply_chat_template writes
    them; ask: with what makes the model answer (add_generation_prompt)."""
    if not getattr(tokenizer, "chat_template", ""):
        raise UserError("the tokenizer has no chat template (chat_template in tokenizer_config.json"
                        ", or chat_template.jinja); choose another --template")
    try:
        return compiled_chat(tokenizer.chat_template).render(
            messages=[dict(role=role, content=text) for role, text in turns],
            add_generation_prompt=ask, tools=None, documents=None, **tokenizer.special_tokens)
    except UserError:
        raise
    except Exception as e:  # whatever a stranger's template does
        roles = ", ".join(role for role, _ in turns)
        raise UserError(f"the model's chat template cannot write the turns {roles} "
                        f"({one_line(e) or type(e).__name__}); choose another --template, or mend "
                        "the rows") from None


def write_chat(tokenizer, turns: list[tuple[str, str]], answer: str) -> tuple[str, str]:
    """The prompt of a chat, and all that follows it: the template "chat" of data.TEMPLATES."""
    prompt = render_chat(tokenizer, turns, ask=True)
    if not answer:
        return prompt, ""
    text = render_chat(tokenizer, [*turns, ("assistant", answer)], ask=False)
    if not text.startswith(prompt):
        raise UserError("the model's chat template puts the answer elsewhere than after the prompt "
                        "that it writes; choose another --template")
    return prompt, text[len(prompt):]


# As open-unlearning puts TOFU to Llama 3: https://github.com/locuslab/open-unlearning
TEMPLATES["llama3"] = (
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday "
    "Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\n",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "")
data.TURN_END["llama3"] = "<|eot_id|>"
TEMPLATES["chat"] = write_chat


# ---------------------------------------------------------------------------------- tiny tokenizers


def train_tokenizer(texts: list[str], folder: Path, *, llama: bool, vocab: int):
    """Train a small tokenizer of LLaMA's or OLMo's kind on texts, and save it in folder."""
    (train_llama if llama else train_olmo)(texts, Path(folder), vocab)


def train_llama(texts: list[str], folder: Path, vocab: int):
    text = sorted({line for t in texts for line in t.splitlines() if line.strip()})
    model = io.BytesIO()  # a file name would be written into the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=model, vocab_size=vocab, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, character_coverage=1.0, hard_vocab_limit=False,
            num_threads=1, minloglevel=2)
    except RuntimeError as e:
        raise UserError(f"--vocab {vocab} does not suit this text ({e}); raise it") from None
    with atomic_file(folder / "tokenizer.model") as file:
        file.write(model.getvalue())
    write_text(folder / "tokenizer_config.json", json.dumps(LLAMA_IN_TRANSFORMERS))


def train_olmo(texts: list[str], folder: Path, vocab: int):
    tokenizers = optional_package("tokenizers", "tiny-olmo")
    from tokenizers import decoders, models, pre_tokenizers, trainers
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, show_progress=False,
                                  special_tokens=["<|endoftext|>", "<|padding|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(sorted(set(texts)), trainer)
    # Not tok.save: on a full disk the library's own writer says nothing of what happened.
    write_text(folder / "tokenizer.json", tok.to_str(pretty=True))
    names = dict(eos_token="<|endoftext|>", pad_token="<|padding|>")
    write_text(folder / "tokenizer_config.json", json.dumps(names | PLAIN_IN_TRANSFORMERS))
