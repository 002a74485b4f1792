"""Adapters on disk: what comes back, what is mixed from there, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pplr.errors import StorageError
from pplr.federation import aggregation
from pplr.federation.aggregation import AVERAGINGS, SIMILARITIES, mix, mix_on_disk, mixing_weights, similarity
from pplr.federation.stacks import HeldAdapters, StoredAdapters
from pplr.testing import refuses


def with_end(states):
    """Add what is no LoRA factor."""
    return [state | {"item_in.weight": torch.full((2, 3), float(i))} for i, state in enumerate(states)]


def stored(folder: Path, states) -> StoredAdapters:
    shapes = {name: tuple(tensor.shape) for name, tensor in states[0].items()}
    stack = StoredAdapters.create(folder, shapes, len(states))
    for number, state in enumerate(states):
        stack.put(number, state)
    return stack


def test_what_is_put_comes_back_bit_for_bit(tmp_path, draw_adapters):
    states = with_end(draw_adapters([1.0, 2.0, 3.0]))
    stored(tmp_path / "stack", states)
    stack = StoredAdapters(tmp_path / "stack")
    assert (len(stack), list(stack.shapes)) == (3, list(states[0]))
    for number, state in enumerate(states):
        assert all(torch.equal(stack.get(number)[name], tensor) for name, tensor in state.items())
    held = HeldAdapters(states)
    assert all(torch.equal(stack.rows(name), held.rows(name)) for name in stack.shapes)


def test_rows_that_were_never_written_are_zero(tmp_path, draw_adapters):
    (state,) = draw_adapters([1.0])
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    stack = StoredAdapters.create(tmp_path / "stack", shapes, 2)
    stack.put(1, state)
    assert not any(tensor.any() for tensor in stack.get(0).values())


@pytest.mark.parametrize("averaging", AVERAGINGS)
@pytest.mark.parametrize("of", SIMILARITIES)
def test_what_is_compared_and_mixed_on_disk_is_what_is_compared_and_mixed_in_memory(
    tmp_path, draw_adapters, of, averaging
):
    initial, *states = with_end(draw_adapters([1.0, 1.0, 0.5, 2.0]))
    stack = stored(tmp_path / "before", states)
    alike = similarity(states, initial, of=of)
    np.testing.assert_array_equal(similarity(stack, initial, of=of), alike)
    weights = mixing_weights(alike, [0.3, 0.9, 1.0])
    expected = [dict(state) for state in states]
    for layer in mix(states, weights, averaging=averaging):
        for state, tensors in zip(expected, layer, strict=True):
            state.update(tensors)
    into = StoredAdapters.create(tmp_path / "after", stack.shapes, 3)
    mix_on_disk(stack, weights, into, averaging=averaging)
    for number, state in enumerate(expected):
        assert all(torch.equal(into.get(number)[name], tensor) for name, tensor in state.items())
        assert all(torch.equal(stack.get(number)[name], tensor) for name, tensor in states[number].items())


@pytest.mark.parametrize("of", SIMILARITIES)
@given(clients=st.integers(1, 9), at_once=st.integers(1, 4))
def test_how_many_clients_are_compared_at_once_changes_nothing(draw_adapters, of, clients, at_once):
    initial, *states = draw_adapters([1.0] * (clients + 1))
    whole = similarity(states, initial, of=of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregation, "_AT_ONCE", at_once)
        patch.setattr(aggregation, "_PAIRS_AT_ONCE", at_once)
        np.testing.assert_allclose(similarity(states, initial, of=of), whole, atol=1e-12)


def test_a_folder_that_is_there_is_not_written_over(tmp_path, draw_adapters):
    (state,) = draw_adapters([1.0])
    stored(tmp_path / "stack", [state])
    with refuses(StorageError, "cannot write"):
        StoredAdapters.create(tmp_path / "stack", {"a": (1,)}, 1)
    assert torch.equal(StoredAdapters(tmp_path / "stack").get(0)[next(iter(state))], next(iter(state.values())))


def test_what_is_not_whole_is_refused(tmp_path, draw_adapters):
    with refuses(StorageError, "holds no adapters"):
        StoredAdapters(tmp_path)
    stored(tmp_path / "stack", draw_adapters([1.0, 1.0]))
    part = tmp_path / "stack" / "1.f32"
    part.write_bytes(part.read_bytes()[:-4])
    with refuses(StorageError, "expected"):
        StoredAdapters(tmp_path / "stack")
    part.unlink()
    with refuses(StorageError, "holds 0 bytes"):
        StoredAdapters(tmp_path / "stack")


def test_tensors_of_another_shape_and_clients_that_are_none_are_refused(tmp_path, draw_adapters):
    (state,) = draw_adapters([1.0])
    stack = stored(tmp_path / "stack", [state])
    name = next(iter(state))
    with pytest.raises(ValueError, match="expected"):
        stack.write_rows(name, state[name])
    with pytest.raises(ValueError, match="expected"):
        stack.put(0, state | {name: state[name].T})
    for number in (-1, 1):
        with pytest.raises(IndexError):
            stack.put(number, state)
        with pytest.raises(IndexError):
            stack.get(number)
