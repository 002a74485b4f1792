"""How much of what a pass holds an attack found, on what tells of the user alone, beside a guess without any state."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from pplr.backbones.base import Backbone
from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.titles import ListTokens
from pplr.data.interactions import Catalog
from pplr.data.prompts import shown_title
from pplr.privacy.audits.base import Guess
from pplr.privacy.observing import Secret
from pplr.seeds import generator

__all__ = ["METRICS", "Reader", "baseline", "exact", "interval", "resampled", "rouge_l", "score"]

METRICS = (
    "token_recovery",
    "rouge_l",
    "item_precision",
    "item_recall",
    "item_f1",
    "target_hit@1",
    "target_hit@10",
)
"""What is measured of each user; a metric that an attack says nothing of is ``None``."""

_BINARY = ("target_hit@1", "target_hit@10")
"""Metrics that are 0 or 1 for each user, whose intervals are exact."""
_RESAMPLES = 2_000
_CLOSE = 0.75
_QUOTED = re.compile(r'"([^"\n]*)"')


class Reader:
    """Reads items off recovered tokens, as an attacker who has the catalog would.

    Args:
        backbone: Whose tokens.
        catalog: The catalog.
    """

    def __init__(self, backbone: Backbone, catalog: Catalog) -> None:
        self.backbone, self.catalog = backbone, catalog
        self._titles: dict[str, int] = {}
        for number, title in enumerate(catalog.titles):
            self._titles.setdefault(shown_title(title), number)
        self._memory: dict[tuple[str, int], list[int]] = {}

    def history(self, tokens: Sequence[int | None]) -> set[int]:
        """Read the items before the target."""
        if not isinstance(self.backbone, CausalLM):
            return {self.first(token) for token in tokens if token is not None}
        said = self._lines(tokens)[:-1] if self._lists else _quoted(self._text(tokens).rsplit("### Response:", 1)[0])
        return {own[0] for title in said if (own := self._closest(title, 1))}

    def request(self, tokens: Sequence[int | None]) -> list[int]:
        """Read the items of a pass that asks for recommendations, in their order: it holds a history and no target."""
        if not isinstance(self.backbone, CausalLM):
            return [self.first(token) for token in tokens if token is not None]
        said = self._lines(tokens) if self._lists else _quoted(self._text(tokens).rsplit("### Response:", 1)[0])
        return [own[0] for title in said if (own := self._closest(title, 1))]

    def targets(self, tokens: Sequence[int | None]) -> tuple[int, ...] | None:
        """Read the likeliest targets, the best first; ``None`` where tokens are items, among which no target is."""
        if not isinstance(self.backbone, CausalLM):
            return None
        if self._lists:
            lines = self._lines(tokens)
            return tuple(self._closest(lines[-1], 10)) if lines else ()
        parts = self._text(tokens).rsplit("### Response:", 1)
        answers = _quoted(parts[1] + '"') if len(parts) == 2 else []
        return tuple(self._closest(answers[0], 10)) if answers else ()

    def token(self, token: int | None) -> int | None:
        """Name a token; where tokens are items, by the first of its title, since the model reads titles alone."""
        return token if token is None or isinstance(self.backbone, CausalLM) else self.first(token)

    def first(self, item: int) -> int:
        """Name an item by the first of its title."""
        return self._titles[shown_title(self.catalog.titles[item])]

    @property
    def _lists(self) -> ListTokens | None:
        """How lists are written, where a pass is one."""
        titles = self.backbone.titles if isinstance(self.backbone, CausalLM) else None
        return titles if isinstance(titles, ListTokens) else None

    def _lines(self, tokens: Sequence[int | None]) -> list[str]:
        """Read the lines of a list, whose beginning is known."""
        lead = 0 if self._lists is None else len(self._lists.lead)
        return [" ".join(line.split()) for line in self._text(tokens[lead:]).split("\n") if line.strip()]

    def _text(self, tokens: Sequence[int | None]) -> str:
        backbone = self.backbone
        if not isinstance(backbone, CausalLM):
            raise TypeError(type(backbone).__name__)
        return str(backbone.tokenizer.decode([t for t in tokens if t is not None], skip_special_tokens=True))

    def _closest(self, title: str, count: int) -> list[int]:
        """Find the catalog's titles that resemble one, the nearest first."""
        memory = self._memory
        if (title, count) not in memory:
            exact = [title] if title in self._titles else []
            near = exact if count == 1 and exact else difflib.get_close_matches(title, self._titles, count, _CLOSE)
            memory[title, count] = [self._titles[own] for own in dict.fromkeys([*exact, *near])][:count]
        return memory[title, count]


def _quoted(text: str) -> list[str]:
    return [" ".join(found.split()) for found in _QUOTED.findall(text) if found.strip(" ,")]


