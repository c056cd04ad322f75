"""Chooses the client library for a URL, and finds mistakes before anything is stored."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvbm_core.errors import TierOpenError
from kvbm_remote._async_stores import AsyncStore, ObjectStore
from kvbm_remote._config import RemoteConfig, shown_url
from kvbm_remote._faults import classify
from kvbm_remote._stores import LocalStore, Store, ThreadStore

__all__ = ["check", "is_read_only", "make_store"]

_PACKAGES: Final = {
    "s3": "obstore or s3fs",
    "s3a": "obstore or s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "http": "aiohttp",
    "https": "aiohttp",
    "webdav": "webdav4[fsspec]",
}
_WITHOUT_ROOT: Final = frozenset({"http", "https"})
"""Nothing can be written there by fsspec."""
_OBSTORE_OPTIONS: Final = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "endpoint_url": "endpoint",
    "region": "region",
    "region_name": "region",
    "anon": "skip_signature",
}
"""What fsspec calls an option, and what obstore does."""


def is_read_only(config: RemoteConfig) -> bool:
    """Say whether nothing may or can be stored."""
    return config.read_only or config.protocol in _WITHOUT_ROOT


def make_store(config: RemoteConfig) -> Store:
    """Choose the client library. Opens no connection.

    Raises:
        TierOpenError: If the protocol is unknown, its package is not installed, or an option is wrong.
    """
    if config.protocol in ("file", "local"):
        return LocalStore(_folder(config))
    settings = _obstore_settings(config)
    if settings is None:
        return _fsspec_store(config)
    bucket, _, prefix = config.url.partition("://")[2].partition("/")
    try:
        return ObjectStore(bucket, prefix.strip("/"), settings, config.connect_timeout_s, config.timeout_s)
    except Exception as error:  # noqa: BLE001 - the library's own types are not ours to know
        raise _wrong_options(config, error) from None


def check(config: RemoteConfig) -> None:
    """Find what would keep an engine from opening the tier. Changes nothing, asks no server.

    Raises:
        TierOpenError: If the protocol is unknown, its package is not installed, an option is wrong,
            or a directory cannot be written.
    """
    make_store(config)
    if config.protocol in ("file", "local") and not config.read_only:
        root = _folder(config)
        existing = next(folder for folder in (root, *root.parents) if os.path.lexists(folder))
        try:
            # Permission bits do not tell everything (read-only mounts): try it, and clean up.
            os.rmdir(tempfile.mkdtemp(prefix=".kvbm-check-", dir=existing))
        except OSError as error:
            raise TierOpenError(
                f"url: {existing} cannot be used by uid {os.getuid()} ({error}); write a directory that this "
                "user may write",
                operation="check",
                tier="remote",
            ) from error


def _folder(config: RemoteConfig) -> Path:
    return Path("/" + config.url.partition("://")[2].strip("/"))


def _obstore_settings(config: RemoteConfig) -> dict[str, Any] | None:
    """Give obstore's settings; None if fsspec is to be used."""
    if config.protocol not in ("s3", "s3a") or config.client == "fsspec":
        return None
    installed = importlib.util.find_spec("obstore") is not None
    if config.client == "obstore":
        if not installed:
            raise _open_error("client: 'obstore' is not installed; pip install obstore")
    elif not installed or _uses_profile():
        return None
    flat = _flat_options(config)
    unknown = sorted(set(flat) - set(_OBSTORE_OPTIONS))
    if unknown and config.client == "obstore":
        known = ", ".join(_OBSTORE_OPTIONS)
        raise _open_error(
            f"storage_options: obstore has no {', '.join(unknown)}; write one of {known}, or client: fsspec"
        )
    return None if unknown else {_OBSTORE_OPTIONS[name]: value for name, value in flat.items()}


def _flat_options(config: RemoteConfig) -> dict[str, Any]:
    import fsspec.config

    options = {**fsspec.config.conf.get("s3", {}), **config.storage_options}
    nested = options.pop("client_kwargs", {})
    return {**options, **(nested if isinstance(nested, Mapping) else {"client_kwargs": nested})}


def _uses_profile() -> bool:
    # obstore does not read the files of the AWS tools; botocore, below s3fs, does.
    if "AWS_PROFILE" in os.environ:
        return True
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    return "AWS_ACCESS_KEY_ID" not in os.environ and file.exists()


def _fsspec_store(config: RemoteConfig) -> Store:
    kind = _file_system(config)
    try:
        root = str(kind._strip_protocol(config.url))
        options = {**kind._get_kwargs_from_urls(config.url), **_defaults(config), **config.storage_options}
    except Exception as error:  # noqa: BLE001 - the library's own types are not ours to know
        raise _wrong_options(config, error) from None
    if kind.async_impl:
        return AsyncStore(lambda: _connect_async(kind, options), root)

    def connect() -> Any:
        fs = kind(**options, skip_instance_cache=True)
        if config.protocol in ("sftp", "ssh"):
            # Else a server that falls silent would hold the thread for ever.
            fs.ftp.get_channel().settimeout(config.timeout_s)
        return fs

    return ThreadStore(connect, root, atomic=config.protocol == "memory")


def _connect_async(kind: Any, options: Mapping[str, Any]) -> Any:
    loop = asyncio.get_running_loop()
    fs = kind(**options, asynchronous=True, loop=loop, skip_instance_cache=True, use_listings_cache=False)
    if hasattr(fs, "retries"):
        # Attempts are counted in one place, above.
        fs.retries = 1
    return fs


def _file_system(config: RemoteConfig) -> Any:
    try:
        import fsspec
    except ImportError:
        raise _open_error("the remote tier needs fsspec; pip install fsspec") from None
    known = sorted({*fsspec.available_protocols()} & {*_PACKAGES, "memory", "file", "hdfs", "ftp"})
    try:
        return fsspec.get_filesystem_class(config.protocol)
    except ValueError:
        raise _open_error(
            f"url: {shown_url(config.url)!r}: no file system is called {config.protocol!r}; "
            f"write one of {', '.join(known)}"
        ) from None
    except ImportError as error:
        package = _PACKAGES.get(config.protocol)
        advice = f"pip install {package}" if package else str(error)
        raise _open_error(
            f"url: {shown_url(config.url)!r} needs a package that is not installed; {advice}"
        ) from None


def _defaults(config: RemoteConfig) -> dict[str, Any]:
    """Give the client's own timeouts and attempts, where it has any."""
    if config.protocol in ("s3", "s3a"):
        return {
            "config_kwargs": {
                "connect_timeout": config.connect_timeout_s,
                "read_timeout": config.timeout_s,
                "max_pool_connections": config.max_in_flight,
                "retries": {"total_max_attempts": 1},
            }
        }
    if config.protocol in ("sftp", "ssh"):
        names = ("timeout", "banner_timeout", "auth_timeout", "channel_timeout")
        return dict.fromkeys(names, config.connect_timeout_s)
    return {}


def _wrong_options(config: RemoteConfig, error: Exception) -> TierOpenError:
    # Not chained: a client's message may quote the option's value.
    names = ", ".join(sorted(config.storage_options)) or "none"
    return _open_error(
        f"url: {shown_url(config.url)!r} or storage_options ({names}) are refused by the client library "
        f"({classify(error).detail}); check the bucket's name and the options"
    )


def _open_error(message: str) -> TierOpenError:
    return TierOpenError(message, operation="open", tier="remote")
