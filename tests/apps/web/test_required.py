"""Where CI asks for them, tests in a browser are never left out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.apps import conftest
from tests.apps.web.conftest import ROOT


@pytest.mark.parametrize(
    ("name", "value", "fails"),
    [
        ("PPLR_REQUIRE_BROWSER", "1", True),
        ("CI", "true", True),
        ("PPLR_REQUIRE_BROWSER", "0", False),
        ("CI", "false", False),
        ("CI", "", False),
    ],
)
def test_a_missing_browser_fails_where_it_is_required(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, fails: bool
) -> None:
    for other in ("PPLR_REQUIRE_BROWSER", "CI"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(conftest.shutil, "which", lambda _: None)
    both = (pytest.fail.Exception, pytest.skip.Exception)  # a skip that is not caught would skip this test
    with pytest.raises(both, match="install Debian's chromium") as told:
        conftest.chromium()
    assert told.type is both[not fails]


def test_ci_requires_it(tmp_path: Path) -> None:
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$1 $PPLR_REQUIRE_BROWSER"\n')
    make.chmod(0o755)
    told = subprocess.run(
        ["/bin/sh", str(ROOT / ".ci" / "run")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout == "test 1\n"
