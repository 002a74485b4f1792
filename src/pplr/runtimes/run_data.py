"""From a configuration to the data of a run, held out and shared among clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pplr.backbones.base import backbone_kind
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
from pplr.errors import PartitionError, nearest
from pplr.seeds import derive_seed

__all__ = ["RunData", "load_run_data"]


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
