"""What votes over components add to a report: a map of who was voted for."""

from collections.abc import Mapping
from typing import Any

from launcher.figures import layer_map


def vote_view(vote: Mapping[str, Any]) -> dict[str, Any]:
    """Return a vote with its map: for each layer and unit the share of rows that voted for it."""
    used, votes, chosen = vote["used"], vote["votes"], [tuple(pair) for pair in vote["chosen"]]
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
    names = [f"{layer}" if vote["level"] == "block" else f"{layer}.{unit}" for layer, unit in chosen]
    return {**vote, "names": names, "map": layer_map(rows, notes, "blue")}
