"""Requests to addresses that callers name: to public machines only, unless the settings allow private ones.

The check is made on the very address that is connected to, so neither a redirect nor a DNS answer that changes gets
around it.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpcore
import httpx

FETCH_SECONDS = 3600.0
"""For a whole file: a worker waits for it, and a server that sends a byte now and then would keep it for ever."""
SECONDS = {"connect": 10.0, "read": 30.0, "write": 30.0, "pool": 10.0}
REDIRECTS = 5
TRIES = 3
TRANSLATED = [ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]
"""IPv6 that leads to an IPv4 address which would have to be checked in its turn: NAT64, 6to4, Teredo."""


class Forbidden(ValueError):
    """The address is not public."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet at large."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if any(ip in net for net in TRANSLATED):
            return False
    return ip.is_global and not ip.is_multicast


def check(address: str, allow_private: bool) -> None:
    """Refuses what can be refused before a name is looked up. Raises ValueError that tells why."""
    try:
        url = urlsplit(address)
        host, _ = url.hostname or "", url.port
    except ValueError:
        raise ValueError("this address cannot be read; copy it again") from None
    if url.scheme not in ("http", "https") or not host:
        raise ValueError("must be an http or https address")
    if url.username or url.password:
        raise ValueError("the address may not hold a user or password")
    if allow_private:
        return
    try:
        public = is_public(host)
    except ValueError:  # a name
        public = host != "localhost" and not host.endswith((".localhost", ".local", ".internal"))
    if not public:
        raise Forbidden(f"{host[:100]} is not a public address; upload the file instead")


class Outside:
    """A client. Close it by `async with`."""

    def __init__(self, allow_private: bool) -> None:
        self.allow_private = allow_private
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(), network_backend=_Backend(allow_private), max_connections=50
        )

    async def __aenter__(self) -> "Outside":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.aclose()

    async def post(self, address: str, headers: Mapping[str, str], body: bytes) -> int:
        """The status of the answer; a redirect is not followed. Raises ValueError or OSError where there is none."""
        check(address, self.allow_private)
        address = _written(address)
        try:
            async with self._pool.stream(
                "POST", address, headers=_headers(headers, body), content=body, extensions={"timeout": SECONDS}
            ) as answer:
                return int(answer.status)
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
            raise OSError(f"{urlsplit(address).hostname} did not answer: {type(error).__name__}") from error

    async def fetch(self, address: str, path: Path, limit: int) -> str:
        """Downloads into the file `path`, at most `limit` bytes; returns the answer's content type.

        Tries again where the network fails or the server is unwell. Raises ValueError that names the host.
        """
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                return await self._try(address, path, limit)
        except TimeoutError:
            raise ValueError(
                f"{urlsplit(address).hostname} sent no whole file in {FETCH_SECONDS / 60:.0f} minutes"
            ) from None

    async def _try(self, address: str, path: Path, limit: int) -> str:
        for attempt in range(1, TRIES + 1):
            try:
                return await self._fetch(address, path, limit)
            except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
                if attempt == TRIES:
                    host = urlsplit(address).hostname
                    raise ValueError(
                        f"{host} could not be reached: {str(error)[:100] or type(error).__name__}"
                    ) from None
                await asyncio.sleep(2 ** (attempt - 1))
        raise AssertionError("unreachable")

    async def _fetch(self, address: str, path: Path, limit: int) -> str:
        for _ in range(REDIRECTS + 1):
            check(address, self.allow_private)
            address = _written(address)
            host = urlsplit(address).hostname
            async with self._pool.stream(
                "GET", address, headers=_headers({}), extensions={"timeout": SECONDS}
            ) as answer:
                told = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in answer.headers}
                if answer.status in (301, 302, 303, 307, 308) and "location" in told:
                    address = urljoin(address, told["location"])
                    continue
                if answer.status >= 500:
                    raise httpcore.RemoteProtocolError(f"it answers {answer.status}")
                if answer.status != 200:
                    raise ValueError(f"{host} answers {answer.status}")
                done = 0
                with path.open("wb") as file:
                    async for block in answer.aiter_stream():
                        done += len(block)
                        if done > limit:
                            raise ValueError(f"the file at {host} is larger than {limit / 2**20:.0f} MiB")
                        file.write(block)
                return told.get("content-type", "").partition(";")[0]
        raise ValueError(f"{urlsplit(address).hostname} redirects more than {REDIRECTS} times")


def _written(address: str) -> str:
    """As it goes over the wire: what HTTP has no letter for, such as ü or a blank, as browsers write it."""
    try:
        return str(httpx.URL(address))
    except (httpx.InvalidURL, UnicodeError):
        raise ValueError("this address cannot be read; copy it again") from None


def _headers(more: Mapping[str, str], body: bytes | None = None) -> list[tuple[str, str]]:
    sized = {} if body is None else {"Content-Length": str(len(body)), "Content-Type": "application/json"}
    return [*({"User-Agent": "flux-lora-server", **sized, **more}).items()]


class _Backend(httpcore.AsyncNetworkBackend):
    """Looks the name up itself, checks each answer, and connects to what it has checked."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._plain = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(f"its name is not known ({error.strerror})") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not self._allow_private and not all(map(is_public, addresses)):
            raise Forbidden(f"{host[:100]} is not a public address; upload the file instead")
        for address in addresses[:-1]:
            try:
                return await self._plain.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.ConnectError:
                continue
        return await self._plain.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
