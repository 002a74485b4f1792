"""One sentence that a person can act on, from the figures of an audit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["is_within_reach", "own_settings", "share_found", "strongest", "verdict"]

_MOST, _SOME = 0.5, 0.1
_HAS = {
    "own": "the client's adapter",
    "exchanged": "what the client sends of its adapter",
    "mixed": "the other clients' adapters",
    "base": "the public model alone",
    "pairs": "no weights, but states of public text",
    "catalog": "nothing but the catalog and its popularity",
}


def is_within_reach(knowledge: str, levels: Collection[str]) -> bool:
    """Say whether a server of the federation can have what an attacker was given.

    Where part of an adapter stays at home, as an attacker at the level ``exchanged`` shows, it cannot have the whole.

    Args:
        knowledge: What the attacker had.
        levels: What all attackers of the setting had.
    """
    return not (knowledge == "own" and "exchanged" in levels)


def own_settings(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Choose the settings at the run's own cut, guard and wire format, with nothing added.

    Args:
        content: Of ``audit.json``.
    """
    own = (content["cut"], 0, content.get("guard"), content.get("wire"))
    return [
        found
        for found in content["settings"]
        if (found["cut"], found["noise"], found.get("guard"), found.get("wire", own[3])) == own
    ]


def strongest(content: Mapping[str, Any], metric: str = "item_f1") -> dict[str, Any] | None:
    """Find the attack that found most of the run as it is, else at the first setting.

    Args:
        content: Of ``audit.json``.
        metric: What counts.

    Returns:
        The attack's entry, with its setting as ``at``; ``None`` where no attack says anything of the metric.
    """
    told = [
        {**audit, "at": found}
        for found in own_settings(content) or content["settings"][:1]
        for audit in found["audits"]
        if audit.get(metric) and is_within_reach(audit["knowledge"], {each["knowledge"] for each in found["audits"]})
    ]
    return max(told, key=lambda audit: audit[metric]["mean"]) if told else None


def share_found(found: float, guessed: float) -> float:
    """Say how much of what a guess without any state leaves open an attack found: (f - g) / (1 - g), at least 0."""
    return max(0.0, (found - guessed) / (1 - guessed)) if guessed < 1 else 0.0


def verdict(content: Mapping[str, Any]) -> str:
    """Say what the server can read, beside what anyone could guess, and what to do.

    What to do follows from the upper end of the interval: with few users much more than the mean may be read. Where
    nothing was audited as the run is, the sentence says so and claims nothing of the run.

    Args:
        content: Of ``audit.json``.
    """
    told = [
        (metric, found, content["baseline"][metric])
        for metric in ("item_f1", "target_hit@1")
        if (found := strongest(content, metric)) is not None and content["baseline"][metric] is not None
    ]
    if not told:
        return "No attack that was run says which items a server reads: run more of them before trusting this cut."
    at = told[0][1]["at"]
    figures = f"With {_where(at, content)}, " + ", and ".join(_told(*own) for own in told)
    if not own_settings(content):
        return (
            f"Not of this run as it is, but as it would be: {figures[0].lower()}{figures[1:]}. Audit its own cut and "
            "guard, with no noise added, before trusting it."
        )
    share = max(share_found(found[metric]["high"], guess["mean"]) for metric, found, guess in told)
    if share >= _MOST:
        return f"{figures}: whoever must not read the histories must not run this server."
    if share >= _SOME:
        return f"{figures}: count the histories as partly known to whoever runs this server."
    return f"{figures}: these attacks found little, which does not show that others would not{_not_tried(content)}."


def _where(at: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Say at which setting, and what recommendations are worth there."""
    cut, wire = at["cut"], at.get("wire")
    parts = [f"k = {cut['input_layers']} and m = {cut['output_layers']} of {cut['total_layers']} blocks"]
    parts += [at["guard"]] if at.get("guard") else []
    parts += [f"noise of {at['noise']:g} times the states' size"] if at["noise"] else []
    parts += [f"{wire} on the wire"] if wire is not None and wire != content.get("wire") else []
    worth = (at.get("worth") or {}).get("mean")
    parts += [f"{content['metric'].upper()} of {worth:.4f}"] if worth is not None else []
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def _not_tried(content: Mapping[str, Any]) -> str:
    """Name the attacks that were not run with what this server has."""
    levels: dict[str, list[str]] = {}
    for own in content.get("not_tried", ()):
        levels.setdefault(own["knowledge"], []).append(own["audit"])
    told = "; ".join(f"with {_HAS[level]}: {', '.join(names)}" for level, names in levels.items())
    return f"; this server could also try, {told}" if told else ""


def _told(metric: str, found: Mapping[str, Any], guess: Mapping[str, float]) -> str:
    """Say what one attack found, beside a guess without any state."""
    own = found[metric]
    what = {
        "item_f1": "reads the items of a user's history with an F1 of {mean:.2f}",
        "target_hit@1": "finds the item that a training pass predicts for {mean:.2f} of the users",
    }[metric].format(**own)
    passes = found["at"].get("passes", 1)
    by = f"{own['low']:.2f} to {own['high']:.2f}"
    by += f" over {own['users']} users" if "users" in own else ""
    by += f"; {found['audit']}" + (f", {passes} passes" if passes > 1 else "")
    return (
        f"a server that has {_HAS[found['knowledge']]} {what} ({by}), where popularity alone gives {guess['mean']:.2f}"
    )
