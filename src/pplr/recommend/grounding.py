"""From what the model wrote to scores for real items.

Two ways, both over the full catalog: the distance between a generated text and every title in the base model's
embedding space (BIGRec's), and the beams of a search that walks a trie of the titles.

Several items may share a title. Text cannot tell them apart, so all items of a title get the same score, and the
metrics break that tie pessimistically.

Shapes: B rows, N items, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pplr.errors import DataError

__all__ = ["l2_scores", "trie_scores"]


def l2_scores(queries: Tensor, items: Tensor, *, chunk_items: int = 65_536) -> Tensor:
    r"""Score every item by its nearness to each query.

    s_bn = -‖q_b - e_n‖₂

    The differences are squared and summed as they are, in float32. The faster ‖q‖² + ‖e‖² - 2 q·e is not used: the
    embeddings of a language model lie far from the origin and near each other, so it would cancel most digits.
    Equal embeddings get exactly equal scores.

    Args:
        queries: (B, D) embeddings, of any float type.
        items: (N, D) embeddings, of any float type and on any device.
        chunk_items: Items widened to float32 at once; it bounds the memory and does not change the result.

    Returns:
        (B, N) float32 on the device of ``queries``; 0 for an item at the query, negative elsewhere.

    Raises:
        DataError: The widths differ.

    Example:
        >>> l2_scores(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[-5., -0.]])
    """
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1]:
        raise DataError(
            f"queries {tuple(queries.shape)} and items {tuple(items.shape)} do not share a width",
            cure="Embed texts and titles with the same base model.",
        )
    wide = queries.float()  # (B, D)
    scores = torch.empty(len(queries), len(items), dtype=torch.float32, device=queries.device)
    for start in range(0, len(items), chunk_items):
        chunk = items[start : start + chunk_items].to(device=queries.device, dtype=torch.float32)
        distances = torch.cdist(wide, chunk, compute_mode="donot_use_mm_for_euclid_dist")  # (B, chunk)
        scores[:, start : start + len(chunk)] = -distances
    return scores


def trie_scores(
    beams: Sequence[Sequence[tuple[tuple[int, ...], float]]],
    items: Tensor,
    title_of: NDArray[np.int64] | Sequence[int] | None = None,
) -> Tensor:
    r"""Score every item from the titles that a constrained beam search wrote.

    Items of the generated titles come first: with M different beam scores in a row, those of the best beam get M,
    of the next M - 1, down to 1. All other items follow by nearness to the best beam's title, -‖e_best - e_n‖₂ ≤ 0.
    So no item that was not generated can pass or tie with one that was. Items of one title score the same; an item
    that several beams name counts for its best. A row without a beam scores 0 everywhere, which ranks nothing.

    Args:
        beams: For each of B rows, the items of a title and the score of its beam (sum of log-probabilities), in
            any order; :func:`pplr.recommend.trie.generated_titles` gives this.
        items: (N, D) embeddings of the items' titles by the base model.
        title_of: (N,) a number for each item's title (:attr:`pplr.recommend.trie.TitleTrie.title_of`). With it, the
            first item's embedding stands for all items of a title, so that they tie exactly; without it, equal
            titles must have equal embeddings.

    Returns:
        (B, N) float32 on the device of ``items``.

    Raises:
        DataError: A beam has no items or a score that is NaN, or an item is outside the catalog.

    Example:
        >>> beams = [[((2,), -0.5), ((0, 3), -1.0)]]
        >>> trie_scores(beams, torch.tensor([[0.0], [1.0], [3.0], [0.0]]))
        tensor([[ 1., -2.,  2.,  1.]])
    """
    scores = torch.zeros(len(beams), len(items), dtype=torch.float32, device=items.device)
    ordered = [_best_first(row, len(items)) for row in beams]
    rows = [row for row, own in enumerate(ordered) if own]
    if rows:
        best = torch.tensor([ordered[row][0][0][0] for row in rows], device=items.device)
        if title_of is None:
            scores[rows] = l2_scores(items[best], items)
        else:
            numbers = torch.as_tensor(np.asarray(title_of, dtype=np.int64), device=items.device)
            first = torch.as_tensor(_first_of_each(np.asarray(title_of, dtype=np.int64)), device=items.device)
            scores[rows] = l2_scores(items[first[numbers[best]]], items[first])[:, numbers]
    for row in rows:
        levels = sorted({score for _, score in ordered[row]})
        place = {score: float(level) for level, score in enumerate(levels, start=1)}
        for titled, score in reversed(ordered[row]):  # the best last, so that it stays
            scores[row, list(titled)] = place[score]
    return scores


def _best_first(row: Sequence[tuple[tuple[int, ...], float]], item_count: int) -> list[tuple[tuple[int, ...], float]]:
    for titled, score in row:
        if not titled or math.isnan(score) or min(titled) < 0 or max(titled) >= item_count:
            raise DataError(
                f"a beam of items {titled[:5]} with score {score} does not fit a catalog of {item_count} items",
                cure="Read the beams with generated_titles and the trie of this catalog.",
            )
    return sorted(row, key=lambda beam: -beam[1])


def _first_of_each(title_of: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each title number from 0 to the largest, its first item; numbers that do not occur stand for item 0."""
    first = np.zeros(int(title_of.max()) + 1, dtype=np.int64)
    first[title_of[::-1]] = np.arange(len(title_of))[::-1]
    return first
