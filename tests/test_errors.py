"""One tree of errors, drawn as it is."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from pplr import errors
from pplr.errors import PplrError, nearest

KINDS = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, PplrError)}


def test_the_drawing_is_the_tree():
    drawn: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        if not (found := re.match(r"^([ │├└─]*)(\w+Error)\b", line)):
            continue
        depth, name = len(found[1]), found[2]
        above = [(d, n) for d, n in above if d < depth]
        drawn[name] = above[-1][1] if above else None
        above.append((depth, name))
    assert drawn == {name: None if kind is PplrError else kind.__base__.__name__ for name, kind in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_error_says_what_was_seen_and_what_to_do(kind: type[PplrError]):
    error = kind("31 of 30 blocks.", cure="Lower it.")
    assert str(error) == "31 of 30 blocks. Lower it."
    assert (error.message, error.cure) == ("31 of 30 blocks", "Lower it.")
    with pytest.raises(TypeError):
        kind("without a cure")


def test_an_error_can_go_to_another_process():
    error = pickle.loads(pickle.dumps(errors.CutError("31 of 30", cure="Lower it.")))
    assert type(error) is errors.CutError
    assert (str(error), error.cure) == ("31 of 30. Lower it.", "Lower it.")


def test_the_nearest_name_is_told():
    assert nearest("ronuds", {"rounds": 1, "clients": 2}) == "Did you mean 'rounds'?"
    assert nearest("zzz", ["b", "a", "b"]) == "Known: 'a', 'b'."
    many = nearest("zzz", [f"name{number:02}" for number in range(30)])
    assert "'name19', ..." in many
    assert "name20" not in many
