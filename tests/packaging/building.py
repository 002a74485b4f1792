"""Building the project's distributions through its own build backend, as pip does, without fetching anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.packaging.main_job import ROOT

BUILD = "import sys, hatchling.build as own; print(getattr(own, 'build_' + sys.argv[1])(sys.argv[2]))"


def build(kind: str, folder: Path, source: Path = ROOT) -> Path:
    """Build a ``wheel`` or an ``sdist`` of a source tree into a folder."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(folder)],
        cwd=source, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]
