"""Where interactions come from: one registry, one file for each family of sources.

To add a source, write a function that reads it into :class:`~pplr.data.cleaning.RawTables`, decorate it with
:func:`register_source`, and import its file here.
"""

from __future__ import annotations

from pplr.data.sources import amazon, microlens, movielens, recbole, table  # noqa: F401  (importing registers)
from pplr.data.sources.registry import Source, fetch_source, load_dataset, register_source, source_folder, sources

__all__ = ["Source", "fetch_source", "load_dataset", "register_source", "source_folder", "sources"]
