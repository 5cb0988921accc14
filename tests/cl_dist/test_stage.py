import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.config import parse
from cl_dist.errors import ConfigError
from cl_dist.stage import Evaluate, StageRef, Train, TrainConfig, digest_of, flat, model_after, ref

KEYS = st.text("abc", min_size=1, max_size=3)
TREES = st.dictionaries(
    KEYS, st.recursive(st.integers(), lambda inner: st.dictionaries(KEYS, inner, min_size=1), max_leaves=6)
)


def test_a_stage_needs_the_stages_that_it_refers_to() -> None:
    assert Train(task=0, data=(0,)).inputs == ()
    assert Train(task=2, data=(2,), init=model_after(1)).inputs == (StageRef(task=1, stage="train"),)
    earlier = StageRef(task=0, stage="evaluate")
    assert Evaluate(task=1, model=model_after(1), tasks=(1,)).inputs == (model_after(1),)
    assert Evaluate(task=1, model=model_after(1), tasks=(1,), previous=earlier).inputs == (model_after(1), earlier)


def test_a_stage_is_named_by_its_task_and_kind() -> None:
    assert ref(Train(task=3, data=(3,))) == model_after(3) == StageRef(task=3, stage="train")
    assert ref(Evaluate(task=3, model=model_after(3), tasks=(0,))) == StageRef(task=3, stage="evaluate")


def test_the_digest_is_that_of_canonical_json() -> None:
    # printf '{"a":[1,2.5],"b":"\\u00e9"}' | sha256sum
    expected = "60d4fe7d84d09285a774fa6c850ed0e739e0153890529471751ae4df4e1df886"
    assert digest_of({"b": "é", "a": [1, 2.5]}) == expected
    assert digest_of({"a": (1, 2.5), "b": "é"}) == expected
    assert digest_of({"a": 1}) != digest_of({"a": 1.5})
    assert digest_of({"a": "1"}) != digest_of({"a": 1})


def test_a_number_that_json_cannot_hold_has_no_digest() -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest_of({"a": float("nan")})


@given(TREES)
def test_flattened_facts_keep_every_value_apart(tree: dict[str, object]) -> None:
    def count(node: object) -> int:
        return sum(map(count, node.values())) if isinstance(node, dict) else 1

    facts = flat(tree)
    assert len(facts) == count(tree)
    assert not any(isinstance(value, dict) for value in facts.values())


def test_flattened_keys_are_dotted_and_tuples_are_lists_as_in_a_manifest() -> None:
    assert flat({"a": {"b": {"c": (1, 2)}}, "d": 0}) == {"a.b.c": [1, 2], "d": 0}


@pytest.mark.parametrize(
    "setting",
    [{"epochs": 0}, {"lr": 0}, {"warmup_ratio": 1}, {"global_batch": 0}, {"max_length": 2}, {"keep": "first"}],
)
def test_training_settings_out_of_range_are_named(setting: dict[str, object]) -> None:
    (key,) = setting
    with pytest.raises(ConfigError, match=f"^{key}="):
        parse(TrainConfig, setting)
