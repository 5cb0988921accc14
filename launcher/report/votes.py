"""What votes over components add to a report: who was voted for, and how far the chosen ones have moved."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from launcher.report.figures import layer_map


def vote_view(vote: Mapping[str, Any]) -> dict[str, Any]:
    """Return a choice with its names and, of a vote, its maps.

    map: for each layer and unit the share of rows that voted for it; spread: how c is distributed over rows.
    """
    chosen = [tuple(pair) for pair in vote["chosen"]]
    names = [f"{layer}" if vote["level"] == "block" else f"{layer}.{unit}" for layer, unit in chosen]
    if "tried" in vote:
        return {**vote, "names": names}
    used, votes = vote["used"], vote["votes"]
    units = range(len(votes[0]))
    rows = [(f"layer {layer}", [count / used for count in counts]) for layer, counts in enumerate(votes)]
    notes = [
        [
            f"layer {layer}, {vote['level']} {unit}: {counts[unit]} of {used} rows, mean c "
            f"{vote['mean_c'][layer][unit]:.3f}{', frozen' if (layer, unit) in chosen else ''}"
            for unit in units
        ]
        for layer, counts in enumerate(votes)
    ]
    means = [sum(values[unit] for _, values in rows) / len(rows) for unit in units]
    rows.append(("mean", means))
    notes.append([f"{vote['level']} {unit}" for unit in units])
    return {**vote, "names": names, "map": layer_map(rows, notes, "blue"), "spread": _spread(vote, names)}


def _spread(vote: Mapping[str, Any], names: Sequence[str]) -> Markup:
    """Return how c is distributed: a row per chosen unit, the last one all others; a column per twentieth of 0..1."""
    found = [*vote["distribution"]["chosen"], vote["distribution"]["others"]]
    labels = [*(f"{vote['level']} {name}" for name in names), "others"]
    shares = [[count / max(sum(counts), 1) for count in counts] for counts in found]
    width = 1 / len(shares[0])
    notes = [
        [f"{label}: {share:.1%} with c in [{k * width:.2f}, {(k + 1) * width:.2f}]" for k, share in enumerate(row)]
        for label, row in zip(labels, shares, strict=True)
    ]
    return layer_map(list(zip(labels, shares, strict=True)), notes, "blue")
