"""What one rank must hold while it trains, by kind, as formulas over a few counts. Pure, torch-free.

Letters of the formulas:
    P      elements of the model;  T of these are trained;  M of its largest module
    b      bytes of an element in the forward pass: 4, or 2 with bfloat16
    R      ranks;  t/R is rounded up
    C      elements of the buffer that gradients are reduced through: min(500,000,000, max(T, M))
    W      elements of weights that ZeRO-3 keeps gathered for reuse: min(1e9, max(M, P/8))
    F      elements that it fetches ahead: min(5e7, P/16)
    A      bytes of activations at a moment of a micro-batch, G of the gradients that are finished by then
What lives all the time is added up. Beside it there are moments of a step of which the highest one counts, since a
gradient appears as the activations that it came from go. Which tensors there are under which stage was read in
DeepSpeed 0.19 and measured (tests/benchmarks/test_memory_plan.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cl_dist.parallel.config import buffer_bounds

GIB = 2**30
TRACED = {
    "activations": "traced: what the loss keeps and makes, over rows * max_length tokens (cl_dist/planning/trace.py)",
    "plugins": "traced, inside of plugins: their units, and the capsules of all tasks so far",
    "logits": "traced: 4 V bytes a label for its log-softmax, its gradient, and theirs; 2048 labels at a time",
}
"""Kinds of activations."""
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Model:
    """Counts of a model."""

    elements: int
    trained: int
    largest: int
    """Elements of the module that holds most of them itself."""
    item: int
    """Bytes of an element in the forward pass."""
    task_elements: int = 0
    """Elements that belong to tasks, of all of them: plugins, adapters, heads."""
    task_trained: int = 0
    buffers: int = 0
    """Bytes of masks and other buffers."""
    extras: Mapping[str, int] = field(default_factory=dict)
    """Bytes of what a method holds beside its model: penalties, a teacher."""
    quantized: int = 0
    """Elements beside those that are loaded whole, then held in fewer bits: part of the buffers."""
    tables: int = 0
    """Elements that every rank makes whole when the rest is cut up: the vocabulary's."""
    partitions: bool = False
    """Whether ZeRO-3 cuts the backbone up while it is loaded."""
    whole_at_once: int = 5
    """Pieces that are in memory at a time where the others lie in files."""


@dataclass(frozen=True, slots=True)
class Step:
    """Micro-batches of an optimizer step."""

    saved: Mapping[str, int]
    """Bytes that wait for the backward pass, by kind."""
    points: Sequence[tuple[Mapping[str, int], int]]
    """(bytes of activations by kind, elements of finished gradients) at the moments that may be the highest."""
    accumulates: bool
    """Whether it has more than one."""
    operations: int = 0
    """Of one micro-batch."""


@dataclass(frozen=True, slots=True)
class Gang:
    """How ranks share the work."""

    ranks: int
    zero_stage: int
    engine: str = "deepspeed"
    is_gpu: bool = False
    offload: str | None = None
    """As `cluster.offload`; on a CPU the host's memory is the device's."""
    in_files: bool = False
    """As `cluster.offload_folder`: weights are not left to the host's memory then, but to its files."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """Bytes of one kind."""

    kind: str
    bytes: int
    formula: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a rank holds."""

    resident: tuple[Quantity, ...]
    """What lives from step to step."""
    moments: tuple[Quantity, ...]
    """What is added to it at some moments of a step; the highest of them counts."""
    activations: Mapping[str, int]
    """Bytes of activations by kind when there are most of them; part of the moments."""

    @property
    def highest(self) -> Quantity:
        """The moment that counts."""
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def peak(self) -> int:
        """The most bytes of a step."""
        return sum(each.bytes for each in self.resident) + self.highest.bytes

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "peak_bytes": self.peak,
            "resident": [plain(each) for each in self.resident],
            "moments": [plain(each) for each in self.moments],
            "highest_moment": self.highest.kind,
            "activations": [
                {"kind": kind, "bytes": size, "formula": TRACED[kind]} for kind, size in self.activations.items()
            ],
        }


