"""The stores that run on an event loop: s3 by obstore, and asynchronous fsspec file systems."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import timedelta
from typing import Any, Final

from kvbm_remote._faults import WrongLengthError, classify
from kvbm_remote._stores import UNSAID, Buffer, Entry, Store, entry_of

__all__ = ["AsyncStore", "ObjectStore"]

_LIST_OBJECTS: Final = 1000
"""Listed at once: what S3 answers with one request."""


class ObjectStore(Store):
    """S3 by obstore: half the time of s3fs in a third of its processor time."""

    asynchronous = True

    def __init__(
        self,
        bucket: str,
        prefix: str,
        settings: Mapping[str, Any],
        connect_timeout_s: float,
        timeout_s: float,
    ) -> None:
        import obstore
        from obstore.store import S3Store

        self.client = f"obstore {obstore.__version__}"
        self._obstore = obstore
        self._exclusive = True
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            client_options={
                "allow_http": True,
                "connect_timeout": timedelta(seconds=connect_timeout_s),
                "timeout": timedelta(seconds=timeout_s),
            },
            # Attempts are counted in one place, above.
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)},
            **settings,
        )

    async def get(self, path: str, target: memoryview) -> Buffer:
        """See `Store.get`."""
        answer = await self._obstore.get_async(self._store, path)
        if answer.meta["size"] != len(target):
            raise WrongLengthError
        return memoryview(await answer.bytes_async())

    async def put(self, path: str, content: Buffer, *, overwrite: bool) -> None:
        """See `Store.put`. If-None-Match: the server drops what it has."""
        from obstore.exceptions import AlreadyExistsError, NotSupportedError

        if self._exclusive and not overwrite:
            try:
                await self._obstore.put_async(self._store, path, content, use_multipart=False, mode="create")
            except AlreadyExistsError:
                pass
            except NotSupportedError:
                self._exclusive = False
            except Exception as error:
                if "status 501" not in classify(error).detail:
                    raise
                self._exclusive = False
            if self._exclusive:
                return
        await self._obstore.put_async(self._store, path, content, use_multipart=False, mode="overwrite")

    async def nbytes(self, path: str) -> int:
        """See `Store.nbytes`."""
        return int((await self._obstore.head_async(self._store, path))["size"])

    async def delete(self, path: str) -> None:
        """See `Store.delete`."""
        await self._obstore.delete_async(self._store, path)

    async def entries(self, folder: str) -> AsyncIterator[Entry]:
        """See `Store.entries`."""
        async for batch in self._obstore.list(self._store, prefix=folder, chunk_size=_LIST_OBJECTS):
            for facts in batch:
                yield Entry(facts["path"], facts["size"], facts["last_modified"].timestamp())

    async def close(self) -> None:
        """See `Store.close`. Its connections end with it."""


class AsyncStore(Store):
    """An asynchronous fsspec file system, made on the loop when it is first used."""

    asynchronous = True

    def __init__(self, connect: Callable[[], Any], root: str) -> None:
        """Make a store.

        Args:
            connect: Makes the file system; called on the loop.
            root: The folder, as the file system writes it.
        """
        self.client = "fsspec, asynchronous"
        self._connect = connect
        self._root = root.rstrip("/")
        self._connecting = asyncio.Lock()
        self._fs: Any = None
        self._session: Any = None
        self._modes = False

    async def get(self, path: str, target: memoryview) -> Buffer:
        """See `Store.get`."""
        content: bytes = await (await self._connected())._cat_file(self._at(path))
        return content

    async def put(self, path: str, content: Buffer, *, overwrite: bool) -> None:
        """See `Store.put`. A single request, which such stores carry out whole or not at all."""
        fs = await self._connected()
        exclusive = {"mode": "create"} if self._modes and not overwrite else {}
        try:
            await fs._pipe_file(self._at(path), content, **exclusive)
        except FileExistsError:
            return
        except OSError as error:
            if not exclusive or "status 412" not in classify(error).detail:
                raise

    async def nbytes(self, path: str) -> int:
        """See `Store.nbytes`."""
        facts = await (await self._connected())._info(self._at(path))
        return UNSAID if facts["size"] is None else int(facts["size"])

    async def delete(self, path: str) -> None:
        """See `Store.delete`."""
        await (await self._connected())._rm_file(self._at(path))

    async def entries(self, folder: str) -> AsyncIterator[Entry]:
        """See `Store.entries`."""
        fs, folders = await self._connected(), [self._at(folder)]
        while folders:
            with contextlib.suppress(FileNotFoundError):
                for facts in await fs._ls(folders.pop(), detail=True):
                    if facts["type"] == "directory":
                        folders.append(facts["name"])
                    else:
                        yield entry_of(facts, self._root)

    async def close(self) -> None:
        """See `Store.close`."""
        fs, self._fs = self._fs, None
        for owner in (self._session, getattr(fs, "service_client", None)):
            if owner is not None:
                await owner.close()

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    async def _connected(self) -> Any:
        if self._fs is None:
            async with self._connecting:
                if self._fs is None:
                    fs = self._connect()
                    # The one public way to a session, under two names.
                    begin = getattr(fs, "set_session", None) or getattr(fs, "_set_session", None)
                    self._session = await begin() if begin is not None else None
                    self._modes = "mode" in inspect.signature(fs._pipe_file).parameters
                    self._fs = fs
        return self._fs
