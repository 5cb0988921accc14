"""The pictures of the front page, from a finished run of the recipe ctr-demo.

python -m tests.pages.pictures RUN   write launcher/pictures/report.png and terminal.svg

Needs Chromium.
"""

import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from contextlib import suppress
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from tests.pages.markdown import ROOT

PICTURES = ROOT / "launcher/pictures"
WIDTH = 118
SIZE = "1180,1130"
COLOURS = 96


def terminal(run: Path) -> str:
    """Return an SVG of what `status` and `plan` print of a run."""
    commands = (f"status runs/{run.name}", f"plan {run.name} --no-memory")
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for command in commands:
        console.print(Text(f"$ cl-dist {command}", style="bold green"))
        console.print(Text.from_ansi(shown(command, run.parents[1])))
    picture = console.export_svg(title="cl-dist")
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # fonts of another host


def shown(command: str, folder: Path) -> str:
    """Return what a command prints on a terminal of WIDTH columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 60, WIDTH, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    program = [sys.executable, "-m", "launcher", *command.split()]
    process = subprocess.Popen(program, cwd=folder, env=environment, stdout=its, stderr=subprocess.DEVNULL)
    os.close(its)
    found = b""
    with suppress(OSError):  # Linux reports the end of a terminal as an error
        while part := os.read(ours, 65536):
            found += part
    os.close(ours)
    assert process.wait() == 0, command
    return found.decode().replace("\r\n", "\n")


def report(run: Path, target: Path) -> None:
    """Write a picture of the upper part of a run's report."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder:
        page = run / "report/index.html"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}"]
        flags += ["--virtual-time-budget=2000", f"--window-size={SIZE}", f"--screenshot={target}", page.as_uri()]
        subprocess.run([chromium, *flags], check=True, capture_output=True, timeout=120)
    Image.open(target).convert("RGB").quantize(COLOURS).save(target, optimize=True)


def main() -> None:
    """Write both pictures."""
    match sys.argv[1:]:
        case [folder]:
            run = Path(folder).resolve()
            PICTURES.mkdir(exist_ok=True)
            (PICTURES / "terminal.svg").write_text(terminal(run), encoding="utf8")
            report(run, PICTURES / "report.png")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
