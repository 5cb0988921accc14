"""Formulas of a plan, against arithmetic by hand."""

from dataclasses import replace
from typing import Any

import pytest

from cl_dist.parallel.config import BUCKET
from cl_dist.planning import memory
from cl_dist.planning.memory import Decoder, Gang, Model, Quantity, Step

MODEL = Model(elements=1000, trained=600, largest=300, item=4, task_elements=100, buffers=7)
ONE = Step({"activations": 900, "logits": 50}, [({"activations": 1000}, 0), ({"activations": 200}, 500)], False)
SEVERAL = memory.accumulating(ONE, True)


def parts(found: tuple[Quantity, ...]) -> dict[str, int]:
    return {each.kind: each.bytes for each in found}


def test_plain_torch_holds_weights_and_two_moments_and_gradients_as_activations_go() -> None:
    found = memory.training(MODEL, ONE, Gang(1, 0, "torch"))
    assert parts(found.resident) == {
        "weights": 4 * 900,
        "parts of tasks": 4 * 100,
        "masks and buffers": 7,
        "optimizer": 8 * 600,
    }
    # 1000 + 0, or 200 + 4 * 500 bytes; all gradients at the end
    assert parts(found.moments) == {"micro-batch": 2200, "reduction": 2400}
    assert found.peak == 4007 + 4800 + 2400


def test_gradients_of_earlier_micro_batches_lie_beside_the_most_activations() -> None:
    assert parts(memory.training(MODEL, SEVERAL, Gang(1, 0, "torch")).moments)["micro-batch"] == 1000 + 4 * 600


