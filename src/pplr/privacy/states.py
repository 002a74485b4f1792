"""What a client does to states and gradients before they cross the cut, and what that is worth as an ε."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pplr.config import StatePrivacyConfig
from pplr.privacy.accounting import epsilon_of
from pplr.privacy.coins import SecretCoins
from pplr.privacy.secret import derived

__all__ = ["StateGuard", "clipped", "described", "gaussian_epsilon", "told_of_states"]

_TINY = 1e-12
_LITTLE = 0.002
"""Noise multiplier below which ε is bounded by a formula: above a hundred thousand, its digits matter to nobody."""


def clipped(states: Tensor, clip_norm: float | None) -> Tensor:
    """Scale rows down to at most a norm, with the exact derivative: (..., D) -> (..., D) float32.

    h min(1, C / ‖h‖)
    """
    states = states.float()
    if clip_norm is None:
        return states
    norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True).clamp(min=_TINY)
    return states * (clip_norm / norms).clamp(max=1.0)


class StateGuard:
    """Clips what crosses the cut, one token's vector at a time, and adds noise that only the client can draw again.

    The noise of a pass is ChaCha20's key stream under a key that HMAC-SHA256 makes of the client's secret, of what the
    pass is for, of how many passes came before it there, and of the clipped vectors themselves. So a pass that is run
    again, as after a kill, sends the same bytes; vectors that differ in one bit get other noise; and the same vectors
    in another pass do too, so that equal noise never shows that two histories are equal.

    Where the input stage has settled, the noise of a vector follows from it and from those before it, for the same
    user in every pass: a history that crosses again, or an item longer, tells nothing new as far as it is the same.
    The key still holds the vectors. Were it made of the items instead, an input stage
    that moves would send two different states with one noise, and their difference has none.

    Args:
        config: What is done.
        secret: 32 bytes, where anything is drawn.
        context: Whose passes these are.

    Cites:
        feyisetan2020metric
        dwork2014algorithmic
    """

    def __init__(self, config: StatePrivacyConfig, secret: bytes, context: str) -> None:
        self.config = config
        self._secret, self._context = secret, context
        self._occasion, self._passes = "", Counter[str]()
        self._owner: int | None = None

    @property
    def settle_rounds(self) -> int | None:
        """After how many server rounds the input stage stays as it is."""
        return self.config.settle_rounds

    def enter(self, occasion: str) -> None:
        """Say what the next passes are for; the same occasion again starts where it started before."""
        self._occasion, self._passes = occasion, Counter()

    @contextmanager
    def repeating(self, owner: int) -> Iterator[None]:
        """Draw the same noise for a user's vector behind the same ones, whatever it is sent for and however often."""
        self._owner = owner
        try:
            yield
        finally:
            self._owner = None

    def clip(self, hidden_states: Tensor) -> Tensor:
        """Do to states what is done without drawing anything: (..., D) -> (..., D)."""
        return clipped(hidden_states, self.config.clip_norm).to(hidden_states.dtype)

    def states(self, hidden_states: Tensor, lengths: Tensor | None = None, *, public: bool = False) -> Tensor:
        """Guard states before the first cut: (B, T, D) -> (B, T, D). A public pass is clipped alone."""
        config = self.config
        if config.noise in ("none", "learned") or public:
            return self.clip(hidden_states) if config.clip_norm is not None else hidden_states
        real = _real(hidden_states, lengths)
        kept = clipped(hidden_states, config.clip_norm)
        drawn = np.concatenate(
            [self._drawn(coins, rows, kept.shape[-1]) for coins, rows in self._coins("states", kept[real])]
        )
        noise = torch.zeros(hidden_states.shape, dtype=torch.float64)
        noise[real.cpu()] = torch.from_numpy(drawn)
        return (kept.double() + noise.to(kept.device)).to(hidden_states.dtype)

    @torch.no_grad()
    def normal(self, mean: Tensor, lengths: Tensor | None = None, *, public: bool = False) -> Tensor:
        """Draw noise for codes where it is learned, else none: (B, T, r) -> (B, T, r)."""
        noise = torch.zeros(mean.shape, dtype=torch.float64)
        if self.config.noise == "learned" and not public:
            real = _real(mean, lengths)
            coins = self._coins("codes", mean[real])
            drawn = np.concatenate([own.gaussian((rows, mean.shape[-1])) for own, rows in coins])
            noise[real.cpu()] = torch.from_numpy(drawn)
        return noise.to(mean.device, mean.dtype)

    @torch.no_grad()
    def gradient(self, gradient: Tensor, lengths: Tensor, scale: float) -> Tensor:
        """Guard a gradient before the second cut: (B, T, D) -> (B, T, D)."""
        config = self.config
        if config.gradient_clip_norm is None or scale == 0:
            return gradient
        real = _real(gradient, lengths)
        kept = clipped(gradient.float() / scale, config.gradient_clip_norm).double()
        if config.gradient_noise_multiplier is not None:
            coins = self._coins("gradient", kept[real])
            drawn = np.concatenate([own.gaussian((rows, gradient.shape[-1])) for own, rows in coins])
            drawn *= config.gradient_noise_multiplier * config.gradient_clip_norm
            kept[real] += torch.from_numpy(drawn).to(kept.device)
        return (kept * scale).to(gradient.dtype)

    def _drawn(self, coins: SecretCoins, rows: int, width: int) -> NDArray[np.float64]:
        """Draw the noise of some states: (rows, width)."""
        config = self.config
        if config.noise == "gaussian":
            return coins.gaussian((rows, width)) * ((config.noise_multiplier or 0.0) * (config.clip_norm or 0.0))
        return coins.exponential(rows, width, config.eta or math.inf)

    def _coins(self, kind: str, vectors: Tensor) -> Iterator[tuple[SecretCoins, int]]:
        """Make coins of the secret, the pass, and what they are to hide, each for so many of the vectors (M, D).

        Of a pass there is one for all vectors; where noise repeats there is one for each, of it and those before it.
        """
        told = vectors.detach().cpu().contiguous().numpy()
        if self._owner is None:
            which = [self._context, self._occasion, str(self._passes[kind])]
            self._passes[kind] += 1
            yield self._made(kind, which, told.shape, hashlib.sha256(told.tobytes()).digest()), len(told)
            return
        content = hashlib.sha256()
        for place, vector in enumerate(told):
            content.update(vector.tobytes())
            shape = (place + 1, *told.shape[1:])
            yield self._made(kind, ["again", str(self._owner)], shape, content.copy().digest()), 1

    def _made(self, kind: str, which: Sequence[str], shape: tuple[int, ...], content: bytes) -> SecretCoins:
        what = "\x1f".join([kind, *which, str(tuple(shape)), ""])
        return SecretCoins(derived(self._secret, "states", what, content))


