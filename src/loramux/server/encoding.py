"""JSON as it goes over the wire."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


def encode(content: Any) -> bytes:
    """Compact ASCII JSON. Escaping everything else keeps a client's lone surrogate from making
    its own error message impossible to send."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


class ReplyJSON(JSONResponse):
    """A JSON response through `encode`."""

    def render(self, content: Any) -> bytes:
        return encode(content)
