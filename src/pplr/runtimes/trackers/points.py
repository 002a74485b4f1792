"""What trackers are told of a run: numbers by tag, from the records of its rounds and from ``metrics.json``.

A tag says what was measured, then of whom: ``validation/ndcg@10/mean``, ``validation/ndcg@10/client/0``. What was not
measured has no point. Nothing of a user is in it: no history, no title, no id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import PurePath
from typing import Any, Final

from pplr.config import Config

__all__ = ["final_points", "parameters", "round_points"]

_PER_CLIENT: Final = ("loss_share", "heating_weight")
_ADDED: Final = ("samples", "bytes_up", "bytes_down", "seconds")
_LOWER_IS_BETTER: Final = "loss"


def round_points(record: Mapping[str, Any]) -> dict[str, float]:
    """Read the points of one server round.

    Args:
        record: A line of ``rounds.jsonl``.

    Returns:
        Of the training loss and each validation metric every client's value, their mean, the worst, and the gap between
        best and worst, every client counting the same; every client's share of the loss and heating weight; samples,
        bytes and seconds of each and in all; ε where training is private; and of the similarities of two different
        clients the mean, the lowest and the highest.

    Example:
        >>> clients = {"0": {"loss": 2.0, "heating_weight": 0.5}, "1": {"loss": 1.0, "heating_weight": None}}
        >>> round_points({"server_round": 1, "similarity": None, "clients": clients})
        {'loss/client/0': 2.0, 'loss/client/1': 1.0, 'loss/mean': 1.5, 'loss/worst': 2.0, 'loss/gap': 1.0, \
'heating_weight/client/0': 0.5}
    """
    clients: Mapping[str, Mapping[str, Any]] = record["clients"]
    found = _spread("loss", {name: own.get("loss") for name, own in clients.items()})
    for metric in dict.fromkeys(metric for own in clients.values() for metric in own.get("validation") or {}):
        measured = {name: (own.get("validation") or {}).get(metric) for name, own in clients.items()}
        found |= _spread(f"validation/{metric}", measured, lower_is_better=metric == _LOWER_IS_BETTER)
    for tag in _PER_CLIENT:
        found |= _of_clients(tag, {name: own.get(tag) for name, own in clients.items()})
    for tag in _ADDED:
        if values := _of_clients(tag, {name: own.get(tag) for name, own in clients.items()}):
            found |= values | {f"{tag}/total": sum(values.values())}
    if spent := _of_clients("epsilon", {name: own.get("epsilon") for name, own in clients.items()}):
        found |= spent | {"epsilon/largest": max(spent.values())}
    return found | _similarity(record.get("similarity"))


def final_points(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Read the points of a finished run, which belong to its last server round.

    Args:
        metrics: The content of ``metrics.json``.

    Example:
        >>> final_points({"overall": {"mrr": 0.5}, "clients": {"0": {"users": 2}}, "seconds": {"total": 9}})
        {'test/mrr/overall': 0.5, 'test/users/client/0': 2.0, 'run/seconds/total': 9.0}
    """
    told: dict[str, Any] = {}
    for when, part in (("test", metrics), ("before", metrics.get("before") or {})):
        told |= {f"{when}/{name}/overall": value for name, value in (part.get("overall") or {}).items()}
        for client, own in (part.get("clients") or {}).items():
            told |= {f"{when}/{name}/client/{client}": value for name, value in own.items()}
    for name, own in (metrics.get("spread") or {}).items():
        told |= {f"test/{name}/{key}": own.get(key) for key in ("worst", "best", "gap")}
    told |= dict(_leaves("floors", metrics.get("floors")))
    for section in ("cost", "seconds", "samples_per_second"):
        told |= dict(_leaves(f"run/{section}", metrics.get(section)))
    return {tag: float(value) for tag, value in told.items() if isinstance(value, int | float)}


def parameters(config: Config) -> dict[str, str]:
    """Write every field of a configuration as text by its dotted name; an absolute path goes by its last part.

    Example:
        >>> parameters(Config())["data.holdout.kind"], parameters(Config())["evaluation.cutoffs"]
        ('leave_one_out', '[10, 20]')
    """
    return {name: _text(value) for name, value in _leaves("", config.model_dump(mode="json"), ".")}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return PurePath(value).name if value.startswith(("/", "~")) else value


def _leaves(tag: str, value: Any, joint: str = "/") -> Iterator[tuple[str, Any]]:
    """Walk nested sections down to what holds none."""
    if not isinstance(value, Mapping) or not value:
        yield tag, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{tag}{joint}{name}" if tag else name, inner, joint)


def _of_clients(tag: str, values: Mapping[str, float | None]) -> dict[str, float]:
    return {f"{tag}/client/{name}": float(value) for name, value in values.items() if value is not None}


def _spread(tag: str, values: Mapping[str, float | None], *, lower_is_better: bool = True) -> dict[str, float]:
    found = _of_clients(tag, values)
    if not found:
        return {}
    known = list(found.values())
    return found | {
        f"{tag}/mean": sum(known) / len(known),
        f"{tag}/worst": max(known) if lower_is_better else min(known),
        f"{tag}/gap": max(known) - min(known),
    }


def _similarity(rows: Any) -> dict[str, float]:
    pairs = [rows[i][j] for i, j in permutations(range(len(rows or ())), 2)]
    if not (known := [value for value in pairs if value is not None]):
        return {}
    return {
        "similarity/mean": sum(known) / len(known),
        "similarity/lowest": min(known),
        "similarity/highest": max(known),
    }
