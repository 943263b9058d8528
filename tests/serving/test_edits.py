"""Edits of an uploaded picture, which is decoded only where its header admits it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from flux_edit_models import fill
from models import prompting_pipeline, seeded
from PIL import Image, ImageFile
from served import editing_engine, picture, running
from uploaded import bomb, file_of

import ddit_rt
from ddit_rt import Engine
from ddit_rt.serving.errors import ApiError
from ddit_rt.serving.uploads import read_picture


@pytest.fixture(scope="module")
def engine() -> Engine:
    return editing_engine()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[openai.OpenAI]:
    with (
        running(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client


def edit(client: openai.OpenAI, data: bytes, **own: Any) -> Any:
    body = {"num_inference_steps": 4, "seed": 3, "strength": 0.5, "patch_policy": "fine", **own}
    return client.images.edit(image=("a.png", data), prompt="a fox", size="64x64", extra_body=body)


def test_an_edit_is_the_engines_own(client: openai.OpenAI, engine: Engine) -> None:
    made = edit(client, file_of())
    expected = engine(
        "a fox",
        image=Image.open(io.BytesIO(file_of())).convert("RGB"),
        strength=0.5,
        height=64,
        width=64,
        num_inference_steps=4,
        patch_policy="fine",
        generator=seeded(3),
    ).images[0]
    assert np.array_equal(np.asarray(picture(made.data[0].model_dump())), np.asarray(expected))


def test_no_pixel_of_a_bomb_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data, decoded = bomb(), []
    assert len(data) < 2**17
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size))
    with pytest.raises(ApiError, match="more than 16777216 pixels"):
        read_picture(data, "image", 16 * 2**20)
    assert not decoded
    read_picture(file_of(), "image", 64 * 64)
    assert decoded == [(64, 64)]


def test_pictures_of_three_formats_are_read_and_nothing_else_is() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        assert read_picture(file_of(kind), "image", 10**6).size == (64, 64)
    broken = (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", file_of()[:200], b"<svg/>", bytes(64))
    for data in (*broken, *map(file_of, ("GIF", "BMP", "TIFF"))):
        with pytest.raises(ApiError, match="image is") as refused:
            read_picture(data, "image", 10**6)
        assert refused.value.status == 400


def test_what_is_missing_or_strange_is_refused(client: openai.OpenAI) -> None:
    for own, said in (({"strength": 2}, "strength"), ({"stream": True}, "not permitted")):
        with pytest.raises(openai.BadRequestError, match=said):
            edit(client, file_of(), **own)
    with pytest.raises(openai.BadRequestError, match="takes no mask_image"):
        client.images.edit(image=file_of(), mask=file_of(), prompt="a fox")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a fox")


def test_a_mask_says_where_a_model_that_fills_works() -> None:
    pipeline = fill()
    pipeline.encode_prompt = prompting_pipeline().encode_prompt
    engine = ddit_rt.compile(pipeline, height=64, width=64, backend="eager", progress=False)
    mask, file = Image.new("L", (64, 64), 0), io.BytesIO()
    mask.paste(255, (0, 0, 32, 64))
    mask.save(file, "PNG")
    with running(engine) as url:
        asked = {"prompt": "a fox", "size": "64x64", "seed": "3", "num_inference_steps": "4"}
        files = {"image": file_of(), "mask": file.getvalue()}
        answer = httpx.post(f"{url}/v1/images/edits", data=asked, files=files, timeout=60).json()
    expected = engine(
        "a fox",
        image=Image.open(io.BytesIO(file_of())),
        mask_image=mask,
        height=64,
        width=64,
        num_inference_steps=4,
        generator=seeded(3),
    ).images[0]
    assert np.array_equal(np.asarray(picture(answer["data"][0])), np.asarray(expected))
