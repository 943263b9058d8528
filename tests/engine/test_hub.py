"""Artifacts on the Hub: written and read by its own client, and trusted like any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from hub_stand_in import Hub, stand_in
from huggingface_hub import constants
from models import seeded, tiny_embeds

import ddit_rt
from ddit_rt.errors import ArtifactError, UntrustedArtifactError

NAME = "someone/tiny"

# huggingface_hub hands a file to httpx in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=<...>. to upload:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in() as hub:
        # What HF_ENDPOINT, HF_HUB_CACHE and so on set when the client is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def pushed(hub: Hub, engine: ddit_rt.Engine) -> str:
    return engine.push_to_hub(NAME, token="hf_mine")  # noqa: S106


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From here on this is another user's machine."""
    monkeypatch.setenv("DDIT_RT_HOME", str(tmp_path / "somebody-else"))


def load(pipeline: FluxPipeline, path: Any = NAME, **given: Any) -> ddit_rt.Engine:
    return ddit_rt.load(path, pipeline, progress=False, **given)


def test_what_is_pushed_loads_by_its_name_and_gives_the_same_images(
    hub: Hub,
    pushed: str,
    engine: ddit_rt.Engine,
    pipeline: FluxPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert pushed == f"{hub.url}/{NAME}/commit/{hub.branches[NAME]['main']}"
    assert engine.artifact.directory is not None
    saved = engine.artifact.directory
    here = {p.relative_to(saved).as_posix(): p for p in saved.rglob("*") if p.is_file()}
    there = hub.head(NAME)
    assert set(there) == {*here, ".gitattributes"}
    assert all(there[name] == path.read_bytes() for name, path in here.items())
    assert hub.large, "packages go by LFS"
    assert set(hub.tokens.values()) == {"Bearer hf_mine"}, hub.tokens
    hub.tokens.clear()
    elsewhere(monkeypatch, tmp_path)
    other = load(pipeline, trust_code=True, token="hf_theirs")  # noqa: S106
    assert set(hub.tokens.values()) == {"Bearer hf_theirs"}, hub.tokens
    call: dict[str, Any] = {**tiny_embeds(), "num_inference_steps": 2, "output_type": "pt"}
    size = {"height": 64, "width": 64}
    expected = engine(**call, **size, generator=seeded(3)).images
    assert torch.equal(other(**call, **size, generator=seeded(3)).images, expected)


def test_code_of_someone_else_is_not_even_fetched_without_the_users_say(
    hub: Hub,
    pushed: str,
    pipeline: FluxPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(pipeline)  # this user saved the very same bytes on this machine
    elsewhere(monkeypatch, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    hub.asked.clear()
    with pytest.raises(UntrustedArtifactError, match=rf"{NAME} .*trust_code=True"):
        load(pipeline)
    assert {path for _, path in hub.asked} == {f"/{NAME}/resolve/main/manifest.json"}


def test_pushing_makes_nobody_trust_it(
    hub: Hub,
    engine: ddit_rt.Engine,
    pipeline: FluxPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere(monkeypatch, tmp_path)
    engine.push_to_hub(NAME)
    with pytest.raises(UntrustedArtifactError):
        load(pipeline)


def test_a_byte_that_changed_on_the_hub_is_refused(
    hub: Hub, pushed: str, pipeline: FluxPipeline
) -> None:
    tree = hub.head(NAME)
    name = next(name for name in tree if name.endswith(".pt2"))
    tree[name] = tree[name][:-1] + b"?"
    with pytest.raises(ArtifactError, match="does not have the SHA-256 of the manifest"):
        load(pipeline, trust_code=True)


def test_a_revision_is_the_one_that_is_read(hub: Hub, pushed: str, pipeline: FluxPipeline) -> None:
    first = hub.branches[NAME]["main"]
    hub.commit(NAME, "main", {"README.md": b"gone"})
    with pytest.raises(ArtifactError, match=f"{NAME} on the Hub is not a whole artifact"):
        load(pipeline)
    load(pipeline, revision=first)
    hub.branches[NAME]["v1"] = first
    load(pipeline, revision="v1")
    with pytest.raises(ArtifactError, match=f"{NAME} on the Hub has no revision v2"):
        load(pipeline, revision="v2")


def test_an_artifact_takes_the_place_of_the_one_that_was_there(
    hub: Hub, engine: ddit_rt.Engine, pipeline: FluxPipeline
) -> None:
    hub.create(NAME)
    old = {"Old/package.pt2": b"code", "adapters/2p/a.safetensors": b"", "README.md": b"mine"}
    hub.commit(NAME, "main", old)
    engine.push_to_hub(NAME)
    there = set(hub.head(NAME))
    assert "README.md" in there
    assert not there & (set(old) - {"README.md"})
    load(pipeline)


def test_a_folder_of_that_name_comes_first(
    hub: Hub, pushed: str, pipeline: FluxPipeline, tmp_path: Path
) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    hub.asked.clear()
    with pytest.raises(ArtifactError, match=f"{NAME} is not an artifact"):
        load(pipeline)
    with pytest.raises(ValueError, match="got revision='v1' with the path"):
        load(pipeline, revision="v1")
    with pytest.raises(TypeError, match="got revision=1"):
        load(pipeline, revision=1)
    assert not hub.asked


@pytest.mark.parametrize(
    "path", ["nowhere.ddit", "/a/b", "a/b/c", "./a/b", "models/missing", Path("a/b")], ids=str
)
def test_what_is_no_name_of_the_hub_is_no_such_file(
    hub: Hub, pipeline: FluxPipeline, path: Any, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()  # so that what is within it is a path
    with pytest.raises(ArtifactError, match="no such file"):
        load(pipeline, path)
    assert not hub.asked


def test_what_the_hub_does_not_have_is_said_so(
    hub: Hub, pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtifactError, match="no such file: no/body, and no such repository"):
        load(pipeline, "no/body")
    with pytest.raises(ArtifactError, match=r"a/b\.\.c cannot be fetched"):
        load(pipeline, "a/b..c")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match="no such file: no/body, and the Hub cannot be"):
        load(pipeline, "no/body")


def test_what_was_not_compiled_is_not_pushed(hub: Hub, pipeline: FluxPipeline) -> None:
    eager = ddit_rt.compile(pipeline, backend="eager", progress=False)
    with pytest.raises(ArtifactError, match="nothing to push"):
        eager.push_to_hub(NAME)
    assert not hub.asked
