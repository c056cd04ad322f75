"""Tries etcd as an engine would use it: each endpoint answers, and a key can be written, read and deleted."""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from typing import Final

from kvbm_core import CoordinatorError
from kvbm_etcd._client import Client, EtcdError, RefusedError, Status
from kvbm_etcd._config import Access, EtcdConfig
from kvbm_etcd._roll import read_entries, top_prefix

__all__ = ["probe"]

logger = logging.getLogger("kvbm_etcd")

_MOST_BEHIND: Final = 1000
"""Entries of the log; a member that is healthy is behind by a few."""


def probe(config: EtcdConfig, access: Access) -> str:
    """Try it, and say how it answered. The key is deleted, and names no engine.

    Raises:
        CoordinatorError: It cannot be used; says why, and what to do.
    """
    found = _look_at_each(config, access)
    seconds, engines = _write(config, access)
    versions = ", ".join(sorted({status.version for status in found.values()}))
    behind = max(status.index for status in found.values()) - min(status.index for status in found.values())
    return (
        f"etcd {versions}; {len(found)} of {len(access.targets)} endpoints answer, the last {behind} "
        f"entries behind; a key was written, read and deleted in {1000 * seconds:.1f} ms; "
        f"{engines} engines registered"
    )


def _look_at_each(config: EtcdConfig, access: Access) -> dict[str, Status]:
    """Ask each endpoint by itself, and warn of those that do not answer, or are far behind."""
    found: dict[str, Status] = {}
    away: list[str] = []
    for target in access.targets:
        client = Client(dataclasses.replace(access, targets=(target,)), config.timeout_s)
        try:
            found[target] = client.status()
        except RefusedError as error:
            raise _refused(config, access, error) from error
        except EtcdError as error:
            away.append(f"{target}: {error}")
        finally:
            client.close()
    if not found:
        raise _error(
            access, f"no endpoint answers ({'; '.join(away)}); start etcd there, or write its 'endpoints'"
        )
    for line in away:
        logger.warning("etcd at %s; start it, or take it out of 'endpoints'", line)
    newest = max(status.index for status in found.values())
    for target, status in found.items():
        if newest - status.index > _MOST_BEHIND:
            logger.warning("etcd at %s is %d entries behind; look at its disk and network", target,
                           newest - status.index)  # fmt: skip
        for line in status.errors:
            logger.warning("etcd at %s says: %s; see `etcdctl alarm list`", target, line)
    return found


def _write(config: EtcdConfig, access: Access) -> tuple[float, int]:
    """Do what an engine does at its start and end; give the seconds, and how many engines there are."""
    client, prefix = Client(access, config.timeout_s), top_prefix(config.prefix)
    started_s = time.monotonic()
    try:
        lease = client.grant(config.lease_s)
        try:
            client.claim(f"{prefix}.check-{uuid.uuid4().hex}", b"", lease)
            seen = client.values(prefix)
        finally:
            client.revoke(lease)
    except RefusedError as error:
        raise _refused(config, access, error) from error
    except EtcdError as error:
        raise _error(
            access, f"it takes no key ({error}); look at `etcdctl endpoint health` and `etcdctl alarm list`"
        ) from error
    finally:
        client.close()
    return time.monotonic() - started_s, len({entry.engine for entry in read_entries(seen)})


def _refused(config: EtcdConfig, access: Access, error: RefusedError) -> CoordinatorError:
    who = "the user of ETCD_AUTH_USERNAME" if access.user else "who has no user"
    return _error(
        access,
        f"it refuses {who} ({error}); grant readwrite below {top_prefix(config.prefix)}, or set "
        "ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD to one who has it",
    )


def _error(access: Access, why: str) -> CoordinatorError:
    return CoordinatorError(
        f"coordinator: etcd at {access}: {why}; without 'coordinator' engines run as well, but are not "
        "listed",
        operation="probe",
    )
