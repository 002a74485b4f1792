"""Trained defences for the first cut, attacked by who trained on their states; kept in ``results/privacy/NAME.json``.

One client holds all users and trains a model for each defence, with the same data, steps and seed. What is trained and
what is attacked already is not done again, so the command can be stopped and started.

    python -m benchmarks.state_defence configs/movielens_item_vectors.yaml --name state-defence
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.defence_tables import draw_defences
from benchmarks.measuring import machine
from benchmarks.moving_stage import attack_differences
from benchmarks.quality import finish
from pplr.backbones.adapters import load_adapter
from pplr.config import StatePrivacyConfig
from pplr.config_files import load_config
from pplr.errors import PplrError
from pplr.privacy.scoring import resampled
from pplr.runtimes.audit_settings import AuditSettings
from pplr.runtimes.auditing import audit_run
from pplr.runtimes.run import Run, open_run
from pplr.seeds import generator
from pplr.stages.model import CutModel
from pplr.stages.stage import StageCall
from pplr.storage import write_json

ROOT = Path(__file__).parent.parent
BASE = (
    "federation.method=centralized",
    "federation.rounds=2",
    "training.batch_size=16",
    "runtime.threads=1",
    "cut={input_layers: 1, output_layers: 0}",
)
DEFENCES: dict[str, tuple[str, ...]] = {
    "clean": (),
    "gaussian-0.02": ("clip_norm=36", "noise=gaussian", "noise_multiplier=0.02"),
    "gaussian-0.04": ("clip_norm=36", "noise=gaussian", "noise_multiplier=0.04"),
    "gaussian-0.08": ("clip_norm=36", "noise=gaussian", "noise_multiplier=0.08"),
    "gaussian-0.12": ("clip_norm=36", "noise=gaussian", "noise_multiplier=0.12"),
    "gaussian-0.16": ("clip_norm=36", "noise=gaussian", "noise_multiplier=0.16"),
    "learned-0.01": ("noise=learned", "code_width=32", "rate_weight=0.01"),
    "learned-0.03": ("noise=learned", "code_width=32", "rate_weight=0.03"),
    "learned-0.1": ("noise=learned", "code_width=32", "rate_weight=0.1"),
    "learned-0.03-settled": ("noise=learned", "code_width=32", "rate_weight=0.03", "settle_rounds=1"),
}
"""Settings of ``privacy.states`` that models are trained under: noise from half to four times as large as states that
are as long as the clip, and codes of more and more weight on their rate."""
AFTERWARDS = ("gaussian-0.04", "gaussian-0.08")
"""Those that are also put on the model that was trained without any."""
MOVING = "gaussian-0.08"
"""The one whose noise is taken twice, behind the input stages of two rounds."""
ATTACKS = ("posterior_matching", "inverter")
PASSES = (1, 12)


def settings_of(told: Sequence[str]) -> StatePrivacyConfig:
    """Read settings of ``privacy.states``."""
    overrides = ["backbone.name=item_vectors", *(f"privacy.states.{own}" for own in told)]
    return load_config(overrides=overrides).privacy.states


def worth_of(run: Run, metric: str) -> dict[str, float]:
    """Average a run's own measurement over its test users, with an interval over users."""
    told = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))["test"]
    return resampled(np.array(told["values"][metric]), generator(0, "worth"))


@torch.no_grad()
def rate_of(run: Run) -> float | None:
    """Bound what a state tells of what was before it, in bits, where codes are learned: a mean over training passes."""
    parts, states = run.assembly(), run.config.privacy.states
    model = CutModel(parts.backbone, parts.plan, run.config.adapter, run.config.training, states=states)
    if (bottleneck := model.input.bottleneck) is None:
        return None
    total = items = 0.0
    try:
        for name, samples in parts.data.samples.items():
            member = model.client(name, load_adapter(run.folder / "clients" / name)).input_member
            for encoded in parts.encode(samples):
                batch = parts.backbone.collate([encoded])
                entering = parts.backbone.embed(batch.input_ids, member.ends)
                hidden = model.input.run(member, entering, StageCall(lengths=batch.lengths))
                total += float(bottleneck.rate(bottleneck.mean(hidden, member.ends), member.ends).sum())
                items += batch.tokens
    finally:
        model.close()
    return total / items / math.log(2)


def popularity_bits(run: Run) -> float:
    """Say how many bits name an item, by how popular items are."""
    taken = np.zeros(len(run.assembly().data.dataset.catalog))
    for own in run.assembly().data.holdout.train:
        np.add.at(taken, own, 1)
    share = taken[taken > 0] / taken.sum()
    return float(-(share * np.log2(share)).sum())


def measured(name: str, run: Run, guard: StatePrivacyConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Attack one run behind one guard, and measure its rankings."""
    own = guard == run.config.privacy.states
    settings = AuditSettings(
        attacks=tuple(arguments.attack),
        knowledge=("own",),
        users=arguments.users,
        passes=tuple(arguments.passes),
        guards=(guard,),
        ranked_users=None,
    )
    found = audit_run(run, settings)
    worth = worth_of(run, found["metric"]) if own else found["settings"][0]["worth"]
    return {
        "defence": name,
        "trained_under_it": own,
        "metric": found["metric"],
        "worth": worth,
        "bits": rate_of(run) if own else None,
        "users": found["users"],
        "baseline": found["baseline"],
        "settings": [{key: one[key] for key in ("passes", "guard", "audits")} for one in found["settings"]],
    }


def main() -> None:
    """Train each defence, attack it, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="overrides", metavar="FIELD=VALUE")
    parser.add_argument("--defence", nargs="+", choices=DEFENCES, default=list(DEFENCES))
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--passes", nargs="+", type=int, default=list(PASSES))
    parser.add_argument("--attack", nargs="+", default=list(ATTACKS))
    arguments = parser.parse_args()
    folder = ROOT / "runs" / "privacy" / arguments.name
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    differences = bits = None
    try:
        for name in arguments.defence:
            told = [*BASE, *(f"privacy.states.{own}" for own in DEFENCES[name]), *arguments.overrides]
            finish(arguments.config, told, folder / name)
            run = open_run(folder / name)
            bits = bits or popularity_bits(run)
            guards = {name: run.config.privacy.states}
            if name == "clean":
                guards |= {own: settings_of(DEFENCES[own]) for own in AFTERWARDS if own in arguments.defence}
            for label, guard in guards.items():
                rows.append(_once(folder / name / f"{label}.json", arguments, label, run, guard))
                print(f"{name}, behind {label}: {rows[-1]['worth']['mean']:.4f}", flush=True)
            if name == MOVING:
                differences = attack_differences(run, arguments.users)
    except PplrError as error:
        sys.exit(f"error: {error}")
    path = ROOT / "results" / "privacy" / f"{arguments.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.state_defence", *sys.argv[1:]])
    content = {"command": command, "machine": machine(), "bits": bits, "defences": rows, "differences": differences}
    write_json(path, content)
    draw_defences(content, path.with_suffix(".png"))
    print(f"wrote results/privacy/{path.name} and its plot")


def _once(path: Path, arguments: argparse.Namespace, name: str, run: Run, guard: StatePrivacyConfig) -> dict[str, Any]:
    """Measure, unless the same was measured before."""
    asked = {"users": arguments.users, "passes": arguments.passes, "attack": arguments.attack}
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] == asked:
            return dict(kept["found"])
    found = measured(name, run, guard, arguments)
    write_json(path, {"asked": asked, "found": found})
    return found


if __name__ == "__main__":
    main()
