"""Where a model is divided: spans of blocks, half-open like ``range``."""

from __future__ import annotations

from dataclasses import dataclass

from pplr.config import ClientCutConfig
from pplr.errors import CutError

__all__ = ["CutPlan"]


@dataclass(frozen=True)
class CutPlan:
    """Which blocks the client holds and which the server.

    Args:
        input_layers: k, blocks after the embeddings that stay on the client.
        output_layers: m, blocks before the norm and the head that stay on the client.
        total_layers: L, all blocks.

    Raises:
        CutError: k + m leaves the server no block.

    Example:
        >>> plan = CutPlan(input_layers=2, output_layers=1, total_layers=30)
        >>> plan.input, plan.middle, plan.output
        (range(0, 2), range(2, 29), range(29, 30))
    """

    input_layers: int
    output_layers: int
    total_layers: int

    def __post_init__(self) -> None:
        if min(self.input_layers, self.output_layers) < 0:
            raise CutError(
                f"a cut with {self.input_layers} input and {self.output_layers} output layers",
                cure="Set both to 0 or more.",
            )
        if self.input_layers + self.output_layers >= self.total_layers and not self.is_whole:
            raise CutError(
                f"a cut with {self.input_layers} input and {self.output_layers} output layers leaves the server none "
                f"of the model's {self.total_layers}",
                cure=f"Lower cut.input_layers or cut.output_layers to at most {self.total_layers - 1} together, "
                "or set cut to null for the uncut model.",
            )

    @classmethod
    def make(cls, config: ClientCutConfig | None, total_layers: int) -> CutPlan:
        """Apply a configuration to a model of ``total_layers`` blocks; ``None`` is the uncut model."""
        if config is None:
            return cls(input_layers=total_layers, output_layers=0, total_layers=total_layers)
        if config.input_layers == total_layers and config.output_layers == 0:
            raise CutError(
                f"a cut with all {total_layers} blocks on the client", cure="Set cut to null for the uncut model."
            )
        return cls(config.input_layers, config.output_layers, total_layers)

    @property
    def is_whole(self) -> bool:
        """Whether the model is not cut at all."""
        return self.input_layers == self.total_layers and self.output_layers == 0

    @property
    def input(self) -> range:
        """Blocks of the input stage, on the client."""
        return range(self.input_layers)

    @property
    def middle(self) -> range:
        """Blocks of the middle stage, on the server."""
        return range(self.input_layers, self.total_layers - self.output_layers)

    @property
    def output(self) -> range:
        """Blocks of the output stage, on the client."""
        return range(self.total_layers - self.output_layers, self.total_layers)
