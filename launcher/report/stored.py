"""Details of a stored run for its page: settings, matrix, learning curves and answers, which summary.json lacks."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_dist.run import Run
from cl_dist.stage import Evaluate, model_after, ref

MOST_POINTS = 200
"""Points of a learning curve; more of them are averaged in groups of equal size."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to a test row."""

    id: str
    text: str
    label: str
    prediction: str
    probability: float | None
    """Probability of the prediction; None for generated text, and in runs of older versions."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Training of a task: losses every few optimizer steps, and dev scores after each round."""

    losses: list[tuple[int, float]]
    """(optimizer step, mean training loss over the steps up to it); of rounds where no steps are logged."""
    dev: list[tuple[int, float]]
    """(optimizer step, accuracy on the dev rows)."""


@dataclass(frozen=True)
class Details:
    """What the page of a run shows in addition to its summary."""

    run: Run = field(repr=False)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.config.folder

    @cached_property
    def settings(self) -> str:
        """The resolved run file as text; empty if it cannot be read."""
        return _text(self.folder / "config.yaml")

    @cached_property
    def matrix_csv(self) -> str:
        """The accuracy matrix as CSV; empty before the first task is scored."""
        return _text(self.folder / "metrics" / "R.csv")

    @cached_property
    def group(self) -> str:
        """Text that is equal for runs that differ by seed or order of tasks alone."""
        science = {key: value for key, value in self.run.config.tree()["science"].items() if key != "seed"}
        tasks = sorted(json.dumps(task, sort_keys=True) for task in science.pop("tasks"))
        return json.dumps([science, tasks], sort_keys=True)

    @cached_property
    def curves(self) -> list[Curve]:
        """The learning curves of all tasks."""
        stages = {self.run.ledger.key(model_after(t)): t for t in range(len(self.run.tasks))}
        losses: list[dict[int, float]] = [{} for _ in stages]
        rounds: list[dict[int, float]] = [{} for _ in stages]
        dev: list[dict[int, float]] = [{} for _ in stages]
        fingerprints: dict[str, Any] = {}
        for event in _events(self.folder / "metrics" / "events.jsonl"):
            if (t := stages.get(str(event.get("stage")))) is None:
                continue
            kind, step = event.get("event"), event.get("step")
            if kind == "stage_start":
                if event.get("fingerprint") != fingerprints.setdefault(event["stage"], event.get("fingerprint")):
                    losses[t], rounds[t], dev[t] = {}, {}, {}  # trained again with other settings
                fingerprints[event["stage"]] = event.get("fingerprint")
            elif kind == "telemetry" and step is not None and "train/loss" in event:
                losses[t][step] = event["train/loss"]  # a resumed stage repeats the steps after its checkpoint
            elif kind == "round" and step is not None:
                if "dev/accuracy" in event:
                    dev[t][step] = event["dev/accuracy"]
                if "train/loss" in event:
                    rounds[t][step] = event["train/loss"]
        return [
            Curve(_thinned(sorted((steps or means).items())), sorted(scores.items()))
            for steps, means, scores in zip(losses, rounds, dev, strict=True)
        ]

    @cached_property
    def _read(self) -> dict[tuple[int, int], list[Answer] | None]:
        return {}

    def answers(self, after: int, on: int) -> list[Answer] | None:
        """Return the answers to the test rows of task `on` after task `after`; None if they are not stored."""
        if (after, on) not in self._read:
            self._read[after, on] = self._load(after, on)
        return self._read[after, on]

    def right(self, after: int, on: int) -> NDArray[np.float64] | None:
        """Return 1 per row that is answered as its label says, else 0; None if answers are not stored."""
        found = self.answers(after, on)
        return None if not found else np.array([float(a.label == a.prediction) for a in found])

    def _load(self, after: int, on: int) -> list[Answer] | None:
        run = self.run
        stage = next((each for each in run.plan(after) if isinstance(each, Evaluate)), None)
        while stage is not None and on not in stage.tasks:
            earlier = None if stage.previous is None else run.stage(stage.previous)
            stage = earlier if isinstance(earlier, Evaluate) else None
        if stage is None or run.ledger.manifest(ref(stage)) is None:
            return None
        data = run.data(on)
        lines = list(_events(run.ledger.path(ref(stage)) / "predictions" / f"{data.id}.jsonl"))
        if [line.get("id") for line in lines] != [row.id for row in data.test]:
            return None
        return [
            Answer(
                row.id,
                " | ".join(part for part in (row.text, row.text_pair) if part),
                row.label,
                str(line.get("prediction")),
                line.get("probability"),
            )
            for line, row in zip(lines, data.test, strict=True)
        ]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf8") if path.is_file() else ""


def _events(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a file of JSON lines; a line that a kill has cut off is left out."""
    for line in _text(path).split("\n"):  # texts may have other line ends
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most MOST_POINTS points: the last step and the mean of groups of equal size."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
