"""HAT: trains two gated layers per sub-block, and protects the units that earlier tasks use.

The mathematics is in models/gates and models/plugin. CTR builds on this learner.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_dist.learners.base import Learner, Loss, Progress
from cl_dist.methods.hat import MaskedConfig
from cl_dist.models.classifier import Batch, cross_entropy
from cl_dist.models.gates import slope
from cl_dist.models.plugin import CtrClassifier
from cl_dist.models.transferability import logme
from cl_dist.parallel.gradients import GradientTransform, GradScale
from cl_dist.parallel.seeds import seeded

log = logging.getLogger(__name__)


class Hat(Learner):
    """Trains the two gated layers where no earlier task uses them, and the task's own gates, norms and head."""

    config: MaskedConfig
    model: CtrClassifier

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner."""
        self.model = CtrClassifier(backbone, self.config, self.pooling)
        for count in self.num_labels:
            self.model.add_task(count)
        self._draw(task)
        return self.model

    def _draw(self, task: int) -> None:
        """Draw a task's gates and head anew, keyed on seed, task and name alone.

        So methods that insert different parts besides them start from the same masks and heads: CTR and HAT are pairs.
        """
        shape = self.model.shape
        weight = self.model.heads[task].get_parameter("weight")
        for name, plugin in zip(self.model.plugin_names, self.model.plugins, strict=True):
            for number, gate in enumerate(plugin.gates(task)):
                with seeded(self.seed, "gate", task, name, number), torch.no_grad():
                    gate.normal_(shape.mask_mean, shape.mask_std)
        with seeded(self.seed, "head", task), torch.no_grad():
            weight.normal_(std=0.02)

    @torch.no_grad()
    def nearest(self, batches: Iterable[Batch]) -> int | None:
        """Compare the backbone alone and with each earlier task's parts, by LogME of their sentence vectors."""
        model, task = self.model.eval(), len(self.num_labels) - 1
        rows = list(batches)
        labels_N = torch.cat([batch["label"] for batch in rows])
        if len(labels_N.unique()) < 2:
            return None  # nothing to predict
        scores: dict[int | None, float] = {}
        for candidate in (None, *range(task)):
            self.activate(task if candidate is None else candidate)
            model.context.plain = candidate is None
            vectors_NH = torch.cat([model.vectors(batch).float() for batch in rows])
            scores[candidate] = round(logme(vectors_NH, labels_N), 4)  # less is rounding, and no reason to inherit
        model.context.plain = False
        self.activate(task)
        log.info("nearest task=%d logme=%s", task, scores)
        return max(scores, key=lambda candidate: scores[candidate])

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """Start what the task inherits, if it does; freeze what is not its own."""
        if task and self.config.inherit == "previous":
            self.source = task - 1
        if self.source is not None:
            self.model.inherit(task, self.source)
        self.model.start_task(task, protect=False)  # the engine does it, by gradient_transforms, under any ZeRO stage

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return cross-entropy per row and the sparsity of the task's masks.

        Once per round the mask slope rises to s_max, so that a round ends under the conditions of scoring.
        """
        self.model.context.slope = slope(progress.round_step, progress.round_steps, self.config.s_max)
        logits_BK = model(batch)
        # From the masks that the plugins recorded in this forward pass: the gates themselves may be empty by now.
        sparsity = self.config.sparsity * self.model.sparsity()
        return Loss({"ce": cross_entropy(logits_BK, batch)}, {"sparsity": sparsity})

    def activate(self, task: int, without: str | None = None) -> None:
        """Score with binary masks."""
        self.model.activate(task)
        self.model.context.slope = self.model.context.noise_PBU2 = None

    def gradient_transforms(self) -> Mapping[str, GradientTransform]:
        """Protect the units that earlier tasks use; bring gate gradients to the scale of the others.

        A unit of the first layer is kept whole; a weight of the second is kept where both its ends are used. Gate
        gradients are s_max / 4 times the others', which would leave the clipped norm to them alone; Adam is invariant
        to the constant that is taken out here.
        """
        scales: dict[str, GradientTransform] = {}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        task = self.model.context.task
        for plugin in self.model.plugins:
            for name, used in plugin.shared(task).items() if task else ():
                row, *column = (1 - used_U for used_U in used)
                scales[names[plugin.get_parameter(name)]] = GradScale(row=row, column=column[0] if column else None)
            for gate in plugin.gates(task):
                scales[names[gate]] = GradScale(scale=1 / self.config.s_max)
        return scales

    def learning_rates(self) -> Mapping[str, float]:
        """Gates and heads have their own rates."""
        rates = {}
        for name, _ in self.model.named_parameters():
            if ".gate1_" in name or ".gate2_" in name:
                rates[name] = self.config.gate_lr
            if self.config.head_lr is not None and name.startswith("heads."):
                rates[name] = self.config.head_lr
        return rates

    def end_task(self, masters: Mapping[str, Tensor], rows: Iterable[Batch]) -> None:
        """Binarise the task's masks from the float32 gate embeddings."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        pairs = [plugin.gates(self.model.context.task) for plugin in self.model.plugins]
        self.model.finish_task([(masters[names[gate1]], masters[names[gate2]]) for gate1, gate2 in pairs])

    def report_info(self) -> dict[str, Any]:
        """Return each plugin's mask use, sharing with earlier tasks, and free units, as shares of its units."""
        task, plugins = self.model.context.task, self.model.plugins
        return {
            "layers": self.model.plugin_names,
            "units": [[p.mask1.shape[1], p.mask2.shape[1]] for p in plugins],
            "inherited_from": self.source,
            "mask_use": [[_mean(m[task]) for m in (p.mask1, p.mask2)] for p in plugins],
            "mask_shared": [[_shared(m, task) for m in (p.mask1, p.mask2)] for p in plugins],
            "free_units": [[1 - _mean(m.any(0)) for m in (p.mask1, p.mask2)] for p in plugins],
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the binary masks of all finished tasks."""
        return self.model.masks()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the binary masks."""
        self.model.load_masks(dict(state))


def _mean(mask_U: Tensor) -> float:
    return float(mask_U.float().mean())


def _shared(mask_TU: Tensor, task: int) -> float:
    """Return the share of a task's units that an earlier task uses too."""
    own = mask_TU[task]
    return float((own & mask_TU[:task].any(0)).sum() / own.sum().clamp(min=1))
