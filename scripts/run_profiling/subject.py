"""What gets profiled: the denoising loop of an engine, on a prepared request."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ddit_rt
from ddit_rt.artifact import read_manifest
from ddit_rt.cli.models import EMBEDDED, embedded_defaults, load_pipeline
from ddit_rt.cli.policies import choose_policy
from ddit_rt.loop import RunTrace
from ddit_rt.models import family_of
from ddit_rt.policies import PatchPolicy
from ddit_rt.steps import StepModel


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An engine and one request, encoded: what is left is the loop.

    Attributes:
        engine: The engine, with ranges for profilers.
        model: Its model, for counts of what a step must do.
        latents: Initial noise, `[B, C, H, W]`.
        conditioning: The prompt, as `Engine.denoise` takes it.
        steps: Denoising steps.
        policy: Patch policy.
        prompts: The prompts.
    """

    engine: ddit_rt.Engine
    model: StepModel
    latents: Tensor
    conditioning: dict[str, Tensor]
    steps: int
    policy: PatchPolicy
    prompts: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.transformer.parameters()).device

    @property
    def text_tokens(self) -> int:
        """Text tokens per sample."""
        text = self.model.family.embed_text(self.model.transformer, self.conditioning)
        return text.shape[1]

    def run(self) -> RunTrace:
        """Denoises once."""
        arguments: dict[str, Any] = {"patch_policy": self.policy, **self.conditioning}
        self.engine.denoise(self.latents, num_inference_steps=self.steps, **arguments)
        assert self.engine.last_trace is not None, "a run that returned has a trace"
        return self.engine.last_trace


@torch.no_grad()
def load_subject(args: argparse.Namespace) -> Subject:
    """Loads the artifact, or compiles the embedded model, and encodes the request.

    Args:
        args: The command line of `profile.py`.

    Raises:
        ValueError: Options that do not fit together, or a model that cannot be run.
        ArtifactError: See `ddit_rt.load`.
    """
    engine = _embedded_engine(args) if args.artifact == EMBEDDED else _loaded_engine(args)
    engine.annotate = True
    pipeline = engine.pipeline
    model = StepModel(
        family=family_of(pipeline.transformer), transformer=pipeline.transformer, base={}
    )
    prompts = tuple(args.prompt)
    request = {
        **engine.artifact.manifest.pipeline_defaults,
        **_given(args),
        "prompt": list(prompts),
        "generator": torch.Generator().manual_seed(args.seed),
    }
    call = model.family.prepare(pipeline, copy.deepcopy(pipeline.scheduler), request)
    return Subject(
        engine=engine,
        model=model,
        latents=call.latents,
        conditioning=call.conditioning,
        steps=call.num_inference_steps,
        policy=choose_policy(args.policy, args.tau, args.rho, engine.default_policy),
        prompts=prompts,
    )


def _embedded_engine(args: argparse.Namespace) -> ddit_rt.Engine:
    from ddit_rt.lab.demo.plans import DEMO_POLICY

    if args.model not in (None, EMBEDDED):
        raise ValueError(
            f"got ARTIFACT {EMBEDDED} and --model {args.model}; {EMBEDDED} is the model inside the "
            "package: leave --model out, or name an artifact of your model"
        )
    pipeline = load_pipeline(EMBEDDED, args.dtype, args.device)
    size = embedded_defaults(EMBEDDED)
    return ddit_rt.compile(
        pipeline,
        height=size["height"],
        width=size["width"],
        patch_policy=DEMO_POLICY,
        backend=args.backend,
    )


def _loaded_engine(args: argparse.Namespace) -> ddit_rt.Engine:
    if args.model is None:
        raise ValueError(
            f"got the artifact {args.artifact} without --model; an artifact holds no weights: name "
            "the model that it was compiled from"
        )
    # Before the model: a missing artifact should not cost the minutes of loading one.
    manifest = read_manifest(args.artifact)
    dtype = args.dtype or manifest.dtype
    pipeline = load_pipeline(args.model, dtype, manifest.environment.device)
    return ddit_rt.load(args.artifact, pipeline, trust_code=args.trust_code)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call that were given, and those of the embedded model."""
    given = {
        "num_inference_steps": args.steps,
        "height": args.height,
        "width": args.width,
        "max_sequence_length": args.max_sequence_length,
    }
    given = {name: value for name, value in given.items() if value is not None}
    embedded = args.model == EMBEDDED or args.artifact == EMBEDDED
    text = embedded_defaults(EMBEDDED)["max_sequence_length"] if embedded else None
    return given if text is None else {"max_sequence_length": text, **given}
