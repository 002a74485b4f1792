"""Where a program begins: the data of a configuration, and a run on the runtime that it names."""

from __future__ import annotations

from pathlib import Path

from pplr.backbones.base import Backbone
from pplr.config import Config
from pplr.errors import ConfigError
from pplr.progress import Progress, Silent
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.run import Run
from pplr.runtimes.run_data import RunData, load_run_data

__all__ = ["load_data", "train"]


def load_data(config: Config, progress: Progress | None = None) -> RunData:
    """Load the data of a run as it will see them: cleaned, held out in time, and shared out among clients.

    Args:
        config: The run.
        progress: Told what is fetched.

    Returns:
        Catalog, histories, clients, samples and test cases.

    Raises:
        DataError: The data cannot be used as they are.
        PartitionError: A client would have no training samples.
    """
    return load_run_data(config, (progress or Silent()).note)


def train(
    config: Config,
    run_dir: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    backbone: Backbone | None = None,
    stage_server: StageServerAt | None = None,
) -> Run:
    """Train a federation, keep each client's best adapter, and measure them on the test cases.

    Args:
        config: The run; ``runtime.name`` says where it runs.
        run_dir: The run folder; made when absent.
        resume: Go on from the newest whole checkpoint.
        progress: Told of every step.
        backbone: A loaded backbone, to share one between runs in this process.
        stage_server: Hosts the middle blocks; the runtime hosts them when absent.

    Returns:
        The finished run.

    Raises:
        ConfigError: The runtime is not installed, or cannot use a stage server.
        PplrError: Whatever else keeps the run from being carried out.
    """
    if config.runtime.name == "in_process":
        from pplr.runtimes import in_process

        return in_process.train(
            config, run_dir, resume=resume, progress=progress, backbone=backbone, stage_server=stage_server
        )
    if stage_server is not None:
        raise ConfigError(
            f"runtime.name {config.runtime.name} hosts the middle blocks itself",
            cure="Leave out the stage server and its kit, or set runtime.name to in_process.",
        )
    if config.runtime.name == "flower":
        raise ConfigError(
            "runtime.name is flower, and no federation is named", cure="Give --federation DIR and --state DIR."
        )
    from pplr.runtimes import flower_simulation

    return flower_simulation.train(config, run_dir, resume=resume, progress=progress)
