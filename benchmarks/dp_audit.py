"""Audit what private training claims, on one client's real users: canaries in or out, with and without noise.

The last rows are a positive control: the same training without noise must be found out.

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

from benchmarks.measuring import at_least, at_most, write_result
from pplr.config import Config
from pplr.config_files import load_config
from pplr.data.prompts import Sample
from pplr.errors import PplrError
from pplr.federation.client import FederatedClient
from pplr.privacy.audits.canary import audit_client, draw_canaries
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


def audit(assembly: Assembly, config: Config, name: str, count: int, seed: int) -> dict[str, Any]:
    """Audit one client's training by a configuration.

    Args:
        assembly: The data and the model.
        config: The configuration to train by.
        name: The client.
        count: Canaries.
        seed: Of the canaries and of who is in.
    """
    data, private = assembly.data, config.privacy.dp
    source = np.random.default_rng(seed)
    canaries = draw_canaries(count, len(data.dataset.catalog), LENGTH, source, len(data.dataset.user_ids))
    with tempfile.TemporaryDirectory() as folder:
        books = Ledger(Path(folder), name, private, "audit") if private.is_on else None

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
        claimed = None if books is None else books.epsilon()
    return {
        "noise_multiplier": private.noise_multiplier,
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
    """Hold each lower bound to what it must be: below the claim, or above 1 where there is no noise."""
    rows = []
    for own in audits:
        if own["claimed_epsilon"] is None:
            rows.append(at_least("audited ε without noise", "an ε of 1", own["lower_bound"], 1.0))
        else:
            name = f"audited ε at noise {own['noise_multiplier']:g}"
            rows.append(at_most(name, "claimed ε", own["lower_bound"] / own["claimed_epsilon"], 1.0))
    return rows


def told(found: dict[str, Any]) -> str:
    """Say in a line what an audit found; ``docs/dp.md`` shows those of the committed result."""
    claim = "none" if found["claimed_epsilon"] is None else f"{found['claimed_epsilon']:.3f}"
    return (
        f"noise {found['noise_multiplier']}: claimed ε {claim}, at least {found['lower_bound']:.3f} "
        f"({found['correct']} of {found['guesses']} guesses right), {found['seconds']:.0f} s"
    )


def main() -> None:
    """Audit each noise multiplier, and training without noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--client", default="0")
    parser.add_argument("--canaries", type=int, default=100)
    parser.add_argument("--noise", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="overrides", metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    rows = []
    try:
        config = load_config(arguments.config, [*HONEST, *arguments.overrides])
        assembly = Assembly(config, Silent())
        for noise in [*arguments.noise, None]:
            private = config.privacy.dp.model_copy(update={"noise_multiplier": noise})
            own = config.model_copy(update={"privacy": config.privacy.model_copy(update={"dp": private})})
            rows.append(audit(assembly, own, arguments.client, arguments.canaries, arguments.seed))
            print(told(rows[-1]))
    except PplrError as error:
        sys.exit(f"error: {error}")
    write_result("dp_audit", {"client": arguments.client, "rows": compared(rows), "audits": rows})


if __name__ == "__main__":
    main()
