"""What a server reads where noise stays and the input stage moves: two states with one noise, less each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.privacy.audits import Attacker, make_audit
from pplr.privacy.observing import Observation, secret_of
from pplr.privacy.replica import Replica
from pplr.privacy.scoring import Reader, interval, score
from pplr.privacy.states import StateGuard
from pplr.runtimes.attacking import auxiliary_rows
from pplr.runtimes.run import Run
from pplr.seeds import derive_seed, generator

__all__ = ["attack_differences"]

_OPTIMIZER = "optimizer."


class Differences:
    """Takes the place of a :class:`Replica`: the states of two rounds of one client, the later less the earlier.

    Args:
        earlier: The client's stages at the earlier round.
        later: The same at the later one.
        noise: Draws noise that is added to both, of a shape.
        dtype: What states are rounded to on their way.
    """

    def __init__(
        self, earlier: Replica, later: Replica, noise: Callable[[torch.Size], Tensor], dtype: torch.dtype
    ) -> None:
        self._both, self._noise, self._dtype = (earlier, later), noise, dtype
        self.backbone = later.backbone
        self.vocabulary = later.vocabulary

    def crossing(self, rows: Tensor) -> Tensor:
        """Say what the difference would be without noise: (B, T) -> (B, T, D)."""
        earlier, later = (own.crossing(rows) for own in self._both)
        return later - earlier

    def states(self, rows: Tensor) -> Tensor:
        """Send both with one noise, as they are rounded, and take one from the other: (B, T) -> (B, T, D)."""
        earlier, later = (own.crossing(rows) for own in self._both)
        noise = self._noise(later.shape)
        return (later + noise).to(self._dtype).float() - (earlier + noise).to(self._dtype).float()


def attack_differences(run: Run, users: int) -> dict[str, Any]:
    """Attack what a client would have sent in two rounds if it kept its noise and went on training.

    pplr never sends that: its noise follows from the states themselves. The noise is that of the run's own setting.

    Args:
        run: A finished run of one trainer, with two checkpoints.
        users: How many are attacked.

    Returns:
        Each metric's mean over users with its interval.
    """
    parts, states = run.assembly(), run.config.privacy.states
    clip, deviation = StateGuard(states, bytes(32), "").clip, (states.noise_multiplier or 0) * (states.clip_norm or 0)
    source = torch.Generator().manual_seed(derive_seed(0, "one noise"))
    (earlier, later) = (
        Replica(parts.backbone, parts.plan, run.config.adapter, _adapter(run, place), clip) for place in (-2, -1)
    )
    both = Differences(
        earlier, later, lambda shape: deviation * torch.randn(shape, generator=source), parts.backbone.dtype
    )
    taken = np.zeros(len(parts.data.dataset.catalog), dtype=np.int64)
    for own in parts.data.holdout.train:
        np.add.at(taken, own, 1)
    popularity = torch.from_numpy(taken)
    catalog, most = parts.data.dataset.catalog, run.config.data.history_items
    newest = {own.user: (name, own) for name, samples in parts.data.samples.items() for own in samples}
    chosen = generator(0, "audited users").choice(sorted(newest), min(users, len(newest)), replace=False)
    secrets = [secret_of(parts.backbone, newest[u][1], newest[u][0], catalog, most) for u in sorted(chosen.tolist())]
    seen = []
    for secret in secrets:
        sent = both.states(torch.tensor([secret.tokens]))[0]
        seen.append(Observation(sent, sent, None))
    attacker = Attacker(
        "own", cast(Replica, both), catalog, popularity,
        lambda passes, seed: auxiliary_rows(parts.backbone, catalog, popularity, most, passes, seed),
    )  # fmt: skip
    guesses = make_audit("posterior_matching").attack(seen, attacker)
    reader = Reader(parts.backbone, catalog)
    found = interval([score(guess, secret, reader) for guess, secret in zip(guesses, secrets, strict=True)])
    return {"defence": run.folder.name, "users": len(secrets), **found}


def _adapter(run: Run, place: int) -> AdapterState:
    """Read a client's adapter at the end of one of the newest rounds."""
    folder = sorted(path for path in (run.folder / "checkpoints").iterdir() if path.is_dir())[place]
    (path,) = folder.glob("client-*.safetensors")
    return {name: own for name, own in load_file(path).items() if not name.startswith(_OPTIMIZER)}
