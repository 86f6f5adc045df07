"""Requests to the Hugging Face Hub: bounded, repeated where that helps, and with errors that say what to do."""

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

from ...errors import CheckpointError, EnvironmentFailure, Interrupted
from ..open_source import quoted

RETRIES = 3
"""How often a request is repeated before a byte of its answer has come; every byte that comes starts the count anew."""

FIRST_WAIT = 0.5
"""Seconds before the first repetition; twice as long before each further one."""

LONGEST_WAIT = 60
"""The most seconds that are waited where the Hub asks for patience; where it asks for more, the user is told."""

_AGAIN = {408, 429, 500, 502, 503, 504}
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Place:
    """What a request is about, as errors name it.

    Args:
        repo: the repository's id.
        revision: the branch, tag or commit.
        file: the file in it; empty for the repository itself.
    """

    repo: str
    revision: str
    file: str = ""

    def __str__(self) -> str:
        revision = self.revision[:12] if is_commit(self.revision) else self.revision
        return f"{self.repo}@{revision}" + (f"/{self.file}" if self.file else "")


class _TransientError(Exception):
    """A request failed in a way that may pass. Args: what happened; the seconds that the server asks to wait, or 0."""

    def __init__(self, found: str, seconds: float = 0) -> None:
        super().__init__(found)
        self.seconds = seconds


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit hash, which never comes to mean another commit."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def is_offline() -> bool:
    """Whether the user has forbidden requests (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """Where the Hub is: https://huggingface.co, or HF_ENDPOINT."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_logged_in() -> bool:
    """Whether there is a token to send."""
    return _token() is not None


# ------------------------------------------------------------------------------------------------ reading


def read_json(place: Place, url: str, limit: int) -> Any:
    """The JSON document at `url`, of at most `limit` bytes.

    Raises:
        CheckpointError: the Hub refuses, or the answer is no such document.
        EnvironmentFailure: the Hub can't be reached, or breaks off again and again.
    """
    patience = _Patience(place)
    while True:
        body = bytearray()
        try:
            for chunk in _request(place, url):
                body += chunk
                if len(body) > limit:
                    raise CheckpointError(f"{place}: {endpoint()} answers with more than {limit:,} bytes of JSON")
            return json.loads(body)
        except _TransientError as error:
            patience.wait(error)
        except (ValueError, RecursionError):
            raise CheckpointError(
                f"{place}: {endpoint()} doesn't answer with JSON, as the Hub does: check HF_ENDPOINT and the proxy"
            ) from None


def read_file(
    place: Place, url: str, start: int, end: int, total: int, stop: threading.Event | None = None
) -> Iterator[bytes]:
    """The bytes of a file from `start` to `end` (exclusive), in pieces; after a broken connection it goes on.

    Args:
        place: the file.
        url: where it is.
        start: the first byte.
        end: one past the last byte.
        total: the file's size in bytes, which the server must confirm.
        stop: set by another thread to end the request.

    Raises:
        CheckpointError: the Hub refuses, or has another file there.
        EnvironmentFailure: the Hub can't be reached, or breaks off again and again.
        Interrupted: `stop` was set.
    """
    patience = _Patience(place, stop)
    while start < end:
        try:
            for chunk in _request(place, url, (start, end, total)):
                start += len(chunk)
                patience.renew()
                yield chunk
            if start < end:
                raise _TransientError("it sent fewer bytes than were asked for")
        except _TransientError as error:
            patience.wait(error)


class _Patience:
    """How often, and for how long, a request is still waited for."""

    def __init__(self, place: Place, stop: threading.Event | None = None) -> None:
        self._place = place
        self._stop = stop or threading.Event()
        self._tries = 0

    def renew(self) -> None:
        """Something came. Raises Interrupted where the whole work was stopped."""
        self._tries = 0
        if self._stop.is_set():
            raise Interrupted("stopped: the same command goes on")

    def wait(self, error: _TransientError) -> None:
        """Wait before the next try. Raises EnvironmentFailure where there is none."""
        if self._tries == RETRIES or error.seconds > LONGEST_WAIT:
            again = f"in {error.seconds:.0f} seconds" if error.seconds else "later"
            if self._place.file:
                said = f"{endpoint()} doesn't give it: {error}: run the same command again {again}; it goes on"
            else:  # it may have been meant as a path
                said = f"there is no such directory here: check the path. If it is a model of {endpoint()}: {error}: "
                said += f"run the same command again {again}"
            raise EnvironmentFailure(f"{self._place}: {said}")
        if self._stop.wait(max(error.seconds, FIRST_WAIT * 2**self._tries)):
            raise Interrupted("stopped: the same command goes on")
        self._tries += 1


