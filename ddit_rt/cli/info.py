"""`ddit-rt info`: what an artifact holds, or what can be run of a model. Executes no artifact."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.info_model import OPTIONS, add_model_arguments, is_model, run_model, size_text
from ddit_rt.sources import MODEL_HELP, load_pipeline

if TYPE_CHECKING:
    from ddit_rt.artifact import Artifact, Manifest

_MIB = 2**20


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "artifact",
        type=Path,
        metavar="ARTIFACT",
        help="what compile wrote; or a diffusers folder, of a pipeline or of a transformer, to "
        "see whether it can be run",
    )
    parser.add_argument(
        "--model",
        help=f"of an artifact: also check against this model, and count its memory: {MODEL_HELP}",
    )
    add_model_arguments(parser)


def _run(args: argparse.Namespace) -> Outcome:
    if is_model(args.artifact):
        return run_model(args)
    if given := [option for option in OPTIONS if getattr(args, option) is not None]:
        raise ValueError(
            f"got {', '.join('--' + name.replace('_', '-') for name in given)} for an artifact; "
            "they say what to count of a diffusers folder: leave them out"
        )
    from ddit_rt.artifact import is_trusted, mismatches, open_artifact
    from ddit_rt.engine.memory import memory_of
    from ddit_rt.policies import DDiTPolicy, NoCache

    # Verifies hash sums; trust matters to loading code, and none is loaded here.
    artifact = open_artifact(args.artifact, trust_code=True)
    manifest = artifact.manifest
    memory: dict[str, Any] = {
        "packages_bytes": sum(entry.bytes for entry in manifest.packages.values()),
        "files_bytes": sum(entry.bytes for entry in manifest.files.values()),
    }
    if args.model is None:
        problems = _machine_mismatches(manifest)
    else:
        pipeline = load_pipeline(args.model, manifest.dtype)
        problems = mismatches(manifest, pipeline.transformer)
        if not problems:
            memory |= asdict(memory_of(artifact, pipeline))
    data = {
        "artifact": str(args.artifact),
        "digest": manifest.digest,
        "trusted": is_trusted(manifest.digest),
        "fits": not problems,
        "mismatches": problems,
        "checked_against": "machine" if args.model is None else "machine and model",
        "default_policy": manifest.policy or DDiTPolicy().to_dict(),
        "default_step_cache": manifest.step_cache or NoCache().to_dict(),
        "memory": memory,
        "attention": {name: list(_attention(artifact, name)) for name in manifest.packages},
        "manifest": asdict(manifest),
    }
    return Outcome(data=data, text=_text(data))


def _attention(artifact: Artifact, package: str) -> tuple[str, ...]:
    """Attention kernels that a package calls; none where it is older than their record."""
    from ddit_rt.blocks import read_info

    assert artifact.directory is not None, "an opened artifact has a folder"
    return read_info(artifact.directory / package).attention


def _machine_mismatches(manifest: Manifest) -> list[str]:
    import torch

    from ddit_rt.artifact import Environment

    wants_cuda = manifest.environment.device == "cuda" and torch.cuda.is_available()
    device = torch.device("cuda" if wants_cuda else "cpu")
    return manifest.environment.mismatches(Environment.current(device))


def _text(data: dict[str, Any]) -> str:
    manifest, memory = data["manifest"], data["memory"]
    built = manifest["environment"]
    buckets = ", ".join(f"{entry['patch']} ({entry['method']})" for entry in manifest["buckets"])
    ranges = ", ".join(
        f"{name} {low} to {high}" for name, (low, high) in manifest["ranges"].items()
    )
    defaults = ", ".join(f"{k}={v}" for k, v in manifest["pipeline_defaults"].items()) or "none"
    lines = [
        f"{data['artifact']}  (digest {data['digest'][:16]})",
        f"  model        {manifest['transformer_class']}, {manifest['dtype']}",
        f"  family       {manifest['family']}",
        f"  buckets      {buckets}",
        f"  ranges       {ranges}",
        f"  defaults     {defaults}",
        f"  policy       {_fields_text('policy', data['default_policy'])}",
        f"  step cache   {_fields_text('step_cache', data['default_step_cache'])}",
        *(f"  fitted       {one['kind']}: {one['source']}" for one in manifest["cache_fits"]),
        *(_calibration_line(entry) for entry in manifest["calibrations"]),
        f"  built with   ddit_rt {manifest['project_version']}, torch {built['torch_version']}",
        f"  built for    {built['device']}, {built['machine']}, {built['cpu_capability']}",
        "  trusted      yes: this user saved it on this machine"
        if data["trusted"]
        else "  trusted      no: loading it runs its native code, and needs --trust-code",
        f"  fits         {'yes' if data['fits'] else 'no'} ({data['checked_against']})",
        *(f"    {text}" for text in data["mismatches"]),
        f"  packages     {memory['packages_bytes'] / _MIB:.1f} MiB",
        *(
            f"    {name}  {entry['bytes'] / _MIB:.1f} MiB  sha256 {entry['sha256'][:16]}  "
            f"attention: {', '.join(data['attention'][name]) or 'not recorded'}"
            for name, entry in manifest["packages"].items()
        ),
        *_memory_lines(memory),
    ]
    return "\n".join(lines)


def _fields_text(kind: str, data: dict[str, Any]) -> str:
    fields = ", ".join(f"{name}={value}" for name, value in data.items() if name != kind)
    return f"{data[kind]}({fields})"


def _calibration_line(entry: dict[str, Any]) -> str:
    from ddit_rt.artifact import PRESETS

    def text(preset: str) -> str:
        plan = entry["presets"][preset]
        cache = plan["step_cache"]
        threshold = f" {cache['threshold']:.3g}" if cache and "threshold" in cache else ""
        cached = f" ({cache['step_cache']}{threshold})" if cache else ""
        return f"{preset} {plan['speedup']:.2f}x{cached}"

    ((name, value),) = entry["target"].items()
    presets = ", ".join(text(preset) for preset in PRESETS)
    return f"  calibrated   {entry['num_inference_steps']} steps, {name} {value:g}: {presets}"


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    if "weights_bytes" not in memory:
        return ["  weights      shared with the model, not in the artifact (--model counts them)"]
    latent = memory["latent_bytes"]
    parts = [memory[f"{name}_bytes"] for name in ("history", "velocities", "detail")]
    parts += [entry["correction_bytes"] for entry in memory["buckets"]]
    return [
        f"  weights      {memory['weights_bytes'] / _MIB:.1f} MiB, shared with the model",
        f"  state        of one run, {_conditions(memory)}:",
        f"    one latent     {latent:>12,} bytes, float32",
        f"    history        {memory['history_bytes']:>12,} bytes",
        f"    velocities     {memory['velocities_bytes']:>12,} bytes, for {memory['solver']}",
        f"    detail         {memory['detail_bytes']:>12,} bytes, of the latest step at p",
        *(
            f"    correction {entry['patch']:<3} {entry['correction_bytes']:>12,} bytes"
            for entry in memory["buckets"]
            if entry["correction_bytes"]
        ),
        f"    together       {sum(parts):>12,} bytes, {sum(parts) / latent:.2f} latents",
        f"    text           {memory['text_bytes']:>12,} bytes",
        *(
            f"    bucket {entry['patch']:<3}     {entry['tokens']:>12,} tokens; positions "
            f"{entry['positions_bytes']:,} bytes, modulation {entry['modulation_bytes']:,} bytes, "
            f"with a step cache {entry['residual_bytes']:,} bytes more"
            for entry in memory["buckets"]
        ),
    ]


def _conditions(memory: dict[str, Any]) -> str:
    guided = ", guided" if memory["passes"] > 1 else ""
    experts = f", {memory['experts']} experts" if memory["experts"] > 1 else ""
    return (
        f"{size_text(memory)}, {memory['text_tokens']} text tokens, "
        f"{memory['steps']} steps, batch 1{guided}{experts}"
    )


INFO = Command(
    name="info",
    summary="Show what an artifact holds and whether it fits, or whether a model can be run.",
    examples=(
        "ddit-rt info demo.ddit",
        "ddit-rt info demo.ddit --model demo",
        "ddit-rt info flux.ddit --json | jq .mismatches",
        "ddit-rt info ./FLUX.1-dev --height 768 --width 1360",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
