"""The membership audit of a configuration: it is trained with and without its users, and attackers tell which."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from pplr.backbones.adapters import AdapterState
from pplr.config import Config
from pplr.data.prompts import Sample
from pplr.errors import ConfigError
from pplr.federation.checkpoints import CheckpointStore
from pplr.federation.client import FederatedClient
from pplr.federation.rounds import Federation, run_rounds
from pplr.privacy.audits.membership import LEAST_PAIRS, likelihood_ratios, list_gains, unit_losses
from pplr.privacy.audits.membership_units import Unit, draw_halves, interactions_of, samples_without, users_of
from pplr.privacy.ledger import Ledger
from pplr.privacy.roc import NO_INFORMATION, measure_roc
from pplr.progress import Progress, Silent
from pplr.runtimes.assembly import POOLED, Assembly
from pplr.seeds import derive_seed, generator

__all__ = ["MembershipSettings", "audit_membership"]

_SHADOWED = ("offline", "online")
"""Attacks that hold what is seen against shadow trainings."""


@dataclass(frozen=True)
class MembershipSettings:
    """What is audited.

    Args:
        unit: Whether users are left out, or single interactions of users who stay.
        pairs: Pairs of trainings; each is attacked, and those of the other pairs are its shadows.
        list_length: K of the lists that an outsider sees.
        lists: Lists that an outsider sees of each user; with interactions, one for each of them.
        interactions: Most interactions of each user that are tried, and no more than a fifth of its targets.
        seed: Of who is left out, and of the trainings.
    """

    unit: Literal["user", "interaction"] = "user"
    pairs: int = LEAST_PAIRS
    list_length: int = 10
    lists: int = 4
    interactions: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs < LEAST_PAIRS:
            raise ConfigError(
                f"{self.pairs} pairs of trainings are too few to tell a deviation among shadows",
                cure=f"Train at least {LEAST_PAIRS} pairs.",
            )
        if min(self.list_length, self.lists, self.interactions) < 1:
            raise ConfigError("lists of no items, no lists or no interactions", cure="Give at least one of each.")


@dataclass(frozen=True)
class _Adapters:
    """What became of one trainer: its adapter after the last local training, after mixing, and as it serves."""

    local: AdapterState
    mixed: AdapterState
    serving: AdapterState


def audit_membership(
    assembly: Assembly, settings: MembershipSettings | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a configuration with and without each unit, and measure how well attackers tell which.

    Three attackers: the server, which has each client's adapter as it was sent last; another client, which has its own
    mixed adapter; an outsider, who sees top-K lists that the client's recommender makes.

    Args:
        assembly: The data and the model, all in this process.
        settings: What is audited.
        progress: Told of every step.

    Returns:
        For each attacker and attack the AUC and the true-positive rates, with intervals over users.

    Raises:
        ConfigError: A client has too little to leave anything out of.
    """
    settings, progress = settings or MembershipSettings(), progress or Silent()
    began = time.perf_counter()
    units = _units(assembly, settings)
    included = draw_halves([own.client for own in units], settings.pairs, settings.seed)
    seen: dict[str, list[NDArray[np.float64]]] = {}
    for number, is_in in enumerate(included):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            trained = _train(assembly, _samples(assembly, units, is_in), _config(assembly, settings, number), folder)
        for attacker, own in _seen(assembly, settings, units, trained).items():
            seen.setdefault(attacker, []).append(own)
        seconds = time.perf_counter() - started
        progress.note(f"training {number + 1} of {len(included)}: {seconds:.0f} s")
    base = _losses(assembly, units, {own.client: assembly.initial for own in units})
    tables = {attacker: np.stack(own) for attacker, own in seen.items()}
    losses = -tables["server"]
    return {
        "unit": settings.unit,
        "backbone": assembly.config.backbone.name,
        "method": assembly.config.federation.method,
        "rounds": assembly.config.federation.rounds,
        "private": assembly.config.privacy.dp.is_on,
        "trainings": len(included),
        "shadows": len(included) - 2,
        "seed": settings.seed,
        "users": len({own.user for own in units}),
        "members": int(included.sum()),
        "non_members": int((~included).sum()),
        "loss": {
            "base": float(base.mean()),
            "members": float(losses[included].mean()),
            "non_members": float(losses[~included].mean()),
        },
        "baseline": dict(NO_INFORMATION),
        "attacks": _attacks(tables, base, included, np.array([own.user for own in units]), settings.seed),
        "seconds": time.perf_counter() - began,
    }


def _attacks(
    tables: Mapping[str, NDArray[np.float64]],
    base: NDArray[np.float64],
    included: NDArray[np.bool_],
    users: NDArray[np.int64],
    seed: int,
) -> list[dict[str, Any]]:
    """Run every attack on what each attacker sees, and measure it over all trials."""
    told = []
    owners = np.broadcast_to(users, included.shape).ravel()
    for attacker, seen in tables.items():
        plain = ("lists", seen) if attacker == "outsider" else ("loss_difference", seen + base)
        attacks = [plain, *((name, likelihood_ratios(seen, included, online=name == "online")) for name in _SHADOWED)]
        for name, scores in attacks:
            draw = generator(seed, "membership", attacker, name)
            found = measure_roc(scores.ravel(), included.ravel(), owners, draw)
            told.append({"attacker": attacker, "attack": name, **found})
    return told


