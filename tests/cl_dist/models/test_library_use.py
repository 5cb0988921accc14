"""The plugins without the rest of this project: a BertModel, plain training loops, a file of a few kilobytes."""

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel

from cl_dist.learners.hat import Hat
from cl_dist.methods.hat import HatConfig
from cl_dist.models.config import MaskShape, ModelConfig, PluginShape
from cl_dist.models.gates import slope
from cl_dist.models.plugin import CtrClassifier
from cl_dist.models.task_modules import AdapterClassifier
from tests.encoders import batch_of, encoder, snapshot, train

STEPS, ROOT = 80, Path(__file__).parents[3]
BERT = BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
SHAPE = PluginShape(tsm_size=48, filters=8, capsule_mid=8)
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 0.0}
Optimizer = Callable[[CtrClassifier], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def _own_generator() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BERT)


def data(seed: int, rows: int = 32) -> dict[str, Tensor]:
    ids = torch.randint(0, 30, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": (ids[:, seed] >= 15).long()}


def learn(model: CtrClassifier, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Take steps of the task in training; return the last loss."""
    model.train()
    for step in steps:
        model.set_progress(step, steps.stop)
        loss = F.cross_entropy(model(batch).float(), batch["label"])
        (loss + 0.1 * model.sparsity()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def logits(model: CtrClassifier, task: int, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    model.activate(task)
    return model(batch)


def test_plugins_learn_a_task_in_a_plain_bert_and_are_saved_alone(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        backbone = bert()
        before = {name: parameter.clone() for name, parameter in backbone.state_dict().items()}
        ids = torch.randint(0, 30, (32, 6))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        label = (ids[:, 0] >= 15).long()

        model = CtrClassifier(backbone, SHAPE)
        model.add_task(num_labels=2)
        model.start_task(0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for step in range(STEPS):
            model.context.slope = slope(step, STEPS, SHAPE.s_max)
            loss = F.cross_entropy(model(batch), label)
            (loss + 0.1 * model.sparsity()).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.finish_task()
        assert losses[-1] < 0.5 * losses[0]

        path = tmp_path / "plugins.safetensors"
        model.save_plugins(path)
        fresh = CtrClassifier(bert(), SHAPE)
        fresh.add_task(num_labels=2)
        fresh.load_plugins(path)
        with torch.no_grad():
            answers = model.eval()(batch)
            torch.testing.assert_close(fresh.eval()(batch), answers, rtol=0, atol=0)
        assert (answers.argmax(-1) == label).float().mean() > 0.9

    still = {name.replace(".base.", "."): value for name, value in model.backbone.state_dict().items()}
    frozen = [name for name in before if name in still]
    assert len(frozen) > 20
    assert all(torch.equal(still[name], before[name]) for name in frozen)


# --- a later task changes no bit of an earlier one

LR: dict[str, Any] = {"lr": 0.01}
OPTIMIZERS: dict[str, Optimizer] = {
    "parameter_groups": lambda model: torch.optim.AdamW(
        model.parameter_groups(**LR, weight_decay=0.1), betas=(0.95, 0.99)
    ),
    "all parameters, decayed": lambda model: torch.optim.AdamW(model.parameters(), **LR, weight_decay=0.1),
    "sgd with momentum": lambda model: torch.optim.SGD(model.parameters(), **LR, momentum=0.9, weight_decay=0.1),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), **LR, weight_decay=0.1, fused=True),
}


def two_tasks(dtype: torch.dtype = torch.float32, shape: MaskShape = SHAPE) -> CtrClassifier:
    model = CtrClassifier(bert(), shape)
    model.add_task(2)
    model.add_task(2)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_second_task_changes_no_bit_of_the_first_ones_logits(kind: str, dtype: torch.dtype) -> None:
    model, first, second = two_tasks(dtype), data(0), data(1)
    model.start_task(0)
    learn(model, first, OPTIMIZERS[kind](model), range(30))
    model.finish_task()
    before = logits(model, 0, first)

    model.start_task(1)
    start = snapshot(model)
    loss = learn(model, second, OPTIMIZERS[kind](model), range(30))
    torch.testing.assert_close(logits(model, 0, first), before, **EXACT)  # in the middle of the task, too
    model.finish_task()
    torch.testing.assert_close(logits(model, 0, first), before, **EXACT)
    assert loss < 0.69
    layers = [name for name in start if name.endswith(("fc1.weight", "fc2.weight"))]
    assert len(layers) == 8
    for name in layers:  # what the first task does not use has learned
        assert not torch.equal(model.get_parameter(name), start[name]), name


@pytest.mark.parametrize("to_none", [True, False])
def test_one_optimizer_for_all_tasks_whose_moments_live_on_changes_no_bit_either(to_none: bool) -> None:
    model, first, second = two_tasks(), data(0), data(1)
    optimizer = torch.optim.AdamW(model.parameters(), **LR, weight_decay=0.1)
    found = []
    for task, batch in enumerate((first, second)):
        model.start_task(task)
        model.train()
        for step in range(20):
            model.set_progress(step, 20)
            (F.cross_entropy(model(batch), batch["label"]) + 0.1 * model.sparsity()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        optimizer.step()  # one too many, after the last gradient
        model.finish_task()
        optimizer.step()
        found.append(logits(model, 0, first))
    torch.testing.assert_close(*found, **EXACT)


def test_clipping_and_accumulation_change_no_bit_either() -> None:
    model, first, second = two_tasks(), data(0), data(1)
    found = []
    for task, batch in enumerate((first, second)):
        model.start_task(task)
        optimizer = torch.optim.AdamW(model.parameter_groups(lr=0.02, weight_decay=0.1))
        model.train()
        for step in range(20):
            model.set_progress(step, 20)
            for part in range(2):
                piece = {name: value[part::2] for name, value in batch.items()}
                ((F.cross_entropy(model(piece), piece["label"]) + 0.1 * model.sparsity()) / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        model.finish_task()
        found.append(logits(model, 0, first))
    torch.testing.assert_close(*found, **EXACT)


@pytest.mark.parametrize("started_first", [False, True])
def test_a_task_goes_on_from_state_dicts_to_the_same_bits(started_first: bool) -> None:
    """The state of model and optimizer is enough; a model whose task has been started may load it as well."""
    shape = MaskShape(tsm_size=48)  # no router, whose noise comes from torch's generator
    model, first, second = two_tasks(shape=shape), data(0), data(1)

    def optimizer_of(model: CtrClassifier) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)

    model.start_task(0)
    learn(model, first, optimizer_of(model), range(20))
    model.finish_task()
    before = logits(model, 0, first)
    finished = copy.deepcopy(model.state_dict())

    model.start_task(1)
    optimizer = optimizer_of(model)

    def steps(model: CtrClassifier, optimizer: torch.optim.Optimizer, which: range) -> None:
        model.train()
        model.activate(1)
        for step in which:
            torch.manual_seed(step)  # dropout
            model.set_progress(step, 20)
            (F.cross_entropy(model(second), second["label"]) + 0.1 * model.sparsity()).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(model, optimizer, range(10))
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))

    other = two_tasks(shape=shape)
    for plugin in other.plugins:
        torch.nn.init.normal_(plugin.fc1.weight)  # nothing of this model may be left
    if started_first:
        other.load_state_dict(finished)
        other.start_task(1)
    other.load_state_dict(saved[0])
    if not started_first:
        other.start_task(1)
    resumed = optimizer_of(other)
    resumed.load_state_dict(saved[1])
    for each, its in ((model, optimizer), (other, resumed)):
        steps(each, its, range(10, 20))
        torch.testing.assert_close(logits(each, 0, first), before, **EXACT)
        each.finish_task()
    torch.testing.assert_close(other.state_dict(), model.state_dict(), **EXACT)
    torch.testing.assert_close(logits(other, 1, second), logits(model, 1, second), **EXACT)


def test_state_dicts_hold_restored_values_and_so_do_those_of_parts() -> None:
    model = two_tasks()
    model.start_task(0)
    learn(model, data(0), OPTIMIZERS["parameter_groups"](model), range(10))
    model.finish_task()
    before = copy.deepcopy(model.state_dict())
    model.start_task(1)
    learn(model, data(1), OPTIMIZERS["all parameters, decayed"](model), range(3))
    part = model.backbone.state_dict()
    for name, plugin in ((n, m) for n, m in model.named_modules() if m in model.plugins):
        used1, used2 = (used.bool() for used in plugin.used(1))
        for key, where in (("fc1.weight", used1), ("fc1.bias", used1), ("fc2.bias", used2)):
            own = f"{name}.{key}"
            assert where.any()
            torch.testing.assert_close(part[own.removeprefix("backbone.")][where], before[own][where], **EXACT)
        own, both = f"{name}.fc2.weight", used2[:, None] & used1
        torch.testing.assert_close(part[own.removeprefix("backbone.")][both], before[own][both], **EXACT)


def test_a_plain_loop_trains_what_the_engine_does() -> None:
    """Gradient factors, rates and decay are the same, so every bit is. Two tasks of HAT, the second one protected."""
    learner = Hat(HatConfig(tsm_size=24, s_max=50.0), (2, 2), ModelConfig(source="."), 0)
    torch.manual_seed(0)
    learner.build(encoder(), 1)
    model = CtrClassifier(encoder(), MaskShape(tsm_size=24, s_max=50.0))
    model.add_task(2)
    model.add_task(2)
    model.load_state_dict(learner.model.state_dict())
    batches = [batch_of(seed=seed) for seed in range(6)]
    for task in (0, 1):
        train(learner, task, batches, lr=0.01, weight_decay=0.1)
        model.start_task(task)
        optimizer = torch.optim.AdamW(model.parameter_groups(lr=0.01, weight_decay=0.1), fused=True)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (6 - step) / 6)
        model.train()
        for step, batch in enumerate(batches):
            model.set_progress(step, len(batches))
            loss = F.cross_entropy(model(batch), batch["label"], reduction="none").mean() + 0.75 * model.sparsity()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
        model.finish_task()
    torch.testing.assert_close(model.state_dict(), learner.model.state_dict(), **EXACT)


# --- mistakes are named


def test_what_would_train_in_vain_or_without_protection_is_refused() -> None:
    model, batch = two_tasks(), data(0)
    with pytest.raises(ValueError, match=r"start_task\(1\): expected 0.*finish_task\(\)"):
        model.start_task(1)
    model.start_task(0)
    with pytest.raises(ValueError, match=r"task 0 is in training: call set_progress\(step, total_steps\)"):
        model(batch)
    with pytest.raises(ValueError, match="step=5"):
        model.set_progress(5, 5)
    model.finish_task()
    with pytest.raises(ValueError, match="finish_task: expected task 1"):
        model.finish_task()
    model.start_task(1)
    model.set_progress(0, 5)
    model.activate(0)
    with pytest.raises(ValueError, match=r"task 1 is in training: call activate\(1\)"):
        model(batch)
    model.eval()(batch)  # scoring the earlier task
    model.finish_task()
    assert model.num_finished == 2
    with pytest.raises(ValueError, match=r"start_task\(0\): expected 2"):
        model.start_task(0)


def test_parameters_that_zero_3_has_partitioned_are_refused() -> None:
    model = two_tasks()
    model.start_task(0)
    model.finish_task()
    model.start_task(1)
    parameter: Any = model.plugins[0].fc1.weight
    parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    with pytest.raises(ValueError, match=r"fc1\.weight: start_task\(protect=True\) needs full parameters"):
        model.eval()(data(0))


def test_a_task_in_training_is_scored_in_eval_mode_as_when_it_is_finished() -> None:
    model, batch = two_tasks(), data(0)
    model.start_task(0)
    learn(model, batch, OPTIMIZERS["parameter_groups"](model), range(10))
    model.set_progress(2, 10)
    before = logits(model, 0, batch)
    model.finish_task()
    torch.testing.assert_close(logits(model, 0, batch), before, **EXACT)


def test_two_forward_passes_may_share_a_backward_pass() -> None:
    model = two_tasks()
    model.start_task(0)
    learn(model, data(0), OPTIMIZERS["parameter_groups"](model), range(3))
    model.finish_task()
    model.start_task(1)
    model.train()
    model.set_progress(0, 2)
    (model(data(1)).sum() + model(data(0)).sum()).backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert grads
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_a_copy_of_a_model_in_training_protects_as_well() -> None:
    model, first = two_tasks(), data(0)
    model.start_task(0)
    learn(model, first, OPTIMIZERS["parameter_groups"](model), range(10))
    model.finish_task()
    before = logits(model, 0, first)
    model.start_task(1)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        learn(same, data(1), OPTIMIZERS["all parameters, decayed"](same), range(5))
        same.finish_task()
        torch.testing.assert_close(logits(same, 0, first), before, **EXACT)


def test_adapters_of_earlier_tasks_do_not_move_under_one_optimizer_for_all_tasks() -> None:
    model = AdapterClassifier(bert(), 8)
    model.add_task(2)
    model.add_task(2)
    optimizer, found = torch.optim.AdamW(model.parameters(), **LR, weight_decay=0.1), []
    for task, batch in enumerate((data(0), data(1))):
        model.start_task(task)
        for _ in range(5):
            F.cross_entropy(model.train()(batch), batch["label"]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        model.activate(0)
        with torch.no_grad():
            found.append(model.eval()(data(0)))
    torch.testing.assert_close(*found, **EXACT)


# --- the examples of the pages


def examples() -> dict[str, str]:
    """Return the example of the plugins on the library's page, and the one of the class."""
    page = (ROOT / "cl_dist/README.md").read_text(encoding="utf8")
    (readme,) = [
        block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "CtrClassifier" in block
    ]
    assert CtrClassifier.__doc__ is not None
    lines = [line.removeprefix(" " * 8) for line in CtrClassifier.__doc__.splitlines() if line.startswith(" " * 8)]
    imports = "import torch\nimport torch.nn.functional as F\nfrom transformers import AutoModel\n"
    imports += "from cl_dist.models.config import PluginShape\nfrom cl_dist.models.plugin import CtrClassifier\n"
    return {"cl_dist/README.md": readme, "docstring": imports + "\n".join(lines)}


@pytest.mark.parametrize("page", ["cl_dist/README.md", "docstring"])
def test_the_example_runs_as_written_and_forgets_nothing(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert().save_pretrained(tmp_path / "path/to/bert")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {task: [data(number)] * 10 for number, task in enumerate(("reviews", "tickets"))}
    found: list[Tensor] = []
    finish = CtrClassifier.finish_task

    def finish_and_score(model: CtrClassifier) -> None:
        finish(model)
        found.append(logits(model, 0, data(0)))
        model.train()

    monkeypatch.setattr(CtrClassifier, "finish_task", finish_and_score)
    exec(examples()[page], names)
    assert len(found) == names["model"].num_finished
    for scored in found[1:]:
        torch.testing.assert_close(scored, found[0], **EXACT)
    if page == "docstring":
        assert len(found) == 2
