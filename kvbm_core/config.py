"""The configuration: one mapping, in a YAML file or inline, checked before anything starts.

    tiers:                                # fastest first
      - {backend: cpu,  capacity: 8GiB}
      - {backend: lmdb, capacity: 200GiB, path: /nvme/kvbm}
    load_deadline_s: 5

A tier's keys are ``backend``, ``name``, ``checked``, ``codecs``, ``policy``, ``admission``, ``movement`` and
whatever its backend's own type declares.
"""

from __future__ import annotations

import difflib
import enum
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from kvbm_core.errors import ConfigError
from kvbm_core.field_docs import show_fields
from kvbm_core.movement import WRITE_THROUGH, Movement
from kvbm_core.printable import noun, shown
from kvbm_core.ranges import check_ranges
from kvbm_core.sizes import ByteSize, parse_size, size_text
from kvbm_core.yaml_file import read_yaml

__all__ = [
    "ByteSize",
    "PartEntry",
    "Settings",
    "StackConfig",
    "TierEntry",
    "convert",
    "load_config",
    "parse_size",
    "size_text",
]

_OWN_KEYS: Final = ("backend", "name", "checked", "codecs", "policy", "admission", "movement")
"""Of a tier, whatever its backend."""
_UNIONS: Final = (Union, types.UnionType)

T = TypeVar("T")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Base of a configuration. Its repr shows numbers and switches, and of all else the type or the keys.

    Text and what is nested may be a password, and whoever prints a configuration cannot know.
    """

    def __init_subclass__(cls) -> None:
        show_fields([cls])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Give what `rich.print` shows: the same."""
        return [(name, _hidden(getattr(self, name))) for name in self.__struct_fields__]


class PartEntry(Settings, frozen=True, kw_only=True):
    """A codec or a policy, as written: ``zstd``, or ``{name: zstd, element_bytes: 4}``."""

    name: str
    """That of its entry point."""
    settings: Mapping[str, Any]
    """For its own type."""


class TierEntry(Settings, frozen=True, kw_only=True):
    """One tier of the stack, as written; `settings` are for the backend's own type."""

    backend: str
    """The backend's name: that of its entry point."""
    name: str
    """What logs, counters and errors call this tier; by default the backend's name."""
    checked: bool | None
    """Add a seal with namespace, key and checksum to each block and verify it on every load.
    None: for every tier but those of host memory without codecs (nothing outside the process can change it
    there, and a checksum costs a fifth of a memory copy)."""
    settings: Mapping[str, Any]
    """For the backend's own type: all keys that are not a tier's."""
    codecs: tuple[PartEntry, ...] = ()
    """They transform each object on its way into the tier, in this order, and back."""
    policy: PartEntry | None = None
    """Chooses the objects that make room for others. None: the least recently used."""
    admission: PartEntry | None = None
    """Chooses the blocks that are written to the tier. None: all."""
    movement: Movement = WRITE_THROUGH
    """How blocks come here from the tiers above, and go back."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        told: dict[str, Any] = {"backend": self.backend, "name": self.name, "checked": self.checked}
        told["codecs"] = [codec.name for codec in self.codecs]
        told |= {
            "policy": self.policy and self.policy.name,
            "admission": self.admission and self.admission.name,
        }
        told |= {"movement": self.movement.stores}
        return [*told.items(), ("settings", _hidden(self.settings))]


class StackConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operator's settings: of the stack, and of the engine that uses it.

    A `Stack` reads `tiers`, the deadlines, `max_store_blocks` and `staging`; the other keys are for the
    connector of an engine.
    """

    tiers: tuple[TierEntry, ...]
    """Fastest first, at least one."""
    load_deadline_s: float = 5.0
    """A load that takes longer is given up and the tokens are computed. Seconds, above 0."""
    store_deadline_s: float = 30.0
    """A store that takes longer is counted as failed. Seconds, above 0."""
    lookup_deadline_s: float = 0.25
    """A tier that cannot list its blocks, like a remote store, is asked before a prompt is computed;
    the prompt waits no longer than this for each answer. Seconds, above 0."""
    only_faster: bool = True
    """Load only what is expected to load faster than the engine computes it, by what was measured of
    both; false: whatever a tier has."""
    max_load_fraction: float = 0.5
    """Largest part of the engine's KV blocks that may be waiting for loads at once, above 0, at
    most 1. Blocks that wait cannot be used by a running request."""
    max_store_blocks: int = 512
    """Blocks on their way into tiers below the first at once; more wait in a queue of the same
    length, and what does not fit there is dropped. At least 1."""
    staging: ByteSize = ByteSize(256 << 20)
    """Host memory for blocks on their way, used only without a host pool."""
    sparse_stores: Literal["boundaries", "dense"] = "boundaries"
    """Which blocks of sliding windows and attention chunks are stored: those that a prefix needs which ends
    where the next prompt is likely to leave it, or all."""
    sparse_stores_every_tokens: int | None = None
    """With ``boundaries``: a prefix may end each so many tokens, beside the ends of prompts and answers and
    where prompts part. 0: nowhere else. None: 2,048, or four times the model's longest window or chunk if
    that is more."""
    device_copy: str = "auto"
    """How blocks cross the link of an accelerator: ``staged`` (kernel and DMA), ``dma``, ``kernel``, or
    ``auto`` for what a measurement at start finds fastest."""
    device_staging: ByteSize = ByteSize(256 << 20)
    """Memory of the accelerator for blocks on their way. A store that finds none waits, and is given up
    when the engine needs its blocks."""
    weights_id: str | None = None
    """Names the model's weights, in place of the digest of their files. Give it where the files
    cannot be read by the engine, and change it whenever the weights change."""
    prefetch_fraction: float = 0.25
    """Largest part of the host pool that holds blocks which were brought into it for requests that wait.
    At least 0, which stands for none, at most 1."""
    keep_fraction: float = 0.25
    """Largest part of each tier, and of a tenant's quota there, whose blocks may be kept for requests. At
    least 0, which stands for none, below 1."""
    max_keep_s: float = 3600.0
    """So long may a request have its blocks kept. Seconds, above 0."""
    tenants: Mapping[str, Mapping[str, ByteSize]] = {}
    """Quotas, by tenant and by the name of a tier; ``default``: of each tenant that is not named."""
    record: str | None = None
    """A file for the log of hashes, without text, that `kvbm replay` reads. None: nothing is recorded."""
    record_capacity: ByteSize = ByteSize(1 << 30)
    """Bytes of that file and the one before it. At least 1 MiB."""
    coordinator: Mapping[str, Any] | None = None
    """Where the engine's processes register: ``backend`` names the coordinator, all other keys are
    its own. None: nowhere."""


