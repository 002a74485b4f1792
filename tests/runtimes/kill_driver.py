"""Trains in processes that die at a chosen moment, so that test_resume can look at what they leave.

Run as a script, it reads one job for each line and answers with one line. Libraries load once; every training is a
fork, and a kill is SIGKILL: nothing is closed, flushed or cleaned up.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from typing import Any

CALLS = ("fsync", "replace", "unlink", "rmdir", "mkdir")
"""What a run asks of the disk; between any two of them it may die."""


def train_in_fork(job: dict[str, Any], backbone: Any) -> dict[str, Any]:
    """Train, and say how it ended: how many calls it made, what it noted, its error, or the signal that killed it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        answer = train_here(job, backbone)
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    timer = None
    if job.get("kill_after_s") is not None:
        timer = threading.Timer(job["kill_after_s"], os.kill, (child, signal.SIGKILL))
        timer.start()
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    if timer is not None:
        timer.cancel()
    _, status = os.waitpid(child, 0)
    answer = json.loads(told) if told else {}
    return answer | {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None}


def train_here(job: dict[str, Any], backbone: Any) -> dict[str, Any]:
    from pplr.config_files import load_config
    from pplr.progress import Silent
    from pplr.runtimes.in_process import train

    calls: list[str] = []
    notes: list[str] = []
    os.environ["PPLR_CACHE"] = job["run_dir"] + " cache"  # of its own, so that every run begins with nothing

    def counted(name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == job.get("die_at"):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    progress = Silent()
    progress.note = notes.append  # type: ignore[method-assign]
    error = None
    try:
        train(load_config(job["config"]), job["run_dir"], resume=job["resume"], progress=progress, backbone=backbone)
    except BaseException:
        error = traceback.format_exc()
    return {"calls": len(calls), "notes": notes, "error": error}


def main() -> None:
    import torch

    from pplr.backbones.causal_lm import CausalLM
    from pplr.config import PromptConfig
    from pplr.runtimes import in_process  # noqa: F401  (loads what every fork needs)
    from pplr.testing import tiny_decoder, tiny_tokenizer

    torch.set_num_threads(1)
    prompt = PromptConfig(noun="trees", verb="planted", instruction="Name the next.")
    backbone = CausalLM(tiny_decoder(layers=3, width=16), tiny_tokenizer(), prompt=prompt, max_tokens=256)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(train_in_fork(json.loads(line), backbone)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
