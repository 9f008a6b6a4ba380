"""A tokenizer of any folder, with transformers' ids; chat templates in jinja's sandbox; tiny
tokenizers. Importing this adds the templates "llama3" and "chat" to data.TEMPLATES."""

import contextlib
import functools
import importlib
import io
import json
import re
from datetime import date
from pathlib import Path

import sentencepiece

import data
from data import TEMPLATES, json_object, token_text
from model import UserError, atomic_file, write_text

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
LLAMA_NAMES = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of an added token
SPACE = "\u2581"  # how a piece of a sentencepiece model spells a space
LLAMA_IN_TRANSFORMERS = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True,
                             add_eos_token=False, legacy=False, **LLAMA_NAMES)
# How transformers must read a tokenizer.json to get the same ids.
PLAIN_IN_TRANSFORMERS = dict(tokenizer_class="PreTrainedTokenizerFast",
                             model_input_names=["input_ids", "attention_mask"],
                             clean_up_tokenization_spaces=False)


def optional_package(name: str, needed_by):
    """The module `name`, which only `needed_by` needs; UserError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{needed_by} needs a package: pip install "
                        f"{name.replace('_', '-')}") from None


def one_line(error: BaseException) -> str:
    """A library's message on one line, cut short, to be quoted in ours."""
    return " ".join(str(error).split())[:200]


# --------------------------------------------------------------------------- what a folder says


class Source:
    """What the files of a tokenizer say, as transformers reads them. names: the text of bos_token,
    eos_token, ...; added: of each token to be added its declared id, or None, and its flags."""

    def __init__(self, folder: Path):
        self.file, self.text, self.sp = folder / "tokenizer.json", "", None
        if self.file.is_file():
            self.text = self.file.read_text("utf-8")
        else:
            self.file = folder / "tokenizer.model"
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.file))
            self.spaced = self.sp.id_to_piece(self.sp.encode("a")[0]).startswith(SPACE)
        named = self.config = json_object(folder / "tokenizer_config.json")
        decoder = named.get("added_tokens_decoder")
        if decoder is None:  # older folders have files beside it instead
            named = named | json_object(folder / "special_tokens_map.json")
            decoder = {i: token for token, i in json_object(folder / "added_tokens.json").items()}
        # transformers' LlamaTokenizer has rules in place of the file's.
        self.is_llama = (str(self.config.get("tokenizer_class")) in LLAMA_CLASSES
                         and json_object(folder / "config.json").get("model_type") != "mistral"
                         and "ByteLevel" not in self.text and '"Unigram"' not in self.text)
        usual = LLAMA_NAMES if self.is_llama or self.sp else {}
        tokens = {name: named.get(name) or usual.get(name) for name in NAMES}
        self.names = {name: token_text(token) for name, token in tokens.items()}
        config = self.config
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        if self.sp and not extra:
            extra = [self.sp.id_to_piece(i) for i in range(len(self.sp)) if self.sp.is_control(i)]
        listed = [(decoder[i], int(i)) for i in sorted(decoder, key=int)]
        listed += [(token, None) for token in [*tokens.values(), *extra]]
        self.added = {}
        for token, i in listed:
            text = token_text(token)
            special = i is None or text in self.names.values()
            flags = dict(special=special, normalized=not special)
            if isinstance(token, dict):
                flags |= {k: token[k] for k in FLAGS if isinstance(token.get(k), bool)}
            if self.sp and not self.is_llama:
                flags["normalized"] = False
            if text:
                self.added.setdefault(text, (i, flags))

    def prefix_scheme(self) -> str:
        """Where transformers puts a space: before a text, also after each special token (legacy),
        or nowhere."""
        if self.is_llama and self.config.get("add_prefix_space") is False:
            return "never"
        if not self.is_llama and not self.spaced:
            return "never"
        return "always" if self.config.get("legacy", not self.is_llama) else "first"


def load_tokenizer(path) -> data.Tokenizer:
    """The tokenizer of a model's folder, whatever is beside its file: with the ids that
    transformers gives, else UserError. It also has chat_template ("" if the model has none) and
    special_tokens (bos_token, ...); eos_ids holds the token too by which the chat template ends an
    answer."""
    folder = Path(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder} has neither tokenizer.model nor tokenizer.json; copy it there "
                        "from where the weights came from")
    try:
        return read_tokenizer(folder)
    except UserError:
        raise
    except Exception as e:  # the libraries' are of every class
        raise UserError(f"{folder}'s tokenizer.json or tokenizer.model, or a file beside it, cannot"
                        f" be read ({type(e).__name__} {one_line(e)}); fetch them again") from None