def convert(value: Mapping[str, Any], to: type[T], where: str) -> T:
    """Turn a mapping into a typed, frozen configuration.

    Args:
        value: As written by the user.
        to: A msgspec structure.
        where: Names the place in messages, for example ``tiers[1] (lmdb)``.

    Raises:
        ConfigError: For an unknown key (with the nearest known one), a missing key, or a value of
            the wrong type; names key and value.
    """
    fields = {f.name for f in msgspec.structs.fields(to)}  # type: ignore[arg-type]
    refuse_unknown(value, fields, where)
    try:
        return msgspec.convert(dict(value), to, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_explain(str(error), value, to)}") from None
    except ConfigError as error:
        error.args = (f"{where}: {error}",)  # A range that the type itself looks at.
        raise


def refuse_unknown(keys: Iterable[object], known: Iterable[str], where: str) -> None:
    """Raise a `ConfigError` for the first key that is not known, naming the nearest that is."""
    known = sorted(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def load_config(source: Mapping[str, Any] | str | Path) -> StackConfig:
    """Read a stack's configuration.

    Args:
        source: The mapping itself, or the path of a YAML file that holds it.

    Raises:
        ConfigError: If it cannot be read or something in it is wrong.
    """
    if isinstance(source, Mapping):
        return _stack(source, "configuration")
    path, value = read_yaml(source)
    if not isinstance(value, Mapping):
        raise ConfigError(f"configuration file {path}: expected keys like 'tiers:', found {noun(value)}")
    return _stack(value, str(path))


def _stack(value: Mapping[str, Any], where: str) -> StackConfig:
    refuse_unknown(value, StackConfig.__struct_fields__, where)
    tiers = value.get("tiers")
    if not isinstance(tiers, list | tuple) or not tiers:
        raise ConfigError(f"{where}: tiers: {noun(tiers)}; write a list of at least one tier, "
                          "fastest first, like [{backend: cpu, capacity: 8GiB}]")  # fmt: skip
    entries = tuple(_tier_entry(index, tier, where) for index, tier in enumerate(tiers))
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where}: two tiers are called {name!r}; give each a 'name' of its own")
    config = convert({**value, "tiers": ()}, StackConfig, where)
    config = msgspec.structs.replace(config, tiers=entries)
    check_ranges(config, where)
    return config


