"""Configurations as files: read, overridden from the command line, explained where they are wrong, and written anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pplr.config import Config
from pplr.errors import ConfigError, nearest

__all__ = ["config_template", "load_config"]


def load_config(source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration from a YAML file, or from sections written in Python, and apply overrides.

    Args:
        source: A YAML file, or a mapping with its content; absent means all defaults. Relative paths inside a file are
            taken from its own folder if they exist there, else from the working directory.
        overrides: ``section.field=value`` strings, values in YAML.

    Raises:
        ConfigError: The file cannot be read, a key is unknown (the nearest known key is named), or a value is wrong.

    Example:
        >>> load_config(overrides=["federation.rounds=2"]).federation.rounds
        2
        >>> load_config({"federation": {"clients": 3}}).federation.clients
        3
    """
    raw: dict[str, Any] = {}
    if isinstance(source, Mapping):
        raw = copy.deepcopy(dict(source))
    elif source is not None:
        path = Path(source)
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"cannot read the configuration {path}: {error.strerror}", cure="Give the path of a YAML file."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problem = " ".join(str(error).split())
            raise ConfigError(f"{path} is not valid YAML: {problem}", cure="Correct the line named.") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(
                f"{path} holds a {type(loaded).__name__}, not sections",
                cure="Start from `pplr config --template`.",
            )
        raw = dict(loaded or {})
        _anchor_paths(raw, path.parent)
    for override in overrides:
        _apply_override(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, str(source) if isinstance(source, str | Path) else "the configuration") from None


def config_template() -> str:
    """Write every field with its default and its description, as YAML ready to edit."""
    lines: list[str] = []
    _template_lines(Config(), lines, indent=0)
    return "\n".join(lines) + "\n"


def _anchor_paths(raw: dict[str, Any], folder: Path) -> None:
    data = raw.get("data")
    backbone = raw.get("backbone")
    for section, key in ((data, "path"), (data, "items_path"), (backbone, "model")):
        if not isinstance(section, dict):
            continue
        value = section.get(key)
        if not isinstance(value, str) or Path(value).is_absolute() or not (folder / value).exists():
            continue
        if key != "model" or "/" in value or value.endswith(".gguf"):  # a bare word is a short name
            section[key] = str((folder / value).resolve())


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {override!r} has no '='", cure="Write --set section.field=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML", cure="Quote the value.") from error
    *sections, field = key.strip().split(".")
    place = raw
    for section in sections:
        inner = place.setdefault(section, {})
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"--set {override!r}: {section!r} is {inner!r}, not a section", cure="Write --set section.field=value."
            )
        place = inner
    place[field] = value


def _sections_of(model: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel]]:
    found = {prefix: model}
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found.update(_sections_of(kind, f"{prefix}.{name}" if prefix else name))
    return found


def _all_keys() -> list[str]:
    return [name for model in _sections_of(Config).values() for name in model.model_fields]


def _explain(error: ValidationError, where: str) -> ConfigError:
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    dotted = ".".join(parts) or "the configuration"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        section = ".".join(parts[:-1])
        models = _sections_of(Config)
        known = list(models[section].model_fields) if section in models else _all_keys()
        hint = nearest(parts[-1], known)
        elsewhere = [name for name, model in models.items() if name and parts[-1] in model.model_fields]
        if elsewhere:  # the very name, in another section
            hint = f"Did you mean '{elsewhere[0]}.{parts[-1]}'?"
        return ConfigError(f"{where}: unknown key {dotted!r}{more}", cure=hint)
    seen = first.get("input")
    shown = f", got {seen!r}" if isinstance(seen, str | int | float | bool | list) or seen is None else ""
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(
        f"{where}: {dotted}: {message[:1].lower()}{message[1:]}{shown}{more}",
        cure="See `pplr config --template` for what the field takes.",
    )


def _template_lines(section: BaseModel, lines: list[str], indent: int) -> None:
    pad = "  " * indent
    for name, field in type(section).model_fields.items():
        value: Any = getattr(section, name)
        for sentence in (field.description or "").splitlines():
            lines.append(f"{pad}# {sentence.strip()}")
        if isinstance(value, BaseModel):
            lines.append(f"{pad}{name}:")
            _template_lines(value, lines, indent + 1)
        else:
            lines.append(f"{pad}{name}: {_yaml_scalar(section, name)}")
        if indent == 0:
            lines.append("")


def _yaml_scalar(section: BaseModel, name: str) -> str:
    value: Mapping[str, Any] = section.model_dump(mode="json", include={name})
    return (
        yaml.safe_dump(value[name], default_flow_style=True, width=10_000, allow_unicode=True)
        .removesuffix("\n...\n")
        .strip()
    )