def read_tokenizer(folder: Path) -> data.Tokenizer:
    source = Source(folder)
    if source.sp:
        if source.config.get("add_eos_token"):
            raise UserError(f"{folder}/tokenizer_config.json puts eos after every text "
                            "(add_eos_token): no answer goes on after it; set it to false")
        tokenizer = SentencePieceTokenizer(source.file)
        tokenizer.source, known = source, tokenizer.added
        if not source.spaced or source.prefix_scheme() == "never" or any(
                text not in known or i not in (None, known[text])
                for text, (i, _) in source.added.items()):
            tokenizer = json_tokenizer(source)
        # transformers puts bos where the config says so; without a config, Meta does.
        puts_bos = source.config.get("add_bos_token", not source.config)
        tokenizer.bos_id = tokenizer.added.get(source.names["bos_token"]) if puts_bos else None
    else:
        tokenizer = json_tokenizer(source)
    data.name_ends(tokenizer, folder, source.names["eos_token"])
    tokenizer.chat_template = chat_template(folder, source.config)
    tokenizer.special_tokens = {name: text for name, text in source.names.items() if text}
    add_turn_end(tokenizer)
    return tokenizer


class SentencePieceTokenizer(data.SentencePieceTokenizer):
    """A tokenizer.model. A text that spells one of its tokens is encoded by the package tokenizers,
    as transformers does."""

    @functools.cached_property
    def converted(self) -> data.JsonTokenizer:
        return json_tokenizer(self.source)

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        spells = any(token in text for token in self.special)
        return self.converted.ends(text) if spells else self.spans(text)


def json_tokenizer(source: Source) -> data.JsonTokenizer:
    """A tokenizer of the package tokenizers, with the folder's added tokens, also in a text."""
    tokenizers = optional_package("tokenizers", source.file)
    is_changed = source.sp or source.is_llama
    tok = converted(source) if is_changed else tokenizers.Tokenizer.from_str(source.text)
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
    scheme = source.prefix_scheme()
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
    with contextlib.suppress(UserError):  # raised again where the template is used
        _, rest = write_chat(tokenizer, [("user", "?")], "\u2603")
        after = rest.partition("\u2603")[2]
        ends = [i for token, i in tokenizer.added.items()
                if after.startswith(token) and not tokenizer.decode([i])]  # a special one
        tokenizer.eos_ids = tuple(dict.fromkeys([*tokenizer.eos_ids, *ends]))


@functools.lru_cache(maxsize=4)
def compiled_chat(source: str):
    """A chat template as transformers compiles it: in a sandbox, for a stranger wrote it."""
    jinja2 = optional_package("jinja2", "--template chat")
    if [int(n) for n in re.findall(r"\d+", jinja2.__version__)[:3]] < [3, 1, 6]:
        raise UserError("the sandbox of jinja2 is not safe before 3.1.6: pip install -U jinja2")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    # Llama 3's default date, so that a run says tomorrow what it says today.
    env.globals |= dict(raise_exception=refuse, strftime_now=date(2024, 7, 26).strftime)
    # transformers marks an assistant's part with a tag of its own, which writes nothing.
    source = re.sub(r"(\{%-?)\s*generation\s*(-?%\})", r"\1 if true \2", source)
    return env.from_string(re.sub(r"(\{%-?)\s*endgeneration\s*(-?%\})", r"\1 endif \2", source))


def write_chat(tokenizer, turns: list[tuple[str, str]], answer: str) -> tuple[str, str]:
    """The prompt of a chat, and all that follows it, as transformers' apply_chat_template writes
    them: the template "chat" of data.TEMPLATES."""
    if not getattr(tokenizer, "chat_template", ""):
        raise UserError("the tokenizer has no chat template (chat_template in tokenizer_config.json"
                        ", or chat_template.jinja); choose another --template")
    messages = [dict(role=role, content=text) for role, text in turns]
    answered = [*messages, dict(role="assistant", content=answer)]
    names = dict(tokenizer.special_tokens, tools=None, documents=None)
    try:
        template = compiled_chat(tokenizer.chat_template)
        prompt = template.render(messages=messages, add_generation_prompt=True, **names)
        if not answer:
            return prompt, ""
        text = template.render(messages=answered, add_generation_prompt=False, **names)
    except UserError:
        raise
    except Exception as e:  # whatever a stranger's template does
        roles = ", ".join(role for role, _ in turns)
        raise UserError(f"the model's chat template cannot write the turns {roles} "
                        f"({one_line(e) or type(e).__name__}); choose another --template, or mend "
                        "the rows") from None
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
    if llama:
        name, content, config = "tokenizer.model", train_llama(texts, vocab), LLAMA_IN_TRANSFORMERS
    else:
        name, content = "tokenizer.json", train_olmo(texts, vocab)
        config = dict(eos_token="<|endoftext|>", pad_token="<|padding|>") | PLAIN_IN_TRANSFORMERS
    # Not the libraries' writers: on a full disk they say nothing of what happened.
    with atomic_file(Path(folder) / name) as file:
        file.write(content)
    write_text(Path(folder) / "tokenizer_config.json", json.dumps(config))


def train_llama(texts: list[str], vocab: int) -> bytes:
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
    return model.getvalue()


def train_olmo(texts: list[str], vocab: int) -> bytes:
    tokenizers = optional_package("tokenizers", "tiny-olmo")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = byte_level(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, show_progress=False, initial_alphabet=byte_level.alphabet(),
        special_tokens=["<|endoftext|>", "<|padding|>"])
    tok.train_from_iterator(sorted(set(texts)), trainer)
    return tok.to_str(pretty=True).encode()
