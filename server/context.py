"""What every part of a server process is handed."""

from dataclasses import dataclass

from server.database import Sessions
from server.files import Links, Store
from server.settings import Settings


@dataclass(frozen=True)
class Context:
    settings: Settings
    sessions: Sessions
    store: Store
    key: bytes
    """Signs links."""

    def links(self, base: str) -> Links:
        return Links(base, self.key, self.settings.link_seconds)
