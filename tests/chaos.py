"""Kills runs at drawn points and looks whether they end as if nothing had happened.

A run in a child process counts what it does to its run folder (files opened for writing, renames, removals) and every
event it reports, and kills itself at a drawn count: in the middle of a step, of saving, of publishing. Then it is
resumed to its end, by another child that may be killed too.
`python -m tests.chaos OUT.json [--points N] [--seed S]` does it at many points and keeps what was seen.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cl_dist import sequence
from cl_dist.contract import tiny
from cl_dist.dispatch_local import LocalDispatcher
from cl_dist.run import Run
from cl_dist.run_events import Tracker

RUNS: Mapping[str, Mapping[str, Any]] = {
    "ctr": {"method": dict(tiny.METHODS["ctr"])},
    "lamol": {"method": dict(tiny.METHODS["lamol"]), "generate": {"shard_samples": 2}},
    "rational_lamol": {"method": dict(tiny.METHODS["rational_lamol"])},
}
"""Science settings of the runs, of two tasks each."""
WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


@dataclass(frozen=True)
class Seen:
    """One run that was killed, and how it ended."""

    method: str
    kills: tuple[int, ...]
    """At which counts, attempt by attempt."""
    died_in: tuple[str, ...]
    """The stage that each attempt died in."""
    equal: bool
    """Whether matrix, scores, samples, votes and weights are those of an undisturbed run."""


def made(folder: Path, method: str, name: str) -> Run:
    """Return a run whose every step is saved, so that many kills hit a saving."""
    over = {"run": {"name": name}, "science": dict(RUNS[method]), "cluster": {"checkpoint_steps": 2}}
    over["science"] |= {"train": {"epochs": 3} | (dict(tiny.TEXT_TRAIN) if tiny.writes(method) else {})}
    return tiny.make_run(folder, over, tasks=("food", "film"))


def _attempt(folder: Path, method: str, name: str, kill_at: int | None, pipe: Any) -> None:
    """Compute a run, in a process of its own; send the number of counted actions if it lives to its end."""
    opened = made(folder, method, name)
    run_folder, count = str(opened.config.folder.absolute()), 0
    log = Path(f"{run_folder}.stage")
    log.parent.mkdir(exist_ok=True)
    log.write_text("")  # what is killed before its first event dies at the start

    def tick() -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        is_read = event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+"))
        if event in WATCHED and str(args[0]).startswith(run_folder) and not is_read:
            tick()

    def watch(event: Mapping[str, Any]) -> None:
        log.write_text(str(event.get("stage", "")))
        tick()

    sys.addaudithook(audit)
    sequence.run_stages(opened, LocalDispatcher(), Tracker(opened, watch=watch))
    pipe.send(count)


def attempt(folder: Path, method: str, name: str, kill_at: int | None = None) -> int | None:
    """Return the count of an attempt that came to its end, None of one that was killed."""
    context = multiprocessing.get_context("fork")  # a start costs milliseconds, with torch in place
    here, there = context.Pipe()
    child = context.Process(target=_attempt, args=(folder, method, name, kill_at, there))
    child.start()
    there.close()
    child.join(120)
    if child.is_alive():
        child.kill()
        raise TimeoutError(f"{method} {name}: hangs")
    if child.exitcode == -signal.SIGKILL:
        return None
    if child.exitcode:
        raise RuntimeError(f"{method} {name}: ended with {child.exitcode}")
    count: int = here.recv()
    return count


def digests(run: Path) -> dict[str, str]:
    """Return the digest of every result of a run, without what tells the time."""
    names = ("scores.json", "samples.jsonl", "critical.json", "recorded.jsonl", "R.csv", "*.safetensors")
    files = [path for name in names for path in run.rglob(name)]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def undisturbed(folder: Path, method: str) -> tuple[dict[str, str], int]:
    """Return an undisturbed run's results and how much there is to count in it."""
    count = attempt(folder, method, "whole")
    assert count is not None
    found = digests(made(folder, method, "whole").config.folder)
    assert any(name.endswith("R.csv") for name in found)
    return found, count


def kill(folder: Path, method: str, name: str, kills: tuple[int, ...], whole: Mapping[str, str]) -> Seen:
    """Kill a run at each of some counts, one attempt after the other, and let it end."""
    died = [
        (folder / "runs" / f"{name}.stage").read_text() or "the start"
        for kill_at in kills
        if attempt(folder, method, name, kill_at) is None
    ]
    attempt(folder, method, name)
    run = folder / "runs" / name
    is_clean = not list(run.rglob("*.partial*")) and not list(run.rglob("checkpoints"))
    return Seen(method, kills, tuple(died), is_clean and digests(run) == dict(whole))


def drawn(seed: int, method: str, count: int, points: int) -> list[tuple[int, ...]]:
    """Draw where to kill: each third run is killed twice."""
    source = random.Random(f"{seed}-{method}")
    return [tuple(source.randint(1, count) for _ in range(2 if n % 3 == 2 else 1)) for n in range(points)]


def main() -> None:
    """Kill runs of every method and write what was seen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    seen: list[Seen] = []
    for method in RUNS:
        with TemporaryDirectory() as folder:
            whole, count = undisturbed(Path(folder), method)
            points = enumerate(drawn(asked.seed, method, count, asked.points))
            seen += [kill(Path(folder), method, f"k{number}", kills, whole) for number, kills in points]
    rows = [
        {
            "method": method,
            "runs": sum(one.method == method for one in seen),
            "kills": sum(len(one.died_in) for one in seen if one.method == method),
            "stages": sorted({stage for one in seen if one.method == method for stage in one.died_in}),
            "equal": sum(one.equal for one in seen if one.method == method),
        }
        for method in RUNS
    ]
    asked.out.write_text(json.dumps({"seed": asked.seed, "rows": rows}, indent=1) + "\n", encoding="utf8")
    if different := [one for one in seen if not one.equal]:
        raise SystemExit("\n".join(f"ended otherwise: {one}" for one in different))


if __name__ == "__main__":
    main()
