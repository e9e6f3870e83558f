"""What /openapi.json says beyond what FastAPI finds out by itself."""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from lalia.serving.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from lalia.settings import Settings

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
    for status, text in {
        400: "The request is malformed or asks for something unsupported; `param` names the field.",
        403: "The request comes from a page of another site.",
        404: "No such model.",
        408: "The body took too long.",
        413: "The body is too large.",
        415: "The body is compressed.",
        503: "The server is stopping or has too much to do.",
    }.items()
}


def request_body(kind: type[Settings]) -> dict[str, Any]:
    """What a route that reads raw bytes says of its body."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_bodies(app: FastAPI) -> None:
    """Put the bodies' schemas into /openapi.json, where `request_body` refers to them."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        description = generate()
        kinds = [(kind, "validation") for kind in (ChatRequest, CompletionRequest, EmbeddingRequest)]
        _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # pyright: ignore[reportArgumentType]
        description.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return description

    app.openapi = openapi
