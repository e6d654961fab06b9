"""How a model's tensors are written down: one table with a row for each name, shape and role.

Shape checks, the graph, the roles of both backends and what verification compares all read these tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qwen_profiles.schema import Role

_INDEX = re.compile(r"\{(\w+)\}")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must be.

    Attributes:
        shape: in the checkpoint.
        role: what it is counted as, in reports of size by role.
        recipe_role: the recipe's role whose format it is stored in; None: it stays in floating point.
    """

    shape: tuple[int, ...]
    role: str
    recipe_role: Role | None


@dataclass(frozen=True)
class TensorRow:
    """One row of a table.

    Attributes:
        name: `{layer}`, or another word in braces, stands for every index of that kind.
        sizes: of the axes: numbers, or names of the configuration's attributes.
        role, recipe_role: as in `TensorSpec`.
    """

    name: str
    sizes: tuple[str | int, ...]
    role: str
    recipe_role: Role | None

    @property
    def index(self) -> str | None:
        """The word in braces."""
        found = _INDEX.search(self.name)
        return found[1] if found else None

    def at(self, index: int) -> str:
        """The name with its index."""
        return _INDEX.sub(str(index), self.name)

    def matches(self, name: str) -> bool:
        """Whether `name` is this row's, with any index."""
        before, *after = _INDEX.split(self.name)[::2]
        pattern = "".join([re.escape(before), *(rf"\d+{re.escape(part)}" for part in after)])
        return re.fullmatch(pattern, name) is not None


Table = tuple[TensorRow, ...]


@dataclass(frozen=True)
class Fused:
    """Tensors that a checkpoint stores as one, their rows in groups.

    Attributes:
        name: how the stored tensor's name ends, from the block on.
        groups: how many, one after the other; all alike.
        parts: of a group, in its order: the tensor of the table that the rows belong to, named like `name`,
            and how many they are. A tensor has its first part's rows of every group, then its second's, ...
    """

    name: str
    groups: int
    parts: tuple[tuple[str, int], ...]

    @property
    def rows(self) -> int:
        """Of the stored tensor."""
        return self.groups * sum(count for _, count in self.parts)

    def split(self) -> dict[str, tuple[range, ...]]:
        """For each tensor, by its name: the rows of the stored one that it consists of, in its own order."""
        size, start = self.rows // self.groups, 0
        found: dict[str, tuple[range, ...]] = {}
        for name, count in self.parts:
            runs = tuple(range(first, first + count) for first in range(start, self.rows, size))
            found[name] = found.get(name, ()) + runs
            start += count
        return found


def matrix(name: str, role: Role, *sizes: str | int) -> TensorRow:
    """A tensor that is stored in the recipe's format for `role`."""
    return TensorRow(name, sizes, role, role)


def floats(name: str, role: str, *sizes: str | int) -> TensorRow:
    """A tensor that stays in floating point."""
    return TensorRow(name, sizes, role, None)


def expand(table: Table, config: object, indices: Mapping[str, Iterable[int]]) -> dict[str, TensorSpec]:
    """Every tensor of `table` by name: those without an index, then index by index.

    Args:
        config: its attributes are the sizes.
        indices: by the word in braces.
    """
    found: list[tuple[int, str, TensorSpec]] = []
    for row in table:
        shape = tuple(size if isinstance(size, int) else getattr(config, size) for size in row.sizes)
        spec = TensorSpec(shape, row.role, row.recipe_role)
        for index in indices[row.index] if row.index else (-1,):
            found.append((index, row.at(index), spec))
    found.sort(key=lambda entry: entry[0])
    return {name: spec for _, name, spec in found}


def layer_of(name: str) -> int | None:
    """The decoder layer that the tensor `name` belongs to."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None
