"""The registry of backbones."""

from __future__ import annotations

import pytest

from pplr.backbones.base import BACKBONES, load_backbone, register
from pplr.backbones.causal_lm import CausalLM
from pplr.config import BackboneConfig
from pplr.errors import ConfigError
from pplr.testing import refuses, tiny_backbone


def test_an_unknown_backbone_is_refused_with_the_nearest_name():
    with refuses(ConfigError, "no backbone is called 'causal_ln'. Did you mean 'causal_lm'?"):
        load_backbone(BackboneConfig(name="causal_ln"))


def test_a_backbone_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pplr.backbones.base.BACKBONES", dict(BACKBONES))
    made = tiny_backbone()
    heard = []

    class Mine(CausalLM):
        name = "mine"

        @classmethod
        def load(cls, config, notify):
            notify(config.model)
            return made

    assert register(Mine) is Mine
    try:
        assert load_backbone(BackboneConfig(name="mine", model="a model"), heard.append) is made
        assert heard == ["a model"]
    finally:
        BACKBONES.pop("mine", None)
