"""Sends requests to the Hugging Face Hub: bounded answers, retries, and errors that say what to do."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import CheckpointError, EnvironmentFailure, HubUnreachable, Interrupted, ModelNotFound
from ..open_source import quoted

RETRIES = 3
"""The number of retries of a request without progress; each received byte resets the count."""

FIRST_WAIT = 0.5
"""The wait before the first retry in seconds; it doubles with each further retry."""

LONGEST_WAIT = 60
"""The maximum wait in seconds that the Hub may ask for; a longer one is an error."""

_RETRYABLE = {408, 429, 500, 502, 503, 504}
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class HubLocation:
    """The target of a request, as errors name it.

    Args:
        repo: the repository's id.
        revision: the branch, tag or commit.
        file: the path of a file in the repository; empty for the repository itself.
        implied: whether the user named no revision, so texts about the repository itself don't name it either.
    """

    repo: str
    revision: str
    file: str = ""
    implied: bool = False

    def __str__(self) -> str:
        if self.implied and not self.file:
            return self.repo
        revision = self.revision[:12] if is_commit(self.revision) else self.revision
        return f"{self.repo}@{revision}" + (f"/{self.file}" if self.file else "")


class _TransientError(Exception):
    """A request failed for a reason that may be temporary.

    Args:
        problem: the reason.
        seconds: the wait that the server asks for; 0 if it does not.
    """

    def __init__(self, problem: str, seconds: float = 0) -> None:
        super().__init__(problem)
        self.seconds = seconds


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash, which always refers to the same commit."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """The URL of the Hub: HF_ENDPOINT or https://huggingface.co."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_logged_in() -> bool:
    """Whether there is a token."""
    return _token() is not None


# ------------------------------------------------------------------------------------------------ reading


def fetch_json(location: HubLocation, url: str, limit: int) -> Any:
    """Fetch the JSON document at `url`, of at most `limit` bytes.

    Raises:
        CheckpointError: the Hub refuses access, or the answer is too large or not JSON.
        EnvironmentFailure: the Hub is not reachable, or all retries failed.
    """
    retry = _Retry(location)
    while True:
        body = bytearray()
        try:
            for chunk in _request(location, url):
                body += chunk
                if len(body) > limit:
                    raise CheckpointError(f"{location}: {endpoint()} answers with more than {limit:,} bytes of JSON")
            return json.loads(body)
        except _TransientError as error:
            retry.wait(error)
        except (ValueError, RecursionError):
            raise CheckpointError(
                f"{location}: {endpoint()} is not a valid Hub API (it sent no JSON): check HF_ENDPOINT and the proxy"
            ) from None


def read_file(
    location: HubLocation, url: str, start: int, end: int, total: int, stop: threading.Event | None = None
) -> Iterator[bytes]:
    """Yield the bytes of a file from `start` to `end` (exclusive) in chunks, reconnecting after a broken connection.

    Args:
        location: the file, for errors.
        url: the download URL.
        start: the offset of the first byte.
        end: the offset after the last byte.
        total: the size of the file in bytes, which the server must confirm.
        stop: an event that another thread sets to end the request.

    Raises:
        CheckpointError: the Hub refuses access, or has another file at the URL.
        EnvironmentFailure: the Hub is not reachable, or all retries failed.
        Interrupted: `stop` was set.
    """
    retry = _Retry(location, stop)
    while start < end:
        try:
            for chunk in _request(location, url, (start, end, total)):
                start += len(chunk)
                retry.reset()
                yield chunk
            if start < end:
                raise _TransientError("it sent fewer bytes than requested")
        except _TransientError as error:
            retry.wait(error)


