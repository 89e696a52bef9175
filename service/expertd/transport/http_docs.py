"""HTTP: /docs and what /openapi.json tells, so that clients made from it work."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from swagger_ui_bundle import swagger_ui_path

Schema = dict[str, Any]


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


TEXT: Schema = {"type": "string"}
REFUSAL = _object(**dict.fromkeys(("backend", "mode", "entry", "code", "text"), TEXT))
ERROR = _object(
    error=_object(code=TEXT, reason=TEXT, message=TEXT, reasons={"type": "array", "items": REFUSAL})
)
FAILURE: Schema = {
    "description": "What went wrong",
    "content": {"application/json": {"schema": ERROR}},
}
SAFETENSORS: Schema = {
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
}
QUESTION: Schema = {"content": {"application/json": {"schema": {"type": "object"}}}}


def reads(kind: Schema) -> Schema:
    """openapi_extra of a route that reads its body itself."""
    return {"requestBody": {"required": True, **kind}}


def add_docs(app: FastAPI) -> None:
    """Adds /docs, served from here, and /openapi.json of the routes that are there."""
    app.mount("/docs/assets", StaticFiles(directory=swagger_ui_path))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="expertd",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="/docs/assets/favicon-32x32.png",
        )

    app.openapi = cache(partial(_schema, app))  # type: ignore[method-assign]


def _schema(app: FastAPI) -> Schema:
    """FastAPI's, but for its 422, which nobody is answered: all errors have one shape."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path in found["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = FAILURE
    found.pop("components", None)
    return found
