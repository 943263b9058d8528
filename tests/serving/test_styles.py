"""Style LoRAs of requests: they act, only where they are asked for, and leave no trace."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from lora_files import check_unchanged, eager, everything, run, speaking_pipeline, style, words
from safetensors.torch import save_file
from served import PATH, client_of

from ddit_rt import Engine
from ddit_rt.serving.schema import Lora
from ddit_rt.serving.styles import Styles

ASKED: dict[str, Any] = {"prompt": "a fox", "num_inference_steps": 3, "seed": 1, "size": "64x64"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline, folder = speaking_pipeline(), tmp_path_factory.mktemp("styles")
    save_file(style(pipeline), folder / "ink.safetensors")
    save_file(words(pipeline), folder / "words.safetensors")
    save_file({"transformer.nothing.lora_A.weight": torch.ones(1, 1)}, folder / "odd.safetensors")
    (folder / "notes.bin").write_bytes(b"no LoRA")
    save_file(style(pipeline), folder.parent / "outside.safetensors")
    return folder


@pytest.fixture
def engine() -> Engine:
    return eager(speaking_pipeline())


@pytest.fixture
def client(engine: Engine, folder: Path) -> Iterator[TestClient]:
    settings = {"lora_dir": folder, "call": {"max_sequence_length": 16}, "warmup_steps": 0}
    with client_of(engine, **settings) as client:
        yield client


def made(client: TestClient, lora: Any) -> str:
    answer = client.post(PATH, json={**ASKED, "lora": lora})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"][0]["b64_json"])


@pytest.mark.slow
def test_after_any_sequence_the_base_is_what_it_was(engine: Engine, client: TestClient) -> None:
    before = everything(engine.pipeline)
    plain = made(client, None)
    strong, weak = {"name": "ink"}, {"name": "ink", "scale": 0.5}
    first = {str(lora): made(client, lora) for lora in (strong, weak, "words")}
    assert len({plain, *first.values()}) == 4
    for lora in (None, "words", strong, None, weak, strong, "words", None):
        assert made(client, lora) == (plain if lora is None else first[str(lora)])
    check_unchanged(engine.pipeline, before)


def test_one_that_does_not_fit_is_refused_and_the_next_request_is_plain(
    client: TestClient,
) -> None:
    plain = made(client, None)
    made(client, "ink")
    answer = client.post(PATH, json={**ASKED, "lora": "odd"})
    assert answer.status_code == 400
    assert "no place" in answer.json()["error"]["message"]
    assert made(client, None) == plain


def test_only_names_of_the_folder_are_known(client: TestClient) -> None:
    elsewhere = ("../outside", "/etc/passwd", "https://x/y")
    for name in (*elsewhere, "ink.safetensors", "notes", "", ".", "a\0b"):
        error = client.post(PATH, json={**ASKED, "lora": name}).json()["error"]
        assert (error["param"], error["code"]) == ("lora", "lora_not_found"), name


def test_what_is_kept_is_not_read_again_and_what_was_not_used_makes_room(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    own = Engine.load_lora

    def load(one: Engine, lora: Any, weight: float, name: str, **kwargs: Any) -> str:
        read.append(name)
        return own(one, lora, weight, name, **kwargs)

    monkeypatch.setattr(Engine, "load_lora", load)
    size = (folder / "ink.safetensors").stat().st_size
    for most, expected in ((size, ["ink", "words"]), (0, ["ink", "ink", "words", "ink"])):
        styles = Styles(engine, folder, most)
        for name in ("ink", None, "ink", "words", "ink", "ink"):
            styles.switch(None if name is None else Lora(name=name))
        styles.switch(Lora(name="ink", scale=0.5))
        assert read == expected
        read.clear()
        engine.unload_loras()


def test_a_file_that_was_replaced_is_read_again(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    save_file(style(engine.pipeline), file)
    styles, plain = Styles(engine, tmp_path, 10**9), run(engine)
    styles.switch(Lora(name="own"))
    first = run(engine)
    save_file({name: value * 2 for name, value in style(engine.pipeline).items()}, file)
    os.utime(file, ns=(1, 1))
    styles.switch(Lora(name="own"))
    assert not torch.equal(run(engine), first)
    save_file({"transformer.nothing.lora_A.weight": torch.ones(1, 1)}, file)
    with pytest.raises(ValueError, match="no place"):
        styles.switch(Lora(name="own"))
    assert engine.loras == {}
    styles.switch(None)
    assert torch.equal(run(engine), plain)
