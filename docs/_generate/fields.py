"""The configuration, field by field: its type, its default, and the one sentence that describes it."""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pplr.config import Config

__all__ = ["all_fields", "fields_page"]

_KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def all_fields(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """List every field of a configuration by its dotted name, without the sections themselves."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        inner = _section(field)
        found |= all_fields(inner, f"{prefix}{name}.") if inner else {prefix + name: field}
    return found


def fields_page(config: type[BaseModel] = Config) -> str:
    """Write a section of the page for each section of the configuration.

    Raises:
        KeyError: A field has a type that no words are known for.
    """
    return "\n\n".join([_described(config, ""), *_sections(config, "", level=2)]) + "\n"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """Say which section a field is, if it is one, and not a mapping to some."""
    kinds = [] if get_origin(field.annotation) is dict else [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _mapped(field: FieldInfo) -> type[BaseModel] | None:
    """Say which section a field has for each of its names, if it has."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) is dict else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _sections(section: type[BaseModel], prefix: str, level: int) -> list[str]:
    parts: list[str] = []
    for key, field in section.model_fields.items():
        name = f"{prefix}{key}" + (".NAME" if _mapped(field) else "")
        if inner := _section(field) or _mapped(field):
            absent = " May be `null`." if type(None) in get_args(field.annotation) else ""
            parts += [f"{'#' * level} {name}", f"{_text(field.description)}{absent}", _described(inner, f"{name}.")]
            parts += _sections(inner, f"{name}.", min(level + 1, 4))
    return parts


def _described(section: type[BaseModel], prefix: str) -> str:
    """Write a section's class with its own fields, so that Python's pages can link to it."""
    own = [_field(prefix + name, field) for name, field in section.model_fields.items() if not _section(field)]
    head = "::::{py:class} " + f"{section.__module__}.{section.__name__}"
    return "\n\n".join([head, _text(section.__doc__), *own, "::::"])


def _field(name: str, field: FieldInfo) -> str:
    kind = _type(field)
    default = json.dumps(_plain(field.get_default(call_default_factory=True)), ensure_ascii=False)
    head = [f":::{{confval}} {name}", f":type: {kind}", f":default: `{default}`"]
    return "\n".join([*head, "", _text(field.description), ":::"])


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _text(sentence: str | None) -> str:
    return " ".join((sentence or "").split()).replace("<", "&lt;")


def _type(field: FieldInfo) -> str:
    kind, *rest = _kind(field.annotation).split(" or `null`")
    lengths = [own.min_length for own in field.metadata if hasattr(own, "min_length")]
    told = f"{kind} {_limits(field.metadata)}".strip() + "".join(f"; at least {length} of them" for length in lengths)
    return told + (", or `null`" if rest else "")


def _limits(metadata: Sequence[Any]) -> str:
    known = [f"{word} {getattr(own, key)}" for own in metadata for key, word in _BOUNDS.items() if hasattr(own, key)]
    return " and ".join(known)


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(f"`{own}`" for own in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(
            sorted(("`null`" if own is type(None) else _kind(own) for own in inner), key="`null`".__eq__)
        )
    if origin is tuple:
        return _items(inner[0], "" if Ellipsis in inner else f"{len(inner)} ")
    if origin is dict:
        section = isinstance(inner[1], type) and issubclass(inner[1], BaseModel)
        return "mapping from names to " + (f"`{inner[1].__name__}`" if section else "names")
    return _KINDS[annotation]


def _items(annotation: Any, count: str) -> str:
    if get_origin(annotation) is Annotated:
        kind, *metadata = get_args(annotation)
        each = [part for own in metadata for part in (own.metadata if isinstance(own, FieldInfo) else [own])]
        return f"list of {count}{_PLURALS[kind]}, each {_limits(each)}"
    return f"list of {count}{_PLURALS[annotation]}"
