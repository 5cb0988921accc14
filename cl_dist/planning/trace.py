"""Memory and operations of a Train stage without its weights: the learner's model and loss, traced on fake tensors.

Nothing is loaded or allocated: a model of 70 billion parameters is built from its config.json in seconds. Its
trainable parameters, the gradient factors and the loss are the learner's, so the counts are those of training.
Attention is fused, and only logits are recomputed in the backward pass (models/causal.py).

Checked by hand for plain models in float32 (tests/cl_dist/stages/test_dry.py). A layer saves, in elements per token,
with H hidden units, F in the feed-forward part, a heads, D of all heads, everything trained:
    BERT   4 H + 4 D + 2 F + a + 4 + L    two sums and two norms, with mean and deviation; q, k, v, attended, and their
                                          log-sums; before and after the GELU; the mask as numbers
    GPT-2  4 H + 4 D + 5 F + a + 4 + L    the same; its GELU is not fused, and saves its intermediate results
    Llama  6 H + 4 D + 4 F + a + 2 + L    two sums, normed, scaled; k and v for every head; gate, its SiLU, up, product
Axes: B rows, L tokens, N labels.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cl_dist.data.language import SpecialTokens
from cl_dist.learners.base import Progress
from cl_dist.learners.text import TextLearner
from cl_dist.methods import capabilities_of
from cl_dist.methods.base import MethodConfig
from cl_dist.models.attention_slices import block_parameters, shape_of
from cl_dist.models.backbone import load_backbone, recompute_activations
from cl_dist.models.causal import CausalModel
from cl_dist.models.config import ModelConfig
from cl_dist.models.plugin_layer import Plugin
from cl_dist.models.quantized import QuantizedLinear
from cl_dist.models.saliency import sensitivity
from cl_dist.models.task_modules import HoulsbyAdapters
from cl_dist.parallel.engine import attach
from cl_dist.planning.live import LiveTensorBytes, tensors_of
from cl_dist.stages.build import new_learner


@dataclass(frozen=True, slots=True)
class Count:
    """Elements of a model's parameters."""

    elements: int
    trained: int


@dataclass(frozen=True, slots=True)
class Point:
    """A possible peak of a micro-batch."""

    activations: Mapping[str, int]
    """Bytes by kind: activations, plugins (activations inside plugins), logits."""
    gradients: int
    """Elements of the gradients finished by then."""


@dataclass(frozen=True, slots=True)
class Micro:
    """One micro-batch, forward and backward."""

    saved: Mapping[str, int]
    """Bytes saved for the backward pass, by kind."""
    points: tuple[Point, ...]
    """Points after which activations are never as large again, in order of time, so with growing gradients."""
    operations: int
    """Additions and multiplications of its matrix products, including recomputation."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A forward pass without gradients."""

    peak: int
    """Peak bytes in addition to the weights."""
    operations: int


