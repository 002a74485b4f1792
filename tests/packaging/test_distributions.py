"""What is in the wheel and in the source distribution, and what is not."""

from __future__ import annotations

import re
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser

import pytest
from packaging.requirements import Requirement

from tests.packaging.building import build
from tests.packaging.main_job import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The wheel's files."""
    with zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The source distribution's files and their bytes."""
    with tarfile.open(build("sdist", tmp_path_factory.mktemp("sdist"))) as archive:
        return {member.name.partition("/")[2]: member.size for member in archive.getmembers() if member.isfile()}


@pytest.fixture(scope="module")
def metadata(wheel: dict[str, bytes]) -> Message:
    (text,) = (content for name, content in wheel.items() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(text.decode())


def named(wanted: list[str], extras: dict[str, list[str]]) -> set[str]:
    """The packages that requirements name, those of the project's own extras written out."""
    names: set[str] = set()
    for own in map(Requirement, wanted):
        names |= {own.name.lower()} if own.name != "pplr" else named([t for e in own.extras for t in extras[e]], extras)
    return names


def tracked(folder: str) -> set[str]:
    """The files of a folder of the source tree, without what Python makes beside them."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in files}


def test_the_wheel_has_the_whole_package_and_the_configurations_and_nothing_else(wheel: dict[str, bytes]) -> None:
    package = {name.removeprefix("src/") for name in tracked("src/pplr")}
    configs = {f"pplr/{name}" for name in tracked("configs")}
    inside = {name for name in wheel if ".dist-info/" not in name}
    assert inside == package | configs
    for needed in (
        "pplr/py.typed",
        "pplr/apps/reports/templates/page.html",
        "pplr/runtimes/stage_pb2.py",
        "pplr/runtimes/stage_pb2.pyi",
        "pplr/runtimes/stage.proto",
        "pplr/configs/quickstart.yaml",
    ):
        assert needed in inside


def test_the_wheel_has_its_licence_and_its_command(wheel: dict[str, bytes]) -> None:
    own = {
        name.partition(".dist-info/")[2]: content.decode() for name, content in wheel.items() if ".dist-info" in name
    }
    assert own["licenses/LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "pplr = pplr.apps.cli:main" in own["entry_points.txt"]
    assert "Root-Is-Purelib: true" in own["WHEEL"]


def test_the_metadata_names_what_the_core_needs_and_every_extra(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    extras = PROJECT["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra")) == set(extras)
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    for extra, wanted in {"": PROJECT["dependencies"], **extras}.items():
        found = {
            own.name.lower()
            for own in needs
            if (own.marker is None) == (extra == "") and (own.marker is None or own.marker.evaluate({"extra": extra}))
        }
        assert found == named(wanted, extras), extra


def test_the_core_needs_nothing_of_a_server_a_page_or_a_plot(metadata: Message) -> None:
    core = {own.name for own in map(Requirement, metadata.get_all("Requires-Dist")) if own.marker is None}
    assert not core & {"flwr", "grpcio", "cryptography", "matplotlib", "nicegui", "jinja2", "pytest", "ray"}


def test_the_page_of_a_package_index_links_to_nothing_that_is_not_there(metadata: Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = metadata.get_payload()
    assert page.lstrip().startswith("# pplr")
    assert re.findall(r"\]\(([^)]+)\)", page)
    assert not re.findall(r"\]\((?!https?://|#)([^)]+)\)", page)
    assert "`docs/deploy.md`" in page


def test_the_source_distribution_builds_and_tests_but_holds_no_results(source: dict[str, int]) -> None:
    for folder in ("src/pplr", "configs", "tests"):
        assert tracked(folder) <= set(source), folder
    assert {"docs/deploy.md", "docs/references.bib", "Dockerfile", ".dockerignore", "compose.yaml"} <= set(source)
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", ".ci/run"} <= set(
        source
    )
    assert not [name for name in source if re.match(r"results/|benchmarks/results/|runs/|\.venv|.*__pycache__", name)]
    assert sum(source.values()) < 8_000_000


def test_every_configuration_in_the_wheel_is_that_of_the_repository(wheel: dict[str, bytes]) -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert wheel[f"pplr/configs/{path.name}"] == path.read_bytes()