class _Retry:
    """Counts the retries of a request and waits between them."""

    def __init__(self, location: HubLocation, stop: threading.Event | None = None) -> None:
        self._location = location
        self._stop = stop or threading.Event()
        self._retries = 0

    def reset(self) -> None:
        """Reset the count after progress. Raises Interrupted if `stop` was set."""
        self._retries = 0
        if self._stop.is_set():
            raise Interrupted("stopped: run the same command to resume")

    def wait(self, error: _TransientError) -> None:
        """Wait before the next retry. Raises EnvironmentFailure if there are no more retries."""
        if self._retries == RETRIES or error.seconds > LONGEST_WAIT:
            when = f"in {error.seconds:.0f} seconds" if error.seconds else "later"
            if self._location.file:
                problem = f"download from {endpoint()} failed: {error}: run the same command again {when} to resume"
                raise EnvironmentFailure(f"{self._location}: {problem}")
            problem = f"{NO_DIRECTORY} here: check the path. If it is a model on "  # it may have been meant as a path
            raise HubUnreachable(f"{self._location}: {problem}{endpoint()}: {error}: run the same command again {when}")
        if self._stop.wait(max(error.seconds, FIRST_WAIT * 2**self._retries)):
            raise Interrupted("stopped: run the same command to resume")
        self._retries += 1


def _request(location: HubLocation, url: str, span: tuple[int, int, int] | None = None) -> Iterator[bytes]:
    """Yield the body of one answer in chunks.

    Args:
        location: the target, for errors.
        url: the URL.
        span: the requested range and the size of the file (start, end, size); None for the complete body.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    # huggingface_hub's session uses the configured proxies and certificates and sends no token to other hosts
    session: Any = get_session()
    errors = _errors_of(session)
    token = _token()
    headers = {"User-Agent": "mergeloom", "Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    start, end, total = span or (0, sys.maxsize, -1)
    if span:
        headers["Range"] = f"bytes={start}-{end - 1}"
    try:
        with session.stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        ) as response:
            if response.status_code not in (200, 206):
                _refuse(location, response.status_code, response.headers, bool(token))
            complete = response.status_code == 200
            if span:
                _check_span(location, response.headers, complete, start, total)
            skip, left = (start if complete else 0), end - start
            for chunk in response.iter_raw():
                piece = chunk[skip : skip + left]
                skip = max(0, skip - len(chunk))
                left -= len(piece)
                if piece:
                    yield piece
                if not left:  # a server without range support would send the rest, too
                    return
    except errors.HTTPError as error:
        if isinstance(error, errors.TransportError) and not isinstance(error, errors.UnsupportedProtocol):
            raise _TransientError(f"the connection failed ({str(error) or type(error).__name__})") from error
        raise EnvironmentFailure(f"{location}: {endpoint()} is not usable ({error}): check HF_ENDPOINT") from error
    except errors.InvalidURL as error:
        raise EnvironmentFailure(f"{location}: {endpoint()} is not a valid URL ({error}): check HF_ENDPOINT") from error
    except OfflineModeIsEnabled:
        raise CheckpointError(f"{location}: {OFFLINE}") from None


NO_DIRECTORY = "there is no such directory"
"""The beginning of errors about a name that is neither a directory nor a model of the Hub."""

OFFLINE = "isn't in the cache, and HF_HUB_OFFLINE forbids downloads: unset it and run the same command again"
"""The error for something that is not cached while HF_HUB_OFFLINE is set."""


def _errors_of(session: Any) -> Any:
    """The module of the client's exceptions: httpx, or httpx2 since huggingface_hub 2."""
    modules = (base.__module__.partition(".")[0] for base in type(session).__mro__)
    return sys.modules[next(module for module in modules if module.startswith("httpx"))]


def _token() -> str | None:
    """The user's token from huggingface_hub.

    huggingface_hub's build_hf_headers is not used because it may send a telemetry request.
    """
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token and not (token.isascii() and token.isprintable()):
        raise CheckpointError(f"the Hugging Face Hub token contains invalid characters: {_LOG_IN}")
    return token


def _check_span(location: HubLocation, headers: Any, complete: bool, start: int, total: int) -> None:
    """Raise an error unless an answer is for the requested file and the requested range (or the complete file)."""
    if headers.get("Content-Encoding", "identity") != "identity":
        raise EnvironmentFailure(f"{location}: the answer is compressed, which was not requested: check the proxy")
    if complete:
        value = headers.get("Content-Length", str(total))
        matches = value == str(total)
    else:
        value = headers.get("Content-Range", "")
        matches = value.startswith(f"bytes {start}-") and value.endswith(f"/{total}")
    if not matches:
        raise CheckpointError(
            f"{location}: expected {total:,} bytes, but the server sends something else ({quoted(value)}): the file "
            "was replaced, or a proxy answers instead of the Hub; try again without it"
        )


