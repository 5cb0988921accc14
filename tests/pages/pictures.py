"""The pictures of the pages, from a finished run of the recipe ctr-demo.

python -m tests.pages.pictures RUN   write launcher/pictures/: the report for a desk and a phone, light and dark, and
                                     terminal.svg

Needs Chromium; `python -m tests.pages.terminal_picture RUN` writes only terminal.svg and does not.
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
        case [folder]:
            run = Path(folder).resolve()
            PICTURES.mkdir(exist_ok=True)
            (PICTURES / "terminal.svg").write_text(terminal(run), encoding="utf8")
            report(run / "report/index.html", PICTURES)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
