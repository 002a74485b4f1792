"""SASRec of RecTools, in an environment of its own: it reads histories and writes scores, and knows nothing of pplr.

    python rectools_sasrec.py HISTORIES.json SCORES.npz

HISTORIES.json: ``items`` N, ``train`` U histories, ``validation`` U targets or null (not looked at),
``test_histories`` by user, ``settings`` (keyword arguments of SASRecModel), ``seeds``, ``check_every`` epochs,
``patience`` checks, ``most_epochs``, ``device``, ``parallel`` trainings at once, ``threads`` of each, ``keep``, a
folder where each training is kept after every check, so that the same command goes on where it stopped, or null.
Settings and number of epochs are those of the best validation NDCG@10 with the first seed; the other seeds train with
the same settings and stop by the same rule. With ``seconds`` the first settings and seed are fitted once for so long,
validation unseen.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from pytorch_lightning import Callback, Trainer, seed_everything  # noqa: E402
from rectools import Columns  # noqa: E402
from rectools.dataset import Dataset  # noqa: E402
from rectools.models import SASRecModel  # noqa: E402

_USERS_AT_ONCE = 250  # RecTools returns a row for each user and item


def dataset(histories: dict[int, list[int]]) -> Dataset:
    """Make RecTools' dataset of histories, oldest first."""
    rows = [(user, item, 1.0, place) for user, own in histories.items() for place, item in enumerate(own)]
    frame = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime])
    frame[Columns.Datetime] = pd.to_datetime(frame[Columns.Datetime], unit="s")
    return Dataset.construct(frame)


def scores(model: SASRecModel, histories: dict[int, list[int]], items: int) -> np.ndarray:
    """Score every item after every history: (len(histories), items); items it never trained on come last."""
    out = np.full((len(histories), items), -1e9, dtype=np.float32)
    users = list(histories)
    for start in range(0, len(users), _USERS_AT_ONCE):
        chosen = {user: histories[user] for user in users[start : start + _USERS_AT_ONCE]}
        told = model.recommend(
            list(chosen), dataset(chosen), k=items, filter_viewed=False, on_unsupported_targets="ignore"
        )
        rows = {user: start + row for row, user in enumerate(chosen)}
        out[told[Columns.User].map(rows), told[Columns.Item]] = told[Columns.Score]
    return out


def ndcg(model: SASRecModel, histories: dict[int, list[int]], targets: dict[int, int]) -> float:
    """NDCG@10 of one target each, among all items that the history does not hold."""
    told = model.recommend(
        list(histories), dataset(histories), k=10, filter_viewed=True, on_unsupported_targets="ignore"
    )
    found = told[told[Columns.Item] == told[Columns.User].map(targets)]
    return float(sum(1 / math.log2(rank + 1) for rank in found[Columns.Rank]) / len(histories))


class Until(Callback):
    """Counts the targets of a fit, and ends it with the first batch after some seconds.

    Args:
        seconds: From the first batch on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.taken, self.targets, self.batches, self._started = seconds, 0.0, 0, 0, 0.0

    def on_train_start(self, trainer: Trainer, module: object) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, module: object, outputs: object, batch: dict, place: int) -> None:
        """Count a batch, and look at the clock."""
        self.targets += int((batch["y"] != 0).sum())
        self.batches += 1
        self.taken = time.monotonic() - self._started
        if self.taken >= self.seconds:
            trainer.should_stop = True


def trainer(device: str, epochs: int = 1, until: Until | None = None) -> Trainer:
    """Make a quiet trainer; how many more epochs it trains than those that lie behind it is said later."""
    return Trainer(
        callbacks=[] if until is None else [until],
        max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False, logger=False,
        enable_checkpointing=False, accelerator="cpu" if device == "cpu" else "gpu", devices=1,
    )  # fmt: skip


def weights(model: SASRecModel) -> dict:
    """Copy what a model has learned."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.torch_model.state_dict().items()}


def without_scores(best: dict) -> dict:
    """Leave out the one part that is no summary."""
    return {key: value for key, value in best.items() if key != "scores"}


