"""Bytes are counted by the lifetimes of storages."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cl_dist.planning.live import LiveTensorBytes


def test_a_storage_counts_once_however_many_tensors_look_at_it_and_until_the_last_is_gone() -> None:
    live = LiveTensorBytes()
    with live:
        whole = torch.zeros(10, 10)
        view = whole[2:].t()
        assert live.live == 400
        del whole
        assert live.live == 400
        copy = view.contiguous()
        assert (live.live, live.peak) == (720, 720)
        del view
        assert (live.live, live.peak) == (320, 720)
        live.restart()
        del copy
    assert (live.live, live.peak) == (0, 320)


def test_what_was_there_before_is_counted_when_it_is_shown_and_changes_its_kind() -> None:
    before = torch.zeros(25)
    live = LiveTensorBytes(lambda tensor: "square" if tensor.dim() == 2 else "other")
    live.show([before, before[:5]], "weights")
    with live:
        product = torch.outer(before, before)
        row = before + 1
    assert dict(live.kinds) == {"weights": 100, "square": 2500, "other": 100}
    live.show([row], "gradients")
    assert live.kinds == {"weights": 100, "square": 2500, "gradients": 100, "other": 0}
    assert product.shape == (25, 25)


def test_tensors_without_data_count_as_if_they_had_some_and_those_of_the_meta_device_do_not() -> None:
    live = LiveTensorBytes()
    with FakeTensorMode(), live:
        there = torch.zeros(1000)
        assert live.live == 4000
    with live:
        shape = torch.zeros(1000, device="meta")
        assert live.live == 4000
    assert shape.shape == there.shape
