"""`compile` and `load`: from a diffusers pipeline or a bare transformer to an `Engine`."""

from __future__ import annotations

import logging
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ddit_rt import checks
from ddit_rt.adapters import AdapterSet, PatchAdapter, load_adapters, save_adapters
from ddit_rt.artifact import (
    Artifact,
    BucketEntry,
    Manifest,
    QuantizationEntry,
    mismatches,
    open_artifact,
    weight_fingerprint,
)
from ddit_rt.blocks import (
    CompiledRunner,
    EagerRunner,
    LoadedPackage,
    LoraSpec,
    Progress,
    TokenRanges,
    block_lora,
    compile_blocks,
    quantise_blocks,
)
from ddit_rt.engine.engine import Engine
from ddit_rt.engine.inputs import (
    check_adapters,
    check_executor,
    check_quantization,
    check_size,
    default_sizes,
    find_adapters,
    parse_multiples,
    stored_cache,
    stored_policy,
    unwrap,
)
from ddit_rt.errors import ArtifactMismatchError
from ddit_rt.live import LiveModel
from ddit_rt.models import Family
from ddit_rt.models.base import BlockType, TensorSpec
from ddit_rt.models.quantised import has_quantised
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.policies import PatchPolicy, StepCache, patch_name
from ddit_rt.steps import Runners, StepModel
from ddit_rt.torch_state import plain_defaults, shielded
from ddit_rt.version import __version__

LOG = logging.getLogger("ddit_rt.engine")

_ADAPTER_FOLDER = "adapters"

MakeRunner = Callable[[BlockType, nn.Module, LoraSpec | None, "Mapping[str, Any] | None"], Any]


@shielded()
@plain_defaults()
def compile(  # noqa: A001 - the field's word for it; it is called as ddit_rt.compile
    model: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    patch_sizes: str | Sequence[str | int] = ("p", "2p", "4p"),
    adapter: str | Path | AdapterSet | None = None,
    patch_policy: PatchPolicy | str | None = None,
    step_cache: StepCache | str | None = None,
    ranges: TokenRanges | None = None,
    quantization: str | None = None,
    backend: str = "aot",
    executor: str = "auto",
    batched_guidance: bool = True,
    progress: bool = True,
) -> Engine:
    """Compiles a model ahead of time, once.

    One package per block class serves every patch size, image size, batch and prompt length
    within `ranges`; the weights stay the model's own and are not copied.

    Args:
        model: A diffusers pipeline (`FluxPipeline`, `WanPipeline`), or its transformer alone.
        height: Default image height of the engine's calls, in pixels; checked here already.
        width: Default image width, in pixels.
        num_frames: Default number of frames, of a video model.
        patch_sizes: Patch sizes to offer, `"p"` among them; `"p,2p"` is `("p", "2p")`.
        adapter: Trained patch adapters: a folder, or loaded ones. A coarse size without one runs
            training-free.
        patch_policy: Policy of calls that name none, by value or as text (`"fine"`, `"static"`,
            `"dynamic"`, `"4p:0.2,2p:0.4,p"`); by default `DDiTPolicy()`.
        step_cache: Step cache of calls that name none, by value or as text (`"teacache:0.4"`); by
            default every step computes.
        ranges: Batch sizes and token counts to compile for; by default the family's.
        quantization: `"int8"` or `"fp8"` quantises the blocks with torchao (extra `quant`), in
            place and for good: weights by rows, activations by tokens. `load` does the same. A
            model that was loaded with torchao's int8 or float8 weights needs no word of it.
        backend: `"aot"`; or `"eager"`, which runs the model's own blocks uncompiled, for
            debugging. An eager engine cannot be saved.
        executor: How a CUDA run is driven; see `Engine.executor`.
        batched_guidance: See `Engine.batched_guidance`.
        progress: Whether to show a progress bar on stderr.

    Returns:
        An engine that is ready to run, and to `save`.

    Raises:
        UnsupportedModelError: A model, pipeline or scheduler that no family handles, a model
            with what compiled blocks cannot honour, such as hooks, or a quantisation that this
            machine cannot run.
        ShapeError: `height`, `width` or `num_frames` cannot be run.
        ValueError, TypeError: A value that is none for its name.
        CompileError: A block cannot be compiled; the message says what is missing.
    """
    started = time.perf_counter()
    checks.choice("backend", backend, ("aot", "eager"))
    checks.flag("progress", progress)
    checks.flag("batched_guidance", batched_guidance)
    pipeline, transformer, family = unwrap(model)
    check_executor(executor, transformer)
    live = LiveModel(family, transformer, pipeline)
    multiples = parse_multiples(patch_sizes)
    policy, cache = stored_policy(patch_policy, multiples), stored_cache(step_cache)
    defaults = default_sizes(family, pipeline, height, width, num_frames)
    if ranges is None:
        ranges = TokenRanges(**family.default_ranges)
    checks.instance("ranges", ranges, TokenRanges, "TokenRanges(batch=..., image=..., text=...)")
    if pipeline is not None:
        steps = StepModel(family=family, transformer=transformer, base={})
        sized = CompiledModel(steps=steps, multiples=multiples, ranges=ranges)
        check_size(sized, pipeline, defaults)
    adapters = find_adapters(adapter, family, transformer)
    check_adapters(adapters, multiples)
    entry = None
    if quantization is not None:
        check_quantization(quantization, transformer, adapters)
        entry = QuantizationEntry(kind=quantization, weights=weight_fingerprint(transformer))
        live = _quantised(live, family, pipeline, entry)
    manifest = Manifest.describe(
        transformer,
        project_version=__version__,
        family=family.name,
        ranges=ranges,
        buckets=tuple(_bucket_entry(multiple, adapters) for multiple in multiples),
        policy=policy.to_dict() if policy else None,
        step_cache=cache.to_dict() if cache else None,
        pipeline_defaults=defaults,
        block_changes=live.block_changes,
        quantization=entry,
    )
    if backend == "eager":
        artifact = Artifact.unsaved(None, manifest)
    else:
        artifact = _compile_artifact(transformer, family, adapters, manifest, progress)
    compiled = _compiled_model(live, family, artifact, adapters, multiples, progress)
    engine = Engine(
        compiled, artifact, pipeline, executor=executor, batched_guidance=batched_guidance
    )
    LOG.info("compiled in %.2f s: %r", time.perf_counter() - started, engine)
    return engine


