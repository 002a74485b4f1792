"""Where time and bytes go when pplr trains, evaluates, recommends and aggregates.

Each job is run once to warm up, some times to be timed, and once under torch's profiler, which shares its time out by
kind of operation; that run is slower and its seconds are not told. What is measured goes to the column ``after``; with
``--label before`` to the column beside it, as before a change. Each job keeps where it is from, with the commit of the
pplr that was imported, which may be an older one:

    python -m benchmarks.profiles [--jobs train evaluate]
    PYTHONPATH=OLDER/src:. python -m benchmarks.profiles --label before
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.aggregation import draw, shapes, view_of
from benchmarks.measuring import RESULTS, config_file, origin, quickstart, spread, use_all_cores, write_json
from benchmarks.op_shares import shares_of
from benchmarks.origins import LABELS
from benchmarks.performance_page import write_page
from pplr.config import Config, FederationConfig
from pplr.config_files import load_config
from pplr.data.prompts import Case
from pplr.federation.aggregation import mix_on_disk, similarity
from pplr.federation.methods import make_method
from pplr.federation.stacks import StoredAdapters
from pplr.progress import Silent
from pplr.recommend.training import train_locally
from pplr.runtimes.assembly import Assembly

AGGREGATED = 100


@dataclass(frozen=True)
class Job:
    """A piece of work to be profiled.

    Args:
        work: Does it once.
        counts: How much one run does, by name.
        traffic: Says how many bytes crossed the cut so far, where a model is cut.
    """

    work: Callable[[], Any]
    counts: dict[str, int]
    traffic: Callable[[], int] = lambda: 0


@contextmanager
def training(config: Config, samples: int) -> Iterator[Job]:
    """One epoch of local training of one client, on its first samples."""
    assembly = Assembly(config, Silent())
    own = assembly.data.samples["0"][:samples]
    encoded = assembly.backbone.encode(own, assembly.data.dataset.catalog, config.data.history_items)
    model = assembly.admit("0", assembly.initial)

    def work() -> None:
        train_locally(model, encoded, config.training, client="0", server_round=0, rounds=1, seed=0)

    tokens = sum(assembly.backbone.length(one) for one in encoded)
    traffic = model.traffic
    yield Job(work, {"samples": len(encoded), "tokens": tokens}, lambda: _crossed(model.traffic) - _crossed(traffic))
    assembly.close()


@contextmanager
def ranking(config: Config, users: int) -> Iterator[Job]:
    """Ranking the catalog for some users of one client."""
    assembly = Assembly(config, Silent())
    cases: Sequence[Case] = assembly.data.test["0"][:users]
    model = assembly.admit("0", assembly.initial)
    ranker = assembly.ranker(model)
    yield Job(lambda: ranker.scores(cases), {"users": len(cases)}, lambda: _crossed(model.traffic))
    assembly.close()


@contextmanager
def aggregating(of: str) -> Iterator[Job]:
    """Weighing and mixing many clients' adapters that lie on disk, or comparing them by their products."""
    clients = AGGREGATED
    with tempfile.TemporaryDirectory() as name:
        stack = StoredAdapters.create(Path(name) / "before", shapes(), clients)
        for client in range(clients):
            stack.put(client, draw(client))
        into = StoredAdapters.create(Path(name) / "after", shapes(), clients)
        method, view = make_method(FederationConfig(clients=clients)), view_of(stack, clients)

        def mixed() -> None:
            weights = method.mixing(view).weights
            if weights is not None:
                mix_on_disk(stack, weights, into)

        def compared() -> None:
            similarity(stack, view.initial, of="products")

        yield Job(compared if of == "products" else mixed, {"clients": clients})


def _crossed(traffic: Any) -> int:
    return int(traffic.bytes_up + traffic.bytes_down)


def _demo(*overrides: str) -> Config:
    return quickstart("training.samples=null", "training.local_epochs=1", *overrides)


def _items() -> Config:
    return load_config(config_file("movielens_item_vectors.yaml"), ["training.local_epochs=1"])


JOBS: dict[str, Callable[[], Any]] = {
    "train": lambda: training(_demo("training.batch_size=16"), 32),
    "train_item_vectors": lambda: training(_items(), 32),
    "evaluate": lambda: ranking(_demo(), 8),
    "evaluate_item_vectors": lambda: ranking(_items(), 64),
    "recommend": lambda: ranking(_demo(), 1),
    "recommend_item_vectors": lambda: ranking(_items(), 1),
    "aggregate": lambda: aggregating("adapters"),
    "compare_products": lambda: aggregating("products"),
}
"""What is profiled, by the name of its section in ``docs/performance.md``."""


def measure(name: str, times: int) -> dict[str, Any]:
    """Measure one job."""
    with JOBS[name]() as job:
        before = job.traffic()
        job.work()
        crossed = job.traffic() - before
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            job.work()
            seconds.append(time.perf_counter() - started)
        return {
            "counts": job.counts,
            "seconds": spread(seconds),
            "crossed_bytes": crossed,
            "kinds": shares_of(job.work),
        }


def kept(label: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Put what was measured beside what is there already, in the order of the jobs."""
    path = RESULTS / "profiles.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    both = {own: dict(old.get(own, {})) | (measured if own == label else {}) for own in LABELS}
    return {own: {name: jobs[name] for name in JOBS if name in jobs} for own, jobs in both.items()}


def notes_of(columns: dict[str, Any]) -> list[str]:
    """Tell every job of both columns."""
    notes = []
    for name in JOBS:
        for label, jobs in columns.items():
            if name in jobs:
                own = jobs[name]
                counts = ", ".join(f"{count:,} {what}" for what, count in own["counts"].items())
                most = next(iter(own["kinds"]))
                notes.append(f"{name}, {label} ({counts}): {own['seconds']['median']:.3g} s, most of it {most}")
    return notes


def main() -> None:
    """Measure, and write ``profiles.json`` and ``docs/performance.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB")
    parser.add_argument("--times", type=int, default=3, help="timed runs of a job")
    parser.add_argument("--label", choices=LABELS, default="after")
    arguments = parser.parse_args()
    use_all_cores()
    torch.manual_seed(0)
    where = origin("profiles")
    measured = {}
    for name in arguments.jobs:
        measured[name] = own = {"origin": where, **measure(name, arguments.times)}
        print(f"{name}: {own['seconds']['median']:.3g} s", flush=True)
    columns = kept(arguments.label, measured)
    write_json("profiles", {**columns, "rows": [], "notes": notes_of(columns)})
    write_page()


if __name__ == "__main__":
    main()
