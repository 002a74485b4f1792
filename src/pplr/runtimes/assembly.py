"""From a configuration to the parts of a run: its model, and the clients that are admitted to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.backbones.base import Backbone, MatchingBackbone, load_backbone
from pplr.backbones.causal_lm import CausalLM
from pplr.config import Config
from pplr.data.prompts import Case, Sample
from pplr.errors import ConfigError, RunError, nearest
from pplr.federation.client import FederatedClient, Validate
from pplr.federation.methods import make_method
from pplr.federation.rounds import Federation
from pplr.privacy.coins import SecretCoins
from pplr.privacy.ledger import Ledger
from pplr.privacy.refusals import refuse_lies
from pplr.privacy.secret import client_secret, derived, secret_path
from pplr.privacy.states import StateGuard
from pplr.progress import Progress
from pplr.recommend.evaluation import Ranker, evaluate
from pplr.recommend.generative import GenerativeRanker, TitleSpace, read_texts
from pplr.recommend.matching import MatchingRanker
from pplr.recommend.metrics import ranking_metrics
from pplr.recommend.title_answers import TitleAnswers
from pplr.recommend.training import evaluation_loss
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.memory import keep_few_kernels
from pplr.runtimes.readers import Readers
from pplr.runtimes.run_data import load_run_data
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.storage import sha256_bytes

if TYPE_CHECKING:
    from pplr.runtimes.connections import Connections

__all__ = ["POOLED", "Assembly"]

POOLED = "pooled"
"""Name of the one trainer of a centralized run."""


class Assembly:
    """The parts of a run, with one frozen base for all clients.

    Args:
        config: The run's configuration.
        progress: Told of every step.
        backbone: A loaded backbone, to share one between runs; loaded by the configuration when absent.
        stage_server: Hosts the middle blocks; this process hosts them when absent.
        own: Name of the one client that all of the data belong to; shared out among clients when absent.
        secrets: Folder of the clients' secrets, where something is drawn that the server must not know.
    """

    def __init__(
        self,
        config: Config,
        progress: Progress,
        backbone: Backbone | None = None,
        stage_server: StageServerAt | None = None,
        own: str | None = None,
        secrets: Path | None = None,
    ) -> None:
        if config.training.shared_prefix:  # hardly two of its batches are of one shape
            keep_few_kernels()
        self._secrets = secrets
        self.config = config
        self.progress = progress
        self.method = make_method(config.federation)
        self._check_metric()
        refuse_lies(config, hosted_elsewhere=stage_server is not None)
        if config.runtime.threads is not None:
            torch.set_num_threads(config.runtime.threads)
        with progress.task("loading the data", 1, "sources") as advance:
            self.data = load_run_data(config, progress.note, own)
            advance(1)
        if own is None:  # the others' cuts are theirs
            self._check_cuts()
        with progress.task("loading the model", 1, "models") as advance:
            self.backbone = backbone or load_backbone(config.backbone, progress.note)
            advance(1)
        self.plan = CutPlan.make(config.cut, self.backbone.total_layers)
        self._connections = self._connect(stage_server)
        self._models: dict[CutPlan, CutModel] = {}
        self.readers = Readers(self)
        self.backbone.prepare(self.data.dataset.catalog, self._read_texts)
        self.backbone.leave_out(self.data.holdout.unseen)
        self.model = self._model(self.plan)
        self.initial: AdapterState = self.model.initial_adapter(config.run.seed)

    def _connect(self, stage_server: StageServerAt | None) -> Connections | None:
        if stage_server is None:
            return None
        if self.plan.is_whole:
            raise ConfigError(
                "a stage server for a model that is not cut", cure="Set cut, or leave out --stage-server and --kit."
            )
        from pplr.runtimes.connections import Connections  # what connects is an extra

        return Connections(stage_server.kit, stage_server.address)

    def _model(self, plan: CutPlan) -> CutModel:
        if plan not in self._models:
            connect = None
            if self._connections is not None:
                connect = self._connections.connector(self.backbone, self.config)
            self._models[plan] = CutModel(
                self.backbone, plan, self.config.adapter, self.config.training, connect=connect,
                in_flight=self.config.runtime.in_flight, states=self.config.privacy.states,
            )  # fmt: skip
        return self._models[plan]

    @property
    def is_remote(self) -> bool:
        """Whether a stage server hosts the middle blocks."""
        return self._connections is not None

    def model_of(self, client: str) -> CutModel:
        """Return the model as it is cut for a client."""
        cut = self.config.cut
        if cut is None or client not in cut.by_client:
            return self.model
        return self._model(CutPlan.make(cut.by_client[client], self.backbone.total_layers))

    def exchanged(self, state: AdapterState) -> AdapterState:
        """Leave out of an adapter what never leaves a client."""
        private = self.backbone.private
        return {name: tensor for name, tensor in state.items() if name not in private}

    def admit(self, client: str, adapter: AdapterState, purpose: str = "") -> ClientModel:
        """Admit a client, or a second model of it for some purpose, with an adapter to start from."""
        return self.model_of(client).client(f"{client} {purpose}".strip(), adapter, self._guard(client, purpose))

    def _guard(self, client: str, purpose: str) -> StateGuard | None:
        """Make what guards a client's states; recommendations are asked for again, so each has noise of its own."""
        states = self.config.privacy.states
        if not states.is_on:
            return None
        secret = self._secret(client) if states.is_noisy else b""
        nonce = os.urandom(16).hex() if purpose == "recommend" else ""
        return StateGuard(states, secret, "\x1f".join([client, purpose, nonce]))

    @property
    def _draws_secretly(self) -> bool:
        vectors = self.config.backbone.item_vectors
        return self.config.privacy.states.is_noisy or (
            self.config.backbone.name == "item_vectors" and vectors.secret_projection
        )

    def start_of(self, client: str) -> AdapterState:
        """Say what a client starts from: the one initial adapter, and what only it knows of its own."""
        config = self.config.backbone
        if config.name != "item_vectors" or not config.item_vectors.secret_projection:
            return self.initial
        coins = SecretCoins(derived(self._secret(client), "projection", client))
        return self.initial | self.model.secret_start(lambda shape: torch.from_numpy(coins.gaussian(shape)).float())

    def _secret(self, client: str) -> bytes:
        if self._secrets is None:
            raise ConfigError("something to draw without a secret", cure="Say in which folder the clients keep theirs.")
        return client_secret(self._secrets, client)

    def check_secrets(self) -> None:
        """Refuse to go on with a run whose clients have lost the secrets that it began with.

        Raises:
            RunError: One is missing.
        """
        for name in self.trainers if self._draws_secretly else ():
            if self._secrets is not None and not (path := secret_path(self._secrets, name)).exists():
                raise RunError(
                    f"{path} is missing, and the run has used it", cure="Put it back, or train anew in another folder."
                )

    def dismiss(self, client: str, purpose: str = "") -> None:
        """Let go of what the server's side keeps for what was admitted."""
        self.model_of(client).dismiss(f"{client} {purpose}".strip())

    def dismiss_all(self) -> None:
        """Let go of what the server's side keeps for everyone that was admitted."""
        for model in self._models.values():
            model.close()
        self.readers.forget()

    def close(self) -> None:
        """Let go of everything on the server's side, and of the connections to it."""
        self.dismiss_all()
        if self._connections is not None:
            self._connections.close()

    def _check_metric(self) -> None:
        metric = self.config.evaluation.validation_metric
        known = ["loss", *ranking_metrics([1], self.config.evaluation.cutoffs)]
        if metric not in known:
            raise ConfigError(f"evaluation.validation_metric: {metric!r} is not measured", cure=nearest(metric, known))

    def _check_cuts(self) -> None:
        known = self.data.partition.names
        for name in self.config.cut.by_client if self.config.cut is not None else ():
            if name not in known:
                raise ConfigError(f"cut.by_client names {name!r}, which is no client", cure=nearest(name, known))

    @cached_property
    def space(self) -> TitleSpace:
        """The catalog's titles, embedded by the base model through a client of no data."""
        catalog = self.data.dataset.catalog
        reader = self.model.client("title embeddings", self.initial)
        try:
            with self.progress.task("embedding titles", len(catalog.by_title), "titles") as advance:
                return TitleSpace.build(reader, catalog, advance)
        finally:
            self.model.dismiss("title embeddings")

    @cached_property
    def _answers(self) -> TitleAnswers | None:
        """The catalog's titles as the backbone writes them."""
        return TitleAnswers(self.backbone, self.data.dataset.catalog) if isinstance(self.backbone, CausalLM) else None

    def _read_texts(self, texts: Sequence[str]) -> Tensor:
        """Read texts by the base model, through a client of no data."""
        text = self.backbone.text
        connect = None if self._connections is None else self._connections.connector(text, self.config)
        model = CutModel(text, self.plan, self.config.adapter, self.config.training, connect=connect)
        reader = model.client("item texts", model.initial_adapter(0))
        try:
            with self.progress.task("reading items", len(set(texts)), "texts") as advance:
                return read_texts(reader, texts, advance, pooling=self.config.backbone.item_vectors.pooling)
        finally:
            model.close()

    def ranker(self, model: ClientModel) -> Ranker:
        """Make the ranker of one client's model."""
        if isinstance(self.backbone, MatchingBackbone):
            return MatchingRanker(model, history_items=self.config.data.history_items)
        most = self.config.data.history_items
        return GenerativeRanker(model, self.space, self.config.evaluation, history_items=most, answers=self._answers)

    @property
    def trainers(self) -> tuple[str, ...]:
        """Names of those who train: all clients, or the one that stands for them."""
        return (POOLED,) if self.method.pooled else tuple(self.data.partition.names)

    def federation(self, ledgers: Path | None = None) -> Federation:
        """Admit every client with the one initial adapter, its encoded samples and its validation.

        Args:
            ledgers: Folder of the clients' ledgers, where training is private.
        """
        clients = [self.federated_client(name, ledgers) for name in self.trainers]
        return Federation(clients, self.method, self.initial)

    def federated_client(self, name: str, ledgers: Path | None = None) -> FederatedClient:
        """Admit one client with the initial adapter, its encoded samples and its validation.

        Args:
            name: The client.
            ledgers: Folder of its ledger, where training is private.

        Raises:
            ConfigError: Training is private, and there is no folder for the ledger.
            RunError: The ledger cannot be read.
        """
        samples, private, books = self.samples(name), self.config.privacy.dp, None
        if private.is_on:
            if ledgers is None:
                raise ConfigError("private training without a ledger", cure="Say in which folder the client keeps it.")
            books = Ledger(ledgers, name, private, sha256_bytes(repr(list(samples)).encode()))
        start = self.start_of(name)
        personal = self.admit(name, start, "personal") if self.method.personal else None
        model, validation = self.admit(name, start), self._validation(name)
        owners = [sample.user for sample in samples]
        return FederatedClient(name, self.encode(samples), model, validation, personal, owners, books)

    def serving(self, federation: Federation) -> dict[str, FederatedClient]:
        """Say which trainer serves each client of the partition."""
        trainers = {client.name: client for client in federation.clients}
        return {name: trainers[POOLED if self.method.pooled else name] for name in self.data.partition.names}

    def samples(self, name: str) -> Sequence[Sample]:
        """Return the training samples of one who trains, those divided that are too long to be encoded whole."""
        drawn = [own for client, every in self.data.samples.items() if name in (POOLED, client) for own in every]
        return self.backbone.divide(drawn, self.data.dataset.catalog)

    def validation_cases(self, name: str) -> Sequence[Case]:
        """Return the validation cases of one who trains."""
        if name == POOLED:
            return [case for own in self.data.validation.values() for case in own]
        return self.data.validation[name]

    def validation_samples(self, name: str) -> list[Sample]:
        """Make a sample of each target of the validation cases of one who trains, for measuring the loss."""
        return [Sample(c.user, c.history, target) for c in self.validation_cases(name) for target in c.targets]

    def encode(self, samples: Sequence[Sample]) -> list[Any]:
        """Encode samples as training does."""
        return self.backbone.encode(samples, self.data.dataset.catalog, self.config.data.history_items)

    def _validation(self, name: str) -> Validate:
        """Make the function that measures a client: the loss on its validation targets, or rankings."""
        cases = self.validation_cases(name)
        if self.config.evaluation.validation_metric == "loss":
            encoded = self.encode(self.validation_samples(name))
            size = self.config.evaluation.batch_size
            return lambda model: {"loss": evaluation_loss(model, encoded, size)}

        def rank(model: ClientModel) -> Mapping[str, float | None]:
            settings = self.config.evaluation
            found = evaluate(self.ranker(model), {name: cases}, settings.cutoffs, settings.batch_size)
            return found.overall()

        return rank