def _compile_artifact(
    transformer: nn.Module,
    family: Family,
    adapters: AdapterSet,
    manifest: Manifest,
    progress: bool,
) -> Artifact:
    """Packages and adapters in a temporary folder that lives as long as the artifact."""
    variants: dict[str | None, LoraSpec | None] = {None: None}
    for adapter in adapters.adapters.values():
        if adapter.lora:
            spec = _lora_spec(adapter)
            variants[spec.variant] = spec
    workspace = tempfile.TemporaryDirectory(prefix="ddit_rt-")
    try:
        root = Path(workspace.name)
        with _progress_bar(progress, "compile") as report:
            compile_blocks(
                transformer,
                family.block_types(transformer),
                root,
                ranges=manifest.ranges,
                variants=variants,
                progress=report,
            )
        save_adapters(adapters, root / _ADAPTER_FOLDER, family, transformer)
        artifact = Artifact.unsaved(root, manifest)
    except BaseException:
        workspace.cleanup()
        raise
    weakref.finalize(artifact, workspace.cleanup)
    return artifact


@shielded()
@plain_defaults()
def load(
    path: str | Path,
    model: Any,
    *,
    trust_code: bool = False,
    check_weights: bool = True,
    executor: str = "auto",
    batched_guidance: bool = True,
    progress: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Engine:
    """Loads an artifact for a model. Seconds: nothing is compiled.

    Args:
        path: What `Engine.save` wrote; or `"org/name"` of what `Engine.push_to_hub` did, unless
            there is a folder of that name.
        model: The pipeline or transformer that it was compiled from, weights loaded.
        trust_code: An artifact holds native code, which loading executes. One that this user
            saved on this machine is trusted; for any other this argument is your say that you
            trust its source.
        check_weights: Whether other weights than the compiled ones are an error. The packages
            hold no weights and would run with any of the same shapes; adapters and calibrated
            policies would not fit.
        executor: How a CUDA run is driven; see `Engine.executor`.
        batched_guidance: See `Engine.batched_guidance`.
        progress: Whether to show a progress bar on stderr.
        revision: Branch, tag or commit of a repository of the Hub; by default its main branch.
        token: For the Hub; by default that of the user who is logged in.

    Raises:
        ArtifactError: Missing, on the Hub too, truncated, tampered with, or of another schema.
        ArtifactMismatchError: It does not fit this model, torch build or machine; each reason
            comes with its remedy.
        UnsupportedModelError: As for `compile`.
        UntrustedArtifactError: See `trust_code`.
        ValueError, TypeError: A value that is none for its name.
    """
    started = time.perf_counter()
    checks.path("path", path)
    for name, value in (
        ("trust_code", trust_code),
        ("check_weights", check_weights),
        ("batched_guidance", batched_guidance),
        ("progress", progress),
    ):
        checks.flag(name, value)
    pipeline, transformer, family = unwrap(model)
    live = LiveModel(family, transformer, pipeline)
    check_executor(executor, transformer)
    found = _folder(path, trust_code=trust_code, revision=revision, token=token)
    artifact = open_artifact(found, trust_code=trust_code)
    manifest = artifact.manifest
    entry = manifest.quantization
    if entry is not None and not has_quantised(transformer):
        _check_fits(path, manifest.before_quantization(), live, family, check_weights)
        check_quantization(entry.kind, transformer)
        live = _quantised(live, family, pipeline, entry)
    _check_fits(path, manifest, live, family, check_weights)
    multiples = parse_multiples([entry.patch for entry in artifact.manifest.buckets])
    assert artifact.directory is not None, "an opened artifact has a folder"
    folder = artifact.directory / _ADAPTER_FOLDER
    adapters = AdapterSet()
    if folder.exists():
        adapters = load_adapters(folder, family, transformer, check_base=check_weights)
    compiled = _compiled_model(live, family, artifact, adapters, multiples, progress)
    engine = Engine(
        compiled, artifact, pipeline, executor=executor, batched_guidance=batched_guidance
    )
    LOG.info("loaded in %.2f s: %r", time.perf_counter() - started, engine)
    return engine


def _check_fits(
    path: str | Path, manifest: Manifest, live: LiveModel, family: Family, check_weights: bool
) -> None:
    """Raises `ArtifactMismatchError` with all that does not fit."""
    transformer, *_ = live.models
    problems = mismatches(manifest, transformer, live.block_changes, family=family.name)
    if not check_weights:
        problems = [problem for problem in problems if not problem.startswith("weights:")]
    if problems:
        raise ArtifactMismatchError(
            f"{path} does not fit:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )


def _quantised(
    live: LiveModel, family: Family, pipeline: Any, entry: QuantizationEntry
) -> LiveModel:
    """The models after their blocks were quantised in place."""
    for model in live.models:
        quantise_blocks(model, family.block_types(model), entry.kind)
    return LiveModel(family, live.models[0], pipeline)


def _folder(
    path: str | Path, *, trust_code: bool, revision: str | None, token: str | bool | None
) -> Path:
    """The folder that a path is, or that a repository of the Hub was fetched to."""
    from ddit_rt.artifact.hub import fetch, is_repo_id

    if revision is not None:
        checks.instance("revision", revision, str, "a branch, tag or commit of the Hub, as text")
    if is_repo_id(path):
        return fetch(str(path), trust_code=trust_code, revision=revision, token=token)
    if revision is not None:
        raise ValueError(
            f"got revision={checks.show(revision)} with the path {path}; only a repository of the "
            'Hub, "org/name", has revisions: leave it out'
        )
    return Path(path)


def _compiled_model(
    live: LiveModel,
    family: Family,
    artifact: Artifact,
    adapters: AdapterSet,
    multiples: tuple[int, ...],
    progress: bool,
) -> CompiledModel:
    """Binds runners to the model's weights."""
    make = _runner_maker(artifact)
    transformer, *experts = live.models
    types = family.block_types(transformer)
    total = sum(len(block_type.blocks(transformer)) for block_type in types)
    total *= 1 + len(experts) + sum(bool(one.lora) for one in adapters.adapters.values())
    with _progress_bar(progress, "load") as report:
        counter = _Counter(report, total)
        base, *others = (_runners(types, model, make, None, counter) for model in live.models)
        adapted = {
            multiple: _runners(types, transformer, make, adapter, counter) if adapter.lora else base
            for multiple, adapter in adapters.adapters.items()
        }
    return CompiledModel(
        steps=StepModel(family=family, transformer=transformer, base=base),
        multiples=multiples,
        ranges=artifact.manifest.ranges,
        adapters=adapters,
        adapter_runners=adapted,
        experts=tuple(
            StepModel(family=family, transformer=model, base=runners)
            for model, runners in zip(experts, others, strict=True)
        ),
        live=live,
    )


class _Counter:
    """Counts loaded blocks into a progress bar."""

    def __init__(self, report: Progress, total: int) -> None:
        self._report, self._total, self._done = report, total, 0
        report(0, total, "blocks")

    def advance(self) -> None:
        self._done += 1
        self._report(self._done, self._total, "blocks")


def _runners(
    types: Sequence[BlockType],
    transformer: nn.Module,
    make: MakeRunner,
    adapter: PatchAdapter | None,
    counter: _Counter,
) -> Runners:
    runners: dict[str, list[Any]] = {}
    spec = _lora_spec(adapter) if adapter else None
    for block_type in types:
        runners[block_type.key] = []
        for index, block in enumerate(block_type.blocks(transformer)):
            lora = block_lora(adapter.lora, block_type.block_path(index)) if adapter else None
            runners[block_type.key].append(make(block_type, block, spec, lora))
            counter.advance()
    return runners


def _runner_maker(artifact: Artifact) -> MakeRunner:
    ranges = artifact.manifest.ranges

    def eager(block_type: BlockType, block: nn.Module, spec: LoraSpec | None, lora: Any) -> Any:
        return EagerRunner(block_type, block, ranges=ranges, lora_spec=spec, lora=lora)

    shared: dict[tuple[Path, torch.device], LoadedPackage] = {}

    def compiled(block_type: BlockType, block: nn.Module, spec: LoraSpec | None, lora: Any) -> Any:
        path = artifact.package(block_type.name, spec.variant if spec else None)
        device = next(block.parameters()).device
        package = shared.get((path, device))
        if package is None:
            package = LoadedPackage(path, device=device)
            if not package.info.takes(block_type.inputs):
                raise ArtifactMismatchError(
                    f"{path} takes {_names(package.info.inputs)}, and this version of ddit_rt "
                    f"gives {_names(block_type.inputs)}: compile the model again"
                )
            if package.shared:
                shared[path, device] = package
        runner = CompiledRunner(package)
        runner.bind(block, lora)
        return runner

    return compiled if artifact.manifest.packages else eager


def _names(inputs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {list(spec.dims)}" for spec in inputs)


def _bucket_entry(multiple: int, adapters: AdapterSet) -> BucketEntry:
    name = patch_name(multiple)
    if multiple == 1:
        return BucketEntry(patch=name, method="base", variant=None)
    adapter = adapters.adapters.get(multiple)
    if adapter is None:
        return BucketEntry(patch=name, method="snr", variant=None)
    return BucketEntry(
        patch=name, method="adapter", variant=_lora_spec(adapter).variant if adapter.lora else None
    )


def _lora_spec(adapter: PatchAdapter) -> LoraSpec:
    config = adapter.config
    return LoraSpec(rank=config.rank, scaling=config.lora_alpha / config.rank)


@contextmanager
def _progress_bar(shown: bool, title: str) -> Iterator[Progress]:
    with tqdm(desc=title, disable=not shown, leave=False) as bar:

        def report(done: int, total: int, label: str) -> None:
            bar.total = total
            bar.set_postfix_str(label)
            bar.update(done - bar.n)

        yield report
