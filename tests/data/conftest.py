from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import settings

from pplr.data.interactions import Catalog, Dataset, Interactions

settings.register_profile("shared machine", deadline=None)  # a slow first call is no defect
settings.load_profile("shared machine")


def _dataset(
    histories: Sequence[Sequence[int]],
    *,
    times: Sequence[Sequence[float]] | None = None,
    items: int | None = None,
    genres: Sequence[str] | None = None,
    columns: dict[str, Sequence[str]] | None = None,
) -> Dataset:
    """Make a dataset of each user's items in order; `times` in order as well."""
    users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    flat = np.concatenate([np.asarray(history, dtype=np.int32) for history in histories])
    count = items if items is not None else int(flat.max()) + 1
    ids = tuple(f"i{item}" for item in range(count))
    return Dataset(
        name="drawn",
        user_ids=tuple(f"u{user}" for user in range(len(histories))),
        catalog=Catalog(ids, tuple(f"Title {i}" for i in ids), {"genre": tuple(genres)} if genres else {}),
        interactions=Interactions(
            users.astype(np.int32),
            flat.astype(np.int32),
            timestamps=None if times is None else np.concatenate([np.asarray(t, dtype=np.float64) for t in times]),
        ),
        user_attributes={key: tuple(values) for key, values in (columns or {}).items()},
    )


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Dataset]:
    return _dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path_factory.mktemp("cache")))
