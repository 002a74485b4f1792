"""Figures that stand on pages written by hand are those of a committed result."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from _generate.leakage import leakage_table
from typer.testing import CliRunner

from benchmarks.dp_audit import told
from benchmarks.measuring import RESULTS
from pplr.apps.cli import app
from pplr.privacy.accounting import epsilon_of
from pplr.recommend.private_training import private_steps
from tests.docs.pages import DOCS, ROOT, blocks

PRIVACY = (DOCS / "privacy.md").read_text(encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def rows_after(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    lines = PRIVACY.partition(f"\n## {heading}\n")[2].splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def short(value: float, digits: int = 2) -> str:
    return re.sub(r"^0", "", f"{value:.{digits}f}")


def metric(audits: list[dict[str, Any]], audit: str, name: str, knowledge: str = "own") -> str:
    found = [own[name]["mean"] for own in audits if (own["audit"], own["knowledge"]) == (audit, knowledge)]
    return short(found[0]) if found else ""


def test_what_noise_hides_is_what_was_measured() -> None:
    (seed,) = read(ROOT / "results" / "privacy" / "item-vectors-states.json")["seeds"]
    by_guard: dict[str | None, list[dict[str, Any]]] = {}
    for setting in seed["settings"]:
        by_guard.setdefault(setting["guard"], []).append(setting)
    expected = []
    for guard, (one, twelve) in by_guard.items():
        assert (one["passes"], twelve["passes"]) == (1, 12)
        worth = one["worth"] if guard else next(own["worth_unguarded"] for own in seed["settings"] if own["guard"])
        read_of = [
            max(
                (metric(own["audits"], audit, "item_f1") for audit in ("vocabulary_matching", "posterior_matching")),
                key=float,
            )
            for own in (one, twelve)
        ]
        expected.append([short(worth["mean"], 4), *read_of, metric(one["audits"], "label_gradients", "target_hit@1")])
    guess = short(seed["baseline"]["item_f1"]["mean"])
    expected.append(["", guess, guess, short(seed["baseline"]["target_hit@1"]["mean"])])
    rows = rows_after("What noise hides, and what it costs")
    assert [cells[1:] for cells in rows] == expected
    for cells, guard in zip(rows, by_guard, strict=False):
        assert set(re.findall(r"\d+(?:\.\d+)?", cells[0])) <= set(re.findall(r"\d+(?:\.\d+)?", guard or ""))


def test_what_a_secret_projection_hides_is_what_was_measured() -> None:
    (seed,) = read(ROOT / "results" / "privacy" / "item-vectors-secret.json")["seeds"]
    surface, deeper = seed["settings"]
    assert [own["cut"]["input_layers"] for own in (surface, deeper)] == [0, 1]
    *rows, guess = rows_after("A secret projection")
    for cells in rows:
        (knowledge,) = re.findall(r"\(`(\w+)`\)", cells[0])
        attack = "alignment" if knowledge == "catalog" else "vocabulary_matching"
        expected = [metric(own["audits"], attack, "item_f1", knowledge) for own in (surface, deeper)]
        for own in (surface, deeper):  # gradients tell the same at both cuts
            gradients = [
                metric(own["audits"], "label_gradients", name, knowledge) for name in ("item_f1", "target_hit@1")
            ]
            assert cells[1:] == [*expected, *gradients], knowledge
    assert guess[1:] == [short(seed["baseline"][name]["mean"]) for name in (*["item_f1"] * 3, "target_hit@1")]
    worth = [short(surface["worth"]["mean"], 4)]
    (other,) = read(ROOT / "results" / "privacy" / "item-vectors-states.json")["seeds"]
    worth.append(short(other["settings"][0]["worth"]["mean"], 4))
    text = " ".join(PRIVACY.split())
    assert re.search(rf"NDCG@10 of all 943 users is {worth[0]}, beside {worth[1]} of the same run without it", text)


def test_what_an_audit_of_private_training_found_is_what_was_measured() -> None:
    (shown,) = (block.text for block in blocks(DOCS / "dp.md") if block.kind == "text")
    assert shown.splitlines() == [told(own) for own in read(RESULTS / "dp_audit.json")["audits"]]


def test_what_many_clients_would_take_follows_from_a_bound_that_is_met() -> None:
    result = read(RESULTS / "aggregation.json")
    (row,) = (own for own in result["rows"] if own["name"] == "seconds of 1000 clients")
    assert row["met"]
    bound = int(row["against"].removesuffix(" s"))
    assert result["curve"]["1000"]["total"] < 100 * result["curve"]["100"]["total"]
    scale = " ".join((DOCS / "scale.md").read_text(encoding="utf-8").split())
    text = f"the {bound} s that 1,000 clients may take there become {bound * 100 // 60} minutes at 10,000 clients, and "
    assert f"{text}{bound * 10_000 // 3600} hours at 100,000" in scale


def test_pages_say_nearly_all_at_every_measured_cut_as_long_as_that_is_so() -> None:
    lines = leakage_table(ROOT / "results" / "privacy").strip().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) > 5
    assert min(float(cells[4]) for cells in rows) > 0.9
    for page in (ROOT / "README.md", DOCS / "index.md", DOCS / "deploy.md", DOCS / "method.md"):
        text = " ".join(page.read_text(encoding="utf-8").split())
        assert re.search(r"(nearly (all|everything)[^.]*,? at every cut|at every cut[^.]* nearly)", text), page.name
        assert "at most cuts" not in text


def test_what_privacy_of_users_costs_is_what_was_measured() -> None:
    rows = []
    for name in ("pooled", "dp-weak", "dp"):
        result = read(ROOT / "results" / "privacy" / f"item-vectors-{name}.json")
        worth = short(result["seeds"][0]["settings"][0]["worth"]["mean"], 4)
        own = dict(word.split("=", 1) for word in result["command"].split() if "=" in word)
        if "privacy.dp.delta" not in own:
            rows.append(["without privacy", "none", worth])
            continue
        sigma, rate, delta = (
            float(own[f"privacy.dp.{field}"]) for field in ("noise_multiplier", "sampling_rate", "delta")
        )
        steps = int(own["federation.rounds"]) * private_steps(1, rate)
        rows.append([f"σ = {sigma:g}, q = {rate:g}", f"{epsilon_of([(steps, rate, sigma)], delta):.3g}", worth])
        assert delta == 1e-4
    popularity = read(ROOT / "results" / "item-vectors-pplr.json")["runs"][0]["floors"]["popularity"]["ndcg@10"]
    rows.append(["popularity", "none", short(popularity, 4)])
    cost = (DOCS / "dp.md").read_text(encoding="utf-8").partition("## Cost")[2]
    lines = [line for line in cost.splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] == rows


@pytest.mark.parametrize("page", ["scale.md", "runtimes.md", "trackers.md", "web.md"])
def test_pages_that_no_result_stands_behind_have_no_table_of_figures(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert not [cell for cell in cells if re.fullmatch(r"[\d,]*\.?\d+( \w+)?", cell)], row


@pytest.mark.usefixtures("shared_cache")
def test_what_a_deeper_cut_costs_is_what_the_plan_says() -> None:
    told = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["plan", "smollm2-135m"]).output
    rows = rows_after("A deeper cut")
    for k, memory, share in rows:
        (found,) = re.findall(rf"^ +{k} +0 +\S+ MB +(\S+) MB +(\S+)%", told, flags=re.MULTILINE)
        assert (memory, share) == (f"{found[0]} MB", f"{found[1]} %"), told
    assert [row[0] for row in rows] == ["0", "1", "2", "4", "8"]


def test_what_a_learned_inverter_reads_is_what_was_measured() -> None:
    (seed,) = read(ROOT / "results" / "privacy" / "causal-lm-inverter.json")["seeds"]
    (row,) = (cells for cells in rows_after("Beside published figures") if cells[0] == "learned inverter")
    expected = [
        (short(own["audits"][0]["rouge_l"]["mean"], 3), str(own["cut"]["input_layers"])) for own in seed["settings"]
    ]
    assert re.findall(r"(\.\d{3}) behind (\d+)", row[2]) == expected


def test_what_chance_does_to_a_run_is_what_was_measured() -> None:
    text = (DOCS / "results_text" / "claim-cpu.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0:1] == "|"]
    assert len(rows) == 2 + 6
    for by, seed, *values in rows[2:]:
        name = f"leave_one_out-{by.lower()}-{seed}-pplr.json"
        records = [read(ROOT / "results" / folder / name) for folder in ("claim-movielens", "claim-cpu")]
        assert values == [short(own["overall"]["ndcg@10"], 4) for own in records]
        assert len({own["partition_sha256"] for own in records}) == 1


@pytest.mark.parametrize(
    ("unit", "names"), [("users", ["users-all", "users-600"]), ("interactions", ["interactions-600"])]
)
def test_who_was_trained_on_is_what_was_measured(unit: str, names: list[str]) -> None:
    (row,) = (cells for cells in rows_after("Beside published figures") if cells[0] == f"membership, of {unit}")
    expected = []
    for name in names:
        (seed,) = read(ROOT / "results" / "privacy" / f"membership-{name}.json")["membership"]
        found = [own for own in seed["attacks"] if own["attacker"] != "outsider" and own["attack"] != "loss_difference"]
        for metric_name in ("auc", "tpr@0.001"):
            values = [own[metric_name]["value"] for own in found]
            expected.append((short(min(values)), short(max(values))))
    assert re.findall(r"([01]?\.\d\d) to ([01]?\.\d\d)", row[2]) == expected


def test_what_recformer_is_worth_is_what_was_measured() -> None:
    page = ROOT / "docs" / "results_text" / "recommendations-movielens-100k-leave_one_out.md"
    text = " ".join(page.read_text(encoding="utf-8").split())
    names = ("recformer-frozen-centralized", "recformer-frozen-pplr", "recformer-short-slow-centralized")
    pooled, federated, slow = (read(ROOT / "results" / f"{name}.json")["runs"] for name in names)
    metrics = ("recall@10", "ndcg@10")

    def mean(runs: list[dict[str, Any]], of: str) -> float:
        return statistics.mean(own["overall"][of] for own in runs)

    below = [
        round(100 * (1 - mean(own, of) / own[0]["floors"]["popularity"][of]))
        for own in (pooled, federated)
        for of in metrics
    ]
    found = re.search(r"it is (\d+) % below .*?and (\d+) % in .*?by `pplr` (\d+) % and (\d+) %", text)
    assert found is not None
    assert [int(value) for value in found.groups()] == below
    beside = [round(100 * (mean(federated, of) / mean(pooled, of) - 1)) for of in metrics]
    assert f"by `pplr` {-beside[0]} % below pooled in Recall@10, {beside[1]} % above in NDCG@10" in text
    worst = [statistics.mean(own["spread"]["ndcg@10"]["worst"] for own in runs) for runs in (pooled, federated)]
    assert worst[0] < worst[1]
    rounds, fewer = (own[0]["validation"]["clients"]["pooled"] for own in (slow, pooled))
    told = re.search(r"rose to (\S+) in the fourth round, fell to (\S+) in the twelfth, and rose to (\S+) in", text)
    assert told is not None
    assert list(told.groups()) == [short(rounds[place], 4) for place in (3, 11, 12)]
    assert f"At best it was {short(max(rounds), 4)}; with four and twelve, {short(max(fewer), 4)}." in text
