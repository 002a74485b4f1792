"""Every shipped configuration is a test case."""

from __future__ import annotations

from pathlib import Path

import pytest

from pplr.config import Config
from pplr.config_files import load_config
from pplr.data.sources import sources
from pplr.federation.methods import make_method
from pplr.recommend.floors import floor_names
from pplr.stages.cut import CutPlan

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LAYERS = {"smollm2-135m": 30, "minilm-l6": 6}


def test_the_promised_configurations_are_there() -> None:
    assert {
        "quickstart.yaml",
        "quickstart_causal_lm.yaml",
        "quickstart_encoder.yaml",
        "movielens_pplr.yaml",
        "games_pplr.yaml",
        "movielens_item_vectors.yaml",
        "games_item_vectors.yaml",
        "movielens_recformer.yaml",
        "games_recformer.yaml",
    } <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_valid_and_names_what_exists(path: Path) -> None:
    config = load_config(path)
    assert config.data.source in sources()
    assert make_method(config.federation).name == config.federation.method
    assert set(config.evaluation.floors) <= set(floor_names())
    blocks = config.backbone.keep_blocks or LAYERS[config.backbone.model]
    plan = CutPlan.make(config.cut, blocks)
    assert len(plan.input) + len(plan.middle) + len(plan.output) == blocks <= LAYERS[config.backbone.model]
    assert load_config(path) == Config.model_validate(config.model_dump(mode="json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_data_that_is_not_fetched_lies_below_the_users_own_folder(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name  # as `pplr init` writes it
    copy.write_bytes(path.read_bytes())
    given = load_config(copy).data.path
    if given is None:
        assert load_config(path).data.source == "movielens-100k"
        return
    assert not given.is_absolute()
    assert ".." not in given.parts
    (tmp_path / given).mkdir(parents=True)
    assert load_config(copy).data.path == tmp_path.resolve() / given
    page = (ROOT / "docs" / "howto" / "own_data.md").read_text(encoding="utf-8")
    assert f"`{given}`" in page
    assert f"`{path.stem}`" in page


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_trains_when_its_data_and_model_are_made_small(
    path: Path, data_folder: Path, model_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    import pplr

    is_encoder = load_config(path).backbone.name == "encoder"
    config = load_config(
        path,
        [
            "data.source=recbole",
            f"data.path={data_folder}",
            "data.partition={by: column, column: region, min_users: 1}",
            f"backbone.model={encoder_folder if is_encoder else model_folder}",
            *(["backbone.encoder.attributes=[]", "backbone.max_tokens=128"] if is_encoder else []),
            "backbone.keep_blocks=null",
            "cut={input_layers: 1, output_layers: 1}",
            "federation.clients=3",
            "federation.rounds=1",
            "training.local_epochs=1",
            "training.samples=9",
            "evaluation.test_users=3",
            "evaluation.validation_users=1",
            "evaluation.max_new_tokens=4",
        ],
    )
    run = pplr.train(config, tmp_path / "run")
    assert run.metrics is not None
    assert set(run.metrics["floors"]) == set(config.evaluation.floors)
    assert len(run.rounds) == 1