class TracedLearner:
    """A learner on fake tensors, at the start of a task."""

    def __init__(
        self,
        method: MethodConfig,
        model: ModelConfig,
        num_labels: tuple[int, ...],
        *,
        vocabulary: int | None = None,
        tasks: tuple[int, ...] | None = None,
        recompute: bool = False,
    ) -> None:
        """Build the model for the last of some tasks; model.config has the sizes of the backbone.

        Args:
            method: The method's settings.
            model: The backbone; its source is not read.
            num_labels: Number of classes of every task up to the current one.
            vocabulary: Rows of a decoder's vocabulary, including special tokens; None uses the backbone's.
            tasks: Tasks with training rows, if not only the last one.
            recompute: Whether activations are recomputed in the backward pass.
        """
        self._task = len(num_labels) - 1
        self.learner, able = new_learner(method, model, num_labels, 0), capabilities_of(method, model)
        is_text = isinstance(self.learner, TextLearner)
        if is_text and vocabulary is not None and model.config is not None:
            model = model.model_copy(update={"config": model.config | {"vocab_size": vocabulary}})
        with torch.device("meta"):
            backbone: Any = load_backbone(model, causal=is_text)
            own = {id(parameter) for parameter in backbone.parameters()}
            # `build` of a decoder would load a tokenizer to find the new rows; only their number matters here.
            if isinstance(self.learner, TextLearner):
                size = backbone.config.vocab_size
                new = SpecialTokens(0, 0).size(len(num_labels), model.spare_task_tokens)
                built = self.learner.build_for_vocab(backbone, max(1, size - new), size)
            else:
                built = self.learner.build(backbone, self._task)
            teacher = load_backbone(model, causal=True) if able.teacher else None
        quantized = [module.elements for module in built.modules() if isinstance(module, QuantizedLinear)]
        both = (backbone.get_input_embeddings(), backbone.get_output_embeddings()) if is_text else ()
        tables = {} if able.freezes_backbone else {id(table.weight): table.weight.numel() for table in both}
        self.tables = sum(tables.values())
        """Elements of a decoder's vocabulary, gathered on every rank to add rows for special tokens."""
        self.quantized = sum(quantized)
        """Number of weights that are quantized after loading: buffers, not parameters of the backbone."""
        self._config, is_own = backbone.config, [id(parameter) in own for parameter in built.parameters()]
        self.decoder = (*shape_of(backbone), backbone.config.vocab_size) if is_text else None
        """(layers, heads, groups of heads, size of a head, rows of the vocabulary)."""
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            for module in (built, *([] if teacher is None else [teacher])):
                _materialize(module)
            _redirect_copies(backbone, teacher)
            self.learner.model = built
            for earlier in range(self._task):
                self._finish(earlier)
            self.learner.start_task(self._task, tasks or (self._task,))
        transforms = self.learner.gradient_transforms()  # which read small tensors with data
        with self._fake:
            self._count(is_own)
            first = [backbone.get_parameter(name) for name in block_parameters(backbone, 0)] if is_text else []
            self.block = sum(parameter.numel() for parameter in first if parameter.requires_grad)
            """Trained elements of a decoder's block, which a vote for blocks freezes."""
            if model.dtype == "bfloat16":
                _materialize(built, torch.bfloat16)
            attach(built, transforms)
            if recompute:
                recompute_activations(built)

    def _finish(self, task: int) -> None:
        """Run the end of a task, which creates masks and importances."""
        self.learner.start_task(task, (task,))
        self.learner.end_task(dict(self.learner.model.named_parameters()), ())

    def _count(self, is_own: list[bool]) -> None:
        """Count the model's elements in float32; is_own: whether each parameter belongs to the backbone."""
        model = self.learner.model
        sizes = [
            (mine, p.numel(), p.numel() * p.requires_grad) for mine, p in zip(is_own, model.parameters(), strict=True)
        ]
        self.backbone, self.parts = (
            Count(sum(n for mine, n, _ in sizes if mine is which), sum(n for mine, _, n in sizes if mine is which))
            for which in (True, False)
        )
        """Parameters of the pretrained model, and of task-specific parts."""
        self.largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
        """Own elements of the largest module, the minimum that ZeRO-3 gathers at a time."""
        self.buffers = _bytes(model.buffers())
        penalties = [tensor for penalty in self.learner.penalties().values() for tensor in penalty.tensors()]
        self._teacher_tensors = [p for teacher in getattr(model, "_teacher", []) for p in tensors_of(teacher)]
        self.extras = {"penalties": _bytes(penalties), "teacher": _bytes(self._teacher_tensors)}
        """Bytes of the method's state outside its model."""

    def micro(self, rows: int, length: int, answer: int) -> Micro:
        """Trace a micro-batch of rows of equal length, with `answer` labels each, forward and backward."""
        model = self.learner.model
        with self._fake, _tracing(model.train(), self._config, self._teacher_tensors) as trace:
            batch = self._batch(rows, length, answer)
            with trace.live, _Operations() as counted:
                loss = self.learner.loss(model, batch, Progress(0, 10, 0, 10))
                terms = [(term * batch["weight"]).sum() for term in loss.per_example.values()]
                total = torch.stack([term.float() for term in (*terms, *loss.regularizers.values())]).sum()
                del loss, terms
                saved = trace.activations()
                total.backward()
            for parameter in model.parameters():
                parameter.grad = None
            return Micro(saved, trace.points(), counted.total)

    def scored(self, rows: int, length: int) -> Scored:
        """Trace a forward pass without gradients; for a decoder, without logits."""
        model: Any = self.learner.model
        with self._fake, torch.no_grad(), _tracing(model.eval(), self._config, []) as trace:
            self.learner.activate(self._task)
            batch = self._batch(rows, length, 1)
            with trace.live, _Operations() as counted:
                if isinstance(model, CausalModel):
                    untyped: Any = model.backbone
                    untyped.base_model(batch["input_ids"][:rows], use_cache=False)
                else:
                    model(batch)
            return Scored(trace.live.peak - trace.before, counted.total)

    def marked(self, length: int, answer: int) -> int:
        """Return the peak bytes in addition to the weights while a rationale is computed by gradients."""
        model: Any = self.learner.model
        with self._fake, _tracing(model.eval(), self._config, []) as trace:
            self.learner.activate(self._task)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            model.requires_grad_(False)  # as in inference
            with trace.live:
                sensitivity(model.backbone, torch.zeros(length, dtype=torch.int64), length - 1 - answer)
            for parameter in trained:
                parameter.requires_grad_(True)
            return trace.live.peak - trace.before

    def ended(self) -> int:
        """End the task and return the bytes of the learner's state: masks in bits, importances.

        No micro-batch can be traced after this.
        """
        with self._fake:
            self._finish(self._task)
            state = self.learner.state_dict().values()
        return sum(value.numel() * (4 if value.is_floating_point() else value.element_size()) for value in state)

    def labels(self, rows: int, length: int, answer: int) -> dict[str, int]:
        """Return the number of labels of a decoder's micro-batch by loss term: LAMOL encodes every row twice."""
        if not isinstance(self.learner, TextLearner):
            return {}
        has_samples = self.learner.encoding_options(training=True).samples
        return {"qa": rows * answer} | ({"lm": rows * length} if has_samples else {})

    def _batch(self, rows: int, length: int, answer: int) -> dict[str, Tensor]:
        """Return a batch in the format of this learner, with all rows at the maximum length."""
        batch = {name: torch.zeros(rows, dtype=torch.int64) for name in ("row", "task")} | {"weight": torch.ones(rows)}
        if not isinstance(self.learner, TextLearner):
            names = ["input_ids", "attention_mask"]
            if getattr(self._config, "type_vocab_size", 0) > 1:
                names.append("token_type_ids")
            batch |= {name: torch.ones(rows, length, dtype=torch.int64) for name in names}
            return batch | {"label": torch.zeros(rows, dtype=torch.int64)}
        parts = self.labels(rows, length, answer)
        labels = sum(parts.values())
        batch["input_ids"] = torch.zeros(rows * len(parts), length, dtype=torch.int64)
        batch |= {name: torch.zeros(labels, dtype=torch.int64) for name in ("place", "target", "owner", "part")}
        return batch | {"unit": torch.ones(labels), "replayed": torch.zeros(rows)}


