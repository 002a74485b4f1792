"""Tiny data, tiny models and finished runs, made once and shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pplr.backbones.causal_lm import CausalLM
from pplr.config import Config, PromptConfig
from pplr.config_files import load_config
from pplr.runtimes.in_process import train
from pplr.runtimes.run import Run
from pplr.storage import cache_dir
from pplr.testing import tiny_decoder, tiny_encoder, tiny_tokenizer

settings.register_profile("shared machine", deadline=None)  # a slow first call is no defect
settings.load_profile("shared machine")

TITLES = tuple(
    "Ash Alder Aspen Beech Birch Box Cedar Cherry Elm Fir Hazel Holly Larch Lime Maple Oak Oak Pine Plane Yew".split()  # noqa: SIM905
)
"""Two items are called Oak."""
THEIR_CACHE = os.environ.get("PPLR_CACHE")
REGIONS = ("north", "south", "west")
PROMPT = PromptConfig(noun="trees", verb="planted", instruction="Name the next of the {noun}.")
SMALL = (
    "data.source=recbole",
    "data.partition.by=column",
    "data.partition.column=region",
    "backbone.dtype=float32",
    "cut.input_layers=1",
    "cut.output_layers=1",
    "adapter.rank=2",
    "training.samples=24",
    "training.batch_size=4",
    "training.learning_rate=0.02",
    "training.warmup_steps=1",
    "federation.clients=3",
    "federation.rounds=2",
    "evaluation.beams=2",
    "evaluation.max_new_tokens=8",
    "evaluation.test_users=6",
    "evaluation.validation_users=2",
    "evaluation.cutoffs=[3, 5]",
    "runtime.threads=1",
)
"""A run of a second: three clients, a model of three blocks that is cut into three."""


def write_atomic_files(folder: Path, users: int = 24) -> Path:
    """Write a small dataset as RecBole's atomic files: users of a region walk the catalog from their own place."""
    folder.mkdir(parents=True, exist_ok=True)
    items = "".join(f"t{number}\t{title}\n" for number, title in enumerate(TITLES))
    (folder / "tiny.item").write_text("item_id:token\titem_name:token_seq\n" + items)
    people = "".join(f"u{user}\t{REGIONS[user % 3]}\n" for user in range(users))
    (folder / "tiny.user").write_text("user_id:token\tregion:token\n" + people)
    lines = ["user_id:token\titem_id:token\ttimestamp:float\n"]
    for user in range(users):
        start, step = 5 * (user % 3) + user // 3, (1, 3, 7)[user % 3]
        for place in range(5 + user % 4):
            lines.append(f"u{user}\tt{(start + step * place) % len(TITLES)}\t{1000 * user + place}\n")
    (folder / "tiny.inter").write_text("".join(lines))
    return folder


FIRST = ("end_to_end", "privacy", "runtimes", "packaging")
"""Folders whose files take longest: begun last, one of them would keep a worker busy when the others have ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest; within a file the order stays."""
    folders = [f"{os.sep}tests{os.sep}{name}{os.sep}" for name in FIRST]
    items.sort(key=lambda item: next((at for at, name in enumerate(folders) if name in str(item.path)), len(FIRST)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path_factory.getbasetemp() / "pplr cache"))


@pytest.fixture
def shared_cache(_own_cache: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of whoever runs the tests, for the one model that is too large to fetch for each test."""
    monkeypatch.delenv("PPLR_CACHE")
    if THEIR_CACHE is not None:
        monkeypatch.setenv("PPLR_CACHE", THEIR_CACHE)
    return cache_dir()


@pytest.fixture(autouse=True)
def _own_threads() -> None:
    """One thread is fastest where everything is tiny; a run may set another number, and the next test has one again."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 24 users in three regions and 20 items, two of one title, as RecBole's atomic files."""
    return write_atomic_files(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def backbone() -> CausalLM:
    """A random decoder of three blocks with a byte-level tokenizer and a short prompt."""
    return CausalLM(
        tiny_decoder(layers=3, width=16), tiny_tokenizer(), prompt=PROMPT, max_tokens=256, folder="tiny-llama"
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same decoder and tokenizer as a folder that any process can load."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny_decoder(layers=3, width=16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of three blocks and its tokenizer as a folder that any process can load."""
    folder = tmp_path_factory.mktemp("model") / "tiny-bert"
    tiny_encoder(num_hidden_layers=3, hidden_size=16).model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_config(data_folder: Path) -> Callable[..., Config]:
    """Make the configuration of a small run; later settings win."""

    def make(*settings: str) -> Config:
        return load_config(overrides=[*SMALL, f"data.path={data_folder}", *settings])

    return make


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, small_config: Callable[..., Config], backbone: CausalLM
) -> Callable[..., Run]:
    """Return a finished small run of some settings, trained once for all tests that only read it."""
    runs: dict[tuple[str, ...], Run] = {}

    def get(*settings: str) -> Run:
        if settings not in runs:
            folder = tmp_path_factory.mktemp("finished") / "run"
            runs[settings] = train(small_config(*settings), folder, backbone=backbone)
        return runs[settings]

    return get
