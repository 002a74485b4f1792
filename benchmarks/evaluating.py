"""Evaluating users: batches of ours against one user at a time, beam 4 and 128 new tokens, then grounding.

The usual way is run twice: as it is, ended by nothing but the end token, and stopped where a title's line ends, as
ours is. What the first writes after the title decides which of its beams is best, so the two may write different
titles; ours is held to the second, and told beside both.

It trains a small run first, unless --run-dir holds one: a model that was not trained to write titles never ends them.
Before anything is timed ours ranks users, as many at a time as are measured, until it finds the target of some; these
are among those that are ranked one at a time, so that there is quality to compare. Some of them are ranked in float32
by ours and by the usual way that stops: the first ten items have to be the same, in the same order. In the run's own
number format a batch rounds otherwise than a single row; where the two differ by more than is said below, there is no
result.

    python -m benchmarks.evaluating
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.beside import beside
from benchmarks.measuring import at_least, use_all_cores, write_result
from benchmarks.reference.one_at_a_time import OneAtATime
from pplr.backbones.adapters import AdapterState, load_adapter
from pplr.backbones.causal_lm import CausalLM
from pplr.config import Config
from pplr.config_files import load_config
from pplr.data.prompts import Case, evaluation_cases
from pplr.progress import Silent
from pplr.recommend.evaluation import Ranker, in_batches
from pplr.recommend.generative import GenerativeRanker
from pplr.recommend.metrics import batch_ranks
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.in_process import train
from pplr.runtimes.run import open_run
from pplr.seeds import generator

_CONFIGS = Path(__file__).parent.parent / "configs"
LISTS = 0.6
"""Smallest share of their first ten items that users must have in common, on average: in bfloat16 a batch rounds
otherwise than a single row, and where two beams are nearly as good the other one is written."""
SLOW, STOPPED = "one at a time", "one at a time, stopped"
NDCG = 0.05
"""Largest difference of NDCG@10 over the same users."""


def _configs(arguments: argparse.Namespace) -> tuple[Config, Config]:
    """The run that writes titles, trained on every title of its lists, and the one that ranks by item vectors."""
    overrides = [
        "backbone.prompt.targets=all", "training.warmup_steps=5", "training.schedule=cosine",
        f"training.samples={arguments.samples}", "evaluation.before=false", "evaluation.test_users=5",
        "evaluation.floors=[]", "federation.method=centralized", f"federation.rounds={arguments.rounds}",
        *arguments.overrides,
    ]  # fmt: skip
    own = load_config(_CONFIGS / "quickstart_causal_lm.yaml", overrides)
    return own, load_config(_CONFIGS / "quickstart.yaml", arguments.overrides)


def _all_scores(ranker: Ranker, cases: Sequence[Case], size: int) -> NDArray[np.float32]:
    """Score in batches: (B, N), in the order of the cases."""
    batches = in_batches(ranker, cases, size)
    scored = np.concatenate([ranker.scores([cases[place] for place in batch]) for batch in batches])
    return scored[np.argsort(np.concatenate(batches))]


def _quality(scores: NDArray[np.float32], cases: Sequence[Case]) -> float:
    """NDCG@10 of one target each."""
    ranks = [int(own[0]) for own in batch_ranks(scores, cases)]
    return statistics.fmean(1 / np.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks)


def _first_ten(scores: NDArray[np.float32], cases: Sequence[Case]) -> list[list[int]]:
    """List each user's first ten items, best first."""
    found = []
    for row, case in zip(scores, cases, strict=True):
        own = row.copy()
        own[list(case.seen)] = -np.inf
        found.append(np.argsort(-own, kind="stable")[:10].tolist())
    return found


def _in_common(one: NDArray[np.float32], other: NDArray[np.float32], cases: Sequence[Case]) -> float:
    """Average over users the share of their first ten items that are among the first ten of both."""
    firsts = zip(_first_ten(one, cases), _first_ten(other, cases), strict=True)
    return statistics.fmean(len(set(a) & set(b)) / len(a) for a, b in firsts)


def usual_way(parts: Assembly, state: AdapterState, tokens: int) -> OneAtATime:
    """Make the usual way of a run's model, of its own copy of the base."""
    backbone, settings = parts.backbone, parts.config.backbone
    if not isinstance(backbone, CausalLM):
        raise TypeError("the run has to be one of causal_lm")
    own = CausalLM(
        copy.deepcopy(backbone.model), backbone.tokenizer, prompt=settings.prompt, max_tokens=settings.max_tokens
    )
    return OneAtATime(own, parts.config.adapter, state, max_new_tokens=tokens)


