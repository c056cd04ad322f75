"""Chooses the client library for a URL, and finds mistakes before anything is stored."""

from __future__ import annotations

import asyncio
import difflib
import importlib.util
import inspect
import os
import shlex
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from kvbm_core.errors import TierOpenError
from kvbm_core.extras import extra_command
from kvbm_core.log_limit import Log, TierLog
from kvbm_core.remedies import try_writing
from kvbm_remote._async_stores import AsyncStore, ObjectStore
from kvbm_remote._config import RemoteConfig, shown_url
from kvbm_remote._faults import classify
from kvbm_remote._local_store import LocalStore
from kvbm_remote._redirects import aiohttp_tracing, aws_session, obstore_guard, uses_proxy
from kvbm_remote._stores import Store, ThreadStore

__all__ = ["check", "is_read_only", "make_store"]

_log = TierLog("kvbm_remote")

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
WITHOUT_ROOT: Final = frozenset({"http", "https"})
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
_ENDPOINT_VARIABLES: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_SESSION_OPTIONS: Final = {
    **dict.fromkeys(("s3", "s3a"), "config_kwargs"),
    **dict.fromkeys(("http", "https"), "client_kwargs"),
    **dict.fromkeys(("gs", "gcs"), "session_kwargs"),
}
"""The option with which a file system on aiohttp makes its session."""
_NEAR: Final = 0.75
"""Names that are so much alike are taken for one another's misspelling."""


def is_read_only(config: RemoteConfig) -> bool:
    """Say whether nothing may or can be stored."""
    return config.read_only or config.protocol in WITHOUT_ROOT


def make_store(config: RemoteConfig, log: Log = _log, *, direct: bool = False) -> Store:
    """Choose the client library. Opens no connection.

    Args:
        config: The tier's.
        log: Where its lines go.
        direct: Read files of a directory past the page cache, see `LocalStore`.

    Raises:
        TierOpenError: If the protocol is unknown, its package is not installed, or an option is wrong.
    """
    if config.protocol in ("file", "local"):
        return LocalStore(_folder(config), log, direct=direct)
    authorities = _authorities(config)
    settings = _obstore_settings(config)
    if settings is None:
        return _fsspec_store(config)
    bucket, _, prefix = config.url.partition("://")[2].partition("/")
    endpoint = _endpoint(settings)
    if endpoint:
        settings["endpoint"] = endpoint
    region = settings.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    client_options = {
        **obstore_guard(bucket, endpoint, str(region or "us-east-1")),
        **({"root_certificate": authorities} if authorities else {}),
        "connect_timeout": timedelta(seconds=config.connect_timeout_s),
    }
    try:
        return ObjectStore(bucket, prefix.strip("/"), settings, client_options, config.timeout_s)
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
        try_writing(_folder(config), "remote", "url")


def _folder(config: RemoteConfig) -> Path:
    return Path("/" + config.url.partition("://")[2].strip("/"))


def _obstore_settings(config: RemoteConfig) -> dict[str, Any] | None:
    """Give obstore's settings; None if fsspec is to be used."""
    if config.protocol not in ("s3", "s3a") or config.client == "fsspec":
        return None
    installed = importlib.util.find_spec("obstore") is not None
    if config.client == "auto" and (not installed or _uses_profile()):
        return None
    if not installed:
        raise _open_error(f"client: 'obstore' is not installed; {extra_command('remote')}")
    flat = _flat_options(config)
    settings = {_OBSTORE_OPTIONS[name]: value for name, value in flat.items() if name in _OBSTORE_OPTIONS}
    why = ""
    if unknown := set(flat) - set(_OBSTORE_OPTIONS):
        why = f"storage_options: obstore has no {_named(unknown, _OBSTORE_OPTIONS)}"
    elif proxy := uses_proxy(_endpoint(settings) or "https://s3.amazonaws.com"):
        # It would follow a redirect behind the proxy.
        why = f"{proxy}: obstore is not used with a proxy; name the store's host in NO_PROXY"
    if not why:
        return settings
    if config.client == "obstore":
        raise _open_error(f"{why}; or write client: fsspec")
    if importlib.util.find_spec("s3fs") is None:
        raise _open_error(f"{why}; or pip install s3fs")
    return None


