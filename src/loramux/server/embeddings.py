"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
import sys
from array import array
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.server.access import Caller
from loramux.server.pooling import pool
from loramux.server.pooling_protocol import EmbeddingRequest
from loramux.server.state import State
from loramux.types import PoolingOutput

router = APIRouter()


@router.post("/v1/embeddings")
async def create_embeddings(
    body: EmbeddingRequest, request: Request, state: State, access: Caller
) -> Response:
    """A vector for each input."""

    def item(index: int, pooled: PoolingOutput) -> dict[str, Any]:
        values = pooled.values
        in_base64 = body.encoding_format == "base64"
        vector = _in_base64(values) if in_base64 else values.tolist()
        return {"object": "embedding", "index": index, "embedding": vector}

    return await pool(body, body.params, request, state, access, "embd", item)


def _in_base64(values: array[float]) -> str:
    """Little-endian, whatever this machine is."""
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode("ascii")
