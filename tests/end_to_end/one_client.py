"""One client of a federation as a process of its own: its bundle, its kit, its samples, and a folder to meet in.

Each round it trains, leaves the tensors of its own layers in the folder, and waits for the mixed ones; what belongs to
the middle blocks never passes through here. In the end it recommends for its first test case.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from safetensors.torch import load_file, save

from pplr.config_files import load_config
from pplr.progress import Silent
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.assembly import Assembly
from pplr.storage import write_atomic, write_json


def main(config_path: str, name: str, kit: str, address: str, place: str) -> None:
    config, folder = load_config(config_path), Path(place)
    assembly = Assembly(config, Silent(), stage_server=StageServerAt(Path(kit), address))
    held = sorted(block for block in range(assembly.plan.total_layers) if _is_held(assembly, block))
    client = assembly.federated_client(name)
    assert client.model.transport is not None
    middle = client.model.transport.adapter().keys()
    for server_round in range(config.federation.rounds):
        result = client.train(server_round, config, assembly.method, lambda _: None)
        own = {key: tensor.contiguous() for key, tensor in client.model.adapter().items() if key not in middle}
        write_atomic(folder / f"{name}-{server_round}-local.safetensors", save(own))
        write_json(folder / f"{name}-{server_round}.json", {"loss": result.loss, "samples": len(client.encoded)})
        mixed = folder / f"{name}-{server_round}-mixed.safetensors"
        while not mixed.exists():
            time.sleep(0.02)
        client.set_adapter(load_file(mixed))
    scores = assembly.ranker(client.model).scores(assembly.data.test[name][:1])[0]
    write_json(folder / f"{name}.json", {"scores": scores.tolist(), "blocks": held, "middle": sorted(middle)})
    assembly.close()


def _is_held(assembly: Assembly, block: int) -> bool:
    layer = assembly.backbone.model.model.layers[block]
    return not any(tensor.is_meta for tensor in layer.state_dict().values())


if __name__ == "__main__":
    main(*sys.argv[1:])
