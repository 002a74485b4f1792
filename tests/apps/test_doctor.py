from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pplr.apps import doctor
from pplr.apps.cli import app


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what loads torch."""
    monkeypatch.setattr(doctor, "_IMPORTED", ())
    monkeypatch.setattr(doctor, "_cuda", lambda: "no device")
    monkeypatch.setattr(doctor, "_models", lambda broken, wanted: [])


@pytest.mark.usefixtures("light")
def test_what_is_in_the_cache_is_listed_with_its_size(cache: Path) -> None:
    assert "movielens-100k is not in the cache: run `pplr data fetch movielens-100k`." in doctor.examine().missing
    assert dict(doctor.examine().rows)["cache"] == f"{cache} (not made yet)"
    folder = cache / "sources" / "movielens-100k" / "recbole"
    folder.mkdir(parents=True)
    (folder / "ml-100k.inter").write_bytes(b"x" * 1500)
    rows = dict(doctor.examine().rows)
    assert rows["  sources/movielens-100k"] == "1.5 kB"
    assert rows["source movielens-100k"] == "in the cache"
    assert rows["source movielens-latest-small"] == "not in the cache"
    assert not any("movielens-100k" in line for line in doctor.examine().missing)


@pytest.mark.usefixtures("light", "cache")
def test_what_was_left_by_an_interrupted_fetch_does_not_count(cache: Path) -> None:
    (cache / "sources" / "movielens-100k" / ".recbole.abc").mkdir(parents=True)
    assert dict(doctor.examine().rows)["source movielens-100k"] == "not in the cache"


@pytest.mark.usefixtures("light", "cache")
def test_a_missing_package_makes_it_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_peft(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_peft)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "peft is not installed: run `pip install 'peft" in result.stdout


@pytest.mark.usefixtures("light", "cache")
def test_a_package_that_does_not_load_makes_it_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError(f"lib{name}.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "_IMPORTED", ("torch",))
    monkeypatch.setattr(importlib, "import_module", broken)
    findings = doctor.examine()
    assert not findings.usable
    assert findings.missing[0].startswith("torch cannot be imported (OSError: libtorch.so")
    assert dict(findings.rows)["cuda"] == "-"


@pytest.mark.usefixtures("light", "cache")
def test_a_package_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["polars>=1000", "ruff>=1; extra == 'dev'"])
    findings = doctor.examine()
    assert next(line for line in findings.missing if "does not fit" in line).endswith("'polars>=1000'`.")
    assert not any(line.startswith("ruff") for line in findings.missing)


@pytest.mark.usefixtures("light", "cache")
def test_little_disk_is_told_but_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LITTLE_DISK", 10**18)
    findings = doctor.examine()
    assert findings.usable
    assert findings.missing[-1].startswith("Only ")


@pytest.mark.usefixtures("light", "cache")
def test_a_machine_that_tells_nothing_gets_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_read", lambda path: "")
    rows = dict(doctor.examine().rows)
    assert rows["AVX-512"] == rows["bf16 arithmetic"] == "-"
    assert rows["memory"].endswith("- available")


@pytest.mark.slow
def test_this_installation_is_usable(cache: Path) -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "smollm2-135m is not in the cache: the first `pplr train` that uses it fetches it" in result.stdout
    model = cache / "models" / "smollm2-135m"
    model.mkdir(parents=True)
    (model / "manifest.json").write_text("{}")
    assert "smollm2-135m" not in "".join(doctor.examine().missing)
