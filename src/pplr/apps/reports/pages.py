"""The report of a run and the comparison of several, each as one HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from pplr import __version__
from pplr.apps.reports.comparison import comparison_page, comparison_parts
from pplr.apps.reports.costs import cost_section, whole_bytes
from pplr.apps.reports.elements import (
    MISSING,
    Cell,
    Code,
    Link,
    Page,
    Section,
    Text,
    bytes_cell,
    measured,
    said,
    share_cell,
)
from pplr.apps.reports.leakage import (
    audit_command,
    dp_section,
    elsewhere,
    leakage_section,
    own_setting,
    spent,
    strongest_attack,
)
from pplr.apps.reports.learning import learning_section
from pplr.apps.reports.mixing import mixing_section
from pplr.apps.reports.quality import headline_metric, quality_section
from pplr.apps.reports.records import RunFiles, read_run
from pplr.apps.reports.setting import repeat_section, setting_section
from pplr.storage import write_atomic

__all__ = ["render", "report_page", "write_comparison", "write_report"]

_MADE_BY = f"pplr {__version__}"


def write_report(
    folder: Path, others: Sequence[Path] = (), out: Path | None = None, *, samples: int = 10_000, seed: int = 0
) -> Path:
    """Write ``report.html`` into a run folder, of a run that is finished or not.

    Args:
        folder: The run's.
        others: Finished runs of the same experiment, to stand beside it.
        out: Another place for the file.
        samples: Bootstrap samples.
        seed: Of the bootstrap.

    Returns:
        The file written.

    Raises:
        RunError: A folder is no run folder, or a file in one is damaged.
        ConfigError: A run did not measure what is compared.
    """
    files, beside = read_run(folder), [read_run(other) for other in others]
    page = report_page(files, beside, samples=samples, seed=seed)
    out = out or folder / "report.html"
    write_atomic(out, render(page).encode())
    return out


def write_comparison(
    folders: Sequence[Path], metrics: Sequence[str], out: Path, *, samples: int = 10_000, seed: int = 0
) -> Path:
    """Write the comparison of finished runs with the first of them.

    Raises:
        RunError: A run is not finished, or was tested on another holdout.
        ConfigError: A metric was not measured.
    """
    runs = [read_run(folder) for folder in folders]
    page = comparison_page(runs, metrics, samples=samples, seed=seed, made_by=_MADE_BY)
    write_atomic(out, render(page).encode())
    return out


def render(page: Page) -> str:
    """Write a page as HTML; every text in it is escaped."""
    environment = Environment(
        loader=PackageLoader("pplr.apps.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["exactly"] = repr
    return environment.get_template("page.html").render(page=page)


def report_page(files: RunFiles, others: Sequence[RunFiles] = (), *, samples: int = 10_000, seed: int = 0) -> Page:
    """Put the report of a run together.

    Args:
        files: What its folder holds.
        others: Finished runs to stand beside it.
        samples: Bootstrap samples.
        seed: Of the bootstrap.
    """
    sections = [setting_section(files), quality_section(files, samples=samples, seed=seed)]
    if others:
        parts = comparison_parts(files, others, samples=samples, seed=seed)
        sections.append(Section("beside", "Beside other runs", parts))
    sections += [
        leakage_section(files),
        dp_section(files),
        cost_section(files),
        learning_section(files),
        mixing_section(files),
        repeat_section(files),
    ]
    title = f"Run report: {said(files.name)}"
    return Page(title, _summary(files), sections, _MADE_BY, notices=_notices(files))


def _notices(files: RunFiles) -> list[Text]:
    if files.metrics is not None:
        return []
    folder = str(files.folder)
    again = shlex.join(["pplr", "train", f"{folder}/config.yaml", "--run-dir", folder, "--resume"])
    return [
        (
            "This run is under way, or was stopped: ",
            measured(len(files.rounds)),
            " of at most ",
            measured(files.config.federation.rounds),
            " server rounds are done, and nothing is tested yet. If it was stopped, go on with ",
            Code(said(again)),
            ".",
        )
    ]


def _summary(files: RunFiles) -> Text:
    """Say the whole in a few figures."""
    config, metrics = files.config, files.metrics
    told: list[str | Cell | Code | Link] = [
        measured(len(files.clients) or config.federation.clients),
        f" clients trained {said(config.backbone.name)} on {said(config.backbone.model)} by the method "
        f"{said(config.federation.method)} in ",
        measured(len(files.rounds)),
        " server rounds. ",
    ]
    if metrics is not None and (metric := headline_metric(metrics)) is not None:
        told += [f"Over all test users {said(metric)} is ", measured(metrics.overall.get(metric))]
        if "popularity" in metrics.floors:
            told += [", where popularity alone gives ", measured(metrics.floors["popularity"].get(metric))]
        spread = metrics.spread.get(metric, {})
        told += ["; the worst client has ", measured(spread.get("worst")), ", the best "]
        told += [measured(spread.get("best")), ". "]
    else:
        told += ["What its recommendations are worth is ", Cell(MISSING), " yet. "]
    if metrics is not None and metrics.cut is not None:
        whole, stored = whole_bytes(files), metrics.cost.client.get("stored_bytes")
        told += ["A client stores ", bytes_cell(stored)]
        if whole and stored is not None:
            told += [", ", share_cell(stored / whole), " of the whole model"]
        told += [". "]
    return [*told, *_leakage(files), *_epsilon(files)]


def _leakage(files: RunFiles) -> list[str | Cell | Code | Link]:
    audit, link = files.audit, Link("leakage", "what the server could read")
    if audit is None:
        if files.config.cut is None:
            return ["The model is not cut, so the server saw no hidden states. "]
        start: list[str | Cell | Code | Link] = ["How much of the histories the server could read is ", Cell(MISSING)]
        if files.config.backbone.name == "encoder":
            return [*start, ". "]
        return [*start, " (", audit_command(files), "). "]
    found, guess = strongest_attack(own_setting(audit), "item_f1"), audit.baseline.get("item_f1")
    if found is None:
        return ["See ", link, ". "]
    told: list[str | Cell | Code | Link] = ["Of a user's history the strongest attack on the server's side read items "]
    told += ["with an F1 of ", measured(found[1].mean, 2)]
    if guess is not None:
        told += [", where a guess without any state gives ", measured(guess.mean, 2)]
    if elsewhere(audit):
        told += [", at another cut or guard than the run's own"]
    return [*told, ": ", link, ". "]


def _epsilon(files: RunFiles) -> list[str | Cell | Code | Link]:
    known = [value for value in spent(files).values() if value is not None]
    if not known:
        return []
    delta = files.config.privacy.dp.delta
    return ["The adapters' ", Link("dp", "ε"), " is at most ", measured(max(known), 3), f" at δ = {delta:g}."]
