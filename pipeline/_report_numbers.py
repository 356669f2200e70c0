"""How a report's numbers, dates and settings are written; None and NaN are "not measured"."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "DASH",
    "FILTERS",
    "MINUS",
    "TIMES",
    "as_given",
    "factor",
    "finite",
    "megabytes",
    "number",
    "part",
    "percent",
    "setting",
]

DASH = "–"
MINUS = "−"
TIMES = "×"
# A list of all weights is a page of braces.
_LONGEST_SETTING = 600
_NO_BREAK = "\u00a0"


def finite(value: Any) -> float | None:
    """The value as a float, or None where there is nothing to draw or to divide by."""
    if value is None or not math.isfinite(value):
        return None
    return float(value)


def _unmeasured(value: Any) -> str | None:
    """How a value that no format fits is shown; None for an ordinary number."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return None


def number(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits: 526, 14.0, 0.0213, 1.2e-5, 1,234,567."""
    special = _unmeasured(value)
    if special is not None:
        return special
    if value == 0:
        return "0"
    size = abs(value)
    # Rounded first, so that 999.96 with four digits is 1,000 and not 1000.0.
    exponent = int(f"{size:.{digits - 1}e}".partition("e")[2])
    if exponent < -3 or exponent > 8:
        mantissa, _, power = f"{size:.{max(digits - 2, 1)}e}".partition("e")
        text = f"{mantissa}e{int(power)}"
    else:
        text = f"{size:,.{max(digits - 1 - exponent, 0)}f}"
    return f"{MINUS}{text}" if value < 0 else text


def as_given(value: Any, digits: int = 6) -> str:
    """A bound or setting as it was given: 10, 0.05, 1e-5."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return setting(value)
    special = _unmeasured(value)
    if special is not None:
        return special
    text = re.sub(r"e(-?)\+?0*(?=\d)", r"e\1", f"{value:.{digits}g}")
    return f"{MINUS}{text[1:]}" if text.startswith("-") else text


def _cosine(value: Any) -> str:
    """A cosine similarity; rounding never turns 0.9999996 into 1."""
    special = _unmeasured(value)
    if special is not None:
        return special
    return "1.000000" if value >= 1 else f"{math.floor(value * 1e6) / 1e6:.6f}".replace("-", MINUS)


def megabytes(value: Any) -> str:
    """Megabytes (10^6 bytes) with a unit that fits: 845 kB, 98.1 MB, 1.24 GB."""
    special = _unmeasured(value)
    if special is not None:
        return special
    for unit, scale in (("GB", 1e-3), ("MB", 1.0), ("kB", 1e3)):
        if abs(value) * scale >= 0.9995:
            return f"{number(value * scale)}{_NO_BREAK}{unit}"
    return f"{round(value * 1e6)}{_NO_BREAK}bytes"


def _bytes(value: Any) -> str:
    return megabytes(None if value is None else value / 1e6)


def _count(value: Any) -> str:
    return _unmeasured(value) or f"{value:,}"


def _large(value: Any) -> str:
    """A count of parameters: 134.5 M, 1.240 B."""
    special = _unmeasured(value)
    if special is not None:
        return special
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{number(value / scale, 4)}{_NO_BREAK}{unit}"
    return str(value)


def percent(share: Any) -> str:
    """A share of one in percent; rounding never makes it whole."""
    special = _unmeasured(share)
    if special is not None:
        return special
    if 0.9995 <= share < 1:
        return f">{_NO_BREAK}99.9{_NO_BREAK}%"
    return f"{share * 100:.1f}{_NO_BREAK}%"


def _change(percent: Any) -> str:
    """A change in percent, with its sign."""
    special = _unmeasured(percent)
    if special is not None:
        return special
    text = f"{abs(percent):,.1f}{_NO_BREAK}%"
    return text if text.startswith("0.0") else f"{'+' if percent > 0 else MINUS}{text}"


def _seconds(value: Any) -> str:
    special = _unmeasured(value)
    if special is not None:
        return special
    if value < 1:
        return f"{value:.2f}{_NO_BREAK}s"
    if value < 59.95:
        return f"{value:.1f}{_NO_BREAK}s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes}{_NO_BREAK}min{_NO_BREAK}{seconds:02}{_NO_BREAK}s"


def factor(ratio: float) -> str:
    """How many times one thing is the other: 1.25×, 4.0×, 130×."""
    return f"{ratio:.2f}{TIMES}" if ratio < 1.95 else f"{number(ratio, 2 if ratio < 99.5 else 3)}{TIMES}"


def _range(interval: Any) -> str:
    """``low`` to ``high`` of a measurement."""
    if interval is None or (finite(interval["low"]) is None and finite(interval["high"]) is None):
        return ""
    return f"{number(interval['low'])} to {number(interval['high'])}"


def part(mapping: Any, key: str) -> Any:
    """A value of a part that may not have been measured."""
    return None if mapping is None else mapping[key]


def _date(text: str) -> str:
    text = str(text)
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d(?:\.\d+)?(?:Z|\+00:00)", text)
    return f"{match[1]} {match[2]} UTC" if match else text


def _provider(name: str) -> str:
    return name.removesuffix("ExecutionProvider") or name


def _json_safe(value: Any) -> Any:
    """The value with tuples as lists and what JSON cannot spell (NaN, infinities, paths) as text."""
    if isinstance(value, Mapping):
        return {str(k): _json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json_safe(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else _unmeasured(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _pretty(value: Any) -> str:
    return json.dumps(_json_safe(value), indent=2, ensure_ascii=False)


def setting(value: Any) -> str:
    """A parameter of a pass or a detail that it reported, on one line; of what is long, how much there is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return DASH
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return as_given(value)
    text = json.dumps(_json_safe(value), ensure_ascii=False)
    return text if len(text) <= _LONGEST_SETTING else f"{len(value)} entries, in report.json"


FILTERS: Mapping[str, Callable[..., str]] = {
    "bytes": _bytes,
    "change": _change,
    "cosine": _cosine,
    "count": _count,
    "date": _date,
    "large": _large,
    "megabytes": megabytes,
    "number": number,
    "part": part,
    "percent": percent,
    "plain": as_given,
    "pretty": _pretty,
    "provider": _provider,
    "range": _range,
    "seconds": _seconds,
    "setting": setting,
}