def check_lists(config: Config, client: str, state: AdapterState, cases: Sequence[Case], tokens: int) -> None:
    """Rank users in float32 by ours and by the usual way that stops, and refuse other first ten items or orders."""
    wide = config.backbone.model_copy(update={"dtype": "float32"})
    parts = Assembly(config.model_copy(update={"backbone": wide}), Silent())
    catalog, most = parts.data.dataset.catalog, config.data.history_items
    settings = config.evaluation.model_copy(update={"grounding": "l2", "beams": 4, "max_new_tokens": tokens})
    reader = parts.admit(client, state, "float32")
    ours = GenerativeRanker(reader, parts.space, settings, history_items=most)
    usual = usual_way(parts, state, tokens).stopping_at(ours.stop_tokens)
    titles = parts.space.embeddings[parts.space.title_of]
    slow = np.stack([usual.scores(case, titles, catalog, most) for case in cases])
    lists = zip(_first_ten(ours.scores(cases), cases), _first_ten(slow, cases), strict=True)
    parts.close()
    if unlike := sum(one != other for one, other in lists):
        raise SystemExit(f"error: in float32 {unlike} of {len(cases)} users have other first ten items in the two ways")


def hits(scores: NDArray[np.float32], cases: Sequence[Case]) -> list[int]:
    """List the places of the cases whose target is among the first ten."""
    return [place for place, own in enumerate(batch_ranks(scores, cases)) if own[0] <= 10]


def measured_users(ranker: Ranker, cases: Sequence[Case], count: int, size: int) -> tuple[list[Case], list[int]]:
    """Rank as many users at a time as are measured, until some target is found.

    Returns:
        The users who are measured, and the places of those whose target is found.
    """
    for start in range(0, len(cases), count):
        own = list(cases[start : start + count])
        if found := hits(_all_scores(ranker, own, size), own):
            return own, found
    raise SystemExit(
        f"error: our way finds no target of {len(cases)} users, so there is no quality to compare; train more, by "
        "--samples or --rounds"
    )


