"""The picture of `cl-dist train` on a terminal, from the events of a finished run.

python -m tests.pages.terminal_picture RUN   write launcher/pictures/terminal.svg
"""

import io
import json
import re
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cl_dist.pace import Pace
from cl_dist.session_events import opening, plan, planned
from cl_dist.stored_run import load_run
from launcher.watch import Watch
from tests.pages.markdown import ROOT

TARGET = ROOT / "launcher/pictures/terminal.svg"
WIDTH = 118


def terminal(run: Path) -> str:
    """Return an SVG of the terminal while the recipe of a finished run trained, with the live bars of that time."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ cl-dist train {run.name}", style="bold green"))
    replay(run, console)
    picture = console.export_svg(title="cl-dist")
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # fonts of another host


def replay(run: Path, console: Console, share: float = 0.55) -> None:
    """Show the first part of a finished run's events as they came, and the live bars at that moment."""
    stored = load_run(run)
    runs = [stored.run, *stored.baselines]
    began: dict[str, Any] = {"accuracy": [[None] * len(stored.tasks) for _ in stored.tasks]}
    stages = {str(each.config.folder): planned(each) for each in runs}
    fresh = {folder: [replace(stage, seconds=None) for stage in known] for folder, known in stages.items()}
    now, pace = 0.0, Pace(fresh, lambda: now)
    watch = Watch(console, lambda: now)
    view = watch.view
    plan_event = plan(runs, fresh)
    watch(opening([each.config for each in runs]) | {"folder": f"runs/{run.name}"})
    watch(plan_event | {"runs": [line | began for line in plan_event["runs"]]})
    events = [(each, json.loads(line)) for each in runs for line in _events(each.config.folder)]
    begin = datetime.fromisoformat(events[0][1]["ts"])
    steps = [number for number, (_, event) in enumerate(events) if event["event"] in ("telemetry", "round")]
    steps = [number for number in steps if events[number][1]["step"] < events[number][1]["total_steps"]] or steps
    for each, event in events[: steps[int(share * len(steps))] + 1]:
        now = (datetime.fromisoformat(event["ts"]) - begin).total_seconds()
        pace.take(str(each.config.folder), event)
        if event["event"] in ("telemetry", "round"):
            step = {"event": "step", **{name: event[name] for name in ("ts", "stage", "step", "total_steps")}}
            pace.take(str(each.config.folder), step)
            watch(event)
            event = step | pace.estimates()
        watch({"run": each.config.run.name} | event)
    console.print(view)


def _events(folder: Path) -> list[str]:
    return (folder / "metrics/events.jsonl").read_text(encoding="utf8").splitlines()


def main() -> None:
    """Write the picture."""
    match sys.argv[1:]:
        case [folder]:
            TARGET.write_text(terminal(Path(folder).resolve()), encoding="utf8")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
