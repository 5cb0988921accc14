"""Tables of runs: scores by method and seed, their means, and differences with 95 % intervals."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cl_dist.metrics import DEFINITIONS

RESULTS = Path("tests/results")
COLUMNS = {
    name: DEFINITIONS[name].word for name in ("cl/avg_acc", "cl/f1_macro", "cl/forgetting_max", "cl/bwt", "cl/fwt_one")
}


def kept(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table needs of a summary."""
    seconds = sum(stage["seconds"] for stage in summary["stages"])
    fields = ("run", "method", "seed", "model", "cluster", "versions", "metrics", "matrix")
    tasks = [{key: task[key] for key in ("id", "rows", "majority")} for task in summary["tasks"]]
    model = Path(summary["model"]).name if summary["model"].startswith(("/", "~", ".")) else summary["model"]
    return {key: summary[key] for key in fields} | {"model": model, "tasks": tasks, "seconds": round(seconds, 1)}


def keep(name: str, folders: list[Path]) -> Path:
    """Store the summaries of run folders, and of the baselines inside them."""
    found = [
        kept(json.loads(path.read_text(encoding="utf8"))) | {"folder": folder.name}
        for folder in folders
        for path in (folder / "metrics/summary.json", *sorted(folder.glob("baselines/*/metrics/summary.json")))
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    return path


def table(summaries: list[dict[str, Any]]) -> str:
    """Return the Markdown table of some runs: a row per run, and each method's mean over runs where it has several.

    Runs that differ in settings of one method, as baselines of one run, go by their names instead.
    """
    same = [(summary.get("folder"), summary["seed"], summary["method"]) for summary in summaries]
    group = "method" if len(set(same)) == len(same) else "run"
    orders = len({tuple(task["id"] for task in summary["tasks"]) for summary in summaries})
    which = "seed" if orders == 1 else "folder"
    heading = " | ".join([group, "seed" if orders == 1 else "run", *COLUMNS.values(), "seconds"])
    lines = [f"| {heading} |", "| --- " * (len(COLUMNS) + 3) + "|"]
    groups = {
        name: sorted((s for s in summaries if s[group] == name), key=lambda s: str(s[which]))
        for name in dict.fromkeys(summary[group] for summary in summaries)
    }
    for method, runs in sorted(groups.items()):
        values = [[run["metrics"].get(name, {}).get("value") for name in COLUMNS] for run in runs]
        seconds = [run["seconds"] for run in runs]
        labels = [str(run[which]) for run in runs]
        if len(runs) > 1:
            values.append([None if None in column else mean(column) for column in zip(*values, strict=True)])
            seconds.append(mean(seconds))
            labels.append(f"mean of {len(runs)}")
        for label, row, taken in zip(labels, values, seconds, strict=True):
            cells = ["-" if value is None else f"{value:.4f}" for value in row]
            lines.append(f"| {method} | {label} | {' | '.join(cells)} | {taken:.0f} |")
    first = summaries[0]
    chance = sum(task["majority"] for task in first["tasks"]) / len(first["tasks"])
    rows = first["tasks"][0]["rows"]
    tasks = ", ".join(task["id"] for task in first["tasks"])
    order = f"Tasks in this order: {tasks}" if orders == 1 else f"{len(first['tasks'])} tasks in {orders} orders"
    lines.append("")
    caption = (
        f"{order}. Always answering the commonest label: {chance:.4f}. "
        f"First task: {rows['train']} train, {rows['dev']} dev, {rows['test']} test rows. "
        f"{first['cluster']['workers']} Ray workers, ZeRO-{first['cluster']['zero_stage']}, "
        f"torch {first['versions']['torch']}; seconds are the sum over the stages."
    )
    lines.append(caption)
    compared = differences(groups, which)
    return "\n".join([*lines, *(["", compared] if compared else [])]) + "\n"


def differences(groups: Mapping[str, list[dict[str, Any]]], which: str) -> str:
    """Return a sentence with the first group's differences from each other group, with 95 % intervals; '' for none.

    A task's difference is the mean over the runs that both groups have: the same seed, or the same order of tasks.
    The interval is Student's over the tasks' differences, so it covers the choice of tasks and of test rows.
    """
    name, *others = groups
    found, tasks, pairs = [], 0, 0
    for other in others:
        ends = [{str(run[which]): _ends(run) for run in groups[each]} for each in (name, other)]
        parts = []
        for key, column in (("accuracy", "accuracy"), ("f1_macro", "macro F1")):
            points: dict[str, list[float]] = {}
            for run in ends[0].keys() & ends[1].keys():
                ours, theirs = (end[run].get(key, {}) for end in ends)
                for task in ours.keys() & theirs.keys():
                    points.setdefault(task, []).append(100 * (ours[task] - theirs[task]))
            if len(points) > 1:
                values = [mean(each) for each in points.values()]
                half = quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
                parts.append(f"{column} {mean(values):+.1f} ± {half:.1f}")
                tasks, pairs = len(values), len(next(iter(points.values())))
        found += [f"{name} minus {other}: {', '.join(parts)}"] if parts else []
    if not found:
        return ""
    runs = "one pair of runs" if pairs == 1 else f"{pairs} pairs of runs"
    heading = f"Points after the last task, with 95 % intervals over the {tasks} tasks ({runs})"
    return f"{heading}. {'; '.join(found)}."


def _ends(run: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return each task's scores after the last task, by kind of score."""
    names = [task["id"] for task in run["tasks"]]
    return {
        kind: {task: score for task, score in zip(names, rows[-1], strict=True) if score is not None}
        for kind, rows in run["matrix"].items()
    }


def quantile(freedom: int) -> float:
    """Return the t below which Student's distribution has 97.5 % of its mass, by Simpson's rule and bisection."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def above_zero(t: float) -> float:
        steps = 2000
        density = [scale * (1 + (t * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
        return t / steps / 3 * (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]))

    low, high = 1.9, 13.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if above_zero(middle) < 0.475 else (low, middle)
    return low


def means(summaries: list[dict[str, Any]]) -> str:
    """Return a short Markdown table of some runs: the mean of each method over its runs."""
    lines = [f"| method | runs | {' | '.join(COLUMNS.values())} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for method in sorted({summary["method"] for summary in summaries}):
        runs = [summary["metrics"] for summary in summaries if summary["method"] == method]
        values = [[run.get(name, {}).get("value") for run in runs] for name in COLUMNS]
        cells = ["-" if None in column else f"{mean(column):.3f}" for column in values]
        lines.append(f"| `{method}` | {len(runs)} | {' | '.join(cells)} |")
    chance = mean(task["majority"] for task in summaries[0]["tasks"])
    lines.append(f"| always the commonest label | | {chance:.3f} |{' |' * (len(COLUMNS) - 1)}")
    return "\n".join(lines) + "\n"
