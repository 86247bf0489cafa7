"""Pushes to the Hub during training: the Trainer makes them in the background, and never looks whether they failed."""

from __future__ import annotations

import logging
from typing import Any

from huggingface_hub import errors

from .usage import one_line

logger = logging.getLogger(__name__)

# Also of no answer at all. By its place among the bases: which HTTP library huggingface_hub uses changes.
HTTP_ERROR: type[Exception] = next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def tell_failed(pushes: Any) -> None:
    """A warning for each push of the Trainer's `PushInProgress` that is over and failed, once; None: there was none."""
    for job in [job for job in pushes.jobs if job.done()] if pushes is not None else ():
        pushes.jobs.remove(job)
        error = None if job.cancelled() else job.exception()
        if error is not None:
            logger.warning("a push during training failed, training goes on: %s", one_line(reason_of(error), 300))


def reason_of(error: BaseException) -> str:
    """The status and what the server said of it, or the error's own words; its cause where a library wrapped it."""
    while error.__cause__ is not None and not isinstance(error, HTTP_ERROR):
        error = error.__cause__
    response, said = getattr(error, "response", None), getattr(error, "server_message", None)
    return f"{response.status_code}: {said}" if response is not None and said else str(error) or type(error).__name__
