"""Says of an environment which of its variables cannot be honoured, and what the others do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Final

from kvbm_core import ConfigError
from kvbm_vllm.kvbm._variables import VARIABLES, Use

__all__ = ["check_environment", "explain", "makes_stack"]

_BY_NAME: Final = {variable.name: variable for variable in VARIABLES}
_WORDS: Final = {
    "1": "true", "true": "true", "on": "true", "yes": "true",
    "0": "false", "false": "false", "off": "false", "no": "false",
}  # fmt: skip


def check_environment(environ: Mapping[str, str]) -> None:
    """Find what cannot be honoured.

    Raises:
        ConfigError: Names every variable at fault with its value and what to do; for an unknown one,
            the nearest that is known. A misspelt size would otherwise be a cache that is not there.
    """
    faults = [fault for name, value in _given(environ).items() if (fault := _fault(name, value))]
    if faults:
        raise ConfigError("\n".join(["settings of KVBM in the environment:", *faults]))


def explain(environ: Mapping[str, str]) -> list[str]:
    """Say in a line for each variable that is set what it does."""
    given = _given(environ)
    return [f"{name}={_shown(name, given[name])}: {_BY_NAME[name].text}" for name in given]


def makes_stack(environ: Mapping[str, str]) -> list[str]:
    """List the variables that are set and make the stack."""
    return [name for name in _given(environ) if _BY_NAME[name].use is Use.STACK]


def _given(environ: Mapping[str, str]) -> dict[str, str]:
    """Take what is KVBM's from an environment; what is empty is not set."""
    ours = {name: value.strip() for name, value in environ.items()
            if name.startswith("DYN_KVBM_") or name in _BY_NAME}  # fmt: skip
    return {name: value for name, value in sorted(ours.items()) if value}


def _fault(name: str, value: str) -> str | None:
    shown, variable = f"{name}={_shown(name, value)}", _BY_NAME.get(name)
    if variable is None:
        near = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0)
        return f"{shown}: there is no such variable; did you mean {near[0]}?"
    if variable.use is Use.REFUSED:
        return f"{shown}: {variable.text}"
    if variable.use is Use.FIXED and _WORDS.get(value.lower(), value) not in _spelt(variable.accepts):
        return f"{shown}: {variable.text} Only {' or '.join(variable.accepts)} is accepted."
    return None


def _spelt(accepts: tuple[str, ...]) -> set[str]:
    return {_WORDS.get(value, value) for value in accepts}


def _shown(name: str, value: str) -> str:
    return "(hidden)" if name.endswith(("_KEY", "_SECRET", "_TOKEN", "_PASSWORD")) else value
