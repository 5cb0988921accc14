"""Strict YAML: plain data only, no duplicate keys, numbers as in YAML 1.2, and bounded aliases.

Differs from PyYAML's safe loader, which reads YAML 1.1: 010, 1:30, 0x1f and 1_000 stay text, 1e-5 is a number.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.tokens import Token

from cl_dist.errors import ConfigError

INTEGER = r"[-+]?(?:0|[1-9][0-9]*)"
DECIMAL = r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9]+(?:[eE][-+]?[0-9]+)?)"
"""Number formats: those of JSON, and a leading or trailing decimal point."""
MAX_NODES = 100_000
"""Limit of the values in a file. Each alias counts as all the values it expands to, which stops alias bombs."""


class _Loader(yaml.SafeLoader):
    """Safe loader that rejects duplicate keys, recursive aliases and files that expand to more than MAX_NODES."""

    yaml_constructors = {  # neither type exists in JSON, and the order of a set differs between processes
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag not in ("tag:yaml.org,2002:binary", "tag:yaml.org,2002:set")
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._count = 0
        """Nodes so far, with aliases expanded."""
        self._sizes: dict[yaml.Node, int] = {}
        """Expanded size of each complete node, itself included."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        before = self._count
        _check_comment(event)
        node = super().compose_node(parent, index)
        assert node is not None  # PyYAML returns None for an empty document only, which does not reach this method
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:  # the anchored node is still incomplete
                text = f"*{event.anchor} is used inside the value that it refers to"
                raise ComposerError(None, None, text, mark)
            self._count += self._sizes[node]
        else:
            self._count += 1
            self._sizes[node] = self._count - before
        if self._count > MAX_NODES:
            text = f"more than {MAX_NODES} values after expanding aliases"
            raise ComposerError(None, None, text, mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":  # `<<` may be repeated
                if (key.tag, key.value) in seen:
                    raise ComposerError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def _check_comment(event: Any) -> None:
    """Raise ComposerError for `key: #text`, which YAML reads as an empty value and a comment."""
    if isinstance(event, yaml.ScalarEvent) and event.value == "" and event.implicit[0]:
        mark: Any = event.start_mark
        rest = mark.buffer[mark.pointer :].partition("\n")[0].strip(" \t\0")
        if re.match(r"#\S", rest):
            text = f"no value before the comment {rest!r:.60}; quote it if it is text, or write null"
            raise ComposerError(None, None, text, mark)


def _resolvers(kind: Any, *, without: tuple[str, ...] = ()) -> None:
    """Make a loader or dumper recognise INTEGER and DECIMAL as numbers, after removing the tags in `without`."""
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
    """Dumper that quotes every text which this module or a YAML 1.1 reader would take for a number, such as 1e-5."""


_resolvers(Dumper)


def _text(dumper: Dumper, text: str) -> yaml.Node:
    """Represent a text. Only double quotes preserve a next-line character (U+0085)."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


Dumper.add_representer(str, _text)


def yaml_text(tree: Mapping[str, Any], width: int = 80) -> str:
    """Return a tree as YAML that reads back equal."""
    return yaml.dump(dict(tree), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=width)


def parse_yaml(text: str, where: str) -> Any:
    """Return the data of a YAML text.

    Args:
        text: One YAML document.
        where: Start of the error message.

    Raises:
        ConfigError: If it is not valid YAML, repeats a key, or exceeds MAX_NODES.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{where}not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # such as an impossible date
        raise ConfigError(f"{where}not valid YAML: {error}") from None


def has_comment(text: str) -> bool:
    """Return whether YAML drops part of a text as a comment."""
    tokens: Iterator[Token] = yaml.scan(text, Loader=_Loader)
    return any("#" in text[one.end_mark.index : other.start_mark.index] for one, other in pairwise(tokens))
