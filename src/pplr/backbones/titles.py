"""Titles in tokens: a history as a prompt, a title as its answer, and both as what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pplr.backbones.shared_row import common_prefix
from pplr.data.interactions import Catalog
from pplr.data.prompts import PromptTemplate, Sample
from pplr.errors import DataError

__all__ = ["EncodedSample", "ListTokens", "PromptTokens"]

_AT_ONCE = 1024
"""Prompts that are given to the tokenizer in one call: many threads read them, and their texts need little memory."""


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A prompt and what is to be written after it, encoded apart, so that prompts are the same in inference."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class PromptTokens:
    """Prompts and answers as the template has them: a history, and the one title that followed.

    Args:
        tokenizer: Of the model.
        template: Words around a history.
        start: What every sequence begins with.
        end: The token that ends a text.

    Attributes:
        end: The token that ends an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, start: tuple[int, ...], end: int
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.start, self.end = start, end
        self._room: tuple[Catalog, int] | None = None

    def tokens(self, text: str) -> tuple[int, ...]:
        """Encode a text as it is, with nothing before or after it."""
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def whole_prompt(self, titles: Sequence[str]) -> tuple[int, ...]:
        """Encode a history, however long it is."""
        return self.start + self.tokens(self.template.prompt(titles))

    @cached_property
    def opening(self) -> int:
        """Count the tokens that every prompt begins with, whatever the history: they tell of no user."""
        return common_prefix([self.whole_prompt([title]) for title in ("A", "z", "7", "(")])

    def answer(self, title: str) -> tuple[int, ...]:
        """Encode a title as an answer, with the token that ends it."""
        return (*self.tokens(self.template.answer(title)), self.end)

    def _longest(self, catalog: Catalog) -> int:
        answers = [self.template.answer(title) for title in catalog.titles]
        return 1 + max(map(len, self.tokenizer(answers, add_special_tokens=False).input_ids))

    def room(self, catalog: Catalog) -> int:
        """Count the tokens of a catalog's longest answer.

        Every prompt leaves as much room, in training as in inference, where the answer is not known; so a history
        is shortened to the same prompt in both.
        """
        if self._room is None or self._room[0] is not catalog:
            self._room = (catalog, self._longest(catalog))
        return self._room[1]

    def prompt(self, titles: Sequence[str], reserve: int, max_tokens: int) -> tuple[tuple[int, ...], int]:
        """Encode the newest titles of a history that leave room for an answer, and say how many there are.

        Args:
            titles: The history, oldest first.
            reserve: Tokens to leave for the answer.
            max_tokens: Longest prompt with its answer.

        Raises:
            DataError: There is no history, or even its newest title alone does not fit.
        """
        needed = 0
        for first in range(max(1, len(titles))):
            tokens = self.whole_prompt(titles[first:])
            needed = len(tokens) + reserve
            if needed <= max_tokens:
                return tokens, len(titles) - first
        raise DataError(
            f"a prompt with one title and {reserve} answer tokens takes {needed} tokens, more than the "
            f"{max_tokens} allowed",
            cure="Raise backbone.max_tokens, or shorten backbone.prompt.instruction or the data's titles.",
        )

    def windows(self, samples: Sequence[Sample], catalog: Catalog, max_tokens: int) -> list[Sample]:
        """Divide samples of which every title is a target, so that each fits; of a single target, none is divided."""
        return list(samples)

    def encode(self, sample: Sample, catalog: Catalog, history_items: int, max_tokens: int) -> EncodedSample:
        """Encode the newest items of a history as a prompt, and the target as its answer."""
        titles = [catalog.titles[item] for item in sample.history[-history_items:]]
        prompt, _ = self.prompt(titles, self.room(catalog), max_tokens)
        return EncodedSample(prompt, self.answer(catalog.titles[sample.target]))

    def encode_all(
        self, samples: Sequence[Sample], catalog: Catalog, history_items: int, max_tokens: int
    ) -> list[EncodedSample]:
        """Encode samples as :meth:`encode` does each, many of them in one call of the tokenizer."""
        encoded, room = list[EncodedSample](), self.room(catalog)
        targets = list(dict.fromkeys(catalog.titles[sample.target] for sample in samples))
        answers = {title: self.answer(title) for title in targets}
        for start in range(0, len(samples), _AT_ONCE):
            part = samples[start : start + _AT_ONCE]
            histories = [[catalog.titles[item] for item in sample.history[-history_items:]] for sample in part]
            prompts = self._whole_prompts(histories)
            for sample, titles, prompt in zip(part, histories, prompts, strict=True):
                if len(prompt) + room > max_tokens:
                    prompt, _ = self.prompt(titles, room, max_tokens)
                encoded.append(EncodedSample(prompt, answers[catalog.titles[sample.target]]))
        return encoded

    def _whole_prompts(self, histories: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
        texts = [self.template.prompt(titles) for titles in histories]
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return [self.start + self.tokens(text) for text in texts]
        encoder = self.tokenizer.backend_tokenizer  # asked itself, it makes no masks, types and places
        encoder.no_truncation()
        encoder.no_padding()
        return [self.start + tuple(own.ids) for own in encoder.encode_batch_fast(texts, add_special_tokens=False)]


class ListTokens(PromptTokens):
    """Lists, a title on each line, of which every title after the first may be a target.

    Each line is encoded apart, and so is its end. So a history is the same tokens whatever follows it, a prompt with
    its answer is the prompt of the longer history, and an answer ends where its line does.

    Attributes:
        lead: Tokens before the first title.
        line_end: Tokens that end a line.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, start: tuple[int, ...], end: int
    ) -> None:
        super().__init__(tokenizer, template, start, end)
        self.lead = start + self.tokens(template.before)
        self.line_end = self.tokens("\n")
        self.end = self.line_end[-1]
        self._lines: dict[str, tuple[int, ...]] = {}

    def whole_prompt(self, titles: Sequence[str]) -> tuple[int, ...]:
        """Encode a history, however long it is."""
        self.template.prompt(titles)  # refuses an empty one
        return self.lead + tuple(token for title in titles for token in self.answer(title))

    def answer(self, title: str) -> tuple[int, ...]:
        """Encode a title's line."""
        if title not in self._lines:
            text = self.template.answer(title).removesuffix("\n")
            self._lines[title] = self.tokens(text) + self.line_end
        return self._lines[title]

    def _longest(self, catalog: Catalog) -> int:
        return max(len(self.answer(title)) for title in catalog.titles)

    def windows(self, samples: Sequence[Sample], catalog: Catalog, max_tokens: int) -> list[Sample]:
        """Divide samples of which every title is a target, so that each fits and no target is lost.

        As windows of histories do, parts begin at the newest item and share the item at their border.
        """
        divided: list[Sample] = []
        for sample in samples:
            parts, items = [], (*sample.history, sample.target)
            while sample.every and len(items) > 1:
                titles = [catalog.titles[item] for item in items[:-1]]
                _, kept = self.prompt(titles, self.room(catalog), max_tokens)
                parts.append(replace(sample, history=items[-1 - kept : -1], target=items[-1]))
                items = items[:-kept]
            divided += parts[::-1] or [sample]
        return divided

    def encode(self, sample: Sample, catalog: Catalog, history_items: int, max_tokens: int) -> EncodedSample:
        """Encode a history and its target; where every title is one, the prompt ends after the first that fits."""
        titles = [catalog.titles[item] for item in sample.history[-history_items:]]
        prompt, kept = self.prompt(titles, self.room(catalog), max_tokens)
        answer = self.answer(catalog.titles[sample.target])
        if not sample.every:
            return EncodedSample(prompt, answer)
        begins = len(self.lead) + len(self.answer(titles[-kept]))
        return EncodedSample(prompt[:begins], prompt[begins:] + answer)

    def encode_all(
        self, samples: Sequence[Sample], catalog: Catalog, history_items: int, max_tokens: int
    ) -> list[EncodedSample]:
        """Encode samples as :meth:`encode` does each: a line is encoded once."""
        return [self.encode(sample, catalog, history_items, max_tokens) for sample in samples]
