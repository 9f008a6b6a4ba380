"""What a run on a user's own rows will be, told before anything of it starts: rows, tokens, what
does not fit, updates, memory, files, and the time that each stage will take on this machine, from
one measured pass. What can be refused in seconds is refused here."""

import shutil
from dataclasses import replace
from pathlib import Path

import data
import eval as evaluation
from data import Encoded
from model import Config, UserError
from pipeline import checkpoint, hub, pace, plan, slices
from pipeline.levels import need_reference
from pipeline.plan import GB, fit_memory
from pipeline.settings import Settings, load_benchmark, placement
from pipeline.tokenizers import load_tokenizer


def fitted(s: Settings, rows: list[Encoded]) -> Settings:
    """On a user's own rows: the same settings with passes that hold the longest row."""
    if s.layout != "rows":
        return s
    longest = max(len(r.ids) for r in rows)
    passes = {name: max(getattr(s, name), longest) for name in ("micro_tokens", "learn_tokens")
              if getattr(s, name)}  # 0: the memory decides, and has room for any row that fits
    return replace(s, **passes, eval_tokens=max(s.eval_tokens, longest),
                   attribution_tokens=max(s.attribution_tokens, longest * max(1, s.steps - 1)))


def plan_command(s: Settings):
    """Print what each stage of a run needs, whether it fits the device at hand, and how long it
    takes; of rows of your own in a model that is here, of these rows alone."""
    folder = Path(hub.given_model(s))
    if s.layout == "rows" and (folder / "config.json").is_file():
        outlook(s, folder, load_benchmark(s))
    else:
        plan.plan_command(s)


def outlook(s: Settings, folder: Path, bench: slices.Benchmark):
    """Print what will be. folder: the model's, as it is given."""
    need_reference(s, bench)
    tokenizer, config = load_tokenizer(folder), checkpoint.read_config(folder)
    rows = {name: data.encode_for(config, some, tokenizer, s.template) for name, some in (
        ("to forget", bench.forget), ("to keep", bench.retain),
        ("never seen", [*bench.nonmembers, *bench.level_rows])) if some}
    for name, some in rows.items():
        sizes = [len(r.ids) for r in some]
        print(f"rows {name}: {len(some):,}, {sum(sizes):,} tokens, the longest {max(sizes):,}")
    every = [r for some in rows.values() for r in some]
    s = fitted(s, every)
    updates = max(1, s.epochs * len(bench.forget) // s.batch)
    asked = len(bench.forget) + len(bench.retain_eval)
    print(f"template {s.template}; at most {updates} updates of {s.batch} + {s.batch} rows; "
          f"{asked} rows are asked before and after"
          + (f" (--judge {s.judge}: a sample of those to keep)"
             if len(bench.retain_eval) < len(bench.retain) else ""))
    stages = [("unlearn", s.method)] + [("learn", None)] * s.teach
    peak = max(fit_memory(s, config, *stage, rows=every)[1]["predicted_bytes"] for stage in stages)
    rate, size = measured(s, folder, rows["to forget"])
    there = next(p for p in (s.run, *s.run.absolute().parents) if p.is_dir())
    made = size * (2 if s.teach else 1)
    print(f"memory: {peak / GB:.1f} GB at most; files: {made / GB:.2f} GB in {s.run.name}, "
          f"{shutil.disk_usage(there).free / GB:.0f} GB free")
    told = ", ".join(f"{name} {pace.in_words(t)}"
                     for name, t in times(s, config, rows, rate, updates, asked))
    print(f"time, roughly, at {rate.tokens:,.0f} tokens a second in a pass that was measured: "
          + told, flush=True)


def measured(s: Settings, folder: Path, rows: list[Encoded]) -> tuple[pace.Pace, int]:
    """The pace of the model in a folder, and the bytes of its weights."""
    model = checkpoint.load_model(folder, **placement(s))
    some = evaluation.spread(rows, pace.MEASURED)
    taken = pace.pass_seconds(model, some, s)
    return (pace.Pace(sum(len(r.ids) for r in some) / taken),
            sum(p.nbytes for p in model.parameters()))


def times(s: Settings, config: Config, rows: dict, rate: pace.Pace, updates: int, asked: int):
    """(stage, seconds)."""
    given = [pace.rows_of(rows.get(name, [])) for name in ("to forget", "to keep")]
    stages = (("teach", "learn"),) * s.teach + (("attribute",) * 2, ("unlearn",) * 2,
                                                ("evaluate twice", "evaluate"))
    for name, stage in stages:
        yield name, pace.seconds(s, config, rate, stage, *given, asked=2 * asked, updates=updates)
