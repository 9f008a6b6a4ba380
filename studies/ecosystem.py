"""Do the folders that a run writes load where others load such models, and say the same there?

    python -m studies ecosystem runs/demo-tiny-mamba/original runs/demo-tiny-rwkv/simu-graddiff

Mamba-2 in transformers, tokenizer included; RWKV-7, its tensors renamed as its author names them,
in his `rwkv` package. Greedy answers to the demo's first retain questions, and logits over one
whole row.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

import data
from model import Transformer
from pipeline import settings
from pipeline.reading import generate
from studies import common

ROWS, LONG = 8, 40  # questions asked, and tokens answered at most


def helpers():
    """The tests' own renaming of RWKV-7's tensors, and their measure of a difference."""
    sys.path.append(str(settings.HERE / "tests"))
    import test_mixers
    return test_mixers


def transformers_of(folder: Path, tokenizer, texts: list[str]):
    """Logits and greedy answers of transformers' own class: functions of ids."""
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        assert theirs(text)["input_ids"] == data.encode_prompt(text, tokenizer, "raw"), text
    print(f"  {type(model).__name__}; its tokenizer gives the same ids")
    return (lambda ids: model(torch.tensor([ids])).logits[0],
            lambda ids: model.generate(torch.tensor([ids]), max_new_tokens=LONG, do_sample=False)[
                0, len(ids):].tolist())


def rwkv_of(folder: Path, tokenizer, texts: list[str]):
    """The same of the author's package, which reads pickles: it is handed the tensors."""
    os.environ |= dict(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    import rwkv.model
    tensors = helpers().native(load_file(folder / "model.safetensors"))
    with mock.patch.object(torch, "load", lambda *_, **__: tensors):
        model = rwkv.model.RWKV(model=str(folder / "native"), strategy="cpu fp32")
    print("  rwkv.model.RWKV")

    def answer(ids):
        said, (logits, state) = [], model.forward(ids, None)
        while len(said) < LONG and (token := int(logits.argmax())) != tokenizer.eos_id:
            said.append(token)
            logits, state = model.forward([token], state)
        return said
    return lambda ids: model.forward(ids, None, full_output=True)[0], answer


@torch.no_grad()
def compare(folder: Path):
    print(folder)
    model, tokenizer = Transformer.from_pretrained(folder), data.load_tokenizer(folder)
    s = settings.resolve(dict(benchmark="demo", model="tiny-mamba"))
    rows = settings.load_benchmark(s).retain[:ROWS]
    texts = [f"Question: {e.question}\nAnswer:" for e in rows]
    read = dict(mamba2=transformers_of, rwkv7=rwkv_of)[model.config.model_type]
    logits, answer = read(folder, tokenizer, texts)
    prompts = [data.encode_prompt(text, tokenizer, "raw") for text in texts]
    said = generate(model, prompts, max_new_tokens=LONG, eos_id=tokenizer.eos_id)
    same = sum(a == [i for i in answer(p) if i != tokenizer.eos_id] for a, p in zip(said, prompts))
    far = max(helpers().relative(model(torch.tensor([p + a]))[0], logits(p + a))
              for p, a in zip(prompts, said))
    print(f"  {same} of {ROWS} greedy answers ({sum(map(len, said))} tokens) are the same; logits "
          f"differ by {far:.1e} of the largest; first answer: {tokenizer.decode(said[0])!r}")


def main(argv: list[str]):
    """Do folders that a run writes load elsewhere, and say the same there?"""
    p = common.parser_of("ecosystem", __doc__)
    p.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    for folder in p.parse_args(argv).models:
        compare(folder)
