"""What a run's training cost in operations: worked out from the batches that it trained on, and not measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pplr.config import Config
from pplr.recommend.training import epoch_batches
from pplr.stages.flops import Flops, FlopsOfCut

if TYPE_CHECKING:
    from pplr.runtimes.assembly import Assembly

__all__ = ["is_worked_out", "training_flops"]


def is_worked_out(config: Config) -> bool:
    """Tell whether the operations of a run follow from its configuration and data alone.

    Private training draws its users secretly, and a learned code, or an input stage that settles, takes other passes
    than those counted here.
    """
    states = config.privacy.states
    return not (config.privacy.dp.is_on or states.noise == "learned" or states.settle_rounds is not None)


def training_flops(assembly: Assembly, client: str, rounds: Sequence[int]) -> Flops | None:
    """Count the operations of one client's training.

    The batches of each epoch are made again, as its seed says; where every epoch has the same samples, those of the
    first stand for all.
    What a backbone reads anew before each epoch, such as an encoder its items, counts as well.

    Args:
        assembly: The parts of the run, with this client's data.
        client: Its name.
        rounds: Server rounds in which it trained, from 0.

    Returns:
        Operations of either side, both of the exchanged and of the personal adapter; ``None`` where they are not
        worked out.
    """
    config, backbone, method = assembly.config, assembly.backbone, assembly.method
    if not is_worked_out(config):
        return None
    objectives = [method.objective(), *([method.personal_objective()] if method.personal else [])]
    plan, encoded = assembly.model_of(client).plan, assembly.encode(assembly.samples(client))
    is_drawn = backbone.draw(encoded, 0) is not encoded
    total = Flops()
    for number, objective in enumerate(objectives):
        counter = FlopsOfCut(backbone, plan, config.adapter, train_a=objective.train_a)
        name = client if number == 0 else f"{client} personal"
        reading = _sum(counter.reading(batch) for batch in backbone.constant_batches())
        same: Flops | None = None
        for server_round in rounds:
            for epoch in range(config.training.local_epochs):
                if same is None or is_drawn:
                    told = (config.training, name, server_round, epoch, config.run.seed)
                    batches = (part for parts in epoch_batches(backbone, encoded, *told) for part in parts)
                    same = _sum(counter.training(batch) for batch in batches)
                if same is None or reading is None:
                    return None
                total += same if backbone.keeps_constants(server_round) else same + reading
    return total


def _sum(counts: Iterable[Flops | None]) -> Flops | None:
    """Add up; ``None`` where one of them is unknown."""
    total = Flops()
    for own in counts:
        if own is None:
            return None
        total += own
    return total
