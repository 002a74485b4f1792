"""What training a decoder of LLaMA's shape costs, with LoRA on a frozen base: operations and memory, by arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["SHAPES", "Shape", "flops", "kept_bytes_per_token"]

ADAPTED = 2
"""Layers of a block that have an adapter: q_proj, D to D, and v_proj, D to the width of the values."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, and where it is cut.

    Args:
        width: D.
        blocks: L.
        heads: Attention heads.
        mlp_width: F.
        vocabulary: V; the head is not tied to the embeddings.
        input_layers: Blocks of the client's first stage.
        output_layers: Blocks of the client's last stage.
        value_width: Width of keys and of values, where fewer heads share them; D when absent.
    """

    width: int
    blocks: int
    heads: int
    mlp_width: int
    vocabulary: int
    input_layers: int
    output_layers: int
    value_width: int | None = None

    @property
    def values(self) -> int:
        """Width of keys and of values."""
        return self.width if self.value_width is None else self.value_width

    @property
    def block_weights(self) -> int:
        """Numbers in the matrices of one block: 2 D² for q and o, 2 D times the values' width, and 3 D F."""
        return 2 * self.width**2 + 2 * self.width * self.values + 3 * self.width * self.mlp_width

    @property
    def parameters(self) -> int:
        """Numbers of the whole base: blocks with two norms each, embeddings, last norm, head."""
        in_blocks = self.blocks * (self.block_weights + 2 * self.width)
        return in_blocks + 2 * self.vocabulary * self.width + self.width


SHAPES = {
    "llama-7b": Shape(
        width=4096, blocks=32, heads=32, mlp_width=11008, vocabulary=32000, input_layers=20, output_layers=1
    ),
    "tiny": Shape(width=64, blocks=4, heads=4, mlp_width=96, vocabulary=32000, input_layers=2, output_layers=1),
}
"""LLaMA-7B with the authors' cut, and one that a processor trains in seconds."""


def flops(shape: Shape, rank: int, rows: Iterable[tuple[int, int]]) -> dict[str, dict[str, int]]:
    """Count the operations of a forward and a backward pass, two for each multiply-add; padding does not count.

    Frozen matrices get no gradient, so their backward pass is one product, with the gradient of their outputs. What
    enters the first block needs none, so the products of its q, k and v have no backward pass. Of attention, the half
    that looks back counts, and twice as much in the backward pass (what a fused kernel computes again does not count).

    Args:
        shape: The decoder.
        rank: R of LoRA on q_proj and v_proj.
        rows: Tokens of each sample, and how many of them are targets.

    Returns:
        For ``forward`` and ``backward``: operations in the matrices of the ``blocks``, in ``attention``, in ``lora``
        and in the ``head``, which runs for targets only.
    """
    rows = list(rows)
    tokens, targets = sum(own for own, _ in rows), sum(own for _, own in rows)
    pairs = sum(own * (own + 1) // 2 for own, _ in rows)
    blocks = 2 * tokens * shape.blocks * shape.block_weights
    attention = 4 * pairs * shape.blocks * shape.width
    down = 2 * tokens * ADAPTED * rank * shape.width  # of A, in one block
    lora = down + 2 * tokens * rank * (shape.width + shape.values)  # with B
    head = 2 * targets * shape.width * shape.vocabulary
    return {
        "forward": {"blocks": blocks, "attention": attention, "lora": lora * shape.blocks, "head": head},
        "backward": {
            "blocks": blocks - 2 * tokens * shape.width * (shape.width + 2 * shape.values),
            "attention": 2 * attention,
            "lora": 2 * lora * shape.blocks - down,
            "head": head,
        },
    }


def kept_bytes_per_token(shape: Shape, rank: int, itemsize: int) -> int:
    """Count the bytes that one block keeps of a token for its backward pass, with LoRA's dropout on.

    Each norm keeps its input in float32; each adapter its dropout's scales, what came through, and the R between A
    and B; attention q, k, v, its output and a sum for each head; the feed-forward layer gate, its SiLU, and up.

    Args:
        shape: The decoder.
        rank: R of LoRA on q_proj and v_proj.
        itemsize: Bytes of a number.
    """
    norms = 2 * (shape.width + 1) * 4
    lora = ADAPTED * (2 * shape.width + rank) * itemsize
    attention = 4 * shape.width * itemsize + 4 * shape.heads
    return norms + lora + attention + 3 * shape.mlp_width * itemsize
