"""The audit of a finished run: attacks on what its server sees, scored, beside what its recommendations are worth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pplr.backbones.base import Batch
from pplr.backbones.item_vectors import ItemVectors
from pplr.config import CutConfig, StatePrivacyConfig
from pplr.data.prompts import Sample
from pplr.errors import ConfigError, RunError
from pplr.privacy.audits import AUDITS, Attacker, Knowledge, make_audit
from pplr.privacy.observing import Observation, Spy, observe, secret_of
from pplr.privacy.replica import Replica
from pplr.privacy.scoring import Reader, baseline, interval, resampled, score
from pplr.privacy.states import described
from pplr.privacy.verdict import verdict
from pplr.progress import Progress, Silent
from pplr.recommend.evaluation import Evaluation, evaluate
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.attacking import Attackers, rounded, saved_adapters
from pplr.runtimes.audit_settings import AuditSettings
from pplr.runtimes.run import Run
from pplr.runtimes.state_counts import draws_of_a_state
from pplr.seeds import derive_seed, generator
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.storage import write_json

__all__ = ["audit_run"]

_AUXILIARY_FOR_SCALE = 16


def audit_run(run: Run, settings: AuditSettings | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Attack what the server of a run sees, and write ``audit.json`` into its folder.

    Args:
        run: A finished run of ``causal_lm`` or ``item_vectors``.
        settings: What is audited.
        progress: Told of every step.

    Returns:
        The content of ``audit.json``: for each cut, noise and wire format the run's worth and, for each attack and
        what its attacker has, each metric's mean over users with its interval, beside that of a guess without any
        state.

    Raises:
        RunError: The run is not finished.
        ConfigError: The run is not cut and no cut is given, or its backbone is not audited yet.
    """
    settings, progress = settings or AuditSettings(), progress or Silent()
    if run.metrics is None:
        raise RunError(f"the run in {run.folder} is not finished", cure="Train it to its end with --resume.")
    for guard in settings.guards:
        if guard.noise == "learned" and guard != run.config.privacy.states:
            raise ConfigError(
                f"{described(guard)}, of a run that was not trained with them", cure="Train a run with privacy.states."
            )
    work = _Work(run, settings, progress)
    began = time.perf_counter()
    content: dict[str, Any] = {
        "backbone": run.config.backbone.name,
        "method": run.config.federation.method,
        "cut": run.metrics["cut"],
        "guard": described(run.config.privacy.states) or None,
        "metric": work.metric,
        "users": len(work.secrets),
        "seed": settings.seed,
        "wire": run.config.runtime.wire,
        "baseline": interval([baseline(own, work.popularity, work.reader) for own in work.secrets], settings.seed),
        "settings": [found for plan in work.plans for found in work.at(plan)],
    }
    content["not_tried"] = work.not_tried(content["settings"])
    content["verdict"] = verdict(content)
    content["seconds"] = time.perf_counter() - began
    write_json(run.folder / "audit.json", content)
    return content


@dataclass(frozen=True)
class _Setting:
    """One cut and noise, and what the server sees there.

    Args:
        plan: The cut.
        noise: Its size, as a multiple of the states'.
        wire: How states travel.
        passes: How often each pass crossed, not counting those of the same bytes as another.
        pairs: Passes of public text whose states attackers at the level ``pairs`` have.
        guard: What clients did to what they sent.
        through: What becomes of states on their way, the guard apart.
        seen: The passes, in the order of the secrets.
        others: Gives a client's other passes, of which there is no secret.
    """

    plan: CutPlan
    noise: float
    wire: str
    passes: int
    pairs: int
    guard: StatePrivacyConfig
    through: Callable[[Tensor], Tensor]
    seen: Sequence[Observation]
    others: Callable[[str], list[Observation]]


