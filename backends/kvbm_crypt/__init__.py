"""Encrypts objects on their way to a tier, or signs them, so that a shared or stolen medium can be used.

    codecs: [{name: crypt, keys: [{file: /etc/kvbm/key}]}]

`CryptCodec` is the codec, `CryptConfig` its settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_core import CodecKind, hookimpl
from kvbm_crypt._codec import CryptCodec
from kvbm_crypt._config import CryptConfig, KeySource

__all__ = ["CryptCodec", "CryptConfig", "KeySource", "kvbm_codecs"]


@hookimpl
def kvbm_codecs() -> Sequence[CodecKind]:
    """Offer the codec ``crypt``."""
    return [CodecKind("crypt", CryptConfig, CryptCodec, contract_version=2)]
