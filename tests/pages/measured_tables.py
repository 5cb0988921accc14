"""Tables of measurements: parity, chaos, memory, scaling, speed and the GPU check."""

from collections.abc import Mapping
from typing import Any

from cl_dist.planning.scaling import RANKS, cells

TWO_WORKERS = 1.7
"""Smallest speed-up that the design asks of two workers."""


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
    lines = ["| run of two tasks | runs | kills | stages that were killed | ended byte-equal |", "| --- " * 5 + "|"]
    lines += [
        f"| {row['method']} | {row['runs']} | {row['kills']} | {', '.join(row['stages'])} | {row['equal']} |"
        for row in data["rows"]
    ]
    lines += [
        "",
        f"Kill points drawn with seed {data['seed']}; a checkpoint every two optimizer steps; one process with torch.",
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
        "Estimated MiB of `cl-dist plan` / measured peak MiB of live tensors on a rank (their ratio), on CPUs. "
        f"{data['global_batch']} rows of {data['length']} tokens a step, 4 layers of width 192, float32, torch "
        f"{data['torch']}."
    )
    return "\n".join(lines) + "\n"


def scaling(data: Mapping[str, Any]) -> str:
    """Return the Markdown tables of `tests.scaling`: measurements, then estimates."""
    lines = ["| scaling | workers | global batch | s a step | tokens/s | times one worker |", "| --- " * 6 + "|"]
    first: dict[str, float] = {}
    for row in data["measured"]:
        times = row["tokens_per_s"] / first.setdefault(row["how"], row["tokens_per_s"])
        numbers = f"{row['step_s']:.3f} | {row['tokens_per_s']:.0f} | {times:.2f}"
        lines.append(f"| {row['how']} | {row['workers']} | {row['global_batch']} | {numbers} |")
    measured = f"{data['cores']} cores, one thread a worker, ZeRO-2, torch {data['torch']}."
    lines = [*lines, "", measured, ""] if data["measured"] else ["Not measured yet: `make scaling`.", ""]
    lines += ["| estimate | GPUs | rows a rank | computing s | links s | tokens/s | |", "| --- " * 7 + "|"]
    for each in data["paper"]:
        for step in each["steps"]:
            numbers = f"{step['compute_s']:.3g} | {step['link_s']:.3g} | {step['tokens_per_s']:,.0f}"
            lines.append(f"| {each['what']} | {step['ranks']} | {step['rows']} | {numbers} | {step['note']} |")
    rows = data["rows"]
    lines += [
        "",
        f"{data['machine']}; {rows['global_batch']} rows of {rows['tokens']} tokens a step, micro_batch: "
        f"{rows['micro_batch']}, activations recomputed.",
        "",
        f"| estimated seconds of a stage | rows | {' | '.join(f'{size} GPUs' for size in RANKS)} |",
        "| --- " * (2 + len(RANKS)) + "|",
    ]
    for each in data["paper"]:
        for line in each["stages"]:
            stage = line["stage"].partition("/")[2]
            lines.append(f"| {each['what']}: {stage} | {line['rows']} | {' | '.join(cells(line['seconds']))} |")
    lines += [
        "",
        f"The second of two tasks of {rows['train']:,} train and {rows['test']:,} test rows, {rows['epochs']} epochs; "
        "every row and sample at the maximum length.",
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
