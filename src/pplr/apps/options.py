"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["ConfigPath", "RunDir", "Settings"]

ConfigPath = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A YAML file; all defaults when absent.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field, its value in YAML. Repeatable."),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")]
