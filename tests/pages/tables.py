"""The generated blocks of the pages: tables of results and measurements, and references of settings and commands.

A block stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME: a file of tests/results, or a key of REFERENCES.

python -m tests.pages.tables keep NAME RUN...   store the summaries of runs under tests/results/NAME.json
python -m tests.pages.tables write              write every block of every page
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.pages.commands import command_table, exit_code_table
from tests.pages.markdown import GENERATED, ROOT, pages, wrapped
from tests.pages.measured_tables import chaos, gpu, memory, parity, scaling, speed
from tests.pages.run_tables import RESULTS, keep, means, table
from tests.pages.settings import method_settings, metric_table, recipe_table, run_file_settings

MEASURED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "gpu": gpu,
    "parity": parity,
    "chaos": chaos,
    "memory": memory,
    "scaling": scaling,
}
"""Files of tests/results that are not summaries of runs."""
REFERENCES: dict[str, Callable[[], str]] = {
    "commands": command_table,
    "exit-codes": exit_code_table,
    "metrics": metric_table,
    "recipes": recipe_table,
    "run-file": run_file_settings,
    "method-settings": method_settings,
}
"""Blocks that are generated from the code."""


def results() -> dict[str, Any]:
    """Return the stored results by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf8")) for path in sorted((ROOT / RESULTS).glob("*.json"))}


def block(name: str, stored: Mapping[str, Any]) -> str:
    """Return the text of a generated block.

    Raises:
        KeyError: If no block has this name.
    """
    if name in REFERENCES:
        text = REFERENCES[name]()
    elif name == "ctr-demo-means":
        text = means(stored["ctr-demo"])
    elif name == "speed":
        text = speed(stored[name], stored.get("scaling"))
    else:
        text = MEASURED.get(name, table)(stored[name])
    return wrapped(text)


def filled(page: str) -> str:
    """Return a page with every generated block written anew."""
    stored = results()
    return GENERATED.sub(
        lambda match: f"<!-- table: {match['name']} -->\n{block(match['name'], stored)}<!-- end -->", page
    )


def main() -> None:
    """Store the summaries of runs, or write the pages."""
    match sys.argv[1:]:
        case ["keep", name, *folders] if folders:
            keep(name, [Path(folder) for folder in folders])
        case ["write"]:
            for name, page in pages().items():
                if (new := filled(page)) != page:
                    (ROOT / name).write_text(new, encoding="utf8")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
