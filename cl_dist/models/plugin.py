"""CTR's CL-plugin: knowledge sharing, then a gated task-specific module, inside a frozen backbone.

Axes: B rows, L tokens, H hidden units, A units of the task-specific module, U seen tasks, P plugins.
Source: Ke et al. 2021 (CTR), sections 3-4. One plugin sits behind each sub-block, before the residual sum and norm:
    h = x + KSM(x);  k1 = ReLU(W1 h + b1) * m1;  k2 = ReLU(W2 k1 + b2) * m2;  Plugin(x) = x + k2
Departs from the release: norms are copied per task instead of being trained by every task without protection.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_dist.models.adapters import ActiveTask, TaskNorms, insert
from cl_dist.models.capsules import Sharing
from cl_dist.models.classifier import Batch, Classifier, freeze
from cl_dist.models.config import MaskShape, PluginShape
from cl_dist.models.gates import Gate, binary, sparsity
from cl_dist.pieces import whole_shape


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


class CtrClassifier(Classifier):
    """A frozen backbone with a CL-plugin behind every sub-block, and a head per task.

    Usable without the rest of this project:
        model = CtrClassifier(AutoModel.from_pretrained(...), PluginShape(tsm_size=256))
        model.add_task(num_labels=2); model.start_task(0)
        ... an ordinary training loop over `model(batch)`, with `model.context.slope` set at each step ...
        model.finish_task(); model.save_plugins("plugins.safetensors")
    """

    def __init__(self, backbone: PreTrainedModel, shape: MaskShape, pooling: str | None = None) -> None:
        super().__init__(backbone, pooling)
        freeze(backbone)
        self.shape, self.context = shape, Context()
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

    def start_task(self, task: int) -> None:
        """Choose what task `task` may train: its own parts, and the plugins' shared layers.

        Those of their units that earlier tasks use are for the caller to protect.
        """
        freeze(self)
        trained = self.task_parameters(task)
        for plugin in self.plugins:
            trained += [*plugin.fc1.parameters(), *plugin.fc2.parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)
        self.activate(task)

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
        """
        for number, plugin in enumerate(self.plugins):
            gate1, gate2 = plugin.gates(self.context.task) if gates is None else gates[number]
            plugin.mask1 = torch.cat([plugin.mask1, (gate1.detach() > 0)[None].to(plugin.mask1.device)])
            plugin.mask2 = torch.cat([plugin.mask2, (gate2.detach() > 0)[None].to(plugin.mask2.device)])

    def sparsity(self) -> Tensor:
        """Return the sparsity term of the masks that the last forward pass used."""
        return sparsity(self.context.masks)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits (B, K) of the active task."""
        self.context.token_mask_BL = batch["attention_mask"].bool()
        self.context.masks, self.context.gates = [], []
        return super().forward(batch)

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
        cut = [name for name, p in self.own_parameters().items() if p.shape != whole_shape(p)]
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
