"""What task masks and capsules add to a report: how masks fill up, whose capsules tasks open, what sharing is worth."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from launcher.report.figures import arcs, clean, heat_class, layer_map, score_range

Summary = Mapping[str, Any]
Value = float | None
Table = list[list[list[Value]]]


def plugin_view(main: Summary, accuracy: Sequence[Sequence[Value]]) -> dict[str, Any]:
    """Return the figures of a CTR or HAT run over the tasks that have masks; a figure without data is None."""
    facts = main["plugins"]
    num_tasks = max(_num_measured(facts.get(key)) for key in ("mask_use", "gate_open", "accuracy_without_ksm"))
    names = [clean(task["id"]) for task in main["tasks"][:num_tasks]]
    return {
        "masks": _masks(facts, names) if _num_measured(facts.get("mask_use")) else None,
        "transfer": _transfer(facts, names) if _num_measured(facts.get("gate_open")) > 1 else None,
        "sharing": _sharing(facts, accuracy, names),
    }


def _num_measured(series: Sequence[Any] | None) -> int:
    return max((t + 1 for t, entry in enumerate(series or []) if entry is not None), default=0)


def _padded(series: Sequence[Any] | None, length: int) -> list[Any]:
    return [*(series or []), *[None] * length][:length]


def _mean(values: Sequence[Value]) -> Value:
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


def _weighted(pair: Sequence[Value], weights: Sequence[float]) -> Value:
    """Return the mean of a plugin's two masks, or None if one was not measured or there is nothing to weigh."""
    if any(x is None for x in pair) or not sum(weights):
        return None
    return sum(x * w for x, w in zip(pair, weights, strict=True) if x is not None) / sum(weights)


def _masks(facts: Summary, names: Sequence[str]) -> dict[str, Any]:
    """Return heat maps of layers and tasks, and how the units of the whole model are divided after each task.

    A plugin has two masks of different width; its number is that of all its units together.
    """
    layers, sizes = facts["layers"], [(unit["hidden"], unit["output"]) for unit in facts["units"]]
    use, shared, free = (_padded(facts.get(key), len(names)) for key in ("mask_use", "mask_shared", "free_units"))
    opened = [entry or [(None, None)] * len(layers) for entry in use]

    def grid(table: Table, of_open_units: bool = False) -> tuple[list[list[Value]], list[list[str]]]:
        values: list[list[Value]] = []
        notes: list[list[str]] = []
        for k, layer in enumerate(layers):
            row, texts = [], []
            for t, name in enumerate(names):
                pair = table[t][k] if table[t] else [None, None]
                weights = (
                    [n * (u or 0) for n, u in zip(sizes[k], opened[t][k], strict=True)] if of_open_units else sizes[k]
                )
                row.append(_weighted(pair, weights))
                both = " and ".join("not measured" if x is None else f"{100 * x:.1f} %" for x in pair)
                texts.append(f"{clean(layer)}, {name}: {both}")
            values.append(row)
            notes.append(texts)
        weight = [sum(size) for size in sizes]
        totals = []
        for t in range(len(names)):
            column = [row[t] for row in values]
            heavy = (
                [w * (_weighted(opened[t][k], sizes[k]) or 0) for k, w in enumerate(weight)]
                if of_open_units
                else weight
            )
            totals.append(_weighted(column, heavy))
        return [*values, totals], [*notes, [f"all layers, {name}" for name in names]]

    maps, totals = [], []
    for title, table, ramp, relative in (
        ("Units the task uses", use, "blue", False),
        ("Of these, also used by earlier tasks", shared, "orange", True),
        ("Units still free after the task", free, "green", False),
    ):
        values, notes = grid(table, relative)
        totals.append(values[-1])
        if any(table):
            rows = list(zip([*layers, "all layers"], values, strict=True))
            maps.append((title, layer_map(rows, notes, ramp)))
    return {"maps": maps, "bars": _capacity(names, *totals)}


