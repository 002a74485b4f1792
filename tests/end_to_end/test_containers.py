"""The image and the compose file: linted, with no more rights than needed, and run without containers."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from typer.testing import CliRunner

from pplr.apps.cli import app
from pplr.storage import sha256_file
from tests.end_to_end.composition import ROOT, Composition, services
from tests.end_to_end.walk import PAGE, write_federation
from tests.packaging.building import build

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = ROOT / "pyproject.toml"
SENT = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
"""What the build's context holds."""
WRITES = {
    "server": ["./shops/server/state"],
    "north": ["./shops/north/state"],
    "south": ["./shops/south/state"],
    "train": ["./shops/server/runs"],
    "authority": ["./shops/authority"],
}


def called(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / words[0]), *map(str, words[1:])],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


# -- the image ----------------------------------------------------------------------------------------------------


def test_the_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    done = called("hadolint", "Dockerfile")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install torch\n")
    assert called("hadolint", tmp_path / "Dockerfile").returncode == 1


def test_the_image_is_pinned_and_runs_without_rights() -> None:
    (version,) = re.findall(r"^ARG PYTHON_VERSION=(.+)$", DOCKERFILE, re.M)
    assert re.fullmatch(r"3\.\d+\.\d+", version)
    assert len(re.findall(r"^FROM python:\$\{PYTHON_VERSION\}-slim-", DOCKERFILE, re.M)) == 2
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    (user,) = re.findall(r"^USER (\d+):(\d+)$", final, re.M)
    assert "0" not in user
    assert final.index("USER ") < final.index("ENTRYPOINT ")
    assert not re.search(r"^(ADD|COPY \.)", DOCKERFILE, re.M)


def test_the_image_has_what_its_packages_are_linked_with() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    installed = set(re.findall(r"apt-get install ([^&]*)", final)[0].split())
    assert final.index("apt-get install") < final.index("USER ")
    library = re.compile(rb"\blibgomp\.so\.1\b")
    (folder,) = find_spec("implicit").submodule_search_locations
    if any(library.search(path.read_bytes()) for path in Path(folder).rglob("*.so")):
        assert "libgomp1" in installed


def test_the_image_is_built_from_what_is_there_and_sent_to_the_daemon() -> None:
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M) for word in line.split()]
    assert sorted(SENT) == sorted(copied)
    for name in SENT:
        assert (ROOT / name).exists(), name


def test_the_wheel_is_built_from_what_the_daemon_gets(tmp_path: Path) -> None:
    for name in SENT:
        own = ROOT / name
        if own.is_dir():
            shutil.copytree(own, tmp_path / "context" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (tmp_path / "context").mkdir(exist_ok=True)
            shutil.copy(own, tmp_path / "context")
    names = [zipfile.ZipFile(build("wheel", tmp_path, source)).namelist() for source in (tmp_path / "context", ROOT)]
    assert sorted(names[0]) == sorted(names[1])


def test_the_image_has_the_extras_that_a_federation_needs() -> None:
    (extras,) = re.findall(r'^ARG EXTRAS="(.+)"$', DOCKERFILE, re.M)
    known = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {"network", "flower"} <= set(extras.split(",")) <= set(known)


# -- the compose file ---------------------------------------------------------------------------------------------


def test_the_compose_file_fits_its_schema(tmp_path: Path) -> None:
    check = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    done = called(*check, "compose.yaml")
    assert done.returncode == 0, done.stdout
    wrong = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    wrong["services"]["server"]["prots"] = []
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(wrong))
    assert called(*check, tmp_path / "compose.yaml").returncode == 1


