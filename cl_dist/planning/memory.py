"""Memory estimate of a rank in training, by kind, as formulas over a few counts. Pure, torch-free.

Letters of the formulas:
    P      elements of the model;  T of these are trained;  M of its largest module
    b      bytes of an element in the forward pass: 4, or 2 with bfloat16
    R      ranks;  t/R is rounded up
    C      elements of the gradient reduction buffer: min(500,000,000, max(T, M))
    W      elements of weights that ZeRO-3 keeps gathered for reuse: min(1e9, max(M, P/8))
    F      elements that it prefetches: min(5e7, P/16)
    A      bytes of activations at a moment of a micro-batch, G of the gradients finished by then
The peak is the sum of what is resident for the whole step, plus the largest of its moments, since gradients appear as
their activations are freed. The tensors of each ZeRO stage were read in DeepSpeed 0.19 and measured
(tests/benchmarks/test_memory_plan.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cl_dist.parallel.config import buffer_bounds

GIB = 2**30
TRACED = {
    "activations": "traced: tensors of the loss, over rows * max_length tokens (cl_dist/planning/trace.py)",
    "plugins": "traced, inside of plugins: their units, and the capsules of all tasks so far",
    "logits": "traced: 4 V bytes per label for its log-softmax and the gradients; 2048 labels at a time",
}
"""Kinds of activations."""
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Model:
    """Counts of a model."""

    elements: int
    trained: int
    largest: int
    """Own elements of the largest module."""
    item: int
    """Bytes of an element in the forward pass."""
    task_elements: int = 0
    """Elements of the task-specific parts of all tasks: plugins, adapters, heads."""
    task_trained: int = 0
    buffers: int = 0
    """Bytes of masks and other buffers."""
    extras: Mapping[str, int] = field(default_factory=dict)
    """Bytes of a method's state outside its model: penalties, a teacher."""
    quantized: int = 0
    """Elements that are quantized after loading: part of the buffers, not of `elements`."""
    tables: int = 0
    """Elements that every rank gathers when the backbone is partitioned: the vocabulary's."""
    partitions: bool = False
    """Whether ZeRO-3 partitions the backbone while it is loaded."""
    whole_at_once: int = 5
    """Parameters in memory at a time if the others are offloaded to files."""


@dataclass(frozen=True, slots=True)
class Step:
    """Micro-batches of an optimizer step."""

    saved: Mapping[str, int]
    """Bytes saved for the backward pass, by kind."""
    points: Sequence[tuple[Mapping[str, int], int]]
    """(bytes of activations by kind, elements of finished gradients) at the possible peaks."""
    accumulates: bool
    """Whether the step has more than one micro-batch."""
    operations: int = 0
    """Operations of one micro-batch."""


@dataclass(frozen=True, slots=True)
class Gang:
    """Distribution of the work over ranks."""

    ranks: int
    zero_stage: int
    engine: str = "deepspeed"
    is_gpu: bool = False
    offload: str | None = None
    """As `cluster.offload`; on a CPU the host's memory is the device's."""
    in_files: bool = False
    """Whether weights are offloaded to files (`cluster.offload_folder`) instead of the host's memory."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """Bytes of one kind."""

    kind: str
    bytes: int
    formula: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of a rank."""

    resident: tuple[Quantity, ...]
    """Memory that is used throughout."""
    moments: tuple[Quantity, ...]
    """Additional memory at moments of a step; the peak includes the largest."""
    activations: Mapping[str, int]
    """Bytes of activations by kind at their maximum; part of the moments."""

    @property
    def highest(self) -> Quantity:
        """The moment with most memory."""
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def peak(self) -> int:
        """Peak bytes of a step."""
        return sum(each.bytes for each in self.resident) + self.highest.bytes

    def plain(self) -> dict[str, Any]:
        """Return the estimate as plain data."""
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
    """Return a copy of a step with several micro-batches, or with one."""
    return replace(step, accumulates=is_so)


