"""Reading typed values out of an untrusted mapping.

What it is: a view of a parsed JSON object or GGUF metadata that yields a value of
the asked type and range, or raises. What it knows nothing about: what the keys mean.
Invariant: no value leaves it unchecked, so no absurd number reaches an allocation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.errors import ModelFileError

_REQUIRED = object()


class Fields:
    """Typed access to `values`; `origin` names the file in error messages, `prefix` goes before each key.

    Every reader takes a default, returned when the key is absent or null; without one,
    an absent key raises ModelFileError, as does a value of the wrong type or out of range.
    """

    def __init__(self, values: Mapping[str, Any], origin: str, prefix: str = "") -> None:
        self.values, self.origin, self.prefix = values, origin, prefix

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as parsed; null counts as absent."""
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, *, low: int = 1, high: int = 2**31 - 1) -> Any:
        """An int in [low, high]; booleans and fractional numbers are refused."""
        value = self._present(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, low: float = 0.0, high: float = 1e12) -> Any:
        """A finite float in (low, high]."""
        value = self._present(key, default)
        if value is default:
            return value
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not low < value <= high:  # NaN fails both comparisons
            raise self.bad(key, value, f"a number above {low:g} and up to {high:g}")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> Any:
        """true or false, nothing that merely looks like it."""
        value = self._present(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.bad(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A string."""
        value = self._present(key, default)
        if value is not default and not isinstance(value, str):
            raise self.bad(key, value, "a string")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them, as a tuple; absent is empty."""
        value = self.raw(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
            raise self.bad(key, value, "a token id or a list of them")
        return tuple(dict.fromkeys(ids))

    def _present(self, key: str, default: Any) -> Any:
        value = self.raw(key, default)
        if value is _REQUIRED:
            raise ModelFileError(
                f"{self.origin} lacks `{self.prefix}{key}`.",
                param=self.prefix + key,
                hint="Download the model again, or pick a complete one.",
            )
        return value

    def bad(self, key: str, value: Any, wanted: str) -> ModelFileError:
        """The error that says what `key` holds and what it should."""
        name, shown = self.prefix + key, repr(value)[:80]
        return ModelFileError(
            f"{self.origin}: `{name}` is {shown}, but must be {wanted}.",
            param=name,
            hint="The file is corrupt or not a model of this kind.",
        )
