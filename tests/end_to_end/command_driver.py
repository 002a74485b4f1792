"""Runs the real command line in processes that may stall, die or repeat themselves at a chosen moment.

Run as a script, it reads one job for each line and answers with one line. Libraries load once; every command is a fork
with a name of its own in the process table, so that a kill is SIGKILL of a whole server or a whole client.
``commands.py`` is what tests speak to it through.

A fault is a JSON object: ``do`` says what happens, ``on`` names methods that share one count, ``at`` which of their
calls is meant (the first is 1), ``when`` whether before it, after it, or inside the backward pass.

- ``stall``: write ``file`` and stand still until somebody deletes it.
- ``die``: SIGKILL of the process itself.
- ``count``: add one byte to ``file`` at each call.
- ``repeat``: deliver every request twice at the same time, and the one before it once more.
- ``patience``: give a server that does not answer ``patience_s``, and each attempt ``timeout_s``.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any


def happen(fault: dict[str, Any]) -> None:
    """Die, or stand still until the file is gone."""
    if fault["do"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    marker = Path(fault["file"])
    marker.touch()
    while marker.exists():
        time.sleep(0.005)


def plant(fault: dict[str, Any]) -> None:
    """Wrap the methods that a fault is about."""
    if fault["do"] == "patience":
        from pplr.runtimes.stage_channel import StageChannel

        StageChannel.__init__.__kwdefaults__ |= {k: v for k, v in fault.items() if k != "do"}  # type: ignore[attr-defined]
        return
    if fault["do"] == "repeat":
        repeat()
        return
    calls: list[str] = []

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            meant = len(calls) == fault.get("at")
            if fault["do"] == "count":
                with Path(fault["file"]).open("ab") as file:
                    file.write(b".")
            if meant and fault["when"] == "before":
                happen(fault)
            if meant and fault["when"] == "inside":
                host, client, step = arguments[:3]
                host._tenancies[client].kept[step][0].register_hook(lambda _: happen(fault))  # the end of the backward
            result = real(*arguments, **options)
            if meant and fault["when"] == "after":
                happen(fault)
            return result

        return call

    for target in fault["on"]:
        owner, _, method = target.rpartition(".")
        kind = resolve_name(owner)
        setattr(kind, method, wrapped(method, getattr(kind, method)))


def repeat() -> None:
    """Deliver every request twice at the same time, and the one before it a third time, which must be refused."""
    from pplr.errors import TransportError
    from pplr.runtimes.stage_channel import StageChannel

    once = StageChannel.call
    pool = ThreadPoolExecutor(2)
    before: dict[int, tuple[Any, ...]] = {}

    def call(channel: Any, name: str, request: Any, kind: Any, **options: Any) -> Any:
        first, second = (pool.submit(once, channel, name, request, kind, **options) for _ in range(2))
        replies = []
        for reply in (first, second):
            try:
                replies.append(reply.result(60))
            except TransportError as error:
                if name != "Leave":  # after which there is no session to ask again
                    raise AssertionError(f"{name}, delivered twice: {error}") from error
        if replies[0].SerializeToString() != replies[-1].SerializeToString():
            raise AssertionError(f"two replies to one {name}")
        session = request.header.session if name != "Hello" else 0
        if session in before:
            try:
                once(channel, *before[session], **options)
            except TransportError:
                pass
            else:
                raise AssertionError(f"an old {before[session][0]} was carried out again")
        if session:
            before[session] = name, request, kind
        return replies[-1]

    StageChannel.call = call  # type: ignore[method-assign]


def start(job: dict[str, Any]) -> int:
    """Fork a process for a command; its output goes to files. Return 0 in the child, which is to run it."""
    child = os.fork()
    if child:
        return child
    for number, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        descriptor = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    for fault in job["faults"]:
        plant(fault)
    sys.argv = [job["program"] or "pplr", *job["arguments"]]
    return 0


def main() -> None:
    import torch

    from pplr.apps import cli
    from pplr.backbones import bundles, causal_lm  # noqa: F401  (this and what follows loads what every fork needs)
    from pplr.federation import checkpoints  # noqa: F401
    from pplr.runtimes import connections, in_process, participant, stage_server  # noqa: F401

    with suppress(ModuleNotFoundError):
        from pplr.runtimes import flower, flower_link  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the tests ends this by the end of its input
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    gc.freeze()  # so that a fork ends without walking through what all share
    running: set[int] = set()
    while line := sys.stdin.readline():
        job = json.loads(line)
        if "wait" in job:
            until, answer = time.monotonic() + job["seconds"], None
            while answer is None and time.monotonic() < until:
                ended, status = os.waitpid(job["wait"], os.WNOHANG)
                if ended:
                    running.discard(ended)
                    answer = os.waitstatus_to_exitcode(status)
                else:
                    time.sleep(0.005)
        else:
            answer = start(job)
            if answer == 0:
                if job["program"] is None:
                    cli.main()
                else:
                    runpy.run_path(job["program"], run_name="__main__")
                return
            running.add(answer)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for child in running:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
