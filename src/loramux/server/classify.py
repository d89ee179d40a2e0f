"""`POST /classify`, which is vLLM's, and the same under /v1."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.server.access import Caller
from loramux.server.pooling import pool
from loramux.server.pooling_protocol import ClassifyRequest
from loramux.server.state import State
from loramux.types import PoolingOutput

router = APIRouter()


@router.post("/classify")
@router.post("/v1/classify")
async def classify(
    body: ClassifyRequest, request: Request, state: State, access: Caller
) -> Response:
    """The likeliest label of each input, and what each class got."""

    def item(index: int, pooled: PoolingOutput) -> dict[str, Any]:
        return {
            "index": index,
            "label": pooled.label,
            "probs": pooled.values.tolist(),
            "num_classes": len(pooled.values),
        }

    return await pool(body, body.params, request, state, access, "classify", item)
