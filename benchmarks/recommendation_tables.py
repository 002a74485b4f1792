"""Tables of what recommendations are worth: pplr's configurations beside SASRec and the floors, by holdout."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.tables import Section, command, known_interval, table, where
from pplr.config_files import load_config

METRICS = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")
HEAD = ("what", "seeds", *METRICS, "worst client's ndcg@10", "rounds or epochs", "minutes a seed")

Result = dict[str, Any]


def recommendation_sections(results: dict[str, Result]) -> list[Section]:
    """Make a section for each holdout, so that no table mixes what cannot be compared.

    Args:
        results: What ``benchmarks.quality`` and ``benchmarks.sasrec`` wrote, by name.
    """
    groups: dict[str, dict[str, Result]] = {}
    for name, told in sorted(results.items()):
        groups.setdefault(holdout_of(told), {})[name] = told
    sections = [_section(holdout, own) for holdout, own in groups.items()]
    return sorted(sections, key=lambda section: section.title)


def holdout_of(told: Result) -> str:
    """Tell the hash of the holdout that something was measured on."""
    return str(told["holdout_sha256"] if "sasrec" in told else told["runs"][0]["holdout_sha256"])


def _section(holdout: str, results: dict[str, Result]) -> Section:
    rows: list[list[str]] = []
    notes: list[str] = []
    floors: dict[str, Result] = {}
    for name, told in results.items():
        if "sasrec" in told:
            rows += other_rows(told)
            notes.append(_sasrec_note(name, told))
        else:
            rows.append(training_row(name, told["runs"]))
            machine = told["machine"] | told["runs"][0].get("machine", {})
            notes.append(
                f"- {name}: `{command(told, 'pplr train')}`; {where(machine)}.{best_in_validation(told['runs'])}"
            )
            floors |= told["runs"][0]["floors"]
    shown = {row[0] for row in rows}
    rows += [row(name, [{"overall": own}]) for name, own in sorted(floors.items()) if name not in shown]
    what = next((_data_of(told) for told in results.values() if "config" in told), f"holdout {holdout[:8]}")
    slug = "recommendations-" + what.replace(", ", "-").replace(" ", "-")
    return Section(slug, f"Recommendations: {what}", table(HEAD, rows) + "\n\n" + "\n".join(notes))


def _data_of(told: Result) -> str:
    """Name the data and the holdout of a configuration."""
    data = load_config(told["config"], told["set"]).data
    source = data.source if data.path is None else data.path.name
    return f"{source}, {data.holdout.kind}"


def row(name: str, runs: Sequence[Result], more: Sequence[str] = ("", "", "")) -> list[str]:
    """Make a row from the overall figures of some seeds."""
    means = [known_interval(run["overall"].get(metric) for run in runs) for metric in METRICS]
    return [name, str(len(runs)), *means, *more]


def training_row(name: str, runs: Sequence[Result]) -> list[str]:
    """Make the row of a configuration that pplr trained."""
    worst = known_interval(run["spread"]["ndcg@10"]["worst"] for run in runs)
    totals = [run["seconds"]["total"] for run in runs if run["seconds"]["total"] is not None]
    minutes = f"{statistics.fmean(totals) / 60:.0f}" if totals else ""
    return row(name, runs, (worst, "/".join(str(run["rounds"]) for run in runs), minutes))


def best_in_validation(runs: Sequence[Result]) -> str:
    """Say when validation was best, where one client was trained and each round was kept; nothing otherwise."""
    told = []
    for run in runs:
        kept = run.get("validation", {"clients": {}})
        if len(kept["clients"]) != 1:
            return ""
        ((_, values),) = kept["clients"].items()
        known = [(value, place) for place, value in enumerate(values, 1) if value is not None]
        if not known:
            return ""
        value, place = (min if kept["metric"] == "loss" else max)(known, key=lambda own: own[0])  # the first of equals
        told.append(f"{kept['metric']} {value:.4f} after {place}")
    return f" Best in validation: {', '.join(told)}."


def other_rows(told: Result) -> list[list[str]]:
    """Make the rows of SASRec and of the floors."""
    kinds: dict[str, list[Result]] = {}
    for name, overall in told["overall"].items():
        kinds.setdefault(name.split(",")[0], []).append({"overall": overall})
    runs = told["sasrec"]["runs"]
    minutes = f"{statistics.fmean(run['seconds'] for run in runs) / 60:.0f}"
    trained = ("", "/".join(str(run["epochs"]) for run in runs), minutes)
    return [row(name, own, trained if name == "sasrec" else ("", "", "")) for name, own in kinds.items()]


def _sasrec_note(name: str, told: Result) -> str:
    tried = ", ".join(f"{own['ndcg']:.4f}" for own in told["sasrec"]["tried"])
    device = {"device": told["sasrec"]["device"]} if "device" in told["sasrec"] else {}
    return (
        f"- sasrec (`results/{name}.json`, {told['requirements'][0]}): {told['users']} test users; settings by "
        f"validation NDCG@10 out of {len(told['sasrec']['tried'])} ({tried}): `{told['sasrec']['chosen']}`; "
        f"{where(told['machine'] | device)}."
    )
