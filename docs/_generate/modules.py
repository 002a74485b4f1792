"""A page for each layer of the package, with its modules and what they name public."""

from __future__ import annotations

import importlib
import pkgutil

import pplr

__all__ = ["module_pages", "public_modules"]

_LAYERS = {
    "errors": "The exceptions, and how they hang together.",
    "data": "What happened: interactions, catalogs, sources, holdouts, partitions. Loads no torch.",
    "backbones": "The language model, whole.",
    "stages": "The language model, cut.",
    "recommend": "The task: training, generation, grounding, metrics.",
    "federation": "The method: similarity, heating, mixing, rounds. Knows no network.",
    "privacy": "What leaks, and what guards.",
    "runtimes": "Where a run runs: one process, Flower, a stage server.",
    "testing": "Tiny models, and contracts that a new backbone, transport or audit is held to.",
}
_BESIDE = ("config_files", "progress", "seeds", "storage", "lazy")
_ELSEWHERE = ("pplr.apps", "pplr.config")
"""Commands are public by their name on the command line, and the configuration has a reference of its own."""


def public_modules() -> list[str]:
    """List the modules that name what is public, as ``tests/test_public.py`` holds them to, without commands."""
    found = []
    for module in pkgutil.walk_packages(pplr.__path__, "pplr."):
        name = module.name
        elsewhere = any(name == own or name.startswith(f"{own}.") for own in _ELSEWHERE)
        if (
            not elsewhere
            and not name.endswith(("__main__", "_pb2"))
            and hasattr(importlib.import_module(name), "__all__")
        ):
            found.append(name)
    return sorted(found)


def module_pages() -> dict[str, str]:
    """Write a page for each layer, and one for the package itself."""
    modules = public_modules()
    pages = {"pplr": _package()}
    for layer, sentence in _LAYERS.items():
        own = [name for name in modules if name.split(".")[1] == layer]
        pages[f"pplr.{layer}"] = _page(f"pplr.{layer}", sentence, own)
    beside = [name for name in modules if name.split(".")[1] in _BESIDE]
    pages["beside"] = _page("Beside the layers", "What every layer may use.", beside)
    return pages


def _page(title: str, sentence: str, modules: list[str]) -> str:
    parts = [_heading(title, "="), sentence]
    for name in modules:
        parts += [_heading(name, "-"), f".. automodule:: {name}\n   :members:\n   :show-inheritance:"]
    return "\n\n".join(parts) + "\n"


def _package() -> str:
    parts = [_heading("pplr", "="), "What ``import pplr`` gives. Names are loaded when they are first used."]
    for name, home in pplr._HOME.items():
        thing = getattr(pplr, name)
        role = "class" if isinstance(thing, type) else "func"
        sentence = (thing.__doc__ or "").strip().splitlines()[0]
        parts.append(f":{role}:`pplr.{name} <{home}.{name}>`\n    {sentence}")
    return "\n\n".join(parts) + "\n"


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}"
