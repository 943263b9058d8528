"""Checks of what callers pass: one sentence says what came, what was expected, and what to do.

Each takes the argument's name and value, and gives the value as plain Python. Where a number is
taken, so are numpy's scalars and tensors without dimensions; truth values are no numbers, and
numbers no truth values. Imports nothing heavy.
"""

from __future__ import annotations

import difflib
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

_LARGEST = 3.4028234663852886e38
"""Largest number of float32, in which the loop computes: beyond it everything is infinite."""

_SHOWN = 80
"""Characters of a value that a message shows."""


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """A whole number within bounds, which are inclusive.

    Raises:
        TypeError: No whole number; a float is none, whatever its value.
        ValueError: Out of bounds.
    """
    number = _whole(value)
    expected = f"a whole number{bounds(least, most)}"
    if number is None:
        real = _real(value)
        same = real is not None and math.isfinite(real) and real == int(real)
        raise TypeError(got(name, value, expected, f"pass {int(real or 0)}" if same else ""))
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(got(name, value, expected))
    return number


def number(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    open_low: bool = False,
) -> float:
    """A number within bounds that is finite in float32.

    Args:
        name: The argument's name.
        value: What came.
        low: Smallest.
        high: Largest.
        open_low: Whether `low` itself is out of bounds.

    Raises:
        TypeError: No number.
        ValueError: NaN, infinite or out of bounds.
    """
    real = _real(value)
    expected = f"a finite number{bounds(low, high, open_low=open_low)}"
    if real is None:
        raise TypeError(got(name, value, expected))
    below = low is not None and (real < low or (open_low and real == low))
    if not abs(real) <= _LARGEST or below or (high is not None and real > high):
        raise ValueError(got(name, value, expected))
    return real


def numbers(name: str, value: Any, *, least: int = 1) -> tuple[float, ...]:
    """A sequence of finite numbers, of at least so many; arrays and tensors of one dimension too.

    Raises:
        TypeError: No such sequence.
        ValueError: Too short, or a value that is NaN or infinite.
    """
    values = items(name, value, "a sequence of numbers")
    if len(values) < least:
        raise ValueError(got(name, value, f"at least {least} number{'s' * (least > 1)}"))
    return tuple(number(f"{name}[{place}]", item) for place, item in enumerate(values))


def pair(name: str, value: Any, check: Callable[[str, Any], _T], expected: str) -> tuple[_T, _T]:
    """Two values, each checked by a check of its own.

    Raises:
        ValueError: No sequence of two; besides what the check raises.
    """
    try:
        values = items(name, value, expected)
    except TypeError:
        values = ()
    if len(values) != 2:
        raise ValueError(got(name, value, expected))
    return check(f"{name}[0]", values[0]), check(f"{name}[1]", values[1])


def items(name: str, value: Any, expected: str) -> Sequence[Any]:
    """The items of a sequence that is no text; arrays and tensors of one dimension are sequences.

    Raises:
        TypeError: Something else.
    """
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist") and not _is_meta(value):
        listed: list[Any] = value.tolist()
        return listed
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return value
    raise TypeError(got(name, value, expected))


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: Something else, whatever its truth value.
    """
    if isinstance(value, bool):
        return value
    if "bool" in str(getattr(value, "dtype", "")) and getattr(value, "ndim", None) == 0:
        return bool(value)
    raise TypeError(got(name, value, "True or False"))


def choice(name: str, value: Any, options: Sequence[str]) -> str:
    """One of some names.

    Raises:
        TypeError: No text.
        ValueError: Another name; the message says which is closest.
    """
    listed = f"one of {', '.join(map(repr, options))}"
    if not isinstance(value, str):
        raise TypeError(got(name, value, listed))
    if value not in options:
        raise ValueError(got(name, value, listed, did_you_mean(value, options)))
    return value


def path(name: str, value: Any) -> Path:
    """A path.

    Raises:
        TypeError: Neither text nor a path.
        ValueError: Empty, or no path that a file system could have.
    """
    expected = "a path, as text or pathlib.Path"
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(got(name, value, expected))
    text = os.fspath(value)
    if not text or "\0" in text:
        raise ValueError(got(name, value, expected))
    return Path(text)


def instance(name: str, value: Any, kind: type[_T], expected: str) -> _T:
    """An object of a class.

    Raises:
        TypeError: Another object, or the class itself.
    """
    if isinstance(value, kind):
        return value
    is_class = isinstance(value, type) and issubclass(value, kind)
    raise TypeError(got(name, value, expected, "call the class" if is_class else ""))


def optional(check: Callable[..., _T], name: str, value: Any, *bounds: Any) -> _T | None:
    """None for None, else what a check returns."""
    return None if value is None else check(name, value, *bounds)


def settle(record: Any, **values: Any) -> None:
    """Sets checked fields of a frozen dataclass, in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


def text_lines(path: str | Path) -> list[str]:
    """Lines of a text file, without those that are blank.

    Raises:
        OSError, ValueError: No such file, or none that can be read as UTF-8 text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file: {path}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text; expected a text file") from error
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from error
    return [line.strip() for line in lines if line.strip()]


def got(name: str, value: Any, expected: str, advice: str = "") -> str:
    """The sentence that says what came, what was expected, and what to do."""
    return f"got {name}={show(value)}; expected {expected}" + (f": {advice}" if advice else "")


def show(value: Any) -> str:
    """A value in a few characters; of arrays and tensors the shape and data type."""
    if getattr(value, "ndim", 0) and hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{type(value).__name__} of shape {list(value.shape)}, {value.dtype}>"
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def bounds(low: float | None, high: float | None, *, open_low: bool = False) -> str:
    """How a message says the bounds of a number."""
    if low is not None and high is not None:
        return f" {'above' if open_low else 'from'} {low} {'and up ' * open_low}to {high}"
    if low is not None:
        return f" above {low}" if open_low else f" of at least {low}"
    return "" if high is None else f" of at most {high}"


def did_you_mean(text: str, options: Iterable[str]) -> str:
    """`"did you mean 'fine'?"`; empty where nothing is close."""
    close = difflib.get_close_matches(text, list(options), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], owner: str) -> None:
    """Refuses names that would be ignored.

    Raises:
        ValueError: Some names are not known; the message lists those that are.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        advice = did_you_mean(unknown[0], known)
        raise ValueError(
            f"unknown arguments {unknown}; {owner} takes {list(known)}"
            + (f": {advice}" if advice else "")
        )


def _whole(value: Any) -> int | None:
    if isinstance(value, bool) or (hasattr(value, "dtype") and not _scalar(value, "int")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _real(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if not (_scalar(value, "int", "float") if hasattr(value, "dtype") else isinstance(value, Real)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _scalar(value: Any, *kinds: str) -> bool:
    """Whether a number of numpy, or an array or tensor without dimensions, is of some kinds."""
    without_dimensions = getattr(value, "ndim", 0) == 0 and not _is_meta(value)
    return without_dimensions and any(kind in str(value.dtype) for kind in kinds)


def _is_meta(value: Any) -> bool:
    """Whether a tensor has no data."""
    return bool(getattr(value, "is_meta", False))
