"""Each attack keeps the contract: it finds what is bare, and nothing in random states."""

from __future__ import annotations

from typing import ClassVar

from pplr.testing.audits import AuditContract


class TestNearestEmbedding(AuditContract):
    audit = "nearest_embedding"
    finds: ClassVar = {"causal_lm": 1.0, "item_vectors": 1.0}


class TestVocabularyMatching(AuditContract):
    audit = "vocabulary_matching"
    finds: ClassVar = {"causal_lm": 1.0, "item_vectors": 1.0}


class TestVocabularyMatchingBehindBlocks(AuditContract):
    audit = "vocabulary_matching"
    cut = (2, 0)
    levels = ("own",)
    finds: ClassVar = {"causal_lm": 0.9, "item_vectors": 0.9}


class TestPairsBehindBlocks(AuditContract):
    audit = "vocabulary_matching"
    cut = (2, 0)
    levels = ("pairs",)
    finds: ClassVar = {"causal_lm": 0.25, "item_vectors": 0.25}


class TestCatalogMatching(AuditContract):
    audit = "catalog_matching"
    finds: ClassVar = {"causal_lm": 1.0, "item_vectors": 1.0}


class TestCatalogMatchingBehindBlocks(AuditContract):
    audit = "catalog_matching"
    cut = (2, 0)
    finds: ClassVar = {"causal_lm": 0.9, "item_vectors": 0.9}
