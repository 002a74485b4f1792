"""The command line. Every command loads what it needs when it runs, so that help answers at once."""

from __future__ import annotations

import contextlib
import shlex
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from pplr import __version__
from pplr.apps import cutting, data, enrolling, inspecting, serving, staging, starting
from pplr.apps.command_group import INTERRUPTED, CommandGroup, complain, silence, wait_briefly
from pplr.apps.options import (
    ConfigPath,
    KitPath,
    RunDir,
    Settings,
    StageServer,
    stage_server_at,
)

__all__ = ["app", "main"]

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Privacy-preserving LLM-based recommendation: a federation of clients trains one recommender around a "
    "language model that is cut between client and server.",
)
_SET_UP, _TRAIN, _INSPECT, _CUT = "Set up", "Train and recommend", "Look at runs", "Cut and federate"


def main() -> None:
    """Run the command line on the arguments of this process, and end it."""
    wait_briefly()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app(prog_name="pplr")
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            silence()


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pplr {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see `pplr config --template`.")],
    settings: Settings = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="The run's folder; runs/NAME for a configuration NAME.yaml when absent.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    stage_server: StageServer = None,
    kit: KitPath = None,
    federation: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Train with the clients enrolled here, each on its own machine.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --federation: the folder of `pplr server --state`.")
    ] = None,
) -> None:
    """Train a federation, test it, and keep both in a run folder."""
    from pplr.apps.results import result_table
    from pplr.apps.terminal import Screen, TerminalProgress
    from pplr.config_files import load_config

    chosen = load_config(config, settings or ())
    folder = run_dir if run_dir is not None else Path("runs") / config.stem
    screen = Screen()
    progress = TerminalProgress(screen, rounds=chosen.federation.rounds)
    overrides = [part for setting in settings or () for part in ("--set", setting)]
    given = {"--stage-server": stage_server, "--kit": kit, "--federation": federation, "--state": state}
    there = [part for option, value in given.items() if value for part in (option, str(value))]
    again = shlex.join(["pplr", "train", str(config), *overrides, "--run-dir", str(folder), *there, "--resume"])
    if (federation is None) != (state is None):
        raise typer.BadParameter("give both --federation and --state, or neither")
    server = stage_server_at(stage_server, kit)
    try:
        with screen.busy("loading libraries"):
            from pplr.runtimes.launch import train as train_run
        if federation is None or state is None:
            run = train_run(chosen, folder, resume=resume, progress=progress, stage_server=server)
            run.close()
            metrics = run.metrics
        else:
            from pplr.runtimes.flower_federation import train as train_federation

            metrics = train_federation(
                chosen,
                folder,
                federation=federation,
                state=state,
                stage_server=server,
                resume=resume,
                progress=progress,
            )
    except KeyboardInterrupt as error:
        complain(f"stopped. Go on with: {again}")
        raise typer.Exit(INTERRUPTED) from error
    if metrics is not None:
        screen.line()
        screen.lines(result_table(metrics, screen.width))
        screen.line()
    screen.line(f"run folder: {folder}")


def evaluate(run_dir: RunDir, stage_server: StageServer = None, kit: KitPath = None) -> None:
    """Test a run again and print its figures."""
    from pplr.apps.results import result_table
    from pplr.apps.terminal import Screen, TerminalProgress

    screen, server = Screen(), stage_server_at(stage_server, kit)
    with screen.busy("loading libraries"):
        from pplr.runtimes.run import open_run
    with closing(open_run(run_dir, server)) as run:
        metrics = run.evaluate(progress=TerminalProgress(screen))
    screen.lines(result_table(metrics, screen.width))


