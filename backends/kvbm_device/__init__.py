"""The engine's KV blocks as byte views, copied to and from contiguous regions.

engine's tensors, by KV group ──layout_of──► ``Layout``, of ``PageView``, ... ──► ``Device``: gather, scatter

`open_device` does both.
"""

from __future__ import annotations

from kvbm_device._counts import CopyCounts
from kvbm_device._host import HostDevice
from kvbm_device._layout import Layout, layout_of
from kvbm_device._open import check_copy, open_device
from kvbm_device._staged import StagedDevice
from kvbm_device._views import PageView, page_views

__all__ = [
    "CopyCounts",
    "HostDevice",
    "Layout",
    "PageView",
    "StagedDevice",
    "check_copy",
    "layout_of",
    "open_device",
    "page_views",
]
