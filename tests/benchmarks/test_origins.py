"""The commit of a folder's files, in a repository made for it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.origins import commit_of


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "src" / "package"
    folder.mkdir(parents=True)
    (folder / "code.py").write_text("one = 1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=n@n", "commit", "--quiet", "--message", "one")
    return folder


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_folder(package: Path) -> None:
    assert commit_of(package) == git(package, "rev-parse", "--short=10", "HEAD")


def test_files_that_changed_since_are_told_and_those_elsewhere_are_not(package: Path) -> None:
    commit = commit_of(package)
    (package.parent / "result.json").write_text("{}")
    assert commit_of(package) == commit
    (package / "code.py").write_text("one = 2\n")
    assert commit_of(package) == f"{commit}, changed"


def test_an_installed_package_inside_a_repository_has_no_commit(package: Path) -> None:
    installed = package.parent.parent / "environment" / "package"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("one = 1\n")
    assert commit_of(installed) is None


def test_a_folder_outside_any_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_of(tmp_path) is None
