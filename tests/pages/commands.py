"""The commands on the pages: which there are, and whether the command line, Makefile and packages have them."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import typer

from launcher.cli import EXIT_CODES, app
from tests.pages.markdown import ROOT, table

SHELL = "sh"
"""Language of the blocks that hold commands."""
PROGRAMS = ("cl-dist", "make", "python")


def root_command() -> Any:
    """Return the command line as a tree of click commands."""
    return typer.main.get_command(app)


def command_table() -> str:
    """Return each command with the first line of its help, by panels where the command line has some."""
    rows, panels = [], list[str]()
    for panel, name, text in _listed(root_command(), ""):
        if panel and panel not in panels:
            panels.append(panel)
            rows.append([f"**{panel}**", ""])
        rows.append([f"`cl-dist {name}`", text])
    return table(["command", "what it does"], rows)


def _listed(group: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yield panel, name and help of each command; a group's commands come in the place of the group."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        panel = getattr(command, "rich_help_panel", None)
        panel = panel if isinstance(panel, str) else ""
        if hasattr(command, "commands"):
            for _, inner, text in _listed(command, f"{prefix}{name} "):
                yield panel, inner, text
        else:
            yield panel, f"{prefix}{name}", " ".join(command.get_short_help_str(300).split())


def exit_code_table() -> str:
    """Return the exit codes and their meaning."""
    return table(["exit code", "meaning"], [[str(code), meaning] for code, meaning in EXIT_CODES.items()])


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block, without variables, redirections and what is piped in."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        inner = re.findall(r"\$\(([^()]*)\)", line)
        for part in (re.sub(r"\$\([^()]*\)", "SUBSTITUTED", line), *inner):
            yield from _words(part)


def _words(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = list[str]()
    for word in [*lexer, ";"]:
        if re.fullmatch(r"[|&;]+", word):
            if command := _plain(words):
                yield command
            words = []
        else:
            words.append(word)


def _plain(words: list[str]) -> list[str]:
    """Return the words of a command from its program on."""
    found, is_file = list[str](), False
    for word in words:
        if re.fullmatch(r"[<>]+", word):
            is_file = True
        elif is_file:
            is_file = False
        elif found or not re.match(r"\w+=", word):
            found.append(word)
    return found


def program(words: list[str]) -> str:
    """Return which of PROGRAMS a command calls; '' for any other."""
    name = PurePath(words[0]).name
    name = "python" if re.fullmatch(r"python3?", name) else name
    return name if name in PROGRAMS else ""


def fault(words: list[str], *, is_whole: bool = True) -> str:
    """Return what is wrong with a command; '' if it can be called. A part of one may lack arguments."""
    match program(words):
        case "cl-dist":
            return _unparsed(words[1:], is_whole)
        case "make":
            asked = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            unknown = [word for word in asked if word not in make_targets()]
            return f"no target {', '.join(unknown)} in the Makefile" if unknown else ""
        case "python":
            if "-m" not in words[:-1]:
                return ""
            module = words[words.index("-m") + 1]
            return "" if _is_module(module) else f"no module {module}"
    return ""


def make_targets() -> set[str]:
    """Return the targets of the Makefile that have a description."""
    return set(re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf8"), flags=re.MULTILINE))


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _unparsed(arguments: list[str], is_whole: bool) -> str:
    """Return why the command line does not take some arguments; nothing is run."""
    command, name = root_command(), "cl-dist"
    parent = command.make_context(name, [], resilient_parsing=True)
    rest = list(arguments)
    while hasattr(command, "commands"):
        while rest and rest[0].startswith("-"):
            option = rest.pop(0)
            if option not in {"--help", *(each for parameter in command.params for each in parameter.opts)}:
                return f"`{name}` has no option {option}"
        if not rest:
            return ""
        if rest[0] not in command.commands:
            return f"`{name}` has no command {rest[0]!r}"
        name, command = f"{name} {rest[0]}", command.commands[rest.pop(0)]
    if rest == ["..."] or (not is_whole and not rest):
        return ""
    context = parent
    try:
        context = command.make_context(name, list(rest), parent=parent, resilient_parsing=not is_whole)
    except Exception as error:  # of click, which typer carries inside of it
        if type(error).__name__ == "Exit":  # --help
            return ""
        return f"`{name}`: {getattr(error, 'message', None) or error}"
    finally:
        context.close()
    return ""
