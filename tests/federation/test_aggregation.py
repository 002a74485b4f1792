"""Similarity, mixing weights and mixing, against the formulas written as plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pplr.errors import FederationError
from pplr.federation.aggregation import AVERAGINGS, SIMILARITIES, mix, mixing_weights, similarity

SCALES = st.lists(st.sampled_from([0.0, 0.01, 1.0, 1.0, 30.0]), min_size=1, max_size=6)
SHAPES = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 3),
        "width_in": st.integers(1, 6),
        "width_out": st.integers(1, 6),
        "layers": st.integers(1, 3),
        "seed": st.integers(0, 2**20),
    }
)
HEATING = st.lists(st.floats(0.01, 1), min_size=6, max_size=6)


def pairs(state):
    return [(name, name.replace("lora_A", "lora_B")) for name in state if "lora_A" in name]


def flat(state):
    return np.concatenate([state[name].double().numpy().reshape(-1) for name in state])


def products(state):
    """Every BA, formed."""
    return [(state[b].double() @ state[a].double()).numpy() for a, b in pairs(state)]


def cosine_by_loops(x, y):
    inner = sum(float(a) * float(b) for a, b in zip(x, y, strict=True))
    length_x = math.sqrt(sum(float(a) ** 2 for a in x))
    length_y = math.sqrt(sum(float(b) ** 2 for b in y))
    if length_x == 0 and length_y == 0:
        return 1.0
    return inner / (length_x * length_y) if length_x and length_y else 0.0


def compared(state, initial, of):
    if of == "adapters":
        return flat(state)
    if of == "updates":
        return flat(state) - flat(initial)
    if of == "none":
        return np.ones(1)
    return np.concatenate([product.reshape(-1) for product in products(state)])


def weights_by_loops(alike, heating):
    count = len(alike)
    table = np.zeros((count, count))
    for i in range(count):
        bottom = alike[i][i]
        for j in range(count):
            if j != i:
                bottom += heating[i] * alike[i][j]
        for j in range(count):
            table[i][j] = (alike[i][i] if i == j else heating[i] * alike[i][j]) / bottom
    return table


def mixed(states, weights, averaging="factors"):
    found = [dict(state) for state in states]
    for layer in mix(states, weights, averaging=averaging):
        for state, tensors in zip(found, layer, strict=True):
            assert set(tensors) <= set(state)
            state.update(tensors)
    return found


def drawn_weights(count, heating, seed):
    alike = np.random.default_rng(seed).random((count, count))
    alike = (alike + alike.T) / 2
    np.fill_diagonal(alike, 1)
    return mixing_weights(alike, heating[:count])


@pytest.mark.parametrize("of", SIMILARITIES)
@given(scales=SCALES, shapes=SHAPES, same=st.booleans())
def test_similarity_is_the_cosine_of_the_vectors_written_out(draw_adapters, of, scales, shapes, same):
    initial, *states = draw_adapters([1.0, *scales], **shapes)
    if same:  # a client that did not move, whose update is zero
        states[0] = {name: tensor.clone() for name, tensor in initial.items()}
    found = similarity(states, initial, of=of)
    vectors = [compared(state, initial, of) for state in states]
    expected = [[(cosine_by_loops(x, y) + 1) / 2 for y in vectors] for x in vectors]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert np.array_equal(found, found.T)
    assert np.array_equal(np.diag(found), np.ones(len(states)))


def test_what_similarity_compares_makes_a_difference(draw_adapters):
    initial, one, two = draw_adapters([1.0, 0.1, 0.1], seed=3)
    near = [{name: initial[name] + state[name] for name in initial} for state in (one, two)]
    values = {of: similarity(near, initial, of=of)[0, 1] for of in SIMILARITIES}
    assert values["adapters"] > 0.99  # the shared start hides what was learned
    assert abs(values["updates"] - 0.5) < 0.3
    assert len({round(float(value), 6) for value in values.values()}) == 4


@given(scales=SCALES, heating=HEATING, seed=st.integers(0, 2**20))
def test_mixing_weights_are_the_formula_written_out(scales, heating, seed):
    count = len(scales)
    alike = np.random.default_rng(seed).random((count, count))
    np.fill_diagonal(alike, np.random.default_rng(seed + 1).uniform(0.1, 1, count))  # also other than 1
    found = mixing_weights(alike, heating[:count])
    np.testing.assert_allclose(found, weights_by_loops(alike, heating), atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    assert (found >= 0).all()


def test_heating_does_not_cool_a_client_towards_itself():
    found = mixing_weights(np.ones((3, 3)), [0.5, 1.0, 1e-6])
    np.testing.assert_allclose(found[0], [0.5, 0.25, 0.25])
    np.testing.assert_allclose(found[1], [1 / 3] * 3)
    np.testing.assert_allclose(found[2], [1e-6, 1e-6, 1], atol=1e-5)


def test_arguments_stay_as_they_are(draw_adapters):
    states = draw_adapters([1.0, 2.0, 3.0])
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    alike, weights = np.full((3, 3), 0.5), np.full((3, 3), 1 / 3)
    mixing_weights(alike, [0.1, 0.2, 0.3])
    for averaging in AVERAGINGS:
        mixed(states, weights, averaging)
    assert (alike == 0.5).all()
    assert (weights == 1 / 3).all()
    assert all(torch.equal(old[name], new[name]) for old, new in zip(before, states, strict=True) for name in old)


@given(scales=SCALES, shapes=SHAPES, heating=HEATING, seed=st.integers(0, 2**20))
def test_factors_are_mixed_as_the_formula_written_out(draw_adapters, scales, shapes, heating, seed):
    states = draw_adapters(scales, **shapes)
    weights = drawn_weights(len(states), heating, seed)
    for i, found in enumerate(mixed(states, weights)):
        for name, tensor in found.items():
            expected = np.zeros(tuple(tensor.shape))
            for j, state in enumerate(states):
                expected += weights[i][j] * state[name].double().numpy()
            assert tensor.dtype == torch.float32
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6, atol=1e-6)


@given(scales=SCALES, shapes=SHAPES, heating=HEATING, seed=st.integers(0, 2**20))
def test_freeze_a_mixes_b_alone_which_is_the_mixture_of_products(draw_adapters, scales, shapes, heating, seed):
    states = draw_adapters(scales, **shapes)
    for state in states[1:]:  # A stays at its start, which all share
        state.update({a: states[0][a] for a, _ in pairs(state)})
    weights = drawn_weights(len(states), heating, seed)
    for i, found in enumerate(mixed(states, weights, "freeze_a")):
        assert all(found[a] is states[i][a] for a, _ in pairs(found))
        for place, product in enumerate(products(found)):
            expected = sum(weights[i][j] * products(state)[place] for j, state in enumerate(states))
            np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-4)


@given(scales=SCALES, shapes=SHAPES, heating=HEATING, seed=st.integers(0, 2**20))
def test_product_is_the_best_approximation_of_the_mixture_at_the_rank(draw_adapters, scales, shapes, heating, seed):
    states = draw_adapters(scales, **shapes)
    weights = drawn_weights(len(states), heating, seed)
    for i, found in enumerate(mixed(states, weights, "product")):
        assert all(found[name].shape == tensor.shape for name, tensor in states[i].items())
        for place, product in enumerate(products(found)):
            whole = sum(weights[i][j] * products(state)[place] for j, state in enumerate(states))
            u, s, vt = np.linalg.svd(whole, full_matrices=False)
            rank = shapes["rank"]
            expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
            np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(s[0])))


@pytest.mark.parametrize("averaging", AVERAGINGS)
@given(shapes=SHAPES, count=st.integers(1, 6), heating=HEATING, seed=st.integers(0, 2**20))
def test_equal_adapters_stay_as_they_are(draw_adapters, averaging, shapes, count, heating, seed):
    (state,) = draw_adapters([1.0], **shapes)
    found = mixed([state] * count, drawn_weights(count, heating, seed), averaging)
    for own in found:
        for before, after in zip(products(state), products(own), strict=True):
            np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
        if averaging != "product":  # there the factors turn, and only BA stays
            assert all(torch.allclose(own[name], state[name], rtol=1e-6) for name in state)


@pytest.mark.parametrize("averaging", AVERAGINGS)
@given(scales=SCALES, shapes=SHAPES)
def test_a_client_that_does_not_open_keeps_its_own_adapter_bit_for_bit(draw_adapters, averaging, scales, shapes):
    states = draw_adapters(scales, **shapes)
    alike = similarity(states, states[0])
    weights = mixing_weights(alike, [1e-300] * len(states))
    for before, after in zip(states, mixed(states, weights, averaging), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("averaging", AVERAGINGS)
@given(scales=SCALES, shapes=SHAPES, heating=HEATING, order=st.permutations(range(6)))
def test_the_order_of_the_clients_changes_nothing(draw_adapters, averaging, scales, shapes, heating, order):
    order = [i for i in order if i < len(scales)]
    initial, *states = draw_adapters([1.0, *scales], **shapes)

    def whole(states, heating):
        return mixed(states, mixing_weights(similarity(states, initial), heating), averaging)

    expected = whole(states, heating[: len(states)])
    found = whole([states[i] for i in order], [heating[i] for i in order])
    for place, i in enumerate(order):
        for before, after in zip(products(expected[i]), products(found[place]), strict=True):
            np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(before).max())))


@pytest.mark.parametrize("averaging", AVERAGINGS)
@given(scales=SCALES, shapes=SHAPES, seed=st.integers(0, 2**20))
def test_equal_rows_of_weights_give_equal_bytes(draw_adapters, averaging, scales, shapes, seed):
    states = draw_adapters(scales, **shapes)
    if averaging == "freeze_a":
        states = [state | {a: states[0][a] for a, _ in pairs(state)} for state in states]
    share = np.random.default_rng(seed).dirichlet(np.ones(len(states)))
    first, *others = mixed(states, np.tile(share, (len(states), 1)), averaging)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_a_mixture_that_says_nothing_can_still_learn(draw_adapters):
    """With A and B both zero no gradient would ever reach either: A must outlive a mixture of zero products."""
    states = draw_adapters([1.0, 1.0, 1.0], rank=3)
    for state in states:
        state.update({b: torch.zeros_like(state[b]) for _, b in pairs(state)})
    for own in mixed(states, np.full((3, 3), 1 / 3), "product"):
        for a, b in pairs(own):
            assert torch.equal(own[b], torch.zeros_like(own[b]))
            assert torch.linalg.matrix_rank(own[a]) == 3


def test_directions_that_a_mixture_does_not_use_can_still_learn(draw_adapters):
    states = draw_adapters([1.0, 1.0], rank=2, layers=1)
    a, b = pairs(states[0])[0]
    for state in states:  # everybody's BA is a multiple of the same matrix of rank one
        state[b] = torch.outer(torch.arange(1.0, 5.0), torch.tensor([1.0, 0.0]))
        state[a][0] = torch.arange(1.0, 6.0)
    for own in mixed(states, np.full((2, 2), 0.5), "product"):
        torch.testing.assert_close(own[b] @ own[a], states[0][b] @ states[0][a])
        assert torch.linalg.matrix_rank(own[a]) == 2


def test_weights_that_do_not_fit_the_clients_are_refused(draw_adapters):
    with pytest.raises(FederationError, match=r"\(2, 2\) for 3 clients"):
        list(mix(draw_adapters([1.0, 1.0, 1.0]), np.eye(2)))