def score(guess: Guess, secret: Secret, reader: Reader) -> dict[str, float | None]:
    """Measure one guess."""
    told: dict[str, float | None] = dict.fromkeys(METRICS)
    targets = guess.targets
    if guess.tokens is not None:
        places = [place for place, own in enumerate(secret.is_private) if own]
        said, true = ([reader.token(tokens[place]) for place in places] for tokens in (guess.tokens, secret.tokens))
        told["token_recovery"] = sum(a == b for a, b in zip(said, true, strict=True)) / len(places)
        told["rouge_l"] = rouge_l(said, true)
        found, truth = reader.history(guess.tokens), set(secret.history)
        if truth:
            told |= _sets(found, truth)
        targets = reader.targets(guess.tokens) if targets is None else targets
    if targets is not None:
        named = [reader.first(item) for item in targets]
        told["target_hit@1"] = float(secret.target in named[:1])
        told["target_hit@10"] = float(secret.target in named[:10])
    return told


def _sets(found: set[int], truth: set[int]) -> dict[str, float | None]:
    both = len(found & truth)
    precision, recall = both / len(found) if found else 0.0, both / len(truth)
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {"item_precision": precision, "item_recall": recall, "item_f1": f1}


def rouge_l(guessed: Sequence[int | None], truth: Sequence[int | None]) -> float:
    """Measure the longest common subsequence as an F1, in [0, 1].

    Cites:
        lin2004rouge

    Example:
        >>> rouge_l([1, 9, 3], [1, 2, 3])
        0.6666666666666666
    """
    said = [token for token in guessed if token is not None]
    before = [0] * (len(truth) + 1)
    for token in said:
        row = [0]
        for place, own in enumerate(truth, 1):
            row.append(before[place - 1] + 1 if own == token else max(before[place], row[-1]))
        before = row
    return 2 * before[-1] / (len(said) + len(truth)) if said and truth else 0.0


def baseline(secret: Secret, popularity: Tensor, reader: Reader) -> dict[str, float | None]:
    """Measure a guess that uses no state: the most popular items, as many as the history holds.

    Tokens of items are guessed likewise, each place by the most popular item; of text only the words around a history
    are known, which count for nothing.
    """
    order = popularity.argsort(descending=True, stable=True).tolist()
    ranked = list(dict.fromkeys(reader.first(item) for item in order))
    told: dict[str, float | None] = dict.fromkeys(METRICS)
    reads_items = not isinstance(reader.backbone, CausalLM)
    places = [place for place, own in enumerate(secret.is_private) if own]
    guessed = [ranked[0] if reads_items else None] * len(places)
    truth = [reader.token(secret.tokens[place]) for place in places]
    told["token_recovery"] = sum(a == b for a, b in zip(guessed, truth, strict=True)) / len(places)
    told["rouge_l"] = rouge_l(guessed, truth)
    if secret.history:
        told |= _sets(set(ranked[: len(set(secret.history))]), set(secret.history))
    unseen = [item for item in ranked if item not in secret.history]
    told["target_hit@1"] = float(secret.target in unseen[:1])
    told["target_hit@10"] = float(secret.target in unseen[:10])
    return told


def interval(rows: Sequence[Mapping[str, float | None]], seed: int = 0) -> dict[str, dict[str, float] | None]:
    """Average each metric over users, with a 95 % interval.

    A share of users has Clopper and Pearson's interval: resampling a few users who are all hit says they all would be.
    Other metrics are resampled over users, which is too narrow too where users are few; so their number is told.

    Returns:
        ``mean``, ``low``, ``high`` and ``users`` of each metric; ``None`` where no user has it.

    Cites:
        clopper1934fiducial
    """
    told: dict[str, dict[str, float] | None] = {}
    for metric in METRICS:
        known = [value for row in rows if (value := row[metric]) is not None]
        if not known:
            told[metric] = None
            continue
        values = np.array(known)
        own = exact(values) if metric in _BINARY else resampled(values, generator(seed, "audit", metric))
        told[metric] = {**own, "users": len(known)}
    return told


def exact(values: NDArray[np.float64]) -> dict[str, float]:
    """Average values that are 0 or 1, with Clopper and Pearson's 95 % interval: ``mean``, ``low`` and ``high``.

    Example:
        >>> round(exact(np.ones(8))["low"], 4)
        0.6306
    """
    hits, count = int(values.sum()), len(values)
    bounds = binomtest(hits, count).proportion_ci(0.95, method="exact")
    return {"mean": float(values.mean()), "low": float(bounds.low), "high": float(bounds.high)}


def resampled(values: NDArray[np.float64], draw: np.random.Generator) -> dict[str, float]:
    """Average the values of users, with a 95 % interval by resampling users: ``mean``, ``low`` and ``high``."""
    draws = draw.integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