def _request(place: Place, url: str, span: tuple[int, int, int] | None = None) -> Iterator[bytes]:
    """The pieces of one answer's body: all of it, or the bytes [start, end) of a file of a known size."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    session: Any = get_session()  # with the user's proxies and certificates; it sends no token to another host
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
                _refuse(place, response.status_code, response.headers, bool(token))
            whole = response.status_code == 200
            if span:
                _check_span(place, response.headers, whole, start, total)
            skip, left = (start if whole else 0), end - start
            for chunk in response.iter_raw():
                piece = chunk[skip : skip + left]
                skip = max(0, skip - len(chunk))
                left -= len(piece)
                if piece:
                    yield piece
                if not left:  # a server that knows no ranges would send the rest too
                    return
    except errors.HTTPError as error:
        if isinstance(error, errors.TransportError) and not isinstance(error, errors.UnsupportedProtocol):
            raise _TransientError(f"the connection failed ({str(error) or type(error).__name__})") from error
        raise EnvironmentFailure(f"{place}: {endpoint()} can't be asked ({error}): check HF_ENDPOINT") from error
    except errors.InvalidURL as error:
        raise EnvironmentFailure(f"{place}: {endpoint()} is no address ({error}): check HF_ENDPOINT") from error
    except OfflineModeIsEnabled:
        raise CheckpointError(f"{place}: {OFFLINE}") from None


OFFLINE = "isn't in the cache, and HF_HUB_OFFLINE forbids asking the Hub for it: run the same command with it unset"
"""What is said of something that is missing while requests are forbidden."""


def _errors_of(session: Any) -> Any:
    """The library of the client's exceptions: httpx, or httpx2 since huggingface_hub 2."""
    modules = (base.__module__.partition(".")[0] for base in type(session).__mro__)
    return sys.modules[next(module for module in modules if module.startswith("httpx"))]


def _token() -> str | None:
    """The user's token, from where huggingface_hub has it.

    Not by its build_hf_headers, which now and then sends a telemetry request of its own.
    """
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token and not (token.isascii() and token.isprintable()):
        raise CheckpointError(f"the token of the Hugging Face Hub has characters that no token has: {_LOG_IN}")
    return token


def _check_span(place: Place, headers: Any, whole: bool, start: int, total: int) -> None:
    """Refuse an answer that isn't about the file, or the bytes of it, that were asked for."""
    if headers.get("Content-Encoding", "identity") != "identity":
        raise EnvironmentFailure(f"{place}: the answer comes compressed, unasked for: check the proxy")
    if whole:
        found = headers.get("Content-Length", str(total))
        agrees = found == str(total)
    else:
        found = headers.get("Content-Range", "")
        agrees = found.startswith(f"bytes {start}-") and found.endswith(f"/{total}")
    if not agrees:
        raise CheckpointError(
            f"{place}: should have {total:,} bytes, and the server sends something else ({quoted(found)}): the file "
            "was replaced, or a proxy answers in the Hub's stead; try again without it"
        )


# ------------------------------------------------------------------------------------------------ refusals

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN (https://huggingface.co/settings/tokens has your tokens)"


def describe_gated(place: Place, logged_in: bool) -> str:
    """What to do about a repository whose files need their owner's consent."""
    page = f"{endpoint()}/{place.repo}"
    if logged_in:
        return (
            f"{place}: is gated, and your account may not read it (yet): accept its licence at {page}, wait for the "
            "owner's consent where he asks for it, and see that your token may read gated repositories"
        )
    return f"{place}: is gated, and no token was found: accept its licence at {page}, then {_LOG_IN}"


def _refuse(place: Place, status: int, headers: Any, logged_in: bool) -> None:
    """Raise what an answer without content means."""
    code, said = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    says = f" (it says {quoted(said)})" if said else ""
    if status in _AGAIN:
        what = "it asks for fewer requests" if status == 429 else f"it fails with status {status}"
        login = "" if status != 429 or logged_in else " (with a token, more are allowed)"
        raise _TransientError(what + login, _seconds_asked_for(headers))
    if code == "GatedRepo":
        raise CheckpointError(describe_gated(place, logged_in))
    if status == 401 and logged_in and code != "RepoNotFound":
        source = "in HF_TOKEN" if os.environ.get("HF_TOKEN") else "that is stored"
        raise CheckpointError(f"{place}: the Hub refuses the token {source}{says}: it may have expired; {_LOG_IN}")
    if code == "RevisionNotFound":
        raise CheckpointError(
            f"{place}: the repository is there, but has no branch, tag or commit {quoted(place.revision)}: see "
            f"{endpoint()}/{place.repo}/commits/main"
        )
    if code == "EntryNotFound" or (status == 404 and place.file and not code):
        raise CheckpointError(f"{place}: the repository has no such file at this revision")
    if status in (401, 404) and (code == "RepoNotFound" or not place.file):
        private = "or your token may not see it" if logged_in else f"or it is private: {_LOG_IN}"
        raise CheckpointError(
            f"{place}: there is no such directory here, and no such model at {endpoint()}: check its name; {private}"
        )
    if status in (401, 403):
        raise CheckpointError(f"{place}: the Hub refuses to give it (status {status}){says}: {_LOG_IN}")
    raise EnvironmentFailure(f"{place}: {endpoint()} answers with status {status}{says}: check HF_ENDPOINT, try again")


def _seconds_asked_for(headers: Any) -> float:
    """The seconds that an answer asks to wait before the next request; 0 where it says nothing of it."""
    after = headers.get("Retry-After", "").strip()
    limit = re.search(r"\bt\s*=\s*(\d{1,9})", headers.get("RateLimit", ""))  # "api";r=0;t=55
    if re.fullmatch(r"\d{1,9}", after):
        return float(after)
    return float(limit[1]) if limit else 0


# ------------------------------------------------------------------------------------------------ many at once


def in_parallel(
    work: Callable[[_Item, threading.Event], _Result],
    items: Sequence[_Item],
    threads: int,
    tick: Callable[[], None] | None = None,
) -> list[_Result]:
    """``work(item, stop)`` for each item, in threads; the results in the items' order.

    After the first error, or a Ctrl-C, `stop` is set, and what runs is waited for.

    Args:
        work: called in several threads at once.
        items: what to call it with.
        threads: how many at a time.
        tick: called in this thread ten times a second.

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
