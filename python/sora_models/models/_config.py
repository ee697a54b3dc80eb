"""Configs: frozen dataclasses that check their fields and go to JSON and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

C = TypeVar("C", bound="Config")


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of the models' configs. Lists, as JSON gives them, become tuples."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        self.validate()

    def validate(self) -> None:
        """Raises ValueError that names the first bad field."""

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for ``json.dumps``; :meth:`from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[C], fields: Mapping[str, Any]) -> C:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; "
                f"its fields are {', '.join(known)}"
            )
        return cls(**fields)

    def _reject(self, name: str, expected: str) -> None:
        got = getattr(self, name)
        raise ValueError(f"{type(self).__name__}.{name}: expected {expected}; got {got!r}")

    def _int(self, *names: str, least: int = 1) -> None:
        for name in names:
            if not _is_int(getattr(self, name), least):
                self._reject(name, f"an int of at least {least}")

    def _ints(self, name: str, length: int | None = None, least: int = 1) -> None:
        value = getattr(self, name)
        right = isinstance(value, tuple) and (len(value) == length if length else len(value) > 0)
        if not right or not all(_is_int(item, least) for item in value):
            count = "a non-empty tuple" if length is None else f"a tuple of {length}"
            self._reject(name, f"{count} of ints of at least {least}")

    def _choice(self, name: str, choices: Collection[str | None]) -> None:
        value = getattr(self, name)
        if not (value is None or isinstance(value, str)) or value not in choices:
            self._reject(name, " or ".join(repr(choice) for choice in choices))

    def _number(self, name: str, least: float = 0.0, below: float = float("inf")) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not least <= value < below:
            self._reject(name, f"a number in [{least:g}, {below:g})")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
