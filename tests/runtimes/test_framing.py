from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplr.errors import WireError
from pplr.runtimes.framing import FRAME_BYTES, frames, joined
from pplr.testing import refuses


@given(st.binary(max_size=200), st.integers(1, 7))
def test_what_is_divided_comes_together_however_the_network_cuts_it(content, size) -> None:
    whole = b"".join(frames(content))
    parts = [whole[start : start + size] for start in range(0, len(whole), size)]
    assert joined(parts, 200) == content


def test_frames_stay_below_the_limit() -> None:
    content = bytes(3 * FRAME_BYTES + 5)
    parts = list(frames(content))
    assert max(map(len, parts)) <= FRAME_BYTES
    assert joined(parts, len(content)) == content


def test_a_message_that_declares_too_much_is_refused_before_it_is_read() -> None:
    def endless():
        yield struct.pack("<Q", 2**60)
        raise AssertionError("more was read")

    with refuses(WireError, "at most 100"):
        joined(endless(), 100)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "ended early"),
        ([b"\x01"], "ended early"),
        ([struct.pack("<Q", 5), b"abc"], "ended early"),
        ([struct.pack("<Q", 2), b"abc"], "longer than it says"),
        ([struct.pack("<Q", 0), b"a"], "longer than it says"),
    ],
)
def test_a_message_that_is_not_as_long_as_it_says_is_refused(parts, words) -> None:
    with refuses(WireError, words):
        joined(parts, 100)
