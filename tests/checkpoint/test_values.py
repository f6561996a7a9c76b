"""Plain values come back from their bytes exactly, and executing nothing."""

import random
from collections import OrderedDict

import numpy as np
import pytest
import torch

from titanarch.checkpoint.loading import leaves_of
from titanarch.checkpoint.values import decode, encode, flatten, unflatten

TREE = {
    "step": 2**70,
    "lr": 0.1 + 0.2,
    "rates": [float("inf"), -0.0, 5e-324, 1e308],
    "none": None,
    "on": True,
    "name": 'ümlaut "quoted" \n',
    "betas": (0.9, 0.95),
    "raw": b"\x00\xff\x80",
    "cursors": {0: {"epoch": 1, "buffer": [3, (4, 5)]}, 1: {}},
    "deep": {"a": {"b": {"c": [{"bytes": "not bytes"}, {}]}}},
    "empty": {},
    "generator": random.Random(3).getstate(),
}


def test_values_round_trip_exactly() -> None:
    loaded = unflatten(decode(encode(flatten(TREE))))
    assert loaded == TREE
    assert repr(loaded) == repr(TREE)  # types and signs of zero too
    assert np.isnan(decode(encode({("x",): float("nan")}))[("x",)])


def test_tensors_are_left_to_torch() -> None:
    leaves = flatten({"a": {"w": torch.ones(2), "n": 1}})
    assert decode(encode(leaves)) == {("a", "n"): 1}


@pytest.mark.parametrize("value", [{1, 2}, np.float32(1), torch.float32, [torch.ones(1)], object()])
def test_what_cannot_be_stored_is_named(value: object) -> None:
    with pytest.raises(TypeError, match=r"the state 'data\.cursor' holds a"):
        encode(flatten(OrderedDict(data={"cursor": value})))


def test_names_must_be_unambiguous() -> None:
    with pytest.raises(ValueError, match=r"two leaves named 'x\.a\.b'"):
        leaves_of("x", {"a.b": 1, "a": {"b": 2}})
    with pytest.raises(ValueError, match="dot"):
        leaves_of("x.y", {"a": 1})
