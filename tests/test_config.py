"""The configuration: said once, checked, frozen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from pplr.config import Config, DataConfig
from pplr.config_files import config_template, load_config
from pplr.errors import ConfigError
from pplr.testing import refuses


def fields(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, object]]:
    for name, field in model.model_fields.items():
        dotted = f"{place}.{name}".strip(".")
        yield dotted, field
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields(kind, dotted)


FIELDS = dict(fields(Config))


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_there_are_the_sections_of_a_run():
    assert list(Config.model_fields) == [
        "data", "backbone", "cut", "adapter", "training", "federation", "evaluation", "privacy",
        "runtime", "run",
    ]  # fmt: skip
    assert len(FIELDS) > 60


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_says_what_it_is(name: str):
    description = FIELDS[name].description
    assert description
    assert description.strip().endswith(".")
    assert all(line.strip() in config_template() for line in description.splitlines())


def test_the_template_is_the_defaults(written):
    assert load_config(written(config_template())) == Config() == load_config()
    lines = config_template().splitlines()
    for name in FIELDS:
        assert sum(line.strip().startswith(f"{name.split('.')[-1]}:") for line in lines) >= 1, name


def test_a_resolved_configuration_reads_back_equal(written):
    config = load_config(
        overrides=[
            "cut=null",
            "data.columns={user: uid, title: títle}",
            "data.min_rating=3.5",
            "training.clip_norm=null",
            "evaluation.cutoffs=[1, 5]",
            "backbone.prompt.noun='books: a \"b\"'",
            "training.learning_rate=1e-5",
        ]
    )
    assert config.training.learning_rate == 1e-5
    assert config != Config()
    assert load_config(written(config.to_yaml())) == config


def test_a_part_of_a_file_is_enough(written):
    config = load_config(written("federation:\n  rounds: 9\n"))
    assert config == load_config(overrides=["federation.rounds=9"])
    assert load_config(written("")) == Config()
    assert load_config(written("cut: null\n")).cut is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("federation:\n  ronuds: 3\n", "unknown key 'federation.ronuds'. Did you mean 'rounds'?"),
        ("federaton: {}\n", "unknown key 'federaton'. Did you mean 'federation'?"),
        ("rounds: 3\n", "unknown key 'rounds'. Did you mean 'federation.rounds'?"),
        ("cut:\n  middle: 3\n", "unknown key 'cut.middle'. Known: 'by_client', 'input_layers', 'output_layers'."),
        ("backbone:\n  prompt:\n    nuon: x\n", "unknown key 'backbone.prompt.nuon'. Did you mean 'noun'?"),
        ("a: 1\nb: 2\n", "(and 1 more)"),
        ("- 1\n- 2\n", "holds a list, not sections"),
        ("just words\n", "holds a str, not sections"),
        ("a: [1\n", "is not valid YAML"),
        ("run: 3\n", "run: input should be"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused(written, text: str, words: str):
    path = written(text)
    with refuses(ConfigError, words):
        load_config(path)
    with refuses(ConfigError, str(path)):
        load_config(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    with refuses(ConfigError, "No such file"):
        load_config(tmp_path / "none.yaml")
    with refuses(ConfigError, "directory"):
        load_config(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"run:\n  seed: \xff\xfe\n")
    with refuses(ConfigError, "is not valid YAML"):
        load_config(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "federation.rounds=0",
        "federation.clients=2.5",
        "federation.clients=many",
        "federation.participation=1.1",
        "federation.temperature=0",
        "training.learning_rate=.nan",
        "training.learning_rate=.inf",
        "training.clip_norm=0",
        "adapter.dropout=1",
        "adapter.target_modules=[]",
        "evaluation.cutoffs=[]",
        "evaluation.cutoffs=[10, 0]",
        "evaluation.grounding=l3",
        "data.holdout.ratios=[.nan, 1, 1]",
        "data.holdout.ratios=[8, 1]",
        "data.partition.by=kmean",
        "cut.input_layers=-1",
        "run.seed=-1",
        "run.seed=2147483648",
        "backbone.dtype=float16",
        "training=3",
    ],
)
def test_a_wrong_value_is_refused_at_its_field(override: str):
    key = override.split("=")[0]
    with refuses(ConfigError, f"the configuration: {key}"):
        load_config(overrides=[override])


@pytest.mark.parametrize("ratios", ["[0, 1, 1]", "[8, 1, 0]", "[8, -1, 1]"])
def test_ratios_must_be_shares(ratios: str):
    with refuses(ConfigError, "data.holdout: ratios must be positive for train and test"):
        load_config(overrides=[f"data.holdout.ratios={ratios}"])
    assert load_config(overrides=["data.holdout.ratios=[8, 0, 1]"]).data.holdout.ratios == (8, 0, 1)


def test_overrides_are_yaml_and_the_last_wins(written):
    path = written("federation:\n  rounds: 9\n  method: fedavg\ncut: null\n")
    config = load_config(
        path,
        overrides=[
            "federation.rounds=2",
            "federation.rounds=3",
            "cut.input_layers=4",
            " run.keep_rounds =yes",
            "data.columns.user=uid",
            "data.columns.item=iid",
            "backbone.prompt.noun=a=b",
            "adapter.target_modules=[k_proj]",
        ],
    )
    assert (config.federation.rounds, config.federation.method) == (3, "fedavg")
    assert config.cut is not None
    assert config.cut.input_layers == 4
    assert config.run.keep_rounds is True
    assert config.data.columns == {"user": "uid", "item": "iid"}
    assert config.backbone.prompt.noun == "a=b"
    assert config.adapter.target_modules == ("k_proj",)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["federation.rounds"], "has no '='"),
        (["=3"], "has no '='"),
        (["federation.rounds=[1"], "not valid YAML"),
        (["run=5", "run.seed=1"], "'run' is 5, not a section"),
        (["run.seed=5", "run.seed.x=1"], "'seed' is 5, not a section"),
        (["federation.ronuds=3"], "Did you mean 'rounds'?"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(overrides: list[str], words: str):
    with refuses(ConfigError, words):
        load_config(overrides=overrides)


def test_paths_are_found_beside_the_file(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("raw/x.inter", "raw/items.csv", "models/tiny/config.json", "tiny.gguf", "smollm2-135m/config.json"):
        written("", f"configs/{name}")
    text = "data:\n  path: {0}\n  items_path: raw/items.csv\nbackbone:\n  model: {1}\n"
    beside = tmp_path / "configs"
    monkeypatch.chdir(tmp_path)

    def load(path: str, model: str) -> Config:
        return load_config(Path(written(text.format(path, model), "configs/run.yaml")).relative_to(tmp_path))

    config = load("raw", "models/tiny")
    assert config.data.path == beside / "raw"
    assert config.data.items_path == beside / "raw" / "items.csv"
    assert config.backbone.model == str(beside / "models" / "tiny")
    assert load("raw", "tiny.gguf").backbone.model == str(beside / "tiny.gguf")
    assert load("raw", "smollm2-135m").backbone.model == "smollm2-135m"  # a short name stays one
    assert load("raw", "owner/model").backbone.model == "owner/model"
    assert load("elsewhere", "x").data.path == Path("elsewhere")  # left to the working directory
    assert load(str(tmp_path / "absolute"), "x").data.path == tmp_path / "absolute"


def test_overrides_are_left_to_the_working_directory(written, tmp_path: Path):
    written("", "raw/x.inter")
    config = load_config(written("data: {}\n"), overrides=["data.path=raw"])
    assert config.data.path == Path("raw")


def test_a_configuration_is_frozen():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.run = None  # type: ignore[assignment]
    with pytest.raises(ValidationError, match="frozen"):
        config.run.seed = 3  # type: ignore[misc]
    assert hash(config.training) == hash(load_config().training)


def test_sections_are_typed():
    config = load_config(overrides=["data.path=raw"])
    assert isinstance(config.data, DataConfig)
    assert isinstance(config.data.path, Path)
    assert yaml.safe_load(config.to_yaml())["data"]["path"] == "raw"
