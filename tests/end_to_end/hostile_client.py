"""A client of a federation that trains as it is told and reports something else: NaN first, then a huge update.

python hostile_client.py client --kit KIT --data DATA --server HOST:PORT --folder DIR
"""

from __future__ import annotations

from typing import Any

import torch

from pplr.apps import cli
from pplr.runtimes import flower_node
from pplr.runtimes.parcels import TRAIN, Parcel


class Hostile(flower_node.OwnClient):
    """Spoils what it reports of its training."""

    def __call__(self, context: Any, order: bytes) -> bytes:
        report = super().__call__(context, order)
        asked, told = (Parcel.unpack(data, whose="somebody") for data in (order, report))
        if asked.kind != TRAIN:
            return report
        spoilt = {name: own.clone() for name, own in told.tensors.items()}
        if asked.told["server_round"] == 0:
            next(iter(spoilt.values())).view(-1)[0] = torch.nan
        else:
            before = asked.tensors
            spoilt = {name: before[name] + 1000 * (own - before[name]) for name, own in spoilt.items()}
        return Parcel(told.kind, told.told, spoilt).pack()


if __name__ == "__main__":
    flower_node.OwnClient = Hostile  # type: ignore[misc]
    cli.main()
