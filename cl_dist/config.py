"""Strict settings: a pydantic base that suggests the key you meant, YAML with `extends`, dotted overrides."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, TypeVar
from unicodedata import normalize

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from yaml.composer import ComposerError

from cl_dist.errors import ConfigError

Tree = dict[str, Any]
RUN_FILE = "a mapping with the keys run, science and cluster"
NUMBER = "expected a number, written as 10 or 1.5 or 1e-5"
INTEGER = r"[-+]?(?:0|[1-9][0-9]*)"
DECIMAL = r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9]+(?:[eE][-+]?[0-9]+)?)"
"""How whole numbers and others are written: as in JSON, and with a bare or a leading point."""
MAX_NODES, MAX_DEPTH = 100_000, 50
"""Bounds of a tree: values, those behind aliases counted wherever they stand, and how deep they are nested."""


class Section(BaseModel):
    """Base of every group of settings: frozen, no unknown keys, docstrings become the schema's descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _suggest(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            known = list(cls.model_fields)
            for key in given:
                if key not in known:
                    raise ValueError(f"unknown key {key!r}{did_you_mean(str(key), known)}")
        return given

    def changed(self) -> Tree:
        """Return the fields that differ from their defaults, as plain data: what enters a fingerprint.

        A section in the place of None says something by being there, also with defaults alone: it is given whole.
        """
        found = self.model_dump(mode="json", exclude_defaults=True)
        optional = (name for name, field in type(self).model_fields.items() if field.default is None)
        return found | {
            name: section.model_dump(mode="json")
            for name in optional
            if isinstance(section := getattr(self, name), Section)
        }

    def updated(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with these fields replaced and checked again."""
        return parse(type(self), merged(self.model_dump(mode="json", exclude_unset=True), changes))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return '; did you mean ...?' for the nearest known word, or the list of what is known."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if near and normalize("NFKC", near[0]) == normalize("NFKC", word):
        return f"; did you mean {near[0]!a}?"  # as it is not told from the word when it is printed
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known)) or 'none'}"


S = TypeVar("S", bound=BaseModel)


def parse(kind: type[S], tree: Mapping[str, Any], where: str = "") -> S:
    """Check a tree of plain data against a section.

    Raises:
        ConfigError: With one line per fault, each naming the dotted field, its value and what was expected.
    """
    if unusable := list(_unusable(tree)):
        raise ConfigError("\n".join(f"{where}{line}" for line in unusable))
    try:
        made = kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}{line}" for line in _told(kind, error.errors()))) from None
    if misread := list(_misread(tree, made)):
        raise ConfigError("\n".join(f"{where}{line}" for line in misread))
    return made


def _told(kind: type[BaseModel], faults: Sequence[Any]) -> Iterator[str]:
    """Yield a line for each fault: the field, its value, what was expected, and quotes where YAML misread a text."""
    # Of a field that takes a list or a text pydantic tells what is wrong with it as either, and which it means.
    either = {fault["loc"][:n] for fault in faults for n, part in enumerate(fault["loc"]) if _is_list(part)}
    for fault in faults:
        given, message, loc = fault["input"], fault["msg"].removeprefix("Value error, "), fault["loc"]
        if loc[:-1] in either:
            if _is_list(loc[-1]) != isinstance(given, list):
                continue
            loc = loc[:-1]
        parts = [str(part) for part in loc if not _is_list(part)]
        is_shown = given is None or isinstance(given, str | int | float | date) or fault["type"] == "string_type"
        shown = f"={str(given) if isinstance(given, date) else repr(given):.200}" if is_shown else ""
        if parts[-1:] == ["[key]"]:
            parts, shown, message = parts[:-2], "", f"key {given!s}: {message}"
        if fault["type"].startswith(("greater_than", "less_than")) and not _is_number(given):
            message = NUMBER
        elif fault["type"] == "string_type":
            message += _quoted(given)
        elif fault["type"] == "list_type" and isinstance(given, str):
            items = ", ".join(re.split(r"[,\s]+", given.strip()))
            message += f"; a list is written in brackets: [{items}]"
        yield f"{'.'.join(parts) or kind.__name__}{shown}: {message}"


def _is_list(part: Any) -> bool:
    return isinstance(part, str) and part.startswith("list[")


def _quoted(value: Any) -> str:
    """Return '; quote it: ...' for a value that YAML has made of a text without quotes."""
    match value:
        case bool():
            first, others = ("yes", "'on', 'true'") if value else ("no", "'off', 'false'")
            return f"; quote it: '{first}' (or {others}, as it is written)"
        case None:
            return "; quote it if it is a text: 'null'"
        case int() | float() | date():
            return f"; quote it: '{value}' (as it is written)"
        case Mapping():
            return "; quote it: YAML takes a text with ': ' for a mapping"
        case _:
            return ""


def _misread(given: Any, made: Any, path: str = "") -> Iterator[str]:
    """Yield a line for each truth value, and each text that is no plain decimal, of which a number was made."""
    if isinstance(made, BaseModel | Mapping) and isinstance(given, Mapping):
        for key, value in given.items():
            inner = getattr(made, str(key), None) if isinstance(made, BaseModel) else made.get(key)
            yield from _misread(value, inner, f"{path}.{key}" if path else str(key))
    elif isinstance(made, list | tuple) and isinstance(given, list | tuple):
        for number, (value, inner) in enumerate(zip(given, made, strict=False)):
            yield from _misread(value, inner, f"{path}.{number}")
    elif isinstance(made, int | float) and not isinstance(made, bool) and not _is_number(given):
        yield f"{path}={given!r}: {NUMBER}"


def _is_number(given: Any) -> bool:
    """Return whether a number may be made of a value: of a number, or of a text that is one in plain decimals."""
    if isinstance(given, str):
        return re.fullmatch(f"{INTEGER}|{DECIMAL}", given.strip()) is not None
    return isinstance(given, int | float) and not isinstance(given, bool)


def _unusable(node: Any, path: str = "", depth: int = 0) -> Iterator[str]:
    """Yield a line for each value that no digest, file or tokenizer takes, and that a field of any type lets pass."""
    if isinstance(node, str):
        try:
            node.encode()
        except UnicodeEncodeError as error:
            yield f"{path}: holds half a character, {node[error.start]!a} at position {error.start}"
    elif isinstance(node, float):
        if not math.isfinite(node):
            yield f"{path}={node}: expected a finite number"
    elif isinstance(node, Mapping | list | tuple):
        if depth == MAX_DEPTH:
            yield f"{path}: nested more than {MAX_DEPTH} deep"
            return
        pairs = node.items() if isinstance(node, Mapping) else enumerate(node)
        for key, value in pairs:
            if faults := list(_unusable(key, f"{path or 'the file'}: key {key!a}")):
                yield from faults
            else:
                yield from _unusable(value, f"{path}.{key}" if path else str(key), depth + 1)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Return base with over laid on top: mappings merge key by key, anything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def read_yaml(path: Path, expected: str = RUN_FILE) -> Tree:
    """Read a YAML mapping; `extends: other.yaml` (relative to this file) is laid underneath, `${env:NAME}` filled in.

    Raises:
        ConfigError: If the file is missing, is not a YAML mapping (the message says what was expected), extends itself,
            or names an unset variable.
    """
    return _read_yaml(path, (), expected)


def _read_yaml(path: Path, seen: tuple[Path, ...], expected: str) -> Tree:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path.name}: extends itself through {' -> '.join(p.name for p in (*seen, path))}")
    tree = plain_yaml(path, expected)
    base = tree.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: extends={base!r}: expected the path of another run file")
    filled: Tree = _with_texts(tree, lambda text: _fill_env(text, path))
    return merged(_read_yaml(path.parent / base, (*seen, path), expected), filled) if base else filled


def plain_yaml(path: Path, expected: str = RUN_FILE) -> Tree:
    """Read a YAML mapping as it stands.

    Raises:
        ConfigError: If the file is missing or is not a YAML mapping, or if what it says of the run is none.
    """
    try:
        text = path.read_text(encoding="utf8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    tree = _plain(text, f"{path}: ")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected {expected}")
    if not isinstance(tree.get("run", {}), dict):
        raise ConfigError(f"{path}: run: expected a mapping with the keys name and dir, got {tree['run']!r:.50}")
    return tree


class _Loader(yaml.SafeLoader):
    """Plain data alone, no key that comes twice, and no aliases that name what is around them, or far too much.

    Numbers are those of JSON and YAML 1.2. What YAML 1.1 reads as octal (010), base 60 (1:30), hexadecimal or with
    underscores stays a text, which no number field takes.
    """

    yaml_constructors = {  # neither is JSON, and a set has another order in each process
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag not in ("tag:yaml.org,2002:binary", "tag:yaml.org,2002:set")
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._count = 0
        self._counts: dict[yaml.Node, int] = {}
        """Nodes below each finished one, with itself."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark, before = event.start_mark, self._count
        if isinstance(event, yaml.ScalarEvent) and event.value == "" and event.implicit[0]:
            rest = mark.buffer[mark.pointer :].partition("\n")[0].strip(" \t\0")
            if re.match(r"#\S", rest):
                text = f"nothing stands before the comment {rest!r:.60}; quote it if it is a text, or write null"
                raise ComposerError(None, None, text, mark)
        node = super().compose_node(parent, index)
        assert node is not None  # that of an empty text is asked for elsewhere
        if isinstance(event, yaml.AliasEvent):
            if node not in self._counts:
                raise ComposerError(None, None, f"*{event.anchor} stands inside of what it names", mark)
            self._count += self._counts[node]
        else:
            self._count += 1
            self._counts[node] = self._count - before
        if self._count > MAX_NODES:
            raise ComposerError(None, None, f"more than {MAX_NODES} values, with those of aliases", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":  # `<<` loses nothing
                if (key.tag, key.value) in seen:
                    raise ComposerError(None, None, f"key {key.value!r} comes twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def _resolvers(kind: Any, *, without: tuple[str, ...] = ()) -> None:
    """Let a loader or dumper take for numbers what is one in JSON and YAML 1.2, and not what is one in `without`."""
    kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in without]
        for first, known in kind.yaml_implicit_resolvers.items()
    }
    signs, digits = "+-", "0123456789"
    special = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    kind.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"(?:{INTEGER})$"), [*signs, *digits])
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(rf"(?:{DECIMAL}|{special})$"), [*signs, ".", *digits]
    )


