"""What the measurements share: the machine, the prompts, medians, and where results go."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import pplr
from benchmarks.origins import commit_of
from pplr.backbones.base import Backbone, load_backbone
from pplr.backbones.causal_lm import CausalLM
from pplr.config import Config, TrainingConfig
from pplr.config_files import load_config
from pplr.runtimes.run_data import load_run_data

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Say what was measured on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def use_all_cores() -> None:
    """Let torch use what this process may use."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Tell a list of measurements by its median and its ends."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values), "count": len(values)}


def real_batch(config: Config, backbone: Backbone, size: int) -> list[Any]:
    """Encode real prompts of MovieLens-100K, as training would draw them."""
    data = load_run_data(config.model_copy(update={"training": config.training.model_copy(update={"samples": size})}))
    samples = [sample for own in data.samples.values() for sample in own][:size]
    return backbone.encode(samples, data.dataset.catalog, config.data.history_items)


def config_file(name: str) -> Path:
    """Find a file of ``configs/`` in the checkout of the imported pplr, which may be an older one, or in this one."""
    of_pplr = Path(pplr.__file__).parents[2] / "configs" / name
    return of_pplr if of_pplr.exists() else Path(__file__).parent.parent / "configs" / name


def quickstart(*overrides: str) -> Config:
    """Load the demo's configuration, with padded rows unless it is said otherwise; older code knows no others."""
    padded = ("training.shared_prefix=false",) if "shared_prefix" in TrainingConfig.model_fields else ()
    return load_config(config_file("quickstart_causal_lm.yaml"), (*padded, *overrides))


def backbone_of(config: Config) -> Backbone:
    """Load a configuration's backbone, telling what is fetched."""
    return load_backbone(config.backbone, print)


def causal_lm_of(config: Config) -> CausalLM:
    """Load a configuration's backbone where it is to write titles."""
    backbone = backbone_of(config)
    if not isinstance(backbone, CausalLM):
        raise SystemExit(f"error: this is measured with causal_lm, not with {backbone.name}")
    return backbone


def at_least(name: str, against: str, ratio: float, bound: float) -> dict[str, Any]:
    """Make a row whose ratio should not be lower."""
    return complete({"name": name, "against": against, "ratio": ratio, "at_least": bound, "met": ratio >= bound})


def at_most(name: str, against: str, ratio: float, bound: float) -> dict[str, Any]:
    """Make a row whose ratio should not be higher."""
    return complete({"name": name, "against": against, "ratio": ratio, "at_most": bound, "met": ratio <= bound})


def complete(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give a row every key, null for a bound that it has not; one without a ratio may say the ``reason``."""
    keys = ("name", "against", "ratio", "at_least", "at_most", "met")
    return {key: row.get(key) for key in keys} | ({"reason": row["reason"]} if "reason" in row else {})


def origin(name: str) -> dict[str, Any]:
    """Say where what is measured now is from: command, day, machine, and the commit of the pplr that was imported."""
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "day": date.today().isoformat(),
        "commit": commit_of(Path(pplr.__file__).parent),
        "machine": machine(),
    }


def write_result(name: str, content: Mapping[str, Any]) -> None:
    """Write one benchmark's result, with where it is from."""
    write_json(name, {**origin(name), **content})


def write_json(name: str, content: Mapping[str, Any]) -> None:
    """Write one benchmark's result, its rows with every key."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {**content, "rows": [complete(row) for row in content["rows"]]}
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    print(f"wrote benchmarks/results/{path.name}")


def quality_parser(description: str | None) -> argparse.ArgumentParser:
    """Make the arguments that every measurement of recommendations takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="overrides", metavar="FIELD=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    return parser


def write_quality(name: str, content: dict[str, Any], root: Path = RESULTS.parent.parent) -> None:
    """Write what recommendations were worth to ``results/NAME.json``."""
    path = root / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote results/{path.name}")
