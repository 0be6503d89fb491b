"""Plain data goes through JSON and back without a change; anything else is refused by its place."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.checkpoint.scalars import pack, unpack
from shardwise.errors import CheckpointError

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"))
keys = st.text(st.characters(codec="utf-8"), max_size=4) | st.sampled_from(["$float", "$dict", "$"]) | st.integers()
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(st.tuples(st.integers(), st.booleans()), inner, max_size=2)
    ),
)


@given(values)
def test_everything_comes_back_as_it_was(value: Any) -> None:
    text = json.dumps(pack(value), allow_nan=False)
    assert repr(unpack(json.loads(text))) == repr(value)  # repr tells NaN, -0.0, True and 1, lists and tuples apart


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": {"b": [1, {2}]}}, r"scalars\.a\.b\[1\] is a set"),
        ((1, b"raw"), r"scalars\[1\] is a bytes"),
        ({"rule": math.sin}, r"scalars\.rule is a builtin_function_or_method"),
    ],
)
def test_what_is_not_plain_data_is_refused_by_its_place(value: Any, place: str) -> None:
    with pytest.raises(CheckpointError, match=place):
        pack(value)


@pytest.mark.parametrize(
    "value",
    [{"$float": "1.5"}, {"$int": 5}, {"$int": "1" * 5000}, {"$tuple": 1}, {"$dict": [[1]]}, {"$call": "os.system"}],
)
def test_a_tag_that_was_never_written_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="unknown value"):
        unpack(value)
