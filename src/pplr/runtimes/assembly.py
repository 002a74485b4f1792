"""From a configuration to the parts of a run: data, clients, model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.backbones.base import Backbone, MatchingBackbone, backbone_kind, load_backbone
from pplr.backbones.causal_lm import CausalLM
from pplr.config import Config
from pplr.data.holdout import Holdout, make_holdout
from pplr.data.interactions import Dataset
from pplr.data.partition import Partition, make_partition, own_partition
from pplr.data.prompts import (
    Case,
    Sample,
    draw_cases,
    draw_samples,
    evaluation_cases,
    training_histories,
    training_samples,
    training_users,
)
from pplr.data.sources import load_dataset
from pplr.errors import ConfigError, PartitionError, RunError, nearest
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
from pplr.seeds import derive_seed
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.storage import sha256_bytes

if TYPE_CHECKING:
    from pplr.runtimes.connections import Connections

__all__ = ["POOLED", "Assembly", "RunData", "load_run_data"]

POOLED = "pooled"
"""Name of the one trainer of a centralized run."""


@dataclass(frozen=True)
class RunData:
    """The data of a run, held out and shared among clients.

    Args:
        dataset: Cleaned interactions and catalog.
        holdout: Train, validation and test.
        partition: Users of each client.
        samples: Training samples of each client, by name.
        validation: Validation cases of each client, by name.
        test: Test cases of each client, by name.
        left_out: Users that have no test case.
    """

    dataset: Dataset
    holdout: Holdout
    partition: Partition
    samples: Mapping[str, Sequence[Sample]]
    validation: Mapping[str, Sequence[Case]]
    test: Mapping[str, Sequence[Case]]
    left_out: int

    def users(self, client: str) -> list[str]:
        """Name a client's users, by the data's ids.

        Raises:
            PartitionError: There is no such client.
        """
        if client not in self.partition.names:
            raise PartitionError(f"there is no client {client!r}", cure=nearest(client, self.partition.names))
        own = self.partition.users[self.partition.names.index(client)]
        return [self.dataset.user_ids[user] for user in sorted(own.tolist())]

    def titles(self, user: str) -> list[str]:
        """Return the titles of everything a user did, oldest first.

        Raises:
            UnknownItemError: There is no such user; the nearest is named.
        """
        catalog = self.dataset.catalog
        return [catalog.titles[item] for item in self.dataset.histories[self.dataset.user(user)]]

    def client_of(self, user: int) -> str:
        """Name the client that holds a user."""
        for name, users in zip(self.partition.names, self.partition.users, strict=True):
            if user in users:
                return name
        raise PartitionError(f"user {user} belongs to no client", cure="Use a partition that covers all users.")


def load_run_data(config: Config, notify: Callable[[str], None] = lambda _: None, own: str | None = None) -> RunData:
    """Load, clean, hold out, share out and draw: everything about the data that a configuration says.

    Args:
        config: The run's configuration.
        notify: Told what is fetched.
        own: Name of the one client that all of the data belong to; shared out among clients when absent.

    Raises:
        DataError: The data cannot be used as it is.
        PartitionError: A client would have no training samples.
    """
    dataset = load_dataset(config.data, notify=notify)
    holdout = make_holdout(dataset, config.data.holdout, config.run.seed)
    seed, items = config.run.seed, config.data.history_items
    if own is None:
        partition = make_partition(dataset, holdout, config.data.partition, config.federation.clients, seed)
    else:
        partition = own_partition(dataset, holdout, own, config.data.partition.min_users)
    samples_of = backbone_kind(config.backbone.name).samples_of(config.backbone)
    make: Callable[[list[int]], list[Sample]] = {
        "target": lambda users: training_samples(holdout, users, items),
        "history": lambda users: training_histories(holdout, users, items),
        "user": lambda users: training_users(holdout, users),
    }[samples_of]
    every = [make(users.tolist()) for users in partition.users]
    samples = draw_samples(every, config.training.samples, seed)
    for name, drawn in zip(partition.names, samples, strict=True):
        if not drawn:
            raise PartitionError(
                f"client {name} ({partition.labels[int(partition.names.index(name))]}) has no training samples",
                cure="Lower federation.clients, or raise training.samples or data.partition.min_users.",
            )
    validation = [evaluation_cases(holdout, users.tolist(), "validation", items)[0] for users in partition.users]
    if config.evaluation.validation_users is not None:
        most = config.evaluation.validation_users
        validation = [
            draw_cases([own], most, derive_seed(seed, "validation", name))[0]
            for name, own in zip(partition.names, validation, strict=True)
        ]
    tests = [evaluation_cases(holdout, users.tolist(), "test", items) for users in partition.users]
    test = draw_cases([cases for cases, _ in tests], config.evaluation.test_users, derive_seed(seed, "test"))
    names = partition.names
    return RunData(
        dataset=dataset,
        holdout=holdout,
        partition=partition,
        samples=dict(zip(names, samples, strict=True)),
        validation=dict(zip(names, validation, strict=True)),
        test=dict(zip(names, test, strict=True)),
        left_out=sum(count for _, count in tests),
    )


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
                return read_texts(reader, texts, advance)
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
