"""What an unlearned model's folder needs beside weights and tokenizer, to be used by others: how it
was made to speak (generation_config.json) and where it comes from (README.md, the model card).

`simu.py unlearn` writes both, `eval.py report` the card again with the metrics: a stage answers for
all its files but that one.
"""

from dataclasses import replace
from pathlib import Path

import data
import report
import stage
from model import TOKEN_IDS, Config
from stage import Settings

SOURCES = {"demo": "the invented people and facts of this project's demo/",
           "tofu": "TOFU (https://huggingface.co/datasets/locuslab/TOFU)",
           "lume": "LUME (https://github.com/amazon-science/lume-llm-unlearning)"}
LICENCES = {"llama2-7b": "LLaMA2-7B is under the Llama 2 Community License "
                         "(https://ai.meta.com/llama/license/)",
            "olmo-1b": "OLMo-1B is under Apache 2.0"}
MADE_HERE = "Its original was made here, from random weights, on the benchmark's text alone."
DATA = {"tofu": ("forget_split", "retain_split", "rows_per_author"), "lume": ("lume_fraction",)}
SIMU_ONLY = ("steps", "threshold", "path", "mask")
USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (x.from_pretrained(".") for x in (AutoTokenizer, AutoModelForCausalLM))
ids = tokenizer({prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids)[0], skip_special_tokens=True))
```"""


def write_generation_config(folder: Path, s: Settings):
    """How our evaluation generates, for transformers: greedy, one eos, as many tokens [D16]."""
    config, eos_id = Config.from_dir(folder), data.load_tokenizer(folder).eos_id
    length = dict(max_new_tokens=s.max_new_tokens) if s.max_new_tokens else dict(
        max_length=s.max_total_tokens or config.max_position_embeddings)
    ids = {key: getattr(config, key) for key in TOKEN_IDS} | dict(eos_token_id=eos_id)
    stage.write_json(folder / "generation_config.json", dict(do_sample=False, **length) | {
        k: v for k, v in ids.items() if v is not None})


def write_card(folder: Path, s: Settings, recipe: dict, found: list[dict] = ()):
    """README.md of a model unlearned in run s with the settings in `recipe`; found: evaluations of
    it and of its original, as report.find_evaluations gives them."""
    kind = "lume" if s.benchmark == "lume" else "tofu"
    before, after, _ = data.TEMPLATES[s.template]
    simu = recipe["method"] == "simu"
    made = replace(s, **{k: recipe[k] for k in ("method", "mask", "objective")})
    name = stage.unlearned_name(made)
    names = (*report.RECIPE, "seed", "template") + SIMU_ONLY * simu
    sliced = {k: recipe[k] for k in (*DATA[kind], "forget_groups", "retain_groups")}
    base = f"Base: {Path(s.weights).name}." if s.weights else MADE_HERE
    licence = LICENCES.get(s.model, "The demo is under this project's MIT licence")
    metrics = (report._table_of(report.COLUMNS[kind], found) + "\n\n" + report.READING[kind]
               if found else "Not evaluated yet: `python eval.py evaluate` and `report`.")
    parts = ["---\nlibrary_name: transformers\ntags: [unlearning]\n---",
             f"# {s.benchmark} {s.model}, unlearned by {report.LABELS.get(name, name)}",
             f"{base} It was made to forget a part of {SOURCES[s.benchmark]}, and to keep the "
             "rest, by SIMU's reference implementation (arXiv 2510.07822). Forgetting is measured "
             "below, not guaranteed.",
             "## Use", USE.format(prompt=f"{before}...{after}"),
             "## Metrics", metrics,
             "## Recipe", report.table(["Setting", "Value"], [[k, recipe[k]] for k in names]),
             "## Data", report.table(["Setting", "Value"], list(sliced.items())),
             *(("## Critical neurons", report.mask_line(s.run / stage.mask_name(made), s))
               if simu else ()),
             "## Licence", f"{licence}. The licence of the base model binds this one too: if "
             "another base was given than this name says, it is that one's."]
    stage.write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def write_cards(run: Path, s: Settings, found: list[dict]):
    """Write the cards of a run's evaluated unlearned models again, now with metrics."""
    for e in report.unlearned(found):
        recipe = stage.read_stage(run / e["name"])["settings"]
        shown = [x for x in found if x["name"] in ("original", e["name"])]
        write_card(run / e["name"], s, recipe, shown)
