"""Strict settings: a pydantic base class, YAML files with `extends`, and dotted overrides."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_origin
from unicodedata import normalize

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cl_dist.errors import ConfigError
from cl_dist.strict_yaml import DECIMAL, INTEGER, has_comment, parse_yaml

Tree = dict[str, Any]
RUN_FILE = "a mapping with the keys run, science and cluster"
NUMBER = "expected a number, written as 10 or 1.5 or 1e-5"
MAX_DEPTH = 50
"""Deepest nesting of a settings tree."""


class Section(BaseModel):
    """Base of every group of settings: frozen, rejects unknown keys, takes schema descriptions from docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _suggest(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            known = list(cls.model_fields)
            for key in given:
                if key not in known:
                    below = _path_to(cls, str(key))
                    hint = f"; did you mean {below!r}?" if below else did_you_mean(str(key), known)
                    raise ValueError(f"unknown key {key!r}{hint}")
        return given

    def changed(self) -> Tree:
        """Return the fields that differ from their defaults, as plain data for a fingerprint.

        A section whose default is None is returned with all its fields, since its presence alone is a setting.
        """
        found = self.model_dump(mode="json", exclude_defaults=True)
        optional = (name for name, field in type(self).model_fields.items() if field.default is None)
        return found | {
            name: section.model_dump(mode="json")
            for name in optional
            if isinstance(section := getattr(self, name), Section)
        }

    def updated(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with these fields replaced, after checking it."""
        return parse(type(self), merged(self.model_dump(mode="json", exclude_unset=True), changes))


def _path_to(kind: type[Section], key: str) -> str | None:
    """Return the dotted path of a key in the sections of a section, the shortest first; None if none has it."""
    waiting = [(kind, "")]
    for section, path in waiting:
        for name, field in section.model_fields.items():
            if name == key and path:
                return f"{path}{name}"
            below = f"{path}{name}.ID." if get_origin(field.annotation) is list else f"{path}{name}."
            kinds: list[Any] = [field.annotation]
            for each in kinds:
                if isinstance(each, type) and issubclass(each, Section):
                    waiting.append((each, below))
                kinds += get_args(each)
    return None


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return '; did you mean ...?' with the nearest known word, or the list of known words."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if near and normalize("NFKC", near[0]) == normalize("NFKC", word):
        return f"; did you mean {near[0]!a}?"  # ASCII escapes: both look the same in print
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known)) or 'none'}"


S = TypeVar("S", bound=BaseModel)


def parse(kind: type[S], tree: Mapping[str, Any], where: str = "") -> S:
    """Validate a tree of plain data as a section.

    Raises:
        ConfigError: With one line per fault, each with the dotted field, its value and the expected value.
    """
    if invalid := list(_invalid_values(tree)):
        raise ConfigError("\n".join(f"{where}{line}" for line in invalid))
    try:
        made = kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}{line}" for line in _fault_lines(kind, error.errors()))) from None
    if coerced := list(_coerced_numbers(tree, made)):
        raise ConfigError("\n".join(f"{where}{line}" for line in coerced))
    return made


def _fault_lines(kind: type[BaseModel], faults: Sequence[Any]) -> Iterator[str]:
    """Yield a line per fault: field, value, expected value, and a hint to quote text that YAML has converted."""
    # Pydantic reports a wrong `list[T] | str` once for each alternative; keep the fault of the matching one.
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
            message += f"; write a list in brackets: [{items}]"
        yield f"{'.'.join(parts) or kind.__name__}{shown}: {message}"


def _is_list(part: Any) -> bool:
    return isinstance(part, str) and part.startswith("list[")


def _quoted(value: Any) -> str:
    """Return '; quote it: ...' for a value that YAML may have converted from unquoted text."""
    match value:
        case bool():
            first, others = ("yes", "'on', 'true'") if value else ("no", "'off', 'false'")
            return f"; quote it: '{first}' (or {others}, as in the file)"
        case None:
            return "; quote it if it is text: 'null'"
        case int() | float() | date():
            return f"; quote it: '{value}' (as in the file)"
        case Mapping():
            return "; quote it: YAML reads text with ': ' as a mapping"
        case _:
            return ""


def _coerced_numbers(given: Any, made: Any, path: str = "") -> Iterator[str]:
    """Yield a line for each boolean, and each text other than a plain decimal, that pydantic converted to a number."""
    if isinstance(made, BaseModel | Mapping) and isinstance(given, Mapping):
        for key, value in given.items():
            inner = getattr(made, str(key), None) if isinstance(made, BaseModel) else made.get(key)
            yield from _coerced_numbers(value, inner, f"{path}.{key}" if path else str(key))
    elif isinstance(made, list | tuple) and isinstance(given, list | tuple):
        for number, (value, inner) in enumerate(zip(given, made, strict=False)):
            yield from _coerced_numbers(value, inner, f"{path}.{number}")
    elif isinstance(made, int | float) and not isinstance(made, bool) and not _is_number(given):
        yield f"{path}={given!r}: {NUMBER}"


def _is_number(given: Any) -> bool:
    """Return whether a value is a number, or a text with a plain decimal number."""
    if isinstance(given, str):
        return re.fullmatch(f"{INTEGER}|{DECIMAL}", given.strip()) is not None
    return isinstance(given, int | float) and not isinstance(given, bool)


def _invalid_values(node: Any, path: str = "", depth: int = 0) -> Iterator[str]:
    """Yield a line for each value that cannot be hashed, stored or tokenized, whatever the type of its field.

    These are texts that are not valid UTF-8 (a lone surrogate), numbers that are not finite, and too deep nesting.
    """
    if isinstance(node, str):
        if (fault := surrogate_fault(node)) is not None:
            yield f"{path}: {fault}"
    elif isinstance(node, float):
        if not math.isfinite(node):
            yield f"{path}={node}: expected a finite number"
    elif isinstance(node, Mapping | list | tuple):
        if depth == MAX_DEPTH:
            yield f"{path}: nested more than {MAX_DEPTH} levels deep"
            return
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        for key, value in items:
            if faults := list(_invalid_values(key, f"{path or 'the file'}: key {key!a}")):
                yield from faults
            else:
                yield from _invalid_values(value, f"{path}.{key}" if path else str(key), depth + 1)


def surrogate_fault(text: str) -> str | None:
    """Return a message for a text with half a surrogate pair, which JSON can escape but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"contains half a surrogate pair, {text[error.start]!a}, at position {error.start}"
    return None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Return base updated with over: mappings merge key by key, other values are replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def read_yaml(path: Path, expected: str = RUN_FILE) -> Tree:
    """Read a YAML mapping, merge it over the file in `extends` (a relative path starts here), expand `${env:NAME}`.

    Raises:
        ConfigError: If the file is missing, is not a YAML mapping (the message names `expected`), extends itself, or
            uses an unset variable.
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
    """Read a YAML mapping without `extends` and variables.

    Raises:
        ConfigError: If the file is missing, or it or its key `run` is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    tree = parse_yaml(text, f"{path}: ")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected {expected}")
    if not isinstance(tree.get("run", {}), dict):
        raise ConfigError(f"{path}: run: expected a mapping with the keys name and dir, got {tree['run']!r:.50}")
    return tree


def _with_texts(node: Any, change: Callable[[str], str]) -> Any:
    """Return a deep copy of plain data with `change` applied to every text; copies of an alias are independent."""
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
    """Return a tree with `a.b.c=value` settings applied; values are YAML, list items are named by index or id.

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
        *parents, last = _key_parts(result, key.split("."))
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
    """Return the value of an override.

    Raises:
        ConfigError: If it is empty or not valid YAML, or if YAML would drop part of it as a comment.
    """
    if not text.strip():
        raise ConfigError(f"{override!r}: no value after '='; write null for no value, or '\"\"' for an empty text")
    value = parse_yaml(text, f"{override!r}: the value is ")
    if has_comment(text):
        key = override.partition("=")[0]
        raise ConfigError(
            f"{override!r}: YAML reads text after '#' as a comment: remove it, or quote the value: "
            f"{key}='\"{text.strip()}\"'"
        )
    return value


def _key_parts(tree: Any, parts: list[str]) -> list[str]:
    """Return the parts of a dotted key, after joining parts that form one key or one id with dots in it."""
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
    """Return the children of a node by name: the values of a mapping, or the items of a list by their id."""
    if isinstance(node, dict):
        return {key: value for key, value in node.items() if isinstance(key, str)}
    if isinstance(node, list):
        return {str(item["id"]): item for item in node if isinstance(item, dict) and "id" in item}
    return {}


def _index(items: Any, part: str, override: str) -> int:
    if not isinstance(items, list):
        raise ConfigError(f"{override!r}: a single value has no field {part!r}")
    for index, item in enumerate(items):
        if isinstance(item, dict) and str(item.get("id")) == part:
            return index
    if part.isdigit() and int(part) < len(items):
        return int(part)
    ids = [str(item["id"]) for item in items if isinstance(item, dict) and "id" in item]
    raise ConfigError(f"{override!r}: no list item {part!r}{did_you_mean(part, ids)}")
