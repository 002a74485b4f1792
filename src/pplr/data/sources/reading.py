"""Reading files into columns of text, and columns of text into checked numbers."""

from __future__ import annotations

import ast
import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import polars as pl

from pplr.data.text import decode_text
from pplr.errors import DataError, SourceError, nearest

__all__ = ["find_file", "json_lines", "numbers", "pick", "read_bytes", "read_delimited", "seconds"]

_GZIP: Final = b"\x1f\x8b"
_BROKEN: Final = (EOFError, gzip.BadGzipFile, zlib.error)


def find_file(path: Path, accepts: Callable[[str], bool], expected: str) -> Path:
    """Find the one file that a reader needs: the path itself, or the one file in the folder that fits.

    Args:
        path: A file, which is taken as it is, or a folder.
        accepts: Whether a file name fits.
        expected: What fits, for messages.

    Raises:
        SourceError: Nothing is there, nothing fits, or several files do.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise SourceError(f"there is no file or folder {path}", cure=f"Set data.path to {expected}.")
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    fitting = [name for name in names if accepts(name)]
    if len(fitting) == 1:
        return path / fitting[0]
    seen = ", ".join((fitting or names)[:8]) or "nothing"
    if fitting:
        raise SourceError(f"{path} holds several files that fit: {seen}", cure="Set data.path to the one file.")
    raise SourceError(f"{path} holds {seen}, expected {expected}", cure="Put the file there, or correct data.path.")


def read_bytes(path: Path) -> bytes:
    """Read a file whole, unpacked if it is gzip.

    Raises:
        SourceError: The file is missing, cannot be read, or is truncated.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == _GZIP else content
    except _BROKEN as error:
        raise _truncated(path) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def read_delimited(
    path: Path, *, separator: str = ",", quote: str | None = '"', names: Sequence[str] | None = None
) -> pl.DataFrame:
    """Read a text table (gzip or not, UTF-8 or not) into columns of text.

    Args:
        path: The file.
        separator: One character.
        quote: The quoting character, or ``None`` when quotes are ordinary text.
        names: Names of the columns of a file without a header; further columns are left out.

    Raises:
        SourceError: The file is missing or truncated.
        DataError: It is not such a table.
    """
    content = read_bytes(path)
    if not _is_utf8(content):
        content = decode_text(content).encode()
    try:
        frame = pl.read_csv(
            io.BytesIO(content),
            separator=separator,
            quote_char=quote,
            has_header=names is None,
            infer_schema=False,
        )
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{path} is empty", cure="Get the file again.") from error
    except pl.exceptions.PolarsError as error:
        problem = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} is not a table separated by {separator!r}: {problem}", cure="Check the file."
        ) from error
    if names is None:
        return frame
    if frame.width < len(names):
        raise DataError(
            f"{path} has {frame.width} columns separated by {separator!r}, expected {len(names)}: {', '.join(names)}",
            cure="Check that it is the right file.",
        )
    return frame.select(pl.nth(index).alias(name) for index, name in enumerate(names))


def pick(frame: pl.DataFrame, column: str, candidates: Sequence[str], path: Path) -> str:
    """Find which of a few names a table uses for a column that is needed.

    Raises:
        DataError: None of them, with the columns seen.
    """
    for candidate in candidates:
        if candidate in frame.columns:
            return candidate
    seen = ", ".join(frame.columns[:20])
    expected = " or ".join(repr(candidate) for candidate in candidates)
    hint = nearest(candidates[0], frame.columns)
    raise DataError(
        f"{path} has no column {expected} for the {column}, only: {seen}",
        cure=hint if hint.startswith("Did") else "Check that it is the right file, or name the column in data.columns.",
    )


def numbers(values: pl.Series, what: str, path: Path, *, needed: bool = False) -> pl.Series:
    """Turn a column into finite floats.

    Args:
        values: Text or numbers; empty text is missing.
        what: What a value is, for messages.
        path: The file, for messages.
        needed: Whether a missing value is an error.

    Raises:
        DataError: A value is not a number, with its row counted from 1.
    """
    text = values.cast(pl.String).str.strip_chars()
    missing = text.is_null() | (text == "")
    floats = text.cast(pl.Float64, strict=False)
    wrong = ~missing & ~floats.is_finite().fill_null(False)
    if needed:
        wrong |= missing
    if wrong.any():
        row = int(wrong.arg_max() or 0)
        more = f" (and {int(wrong.sum()) - 1} more)" if int(wrong.sum()) > 1 else ""
        seen = "is missing" if missing[row] else f"{text[row]!r} is not a number"
        raise DataError(f"{path}: row {row + 1}: the {what} {seen}{more}", cure="Correct the row, or remove it.")
    return floats


def seconds(times: pl.Series) -> pl.Series:
    """Bring Unix times to seconds; times beyond 10^11, the year 5138, are milliseconds."""
    scale = pl.when(times.name and pl.col(times.name).abs() > 1e11).then(1000.0).otherwise(1.0)
    return times.to_frame().select(pl.col(times.name) / scale).to_series()


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read one object from each line, gzip or not, holding one line in memory; lines are counted from 1.

    Lines of the oldest files are Python literals instead of JSON and are read as such.

    Raises:
        SourceError: The file is missing or truncated.
        DataError: A line is neither.
    """
    try:
        with _open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(line, number, path)
    except _BROKEN as error:
        raise _truncated(path) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _parse(line: bytes, number: int, path: Path) -> dict[str, Any]:
    text = decode_text(line)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise DataError(
                f"{path}: line {number} is not JSON: {text.strip()[:60]!r}", cure="Get the file again."
            ) from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: line {number} holds no object but {text.strip()[:60]!r}", cure="Check the file.")
    return found


def _open_binary(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    return gzip.open(path, "rb") if packed else path.open("rb")


def _is_utf8(content: bytes) -> bool:
    """Check bytes piece by piece, without a second copy of a large file."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(content), 1 << 20):
            decoder.decode(content[start : start + (1 << 20)])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _truncated(path: Path) -> SourceError:
    return SourceError(f"{path} is truncated or altered: gzip cannot unpack it", cure="Delete it and get it again.")


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(f"cannot read {path}: {error.strerror or error}", cure="Check that the file is there.")