@pytest.mark.parametrize("name", services())
def test_a_container_can_do_no_more_than_it_must(name: str) -> None:
    own = services()[name]
    assert own["user"] == "1000:1000"
    assert own["read_only"] is True
    assert own["cap_drop"] == ["ALL"]
    assert own["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "cap_add", "secrets"} & set(own)
    if name != "authority":  # it may take what the machine has, for a moment
        assert {"cpus", "memory", "pids"} <= set(own["deploy"]["resources"]["limits"])
    for mount in own["volumes"]:
        assert mount["bind"] == {"create_host_path": False}  # else Docker makes it, for root
    written = [mount["source"] for mount in own["volumes"] if not mount.get("read_only")]
    assert written == WRITES[name]


def test_a_client_sees_its_own_folder_and_reaches_the_server_alone() -> None:
    known = services()
    for name in ("north", "south"):
        assert all(mount["source"].startswith(f"./shops/{name}/") for mount in known[name]["volumes"])
        assert known[name]["networks"] == [name]
        assert set(known[name]["networks"]) <= set(known["server"]["networks"])
        assert "ports" not in known[name]
    assert [name for name, own in known.items() if any("authority" in m["source"] for m in own["volumes"])] == [
        "authority"
    ]


# -- what it runs -------------------------------------------------------------------------------------------------


def test_on_machines_of_their_own_the_certificate_has_every_name_that_the_compose_file_fixes(tmp_path: Path) -> None:
    section = PAGE.read_text(encoding="utf-8").partition("### Each party on its own machine")[2].partition("\n## ")[0]
    (init,) = re.findall(r"^docker compose run --rm authority (enroll init .*)$", section, re.M)
    with contextlib.chdir(tmp_path):
        result = CliRunner().invoke(app, shlex.split(init))
    assert result.exit_code == 0, result.output
    certificate = x509.load_pem_x509_certificate((tmp_path / "federation" / "server" / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    server = services()["server"]
    (address,) = (word.partition("=")[2] for word in server["command"] if word.startswith("--address="))
    (health,) = re.findall(r"--stage-server (\S+)", server["healthcheck"]["test"])
    (client,) = re.findall(r"^PPLR_SERVER=(\S+) docker compose up", section, re.M)
    (kits,) = re.findall(r"--address (\S+)", init)
    fixed = {own.partition(":")[0] for own in (address, health, client, kits)}
    assert fixed == {"server", "localhost", "fed.example.org"}
    assert fixed <= set(names.get_values_for_type(x509.DNSName))


@pytest.mark.slow
def test_the_commands_of_the_compose_file_are_a_federation(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    section = PAGE.read_text(encoding="utf-8").partition("## With containers")[2].partition("\n##")[0]
    commands = [line for block in re.findall(r"```sh\n(.*?)```", section, re.S) for line in block.splitlines()]
    assert len(commands) > 20
    (tmp_path / "shops" / "authority").mkdir(parents=True)
    write_federation(tmp_path, tmp_path / "shops" / "authority" / "whole")
    composition, before = Composition(tmp_path), {}
    try:
        for command in commands:
            line = command.replace("smollm2-135m", "whole")
            if "RUN" in line:
                (run,) = (tmp_path / "shops" / "north" / "state" / "runs").glob("*")
                line = line.replace("RUN", run.name)
            if " up " in line:
                before = read_only_files(tmp_path)
            composition.carry_out(line)
    finally:
        composition.walk.stop()
    metrics = json.loads((tmp_path / "shops" / "server" / "runs" / "shops" / "metrics.json").read_text())
    assert set(metrics["clients"]) == {"north", "south"}
    assert before
    assert read_only_files(tmp_path) == before
    assert "every adapter is in" in composition.walk.log("server")
    assert [path.parent.parent.name for path in (tmp_path / "shops").rglob("ca.key")] == ["authority"]


def read_only_files(folder: Path) -> dict[str, str]:
    """Hash what services mount read-only from folders that no service writes."""
    mounts = [mount for own in services().values() for mount in own["volumes"]]
    written = {mount["source"] for mount in mounts if not mount.get("read_only")}
    sources = [folder / mount["source"] for mount in mounts if mount["source"] not in written]
    files = [path for source in sources for path in ([source] if source.is_file() else source.rglob("*"))]
    return {str(path): sha256_file(path) for path in files if path.is_file()}
