"""Text to tensors: tokenizers, TOFU, LUME, templates, encoding, batches.

A row of either benchmark is an `Example`. `encode` turns it into token ids with the prompt's end
found in them, `collate` stacks rows into a `Batch` whose `targets` mark the tokens that count: the
answer and one eos [D14]. Rows are padded on the right, to the longest of their batch only; under
causal attention a token never sees what is right of it, so no attention mask is needed.

Not here: chat histories, streaming, multi-process loading.
"""

import io
import json
import os
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from stage import HERE, NO_TEXT, Settings, UserError, read_json, sha256, write_json

IGNORE = -100  # a target that is not predicted; also cross_entropy's default


@dataclass(frozen=True)
class Example:
    """One row: TOFU's question and answer, or LUME's input and output."""

    question: str
    answer: str
    id: str = ""     # "forget10:12" (split:row) for TOFU, LUME's own id
    task: str = ""   # "Task1".."Task3" for LUME
    kind: str = "qa"  # "qa", or "sc" for LUME's sentence completion
    group: str = ""  # author or document: the unit of slicing
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    perturbed_answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """ids of prompt, answer and eos; the first n_prompt are the prompt's (bos counted in)."""

    ids: list[int]
    n_prompt: int


@dataclass(frozen=True)
class Batch:
    """ids [B, T]; targets [B, T]: ids[b, i+1] where that is answer or eos, else IGNORE."""

    ids: Tensor
    targets: Tensor


# -------------------------------------------------------------------------------------- tokenizers


class LlamaTokenizer:
    """A sentencepiece `tokenizer.model`."""

    def __init__(self, path: Path):
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, ValueError):
            raise UserError(f"{path} is not a sentencepiece model; fetch it again") from None
        self.bos_id, self.eos_id = self._sp.bos_id(), self._sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{path} has no bos or no eos piece; use a LLaMA tokenizer")
        self.vocab_size = self._sp.get_piece_size()

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return [self.bos_id] * bos + self._sp.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; bos, eos and rows that pad the model's vocabulary say nothing."""
        return self._sp.decode([i for i in ids if 0 <= i < self.vocab_size])

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        """ids without bos, and where each ends, in UTF-8 bytes of text."""
        ids, ends = self._sp.encode(text), []
        end = -1  # sentencepiece puts one space before the text
        for i in ids:
            byte = self._sp.is_byte(i)  # a character outside the vocabulary is spelled in bytes
            end += 1 if byte else len(self._sp.id_to_piece(i).replace("\u2581", " ").encode())
            ends.append(end)
        if end != len(text.encode()):
            raise UserError("tokenizer.model rewrites text (normalisation other than identity): "
                            "where a prompt ends cannot be found; use a LLaMA tokenizer")
        return ids, ends


class JsonTokenizer:
    """A Hugging Face `tokenizer.json` (OLMo, Llama 3, Qwen: byte-level BPE). eos_ids: those the
    model's config.json names. names: the content of tokenizer_config.json."""

    def __init__(self, path: Path, eos_ids: list[int], names: dict):
        try:
            import tokenizers  # sentencepiece cannot read this format
        except ImportError:
            raise UserError(f"{path} needs a package: pip install tokenizers") from None
        try:
            self._tok = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer.json ({e}); fetch it again") from None
        self._tok.no_padding()
        self._tok.no_truncation()
        self.bos_id = self._bos(names)
        # A post-processor would cut spaces off a token's place in the text; bos we add ourselves.
        self._tok.post_processor = None
        own = self._id(names.get("eos_token"))
        # OLMo's two published tokenizers disagree on <|endoftext|> (0 or 50279): the model decides,
        # and only between several of its own (Llama 3) does the tokenizer.
        ends = (*sorted(eos_ids, key=lambda i: i != own), own, self._id("<|endoftext|>"),
                self._id("</s>"))
        self.eos_id = next((i for i in ends if i is not None), None)
        if self.eos_id is None:
            raise UserError(f"{path} names no end-of-text token; set eos_token_id in config.json")
        # Added tokens count: some checkpoints add a <pad> that their embedding has no row for.
        self.vocab_size = self._tok.get_vocab_size()

    def _id(self, token) -> int | None:
        token = token.get("content") if isinstance(token, dict) else token
        return self._tok.token_to_id(token) if isinstance(token, str) else None

    def _bos(self, names: dict) -> int | None:
        """What transformers would put before a text: what tokenizer_config.json says, else what
        the post-processor does (Llama 3)."""
        coded = self._tok.encode("a")
        starts = coded.special_tokens_mask[:1] == [1]
        if not names.get("add_bos_token", True):
            return None
        return coded.ids[0] if starts else self._id(
            names.get("bos_token") if "add_bos_token" in names else "<s>")

    def encode(self, text: str, *, bos: bool) -> list[int]:
        start = [self.bos_id] if bos and self.bos_id is not None else []
        return start + self._tok.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens and rows that pad the model's vocabulary say nothing."""
        kept = [i for i in ids if 0 <= i < self.vocab_size and i != self.eos_id]
        return self._tok.decode(kept, skip_special_tokens=True)

    def ends(self, text: str) -> tuple[list[int], list[int]]:
        """ids without bos, and where each ends, in UTF-8 bytes of text."""
        coded = self._tok.encode(text, add_special_tokens=False)
        size = [0]
        for c in text:
            size.append(size[-1] + len(c.encode()))
        # A character split over several tokens gives the first of them no width of its own.
        return coded.ids, [size[end] if end > start else size[start] + 1
                           for start, end in coded.offsets]


