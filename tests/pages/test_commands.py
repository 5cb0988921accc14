"""Every command on the pages can be called, and names the test that runs it or why none does."""

import re

import pytest

from tests.pages.commands import SHELL, commands, fault, program
from tests.pages.markdown import ROOT, Block, blocks, inline_code, pages

SHELL_BLOCKS = [block for page, text in pages().items() for block in blocks(page, text) if block.language == SHELL]
OTHERS = [block for page, text in pages().items() for block in blocks(page, text) if block.language != SHELL]
HISTORY = ("CHANGELOG.md", "cl_dist/DECISIONS.md", "cl_dist/decisions/")


def where(block: Block) -> str:
    return block.where


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=where)
def test_commands_of_a_block_can_be_called(block: Block) -> None:
    found = list(commands(block.text))
    assert found
    assert [problem for words in found if program(words) and (problem := fault(words))] == []


@pytest.mark.parametrize(
    "block", [*SHELL_BLOCKS, *(block for block in OTHERS if block.language == "python")], ids=where
)
def test_a_block_names_the_tests_that_run_it_or_a_reason(block: Block) -> None:
    assert block.kind, f"{block.where}: put <!-- run by: TESTS --> or <!-- not run: REASON --> directly above"
    if block.kind == "not run":
        assert len(block.by) > 10
        return
    tests = [ROOT / name for name in block.by.split(", ")]
    assert [path for path in tests if not path.is_file()] == []
    text = "\n".join(path.read_text(encoding="utf8") for path in tests)
    if "tests/launcher/test_readme.py" in block.by:  # it runs the blocks as they stand
        return
    shell = block.text if block.language == SHELL else ""
    verbs = {words[1] for words in commands(shell) if program(words) == "cl-dist"}
    assert [verb for verb in verbs if not re.search(rf"\b{re.escape(verb)}\b", text)] == []


def test_commands_stand_in_shell_blocks() -> None:
    lines = [(block.where, line) for block in OTHERS for line in block.text.splitlines()]
    assert [line for line in lines if re.match(r"(\.venv/bin/)?(cl-dist|make|python3? -m) \w", line[1])] == []


@pytest.mark.parametrize("page", sorted(page for page in pages() if not page.startswith(HISTORY)))
def test_commands_in_running_text_exist(page: str) -> None:
    found = [
        (line, words)
        for line, code in inline_code(pages()[page])
        if re.match(r"(\S+=\S+ )?(\.venv/bin/)?(cl-dist|make|python3? -m) \S", code)
        for words in commands(code)
    ]
    problems = ((line, fault(words, is_whole=False)) for line, words in found)
    assert [f"{page}:{line}: {problem}" for line, problem in problems if problem] == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("cl-dist plan x.yaml science.train.epochs=3 --json", ""),
        ("A=1 .venv/bin/cl-dist data check x.yaml | jq . > y", ""),
        ("x=$(cl-dist plan x.yaml --bogus)", "`cl-dist plan`: No such option: --bogus"),
        ("cl-dist plans x.yaml", "`cl-dist` has no command 'plans'"),
        ("cl-dist data look x.yaml", "`cl-dist data` has no command 'look'"),
        ("cl-dist predict runs/x", "`cl-dist predict`: Missing"),
        ("make check tables", ""),
        ("make nothing", "no target nothing"),
        ("python -m tests.pages.tables write", ""),
        ("python3 -m tests.nothing", "no module tests.nothing"),
    ],
)
def test_a_wrong_command_is_found(line: str, problem: str) -> None:
    found = [fault(words) for words in commands(line) if program(words)]
    assert "".join(found).startswith(problem)
    assert bool("".join(found)) == bool(problem)


def test_comments_and_line_ends_do_not_count() -> None:
    assert list(commands("a b \\\n  c   # d; e\nf && g")) == [["a", "b", "c"], ["f"], ["g"]]
