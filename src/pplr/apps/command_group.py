"""How commands begin, and how they end: what an error that was expected, Ctrl-C and a closed pipe become."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from pplr.errors import PplrError

__all__ = ["EXTRAS", "INTERRUPTED", "SPINS", "CommandGroup", "complain", "silence", "wait_briefly"]

INTERRUPTED = 130
SPINS = "1000"
_BROKEN_PIPE = 141
EXTRAS = dict.fromkeys(("cryptography", "grpc", "grpc_health", "google", "prometheus_client"), "network")
EXTRAS |= dict.fromkeys(("flwr", "httpx", "ray"), "flower")
EXTRAS |= dict.fromkeys(("matplotlib", "jinja2"), "plots")
EXTRAS |= dict.fromkeys(("nicegui", "fastapi", "uvicorn"), "web")
"""Packages that only some commands need, and the extra that installs each."""


class CommandGroup(TyperGroup):
    """Ends every command the same way: an expected error in one line, Ctrl-C in one line, a closed pipe in none."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except PplrError as error:
            complain(f"error: {error}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            complain("stopped")
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            silence()
            raise typer.Exit(_BROKEN_PIPE) from error
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").split(".")[0])
            if extra is None:
                raise
            complain(f"error: this command needs {error.name}. Install it with: pip install 'pplr[{extra}]'")
            raise typer.Exit(1) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            complain("error: no space left on the disk. Free some space and run the command again.")
            raise typer.Exit(1) from error


def wait_briefly() -> None:
    """Let compute threads that wait for each other spin for :data:`SPINS` turns of a loop, and then sleep.

    GNU OpenMP lets them spin for 300,000, during which a thread that another program has put off cannot get their
    core: on cores that are shared, training takes many times as long (``benchmarks/shared_cores.py``). What is computed
    does not depend on it. To be called before torch is imported; whoever set how threads wait is left alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def complain(line: str) -> None:
    """Write one line to standard error, whatever it holds."""
    from pplr.apps.tables import clean

    with contextlib.suppress(BrokenPipeError):
        typer.echo(" ".join(clean(line).split()), err=True)


def silence() -> None:
    """Send what is left to write to nowhere, so that Python does not complain about the closed pipe at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
