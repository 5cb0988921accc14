"""What the plugins of a run will cost, from its settings and the backbone's config.json alone."""

import json
from typing import Any

from cl_dist.errors import DataError
from cl_dist.models.config import MaskShape, plugin_sizes
from cl_dist.places import resolve
from cl_dist.run_config import RunConfig

HIDDEN, LAYERS = ("hidden_size", "dim"), ("num_hidden_layers", "n_layers")
SUB_BLOCKS = 2


def plugins(config: RunConfig) -> dict[str, Any] | None:
    """Return sizes in bytes at the last task, whole and per rank; None for methods without plugins.

    Weights are float32: under ZeRO-3 a rank holds its share of every tensor, rounded up, below that all of them.
    Masters and the two moments of AdamW exist for what the last task trains, and are divided from ZeRO-1 on.
    """
    shape, cluster = config.science.method, config.cluster
    if not isinstance(shape, MaskShape):
        return None
    try:
        known = json.loads((resolve(config.science.model.source) / "config.json").read_text(encoding="utf8"))
    except (DataError, OSError, ValueError):
        return None  # a name on the hub: nothing is downloaded for a plan
    hidden, layers = (next(known[key] for key in keys if key in known) for keys in (HIDDEN, LAYERS))
    count, num_tasks = layers * SUB_BLOCKS, len(config.science.sequence())
    own, shared = plugin_sizes(shape, hidden, num_tasks)
    trained = count * (sum(own) // num_tasks + sum(shared))
    split, divided = (cluster.workers if cluster.zero_stage >= least else 1 for least in (3, 1))
    return {
        "plugins": count,
        "elements": count * sum(own + shared),
        "trained": trained,
        "bytes": 4 * count * sum(own + shared),
        "bytes_per_rank": 4 * count * sum(-(-size // split) for size in own + shared),
        "optimizer_bytes_per_rank": 12 * -(-trained // divided),
        "workers": cluster.workers,
        "zero_stage": cluster.zero_stage,
    }


def sentence(found: dict[str, Any]) -> str:
    """Return the sizes as a line for people."""
    whole, rank, optimizer = (found[key] / 2**20 for key in ("bytes", "bytes_per_rank", "optimizer_bytes_per_rank"))
    return (
        f"{found['plugins']} plugins: {whole:.1f} MiB at the last task; each of {found['workers']} ranks holds "
        f"{rank:.1f} MiB of them, and {optimizer:.1f} MiB of masters and moments (ZeRO-{found['zero_stage']})"
    )
