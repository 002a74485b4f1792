"""One sentence that a person can act on, from the figures of an audit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["is_within_reach", "share_found", "strongest", "verdict"]

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


def strongest(content: Mapping[str, Any], metric: str = "item_f1") -> dict[str, Any] | None:
    """Find the attack that found most at the run's own cut and guard without added noise, else at the first setting.

    Args:
        content: Of ``audit.json``.
        metric: What counts.

    Returns:
        The attack's entry, with its setting as ``at``; ``None`` where no attack says anything of the metric.
    """
    settings = content["settings"]
    own = [
        found
        for found in settings
        if (found["cut"], found["noise"], found.get("guard")) == (content["cut"], 0, content.get("guard"))
    ]
    told = [
        {**audit, "at": found}
        for found in own or settings[:1]
        for audit in found["audits"]
        if audit.get(metric) and is_within_reach(audit["knowledge"], {each["knowledge"] for each in found["audits"]})
    ]
    return max(told, key=lambda audit: audit[metric]["mean"]) if told else None


def share_found(found: float, guessed: float) -> float:
    """Say how much of what a guess without any state leaves open an attack found: (f - g) / (1 - g), at least 0."""
    return max(0.0, (found - guessed) / (1 - guessed)) if guessed < 1 else 0.0


def verdict(content: Mapping[str, Any]) -> str:
    """Say what the server can read, beside what anyone could guess, and what to do.

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
    cut = told[0][1]["at"]["cut"]
    where = f"k = {cut['input_layers']} and m = {cut['output_layers']} of {cut['total_layers']} blocks"
    guard = told[0][1]["at"].get("guard")
    figures = f"With {where}{f' and {guard}' if guard else ''}, " + ", and ".join(_told(*own) for own in told)
    share = max(share_found(found[metric]["mean"], guess["mean"]) for metric, found, guess in told)
    if share >= _MOST:
        return f"{figures}: whoever must not read the histories must not run this server."
    if share >= _SOME:
        return f"{figures}: count the histories as partly known to whoever runs this server."
    return f"{figures}: these attacks found little, which does not show that others would not."


def _told(metric: str, found: Mapping[str, Any], guess: Mapping[str, float]) -> str:
    """Say what one attack found, beside a guess without any state."""
    own = found[metric]
    what = {
        "item_f1": "reads the items of a user's history with an F1 of {mean:.2f}",
        "target_hit@1": "finds the item that a training pass predicts for {mean:.2f} of the users",
    }[metric].format(**own)
    passes = found["at"].get("passes", 1)
    by = f"{own['low']:.2f} to {own['high']:.2f}; {found['audit']}{f', {passes} passes' if passes > 1 else ''}"
    return (
        f"a server that has {_HAS[found['knowledge']]} {what} ({by}), where popularity alone gives {guess['mean']:.2f}"
    )
