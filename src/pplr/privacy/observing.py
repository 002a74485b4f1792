"""What the server sees of a user's pass across the cut, recorded where the server would see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pplr.backbones.base import Backbone, Batch
from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.item_vectors import ItemVectors
from pplr.backbones.titles import EncodedSample, ListTokens
from pplr.data.interactions import Catalog
from pplr.data.prompts import Sample, shown_title
from pplr.errors import ConfigError
from pplr.stages.boundary import Guard
from pplr.stages.client_model import ClientModel
from pplr.stages.model import CutModel
from pplr.stages.stage import StageCall
from pplr.stages.transport import Transport

__all__ = ["Observation", "Secret", "Spy", "observe", "secret_of"]


@dataclass(frozen=True)
class Secret:
    """What a user's pass holds, and the server should not learn.

    Args:
        user: The user's number.
        client: Whose user it is.
        tokens: What enters the model, T of them: token ids, or items where the backbone reads these, not the target.
        is_private: Whether each token tells something of the user; the words around a history do not.
        history: Items in order of time, each title's first.
        target: The item that the pass is trained to predict, its title's first.
    """

    user: int
    client: str
    tokens: tuple[int, ...]
    is_private: tuple[bool, ...]
    history: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Observation:
    """What the server sees of one user's training pass.

    Args:
        states: (T, D) float32, hidden states at the first cut.
        returned: (T, D) float32, what the server sends back at the second cut.
        gradient: (T, D) float32, what comes back at the second cut; ``None`` in inference.
    """

    states: Tensor
    returned: Tensor
    gradient: Tensor | None

    @property
    def length(self) -> int:
        """T."""
        return len(self.states)


class Spy:
    """A transport that keeps what the server sees, as it sees it.

    Args:
        transport: The real way to the middle stage.
        through: What becomes of states on their way, such as noise or a rounding wire format.
        back: What becomes of gradients on theirs.
    """

    def __init__(
        self,
        transport: Transport,
        through: Callable[[Tensor], Tensor] = lambda states: states,
        back: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> None:
        self._transport, self._through, self._back = transport, through, back
        self.states: Tensor | None = None
        self.returned: Tensor | None = None
        self.gradient: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def forward(self, hidden_states: Tensor, lengths: Tensor, call: StageCall, *, keep_as: int | None) -> Tensor:
        """Run the middle stage on what arrives: (B, T, D) -> (B, T, D)."""
        self.states = self._through(hidden_states)
        self.returned = self._transport.forward(self.states, lengths, call, keep_as=keep_as)
        return self.returned

    def decode(self, hidden_states: Tensor, call: StageCall, cache: int) -> Tensor:
        """Run the middle stage on what arrives and extend a cache: (B, T, D) -> (B, T, D)."""
        return self._transport.decode(self._through(hidden_states), call, cache)

    def backward(self, step: int, grad_hidden_states: Tensor, lengths: Tensor) -> Tensor | None:
        """Send a gradient back, and use it as it arrives: (B, T, D) -> (B, T, D), if that pass wants one."""
        self.gradient = self._back(grad_hidden_states)
        return self._transport.backward(step, self.gradient, lengths)


def observe(
    model: CutModel,
    adapter: Mapping[str, Tensor],
    batch: Batch,
    through: Callable[[Tensor], Tensor],
    guard: Guard | None = None,
    passes: int = 1,
    shared: int = 0,
    back: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Observation:
    """Run one user's training pass, without dropout, and keep what the server sees: the mean of several, if asked.

    Args:
        model: The model as it is cut.
        adapter: The client's.
        batch: The user's row, and after it those of a batch with which it shares its first tokens.
        through: What becomes of states on their way to the server.
        guard: What the client does to what it sends.
        passes: How often the pass crosses, each time with new noise.
        shared: As many tokens cross once for all rows, so that their gradient is the sum over the batch.
        back: What becomes of the gradient on its way.
    """
    name = "audit"
    client: ClientModel = model.client(name, adapter, guard)
    try:
        if client.transport is None:
            raise ConfigError("the model is not cut, so a server sees nothing", cure="Set cut, or give --input-layers.")
        spy = Spy(client.transport, through, back)
        client.transport = spy
        seen = [_observe_once(client, spy, batch, shared) for _ in range(passes)]
    finally:
        model.dismiss(name)
    gradients = [own.gradient for own in seen if own.gradient is not None]
    return Observation(
        torch.stack([own.states for own in seen]).mean(dim=0),
        torch.stack([own.returned for own in seen]).mean(dim=0),
        torch.stack(gradients).mean(dim=0) if gradients else None,
    )


def _observe_once(client: ClientModel, spy: Spy, batch: Batch, shared: int) -> Observation:
    client.train_loss(batch, None).backward()
    count = int(batch.lengths[0])
    if spy.states is None or spy.returned is None:
        raise ConfigError("nothing crossed the cut", cure="Set cut, or give --input-layers.")
    gradient = None
    if spy.gradient is not None:
        gradient = spy.gradient[0, :count].detach().float()
        gradient = torch.cat([spy.gradient[:, :shared].detach().float().sum(dim=0), gradient[shared:]])
    return Observation(spy.states[0, :count].detach().float(), spy.returned[0, :count].detach().float(), gradient)


def secret_of(backbone: Backbone, sample: Sample, client: str, catalog: Catalog, history_items: int) -> Secret:
    """Write down what a user's training pass holds.

    Raises:
        ConfigError: The backbone's passes cannot be read yet.
    """
    (encoded,) = backbone.encode([sample], catalog, history_items)
    first = _first_of_title(catalog)
    if isinstance(backbone, ItemVectors):
        *items, target = encoded.items
        private = (True,) * len(items)
        return Secret(sample.user, client, tuple(items), private, tuple(first[item] for item in items), first[target])
    if isinstance(backbone, CausalLM):
        return _prompt_secret(backbone, sample, encoded, client, catalog, history_items)
    raise ConfigError(
        f"what passes through backbone {backbone.name} is not audited", cure="Audit causal_lm or item_vectors."
    )


def _prompt_secret(
    backbone: CausalLM, sample: Sample, encoded: EncodedSample, client: str, catalog: Catalog, history_items: int
) -> Secret:
    """Find which tokens of a prompt and its answer are of titles."""
    items = sample.history[-history_items:]
    first = _first_of_title(catalog)
    if isinstance(backbone.titles, ListTokens):
        return _list_secret(backbone.titles, replace(sample, history=items), encoded, client, catalog)
    for start in range(len(items)):  # the oldest titles may have been left out
        kept = items[start:]
        text = backbone.template.prompt([catalog.titles[item] for item in kept])
        private = _private_tokens(backbone, text, [catalog.titles[item] for item in kept])
        if len(private) == len(encoded.prompt):
            answer = backbone.template.answer(catalog.titles[sample.target])
            told = [*_private_tokens(backbone, answer, [catalog.titles[sample.target]], begins=False), False]
            return Secret(
                user=sample.user,
                client=client,
                tokens=(*encoded.prompt, *encoded.answer),
                is_private=(*private, *told),
                history=tuple(first[item] for item in kept),
                target=first[sample.target],
            )
    raise ConfigError("a prompt holds no history", cure="Raise backbone.max_tokens.")


def _list_secret(titles: ListTokens, sample: Sample, encoded: EncodedSample, client: str, catalog: Catalog) -> Secret:
    """Find which tokens of a list are of titles: all of a line's but its end."""
    tokens, first = (*encoded.prompt, *encoded.answer), _first_of_title(catalog)
    kept: list[int] = []
    private: list[bool] = []
    for item in (sample.target, *reversed(sample.history)):  # the oldest titles may have been left out
        if len(titles.lead) + len(private) == len(tokens):
            break
        line = titles.answer(catalog.titles[item])
        kept.append(first[item])
        private += [False] * len(titles.line_end) + [True] * (len(line) - len(titles.line_end))
    return Secret(
        user=sample.user,
        client=client,
        tokens=tokens,
        is_private=(*[False] * len(titles.lead), *reversed(private)),
        history=tuple(kept[:0:-1]),
        target=kept[0],
    )


def _private_tokens(backbone: CausalLM, text: str, titles: Sequence[str], begins: bool = True) -> list[bool]:
    """Say of each token of a text whether it holds a letter of one of the titles, which follow each other."""
    spans, at = [], 0
    for title in titles:
        at = text.index(f'"{shown_title(title)}"', at) + 1
        spans.append(range(at, at + len(shown_title(title))))
        at = spans[-1].stop
    offsets = backbone.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    lead = len(backbone.text_tokens("")) if begins else 0
    return [False] * lead + [any(max(a, s.start) < min(b, s.stop) for s in spans) for a, b in offsets]


def _first_of_title(catalog: Catalog) -> list[int]:
    """Name each item by the first item of its title, since a title is all that a text tells."""
    first: dict[str, int] = {}
    return [first.setdefault(shown_title(title), number) for number, title in enumerate(catalog.titles)]
