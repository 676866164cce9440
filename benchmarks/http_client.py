"""A small HTTP/1.1 client over asyncio streams.

The load generator shares the machine with the server it measures, so it must cost next to nothing:
a general client spends more on a streamed frame than the server does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import msgspec

_LIMIT = 64 << 20  # bytes in one line or chunk


class Connection:
    """One keep-alive connection; one request at a time."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"the server's address must look like http://host:port, not {base_url!r}")
        self._host, self._port = parts.hostname, parts.port or 80
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Status and whole body."""
        status, chunks = await self._send(method, path, body)
        return status, b"".join([chunk async for chunk in chunks])

    async def events(self, path: str, body: object) -> AsyncIterator[bytes]:
        """The data of each server-sent event until ``[DONE]``. RuntimeError on any status but 200."""
        status, chunks = await self._send("POST", path, body)
        if status != 200:
            text = b"".join([chunk async for chunk in chunks]).decode(errors="replace")
            raise RuntimeError(f"{path} answered {status}: {text[:500]}")
        rest = b""
        async for chunk in chunks:
            *frames, rest = (rest + chunk).split(b"\n\n")
            for frame in frames:
                data = frame.removeprefix(b"data: ")
                if data != b"[DONE]":
                    yield data

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _send(self, method: str, path: str, body: object) -> tuple[int, AsyncIterator[bytes]]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=_LIMIT)
        reader, writer = self._streams
        content = b"" if body is None else msgspec.json.encode(body)
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Length: {len(content)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        status = int((await reader.readline()).split(b" ", 2)[1])
        headers: dict[bytes, bytes] = {}
        while (line := await reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        return status, self._body(reader, headers)

    async def _body(self, reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> AsyncIterator[bytes]:
        if headers.get(b"transfer-encoding") == b"chunked":
            while size := int(await reader.readline(), 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        elif b"content-length" in headers:
            yield await reader.readexactly(int(headers[b"content-length"]))
        else:
            yield await reader.read()
            await self.close()
        if headers.get(b"connection", b"").lower() == b"close":
            await self.close()
