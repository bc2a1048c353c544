"""Where a LoRA comes from: a file, a folder, a trainer's tar, the Hugging Face Hub, or a web address.

Whatever it is, one safetensors file comes out; its content is `weights.read`'s to judge. Nothing is ever unpickled.
"""

import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

from lora import disk, wait, weights

MAX_BYTES = 4 * 2**30
"""Of a download. A LoRA of rank 128 on every layer of FLUX.1 in 32 bits has 2 GiB."""
TIMEOUT = 30.0
"""Seconds without a byte."""
TRIES = 3
USUAL_NAMES = ("lora.safetensors", "pytorch_lora_weights.safetensors")
"""Which file is meant where a repository or folder holds several."""


def fetch(source: str, folder: Path, called: str, token: str | None = None) -> Path:
    """The safetensors file that `source` means, below `folder` where it had to be downloaded or taken out of a tar.

    `source` is the path of a safetensors file, a tar or a folder, a Hub id (`owner/name`, or `owner/name/file`), or an
    http(s) address of a safetensors or a tar. `token` is for the Hub; without one HF_TOKEN counts. Raises ValueError
    that begins with `called`, the input's name.
    """
    try:
        return weights.take_out(wait.interruptibly(lambda: _find(source.strip(), folder, token)), folder)
    except ValueError as error:
        raise ValueError(f"{called}: {error}") from error


def _find(source: str, folder: Path, token: str | None) -> Path:
    url = urlsplit(source)
    if url.scheme in ("http", "https"):
        at_hub = url.hostname in ("huggingface.co", "www.huggingface.co")
        return _from_hub(_hub_id(url.path), token) if at_hub else _download(source, folder)
    path = Path(source)
    if source and path.is_file():
        return path
    if source and path.is_dir():
        files = sorted(str(file.relative_to(path)) for file in path.rglob("*.safetensors"))
        return path / _the_one(files, f"the folder {path.name!r}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./ -]+\.safetensors)?", source):
        return _from_hub(source, token)
    raise ValueError(
        f"{source!r} is no file or folder here, no http or https address and no Hub id (owner/name); give one of these"
    )


def _the_one(files: list[str], where: str) -> str:
    usual = [file for file in files if file.rpartition("/")[2] in USUAL_NAMES]
    for chosen in (files, usual):
        if len(chosen) == 1:
            return chosen[0]
    if not files:
        raise ValueError(f"{where} holds no .safetensors file")
    raise ValueError(f"{where} holds {len(files)} safetensors files ({', '.join(files[:5])}): say which by its name")


def _hub_id(path: str) -> str:
    """`/owner/name/blob/main/lora.safetensors` -> `owner/name/lora.safetensors`, and `/owner/name` -> `owner/name`."""
    owner, name, *rest = [*unquote(path).strip("/").split("/"), ""]
    file = "/".join(rest[2:]).strip("/") if rest[0] in ("blob", "resolve") else ""
    return f"{owner}/{name}/{file}".rstrip("/")


def _from_hub(source: str, token: str | None) -> Path:
    owner, name, *rest = source.split("/")
    repository, file = f"{owner}/{name}", "/".join(rest)
    try:
        if not file:
            files = [f for f in HfApi(token=token).list_repo_files(repository) if f.endswith(".safetensors")]
            file = _the_one(files, f"the Hub's {repository}")
        return Path(hf_hub_download(repository, file, token=token))
    except RepositoryNotFoundError as error:
        raise ValueError(f"the Hub has no {repository}, or the token may not read it; check both") from error
    except (HTTPError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{source} could not be fetched from the Hub ({type(error).__name__}: {first})") from error


def _download(url: str, folder: Path) -> Path:
    """Tries again where the network fails or the server is unwell; follows redirects to http(s) alone."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "download"
    for attempt in range(1, TRIES + 1):
        try:
            _stream(url, path)
            return path
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == TRIES:
                raise ValueError(f"{_without_secrets(url)} answers {error.code} {error.reason}") from error
        except disk.DiskError:
            raise
        except (OSError, EOFError) as error:
            if attempt == TRIES:
                raise ValueError(f"{_without_secrets(url)} could not be fetched: {error}") from error
        time.sleep(2 ** (attempt - 1))
    raise AssertionError("the last try returns or raises")


def _stream(url: str, path: Path) -> None:
    handlers = (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
    opener = urllib.request.OpenerDirector()  # build_opener would add ftp, file and data, for redirects too
    for handler in (*handlers, urllib.request.HTTPRedirectHandler):
        opener.add_handler(handler())
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    opener.add_handler(urllib.request.UnknownHandler())
    request = urllib.request.Request(url, headers={"User-Agent": "flux-lora-trainer"})
    with opener.open(request, timeout=TIMEOUT) as answer, disk.writing(path), path.open("wb") as out:
        announced = answer.headers.get("Content-Length")
        done = 0
        while block := answer.read(1 << 20):
            done += len(block)
            if done > MAX_BYTES:
                raise ValueError(f"{_without_secrets(url)} is larger than {MAX_BYTES / 2**30:g} GiB: no LoRA is")
            out.write(block)
    if announced is not None and done < int(announced):
        raise EOFError(f"it ended after {done} bytes of {announced}")


def _without_secrets(url: str) -> str:
    """The address without its user, query and fragment, in which presigned addresses carry their keys."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"
