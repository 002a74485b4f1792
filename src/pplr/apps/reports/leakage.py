"""What the server could read of users, as the audit measured it, and what differential privacy bounds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pplr.apps.auditing import SHOWN, frontier
from pplr.apps.reports.charts import as_chart, intervals
from pplr.apps.reports.elements import (
    MISSING,
    Cell,
    Code,
    Link,
    Paragraph,
    Part,
    Section,
    Table,
    Text,
    between,
    measured,
    said,
    seconds_cell,
)
from pplr.apps.reports.records import AttackRecord, AuditRecord, IntervalRecord, RunFiles, SettingRecord
from pplr.privacy.verdict import is_within_reach

__all__ = [
    "audit_command",
    "dp_section",
    "elsewhere",
    "interval_cell",
    "leakage_section",
    "own_setting",
    "spent",
    "strongest_attack",
    "where",
]

_MEANING = (
    "token_recovery: share of the tokens that tell of the user, read right. item_f1: items of the user's history. "
    "target_hit@1: users for whom the item that a training pass predicts was named first. "
    "Means over users, with 95 % intervals."
)
_NOTHING = (
    "No differential privacy was used (privacy.dp is off), so nothing bounds what the adapters that clients exchange "
    "tell of one user. What crosses the cut is another matter: see "
)


def audit_command(files: RunFiles) -> Code:
    """Name the command that measures it."""
    return Code(said(shlex.join(["pplr", "audit", str(files.folder)])))


def own_setting(audit: AuditRecord) -> SettingRecord:
    """Take the run's own cut and guard without added noise, one pass, else the first that was audited."""
    own = [found for found in audit.settings if _is_own(found, audit)]
    return (own or audit.settings)[0]


def elsewhere(audit: AuditRecord) -> bool:
    """Whether no setting of the audit is the run's own cut and guard without added noise."""
    return not _is_own(own_setting(audit), audit)


def _is_own(setting: SettingRecord, audit: AuditRecord) -> bool:
    own = (setting.cut, setting.guard, setting.noise, setting.passes, setting.wire or audit.wire)
    return own == (audit.cut, audit.guard, 0, 1, audit.wire)


def strongest_attack(setting: SettingRecord, metric: str) -> tuple[AttackRecord, IntervalRecord] | None:
    """Find the attack that found most; ``None`` where none says anything of the metric."""
    levels = {own.knowledge for own in setting.audits}
    told = [
        (own, found)
        for own in setting.audits
        if is_within_reach(own.knowledge, levels) and (found := own.found.get(metric)) is not None
    ]
    return max(told, key=lambda pair: pair[1].mean) if told else None


def leakage_section(files: RunFiles) -> Section:
    """Say what attacks read, or that nobody measured it."""
    audit, title = files.audit, "What the server could read"
    if audit is None:
        return Section("leakage", title, [_unmeasured(files), *_guarded(files)])
    setting = own_setting(audit)
    parts: list[Part] = [Paragraph((said(audit.verdict),), "verdict"), *_guarded(files)]
    if elsewhere(audit):
        parts.append(Paragraph((f"Measured at {where(setting, audit)}, which is not how the run was cut.",), "notice"))
    parts += [
        Paragraph(
            (
                "Attacks on the training passes of ",
                measured(audit.users),
                f" users. {_MEANING} The last row is a guess that sees nothing. An attack that finds little does not "
                "show that others would.",
            )
        ),
        _attacks_table(setting, audit),
    ]
    rows = [
        (f"{own.audit}, has {own.knowledge}", found.mean, found.low, found.high)
        for own in setting.audits
        if (found := own.found.get("item_f1")) is not None
    ]
    guess = audit.baseline.get("item_f1")
    if rows:
        figure = intervals(
            rows,
            ("popularity, no states", guess.low, guess.high) if guess else None,
            "item_f1 (0 to 1)",
            limits=(-0.03, 1.03),
        )
        told = "; ".join(f"{name} {mean:.2f}" for name, mean, *_ in rows)
        told += f"; a guess without states {guess.mean:.2f}" if guess else ""
        caption = f"Items of the history that each attack read, {where(setting, audit)}. Right is worse for the users."
        parts.append(as_chart(figure, f"Means with intervals of item_f1: {said(told)}.", caption, wide=True))
    if len(audit.settings) > 1:
        parts += _sweep(audit)
    return Section("leakage", title, parts)


def _guarded(files: RunFiles) -> list[Part]:
    """Say what clients do to what they send, and what that promises."""
    states = files.metrics.states if files.metrics else None
    return [Paragraph((said(f"What crosses the cut: {states.summary}. {states.note}"),))] if states else []


def _unmeasured(files: RunFiles) -> Paragraph:
    if files.config.cut is None:
        return Paragraph(
            (
                "The model is not cut, so no hidden states crossed. What the adapters tell of users was ",
                Cell(MISSING),
                ".",
            )
        )
    told: Text = (
        "How much of a user's history the server could read off hidden states was ",
        Cell(MISSING),
        " for this run. Hidden states can be inverted: until it is measured, count histories as known to whoever runs "
        "the server. ",
    )
    if files.config.backbone.name == "encoder":
        return Paragraph((*told, "The audit does not attack the encoder yet."), "verdict")
    return Paragraph((*told, "Measure it with ", audit_command(files), "."), "verdict")


