"""Scores, on what tells of the user alone."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import beta

from pplr.backbones.item_vectors import ItemVectors
from pplr.data.prompts import Sample
from pplr.privacy.audits import Guess
from pplr.privacy.observing import secret_of
from pplr.privacy.scoring import METRICS, Reader, baseline, interval, rouge_l, score
from pplr.privacy.verdict import share_found, strongest, verdict
from pplr.testing import tiny_backbone, tiny_catalog


@pytest.fixture
def reader() -> Reader:
    return Reader(tiny_backbone(), tiny_catalog())


def test_the_template_alone_scores_nothing(reader: Reader) -> None:
    secret = secret_of(reader.backbone, Sample(0, (3, 1), 4), "a", reader.catalog, 10)
    blank = [None if own else token for token, own in zip(secret.tokens, secret.is_private, strict=True)]
    told = score(Guess(tuple(blank)), secret, reader)
    assert (
        told["token_recovery"] == told["rouge_l"] == told["item_f1"] == told["target_hit@1"] or told["item_f1"] == 0.0
    )
    assert told["token_recovery"] == 0.0


def test_the_truth_scores_all(reader: Reader) -> None:
    secret = secret_of(reader.backbone, Sample(0, (3, 1), 4), "a", reader.catalog, 10)
    assert set(score(Guess(secret.tokens), secret, reader).values()) == {1.0}


def test_items_are_read_by_the_nearest_title_and_counted_once(reader: Reader) -> None:
    secret = secret_of(reader.backbone, Sample(0, (3, 1), 4), "a", reader.catalog, 10)
    tokenizer = reader.backbone.tokenizer  # type: ignore[attr-defined]
    text = tokenizer.decode(list(secret.tokens)).replace("Copper Beech", "Copper Beach").replace("Birch", "Yew")
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert reader.history(tokens) == {3, 7}
    assert reader.targets(tokens)[0] == 4


def test_an_attack_on_the_target_says_nothing_of_tokens(reader: Reader) -> None:
    secret = secret_of(reader.backbone, Sample(0, (3, 1), 5), "a", reader.catalog, 10)
    told = score(Guess(targets=(2, 6)), secret, reader)  # 6 has the target's title
    assert told == dict.fromkeys(METRICS) | {"target_hit@1": 0.0, "target_hit@10": 1.0}


def test_longest_common_subsequence_by_hand() -> None:
    assert rouge_l([1, None, 2, 4], [1, 2, 3, 4]) == pytest.approx(2 * 3 / 7)
    assert rouge_l([], [1]) == rouge_l([None], [1]) == 0.0


def test_the_baseline_knows_popularity_and_nothing_of_the_user(reader: Reader) -> None:
    popularity = torch.tensor([9, 8, 1, 7, 0, 0, 0, 0])
    secret = secret_of(reader.backbone, Sample(0, (0, 4), 3), "a", reader.catalog, 10)
    told = baseline(secret, popularity, reader)
    assert told["token_recovery"] == 0.0
    assert told["item_precision"] == told["item_recall"] == 0.5
    assert told["target_hit@1"] == 0.0  # item 1 comes before
    assert told["target_hit@10"] == 1.0


def test_intervals_are_of_users_and_leave_out_what_is_not_known() -> None:
    rows = [dict.fromkeys(METRICS, None) | {"item_f1": value} for value in (0.0, 1.0) * 50]
    told = interval(rows)
    assert told["rouge_l"] is None
    own = told["item_f1"]
    assert own is not None
    assert own["mean"] == 0.5
    assert 0.38 < own["low"] < 0.42
    assert 0.58 < own["high"] < 0.62


def _content(f1: float, guess: float = 0.1) -> dict:
    def told(value: float) -> dict:
        return {"mean": value, "low": value, "high": value}

    cut = {"input_layers": 1, "output_layers": 0, "total_layers": 4}
    audits = [
        {"audit": "a", "knowledge": "own", "item_f1": told(f1)},
        {"audit": "b", "knowledge": "own", "item_f1": None},
    ]
    other = [{"audit": "c", "knowledge": "own", "item_f1": told(1.0)}]
    settings = [
        {"cut": cut | {"input_layers": 0}, "noise": 0.0, "audits": other},
        {"cut": cut, "noise": 0.0, "audits": audits},
        {"cut": cut, "noise": 1.0, "audits": other},
    ]
    return {"cut": cut, "baseline": {"item_f1": told(guess), "target_hit@1": told(0.0)}, "settings": settings}


@pytest.mark.parametrize(
    ("found", "words"),
    [(0.9, "must not run this server"), (0.4, "partly known"), (0.12, "does not show that others would not")],
)
def test_the_verdict_follows_what_was_found_at_the_runs_own_cut(found: float, words: str) -> None:
    told = verdict(_content(found))
    assert words in told
    assert f"F1 of {found:.2f}" in told
    assert "gives 0.10" in told


def test_the_verdict_is_of_the_runs_own_guard_and_of_the_most_passes() -> None:
    content = _content(0.4)
    own = content["settings"][1]
    guarded = own | {"guard": "states clipped to 3", "passes": 1}
    many = guarded | {"passes": 12, "audits": [own["audits"][0] | {"item_f1": {"mean": 0.8, "low": 0.8, "high": 0.8}}]}
    bare = own | {"audits": [own["audits"][0] | {"item_f1": {"mean": 1.0, "low": 1.0, "high": 1.0}}]}
    told = verdict(content | {"guard": "states clipped to 3", "settings": [bare, guarded, many]})
    assert "blocks and states clipped to 3, a server" in told
    assert "F1 of 0.80 (0.80 to 0.80; a, 12 passes)" in told


def test_the_verdict_goes_by_the_upper_end_of_the_interval() -> None:
    content = _content(0.09, guess=0.05)
    content["settings"][1]["audits"][0]["item_f1"] = {"mean": 0.09, "low": 0.0, "high": 0.3, "users": 4}
    told = verdict(content)
    assert "partly known" in told
    assert "0.00 to 0.30 over 4 users" in told


def test_of_another_noise_guard_or_wire_format_the_verdict_claims_nothing_of_the_run() -> None:
    for changed in ({"noise": 2.0}, {"guard": "metric noise η 4"}, {"wire": "int8"}):
        content = _content(0.12) | {"wire": "exact"}
        content["settings"] = [content["settings"][1] | {"wire": "exact"} | changed]
        told = verdict(content)
        assert told.startswith("Not of this run as it is")
        assert "found little" not in told
        said = {"noise": "noise of 2 times the states' size", "guard": "metric noise η 4", "wire": "int8 on the wire"}
        assert said[next(iter(changed))] in told


def test_the_verdict_tells_what_recommendations_are_worth_and_which_attacks_were_not_tried() -> None:
    content = _content(0.12) | {"metric": "ndcg@10"}
    content["settings"][1]["worth"] = {"mean": 0.0556, "users": 200}
    missing = [{"audit": name, "knowledge": "own"} for name in ("inverter", "logit_lens")]
    told = verdict(content | {"not_tried": missing})
    assert "and NDCG@10 of 0.0556, a server" in told
    assert told.endswith("this server could also try, with the client's adapter: inverter, logit_lens.")


@pytest.mark.parametrize("hits", [0, 5, 8])
def test_shares_of_users_have_clopper_and_pearsons_interval_and_all_tell_their_number(hits: int) -> None:
    rows = [dict.fromkeys(METRICS, None) | {"target_hit@1": float(user < hits)} for user in range(8)]
    own = interval(rows)["target_hit@1"]
    assert own is not None
    assert own["users"] == 8
    assert own["low"] == pytest.approx(0.0 if hits == 0 else beta.ppf(0.025, hits, 9 - hits))
    assert own["high"] == pytest.approx(1.0 if hits == 8 else beta.ppf(0.975, hits + 1, 8 - hits))


def test_what_stays_at_home_no_server_has() -> None:
    content = _content(0.9)
    sent = {"audit": "b", "knowledge": "exchanged", "item_f1": {"mean": 0.12, "low": 0.1, "high": 0.2}}
    content["settings"][1]["audits"].append(sent)
    told = verdict(content)
    assert "a server that has what the client sends of its adapter reads" in told
    assert "F1 of 0.12" in told


def test_targets_count_as_items_do() -> None:
    content = _content(0.12)
    hit = {"mean": 0.75, "low": 0.5, "high": 1.0}
    content["settings"][1]["audits"][1] |= {"knowledge": "base", "target_hit@1": hit}
    told = verdict(content)
    assert "an F1 of 0.12" in told
    assert "a server that has the public model alone finds the item that a training pass predicts for 0.75" in told
    assert "must not run this server" in told


def test_without_a_figure_nothing_is_claimed() -> None:
    content = _content(0.5)
    for setting in content["settings"]:
        setting["audits"] = setting["audits"][1:]
    assert strongest(content) is None
    assert verdict(content).startswith("No attack that was run says")


def test_the_share_is_of_what_a_guess_leaves_open() -> None:
    assert share_found(0.55, 0.1) == pytest.approx(0.5)
    assert share_found(0.0, 0.1) == 0.0
    assert share_found(1.0, 1.0) == 0.0


def test_items_of_one_title_are_one_token_since_the_model_reads_titles() -> None:
    backbone, catalog = ItemVectors(tiny_backbone()), tiny_catalog()
    backbone.prepare(catalog, lambda texts: torch.zeros(len(texts), backbone.hidden_size))
    secret = secret_of(backbone, Sample(0, (6, 1), 4), "a", catalog, 10)
    reader = Reader(backbone, catalog)
    assert (secret.tokens, secret.history, secret.target) == ((6, 1), (5, 1), 4)  # the target is no part of the pass
    told = score(Guess((5, 1)), secret, reader)
    assert told["token_recovery"] == told["item_f1"] == 1.0  # 5 and 6 are both called Oak
    assert told["target_hit@1"] is told["target_hit@10"] is None
    assert score(Guess((3, 1)), secret, reader)["token_recovery"] == 0.5
    assert score(Guess((3, 1), (4,)), secret, reader)["target_hit@1"] == 1.0
