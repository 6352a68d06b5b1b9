"""Numbers as people read them."""

import math
from collections.abc import Sequence

from train.intervals import interval


def readable_bytes(count: float) -> str:
    """`512 B`, `1.5 KB`, `67 MB`: decimal units, at least two digits."""
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if value < 9.95 and unit != "B" else f"{value:.0f} {unit}"


def readable_count(count: float) -> str:
    """`950`, `12.3 k`, `1.25 M`: three digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size * 0.9995:
            return f"{three_digits(count / size)} {unit}"
    return f"{count:,.0f}"


def short_context(context: float) -> str:
    """`128`, `16k`: contexts are counted in 1,024s where they can be."""
    whole = round(context)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else f"{whole:,}"


def readable_seconds(seconds: float) -> str:
    """`42 s`, `7.5 min`, `3.2 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def three_digits(value: float) -> str:
    """`1.23e-4`, `0.0123`, `1.23`, `12.3`, `1,234`."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) < 1e-3:
        number, _, power = f"{value:.2e}".partition("e")
        return f"{number}e{int(power)}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def short_number(value: float) -> str:
    """At an axis, with no zeros at its end: `5e-4`, `0.03`, `2.5`, `100`, `1,234`, `3e6`."""
    if abs(value) < 1e6:
        number, e, power = three_digits(value).partition("e")
    else:
        number, e, power = f"{value:.2e}".replace("e+0", "e").replace("e+", "e").partition("e")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number}{e}{power}"


def with_margin(values: Sequence[float], digits: int = 3) -> str:
    """`1.412` for one value, `1.412 ± 0.003` with the 95 % interval of the mean for several."""
    mean, margin = interval(values)
    text = f"{mean:.{digits}f}"
    return text if margin is None else f"{text} ± {margin:.{digits}f}"


def readable_flops(flops: float) -> str:
    """`1.23e14`, as budgets are written."""
    number, _, power = f"{flops:.2e}".partition("e")
    return f"{float(number):g}e{int(power)}" if flops >= 1000 else f"{flops:g}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


def count_range(values: Sequence[float]) -> str:
    """`1.25 M`, or `1.25 M to 1.31 M` where the values differ."""
    low, high = readable_count(min(values)), readable_count(max(values))
    return low if low == high else f"{low} to {high}"


def ratio_digits(ratio: float) -> str:
    """`1.04`, `5.1`, `64`."""
    text = f"{ratio:.2f}" if ratio < 1.2 else f"{ratio:.1f}"
    return text if ratio < 9.95 else f"{ratio:,.0f}"
