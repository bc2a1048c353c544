"""Publishing on the Hugging Face Hub: what is asked before a training, and the upload. The model card is `card.py`'s.

Uploaded are the weights, the card and pictures that the model drew; never the user's pictures or captions.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from lora import wait
from lora.request import TrainRequest
from lora.result import card
from lora.result.preview import Preview, thumbnail
from lora.result.tarball import BESIDE

TRIES = 4
FIRST_WAIT, LONGEST_WAIT = 2.0, 60.0
"""Seconds before the second try; it doubles each time, and a server that names a time (Retry-After) is believed."""


class UploadFailed(Exception):
    """The upload is given up; the message says why, and what to do."""


# ---------------------------------------------------------------- before the training


def check_access(repo_id: str, token: str, private: bool) -> None:
    """Asks the Hub whether this token may write to this repository, or make it.

    Raises ValueError that names the input where it may not, where the repository is public but was to be private, and
    where the Hub does not answer.
    """
    api = HfApi(token=token)
    owner = repo_id.split("/")[0]
    try:
        fault = _fault_of_token(api.whoami(), owner, repo_id)
        if fault is None:
            fault = _fault_of_repository(api, repo_id, private)
    except HTTPError as error:
        if wait.refused(error):
            fault = "hf_token: the Hugging Face Hub refuses this token; give one from https://huggingface.co/settings/tokens"
        else:
            why = _reason(error, token)
            fault = f"hf_repo_id: the Hugging Face Hub could not be asked for {repo_id} ({why}); try again"
    if fault:
        raise ValueError(fault)


def _fault_of_token(account: Mapping[str, Any], owner: str, repo_id: str) -> str | None:
    """What `whoami` says against writing to a repository of `owner`, or None."""
    organisations = {org["name"]: org.get("roleInOrg") for org in account.get("orgs", [])}
    known = {account["name"], *organisations}
    # The Hub takes a name in any case, but says it in one
    owner = next((name for name in known if name.casefold() == owner.casefold()), owner)
    if owner not in known:
        may = " or ".join(sorted(known))
        return f"hf_repo_id: hf_token is {account['name']}'s, who may not write to {owner}; the owner may be {may}"
    if organisations.get(owner) == "read":
        return f"hf_repo_id: {account['name']} may only read in {owner}; ask its administrators for the right to write"
    access = account.get("auth", {}).get("accessToken", {})
    writes = access.get("role") != "read"
    if access.get("role") == "fineGrained":
        scopes = access.get("fineGrained", {}).get("scoped", [])
        writes = any(
            "repo.write" in scope.get("permissions", [])
            and scope.get("entity", {}).get("name", "").casefold() in (owner.casefold(), repo_id.casefold())
            for scope in scopes
        )
    if not writes:
        return (
            f"hf_token: this token may not write to {repo_id}; make one with the role 'write' at"
            " https://huggingface.co/settings/tokens"
        )
    return None


def _fault_of_repository(api: HfApi, repo_id: str, private: bool) -> str | None:
    """What stands against uploading to a repository that exists, or None; also where it does not exist yet."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    if private and info.private is False:
        return f"hf_private: {repo_id} exists and is public; set hf_private to false, or name another repository"
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if _status(error) in (401, 403, 404):
            return f"hf_token: this token may not write to {repo_id}, which exists; give one that may"
        raise
    return None


# ---------------------------------------------------------------- the upload


def upload(
    repo_id: str,
    token: str,
    private: bool,
    files: Mapping[str, Path | bytes],
    log: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    given_up: Callable[[], bool] = lambda: False,
) -> str:
    """Puts the files into the repository in one commit, making it where it is not there; returns its page's URL.

    What a network does wrong, and a server for a while, is tried again (TRIES times in all). Once `given_up` says that
    nobody waits any more, nothing further is begun, nor committed. Raises UploadFailed.
    """
    disable_progress_bars()
    api = HfApi(token=token)
    wait = FIRST_WAIT
    for attempt in range(1, TRIES + 1):
        _go_on(given_up)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            additions = [
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in files.items()
            ]
            _go_on(given_up)
            api.preupload_lfs_files(repo_id, additions)  # create_commit would do it, and leave no place to ask after it
            _go_on(given_up)
            api.create_commit(repo_id, additions, commit_message="Upload the LoRA")
            return f"{api.endpoint}/{repo_id}"
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            cause = _cause(error)
            if attempt == TRIES or not _may_pass(cause):
                raise UploadFailed(_advice(repo_id, cause, token)) from error
            pause = min(LONGEST_WAIT, max(wait, _asked_to_wait(cause)))
            log(f"the upload to {repo_id} did not work ({_reason(cause, token)}); again in {pause:.0f} s")
            sleep(pause)
            wait *= 2
    raise AssertionError("the last try returns or raises")