def plain(each: Quantity) -> dict[str, Any]:
    """Return a quantity as plain data."""
    return {"kind": each.kind, "bytes": each.bytes, "formula": each.formula}


def accumulating(step: Step, is_so: bool) -> Step:
    """Return a step of equal micro-batches that are several, or one."""
    return replace(step, accumulates=is_so)


def share(size: int, ranks: int) -> int:
    """Return a rank's share of some elements, rounded up."""
    return -(-size // ranks)


def training(model: Model, step: Step, gang: Gang) -> Estimate:
    """Return what a rank holds while it trains, without what it leaves to the host."""
    stage = -1 if gang.engine == "torch" else gang.zero_stage
    left = _left_to_the_host(gang)
    resident = [each for each in _resident(model, gang, stage) if each.kind not in left]
    if gang.in_files and not gang.is_gpu:  # whose memory is the host's
        resident.append(_file_buffers(model, gang))
    most = max(step.points, key=lambda point: sum(point[0].values()))
    return Estimate(tuple(resident), tuple(_moments(model, step, gang, stage)), most[0])


def _left_to_the_host(gang: Gang) -> tuple[str, ...]:
    """Return the kinds of what a rank on a GPU leaves to its host; on a CPU, what it leaves to files."""
    if not gang.is_gpu or gang.offload is None:
        return ("weights",) if gang.in_files else ()
    return ("optimizer", "gradients", *(("weights", "parts of tasks") if gang.offload == "all" else ()))


def _file_buffers(model: Model, gang: Gang) -> Quantity:
    size = model.whole_at_once * share(model.largest, gang.ranks) + share(model.trained, gang.ranks)
    formula = f"{model.whole_at_once} b M/R to read, b T/R to write what is trained; locked"
    return Quantity("buffers for files", model.item * size, formula)


def _resident(model: Model, gang: Gang, stage: int) -> list[Quantity]:
    b, trained, divided = model.item, model.trained, share(model.trained, gang.ranks)
    split = gang.ranks if stage == 3 else 1
    over = "/R" if stage == 3 else ""
    found = [
        Quantity("weights", b * share(model.elements - model.task_elements, split), f"b * (P - parts of tasks){over}"),
        Quantity("parts of tasks", b * share(model.task_elements, split), f"b * parts of tasks{over}"),
        Quantity("masks and buffers", model.buffers, "1 byte a unit, layer and earlier task, for each gate"),
    ]
    if stage <= 0:
        found.append(Quantity("optimizer", 8 * trained, "8 T: two moments; float32 weights are their own masters"))
    else:
        found.append(Quantity("optimizer", 12 * divided, "12 T/R: float32 masters and two moments"))
    if stage == 3:
        found.append(Quantity("gradients", b * divided, "b T/R"))
        found.append(Quantity("buckets", b * _bounds(model)["reduce_bucket_size"], "b C"))
    for name, size in model.extras.items():
        if not (gang.is_gpu and name == "penalties"):  # which stay with the host
            found.append(Quantity(name, size, "4 bytes an element, whole on every rank"))
    return [each for each in found if each.bytes]


def _moments(model: Model, step: Step, gang: Gang, stage: int) -> list[Quantity]:
    """Return what is added at the moments of a step that may be the highest.

    Gradients are whole up to ZeRO-1; ZeRO-2 and 3 move each into a bucket as it appears. ZeRO-3 gathers weights: those
    that are used again soon stay whole, and what is fetched together exists twice until its last part is used.
    """
    b, trained, bounds = model.item, model.trained, _bounds(model)
    bucket = b * bounds["reduce_bucket_size"]
    sizes = [(sum(kinds.values()), b * elements) for kinds, elements in step.points]
    most = max(size for size, _ in sizes)
    if stage <= 1:
        if step.accumulates:
            micro = Quantity("micro-batch", most + b * trained, "max A + b T: of the micro-batches before")
        else:
            micro = Quantity("micro-batch", max(size + done for size, done in sizes), "max over its moments of A + G")
        copy = bucket if gang.ranks > 1 and stage >= 0 else 0
        return [micro, Quantity("reduction", b * trained + copy, "b T + b C" if copy else "b T")]
    copies = 1 if gang.is_gpu else 2
    part = b * share(trained, gang.ranks)
    if stage == 2:
        own = part * (1 + step.accumulates)
        return [
            Quantity("micro-batch", most + bucket + part * step.accumulates, "max A + b C, + b T/R after the first"),
            Quantity("reduction", 2 * bucket + own, "2 b C + b T/R (twice where micro-batches add up)"),
            Quantity("step", (b + 4) * share(trained, gang.ranks), "(b + 4) T/R: gradients and their float32 copy"),
        ]
    ahead, reused = bounds["stage3_prefetch_bucket_size"], bounds["stage3_max_reuse_distance"]
    if gang.in_files:
        ahead = reused = 0
    whole = b * min(model.elements, reused // 2 + ahead + model.largest)
    fetched = b * min(model.elements, ahead + model.largest)
    return [
        Quantity("micro-batch", most + whole, "max A + b min(P, W/2 + F + M): gathered weights"),
        Quantity(
            "end of the forward pass",
            sum(size for kind, size in step.saved.items() if kind != "logits") + whole + fetched,
            "A + b min(P, W/2 + F + M) + b min(P, F + M): what was fetched last exists twice",
        ),
        Quantity("reduction", copies * bucket + b * model.largest, f"{copies} b C + b M"),
        Quantity("step", 4 * share(trained, gang.ranks), "4 T/R"),
    ]


def _bounds(model: Model) -> dict[str, int]:
    return buffer_bounds(model.elements, model.trained, model.largest)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a decoder that writes or votes."""

    layers: int
    heads: int
    groups: int
    """Heads that share keys and values count once."""
    size: int
    """Of a head."""
    vocabulary: int


SPAN, QUERIES = 16, 256
"""Cache lengths are multiples of SPAN (models/decode.py); a vote takes so many queries at a time (models/cci.py)."""


def pooled(model: Model, working: Sequence[Quantity], devices: int) -> tuple[Quantity, ...]:
    """Return what a device of an actor of the pool holds: the model, and what it works with. ZeRO does not divide it.

    Several devices of one actor have a share of the layers each; what is worked with may be on one of them.
    """
    weights = share(model.item * model.elements + model.buffers, devices)
    formula = "b P, whole on every worker" if devices == 1 else f"b P / {devices}: layers on {devices} devices"
    return (Quantity("weights", weights, formula), *working)


def cache(decoder: Decoder, rows: int, tokens: int, item: int) -> Quantity:
    """Return the keys and values of rows that are written side by side."""
    length = share(tokens, SPAN) * SPAN
    size = 2 * decoder.layers * decoder.groups * decoder.size * length * item * rows
    return Quantity("KV cache", size, "2 layers groups d tokens b rows; tokens rounded up to 16")


def rows_within(decoder: Decoder, rows: int, tokens: int, item: int, kv_cache_gb: float) -> int:
    """Return how many rows are written side by side within a cache of so many GB; see models/decode.py."""
    return max(1, min(rows, int(kv_cache_gb * 1e9) // cache(decoder, 1, tokens, item).bytes))


def generating(decoder: Decoder, rows: int, tokens: int, item: int) -> tuple[Quantity, ...]:
    """Return what the writing of samples works with: the cache, one layer's keys and values, and logits."""
    length = share(tokens, SPAN) * SPAN
    is_shared = decoder.groups < decoder.heads
    layer = 2 * rows * decoder.heads * decoder.size * length * item * is_shared
    logits = rows * decoder.vocabulary * (item % 4 + 2 * 4)
    return (
        cache(decoder, rows, tokens, item),
        Quantity("attention of a layer", layer, "2 rows heads d tokens b, where heads share keys: for each head"),
        Quantity("logits", logits, "rows V (8 bytes: float32, and over the temperature; 2 more with bfloat16)"),
    )


def voting(decoder: Decoder, tokens: int, item: int) -> Quantity:
    """Return what a vote works with beside a forward pass of one text: scores and attention of some queries."""
    size = decoder.heads * min(QUERIES, tokens) * tokens * (4 + 4 + item % 4)
    return Quantity("attention statistics", size, "heads min(256, tokens) tokens (4 + 4 bytes, 2 more with bfloat16)")


def host(model: Model, gang: Gang) -> tuple[Quantity, ...]:
    """Return what the host of a rank holds while the rank builds its model, and what the rank leaves to it then.

    On a CPU that is where it trains, too.
    """
    builds = "host: a rank builds its model"
    if model.partitions and gang.zero_stage == 3 and gang.ranks > 1:
        size = 4 * (share(model.elements - model.tables, gang.ranks) + model.tables + model.largest)
        formula = "4 (P - V)/R + 4 V + 4 M: cut up while it is loaded, but for the vocabulary's tables"
        found = [Quantity(builds, size, formula)]
        rounded = share(4 * model.trained - 2 * model.elements, gang.ranks) if model.item == 2 else 0
        if rounded > 0:
            formula = "(4 T - 2 P)/R: rounded, while the exact ones wait for DeepSpeed's masters"
            found.append(Quantity("host: its weights in bfloat16", rounded, formula))
    else:
        whole = model.elements + model.quantized
        found = [Quantity(builds, 4 * whole, "4 P: whole, in float32, also what is quantized then")]
        if model.item == 2 and (rounded := 4 * model.trained - 2 * model.elements) > 0:
            formula = "4 T - 2 P: rounded, while the exact ones wait for DeepSpeed's masters"
            found.append(Quantity("host: its weights in bfloat16", rounded, formula))
    if model.extras.get("penalties"):
        found.append(Quantity("host: penalties", model.extras["penalties"], "8 bytes an element: strength, anchor"))
    left = _left_to_the_host(gang)
    for each in _resident(model, gang, gang.zero_stage):
        if each.kind == "weights" and gang.in_files:
            found.append(Quantity("files: weights", each.bytes, f"{each.formula}; pieces of less than 1 MB in memory"))
            if gang.is_gpu:
                found.append(_file_buffers(model, gang))
        elif each.kind in left:
            found.append(Quantity(f"host: {each.kind} (offload)", each.bytes, each.formula))
    return tuple(found)


def disk(
    model: Model, *, learner: int, num_tasks: int, trainings: int, keeps_best: bool, samples: int
) -> tuple[Quantity, ...]:
    """Return the bytes that a run leaves on disk, and those of a Train stage under way.

    Args:
        model: Counts of the model of the last task.
        learner: Bytes of what outlives all tasks beside weights; an earlier task has its share of them.
        num_tasks: Tasks of the run.
        trainings: Train stages of the run.
        keeps_best: Whether a checkpoint holds the weights of the best round too.
        samples: Bytes of pseudo-samples.
    """
    weights = 4 * model.trained
    copies = 4 if keeps_best else 3
    return (
        Quantity("trainable.safetensors of a task", weights, "4 T: float32, whatever dtype says"),
        Quantity(
            "learner.safetensors of the last task",
            learner,
            "a bit a gated unit and task; 4 bytes an importance",
        ),
        Quantity("step checkpoint", copies * weights, f"{copies} * 4 T: weights, moments{', best' * keeps_best}"),
        Quantity("checkpoints of a stage under way", 3 * copies * weights, "3 of them: two stay while one is written"),
        Quantity("pseudo-samples", samples, "at most 12 bytes a token, samples * max_length"),
        Quantity(
            "the run when it is finished",
            trainings * weights + learner * (num_tasks + 1) // 2 + samples,
            "Train stages * 4 T + learner state of all tasks + samples; without scores",
        ),
    )
