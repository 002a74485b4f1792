"""Writing a dataset as RecBole's atomic files, which the source ``recbole`` reads back to an equal dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pplr.data.interactions import Dataset
from pplr.errors import DataError, StorageError
from pplr.storage import write_atomic

__all__ = ["write_atomic_files"]


def write_atomic_files(dataset: Dataset, folder: Path) -> list[Path]:
    """Write ``X.item``, ``X.user`` if users have attributes, and last ``X.inter``; X is the folder's name.

    Events come in the order of the input, which breaks ties in time when they are read back.

    Args:
        dataset: What to write.
        folder: Made if needed; it must not hold atomic files yet.

    Returns:
        The files written.

    Raises:
        StorageError: The folder is a file, holds an ``.inter`` file, or cannot be written.
        DataError: An id holds a tab or the end of a line, which the format cannot express.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file, not a folder", cure="Choose another --out.")
    if found := sorted(folder.glob("*.inter")):
        raise StorageError(f"{folder} already holds {found[0].name}", cure="Choose another --out, or delete it.")
    catalog, name = dataset.catalog, folder.resolve().name
    for kind, ids in (("user", dataset.user_ids), ("item", catalog.item_ids)):
        if bad := next((one for one in ids if set(one) & set("\t\n\r")), None):
            raise DataError(f"the {kind} id {bad!r} holds a tab or the end of a line", cure="Replace it in the file.")
    items = {"item_id:token": catalog.item_ids, "title:token_seq": catalog.titles}
    written = [(folder / f"{name}.item", _described(items, catalog.attributes, "item"))]
    if dataset.user_attributes:
        users = {"user_id:token": dataset.user_ids}
        written.append((folder / f"{name}.user", _described(users, dataset.user_attributes, "user")))
    written.append((folder / f"{name}.inter", _events(dataset)))
    for path, frame in written:
        content = frame.write_csv(separator="\t", quote_style="never")
        write_atomic(path, content.encode())
    return [path for path, _ in written]


def _described(
    columns: Mapping[str, Sequence[str]], attributes: Mapping[str, Sequence[str]], kind: str
) -> pl.DataFrame:
    """Add attributes as single tokens, so that their spaces stay; one named as the format names ids is renamed."""
    taken = {kind, f"{kind}_id", "title"}
    found = dict(columns)
    for name, values in attributes.items():
        name = " ".join(name.split())
        while name in taken:
            name = f"other_{name}"
        taken.add(name)
        found[f"{name}:token"] = values
    return pl.DataFrame({name: pl.Series(values, dtype=pl.String) for name, values in found.items()})


def _events(dataset: Dataset) -> pl.DataFrame:
    events = dataset.interactions
    order = np.arange(len(events)) if events.rows is None else np.argsort(events.rows, kind="stable")
    user_ids, item_ids = (np.array(ids, dtype=object) for ids in (dataset.user_ids, dataset.catalog.item_ids))
    columns = {
        "user_id:token": pl.Series(user_ids[events.users[order]].tolist(), dtype=pl.String),
        "item_id:token": pl.Series(item_ids[events.items[order]].tolist(), dtype=pl.String),
    }
    if events.ratings is not None:
        columns["rating:float"] = _numbers(events.ratings[order])
    if events.timestamps is not None:
        columns["timestamp:float"] = _numbers(events.timestamps[order])
    return pl.DataFrame(columns)


def _numbers(values: NDArray[np.float32] | NDArray[np.float64]) -> pl.Series:
    """Write floats with the fewest digits that read back the same, whole numbers without a fraction."""
    texts = ["" if np.isnan(value) else np.format_float_positional(value, trim="-", unique=True) for value in values]
    return pl.Series(texts, dtype=pl.String)