def _named(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Name options that are not known, each with the known one that it resembles."""
    known = list(known)
    said = []
    for name in sorted(unknown):
        near = difflib.get_close_matches(name, known, 1, _NEAR)
        said.append(f"{name!r}, write {near[0]!r}" if near else f"{name!r}")
    return f"{'; '.join(said)} (it has {', '.join(known)})"


def _endpoint(settings: Mapping[str, Any]) -> str:
    given = (settings.get("endpoint"), *(os.environ.get(name) for name in _ENDPOINT_VARIABLES))
    return str(next((each for each in given if each), ""))


def _authorities(config: RemoteConfig) -> bytes:
    """Read the certificates that AWS_CA_BUNDLE names, so that a wrong file is said by its name.

    Raises:
        TierOpenError: If it cannot be read, or has none in it.
    """
    name = os.environ.get("AWS_CA_BUNDLE", "")
    if not name or config.protocol not in ("s3", "s3a"):
        return b""
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise _open_error(
            f"AWS_CA_BUNDLE: {name} cannot be read ({os.strerror(error.errno or 0)}); write a PEM file"
        ) from None
    if b"-----BEGIN CERTIFICATE-----" not in content:
        raise _open_error(f"AWS_CA_BUNDLE: {name} has no certificate in it; write a PEM file")
    return content


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
        options = {**kind._get_kwargs_from_urls(config.url), **config.storage_options, **_defaults(config)}
    except Exception as error:  # noqa: BLE001 - the library's own types are not ours to know
        raise _wrong_options(config, error) from None
    _check_names(config, kind)
    if config.protocol in _SESSION_OPTIONS:
        _guard(options, _SESSION_OPTIONS[config.protocol])
    if kind.async_impl:
        return AsyncStore(lambda: _connect_async(kind, options), root)

    def connect() -> Any:
        fs = kind(**options, skip_instance_cache=True)
        if config.protocol in ("sftp", "ssh"):
            # Else a server that falls silent would hold the thread for ever.
            fs.ftp.get_channel().settimeout(config.timeout_s)
        return fs

    return ThreadStore(connect, root, atomic=config.protocol == "memory")


def _check_names(config: RemoteConfig, kind: Any) -> None:
    """Find misspelt options: most file systems take any name, and do nothing with it.

    Raises:
        TierOpenError: If an option is not the file system's, and s3fs has none such, or one almost alike.
    """
    inits = [vars(each)["__init__"] for each in kind.__mro__[:-1] if "__init__" in vars(each)]
    known = {name for init in inits for name in inspect.signature(init).parameters} - {
        "self",
        "args",
        "kwargs",
    }
    unknown = set(map(str, config.storage_options)) - known
    if config.protocol not in ("s3", "s3a"):
        unknown = {name for name in unknown if difflib.get_close_matches(name, known, 1, _NEAR)}
    if unknown:
        library = kind.__module__.partition(".")[0]
        raise _open_error(f"storage_options: {library} has no {_named(unknown, sorted(known))}")


def _guard(options: dict[str, Any], name: str) -> None:
    """Have a client's sessions refuse redirects to another host."""
    own = dict(options.get(name) or {})
    if name == "config_kwargs":
        own.setdefault("http_session_cls", aws_session())
    else:
        own["trace_configs"] = [*own.get("trace_configs", ()), aiohttp_tracing()]
    options[name] = own


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
        raise _open_error(f"the remote tier needs fsspec; {extra_command('remote')}") from None
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
        if config.protocol in ("s3", "s3a"):
            advice = extra_command("remote")
        else:
            advice = f"pip install {shlex.quote(package)}" if package else str(error)
        raise _open_error(
            f"url: {shown_url(config.url)!r} needs {package or 'a package'}, which is not installed; {advice}"
        ) from None


def _defaults(config: RemoteConfig) -> dict[str, Any]:
    """Give the client's own timeouts and attempts, where it has any."""
    if config.protocol in ("s3", "s3a"):
        own = {
            "connect_timeout": config.connect_timeout_s,
            "read_timeout": config.timeout_s,
            "max_pool_connections": config.max_in_flight,
            "retries": {"total_max_attempts": 1},
        }
        given = config.storage_options.get("config_kwargs") or {}
        return {"config_kwargs": {**own, **given} if isinstance(given, Mapping) else given}
    if config.protocol in ("sftp", "ssh"):
        names = ("timeout", "banner_timeout", "auth_timeout", "channel_timeout")
        return {name: config.storage_options.get(name, config.connect_timeout_s) for name in names}
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
