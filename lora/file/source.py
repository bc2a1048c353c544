"""Where a LoRA comes from: a file, a folder, a trainer's tar, the Hugging Face Hub, or a web address.

Whatever it is, one safetensors file comes out; its content is `weights.read`'s to judge. Nothing is ever unpickled.
"""

import base64
import binascii
import os
import re
from pathlib import Path
from urllib.parse import parse_qs, unquote, unquote_to_bytes, urlsplit

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

from lora import disk, wait, web
from lora.file import weights
from lora.pictures import archive
from lora.request import without_secrets

MAX_BYTES = 4 * 2**30
"""Of a download. A LoRA of rank 128 on every layer of FLUX.1 in 32 bits has 2 GiB."""
SHOWN = 200
"""Characters of an input that a message shows."""
USUAL_NAMES = ("lora.safetensors", "pytorch_lora_weights.safetensors")
"""Which file is meant where a repository or folder holds several."""


def fetch(source: str, folder: Path, called: str, token: str | None = None) -> Path:
    """The safetensors file that `source` means, below `folder` where it had to be downloaded or taken out of a tar.

    `source` is the path of a safetensors file, a tar or a folder, a Hub id (`owner/name`, or `owner/name/file`; also
    with `huggingface.co/` before it), an http(s) address of a safetensors or a tar, a page of Civitai with its
    modelVersionId, or a `data:` address, which holds the file itself. `token` is for the Hub; without one HF_TOKEN
    counts. Raises ValueError that begins with `called`, the input's name.
    """
    try:
        return weights.take_out(wait.interruptibly(lambda: _find(source.strip(), folder, token)), folder)
    except ValueError as error:
        raise ValueError(f"{called}: {error}") from error


def _find(source: str, folder: Path, token: str | None) -> Path:
    if source[:5].lower() == "data:":
        return _from_data(source, folder)
    if re.match(r"(www\.)?(huggingface\.co|civitai\.com|replicate\.com)/", source):  # as flux-dev-lora takes it
        source = f"https://{source}"
    try:
        url = urlsplit(source)
    except ValueError:  # its text may hold a password
        raise ValueError("this address cannot be read: its server's name is wrong; copy it again") from None
    if url.scheme in ("http", "https"):
        if url.hostname in ("huggingface.co", "www.huggingface.co"):
            return _from_hub(*_hub_file(url.path), folder, token)
        return _download(_file_of_page(source), folder)
    path = Path(source)
    if source and os.path.isfile(path):  # Path.is_file raises where a name is too long, before Python 3.14
        return path
    if source and os.path.isdir(path):
        files = sorted(str(file.relative_to(path)) for file in path.rglob("*.safetensors"))
        return path / _the_one(files, f"the folder {path.name!r}")
    ends = r"\.(tar|tar\.gz|tgz|zip)$" if source.count("/") > 1 else r"\.(tar|tar\.gz|tgz|zip|safetensors)$"
    if source.startswith((".", "/", "~")) or re.search(ends, source, re.IGNORECASE):
        raise ValueError(f"there is no file {_shown(source)!r} where this runs; check its path")
    part = r"[\w.-]{1,96}"
    if re.fullmatch(rf"{part}/{part}[:/]{part}", source) and not source.endswith(".safetensors"):
        raise ValueError(
            f"{_shown(source)!r} is no file here, and a version of a model on Replicate cannot be fetched by its name:"
            " give the address of its weights (the training's output); a file on the Hub is owner/name/file.safetensors"
        )
    if re.fullmatch(rf"{part}/{part}(/[\w./ -]{{1,{SHOWN}}}\.safetensors)?", source):
        owner, name, *file = source.split("/")
        return _from_hub(f"{owner}/{name}", "/".join(file), None, folder, token)
    raise ValueError(
        f"{_shown(source)!r} is no file or folder here, no http or https address and no Hub id (owner/name); give one"
        " of these"
    )


