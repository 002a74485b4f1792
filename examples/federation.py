"""A federation from a configuration: train with the others and without, and see whether the difference is chance.

    python examples/federation.py [section.field=value ...]

Five clients share MovieLens-100K among them. The first run keeps every client alone (`local`); the others are held
against it over the same users.
"""

import sys
from pathlib import Path

import pplr
from pplr.apps.terminal import TerminalProgress

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
METHODS = ("local", "fedavg", "pplr")
METRIC = "ndcg@10"


def main(settings: list[str]) -> None:
    """Train each method once, and print what its clients gain."""
    runs = []
    for method in METHODS:
        config = pplr.load_config(CONFIG, [*settings, f"federation.method={method}"])
        folder = Path("runs/examples") / method
        runs.append(pplr.train(config, folder, resume=True, progress=TerminalProgress()))

    for method, run in zip(METHODS, runs, strict=True):
        last = run.rounds[-1]["clients"]
        print(f"{method}: {len(run.rounds)} rounds, training loss", {name: own["loss"] for name, own in last.items()})
        tested = run.evaluation()
        print(f"  {METRIC} overall {tested.overall()[METRIC]:.4f}, of clients", tested.spread([METRIC])[METRIC])

    for found in pplr.compare(runs, [METRIC]):
        sign = "more than chance" if found.is_one else "no more than chance"
        interval = f"95 % between {found.low:+.4f} and {found.high:+.4f}"
        print(f"{found.run} less local: {found.difference:+.4f}, {interval}, {found.users} users: {sign}")


if __name__ == "__main__":
    main(sys.argv[1:])
