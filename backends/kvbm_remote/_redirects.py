"""Keeps each HTTP client at the host it was sent to.

A redirect makes a client repeat its request at another host. aiohttp and obstore's reqwest leave out the
header `Authorization` then, but send all others: `x-amz-security-token` among them.
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urljoin, urlsplit

from kvbm_remote._faults import NOWHERE, RedirectError

if TYPE_CHECKING:
    import aiohttp

__all__ = ["aiohttp_tracing", "aws_session", "obstore_guard", "uses_proxy"]

_METADATA_HOSTS: Final = (
    "169.254.169.254",
    "169.254.170.2",
    "169.254.170.23",
    "fd00:ec2::254",
    "fd00:ec2::23",
)
"""Where machines, containers and pods at AWS get their credentials."""


def aiohttp_tracing() -> aiohttp.TraceConfig:
    """Make what refuses redirects to another host, for a session of aiohttp."""
    import aiohttp

    async def refuse(_session: Any, _context: Any, redirect: Any) -> None:
        target = urlsplit(urljoin(str(redirect.url), redirect.response.headers.get("Location", "")))
        if target.hostname != redirect.url.host or (redirect.url.scheme, target.scheme) == ("https", "http"):
            raise RedirectError(target.hostname or "")

    tracing = aiohttp.TraceConfig()
    tracing.on_request_redirect.append(refuse)
    tracing.freeze()
    return tracing


def aws_session() -> type[Any]:
    """Give aiobotocore's HTTP session, with redirects to another host refused."""
    import aiobotocore.httpsession  # type: ignore[import-untyped]  # It has no types.

    tracing = aiohttp_tracing()

    base: Any = aiobotocore.httpsession.AIOHTTPSession

    class Session(base):  # type: ignore[misc]  # Its base has no types.
        async def _get_session(self, proxy_url: Any) -> Any:
            session = await super()._get_session(proxy_url)
            if tracing not in session.trace_configs:
                session.trace_configs.append(tracing)
            return session

    return Session


def obstore_guard(bucket: str, endpoint: str, region: str) -> dict[str, Any]:
    """Give client options with which obstore reaches the store and who gives credentials, and nobody else.

    obstore has no option for redirects. It has one for a proxy and the hosts that need none: all other hosts
    are behind a proxy at an address where a connection fails at once.
    """
    hosts = {*_METADATA_HOSTS, "sts.amazonaws.com", f"sts.{region}.amazonaws.com"}
    given = (value for name, value in os.environ.items() if name.startswith("AWS_") and "://" in value)
    hosts |= {host for url in given if (host := _host(url))}
    if endpoint:
        hosts.add(_host(endpoint))
    else:
        hosts.add(f"s3.{region}.amazonaws.com")
        if bucket.endswith("--x-s3"):
            hosts.add(f"s3express-{bucket.split('--')[-2]}.{region}.amazonaws.com")
    return {
        "allow_http": True,
        "proxy_url": f"http://{NOWHERE}",
        "proxy_excludes": ",".join(sorted(hosts - {""})),
    }


def uses_proxy(url: str) -> str:
    """Give the variable of the environment that sends a URL to a proxy; empty if none does."""
    parts = urlsplit(url)
    names: Mapping[str, str] = urllib.request.getproxies_environment()
    name = next((each for each in (parts.scheme, "all") if names.get(each)), "")
    if not name or urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    return f"{name.upper()}_PROXY"


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
