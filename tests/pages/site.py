"""The pages as a site: gathered into build/pages and built by mkdocs into build/site.

python -m tests.pages.site gather   copy the pages, their pictures and the configuration into build/
python -m tests.pages.site build    the same, then `mkdocs build --strict`
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.pages.markdown import FENCE, LINK, ROOT, pages

BUILD = ROOT / "build"
PICTURE = (".png", ".svg")
SECTIONS = {
    "Start": {"Overview": "README.md", "Troubleshooting": "launcher/TROUBLESHOOTING.md", "Changes": "CHANGELOG.md"},
    "Use": {
        "Command line": "launcher/README.md",
        "Run file": "launcher/RUNFILE.md",
        "Studies": "launcher/STUDY.md",
        "Methods": "cl_dist/methods/README.md",
        "Library": "cl_dist/README.md",
    },
    "Clusters": {
        "Clusters and jobs": "cluster_configs/README.md",
        "Sizing": "cluster_configs/SCALING.md",
        "Ports and tokens": "cluster_configs/SECURITY.md",
        "GPU": "cluster_configs/GPU.md",
        "Containers": "docker/README.md",
    },
    "Evidence": {
        "Guarantees and faults": "tests/README.md",
        "Results": "tests/results/README.md",
        "Measurements": "tests/benchmarks/README.md",
    },
    "Development": {"Contributing": "CONTRIBUTING.md", "Decisions": "cl_dist/DECISIONS.md"},
}
"""Titles of the pages in the navigation; pages of decisions are added below Development."""


def gather(folder: Path = BUILD) -> Path:
    """Copy the pages and their pictures into a folder, with a configuration of mkdocs; return its path."""
    shutil.rmtree(folder / "pages", ignore_errors=True)
    for name, text in pages().items():
        place = folder / "pages" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(prepared(name, text), encoding="utf8")
    for name, text in pages().items():
        for match in LINK.finditer(text):
            source = (ROOT / name).parent / match["target"]
            if source.suffix in PICTURE and source.is_file():
                target = folder / "pages" / source.resolve().relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
    config = folder / "mkdocs.yml"
    config.write_text(yaml.safe_dump(configuration(), sort_keys=False), encoding="utf8")
    return config


def configuration() -> dict[str, Any]:
    """Return the configuration of mkdocs. The theme loads nothing from other hosts."""
    nav: list[dict[str, Any]] = [
        {title: [{name: page} for name, page in own.items()]} for title, own in SECTIONS.items()
    ]
    notes = [name for name in pages() if name.startswith("cl_dist/decisions/")]
    nav[-1]["Development"] += [{_title(name): name} for name in notes]
    return {
        "site_name": "cl-dist",
        "docs_dir": "pages",
        "site_dir": "site",
        "use_directory_urls": False,
        "theme": {"name": "material", "font": False, "features": ["content.code.copy"]},
        "plugins": ["search"],
        "markdown_extensions": ["tables", "toc", "pymdownx.superfences"],
        "validation": {"links": {"anchors": "warn", "not_found": "warn", "unrecognized_links": "warn"}},
        "nav": nav,
    }


def _title(page: str) -> str:
    return pages()[page].partition("\n")[0].removeprefix("# ")


def prepared(name: str, text: str) -> str:
    """Return a page as mkdocs wants it: blank lines around lists and tables, and no link to what is not on the site."""
    parts = FENCE.split(text)  # text, language, code, text, ...
    found = []
    for number in range(0, len(parts), 3):
        found.append(_separated(re.sub(r"<!--.*?-->\n?", "", _linked(name, parts[number]), flags=re.DOTALL)))
        if number + 2 < len(parts):
            found.append(f"\n```{parts[number + 1]}\n{parts[number + 2]}```\n")
    return "".join(found)


def _linked(name: str, text: str) -> str:
    def kept(match: re.Match[str]) -> str:
        path = match["target"].partition("#")[0]
        place = (ROOT / name).parent / path
        is_here = re.match(r"[a-z]+:", path) or not path or place.suffix in (".md", *PICTURE)
        return match[0] if is_here else match["text"]

    return LINK.sub(kept, text)


def _kind(line: str) -> str:
    if line.startswith("|"):
        return "table"
    return "item" if re.match(r"(- |\d+\. )", line) else "text" if line.strip() else "blank"


def _separated(text: str) -> str:
    lines, before, in_list = list[str](), "blank", False
    for line in text.split("\n"):
        kind = _kind(line)
        starts = (kind == "item" and not in_list) or (kind == "table") != (before == "table")
        if starts and before != "blank" and kind != "blank":
            lines.append("")
        in_list = kind == "item" or (in_list and line.startswith("  "))
        before = kind
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Gather the pages, or build the site."""
    if sys.argv[1:] not in (["gather"], ["build"]):
        sys.exit(__doc__)
    config = gather()
    if sys.argv[1:] == ["build"]:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(config)]
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement of the theme
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
