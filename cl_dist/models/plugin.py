"""CTR classifier: a frozen backbone with a CL-plugin after every sub-block and a head per task.

Axes: B rows, L tokens, H hidden units, A units of the task-specific module, U seen tasks, P plugins.
Source: Ke et al. 2021 (CTR), sections 3-4; the plugin is in plugin_layer.py.
Departs from the release: norms are copied per task instead of being trained by every task without protection.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_dist.models.capsules import Sharing
from cl_dist.models.classifier import Batch, Classifier, freeze
from cl_dist.models.config import MaskShape
from cl_dist.models.gates import slope, sparsity
from cl_dist.models.noise import gumbel
from cl_dist.models.plugin_layer import Context, Plugin
from cl_dist.models.task_modules import TaskNorms, insert_modules
from cl_dist.partition import full_shape


class CtrClassifier(Classifier):
    """A frozen backbone with a CL-plugin after every sub-block, and a head per task.

    Usable without the rest of this project, with any optimizer in any training loop:

        model = CtrClassifier(AutoModel.from_pretrained("path/to/bert"), PluginShape(tsm_size=256))
        for task, batches in enumerate([reviews, tickets]):
            model.add_task(num_labels=2)
            model.start_task(task)
            optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-3, weight_decay=0.01))
            for step, batch in enumerate(batches):
                model.set_progress(step, len(batches))
                loss = F.cross_entropy(model(batch), batch["label"]) + 0.75 * model.sparsity()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            model.finish_task()
        model.eval()
        model.activate(0)
        logits = model(reviews[0])

    From `start_task` to `finish_task` the outputs of earlier tasks do not change by a bit: their logits in eval mode
    stay the same. `state_dict` has everything for a restart; add the same tasks, load it, then call `start_task`.
    """

    def __init__(self, backbone: PreTrainedModel, shape: MaskShape, pooling: str | None = None) -> None:
        super().__init__(backbone, pooling)
        freeze(backbone)
        self.shape, self.context = shape, Context()
        self._training_task: int | None = None
        self._progress: tuple[int, int] | None = None
        self.earlier = "routed"
        """How the gates of earlier tasks' capsules are decided: routed, or for ablations closed or by a coin."""
        self.plugins: list[Plugin] = []

        def plugin(inner: nn.Module) -> nn.Module:
            self.plugins.append(Plugin(inner, backbone.config.hidden_size, shape, self.context, len(self.plugins)))
            return self.plugins[-1]

        self.plugin_names, self.norms = insert_modules(backbone, self.context, plugin)

    @property
    def sharings(self) -> list[Sharing]:
        """The knowledge-sharing modules; empty if they are switched off."""
        return [plugin.sharing for plugin in self.plugins if plugin.sharing is not None]

    @property
    def num_tasks(self) -> int:
        """Number of tasks that have been added."""
        return len(self.heads)

    def add_task(self, num_labels: int) -> None:
        """Append the next task: parts in every plugin and norm, and a head."""
        parts: list[Plugin | TaskNorms] = [*self.plugins, *self.norms]
        for part in parts:
            part.add_task()
        self.add_head(num_labels)

    def task_parameters(self, task: int) -> list[nn.Parameter]:
        """Return the parameters of a single task: its sharing parts, gates, norms and head."""
        own = [p for plugin in self.plugins for p in plugin.gates(task)]
        own += [p for sharing in self.sharings for p in sharing.task_parameters(task)]
        own += [p for norms in self.norms for p in norms.norms[task].parameters()]
        return own + list(self.heads[task].parameters())

    @property
    def num_finished(self) -> int:
        """Number of tasks whose masks are final."""
        return self.plugins[0].mask1.shape[0]

    def start_task(self, task: int, protect: bool = True) -> None:
        """Make the parameters of a task and the plugins' shared layers trainable.

        Args:
            task: The task to train.
            protect: Prevent any change of the units that earlier tasks use, see `Plugin.protect`. False leaves that to
                the caller: cl-dist's learners scale gradients and restore entries in the engine, also under ZeRO-3.

        Raises:
            ValueError: If earlier tasks are not finished, or this one is finished already.
        """
        if protect and task != self.num_finished:
            raise ValueError(
                f"start_task({task}): expected {self.num_finished}, the number of finished tasks; call "
                "finish_task() at the end of a task, and load a state_dict before start_task()"
            )
        self._release()
        freeze(self)
        trained = self.task_parameters(task)
        for plugin in self.plugins:
            trained += [*plugin.fc1.parameters(), *plugin.fc2.parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)
        self.activate(task)
        if protect:
            self._training_task = task
            for plugin in self.plugins:
                plugin.protect(task)

    def _release(self) -> None:
        self._training_task = self._progress = None
        for plugin in self.plugins:
            plugin.restore()
            plugin.release()

    def parameter_groups(self, lr: float, weight_decay: float = 0.0, gate_lr: float = 0.02) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups for the task in training.

        Gates have their own learning rate. Biases, norms and gates have no weight decay, nor have the shared layers
        once an earlier task uses units of them.
        """
        gates = {id(gate) for plugin in self.plugins for gate in plugin.gates(self.context.task)}
        layers = (layer for plugin in self.plugins for layer in (plugin.fc1, plugin.fc2))
        used = {id(p) for layer in layers for p in layer.parameters()} if self.num_finished else set()
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in self.parameters():
            if parameter.requires_grad:
                decays = len(full_shape(parameter)) > 1 and id(parameter) not in used
                key = (gate_lr if id(parameter) in gates else lr, weight_decay if decays else 0.0)
                groups.setdefault(key, []).append(parameter)
        return [{"params": groups[key], "lr": key[0], "weight_decay": key[1]} for key in sorted(groups)]

    def set_progress(self, step: int, total_steps: int) -> None:
        """Set the progress of the task's training, before each optimizer step: 0 <= step < total_steps.

        In train mode the gates' slope rises to s_max and the routers' noise, drawn from torch's generator, falls to 0.
        In eval mode masks and routers behave as after `finish_task`.
        """
        slope(step, total_steps, self.shape.s_max)  # raises for steps beyond the end
        self._progress = (step, total_steps)

    def train_capsules(self, before: int) -> None:
        """Make the capsules of earlier tasks trainable through open gates: backward transfer."""
        for sharing in self.sharings:
            for task in range(before):
                for parameter in sharing.capsule_parameters(task):
                    parameter.requires_grad_(True)

    def inherit(self, task: int, source: int) -> None:
        """Initialize the masks, norms, router, up-projection and routing row of a task with an earlier task's.

        So is the head, if both have the same number of labels.
        """
        for sharing in self.sharings:
            sharing.inherit(task, source)
        for norms in self.norms:
            norms.norms[task].load_state_dict(norms.norms[source].state_dict())
        with torch.no_grad():
            for plugin in self.plugins:
                for gate, earlier in zip(plugin.gates(task), plugin.gates(source), strict=True):
                    gate.copy_(earlier)
        if self.heads[task].weight.shape == self.heads[source].weight.shape:
            self.heads[task].load_state_dict(self.heads[source].state_dict())

    def activate(self, task: int) -> None:
        """Select the task for the next forward passes: its masks, capsules, norms and head."""
        self.task = self.context.task = task

    def finish_task(self, gates: list[tuple[Tensor, Tensor]] | None = None) -> None:
        """Binarise the masks of the task in training and mark their units as used.

        Args:
            gates: The float32 masters of the gate embeddings, if the parameters themselves have lower precision.

        Raises:
            ValueError: If the task is finished already.
        """
        task = self.context.task if self._training_task is None else self._training_task
        if task != self.num_finished:
            raise ValueError(f"finish_task: expected task {self.num_finished} to be the one in training, not {task}")
        if self._training_task is not None:
            self._release()
            self.context.slope = self.context.noise_PBU2 = None
            freeze(self)
        for number, plugin in enumerate(self.plugins):
            gate1, gate2 = plugin.gates(task) if gates is None else gates[number]
            plugin.mask1 = torch.cat([plugin.mask1, (gate1.detach() > 0)[None].to(plugin.mask1.device)])
            plugin.mask2 = torch.cat([plugin.mask2, (gate2.detach() > 0)[None].to(plugin.mask2.device)])

    def sparsity(self) -> Tensor:
        """Return the sparsity term of the masks of the last forward pass."""
        return sparsity(self.context.masks)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits (B, K) of the active task."""
        if self._training_task is not None:
            self._prepare(batch["attention_mask"])
        return super().forward(batch)

    def vectors(self, batch: Batch) -> Tensor:
        """Return the sentence vectors (B, H) of the active task."""
        self.context.token_mask_BL = batch["attention_mask"].bool()
        self.context.masks, self.context.gates = [], []
        self.context.fixed_PBU = None if self.earlier == "routed" else self._fixed(batch)
        return super().vectors(batch)

    def _fixed(self, batch: Batch) -> Tensor:
        """Return gates of earlier tasks' capsules (P, B, U) that no router has decided."""
        rows_B, num = batch["row"], len(self.plugins)
        if self.earlier == "closed":
            return torch.zeros(num, len(rows_B), self.context.task, device=rows_B.device)
        noise_PBU2 = gumbel(0, 0, rows_B, num, self.context.task)
        return (noise_PBU2[..., 0] > noise_PBU2[..., 1]).float()

    def _prepare(self, rows_BL: Tensor) -> None:
        """Set slope and noise for the current progress and mode; raise if a training step would be invalid."""
        context, task = self.context, self._training_task
        if self._progress is not None:
            step, total = self._progress
            context.slope = slope(step, total, self.shape.s_max) if self.training else None
            scale = 1 - step / max(1, total - 1)
            noise_PBU2 = torch.empty(len(self.plugins), len(rows_BL), context.task, 2, device=rows_BL.device)
            noisy = self.training and scale > 0 and self.sharings
            context.noise_PBU2 = -noise_PBU2.exponential_().log() * scale if noisy else None
        if self.training and torch.is_grad_enabled() and (context.task != task or context.slope is None):
            wanted = f"activate({task})" if context.task != task else "set_progress(step, total_steps)"
            raise ValueError(f"task {task} is in training: call {wanted} before its next step, and eval() for scoring")

    def masks(self) -> dict[str, Tensor]:
        """Return the binary masks of the finished tasks by plugin: uint8, eight units a byte."""
        return {
            f"{name}.{kind}": pack(mask)
            for name, plugin in zip(self.plugin_names, self.plugins, strict=True)
            for kind, mask in (("mask1", plugin.mask1), ("mask2", plugin.mask2))
        }

    def load_masks(self, masks: dict[str, Tensor]) -> None:
        """Load masks returned by `masks`."""
        for name, plugin in zip(self.plugin_names, self.plugins, strict=True):
            plugin.mask1 = unpack(masks[f"{name}.mask1"], plugin.mask1.shape[1]).to(plugin.mask1.device)
            plugin.mask2 = unpack(masks[f"{name}.mask2"], plugin.mask2.shape[1]).to(plugin.mask2.device)

    def save_plugins(self, path: Path | str) -> None:
        """Write plugins, norms, heads and masks, without the backbone, as safetensors.

        Raises:
            ValueError: If a parameter is partitioned.
        """
        partitioned = [name for name, p in self.own_parameters().items() if p.shape != full_shape(p)]
        if partitioned:
            raise ValueError(
                f"{path}: parameters are partitioned, such as {partitioned[0]!r}; gather own_parameters() on all ranks "
                "first, with deepspeed.zero.GatheredParameters"
            )
        owned = {name: parameter.detach().contiguous() for name, parameter in self.own_parameters().items()}
        save_file({**owned, **{f"masks.{k}": v for k, v in self.masks().items()}}, str(path))

    def load_plugins(self, path: Path | str) -> None:
        """Load a file written by `save_plugins`; add the same tasks first."""
        state = load_file(str(path))
        self.load_masks({k.removeprefix("masks."): v for k, v in state.items() if k.startswith("masks.")})
        rest = {k: v for k, v in state.items() if not k.startswith("masks.")}
        _, unexpected = self.load_state_dict(rest, strict=False)
        missing = [name for name in self.own_parameters() if name not in rest]
        if unexpected or missing:
            raise ValueError(
                f"{path}: does not match this model or its number of tasks: missing {missing[:3]}, unexpected "
                f"{unexpected[:3]}"
            )

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters outside the backbone by name: plugins, task norms, heads."""
        own = {id(p) for plugin in self.plugins for n, p in plugin.named_parameters() if not n.startswith("inner.")}
        own |= {id(p) for part in (*(norms.norms for norms in self.norms), self.heads) for p in part.parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) in own}


def pack(mask_TU: Tensor) -> Tensor:
    """Pack a boolean mask (T, U) into uint8 (T, ceil(U / 8)), least significant bit first."""
    padded = F.pad(mask_TU.to(torch.uint8), (0, -mask_TU.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask_TU.device)).sum(-1, dtype=torch.uint8)


def unpack(bits_TX: Tensor, units: int) -> Tensor:
    """Undo `pack`: boolean (T, units)."""
    bits = (bits_TX[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits_TX.device)) & 1
    return bits.flatten(1)[:, :units].bool()
