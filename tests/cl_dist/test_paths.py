import sys
from pathlib import Path

import pytest

from cl_dist.errors import DataError
from cl_dist.paths import resolve


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site" / "corpus_of_tests"
    (folder / "texts").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "texts" / "a.txt").write_text("a\n")
    (folder.parent / "corpus_of_tests_2").mkdir()
    (folder.parent / "lone_module_of_tests.py").write_text("")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_a_plain_path_is_left_as_it_is_and_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("data/a.txt") == Path("data/a.txt")
    assert resolve("~/a.txt") == tmp_path / "a.txt"


def test_a_file_in_a_package_is_found_without_importing_the_package(package: Path) -> None:
    assert resolve("package:corpus_of_tests/texts/a.txt") == package / "texts" / "a.txt"
    assert "corpus_of_tests" not in sys.modules


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(DataError, match=r"^~no\.such\.user/x: this user does not exist on this machine"):
        resolve("~no.such.user/x")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("package:no_such_package_here/a.txt", "pip install no_such_package_here"),
        ("package:corpus_of_tests/../secret.txt", "leaves the folder"),
        ("package:corpus_of_tests/../corpus_of_tests_2/a.txt", "leaves the folder"),
        ("package:corpus_of_tests//etc/passwd", "leaves the folder"),
        ("package:corpus_of_tests", "expected package:NAME/inner/path"),
        ("package:corpus_of_tests.texts/a.txt", "expected package:NAME/inner/path"),
        ("package:lone_module_of_tests/a.txt", "single module"),
    ],
)
def test_a_package_path_that_leads_nowhere_says_why(path: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        resolve(path)
    assert path in str(caught.value)


def test_a_package_file_that_is_a_link_counts_as_inside(package: Path, tmp_path: Path) -> None:
    (tmp_path / "cache.txt").write_text("a\n")
    (package / "linked.txt").symlink_to(tmp_path / "cache.txt")  # how uv may install a wheel
    assert resolve("package:corpus_of_tests/linked.txt").read_text() == "a\n"
