from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.claim import Claim, main, parse
from benchmarks.claim_jobs import METHODS, PARTITIONS, Job
from benchmarks.records import evaluation_of, read_record, without_places
from pplr.config_files import load_config
from pplr.errors import ConfigError, RunError
from pplr.federation.methods import make_method
from pplr.runtimes.in_process import train
from pplr.testing import refuses

MOVIELENS = Path(__file__).parent.parent.parent / "configs" / "movielens_item_vectors.yaml"


class InProcess(Claim):
    """Runs jobs in this process, and remembers which."""

    trained: list[str]

    def _train(self, job: Job) -> None:
        self.trained.append(job.name)
        train(self.config_of(job), self.run_folder(job), resume=self.run_folder(job).exists()).close()


@pytest.fixture
def make(tiny_config, tmp_path, monkeypatch):
    """Make a claim over tiny data, whose partitions are KMeans and the region."""
    by_region = ("data.partition.by=column", "data.partition.column=region")
    monkeypatch.setitem(PARTITIONS, "occupation", by_region)

    def claim(*overrides: str, **wanted) -> InProcess:
        wanted = {"seeds": (0,), "holdouts": ("leave_one_out",), "methods": ("pplr", "centralized")} | wanted
        made = InProcess("tiny", tiny_config, overrides, root=tmp_path, **wanted)
        made.trained = []
        return made

    return claim


def test_where_a_run_was_trained_is_no_setting_of_the_plan() -> None:
    places = ["runtime.threads=1", "backbone.device=cuda", "data.path=/data", "data.items_path=/data/items.csv"]
    assert without_places([*places, "backbone.dtype=float32", "data.history_items=9"]) == [
        "backbone.dtype=float32",
        "data.history_items=9",
    ]


def test_every_method_is_settings_that_can_be_run() -> None:
    for method, settings in METHODS.items():
        config = load_config(MOVIELENS, settings)
        assert make_method(config.federation).name == method.split("-")[0]
    assert load_config(MOVIELENS, METHODS["pplr-no-heating"]).federation.heating_scale is None


def test_part_of_it_is_of_use_early(tmp_path) -> None:
    arguments = parse([str(MOVIELENS), "--name", "x"])
    claim = Claim("x", MOVIELENS, (), arguments.seeds, arguments.holdouts, arguments.partitions, arguments.methods)
    assert len(claim.jobs) == len(set(claim.jobs)) == 5 * 2 * (2 * 11 - 1)
    groups = list(dict.fromkeys((job.seed, job.holdout, job.partition) for job in claim.jobs))
    assert groups[:5] == [
        (0, "leave_one_out", "kmeans"),
        (0, "leave_one_out", "occupation"),
        (0, "global_time", "kmeans"),
        (0, "global_time", "occupation"),
        (1, "leave_one_out", "kmeans"),
    ]
    drawn = Claim("x", MOVIELENS, ["training.samples=100"])  # by client, so each partition has a pool of its own
    assert len(drawn.jobs) == 5 * 2 * 2 * 11


def test_a_claim_is_kept_small_and_not_run_twice(make, tmp_path) -> None:
    claim = make()
    claim.run(parallel=1)
    first = ["leave_one_out-kmeans-0-pplr", "leave_one_out-kmeans-0-centralized", "leave_one_out-occupation-0-pplr"]
    assert claim.trained == first
    results = tmp_path / "results" / "tiny"
    pooled = "leave_one_out-occupation-0-centralized"
    assert {path.stem for path in results.glob("*.json")} == {*first, pooled, "plan"}
    assert json.loads((results / "plan.json").read_text())["seeds"] == [0]
    by_cluster, by_region = read_record(results / f"{first[1]}.json"), read_record(results / f"{pooled}.json")
    assert by_region["trained_as"] == first[1]
    assert by_region["overall"] == by_cluster["overall"]
    assert by_region["settings"]["data"]["partition"]["by"] == "column"
    own = read_record(results / f"{first[2]}.json")
    assert own["partition_sha256"] == by_region["partition_sha256"] != by_cluster["partition_sha256"]
    assert evaluation_of(by_region).client_of == evaluation_of(own).client_of
    left = {path.name for path in (tmp_path / "runs" / "tiny" / first[0]).iterdir()}
    assert "metrics.json" in left
    assert not {"clients", "checkpoints"} & left

    again = make("runtime.threads=1", seeds=(0, 1), methods=("pplr",), partitions=("kmeans",))
    again.run(parallel=1)
    assert again.trained == ["leave_one_out-kmeans-1-pplr"]
    plan = json.loads((results / "plan.json").read_text())
    assert plan["set"] == []  # records tell what they were trained on
    assert plan["seeds"] == [0, 1]
    assert plan["methods"] == ["pplr", "centralized"]


def test_other_settings_under_the_same_name_are_refused_before_anything_runs(make) -> None:
    make(methods=("local",), partitions=("kmeans",)).run(parallel=1)
    other = make("training.learning_rate=0.03", methods=("pplr",), partitions=("kmeans",), seeds=(1,))
    with refuses(RunError, "training.learning_rate is 0.02 there and 0.03 here"):
        other.run(parallel=1)
    assert other.trained == []


def test_a_run_that_fails_keeps_no_other_from_running(make, tmp_path) -> None:
    claim = make(methods=("local", "pplr"), partitions=("kmeans",))
    (claim.run_folder(claim.jobs[0]) / "mine").mkdir(parents=True)
    with refuses(RunError, "1 of 2 runs failed: leave_one_out-kmeans-0-local"):
        claim.run(parallel=2)
    assert claim.is_kept(claim.jobs[1])
    assert not claim.is_kept(claim.jobs[0])


def test_what_records_do_not_keep_must_be_measured(make) -> None:
    with refuses(ConfigError, "evaluation.cutoffs is"):
        make("evaluation.cutoffs=[5]").run(parallel=1)


def test_an_unfinished_run_goes_on_with_the_threads_it_began_with(make) -> None:
    claim = make(methods=("local",), partitions=("kmeans",))
    (job,) = claim.jobs
    claim.run_folder(job).mkdir(parents=True)
    begun = load_config(claim.config, ["runtime.threads=3"])
    (claim.run_folder(job) / "config.yaml").write_text(begun.to_yaml())
    assert make(threads=2).settings(job)[0] == "runtime.threads=3"


@pytest.mark.slow
def test_the_command_runs_processes(tiny_config, tmp_path) -> None:
    wanted = ["--holdouts", "leave_one_out", "--partitions", "kmeans", "--seeds", "0", "--methods"]
    main([str(tiny_config), "--name", "tiny", *wanted, "local"], root=tmp_path)
    assert (tmp_path / "results" / "tiny" / "leave_one_out-kmeans-0-local.json").exists()
    with pytest.raises(SystemExit, match="error: 1 of 1 runs failed"):
        main([str(tiny_config), "--name", "other", *wanted, "fedavg", "--set", "backbone.model=nowhere"], root=tmp_path)
