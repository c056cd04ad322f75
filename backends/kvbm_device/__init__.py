"""The engine's KV blocks as byte views, copied to and from contiguous regions.

engine's tensors ──page_views──► ``PageView``, ... ──open_device──► ``Device``: gather, scatter
"""

from __future__ import annotations

from kvbm_device._counts import CopyCounts
from kvbm_device._host import HostDevice
from kvbm_device._open import check_copy, open_device
from kvbm_device._staged import StagedDevice
from kvbm_device._views import PageView, page_views

__all__ = [
    "CopyCounts",
    "HostDevice",
    "PageView",
    "StagedDevice",
    "check_copy",
    "open_device",
    "page_views",
]
