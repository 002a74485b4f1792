"""Commands of pages outside of docs/howto/, carried out with tiny data and a tiny model in one folder."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import DOCS, ROOT, blocks, carried_out, commands, told
from tests.end_to_end.machines import free_port
from tests.end_to_end.walk import Walk, write_federation

pytestmark = pytest.mark.slow

OTHERS = ("pip", "python", "tensorboard", "mlflow")
"""Programs whose commands tests/docs/test_blocks.py parses, and nobody runs: docs/contributing.md says so."""
RUNS = {"RUN_DIR": "runs/one", "OTHER_RUN_DIR": "runs/other"}
SETTINGS = ("federation.rounds=1", "evaluation.cutoffs=[3, 10]")


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, model_folder: Path
) -> Iterator[Callable[..., dict[str, str]]]:
    """A folder to be in, whose `configs/` are tiny; carries out what a page says and returns what each printed."""
    folder = tmp_path_factory.mktemp("pages")
    small = {
        "data": {"source": "recbole", "path": str(data_folder), "partition": {"by": "column", "column": "region"}},
        "backbone": {"name": "item_vectors", "model": str(model_folder), "dtype": "float32"},
        "cut": {"input_layers": 1, "output_layers": 1},
        "training": {"batch_size": 4, "learning_rate": 0.02, "warmup_steps": 1},
        "federation": {"clients": 3, "rounds": 1},
        "evaluation": {
            "test_users": 6,
            "validation_users": 2,
            "batch_size": 8,
            "cutoffs": [3, 10],
            "floors": ["popularity"],
        },
        "runtime": {"threads": 1},
    }
    small["data"] |= {"holdout": {"kind": "leave_one_out"}}
    small["data"]["partition"] |= {"min_users": 1}
    (folder / "configs").mkdir()
    for name in ("quickstart", "movielens_item_vectors"):
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(small))

    def carry_out(page: str, *more: str, sweep: Sequence[str] = ()) -> dict[str, str]:
        printed = {}
        for program, *words in told(DOCS / page, RUNS):
            if program in OTHERS or program.isupper() or "=" in program:
                continue
            assert program == "pplr"
            printed[" ".join(words)] = carried_out([*words, *more, *(sweep if "--sweep" in words else ())])
        return printed

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        yield carry_out


@pytest.fixture(scope="module")
def two_runs(place: Callable[..., dict[str, str]]) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        words = ["train", "configs/quickstart.yaml", "--run-dir", f"runs/{name}", "--set", f"run.seed={seed}"]
        carried_out(words)


def test_a_report_and_comparisons(place: Callable[..., dict[str, str]], two_runs: None) -> None:
    place("report.md")
    assert "Beside other runs" in Path("runs/one/report.html").read_text()
    assert "ndcg@3" in Path("compared.html").read_text()


def test_audits(place: Callable[..., dict[str, str]], two_runs: None) -> None:
    few = ("--users", "2", "--attack", "vocabulary_matching", "--has", "own")
    printed = place("privacy.md", *few, sweep=("--cut", "1,1", "--noise", "0", "--noise", "1"))
    assert len(printed) == 4
    assert all("written: runs/one/audit.json" in own for own in printed.values())
    assert Path("runs/one/audit.png").exists()
    assert "mean of 12 passes" in list(printed.values())[-1]


def test_curves_in_trackers(place: Callable[..., dict[str, str]]) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("mlflow")
    place("trackers.md")
    for program, folder in (("tensorboard", "--logdir"), ("mlflow", "--backend-store-uri")):
        (words,) = (own for own in told(DOCS / "trackers.md", {}) if program in own[:2])
        assert list(Path(words[words.index(folder) + 1]).iterdir())  # where the page sends its program


def test_private_training(place: Callable[..., dict[str, str]]) -> None:
    first, second = place("dp.md").values()
    assert "ε" in first
    assert "ε" in second
    assert "popularity" in second


def walked(folder: Path, lines: list[list[str]], here: dict[str, str], ready: dict[str, Callable[[str], bool]]) -> Walk:
    """Carry out commands of which some run on, those in `ready`; others end."""
    walk = Walk(folder)
    try:
        for words in lines:
            program, *own = [here.get(word, word) for word in words]
            assert program == "pplr"
            name = next((key for key in ready if " ".join(own).startswith(key)), None)
            if name:
                walk.start(name, own, ready[name])
            else:
                walk.carry_out(own)
        for process in reversed(walk.running.values()):  # clients before their server
            process.send_signal(signal.SIGTERM)
        for name, process in walk.running.items():
            assert process.wait(60) == 0, walk.log(name)
    finally:
        walk.stop()
    return walk


def configuration(folder: Path, **sections: object) -> None:
    """Write CONFIG: the deployment page's, for the clients and the cut that a page has."""
    told = yaml.safe_load((folder / "shops.yaml").read_text())
    told["cut"] = {"input_layers": 2, "output_layers": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(told | sections))


def test_the_cut_of_the_readme(tmp_path: Path) -> None:
    pytest.importorskip("grpc")
    write_federation(tmp_path, tmp_path / "whole")
    configuration(tmp_path, federation={"method": "local", "clients": 1, "rounds": 1})
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["data"] |= {"path": "north.csv", "items_path": "items.csv", "partition": {"by": "random", "min_users": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (block,) = (own for own in blocks(ROOT / "README.md") if own.kind == "sh" and "pplr cut" in own.text)
    port = free_port()
    here = {"smollm2-135m": "whole", "CONFIG": "config.yaml", "localhost:8443": f"localhost:{port}"}
    walked(tmp_path, commands(block), here, {"stage serve": lambda log: f"localhost:{port}" in log})
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.json").exists()


def test_a_federation_whose_clients_host_their_own_middle(tmp_path: Path, data_folder: Path) -> None:
    pytest.importorskip("flwr")
    write_federation(tmp_path, tmp_path / "whole")
    configuration(
        tmp_path,
        data={"source": "recbole", "catalog": "all"},
        backbone={"model": "whole", "dtype": "float32", "max_tokens": 256},
        federation={"method": "pplr", "rounds": 1},
    )
    port = free_port()
    here = {"link.example.org:8000": f"localhost:{port}", "0.0.0.0:8000": f"127.0.0.1:{port}"}
    here |= {"link.example.org:8443": "localhost:8443", "link.example.org": "localhost", "CONFIG": "config.yaml"}
    here |= {"DATA": str(data_folder)}
    _, *lines = told(DOCS / "runtimes.md", {})
    ready = {"server": lambda log: "may join" in log, "client": lambda log: "is connected to" in log}
    walked(tmp_path, lines, here, ready)
    metrics = json.loads((tmp_path / "runs" / "first" / "metrics.json").read_text())
    assert set(metrics["clients"]) == {"north"}
