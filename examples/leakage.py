"""What leaves the house: attack a run at two cuts, and print what a server reads beside what recommendations are worth.

    python examples/leakage.py [RUN_DIR] [section.field=value ...]

Without a folder the quickstart is trained first. A deeper cut costs the client more and should give away less; noise on
what crosses gives away less still, and costs quality. Read each row as a trade.
"""

import sys
from pathlib import Path

import pplr
from pplr.apps.terminal import TerminalProgress

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
CUTS = ((0, 0), (1, 0))
"""Blocks of the client before and after the server's: none but the embeddings, or one block."""
NOISES = (0.0, 1.0)
"""As multiples of the size of the states themselves."""


def main(arguments: list[str]) -> None:
    """Audit a run, and lay its settings beside each other."""
    folders, settings = [own for own in arguments if "=" not in own], [own for own in arguments if "=" in own]
    if folders:
        run = pplr.open_run(folders[0])
    else:
        config = pplr.load_config(CONFIG, settings)
        run = pplr.train(config, "runs/examples/audited", resume=True, progress=TerminalProgress())

    told = run.audit(cuts=CUTS, noises=NOISES, knowledge=["own"])
    guess = told["baseline"]["item_f1"]["mean"]
    print(f" k  m  noise  {told['metric']:>8}  read of a history (F1; {guess:.2f} by guessing what is popular)")
    for found in told["settings"]:
        attacks = [own for own in found["audits"] if own.get("item_f1")]
        best = max(attacks, key=lambda own: own["item_f1"]["mean"])
        cut, read = found["cut"], best["item_f1"]
        print(
            f"{cut['input_layers']:>2} {cut['output_layers']:>2} {found['noise']:>6g}  {found['worth']['mean']:>8.4f}  "
            f"{read['mean']:.2f} ({read['low']:.2f} to {read['high']:.2f}), by {best['audit']}"
        )
    print(told["verdict"])


if __name__ == "__main__":
    main(sys.argv[1:])
