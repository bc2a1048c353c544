"""The worker's own server on loopback, for Cog's child: it gives inputs, takes outputs, and hears of progress."""

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from server.records import Json


class Loopback:
    """Its addresses hold a random word, for other processes of the machine can reach loopback too."""

    def __init__(self, folder: Path, told: Callable[[str, Json], None]) -> None:
        """`told` gets each webhook: the attempt's word and the payload. Files lie in `folder`, by attempt."""
        self.folder = folder
        self._told = told
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._word = secrets.token_hex(16)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/{self._word}"

    @property
    def uploads(self) -> Path:
        """Where Cog's outputs arrive: one run at a time."""
        return self.folder / "outputs"

    def address(self, path: Path) -> str:
        """Of a file below the folder."""
        return f"{self.url}/inputs/{path.relative_to(self.folder / 'inputs')}"

    def path(self, address: str) -> Path | None:
        """The file that an uploaded output's address means; None for any other text."""
        start = f"{self.url}/outputs/"
        if not address.startswith(start):
            return None
        return self.uploads / Path(address.removeprefix(start)).name

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        routes = [
            Route(f"/{self._word}/told/{{attempt}}", self._hear, methods=["POST"]),
            Route(f"/{self._word}/inputs/{{attempt}}/{{name}}", self._give),
            Route(f"/{self._word}/outputs/{{name:path}}", self._take, methods=["PUT"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="error", lifespan="off", access_log=False)
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        with contextlib.suppress(AttributeError):
            server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        running = asyncio.create_task(server.serve([self._socket]))
        try:
            yield
        finally:
            server.should_exit = server.force_exit = True
            await asyncio.gather(running, return_exceptions=True)

    async def _hear(self, request: Request) -> Response:
        self._told(request.path_params["attempt"], json.loads(await request.body()))
        return Response()

    async def _give(self, request: Request) -> Response:
        path = (
            self.folder / "inputs" / Path(request.path_params["attempt"]).name / Path(request.path_params["name"]).name
        )
        return FileResponse(path) if path.is_file() else Response(status_code=404)

    async def _take(self, request: Request) -> Response:
        path = self.uploads / Path(request.path_params["name"]).name
        self.uploads.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            async for block in request.stream():
                file.write(block)
        return Response(status_code=201, headers={"Location": f"{self.url}/outputs/{path.name}"})
