"""Plain text in columns, which goes through pipes as well. Knows cells; knows nothing of what they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def aligned(rows: Sequence[Sequence[str]], left: int | None = None) -> Iterator[str]:
    """A line a row; the first `left` columns keep to the left, the others to the right. None: all to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        sides = [cell.ljust(width) for cell, width in zip(row[:left], widths, strict=False)]
        sides += [cell.rjust(width) for cell, width in zip(row[len(sides) :], widths[len(sides) :], strict=True)]
        yield "  ".join(sides).rstrip()