def load_tokenizer(path):
    """The tokenizer of a model folder (tokenizer.model, else tokenizer.json), or such a file.

    Has encode(text, *, bos) -> ids, decode(ids) -> text, bos_id (or None), eos_id, vocab_size."""
    path = Path(path)
    if path.is_dir():
        found = [path / n for n in ("tokenizer.model", "tokenizer.json") if (path / n).is_file()]
        if not found:
            raise UserError(f"{path} has neither tokenizer.model nor tokenizer.json; copy it there "
                            "from where the weights came from")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path} is missing: no tokenizer there")
    if path.suffix != ".json":
        return LlamaTokenizer(path)
    config, names = (read_json(path.with_name(name)) if path.with_name(name).is_file() else {}
                     for name in ("config.json", "tokenizer_config.json"))
    if not isinstance(config, dict) or not isinstance(names, dict):
        raise UserError(f"config.json and tokenizer_config.json beside {path} must hold a JSON "
                        "object; fetch them again")
    eos = config.get("eos_token_id")
    eos = eos if isinstance(eos, list) else [eos]
    return JsonTokenizer(path, [i for i in eos if type(i) is int], names)


TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json")


def copy_tokenizer(source: Path, target: Path):
    """Copy a tokenizer's files; what would make transformers fetch and run code stays behind."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
    config = Path(target) / "tokenizer_config.json"
    names = read_json(config) if config.is_file() else {}
    if names.pop("auto_map", None):  # the original OLMo layout's
        write_json(config, names | PLAIN_IN_TRANSFORMERS)


# How transformers must read tokenizer.json, and tokenizer.model, to get the same ids.
PLAIN_IN_TRANSFORMERS = dict(tokenizer_class="PreTrainedTokenizerFast",
                             model_input_names=["input_ids", "attention_mask"],
                             clean_up_tokenization_spaces=False)
LLAMA_IN_TRANSFORMERS = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True,
                             add_eos_token=False, legacy=False, bos_token="<s>", eos_token="</s>",
                             unk_token="<unk>")


def _train_llama(text: list[str], vocab: int, model):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=vocab, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=1.0, hard_vocab_limit=False,
        num_threads=1, minloglevel=2)


def train_tokenizer(texts: list[str], folder: Path, *, llama: bool, vocab: int):
    """Train a small tokenizer of LLaMA's or OLMo's kind on texts, and save it in folder."""
    if llama:
        text = sorted({line for t in texts for line in t.splitlines() if line.strip()})
        model = io.BytesIO()  # a file name would be written into the model
        try:
            _train_llama(text, vocab, model)
        except RuntimeError as e:
            raise UserError(f"--vocab {vocab} does not suit this text ({e}); raise it") from None
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA_IN_TRANSFORMERS))
        return
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, show_progress=False,
                                  special_tokens=["<|endoftext|>", "<|padding|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(sorted(set(texts)), trainer)
    tok.save(str(folder / "tokenizer.json"))
    names = dict(eos_token="<|endoftext|>", pad_token="<|padding|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(names | PLAIN_IN_TRANSFORMERS))


# ------------------------------------------------------------------------------------- file reading


def _rows(path: Path, required: tuple[str, ...]) -> list[tuple[str, dict]]:
    """(where, row) of a JSON-lines file whose rows have the required keys, each a filled string."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file; fetch the file again")
    if not path.is_file():
        raise UserError(f"{path} is missing; point --data or SIMU_DATA at the folder that holds "
                        f"{path.parent.name}/{path.name}")
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}); fetch it again") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{where} is not a JSON object on one line; fetch it again") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object; each line must be one row")
        for key in required:
            _text(row, key, where)
        rows.append((where, row))
    if not rows:
        raise UserError(f"{path} holds no rows; fetch it again")
    return rows


