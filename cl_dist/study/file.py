"""Study file: arms, orders, seeds and registered comparison, and the run configurations that they expand to."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cl_dist.config import Section, Tree, apply_overrides, did_you_mean, merged, parse, plain_yaml, read_yaml
from cl_dist.errors import ConfigError
from cl_dist.paths import ConfigPath, home
from cl_dist.run_config import NAME, NAME_TEXT, RunConfig, parse_run
from cl_dist.statistics import Scope

Metric = Literal["accuracy", "f1", "forgetting", "transfer"]
METRICS: tuple[Metric, ...] = ("accuracy", "f1", "forgetting", "transfer")
STUDY_FILE = "a mapping with the keys base, arms and primary"
COPY = "study.yaml"
"""Name of the resolved study file in the study folder."""
REGISTERED = "registered.json"
"""Name of the registration in the study folder."""


class Comparison(Section):
    """Two arms and the metric in which they are compared: the first minus the second."""

    arms: Annotated[list[str], Field(min_length=2, max_length=2)]
    """The two arms, [a, b]: a difference above 0 means that a is higher."""
    metric: Metric = "accuracy"
    """accuracy, f1 (macro F1) or forgetting, each after the last task and averaged over tasks; transfer: accuracy right
    after a task was learned, minus that of a model of its own."""
    margin: float | None = Field(None, gt=0, lt=1)
    """Differences below it do not matter; None takes that of the primary comparison."""


class Primary(Comparison):
    """The comparison that the study is about."""

    margin: float = Field(gt=0, lt=1)
    """Differences below it do not matter: arms are "equal" if the whole interval is inside plus and minus the
    margin."""
    tasks: Scope = "sampled"
    """sampled: the claim covers tasks of this kind, and these are a sample; fixed: it covers these tasks only,
    with a narrower interval. Applies to all comparisons."""


class StudyFile(Section):
    """One study file."""

    name: Annotated[str, Field(pattern=NAME)]
    """Name of the study and of its folder; the default is the name of the study file."""
    dir: ConfigPath = "runs"
    """Parent of the study folder."""
    base: str | Tree
    """Run file that all arms share: a path, which starts at the folder of the study file, the name of a recipe, or the
    run file itself. Its baselines are not part of the study."""
    arms: dict[Annotated[str, Field(pattern=NAME)], Tree] = Field(min_length=1)
    """Settings that differ from the base, by name of the arm: those of `science` as in a run file's baselines, or of
    the sections `science` and `cluster`; keys may be dotted: train.lr: 1e-3. A `method` with a name replaces that of
    the base. The key `pairs` limits an arm to its first N pairs, or to a list of pair numbers."""
    orders: list[list[str] | str] | int | None = None
    """Orders of the tasks: lists of task ids, names of orders of the base, or the number of random permutations to draw
    from order_seed. None uses that of the base."""
    order_seed: int = Field(0, ge=0)
    """Seed of random orders; a larger number of orders extends a smaller one."""
    seeds: list[int] | int = 1
    """Seeds of the runs, or their number: 3 is [0, 1, 2]."""
    design: Literal["crossed", "paired"] = "crossed"
    """crossed: every order with every seed; paired: order i with seed i."""
    primary: Primary
    comparisons: list[Comparison] = []
    """Further comparisons, corrected for their number (Holm)."""
    metrics: list[Metric] = list(METRICS)
    """Metrics of the table of arms."""
    alone: str | None = None
    """Arm whose accuracy right after learning each task is that of "a model of its own" in transfer. None takes an arm
    of the method individual."""

    @model_validator(mode="after")
    def _names_arms(self) -> "StudyFile":
        known = list(self.arms)
        named = [arm for each in (self.primary, *self.comparisons) for arm in each.arms]
        for arm in [*named, *([self.alone] if self.alone else [])]:
            if arm not in known:
                raise ValueError(f"{arm!r} is not an arm{did_you_mean(arm, known)}")
        for each in (self.primary, *self.comparisons):
            if each.arms[0] == each.arms[1]:
                raise ValueError(f"arms={each.arms}: expected two different arms")
        keys = [(*each.arms, each.metric) for each in (self.primary, *self.comparisons)]
        if len(set(keys)) < len(keys):
            raise ValueError("comparisons: one occurs twice")
        for name, count in (("orders", self.orders), ("seeds", self.seeds)):
            if count == [] or (isinstance(count, int) and count < 1):
                raise ValueError(f"{name}={count!r}: expected at least one")
        if isinstance(self.seeds, list) and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: expected distinct seeds")
        return self


@dataclass(frozen=True, slots=True)
class Pair:
    """An order of the tasks and a seed, which every arm runs."""

    number: int
    order_number: int
    order: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """Its part of the names of runs."""
        return f"o{self.order_number}-s{self.seed}"


@dataclass(frozen=True, slots=True)
class StudyRun:
    """A run of the study."""

    arm: str
    pair: Pair
    config: RunConfig

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return self.config.run.name


@dataclass(frozen=True)
class Study:
    """A study file with its runs."""

    file: StudyFile
    pairs: tuple[Pair, ...]
    runs: tuple[StudyRun, ...]
    """All runs, pair by pair, so that an unfinished study has complete pairs."""
    tree: Tree
    """The study file with its base in it: reads back equal."""

    @property
    def folder(self) -> Path:
        """The study folder."""
        return home(self.file.dir) / self.file.name

    @property
    def tasks(self) -> list[str]:
        """Task ids in the order of the base."""
        return [task.id for task in self.runs[0].config.science.tasks]

    def of_arm(self, arm: str) -> list[StudyRun]:
        """Return the runs of an arm."""
        return [run for run in self.runs if run.arm == arm]

    @property
    def alone(self) -> str | None:
        """The arm with one model per task."""
        methods = {arm: self.of_arm(arm)[0].config.science.method.name for arm in self.file.arms}
        return self.file.alone or next((arm for arm, method in methods.items() if method == "individual"), None)


def read_study(
    path: Path, overrides: Sequence[str] = (), find: Callable[[str], Path] = Path, run_overrides: Sequence[str] = ()
) -> Study:
    """Read a study file, or the copy in a study folder, and expand its runs.

    Args:
        path: The study file or the study folder.
        overrides: Settings that replace those of the study file: "primary.margin=0.02".
        find: Returns the path of a base that is not a file next to the study file, such as a recipe.
        run_overrides: Settings that replace those of the base.

    Raises:
        ConfigError: With one line per fault.
    """
    if path.is_dir():
        if not all((path / name).is_file() for name in (COPY, REGISTERED)):
            raise ConfigError(f"{path}: expected a study file, or a study folder, with {COPY} and {REGISTERED} in it")
        tree = plain_yaml(path / COPY, STUDY_FILE)
        tree |= {"name": path.resolve().name, "dir": str(path.resolve().parent)}
        path = path / COPY
    else:
        tree = read_yaml(path, STUDY_FILE)
    tree = apply_overrides(tree, overrides)
    if "name" not in tree:
        if not re.fullmatch(NAME, path.stem):
            raise ConfigError(f"{path}: name is not set, and the file name is not a valid one: expected {NAME_TEXT}")
        tree["name"] = path.stem
    file = parse(StudyFile, tree)
    base = file.base
    if isinstance(base, str):
        sibling = path.parent / home(base)
        base = read_yaml(sibling if sibling.is_file() else find(base))
    base = apply_overrides({name: value for name, value in base.items() if name != "baselines"}, run_overrides)
    return expand(file, tree | {"base": base})


def expand(file: StudyFile, tree: Tree) -> Study:
    """Return a study with its runs.

    Raises:
        ConfigError: If a setting is invalid; the message names the arm.
    """
    base: Tree = tree["base"]
    configs = {arm: _arm(base, arm, over) for arm, over in file.arms.items()}
    parsed = {arm: _parsed(file, arm, settings, arm, {}) for arm, settings in configs.items()}
    first = next(iter(parsed.values()))
    for arm, config in parsed.items():
        ids = [task.id for task in config.science.tasks]
        if sorted(ids) != sorted(task.id for task in first.science.tasks):
            raise ConfigError(f"arms.{arm}: has the tasks {ids}: expected those of the other arms")
        if texts := [task.id for task in config.science.tasks if task.output == "text"]:
            raise ConfigError(
                f"tasks.{texts[0]}.output='text': a study compares rows that are right or wrong; expected tasks with "
                "labels"
            )
    pairs = _pairs(file, first)
    runs = []
    chosen = {arm: _chosen(arm, over.get("pairs"), pairs) for arm, over in file.arms.items()}
    for pair in pairs:
        own = {"order": list(pair.order), "seed": pair.seed}
        for arm, settings in configs.items():
            if pair in chosen[arm]:
                runs.append(StudyRun(arm, pair, _parsed(file, arm, settings, f"{arm}-{pair.name}", own)))
    return Study(file, pairs, tuple(runs), tree)


def _arm(base: Tree, arm: str, over: Tree) -> Tree:
    """Return the run file of an arm."""
    nested: Tree = {}
    dotted = []
    for key, value in over.items():
        if key == "pairs":
            continue
        first, _, rest = str(key).partition(".")
        if first in ("run", "baselines"):
            raise ConfigError(f"arms.{arm}.{key}: an arm changes science and cluster alone; the study names its runs")
        full = str(key) if first in ("science", "cluster") else f"science.{key}"
        if rest:
            dotted.append(f"{full}={json.dumps(value)}")
        elif first in ("science", "cluster"):
            if not isinstance(value, Mapping):
                raise ConfigError(f"arms.{arm}.{key}={value!r}: expected a mapping")
            nested = merged(nested, {first: value})
        else:
            nested = merged(nested, {"science": {key: value}})
    tree = merged(base, nested)
    method = nested.get("science", {}).get("method")
    if isinstance(method, Mapping) and "name" in method:
        tree["science"]["method"] = dict(method)  # replaced, as in baselines: each method has its own settings
    return apply_overrides(tree, dotted)


def _parsed(file: StudyFile, arm: str, tree: Tree, name: str, science: Tree) -> RunConfig:
    """Return the configuration of a run, in the folder of the study."""
    folder = home(file.dir) / file.name
    run = {**tree.get("run", {}), "name": name, "dir": str(folder / "runs")}
    if run.get("mirror"):
        run["mirror"] = f"{str(run['mirror']).rstrip('/')}/{file.name}"
    over = {"run": run, "science": {**tree.get("science", {}), **science}}
    try:
        return parse_run({**tree, **over})
    except ConfigError as error:
        raise ConfigError("\n".join(f"arms.{arm}: {line}" for line in str(error).splitlines())) from None


def _pairs(file: StudyFile, config: RunConfig) -> tuple[Pair, ...]:
    orders = _orders(file, config)
    seeds = list(range(file.seeds)) if isinstance(file.seeds, int) else file.seeds
    numbered = list(enumerate(orders, 1))
    if file.design == "crossed":
        found = list(product(numbered, seeds))
    elif len(orders) != len(seeds):
        raise ConfigError(f"design: paired with {len(orders)} orders and {len(seeds)} seeds: expected as many of each")
    else:
        found = list(zip(numbered, seeds, strict=True))
    return tuple(Pair(k, number, order, seed) for k, ((number, order), seed) in enumerate(found, 1))


def _orders(file: StudyFile, config: RunConfig) -> list[tuple[str, ...]]:
    ids = [task.id for task in config.science.tasks]
    if file.orders is None:
        return [tuple(task.id for task in config.science.sequence().tasks)]
    if isinstance(file.orders, int):
        if file.orders > math.factorial(len(ids)):
            raise ConfigError(f"orders={file.orders}: {len(ids)} tasks have only {math.factorial(len(ids))} orders")
        return _permutations(ids, file.orders, file.order_seed)
    named = config.science.named_orders()
    orders = []
    for number, order in enumerate(file.orders):
        if isinstance(order, str):
            if order not in named:
                raise ConfigError(f"orders.{number}={order!r}: no such order{did_you_mean(order, list(named))}")
            order = named[order]
        if sorted(order) != sorted(ids):
            raise ConfigError(f"orders.{number}={order}: expected each of {', '.join(ids)} once")
        orders.append(tuple(order))
    if len(set(orders)) < len(orders):
        raise ConfigError("orders: one occurs twice")
    return orders


def _permutations(ids: Sequence[str], count: int, seed: int) -> list[tuple[str, ...]]:
    """Return distinct random orders; the k-th does not depend on how many are drawn."""
    found: dict[tuple[str, ...], None] = {}
    draw = 0
    while len(found) < count:
        keys = {name: hashlib.sha256(json.dumps([seed, draw, name]).encode()).digest() for name in ids}
        found.setdefault(tuple(sorted(ids, key=lambda name: keys[name])))
        draw += 1
    return list(found)


def _chosen(arm: str, given: Any, pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs that an arm runs."""
    if given is None:
        return list(pairs)
    numbers = list(range(1, given + 1)) if isinstance(given, int) and not isinstance(given, bool) else given
    valid = isinstance(numbers, list) and numbers and all(isinstance(n, int) and 1 <= n <= len(pairs) for n in numbers)
    if not valid:
        raise ConfigError(
            f"arms.{arm}.pairs={given!r}: expected a number of pairs from 1 to {len(pairs)}, or a list of their numbers"
        )
    return [pair for pair in pairs if pair.number in numbers]
