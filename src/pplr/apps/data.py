"""The commands of ``pplr data``: fetch, import, describe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pplr.apps.options import ConfigPath, Settings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Fetch, import and describe data.")


class _ListsSources(TyperCommand):
    """Ends its help with the registered sources, which are loaded only then."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        from pplr.data.sources import sources

        own = [f"{source.name}: {source.summary}" for source in sources().values() if source.fetch is not None]
        others = [f"{source.name}: {source.summary}" for source in sources().values() if source.fetch is None]
        self.epilog = "\n\n".join(["Sources that can be fetched:", *own, "Sources of your own files:", *others])
        super().format_help(ctx, formatter)


@app.command("fetch", cls=_ListsSources)
def fetch(source: Annotated[str, typer.Argument(metavar="SOURCE", help="A registered source, see below.")]) -> None:
    """Fetch a source's raw files once into the cache, checked by SHA-256."""
    from pplr.apps.terminal import Screen
    from pplr.data.sources import fetch_source

    screen = Screen()
    with screen.busy(f"fetching {source}"):
        folder = fetch_source(source, notify=screen.line)
    screen.line(f"{source} is in {folder}")


@app.command("import")
def import_table(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A CSV, TSV or Parquet file with a row for each event.")],
    user_column: Annotated[str, typer.Option(help="Its column of users.")],
    item_column: Annotated[str, typer.Option(help="Its column of items, which the items file shares.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write.")],
    title_column: Annotated[str | None, typer.Option(help="The column of titles, in either file.")] = None,
    rating_column: Annotated[str | None, typer.Option(help="The column of ratings.")] = None,
    timestamp_column: Annotated[
        str | None, typer.Option(help="The column of times: Unix seconds or milliseconds, or dates.")
    ] = None,
    items_file: Annotated[Path | None, typer.Option(help="A second file with a row for each item.")] = None,
    attribute: Annotated[
        list[str] | None, typer.Option(help="Another column to keep, such as the users' region. Repeatable.")
    ] = None,
) -> None:
    """Turn a table into a folder that `source: recbole, path: FOLDER` reads."""
    from pplr.apps.atomic import write_atomic_files
    from pplr.apps.tables import human_bytes
    from pplr.apps.terminal import Screen
    from pplr.config import DataConfig
    from pplr.data.sources import load_dataset

    named = {"title": title_column, "rating": rating_column, "timestamp": timestamp_column}
    columns = {"user": user_column, "item": item_column} | {key: name for key, name in named.items() if name}
    for name in attribute or []:
        if name in columns:
            raise typer.BadParameter(
                f"{name!r} is the name of a column that pplr has a meaning for", param_hint="--attribute"
            )
        columns[name] = name
    screen = Screen()
    with screen.busy(f"reading {file}"):
        config = DataConfig(source="table", path=file, columns=columns, items_path=items_file)
        dataset = load_dataset(config, notify=screen.line)
    for note in dataset.notes:
        screen.line(note)
    with screen.busy(f"writing {out}"):
        written = write_atomic_files(dataset, out)
    for path in written:
        screen.line(f"wrote {path} ({human_bytes(path.stat().st_size)})")
    counts = (len(dataset.user_ids), len(dataset.catalog), len(dataset.interactions))
    screen.line("{:,} users, {:,} items, {:,} interactions".format(*counts))
    screen.line("To use it, set in a configuration: data: {source: recbole, path: " + str(out) + "}")


@app.command("describe")
def describe_data(config: ConfigPath = None, settings: Settings = None) -> None:
    """Count what a configuration's data holds, and how large its clients are."""
    from pplr.apps.tables import Table
    from pplr.apps.terminal import Screen
    from pplr.config_files import load_config
    from pplr.data.describe import describe
    from pplr.data.holdout import make_holdout
    from pplr.data.partition import make_partition
    from pplr.data.sources import load_dataset
    from pplr.errors import PartitionError

    chosen = load_config(config, settings or ())
    screen = Screen()
    with screen.busy(f"reading {chosen.data.source}"):
        dataset = load_dataset(chosen.data, notify=screen.line)
        holdout = make_holdout(dataset, chosen.data.holdout, chosen.run.seed)
    failure, partition = None, None
    with screen.busy("sharing users out among clients"):
        try:
            partition = make_partition(
                dataset, holdout, chosen.data.partition, chosen.federation.clients, chosen.run.seed
            )
        except PartitionError as error:
            failure = error
    description = describe(dataset, holdout, partition)
    screen.table(Table(("data", ""), description.rows(), texts=("data", "")))
    if failure is not None:
        raise failure
    columns = ("client", "users who", "users", "interactions", "train users", "samples", "validation", "test")
    screen.line()
    screen.table(Table(columns, [client.row() for client in description.clients], texts=columns[:2]))
