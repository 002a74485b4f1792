"""``pplr init``: a configuration to start from, of those that come with pplr."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

import pplr
from pplr.errors import ConfigError, RunError, nearest

__all__ = ["init", "shipped_configs"]


def shipped_configs() -> dict[str, Path]:
    """Find the configurations that come with pplr, by name.

    A wheel has them inside the package, a source tree beside ``src``.

    Raises:
        ConfigError: There are none, so the installation is not whole.
    """
    package = Path(pplr.__file__).parent
    for folder in (package / "configs", package.parent.parent / "configs"):
        if found := {path.stem: path for path in sorted(folder.glob("*.yaml"))}:
            return found
    raise ConfigError(f"no configurations are in {package / 'configs'}", cure="Install pplr again.")


def init(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="Which: a quickstart, or the setting of a published result.")
    ] = "quickstart",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where; NAME.yaml when absent.")] = None,
    names: Annotated[bool, typer.Option("--list", help="Say which there are, and write nothing.")] = False,
) -> None:
    """Write a configuration to start from, ready to train and to edit."""
    from pplr.apps.tables import Table
    from pplr.apps.terminal import Screen
    from pplr.storage import write_atomic

    screen, known = Screen(), shipped_configs()
    if names:
        rows = [(own, _opening(path)) for own, path in known.items()]
        screen.table(Table(("name", "what it is"), rows, texts=("name", "what it is")))
        return
    if name not in known:
        raise ConfigError(
            f"no configuration is called {name!r}", cure=f"{nearest(name, known)} `pplr init --list` names all."
        )
    place = out or Path(f"{name}.yaml")
    if place.exists():
        raise RunError(f"{place} is there already", cure="Give another place with --out, or remove it.")
    write_atomic(place, known[name].read_bytes())
    screen.line(f"written: {place}")
    screen.line(f"train with: {shlex.join(['pplr', 'train', str(place)])}")


def _opening(path: Path) -> str:
    """Read the first sentence of a configuration's opening comment."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    sentence, dot, _ = " ".join(lines).partition(". ")
    return sentence + dot.strip()
