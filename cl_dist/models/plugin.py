"""CTR's CL-plugin: knowledge sharing, then a gated task-specific module, inside a frozen backbone.

Axes: B rows, L tokens, H hidden units, A units of the task-specific module, U seen tasks, P plugins.
Source: Ke et al. 2021 (CTR), sections 3-4. One plugin sits behind each sub-block, before the residual sum and norm:
    h = x + KSM(x);  k1 = ReLU(W1 h + b1) * m1;  k2 = ReLU(W2 k1 + b2) * m2;  Plugin(x) = x + k2
Departs from the release: norms are copied per task instead of being trained by every task without protection.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from cl_dist.models.capsules import Sharing
from cl_dist.models.classifier import Batch, Classifier, freeze
from cl_dist.models.config import MaskShape, PluginShape
from cl_dist.models.gates import Gate, binary, slope, sparsity
from cl_dist.models.task_modules import ActiveTask, TaskNorms, insert
from cl_dist.partition import full_shape


@dataclass
class Context(ActiveTask):
    """What all plugins must know about a forward pass besides the hidden states; one object, shared by them."""

    slope: float | None = None
    """Slope of the gates of a task in training; None uses binary masks."""
    share: bool = True
    """Whether knowledge sharing is on; off is the ablation."""
    noise_PBU2: Tensor | None = None
    """Gumbel noise of the routers; None decides by argmax."""
    token_mask_BL: Tensor | None = None
    masks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Written by a forward pass in training: (mask, union of earlier masks) of every gate, for the sparsity term."""
    gates: list[Tensor] = field(default_factory=list)
    """Written by a forward pass: decisions (B, U) of each plugin's router."""


