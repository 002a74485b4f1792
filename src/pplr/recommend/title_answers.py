"""The catalog's titles as a decoder writes them: how long they are, where they stop, and the trie of them."""

from __future__ import annotations

from functools import cached_property

from pplr.backbones.causal_lm import CausalLM
from pplr.data.interactions import Catalog
from pplr.recommend.trie import TitleTrie

__all__ = ["TitleAnswers"]


class TitleAnswers:
    """All titles of a catalog as a backbone's answers, which are the same for every client and every request.

    Args:
        backbone: Whose tokens they are.
        catalog: Whose titles.

    Attributes:
        backbone: As given.
        catalog: As given.
        tokens: The tokens of each item's title, with those that end it, in catalog order.
        longest: Tokens of the longest.
        stop_tokens: Those that end a title's line.
    """

    def __init__(self, backbone: CausalLM, catalog: Catalog) -> None:
        self.backbone, self.catalog = backbone, catalog
        written = {title: backbone.answer_tokens(title) for title in dict.fromkeys(catalog.titles)}
        self.tokens = [written[title] for title in catalog.titles]
        self.longest = backbone.answer_room(catalog)
        endings = {token for answer in self.tokens for token in answer[-2:]}
        self.stop_tokens = sorted(token for token in endings if "\n" in backbone.tokenizer.decode([token]))

    @cached_property
    def trie(self) -> TitleTrie:
        """The trie of all titles."""
        return TitleTrie(self.tokens, self.backbone.answer_end)