def _capacity(names: Sequence[str], use: Sequence[Value], shared: Sequence[Value], free: Sequence[Value]) -> list[Any]:
    """Return a stacked bar per task: units of earlier tasks left alone, used again, newly taken, still free."""
    bars = []
    free_before = 1.0
    for t, (name, used, again, left) in enumerate(zip(names, use, shared, free, strict=True)):
        if used is None or again is None or left is None:
            return []
        reused = used * again
        parts = (
            ("c-old", "earlier tasks only", 1 - free_before - reused),
            ("c-again", "used again", reused),
            ("c-new", "newly taken", free_before - left),
            ("c-free", "free", left),
        )
        segments = [
            (100 * max(share, 0.0), style, f"{name}: {label} {100 * max(share, 0.0):.0f} %")
            for style, label, share in parts
        ]
        bars.append((t + 1, name, segments, f"{100 * left:.0f} % free"))
        free_before = left
    return bars


def _transfer(facts: Summary, names: Sequence[str]) -> dict[str, Any]:
    """Return how often task u opens the capsule of an earlier task i, mean of plugins, as table and arcs."""
    opened: list[list[Value]] = []
    rows = []
    for u, name in enumerate(names):
        plugins = _padded(facts["gate_open"], len(names))[u] or []
        values, cells = [], []
        for i in range(u):
            known = [plugin[i] for plugin in plugins if i < len(plugin) and plugin[i] is not None]
            mean = _mean(known)
            values.append(mean)
            if mean is None:
                cells.append(("", "void", "not measured"))
                continue
            span = f"from {100 * min(known):.0f} to {100 * max(known):.0f} % by layer"
            note = f"{name} opens the capsule of {names[i]}: {100 * mean:.0f} % ({span})"
            cells.append((f"{100 * mean:.0f}", heat_class(mean, 0, 1), note))
        opened.append(values)
        rows.append((u + 1, name, cells))
    if len(names) <= 8:
        return {"rows": rows, "arcs": arcs(names, opened, 344, strongest=8, least=0.05), "few": True}
    drawn = (arcs(names, opened, width, strongest=2, least=0.25) for width in (600, 344))
    both = Markup('<div class="desk">{}</div><div class="phone">{}</div>').format(*drawn)
    return {"rows": rows, "arcs": both, "few": False}


PARTS = {
    "accuracy_without_ksm": "whole module off, the task's own capsule too",
    "accuracy_without_earlier": "capsules of earlier tasks closed",
    "accuracy_with_coin_gates": "a coin for each of their gates",
}
"""Keys of the summary's plugin facts, and what was switched off for them."""


def _sharing(facts: Summary, accuracy: Sequence[Sequence[Value]], names: Sequence[str]) -> dict[str, Any] | None:
    """Return each task's score with and without the knowledge sharing module, as places on a common axis."""
    without = _padded(facts.get("accuracy_without_ksm"), len(names))
    pairs = [(accuracy[t][t], x) for t, x in enumerate(without)]
    known = [x for pair in pairs if None not in pair for x in pair if x is not None]
    if not known:
        return None
    low, high = score_range(known)
    rows: list[tuple[int, str, dict[str, Any] | None]] = []
    for t, (name, (own, bare)) in enumerate(zip(names, pairs, strict=True)):
        if own is None or bare is None:
            rows.append((t + 1, name, None))
            continue
        places = [100 * (x - low) / (high - low or 1) for x in (own, bare)]
        rows.append((t + 1, name, {"own": own, "bare": bare, "at": places, "from": min(places), "drop": own - bare}))
    parts = [(label, *_change(facts, key, accuracy, len(names))) for key, label in PARTS.items()]
    return {"rows": rows, "low": low, "high": high, "parts": [part for part in parts if part[2]]}


def _change(facts: Summary, key: str, accuracy: Sequence[Sequence[Value]], num_tasks: int) -> tuple[float | None, int]:
    """Return by how much accuracy changes without a part, as a mean over the tasks that were scored without it."""
    found = [(accuracy[t][t], value) for t, value in enumerate(_padded(facts.get(key), num_tasks))]
    changes = [bare - own for own, bare in found if own is not None and bare is not None]
    return (sum(changes) / len(changes) if changes else None), len(changes)
