"""One file over HTTP: bounded in size and in time, and never half-used."""

import http.client
import threading
import time
import urllib.request

ANSWER_SECONDS = 5  # until the first answer: a machine without a network is told soon
SILENCE_SECONDS = 20
TOTAL_SECONDS = 180
SLOWEST = 200_000  # bytes per second of a large file: its time on top of TOTAL_SECONDS
CHUNK_BYTES = 1 << 16


class DownloadError(Exception):
    """The file could not be fetched; the text is a short reason."""


def fetch(url: str, size: int) -> bytes:
    """Returns what `url` holds, at most size + 1 bytes of it: one too many is enough to see that it is another file.

    Raises DownloadError when there is no answer in ANSWER_SECONDS, then nothing is heard for SILENCE_SECONDS, or the
    whole takes more than TOTAL_SECONDS and a second for each SLOWEST bytes.
    """
    allowed = TOTAL_SECONDS + size / SLOWEST
    deadline = time.monotonic() + allowed
    received = bytearray()
    try:
        with _open(url) as response:
            while len(received) <= size and (chunk := response.read1(CHUNK_BYTES)):
                received += chunk
                if time.monotonic() > deadline:
                    raise DownloadError(f"too slow: {len(received):,} of {size:,} bytes in {allowed:.0f} s")
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(short_reason(error)) from error
    return bytes(received[: size + 1])


def _open(url: str) -> http.client.HTTPResponse:
    """The answer of `url`. Its name is looked up without a time limit, so it is asked for in a thread of its own."""
    outcome: list[http.client.HTTPResponse | Exception] = []

    def ask() -> None:
        try:
            outcome.append(urllib.request.urlopen(url, timeout=SILENCE_SECONDS))
        except (OSError, http.client.HTTPException) as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not outcome:
        raise DownloadError(f"no answer in {ANSWER_SECONDS} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def short_reason(error: BaseException) -> str:
    """The innermost cause of a network failure in a few words, out of the layers libraries wrap around it."""
    reason, seen = type(error).__name__, error
    while seen is not None:
        reason = getattr(seen, "strerror", None) or str(seen) or reason
        seen = seen.__cause__ or seen.__context__
    return reason
