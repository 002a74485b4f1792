"""How Flower and Ray are kept to themselves: no telemetry, no look for updates, nothing installed at run time.

The last setting leaves the GPUs that are visible as they are, which Ray will do by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Final

from pplr.errors import ConfigError

__all__ = ["QUIET", "load_flower", "load_link"]

QUIET: Final[Mapping[str, str]] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def load_flower() -> ModuleType:
    """Import the module that carries orders over Flower.

    Raises:
        ConfigError: Flower is not installed.
    """
    return _load("pplr.runtimes.flower")


def load_link() -> ModuleType:
    """Import the module of the link, which needs no torch.

    Raises:
        ConfigError: Flower is not installed.
    """
    return _load("pplr.runtimes.flower_link")


def _load(module: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this runtime needs Flower, and {error.name} is not installed", cure="pip install 'pplr[flower]'"
        ) from error
