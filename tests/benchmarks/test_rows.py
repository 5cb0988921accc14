"""A million rows: checked once by the driver, then every rank starts in seconds and in constant memory."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cl_dist.contract import tiny
from cl_dist.data.load import load_task
from cl_dist.data.published import publish, source_key
from cl_dist.data.tasks import DataConfig, TaskConfig
from tests.benchmarks.conftest import Measured

pytestmark = pytest.mark.bench
ROWS = 1_000_000
RANK = """
import json, resource, sys, time
import numpy as np
from transformers import AutoTokenizer
from cl_dist.data.classify import ClassifyRows
from cl_dist.data.published import published
from cl_dist.data.sampler import global_batch
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
data = published(__import__("pathlib").Path(sys.argv[1]))
rows = ClassifyRows(AutoTokenizer.from_pretrained(sys.argv[2]), 64)
rows.add(0, data, data.train)
for step in range(10):
    rows.batch(global_batch(0, "big", step, len(rows), 32)[1])
spent = time.monotonic() - began
print(json.dumps({"seconds": spent, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}))
"""


def rank(folder: Path, model: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", RANK, folder, model], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def published_rows(folder: Path, count: int) -> tuple[Path, float]:
    """Return the folder of `count` published rows, and the seconds that checking and writing took."""
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        for number in range(count):
            row = {"text": f"the soup number {number} was quite good", "label": "good" if number % 2 else "bad"}
            split = "train" if number >= 200 else "dev" if number >= 100 else "test"
            file.write(json.dumps({**row, "split": split}) + "\n")
    source = {"kind": "jsonl", "path": str(path), "split": {"by": "field"}}
    task, data = TaskConfig.model_validate({"id": "big", "source": source}), DataConfig()
    began = time.monotonic()
    source_key(task, data)
    publish(load_task(task, data), folder / f"rows-{count}")
    return folder / f"rows-{count}", time.monotonic() - began


@pytest.mark.timeout(900)
def test_a_rank_starts_on_a_million_rows_in_seconds_and_constant_memory(tmp_path: Path, measured: Measured) -> None:
    model = tiny.save_model(tmp_path / "model")
    (few, _), (many, checked) = published_rows(tmp_path, 10_000), published_rows(tmp_path, ROWS)
    small, large = rank(few, model), rank(many, model)
    measured("a million rows: parsed, checked and published by the driver", checked, "{:.0f} s, once")
    ok = measured("a million rows: a rank maps them and makes ten batches", large["seconds"], "{:.1f} s", at_most=5)
    more = large["mib"] - small["mib"]
    assert ok & measured("a million rows: memory of a rank, against ten thousand", more, "{:+.0f} MiB", at_most=100)
