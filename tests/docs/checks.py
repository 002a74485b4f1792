"""What a command on a page has to pass: the real parser of what it calls, and the real configuration."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import pytest
import typer
import yaml

from pplr.apps.cli import app
from pplr.config import Config
from pplr.config_files import load_config
from tests.docs.pages import ROOT

PPLR = typer.main.get_command(app)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]

NO_COMMANDS = {"pplr less this"}
"""Column heads of a table."""
FILES = {"csv", "html", "json", "jsonl", "key", "md", "png", "safetensors", "yaml"}
"""Endings by which a file is told from a field of the configuration."""


class ParsedError(Exception):
    """A benchmark has read its arguments, and is to do no more."""


def find(words: list[str]) -> tuple[Any, list[str]]:
    """Find the command that words call, and what is left of them for it."""
    command = PPLR
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def check_pplr(words: list[str]) -> None:
    own = words[: words.index("--")] if "--" in words else words
    command, rest = find(own)
    assert not getattr(command, "commands", None), f"pplr {' '.join(words)} is no command"
    with command.make_context("pplr", list(rest)) as context:
        settings = context.params.get("settings") or ()
        path = context.params.get("config")
    if settings:
        load_config(ROOT / path if path and (ROOT / path).is_file() else None, settings)
    if "--" in words:
        assert command.context_settings.get("allow_extra_args")
        check_pplr(["stage", "serve", "MODEL", "--federation", "DIR", *words[words.index("--") + 1 :]])


def check_python(words: list[str]) -> None:
    assert words[0] == "-m", words
    module, *arguments = words[1:]
    assert module.split(".")[0] == "benchmarks", f"{module} is not a program that pages may name"
    if module == "benchmarks":
        main = importlib.import_module("benchmarks.__main__").main
    else:
        main = importlib.import_module(module).main
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        told = parse(parser, arguments, namespace)
        settings = getattr(told, "set", None) or getattr(told, "overrides", None) or []
        load_config(
            ROOT / told.config if getattr(told, "config", None) and (ROOT / told.config).is_file() else None, settings
        )
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
        patch.setattr("sys.argv", [module, *arguments])
        if "argparse" in _source(module) or "quality_parser" in _source(module):
            with pytest.raises(ParsedError):
                main()
        else:
            assert not arguments, f"{module} takes no arguments"


def _source(module: str) -> str:
    spec = importlib.util.find_spec("benchmarks.__main__" if module == "benchmarks" else module)
    assert spec is not None, f"there is no {module}"
    assert spec.loader is not None
    return spec.loader.get_source(spec.name) or ""  # type: ignore[attr-defined]


def check_make(words: list[str]) -> None:
    for word in words:
        name, sign, _ = word.partition("=")
        found = re.search(rf"^{name} \?=" if sign else rf"^{name}:", MAKEFILE, flags=re.MULTILINE)
        assert found, f"the Makefile has no {name}"


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for word in words[1:]:
        if found := re.fullmatch(r"(pplr|\.)\[([\w,]+)\]", word):
            assert set(found[2].split(",")) <= set(EXTRAS), f"{word}: the extras are {sorted(EXTRAS)}"


def check_docker(words: list[str]) -> None:
    """A command of compose, for services that there are; what runs in a container is checked as anything else."""
    assert words[0] == "compose", f"nobody checks docker {words[0]}"
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    verb, *rest = words[1:]
    assert verb in ("build", "up", "run", "exec", "down", "logs", "ps")
    named = [word for word in rest if not word.startswith("-")]
    inside = named[1:] if verb in ("run", "exec") else []
    assert set(named[: len(named) - len(inside)]) <= set(services), f"compose.yaml has no {named}"
    if inside:
        own = rest[rest.index(inside[0]) :]
        check_command(own if own[0] in PROGRAMS else ["pplr", *own])


def check_files(words: list[str]) -> None:
    """Files are made, copied or moved: nothing of ours is called."""
    assert words


def check_installed(words: list[str], program: str) -> None:
    """Another project's program that an extra brings along; its options are its own."""
    found = metadata.entry_points(group="console_scripts", name=program)
    names = {re.split(r"[\[<>=~ ]", own)[0] for extra in EXTRAS.values() for own in extra}
    assert {own.dist.name for own in found if own.dist} & names, f"no extra brings {program}"


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "pplr": check_pplr,
    "python": check_python,
    "make": check_make,
    "pip": check_pip,
    "docker": check_docker,
    **dict.fromkeys(("cp", "mkdir", "mv", "rm"), check_files),
    **{name: partial(check_installed, program=name) for name in ("mlflow", "tensorboard")},
}


def check_command(words: list[str]) -> None:
    """Hold a command to its program's own parser; a program that nobody can check is an error."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    assert words[0] in PROGRAMS, f"nobody checks commands of {words[0]!r}"
    PROGRAMS[words[0]](words[1:])


def check_span(span: str) -> None:
    """Hold a code span that names a command, a benchmark, a setting or a file to what is there."""
    words = [word for word in re.split(r"[\s\[\]|]+", span) if word]
    if span.startswith("pplr ") and span not in NO_COMMANDS and len(words) > 1 and words[1].islower():
        command, rest = find(words[1:])
        assert command is not PPLR or rest[0].startswith("-"), f"there is no pplr {rest[0]}"
        known = {flag for own in command.params for flag in (*own.opts, *own.secondary_opts)} | {"--help", "--"}
        unknown = {word.split("=")[0] for word in rest if word.startswith("-")} - known
        assert not unknown, f"{span}: no {unknown}"
    elif words[:2] == ["python", "-m"] and words[2:] and words[2].split(".")[0] == "benchmarks":
        _source(words[2])
    elif words[:1] == ["make"] and len(words) > 1:
        check_make([word for word in span.split()[1:] if not word.startswith(("PIP_ARGS", "URL", '"', "-"))])
    elif found := re.match(r"(\w+)\.([a-z_]+(\.\w+)*)(?=$|=|: )", span):
        if found[1] in Config.model_fields and found[2].split(".")[-1] not in FILES:
            assert found[0] in set(_names()) or _is_code(found[0]), f"{found[0]} is no field of the configuration"
    elif re.fullmatch(r"(docs|tests|benchmarks|configs|results|src|examples)/[\w./*-]+", span):
        assert list(ROOT.glob(span.rstrip("/"))), f"there is no {span}"


def _names(section: type[Any] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            yield from _names(field.annotation, f"{prefix}{name}.")
        elif name == "cut":
            yield from ("cut.input_layers", "cut.output_layers", "cut.by_client")


def _is_code(name: str) -> bool:
    module, _, last = f"pplr.{name}".rpartition(".")
    try:
        return (
            hasattr(importlib.import_module(module), last) or importlib.util.find_spec(f"{module}.{last}") is not None
        )
    except ModuleNotFoundError:
        return False
