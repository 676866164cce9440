"""Files that calls name, for replicas on other machines: sent tensors, which the front has in a temporary file."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import IO, Any

from msgspec import structs

from trunkline.core.engine.messages import Call
from trunkline.core.model.sources.catalogue import cache_folder

from .link import Link
from .messages import FilePart

NAMES_FILE = ("update_weights_from_tensor",)  # controls with the argument ``path``, a file that the front deletes later
PART_BYTES = 1 << 20


def file_of(call: Call) -> Path | None:
    """The file that a call names."""
    return Path(call.arguments.get("path", "")) if call.control in NAMES_FILE else None


async def send_file(link: Link, call: Call, answer: asyncio.Future[Any]) -> None:
    """Send the file that a call names, unless its ``answer`` comes before. OSError when it can't be read."""
    path = file_of(call)
    if path is None:
        return
    with await asyncio.to_thread(path.open, "rb") as file:
        while not answer.done() and (part := await asyncio.to_thread(file.read, PART_BYTES)):
            link.send(FilePart(call.key, part))
            await link.drained()
    link.send(FilePart(call.key, b""))


class ReceivedFile:
    """A copy of the file that a call names, which is deleted with this object or by :meth:`close`."""

    def __init__(self, call: Call) -> None:
        """OSError when it can't be written."""
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._call = call
        options: dict[str, Any] = {"prefix": "weights-", "suffix": ".safetensors", "dir": folder}
        self._file: IO[bytes] = tempfile.NamedTemporaryFile(**options)  # noqa: SIM115  # closed by close()

    def write(self, part: bytes) -> Call | None:
        """Write a part. After the last one, the call with the copy's path. OSError."""
        if part:
            self._file.write(part)
            return None
        self._file.flush()
        return structs.replace(self._call, arguments=self._call.arguments | {"path": self._file.name})

    def close(self) -> None:
        self._file.close()
