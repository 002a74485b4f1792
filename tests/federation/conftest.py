from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pplr.backbones.causal_lm import CausalLM
from pplr.config import Config
from pplr.federation.checkpoints import CheckpointStore
from pplr.federation.rounds import Federation, run_rounds
from pplr.progress import Silent
from pplr.runtimes.assembly import Assembly


@pytest.fixture(scope="session")
def draw_adapters() -> Callable[..., list[dict[str, Tensor]]]:
    """Draw adapters with names as PEFT gives them; a client of scale 0 is all zeros."""

    def draw(
        scales: Sequence[float], *, rank: int = 2, width_in: int = 5, width_out: int = 4, layers: int = 2, seed: int = 0
    ) -> list[dict[str, Tensor]]:
        source = torch.Generator().manual_seed(seed)
        states = []
        for scale in scales:
            state = {}
            for layer in range(layers):
                name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
                state[f"{name}.lora_A.weight"] = scale * torch.randn(rank, width_in, generator=source)
                state[f"{name}.lora_B.weight"] = scale * torch.randn(width_out, rank, generator=source)
            states.append(state)
        return states

    return draw


@dataclass
class Rounds:
    """Server rounds that were carried out."""

    assembly: Assembly
    federation: Federation
    config: Config
    folder: Path
    validated: list[str] = field(default_factory=list)

    def adapters(self) -> dict[str, dict[str, Tensor]]:
        return {client.name: client.model.adapter() for client in self.federation.clients}


@pytest.fixture
def carry_out(tmp_path: Path, small_config: Callable[..., Config], backbone: CausalLM) -> Callable[..., Rounds]:
    """Carry out server rounds without testing the adapters afterwards."""

    def carry(*settings: str, prepare: Callable[[Federation], Any] = lambda _: None) -> Rounds:
        config = small_config(*settings)
        folder = tmp_path / f"run {len(list(tmp_path.iterdir()))}"
        assembly = Assembly(config, Silent(), backbone)
        federation = assembly.federation()
        prepare(federation)
        store = CheckpointStore(folder / "checkpoints", keep=config.run.checkpoints, warn=lambda _: None)
        run_rounds(federation, config, store, Silent(), folder)
        return Rounds(assembly, federation, config, folder)

    return carry
