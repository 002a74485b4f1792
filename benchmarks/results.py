"""Write ``docs/results.md`` from ``results/*.json``.

python -m benchmarks.results
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

ROOT = Path(__file__).parent.parent
METRICS = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")


def interval(values: Sequence[float]) -> str:
    """Tell a mean, with its 95 % interval over seeds (Student's t) where there is more than one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.4f} ± {half:.4f}"


def row(name: str, runs: Sequence[dict[str, Any]], more: Sequence[str] = ("", "", "")) -> str:
    """Make a table's row from the overall figures of some seeds."""
    cells = [interval([run["overall"][metric] for run in runs]) for metric in METRICS]
    return "| " + " | ".join([name, str(len(runs)), *cells, *more]) + " |"


def training_rows(name: str, told: dict[str, Any]) -> list[str]:
    """Rows of a configuration that pplr trained."""
    runs = told["runs"]
    worst = [run["spread"]["ndcg@10"]["worst"] for run in runs if run["spread"]["ndcg@10"]["worst"] is not None]
    minutes = statistics.fmean(run["seconds"]["total"] for run in runs) / 60
    rounds = "/".join(str(run["rounds"]) for run in runs)
    return [row(name, runs, (interval(worst) if worst else "", rounds, f"{minutes:.0f}"))]


def other_rows(told: dict[str, Any]) -> list[str]:
    """Rows of SASRec and of the floors."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, overall in told["overall"].items():
        kinds.setdefault(name.split(",")[0], []).append({"overall": overall})
    minutes = statistics.fmean(run["seconds"] for run in told["sasrec"]["runs"]) / 60
    epochs = "/".join(str(run["epochs"]) for run in told["sasrec"]["runs"])
    blank = ("", "", "")
    return [
        row(name, runs, ("", epochs, f"{minutes:.0f}") if name == "sasrec" else blank) for name, runs in kinds.items()
    ]


def main() -> None:
    """Read, arrange and write."""
    head = ["what", "seeds", *METRICS, "worst client's ndcg@10", "rounds or epochs", "minutes a seed"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    notes = []
    for path in sorted((ROOT / "results").glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        where = f"{told['machine']['processor']}, {told['machine']['threads']} threads"
        if "sasrec" in told:
            lines += other_rows(told)
            tried = ", ".join(f"{own['ndcg']:.4f}" for own in told["sasrec"]["tried"])
            notes.append(
                f"- sasrec (`results/{path.name}`, {told['requirements'][0]}): {told['users']} test users; settings "
                f"by validation NDCG@10 out of {len(told['sasrec']['tried'])} ({tried}): `{told['sasrec']['chosen']}`; "
                f"{where}."
            )
        else:
            lines += training_rows(path.stem, told)
            options = " ".join(f"--set {own}" for own in told["set"])
            notes.append(f"- {path.stem}: `pplr train {told['config']} {options}`; {where}.")
    text = (
        "# Results\n\nWritten by `python -m benchmarks.results` from `results/*.json`, which come from "
        "`python -m benchmarks.quality` and `python -m benchmarks.sasrec`. Leave-one-out on MovieLens-100K, full "
        "catalog, history masked; means "
        "over seeds with 95 % intervals (Student's t).\n\n" + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"
    )
    (ROOT / "docs" / "results.md").write_text(text, encoding="utf-8")
    print("wrote docs/results.md")


if __name__ == "__main__":
    main()
