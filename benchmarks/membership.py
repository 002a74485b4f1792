"""Whether an adapter tells who was trained on, kept in ``results/privacy/NAME.json``.

A configuration is trained several times, each time without half of the users, or without some interactions. The server,
another client and an outsider guess who was in. Seeds draw other halves and train anew.

    python -m benchmarks.membership configs/movielens_item_vectors.yaml --name membership-users
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine, quality_parser
from pplr.config_files import load_config
from pplr.errors import PplrError
from pplr.progress import Silent
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.membership import MembershipSettings, audit_membership
from pplr.storage import write_json

ROOT = Path(__file__).parent.parent


class Notes(Silent):
    """Prints what is noted."""

    def note(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)


def line_of(attack: dict[str, Any]) -> str:
    """Say in one line what an attack found."""
    rates = [f"{name} {own['value']:.3f}" for name, own in attack.items() if name.startswith("tpr@") and own]
    area = attack["auc"]
    found = f"AUC {area['value']:.3f} ({area['low']:.3f} to {area['high']:.3f})"
    return ", ".join([f"{attack['attacker']}, {attack['attack']}: {found}", *rates])


def main() -> None:
    """Train and attack with every seed, and write what came out."""
    parser = quality_parser(__doc__)
    parser.add_argument("--unit", choices=("user", "interaction"), default="user")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of trainings")
    parser.add_argument("--lists", type=int, default=4, help="lists of each user that the outsider sees")
    parser.add_argument("--interactions", type=int, default=4, help="most interactions of a user that are tried")
    arguments = parser.parse_args()
    told: list[dict[str, Any]] = []
    try:
        config = load_config(arguments.config, [*arguments.overrides, "federation.patience=null"])
        assembly = Assembly(config, Silent())
        for seed in arguments.seeds:
            settings = MembershipSettings(
                unit=arguments.unit,
                pairs=arguments.pairs,
                lists=arguments.lists,
                interactions=arguments.interactions,
                seed=seed,
            )
            told.append(audit_membership(assembly, settings, Notes()))
            print(f"seed {seed}", *map(line_of, told[-1]["attacks"]), sep="\n", flush=True)
    except PplrError as error:
        sys.exit(f"error: {error}")
    path = ROOT / "results" / "privacy" / f"{arguments.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.membership", *sys.argv[1:]])
    write_json(path, {"command": command, "machine": machine(), "membership": told})
    print(f"wrote results/privacy/{path.name}")


if __name__ == "__main__":
    main()
