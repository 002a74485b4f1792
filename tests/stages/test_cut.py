"""Every legal cut covers every block once; every illegal one is refused with its cure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplr.config import CutConfig
from pplr.errors import CutError
from pplr.stages.cut import CutPlan
from pplr.testing import every_cut, refuses


@given(st.integers(1, 40), st.data())
def test_spans_cover_every_block_once(total: int, data: st.DataObject):
    k = data.draw(st.integers(0, total - 1))
    m = data.draw(st.integers(0, total - 1 - k))
    plan = CutPlan.make(CutConfig(input_layers=k, output_layers=m), total)
    assert [*plan.input, *plan.middle, *plan.output] == list(range(total))
    assert (len(plan.input), len(plan.output)) == (k, m)
    assert len(plan.middle) >= 1
    assert not plan.is_whole


@given(st.integers(1, 12), st.integers(0, 14), st.integers(0, 14))
def test_a_cut_that_leaves_the_server_nothing_is_refused(total: int, k: int, m: int):
    if k + m < total:
        return
    with refuses(CutError, "cut"):
        CutPlan.make(CutConfig(input_layers=k, output_layers=m), total)


@pytest.mark.parametrize(
    ("k", "m", "words"),
    [
        (3, 1, "a cut with 3 input and 1 output layers leaves the server none of the model's 4"),
        (0, 4, "at most 3 together"),
        (5, 0, "set cut to null"),
        (4, 0, "Set cut to null"),
        (2, 99, "leaves the server none"),
    ],
)
def test_the_message_says_what_to_do(k: int, m: int, words: str):
    with refuses(CutError, words):
        CutPlan.make(CutConfig(input_layers=k, output_layers=m), 4)


@pytest.mark.parametrize(("k", "m"), [(-1, 1), (1, -1), (-2, -2), (5, -1)])
def test_negative_layers_are_refused(k: int, m: int):
    with refuses(CutError, "Set both to 0 or more"):
        CutPlan(k, m, 4)


def test_no_cut_is_the_whole_model():
    plan = CutPlan.make(None, 4)
    assert plan.is_whole
    assert (plan.input, plan.middle, plan.output) == (range(4), range(4, 4), range(4, 4))


def test_every_cut_of_four_blocks():
    plans = [(plan.input_layers, plan.output_layers) for plan in every_cut(4)]
    assert plans == [(k, m) for k in range(4) for m in range(4) if k + m <= 3] + [(4, 0)]
