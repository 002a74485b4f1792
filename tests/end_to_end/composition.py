"""A compose file carried out without containers: its commands, in its order, each in a folder that holds its mounts."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.end_to_end.machines import free_port
from tests.end_to_end.walk import LIMIT_S, Walk

ROOT = Path(__file__).parents[2]
INSIDE = "/work"


def services() -> dict[str, dict[str, Any]]:
    """Read the services, with every variable at its default."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "compose.yaml").read_text(encoding="utf-8"))
    assert "${" not in text
    return dict(yaml.safe_load(text)["services"])


class Composition:
    """Runs services as processes on loopback.

    A service's folder stands for ``/work`` and has a link for each of its mounts, so it finds nothing else there. A
    service's name stands for loopback, and its ports for free ones.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.services = folder, services()
        self.walk = Walk(folder)
        self.ports = {port.partition(":")[2]: str(free_port()) for port in self.services["server"]["ports"]}
        (folder / "bin").mkdir()
        program = folder / "bin" / "pplr"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m pplr.apps.cli "$@"\n')
        program.chmod(0o755)

    def here(self, word: str) -> str:
        """Put this machine's addresses in the place of the network's."""
        for inside, outside in self.ports.items():
            word = re.sub(rf"(?:\b(?:{'|'.join(self.services)})|0\.0\.0\.0)(?=:{inside}\b)", "localhost", word)
            word = re.sub(rf"\b{inside}\b", outside, word)
        return word

    def inside(self, name: str) -> Path:
        """Make a service's folder, once; what it mounts must be there."""
        mounts = self.services[name]["volumes"]
        if mounts[0]["target"] == INSIDE:
            return self.folder / mounts[0]["source"]
        folder = self.folder / "containers" / name
        folder.mkdir(parents=True, exist_ok=True)
        for mount in mounts:
            source, target = self.folder / mount["source"], folder / Path(mount["target"]).relative_to(INSIDE)
            assert source.exists(), f"{name} mounts {mount['source']}, which nobody made"
            if not target.is_symlink():
                target.symlink_to(source)
        return folder

    def settled(self, name: str) -> dict[str, str]:
        """Make a service's own environment."""
        own = self.services[name].get("environment", {})
        told = {key: value.replace(INSIDE, str(self.inside(name)), 1) for key, value in own.items()}
        return {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"} | told

    def healthy(self, name: str) -> bool:
        """Carry out a service's health check, as a shell does."""
        return not subprocess.run(
            self.here(self.services[name]["healthcheck"]["test"]), shell=True, check=False, capture_output=True,
            timeout=LIMIT_S, cwd=self.inside(name), env=self.walk.environment | self.settled(name),
        ).returncode  # fmt: skip

    def up(self, name: str) -> None:
        """Start a service after those it depends on, and wait until it is healthy, where that can be said."""
        if name in self.walk.running:
            return
        for other, condition in self.services[name].get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            self.up(other)
        words = [self.here(word) for word in self.services[name]["command"]]
        checked, serves = "healthcheck" in self.services[name], f" on localhost:{self.ports['8443']}"

        def ready(log: str) -> bool:
            return not checked or (serves in log and self.healthy(name))  # a check takes seconds: not in vain

        self.walk.start(name, words, ready, self.inside(name), self.settled(name))

    def carry_out(self, line: str) -> None:
        """Carry out a line of the page."""
        words = shlex.split(line)
        if words[:2] != ["docker", "compose"]:
            done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            return
        verb, *rest = words[2:]
        names = [word for word in rest if not word.startswith("--")]
        if verb == "build":
            assert all("build" in self.services[name] for name in names)
        elif verb == "up":
            for name in names:
                self.up(name)
        elif verb == "down":
            self.down()
        else:
            name, own = names[0], rest[rest.index(names[0]) + 1 :]
            if verb == "run":
                for other in self.services[name].get("depends_on", {}):
                    self.up(other)
                own = own or self.services[name]["command"]
            else:
                program, *own = own
                assert (verb, program) == ("exec", "pplr"), line
                assert name in self.walk.running, line
            self.walk.carry_out([self.here(word) for word in own], self.inside(name), self.settled(name))

    def down(self) -> None:
        """Stop all as `docker compose down` does: those first that depend on others."""
        for name, process in reversed(list(self.walk.running.items())):
            process.terminate()
            assert process.wait(100) == 0, self.walk.log(name)
        self.walk.running.clear()
