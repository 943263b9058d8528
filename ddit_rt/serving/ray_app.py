"""Replicas of an engine on Ray Serve: `serve run ddit_rt.serving.ray_app:app artifact=...`.

There are two deployments. `Replica` is an engine behind its HTTP application; there is one per GPU,
and their number follows the load. `Front` sends requests to them, and again to another if one dies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ddit_rt import checks
from ddit_rt.serving.config import ServeConfig, read_keys
from ddit_rt.serving.ray_local import require_ray
from ddit_rt.sources import (
    check_names,
    embedded_defaults,
    engine_loader,
    is_embedded,
)

if TYPE_CHECKING:
    from ray.serve import Application

    from ddit_rt.engine import Engine

require_ray("ddit_rt.serving.ray_app")

_WAITING = 100_000
"""Requests that may wait in the front; the replicas' own queues are the bound that matters."""

_DRAIN = 30.0
"""Seconds that a replica which is no longer needed has to finish its requests."""

_LOOKS = 5.0
"""Seconds between two checks of a replica's health."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """What the replicas run, and where.

    Attributes:
        artifact: Folder that `compile` wrote, at the same path on every node; or `"demo"`.
        model: Weights of the artifact: a diffusers folder on every node, or a Hub name.
        dtype: Dtype of the weights; by default as compiled.
        trust_code: Whether to run an artifact that was not built on the replica's node.
        name: Name of the model in the interface; by default that of the artifact.
        api_key_file: File of API keys, one a line, read where the application is built.
        num_gpus: GPUs of each replica; by default 1 where the artifact is for CUDA.
        num_cpus: CPUs of each replica.
        min_replicas: Number of replicas without load.
        max_replicas: Largest number of replicas.
    """

    artifact: str
    model: str | None = None
    dtype: str | None = None
    trust_code: bool = False
    name: str | None = None
    api_key_file: Path | None = None
    num_gpus: float | None = None
    num_cpus: float = 1.0
    min_replicas: int = 1
    max_replicas: int = 1

    def __post_init__(self) -> None:
        checks.whole("min_replicas", self.min_replicas, 1)
        checks.whole("max_replicas", self.max_replicas, self.min_replicas)
        checks.number("num_cpus", self.num_cpus, 0)
        checks.optional(checks.number, "num_gpus", self.num_gpus, 0)

    @property
    def gpus(self) -> float:
        """GPUs of each replica."""
        if self.num_gpus is not None:
            return self.num_gpus
        if is_embedded(self.artifact):
            return 0.0
        from ddit_rt.artifact import read_manifest

        return float(read_manifest(Path(self.artifact)).environment.device == "cuda")


def app(args: Mapping[str, Any]) -> Application:
    """Builds the application; `serve run` and `serve deploy` call it.

    Args:
        args: Values for the fields of `Placed`, and of `ServeConfig` without its `model` and
            `keys`; text is converted, since `serve run` gives nothing else.

    Raises:
        ValueError: An unknown argument, a value of the wrong type, no artifact, or a model that
            does not go with it.
        ArtifactError: The artifact cannot be read.
    """
    placed, config = read_settings(args)
    load = engine_loader(
        placed.artifact,
        placed.model,
        command="serve",
        dtype=placed.dtype,
        trust_code=placed.trust_code,
    )
    return application(load, placed, config)


def application(load: Callable[[], Engine], placed: Placed, config: ServeConfig) -> Application:
    """The application of an engine that `load` makes in every replica."""
    from ray import serve

    from ddit_rt.serving.ray_front import Front
    from ddit_rt.serving.ray_replica import Replica

    replicas = serve.deployment(
        Replica,
        ray_actor_options={"num_gpus": placed.gpus, "num_cpus": placed.num_cpus},
        # More than its own queue takes, so that the answer to too many is the engine's.
        max_ongoing_requests=2 * config.max_queue + config.max_batch,
        max_queued_requests=config.max_queue,
        autoscaling_config={
            "min_replicas": placed.min_replicas,
            "initial_replicas": placed.min_replicas,
            "max_replicas": placed.max_replicas,
            "target_ongoing_requests": 2 * config.max_batch,  # one batch runs, and one waits
        },
        health_check_period_s=_LOOKS,
        graceful_shutdown_timeout_s=_DRAIN,
    )
    front = serve.deployment(
        Front,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_WAITING,
    )
    bound: Application = front.bind(replicas.bind(load, config), config)
    return bound


def read_settings(args: Mapping[str, Any]) -> tuple[Placed, ServeConfig]:
    """Reads the arguments of `app`, with the same errors."""
    own = {one.name for one in fields(Placed)}
    served = {one.name for one in fields(ServeConfig)} - own - {"keys"}
    checks.refuse_unknown(args, sorted(own | served), "ddit_rt.serving.ray_app")
    if "artifact" not in args:
        raise ValueError("got no artifact; name what compile wrote: artifact=...")
    placed = Placed(**_typed(Placed, args, own))
    check_names(placed.artifact, placed.model)
    keys = () if placed.api_key_file is None else read_keys(placed.api_key_file)
    given = _typed(ServeConfig, args, served)
    if given.get("lora_dir") is not None:
        given["lora_dir"] = given["lora_dir"].absolute()
    text = embedded_defaults(placed.model or placed.artifact).get("max_sequence_length")
    if text is not None:
        given = {"call": {"max_sequence_length": text}, **given}
    name = placed.name or Path(placed.artifact).name.removesuffix(".ddit")
    return placed, ServeConfig(model=name, keys=keys, **given)


def _typed(kind: type, args: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The arguments among `names`, converted to the types of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {name: _value(name, args[name], hints[name]) for name in sorted(names & args.keys())}


def _value(name: str, given: Any, hint: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_python(given)
    except ValidationError as error:
        raise ValueError(f"got {name}={given!r}: {error.errors()[0]['msg']}") from error
