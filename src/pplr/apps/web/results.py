"""What a request's answer is shown as: its lists, what crossed the cut for it, and what an attacker reads of that."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from pplr.apps.reports.elements import (
    Cell,
    Listing,
    Paragraph,
    Part,
    Table,
    bytes_cell,
    measured,
    said,
    share_cell,
)
from pplr.apps.web.rendering import render, render_parts

if TYPE_CHECKING:
    from pplr.privacy.recording import Exchange
    from pplr.runtimes.explaining import Answer, ReadBack
    from pplr.runtimes.recommending import Recommendation, Request

__all__ = ["after_list", "after_words", "before_list", "crossing", "history", "popular_list", "read_back"]

_AFTER = {
    "local": "the client's adapter, trained alone, since the method of this run is local",
    "centralized": "one adapter, trained on the data of all clients pooled",
}
_SHOWN = 10
"""Titles of a history that are shown at once."""
_HAS = {"own": "the client's adapter", "exchanged": "what the client sends of its adapter"}


def after_words(method: str, client: str) -> str:
    """Say whose adapter recommends."""
    return _AFTER.get(method, f"the adapter of client {said(client)}, federated by {said(method)}")


def after_list(answer: Answer, *, after: str, nearness: str) -> str:
    """Write the ten titles, and under each what resembles it."""
    return render(
        "list.html",
        anchor="after",
        heading=f"After: {after}",
        items=answer.items,
        near=answer.near,
        also=(),
        nearness=nearness,
    )


def before_list(what: str, untrained: Answer, answer: Answer) -> str:
    """Write what the client had before, and which of it is among the ten titles too."""
    return _beside("before", f"Before federation: {what}", untrained.items, answer)


def popular_list(popular: Sequence[Recommendation], answer: Answer) -> str:
    """Write what is popular, and which of it is among the ten titles too."""
    return _beside("popular", "Popularity: what was taken most in training, the same for everyone", popular, answer)


def _beside(anchor: str, heading: str, items: Sequence[Recommendation], answer: Answer) -> str:
    also = {item.item_id for item in answer.items}
    return render("list.html", anchor=anchor, heading=heading, items=items, near=(), also=also, nearness="")


def history(request: Request, titles: Sequence[str]) -> str:
    """Write the history that the model reads, folded away."""
    read = f"the newest {len(titles):,} of {request.taken:,} titles" if len(titles) < request.taken else ""
    read = read or ("the one title" if len(titles) == 1 else f"all {len(titles):,} titles")
    told = "\n".join(f"{place}. {said(title)}" for place, title in enumerate(titles, 1))
    return render_parts([Listing(f"The history that the model reads: {read}, oldest first", told)], "history")


def crossing(exchanges: Sequence[Exchange], *, is_remote: bool, connected: bool = True) -> str:
    """Write every message that crossed the cut for a request."""
    if not exchanges:
        return render_parts([Paragraph(("The model is not cut, so nothing crossed for this request.",))], "crossing")
    up, down = (sum(getattr(own, way).sent_bytes for own in exchanges) for way in ("up", "down"))
    took = sum(own.milliseconds for own in exchanges)
    counted = f"{len(exchanges):,} exchanges" if len(exchanges) > 1 else "one exchange"
    where = (
        "with the stage server, over the network"
        if is_remote
        else "between the two sides in this process, where nothing travels: the time is the server's computing alone"
    )
    parts: list[Part] = [
        Paragraph(
            (
                f"This request took {counted} {where}. Up went ",
                bytes_cell(up),
                ", down came ",
                bytes_cell(down),
                ", in ",
                Cell(f"{took:,.1f} ms", took),
                " together.",
            )
        ),
        Table(
            "Messages in order; B rows, T tokens, D numbers for each. Padding does not cross",
            ("message", "way", "tensor", "shape (B, T, D)", "dtype", "vectors", "bytes", "time"),
            _rows(exchanges),
            texts=("way", "tensor", "shape (B, T, D)", "dtype"),
        ),
        Paragraph(
            (
                "Beside the tensors go how many vectors each row has and, token by token, which earlier ones each may "
                "look at: the length of the history is never hidden.",
            ),
            "note",
        ),
    ]
    return render_parts(parts, "crossing")


def _rows(exchanges: Sequence[Exchange]) -> list[Sequence[Cell | str]]:
    """Write a row for each message; exchanges of the same form that follow each other share one."""
    rows: list[Sequence[Cell | str]] = []
    place = 1
    for _, group in groupby(exchanges, key=lambda own: (own.call, own.up.shape[:2], own.up.dtype)):
        same = list(group)
        name = f"{place}" if len(same) == 1 else f"{place} to {place + len(same) - 1}"
        place += len(same)
        took = sum(own.milliseconds for own in same)
        for way, words in (("up", "client to server"), ("down", "server to client")):
            messages = [getattr(own, way) for own in same]
            rows.append(
                (
                    f"{name}, {same[0].call}",
                    words,
                    "hidden_states",
                    " × ".join(f"{size:,}" for size in messages[0].shape),
                    messages[0].dtype,
                    measured(sum(own.vectors for own in messages)),
                    Cell(f"{sum(own.sent_bytes for own in messages):,}", sum(own.sent_bytes for own in messages)),
                    "" if way == "up" else Cell(f"{took:,.1f} ms", took),
                )
            )
    return rows


def read_back(found: ReadBack | str) -> str:
    """Write what an attacker reads out of the very states that crossed, beside what is true."""
    if isinstance(found, str):
        return render_parts([Paragraph((found,), "verdict")], "attack")
    right = sum(true == guessed for true, guessed in found.rows)
    parts: list[Part] = [
        Paragraph(
            (
                f"The attack {said(found.attack)}, by a server that has {_HAS[found.knowledge]}, reads ",
                share_cell(found.share),
                " of this history's titles out of the states above. Naming the most popular titles instead, with no "
                "state at all, finds ",
                share_cell(found.guess_share),
                ".",
            ),
            "verdict",
        ),
        Paragraph(
            (
                "It took ",
                Cell(f"{found.seconds:.2f} s", found.seconds),
                *((", when its time was up, and it guessed the rest without trying",) if found.hurried else ()),
                f". {right:,} of {len(found.rows):,} titles {'are in their place' if found.by_place else 'were read'}",
                f"; {len(found.wrong):,} that it named are not in the history" if found.wrong else "",
                ". Another attack may read more.",
            ),
            "note",
        ),
        _read_table("What the attack read, newest first", found, found.rows[: -_SHOWN - 1 : -1]),
    ]
    html = render_parts(parts, "attack")
    if older := found.rows[:-_SHOWN][::-1]:
        html += render(
            "folded.html", title=f"The other {len(older):,} titles", inner=[_read_table("Older", found, older)]
        )
    return html


def _read_table(caption: str, found: ReadBack, rows: Sequence[tuple[str, str | None]]) -> Table:
    """Write what was read in the place of each title or, of text that has no places, whether it was read at all."""
    if not found.by_place:
        told = [(said(true), "no" if guessed is None else "yes") for true, guessed in rows]
        return Table(caption, ("true title", "read, in whatever place"), told, texts=("true title",))
    placed = [(said(true), said(guessed or "nothing"), "yes" if true == guessed else "no") for true, guessed in rows]
    return Table(caption, ("true title", "title read", "right"), placed, texts=("true title", "title read", "right"))
