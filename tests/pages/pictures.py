"""The pictures of the pages, from a finished run of the recipe ctr-demo.

python -m tests.pages.pictures RUN   write launcher/pictures/: the report for a desk and a phone, light and dark, and
                                     terminal.svg

python -m tests.pages.pictures terminal RUN   write only terminal.svg, which needs no Chromium
"""

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

from cl_dist.pace import Pace
from cl_dist.session_events import opening, plan, planned
from cl_dist.stored_run import load_run
from launcher.watch import Watch
from tests.pages.markdown import ROOT

PICTURES = ROOT / "launcher/pictures"
WIDTH = 118
SHOTS = {
    "report.png": (1400, 1130, False),
    "report-dark.png": (1400, 1130, True),
    "report-phone.png": (390, 1500, False),
    "report-phone-dark.png": (390, 1500, True),
}
"""Pictures of a report: width and height in pixels, and whether they are dark."""
NARROWEST = 500
"""Chromium opens no narrower window; a page for a phone is drawn in a frame and cut out."""
COLOURS = 96


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


def report(page: Path, folder: Path) -> list[Path]:
    """Write the pictures of the upper part of a report; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (width, height, is_dark) in SHOTS.items():
        shot(page, folder / name, width, height, is_dark=is_dark)
    return [folder / name for name in SHOTS]


def shot(page: Path, target: Path, width: int, height: int, *, is_dark: bool) -> None:
    """Write a picture of the upper part of an HTML page."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder:
        opened = page.resolve().as_uri()
        if width < NARROWEST:
            frame = Path(folder) / "frame.html"
            style = f"display:block;border:0;width:{width}px;height:{height}px"
            frame.write_text(
                f'<body style="margin:0"><iframe src="{opened}" style="{style}"></iframe>', encoding="utf8"
            )
            opened = frame.as_uri()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        flags += [f"--blink-settings=preferredColorScheme={0 if is_dark else 1}", "--allow-file-access-from-files"]
        flags += [f"--window-size={max(width, NARROWEST)},{height}", f"--screenshot={target.resolve()}"]
        subprocess.run(
            [chromium, *flags, "--virtual-time-budget=2000", opened], check=True, capture_output=True, timeout=120
        )
    with Image.open(target) as picture:
        cut = picture.convert("RGB").crop((0, 0, width, height))
    cut.quantize(COLOURS).save(target, optimize=True)


def main() -> None:
    """Write all pictures."""
    match sys.argv[1:]:
        case ["terminal", folder]:
            (PICTURES / "terminal.svg").write_text(terminal(Path(folder).resolve()), encoding="utf8")
        case [folder]:
            run = Path(folder).resolve()
            PICTURES.mkdir(exist_ok=True)
            (PICTURES / "terminal.svg").write_text(terminal(run), encoding="utf8")
            report(run / "report/index.html", PICTURES)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
