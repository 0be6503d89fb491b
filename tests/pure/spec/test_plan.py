"""The Plan as a value: it parses, prints, refuses and finds coordinates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import SpecError
from shardwise.spec.plan import AXES, Plan, build_plan, parse_plan
from shardwise.spec.sync import Sync

plans = st.builds(
    Plan,
    data=st.integers(1, 9),
    tensor=st.integers(1, 4),
    microbatches=st.integers(1, 8),
    precision=st.sampled_from(["float32", "bfloat16"]),
    exact=st.booleans(),
    sync=st.one_of(
        st.builds(Sync, bucket_bytes=st.integers(1, 10**9)),
        st.builds(Sync, word=st.just("local"), every=st.integers(1, 9), bits=st.sampled_from([32, 16, 8, 4])),
        st.builds(Sync, word=st.just("param_server"), bound=st.integers(0, 9)),
        st.builds(Sync, word=st.just("compressed"), method=st.just("topk"), density=st.floats(0.001, 1)),
    ),
)


@given(plans)
def test_a_plan_survives_being_printed_and_parsed(plan: Plan) -> None:
    assert build_plan(parse_plan(str(plan))) == plan


@given(plans)
def test_a_printed_plan_is_safe_in_a_shell(plan: Plan) -> None:
    import shlex

    assert shlex.quote(str(plan).replace(",", "").replace("=", "")) == str(plan).replace(",", "").replace("=", "")


@given(plans)
def test_every_rank_has_its_own_coordinates_and_neighbours_differ_in_the_last_axis(plan: Plan) -> None:
    found = [tuple(plan.coordinates(rank)[axis] for axis in AXES) for rank in range(plan.ranks)]
    assert found == sorted(set(found))
    assert len(found) == plan.ranks


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tensr=2", "did you mean 'tensor'?"),
        ("data=many", "`$.data`"),
        ("data=0", "at least 1"),
        ("sync.mthod=diloco", "did you mean 'method'?"),
        ("data=2,data=3", "twice"),
        ("data", "no value"),
        ("zero=4", "1, 2 or 3"),
        ("sync=everything", "sync"),
        ("sync.bucket_bytes=-1", "negative"),
        ("sync.every=5", "belongs to local/sgd"),
        ("sync=local,sync.method=int8", "no method of sync=local"),
        ("sync=compressed,sync.method=topk,sync.density=0", "above 0"),
        ("sync=local,sync.method=post_local", "needs sync.start"),
        ("sync=local,sync.every=5,sync.overlap=5", "must be below"),
        ("sync=local,sync.method=streaming,sync.every=2", "a step of its own"),
    ],
)
def test_a_bad_plan_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_plan(text)
    assert says in str(caught.value)


def test_a_string_fixes_only_what_it_names() -> None:
    assert parse_plan("data=2,sync=local,sync.every=50") == {"data": "2", "sync": {"word": "local", "every": "50"}}


def test_a_bound_asks_for_bounded_staleness() -> None:
    assert Sync(word="param_server", bound=4).method == "stale"
    assert Sync(word="param_server").method == "sync"
    assert [Sync(word="param_server").exact, Sync(word="param_server", backup=1).exact] == [True, False]


def test_stages_must_match_the_pipeline_axis() -> None:
    with pytest.raises(SpecError, match="stages"):
        build_plan({"pipeline": 2, "stages": [{"first": 0, "last": 3}]})


def test_a_rank_beyond_the_plan_is_refused() -> None:
    with pytest.raises(SpecError, match="rank 2"):
        Plan(data=2).coordinates(2)
