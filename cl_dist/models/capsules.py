"""Knowledge sharing between tasks: task capsules, pre-routing vectors, similarity estimator, task router.

Axes: B rows, L tokens, H hidden units, U seen tasks (the last is the current one), d capsule width, M capsule middle
width, J transfer capsules, D = d * J, C filters of one kernel size.
Source: Ke et al. 2021 (CTR), section 3. Dynamic routing: Sabour et al. 2017, used by B-CL (Ke et al. 2021, NAACL).
Departs from the CTR release, whose reshapes mix tasks, tokens and rows: every result here is a function of its own row,
and the number of operations does not depend on the number of tasks.
"""

import re
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_dist.models.config import SharingShape


def squash(v: Tensor) -> Tensor:
    """Shrink vectors along the last axis to a length below 1: v * |v| / (1 + |v|^2), computed in float32."""
    v32 = v.float()
    square = (v32 * v32).sum(-1, keepdim=True)
    return (v32 * torch.sqrt(square + 1e-12) / (1.0 + square)).to(v.dtype)


def task_capsules(x_BLH: Tensor, weight_UdH: Tensor, bias_Ud: Tensor) -> Tensor:
    """Return the squashed capsules of all seen tasks, by one matrix product: (B, U, L, d)."""
    num_tasks, size, hidden = weight_UdH.shape
    p_BLX = F.linear(x_BLH, weight_UdH.reshape(num_tasks * size, hidden), bias_Ud.reshape(-1))
    return squash(p_BLX.unflatten(-1, (num_tasks, size)).transpose(1, 2))


def max_conv(u_XDL: Tensor, weight_CDk: Tensor, token_mask_XL: Tensor) -> Tensor:
    """Return the maximum of a convolution over windows that start at a real token: (X, C).

    Windows read zeros beyond the last token, so the result does not depend on how far a batch is padded. Bias and ReLU
    commute with the maximum and are applied after it, by the caller.
    """
    kernel = weight_CDk.shape[-1]
    out_XCL = F.conv1d(F.pad(u_XDL, (0, kernel - 1)), weight_CDk)
    return out_XCL.masked_fill(~token_mask_XL[:, None, :], float("-inf")).amax(-1)


def dynamic_routing(u_BULJd: Tensor, rounds: int = 3) -> Tensor:
    """Route task capsules to transfer capsules by agreement: (B, L, J, d).

        c_ij = softmax_j(b_ij);  v_j = squash(sum_i c_ij u_ij);  b_ij += u_ij . v_j

    The coupling logits get no gradient before the last round, as in Sabour et al. 2017's public implementations.
    """
    logits_BULJ = torch.zeros(u_BULJd.shape[:-1], dtype=torch.float32, device=u_BULJd.device)
    fixed_BULJd = u_BULJd.detach().float()
    for _ in range(rounds - 1):
        v_BLJd = squash((logits_BULJ.softmax(-1)[..., None] * fixed_BULJd).sum(1))
        logits_BULJ = logits_BULJ + (fixed_BULJd * v_BLJd[:, None]).sum(-1)
    return squash((logits_BULJ.softmax(-1)[..., None].to(u_BULJd.dtype) * u_BULJd).sum(1))


