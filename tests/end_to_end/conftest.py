"""What the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pplr.data.sources import fetch_source
from tests.end_to_end.commands import Driver
from tests.end_to_end.machines import SETTINGS, Place, write_movielens


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    made = Driver(tmp_path_factory.mktemp("commands"), {})
    yield made
    made.close()


@pytest.fixture
def machines(tmp_path: Path, small_config, model_folder: Path, commands: Driver) -> Iterator[Place]:
    config = small_config(f"backbone.model={model_folder}", *SETTINGS)
    made = Place(tmp_path, config, ("0", "1", "2"), commands)
    yield made
    made.stop()


@pytest.fixture
def real_machines(
    tmp_path: Path, small_config, model_folder: Path, shared_cache: Path, commands: Driver
) -> Iterator[Place]:
    """The same with real data: 24 users of MovieLens-100K."""
    data = write_movielens(fetch_source("movielens-100k"), tmp_path / "movielens")
    where = (f"data.path={data}", "data.partition.by=random", "data.partition.column=null")
    made = Place(tmp_path, small_config(f"backbone.model={model_folder}", *SETTINGS, *where), ("0", "1", "2"), commands)
    yield made
    made.stop()
