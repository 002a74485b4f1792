"""Norms of frozen blocks have transformers' bits, forward and backward, and keep less."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pplr.backbones.norms import FrozenRMSNorm, freeze_norms
from pplr.testing import tiny_backbone


def both(width: int, dtype: torch.dtype) -> tuple[LlamaRMSNorm, LlamaRMSNorm]:
    one, other = (LlamaRMSNorm(width, eps=1e-5).to(dtype).requires_grad_(False) for _ in range(2))
    one.weight.copy_(torch.randn(width))
    other.load_state_dict(one.state_dict())
    freeze_norms(other)
    assert type(other) is FrozenRMSNorm
    return one, other


@pytest.mark.parametrize("shape", [(1, 300, 64), (3, 5, 7, 16), (2, 129, 32), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_is_that_of_transformers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    plain, frozen = both(shape[-1], dtype)
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_(True)
    grad = torch.randn(shape).to(dtype)
    wanted, found = plain(x), frozen(x)
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(own, x, grad)[0] for own in (found, wanted)))
    across = x.transpose(0, 1)  # states whose rows do not lie one after another
    wanted, found = (torch.autograd.grad(own(across), x, grad.transpose(0, 1))[0] for own in (plain, frozen))
    assert torch.equal(found, wanted)
    with torch.no_grad():
        assert torch.equal(frozen(x), plain(x))


def test_a_trained_weight_gets_its_gradient() -> None:
    plain, frozen = both(8, torch.float32)
    x = torch.randn(2, 8)
    for own in (plain, frozen):
        own.weight.requires_grad_(True)
        own(x.requires_grad_(True)).square().sum().backward()
    assert torch.equal(frozen.weight.grad, plain.weight.grad)


def test_it_keeps_no_wide_copy() -> None:
    plain, frozen = both(64, torch.bfloat16)
    x = torch.randn(1, 100, 64).bfloat16().requires_grad_(True)

    def kept(norm: LlamaRMSNorm) -> int:
        found: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: found.update({tensor.data_ptr(): tensor.nbytes}) or tensor, lambda tensor: tensor
        ):
            assert norm(x).requires_grad
        return sum(found.values())

    assert 0 < kept(frozen) < 0.6 * kept(plain)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_blocks_have_them_and_the_shared_model_keeps_its_own(family: str) -> None:
    backbone = tiny_backbone(family)
    for layer in backbone.blocks(range(4)).layers:
        norms = [own for own in layer.modules() if type(own).__name__.endswith("RMSNorm")]
        assert len(norms) >= 2
        assert all(type(own) is FrozenRMSNorm for own in norms)
    assert not any(isinstance(own, FrozenRMSNorm) for own in backbone.model.modules())