# ------------------------------------------------------------------------------------------------ errors

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN (your tokens: https://huggingface.co/settings/tokens)"


def describe_gated(location: HubLocation, logged_in: bool) -> str:
    """The error for a gated repository, whose files require the owner's consent."""
    page = f"{endpoint()}/{location.repo}"
    if logged_in:
        return (
            f"{location}: is gated, and your account may not read it (yet): accept its licence at {page}, wait for the "
            "owner's approval if required, and check that your token may read gated repositories"
        )
    return f"{location}: is gated, and no token was found: accept its licence at {page}, then {_LOG_IN}"


def _refuse(location: HubLocation, status: int, headers: Any, logged_in: bool) -> None:
    """Raise the error for an answer with an error status."""
    code, message = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    detail = f" (message: {quoted(message)})" if message else ""
    if status in _RETRYABLE:
        problem = "too many requests" if status == 429 else f"it fails with status {status}"
        hint = "" if status != 429 or logged_in else " (a token raises the limit)"
        raise _TransientError(problem + hint, _seconds_asked_for(headers))
    if code == "GatedRepo":
        raise CheckpointError(describe_gated(location, logged_in))
    if status == 401 and logged_in and code != "RepoNotFound":
        source = "in HF_TOKEN" if os.environ.get("HF_TOKEN") else "from `hf auth login`"
        raise CheckpointError(f"{location}: the Hub rejects the token {source}{detail}: it may have expired; {_LOG_IN}")
    if code == "RevisionNotFound":
        raise ModelNotFound(
            f"{location}: the repository exists, but has no branch, tag or commit {quoted(location.revision)}: see "
            f"{endpoint()}/{location.repo}/commits/main"
        )
    if code == "EntryNotFound" or (status == 404 and location.file and not code):
        raise CheckpointError(f"{location}: the repository has no such file at this revision")
    if status in (401, 404) and (code == "RepoNotFound" or not location.file):
        private = "or your token has no access" if logged_in else f"or it is private: {_LOG_IN}"
        raise ModelNotFound(
            f"{location}: {NO_DIRECTORY} here, and no such model at {endpoint()}: check its name; {private}"
        )
    if status in (401, 403):
        raise CheckpointError(f"{location}: the Hub refuses access (status {status}){detail}: {_LOG_IN}")
    raise EnvironmentFailure(f"{location}: {endpoint()} answers with status {status}{detail}: check HF_ENDPOINT")


def _seconds_asked_for(headers: Any) -> float:
    """The wait in seconds that an answer asks for before the next request; 0 if it does not."""
    after = headers.get("Retry-After", "").strip()
    limit = re.search(r"\bt\s*=\s*(\d{1,9})", headers.get("RateLimit", ""))  # "api";r=0;t=55
    if re.fullmatch(r"\d{1,9}", after):
        return float(after)
    return float(limit[1]) if limit else 0


# ------------------------------------------------------------------------------------------------ concurrency


def in_parallel(
    work: Callable[[_Item, threading.Event], _Result],
    items: Sequence[_Item],
    threads: int,
    tick: Callable[[], None] | None = None,
) -> list[_Result]:
    """Call ``work(item, stop)`` for each item in a thread pool and return the results in the order of the items.

    After the first error or Ctrl-C, `stop` is set, pending calls are cancelled and running ones are waited for.

    Args:
        work: the function to call. It should return early once `stop` is set.
        items: the items.
        threads: the number of threads.
        tick: a function that is called in this thread ten times a second.

    Raises:
        MergeloomError: the first error.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(threads, thread_name_prefix="hub") as pool:
        futures = [pool.submit(work, item, stop) for item in items]
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.1 if tick else None, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if tick:
                    tick()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]