def _go_on(given_up: Callable[[], bool]) -> None:
    if given_up():
        raise UploadFailed("the upload was given up: nobody waits for it")


def _cause(error: BaseException) -> BaseException:
    """The Hub's library wraps what goes wrong in a thread of its own into a RuntimeError."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _may_pass(error: BaseException) -> bool:
    """Whether it makes sense to try again: a broken connection, too many requests, a conflict, a server's own fault."""
    status = _status(error)
    if status is not None:
        return status in (408, 409, 425, 429) or status >= 500
    return isinstance(error, HTTPError | ConnectionError | TimeoutError | RuntimeError)


def _asked_to_wait(error: BaseException) -> float:
    """Seconds in the answer's Retry-After, or 0."""
    answer = error.response if isinstance(error, HfHubHTTPError) else None
    value = answer.headers.get("Retry-After", "") if answer is not None else ""
    return float(value) if value.isdigit() else 0.0


def _reason(error: BaseException, token: str) -> str:
    """One line, without the request's id and the advice that the Hub's library adds, and never with the token.

    httpx shows a header that it refuses, token and all.
    """
    status = _status(error)
    if status is not None:
        return f"the Hub answers {status}"
    line = str(error).strip().splitlines()[0] if str(error).strip() else "no more is known"
    secret = token.strip()  # the text may hold it without the line break at its end
    return f"{type(error).__name__}: {line.replace(secret, '…') if secret else line}"


def _advice(repo_id: str, error: BaseException, token: str) -> str:
    todo = "upload lora.safetensors from the tar yourself"
    if _status(error) in (401, 403):
        todo = f"hf_token may not write there any more; {todo}"
    return f"the upload to {repo_id} failed: {_reason(error, token)}; {todo}"


def publish(
    request: TrainRequest,
    token: str,
    decided: Mapping[str, Any],
    lora: Path,
    previews: Sequence[Preview],
    pictures: int,
    log: Callable[[str], None],
    verdict: Sequence[str] = (),
    others: Sequence[Path] = (),
) -> dict[str, str]:
    """Uploads the weights, the card and the previews; what became of it, for `request.json`.

    A failure costs nobody the weights: it is an entry too. `pictures` counts what the LoRA was trained on; `others` are
    weights of other steps, which go into a folder.
    """
    assert request.hf_repo_id is not None
    repository, private = request.hf_repo_id, request.hf_private
    left = threading.Event()
    try:
        gallery = {f"images/{i}.webp": preview for i, preview in enumerate(previews)}
        prompts = {name: preview.prompt for name, preview in gallery.items()}
        drawn = {name: thumbnail(preview.after, 1024) for name, preview in gallery.items()}
        width, trained_with = card.of_file(lora)
        word = request.trigger_word if "weights_of_step" in decided else trained_with
        text = card.card(repository, request, decided, pictures, prompts, word=word, width=width, verdict=verdict)
        files: dict[str, Path | bytes] = {card.WEIGHTS_NAME: lora, "README.md": text.encode(), **drawn}
        files |= {f"{BESIDE}/{file.name}": file for file in others}
        url = wait.interruptibly(lambda: upload(repository, token, private, files, log, given_up=left.is_set))
    except UploadFailed as failure:
        return {"repository": repository, "failed": str(failure)}
    except Exception as error:  # whatever it is: the tar, with all that was learned, is packed after this
        return {"repository": repository, "failed": _advice(repository, error, token)}
    finally:
        left.set()
    return {"repository": repository, "url": url}


def tell(published: Mapping[str, str] | None, log: Callable[[str], None], metric: Callable[[str, float], None]) -> None:
    """The last word on an upload: a failure must be seen."""
    if published is None:
        return
    metric("upload_failed", float("failed" in published))
    log(f"ERROR: {published['failed']}" if "failed" in published else f"uploaded: {published['url']}")
