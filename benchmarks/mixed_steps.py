"""Steps whose patches are of two sizes: some regions at p, the others as one coarse token each.

All tokens run through the model in one pass, coarse ones at the middle of what they cover. What a
coarse token holds, and what becomes of its region, is one of

- `matched`: the small image of `steps/buckets.py`, rescaled to its own noise level t', which only
  its tokens are given; the clean estimate is enlarged as there, detail and disagreement kept for
  every region by itself;
- `held`: the same tokens, as context alone: their regions keep the latest clean estimate;
- `noised`: the small image with as much noise added that it is at level t, one draw a run, as in
  methods whose noise all scales share (Fresco; RALU at its switches);
- `plain`: the small image as it is, at level t, which it is not;
- `nearest`: as `matched`, enlarged by repetition (RALU);
- `anchor`: one token at p of the region, another at every step, whose change of the clean estimate
  is drawn out linearly over the tokens that did not run (JiT).

A step is corrected unless told otherwise: between two steps that are wholly at p the same regions
stay at p, and what the first mixed step makes of any token, against the step at p before it, is
taken to be the mixture's doing and fades as there, since tokens at p see other company too.

The velocity is (z - x0) / t, so that z keeps its own noise everywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mixed_model import (
    FAMILY,
    PATCH,
    Part,
    Prompted,
    Regions,
    Rotary,
    Subject,
    detail_energy,
    deviations,
    estimate_change,
    pack,
    token_velocity,
)
from torch import Tensor

from ddit_rt.steps import matched_level

VALUES = ("matched", "held", "noised", "plain", "nearest", "anchor")
SIGNALS = ("third_difference", "energy", "change", "rotating", "random", "oracle")
_AT_LEVEL = ("noised", "plain")
"""Values whose coarse tokens are given the level of the others."""
_ANCHORS = ((0, 0), (1, 1), (0, 1), (1, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """How one step is taken.

    Attributes:
        multiple: m, of the coarse tokens; 1: all at p.
        share: Of the regions, that stay at p.
        signal: By what they are picked; `rotating` takes those that have waited longest, and
            `oracle` those where a whole step at p would change most, which is no plan to follow.
        value: What becomes of the others.
        corrected: Whether what the mixture itself moves is taken off.
    """

    multiple: int = 1
    share: float = 0.0
    signal: str = "third_difference"
    value: str = "matched"
    corrected: bool = True


FINE = Step()


@dataclass(kw_only=True)
class _Memory:
    """What coarse tokens of one size remember of each region.

    Attributes:
        fresh: Whether it ran at p since it was last coarse, `[R]`.
        disagreement: `e` of `steps/buckets.py`, `[R, C p p]`.
        waited: Steps since it ran at p, `[R]`.
        picked: Regions at p and the others, while these are kept.
        own_disagreement: Of the tokens at p, while their regions are kept.
    """

    fresh: Tensor
    disagreement: Tensor
    waited: Tensor
    picked: tuple[Tensor, Tensor] | None = None
    own_disagreement: Tensor | None = None


class Run:
    """One picture in the making.

    Attributes:
        latents: The newest four, newest first, each `[1, C, H, W]`.
        tokens: Image tokens that ran so far.
        aside: Seconds spent on what no plan could do: the oracle.
    """

    def __init__(
        self, subject: Subject, prompt: Prompted, noise: Tensor, sigmas: Tensor, seed: int = 0
    ) -> None:
        """From `noise`, `[1, C, H, W]`, by `sigmas`, `[N + 1]`; `seed` is of drawn regions."""
        self._subject, self._prompt = subject, prompt
        self._sigmas = sigmas
        self._generator = torch.Generator().manual_seed(seed)
        self.latents = [noise]
        self.tokens, self.aside = 0, 0.0
        self._ran_fine = False
        self._estimate = torch.zeros_like(noise)  # of each region when it last ran at p
        self._clean = [self._estimate] * 2  # of the two latest steps
        self._memories: dict[int, _Memory] = {}
        self._tables: dict[float, Tensor] = {}
        text = torch.zeros(prompt.text.shape[1], 3)
        self._text: Rotary = subject.transformer.pos_embed(text)

    def step(self, index: int, how: Step) -> None:
        """Takes a step."""
        latents, level = self.latents[0], self._sigmas[index]
        if how.multiple == 1:
            clean = self._fine(latents, index)
        elif how.value == "anchor":
            clean = self._anchored(latents, index, how)
        else:
            clean = self._coarse(latents, index, how)
        self._clean = [clean, self._clean[0]]
        velocity = (latents - clean) / level
        self.latents.insert(0, latents + (self._sigmas[index + 1] - level) * velocity)
        del self.latents[4:]

    def _fine(self, latents: Tensor, index: int) -> Tensor:
        clean = self._fine_estimate(latents, index)
        self.tokens += self._subject.positions[0].shape[0]
        self._estimate, self._ran_fine = clean, True
        for memory in self._memories.values():
            memory.fresh.fill_(True)
            memory.waited.zero_()
            memory.picked = memory.own_disagreement = None
        return clean

    def _fine_estimate(self, latents: Tensor, index: int) -> Tensor:
        regions = self._subject.regions(2)
        tokens = pack(latents)
        part = Part(count=len(tokens), rows=self._rows(1.0)[index])
        velocity = self._velocity(tokens, [part], self._subject.positions)
        return latents - self._sigmas[index] * regions.unpack(velocity)

    def _coarse(self, latents: Tensor, index: int, how: Step) -> Tensor:
        """The clean estimate of a step of coarse tokens, with some at p."""
        regions, level = self._subject.regions(how.multiple), self._sigmas[index]
        small, small_level, rows = self._small_image(latents, index, how, regions)
        fine, coarse = self._picked(latents, index, how, regions)
        places = regions.tokens[fine].flatten()
        tokens, parts, positions = small, [Part(count=len(small), rows=rows)], regions.small
        if how.share:
            tokens = torch.cat((pack(latents)[places], small[coarse]))
            first = Part(count=len(places), rows=self._rows(1.0)[index])
            parts = [first, Part(count=len(coarse), rows=rows)]
            if how.value in _AT_LEVEL:
                parts = [Part(count=len(tokens), rows=rows)]
            (cos, sin), centres = self._subject.positions, regions.centres
            positions = (
                torch.cat((cos[places], centres[0][coarse])),
                torch.cat((sin[places], centres[1][coarse])),
            )
        self.tokens += len(tokens)
        velocity = self._velocity(tokens, parts, positions)
        clean_fine = tokens[: len(places)] - level * velocity[: len(places)]
        clean_small = tokens[len(places) :] - small_level * velocity[len(places) :]
        change = self._change(clean_small, fine, coarse, level, how)
        if not how.share:
            return self._estimate + self._enlarged(change, how, regions)
        before = pack(self._estimate)
        moved = torch.zeros_like(before)
        moved[places] = self._corrected(clean_fine - before[places], level, how)
        clean_fine = before[places] + moved[places]
        change[fine] = regions.averaged(regions.unpack(moved))[fine]
        clean = pack(self._estimate + self._enlarged(change, how, regions))
        clean[places] = clean_fine
        if not how.corrected:
            before[places] = clean_fine
            self._estimate = regions.unpack(before)
            self._note(places)
        return regions.unpack(clean)

    def _corrected(self, moved: Tensor, level: Tensor, how: Step) -> Tensor:
        """How far tokens at p moved, `[n, C p p]`, without what the mixture itself moved them."""
        if not how.corrected:
            return moved
        memory, fade = self._memory(how.multiple), level.square()
        if memory.own_disagreement is None:
            memory.own_disagreement = moved / fade
        return moved - memory.own_disagreement * fade

    def _small_image(
        self, latents: Tensor, index: int, how: Step, regions: Regions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Coarse tokens `[R, C p p]`, their noise level, and its modulation."""
        maps, level = regions.maps, self._sigmas[index]
        small = maps.down(latents)
        if how.value in _AT_LEVEL:
            if how.value == "noised":
                small = small + level * math.sqrt(1 - maps.deviation**2) * self._shared(regions)
            return pack(small), level, self._rows(1.0)[index]
        scale, own = matched_level(level[None], maps.deviation)
        return pack(small * scale), own, self._rows(maps.deviation)[index]

    def _shared(self, regions: Regions) -> Tensor:
        """The run's noise at the small image's scale."""
        drawn = torch.Generator().manual_seed(regions.multiple)
        channels = self.latents[0].shape[1]
        return torch.randn(1, channels, *regions.maps.small, generator=drawn)

    def _change(
        self, clean: Tensor, fine: Tensor, coarse: Tensor, level: Tensor, how: Step
    ) -> Tensor:
        """How far the small image moved since each region ran at p, `[R, C p p]`.

        Zero at those that run at p now.
        """
        regions, memory = self._subject.regions(how.multiple), self._memory(how.multiple)
        before = pack(regions.maps.down(self._estimate))
        change = torch.zeros_like(before)
        if how.value == "held":
            return change
        change[coarse] = clean - before[coarse]
        fade = level.square()
        first = memory.fresh.clone()
        first[fine] = False
        memory.disagreement = torch.where(first[:, None], change / fade, memory.disagreement)
        memory.fresh &= ~first
        change[coarse] -= memory.disagreement[coarse] * fade
        return change

    @staticmethod
    def _enlarged(change: Tensor, how: Step, regions: Regions) -> Tensor:
        small = regions.unpack_small(change)
        if how.value == "nearest":
            rows = small.repeat_interleave(how.multiple, dim=-2)
            return rows.repeat_interleave(how.multiple, dim=-1)
        return regions.maps.up(small)

    def _anchored(self, latents: Tensor, index: int, how: Step) -> Tensor:
        """The clean estimate of a step in which one token at p stands for each coarse region."""
        regions, level = self._subject.regions(how.multiple), self._sigmas[index]
        turn = 0 if how.corrected else index % 4
        row, column = (place * how.multiple // 2 for place in _ANCHORS[turn])
        fine, coarse = self._picked(latents, index, how, regions)
        anchors = regions.tokens[:, row * how.multiple + column]
        places = torch.cat((regions.tokens[fine].flatten(), anchors[coarse]))
        tokens = pack(latents)[places]
        self.tokens += len(tokens)
        part = Part(count=len(tokens), rows=self._rows(1.0)[index])
        cos, sin = self._subject.positions
        positions = (cos[places], sin[places])
        clean = tokens - level * self._velocity(tokens, [part], positions)
        before = pack(self._estimate)
        clean = before[places] + self._corrected(clean - before[places], level, how)
        moved = before.clone()
        moved[places] = clean
        change = moved[anchors] - before[anchors]
        drawn_out = before + regions.spread(change, (row, column))
        drawn_out[places] = clean
        found = regions.unpack(drawn_out)
        if not how.corrected:
            self._estimate = found
            self._note(regions.tokens[fine].flatten())
        return found

    def _picked(
        self, latents: Tensor, index: int, how: Step, regions: Regions
    ) -> tuple[Tensor, Tensor]:
        """Regions that run at p, and the others, by their scores."""
        kept = round(how.share * regions.count)
        if not kept:
            everything = torch.arange(regions.count)
            return everything[:0], everything
        memory = self._memory(how.multiple)
        if memory.picked is None or not how.corrected:
            order = self._scores(latents, index, how, regions).argsort(descending=True)
            memory.picked = order[:kept], order[kept:]
        return memory.picked

    def _scores(self, latents: Tensor, index: int, how: Step, regions: Regions) -> Tensor:
        drawn = torch.rand(regions.count, generator=self._generator)
        if how.signal == "random" or len(self.latents) == 1:
            return drawn
        if how.signal == "rotating":
            return self._memory(how.multiple).waited + drawn
        if how.signal == "energy":
            return detail_energy(regions, self._estimate)
        if how.signal == "change":
            return estimate_change(regions, *self._clean)
        if how.signal == "oracle":
            started = time.process_time()
            whole = self._fine_estimate(latents, index)
            self.aside += time.process_time() - started
            return estimate_change(regions, whole, self._clean[0])
        return deviations(regions, self.latents)

    def _note(self, places: Tensor) -> None:
        """Regions of which a token has just run at p, in the memory of every size."""
        ran = torch.zeros(self._subject.positions[0].shape[0], dtype=torch.bool)
        ran[places] = True
        for multiple, memory in self._memories.items():
            own = ran[self._subject.regions(multiple).tokens].any(1)
            memory.fresh |= own
            memory.waited = torch.where(own, 0, memory.waited + 1)

    def _memory(self, multiple: int) -> _Memory:
        if multiple not in self._memories:
            count = self._subject.regions(multiple).count
            # As after a step at p, if there was one.
            fresh = torch.full((count,), self._ran_fine)
            features = self.latents[0].shape[1] * PATCH**2
            self._memories[multiple] = _Memory(
                fresh=fresh,
                disagreement=torch.zeros(count, features),
                waited=torch.zeros(count),
            )
        return self._memories[multiple]

    def _rows(self, deviation: float) -> Tensor:
        """Modulation of every step, `[N, P, m]`, at the level of noise reduced to `deviation`."""
        if deviation not in self._tables:
            levels = self._sigmas[:-1]
            if deviation != 1:
                _, levels = matched_level(levels, deviation)
            self._tables[deviation] = FAMILY.embed_time(
                self._subject.transformer, levels, {"pooled_projections": self._prompt.pooled}
            )
        return self._tables[deviation]

    def _velocity(self, tokens: Tensor, parts: Sequence[Part], positions: Rotary) -> Tensor:
        """Velocity of tokens, `[n, C p p]`."""
        cos, sin = (torch.cat(pair) for pair in zip(self._text, positions, strict=True))
        transformer, text = self._subject.transformer, self._prompt.text
        passes = tokens.expand(len(text), *tokens.shape)
        found = token_velocity(transformer, passes, text, parts, (cos, sin))
        if len(found) == 1:
            return found[0]
        joined: Tensor = found[1] + self._prompt.guidance * (found[0] - found[1])
        return joined
