"""Multipart bodies, read by the same schema as JSON ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from ddit_rt.serving.errors import ApiError
from ddit_rt.serving.schema import Asked

_Body = TypeVar("_Body", bound=Asked)


_TEXTS = ("prompt", "negative_prompt", "model", "size", "user", "step_cache")


def described(kind: type[Asked], uploads: Mapping[str, bool], *, as_json: bool) -> dict[str, Any]:
    """What the OpenAPI document says of a body that `read_body` reads.

    Args:
        kind: Its fields.
        uploads: Names of the files, and whether each is required.
        as_json: Whether a body of JSON is taken too.
    """
    fields = _inlined(kind.model_json_schema(), {})
    form = {
        **fields,
        "properties": {
            **fields["properties"],
            **{name: {"type": "string", "format": "binary"} for name in uploads},
        },
        "required": [*fields["required"], *(name for name, needed in uploads.items() if needed)],
    }
    content = {"multipart/form-data": {"schema": form}}
    if as_json:
        content["application/json"] = {"schema": fields}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, known: Mapping[str, Any]) -> Any:
    """A schema with what it refers to in its own definitions put in the place."""
    if isinstance(schema, list):
        return [_inlined(one, known) for one in schema]
    if not isinstance(schema, dict):
        return schema
    known = {**known, **schema.get("$defs", {})}
    if "$ref" in schema:
        return _inlined(known[schema["$ref"].rpartition("/")[2]], known)
    return {name: _inlined(value, known) for name, value in schema.items() if name != "$defs"}


async def read_body(request: Request, kind: type[_Body]) -> tuple[_Body, dict[str, bytes]]:
    """A body of JSON or of a form, and the files of the form by their fields.

    A form's values are text; one that stands for a number, a flag or an object is read as JSON.

    Raises:
        RequestValidationError: It is none of `kind`.
        ApiError: It cannot be read, or a field comes twice.
    """
    files: dict[str, bytes] = {}
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        fields = await _form(request, files)
    else:
        try:
            fields = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise ApiError(400, "the body is no JSON", code="json_invalid") from error
    try:
        return kind.model_validate(fields), files
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


async def _form(request: Request, files: dict[str, bytes]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    async with request.form(max_files=2, max_fields=40) as form:
        for full, value in form.multi_items():
            name = full.removesuffix("[]")
            if name in fields or name in files:
                raise ApiError(400, f"{name} comes twice; give one", param=name)
            if isinstance(value, UploadFile):
                files[name] = await value.read()
            else:
                fields[name] = value if name in _TEXTS else _plain(value)
    return fields


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