def recommend(
    run_dir: RunDir,
    client: Annotated[
        str | None, typer.Option(help="Whose model recommends; the user's own client when absent.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="A user of that client, by the data's id.")] = None,
    history: Annotated[
        str | None, typer.Option(metavar='"A; B; C"', help="Titles instead of a user, oldest first.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every user of that client, or of all clients, into the file --out.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --all: a .csv, .jsonl or .parquet file.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many items.")] = 10,
    stage_server: StageServer = None,
    kit: KitPath = None,
) -> None:
    """Recommend items to a user, to whoever has taken the titles given, or to every user."""
    if every != (out is not None):
        raise typer.BadParameter("give both --all and --out, or neither")
    if out is not None:
        if user is not None or history is not None:
            raise typer.BadParameter("--all takes no --user and no --history")
        _recommend_all(run_dir, client, out, count, stage_server, kit)
        return
    from pplr.apps.tables import Table, figure
    from pplr.apps.terminal import Screen, TerminalProgress

    if (user is None) == (history is None):
        raise typer.BadParameter("give one of --user, --history and --all")
    titles = [title.strip() for title in (history or "").split(";") if title.strip()]
    if user is None and not titles:
        raise typer.BadParameter("it holds no title", param_hint="--history")
    screen, server = Screen(), stage_server_at(stage_server, kit)
    with screen.busy("loading libraries"):
        from pplr.runtimes.run import open_run
    with closing(open_run(run_dir, server)) as run:
        found = run.recommend(
            client,
            user=user,
            history=None if user is not None else titles,
            count=count,
            progress=TerminalProgress(screen),
        )
        heading = "history, oldest first"
        if user is not None:
            taken = run.history_titles(user)
            titles = taken[-run.config.data.history_items :]
            shown = f"the newest {len(titles)} of {len(taken)}, " if len(titles) < len(taken) else ""
            heading = f"history of user {user}, {shown}oldest first"
    screen.line(f"{heading}:", style="bold")
    for title in titles:
        screen.line(f"  {title}")
    screen.line()
    rows = [(figure(own.rank), own.title, figure(own.score), own.item_id) for own in found]
    screen.table(Table(("rank", "title", "score", "item"), rows, texts=("title", "item")))


def _recommend_all(
    run_dir: Path, client: str | None, out: Path, count: int, stage_server: str | None, kit: Path | None
) -> None:
    from pplr.apps.lists import check_format, write_lists
    from pplr.apps.terminal import Screen, TerminalProgress

    check_format(out)
    screen, server = Screen(), stage_server_at(stage_server, kit)
    with screen.busy("loading libraries"):
        from pplr.runtimes.run import open_run
    with closing(open_run(run_dir, server)) as run:
        lists = run.recommend_all(client, count=count, progress=TerminalProgress(screen))
    rows = write_lists(lists, out)
    screen.line(f"written: {out}, {rows} items for {len(lists)} users")


def show_config(
    config: ConfigPath = None,
    settings: Settings = None,
    template: Annotated[bool, typer.Option("--template", help="Print every field with what it means.")] = False,
) -> None:
    """Print a template to start from, or a configuration with every field resolved."""
    from pplr.config_files import config_template, load_config

    if template:
        if config is not None or settings:
            raise typer.BadParameter("the template takes no CONFIG and no --set")
        typer.echo(config_template(), nl=False)
    elif config is None and not settings:
        raise typer.BadParameter("give a CONFIG, or --template")
    else:
        typer.echo(load_config(config, settings or ()).to_yaml(), nl=False)


def doctor() -> None:
    """Check the installation, the machine and the cache, and say what is missing and how to get it."""
    from pplr.apps.doctor import examine
    from pplr.apps.tables import Table
    from pplr.apps.terminal import Screen

    screen = Screen()
    with screen.busy("looking around"):
        findings = examine()
    screen.table(Table(("what", "found"), findings.rows, texts=("what", "found")))
    screen.line()
    for line in findings.missing or ("Nothing is missing.",):
        screen.line(line)
    if not findings.usable:
        raise typer.Exit(1)


app.command(rich_help_panel=_SET_UP)(starting.init)
app.command("config", rich_help_panel=_SET_UP)(show_config)
app.command(rich_help_panel=_SET_UP)(doctor)
app.add_typer(data.app, name="data", rich_help_panel=_SET_UP)
app.command(rich_help_panel=_TRAIN)(train)
app.command(rich_help_panel=_TRAIN)(evaluate)
app.command(rich_help_panel=_TRAIN)(recommend)
app.command(rich_help_panel=_INSPECT)(inspecting.compare)
app.command(rich_help_panel=_INSPECT)(inspecting.report)
app.command(rich_help_panel=_INSPECT)(inspecting.web)
app.command(rich_help_panel=_INSPECT)(inspecting.audit)
app.command(rich_help_panel=_CUT)(cutting.plan)
app.command(rich_help_panel=_CUT)(cutting.cut)
app.command(rich_help_panel=_CUT)(serving.client)
app.command(rich_help_panel=_CUT, context_settings={"allow_extra_args": True})(serving.server)
app.add_typer(enrolling.app, name="enroll", rich_help_panel=_CUT)
app.add_typer(staging.app, name="stage", rich_help_panel=_CUT)


if __name__ == "__main__":
    main()
