"""Links, anchors, paths, language and layout of the Markdown pages."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from cl_dist.methods import METHODS
from cl_dist.run_config import read_run_file
from tests.pages import markdown
from tests.pages.markdown import GENERATED, ROOT, WIDTH, anchor, anchors, blocks, headings, inline_code, links, pages
from tests.pages.pictures import SHOTS
from tests.pages.settings import undescribed

PAGES = sorted(pages())
HISTORY = ("CHANGELOG.md", "cl_dist/DECISIONS.md", "cl_dist/decisions/")
"""Pages that name settings, modules and words as they were on a date."""
LANGUAGES = {"sh", "yaml", "python", "text"}
BANNED = re.compile(
    r"\b(told|held|beside|so many|nobody|whoever|anybody|for ever|mend(s|ed|ing)?|those that|at hand|made anew)\b",
    flags=re.I,
)
PATH = re.compile(rf"(?:{'|'.join(markdown.FOLDERS)})/[\w./-]+")
NAMED = re.compile(rf"((?:{'|'.join(markdown.FOLDERS)})/[\w/-]+\.py)::([\w.]+)")
PICTURES = ("launcher/pictures/terminal.svg", *(f"launcher/pictures/{name}" for name in SHOTS))


def handwritten(page: str) -> str:
    """Return a page without its generated blocks; line numbers stay."""
    return GENERATED.sub(lambda match: "\n" * match[0].count("\n"), pages()[page])


def test_the_front_page_is_short_enough_to_read() -> None:
    lines = pages()["README.md"].splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", PAGES)
def test_lines_outside_of_tables_have_at_most_120_columns(page: str) -> None:
    lines = enumerate(pages()[page].splitlines(), 1)
    assert [number for number, line in lines if len(line) > WIDTH and not line.startswith("|")] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_internal_link_leads_somewhere(page: str) -> None:
    assert [f"{page}:{line}: {target}" for line, target in links(pages()[page]) if not exists(page, target)] == []


def exists(page: str, target: str) -> bool:
    """Return whether a link of a page has a target; those to other sites are not followed."""
    if re.match(r"[a-z]+:", target):
        return True
    path, _, fragment = unquote(target).partition("#")
    place = (ROOT / page).parent / path if path else ROOT / page
    if not place.resolve().is_relative_to(ROOT) or not place.exists():
        return False
    return not fragment or fragment in anchors(place.read_text(encoding="utf8"))


def test_a_broken_link_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exists("README.md", "launcher/README.md#exit-codes")
    assert exists("launcher/README.md", "../README.md#your-own-data")
    assert not exists("README.md", "launcher/NOWHERE.md")
    assert not exists("README.md", "launcher/README.md#no-such-heading")
    assert not exists("README.md", "../elsewhere")
    assert list(links("see [a](b.md)\n`[c](d.md)`\n[`e`](f.md)")) == [(1, "b.md"), (3, "f.md")]


def test_anchors_that_are_linked_are_the_same_on_the_site() -> None:
    linked = {target.partition("#")[2] for page in pages().values() for _, target in links(page)}
    names = {name for page in pages().values() for name in headings(page) if anchor(name) in linked}
    assert len(names) > 20
    assert [name for name in names if anchor(name) != markdown.site_anchor(name)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(HISTORY)])
def test_every_path_in_inline_code_exists(page: str) -> None:
    found = ((line, path.rstrip(".")) for line, code in inline_code(pages()[page]) for path in PATH.findall(code))
    named = ((line, path) for line, path in found if "NAME" not in path)
    assert [f"{page}:{line}: {path}" for line, path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(HISTORY)])
def test_every_name_in_a_module_exists(page: str) -> None:
    found = ((line, *match) for line, code in inline_code(pages()[page]) for match in NAMED.findall(code))
    assert [f"{page}:{line}: {path}::{name}" for line, path, name in found if not defines(path, name)] == []


def defines(path: str, name: str) -> bool:
    """Return whether a module of the repository defines a name, such as `Class.method`."""
    names, body = name.split("."), ast.parse((ROOT / path).read_text(encoding="utf8")).body
    for each in names:
        nodes = [node for node in body if each in names_of(node)]
        if not nodes:
            return False
        body = getattr(nodes[0], "body", [])
    return True


def names_of(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    match node:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return [node.name]
        case ast.Assign():
            return [target.id for target in node.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def test_a_missing_name_is_found() -> None:
    assert defines("cl_dist/run.py", "Run.facts")
    assert defines("cl_dist/kinds.py", "KINDS")
    assert not defines("cl_dist/run.py", "Run.fact")
    assert not defines("cl_dist/run.py", "Runs.facts")


def test_the_page_has_every_name_of_telemetry() -> None:
    source = (ROOT / "cl_dist/stages/telemetry.py").read_text(encoding="utf8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    (text,) = [ast.get_docstring(node) or "" for node in classes if node.name == "Telemetry"]
    names = re.findall(r"\b(?:train|memory)/[\w<>]+", text)
    assert len(names) == 9
    assert [name for name in names if f"`{name}`" not in pages()["launcher/README.md"]] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_block_names_its_language(page: str) -> None:
    assert [block.where for block in blocks(page, pages()[page]) if block.language not in LANGUAGES] == []
    assert pages()[page].count("```") == 2 * len(list(blocks(page, pages()[page])))


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(HISTORY)])
def test_pages_are_written_in_plain_words(page: str) -> None:
    text = handwritten(page)
    if page == "CONTRIBUTING.md":  # its section on prose quotes the words
        text = text.partition("## Prose")[0] + text.partition("## Pages")[2]
    assert [(text.count("\n", 0, match.start()) + 1, match[0]) for match in BANNED.finditer(text)] == []


def run_files() -> Iterator[tuple[str, str]]:
    for page, text in pages().items():
        for block in blocks(page, text):
            if block.language == "yaml" and {"science", "run"} & (yaml.safe_load(block.text) or {}).keys():
                yield block.where, block.text


@pytest.mark.parametrize(("where", "text"), list(run_files()))
def test_run_files_on_pages_parse(where: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text(text, encoding="utf8")
    assert read_run_file(tmp_path / "page.yaml").science.tasks


def test_the_front_page_has_a_run_file() -> None:
    assert any(where.startswith("README.md") for where, _ in run_files())


@pytest.mark.parametrize("page", ["README.md", "cl_dist/methods/README.md"])
def test_every_method_has_a_row(page: str) -> None:
    rows = [line for line in handwritten(page).splitlines() if line.startswith("|")]
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows)))
    assert METHODS.keys() - named == set()


def test_every_setting_has_a_description() -> None:
    assert undescribed() == []


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_small(name: str) -> None:
    assert 1000 < (ROOT / name).stat().st_size < 150_000


@cache
def messages() -> str:
    """Return every text constant of the packages, one a line; a placeholder of a message separates two."""
    found = list[str]()
    for folder in ("cl_dist", "launcher"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf8"))
            values = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
            found += [value for value in values if isinstance(value, str)]
    return "\n".join(found)


def errors_on_page() -> list[str]:
    rows = re.findall(r"^\| `([^`]+)` \|", pages()["launcher/TROUBLESHOOTING.md"], flags=re.MULTILINE)
    return [piece for row in rows for piece in row.split(" ... ")]


def test_there_are_twenty_errors() -> None:
    assert len(re.findall(r"^\| `", pages()["launcher/TROUBLESHOOTING.md"], flags=re.MULTILINE)) == 20


@pytest.mark.parametrize("message", errors_on_page())
def test_the_code_has_every_message_of_the_page(message: str) -> None:
    assert message in messages()
