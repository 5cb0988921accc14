"""Speed of knowledge sharing, as ratios measured in one run; operation counts are exact."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

from cl_dist.models.capsules import Sharing, hard_gate, squash
from cl_dist.models.config import PluginShape, SharingShape
from cl_dist.models.noise import gumbel
from cl_dist.models.plugin import CtrClassifier
from cl_dist.models.task_modules import AdapterClassifier
from tests.benchmarks.conftest import Measured

pytestmark = pytest.mark.bench
HIDDEN, LENGTH, ROWS, TASKS = 768, 128, 8, 19


class Count(TorchDispatchMode):
    """Counts the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ops += 1
        return func(*args, **(kwargs or {}))


def looped(sharing: Sharing, x_BLH: Tensor, task: int, mask_BL: Tensor) -> Tensor:
    """Knowledge sharing one task after the other, over all tasks, unseen ones times zero, as the release does."""
    router: Any = sharing.routers[str(task)]

    def capsule(i: int) -> Tensor:
        p = F.linear(x_BLH, getattr(sharing, f"capsule{i}_weight0"), getattr(sharing, f"capsule{i}_bias0"))
        p = squash(F.linear(p, getattr(sharing, f"capsule{i}_weight1"), getattr(sharing, f"capsule{i}_bias1")))
        return torch.einsum("bld,jde->blje", p, getattr(sharing, f"route{i}")).flatten(-2)

    def pooled(kind: str, k: int, u_BLD: Tensor) -> Tensor:
        weight, bias = getattr(router, f"{kind}{k}_weight"), getattr(router, f"{kind}{k}_bias")
        out = F.conv1d(F.pad(u_BLD.transpose(1, 2), (0, k - 1)), weight)
        return out.masked_fill(~mask_BL[:, None], float("-inf")).amax(-1) + bias

    total = torch.zeros(())
    for i in range(sharing.num_tasks):
        u, own = capsule(i), capsule(task)
        q = router.current(F.relu(torch.cat([pooled("cur", k, own) for k in router.kernels], -1)))
        z = torch.cat([F.relu(pooled("sim", k, u) + q) for k in router.kernels], -1)
        delta = torch.ones(len(x_BLH)) if i == task else hard_gate(router.gate(z), None)
        passed = (router.amount(z) * delta[:, None])[:, None] * u
        total = total + passed * float(i <= task)
    return sharing.ups[str(task)](total)


def seconds(function: Callable[[], Tensor]) -> float:
    """Return the median processor time of a forward and backward pass."""
    times = []
    for _ in range(6):
        began = time.process_time()
        function().square().sum().backward()
        times.append(time.process_time() - began)
    return median(times[1:])


@pytest.fixture(scope="module")
def sharing() -> Sharing:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = Sharing(SharingShape(), HIDDEN)
    for _ in range(TASKS):
        module.add_task()
    return module


@pytest.mark.parametrize(("task", "budget"), [(0, 8.0), (TASKS - 1, 2.5)])
def test_sharing_against_a_loop_over_all_tasks(sharing: Sharing, task: int, budget: float, measured: Measured) -> None:
    x_BLH = torch.randn(ROWS, LENGTH, HIDDEN, requires_grad=True)
    mask_BL = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    ours = sharing(x_BLH, task, mask_BL, None)[0]
    torch.testing.assert_close(ours, looped(sharing, x_BLH, task, mask_BL), atol=1e-4, rtol=1e-4)
    ratio = seconds(lambda: looped(sharing, x_BLH, task, mask_BL)) / seconds(
        lambda: sharing(x_BLH, task, mask_BL, None)[0]
    )
    what = f"knowledge sharing at task {task + 1} of {TASKS}, against a loop over all tasks"
    assert measured(what, ratio, "{:.1f}x as fast", at_least=budget)


def test_operations_do_not_grow_with_tasks(sharing: Sharing, measured: Measured) -> None:
    counts = {}
    for task in (2, 9, TASKS - 1):
        for number in range(TASKS):  # as in training without forgetting: only this task's own parts are trained
            for parameter in sharing.task_parameters(number):
                parameter.requires_grad_(number == task)
        x_BLH = torch.randn(2, 16, HIDDEN, requires_grad=True)
        with Count() as count:
            sharing(x_BLH, task, torch.ones(2, 16, dtype=torch.bool), None)[0].square().sum().backward()
        counts[task] = count.ops
    assert len(set(counts.values())) == 1, counts
    what = f"operations of knowledge sharing, forward and backward, at tasks 3, 10 and {TASKS}"
    measured(what, counts[2], "{} each time")


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """Return what does a whole training step and tells its processor time."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def seconds() -> float:
        began = time.process_time()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - began

    return seconds


@pytest.mark.parametrize(
    ("hidden", "width", "budget"), [(768, 2000, 1.35), (384, 512, None)], ids=["bert-base", "minilm"]
)
def test_a_ctr_step_against_a_step_with_a_plain_adapter(
    hidden: int, width: int, budget: float | None, measured: Measured
) -> None:
    """At the last of 19 tasks; two layers of the backbone, since every layer adds the same to both."""
    torch.set_num_threads(1)
    heads = hidden // 64
    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=4 * hidden
    )
    ctr = CtrClassifier(BertModel(config), PluginShape(tsm_size=width))
    plain = AdapterClassifier(BertModel(config), width)
    batch = {
        "input_ids": torch.randint(1000, 20000, (ROWS, LENGTH)),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "row": torch.arange(ROWS),
    }
    for task in range(TASKS):
        ctr.add_task(2)
        plain.add_task(2)
        if task < TASKS - 1:
            ctr.activate(task)
            ctr.finish_task()
    ctr.start_task(TASKS - 1, protect=False)  # as a learner does
    plain.start_task(TASKS - 1)
    ctr.context.slope = 30.0

    def ctr_loss() -> Tensor:
        ctr.context.noise_PBU2 = gumbel(0, 0, batch["row"], len(ctr.plugins), TASKS - 1)
        return ctr(batch).square().sum() + ctr.sparsity()

    ours, theirs = step_of(ctr, ctr_loss), step_of(plain, lambda: plain(batch).square().sum())
    ratio = median([ours() / theirs() for _ in range(10)][2:])  # in turns, since a machine's speed wanders
    what = f"a CTR step at task {TASKS} of {TASKS}, H={hidden}, width {width}, against one with a plain adapter"
    assert measured(what, ratio, "{:.2f}x its time", at_most=budget)
