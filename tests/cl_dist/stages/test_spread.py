"""Models divided by layers, most of them in files until they are used: samples, votes and scores keep their bits.

Without several GPUs this is what can be tried of dividing: accelerate's hooks bring each layer's weights and inputs to
where it computes.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.dispatch_ray.cluster import WorkerSlot
from cl_dist.dispatch_ray.pool import group_slots
from cl_dist.errors import ClusterError, ConfigError
from cl_dist.parallel.device_map import dispatch_by_layers, infer_device_map
from cl_dist.run import Run
from cl_dist.run_config import ClusterConfig
from cl_dist.stage import StageRef
from cl_dist.stages import build
from cl_dist.stages.shards import sharded

METHODS: dict[str, Any] = {
    "rational_lamol": tiny.METHODS["rational_lamol"],
    "rational_lamol-lora": {**tiny.METHODS["rational_lamol"], "lora": {"r": 4}},
    "ctr": tiny.METHODS["ctr"],
    "lora": tiny.METHODS["lora"],
}
STAGES = {"rational_lamol": ("generate", "record", "vote", "evaluate"), "ctr": ("evaluate",)}
CASES = [
    (name, stage) for name in METHODS for stage in STAGES["rational_lamol" if name.startswith("rational") else "ctr"]
]


class Divided:
    """Divides models as they are placed, and keeps them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.models = folder, list[nn.Module]()

    def __call__(self, model: Any, layer: type[nn.Module]) -> Any:
        self.models.append(dispatch_by_layers(model, layer, {"cpu": 0}, "disk", self._folder / f"{len(self.models)}"))
        return self.models[-1]


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {
        name: tiny.compute(
            tiny.make_run(tmp_path_factory.mktemp(name), {"science": {"method": dict(method)}}, tasks=("food", "film"))
        )
        for name, method in METHODS.items()
    }


@pytest.fixture
def divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Divided:
    found = Divided(tmp_path / "weights")
    monkeypatch.setattr(build, "dispatch", found)
    return found


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_divided_model_leaves_the_same_bytes(
    all_runs: dict[str, Run], divided: Divided, tmp_path: Path, name: str, kind: str
) -> None:
    run = all_runs[name]
    job, shards = run.job(run.stage(StageRef(task=1, stage=kind))), sharded(kind)
    worker = shards.worker(job)
    out = tmp_path / "out"
    out.mkdir()
    shards.merge(job, [(shard, worker.run(shard)) for shard in shards.cut(job)], out)
    assert divided.models
    model = divided.models[-1]
    resting = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert len([name for name in resting if re.search(r"\.(h|layer)\.[01]\.", name)]) > 10, "nothing was divided"
    stored = run.ledger.path(StageRef(task=1, stage=kind))
    files = [path for path in out.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if path.read_bytes() != (stored / path.relative_to(out)).read_bytes()] == []


class Layer(nn.Linear):
    """A layer of 100 bytes of weights."""

    def __init__(self) -> None:
        super().__init__(5, 5, bias=False)


def test_layers_fill_the_devices_in_order_and_the_rest_stays_with_the_host() -> None:
    model = nn.ModuleDict({"embed": nn.Linear(5, 10, bias=False), "layers": nn.ModuleList(Layer() for _ in range(8))})

    def places(room: dict[int | str, int]) -> str:
        found = infer_device_map(model, Layer, room, "cpu")
        assert found.pop("embed") == 0
        return "".join(str(found[f"layers.{number}"])[0] for number in range(8))

    assert places({0: 10_000}) == "00000000"
    assert places({0: 10_000, 1: 10_000}) == "00011111"  # the embeddings weigh as much as two layers
    assert places({0: 10_000, 1: 300}) == "00011100"
    assert places({0: 400, 1: 300}) == "00111ccc"


def place(rank: int, node: str) -> WorkerSlot:
    return WorkerSlot(rank, node, str(rank % 4), 100 + rank)


def test_workers_of_a_node_hold_a_model_together() -> None:
    places = [place(rank, "a" if rank < 5 else "b") for rank in range(8)]
    assert group_slots(places, 1) == places
    assert [(each.node, each.gpus) for each in group_slots(places, 2)] == [("a", "0,1"), ("a", "2,3"), ("b", "1,2")]
    assert [(each.node, each.gpus) for each in group_slots(places, 4)] == [("a", "0,1,2,3")]
    with pytest.raises(ClusterError, match=r"workers_per_model=6: no node has that many of the 8 workers"):
        group_slots(places, 6)


def test_workers_that_cannot_hold_a_model_together_are_refused() -> None:
    sound = {"workers": 4, "workers_per_model": 2, "gpus_per_worker": 1}
    assert parse(ClusterConfig, sound).workers_per_model == 2
    with pytest.raises(ConfigError, match=r"workers=3: expected a multiple of workers_per_model=2"):
        parse(ClusterConfig, {**sound, "workers": 3})
    for gpus in (0, 0.5, 1.5):
        with pytest.raises(ConfigError, match="expected an integer gpus_per_worker of 1 or more"):
            parse(ClusterConfig, {**sound, "gpus_per_worker": gpus})
    with pytest.raises(ConfigError, match="min_workers=1: expected workers_per_model=2 or more"):
        parse(ClusterConfig, {**sound, "min_workers": 1})
