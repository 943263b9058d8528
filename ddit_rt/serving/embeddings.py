"""Prompt embeddings that are kept: a prompt that came before is not encoded again.

It stands in the place of the pipeline's `encode_prompt`, so it serves every pipeline. What enters
the key is all that enters the embeddings: every argument of that call, and the LoRA that is fused
at the time, which may change the text encoder. A batch is encoded prompt by prompt, so that an
image's embeddings are the same bits whoever shares its run.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddit_rt.serving.metrics import Metrics

_PLAIN = (str, int, float, bool, type(None), torch.device, torch.dtype)


class Embeddings:
    """An LRU by bytes; used in the worker's thread alone.

    Attributes:
        held: Bytes of the tensors that are kept.
    """

    def __init__(
        self, pipeline: Any, most: int, metrics: Metrics, state: Callable[[], Hashable]
    ) -> None:
        """Puts it before the pipeline's `encode_prompt`.

        Args:
            pipeline: The pipeline.
            most: Bytes to keep.
            metrics: Where look-ups are counted.
            state: What of the text encoder may change from request to request.
        """
        self.held = 0
        self._own = pipeline.encode_prompt
        self._most = most
        self._metrics = metrics
        self._state = state
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        # The name of its module stays, by which an engine knows the pipeline's own.
        pipeline.encode_prompt = functools.wraps(self._own)(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's `encode_prompt`."""
        prompts = kwargs.get("prompt", args[0] if args else None)
        if not isinstance(prompts, list) or len(prompts) == 1:
            return self._look_up(args, kwargs)
        singles = [
            self._look_up(_single(args, place, len(prompts)), _single(kwargs, place, len(prompts)))
            for place in range(len(prompts))
        ]
        joined = _join(singles)
        return self._look_up(args, kwargs) if joined is None else joined

    def _look_up(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
        key = _key((tuple(args), sorted(kwargs.items()), self._state()))
        if key is not None and key in self._kept:
            self._metrics.embeddings.labels("hit").inc()
            self._kept.move_to_end(key)
            return self._kept[key][0]
        self._metrics.embeddings.labels("miss").inc()
        found = self._own(*args, **kwargs)
        size = _bytes(found)
        if key is not None and size <= self._most:
            self._kept[key] = found, size
            self.held += size
            while self.held > self._most:
                self.held -= self._kept.popitem(last=False)[1][1]
        return found


def _key(value: Any) -> Hashable | None:
    """A value that stands for what was given; None where something has no such value."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (list, tuple)):
        parts = tuple(map(_key, value))
        return None if None in parts else (type(value), parts)
    return None


def _single(given: Any, place: int, count: int) -> Any:
    """Arguments with every list of a text for each prompt cut to one."""

    def cut(one: Any) -> Any:
        return [one[place]] if isinstance(one, list) and len(one) == count else one

    if isinstance(given, Mapping):
        return {name: cut(one) for name, one in given.items()}
    return tuple(map(cut, given))


def _join(parts: list[Any]) -> Any | None:
    """What one call for all prompts would have given; None where that is not plain to see.

    A tensor of one row is a prompt's; one of more is for all, and the same for each.
    """
    first = parts[0]
    if isinstance(first, tuple):
        columns = [_join(list(column)) for column in zip(*parts, strict=True)]
        whole = all(c is not None or f is None for c, f in zip(columns, first, strict=True))
        return tuple(columns) if whole else None
    if isinstance(first, list):
        return [one for part in parts for one in part]
    if not isinstance(first, Tensor) or any(part.shape != first.shape for part in parts):
        return None
    if first.shape[0] == 1:
        return torch.cat(parts)
    return first if all(torch.equal(part, first) for part in parts) else None


def _bytes(found: Any) -> int:
    if isinstance(found, (list, tuple)):
        return sum(map(_bytes, found))
    return found.nbytes if isinstance(found, Tensor) else 0