@pytest.mark.parametrize(
    ("stage", "resident", "moments"),
    [
        (0, {"optimizer": 8 * 600}, {"micro-batch": 2200, "reduction": 2 * 2400}),
        (1, {"optimizer": 12 * 200}, {"micro-batch": 2200, "reduction": 2 * 2400}),
        (2, {"optimizer": 12 * 200}, {"micro-batch": 3400, "reduction": 2 * 2400 + 800, "step": 8 * 200}),
        (
            3,
            {"weights": 4 * 300, "parts of tasks": 4 * 34, "optimizer": 12 * 200, "gradients": 800, "buckets": 2400},
            {
                "micro-batch": 1000 + 4 * (300 // 2 + 62 + 300),  # W is M here, F is 1000 // 16
                "end of the forward pass": 900 + 4 * (300 // 2 + 62 + 300) + 4 * (62 + 300),
                "reduction": 2 * 2400 + 1200,
                "step": 800,
            },
        ),
    ],
)
def test_every_zero_stage_divides_what_it_divides(
    stage: int, resident: dict[str, int], moments: dict[str, int]
) -> None:
    found = memory.training(MODEL, ONE, Gang(3, stage))
    assert parts(found.resident) == {"weights": 3600, "parts of tasks": 400, "masks and buffers": 7} | resident
    assert parts(found.moments) == moments
    assert found.peak == sum(parts(found.resident).values()) + max(moments.values())


def test_bfloat16_halves_weights_and_gradients_and_keeps_float32_masters() -> None:
    half = Model(elements=1000, trained=600, largest=300, item=2)
    found = memory.training(half, ONE, Gang(2, 3))
    assert parts(found.resident) == {"weights": 1000, "optimizer": 3600, "gradients": 600, "buckets": 1200}


def test_large_models_are_reduced_and_gathered_in_pieces() -> None:
    large = Model(elements=10**10, trained=10**10, largest=10**9, item=2)
    found = memory.training(large, ONE, Gang(8, 3, is_gpu=True))
    assert parts(found.resident)["buckets"] == 2 * BUCKET
    assert parts(found.moments)["micro-batch"] == 1000 + 2 * (550_000_000 + 10**9)
    assert parts(found.moments)["reduction"] == 2 * BUCKET + 2 * 10**9


def test_penalties_stay_with_the_host_of_a_gpu() -> None:
    held = Model(elements=10, trained=10, largest=5, item=4, extras={"penalties": 80, "teacher": 40})
    on_cpu, on_gpu = (parts(memory.training(held, ONE, Gang(1, 2, is_gpu=gpu)).resident) for gpu in (False, True))
    assert (on_cpu["penalties"], on_cpu["teacher"], on_gpu["teacher"]) == (80, 40, 40)
    assert "penalties" not in on_gpu
    assert parts(memory.host(held, Gang(1, 2)))["host: penalties"] == 80


def test_what_building_a_model_takes_of_the_host() -> None:
    """Whole on every rank, in float32, unless it is cut up while it is loaded."""
    key, model = "host: a rank builds its model", replace(MODEL, item=2)
    cut = replace(model, partitions=True)
    for found in (memory.host(model, Gang(2, 3)), memory.host(cut, Gang(2, 2)), memory.host(cut, Gang(1, 3))):
        assert parts(found) == {key: 4000, "host: its weights in bfloat16": 400}
    assert parts(memory.host(replace(model, trained=100), Gang(2, 2))) == {key: 4000}  # others are let go one by one
    rounded = {"host: its weights in bfloat16": 200}
    assert parts(memory.host(cut, Gang(2, 3))) == {key: 2000 + 1200} | rounded
    assert parts(memory.host(replace(cut, tables=200), Gang(2, 3))) == {key: 1600 + 800 + 1200} | rounded
    assert parts(memory.host(replace(MODEL, quantized=500), Gang(2, 3))) == {key: 6000}


def test_keys_and_values_of_a_cache() -> None:
    decoder = Decoder(layers=3, heads=8, groups=2, size=16, vocabulary=100)
    # keys and values, 3 layers, 2 groups of 16, 33 tokens rounded up to 48
    assert memory.cache(decoder, 5, 33, 2).bytes == 2 * 3 * 2 * 16 * 48 * 2 * 5
    assert memory.rows_within(decoder, 32, 33, 2, kv_cache_gb=5 * 2 * 3 * 2 * 16 * 48 * 2 / 1e9) == 5
    assert memory.rows_within(decoder, 4, 33, 2, kv_cache_gb=8.0) == 4
    assert memory.rows_within(decoder, 4, 33, 2, kv_cache_gb=1e-9) == 1


def test_a_vote_sees_some_queries_of_one_layer() -> None:
    decoder = Decoder(layers=3, heads=8, groups=2, size=16, vocabulary=100)
    assert memory.voting(decoder, 100, 4).bytes == 8 * 100 * 100 * 8
    assert memory.voting(decoder, 1000, 4).bytes == 8 * 256 * 1000 * 8
    assert memory.voting(decoder, 1000, 2).bytes == 8 * 256 * 1000 * 10


def test_bytes_on_disk() -> None:
    found = parts(memory.disk(MODEL, learner=30, num_tasks=3, trainings=3, keeps_best=False, samples=5))
    assert found["trainable.safetensors of a task"] == 4 * 600
    assert found["step checkpoint"] == 3 * 4 * 600
    assert found["checkpoints of a running stage"] == 3 * 3 * 4 * 600
    assert found["the finished run"] == 3 * 4 * 600 + (10 + 20 + 30) + 5
    best = parts(memory.disk(MODEL, learner=0, num_tasks=1, trainings=1, keeps_best=True, samples=0))
    assert best["step checkpoint"] == 4 * 4 * 600


def test_every_number_comes_with_its_formula() -> None:
    found: Any = memory.training(MODEL, ONE, Gang(3, 3)).plain()
    assert all(each["formula"] for key in ("resident", "moments", "activations") for each in found[key])
    assert found["highest_moment"] == "reduction"


def test_what_a_gpu_leaves_to_its_host_is_counted_there() -> None:
    plain, states, everything = (Gang(2, 3, is_gpu=True, offload=what) for what in (None, "optimizer", "all"))
    whole = parts(memory.training(MODEL, ONE, plain).resident)
    moved = {
        name: size for name, size in whole.items() if name in ("optimizer", "gradients", "weights", "parts of tasks")
    }
    assert len(moved) > 2
    for gang, left in ((states, ("optimizer", "gradients")), (everything, tuple(moved))):
        kept = parts(memory.training(MODEL, ONE, gang).resident)
        assert kept == {name: size for name, size in whole.items() if name not in left}
        there = parts(memory.host(MODEL, gang))
        assert {name: there[f"host: {name} (offload)"] for name in left if name in moved} == {
            name: moved[name] for name in left if name in moved
        }
    assert not any("offload" in name for name in parts(memory.host(MODEL, plain)))


@pytest.mark.parametrize("is_gpu", [False, True])
def test_weights_in_files_are_no_memory_but_their_buffers_are(is_gpu: bool) -> None:
    memory_only = Gang(2, 3, is_gpu=is_gpu, offload="all")
    in_files = replace(memory_only, in_files=True)
    before, after = (parts(memory.host(MODEL, gang)) for gang in (memory_only, in_files))
    whole = parts(memory.training(MODEL, ONE, Gang(2, 3)).resident)["weights"]
    trains = parts(memory.training(MODEL, ONE, in_files).resident)
    assert "weights" not in trains
    place = after if is_gpu else trains  # on a CPU the host's memory is what it trains in
    assert place.pop("buffers for files") == MODEL.item * (5 * MODEL.largest // 2 + MODEL.trained // 2)
    before.pop("host: weights (offload)", None)
    assert after == before | {"files: weights": whole}


def test_on_a_cpu_nothing_is_left_to_a_host() -> None:
    plain, offload = (Gang(2, 3, offload=what) for what in (None, "all"))
    assert memory.training(MODEL, ONE, plain) == memory.training(MODEL, ONE, offload)
    assert memory.host(MODEL, plain) == memory.host(MODEL, offload)
