"""The paper's claim, tested: does federation by ``pplr`` leave no client behind, and does the whole get better?

Every holdout, partition, seed and method is a run of ``pplr train`` in a process of its own. What came of each is kept
in ``results/NAME/``, and a run that is there already is not run again, so the command may be stopped at any time and
given again. ``python -m benchmarks.results`` makes the tables.

    python -m benchmarks.claim configs/movielens_item_vectors.yaml --name claim-movielens --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.claim_jobs import HOLDOUTS, METHODS, PARTITIONS, Job
from benchmarks.measuring import quality_parser
from benchmarks.records import (
    check_metrics,
    first_difference,
    read_record,
    record_of,
    regroup,
    settings_of,
    without_places,
    write_record,
)
from pplr.config import Config
from pplr.config_files import load_config
from pplr.errors import PplrError, RunError
from pplr.runtimes.run import open_run
from pplr.runtimes.run_data import load_run_data
from pplr.storage import write_json

ROOT = Path(__file__).parent.parent


@dataclass
class Claim:
    """All runs of a test, and where they are kept.

    Args:
        name: Folder below ``results/`` and ``runs/``.
        config: What all runs have in common.
        overrides: More that all runs have in common, as ``section.field=value``.
        seeds: Wanted seeds.
        holdouts: Wanted holdouts.
        partitions: Wanted partitions.
        methods: Wanted methods.
        threads: Compute threads of each run.
        root: Where ``results/`` and ``runs/`` lie.
    """

    name: str
    config: Path
    overrides: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    holdouts: Sequence[str] = HOLDOUTS
    partitions: Sequence[str] = ("kmeans", "occupation")  # the paper's, and a natural one
    methods: Sequence[str] = tuple(METHODS)
    threads: int = 1
    root: Path = ROOT
    _processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def jobs(self) -> list[Job]:
        """List what is wanted, in the order in which part of it is of most use.

        Where the partition has no part in what ``centralized`` trains on, it is trained for the first alone.
        """
        return [
            Job(holdout, partition, seed, method)
            for seed in self.seeds
            for holdout in self.holdouts
            for partition in self.partitions
            for method in self.methods
            if not (method == "centralized" and self.pools_alike and partition != self.partitions[0])
        ]

    @cached_property
    def pools_alike(self) -> bool:
        """Whether the pooled data are the same for every partition: nothing is drawn in proportion to clients."""
        told = load_config(self.config, self.overrides)
        drawn = (told.training.samples, told.evaluation.test_users, told.evaluation.validation_users)
        return all(number is None for number in drawn)

    def siblings(self, job: Job) -> list[Job]:
        """List the jobs that one training serves, this one first."""
        if job.method != "centralized" or not self.pools_alike:
            return [job]
        return [job, *(replace(job, partition=other) for other in self.partitions if other != job.partition)]

    def path(self, job: Job) -> Path:
        """Say where a job's record is kept."""
        return self.root / "results" / self.name / f"{job.name}.json"

    def run_folder(self, job: Job) -> Path:
        """Say where a job is run."""
        return self.root / "runs" / self.name / job.name

    def settings(self, job: Job) -> list[str]:
        """Tell all of a job's settings; threads are those that an unfinished run began with."""
        begun = self.run_folder(job) / "config.yaml"
        threads = (load_config(begun).runtime.threads if begun.exists() else None) or self.threads
        return [f"runtime.threads={threads}", *self.overrides, *job.overrides]

    def config_of(self, job: Job) -> Config:
        """Resolve a job's configuration."""
        return load_config(self.config, self.settings(job))

    def is_kept(self, job: Job) -> bool:
        """Say whether a job's record is there.

        Raises:
            RunError: One is there, of other settings.
        """
        if not self.path(job).exists():
            return False
        before = read_record(self.path(job))
        if differs := first_difference(before["settings"], settings_of(self.config_of(job))):
            raise RunError(
                f"{self.path(job)} is of a run with other settings: {differs}",
                cure="Choose another --name, or delete that file to run it again.",
            )
        return True

    def kept(self) -> list[Job]:
        """List the jobs whose records are there, wanted or not."""
        paths = sorted((self.root / "results" / self.name).glob("*.json"))
        return [Job(**read_record(path)["job"]) for path in paths if path.name != "plan.json"]

    def missing(self, job: Job) -> list[Job]:
        """List the jobs that this one's training serves and whose records are not there."""
        return [own for own in self.siblings(job) if not self.is_kept(own)]

    def write_plan(self) -> None:
        """Write down what is wanted, with what was wanted before, so that tables can say what is missing.

        Where it is run is told by each record: seeds may be trained on different machines.
        """
        path = self.root / "results" / self.name / "plan.json"
        plan: dict[str, Any] = {"config": str(self.config), "set": without_places(self.overrides)}
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for key in ("seeds", "holdouts", "partitions", "methods"):
            plan[key] = list(dict.fromkeys([*before.get(key, []), *getattr(self, key)]))
        write_json(path, plan)

    def carry_out(self, job: Job) -> float | None:
        """Run a job, if its record is not kept; keep it, and delete what the run needs no more.

        Returns:
            The seconds that it took; ``None`` where nothing had to be trained.

        Raises:
            RunError: The run failed.
        """
        wanted, missing = self.siblings(job), self.missing(job)
        seconds = None
        if len(missing) == len(wanted):
            started = time.monotonic()
            folder = self.run_folder(job)
            if not (folder / "metrics.json").exists():
                self._train(job)
            write_record(self.path(job), {"job": asdict(job), **record_of(open_run(folder))})
            for heavy in ("checkpoints", "clients", "rounds"):
                shutil.rmtree(folder / heavy, ignore_errors=True)
            missing.remove(job)
            seconds = time.monotonic() - started
        kept = next(own for own in wanted if own not in missing)
        for own in missing:
            config = self.config_of(own)
            data = load_run_data(config)
            test = {name: list(cases) for name, cases in data.test.items()}
            before = read_record(self.path(kept))
            record = regroup(before, config, test, data.partition.sha256)
            trained = {"job": asdict(own), "trained_as": before.get("trained_as", kept.name)}
            write_record(self.path(own), {**record, **trained})
        return seconds

    def _train(self, job: Job) -> None:
        folder = self.run_folder(job)
        command = [sys.executable, "-m", "pplr.apps.cli", "train", str(self.config), "--run-dir", str(folder)]
        for setting in self.settings(job):
            command += ["--set", setting]
        if (folder / "config.yaml").exists():
            command.append("--resume")
        log = folder.parent / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
            with self._lock:
                self._processes.add(process)
            code = process.wait()
            with self._lock:
                self._processes.discard(process)
        if code:
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(f"{job.name} ended with {code}: {last}", cure=f"Read {log}, and run the command again.")

    def stop(self) -> None:
        """End the runs that are under way; their checkpoints stay."""
        with self._lock:
            for process in self._processes:
                process.terminate()

    def run(self, parallel: int) -> None:
        """Carry every job out, some at once.

        Raises:
            RunError: A record is of other settings, or some runs failed; the others are kept.
        """
        check_metrics(load_config(self.config, self.overrides))
        for job in self.kept():
            self.is_kept(job)  # those not wanted now stand in the same tables
        waiting = [job for job in self.jobs if self.missing(job)]
        self.write_plan()
        print(f"{len(self.jobs) - len(waiting)} of {len(self.jobs)} runs are kept already", flush=True)
        failed: list[str] = []
        took: list[float] = []
        with ThreadPoolExecutor(parallel) as pool:
            try:
                futures = {pool.submit(self.carry_out, job): job for job in waiting}
                for count, future in enumerate(as_completed(futures), 1):
                    job = futures[future]
                    try:
                        seconds = future.result()
                    except PplrError as error:
                        failed.append(job.name)
                        print(f"{count}/{len(waiting)} failed: {error}", flush=True)
                        continue
                    took += [] if seconds is None else [seconds]
                    left = (len(waiting) - count) * statistics.fmean(took) / parallel / 3600 if took else 0.0
                    print(f"{count}/{len(waiting)} {job.name}: {self._line(job)}; {left:.1f} h left", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise
        if failed:
            raise RunError(
                f"{len(failed)} of {len(waiting)} runs failed: {', '.join(failed)}",
                cure=f"Read their logs in {self.root / 'runs' / self.name}, and run the command again.",
            )

    def _line(self, job: Job) -> str:
        told = read_record(self.path(job))
        figures = [told["overall"]["ndcg@10"], told["spread"]["ndcg@10"]["worst"]]
        overall, worst = ("not measured" if own is None else f"{own:.4f}" for own in figures)
        return f"ndcg@10 {overall}, worst client {worst}, {len(told['rounds'])} rounds"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command's arguments."""
    parser = quality_parser(__doc__)
    parser.set_defaults(seeds=[0, 1, 2, 3, 4])
    parser.add_argument("--holdouts", nargs="+", choices=HOLDOUTS, default=list(HOLDOUTS))
    parser.add_argument("--partitions", nargs="+", choices=list(PARTITIONS), default=["kmeans", "occupation"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--parallel", type=int, default=1, help="runs at once, which share the cores")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Run what is wanted and not there yet."""
    arguments = parse(argv)
    claim = Claim(
        name=arguments.name,
        config=arguments.config,
        overrides=arguments.overrides,
        seeds=arguments.seeds,
        holdouts=arguments.holdouts,
        partitions=arguments.partitions,
        methods=arguments.methods,
        threads=max(1, len(os.sched_getaffinity(0)) // arguments.parallel),
        root=root,
    )
    try:
        claim.run(arguments.parallel)
    except PplrError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