def share(size: int, ranks: int) -> int:
    """Return a rank's share of some elements, rounded up."""
    return -(-size // ranks)


def training(model: Model, step: Step, gang: Gang) -> Estimate:
    """Return the memory of a rank in training, without offloaded state."""
    stage = -1 if gang.engine == "torch" else gang.zero_stage
    offloaded = _offloaded_kinds(gang)
    resident = [each for each in _resident(model, gang, stage) if each.kind not in offloaded]
    if gang.in_files and not gang.is_gpu:  # on a CPU the buffers are in the same memory
        resident.append(_file_buffers(model, gang))
    most = max(step.points, key=lambda point: sum(point[0].values()))
    return Estimate(tuple(resident), tuple(_moments(model, step, gang, stage)), most[0])


def _offloaded_kinds(gang: Gang) -> tuple[str, ...]:
    """Return the kinds of state that are offloaded: from a GPU to the host, from a CPU to files."""
    if not gang.is_gpu or gang.offload is None:
        return ("weights",) if gang.in_files else ()
    return ("optimizer", "gradients", *(("weights", "parts of tasks") if gang.offload == "all" else ()))


def _file_buffers(model: Model, gang: Gang) -> Quantity:
    size = model.whole_at_once * share(model.largest, gang.ranks) + share(model.trained, gang.ranks)
    formula = f"{model.whole_at_once} b M/R to read, b T/R to write trained weights; locked"
    return Quantity("buffers for files", model.item * size, formula)


def _resident(model: Model, gang: Gang, stage: int) -> list[Quantity]:
    b, trained, own = model.item, model.trained, share(model.trained, gang.ranks)
    split = gang.ranks if stage == 3 else 1
    over = "/R" if stage == 3 else ""
    found = [
        Quantity("weights", b * share(model.elements - model.task_elements, split), f"b * (P - parts of tasks){over}"),
        Quantity("parts of tasks", b * share(model.task_elements, split), f"b * parts of tasks{over}"),
        Quantity("masks and buffers", model.buffers, "1 byte per unit, layer and earlier task, for each gate"),
    ]
    if stage <= 0:
        found.append(Quantity("optimizer", 8 * trained, "8 T: two moments; float32 weights are their own masters"))
    else:
        found.append(Quantity("optimizer", 12 * own, "12 T/R: float32 masters and two moments"))
    if stage == 3:
        found.append(Quantity("gradients", b * own, "b T/R"))
        found.append(Quantity("buckets", b * _bounds(model)["reduce_bucket_size"], "b C"))
    for name, size in model.extras.items():
        if not (gang.is_gpu and name == "penalties"):  # which stay on the host
            found.append(Quantity(name, size, "4 bytes per element, in full on every rank"))
    return [each for each in found if each.bytes]


def _moments(model: Model, step: Step, gang: Gang, stage: int) -> list[Quantity]:
    """Return the additional memory at the possible peaks of a step.

    Up to ZeRO-1 gradients are not partitioned; ZeRO-2 and 3 move each into a bucket as it appears. ZeRO-3 gathers
    weights: those that are reused soon stay gathered, and weights fetched together exist twice until the last is used.
    """
    b, trained, bounds = model.item, model.trained, _bounds(model)
    bucket = b * bounds["reduce_bucket_size"]
    sizes = [(sum(kinds.values()), b * elements) for kinds, elements in step.points]
    most = max(size for size, _ in sizes)
    if stage <= 1:
        if step.accumulates:
            micro = Quantity("micro-batch", most + b * trained, "max A + b T: of earlier micro-batches")
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
            Quantity("reduction", 2 * bucket + own, "2 b C + b T/R (twice with gradient accumulation)"),
            Quantity("step", (b + 4) * share(trained, gang.ranks), "(b + 4) T/R: gradients and their float32 copy"),
        ]
    ahead, reused = bounds["stage3_prefetch_bucket_size"], bounds["stage3_max_reuse_distance"]
    if gang.in_files:
        ahead = reused = 0
    gathered = b * min(model.elements, reused // 2 + ahead + model.largest)
    fetched = b * min(model.elements, ahead + model.largest)
    return [
        Quantity("micro-batch", most + gathered, "max A + b min(P, W/2 + F + M): gathered weights"),
        Quantity(
            "end of the forward pass",
            sum(size for kind, size in step.saved.items() if kind != "logits") + gathered + fetched,
            "A + b min(P, W/2 + F + M) + b min(P, F + M): the weights fetched last exist twice",
        ),
        Quantity("reduction", copies * bucket + b * model.largest, f"{copies} b C + b M"),
        Quantity("step", 4 * share(trained, gang.ranks), "4 T/R"),
    ]


def _bounds(model: Model) -> dict[str, int]:
    return buffer_bounds(model.elements, model.trained, model.largest)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a decoder in generation or votes."""

    layers: int
    heads: int
    groups: int
    """Number of groups of heads that share keys and values."""
    size: int
    """Size of a head."""
    vocabulary: int


SPAN, QUERIES = 16, 256
"""Cache lengths are multiples of SPAN (models/decode.py); a vote computes QUERIES queries at a time (models/cci.py)."""


def pooled(model: Model, working: Sequence[Quantity], devices: int) -> tuple[Quantity, ...]:
    """Return the memory of a device of a pool actor: the full model without ZeRO, and the working memory.

    Several devices of an actor share the layers; the working memory may be on one of them.
    """
    weights = share(model.item * model.elements + model.buffers, devices)
    formula = "b P, in full on every worker" if devices == 1 else f"b P / {devices}: layers on {devices} devices"
    return (Quantity("weights", weights, formula), *working)


def cache(decoder: Decoder, rows: int, tokens: int, item: int) -> Quantity:
    """Return the keys and values of rows generated in parallel."""
    length = share(tokens, SPAN) * SPAN
    size = 2 * decoder.layers * decoder.groups * decoder.size * length * item * rows
    return Quantity("KV cache", size, "2 layers groups d tokens b rows; tokens rounded up to 16")


def rows_within(decoder: Decoder, rows: int, tokens: int, item: int, kv_cache_gb: float) -> int:
    """Return the number of rows generated in parallel with a cache of kv_cache_gb GB; see models/decode.py."""
    return max(1, min(rows, int(kv_cache_gb * 1e9) // cache(decoder, 1, tokens, item).bytes))


def generating(decoder: Decoder, rows: int, tokens: int, item: int) -> tuple[Quantity, ...]:
    """Return the working memory of generation: the cache, one layer's keys and values, and logits."""
    length = share(tokens, SPAN) * SPAN
    is_shared = decoder.groups < decoder.heads
    layer = 2 * rows * decoder.heads * decoder.size * length * item * is_shared
    logits = rows * decoder.vocabulary * (item % 4 + 2 * 4)
    return (
        cache(decoder, rows, tokens, item),
        Quantity("attention of a layer", layer, "2 rows heads d tokens b if heads share keys: copies per head"),
        Quantity("logits", logits, "rows V (8 bytes: float32, and divided by temperature; 2 more with bfloat16)"),
    )


def voting(decoder: Decoder, tokens: int, item: int) -> Quantity:
    """Return the working memory of a vote in addition to a forward pass: scores and attention of some queries."""
    size = decoder.heads * min(QUERIES, tokens) * tokens * (4 + 4 + item % 4)
    return Quantity("attention statistics", size, "heads min(256, tokens) tokens (4 + 4 bytes, 2 more with bfloat16)")


def host(model: Model, gang: Gang) -> tuple[Quantity, ...]:
    """Return the host memory of a rank: while it builds its model, and of its offloaded state in training.

    On a CPU this is also the memory of training.
    """
    builds = "host: a rank builds its model"
    if model.partitions and gang.zero_stage == 3 and gang.ranks > 1:
        size = 4 * (share(model.elements - model.tables, gang.ranks) + model.tables + model.largest)
        formula = "4 (P - V)/R + 4 V + 4 M: partitioned on loading, except for the vocabulary"
        found = [Quantity(builds, size, formula)]
        rounded = share(4 * model.trained - 2 * model.elements, gang.ranks) if model.item == 2 else 0
        if rounded > 0:
            formula = "(4 T - 2 P)/R: rounded copies, until DeepSpeed has created its masters"
            found.append(Quantity("host: its weights in bfloat16", rounded, formula))
    else:
        loaded = model.elements + model.quantized
        found = [Quantity(builds, 4 * loaded, "4 P: in full, in float32, including weights to be quantized")]
        if model.item == 2 and (rounded := 4 * model.trained - 2 * model.elements) > 0:
            formula = "4 T - 2 P: rounded copies, until DeepSpeed has created its masters"
            found.append(Quantity("host: its weights in bfloat16", rounded, formula))
    if model.extras.get("penalties"):
        found.append(Quantity("host: penalties", model.extras["penalties"], "8 bytes per element: strength, anchor"))
    offloaded = _offloaded_kinds(gang)
    for each in _resident(model, gang, gang.zero_stage):
        if each.kind == "weights" and gang.in_files:
            found.append(
                Quantity("files: weights", each.bytes, f"{each.formula}; partitions below 1 MB stay in memory")
            )
            if gang.is_gpu:
                found.append(_file_buffers(model, gang))
        elif each.kind in offloaded:
            found.append(Quantity(f"host: {each.kind} (offload)", each.bytes, each.formula))
    return tuple(found)


def disk(
    model: Model, *, learner: int, num_tasks: int, trainings: int, keeps_best: bool, samples: int
) -> tuple[Quantity, ...]:
    """Return the bytes on disk of a finished run, and of a Train stage in progress.

    Args:
        model: Counts of the model of the last task.
        learner: Bytes of the learner's state after the last task; earlier tasks have a share of it.
        num_tasks: Number of tasks of the run.
        trainings: Number of Train stages of the run.
        keeps_best: Whether a checkpoint also has the weights of the best round.
        samples: Bytes of pseudo-samples.
    """
    weights = 4 * model.trained
    copies = 4 if keeps_best else 3
    return (
        Quantity("trainable.safetensors of a task", weights, "4 T: float32 for every dtype"),
        Quantity(
            "learner.safetensors of the last task",
            learner,
            "a bit per gated unit and task; 4 bytes per importance",
        ),
        Quantity("step checkpoint", copies * weights, f"{copies} * 4 T: weights, moments{', best' * keeps_best}"),
        Quantity(
            "checkpoints of a running stage", 3 * copies * weights, "3 of them: two are kept while one is written"
        ),
        Quantity("pseudo-samples", samples, "at most 12 bytes per token, samples * max_length"),
        Quantity(
            "the finished run",
            trainings * weights + learner * (num_tasks + 1) // 2 + samples,
            "Train stages * 4 T + learner state of all tasks + samples; without scores",
        ),
    )
