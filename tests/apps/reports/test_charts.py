"""Charts draw what they are given, the same each time, and readably without colour."""

from __future__ import annotations

import base64
import itertools

import numpy as np
import pytest

from pplr.apps.reports.charts import MOST_LINES, as_chart, bars, intervals, lines, matrix
from pplr.apps.reports.mixing import chosen_rounds, mixed_matrix
from pplr.apps.reports.records import RoundRecord


def test_lines_differ_by_more_than_colour() -> None:
    series = {f"c{number}": {1: number / 10, 2: number / 20} for number in range(MOST_LINES)}
    figure = lines(series, "loss (nats)")
    (axes,) = figure.axes
    drawn = axes.get_lines()
    assert [own.get_ydata().tolist() for own in drawn] == [list(own.values()) for own in series.values()]
    assert len({(own.get_marker(), str(own.get_linestyle())) for own in drawn}) == MOST_LINES
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("server round", "loss (nats)")


def test_many_clients_become_a_band_with_their_median() -> None:
    series = {str(number): {1: float(number), 3: 2.0 * number} for number in range(MOST_LINES + 1)}
    (axes,) = lines(series, "loss (nats)").axes
    (median,) = axes.get_lines()
    assert median.get_xdata().tolist() == [1, 3]
    assert median.get_ydata().tolist() == [4.0, 8.0]


@pytest.mark.parametrize(("names", "title"), [(3, "a run"), (MOST_LINES, ""), (2, "a run of a name as long as can be")])
def test_names_and_the_axis_s_label_fit_and_do_not_touch(names: int, title: str) -> None:
    series = {f"a-long-name-of-a-run-{number}": {1: 0.5, 2: 0.25} for number in range(names)}
    figure = lines(series, "mean validation ndcg@10 (0 to 1)", title=title)
    figure.draw_without_rendering()
    (legend,), (axes,) = figure.legends, figure.axes
    named, label = legend.get_window_extent(), axes.yaxis.label.get_window_extent()
    assert named.x1 <= figure.bbox.x1
    assert label.y1 <= named.y0
    assert label.y0 >= figure.bbox.y0


def test_charts_of_one_scale_have_it() -> None:
    one, other = (lines({"a": {1: value, 2: 0.5}}, "y", limits=(0.0, 1.0)).axes[0] for value in (0.25, 0.75))
    assert one.get_ylim() == other.get_ylim()
    assert one.get_ylim()[0] < 0.0 < 1.0 < one.get_ylim()[1]


def test_bars_and_intervals_draw_the_figures() -> None:
    (axes,) = bars({"0": 0.25, "1": 0.5}, {"all users": 0.375}, "ndcg@10 (0 to 1)").axes
    assert [own.get_width() for own in axes.patches] == [0.25, 0.5]
    assert all(own.get_hatch() for own in axes.patches)
    assert axes.get_lines()[0].get_xdata() == [0.375, 0.375]
    (axes,) = intervals([("a", 0.5, 0.25, 0.625)], ("guess", 0.0, 0.125), "item_f1").axes
    (told,) = axes.containers
    assert np.asarray(told.lines[2][0].get_segments()[0])[:, 0].tolist() == [0.25, 0.625]


@pytest.mark.parametrize("clients", [1, 3, 25])
def test_a_square_holds_its_numbers_and_none_for_what_is_not_known(clients: int) -> None:
    square = [[None if i == j else 0.25 for j in range(clients)] for i in range(clients)]
    figure = matrix(square, [str(number) for number in range(clients)], "mixture", (0.0, 0.5), 2)
    axes = figure.axes[0]
    assert np.ma.filled(axes.images[0].get_array(), np.nan).shape == (clients, clients)
    told = [text.get_text() for text in axes.texts]
    assert told == ([".25"] * (clients * clients - clients) if clients <= 10 else [])


def test_a_chart_is_the_same_each_time_and_says_nothing_of_when() -> None:
    one, other = (as_chart(lines({"日本 <x>": {1: 1.0}}, "y"), "alt", "caption") for _ in range(2))
    assert one == other
    svg = base64.b64decode(one.source.partition(",")[2]).decode()
    assert svg.startswith("<svg")
    assert "dc:date" not in svg
    assert "日本 &lt;x&gt;" in svg


@pytest.mark.parametrize("count", [1, 2, 12, 13, 75])
def test_all_rounds_are_drawn_or_twelve_at_even_distances(count: int) -> None:
    rounds = [RoundRecord(server_round=number, clients={}) for number in range(1, count + 1)]
    shown = [own.server_round for own in chosen_rounds(rounds)]
    if count <= 12:
        assert shown == list(range(1, count + 1))
        return
    gaps = {after - before for before, after in itertools.pairwise(shown)}
    assert (shown[0], shown[-1], len(shown)) == (1, count, 12)
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


def test_a_client_that_did_not_train_is_in_no_square() -> None:
    record = RoundRecord.model_validate(
        {
            "server_round": 1,
            "similarity": [[1.0, 0.5], [0.5, 1.0]],
            "clients": {
                "a": {"mixed_from": {"a": 0.75, "b": 0.25}},
                "b": {"mixed_from": {"b": 1.0}},
                "late": {"samples": 0, "validation": {"ndcg@10": 0.5}},
            },
        }
    )
    assert mixed_matrix(record) == [[0.75, 0.25], [None, 1.0]]
