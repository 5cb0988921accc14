"""The site holds every page and is built without a warning."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.pages.markdown import links, pages
from tests.pages.site import configuration, gather, prepared


def test_every_page_is_in_the_navigation() -> None:
    listed = [page for section in configuration()["nav"] for pages_ in section.values() for page in pages_]
    assert sorted(name for page in listed for name in page.values()) == sorted(pages())


def test_gathered_pages_link_to_gathered_files_alone(tmp_path: Path) -> None:
    config = gather(tmp_path)
    folder = tmp_path / yaml.safe_load(config.read_text(encoding="utf8"))["docs_dir"]
    for name in pages():
        text = (folder / name).read_text(encoding="utf8")
        inner = [target for _, target in links(text) if ":" not in target and not target.startswith("#")]
        assert [target for target in inner if not ((folder / name).parent / target.partition("#")[0]).exists()] == []


def test_lists_and_tables_stand_alone_and_code_is_kept() -> None:
    text = (
        "words:\n- one\n  more\n- two\n\n```sh\n# words:\n- x   <!-- kept -->\n```\n<!-- gone -->\n| a |\n| - |\nend\n"
    )
    expected = "words:\n\n- one\n  more\n- two\n\n\n```sh\n# words:\n- x   <!-- kept -->\n```\n\n| a |\n| - |\n\nend\n"
    assert prepared("README.md", text) == expected
    assert prepared("README.md", "[a](LICENSE) [b](CHANGELOG.md)") == "a [b](CHANGELOG.md)"


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    config = gather(tmp_path)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/index.html").is_file()
