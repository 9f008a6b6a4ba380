"""The learning-rate grid behind the tiny recipes: every method at every rate, judged alike.

    python benchmarks/grid.py demo tiny-llama   # after the stages original, attribute and mask

For each method the rate kept is the one with the highest utility (mean of the ROUGE-L columns other
than forget, as the paper's Table 1 counts retain and world facts) among those that forget:
ROUGE-L on the forget set at most 0.05 above that of the retain-only model, which never saw it.
"""

import sys
from argparse import Namespace

from common import describe  # and it lets the core be imported

import data
import eval as evaluation
import simu
from model import Transformer, read_tensors
from pipeline.reading import generate
from pipeline import settings
from pipeline.stage import mask_name, run_cli
from pipeline.stages import encoded_rows

RATES = (2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
SLACK = 0.05
RETAIN = 100  # rows at most


def rouge(model, tokenizer, examples, s) -> float:
    """Mean ROUGE-L recall of greedy answers."""
    prompts = [data.encode_prompt(e.question, tokenizer, s.template) for e in examples]
    new = generate(model, prompts, eos_id=tokenizer.eos_id,
                   max_new_tokens=s.max_new_tokens or None,
                   max_total_tokens=s.max_total_tokens or None)
    return evaluation.mean(evaluation.rouge_l(e.answer, tokenizer.decode(ids)).recall
                           for e, ids in zip(examples, new))


def show(*cells):
    print("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else x for x in cells) + " |",
          flush=True)


def main(argv):
    parser = settings.Parser(prog="grid.py", description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=settings.BENCHMARKS)
    parser.add_argument("model")
    parser.add_argument("--methods", nargs="+", choices=simu.METHODS, default=list(simu.METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    settings.add_options(parser, skip=("benchmark", "model", "method", "lr"))
    given = vars(parser.parse_args(argv))
    methods, rates = given.pop("methods"), given.pop("rates")
    s = settings.resolve(given)
    (bench, rows), tokenizer = encoded_rows(s), data.load_tokenizer(s.run / "original")
    mask, = read_tensors(s.run / mask_name(s) / "mask.safetensors", ("mask",))
    sets = dict(forget=bench.forget, retain=bench.retain_eval[:RETAIN], world=bench.world_facts)
    sets = {k: v for k, v in sets.items() if v}
    describe(Namespace(device="cpu", dtype="float32"))
    print(f"critical neurons: {int(mask.sum())} of {mask.numel()}; "
          f"seed {s.seed}; {s.epochs} epochs")
    show("model", "lr", *(f"ROUGE-L {k}" for k in sets))
    show(*["---"] * (2 + len(sets)))
    judged = {}
    for folder in ("retain-only", "original"):
        model = Transformer.from_pretrained(s.run / folder)
        judged[folder] = [rouge(model, tokenizer, e, s) for e in sets.values()]
        show(folder, "", *judged[folder])
    for method in methods:
        kept = None
        for lr in rates:
            own = settings.resolve(given | dict(method=method, lr=lr))
            model = Transformer.from_pretrained(s.run / "original")
            simu.unlearn(model, rows["forget"], rows["retain"], mask, own)
            got = [rouge(model, tokenizer, e, s) for e in sets.values()]
            show(method, f"{lr:g}", *got)
            utility = evaluation.mean(got[1:])
            if got[0] <= judged["retain-only"][0] + SLACK and (not kept or utility > kept[1]):
                kept = (lr, utility)
        best = f"{kept[0]:g} (utility {kept[1]:.3f})" if kept else "none forgets"
        print(f"kept for {method}: {best}", flush=True)


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
