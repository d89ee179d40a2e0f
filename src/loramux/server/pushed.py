"""`PUT /v1/adapters/NAME`: an adapter whose files come with the request, as training loops push them.

The body is `adapter_model.safetensors`; the header `x-loramux-adapter-config` is the base64 of
`adapter_config.json`. The gate counts the body, and nothing of it is read before the caller, the name
and the configuration are found to be good. The bytes go into a private folder as they come, and are
then checked and served like any other adapter.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from loramux.errors import Forbidden, InvalidField
from loramux.server.access import Caller
from loramux.server.adapter_paths import check_name
from loramux.server.admin import DIGEST_PATTERN, digest_header, require_changes
from loramux.server.disconnect import ClientGone
from loramux.server.encoding import ReplyJSON
from loramux.server.residency import row
from loramux.server.state import State

router = APIRouter()

CONFIG_HEADER = "x-loramux-adapter-config"
MAX_CONFIG_BYTES = 32 << 10

Expected = Annotated[str | None, Query(pattern=DIGEST_PATTERN)]


@router.put("/v1/adapters/{name:path}")
async def put_adapter(
    name: str,
    request: Request,
    state: State,
    access: Caller,
    expected_digest: Expected = None,
    pinned: bool | None = None,
) -> Response:
    """Serve the adapter under `name`, in place of what is served there; `expected_digest` and `pinned`
    as for `/v1/load_lora_adapter`. Answers with its entry of `/v1/adapters`."""
    require_changes(state, access)
    if not state.config.allow_adapter_push:
        raise Forbidden(
            "adapters cannot be pushed to this server", remedy="start it with --allow-adapter-push"
        )
    name = check_name(name)
    config = _config_of(request)
    ref = await state.engine.push_adapter(
        name, config, _body(request), expected_digest=expected_digest, pinned=pinned
    )
    statuses = state.engine.residency()
    shown = [row(state, status, access) for status in statuses if status.ref.digest == ref.digest]
    entry = next((item for item in shown if item["name"] == name), {"name": name})
    return ReplyJSON({**entry, "digest": ref.digest}, headers=digest_header(ref))


def _config_of(request: Request) -> bytes:
    """The configuration's bytes. Raises InvalidField."""
    given = request.headers.get(CONFIG_HEADER, "")
    if not given or len(given) > MAX_CONFIG_BYTES * 4 // 3 + 4:
        raise InvalidField(
            f"the header {CONFIG_HEADER} is missing or larger than {MAX_CONFIG_BYTES} bytes",
            field=CONFIG_HEADER,
            remedy="send the base64 of adapter_config.json",
        )
    try:
        return base64.b64decode(given, validate=True)
    except binascii.Error:
        raise InvalidField(f"{CONFIG_HEADER} is no base64", field=CONFIG_HEADER) from None


async def _body(request: Request) -> AsyncIterator[bytes]:
    try:
        async for piece in request.stream():
            if piece:
                yield piece
    except ClientDisconnect:
        raise ClientGone from None
