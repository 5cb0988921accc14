"""Strict settings: a pydantic base that suggests the key you meant, YAML with `extends`, dotted overrides."""

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cl_dist.errors import ConfigError

Tree = dict[str, Any]


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
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


S = TypeVar("S", bound=BaseModel)


def parse(kind: type[S], tree: Mapping[str, Any], where: str = "") -> S:
    """Check a tree of plain data against a section.

    Raises:
        ConfigError: With one line per fault, each naming the dotted field, its value and what was expected.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            path = ".".join(str(part) for part in fault["loc"]) or kind.__name__
            message = fault["msg"].removeprefix("Value error, ")
            given = fault["input"]
            shown = f"={given!r}" if isinstance(given, str | int | float | bool | None) else ""
            lines.append(f"{where}{path}{shown}: {message}")
        raise ConfigError("\n".join(lines)) from None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Return base with over laid on top: mappings merge key by key, anything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def read_yaml(path: Path) -> Tree:
    """Read a YAML mapping; `extends: other.yaml` (relative to this file) is laid underneath, `${env:NAME}` filled in.

    Raises:
        ConfigError: If the file is missing, is not a YAML mapping, extends itself, or names an unset variable.
    """
    return _read_yaml(path, ())


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> Tree:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path.name}: extends itself through {' -> '.join(p.name for p in (*seen, path))}")
    tree = plain_yaml(path)
    base = tree.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: extends={base!r}: expected the path of another run file")
    filled = _fill_env(tree, path)
    return merged(_read_yaml(path.parent / base, (*seen, path)), filled) if base else filled


def plain_yaml(path: Path) -> Tree:
    """Read a YAML mapping as it stands.

    Raises:
        ConfigError: If the file is missing or is not a YAML mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, for one
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping with the keys run, science and cluster")
    return tree


def _fill_env(node: Any, path: Path) -> Any:
    if isinstance(node, dict):
        return {key: _fill_env(value, path) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill_env(value, path) for value in node]
    if isinstance(node, str):
        return re.sub(r"\$\{env:(\w+)\}", lambda match: _env(match[1], path), node)
    return node


def _env(name: str, path: Path) -> str:
    if name not in os.environ:
        raise ConfigError(f"{path}: uses ${{env:{name}}}, but {name} is not set in the environment")
    return os.environ[name]


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> Tree:
    """Lay `a.b.c=value` settings over a tree; values are YAML, list items are named by index or by their id.

    Raises:
        ConfigError: If an override has no '=', names a list item that does not exist, or does not parse.
    """
    result: Tree = yaml.safe_load(yaml.safe_dump(dict(tree)))  # a deep copy of plain data
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r}: expected dotted.key=value, such as science.train.epochs=3")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from None
        *parents, last = key.split(".")
        node: Any = result
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


def _index(items: Any, part: str, override: str) -> int:
    if not isinstance(items, list):
        raise ConfigError(f"{override!r}: no field {part!r} below a single value")
    for index, item in enumerate(items):
        if isinstance(item, dict) and item.get("id") == part:
            return index
    if part.isdigit() and int(part) < len(items):
        return int(part)
    ids = [str(item["id"]) for item in items if isinstance(item, dict) and "id" in item]
    raise ConfigError(f"{override!r}: no list item {part!r}{did_you_mean(part, ids)}")
