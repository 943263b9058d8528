"""Mixed steps: some regions of the image at p, and one token at p for each of the others.

A region is the square of s x s tokens that one coarse token would cover. A share of them run whole,
those whose clean estimate moves most; of every other region one token runs, its anchor. So all
tokens of a mixed step are tokens at p, at their own places and at the noise level of the step: the
model's embedding, blocks, positions and modulation are those of a step at p, over fewer tokens.

    x0 = x0_fine + c

x0_fine is the clean estimate of the latest step at p (zero before there is one). For a token that
ran, c = z - t v - x0_fine - e; between the anchors c is drawn out bilinearly, as in JiT (arXiv
2603.10744). e is what the mixture itself moves a token, since it attends to fewer others than the
model was trained with: all that the first mixed step after a step at p finds, when both should
still agree. It fades as (t / t_first)^2, like that of a whole coarse step (`buckets.py`); so that
it stays comparable, the same regions run whole until the next step at p.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddit_rt import ops
from ddit_rt.models.base import Grid
from ddit_rt.steps.base import Detail, RunContext, StepInputs, StepModel, at_step
from ddit_rt.steps.buckets import PassesBucket
from ddit_rt.steps.passes import Passes


class MixedBucket(PassesBucket):
    """The training-free bucket at s times p in which a share of the regions stays at p."""

    def __init__(
        self, model: StepModel, context: RunContext, multiple: int, fine_share: float
    ) -> None:
        """Prepares a run.

        Args:
            model: A model that tells its layers.
            context: The run, with a detail; s times p divides its latents.
            multiple: s.
            fine_share: Share of the regions that stay at p, above 0 and below 1.
        """
        assert context.detail is not None, "a mixed step changes what the latest step at p found"
        self.multiple = multiple
        self._model, self._context, self._detail = model, context, context.detail
        grid = model.grid(context.height, context.width, frames=context.frames)
        if multiple not in self._detail.corrections:
            regions = Regions(grid, multiple, model.device)
            self._detail.corrections[multiple] = _Selection(
                model, self._detail, regions, math.ceil(fine_share * regions.count)
            )
        self._selection: _Selection = self._detail.corrections[multiple]
        self.tokens = len(self._selection.places)
        self._run = self._passes = Passes(
            model, context, grid, context.timesteps, places=self._selection.places
        )

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """See `Bucket.velocity`."""
        model, selection, sigma = self._model, self._selection, at_step(self._context.sigmas, step)
        places = selection.choose()
        given = ops.pack(latents, model.patch_size).index_select(1, places)
        hidden = model.layers.embed_tokens(model.transformer, given.to(model.dtype))
        found = self._run(hidden, step, reuse=reuse, guided=guided)
        ran = _tokens(model, latents).index_select(1, places)
        clean = torch.addcmul(ran, found.float(), sigma, value=-1)
        change = model.unpack(
            selection.drawn_out(clean, sigma),
            self._context.height,
            self._context.width,
            self._context.frames,
        )
        return (latents - self._detail.estimate - change) / sigma

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        return (*self._passes.tensors(), *self.state())

    def state(self) -> tuple[Tensor, ...]:
        """See `Bucket.state`."""
        return self._selection.tensors()

    def refresh(self, step: int, now: StepInputs) -> None:
        """See `Bucket.refresh`."""
        self._context.sigmas[step].copy_(now.sigma)
        self._passes.refresh(step, now.timestep, now.conditioning)


def _tokens(model: StepModel, latents: Tensor) -> Tensor:
    """Latents as tokens at p, ordered as the de-embedding's: `[B, n, C p p]`."""
    return ops.pack(latents, model.patch_size, channels_last=model.family.channels_last)


