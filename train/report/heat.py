"""Heat maps of the implied attention as inline SVG, a few kilobytes each."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from train.readable import listed
from train.report.text import safe

LEVELS = 9
"""Shades between white and dark, by the root of a share, so that small ones can be seen."""


def attention_of(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All heat maps, those of softmax first; `title`, `words` and, by layer, rows."""
    found = [one for model in models for one in model.get("attention") or []]
    return sorted(found, key=lambda one: not one["title"].startswith("softmax"))


def note(maps: Sequence[Mapping[str, Any]]) -> str:
    """How much each model takes from the token itself, which the diagonal shows."""
    shares = []
    for one in maps:
        own = fmean(_shares(row)[-1] for rows in one["layers"].values() for row in rows)
        shares.append(f"{one['title']} {100 * own:.0f} %")
    sentence = "".join(maps[0]["words"]).strip()
    return (
        f"Each row is a token of “{sentence}” (query); its shade says what share it takes of each "
        "token up to it (key), the mean over heads of absolute weights; the token itself, on the "
        f"diagonal, gives on average: {listed(shares)}."
    )


def figures(maps: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, str]]:
    """A title and the pictures of each model; `key` is unique on the page."""
    found = []
    for place, one in enumerate(maps):
        pictures = []
        for layer, rows in one["layers"].items():
            picture = _draw(rows, f"{one['title']}, layer {layer}", f"{key}{place}-{int(layer)}")
            pictures.append(
                f"<div><span>layer {int(layer)}</span><span class=query>query position</span>"
                f"{picture}<span>key position</span></div>"
            )
        found.append((f"Attention of {one['title']}", "".join(pictures)))
    return found


def _shares(row: str) -> list[float]:
    """Saved in thousandths, one after the other."""
    return [int(share) / 1000 for share in row.split()]


def _draw(rows: Sequence[str], title: str, key: str) -> str:
    """Neighbours of one shade are one stroke."""
    strokes: list[list[str]] = [[] for _ in range(LEVELS)]
    for y, row in enumerate(rows):
        shades = [min(LEVELS - 1, int(LEVELS * max(0.0, share) ** 0.5)) for share in _shares(row)]
        start = 0
        for x in range(1, len(shades) + 1):
            if x == len(shades) or shades[x] != shades[start]:
                strokes[shades[start]].append(f"M{start} {y}h{x - start}")
                start = x
    size = len(rows)
    paths = "".join(
        f'<path class="h{shade}" d="{"".join(parts)}"/>'
        for shade, parts in enumerate(strokes)
        if parts and shade
    )
    return (
        f'<svg viewBox="0 -0.5 {size} {size}" role="img" aria-labelledby="{key}">'
        f'<title id="{key}">{safe(title)}</title>'
        f'<path class="h0" d="M0 -0.5H{size}V{size - 0.5}H0z"/>{paths}</svg>'
    )
