"""What an unlearned model's folder needs beside weights and tokenizer, to be used by others: how it
was made to speak (generation_config.json) and where it comes from (README.md, the model card).

The unlearn stage writes both, the report the card again with the metrics: a stage answers for all
its files but that one.
"""

import re
from dataclasses import fields, replace
from pathlib import Path

import data
import simu
from model import read_json, write_json, write_text
from pipeline import checkpoint, objectives, slices
from pipeline.columns import COLUMNS, label, mask_line, reading, table, table_of, with_values
from pipeline.settings import Settings
from pipeline.stage import mask_name, read_stage, unlearned_name
from pipeline.tokenizers import load_tokenizer

DATA_SOURCES = {"demo": "the invented people and facts of this project's demo",
                "tofu": "TOFU (https://huggingface.co/datasets/locuslab/TOFU)",
                "lume": "LUME (https://github.com/amazon-science/lume-llm-unlearning)",
                "rows": "rows of its maker's own"}
# Of the paper's two base models, whose copies on the hub do not all say so themselves.
LICENCES = {"llama2-7b": "LLaMA2-7B is under the Llama 2 Community License "
                         "(https://ai.meta.com/llama/license/).",
            "olmo-1b": "OLMo-1B is under Apache 2.0."}
USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (x.from_pretrained(".") for x in (AutoTokenizer, AutoModelForCausalLM))
{ids}
print(tokenizer.decode(model.generate(**ids)[0], skip_special_tokens=True))
```"""


def use(template: str) -> str:
    """How to ask the model something in transformers."""
    if template == "chat":
        return USE.format(ids="""asked = [dict(role="user", content="...")]
ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True,
                                    return_tensors="pt")""")
    before, after, _ = data.TEMPLATES[template]
    return USE.format(ids=f'ids = tokenizer({f"{before}...{after}"!r}, return_tensors="pt")')


def write_generation_config(folder: Path, s: Settings):
    """How the model is made to speak, for transformers: as its maker's file says, with every token
    that ends a turn; where there is none, as our evaluation does: greedy, as many tokens [D16]."""
    config = checkpoint.read_config(folder)
    theirs = _object(s.run / "original" / "generation_config.json")
    length = dict(max_new_tokens=s.max_new_tokens) if s.max_new_tokens else dict(
        max_length=s.max_total_tokens or config.max_position_embeddings)
    if not theirs:
        length["do_sample"] = False
    elif {"max_new_tokens", "max_length"} & set(theirs):
        length = {}
    ids = {key: getattr(config, key) for key in checkpoint.TOKEN_IDS} | {
        k: v for k, v in theirs.items() if k in checkpoint.TOKEN_IDS}
    ends = list(load_tokenizer(s.run / "original").eos_ids)
    ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    write_json(folder / "generation_config.json", theirs | length | {
        k: v for k, v in ids.items() if v is not None})


def _object(path: Path) -> dict:
    """The JSON object of a file, {} where there is none."""
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def provenance(s: Settings) -> tuple[str, str]:
    """What a run's original is, and what is known of its licence: nothing is taken from a model of
    another name."""
    if s.tiny and not s.weights:
        about = "Its original was made here, from random weights, on the benchmark's text alone."
        text = ("The demo's text is under this project's MIT licence." if s.benchmark == "demo" else
                "The text it learnt has its own licence.")
        return about, "It holds no weights of anyone else. " + text
    source = read_stage(s.run / "original").get("source", {})
    base = (s.run / "original" / "config.json").resolve().parent  # linked, unless fine-tuned here
    name = source.get("repo") or Path(s.weights or s.model.removeprefix("hf:")).name
    licence = licence_field(base / "README.md")
    if licence:
        known = f"{name} says of itself: {licence}."
    elif s.model in LICENCES and not s.weights:
        known = LICENCES[s.model]
    else:
        known = f"{name} does not say here what licence it is under; find out before sharing this."
    return f"Base: {name}.", known + " The licence of the base model binds this one too."


def licence_field(readme: Path) -> str:
    """The `license:` of a model card's front matter, "" if it has none."""
    try:
        front = readme.read_text(encoding="utf-8", errors="replace").split("---")[1]
    except (OSError, IndexError):
        return ""
    found = re.search(r"^license:[ \t]*([\w.+ -]+?)[ \t]*$", front, re.MULTILINE)
    return found.group(1) if found else ""


def write_card(folder: Path, s: Settings, used: dict, found: list[dict] = (), verdict: str = ""):
    """README.md of a model unlearned in run s with the settings `used`; found: evaluations of it
    and of its original, as report.find_evaluations gives them. verdict: of own rows, as text."""
    kind, method = s.layout, simu.METHODS[used["method"]]
    made = replace(s, **{f.name: used[f.name] for f in fields(objectives.Recipe) if f.name in used},
                   name=used.get("name", ""))
    about, licence = provenance(s)
    metrics = "Not evaluated yet: `python -m pipeline evaluate` and `report`."
    if found:
        columns = with_values(COLUMNS[kind], found)
        metrics = table_of(columns, found) + "\n\n" + reading(found[0]["metrics"])
    if verdict:
        metrics = f"```\n{verdict}\n```\n\n{metrics}"
    constants = [["optimiser", method.optimiser]]
    step1 = (simu.Attribution, simu.Masking) if method.masked else ()
    for part in (objectives.Unlearning, *step1):
        constants += [[f.name, used[f.name]] for f in fields(part)
                      if f.name in used and [f.name, used[f.name]] not in constants]
    sliced = [[f.name, used[f.name]] for f in fields(slices.Slice) if f.name in used
              and (kind != "rows" or f.name in ("seed", "template"))]  # others are of benchmarks
    title = (f"{s.label}, rows of its maker's own unlearned" if kind == "rows" else
             f"{s.benchmark} {s.label}, unlearned by {label(unlearned_name(made))}")
    parts = ["---\nlibrary_name: transformers\ntags: [unlearning]\n---",
             f"# {title}",
             f"{about} It was made to forget a part of {DATA_SOURCES[s.benchmark]}, and to keep "
             "the rest, by SIMU's reference implementation (arXiv 2510.07822). Forgetting is "
             "measured below, not guaranteed.",
             "## Use", use(s.template),
             "## Metrics", metrics,
             "## Recipe", table(["Setting", "Value"], constants),
             "## Data", table(["Setting", "Value"], sliced),
             *(("## Critical neurons", mask_line(s.run / mask_name(made), s))
               if method.masked else ()),
             "## Licence", licence]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def write_cards(s: Settings, found: list[dict], unlearned: list[str], verdict: str = ""):
    """Write the cards of a run's evaluated unlearned models again, now with metrics."""
    for name in unlearned:
        used = read_stage(s.run / name)["settings"]
        if used["method"] in simu.METHODS:  # else of a fork whose method is gone
            shown = [e for e in found if e["name"] in ("original", name)]
            write_card(s.run / name, s, used, shown, verdict)