class Plugin(nn.Module):
    """The plugin behind one sub-block. Its two layers are shared by all tasks; gates say which units a task uses."""

    mask1: Tensor
    mask2: Tensor

    def __init__(self, inner: nn.Module, hidden: int, shape: MaskShape, context: Context, index: int) -> None:
        super().__init__()
        self.inner = inner
        self.shape, self.context, self.index = shape, context, index
        self.num_tasks = 0
        self.sharing = Sharing(shape, hidden) if isinstance(shape, PluginShape) and shape.share else None
        self.fc1 = nn.Linear(hidden, shape.tsm_size)
        self.fc2 = nn.Linear(shape.tsm_size, hidden)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        # Binary masks of finished tasks, one row a task. They are no parameters: nothing can train them.
        self.register_buffer("mask1", torch.zeros(0, shape.tsm_size, dtype=torch.bool), persistent=False)
        self.register_buffer("mask2", torch.zeros(0, hidden, dtype=torch.bool), persistent=False)
        self.protected: int | None = None
        """The task in training that the earlier tasks are protected from; None if nobody asked for protection."""
        self._kept: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
        self._hooks: list[RemovableHandle] = []
        self.register_load_state_dict_post_hook(_protect_loaded)  # type: ignore[no-untyped-call]

    def add_task(self) -> None:
        """Append the gates and sharing parts of the next task."""
        task = self.num_tasks
        if self.sharing is not None:
            self.sharing.add_task()
        for number, layer in ((1, self.fc1), (2, self.fc2)):
            gate = torch.empty(layer.out_features).normal_(self.shape.mask_mean, self.shape.mask_std)
            self.register_parameter(f"gate{number}_{task}", nn.Parameter(gate))
        self.num_tasks += 1

    def gates(self, task: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the two gate embeddings (A,) and (H,) of a task."""
        return getattr(self, f"gate1_{task}"), getattr(self, f"gate2_{task}")

    def used(self, task: int) -> tuple[Tensor, Tensor]:
        """Return which units the tasks before `task` use, as float32 masks (A,) and (H,)."""
        return self.mask1[:task].any(0).float(), self.mask2[:task].any(0).float()

    def shared(self, task: int) -> dict[str, tuple[Tensor, ...]]:
        """Return by parameter which rows, and columns where they count, of the shared layers earlier tasks use.

        A unit of the first layer is theirs whole, an entry of the second where they use both its ends.
        """
        used1_A, used2_H = self.used(task)
        return {
            "fc1.weight": (used1_A,),
            "fc1.bias": (used1_A,),
            "fc2.weight": (used2_H, used1_A),
            "fc2.bias": (used2_H,),
        }

    def protect(self, task: int) -> None:
        """Protect what earlier tasks use of the shared layers while `task` trains, whatever the optimizer.

        Gradients are zero there. Weight decay and momentum move weights without a gradient, so values are also restored
        before they are used: in each forward pass and in `state_dict`. Gates get gradients s_max / 4 times larger than
        other parameters; they are scaled down, or clipping by norm would leave nothing for the others.
        """
        self.release()
        self.protected = task
        for gate in self.gates(task):
            self._hooks.append(gate.register_hook(partial(torch.mul, other=1 / self.shape.s_max)))
        for name, used in self.shared(task).items():
            parameter, (rows, *columns) = self.get_parameter(name), [used_U.nonzero()[:, 0] for used_U in used]
            if rows.numel():
                index = (rows[:, None], *columns) if columns else (rows,)
                self._kept[name] = index, parameter.detach()[index].clone()
                self._hooks.append(parameter.register_hook(partial(_zeroed, index=index)))

    def restore(self) -> None:
        """Restore the values that `protect` keeps.

        Raises:
            ValueError: If ZeRO-3 has partitioned the parameters.
        """
        for name, (index, values) in self._kept.items():
            parameter = self.get_parameter(name)
            if parameter.shape != full_shape(parameter):
                raise ValueError(
                    f"{name}: start_task(protect=True) needs whole parameters, and ZeRO-3 has partitioned them; "
                    "train with cl-dist, or with ZeRO-1 or 2"
                )
            # .data: equal bits are written between the forward passes of one step, which autograd must not take for a
            # change. The model may have moved to another device or type since.
            parameter.data[index] = values.to(parameter)

    def release(self) -> None:
        """End the protection."""
        for hook in self._hooks:
            hook.remove()
        self.protected, self._kept, self._hooks = None, {}, []

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.restore()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.mask1.shape[0]:
            destination |= {f"{prefix}{name}": getattr(self, name) for name in MASKS}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in MASKS:
            if (mask := state_dict.get(f"{prefix}{name}")) is not None:
                setattr(self, name, mask.to(getattr(self, name).device, torch.bool, copy=True))
        rest = {name: value for name, value in state_dict.items() if name.removeprefix(prefix) not in MASKS}
        super()._load_from_state_dict(rest, prefix, *args)

    def _masks(self) -> tuple[Tensor, Tensor]:
        task, s, s_max = self.context.task, self.context.slope, self.shape.s_max
        if task < self.mask1.shape[0]:
            return self.mask1[task].float(), self.mask2[task].float()
        gate1, gate2 = self.gates(task)
        if s is None:
            return binary(gate1), binary(gate2)
        masks = Gate.apply(gate1, s, s_max), Gate.apply(gate2, s, s_max)
        self.context.masks.extend(zip(masks, self.used(task), strict=True))
        return masks

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the sub-block's output with the plugin's contribution added: (B, L, H)."""
        x_BLH: Tensor = self.inner(*args, **kwargs)
        self.restore()
        context, h_BLH = self.context, x_BLH
        if context.share and self.sharing is not None:
            assert context.token_mask_BL is not None  # set by CtrClassifier.forward
            noise_BU2 = None if context.noise_PBU2 is None else context.noise_PBU2[self.index]
            shared_BLH, delta_BU = self.sharing(x_BLH, context.task, context.token_mask_BL.to(x_BLH.device), noise_BU2)
            h_BLH = x_BLH + shared_BLH
            if delta_BU is not None:
                context.gates.append(delta_BU.detach())
        mask1_A, mask2_H = (mask.to(x_BLH.dtype) for mask in self._masks())
        k1_BLA = F.relu(self.fc1(h_BLH)) * mask1_A
        k2_BLH = F.relu(self.fc2(k1_BLA)) * mask2_H
        return x_BLH + k2_BLH


MASKS = ("mask1", "mask2")


def _zeroed(grad: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    return grad.index_put(index, grad.new_zeros(()))


def _protect_loaded(plugin: Plugin, _: object) -> None:
    """Protect what has been loaded, in place of what was there before."""
    if plugin.protected is not None:
        plugin.protect(plugin.protected)


class CtrClassifier(Classifier):
    """A frozen backbone with a CL-plugin behind every sub-block, and a head per task.

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

    From `start_task` to `finish_task` nothing moves a bit of what the earlier tasks compute: their logits in eval mode
    stay as they are. `state_dict` holds all that a restart needs; add the same tasks, load it, then call `start_task`.
    """

    def __init__(self, backbone: PreTrainedModel, shape: MaskShape, pooling: str | None = None) -> None:
        super().__init__(backbone, pooling)
        freeze(backbone)
        self.shape, self.context = shape, Context()
        self._training_task: int | None = None
        self._progress: tuple[int, int] | None = None
        self.plugins: list[Plugin] = []

        def plugin(inner: nn.Module) -> nn.Module:
            self.plugins.append(Plugin(inner, backbone.config.hidden_size, shape, self.context, len(self.plugins)))
            return self.plugins[-1]

        self.plugin_names, self.norms = insert(backbone, self.context, plugin)

    @property
    def sharings(self) -> list[Sharing]:
        """The knowledge-sharing modules; none where they are switched off."""
        return [plugin.sharing for plugin in self.plugins if plugin.sharing is not None]

    @property
    def num_tasks(self) -> int:
        """Number of tasks the model has parts for."""
        return len(self.heads)

    def add_task(self, num_labels: int) -> None:
        """Append the parts of the next task to every plugin and norm, and its head."""
        parts: list[Plugin | TaskNorms] = [*self.plugins, *self.norms]
        for part in parts:
            part.add_task()
        self.add_head(num_labels)

    def task_parameters(self, task: int) -> list[nn.Parameter]:
        """Return what belongs to one task alone: its sharing parts, gates, norms and head."""
        own = [p for plugin in self.plugins for p in plugin.gates(task)]
        own += [p for sharing in self.sharings for p in sharing.task_parameters(task)]
        own += [p for norms in self.norms for p in norms.norms[task].parameters()]
        return own + list(self.heads[task].parameters())

    @property
    def num_finished(self) -> int:
        """Number of tasks whose masks are final."""
        return self.plugins[0].mask1.shape[0]

    def start_task(self, task: int, protect: bool = True) -> None:
        """Choose what task `task` may train: its own parts, and the plugins' shared layers.

        protect keeps the units that earlier tasks use from every change, see `Plugin.protect`. False leaves that to the
        caller, as for a learner whose engine scales gradients and holds back decay itself, under ZeRO-3 too.

        Raises:
            ValueError: If earlier tasks are not finished, or this one is already.
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

        Gates have a learning rate of their own. Biases, norms and gates do not decay, nor do the shared layers once an
        earlier task uses units of them.
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
        """Set where the task's training stands, before each optimizer step: 0 <= step < total_steps.

        In train mode the gates' slope rises to s_max and the routers' noise, drawn from torch's generator, falls to 0.
        In eval mode masks and routers are as they are after `finish_task`.
        """
        slope(step, total_steps, self.shape.s_max)  # refuses steps beyond the end
        self._progress = (step, total_steps)

    def train_capsules(self, before: int) -> None:
        """Let the capsules of the tasks before this one go on learning, through open gates: backward transfer."""
        for sharing in self.sharings:
            for task in range(before):
                for parameter in sharing.capsule_parameters(task):
                    parameter.requires_grad_(True)

    def inherit(self, task: int) -> None:
        """Start the router, up-projection, routing row and norms of a task from the previous task's."""
        for sharing in self.sharings:
            sharing.inherit(task)
        for norms in self.norms:
            norms.norms[task].load_state_dict(norms.norms[task - 1].state_dict())

    def activate(self, task: int) -> None:
        """Select the task whose masks, capsules, norms and head the next forward passes use."""
        self.task = self.context.task = task

    def finish_task(self, gates: list[tuple[Tensor, Tensor]] | None = None) -> None:
        """Binarise the masks of the task in training and count their units as used.

        gates are the float32 masters of the gate embeddings, where the parameters themselves are of lower precision.

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
        """Return the sparsity term of the masks that the last forward pass used."""
        return sparsity(self.context.masks)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits (B, K) of the active task."""
        self.context.token_mask_BL = batch["attention_mask"].bool()
        self.context.masks, self.context.gates = [], []
        if self._training_task is not None:
            self._prepare(batch["attention_mask"])
        return super().forward(batch)

    def _prepare(self, rows_BL: Tensor) -> None:
        """Set slope and noise as `set_progress` and the mode ask for; refuse to train in vain."""
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
        """Restore what `masks` returned."""
        for name, plugin in zip(self.plugin_names, self.plugins, strict=True):
            plugin.mask1 = unpack(masks[f"{name}.mask1"], plugin.mask1.shape[1]).to(plugin.mask1.device)
            plugin.mask2 = unpack(masks[f"{name}.mask2"], plugin.mask2.shape[1]).to(plugin.mask2.device)

    def save_plugins(self, path: Path | str) -> None:
        """Write plugins, norms, heads and masks, without the backbone, as safetensors.

        Raises:
            ValueError: If this rank holds a piece of a parameter only.
        """
        cut = [name for name, p in self.own_parameters().items() if p.shape != full_shape(p)]
        if cut:
            raise ValueError(
                f"{path}: this rank holds pieces of parameters, see {cut[0]!r}; have all ranks gather own_parameters() "
                "first, by deepspeed.zero.GatheredParameters"
            )
        owned = {name: parameter.detach().contiguous() for name, parameter in self.own_parameters().items()}
        save_file({**owned, **{f"masks.{k}": v for k, v in self.masks().items()}}, str(path))

    def load_plugins(self, path: Path | str) -> None:
        """Load what `save_plugins` wrote into a model that has had the same tasks added."""
        state = load_file(str(path))
        self.load_masks({k.removeprefix("masks."): v for k, v in state.items() if k.startswith("masks.")})
        rest = {k: v for k, v in state.items() if not k.startswith("masks.")}
        _, unexpected = self.load_state_dict(rest, strict=False)
        missing = [name for name in self.own_parameters() if name not in rest]
        if unexpected or missing:
            raise ValueError(
                f"{path}: made for another model or task count: missing {missing[:3]}, extra {unexpected[:3]}"
            )

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return by name what is not the backbone's: plugins, norms of tasks, heads."""
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