class _Operations(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention, with torch's formulas.

    Attention is counted in full, even if a kernel for causal attention skips half of it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # by the library
        self.total = 0
        aten, known = torch.ops.aten, flop_registry
        self._formulas = known | {  # torch has no formulas for CPU kernels
            aten._scaled_dot_product_flash_attention_for_cpu: known[aten._scaled_dot_product_flash_attention],
            aten._scaled_dot_product_flash_attention_for_cpu_backward: known[
                aten._scaled_dot_product_flash_attention_backward
            ],
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count an operation."""
        result = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class _Trace:
    """Tracks the live activations by kind and the finished gradients of a micro-batch."""

    def __init__(self, resident: list[Tensor], vocabulary: int) -> None:
        self._vocabulary, self._inside = vocabulary, ["activations"]
        self._finished, self._points = 0, list[tuple[int, Point]]()
        self.live = LiveTensorBytes(self._kind)
        self.live.show(resident, "resident")
        self.before = self.live.live
        self.live.watch = self._note

    def _kind(self, tensor: Tensor) -> str:
        return "logits" if tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary else self._inside[-1]

    def enter(self, kind: str) -> None:
        """Count new tensors as of a kind."""
        self._inside.append(kind)

    def leave(self) -> None:
        """Undo the last `enter`."""
        self._inside.pop()

    def finish(self, parameter: Tensor) -> None:
        """Record that a gradient is finished."""
        assert parameter.grad is not None
        self.live.show([parameter.grad], "gradients")
        self._finished += parameter.numel()
        self._note()

    def activations(self) -> dict[str, int]:
        """Return the live bytes by kind, without weights and finished gradients."""
        return {kind: size for kind, size in self.live.kinds.items() if kind not in ("resident", "gradients") and size}

    def _note(self) -> None:
        kinds = self.live.kinds
        size = self.live.live - kinds["resident"] - kinds["gradients"]
        while self._points and self._points[-1][0] <= size:
            self._points.pop()
        self._points.append((size, Point(self.activations(), self._finished)))

    def points(self) -> tuple[Point, ...]:
        """Return the possible peaks."""
        return tuple(point for _, point in self._points)


@contextmanager
def _tracing(model: nn.Module, config: Any, extras: list[Tensor]) -> Iterator[_Trace]:
    """Trace a model's computation; extras: other resident tensors."""
    trace, hooks = _Trace([*tensors_of(model), *extras], getattr(config, "vocab_size", 0)), []
    for module in model.modules():
        if isinstance(module, Plugin | HoulsbyAdapters):
            for part, kind in ((module, "plugins"), (module.inner, "activations")):
                hooks.append(part.register_forward_pre_hook(lambda *_, kind=kind: trace.enter(kind)))
                hooks.append(part.register_forward_hook(lambda *_: trace.leave()))
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    hooks += [parameter.register_post_accumulate_grad_hook(trace.finish) for parameter in trained]
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def _redirect_copies(backbone: Any, teacher: Any) -> None:
    """Make copies of the backbone return the teacher, since fake tensors can be neither copied nor moved."""
    if teacher is not None:
        backbone.__deepcopy__ = lambda memo: teacher
        teacher.to = lambda *args: teacher


def _materialize(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the tensors of a model by fake ones on the CPU, optionally in another dtype.

    On the meta device attention would not be fused. `nn.Module.to` supports neither conversion.
    """
    placed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in placed:
                body = torch.empty_like(parameter, dtype=dtype, device="cpu")
                placed[id(parameter)] = nn.Parameter(body, parameter.requires_grad)
            setattr(module, name, placed[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            lowered = dtype if buffer.is_floating_point() else None
            setattr(module, name, torch.empty_like(buffer, dtype=lowered, device="cpu"))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _decoder(model: Any) -> tuple[int, int, int, int, int]:
    return *shape_of(model), model.config.vocab_size