_resolvers(_Loader, without=("int", "float", "value"))


class Dumper(yaml.SafeDumper):
    """Writes YAML that `read_yaml` reads back as it was: a text like 1e-5 gets quotes, here and for YAML 1.1."""


_resolvers(Dumper)


def _text(dumper: Dumper, text: str) -> yaml.Node:
    """Represent a text; one with a next-line character (U+0085) in double quotes, since other styles fold it."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


Dumper.add_representer(str, _text)


def yaml_text(tree: Mapping[str, Any], width: int = 80) -> str:
    """Return a tree as YAML that reads back equal."""
    return yaml.dump(dict(tree), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=width)


def _plain(text: str, where: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        ConfigError: If it is no YAML, or names a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{where}not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # such as a date that is none
        raise ConfigError(f"{where}not valid YAML: {error}") from None


def _with_texts(node: Any, change: Callable[[str], str]) -> Any:
    """Return a deep copy of plain data with every text changed; what an alias stands for is copied wherever it is."""
    if isinstance(node, Mapping):
        return {key: _with_texts(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_texts(value, change) for value in node]
    return change(node) if isinstance(node, str) else node


def _fill_env(text: str, path: Path) -> str:
    return re.sub(r"\$\{env:(\w+)\}", lambda match: _env(match[1], path), text)


def _env(name: str, path: Path) -> str:
    if name not in os.environ:
        raise ConfigError(f"{path}: uses ${{env:{name}}}, but {name} is not set in the environment")
    return os.environ[name]


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> Tree:
    """Lay `a.b.c=value` settings over a tree; values are YAML, list items are named by index or by their id.

    Raises:
        ConfigError: If an override has no '=', names a list item that does not exist, or does not parse.
    """
    result: Tree = _with_texts(tree, str)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r}: expected dotted.key=value, such as science.train.epochs=3")
        value = _value(text, override)
        node: Any = result
        *parents, last = _places(result, key.split("."))
        for part in parents:
            if isinstance(node, dict):
                if not isinstance(node.get(part), dict | list):
                    node[part] = {}
                node = node[part]
            else:
                node = node[_index(node, part, override)]
        if isinstance(node, list):
            node[_index(node, last, override)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ConfigError(f"{override!r}: {parents[-1]!r} is a single value and has no field {last!r}")
    return result


def _value(text: str, override: str) -> Any:
    """Return what an override sets.

    Raises:
        ConfigError: If it is no YAML, or nothing, or if YAML would drop some of it as a comment.
    """
    if not text.strip():
        raise ConfigError(
            f"{override!r}: nothing stands behind the '='; write null for no value, or '\"\"' for an empty text"
        )
    value = _plain(text, f"{override!r}: the value is ")
    tokens: list[Any] = list(yaml.scan(text, Loader=_Loader))
    if any("#" in text[one.end_mark.index : other.start_mark.index] for one, other in pairwise(tokens)):
        key, said = override.partition("=")[0], text.strip()
        raise ConfigError(
            f"{override!r}: YAML takes what stands behind '#' for a comment: leave it out, or quote the text: "
            f"{key}='\"{said}\"'"
        )
    return value


def _places(tree: Any, parts: list[str]) -> list[str]:
    """Return the parts of a dotted key, with those joined that are one key, or one item's id, with points in it."""
    found, node = [], tree
    while parts:
        names = _names(node)
        taken = next((n for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in names), 1)
        part, parts = ".".join(parts[:taken]), parts[taken:]
        found.append(part)
        if part in names:
            node = names[part]
        else:
            node = node[int(part)] if isinstance(node, list) and part.isdigit() and int(part) < len(node) else None
    return found


def _names(node: Any) -> dict[str, Any]:
    """Return what can be named below a node: the values of a mapping, the items of a list that have an id."""
    if isinstance(node, dict):
        return {key: value for key, value in node.items() if isinstance(key, str)}
    if isinstance(node, list):
        return {str(item["id"]): item for item in node if isinstance(item, dict) and "id" in item}
    return {}


def _index(items: Any, part: str, override: str) -> int:
    if not isinstance(items, list):
        raise ConfigError(f"{override!r}: no field {part!r} below a single value")
    for index, item in enumerate(items):
        if isinstance(item, dict) and str(item.get("id")) == part:
            return index
    if part.isdigit() and int(part) < len(items):
        return int(part)
    ids = [str(item["id"]) for item in items if isinstance(item, dict) and "id" in item]
    raise ConfigError(f"{override!r}: no list item {part!r}{did_you_mean(part, ids)}")