def _real(states: Tensor, lengths: Tensor | None) -> Tensor:
    """Say which rows cross: (B, T)."""
    if lengths is None:
        return torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)
    return (torch.arange(states.shape[1])[None, :] < lengths[:, None].cpu()).to(states.device)


def gaussian_epsilon(vectors: int, noise_multiplier: float, delta: float) -> float:
    r"""Compute ε at δ of a number of vectors, each clipped to length C, with normal noise of σ C in each dimension.

    Neighbours are any two inputs at all, so each vector may move by 2 C, and all n of them together by 2 C √n: what is
    released is one Gaussian mechanism of noise multiplier σ / (2 √n). Vectors that follow from earlier ones' noise add
    up in the same way. Where ε is so large that no accountant's grid holds it, a simpler upper bound stands for it.

    Args:
        vectors: n.
        noise_multiplier: σ.
        delta: δ.

    Cites:
        dong2022gdp
        bun2016zcdp

    Example:
        >>> 4.3 < gaussian_epsilon(1, 2.0, 1e-5) < 4.4
        True
    """
    if vectors == 0:
        return 0.0
    together = noise_multiplier / (2 * math.sqrt(vectors))
    if together < _LITTLE:
        spent = 0.5 / together**2  # as zero-concentrated differential privacy
        return spent + 2 * math.sqrt(spent * math.log(1 / delta))
    return epsilon_of([(1, 1.0, together)], delta)