class _Work:
    """One audit: the passes that are attacked, and what attackers have.

    Args:
        run: The run.
        settings: What is audited.
        progress: Told of every step.
    """

    def __init__(self, run: Run, settings: AuditSettings, progress: Progress) -> None:
        self.run, self.settings, self.progress = run, settings, progress
        self.assembly: Assembly = run.assembly(progress)
        self.backbone, self.data = self.assembly.backbone, self.assembly.data
        self.catalog = self.data.dataset.catalog
        self.reader = Reader(self.backbone, self.catalog)
        self.wires = settings.wires or (run.config.runtime.wire,)
        self._attackers: dict[tuple[object, ...], Attacker] = {}
        self._done: dict[tuple[object, ...], dict[str, Any]] = {}
        self._worths: dict[tuple[object, ...], dict[str, Any]] = {}
        cutoffs = run.config.evaluation.cutoffs
        self.metric = f"ndcg@{10 if 10 in cutoffs else cutoffs[0]}"
        self.attackers = Attackers(self.assembly, saved_adapters(run, self.assembly), settings.seed)
        self.adapters, self.popularity = self.attackers.adapters, self.attackers.popularity
        self.drawn = self._draw()
        items = run.config.data.history_items
        self.secrets = [secret_of(self.backbone, own, name, self.catalog, items) for name, own in self.drawn]

    @property
    def plans(self) -> list[CutPlan]:
        """The cuts that are audited."""
        total = self.backbone.total_layers
        if not self.settings.cuts:
            if self.assembly.plan.is_whole:
                raise ConfigError(
                    "this run is not cut, so no server saw a state", cure="Give the cut to audit, with --cut K,M."
                )
            return [self.assembly.plan]
        return [CutPlan.make(CutConfig(input_layers=k, output_layers=m), total) for k, m in self.settings.cuts]

    def _draw(self) -> list[tuple[str, Sample]]:
        """Draw users, and of each the newest training pass."""
        newest = {(name, own.user): own for name, samples in self.data.samples.items() for own in samples}
        keys = sorted(newest)
        count = min(self.settings.users, len(keys))
        chosen = generator(self.settings.seed, "audited users").choice(len(keys), count, replace=False)
        return [(keys[place][0], newest[keys[place]]) for place in sorted(chosen.tolist())]

    def at(self, plan: CutPlan) -> Iterator[dict[str, Any]]:
        """Audit one cut, at each noise."""
        config = self.run.config
        model = CutModel(self.backbone, plan, config.adapter, config.training, states=config.privacy.states)
        guards = self.settings.guards or (config.privacy.states,)
        asked = (guards, self.settings.noises, self.wires, self.settings.passes, self.settings.pairs)
        for guard, noise, wire, passes, pairs in product(*asked):
            through = self._through(plan, noise, wire)
            apart = self._apart(guard, passes)
            seen_of = partial(self._observe, model, through=through, states=guard, passes=apart, wire=wire)
            seen = [seen_of(name, sample) for name, sample in self.drawn]
            own = _Setting(plan, noise, wire, apart, pairs, guard, through, seen, partial(self._others, seen_of))
            yield {
                "cut": {
                    "input_layers": plan.input_layers,
                    "output_layers": plan.output_layers,
                    "total_layers": plan.total_layers,
                },
                "noise": noise,
                "wire": wire,
                "passes": passes,
                "pairs": pairs,
                "guard": described(guard) or None,
                "worth": self._worth(model, own),
                "worth_unguarded": self._worth_unguarded(model, own),
                "audits": [self._attack_once(name, level, own) for name, level in self._attacks(own)],
            }

    def _attacks(self, at: _Setting) -> list[tuple[str, Knowledge]]:
        """Choose who attacks what: what was asked for, else all that do not take long and suit the setting."""
        wanted = self.settings.knowledge
        found: list[tuple[str, Knowledge]] = []
        noisy = at.noise > 0 or at.guard.noise != "none"
        usual = [name for name in self._possible() if AUDITS[name].by_default or (noisy and AUDITS[name].in_noise)]
        for name in self.settings.attacks or usual:
            found += [(name, level) for level in AUDITS[name].knows if not wanted or level in wanted]
        alone = len(self.adapters) < 2 or self.assembly.method.pooled
        whole = not self.attackers.keeps_some_at_home
        needless = {"mixed"} if alone else set()
        needless |= {"exchanged"} if whole else set()
        needless |= {"catalog"} if whole and "catalog" not in wanted and not self.settings.attacks else set()
        return [own for own in found if own[1] not in needless]

    def _possible(self) -> list[str]:
        """Name the attacks that can be run on this backbone."""
        items = isinstance(self.backbone, ItemVectors)
        return [name for name, own in AUDITS.items() if items or not own.of_items]

    def not_tried(self, settings: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
        """Name the attacks that the run's server could run with what it has, and that no setting tried."""
        has = ("exchanged", "pairs", "catalog") if self.attackers.keeps_some_at_home else ("own",)
        tried = {(own["audit"], own["knowledge"]) for found in settings for own in found["audits"]}
        every = [(name, level) for level in has for name in self._possible() if level in AUDITS[name].knows]
        return [{"audit": name, "knowledge": level} for name, level in every if (name, level) not in tried]

    def _apart(self, guard: StatePrivacyConfig, passes: int) -> int:
        """Count the passes that differ: after the input stage has settled they are all the same."""
        if guard.settle_rounds is None:
            return passes
        return min(passes, draws_of_a_state(self.assembly, guard.settle_rounds))

    def _observe(
        self,
        model: CutModel,
        name: str,
        own: Sample,
        through: Callable[[Tensor], Tensor],
        states: StatePrivacyConfig,
        passes: int,
        wire: str,
    ) -> Observation:
        config, together = self.run.config, [own]
        if config.training.shared_prefix and not states.is_on:  # as in training, with others of the client
            most = config.training.micro_batch_size or config.training.batch_size
            together += [other for other in self.data.samples[name] if other is not own][: most - 1]
        encoded = self.backbone.encode(together, self.catalog, config.data.history_items)
        batch: Batch = self.backbone.collate(encoded)
        row = self.backbone.collate_row(encoded).row if len(together) > 1 else None
        guard = self.attackers.guard(states.model_copy(update={"settle_rounds": None}), f"{own.user} of {name}")
        shared, back = 0 if row is None else row.prefix, partial(rounded, wire=wire)
        return observe(model, self.adapters[name], batch, through, guard, passes, shared, back)

    def _others(self, seen_of: Callable[[str, Sample], Observation], client: str) -> list[Observation]:
        """Observe the training passes of a client that were not drawn, each once."""
        drawn = [own for name, own in self.drawn if name == client]
        return [seen_of(client, own) for own in self.data.samples[client] if own not in drawn]

    def _through(self, plan: CutPlan, noise: float, wire: str) -> Callable[[Tensor], Tensor]:
        """Make what becomes of states on their way: noise, and rounding."""
        size, source = 0.0, torch.Generator().manual_seed(derive_seed(self.settings.seed, "noise", str(noise)))
        if noise > 0:
            rows = self.attackers.auxiliary(_AUXILIARY_FOR_SCALE, derive_seed(self.settings.seed, "scale"))
            squares = []
            for adapter in self.adapters.values():
                own = self.run.config
                replica = Replica(self.backbone, plan, own.adapter, adapter, states=own.privacy.states)
                squares += [float(replica.states(torch.tensor([row])).square().mean()) for row in rows]
            size = noise * float(np.sqrt(np.mean(squares)))

        def changed(states: Tensor) -> Tensor:
            if size > 0:
                drawn = torch.randn(states.shape, generator=source).to(states.device)
                states = (states.float() + size * drawn).to(states.dtype)
            return rounded(states, wire)

        return changed

    def _worth(self, model: CutModel, at: _Setting) -> dict[str, Any]:
        """Measure the recommendations: the run's own where nothing is added to it, else those of users drawn anew."""
        own = self.run.config.privacy.states
        as_it_was = at.guard == own and (not own.is_on or at.plan == self.assembly.plan)
        rounded_as_it_was = self.wires == (self.run.config.runtime.wire,)
        if not any(self.settings.noises) and as_it_was and rounded_as_it_was:
            told = self.run.metrics or {}
            users = sum(own["users"] for own in told["clients"].values())
            return {**self._own_interval(), "mean": told["overall"][self.metric], "users": users}
        return self._ranked_once(model, at.plan, at.noise, at.guard, at.through, at.wire)

    def _own_interval(self) -> dict[str, float]:
        """Resample the users of the run's own test, where it is kept."""
        path = self.run.folder / "evaluation.json"
        if not path.exists():
            return {}
        found = Evaluation.from_dict(json.loads(path.read_text(encoding="utf-8"))["test"])
        values = found.values[self.metric]
        return resampled(values, generator(self.settings.seed, "worth")) if len(values) else {}

    def _worth_unguarded(self, model: CutModel, at: _Setting) -> dict[str, Any] | None:
        """Measure what the same adapters' recommendations are worth with nothing done to states, where there is."""
        if not at.guard.is_on:
            return None
        return self._ranked_once(model, at.plan, 0.0, StatePrivacyConfig(), lambda states: states, "exact")

    def _ranked_once(
        self,
        model: CutModel,
        plan: CutPlan,
        noise: float,
        guard: StatePrivacyConfig,
        through: Callable[[Tensor], Tensor],
        wire: str,
    ) -> dict[str, Any]:
        """Rank for users drawn anew, the same at every setting.

        Where nothing is done to states a cut model computes what the whole one does, so it is ranked by once only.
        """
        untouched = noise == 0 and not guard.is_on and wire == "exact"
        key = (None if untouched else plan, noise, guard, wire)
        if key not in self._worths:
            self._worths[key] = self._ranked(model, guard, through)
        return self._worths[key]

    def _ranked(
        self, model: CutModel, states: StatePrivacyConfig, through: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        config, most = self.run.config, self.settings.ranked_users
        cases = {name: list(own) for name, own in self.data.test.items()}
        every = [(name, case) for name, own in cases.items() for case in own]
        if most is not None and most < len(every):
            chosen = generator(self.settings.seed, "ranked users").choice(len(every), most, replace=False)
            kept = {every[place][1].user for place in chosen.tolist()}
            cases = {name: [case for case in own if case.user in kept] for name, own in cases.items()}
        rankers = {}
        try:
            for name, adapter in self.adapters.items():
                client = model.client(f"{name} ranked", adapter, self.attackers.guard(states, f"{name} ranked"))
                if client.transport is not None:
                    client.transport = Spy(client.transport, through)
                rankers[name] = self.assembly.ranker(client)
            found = evaluate(rankers, cases, config.evaluation.cutoffs, config.evaluation.batch_size)
        finally:
            for name in self.adapters:
                model.dismiss(f"{name} ranked")
        values = found.values[self.metric]
        return {**resampled(values, generator(self.settings.seed, "worth")), "users": len(values)}

    def _attack_once(self, name: str, level: Knowledge, at: _Setting) -> dict[str, Any]:
        """Attack, unless the same was done where only the cut differs that this attack does not look at."""
        depth = at.plan.input_layers if AUDITS[name].looks_at == "first" else at.plan.output_layers
        key = (name, level, depth, at.noise, at.wire, at.passes, at.pairs if level == "pairs" else None, at.guard)
        if key not in self._done:
            self._done[key] = self._attack(name, level, at)
        return self._done[key]

    def _attack(self, name: str, level: Knowledge, at: _Setting) -> dict[str, Any]:
        """Run one attack on all passes, those of each client with what is known of that client."""
        audit, rows = make_audit(name), []
        began = time.perf_counter()
        label = f"k {at.plan.input_layers}, m {at.plan.output_layers}: {name}, {level}"
        with self.progress.task(label, len(at.seen), "users") as advance:
            for client, of in self._alike().items():
                places = [place for place, own in enumerate(self.secrets) if own.client in of]
                others = [each for name in of for each in at.others(name)] if audit.looks_at_everyone else []
                guesses = audit.attack([at.seen[place] for place in places] + others, self._attacker(level, client, at))
                for place, guess in zip(places, guesses[: len(places)], strict=True):
                    rows.append(score(guess, self.secrets[place], self.reader))
                advance(len(places))
        seconds = time.perf_counter() - began
        return {"audit": name, "knowledge": level, **interval(rows, self.settings.seed), "seconds": seconds}

    def _alike(self) -> dict[str, list[str]]:
        """Put together clients of one adapter, by the name of the first: one attacker does for all of them."""
        names = list(dict.fromkeys(own.client for own in self.secrets))
        return {names[0]: names} if self.assembly.method.pooled else {name: [name] for name in names}

    def _attacker(self, level: Knowledge, client: str, at: _Setting) -> Attacker:
        """Make an attacker, or take the one that knows the same, with what it has learned."""
        key = (level, client, at.plan, at.noise, at.wire, at.passes, at.pairs, at.guard)
        if key not in self._attackers:
            self._attackers = {own: kept for own, kept in self._attackers.items() if own[2:] == key[2:]}
            self._attackers[key] = self.attackers.make(
                level, client, at.plan, at.guard, at.through, at.passes, pairs=at.pairs
            )
        return self._attackers[key]
