"""The licence of a base, as its own files tell it."""

from pathlib import Path

import yaml  # type: ignore[import-untyped]
from huggingface_hub import metadata_load


def read(name: str, readme: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of a README.md's front matter, as far as they are there.

    A link to a file beside the README.md becomes one to the Hub, where the base `name` is an id of the Hub, and is left
    out of a folder's.
    """
    try:
        said = metadata_load(readme) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no README.md, or one that nobody can read
        return {}
    named = ((key, said.get(key)) for key in ("license", "license_name", "license_link"))
    found = {key: value for key, value in named if isinstance(value, str) and 0 < len(value) <= 200}
    link = found.get("license_link", "")
    if link and not link.startswith("https://"):
        if Path(name).is_dir() or name.count("/") != 1:
            del found["license_link"]
        else:
            found["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
    return found
