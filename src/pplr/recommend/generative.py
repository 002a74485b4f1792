"""Generative recommendation: the model writes a title, and the title is grounded in the catalog."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pplr.backbones.causal_lm import CausalLM
from pplr.config import EvaluationConfig
from pplr.data.interactions import Catalog
from pplr.data.prompts import Case, shown_title
from pplr.errors import ConfigError, StorageError
from pplr.recommend.generation import generate
from pplr.recommend.grounding import l2_scores, trie_scores
from pplr.recommend.title_answers import TitleAnswers
from pplr.recommend.title_search import TitleBeam, search_titles, walk_titles
from pplr.recommend.trie import TitleTrie, TrieConstraint, generated_titles
from pplr.stages.client_model import ClientModel
from pplr.storage import cache_dir, sha256_bytes, sha256_file, write_atomic

__all__ = ["GenerativeRanker", "TitleSpace", "embed_texts", "read_texts"]

_BATCH_TOKENS, _BATCH_ROWS = 4096, 256


def embed_texts(
    model: ClientModel,
    texts: Sequence[str],
    advance: Callable[[int], None] = lambda _: None,
    *,
    pooling: Literal["last", "mean"] = "last",
) -> Tensor:
    """Embed texts by the base model: the state of the last token after the final norm, adapters off.

    Args:
        model: Any client's model; its adapter takes no part.
        texts: S texts, none of them empty.
        advance: Told the number of texts done.
        pooling: ``mean`` takes the mean over a text's tokens instead of the last.

    Returns:
        (S, D) float32, on the CPU. Equal texts have equal rows.
    """
    backbone = _decoder(model)
    unique = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    rows = [backbone.text_tokens(text) for text in unique]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    embeddings = torch.empty(len(rows), backbone.hidden_size)
    start = 0
    while start < len(order):
        size = max(1, min(_BATCH_ROWS, _BATCH_TOKENS // len(rows[order[start]])))
        chosen = order[start : start + size]
        batch = backbone.pad([rows[i] for i in chosen])
        states = model.hidden_states(batch, adapter=False)  # (B, T, D)
        if pooling == "last":
            told = backbone.final_states(states[torch.arange(len(chosen)), batch.lengths - 1]).float()
        else:
            real = torch.arange(states.shape[1])[None, :] < batch.lengths[:, None]
            final = backbone.final_states(states).float() * real[:, :, None].to(states.device)
            told = final.sum(dim=1) / batch.lengths[:, None].to(states.device)
        embeddings[chosen] = told.cpu()
        start += len(chosen)
        advance(len(chosen))
    return embeddings[[unique[text] for text in texts]]


class TitleSpace:
    """The catalog's titles as the base model sees them, computed once and cached by hash.

    Items that share a title share a row, so text grounds to all of them alike.

    Args:
        catalog: N items.
        embeddings: (S, D) of the distinct titles as they are shown.
        title_of: (N,) row of each item's title.
    """

    def __init__(self, catalog: Catalog, embeddings: Tensor, title_of: Tensor) -> None:
        self.catalog = catalog
        self.embeddings = embeddings
        self.title_of = title_of

    @classmethod
    def build(cls, model: ClientModel, catalog: Catalog, advance: Callable[[int], None] = lambda _: None) -> TitleSpace:
        """Embed the catalog's titles, or read them from the cache.

        Raises:
            StorageError: The cached file is damaged.
        """
        backbone = _decoder(model)
        shown = [shown_title(title) for title in catalog.titles]
        distinct = {title: number for number, title in enumerate(dict.fromkeys(shown))}
        title_of = torch.tensor([distinct[title] for title in shown])
        key = sha256_bytes("\n".join(["titles 1", backbone.fingerprint(), *distinct]).encode())
        path = cache_dir() / "title_embeddings" / f"{key[:32]}.safetensors"
        return cls(catalog, _cached(path, lambda: embed_texts(model, list(distinct), advance)), title_of)


def read_texts(
    model: ClientModel,
    texts: Sequence[str],
    advance: Callable[[int], None] = lambda _: None,
    *,
    pooling: Literal["last", "mean"] = "mean",
) -> Tensor:
    """Read texts as vectors of the base model, or take them from the cache.

    Args:
        model: Any client's model; its adapter takes no part.
        texts: S texts, none of them empty.
        advance: Told the number of texts done.
        pooling: ``mean`` takes the mean of a text's states over its tokens, ``last`` that of its last token.

    Returns:
        (S, D) float32, on the CPU.

    Raises:
        StorageError: The cached file is damaged.
    """
    kind = "texts 1" if pooling == "mean" else f"texts 1, {pooling}"
    key = sha256_bytes("\n".join([kind, _decoder(model).fingerprint(), *texts]).encode())
    path = cache_dir() / "title_embeddings" / f"{key[:32]}.safetensors"
    return _cached(path, lambda: embed_texts(model, texts, advance, pooling=pooling))


def _cached(path: Path, make: Callable[[], Tensor]) -> Tensor:
    embeddings = _read(path)
    if embeddings is None:
        embeddings = make()
        content = save({"embeddings": embeddings})
        write_atomic(path.with_suffix(".sha256"), sha256_bytes(content).encode())  # first: alone it means nothing
        write_atomic(path, content)
    return embeddings


def _read(path: Path) -> Tensor | None:
    """Map cached embeddings into memory; absent is ``None``, damaged is an error.

    The file is hashed a piece at a time before it is mapped, so its bytes are read once from the disk and never copied.
    """
    if not path.exists():
        return None
    try:
        expected = path.with_suffix(".sha256").read_text(encoding="ascii")
        if sha256_file(path) == expected:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor("embeddings")
    except (OSError, SafetensorError, KeyError, UnicodeDecodeError):
        pass
    raise StorageError(
        f"the cached title embeddings {path} do not match their SHA-256", cure=f"Delete {path} and run again."
    )


class GenerativeRanker:
    """Ranks the full catalog for a user by what one client's model writes.

    ``l2``: the best beam's text, embedded by the base model, against all titles by Euclidean distance (BIGRec's).
    ``trie``: the beams walk a trie of titles, seen ones left out; what they write comes first, by beam score, then
    all other items by the distance to the best beam's title.

    Args:
        model: The client's model.
        space: The catalog's titles.
        config: Grounding, beams, longest answer.
        history_items: Most items of a history that a prompt shows.
        answers: The titles of ``space`` as the model's backbone writes them; made here when absent.

    Attributes:
        stop_tokens: Those that end a title's line.
    """

    def __init__(
        self,
        model: ClientModel,
        space: TitleSpace,
        config: EvaluationConfig,
        *,
        history_items: int,
        answers: TitleAnswers | None = None,
    ) -> None:
        self._model = model
        self._backbone = _decoder(model)
        self._space = space
        self._config = config
        self._history_items = history_items
        answers = answers or TitleAnswers(self._backbone, space.catalog)
        self._longest, self.stop_tokens = answers.longest, answers.stop_tokens
        self._trie = answers.trie if config.grounding == "trie" else None

    def scores(self, cases: Sequence[Case]) -> NDArray[np.float32]:
        """Score every item for every case: (B, N), higher is better."""
        prompts = self._prompts(cases)
        scored = self._by_trie(cases, prompts) if self._trie is not None else self._by_distance(prompts)
        return scored.numpy()

    @property
    def queues(self) -> bool:
        """Whether users can join those who are under way: by the trie, without a guard's noise."""
        return self._trie is not None and self._backbone.takes_masks and not self._model.guard

    def queued(self, cases: Sequence[Case], places: int) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Score cases of which so many are under way at a time; see :class:`~pplr.recommend.evaluation.QueueRanker`."""
        if self._trie is None:
            raise ConfigError("this ranker has no trie", cure="Set evaluation.grounding to trie.")
        prompts = self._prompts(cases)
        order = sorted(range(len(cases)), key=lambda place: len(prompts[place]))
        walked = walk_titles(
            self._model,
            [prompts[place] for place in order],
            self._trie,
            beams=self._config.beams,
            exclude=[cases[place].seen for place in order],
            opening=self._backbone.opening,
            places=places,
        )
        done: list[int] = []
        found: list[list[TitleBeam]] = []
        for number, titles in walked:
            done.append(order[number])
            found.append(titles)
            if len(done) == min(places, _BATCH_ROWS):
                yield done, self._of_titles(self._trie, found).numpy()
                done, found = [], []
        if done:
            yield done, self._of_titles(self._trie, found).numpy()

    def write(self, cases: Sequence[Case]) -> list[str]:
        """Return the text of the best beam for each case, as it would be grounded."""
        return self._texts(self._prompts(cases))

    def sizes(self, cases: Sequence[Case]) -> list[int]:
        """Count the tokens of each case's prompt."""
        return [len(prompt) for prompt in self._prompts(cases)]

    def _prompts(self, cases: Sequence[Case]) -> list[tuple[int, ...]]:
        titles = self._space.catalog.titles
        return [
            self._backbone.prompt_tokens([titles[item] for item in case.history[-self._history_items :]], self._longest)
            for case in cases
        ]

    def _texts(self, prompts: Sequence[tuple[int, ...]]) -> list[str]:
        written = generate(
            self._model,
            prompts,
            beams=self._config.beams,
            max_new_tokens=self._config.max_new_tokens,
            stop_tokens=self.stop_tokens,
            opening=self._backbone.opening,
        )
        answers = written.sequences[:, written.prompt_length :].tolist()
        return [self._backbone.read_answer(answer) for answer in answers]

    def _by_distance(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        texts = self._texts(prompts)
        scored = torch.zeros(len(texts), len(self._space.catalog))  # an empty answer says nothing: all items tie
        told = [row for row, text in enumerate(texts) if text]
        if told:
            queries = embed_texts(self._model, [texts[row] for row in told])
            scored[told] = l2_scores(queries, self._space.embeddings)[:, self._space.title_of]
        return scored

    def _by_trie(self, cases: Sequence[Case], prompts: Sequence[tuple[int, ...]]) -> Tensor:
        if self._trie is None:
            raise ConfigError("this ranker has no trie", cure="Set evaluation.grounding to trie.")
        exclude, beams = [case.seen for case in cases], self._config.beams
        if self._backbone.takes_masks:
            opening = self._backbone.opening
            found = search_titles(self._model, prompts, self._trie, beams=beams, exclude=exclude, opening=opening)
        else:
            found = self._by_constraint(self._trie, prompts, exclude)
        return self._of_titles(self._trie, found)

    def _of_titles(self, trie: TitleTrie, found: Sequence[Sequence[TitleBeam]]) -> Tensor:
        return trie_scores(found, self._space.embeddings[self._space.title_of], trie.title_of)

    def _by_constraint(
        self, trie: TitleTrie, prompts: Sequence[tuple[int, ...]], exclude: Sequence[Sequence[int]]
    ) -> list[list[TitleBeam]]:
        """Find titles a token of every beam at a time, where blocks look back a limited way."""
        beams, longest = self._config.beams, max(len(prompt) for prompt in prompts)
        written = generate(
            self._model,
            prompts,
            beams=beams,
            max_new_tokens=trie.max_length + 1,
            stop_tokens=[trie.end_token],
            returned=beams,
            length_penalty=0.0,
            processors=[TrieConstraint(trie, longest, beams, exclude=exclude)],
        )
        scores = torch.zeros(len(written.sequences)) if written.scores is None else written.scores
        return generated_titles(trie, written.sequences, scores, written.prompt_length, len(prompts))


def _decoder(model: ClientModel) -> CausalLM:
    if not isinstance(model.backbone, CausalLM):
        raise ConfigError(
            f"the backbone {model.backbone.name!r} writes no titles", cure="Use backbone.name: causal_lm."
        )
    return model.backbone
