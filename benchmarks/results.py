"""Write ``docs/results.md`` from ``results/``, with what was written by hand in ``docs/results_text/``.

python -m benchmarks.results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.claim_tables import claim_folders, claim_sections
from benchmarks.cold_start_tables import RESULT, cold_start_sections
from benchmarks.defence_tables import defence_section
from benchmarks.membership_tables import membership_section
from benchmarks.privacy_tables import privacy_section
from benchmarks.recommendation_tables import recommendation_sections
from benchmarks.tables import Section, page
from benchmarks.tuning_tables import tuning_section
from pplr.errors import PplrError
from pplr.storage import write_atomic

ROOT = Path(__file__).parent.parent
OPENING = (
    "Written by `python -m benchmarks.results` from `results/`, which comes from `python -m benchmarks.quality`, "
    "`benchmarks.sasrec`, `benchmarks.cold_start`, `benchmarks.tune`, `benchmarks.audit`, `benchmarks.membership`, "
    "`benchmarks.state_defence` and `benchmarks.claim`, and from `docs/results_text/`, which is written by hand. Full "
    "catalog, history masked, ties against the model; means over seeds with 95 % intervals (Student's t)."
)


def sections_of(results: Path) -> list[Section]:
    """Make all sections from a folder of results."""
    told: dict[str, dict[str, Any]] = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))
    }
    cold = {name: own for name, own in told.items() if RESULT in own}
    sections = recommendation_sections({name: own for name, own in told.items() if name not in cold})
    for name, own in cold.items():
        sections += cold_start_sections(name, own)
    for path in sorted((results / "privacy").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"membership": membership_section, "defences": defence_section}
        make = next((own for key, own in kinds.items() if key in found), privacy_section)
        sections.append(make(path.stem, found))
    for path in sorted((results / "tuning").glob("*.json")):
        sections.append(tuning_section(path.stem, json.loads(path.read_text(encoding="utf-8"))))
    for folder in claim_folders(results):
        sections += claim_sections(folder)
    return sections


def main(root: Path = ROOT) -> None:
    """Read, arrange and write."""
    docs = root / "docs"
    try:
        text = page("Results", OPENING, sections_of(root / "results"), docs / "results_text")
        write_atomic(docs / "results.md", text.encode())
    except PplrError as error:
        sys.exit(f"error: {error}")
    print("wrote docs/results.md")


if __name__ == "__main__":
    main()
