"""README tables, written from the summaries of runs: no figure in it is typed in.

python -m launcher.tables keep NAME RUN...   store the summaries of runs under tests/results/NAME.json
python -m launcher.tables write              fill the marked blocks of the pages from tests/results/*.json
"""

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cl_dist.planning.scaling import RANKS, cells

RESULTS, README = Path("tests/results"), Path("README.md")
PAGES = (README, Path("cluster_configs/SCALING.md"), Path("cluster_configs/GPU.md"))
"""Where marked blocks may be."""
BLOCK = r"(<!-- table: {name} -->\n).*?(<!-- end -->)"
COLUMNS = {
    "cl/avg_acc": "accuracy",
    "cl/f1_macro": "macro F1",
    "cl/forgetting_max": "forgetting",
    "cl/bwt": "backward transfer",
    "cl/fwt_one": "transfer vs. own model",
}
TWO_WORKERS = 1.7
"""The least speed-up that DESIGN asks of two workers."""


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
    lines.append(
        f"{order}. Always answering the commonest label: {chance:.4f}. "
        f"First task: {rows['train']} train, {rows['dev']} dev, {rows['test']} test rows. "
        f"{first['cluster']['workers']} Ray workers, ZeRO-{first['cluster']['zero_stage']}, "
        f"torch {first['versions']['torch']}; seconds are the stages' own."
    )
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


def parity(data: Mapping[str, Any]) -> str:
    """Return the Markdown table of `tests.parity`: a row per method and gang, a column per ZeRO stage."""
    cells = data["cells"]
    stages = sorted({cell["zero_stage"] for cell in cells})
    head = " | ".join(f"ZeRO-{stage}" for stage in stages)
    lines = [f"| method | workers | {head} | metrics | mask bits |", "| --- " * (len(stages) + 4) + "|"]
    for method, workers in dict.fromkeys((cell["method"], cell["workers"]) for cell in cells):
        own = [cell for cell in cells if (cell["method"], cell["workers"]) == (method, workers)]
        values = []
        for stage in stages:
            here = [cell for cell in own if cell["zero_stage"] == stage]
            refused = [cell["refused"] for cell in here if "refused" in cell]
            values.append(refused[0] if refused else f"{max(cell['weights'] for cell in here):.0e}")
        measured = [cell for cell in own if "refused" not in cell]
        metrics = f"{max((cell['metrics'] for cell in measured), default=0):.0e}"
        bits = max((cell["mask_bits"] for cell in measured), default=0)
        lines.append(f"| {method} | {workers} | {' | '.join(values)} | {metrics} | {bits} |")
    lines.append("")
    lines.append(
        f"Largest absolute difference of any weight from one worker with plain torch after {data['steps']} steps, over "
        f"accumulation 1 and 2; largest relative difference of any loss or accuracy; mask bits that differ. "
        f"{data['rows']} rows in global batches of {data['global_batch']}, the second of two tasks, float32, models "
        "of two layers."
    )
    return "\n".join([*lines, *_pretrained(data)]) + "\n"


def _pretrained(data: Mapping[str, Any]) -> list[str]:
    """Return the lines about the pretrained model of `tests.parity`; none where it was not measured."""
    if not data.get("pretrained"):
        return []
    head = "| MiniLM-L6 | workers | largest weight | mean weight | mask bits | metrics | predictions | accuracy |"
    lines = ["", head, "| --- " * 8 + "|"]
    for way in data["pretrained"]:
        steps, (accuracy, reference) = way["steps"], way["accuracy"]
        numbers = (
            f"{way['weights']:.0e} | {way['mean']:.0e} | {way['mask_bits']} of {way['masks']:,} | {way['metrics']:.0e}"
        )
        lines.append(f"| {way['what']} | {way['workers']} | {numbers} | {way['answers']} | {accuracy:.3f} |")
    lines += [
        "",
        f"CTR in float32 on the second of two of the demo's tasks, 200 train rows, {steps} steps, "
        "against one worker with plain torch that takes all rows of a step at once: largest and mean difference "
        "of the trained weights, mask bits, largest relative difference of any loss or accuracy, and predictions that "
        f"differ on 200 test rows, where the accuracy of that one worker is {reference:.3f}.",
    ]
    return lines


def chaos(data: Mapping[str, Any]) -> str:
    """Return the Markdown table of `tests.chaos`: a row per method."""
    lines = ["| run of two tasks | runs | kills | stages they hit | ended byte-equal |", "| --- " * 5 + "|"]
    lines += [
        f"| {row['method']} | {row['runs']} | {row['kills']} | {', '.join(row['stages'])} | {row['equal']} |"
        for row in data["rows"]
    ]
    lines += [
        "",
        f"Points drawn with seed {data['seed']}; every second optimizer step is saved, in one process with torch.",
    ]
    return "\n".join(lines) + "\n"


