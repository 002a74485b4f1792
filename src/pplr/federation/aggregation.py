"""Who learns from whom, and the mixing itself: similarity of adapters, mixing weights, and averages of LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pplr.backbones.adapters import AdapterState, is_lora
from pplr.errors import FederationError
from pplr.federation.stacks import Stack, StoredAdapters, stack_of

__all__ = ["AVERAGINGS", "SIMILARITIES", "is_mixed", "mix", "mix_on_disk", "mixing_weights", "similarity"]

Matrix = NDArray[np.float64]

_NOTHING = 1e-12
_AT_ONCE = 256
"""Clients whose rows are multiplied with all others' at once."""
_NUMBERS_AT_ONCE = 1 << 21
"""Numbers of all clients together that are widened to float64 at once: blocks of that size the allocator uses again,
while larger ones cost a page fault for every page, each time."""
_PAIRS_AT_ONCE = 64
"""The same, where every pair takes R x R numbers."""


def _columns(clients: int, width: int) -> Iterator[slice]:
    """Divide the numbers of a tensor into parts that are small for all clients together."""
    step = max(1, _NUMBERS_AT_ONCE // clients)
    for start in range(0, width, step):
        yield slice(start, min(start + step, width))


def _add_gram(gram: Tensor, rows: Tensor, less: Tensor | None = None) -> None:
    """Multiply every two rows, each pair once, and add it: (C, P) to (C, C), float64."""
    for part in _columns(*rows.shape):
        some = rows[:, part].double()
        if less is not None:
            some -= less[part].to(some)
        for start in range(0, len(rows), _AT_ONCE):
            end = start + _AT_ONCE
            block = (some[start:end] @ some[start:].T).cpu()
            gram[start:end, start:] += block
            gram[end:, start:end] += block[:, end - start :].T


def _gram_of_adapters(stack: Stack, initial: AdapterState) -> Matrix:
    gram = torch.zeros(len(stack), len(stack), dtype=torch.float64)
    for name in initial:
        _add_gram(gram, stack.rows(name).flatten(1))
    return gram.numpy()


def _gram_of_updates(stack: Stack, initial: AdapterState) -> Matrix:
    gram = torch.zeros(len(stack), len(stack), dtype=torch.float64)
    for name, start in initial.items():
        _add_gram(gram, stack.rows(name).flatten(1), start.flatten())
    return gram.numpy()


def _gram_of_products(stack: Stack, initial: AdapterState) -> Matrix:
    """⟨B_i A_i, B_j A_j⟩ = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ), from R x R matrices; BA is never formed."""
    gram = torch.from_numpy(_gram_of_adapters(stack, _outside_blocks(initial)))
    for a_name, b_name in _pairs(initial):
        a, b = stack.rows(a_name).double(), stack.rows(b_name).double()  # (C, R, D_in), (C, D_out, R)
        for start in range(0, len(stack), _PAIRS_AT_ONCE):
            end = start + _PAIRS_AT_ONCE
            b_inner = torch.einsum("ior,jos->ijrs", b[start:end], b[start:])
            a_inner = torch.einsum("ird,jsd->ijrs", a[start:end], a[start:])
            block = (b_inner * a_inner).sum(dim=(2, 3)).cpu()
            gram[start:end, start:] += block
            gram[end:, start:end] += block[:, end - start :].T
    return gram.numpy()


def _gram_of_nothing(stack: Stack, initial: AdapterState) -> Matrix:
    """Every cosine is 1, so that heating alone decides."""
    return np.ones((len(stack), len(stack)))


SIMILARITIES = {
    "adapters": _gram_of_adapters,
    "updates": _gram_of_updates,
    "products": _gram_of_products,
    "none": _gram_of_nothing,
}
"""What a cosine may compare."""


def _pairs(state: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in state:
        if ".lora_A." in name:
            yield name, name.replace(".lora_A.", ".lora_B.")


def _outside_blocks(state: AdapterState) -> AdapterState:
    """Pick what is no LoRA factor: tensors that stand for themselves."""
    return {name: tensor for name, tensor in state.items() if not is_lora(name)}


def similarity(adapters: Stack | Sequence[AdapterState], initial: AdapterState, *, of: str = "adapters") -> Matrix:
    r"""Compare every two clients' adapters by one scalar.

    S_ij = (cos(x_i, x_j) + 1) / 2

    Args:
        adapters: C states with the same names, in memory or on disk.
        initial: The adapter that all clients started from.
        of: What x is: ``adapters`` (θ, the paper's), ``updates`` (θ − θ_initial), ``products`` (BA), or ``none``
            (a constant, so S = 1).

    Returns:
        S, (C, C), symmetric, in [0, 1], with ones on the diagonal. Where one x is zero its cosine is taken as 0, and
        where both are, as 1.

    Cites:
        zhao2024pplr
    """
    gram = SIMILARITIES[of](stack_of(adapters), initial)
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
    adapters: Stack | Sequence[AdapterState], weights: Matrix, *, averaging: str = "factors"
) -> Iterator[list[dict[str, Tensor]]]:
    r"""Mix all clients' adapters for all clients at once, one LoRA layer after the other.

    θ_i' = Σ_j W_ij θ_j

    Each layer is read from all clients before any of it is written, so every client is mixed from one snapshot, and
    no more than one layer of all clients is held besides the adapters.

    Args:
        adapters: C states with the same names, in memory or on disk; not changed here.
        weights: W, (C, C), rows of sum 1.
        averaging: ``factors`` mixes A and B apart, as the paper does; ``freeze_a`` mixes B alone; ``product`` mixes
            the products BA exactly and cuts the mixture back to the rank by a singular value decomposition. What is
            no LoRA factor is mixed as it is.

    Yields:
        For each LoRA layer, and each other tensor, a list of C dictionaries with the mixed tensors of that layer.

    Raises:
        FederationError: The weights do not fit the clients.
    """
    for layer in _mixed_layers(stack_of(adapters), weights, averaging):
        yield [{name: rows[i] for name, rows in layer.items()} for i in range(len(weights))]


def mix_on_disk(adapters: Stack, weights: Matrix, into: StoredAdapters, *, averaging: str = "factors") -> None:
    """Mix as :func:`mix` does, and write what comes out; tensors that are not mixed are copied.

    Args:
        adapters: C states.
        weights: W, (C, C), rows of sum 1.
        into: Another stack of the same shapes.
        averaging: As in :func:`mix`.

    Raises:
        FederationError: The weights do not fit the clients.
        StorageError: The disk refuses.
    """
    left = set(adapters.shapes)
    for layer in _mixed_layers(adapters, weights, averaging):
        for name, rows in layer.items():
            into.write_rows(name, rows)
        left -= set(layer)
    for name in left:
        into.write_rows(name, adapters.rows(name))


def is_mixed(name: str, averaging: str) -> bool:
    """Whether a way of averaging changes a tensor; those that it does not stay each client's own."""
    return averaging != "freeze_a" or ".lora_A." not in name


def _mixed_layers(stack: Stack, weights: Matrix, averaging: str) -> Iterator[dict[str, Tensor]]:
    """Mix layer by layer; of each its names, and (C, *shape) float32."""
    count = len(stack)
    if weights.shape != (count, count):
        raise FederationError(
            f"mixing weights of shape {weights.shape} for {count} clients", cure="Give one row and column for each."
        )
    average, table = AVERAGINGS[averaging], torch.from_numpy(np.ascontiguousarray(weights))
    for a_name, b_name in _pairs(stack.shapes):
        a, b = stack.rows(a_name), stack.rows(b_name)  # (C, R, D_in), (C, D_out, R)
        mixed_a, mixed_b = average(a, b, table.to(a.device))
        yield ({} if mixed_a is None else {a_name: mixed_a}) | {b_name: mixed_b}
    for name in stack.shapes:
        if not is_lora(name):
            rows = stack.rows(name)
            yield {name: _averaged(rows, table.to(rows.device))}


def _averaged(rows: Tensor, weights: Tensor) -> Tensor:
    """Mix rows in float64: (C, *shape) -> (C, *shape), float32."""
    flat = rows.flatten(1)
    mixed = torch.empty_like(flat, dtype=torch.float32)
    for part in _columns(*flat.shape):
        mixed[:, part] = weights @ flat[:, part].double()
    return mixed.view(rows.shape)


def _mix_factors(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return _averaged(a, weights), _averaged(b, weights)


def _mix_b(a: Tensor, b: Tensor, weights: Tensor) -> tuple[None, Tensor]:
    return None, _averaged(b, weights)


def _mix_products(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j W_ij B_j A_j = L R with L (D_out, CR) and R (CR, D_in), so its SVD is that of a small core.

    The result is B = U √S, A = √S Vᵀ, the best approximation of the mixture at rank R. Directions that the mixture
    does not use get the mixed A with B = 0, as LoRA starts: were both zero, no gradient would ever reach them. A
    client that mixes only from itself keeps its factors as they are.
    """
    a, b = a.double(), b.double()
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
    return mixed_a.float(), mixed_b.float()


AVERAGINGS = {"factors": _mix_factors, "freeze_a": _mix_b, "product": _mix_products}
"""How two adapters become one."""
