import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_dist.contract.ranks import Ranks


def add_ranks(rank: int, world: int) -> Tensor:
    total = torch.tensor([float(rank + 1)])
    torch.distributed.all_reduce(total)
    return total


def break_in_rank_1(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("broken on purpose")
    torch.distributed.barrier()  # rank 1 never comes


def hang_in_rank_1(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(600)


def die_in_rank_1(rank: int, world: int) -> None:
    if rank == 1:
        os._exit(7)


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def step_with_zero_2(rank: int, world: int) -> dict[str, Tensor]:
    import deepspeed

    model = linear()
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "zero_optimization": {"stage": 2},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    x, y = (part[rank::world].to(engine.device) for part in rows())
    engine.backward(nn.functional.mse_loss(engine(x), y))
    engine.step()
    weights = {name: p.detach().clone().cpu() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return weights


def step_with_torch() -> dict[str, Tensor]:
    model = linear()
    x, y = rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    return dict(model.named_parameters())


def test_ranks_reduce_over_one_group(ranks: Ranks) -> None:
    assert ranks.run(add_ranks) == [torch.tensor([3.0])] * 2


def test_zero_2_step_on_two_ranks_is_the_step_of_plain_torch(ranks: Ranks) -> None:
    expected = step_with_torch()
    for weights in ranks.run(step_with_zero_2):
        torch.testing.assert_close(weights, expected, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        (break_in_rank_1, ValueError, "broken on purpose"),
        (hang_in_rank_1, TimeoutError, r"ranks \[1\] did not answer within 2 s"),
        (die_in_rank_1, RuntimeError, "rank 1 died with exit code 7"),
    ],
)
def test_failing_rank_is_named_and_the_next_job_gets_fresh_ranks(
    ranks: Ranks, job: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        ranks.run(job, timeout_s=2 if job is hang_in_rank_1 else 60)
    if error is ValueError:
        (note,) = caught.value.__notes__
        assert note.startswith("in rank 1 of 2:")
        assert "in break_in_rank_1" in note
    assert ranks.run(add_ranks)[0].item() == 3.0
