"""Memory that fifty clients add in one process, against what their adapters and optimizer states take.

python -m benchmarks.clients
"""

from __future__ import annotations

import ctypes
import gc

import psutil

from benchmarks.measuring import backbone_of, quickstart, real_batch, use_all_cores, write_result
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel


def _resident() -> int:
    """Resident bytes of this process, after letting go of what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def main(clients: int = 50) -> None:
    """Measure and write ``clients.json``."""
    use_all_cores()
    config = quickstart()
    backbone = backbone_of(config)
    batch = backbone.collate(real_batch(config, backbone, 1))
    plan = CutPlan.make(config.cut, backbone.total_layers)
    model = CutModel(backbone, plan, config.adapter, config.training)
    initial = model.initial_adapter(0)

    def trained(name: str) -> ClientModel:
        client = model.client(name, initial)
        client.begin_round(10)
        (client.train_loss(batch, 1) / batch.targets).backward()
        client.optimizer_step(1.0)
        client.end_round()
        return client

    kept = [trained(f"warm {i}") for i in range(3)]
    before = _resident()
    for i in range(clients):
        kept.append(trained(str(i)))
        if (i + 1) % 10 == 0:
            print(f"{i + 1} clients: {(_resident() - before) / 1e6:.1f} MB more than before")
    added = _resident() - before
    adapter = sum(tensor.nbytes for tensor in initial.values())
    needed = 3 * adapter * clients  # the adapter and AdamW's two moments
    ratio = added / needed
    print(
        f"{clients} clients add {added / 1e6:.1f} MB; adapters and optimizer states take {needed / 1e6:.1f} MB: "
        f"{ratio:.3f}"
    )
    write_result(
        "clients",
        {
            "clients": clients,
            "added_bytes": added,
            "adapter_and_optimizer_bytes": needed,
            "rows": [
                {
                    "name": f"memory that {clients} clients add in one process",
                    "against": "their adapters and optimizer states (at most 1.1)",
                    "ratio": ratio,
                    "at_most": 1.1,
                    "met": ratio <= 1.1,
                }
            ],
        },
    )


if __name__ == "__main__":
    main()
