from collections.abc import Callable

import numpy as np

from pplr.config import HoldoutConfig, PartitionConfig
from pplr.data.describe import describe
from pplr.data.holdout import make_holdout
from pplr.data.interactions import Catalog, Dataset, Interactions
from pplr.data.partition import make_partition

Make = Callable[..., Dataset]


def test_every_number() -> None:
    dataset = Dataset(
        name="tiny",
        user_ids=("a", "b"),
        catalog=Catalog(("1", "2", "3", "4"), ("Sabrina", "Sabrina", "3", "Heat")),
        interactions=Interactions(
            users=np.array([0, 0, 0, 0, 1, 1], dtype=np.int32),
            items=np.array([0, 1, 2, 0, 3, 2], dtype=np.int32),
            ratings=np.array([1, 2, 3, 4, 5, np.nan], dtype=np.float32),
            timestamps=np.array([0, 86400, 86400, 86401, 86401, 86401], dtype=np.float64),
        ),
        notes=("cleaned",),
    )
    found = describe(dataset)
    assert (found.users, found.items, found.interactions) == (2, 4, 6)
    assert found.density == 6 / 8
    assert found.lengths == (2, 3.0, 3.0, 4)
    assert found.ratings == (1.0, 3.0, 5.0)
    assert (found.duplicate_titles, found.items_sharing_a_title, found.empty_titles) == (1, 2, 1)
    assert (found.repeated, found.tied, found.users_tied_at_the_end) == (1, 4, 1)
    assert (found.train, found.clients) == (None, ())
    rows = dict(found.rows())
    assert rows["time"] == "1970-01-01 to 1970-01-02"
    assert rows["density"] == "75.0000%"
    assert rows["note"] == "cleaned"
    assert "train" not in rows


def test_clients_and_parts(make_dataset: Make) -> None:
    dataset = make_dataset([list(range(length)) for length in (5, 4, 2, 1, 6, 3)])
    holdout = make_holdout(dataset, HoldoutConfig())
    partition = make_partition(dataset, holdout, PartitionConfig(by="random", min_users=1), 2, 0)
    found = describe(dataset, holdout, partition)
    assert (found.train, found.validation, found.test) == (13, 4, 4)
    assert (found.tied, found.times) == (None, None)
    for client, users in zip(found.clients, partition.users, strict=True):
        own = [len(dataset.histories[user]) for user in users]
        train = [length if length < 3 else length - 2 for length in own]
        assert (client.users, client.interactions) == (len(own), sum(own))
        assert client.training_users == sum(length > 1 for length in train)
        assert client.training_samples == sum(max(0, length - 1) for length in train)
        assert client.test == client.validation == sum(length >= 3 for length in own)
    assert describe(dataset, partition=partition).clients[0].row()[4:] == ("-", "-", "-", "-")