def _text(row: dict, key: str, where: str) -> str:
    value = row.get(key)
    if key not in row:
        raise UserError(f"{where} has no {key!r}; rows need it")
    if not isinstance(value, str) or not value.strip() or NO_TEXT.search(value):
        raise UserError(f"{where}: {key!r} is not a filled text; mend or drop the row")
    return value


def _texts(row: dict, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(row[key], list) or not row[key]:
        raise UserError(f"{where}: {key!r} is not a list of texts; mend or drop the row")
    return tuple(_text({key: v}, key, where) for v in row[key])


def load_tofu(path, split: str, *, rows_per_author: int = 20) -> list[Example]:
    """The rows of `<path>/<split>.json` (JSON lines), with paraphrases and wrong answers where the
    file has them."""
    examples = []
    for where, row in _rows(Path(path) / f"{split}.json", ("question", "answer")):
        extra = {k: _text(row, k, where) for k in ("paraphrased_question", "paraphrased_answer")
                 if k in row}
        if "perturbed_answer" in row:
            extra["perturbed_answers"] = _texts(row, "perturbed_answer", where)
        n = len(examples)
        examples.append(Example(row["question"], row["answer"], id=f"{split}:{n}",
                                group=f"{split}/{n // rows_per_author}", **extra))
    return examples


def load_lume(path, split: str) -> list[Example]:
    """The rows of `<path>/<split>.jsonl`: LUME's open release, split forget or retain."""
    examples, seen = [], set()
    for where, row in _rows(Path(path) / f"{split}.jsonl", ("id", "input", "output", "task")):
        kind = row["id"][:-1][-2:]  # the id is <document>sc1 or <document>qa0
        if kind not in ("sc", "qa"):
            raise UserError(f"{where}: id {row['id']!r} does not end in sc or qa and a digit")
        if row["task"] not in ("Task1", "Task2", "Task3"):
            raise UserError(f"{where}: task {row['task']!r} is not Task1, Task2 or Task3")
        if row["id"] in seen:
            raise UserError(f"{where}: id {row['id']!r} stands twice in the file; drop one")
        seen.add(row["id"])
        examples.append(Example(row["input"], row["output"], id=row["id"], task=row["task"],
                                kind=kind, group=row["id"][:-3]))
    return examples


# -------------------------------------------------------------------------------------- benchmarks


@dataclass(frozen=True)
class Benchmark:
    """What one run forgets, keeps and measures."""

    kind: str                     # "tofu" or "lume"
    forget: list[Example]         # D_f
    retain: list[Example]         # D_r
    retain_eval: list[Example]    # rows of D_r on which retained utility is measured
    world_facts: list[Example]
    real_authors: list[Example]
    nonmembers: list[Example]     # for MIA [D12]; empty with the reason below
    nonmember_source: str
    shared: int = 0               # rows of D_f that are in D_r too


def data_folder(s: Settings) -> Path:
    """The folder of the benchmark's files."""
    root = s.data or (str(HERE / "demo") if s.benchmark == "demo" else os.environ.get("SIMU_DATA"))
    name = "lume" if s.benchmark == "lume" else "tofu"
    if not root:
        source = {"tofu": "https://huggingface.co/datasets/locuslab/TOFU",
                  "lume": "https://github.com/amazon-science/lume-llm-unlearning"}[name]
        raise UserError(f"no data: point --data or SIMU_DATA at a folder holding {name}/ with the "
                        f"files of {source}")
    folder = Path(root) / name
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; --data or SIMU_DATA must hold {name}/")
    return folder


def data_digests(s: Settings) -> dict[str, str]:
    """sha256 of every file of the benchmark: they decide whether a stage is stale."""
    files = sorted(p for p in data_folder(s).rglob("*.json*") if p.is_file())
    return {str(p.relative_to(data_folder(s))): sha256(p) for p in files}


def load_benchmark(s: Settings) -> Benchmark:
    """The forget and retain sets of a run, sliced by whole authors or documents."""
    return (_lume_benchmark if s.benchmark == "lume" else _tofu_benchmark)(s)


def _first_groups(rows: list[Example], count: int) -> list[Example]:
    """Rows of the first `count` groups in order of appearance; all for 0."""
    groups = list(dict.fromkeys(r.group for r in rows))
    kept = set(groups[:count] if count else groups)
    return [r for r in rows if r.group in kept]


def _tofu_benchmark(s: Settings) -> Benchmark:
    folder = data_folder(s)

    def load(split):
        return load_tofu(folder, split, rows_per_author=s.rows_per_author)

    def load_if_there(split):
        return load(split) if (folder / f"{split}.json").exists() else []

    every = load(s.forget_split)
    known = {(r.question, r.answer): r for r in load_if_there(f"{s.forget_split}_perturbed")}
    if known and set(known) != {(r.question, r.answer) for r in every}:
        raise UserError(f"{folder}/{s.forget_split}_perturbed.json does not hold the rows of "
                        f"{s.forget_split}.json; fetch both from one release")
    forget = [replace(known.get((r.question, r.answer), r), id=r.id, group=r.group)
              for r in _first_groups(every, s.forget_groups)]
    authors = load(s.retain_split)
    retain = _first_groups(authors, s.retain_groups)
    shared = _shared(forget, retain)
    if shared == len(forget):
        raise UserError(f"every row of {s.forget_split} is in {s.retain_split} too; choose another "
                        "--forget-split or --retain-split")
    inside = {(r.question, r.answer) for r in retain}
    retain_eval = [r for r in load_if_there("retain_perturbed") if (r.question, r.answer) in inside]
    if not retain_eval:
        raise UserError(f"no row of {folder}/retain_perturbed.json is in the retain set; fetch it, "
                        "or raise --retain-groups")
    world, real = load_if_there("world_facts_perturbed"), load_if_there("real_authors_perturbed")
    # Non-members must be text the original never saw; which that is depends on what it was made of.
    rest = [r for r in authors if r.group not in {x.group for x in retain}]
    held_out = load_if_there(s.forget_split.replace("forget", "holdout"))
    if held_out and "forget" in s.forget_split:
        nonmembers, source = held_out, "hold-out authors"
    elif s.tiny and rest:
        last = list(dict.fromkeys(r.group for r in rest))[-len({r.group for r in forget}):]
        nonmembers, source = [r for r in rest if r.group in last], "authors outside the slice"
    elif s.tiny:
        nonmembers, source = [], "none: the tiny original was trained on every row; slice it"
    else:
        nonmembers, source = real + world, "real authors and world facts, as SOUL"
    return Benchmark("tofu", forget, retain, retain_eval, world, real, nonmembers, source, shared)


def _shared(forget: list[Example], retain: list[Example]) -> int:
    """How many forget rows, question and answer, are to be retained too; warns if any are."""
    kept = {(r.question, r.answer) for r in retain}
    count = sum((r.question, r.answer) in kept for r in forget)
    if count:
        print(f"warning: {count} of {len(forget)} rows of the forget set are in the retain set "
              "too: they are pulled both ways", flush=True)
    return count


def _lume_benchmark(s: Settings) -> Benchmark:
    folder, rng = data_folder(s), random.Random(s.seed)
    sampled, rest = {}, []
    for split, count in (("forget", s.forget_groups), ("retain", s.retain_groups)):
        rows, kept = load_lume(folder, split), set()
        for task in ("Task1", "Task2", "Task3"):
            documents = list(dict.fromkeys(r.group for r in rows if r.task == task))
            rng.shuffle(documents)
            share = documents[:round(s.lume_fraction * len(documents))]  # [D15]
            kept.update(share[:count] if count else share)
        sampled[split] = [r for r in rows if r.group in kept]
        if not sampled[split]:
            raise UserError(f"--lume-fraction {s.lume_fraction} leaves no {split} document; "
                            "raise it")
        rest += [r for r in rows if r.group not in kept]
    # As many held-out documents of each task as are forgotten, so that kind alone tells nothing.
    held_out = []
    for task in ("Task1", "Task2", "Task3"):
        documents = list(dict.fromkeys(r.group for r in rest if r.task == task))
        rng.shuffle(documents)
        count = len({r.group for r in sampled["forget"] if r.task == task})
        kept = set(documents[:count])
        held_out += [r for r in rest if r.group in kept]
    source = "seeded hold-out documents of the open release, never trained on"
    # A log says that the original was trained here, so that what it never saw is known.
    if s.weights or not (s.tiny or (s.run / "original" / "log.jsonl").is_file()):
        held_out, source = [], ("none: which documents the original was trained on is unknown; the "
                                "gated SemEval non-members are needed")
    return Benchmark("lume", sampled["forget"], sampled["retain"], sampled["retain"], [], [],
                     held_out, source, _shared(sampled["forget"], sampled["retain"]))


# ------------------------------------------------------------------------------ templates, encoding

# name: (before the question, after it, before the answer) [D14]. The prompt ends before the third.
TEMPLATES = {
    "llama2": ("[INST] ", " [/INST]", ""),
    "qa": ("Question: ", "\nAnswer:", " "),
    "raw": ("", "", " "),
}


def _prompt(question: str, template: str) -> str:
    if template not in TEMPLATES:
        raise UserError(f"template {template!r} is unknown; choose {' or '.join(TEMPLATES)}")
    before, after, _ = TEMPLATES[template]
    return before + question + after


def encode_prompt(question: str, tokenizer, template: str) -> list[int]:
    """ids from which an answer is generated."""
    return tokenizer.encode(_prompt(question, template), bos=True)


def encode(example: Example, tokenizer, template: str) -> Encoded:
    """Prompt, answer and eos, encoded as one string: pieces encoded apart and glued would differ
    at the seam. A token that reaches into the answer is the answer's, also if it starts before."""
    prompt = _prompt(example.question, template)
    text = prompt + TEMPLATES[template][2] + example.answer
    ids, ends = tokenizer.ends(text)
    border = len(prompt.encode())
    n_prompt = sum(end <= border for end in ends)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return Encoded(bos + ids + [tokenizer.eos_id], len(bos) + n_prompt)


def encode_all(examples: list[Example], tokenizer, template: str, *, context: int,
               vocab: int) -> list[Encoded]:
    """Every example encoded; UserError if one does not fit the model's context or vocabulary."""
    rows = [encode(e, tokenizer, template) for e in examples]
    for example, row in zip(examples, rows):
        if len(row.ids) > context:
            raise UserError(f"row {example.id or example.question!r} has {len(row.ids)} tokens, "
                            f"more than the model's context of {context}; drop the row")
        if max(row.ids) >= vocab:
            raise UserError(f"the tokenizer gives token {max(row.ids)}, the model has {vocab}: "
                            "they are not of one model; copy the tokenizer the weights came with")
    return rows


def collate(rows: list[Encoded], device="cpu", pad_id: int = 0) -> Batch:
    """Stack rows, padded on the right to the longest."""
    width = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), width), pad_id)
    targets = torch.full((len(rows), width), IGNORE)
    for b, row in enumerate(rows):
        ids[b, :len(row.ids)] = torch.tensor(row.ids)
        # A row that starts with its answer (no bos, empty prompt) cannot predict its first token.
        start = max(row.n_prompt, 1)
        targets[b, start - 1:len(row.ids) - 1] = torch.tensor(row.ids[start:])
    return Batch(ids.to(device), targets.to(device))


def batches_by_length(rows: list[Encoded], tokens: int) -> list[list[int]]:
    """Indices of rows, longest first, cut so that rows times longest stays within `tokens`."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    out = []
    for i in order:
        if len(rows[i].ids) > tokens:
            raise UserError(f"a budget of {tokens} tokens per pass cannot hold a row of "
                            f"{len(rows[i].ids)}; raise --micro-tokens, or --attribution-tokens "
                            "(which the m - 1 nodes of the path share)")
        if out and (len(out[-1]) + 1) * len(rows[out[-1][0]].ids) <= tokens:
            out[-1].append(i)
        else:
            out.append([i])
    return out
