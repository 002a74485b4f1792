"""What the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.machines import SETTINGS, Place


@pytest.fixture
def machines(tmp_path: Path, small_config, model_folder: Path) -> Iterator[Place]:
    config = small_config(f"backbone.model={model_folder}", *SETTINGS)
    made = Place(tmp_path, config, ("0", "1", "2"))
    yield made
    made.stop()
