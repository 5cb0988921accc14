"""The Markdown pages of the repository: their headings, links, code blocks and generated blocks."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("cl_dist", "launcher", "tests", "cluster_configs", "docker")
WIDTH = 120
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", flags=re.DOTALL | re.MULTILINE)
MARKER = re.compile(r"<!-- (?P<kind>run by|not run): (?P<text>[^>]+?) -->\s*\Z")
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
GENERATED = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<text>.*?)<!-- end -->", flags=re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    kind: str
    """'run by' or 'not run', from the HTML comment directly above the block; '' if it has none."""
    by: str
    """The rest of that comment: paths of tests, or the reason."""

    @property
    def where(self) -> str:
        """Page and line, for messages."""
        return f"{self.page}:{self.line}"


@cache
def pages() -> dict[str, str]:
    """Return the text of every page by its path relative to the root of the repository."""
    found = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf8") for path in sorted(found)}


def blocks(page: str, text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for match in FENCE.finditer(text):
        marker = MARKER.search(text[: match.start()])
        kind, by = (marker["kind"], " ".join(marker["text"].split())) if marker else ("", "")
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match["language"], match["text"], kind, by)


def prose(text: str) -> str:
    """Return a page with its fenced blocks, comments and inline code blanked out; line numbers stay."""
    for pattern in (FENCE, re.compile(r"<!--.*?-->", flags=re.DOTALL), re.compile(r"`[^`\n]+`")):
        text = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text


def inline_code(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each piece of inline code."""
    without = FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    for match in re.finditer(r"`([^`\n]+)`", without):
        yield without.count("\n", 0, match.start()) + 1, match[1]


def links(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and target of each link and image, those of HTML tags included."""
    # Code is blanked, but the text of a link may be code: `[`name`](target)`.
    plain = re.sub(r"\[`([^`\]]+)`\]", r"[\1]", text)
    clean = prose(plain)
    found = [(match.start(), match["target"]) for match in LINK.finditer(clean)]
    found += [(match.start(), match[1]) for match in re.finditer(r'(?:src|href)="([^"]+)"', clean)]
    for start, target in sorted(found):
        yield clean.count("\n", 0, start) + 1, target


def headings(text: str) -> list[str]:
    """Return the headings of a page as plain text."""
    without = FENCE.sub("", text)
    found = re.findall(r"^#{1,6} (.+)$", without, flags=re.MULTILINE)
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip() for heading in found]


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def site_anchor(heading: str) -> str:
    """Return the anchor that mkdocs gives a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


def anchors(text: str) -> list[str]:
    """Return the anchors of a page, in order; a heading that comes again is numbered."""
    found: list[str] = []
    for heading in headings(text):
        name, number = anchor(heading), 0
        while (each := f"{name}-{number}" if number else name) in found:
            number += 1
        found.append(each)
    return found


def table(heading: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; bars, and outside of code what HTML takes for a tag, are escaped."""
    lines = [heading, ["---"] * len(heading), *([_escaped(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(cell: str) -> str:
    parts = cell.replace("|", r"\|").split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def wrapped(text: str) -> str:
    """Return a text whose lines have at most WIDTH columns; tables stay as they are."""
    return "".join(
        line if line.startswith("|") or len(line) <= WIDTH + 1 else f"{_filled(line)}\n"
        for line in text.splitlines(keepends=True)
    )


def _filled(line: str) -> str:
    return textwrap.fill(line.strip(), WIDTH, break_long_words=False, break_on_hyphens=False)
