"""API errors: status codes with a body of one line in OpenAI's shape."""

from __future__ import annotations

from http import HTTPStatus

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refused or failed request.

    Args:
        status: HTTP status code.
        message: What was found, what was expected, what to do.
        code: Short name for programs. Defaults to the name of the status.
        param: Field of the request body that is wrong. Defaults to None.
        retry_after: Seconds after which to try again, sent as ``Retry-After``. Defaults to None.

    Example:
        >>> ApiError(404, "no such model", code="model_not_found", param="model").body["error"]["type"]
        'not_found_error'
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, " ".join(message.split()), param
        self.code = code or HTTPStatus(status).phrase.lower().replace(" ", "_")
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """Body of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Error 400 that names the field."""
    return ApiError(400, message, param=param, code=code)