def _units(assembly: Assembly, settings: MembershipSettings) -> list[Unit]:
    """List what is in or left out."""
    samples, items = assembly.data.samples, assembly.config.data.history_items
    if settings.unit == "user":
        return users_of(samples, settings.lists, items, settings.seed)
    return interactions_of(samples, settings.interactions, items, settings.seed)


def _samples(assembly: Assembly, units: Sequence[Unit], is_in: NDArray[np.bool_]) -> dict[str, list[Sample]]:
    """Say what each trainer trains on."""
    kept = samples_without(assembly.data.samples, units, is_in)
    return {POOLED: [own for every in kept.values() for own in every]} if assembly.method.pooled else kept


# -- one training -------------------------------------------------------------------------------------------------


def _config(assembly: Assembly, settings: MembershipSettings, number: int) -> Config:
    """Make the configuration of one training: all rounds, other draws, and what is exchanged last is kept."""
    config = assembly.config
    seed = derive_seed(settings.seed, "membership", number) % 2**31
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"seed": seed, "keep_rounds": True, "checkpoints": 1}),
            "federation": config.federation.model_copy(update={"patience": None}),
        }
    )


def _train(
    assembly: Assembly, samples: Mapping[str, Sequence[Sample]], config: Config, folder: str
) -> dict[str, _Adapters]:
    """Train a federation on some samples; left-out users have no part in it, not even in validation."""
    place, private = Path(folder), config.privacy.dp
    clients = []
    for name, own in samples.items():
        books = Ledger(place / "privacy", name, private, "membership") if private.is_on else None
        personal = assembly.admit(name, assembly.initial, "personal") if assembly.method.personal else None
        model, owners = assembly.admit(name, assembly.initial), [sample.user for sample in own]
        clients.append(FederatedClient(name, _encode(assembly, own), model, lambda _: {}, personal, owners, books))
    try:
        federation = Federation(clients, assembly.method, assembly.initial)
        store = CheckpointStore(place / "checkpoints", keep=1, warn=lambda _: None)
        run_rounds(federation, config, store, Silent(), place)
        last = place / "rounds" / str(federation.next_round)
        return {
            client.name: _Adapters(
                assembly.initial | assembly.exchanged(load_file(last / client.name / "local.safetensors")),
                client.model.adapter(),
                client.serving.adapter(),
            )
            for client in clients
        }
    finally:
        for name in samples:
            for purpose in ("", "personal"):
                assembly.dismiss(name, purpose)


def _encode(assembly: Assembly, samples: Sequence[Sample]) -> list[Any]:
    return assembly.encode(assembly.backbone.divide(samples, assembly.data.dataset.catalog))


# -- what attackers see -------------------------------------------------------------------------------------------


def _seen(
    assembly: Assembly, settings: MembershipSettings, units: Sequence[Unit], trained: Mapping[str, _Adapters]
) -> dict[str, NDArray[np.float64]]:
    """Measure what each attacker sees of every unit: each (M,), higher where it looks more like a member."""
    names = list(trained)
    trainer = {name: POOLED if assembly.method.pooled else name for name in assembly.data.partition.names}
    told = {"server": -_losses(assembly, units, {name: trained[own].local for name, own in trainer.items()})}
    if len(names) > 1:
        following = dict(zip(names, [*names[1:], names[0]], strict=True))
        told["client"] = -_losses(assembly, units, {name: trained[following[name]].mixed for name in names})
    gains = np.zeros(len(units))
    for client in dict.fromkeys(own.client for own in units):
        places = [place for place, own in enumerate(units) if own.client == client]
        try:
            ranker = assembly.ranker(assembly.admit(client, trained[trainer[client]].serving, "lists"))
            cases, size = [units[place].cases for place in places], assembly.config.evaluation.batch_size
            gains[places] = list_gains(ranker, cases, settings.list_length, size)
        finally:
            assembly.dismiss(client, "lists")
    return {**told, "outsider": gains}


def _losses(assembly: Assembly, units: Sequence[Unit], adapters: Mapping[str, AdapterState]) -> NDArray[np.float64]:
    """Measure each unit's loss under the adapter that is held against its client: (M,)."""
    found = np.zeros(len(units))
    for client, adapter in adapters.items():
        places = [place for place, own in enumerate(units) if own.client == client]
        try:
            model = assembly.admit(client, adapter, "membership")
            encoded = [_drawn(assembly, units[place].samples) for place in places]
            found[places] = unit_losses(model, encoded, assembly.config.evaluation.batch_size)
        finally:
            assembly.dismiss(client, "membership")
    return found


def _drawn(assembly: Assembly, samples: Sequence[Sample]) -> Sequence[Any]:
    """Encode samples; where a backbone draws targets, always the same ones."""
    return assembly.backbone.draw(_encode(assembly, samples), 0)
