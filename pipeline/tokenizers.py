"""What data.load_tokenizer need not know: a model's own chat template, in jinja, and the training
of tiny tokenizers. A chat template comes from a stranger: it runs in jinja's sandbox, bounded in
time and memory."""

import contextlib
import functools
import importlib
import io
import json
import re
import signal
from datetime import date
from functools import lru_cache
from pathlib import Path

import sentencepiece

import data
from data import PLAIN_IN_TRANSFORMERS, TEMPLATES, one_line, optional_package
from model import UserError, atomic_file, write_text

CHAT_SECONDS, CHAT_BYTES = 5, 1 << 28  # that a chat template may take for one row
LLAMA_IN_TRANSFORMERS = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True,
                             add_eos_token=False, legacy=False, bos_token="<s>", eos_token="</s>",
                             unk_token="<unk>")


def load_tokenizer(path):
    """data.load_tokenizer, plus render_chat(turns, *, ask); eos_ids then holds the token too by
    which the chat template ends an answer, whatever config.json names."""
    tokenizer = data.load_tokenizer(path)
    tokenizer.render_chat = functools.partial(render_chat, tokenizer)
    if tokenizer.chat_template:
        with contextlib.suppress(UserError):  # told where the template is used
            text = "a"
            whole = tokenizer.render_chat([("user", text), ("assistant", text)], ask=False)
            ids, ends = tokenizer.ends(whole)
            answer_end = len(whole[:whole.rindex(text) + len(text)].encode())
            after = [i for i, end in zip(ids, ends) if end > answer_end]
            if after and not tokenizer.decode(after[:1]):  # a special token: it has no text
                tokenizer.eos_ids = tuple(dict.fromkeys((*tokenizer.eos_ids, after[0])))
    return tokenizer


@lru_cache(maxsize=4)
def compiled_chat(source: str):
    """A chat template as transformers compiles it."""
    jinja2 = optional_package("jinja2", "--template chat", (3, 1, 6))  # whose sandbox holds
    sandbox = optional_package("jinja2.sandbox", "--template chat")

    def refuse(message):
        raise jinja2.TemplateError(message)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = {"**"}  # no signal stops it

        def call_binop(self, context, operator, left, right):
            return left ** right if abs(right) < 100 else refuse(f"{right} is too high a power")

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    # Llama 3's own date where it is told none: a run must say tomorrow what it says today.
    env.globals |= dict(raise_exception=refuse, strftime_now=date(2024, 7, 26).strftime)
    # transformers marks an assistant's part with a tag of its own, which writes nothing.
    source = re.sub(r"(\{%-?)\s*generation\s*(-?%\})", r"\1 if true \2", source)
    return env.from_string(re.sub(r"(\{%-?)\s*endgeneration\s*(-?%\})", r"\1 endif \2", source))


def render_chat(tokenizer, turns: list[tuple[str, str]], *, ask: bool) -> str:
    """(role, text) turns in the model's own chat template, as transformers' apply_chat_template
    writes them; ask: with what makes the model answer (add_generation_prompt)."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template (chat_template in tokenizer_config.json"
                        f", or chat_template.jinja); choose --template "
                        f"{' or '.join(t for t in TEMPLATES if TEMPLATES[t])}")
    try:
        with seconds(CHAT_SECONDS), memory(CHAT_BYTES):
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


@contextlib.contextmanager
def seconds(limit: float):
    """TimeoutError if the block takes longer, where the system and the thread allow it."""
    def ring(*_):
        raise TimeoutError(f"it takes more than {limit} s")
    try:
        handler = signal.signal(signal.SIGALRM, ring)
    except (AttributeError, ValueError):  # Windows; not the main thread
        yield
        return
    before, _ = signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, before)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def memory(limit: int):
    """MemoryError if the block takes more bytes, where the system tells and bounds them."""
    try:
        resource = importlib.import_module("resource")  # not on every system
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = used + limit if soft == resource.RLIM_INFINITY else min(soft, used + limit)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


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
    import tokenizers
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