def told_of_states(
    config: StatePrivacyConfig, counts: Mapping[str, int], gradient_counts: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Say what is promised of some numbers of one user's vectors.

    Args:
        config: What is done.
        counts: How many vectors cross, by what is told of, such as ``{"state": 1, "pass": 51}``.
        gradient_counts: How many gradients do, where that is another number.

    Returns:
        What is done, and ``epsilon`` at the first cut and at the second of each number, ``None`` where nothing is
        promised. With metric noise ε is at δ = 0, and `eta` times the distance is promised of any two states.
    """
    gradient_counts = gradient_counts or counts
    first: dict[str, float | None] = dict.fromkeys(counts)
    second: dict[str, float | None] = dict.fromkeys(counts)
    for name, count in counts.items():
        if config.noise == "gaussian" and config.noise_multiplier is not None:
            first[name] = gaussian_epsilon(count, config.noise_multiplier, config.delta)
        if config.noise == "metric" and config.eta is not None and config.clip_norm is not None:
            first[name] = 2 * config.clip_norm * config.eta * count
        if config.gradient_noise_multiplier is not None:
            second[name] = gaussian_epsilon(gradient_counts[name], config.gradient_noise_multiplier, config.delta)
    epsilon = {"states": first, "gradients": second}
    return {
        **config.model_dump(mode="json"),
        "vectors": dict(counts),
        "epsilon": epsilon,
        "summary": _summary(config, {"states": counts, "gradients": gradient_counts}, epsilon),
        "note": (
            "ε is of what one user's own states and gradients tell, whatever they are, to whoever knows the adapters. "
            "It does not cover lengths, times and the number of steps, nor the factor by which training.clip_norm "
            "scales each step, which follows from the gradients and is sent to the server, nor what adapters tell."
        ),
    }


def _summary(
    config: StatePrivacyConfig, counts: Mapping[str, Mapping[str, int]], epsilon: Mapping[str, Mapping[str, Any]]
) -> str:
    """Write down what is done, and what is promised of one state, of a pass and of a run, at each cut."""
    parts = []
    for cut, what in (("states", "first cut"), ("gradients", "second cut")):
        delta = 0 if cut == "states" and config.noise == "metric" else config.delta
        values = {name: value for name, value in epsilon[cut].items() if value is not None}
        if values:
            told = ((value, _counted(name, counts[cut][name])) for name, value in values.items())
            figures = ", ".join(f"{value:.4g} for {many}" for value, many in told)
            parts.append(f"{what}: ε at most {figures}, at δ = {delta:g}")
        elif cut == "states" and config.noise == "metric":
            parts.append(f"{what}: ε = {config.eta:g} times the distance of two states, bounded by no clip_norm")
        else:
            parts.append(f"{what}: no ε")
    return "; ".join([described(config), *parts])


def _counted(name: str, count: int) -> str:
    return "a state" if name == "state" else f"a {name} of {count} states"


def described(config: StatePrivacyConfig) -> str:
    """Say in a few words what is done.

    Example:
        >>> described(StatePrivacyConfig(clip_norm=3, noise="gaussian", noise_multiplier=0.5))
        'states clipped to 3, normal noise 0.5 x clip'
    """
    parts = [] if config.clip_norm is None else [f"states clipped to {config.clip_norm:g}"]
    if config.noise == "gaussian":
        parts.append(f"normal noise {config.noise_multiplier:g} x clip")
    if config.noise == "metric":
        parts.append(f"metric noise η {config.eta:g}")
    if config.noise == "learned":
        parts.append(f"codes of {config.code_width} numbers with learned noise, rate weight {config.rate_weight:g}")
    if config.settle_rounds is not None:
        parts.append(f"the same for the same history after round {config.settle_rounds}")
    if config.gradient_clip_norm is not None:
        parts.append(f"gradients clipped to {config.gradient_clip_norm:g}")
    if config.gradient_noise_multiplier is not None:
        parts.append(f"with normal noise {config.gradient_noise_multiplier:g} x clip")
    return ", ".join(parts)