class Kept:
    """A training as it was after its last check, in one file.

    Going on from it draws other random numbers than going on at once.

    Args:
        told: The task; its ``keep`` is the folder, or null.
        settings: Of the model.
        seed: Of the training.
    """

    def __init__(self, told: dict, settings: dict, seed: int) -> None:
        shown = {key: told[key] for key in ("items", "train", "validation", "check_every")}
        name = hashlib.sha256(json.dumps([shown, settings, seed]).encode()).hexdigest()[:16]
        self._path = Path(told["keep"]) / f"{name}.ckpt" if told["keep"] else None
        self._device = told["device"]
        self._described: dict = {}

    def load(self) -> tuple[SASRecModel, dict] | None:
        """Read the model and what is known of its training, when there is one."""
        if self._path is None or not self._path.exists():
            return None
        kept = torch.load(self._path, weights_only=False)
        training, self._described = kept["training"], kept["hyper_parameters"]
        change = {"get_trainer_func": lambda: trainer(self._device, training["epochs"])}
        return SASRecModel.load_from_checkpoint(self._path, model_params_update=change), training

    def save(self, model: SASRecModel, training: dict) -> None:
        """Put both in the place of the last ones."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        model.fit_trainer.save_checkpoint(new)
        kept = torch.load(new, weights_only=False)
        self._described = self._described or kept["hyper_parameters"]  # a restored model leaves its settings out
        torch.save({**kept, "hyper_parameters": self._described, "training": training}, new)
        new.replace(self._path)


def fit(told: dict, settings: dict, seed: int, test: dict[int, list[int]]) -> dict:
    """Train until validation no longer improves; keep the test scores of the best check."""
    seed_everything(seed, verbose=False)
    torch.set_num_threads(told["threads"])
    train = {user: own for user, own in enumerate(told["train"]) if own}
    targets = {user: target for user, target in enumerate(told["validation"]) if target is not None and train.get(user)}
    histories = {user: train[user] for user in targets}
    device = told["device"]
    model = SASRecModel(**settings, get_trainer_func=lambda: trainer(device), recommend_torch_device=device)
    data, best, epochs, started = dataset(train), {"ndcg": -1.0}, 0, time.monotonic()
    keeper, learned = Kept(told, settings, seed), None
    if (before := keeper.load()) is not None:
        model, now = before
        best, learned, epochs = now["best"], now["learned"], now["epochs"]
        started -= now["seconds"]
        seed_everything(seed + epochs, verbose=False)
    while epochs < told["most_epochs"] and epochs - best.get("epochs", epochs) < told["patience"] * told["check_every"]:
        model.fit_partial(data, min_epochs=told["check_every"], max_epochs=told["check_every"])
        epochs += told["check_every"]
        reached = ndcg(model, histories, targets)
        print(json.dumps({"settings": settings, "epochs": epochs, "ndcg": reached}), flush=True)
        if reached > best["ndcg"]:
            best, learned = {"ndcg": reached, "epochs": epochs}, weights(model)
        now = {"best": best, "learned": learned, "epochs": epochs, "seconds": time.monotonic() - started}
        keeper.save(model, now)
    best["seconds"] = time.monotonic() - started
    print(json.dumps({"settings": settings, "seed": seed, **best}), flush=True)
    model.torch_model.load_state_dict(learned)
    return {**best, "scores": scores(model, test, told["items"])}


def fit_for(told: dict, test: dict[int, list[int]]) -> dict:
    """Fit once for some seconds, after a fit of another model to warm up; keep the test scores."""
    seed_everything(told["seeds"][0], verbose=False)
    torch.set_num_threads(told["threads"])
    data = dataset({user: own for user, own in enumerate(told["train"]) if own})
    made = {"get_trainer_func": lambda: trainer("cpu"), "recommend_torch_device": "cpu", **told["settings"][0]}
    SASRecModel(**made).fit(data)
    made["get_trainer_func"] = lambda: trainer("cpu", 1_000_000, Until(told["seconds"]))
    model = SASRecModel(**made)
    model.fit(data)
    until = next(own for own in model.fit_trainer.callbacks if isinstance(own, Until))
    return {
        "epochs": until.batches / model.fit_trainer.num_training_batches,
        "targets": until.targets,
        "seconds": until.taken,
        "scores": scores(model, test, told["items"]),
    }


def main(source: str, out: str) -> None:
    """Choose settings by the first seed, then train with every seed."""
    told = json.loads(Path(source).read_text(encoding="utf-8"))
    test = {int(user): own for user, own in told["test_histories"].items()}
    if "seconds" in told:
        own = fit_for(told, test)
        summary = json.dumps({"runs": [without_scores(own)]})
        np.savez(out, summary=summary, **{f"seed_{told['seeds'][0]}": own["scores"]})
        return
    with ProcessPoolExecutor(told["parallel"], mp_context=multiprocessing.get_context("spawn")) as pool:
        begun = [pool.submit(fit, told, settings, told["seeds"][0], test) for settings in told["settings"]]
        tried = [future.result() for future in begun]
        chosen = max(range(len(tried)), key=lambda number: tried[number]["ndcg"])
        begun = [pool.submit(fit, told, told["settings"][chosen], seed, test) for seed in told["seeds"][1:]]
        fitted = [tried[chosen], *(future.result() for future in begun)]
    summary = {
        "chosen": told["settings"][chosen],
        "tried": [{"settings": s, **without_scores(t)} for s, t in zip(told["settings"], tried, strict=True)],
        "runs": [without_scores(own) for own in fitted],
        **({} if told["device"] == "cpu" else {"device": torch.cuda.get_device_name()}),
    }
    np.savez(
        out,
        summary=json.dumps(summary),
        **{f"seed_{s}": own["scores"] for s, own in zip(told["seeds"], fitted, strict=True)},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
