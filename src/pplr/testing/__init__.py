"""Tiny models, a small catalog, and contracts with which what is built on pplr is tested in seconds.

A new backbone or transport is tested by a class of three lines, which inherits every test of its contract:

    class TestLocalTransport(TransportContract):
        def connect(self, host, client):
            return LocalTransport(host, client)
"""

from pplr.testing.backbones import BackboneContract
from pplr.testing.checks import refuses, same_adapters, same_state
from pplr.testing.tiny import (
    every_cut,
    peft_model,
    random_adapter,
    tiny_backbone,
    tiny_catalog,
    tiny_decoder,
    tiny_encoder,
    tiny_samples,
    tiny_tokenizer,
)
from pplr.testing.transports import TransportContract

__all__ = [
    "BackboneContract",
    "TransportContract",
    "every_cut",
    "peft_model",
    "random_adapter",
    "refuses",
    "same_adapters",
    "same_state",
    "tiny_backbone",
    "tiny_catalog",
    "tiny_decoder",
    "tiny_encoder",
    "tiny_samples",
    "tiny_tokenizer",
]
