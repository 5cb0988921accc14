"""The pictures of the front page, from a finished run of the recipe ctr-demo.

python -m tests.pages.pictures RUN   write launcher/pictures/report.png and terminal.svg

Needs Chromium.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.pages.markdown import ROOT
from tests.pages.terminal_picture import terminal

PICTURES = ROOT / "launcher/pictures"
SIZE = "1180,1130"
COLOURS = 96


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
