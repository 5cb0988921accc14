"""The README's figures are those of the stored summaries."""

from pathlib import Path

import pytest

from launcher.tables import RESULTS, filled, kept, table
from tests.launcher.summaries import summaries

ROOT = Path(__file__).parents[2]


def test_readme_shows_what_the_stored_summaries_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    readme = Path("README.md").read_text(encoding="utf8")
    assert list(RESULTS.glob("*.json"))
    for path in RESULTS.glob("*.json"):
        assert f"<!-- table: {path.stem} -->" in readme
    assert filled(readme) == readme, "run `make tables`"


def test_a_table_has_a_row_per_run_and_no_number_for_what_was_not_measured() -> None:
    runs = [kept(summary) for summary in summaries()]
    runs[0]["metrics"]["cl/bwt"]["value"] = None
    text = table(runs)
    assert text.count("\n| ") == len(runs) + 1
    row = next(line for line in text.splitlines() if line.startswith(f"| {runs[0]['method']} "))
    assert row.split("|")[6].strip() == "-"