class Router(nn.Module):
    """One task's similarity estimator, router and up-projection.

    Given the pre-routing vectors u_i of all seen tasks, a text CNN compares each with the current task's:
        q = W_c concat_k max ReLU(conv_cur_k(u_t));   z_i = concat_k max ReLU(conv_sim_k(u_i) + q)
        a_i = W_a z_i + b_a (the amount passed on);  g_i = W_g (z_i - mean_u z_u) + b_g (the gate's logits)
    An open gate passes a_i * u_i; the current task's own gate is always open.

    Initially a_i is near 1 and a gate is open with probability 1/2: with the release's initial values the output of the
    module is below 1 % of the hidden states, so neither the capsules nor the gates get a useful gradient.

    Departs from the paper, whose gate reads z_i itself. z is not negative and its larger part is common to all tasks:
    a step on W_g moves all gates together, much faster than apart, and they end up open for every capsule or for none.
    """

    def __init__(self, shape: SharingShape, hidden: int) -> None:
        super().__init__()
        width, filters = shape.capsule_size * shape.transfer_capsules, shape.filters
        for k in shape.kernels:
            for kind in ("cur", "sim"):
                self.register_parameter(f"{kind}{k}_weight", nn.Parameter(torch.empty(filters, width, k)))
                self.register_parameter(f"{kind}{k}_bias", nn.Parameter(torch.zeros(filters)))
                nn.init.kaiming_uniform_(getattr(self, f"{kind}{k}_weight"), a=5**0.5)
        self.kernels = shape.kernels
        self.current = nn.Linear(filters * len(shape.kernels), filters, bias=False)
        self.amount = nn.Linear(filters * len(shape.kernels), width)
        self.gate = nn.Linear(filters * len(shape.kernels), 2)
        nn.init.ones_(self.amount.bias)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(
        self, u_BULD: Tensor, token_mask_BL: Tensor, noise_BU2: Tensor | None, fixed_BU: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return v (B, L, D), the sum of the outputs of the open gates, and the gates delta (B, U) in {0, 1}.

        noise_BU2 is the Gumbel noise of the U - 1 earlier tasks' gates; None decides by argmax. fixed_BU replaces the
        decisions of these gates.
        """
        batch, num_tasks, length, width = u_BULD.shape
        u_XDL = (u_BULD * token_mask_BL[:, None, :, None].to(u_BULD.dtype)).reshape(-1, length, width).transpose(1, 2)
        mask_XL = token_mask_BL.repeat_interleave(num_tasks, 0)
        own_BDL = u_XDL.unflatten(0, (batch, num_tasks))[:, -1]
        cur_BX = torch.cat([self._pool("cur", k, own_BDL, token_mask_BL) for k in self.kernels], -1)
        q_BC = self.current(F.relu(cur_BX))
        q_XC = q_BC.repeat_interleave(num_tasks, 0)
        z_XZ = torch.cat([F.relu(self._pool("sim", k, u_XDL, mask_XL) + q_XC) for k in self.kernels], -1)
        z_BUZ = z_XZ.unflatten(0, (batch, num_tasks))
        contrast_BUZ = z_BUZ[:, :-1] - z_BUZ.mean(1, keepdim=True)
        delta_BU = hard_gate(self.gate(contrast_BUZ).float(), noise_BU2) if fixed_BU is None else fixed_BU
        delta_BU = torch.cat([delta_BU, torch.ones_like(z_BUZ[:, :1, 0], dtype=torch.float32)], 1)
        passed_BUD = self.amount(z_BUZ) * delta_BU[..., None].to(z_BUZ.dtype)
        return (passed_BUD[:, :, None, :] * u_BULD).sum(1), delta_BU

    def _pool(self, kind: str, k: int, u_XDL: Tensor, mask_XL: Tensor) -> Tensor:
        pooled: Tensor = max_conv(u_XDL, getattr(self, f"{kind}{k}_weight"), mask_XL)
        return pooled + getattr(self, f"{kind}{k}_bias")


def hard_gate(logits_BU2: Tensor, noise_BU2: Tensor | None) -> Tensor:
    """Return the straight-through decision (1 = open) of each gate: Gumbel-softmax at temperature 1, or argmax.

    Shapes: (B, U, 2) -> (B, U). The forward value is exactly 0 or 1; the gradient is that of the softmax.
    """
    soft_BU = (logits_BU2 if noise_BU2 is None else logits_BU2 + noise_BU2).softmax(-1)[..., 0]
    hard_BU = (soft_BU > 0.5).to(soft_BU.dtype)
    return hard_BU + (soft_BU - soft_BU.detach())


class Sharing(nn.Module):
    """The knowledge-sharing module of one plugin, with a capsule and a router per task.

    The capsule parameters of all tasks belong directly to this module, since its forward reads all of them: ZeRO-3
    gathers a module's own parameters only. Modules of a single task are children, gathered when they are used.
    """

    def __init__(self, shape: SharingShape, hidden: int) -> None:
        super().__init__()
        self.shape, self.hidden, self.num_tasks = shape, hidden, 0
        self.routers = nn.ModuleDict()
        self.ups = nn.ModuleDict()

    def add_task(self) -> None:
        """Append a capsule, a row of routing matrices, a router and an up-projection for the next task."""
        shape, task = self.shape, self.num_tasks
        self.num_tasks += 1
        size, num = shape.capsule_size, shape.transfer_capsules
        widths = [self.hidden, size] if shape.capsule_layers == 1 else [self.hidden, shape.capsule_mid, size]
        for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
            weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(fan_out, fan_in)))
            self.register_parameter(f"capsule{task}_weight{layer}", weight)
            self.register_parameter(f"capsule{task}_bias{layer}", nn.Parameter(torch.zeros(fan_out)))
        if self._owner(task) != task:
            return
        route = nn.Parameter(torch.empty(num, size, size))
        nn.init.normal_(route, std=size**-0.5)
        self.register_parameter(f"route{task}", route)
        if shape.routing == "transfer":
            self.routers[str(task)] = Router(shape, self.hidden)
        up = nn.Linear(size * num, self.hidden)
        # small, so that an untrained module changes little
        nn.init.normal_(up.weight, std=0.02) if shape.up_init == "normal" else nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.ups[str(task)] = up

    def _owner(self, task: int) -> int:
        """Return the task whose router, routing row and up-projection a task uses."""
        return 0 if self.shape.routing_scope == "shared" else task

    def inherit(self, task: int, source: int) -> None:
        """Initialize the router, up-projection and routing row of a task with an earlier task's; shared ones stay.

        The gate is not copied: capsules that helped the earlier task need not help this one, and a saturated gate gets
        almost no gradient.
        """
        if self._owner(task) != task:
            return
        with torch.no_grad():
            getattr(self, f"route{task}").copy_(getattr(self, f"route{source}"))
        self.ups[str(task)].load_state_dict(self.ups[str(source)].state_dict())
        if self.shape.routing == "transfer":
            state = self.routers[str(source)].state_dict()
            inherited = {name: value for name, value in state.items() if not name.startswith("gate.")}
            self.routers[str(task)].load_state_dict(inherited, strict=False)

    def task_parameters(self, task: int) -> list[nn.Parameter]:
        """Return the parameters that a task trains: its own, and the ones that all tasks share."""
        owner = self._owner(task)
        modules = [group[str(owner)] for group in (self.routers, self.ups) if str(owner) in group]
        routes = [] if owner == task else [getattr(self, f"route{owner}")]
        return self.capsule_parameters(task) + routes + [p for module in modules for p in module.parameters()]

    def capsule_parameters(self, task: int) -> list[nn.Parameter]:
        """Return one task's capsule and routing row, which `backward_transfer` lets later tasks train."""
        own = re.compile(rf"(capsule{task}_|route{task}$)")
        return [p for name, p in self.named_parameters(recurse=False) if own.match(name)]

    def _stacked(self, kind: str, num_tasks: int) -> Tensor:
        """Return the parameters of a kind of all seen tasks as one tensor (U, ...); the operation count is constant."""
        own = [getattr(self, kind.format(task)) for task in range(num_tasks)]
        if any(parameter.requires_grad for parameter in own[:-1]):
            return torch.stack(own)
        with torch.no_grad():  # no backward operations for frozen tasks
            frozen = torch.stack(own[:-1]) if num_tasks > 1 else own[0].new_empty(0, *own[0].shape)
        return torch.cat([frozen, own[-1][None]])

    def _composed(self, num_tasks: int) -> tuple[Tensor, Tensor]:
        """Return each capsule as one linear map: weight (U, d, H) and bias (U, d)."""
        weight, bias = (self._stacked(kind, num_tasks) for kind in ("capsule{}_weight0", "capsule{}_bias0"))
        if self.shape.capsule_layers == 2:
            weight1, bias1 = (self._stacked(kind, num_tasks) for kind in ("capsule{}_weight1", "capsule{}_bias1"))
            weight, bias = torch.bmm(weight1, weight), torch.bmm(weight1, bias[..., None])[..., 0] + bias1
        return weight, bias

    def forward(
        self,
        x_BLH: Tensor,
        task: int,
        token_mask_BL: Tensor,
        noise_BU2: Tensor | None,
        fixed_BU: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the shared knowledge of the seen tasks (B, L, H), and the gates (B, U) or None without gates.

        fixed_BU opens (1) and closes (0) the U - 1 earlier tasks' capsules by hand, with any routing.
        """
        weight_UdH, bias_Ud = self._composed(task + 1)
        owner = str(self._owner(task))
        p_BULd = task_capsules(x_BLH, weight_UdH, bias_Ud)
        if self.shape.routing_scope == "shared":
            u_BULJd = torch.einsum("buld,jde->bulje", p_BULd, self.get_parameter(f"route{owner}"))
        else:
            u_BULJd = torch.einsum("buld,ujde->bulje", p_BULd, self._stacked("route{}", task + 1))
        if self.shape.routing != "transfer":
            if fixed_BU is not None:
                open_BU = F.pad(fixed_BU, (0, 1), value=1.0)
                u_BULJd = u_BULJd * open_BU[:, :, None, None, None].to(u_BULJd.dtype)
            v_BLJd = dynamic_routing(u_BULJd) if self.shape.routing == "dynamic" else u_BULJd.sum(1)
            return self.ups[owner](v_BLJd.flatten(-2)), None
        v_BLD, delta_BU = self.routers[owner](u_BULJd.flatten(-2), token_mask_BL, noise_BU2, fixed_BU)
        return self.ups[owner](v_BLD), delta_BU
