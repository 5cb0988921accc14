"""References of settings, metrics and recipes, from the classes and tables that define them."""

import re
from collections.abc import Iterator
from itertools import takewhile

from cl_dist.config import Section
from cl_dist.methods import METHODS
from cl_dist.metrics import DEFINITIONS
from cl_dist.run_config import RunConfig, Science
from launcher import runs
from launcher.settings import default_text, description, inner, value_text
from tests.pages.markdown import anchor, table

METHODS_PAGE = "../cl_dist/methods/README.md"


def run_file_settings() -> str:
    """Return a table of settings for each section of a run file, the method's own ones left out."""
    return "\n".join(_sections(RunConfig, ""))


def method_settings() -> str:
    """Return a table of settings for each class of method settings."""
    parts = []
    for config in dict.fromkeys(method.config for method in METHODS.values()):
        names = [f"`{name}`" for name, method in METHODS.items() if method.config is config]
        parts.append(f"### {', '.join(names)}\n")
        parts += _sections(config, "method", skip=("name",)) if len(config.model_fields) > 1 else ["No settings.\n"]
    return "\n".join(parts)


def metric_table() -> str:
    """Return the metrics of a run: the words for them, their formulas and meanings."""
    rows = [[f"`{name}`", each.word, f"`{each.formula}`", each.meaning] for name, each in DEFINITIONS.items()]
    return table(["metric", "in tables and pages", "formula", "meaning"], rows)


def recipe_table() -> str:
    """Return the recipes and the first sentence of the comment that each begins with."""
    rows = []
    for name, path in sorted(runs.recipes().items()):
        comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf8").splitlines())
        sentence = re.split(r"[.:;](?= |$)", " ".join(line.lstrip("# ") for line in comment), maxsplit=1)[0]
        rows.append([f"`{name}`", sentence])
    return table(["recipe", "what it runs"], rows)


def undescribed() -> list[str]:
    """Return the settings of a run file that have no description."""
    return [line for kind in _classes(RunConfig) for line in _undescribed(kind)]


def _undescribed(kind: type[Section]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        if not description(kind, name) and inner(field) is None and name not in ("name", "method", "schema_version"):
            yield f"{kind.__name__}.{name}"


def _classes(kind: type[Section]) -> Iterator[type[Section]]:
    yield kind
    for field in kind.model_fields.values():
        if (section := inner(field)) is not None:
            yield from _classes(section)
    if kind is Science:
        for config in dict.fromkeys(method.config for method in METHODS.values()):
            yield from _classes(config)


def _sections(kind: type[Section], path: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the table of a section, then heading and table of each section in it."""
    properties = kind.model_json_schema()["properties"]
    nested, rows = [], []
    for name, field in kind.model_fields.items():
        if name in skip:
            continue
        section = None if name == "method" else inner(field)
        below = f"{path}.{name}" if path else name
        text = description(kind, name)
        if section is not None:
            below += "[]" if properties[name].get("type") == "array" else ""
            nested.append((section, below))
            text = " ".join(filter(None, [text, f"See [`{below}`](#{anchor(below)})."]))
        elif name == "method":
            text = f"Name and settings of the method: see [methods]({METHODS_PAGE})."
        rows.append([f"`{name}`", default_text(field, _code), value_text(properties[name], _code), text])
    yield table(["key", "default", "value", "meaning"], rows)
    for section, below in nested:
        yield f"{'####' if path.startswith('method') else '###'} `{below}`\n"
        yield from _sections(section, below)


def _code(text: str) -> str:
    return f"`{text}`"
