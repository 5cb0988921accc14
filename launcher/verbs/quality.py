"""Quality gates: with `--fail-if "cl/forgetting_max>0.05"` a command fails if the condition is true."""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cl_dist.config import did_you_mean
from cl_dist.errors import ConfigError
from cl_dist.metrics import FORMULAS
from cl_dist.strict_yaml import DECIMAL, INTEGER

SIGNS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_EXPRESSION = re.compile(r"\s*([^\s<>=]+)\s*([<>]=?)\s*([^\s<>=]+)\s*")


@dataclass(frozen=True, slots=True)
class FailIf:
    """A condition under which a command fails."""

    metric: str
    sign: str
    bound: float

    def reason(self, metrics: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return the reason why metrics of summary.json fail the gate; None if they pass."""
        value = metrics.get(self.metric, {}).get("value")
        condition = f"--fail-if '{self.metric}{self.sign}{self.bound:g}'"
        if value is None:
            return f"{condition}: {self.metric} was not measured; it is {FORMULAS[self.metric]}"
        if SIGNS[self.sign](value, self.bound):
            return f"{condition}: {self.metric} is {value:.6g}"
        return None


def parse_gates(expressions: Sequence[str]) -> list[FailIf]:
    """Parse `--fail-if` conditions.

    Raises:
        ConfigError: If a condition is not METRIC, operator and number, or the metric does not exist.
    """
    gates = []
    for text in expressions:
        match = _EXPRESSION.fullmatch(text)
        is_number = match is not None and re.fullmatch(f"{INTEGER}|{DECIMAL}", match[3]) is not None
        bound = float(match[3]) if match is not None and is_number else math.nan
        if match is None or not math.isfinite(bound):
            raise ConfigError(f"--fail-if {text!r}: expected METRIC>NUMBER, with one of {' '.join(SIGNS)}")
        if match[1] not in FORMULAS:
            raise ConfigError(f"--fail-if {text!r}: no metric {match[1]!r}{did_you_mean(match[1], list(FORMULAS))}")
        gates.append(FailIf(match[1], match[2], bound))
    return gates
