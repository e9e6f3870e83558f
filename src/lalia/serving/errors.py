"""Refusals in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi.responses import JSONResponse

SHOWN_CHARACTERS = 80
"""How much of a received value a message repeats."""

_TYPES = {404: "not_found_error", 403: "permission_error", 500: "server_error", 503: "overloaded_error"}


class ApiError(Exception):
    """A request we refuse, with its HTTP status.

    Attributes:
        param: the field at fault, dotted, or None.
        code: a word for programs, such as "context_length_exceeded", or None.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def internal_error() -> ApiError:
    """What a client hears of a defect of ours; the traceback goes to the log and nowhere else."""
    return ApiError("an internal error stopped this request; the server's log says more", 500, code="internal_error")


def shown(value: Any) -> str:
    """A received value as messages repeat it: its Python form, cut to `SHOWN_CHARACTERS`."""
    text = repr(value[: SHOWN_CHARACTERS + 1] if isinstance(value, str | list) else value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """', did you mean ...?' with the nearest known name, or all of them where none is near."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {nearest[0]!r}?" if nearest else "; known here: " + ", ".join(known)
