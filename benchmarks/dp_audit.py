"""Audit what private training claims, on one client's real users: canaries in or out, with noise and with none.

For each noise there is a positive control: the same private training, with the same claim, whose noise is zero. It must
be found out: what is proved of it must lie above the claim, or the audit could not have told that noise was missing.

    python -m benchmarks.dp_audit configs/movielens_item_vectors.yaml --canaries 100 --set federation.rounds=2
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import at_least, at_most, write_result
from pplr.config import Config
from pplr.config_files import load_config
from pplr.data.prompts import Sample
from pplr.errors import PplrError
from pplr.federation.client import FederatedClient
from pplr.privacy.audits.canary import audit_client, draw_canaries
from pplr.privacy.coins import SecretCoins
from pplr.privacy.ledger import Ledger
from pplr.progress import Silent
from pplr.runtimes.assembly import Assembly

HONEST = (
    "data.catalog=all",
    "federation.patience=null",
    "federation.heating_scale=null",
    "federation.weighting=uniform",
)
LENGTH = 6
"""Items of a canary."""


class NoiselessCoins(SecretCoins):
    """Coins whose normal numbers are all zero, for the control; no setting of pplr leads to them.

    Args:
        coins: What everything else is drawn from.
    """

    def __init__(self, coins: SecretCoins) -> None:
        self._coins = coins

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Draw as they do."""
        return self._coins.uniform(count)

    def gaussian(self, shape: Sequence[int]) -> NDArray[np.float64]:
        """Draw nothing."""
        return np.zeros(tuple(shape))

    def seed(self) -> int:
        """Draw as they do."""
        return self._coins.seed()


class NoiselessLedger(Ledger):
    """A ledger that claims what it would with noise, and gives coins that have none."""

    def book(self, server_round: int, start_sha256: str, steps: int) -> SecretCoins:
        """Book as ever."""
        return NoiselessCoins(super().book(server_round, start_sha256, steps))


def audit(
    assembly: Assembly, config: Config, name: str, count: int, seed: int, kind: type[Ledger] = Ledger
) -> dict[str, Any]:
    """Audit one client's private training by a configuration.

    Args:
        assembly: The data and the model.
        config: The configuration to train by.
        name: The client.
        count: Canaries.
        seed: Of the canaries and of who is in.
        kind: Of the ledger: the real one, or the control's.
    """
    data, private = assembly.data, config.privacy.dp
    source = np.random.default_rng(seed)
    canaries = draw_canaries(count, len(data.dataset.catalog), LENGTH, source, len(data.dataset.user_ids))
    with tempfile.TemporaryDirectory() as folder:
        books = kind(Path(folder), name, private, "audit")

        def encode(samples: Sequence[Sample]) -> list[Any]:
            return assembly.backbone.encode(samples, data.dataset.catalog, config.data.history_items)

        def make(included: Sequence[Sample]) -> FederatedClient:
            samples = [*data.samples[name], *included]
            model = assembly.admit(name, assembly.initial, "audit")
            owners = [sample.user for sample in samples]
            return FederatedClient(name, encode(samples), model, lambda _: {}, owners=owners, books=books)

        began = time.perf_counter()
        try:
            found = audit_client(make, canaries, encode, config, assembly.method, source)
        finally:
            assembly.dismiss(name, "audit")
        claimed = books.epsilon()
    return {
        "noise_multiplier": private.noise_multiplier,
        "noise_is_there": kind is Ledger,
        "claimed_epsilon": claimed,
        "lower_bound": found.epsilon,
        "guesses": found.guesses,
        "correct": found.correct,
        "canaries": found.canaries,
        "delta": found.delta,
        "confidence": found.confidence,
        "seconds": time.perf_counter() - began,
    }


def compared(audits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold each lower bound to what it must be: below the claim, or above it where the noise is missing."""
    rows = []
    for own in audits:
        ratio, at = own["lower_bound"] / own["claimed_epsilon"], f"at noise {own['noise_multiplier']:g}"
        if own["noise_is_there"]:
            rows.append(at_most(f"audited ε {at}", "claimed ε", ratio, 1.0))
        else:
            rows.append(at_least(f"audited ε {at} that is missing", "claimed ε", ratio, 1.0))
    return rows


def told(found: dict[str, Any]) -> str:
    """Say in a line what an audit found; ``docs/dp.md`` shows those of the committed result."""
    kind = "" if found["noise_is_there"] else ", missing"
    return (
        f"noise {found['noise_multiplier']}{kind}: claimed ε {found['claimed_epsilon']:.3f}, at least "
        f"{found['lower_bound']:.3f} ({found['correct']} of {found['guesses']} guesses right), {found['seconds']:.0f} s"
    )


def main() -> None:
    """Audit each noise multiplier, and the same with its noise missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--client", default="0")
    parser.add_argument("--canaries", type=int, default=100)
    parser.add_argument("--noise", nargs="+", type=float, default=[3.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="overrides", metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    rows = []
    try:
        config = load_config(arguments.config, [*HONEST, *arguments.overrides])
        assembly = Assembly(config, Silent())
        for noise in arguments.noise:
            private = config.privacy.dp.model_copy(update={"noise_multiplier": noise})
            own = config.model_copy(update={"privacy": config.privacy.model_copy(update={"dp": private})})
            for kind in (Ledger, NoiselessLedger):
                rows.append(audit(assembly, own, arguments.client, arguments.canaries, arguments.seed, kind))
                print(told(rows[-1]), flush=True)
    except PplrError as error:
        sys.exit(f"error: {error}")
    write_result("dp_audit", {"client": arguments.client, "rows": compared(rows), "audits": rows})


if __name__ == "__main__":
    main()