def memory(data: Mapping[str, Any]) -> str:
    """Return the Markdown table of `tests.memory`: a row per stage and gang, a column per micro-batch."""
    head = "| stage | workers | engine | whole share at once | one row at once |"
    lines = [head, "| --- " * 5 + "|"]
    cells: dict[tuple[str, int, int | None], dict[str, str]] = {}
    for line in data["lines"]:
        sizes = [line[key] / 2**20 for key in ("told", "measured")]
        text = f"{sizes[0]:.1f} / {sizes[1]:.1f} ({sizes[0] / sizes[1]:.3f})"
        cells.setdefault((line["what"], line["workers"], line["zero_stage"]), {})[str(line["micro_batch"])] = text
    for (what, workers, stage), found in cells.items():
        engine = "torch" if stage is None else f"ZeRO-{stage}"
        whole = found.get("auto") or found.get("None", "-")
        lines.append(f"| {what} | {workers} | {engine} | {whole} | {found.get('1', '-')} |")
    lines.append("")
    lines.append(
        "MiB that the plan tells / most MiB of live tensors that were measured on a rank (their ratio), on CPUs. Rows "
        f"of {data['length']} tokens, {data['global_batch']} a step, 4 layers of width 192, float32, torch "
        f"{data['torch']}."
    )
    return "\n".join(lines) + "\n"


def scaling(data: Mapping[str, Any]) -> str:
    """Return the Markdown tables of `tests.scaling`: what was measured, then what is on paper."""
    lines = ["| scaling | workers | global batch | s a step | tokens/s | times one worker |", "| --- " * 6 + "|"]
    first: dict[str, float] = {}
    for row in data["measured"]:
        times = row["tokens_per_s"] / first.setdefault(row["how"], row["tokens_per_s"])
        numbers = f"{row['step_s']:.3f} | {row['tokens_per_s']:.0f} | {times:.2f}"
        lines.append(f"| {row['how']} | {row['workers']} | {row['global_batch']} | {numbers} |")
    measured = f"{data['cores']} cores, one thread a worker, ZeRO-2, torch {data['torch']}."
    lines = [*lines, "", measured, ""] if data["measured"] else ["Not measured yet: `make scaling`.", ""]
    lines += ["| on paper | GPUs | rows a rank | computing s | links s | tokens/s | |", "| --- " * 7 + "|"]
    for each in data["paper"]:
        for step in each["steps"]:
            numbers = f"{step['compute_s']:.3g} | {step['link_s']:.3g} | {step['tokens_per_s']:,.0f}"
            lines.append(f"| {each['what']} | {step['ranks']} | {step['rows']} | {numbers} | {step['note']} |")
    rows = data["rows"]
    lines += [
        "",
        f"{data['machine']}; {rows['global_batch']} rows of {rows['tokens']} tokens a step, micro_batch: "
        f"{rows['micro_batch']}, activations computed again.",
        "",
        f"| seconds of a stage on paper | rows | {' | '.join(f'{size} GPUs' for size in RANKS)} |",
        "| --- " * (2 + len(RANKS)) + "|",
    ]
    for each in data["paper"]:
        for line in each["stages"]:
            stage = line["stage"].partition("/")[2]
            lines.append(f"| {each['what']}: {stage} | {line['rows']} | {' | '.join(cells(line['seconds']))} |")
    lines += [
        "",
        f"The second of two tasks of {rows['train']:,} train and {rows['test']:,} test rows, {rows['epochs']} epochs; "
        "every row and sample as long as may be.",
    ]
    return "\n".join(lines) + "\n"


def speed(data: Mapping[str, Any], scaled: Mapping[str, Any] | None = None) -> str:
    """Return the Markdown table of `tests/benchmarks`, a row per figure, and of `tests.scaling`'s two workers."""
    lines = ["| what | measured | allowed |", "| --- " * 3 + "|"]
    lines += [f"| {row['what']} | {row['text']} | {row['budget'] or '-'} |" for row in data["figures"]]
    rates = {
        row["workers"]: row["tokens_per_s"] for row in (scaled or {}).get("measured", []) if row["how"] == "strong"
    }
    if {1, 2} <= rates.keys():
        times = rates[2] / rates[1]
        missed = "" if times >= TWO_WORKERS else "; missed"
        what = "training with two workers, against one"
        lines.append(f"| {what} | {times:.2f}x as fast | at least {TWO_WORKERS:g}{missed} |")
    lines += ["", f"{data['cores']} cores, torch {data['torch']}."]
    return "\n".join(lines) + "\n"


def gpu(data: Mapping[str, Any]) -> str:
    """Return the Markdown table of `tests.gpu_check`: a row per figure."""
    marks = {True: "yes", False: "no", None: ""}
    lines = ["| what | measured | goal | reached |", "| --- " * 4 + "|"]
    lines += [f"| {row['what']} | {row['text']} | {row['goal']} | {marks[row['ok']]} |" for row in data["lines"]]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines += ["", f"{data['gpus']} x {data['device']}, {data['cores']} CPU cores, {versions}, bfloat16."]
    return "\n".join(lines) + "\n"


BLOCKS = {"gpu": gpu, "parity": parity, "chaos": chaos, "memory": memory, "scaling": scaling}
"""How results are shown that are no summaries of runs."""


def filled(readme: str) -> str:
    """Return a page with every marked block written from its results file."""
    results = {path.stem: json.loads(path.read_text(encoding="utf8")) for path in sorted(RESULTS.glob("*.json"))}
    for name, data in results.items():
        block = speed(data, results.get("scaling")) if name == "speed" else BLOCKS.get(name, table)(data)

        def put(match: re.Match[str], block: str = block) -> str:
            return match[1] + block + match[2]

        readme = re.sub(BLOCK.format(name=re.escape(name)), put, readme, flags=re.DOTALL)
    return readme


def main() -> None:
    """Store results or write the README."""
    match sys.argv[1:]:
        case ["keep", name, *folders] if folders:
            keep(name, [Path(folder) for folder in folders])
        case ["write"]:
            for page in PAGES:
                page.write_text(filled(page.read_text(encoding="utf8")), encoding="utf8")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
