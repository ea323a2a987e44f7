"""Errors in the format of OpenAI's API."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: of HTTP.
        type: as the API names it: "invalid_request_error", "authentication_error", "server_error", "timeout_error".
        param: the field that it is about, None for the whole request.
        code: a name for programs, None where there is no more to say than the type does.
        retry: whether it may help to send the same again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.retry = retry

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer. OpenAI's clients send again what failed by a status of 500 or more, unless they are told not to."""
        return {} if self.retry else {"x-should-retry": "false"}


def server_error(message: str, status: int = 500, code: str | None = None) -> ApiError:
    """An error that is not the client's."""
    return ApiError(status, message, type="server_error", code=code)


def too_slow(seconds: float) -> ApiError:
    """A request that took longer than it may."""
    return ApiError(
        504,
        f"the answer was not complete after {seconds:g} s; ask for fewer tokens, or try again when there is less to do.",
        type="timeout_error",
        code="timeout",
        retry=False,  # the work would be queued once more
    )
