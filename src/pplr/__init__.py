"""Privacy-preserving LLM-based recommendation.

A federation of clients trains one recommender around a language model that is cut between client and server.

Example:
    >>> import pplr
    >>> pplr.load_config(overrides=["federation.clients=3"]).federation.clients
    3
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pplr.config import Config
    from pplr.config_files import config_template, load_config
    from pplr.errors import PplrError
    from pplr.runtimes.address import StageServerAt
    from pplr.runtimes.comparing import Difference, compare
    from pplr.runtimes.launch import load_data, train
    from pplr.runtimes.run import Recommendation, Run, open_run
    from pplr.runtimes.run_data import RunData

__version__ = "0.1.0.dev0"

__all__ = [
    "Config",
    "Difference",
    "PplrError",
    "Recommendation",
    "Run",
    "RunData",
    "StageServerAt",
    "__version__",
    "compare",
    "config_template",
    "load_config",
    "load_data",
    "open_run",
    "train",
]

_HOME = {
    "Config": "pplr.config",
    "Difference": "pplr.runtimes.comparing",
    "PplrError": "pplr.errors",
    "Recommendation": "pplr.runtimes.run",
    "Run": "pplr.runtimes.run",
    "RunData": "pplr.runtimes.run_data",
    "StageServerAt": "pplr.runtimes.address",
    "compare": "pplr.runtimes.comparing",
    "config_template": "pplr.config_files",
    "load_config": "pplr.config_files",
    "load_data": "pplr.runtimes.launch",
    "open_run": "pplr.runtimes.run",
    "train": "pplr.runtimes.launch",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that ``import pplr`` stays light."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pplr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
