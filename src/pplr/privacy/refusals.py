"""What may not be combined with private training, as its ε would not be true."""

from __future__ import annotations

from collections.abc import Iterator

from pplr.config import Config
from pplr.errors import ConfigError

__all__ = ["refuse_lies"]


def refuse_lies(config: Config, *, hosted_elsewhere: bool) -> None:
    """Refuse a configuration whose ε would be a lie: something leaves a client, or couples users, without noise.

    Args:
        config: The run's configuration; one without private training passes.
        hosted_elsewhere: Whether a stage server hosts the middle blocks.

    Raises:
        ConfigError: Says what it is, why, and what to do.
    """
    if not config.privacy.dp.is_on:
        return
    for what, why, cure in (*_what_leaves(config, hosted_elsewhere), *_what_couples(config)):
        raise ConfigError(f"privacy.dp with {what}: {why}, which its ε does not cover", cure=cure)


def _what_leaves(config: Config, hosted_elsewhere: bool) -> Iterator[tuple[str, str, str]]:
    """Find what a client would tell, or what would follow from it, beside its noisy adapter."""
    federation, method = config.federation, config.federation.method
    if config.runtime.name != "in_process":
        yield (
            f"runtime.name {config.runtime.name}",
            "clients report sample counts and what they measured on their users to the server",
            "Use runtime.name: in_process.",
        )
    if hosted_elsewhere and not config.privacy.dp.freeze_middle:
        yield (
            "a stage server",
            "the middle adapter would be trained there on gradients that nobody clipped",
            "Set privacy.dp.freeze_middle: true, or train without a stage server.",
        )
    if hosted_elsewhere and method == "ditto":
        yield (
            "federation.method ditto and a stage server",
            "the middle of the personal adapter would be trained there without noise",
            "Use another method, or train without a stage server.",
        )
    if federation.patience is not None:
        yield (
            f"federation.patience {federation.patience}",
            "when a run stops would follow from the users' validation cases",
            "Set federation.patience: null.",
        )
    if method in ("pplr", "pplr_weighted") and federation.heating_scale is not None:
        yield (
            f"federation.heating_scale {federation.heating_scale:g}",
            "heating weighs clients by their training losses",
            "Set federation.heating_scale: null.",
        )
    weighs = method in ("fedavg", "fedprox", "ditto") and federation.weighting == "samples"
    if method == "pplr_weighted" or weighs:
        yield (
            f"federation.method {method}" + (" and federation.weighting samples" if weighs else ""),
            "it weighs clients by how many samples they have",
            "Set federation.weighting: uniform." if weighs else "Use federation.method: pplr.",
        )
    if config.backbone.name == "encoder" and config.backbone.encoder.first_phase_rounds is not None:
        yield (
            "backbone.encoder.first_phase_rounds",
            "the second phase begins at the round that the users' validation cases choose",
            "Set backbone.encoder.first_phase_rounds: null.",
        )


def _what_couples(config: Config) -> Iterator[tuple[str, str, str]]:
    """Find where one user more would change what the others' samples are."""
    data = config.data
    if config.training.samples is not None:
        yield (
            f"training.samples {config.training.samples}",
            "they are drawn among all users' samples, so that a user changes which of the others' are drawn",
            "Set training.samples: null.",
        )
    if data.catalog == "taken":
        yield (
            "data.catalog taken",
            "the catalog follows from what the users took",
            "Set data.catalog: all, for a catalog that is known without them.",
        )
    if data.item_core > 1:
        yield (
            f"data.item_core {data.item_core}",
            "a user can make an item frequent enough to be kept in the others' histories",
            "Set data.item_core: 1.",
        )
    if data.holdout.kind in ("global_time", "unseen_items", "new_users"):
        yield (
            f"data.holdout.kind {data.holdout.kind}",
            "it is cut or drawn over all users together, so that a user moves what is held out of the others",
            "Use leave_one_out or user_ratio.",
        )
