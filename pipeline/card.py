"""What an unlearned model's folder needs beside weights and tokenizer, to be used by others: how it
was made to speak (generation_config.json) and where it comes from (README.md, the model card).

The unlearn stage writes both, the report the card again with the metrics: a stage answers for all
its files but that one. The card leaves with the model, so no row's text and no path stands in it.
"""

import re
from dataclasses import fields, replace
from pathlib import Path

import simu
from model import read_json, write_json, write_text
from pipeline import checkpoint, objectives, slices
from pipeline.columns import MAIN, label, reading, table, table_of
from pipeline.settings import Settings
from pipeline.stage import mask_name, read_stage
from pipeline.tokenizers import load_tokenizer

DATA_SOURCES = {"demo": "the invented people and facts of this project's demo",
                "tofu": "TOFU (https://huggingface.co/datasets/locuslab/TOFU)",
                "lume": "LUME (https://github.com/amazon-science/lume-llm-unlearning)",
                "rows": "rows of its maker's own"}
# Of the paper's two base models, whose copies on the hub do not all say so themselves.
LICENCES = {"llama2-7b": "LLaMA2-7B is under the Llama 2 Community License "
                         "(https://ai.meta.com/llama/license/).",
            "olmo-1b": "OLMo-1B is under Apache 2.0."}


def write_generation_config(folder: Path, s: Settings):
    """How the model is made to speak, for transformers: as its maker's file says, with every token
    that ends a turn; where there is none, as our evaluation does: greedy, as many tokens [D16]."""
    config = checkpoint.read_config(folder)
    path = s.run / "original" / "generation_config.json"
    theirs = read_json(path) if path.is_file() else dict(do_sample=False)
    if not {"max_new_tokens", "max_length"} & set(theirs):
        theirs |= dict(max_new_tokens=s.max_new_tokens) if s.max_new_tokens else dict(
            max_length=s.max_total_tokens or config.max_position_embeddings)
    ids = {key: theirs.get(key, getattr(config, key)) for key in checkpoint.TOKEN_IDS}
    ends = list(load_tokenizer(s.run / "original").eos_ids)
    ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    known = {key: value for key, value in ids.items() if value is not None}
    write_json(folder / "generation_config.json", theirs | known)


def provenance(s: Settings) -> tuple[str, str]:
    """What a run's original is and its licence, which no model of another name tells."""
    if s.tiny and not s.weights:
        return ("Its original was made here, from random weights, on the benchmark's text alone.",
                "It holds no weights of anyone else; the text it learnt has its own licence.")
    source = read_stage(s.run / "original")["notes"].get("source", {})
    name = source.get("repo") or Path(s.weights or s.model.removeprefix("hf:")).name
    # An original that was not taught here is linked, and its maker's card stands beside what the
    # link names. The hub's cache links on from there, to where files have no names.
    config = s.run / "original" / "config.json"
    readme = config.parent / (config.readlink() if config.is_symlink() else config)
    readme = readme.with_name("README.md")
    front = readme.read_text("utf-8", "replace").split("---")[1:2] if readme.is_file() else ""
    licence = re.search(r"^license:[ \t]*([\w.+ -]+?)[ \t]*$", "".join(front), re.MULTILINE)
    if licence:
        text = f"{name} says of itself: {licence[1]}."
    elif s.model in LICENCES and not s.weights:
        text = LICENCES[s.model]
    else:
        text = f"{name} does not say here what licence it is under; find out before sharing this."
    return f"Base: {name}.", f"{text} The licence of the base model binds this one too."


def critical_neurons(mask: Path) -> str:
    """What a mask's folder holds."""
    stage = read_stage(mask)["notes"]
    per_layer = " ".join(map(str, stage["critical_per_layer"]))
    return (f"{stage['critical']} of {stage['total']}: {stage['critical'] / stage['total']:.2%}; "
            f"by layer {per_layer}")


def recipe_of(values: dict) -> dict:
    """Of a stage's settings, those that an unlearned model was made with."""
    method = simu.METHODS[values["method"]]
    parts = [objectives.Unlearning, *((simu.Attribution, simu.Masking) if method.masked else ())]
    names = dict.fromkeys(f.name for part in parts for f in fields(part))
    return dict(optimiser=method.optimiser) | {k: values[k] for k in names if k in values}


def write_card(folder: Path, name: str, s: Settings, values: dict, evaluations: list[dict] = (),
               verdict_text: str = ""):
    """README.md of an unlearned model. evaluations: read_evaluation's of its original and of it."""
    about, licence = provenance(s)
    metrics = "Not evaluated yet: `python -m pipeline evaluate` and `report`."
    if evaluations:
        lines = [(e["label"], e["metrics"]["values"]) for e in evaluations]
        metrics = f"{table_of(MAIN[s.layout], lines)}\n\n{reading(evaluations[0]['metrics'])}"
    cut = ["template"] if s.layout == "rows" else [f.name for f in fields(slices.Slice)]
    settings = recipe_of(values) | {k: values[k] for k in cut}
    parts = ["---\nlibrary_name: transformers\ntags: [unlearning]\n---",
             f"# {s.benchmark} {s.label}, unlearned by {label(name)}",
             f"{about} It was made to forget a part of {DATA_SOURCES[s.benchmark]}, and to keep "
             "the rest, by SIMU's reference implementation (arXiv 2510.07822). Forgetting is "
             "measured below, not guaranteed.", "## Metrics", verdict_text, metrics,
             "## Settings", table(["Setting", "Value"], [[k, x] for k, x in settings.items()])]
    if simu.METHODS[values["method"]].masked:
        mask = mask_name(replace(s, mask=values["mask"], neurons=values["neurons"]))
        parts += ["## Critical neurons", critical_neurons(s.run / mask)]
    parts += ["## Licence", licence]
    write_text(folder / "README.md", "\n\n".join(p for p in parts if p) + "\n")