def _attacks_table(setting: SettingRecord, audit: AuditRecord) -> Table:
    rows: list[Sequence[Cell | str]] = [
        (
            said(own.audit),
            said(own.knowledge),
            *(interval_cell(own.found.get(metric)) for metric in SHOWN),
            seconds_cell(own.seconds),
        )
        for own in setting.audits
    ]
    ruled = [len(rows)]
    rows.append(("no states", "popularity", *(interval_cell(audit.baseline.get(metric)) for metric in SHOWN), ""))
    columns = ("attack", "attacker has", *SHOWN, "time")
    return Table(f"What attacks read, {where(setting, audit)}", columns, rows, texts=("attacker has",), ruled=ruled)


def interval_cell(found: IntervalRecord | None) -> Cell:
    """Show a mean over users with its interval."""
    return Cell(MISSING) if found is None else between(found.mean, found.low, found.high)


def where(setting: SettingRecord, audit: AuditRecord) -> str:
    """Say at which cut, guard, noise and wire format a setting was audited."""
    cut = setting.cut
    told = f"k = {cut.input_layers}, m = {cut.output_layers} of {cut.total_layers} blocks"
    told += f", {said(setting.guard)}" if setting.guard else ""
    told += f", noise {setting.noise:g} times the states' size" if setting.noise else ""
    told += f", {said(setting.wire)} on the wire" if setting.wire not in (None, audit.wire) else ""
    return told + (f", mean of {setting.passes} passes" if setting.passes > 1 else "")


def _sweep(audit: AuditRecord) -> list[Part]:
    rows: list[Sequence[Cell | str]] = []
    for setting in audit.settings:
        strongest = (strongest_attack(setting, metric) for metric in SHOWN)
        worth = setting.worth
        told = measured(worth.mean)
        if worth.mean is not None and worth.low is not None and worth.high is not None:
            told = between(worth.mean, worth.low, worth.high, 4)
        rows.append((where(setting, audit), *(interval_cell(own[1] if own else None) for own in strongest), told))
    columns = ("setting", *SHOWN, f"worth: {said(audit.metric)}")
    parts: list[Part] = [
        Table("The strongest attack at each setting, and what recommendations are worth", columns, rows)
    ]
    drawable = all(setting.worth.mean is not None for setting in audit.settings)
    if drawable and any(strongest_attack(setting, "item_f1") for setting in audit.settings):
        parts.append(
            as_chart(
                frontier(audit.raw),
                f"Points for {len(audit.settings)} settings: item_f1 of the strongest attack, and {audit.metric}. "
                "The figures are in the table above.",
                "Leakage against worth. To the left is better for the users, upwards for recommendations.",
                wide=True,
            )
        )
    return parts


def spent(files: RunFiles) -> dict[str, float | int | None]:
    """Read each client's ε, from the test figures or else from the newest round that tells it."""
    if files.metrics is not None and files.metrics.privacy is not None:
        return dict(files.metrics.privacy.epsilon)
    told: dict[str, float | int | None] = {}
    for record in files.rounds:
        told |= {name: own.epsilon for name, own in record.clients.items() if own.epsilon is not None}
    return told


def dp_section(files: RunFiles) -> Section:
    """Say what is spent, of what, and what that does not cover."""
    private, title = files.config.privacy.dp, "Differential privacy"
    if not private.is_on:
        return Section("dp", title, [Paragraph((_NOTHING, Link("leakage", "what the server could read"), "."))])
    own, epsilon = files.metrics.privacy if files.metrics else None, spent(files)
    parts: list[Part] = [
        Paragraph(
            (
                f"ε at δ = {private.delta:g}, for each {said(own.unit) if own else 'user'} "
                f"({said(own.adjacency) if own else 'add or remove one user'}): noise multiplier ",
                measured(private.noise_multiplier, 3),
                ", users drawn at a rate of ",
                measured(private.sampling_rate, 3),
                ", gradients clipped to ",
                measured(private.clip_norm, 3),
                f"; middle adapter {'frozen' if private.freeze_middle else 'trained'}.",
            )
        ),
        Table(
            "Spent by each client's users",
            ("client", "ε", "rounds recorded", "rounds booked"),
            [
                (
                    said(name),
                    measured(epsilon.get(name), 3),
                    measured(len(_recorded(files, name))),
                    measured(len(files.booked[name]) if name in files.booked else None),
                )
                for name in files.clients
            ],
        ),
    ]
    behind = [name for name in files.clients if set(files.booked.get(name, [])) - _recorded(files, name)]
    if behind:
        parts.append(
            Paragraph(
                (
                    f"The ledgers of {said(', '.join(behind))} have booked rounds that are not recorded, as "
                    "where a run was stopped in a round: more is spent than the ε above says.",
                ),
                "verdict",
            )
        )
    if own is not None and own.note:
        parts.append(Paragraph((said(own.note), " See ", Link("leakage", "what the server could read"), ".")))
    return Section("dp", title, parts)


def _recorded(files: RunFiles, client: str) -> set[int]:
    return {
        record.server_round
        for record in files.rounds
        if client in record.clients and record.clients[client].epsilon is not None
    }
