"""Pictures of one run's models: losses by update, and what is kept against what is forgotten."""

import json
import statistics
from pathlib import Path

from model import UserError, read_json
from pipeline.settings import Settings, read_settings
from pipeline.stage import data_inputs, differences, finished_models, read_stage
from studies.drawing import BLACK, MARKS, canvas, looks, save_both, title_of
from studies.sweep import BASELINES, axes


def own_models(run: Path) -> tuple[Settings, dict[str, tuple]]:
    """A run's settings, and (method, objective) of each of its unlearned models; the method with
    its mask, or --name. One that is not of what the run now holds is left out, and named."""
    s, found = read_settings(run), {}
    inputs = data_inputs(s)
    for name in finished_models(run):
        objective = read_stage(run / name)["why"]["settings"].get("objective")
        if not objective:
            continue
        if why := "; ".join(differences(run / name, s, inputs)):
            print(f"left out: {run / name} is not of what this run now holds: {why}")
        else:
            found[name] = name.removesuffix(f"-{objective}"), objective
    if not found:
        raise UserError(f"{run} holds no unlearned model to draw; `python -m pipeline unlearn` "
                        "makes one")
    return s, found


def evaluated(folder: Path) -> bool:
    return (folder / "eval" / "stage.json").is_file()


def read_log(path: Path) -> list[dict]:
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


LOSSES = (("loss_forget", "-"), ("loss_retain", ":"))


def losses(folder: Path, about: dict):
    """Losses by update, a panel for each objective: where forgetting sets in, and what it costs."""
    _, models = own_models(folder)
    objectives, ideal = list(dict.fromkeys(x for _, x in models.values())), None
    if evaluated(folder / "retain-only"):
        ideal = statistics.mean(x["loss"] for x in read_log(
            folder / "retain-only" / "eval" / "generations.jsonl") if x["split"] == "forget")
    wide = min(4, len(objectives))
    tall = -(-len(objectives) // wide)
    figure, grid = canvas(tall, wide, (max(6.5, 3.6 * wide), 1.2 + 3 * tall), sharey=True)
    panels, look, rows = grid.flatten(), looks(x for x, _ in models.values()), []
    for name, (method, objective) in models.items():
        log = read_log(folder / name / "log.jsonl")
        rows += [(name, x["step"], *(x.get(k, "") for k, _ in LOSSES)) for x in log]
        for key, style in LOSSES:
            seen = {x["step"]: x[key] for x in log if key in x}
            panels[objectives.index(objective)].plot(
                list(seen), list(seen.values()), color=look[method][0], marker=look[method][1],
                ls=style, ms=4, markevery=max(1, len(seen) // 8),
                label=method if style == "-" else None)
    for ax, objective in zip(panels, objectives):
        if ideal:
            ax.axhline(ideal, color=BLACK, lw=1, ls="--", label="retain-only on the forget rows")
        ax.set(title=objective, xlabel="update", yscale="log")
    for ax in panels[len(objectives):]:
        ax.set_visible(False)
    for row in grid:
        row[0].set_ylabel("loss, nats a token")
    seen = {label: handle for ax in panels for handle, label in zip(
        *ax.get_legend_handles_labels())}
    figure.legend(seen.values(), seen, ncols=5, fontsize=9, loc="outside lower center",
                  title="solid: forget rows" + " (po: their refusals)" * ("po" in objectives)
                  + "; dotted: retain rows")
    figure.suptitle(f"Losses by update: {title_of(about)}", fontsize=11)
    save_both(folder, "losses", figure, ("model", "update", *(k for k, _ in LOSSES)), rows)


def kept(folder: Path, about: dict):
    """What is kept against what is forgotten, a mark for each model of a run."""
    s, models = own_models(folder)
    at = {}
    for name in (*BASELINES, *models):
        if evaluated(folder / name):
            read_stage(folder / name / "eval")
            values = read_json(folder / name / "eval" / "metrics.json")["values"]
            pair = axes({k: v for k, v in values.items() if v is not None}, s.layout)
            at |= {name: (1 - pair[0], pair[1])} if None not in pair else {}
    if not at.keys() & models:
        raise UserError(f"{folder} holds no evaluated model to draw; `python -m pipeline evaluate "
                        f"{folder}` makes it one")
    figure, ((ax,),) = canvas(1, 1, (8.5, 5))
    colours = looks(models[x][0] for x in at if x in models)
    marks = dict(zip(dict.fromkeys(models[x][1] for x in at if x in models), 9 * MARKS))
    for name, (x, y) in at.items():
        own = models.get(name)
        ax.scatter(x, y, s=60 if own else 140, alpha=0.85, zorder=3 if own else 4,
                   color=colours[own[0]][0] if own else BLACK,
                   marker=marks[own[1]] if own else {"original": "*"}.get(name, "p"))
    for name in at.keys() & set(BASELINES):
        ax.annotate(name, at[name], (0, 9), textcoords="offset points", fontsize=9, ha="center")
    low, high = ax.get_ylim()
    if "retain-only" in at:
        ax.axvline(at["retain-only"][0], color=BLACK, lw=0.8, ls="--")
        ax.axhline(at["retain-only"][1], color=BLACK, lw=0.8, ls="--")
    for name, (colour, _) in colours.items():
        ax.scatter([], [], s=60, color=colour, marker="s", label=name)
    for name, marker in marks.items():
        ax.scatter([], [], s=60, color="white", edgecolor=BLACK, marker=marker, label=name)
    ax.set(xlabel="forgetting: 1 - what is left of the forget set", xlim=(-0.06, 1.06),
           ylabel="retained utility", ylim=(low, high + 0.1 * (high - low)),
           title=f"Kept against forgotten: {title_of(about)}")
    figure.legend(*ax.get_legend_handles_labels(), fontsize=9, loc="outside right center",
                  title="colour: method\nshape: objective")
    save_both(folder, "kept", figure, ("model", "forgotten", "kept"), [
        (name, *(f"{v:.5f}" for v in pair)) for name, pair in at.items()])


def drawable(folder: Path) -> list[str]:
    """Which of the two a folder holds the data for."""
    models = [x for x in finished_models(folder) if (folder / x / "log.jsonl").is_file()
              and x not in BASELINES]
    return ["losses"] * bool(models) + ["kept"] * any(evaluated(folder / x) for x in models)