def compared_users(found: Sequence[int], users: int, count: int) -> list[int]:
    """Choose who is ranked one at a time: half of them, if there are as many, have their target among our first ten."""
    half = list(found[: -(-count // 2)])
    others = [place for place in range(users) if place not in found] + list(found[len(half) :])
    return sorted(half + others[: count - len(half)])


def check_quality(
    ours: NDArray[np.float32], usual: Mapping[str, NDArray[np.float32]], cases: Sequence[Case]
) -> tuple[dict[str, float], dict[str, float]]:
    """Compare the ways over the same users, and refuse to go on where ours and the one that stops differ by more.

    Args:
        ours: Scores by distance.
        usual: Those of both usual ways.
        cases: The users.

    Returns:
        For each usual way what share of the first ten items it has in common with ours, and NDCG@10 in each way.
    """
    common = {way: _in_common(ours, scores, cases) for way, scores in usual.items()}
    quality = {way: _quality(scores, cases) for way, scores in {**usual, "l2": ours}.items()}
    if common[STOPPED] < LISTS or abs(quality["l2"] - quality[STOPPED]) > NDCG:
        raise SystemExit(
            f"error: the two ways do not rank alike: {common[STOPPED]:.0%} of the first ten items are in common over "
            f"{len(cases)} users, and NDCG@10 is {quality['l2']:.4f} against {quality[STOPPED]:.4f}"
        )
    return common, quality


def measure(arguments: argparse.Namespace, folder: Path, config: Config, vectors: Config) -> dict[str, Any]:
    """Let the ways take turns over the same users.

    Args:
        arguments: How many users, turns and tokens.
        folder: A run of causal_lm; where there is none yet, it is trained.
        config: What is trained.
        vectors: A configuration of item vectors; its initial adapter ranks as fast as a trained one.
    """
    run = open_run(folder) if (folder / "metrics.json").exists() else train(config, folder)
    parts, most = run.assembly(), run.config.data.history_items
    catalog = parts.data.dataset.catalog
    name = parts.data.partition.names[0]
    state = load_adapter(run.folder / "clients" / name)
    users = [int(user) for own in parts.data.partition.users for user in own]
    tested = evaluation_cases(parts.data.holdout, users, "test", most)[0]
    every = [tested[int(place)] for place in generator(0, "evaluating").permutation(len(tested))]
    reader = parts.admit(name, state, "benchmark")
    rankers: dict[str, Ranker] = {}
    for grounding in ("l2", "trie"):
        alike = {"grounding": grounding, "beams": 4, "max_new_tokens": arguments.tokens}  # ours stop at the line's end
        settings = run.config.evaluation.model_copy(update=alike)
        rankers[grounding] = writer = GenerativeRanker(reader, parts.space, settings, history_items=most)
    matching = Assembly(vectors, Silent())
    rankers["item vectors"] = matching.ranker(matching.admit("0", matching.initial, "benchmark"))
    usual = usual_way(parts, state, arguments.tokens)
    titles = parts.space.embeddings[parts.space.title_of]
    cases, found = measured_users(rankers["l2"], every, arguments.users, arguments.batch_size)
    chosen = compared_users(found, len(cases), min(arguments.slow_users, len(cases)))
    print(f"targets found of {len(found)} of {len(cases)} users; {len(chosen)} are ranked one at a time", flush=True)
    exact = [cases[place] for place in chosen[: arguments.exact_users]]
    if exact:
        check_lists(run.config, name, state, exact, arguments.tokens)
        print(f"in float32 {len(exact)} of them have the same first ten items in ours and in the usual way that stops")
    scored: dict[str, NDArray[np.float32]] = {}
    ways = {SLOW: usual, STOPPED: usual.stopping_at(writer.stop_tokens)}
    slow: dict[str, list[NDArray[np.float32]]] = {way: [] for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in (*ways, *rankers)}

    def timed(way: str, users: int, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        told = work()
        seconds[way].append((time.perf_counter() - started) / users)
        return told

    for part in np.array_split(np.array(chosen), min(arguments.turns, len(chosen))):
        own = [cases[int(place)] for place in part]
        for way, one in ways.items():
            slow[way] += timed(way, len(own), lambda o=own, u=one: [u.scores(c, titles, catalog, most) for c in o])
        for way, ranker in rankers.items():
            scored[way] = timed(way, len(cases), lambda r=ranker: _all_scores(r, cases, arguments.batch_size))
        print("  ".join(f"{way} {1e3 * taken[-1]:.0f} ms a user" for way, taken in seconds.items()), flush=True)
    compared = [cases[place] for place in chosen]
    slowly = {way: np.stack(own) for way, own in slow.items()}
    common, quality = check_quality(scored["l2"][chosen], slowly, compared)
    shape = f"{len(cases)} users, {run.config.backbone.dtype}"
    written = {way: statistics.fmean(one.written) for way, one in ways.items()}
    told = _told(seconds, shape, arguments.tokens, written, (common, len(compared), len(exact)), quality)
    run.close()
    matching.close()
    return {
        "seconds_per_user": seconds,
        "written_tokens": {way: one.written for way, one in ways.items()},
        "first_ten_in_common": common,
        "compared_users": len(compared),
        "exact_users": len(exact),
        "ndcg@10": quality,
        "ndcg@10_of_all": _quality(scored["l2"], cases),
        **told,
    }


def _told(
    seconds: dict[str, list[float]],
    shape: str,
    most: int,
    written: dict[str, float],
    alike: tuple[dict[str, float], int, int],
    quality: dict[str, float],
) -> dict[str, Any]:
    """Make the rows, of which only the one of the prescribed way is bound, and the notes."""
    median = {way: statistics.median(taken) for way, taken in seconds.items()}
    common, users, exact = alike

    def against(way: str) -> str:
        ends = "" if way == SLOW else ", stopped where the title's line ends"
        return (
            f"one user at a time: beam 4, {most} new tokens at most{ends}, {written[way]:.0f} written on average, then "
            "grounding by distance"
        )

    notes = [
        *(f"{way}: median {1e3 * value:.1f} ms a user" for way, value in median.items()),
        *(
            f"{way}, {users} of the users: {share:.0%} of their first ten items are ours, NDCG@10 {quality[way]:.4f} "
            f"where ours is {quality['l2']:.4f}"
            for way, share in common.items()
        ),
        f"ours is held to the one that stops: at least {LISTS:.0%} of the first ten, NDCG@10 {NDCG} apart at most",
        f"in float32 the first ten items of {exact} of these users are the same in both, in the same order",
        "users were drawn so that ours finds some targets, and of whom those are among the compared",
        "the trie ranks otherwise than by distance, and item vectors are another model",
    ]
    rows = [
        at_least(
            f"evaluating by distance, same ranking ({shape}), users per second",
            against(SLOW),
            median[SLOW] / median["l2"],
            10,
        ),
        *(
            beside(name, against(way), median[way] / median[ours])
            for name, ours, way in (
                (f"evaluating by distance ({shape}), users per second", "l2", STOPPED),
                (f"evaluating by the trie, beam 4 ({shape}), users per second", "trie", SLOW),
                (f"evaluating by the trie, beam 4 ({shape}), users per second", "trie", STOPPED),
                (f"ranking by item vectors ({shape}), users per second", "item vectors", SLOW),
            )
        ),
    ]
    return {"rows": rows, "notes": notes}


def make_parser() -> argparse.ArgumentParser:
    """Make the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--slow-users", type=int, default=24, help="users ranked one at a time, over all turns")
    parser.add_argument(
        "--exact-users", type=int, default=6, help="of these, those whose lists are compared in float32"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="most new tokens, in every way")
    parser.add_argument("--samples", type=int, default=640, help="lists to train on, where a run is trained first")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--run-dir", type=Path, help="a run of causal_lm; trained there when it is none yet")
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="overrides", metavar="FIELD=VALUE")
    return parser


def main() -> None:
    """Measure and write ``evaluating.json``."""
    arguments = make_parser().parse_args()
    use_all_cores()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, arguments.run_dir or Path(folder) / "run", *_configs(arguments))
    for line in found["notes"]:
        print(line)
    for row in found["rows"]:
        print(f"{row['name']} against {row['against']}: {row['ratio']:.2f}, met: {row['met']}")
    write_result("evaluating", found)


if __name__ == "__main__":
    main()
