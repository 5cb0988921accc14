"""Does knowledge sharing find a task it has seen before? Tasks with planted answers, the real learner and engine.

Every row holds words of two concepts, each concept in one of two polarities, among fillers. Task 0 asks for the
polarity of concept 0 and task 1 for that of concept 1, with many rows; task 2 asks one of the two questions again, with
few rows. The capsule of the task that asked it knows the answer; the other one's knows about words of the same rows
that are beside the question. Each question is asked again in turn, so that recency cannot decide.
"""

from statistics import mean

import pytest
import torch
from torch import Tensor

from cl_dist.learners.ctr import Ctr
from cl_dist.methods.ctr import CtrConfig
from cl_dist.models.classifier import Batch
from cl_dist.models.config import ModelConfig
from tests.encoders import WORDS, encoder, train

LENGTH, HITS, SYNONYMS, FIRST_WORD = 8, 2, 4, 5
FIRST_FILLER = FIRST_WORD + 4 * SYNONYMS
MANY, FEW, BATCH, STEPS, FEW_STEPS, SEEDS = 1000, 64, 32, 200, 100, 4
CONFIG = CtrConfig(tsm_size=64, filters=16, capsule_layers=1)


def rows(question: int, num: int, generator: torch.Generator) -> Batch:
    """Rows labelled with the polarity of the concept asked for; the other concept's is a coin of its own."""
    polarity_BC = torch.randint(0, 2, (num, 2), generator=generator)
    ids_BL = torch.randint(FIRST_FILLER, WORDS, (num, LENGTH), generator=generator)
    for row in range(num):
        places = torch.randperm(LENGTH, generator=generator)
        for concept in (0, 1):
            first = FIRST_WORD + (2 * concept + int(polarity_BC[row, concept])) * SYNONYMS
            words = first + torch.randint(0, SYNONYMS, (HITS,), generator=generator)
            ids_BL[row, places[concept * HITS : (concept + 1) * HITS]] = words
    return {
        "input_ids": ids_BL,
        "attention_mask": torch.ones_like(ids_BL),
        "label": polarity_BC[:, question],
        "row": torch.arange(num),
    }


def batches(data: Batch, steps: int, generator: torch.Generator) -> list[Batch]:
    drawn = [torch.randint(0, len(data["label"]), (BATCH,), generator=generator) for _ in range(steps)]
    return [{key: value[indices] for key, value in data.items()} for indices in drawn]


def learner_of(num_tasks: int, seed: int) -> Ctr:
    learner = Ctr(CONFIG, (2,) * num_tasks, ModelConfig(source="."), seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        learner.build(encoder(layers=1), num_tasks - 1)
    return learner


@torch.no_grad()
def score(learner: Ctr, task: int, data: Batch) -> tuple[float, Tensor]:
    """Accuracy, and how often the gate of each earlier task is open."""
    learner.activate(task)
    accuracy = (learner.model(data).argmax(-1) == data["label"]).float().mean().item()
    return accuracy, learner.observe()["gate_open"].mean((0, 1))


@pytest.mark.timeout(600)  # half a minute on an idle core
def test_the_capsule_of_a_task_that_asked_the_same_is_opened_more_often_than_an_unrelated_ones() -> None:
    more_open = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        learner = learner_of(2, seed)
        for task in (0, 1):
            train(learner, task, batches(rows(task, MANY, generator), STEPS, generator), lr=3e-3, weight_decay=0.01)
            accuracy, _ = score(learner, task, rows(task, 200, generator))
            assert accuracy > 0.75  # otherwise there is nothing to share
        for question in (0, 1):
            again = learner_of(3, seed)
            again.model.load_state_dict(learner.model.state_dict(), strict=False)
            again.load_state_dict(learner.state_dict())
            few = rows(question, FEW, generator)
            train(again, 2, batches(few, FEW_STEPS, generator), lr=3e-3, weight_decay=0.01)
            _, open_U = score(again, 2, rows(question, 300, generator))
            more_open.append((open_U[question] - open_U[1 - question]).item())
    # These four seeds give 0.62 on average (pairs from -0.41 to 1.00), six others gave 0.25. With the paper's gate,
    # inherited from the previous task as the rest of the router is: 0.04 and 0.02, both capsules being treated alike.
    assert mean(more_open) > 0.1, more_open
