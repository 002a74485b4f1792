"""The commands of ``pplr stage``: serve the middle blocks, and what an operator asks of the server that does."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pplr.errors import BackboneError

if TYPE_CHECKING:
    from pplr.runtimes.stage_channel import StageChannel

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Host the middle blocks of a cut model for enrolled clients.")

Kit = Annotated[Path, typer.Option("--kit", metavar="DIR", envvar="PPLR_KIT", help="An operator's startup kit.")]
Address = Annotated[
    str | None, typer.Option("--stage-server", metavar="HOST:PORT", help="The server; the kit's own when absent.")
]
Client = Annotated[str, typer.Argument(metavar="CLIENT", help="A name that was enrolled.")]
Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="One of its adapters, as `pplr stage list` shows it.")]


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A server's bundle of `pplr cut`, or a whole model.")],
    federation: Annotated[
        Path, typer.Option(metavar="DIR", help="The federation's folder, or its server/, ca.crt and revoked.txt.")
    ],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")
    ] = "0.0.0.0:8443",
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save adapters and optimizers here, on request and on stopping.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A loopback address for Prometheus to read.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Number format of the base; the clients' must be the same.")
    ] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    backbone: Annotated[str, typer.Option(help="causal_lm, which serves item_vectors too, or encoder.")] = "causal_lm",
    keep_blocks: Annotated[
        int | None, typer.Option(min=1, help="Use the model's first blocks alone, as the clients do.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Compute threads; the machine's cores when absent.")
    ] = None,
    wire: Annotated[
        list[str] | None,
        typer.Option(help="Accept states as float32, bfloat16 or int8. Repeatable; all when absent."),
    ] = None,
    max_clients: Annotated[int, typer.Option(min=1, help="Clients with an adapter in memory.")] = 64,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows of one batch.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one sequence.")] = 4096,
    max_kept_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of one client whose activations wait for a gradient.")
    ] = 1 << 15,
    max_cache_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one client in open caches.")] = 1 << 17,
    together: Annotated[
        int, typer.Option(min=1, help="Clients whose training passes are computed as one; 1 is each by itself.")
    ] = 1,
    recompute: Annotated[
        bool,
        typer.Option("--recompute", help="Run blocks again in the backward pass: slower, smaller, the same bits."),
    ] = False,
    cache_ttl: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Idle caches and activations are let go after this.")
    ] = 600.0,
    idle_ttl: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Idle adapters are saved and let go after this.")
    ] = 24 * 3600.0,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="On SIGTERM, longest wait for rounds under way.")
    ] = 30.0,
    until_input_ends: Annotated[
        bool, typer.Option("--until-input-ends", help="Stop when standard input ends, as when the parent is killed.")
    ] = False,
) -> None:
    """Serve the middle blocks over mutual TLS until SIGTERM or Ctrl-C."""
    import logging
    import signal

    from pplr.apps.tables import human_bytes
    from pplr.apps.terminal import Screen, TerminalProgress

    if unknown := sorted(set(wire or ()) - {"float32", "bfloat16", "int8"}):
        raise typer.BadParameter(f"{unknown[0]!r} is none of float32, bfloat16, int8", param_hint="--wire")
    screen = Screen()
    progress = TerminalProgress(screen)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    with screen.busy("loading libraries"):
        import torch

        from pplr.backbones.base import load_backbone
        from pplr.backbones.bundles import is_bundle, read_bundle
        from pplr.config import BackboneConfig
        from pplr.runtimes.codec import Wire
        from pplr.runtimes.identity import read_server
        from pplr.runtimes.memory import rss_bytes
        from pplr.runtimes.stage_server import ServerLimits, StageServer
    identity = read_server(federation)
    if is_bundle(Path(model)) and read_bundle(Path(model)).role == "client":
        raise BackboneError(f"{model} is a client's bundle", cure="Serve the server's bundle of the same `pplr cut`.")
    if threads is not None:
        torch.set_num_threads(threads)
    with progress.task("loading the model", 1, "models") as advance:
        chosen = BackboneConfig(name=backbone, model=model, dtype=dtype, device=device, keep_blocks=keep_blocks)
        base = load_backbone(chosen, progress.note)
        advance(1)
    limits = ServerLimits(
        max_rows=max_rows,
        max_tokens=max_tokens,
        max_clients=max_clients,
        max_kept_tokens=max_kept_tokens,
        max_cache_tokens=max_cache_tokens,
        together=together,
        cache_ttl_s=cache_ttl,
        idle_ttl_s=idle_ttl,
    )
    server = StageServer(
        base,
        identity,
        listen,
        limits,
        wires=tuple(Wire(name) for name in wire) if wire else tuple(Wire),
        state=state,
        metrics_address=metrics,
        recompute=recompute,
    )
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    if until_input_ends:
        threading.Thread(target=_wait_for_end, args=(asked,), daemon=True).start()
    server.start()
    host = listen.rpartition(":")[0]
    held = rss_bytes()
    screen.line(
        f"serving {model} ({dtype}, {torch.get_num_threads()} threads) on {host}:{server.port}"
        + ("" if held is None else f", {human_bytes(held)} of memory")
        + (f", metrics on port {server.metrics_port}" if metrics else "")
    )
    asked.wait()
    screen.line("stopping: nothing new is begun, rounds under way may end")
    finished = server.drain(grace)
    server.stop()
    kept = "" if state is None else f"; every adapter is in {state}"
    screen.line(("stopped" if finished else f"stopped with rounds under way after {grace:g} s") + kept)


def _wait_for_end(asked: threading.Event) -> None:
    sys.stdin.buffer.read()
    asked.set()


@contextmanager
def _channel(kit: Path, address: str | None, *, patience_s: float = 5.0) -> Iterator[StageChannel]:
    from pplr.runtimes.identity import read_kit
    from pplr.runtimes.stage_channel import StageChannel

    own = read_kit(kit)
    channel = StageChannel(address or own.address, own, patience_s=patience_s, timeout_s=60.0)
    try:
        yield channel
    finally:
        channel.close()


@contextmanager
def _operator(kit: Path, address: str | None) -> Iterator[Any]:
    with _channel(kit, address) as channel:
        from pplr.runtimes.stage_operator import StageOperator

        yield StageOperator(channel)


@app.command("health")
def health(kit: Kit, stage_server: Address = None) -> None:
    """Say whether the server serves; exit code 1 when it does not. Any kit of the federation will do."""
    from pplr.apps.terminal import Screen

    with _channel(kit, stage_server, patience_s=0.0) as channel:
        serving = channel.is_serving()
        Screen().line(f"{channel.address} is {'serving' if serving else 'about to stop'}")
    if not serving:
        raise typer.Exit(1)


@app.command("metrics")
def metrics(kit: Kit, stage_server: Address = None) -> None:
    """Print the server's metrics in Prometheus' text format."""
    with _operator(kit, stage_server) as operator:
        typer.echo(operator.metrics(), nl=False)


@app.command("list")
def list_hosted(kit: Kit, stage_server: Address = None) -> None:
    """List every adapter on the server, in memory and on disk."""
    from pplr.apps.tables import Table
    from pplr.apps.terminal import Screen

    with _operator(kit, stage_server) as operator:
        hosted = operator.hosted()
    screen = Screen()
    if not hosted:
        screen.line("The server holds no adapter.")
        return
    rows = [
        (
            own.client,
            own.tenant,
            f"{own.cut[0]} + {own.cut[1]}" if own.in_memory else "-",
            str(own.rank) if own.in_memory else "-",
            str(own.steps) if own.in_memory else "-",
            f"{own.idle_s:.0f} s" if own.in_memory else "not in memory",
            "yes" if own.on_disk else "no",
        )
        for own in hosted
    ]
    names = ("client", "tenant", "cut", "rank", "steps", "idle", "on disk")
    screen.table(Table(names, rows, texts=("client", "tenant", "idle", "on disk")))


@app.command("save")
def save(client: Client, tenant: Tenant, kit: Kit, stage_server: Address = None) -> None:
    """Write an adapter and its optimizer to the server's disk."""
    _tell(kit, stage_server, "save", client, tenant, "saved")


@app.command("restore")
def restore(client: Client, tenant: Tenant, kit: Kit, stage_server: Address = None) -> None:
    """Put an adapter and its optimizer back to where they were saved last."""
    _tell(kit, stage_server, "restore", client, tenant, "put back")


@app.command("dismiss")
def dismiss(client: Client, tenant: Tenant, kit: Kit, stage_server: Address = None) -> None:
    """Let go of an adapter in memory; what was saved of it stays."""
    _tell(kit, stage_server, "dismiss", client, tenant, "let go of")


def _tell(kit: Path, address: str | None, what: str, client: str, tenant: str, done: str) -> None:
    from pplr.apps.terminal import Screen

    with _operator(kit, address) as operator:
        getattr(operator, what)(client, tenant)
    Screen().line(f"{done} {client}/{tenant}")