class Regions:
    """The squares of s x s tokens of a grid, by frame, row and column.

    Attributes:
        tokens: Tokens of each, row by row, `[R, s s]`, int64.
        anchors: One in the middle of each, `[R]`.
    """

    def __init__(self, grid: Grid, multiple: int, device: torch.device) -> None:
        """Of a grid whose rows and columns s divides."""
        rows, columns = grid.height // multiple, grid.width // multiple
        self._shape = (grid.frames, rows, columns)
        places = torch.arange(grid.tokens, dtype=torch.int64, device=device)
        squares = places.reshape(grid.frames, rows, multiple, columns, multiple).transpose(2, 3)
        self.tokens = squares.reshape(-1, multiple**2)
        middle = multiple // 2
        self.anchors = self.tokens[:, middle * multiple + middle].contiguous()
        self._rows, self._columns = (
            _between(count, multiple, middle).to(device) for count in (rows, columns)
        )

    @property
    def count(self) -> int:
        """R."""
        return len(self.tokens)

    def drawn_out(self, values: Tensor) -> Tensor:
        """Values of the anchors, `[B, R, f]`, drawn out to all tokens, `[B, n, f]`.

        Bilinear between the anchors, and constant beyond the outermost.
        """
        batch, _, features = values.shape
        frames, rows, columns = self._shape
        wide = self._columns @ values.reshape(-1, columns, features)
        wide = wide.reshape(batch * frames, rows, -1)
        return (self._rows @ wide).reshape(batch, -1, features)


@torch.inference_mode(False)
def _between(count: int, multiple: int, place: int) -> Tensor:
    """Linear interpolation from `count` anchors to the tokens of an axis, `[count s, count]`."""
    tokens = torch.arange(count * multiple, dtype=torch.float32, device="cpu")
    anchors = torch.arange(count, dtype=torch.float32, device="cpu")
    at = ((tokens - place) / multiple).clamp(0, count - 1)
    return (1 - (at[:, None] - anchors).abs()).clamp(min=0)


def movement(moved: Tensor, edge: int) -> Tensor:
    """By which regions are picked: how far the latest step at p moved their clean estimate.

    Args:
        moved: Change of the estimate, `[B, C, H, W]` or `[B, C, F, H, W]`.
        edge: Side of a region, in latent pixels.

    Returns:
        Mean squares, the largest of any sample, `[R]`.
    """
    return ops.pack(moved, edge).square().mean(-1).amax(0)


class _Selection:
    """Which tokens run, from a step at p to the next, and how the mixture moves each.

    Attributes:
        places: Those tokens, `[n]`, int64: of whole regions, then anchors.
    """

    def __init__(self, model: StepModel, detail: Detail, regions: Regions, whole: int) -> None:
        """`whole` regions run whole."""
        self._model, self._detail, self._regions, self._whole = model, detail, regions, whole
        self._edge = model.patch_size * math.isqrt(regions.tokens.shape[1])
        # Before the first step at p nothing has moved, and no disagreement is known.
        self._serial = torch.zeros_like(detail.serial)
        self.places = self._by_movement()
        tokens = _tokens(model, detail.estimate)
        self._disagreement = torch.zeros_like(tokens[:, : len(self.places)])

    def choose(self) -> Tensor:
        """The tokens that run now; others only in the first mixed step after a step at p."""
        # In place: what lives across steps must lie where a captured graph finds it again.
        is_first = self._detail.serial != self._serial
        self.places.copy_(torch.where(is_first, self._by_movement(), self.places))
        return self.places

    def _by_movement(self) -> Tensor:
        """The tokens of the regions that moved most, then the anchors of the others."""
        assert self._detail.moved is not None, "a run with mixed steps keeps what moved"
        order = movement(self._detail.moved, self._edge).argsort(descending=True, stable=True)
        whole = self._regions.tokens.index_select(0, order[: self._whole]).flatten()
        return torch.cat((whole, self._regions.anchors.index_select(0, order[self._whole :])))

    def drawn_out(self, clean: Tensor, sigma: Tensor) -> Tensor:
        """What changed since the latest step at p, of all tokens: `[B, n, C p p]` to `[B, N, ...]`.

        Args:
            clean: Clean estimate of the tokens that ran.
            sigma: Noise level of the step.
        """
        before = _tokens(self._model, self._detail.estimate)
        change, fade = clean - before.index_select(1, self.places), sigma.square()
        is_first = self._detail.serial != self._serial
        self._disagreement.copy_(torch.where(is_first, change / fade, self._disagreement))
        self._serial.copy_(self._detail.serial)
        change = change - self._disagreement * fade
        known = torch.zeros_like(before).index_copy_(1, self.places, change)
        between = self._regions.drawn_out(known.index_select(1, self._regions.anchors))
        return between.index_copy_(1, self.places, change)

    def tensors(self) -> tuple[Tensor, ...]:
        """What it keeps from step to step, as `Bucket.tensors` gives it."""
        return (self._serial, self.places, self._disagreement)
