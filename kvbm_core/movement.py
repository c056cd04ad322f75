"""How blocks move between a tier and those above it, as an operator writes it on the lower one.

tiers:
- {backend: cpu,  capacity: 8GiB}
- {backend: lmdb, capacity: 200GiB, path: /nvme/kvbm, movement: {stores: demotion}}
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from kvbm_core.errors import ConfigError

__all__ = ["WRITE_THROUGH", "Movement"]


class Movement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The movement along one edge of the stack: between a tier and the next faster one.

    Raises:
        ConfigError: For watermarks that are no parts of a capacity, or settings that exclude each other.
    """

    stores: Literal["write_through", "demotion"] = "write_through"
    """When the tier gets a block. ``write_through``: as soon as it is computed. ``demotion``: when the tier
    above is about to evict it."""
    promotion: Literal["always", "measured", "never"] = "always"
    """If a block that is loaded from the tier is kept above, too. ``measured``: as long as blocks kept so are
    loaded from there again."""
    copies: Literal["inclusive", "exclusive"] = "inclusive"
    """What the tier does with a block that a tier above has got. ``exclusive``: it makes room before any
    other does."""
    low_watermark: float = 0.2
    """Demotion begins when less than this part of the capacity above could be given away without a loss:
    it is free, or the next to be evicted are in this tier already. Above 0, at most `high_watermark`."""
    high_watermark: float = 0.4
    """Demotion copies until this part could be given away. At most 1."""

    def __post_init__(self) -> None:
        if not 0 < self.low_watermark <= self.high_watermark <= 1:
            raise ConfigError(
                f"low_watermark: {self.low_watermark!r}, high_watermark: {self.high_watermark!r}; write "
                "parts of the capacity above, like 0.2 and 0.4, the low one first"
            )
        if self.copies == "exclusive" and self.stores == "write_through":
            raise ConfigError(
                "copies: 'exclusive' with stores: write_through, which puts each block into every tier; "
                "write stores: demotion beside it"
            )


WRITE_THROUGH: Final = Movement()
"""The movement of a tier that names none."""
