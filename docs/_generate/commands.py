"""A page for each command, from what its own help is made from."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import typer

from pplr.apps.cli import app

__all__ = ["all_commands", "command_pages"]


def all_commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """List the commands that do something, with the words that call them, in the order of the help."""
    yield from _below(("pplr",), typer.main.get_command(app))


def _below(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
        return
    for name, own in inner.items():
        yield from _below((*words, name), own)


def command_pages() -> dict[str, str]:
    """Write the pages, by a name for each file."""
    return {"-".join(words[1:]): _page(words, command) for words, command in all_commands()}


def _page(words: tuple[str, ...], command: Any) -> str:
    with command.make_context(words[-1], [], resilient_parsing=True) as context:
        pieces = command.collect_usage_pieces(context)
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # some commands make the end of their help only when it is shown
            command.get_help(context)
    name = " ".join(words)
    parts = [f"# {name}", command.help or "", f"```text\n{' '.join([name, *pieces])}\n```"]
    given = [own for own in command.params if own.param_type_name == "argument"]
    options = [own for own in command.params if own.param_type_name == "option" and own.name != "help"]
    if given:
        rows = [[f"`{own.metavar or own.human_readable_name}`", _cell(own.help)] for own in given]
        parts += ["## Arguments", _table(["argument", "means"], rows)]
    if options:
        parts += ["## Options", "\n\n".join(_option(own) for own in options)]
    parts += [
        _line(own) if own.endswith(":") else f"- {_line(own)}" for own in (command.epilog or "").split("\n\n") if own
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _option(option: Any) -> str:
    flags = "/".join([*option.opts, *option.secondary_opts])
    takes = "" if option.is_flag else " " + _takes(option)
    told = [option.help or ""]
    if option.required:
        told.append("Needed.")
    elif option.default not in (None, False, [], ()) and not option.is_flag:
        told.append(f"Default: `{option.default}`.")
    if limits := _limits(option.type):
        told.append(limits)
    if option.envvar:
        told.append(f"Taken from the environment variable `{option.envvar}` when absent.")
    return f"`{flags}{takes}`\n: {_line(' '.join(told))}"


def _takes(option: Any) -> str:
    choices = getattr(option.type, "choices", None)
    if choices:
        return "|".join(choices)
    return str(option.metavar or option.type.name.split(" ")[0].upper())


def _limits(kind: Any) -> str:
    least, most = getattr(kind, "min", None), getattr(kind, "max", None)
    bounds = [f"{word} {bound}" for word, bound in (("at least", least), ("at most", most)) if bound is not None]
    return " and ".join(bounds).capitalize() + "." if bounds else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _line(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")


def _cell(text: str | None) -> str:
    return _line(text or "").replace("|", "\\|")
