"""The one registry of sources, and the way from a configuration to a dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pplr.config import DataConfig
from pplr.data.cleaning import RawTables, clean
from pplr.data.fetching import Notify
from pplr.data.interactions import Dataset
from pplr.errors import SourceError, nearest
from pplr.storage import cache_dir

__all__ = ["Reader", "Source", "fetch_source", "load_dataset", "register_source", "source_folder", "sources"]

Reader = Callable[[Path, DataConfig], RawTables]


@dataclass(frozen=True)
class Source:
    """One registered source.

    Args:
        name: What ``data.source`` says.
        summary: One line for a person who chooses.
        needs: Which files its folder holds.
        read: Reads a folder or a file.
        fetch: Fetches the files once into the cache, told in one line; ``None`` when a person must get them.
    """

    name: str
    summary: str
    needs: str
    read: Reader
    fetch: Callable[[Notify | None], Path] | None = None


_SOURCES: dict[str, Source] = {}


def register_source(
    name: str, *, summary: str, needs: str, fetch: Callable[[Notify | None], Path] | None = None
) -> Callable[[Reader], Reader]:
    """Register the decorated reader under a name; several names may share one reader.

    Raises:
        ValueError: The name is taken.

    Example:
        >>> @register_source("my-log", summary="Our shop's log.", needs="log.csv")
        ... def read_log(path, config):
        ...     ...
        >>> sources()["my-log"].needs
        'log.csv'
        >>> _ = _SOURCES.pop("my-log")
    """

    def register(read: Reader) -> Reader:
        if name in _SOURCES:
            raise ValueError(f"a source is already registered as {name!r}")
        _SOURCES[name] = Source(name, summary, needs, read, fetch)
        return read

    return register


def sources() -> Mapping[str, Source]:
    """Return all registered sources by name."""
    return MappingProxyType(_SOURCES)


def source_folder(name: str) -> Path:
    """Return the cache folder of a source; files put there by hand are found as well."""
    return cache_dir() / "sources" / name


def fetch_source(name: str, *, notify: Notify | None = None) -> Path:
    """Return the folder of a source's raw files, fetched into the cache if they are not there.

    Args:
        name: A registered source.
        notify: Told in one line what was fetched; a cached source says nothing.

    Raises:
        SourceError: There is no such source, it cannot be reached, a file was altered, or only a person can get it.
    """
    source = _find(name)
    if source.fetch is not None:
        return source.fetch(notify)
    folder = source_folder(name)
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    raise SourceError(
        f"{name} cannot be fetched by pplr and data.path is not set",
        cure=f"Set data.path to where it is, or put {source.needs} into {folder}.",
    )


def load_dataset(config: DataConfig, *, notify: Notify | None = None) -> Dataset:
    """Fetch a source if needed, read it, clean it, and number its users and items.

    Args:
        config: Source, place and cleaning.
        notify: Told in one line what was fetched.

    Raises:
        SourceError: The source is unknown, missing, unreachable or altered.
        DataError: Its content cannot be used: a missing column, a rating that is no number, nothing left.
    """
    source = _find(config.source)
    path = fetch_source(source.name, notify=notify) if config.path is None else config.path.expanduser()
    return clean(source.name, source.read(path, config), config)


def _find(name: str) -> Source:
    try:
        return _SOURCES[name]
    except KeyError:
        raise SourceError(f"no source is called {name!r}", cure=nearest(name, _SOURCES)) from None
