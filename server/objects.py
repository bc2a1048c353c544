"""Replicate's objects, as its clients read them, made from records."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from server.files import Links
from server.records import Account, File, Json, Model, Run, Version


def moment(value: datetime | None) -> str | None:
    return None if value is None else value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def run(run: Run, links: Links, inline: Mapping[str, str] = {}) -> Json:
    """A training or prediction. `inline` are data URIs to show for files, by id, in place of links."""
    kind = f"{run.kind}s"
    address = f"{links.base}/v1/{kind}/{run.id}"
    shown = {
        "id": run.id,
        "model": run.model,
        "version": run.version,
        "status": run.status,
        "input": {} if run.data_removed else with_links(run.input, links),
        "output": None if run.data_removed else with_links(run.output, links, inline),
        "logs": run.logs,
        "error": run.error,
        "metrics": run.metrics,
        "source": run.source,
        "tags": run.tags,
        "data_removed": run.data_removed,
        "created_at": moment(run.created_at),
        "started_at": moment(run.started_at),
        "completed_at": moment(run.completed_at),
        "urls": {
            "get": address,
            "cancel": f"{address}/cancel",
            "stream": links.stream(run.id),
            "web": f"{links.base}/run/{run.id}",
        },
    }
    if run.deadline is not None:
        shown["deadline"] = moment(run.deadline)
    if run.kind == "training":
        shown["destination"] = run.destination
    return shown


def with_links(value: Any, links: Links, inline: Mapping[str, str] = {}) -> Any:
    """A record's value, each `{"$file": id}` in it made an address."""
    if isinstance(value, dict):
        if value.keys() == {"$file"}:
            return inline.get(value["$file"]) or links.file(value["$file"])
        return {name: with_links(entry, links, inline) for name, entry in value.items()}
    if isinstance(value, list):
        return [with_links(entry, links, inline) for entry in value]
    return value


def files_in(value: Any) -> list[str]:
    """The ids of the files that a record's value holds."""
    if isinstance(value, dict):
        found = [value["$file"]] if value.keys() == {"$file"} else []
        return found or [id for entry in value.values() for id in files_in(entry)]
    if isinstance(value, list):
        return [id for entry in value for id in files_in(entry)]
    return []


def model(model: Model, newest: Version | None, links: Links) -> Json:
    return {
        "url": f"{links.base}/v1/models/{model.owner}/{model.name}",
        "owner": model.owner,
        "name": model.name,
        "description": model.description,
        "visibility": model.visibility,
        "github_url": model.github_url,
        "paper_url": model.paper_url,
        "license_url": model.license_url,
        "run_count": model.run_count,
        "cover_image_url": model.cover_image_url,
        "default_example": None,
        "is_official": False,
        "latest_version": None if newest is None else version(newest),
        "created_at": moment(model.created_at),
    }


def version(version: Version) -> Json:
    return {
        "id": version.id,
        "created_at": moment(version.created_at),
        "cog_version": version.cog_version,
        "openapi_schema": version.openapi_schema,
    }


def file(file: File, links: Links) -> Json:
    return {
        "id": file.id,
        "name": file.name,
        "content_type": file.content_type,
        "size": file.size,
        "etag": file.sha256,
        "checksums": {"sha256": file.sha256},
        "metadata": file.details,
        "created_at": moment(file.created_at),
        "expires_at": moment(file.expires_at),
        "urls": {"get": f"{links.base}/v1/files/{file.id}", "download": links.file(file.id)},
    }


def account(account: Account) -> Json:
    return {"type": "user", "username": account.name, "name": account.name, "github_url": None}


def page(results: list[Json], previous: str | None, next: str | None) -> Json:
    return {"previous": previous, "next": next, "results": results}
