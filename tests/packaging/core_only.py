"""Run in a process of its own: import every module, then do the main job, where only the core's packages are found.

python tests/packaging/core_only.py STEPS.json: what failed is printed as JSON.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(wanted: Iterable[str]) -> set[str]:
    """Name the distributions that requirements bring along, without extras."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = [Requirement(text) for text in wanted]
    while waiting:
        requirement = waiting.pop()
        name = normal(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            waiting += [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # for another platform or Python
            continue
    return found


def hidden_modules(core: set[str], distributions: Mapping[str, list[str]]) -> set[str]:
    """Name the modules that no distribution of the core brings."""
    return {
        module
        for module, own in distributions.items()
        if module != "pplr" and not core & {normal(name) for name in own}
    }


class OnlyCore(PathFinder):
    """Finds what is on the path, as if nothing but the core were installed."""

    hidden: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] in cls.hidden:
            return None
        return PathFinder.find_spec(fullname, path, target)


def hide() -> None:
    core = closure(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"])
    OnlyCore.hidden = frozenset(hidden_modules(core, packages_distributions()))
    sys.meta_path = [OnlyCore if finder is PathFinder else finder for finder in sys.meta_path]
    for name in [name for name in sys.modules if name.partition(".")[0] in OnlyCore.hidden]:
        del sys.modules[name]


def imports() -> dict[str, str | None]:
    """Import every module; tell which package each lacks."""
    import pplr

    found: dict[str, str | None] = {}
    for module in pkgutil.walk_packages(pplr.__path__, "pplr.", onerror=lambda name: None):
        try:
            importlib.import_module(module.name)
            found[module.name] = None
        except ModuleNotFoundError as error:
            found[module.name] = error.name
    return found


def main() -> None:
    from typer.testing import CliRunner

    from pplr.apps.cli import app

    steps = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    told = []
    for arguments in steps:
        result = CliRunner().invoke(app, arguments)
        unexpected = result.exception if not isinstance(result.exception, SystemExit | None) else None
        told.append({"code": result.exit_code, "output": result.output, "exception": repr(unexpected)})
    print(json.dumps({"hidden": sorted(OnlyCore.hidden), "imports": imports(), "steps": told}))


if __name__ == "__main__":
    hide()
    main()
