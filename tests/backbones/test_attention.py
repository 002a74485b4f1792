"""Attention as matrix products is the formula written out, and is used where it is meant to be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pplr.backbones import attention
from pplr.backbones.causal_attention import MOST_TOKENS, causal_attention


def draw(batch: int, heads: int, shared: int, tokens: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw query, key and value as transformers gives them: (B, heads, T, d), tokens outermost in memory."""
    source = torch.Generator().manual_seed(tokens)
    shapes = ((batch, tokens, own, width) for own in (heads, shared, shared))
    made = (torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for shape in shapes)
    return [own.transpose(1, 2).detach().requires_grad_(True) for own in made]


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attend one position of one head at a time."""
    group = query.shape[1] // key.shape[1]
    rows = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for t in range(query.shape[2]):
                scores = key[b, h // group, : t + 1] @ query[b, h, t] * scaling
                rows.append(torch.softmax(scores, 0) @ value[b, h // group, : t + 1])
    return torch.stack(rows).view(query.shape)


@pytest.mark.parametrize(("heads", "shared"), [(4, 2), (3, 3), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 5, 97, 150])
def test_it_is_the_formula_with_its_gradients(heads: int, shared: int, tokens: int) -> None:
    states = draw(2, heads, shared, tokens, 4, torch.float64)
    out, expected = causal_attention(*states, 0.3), written_out(*states, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(out.shape, dtype=torch.float64)
    found, wanted = (torch.autograd.grad(own, states, grad) for own in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("past", "tokens"), [(1, 1), (5, 1), (3, 97), (70, 150)])
def test_queries_may_be_those_of_the_last_keys(past: int, tokens: int) -> None:
    query, key, value = draw(2, 4, 2, past + tokens, 4, torch.float64)
    wanted = causal_attention(query, key, value, 0.3)[:, :, past:]
    out = causal_attention(query[:, :, past:], key, value, 0.3)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    grad = torch.randn(out.shape, dtype=torch.float64)
    found, exact = (torch.autograd.grad(own, (query, key, value), grad) for own in (out, wanted))
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


def test_rows_do_not_depend_on_what_lies_ahead_or_beside() -> None:
    query, key, value = draw(3, 4, 2, 130, 8, torch.bfloat16)
    out = causal_attention(query, key, value, 0.3)
    torch.testing.assert_close(causal_attention(query[1:2], key[1:2], value[1:2], 0.3), out[1:2], rtol=0, atol=0)
    other = [own.detach().clone() for own in (query, key, value)]
    for own in other:
        own[:, :, 70:] = 9.0
    torch.testing.assert_close(causal_attention(*other, 0.3)[:, :, :70], out[:, :, :70], rtol=0, atol=0)


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_in_bfloat16_it_is_about_as_exact_as_the_fused_kernel(spread: float) -> None:
    drawn = draw(2, 6, 2, 180, 32, torch.bfloat16)
    query, key, value = ((own * spread).detach().requires_grad_(True) for own in drawn)
    wide = [own.detach().double().requires_grad_(True) for own in (query, key, value)]
    grad = torch.randn(query.shape).bfloat16()

    def errors(out: torch.Tensor) -> torch.Tensor:
        truth = written_by_torch(*wide)
        found = (out, *torch.autograd.grad(out, (query, key, value), grad))
        exact = (truth, *torch.autograd.grad(truth, wide, grad.double()))
        return torch.stack([(f.double() - e).norm() / e.norm() for f, e in zip(found, exact, strict=True)])

    def written_by_torch(*states: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True)

    own, fused = errors(causal_attention(query, key, value, 32**-0.5)), errors(written_by_torch(query, key, value))
    assert (own < 1.5 * fused + 1e-3).all(), (own, fused)


@pytest.mark.parametrize(("tokens", "most"), [(100, 0.55), (256, 0.8), (MOST_TOKENS, 1.2)])
def test_it_keeps_less_than_the_fused_kernel_does_in_float32_and_little_more_at_most(tokens: int, most: float) -> None:
    states = draw(1, 9, 3, tokens, 64, torch.bfloat16)

    def kept(attend) -> int:
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = attend()
        assert out.requires_grad
        return sum(found.values())

    def fused() -> torch.Tensor:
        wide = [own.float() for own in states]
        return scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True).to(torch.bfloat16)

    assert 0 < kept(lambda: causal_attention(*states, 64**-0.5)) < most * kept(fused)


class _Causal(nn.Module):
    is_causal = True


@pytest.mark.parametrize(
    ("fast", "dtype", "tokens", "mask", "options", "used"),
    [
        (True, torch.bfloat16, 20, False, {}, True),
        (True, torch.bfloat16, 20, False, {"scaling": 0.3, "sliding_window": 99}, True),
        (True, torch.bfloat16, 20, True, {}, False),
        (True, torch.bfloat16, 20, False, {"is_causal": False}, False),
        (True, torch.bfloat16, MOST_TOKENS + 1, False, {}, False),
        (True, torch.float32, 20, False, {}, False),
        (False, torch.bfloat16, 20, False, {}, False),
    ],
)
def test_it_is_used_for_short_causal_sequences_that_train_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: torch.dtype, tokens: int, mask: bool, options, used: bool
) -> None:
    calls = []

    def counted(*states):
        calls.append(states)
        return causal_attention(*states)

    monkeypatch.setattr(attention, "causal_attention", counted)
    monkeypatch.setattr(attention, "is_widened", lambda tensor: not fast)
    query, key, value = draw(1, 2, 1, tokens, 8, dtype)
    given = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril() if mask else None
    options = {"num_key_value_groups": 2, **options}
    module = _Causal()
    module.num_key_value_groups = 2
    out, _ = attention._attention(module, query, key, value, given, **options)
    assert out.shape == (1, tokens, 2, 8)
    assert bool(calls) == used
    causal = options.get("is_causal", True)
    expected = scaled_dot_product_attention(
        *(own.float() for own in (query, key, value)),
        is_causal=causal,
        enable_gqa=True,
        scale=options.get("scaling"),
    )
    torch.testing.assert_close(out.float(), expected.transpose(1, 2), rtol=0.03, atol=0.03)
    with torch.no_grad():
        calls.clear()
        attention._attention(module, query.detach(), key.detach(), value.detach(), given, **options)
        assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "shared"), [(9, 3), (4, 1), (4, 4)])
@pytest.mark.parametrize("tokens", [1, 7, 90])
def test_shared_heads_are_read_where_they_are(
    dtype: torch.dtype, heads: int, shared: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mask and no gradient: what transformers computes with copies of keys and values for every head."""
    query, key, value = (own.detach() for own in draw(2, heads, shared, 90, 8, dtype))
    query, module = query[:, :, -tokens:], nn.Module()
    module.num_key_value_groups = heads // shared  # type: ignore[assignment]
    mask = torch.rand(2, 1, tokens, 90, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 3] = True
    expected, _ = attention.sdpa_attention_forward(module, query, key, value, mask, scaling=0.3, is_causal=False)
    calls: list[int] = []
    grouped = attention._grouped
    monkeypatch.setattr(attention, "_grouped", lambda *own: (calls.append(1), grouped(*own))[1])
    found = attention._alone(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)
    assert len(calls) == (heads > shared)
    attention._alone(module, query.requires_grad_(True), key, value, mask, scaling=0.3)
    assert len(calls) == (heads > shared)


@pytest.mark.parametrize(("device", "with_plans"), [("cuda", False), ("cpu", True)])
def test_on_a_gpu_no_kernel_is_taken_that_plans_for_each_shape(device: str, with_plans: bool) -> None:
    asked = torch.backends.cuda
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):  # what a caller allows stays so
        with attention._without_plans(torch.device(device)):
            assert asked.cudnn_sdp_enabled() == with_plans
            assert (asked.flash_sdp_enabled(), asked.math_sdp_enabled()) == (False, True)
        assert asked.cudnn_sdp_enabled()
