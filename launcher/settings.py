"""Settings of run files as rows of tables: name, default, accepted values and meaning."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic.fields import FieldInfo

from cl_dist.config import Section, did_you_mean
from cl_dist.errors import ConfigError
from cl_dist.methods import METHODS
from cl_dist.run_config import RunConfig

METHOD = "science.method"
OPERATORS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
Quote = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a section."""

    name: str
    default: str
    value: str
    meaning: str


def sections(key: str) -> list[tuple[str, list[Setting]]]:
    """Return the settings of a section of run files, then those of each section in it; or one setting.

    Args:
        key: A dotted key such as `science.train`, `science.method.ctr` or `cluster.zero_stage`; or a method's name.

    Raises:
        ConfigError: If there is no such section or setting.
    """
    key = f"{METHOD}.{key}" if key in METHODS else key
    kind: type[Section] = RunConfig
    path = ""
    for part in key.split("."):
        if path == METHOD and part in METHODS:
            kind, path = METHODS[part].config, f"{path}.{part}"
            continue
        if part not in kind.model_fields:
            known = list(METHODS) if path == METHOD else list(kind.model_fields)
            raise ConfigError(f"--for {key!r}: {path or 'a run file'} has no {part!r}{did_you_mean(part, known)}")
        below = f"{path}.{part}".strip(".")
        section = inner(kind.model_fields[part])
        if below == METHOD:
            kind, path = kind if section is None else section, below
        elif section is None:
            return [(below, [setting(kind, part)])]
        else:
            kind, path = section, below
    if path == METHOD:
        rows = [Setting(name, "", "", f"see --for {METHOD}.{name}") for name in METHODS]
        return [(f"{METHOD}: {{name: NAME, ...}}", rows)]
    return list(_nested(kind, path))


def _nested(kind: type[Section], path: str) -> Iterator[tuple[str, list[Setting]]]:
    fields = {name: inner(field) for name, field in kind.model_fields.items()}
    is_method = path.startswith(f"{METHOD}.")
    shown = [name for name in fields if not (is_method and name == "name")]
    yield path or "run file", [setting(kind, name) for name in shown]
    for name, section in fields.items():
        below = f"{path}.{name}".strip(".")
        if section is not None and below != METHOD:
            yield from _nested(section, below)


def setting(kind: type[Section], name: str) -> Setting:
    """Return a setting of a section as plain text."""
    field = kind.model_fields[name]
    schema = kind.model_json_schema()["properties"][name]
    default = "" if inner(field) is not None and not field.is_required() else default_text(field)
    return Setting(name, default, value_text(schema), description(kind, name) or "see below")


def description(kind: type[Section], name: str) -> str:
    """Return the description of a setting in one line; a class that only changes the default inherits it."""
    found = (base.model_fields.get(name) for base in kind.__mro__ if issubclass(base, Section))
    text = next((field.description for field in found if field is not None and field.description), "")
    return " ".join(text.split())


def inner(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, alone, in a list or in a union; None for a plain field."""
    waiting: list[Any] = [field.annotation]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
        waiting += get_args(kind)
    return None


def default_text(field: FieldInfo, quote: Quote = str) -> str:
    """Return the default of a setting; `quote` marks values as code."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "see below"
    if value is None:
        return "-"
    return quote(json.dumps(value)).replace('"', "")


def value_text(schema: Mapping[str, Any], quote: Quote = str) -> str:
    """Return which values a property of a JSON Schema takes; `quote` marks values as code."""
    if "anyOf" in schema:
        each = [part for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(value_text(part, quote) for part in each))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(quote(json.dumps(value)).replace('"', "") for value in values)
    if "$ref" in schema or "oneOf" in schema or "allOf" in schema:
        return "mapping"
    kind = schema.get("type", "any")
    if kind == "array":
        items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of {value_text(items, quote)}" if items else "list"
    name = {"object": "mapping", "string": "text", "boolean": "true, false"}.get(kind, kind)
    bounds = [f"{sign} {schema[key]:g}" for key, sign in OPERATORS.items() if key in schema]
    return " ".join([name, ", ".join(bounds)]).strip()
