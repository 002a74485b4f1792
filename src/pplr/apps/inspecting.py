"""Commands that look at finished runs: attack them, put them side by side, write and serve pages about them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from pplr.apps.command_group import complain
from pplr.apps.options import BootstrapSeed, KitPath, RunDir, Samples, StageServer, stage_server_at

__all__ = ["audit", "compare", "report", "web"]


def audit(
    run_dir: RunDir,
    users: Annotated[int, typer.Option(min=2, help="Users whose passes are attacked.")] = 20,
    only: Annotated[
        list[str] | None,
        typer.Option("--attack", help="Only this attack; else all but those that take long. Repeatable."),
    ] = None,
    has: Annotated[
        list[str] | None,
        typer.Option(help="Only attackers who have this: own, exchanged, mixed, base, pairs or catalog. Repeatable."),
    ] = None,
    cut: Annotated[
        list[str] | None, typer.Option(metavar="K,M", help="Another cut than the run's own. Repeatable.")
    ] = None,
    noise: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Noise on hidden states, as a multiple of their size. Repeatable."),
    ] = None,
    passes: Annotated[
        list[int] | None,
        typer.Option(min=1, help="How often a pass crosses with new noise; attackers see the mean. Repeatable."),
    ] = None,
    pairs: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Public passes whose states an attacker with pairs has; else 256. Repeatable."),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE,...", help="As if the run had these settings of privacy.states. Repeatable."),
    ] = None,
    wire: Annotated[
        list[str] | None, typer.Option(help="How states travel: exact, float32, bfloat16 or int8. Repeatable.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Several cuts, noises and wire formats, and a plot.")] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN_DIR", help="An audited run for the same plot, such as a private one. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws of users, public text and noise.")] = 0,
) -> None:
    """Attack what a finished run's server sees, and say in figures what it can read of a user."""
    from pplr.apps import auditing
    from pplr.apps.terminal import Screen, TerminalProgress

    screen, others = Screen(), [auditing.read_beside(own) for own in beside or ()]
    with screen.busy("loading libraries"):
        from pplr.runtimes.run import open_run
    with closing(open_run(run_dir)) as run:
        progress = TerminalProgress(screen)
        cuts = auditing.parse_cuts(cut or ())
        if sweep and not cuts:
            cuts = auditing.sweep_cuts(run.assembly(progress).backbone.total_layers)
        noises = noise or (auditing.SWEPT_NOISES if sweep else (0.0,))
        wires = wire or (dict.fromkeys((run.config.runtime.wire, auditing.SWEPT_WIRE)) if sweep else ())
        content = run.audit(
            attacks=only or (),
            knowledge=has or (),
            users=users,
            cuts=cuts,
            noises=noises,
            passes=passes or (1,),
            pairs=pairs or (256,),
            guards=[own.split(",") for own in guard or ()],
            wires=tuple(wires),
            seed=seed,
            progress=progress,
        )
    for heading, table in auditing.audit_tables(content):
        screen.line()
        screen.line(heading, style="bold")
        screen.table(table)
    screen.line()
    screen.line(f"written: {run_dir / 'audit.json'}")
    if sweep or others:
        label = auditing.label_of(run_dir) if others else None
        auditing.draw_frontier(content, run_dir / "audit.png", beside=others, label=label)
        screen.line(f"drawn: {run_dir / 'audit.png'}")
    screen.line()
    screen.line(content["verdict"])


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Finished runs; the first is the base.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="Compare by this metric, such as ndcg@10. Repeatable.")
    ] = None,
    samples: Samples = 10_000,
    seed: BootstrapSeed = 0,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one HTML page as well, with clients and plots.")
    ] = None,
) -> None:
    """Put runs side by side, and test each against the first over the same users."""
    from pplr.apps.compare import difference_table, run_table, spread_table
    from pplr.apps.terminal import Screen
    from pplr.runtimes.comparing import compare as compare_runs

    screen = Screen()
    with screen.busy("loading libraries"):
        from pplr.runtimes.run import open_run
    runs = [open_run(run_dir) for run_dir in run_dirs]
    screen.table(run_table(runs))
    screen.line()
    screen.table(spread_table(runs, metric or ()))
    if len(runs) > 1:
        with screen.busy("resampling users"):
            differences = compare_runs(runs, metric or (), samples=samples, seed=seed)
        screen.line()
        screen.table(difference_table(differences, runs[0]))
    if html is not None:
        with screen.busy("drawing"):
            from pplr.apps.reports.pages import write_comparison

            write_comparison(run_dirs, metric or (), html, samples=samples, seed=seed)
        screen.line()
        screen.line(f"written: {html}")


def report(
    run_dir: RunDir,
    others: Annotated[
        list[Path] | None, typer.Argument(metavar="[OTHER_RUN_DIR]...", help="Finished runs to stand beside it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="RUN_DIR/report.html when absent.")] = None,
    samples: Samples = 10_000,
    seed: BootstrapSeed = 0,
) -> None:
    """Write what a run did, is worth, cost and gives away as one HTML page that needs nothing else."""
    from pplr.apps.terminal import Screen

    screen = Screen()
    with screen.busy("drawing"):
        from pplr.apps.reports.pages import write_report

        written = write_report(run_dir, others or (), out, samples=samples, seed=seed)
    screen.line(f"written: {written}")


def web(
    run_dir: RunDir,
    host: Annotated[str, typer.Option(help="Address to listen at; the default is open to this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8765,
    stage_server: StageServer = None,
    kit: KitPath = None,
) -> None:
    """Serve a page on which a run is asked for recommendations, and its training is followed."""
    from pplr.apps.terminal import Screen

    screen, server = Screen(), stage_server_at(stage_server, kit)
    with screen.busy("loading libraries"):
        from pplr.apps.web.gate import is_loopback
        from pplr.apps.web.serving import serve
    if not is_loopback(host):
        complain(
            f"warning: {host} can be reached from other machines. The page has no login and shows the histories of "
            "this run's users to whoever opens it."
        )
    serve(run_dir, host, port, server, told=lambda url: screen.line(f"open {url} in a browser; Ctrl-C stops it"))
