"""Who learns from whom, and the mixing itself: similarity of adapters, mixing weights, and averages of LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pplr.backbones.adapters import AdapterState, is_lora
from pplr.errors import FederationError

__all__ = ["AVERAGINGS", "SIMILARITIES", "mix", "mixing_weights", "similarity"]

Matrix = NDArray[np.float64]

_NOTHING = 1e-12


def _stacked(states: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """Stack one tensor of all clients: (C, P), float64."""
    return torch.stack([state[name].reshape(-1) for state in states]).double()


def _gram_of_adapters(adapters: Sequence[AdapterState], initial: AdapterState) -> Matrix:
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in initial:
        rows = _stacked(adapters, name)
        gram += (rows @ rows.T).cpu()
    return gram.numpy()


def _gram_of_updates(adapters: Sequence[AdapterState], initial: AdapterState) -> Matrix:
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name, start in initial.items():
        rows = _stacked(adapters, name)
        rows = rows - start.reshape(1, -1).to(rows)
        gram += (rows @ rows.T).cpu()
    return gram.numpy()


def _gram_of_products(adapters: Sequence[AdapterState], initial: AdapterState) -> Matrix:
    """⟨B_i A_i, B_j A_j⟩ = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ), from R x R matrices; BA is never formed."""
    gram = torch.from_numpy(_gram_of_adapters(adapters, _outside_blocks(initial)))
    for a_name, b_name in _pairs(initial):
        a = torch.stack([state[a_name] for state in adapters]).double()  # (C, R, D_in)
        b = torch.stack([state[b_name] for state in adapters]).double()  # (C, D_out, R)
        b_inner = torch.einsum("ior,jos->ijrs", b, b)
        a_inner = torch.einsum("ird,jsd->ijrs", a, a)
        gram += (b_inner * a_inner).sum(dim=(2, 3)).cpu()
    return gram.numpy()


def _gram_of_nothing(adapters: Sequence[AdapterState], initial: AdapterState) -> Matrix:
    """Every cosine is 1, so that heating alone decides."""
    return np.ones((len(adapters), len(adapters)))


SIMILARITIES = {
    "adapters": _gram_of_adapters,
    "updates": _gram_of_updates,
    "products": _gram_of_products,
    "none": _gram_of_nothing,
}
"""What a cosine may compare."""


def _pairs(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    for name in state:
        if ".lora_A." in name:
            yield name, name.replace(".lora_A.", ".lora_B.")


def _outside_blocks(state: AdapterState) -> AdapterState:
    """Pick what is no LoRA factor: tensors that stand for themselves."""
    return {name: tensor for name, tensor in state.items() if not is_lora(name)}


def similarity(adapters: Sequence[AdapterState], initial: AdapterState, *, of: str = "adapters") -> Matrix:
    r"""Compare every two clients' adapters by one scalar.

    S_ij = (cos(x_i, x_j) + 1) / 2

    Args:
        adapters: C states with the same names.
        initial: The adapter that all clients started from.
        of: What x is: ``adapters`` (θ, the paper's), ``updates`` (θ − θ_initial), ``products`` (BA), or ``none``
            (a constant, so S = 1).

    Returns:
        S, (C, C), symmetric, in [0, 1], with ones on the diagonal. Where one x is zero its cosine is taken as 0, and
        where both are, as 1.

    Cites:
        zhao2024pplr
    """
    gram = SIMILARITIES[of](adapters, initial)
    gram = (gram + gram.T) / 2  # sums in another order differ in their last digit
    norms = np.sqrt(np.clip(np.diag(gram), 0, None))
    zero = norms == 0
    safe = np.where(zero, 1.0, norms)
    cosine = gram / np.outer(safe, safe)
    cosine[np.outer(zero, zero)] = 1.0
    np.fill_diagonal(cosine, 1.0)
    return np.asarray((np.clip(cosine, -1, 1) + 1) / 2, dtype=np.float64)


def mixing_weights(similarity: Matrix, heating: Sequence[float]) -> Matrix:
    r"""Turn similarity and heating into the share that each client takes from each other.

    W_ij = w_i S_ij / (S_ii + w_i Σ_{l≠i} S_il) for j ≠ i, and S_ii / (...) for j = i.

    Args:
        similarity: S, (C, C).
        heating: w, (C,), in (0, 1].

    Returns:
        W, (C, C), non-negative, with rows of sum 1.

    Cites:
        zhao2024pplr

    Example:
        >>> mixing_weights(np.ones((2, 2)), [1.0, 0.5]).round(3).tolist()
        [[0.5, 0.5], [0.333, 0.667]]
    """
    weights = np.asarray(similarity, dtype=np.float64) * np.asarray(heating, dtype=np.float64)[:, None]
    np.fill_diagonal(weights, np.diag(similarity))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)


def mix(
    adapters: Sequence[AdapterState], weights: Matrix, *, averaging: str = "factors"
) -> Iterator[list[dict[str, Tensor]]]:
    r"""Mix all clients' adapters for all clients at once, one LoRA layer after the other.

    θ_i' = Σ_j W_ij θ_j

    Each layer is read from all clients before any of it is written, so every client is mixed from one snapshot, and
    no more than one layer of all clients is held besides the adapters.

    Args:
        adapters: C states with the same names; not changed here.
        weights: W, (C, C), rows of sum 1.
        averaging: ``factors`` mixes A and B apart, as the paper does; ``freeze_a`` mixes B alone; ``product`` mixes
            the products BA exactly and cuts the mixture back to the rank by a singular value decomposition. What is
            no LoRA factor is mixed as it is.

    Yields:
        For each LoRA layer, and each other tensor, a list of C dictionaries with the mixed tensors of that layer.

    Raises:
        FederationError: The weights do not fit the clients.
    """
    count = len(adapters)
    if weights.shape != (count, count):
        raise FederationError(
            f"mixing weights of shape {weights.shape} for {count} clients", cure="Give one row and column for each."
        )
    average = AVERAGINGS[averaging]
    for a_name, b_name in _pairs(adapters[0]):
        table = torch.from_numpy(np.ascontiguousarray(weights)).to(adapters[0][a_name].device)
        a = torch.stack([state[a_name] for state in adapters]).double()  # (C, R, D_in)
        b = torch.stack([state[b_name] for state in adapters]).double()  # (C, D_out, R)
        mixed_a, mixed_b = average(a, b, table)
        yield [
            ({} if mixed_a is None else {a_name: mixed_a[i].float()}) | {b_name: mixed_b[i].float()}
            for i in range(count)
        ]
    for name, tensor in _outside_blocks(adapters[0]).items():
        rows = _stacked(adapters, name)  # (C, P)
        mixed = torch.from_numpy(np.ascontiguousarray(weights)).to(rows) @ rows
        yield [{name: mixed[i].float().view(tensor.shape)} for i in range(count)]


def _mix_factors(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.einsum("ij,jrd->ird", weights, a), torch.einsum("ij,jor->ior", weights, b)


def _mix_b(a: Tensor, b: Tensor, weights: Tensor) -> tuple[None, Tensor]:
    return None, torch.einsum("ij,jor->ior", weights, b)


def _mix_products(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j W_ij B_j A_j = L R with L (D_out, CR) and R (CR, D_in), so its SVD is that of a small core.

    The result is B = U √S, A = √S Vᵀ, the best approximation of the mixture at rank R. Directions that the mixture
    does not use get the mixed A with B = 0, as LoRA starts: were both zero, no gradient would ever reach them. A
    client that mixes only from itself keeps its factors as they are.
    """
    count, rank, width_in = a.shape
    q_right, r_right = torch.linalg.qr(a.reshape(count * rank, width_in).T)  # (D_in, K), (K, CR)
    mixed_a, mixed_b = torch.empty_like(a), torch.empty_like(b)
    for i in range(count):
        if weights[i, i] == 1:
            mixed_a[i], mixed_b[i] = a[i], b[i]
            continue
        left = (weights[i, :, None, None] * b).permute(1, 0, 2).reshape(b.shape[1], count * rank)  # (D_out, CR)
        q_left, r_left = torch.linalg.qr(left)
        u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        kept = int((s[:rank] > s[0] * _NOTHING).sum())
        root = s[:kept].sqrt()
        mixed_a[i], mixed_b[i] = (weights[i, :, None, None] * a).sum(dim=0), 0
        mixed_b[i][:, :kept] = (q_left @ u[:, :kept]) * root
        mixed_a[i][:kept] = root[:, None] * (vt[:kept] @ q_right.T)
    return mixed_a, mixed_b


AVERAGINGS = {"factors": _mix_factors, "freeze_a": _mix_b, "product": _mix_products}
"""How two adapters become one."""
