"""Downloads: a file from a web address, whole or not at all, whatever the address and its server are."""

import contextlib
import http.client
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

from lora import disk
from lora.request import without_secrets

TIMEOUT = 30.0
"""Seconds without a byte."""
TRIES = 3
SHOWN = 200
"""Characters of an address or an error that a message shows."""


def download(url: str, path: Path, most: int) -> None:
    """The file at an http(s) address into `path`, of `most` bytes at most; tried again where the network fails.

    Redirects are followed to http(s) alone. Raises ValueError with one sentence that has none of the address' secrets,
    and DiskError.
    """
    called = without_secrets(url)[:SHOWN]
    for attempt in range(1, TRIES + 1):
        try:
            _stream(url, path, most)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == TRIES:
                why = told(error.reason)
                raise ValueError(f"{called} answers {error.code} {why}: {_advice(error.code)}") from None
        except (http.client.InvalidURL, UnicodeError):  # their texts hold what the address does
            raise ValueError(
                f"{called} is no address that can be asked: a port is a number, a space is written %20, and no user or"
                " password may be in it; copy it again"
            ) from None
        except disk.DiskError:
            raise
        except (OSError, EOFError, http.client.HTTPException) as error:
            if attempt == TRIES:
                raise ValueError(f"{called} could not be fetched: {told(error)} ({TRIES} tries)") from None
        time.sleep(2 ** (attempt - 1))


def _advice(status: int) -> str:
    if status in (401, 403):
        return (
            "it asks for a login; add your token to the address (?token=…, as Civitai takes it), sign the address again"
            " if it was signed, or give one that opens without"
        )
    return "check the address" if status < 500 else "try again later"


def _stream(url: str, path: Path, most: int) -> None:
    opener = urllib.request.OpenerDirector()  # build_opener would add ftp, file and data, for redirects too
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={"User-Agent": "flux-lora-trainer"})
    with opener.open(request, timeout=TIMEOUT) as answer, disk.writing(path), path.open("wb") as out:
        announced, done = answer.length, 0
        while block := answer.read(1 << 20):
            done += len(block)
            if done > most:
                raise ValueError(f"{without_secrets(url)[:SHOWN]} is larger than {most / 2**30:g} GiB")
            out.write(block)
    if announced is not None and done < announced:
        with contextlib.suppress(OSError):
            path.unlink()
        raise EOFError(f"it ended after {done} bytes of {announced}")


def told(error: object) -> str:
    """The first line of an error, in which the addresses are without their secrets; of the system's own its words."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason
    if isinstance(error, OSError) and error.strerror:
        error = error.strerror
    line = str(error).strip().partition("\n")[0][:SHOWN]
    return re.sub(r"//[^/\s]*@", "//", re.sub(r"[?#][^\s'\"]*", "", line))