def _tier_entry(index: int, tier: object, where: str) -> TierEntry:
    where = f"{where}: tiers[{index}]"
    if not isinstance(tier, Mapping) or not isinstance(tier.get("backend"), str):
        raise ConfigError(f"{where}: a {noun(tier)}; write a mapping with a 'backend', like "
                          "{backend: cpu, capacity: 8GiB}")  # fmt: skip
    settings = {k: v for k, v in tier.items() if k not in _OWN_KEYS}
    checked, name = tier.get("checked"), tier.get("name", tier["backend"])
    if checked is not None and not isinstance(checked, bool):
        raise ConfigError(f"{where}: checked: {shown(checked)}; write true or false, or leave it out")
    if not isinstance(name, str | int) or not str(name):
        raise ConfigError(f"{where}: name: a {noun(name)}; write a word that logs and metrics may show")
    return TierEntry(
        backend=tier["backend"],
        name=str(name),
        checked=checked,
        settings=settings,
        codecs=_codecs(tier.get("codecs", ()), where),
        policy=_part(tier["policy"], f"{where}: policy", "{name: fifo}") if "policy" in tier else None,
        admission=_part(tier["admission"], f"{where}: admission", "{name: second-touch}")
        if "admission" in tier
        else None,
        movement=_movement(tier["movement"], index, where) if "movement" in tier else WRITE_THROUGH,
    )


def _movement(value: object, index: int, where: str) -> Movement:
    if index == 0:
        raise ConfigError(f"{where}: movement: the first tier has none above; write it on a lower one")
    value = {"stores": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: movement: {shown(value)}; write a mapping like {{stores: demotion}}")
    return convert(value, Movement, f"{where}: movement")


def _codecs(value: object, where: str) -> tuple[PartEntry, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(
            f"{where}: codecs: {shown(value)}; write a list, in the order in which they encode, like "
            "[{name: zstd, element_bytes: 4}]"
        )
    parts = tuple(
        _part(each, f"{where}: codecs[{at}]", "{name: zstd, element_bytes: 4}")
        for at, each in enumerate(value)
    )
    for part in parts:
        if sum(other.name == part.name for other in parts) > 1:
            raise ConfigError(f"{where}: codecs: {part.name!r} is written twice; take one away")
    return parts


def _part(value: object, where: str, example: str) -> PartEntry:
    """Read the name and the settings of a codec or a policy."""
    if isinstance(value, str) and value:
        return PartEntry(name=value, settings={})
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"{where}: {shown(value)}; write its name, or a mapping with a 'name', like {example}"
        )
    return PartEntry(name=value["name"], settings={k: v for k, v in value.items() if k != "name"})


def _decode(to: type[Any], value: object) -> object:
    if to is ByteSize:
        try:
            return parse_size(value)
        except ConfigError as error:
            # msgspec adds the key to a ValueError's message.
            raise ValueError(str(error)) from error
    raise NotImplementedError(to)


def _explain(message: str, value: Mapping[str, Any], to: type[Any]) -> str:
    """Turn msgspec's ``… - at `$.key` `` into ``key: …``, with the value where it can be no secret."""
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", message):
        return f"missing key {missing[1]!r}: this backend needs it"
    text, _, path = message.partition(" - at `$.")
    path = path.rstrip("`")
    if not path:
        return text
    key = re.split(r"[.\[]", path)[0]
    wanted = get_type_hints(to).get(key)
    if choices := _choices(wanted):
        # msgspec quotes what was written, which may be anything.
        text = f"not one of {', '.join(map(str, choices))}"
    text = text.removeprefix("size: ")
    known = key == path and key in value and "is not a size" not in text
    if not known:
        return f"{path}: {text}"
    told = shown(value[key]) if _plain(wanted) else f"a {type(value[key]).__name__}"
    return f"{path}: {text} (got {told})"


def _choices(wanted: object) -> tuple[object, ...]:
    """Give the values of a Literal or an Enum, also of an optional one."""
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return tuple(member.value for member in wanted)
    if get_origin(wanted) is Literal:
        return get_args(wanted)
    return next((found for part in get_args(wanted) if (found := _choices(part))), ())


def _plain(wanted: object) -> bool:
    """Say whether a field is of numbers, switches or fixed words only: nobody writes a secret there."""
    if _choices(wanted) or wanted in (bool, int, float, ByteSize, type(None)):
        return True
    return bool(get_args(wanted)) and get_origin(wanted) in _UNIONS and all(map(_plain, get_args(wanted)))


def _hidden(value: object) -> object:
    if isinstance(value, Mapping):
        return f"<{', '.join(map(str, value))}>"
    if isinstance(value, str | bytes):
        return f"<{type(value).__name__}>"
    if isinstance(value, tuple | list):
        return [part if isinstance(part, Settings) else _hidden(part) for part in value]
    if value is None or isinstance(value, bool | int | float | Settings):
        return value
    return f"<{type(value).__name__}>"