def _from_data(source: str, folder: Path) -> Path:
    """The bytes that a `data:` address (RFC 2397) holds, as a trainer without a server's storage answers them."""
    head, comma, content = source.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        if head.lower().endswith(";base64"):
            data = base64.b64decode(unquote(content) if "%" in content[:4096] else content, validate=True)
        else:
            data = unquote_to_bytes(content)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"this data: address of {len(source):,} characters is damaged ({error}); copy it whole"
        ) from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"this data: address holds more than {MAX_BYTES / 2**30:g} GiB: no LoRA does")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data"
    with disk.writing(path):
        path.write_bytes(data)
    return path


def _file_of_page(address: str) -> str:
    """An address of a page about a LoRA -> that of its file, where the page's own tells it; any other as it is.

    Raises ValueError with what to give instead where it does not.
    """
    url = urlsplit(address)
    host, query = (url.hostname or "").removeprefix("www."), parse_qs(url.query)
    if host == "civitai.com" and url.path.startswith("/models/"):
        version = query.get("modelVersionId", [""])[0]
        if not version.isdecimal():
            raise ValueError(
                f"{_shown(address)} is a page of Civitai: give the address of its Download button,"
                " https://civitai.com/api/download/models/<version's number>"
            )
        token = f"?token={query['token'][0]}" if "token" in query else ""
        return f"https://civitai.com/api/download/models/{version}{token}"
    if host == "replicate.com":
        raise ValueError(
            f"{_shown(address)} is a page of Replicate: give the address of the weights themselves, which the training"
            " there shows as its output"
        )
    return address


def _shown(source: str) -> str:
    """An input for a message: without its secrets, and cut."""
    plain = without_secrets(source)
    return plain if len(plain) <= SHOWN else f"{plain[: SHOWN - 3]}..."


def _the_one(files: list[str], where: str) -> str:
    usual = [file for file in files if file.rpartition("/")[2] in USUAL_NAMES]
    for chosen in (files, usual):
        if len(chosen) == 1:
            return chosen[0]
    if not files:
        raise ValueError(f"{where} holds no .safetensors file")
    raise ValueError(
        f"{where} holds {len(files)} safetensors files ({_shown(', '.join(files[:5]))}): say which by its name"
    )


def _hub_file(path: str) -> tuple[str, str, str | None]:
    """The repository, the file ("" where none is named) and the revision (None: the main one) of a Hub address.

    `/owner/name/blob/refs%2Fpr%2F1/v2/lora.safetensors` -> `owner/name`, `v2/lora.safetensors` and `refs/pr/1`.
    """
    owner, name, kind, revision, *file = [*map(unquote, path.strip("/").split("/")), "", "", ""]
    if kind not in ("blob", "resolve", "tree"):
        return f"{owner}/{name}", "", None
    return f"{owner}/{name}", "" if kind == "tree" else "/".join(file).strip("/"), revision or None


def _from_hub(repository: str, file: str, revision: str | None, folder: Path, token: str | None) -> Path:
    """Into `folder`, not into the library's cache: that would serve a private file to whoever names it next."""
    where = f"{repository}/{file}".rstrip("/") + (f" at {revision}" if revision else "")
    try:
        if not file:
            files = HfApi(token=token).list_repo_files(repository, revision=revision)
            file = _the_one([f for f in files if f.endswith(".safetensors")], f"the Hub's {where}")
        with disk.writing(folder / "hub"):
            return Path(hf_hub_download(repository, file, revision=revision, local_dir=folder / "hub", token=token))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the Hub has no {repository}, or the token may not read it, and there is no file of that name; check both"
        ) from error
    except disk.DiskError:
        raise
    except (HTTPError, OSError) as error:
        if wait.refused(error):
            raise ValueError(
                f"the Hugging Face Hub refuses the token for {repository}; give one that may read it, from"
                " https://huggingface.co/settings/tokens"
            ) from None
        told = f"{type(error).__name__}: {web.told(error)}"
        raise ValueError(f"{where} could not be fetched from the Hub ({told})") from None


def _download(url: str, folder: Path) -> Path:
    """The file at a web address, which is no web page."""
    folder.mkdir(parents=True, exist_ok=True)
    path, called = folder / "download", _shown(url)
    web.download(url, path, MAX_BYTES)
    with path.open("rb") as file:
        if archive.is_web_page(file.read(512)):
            raise ValueError(
                f"{called} answers with a web page: give the address of the file itself, not of a page that offers it"
                " or asks for a login"
            )
    return path
