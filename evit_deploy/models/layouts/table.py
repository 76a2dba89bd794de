"""The names of a layout beside timm's, as a table that is read in both directions."""

import re
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor


class Same(msgspec.Struct, frozen=True):
    """A tensor that has another name, and in timm more leading axes of length 1.

    Args:
        theirs: Name in the layout; ``{}`` stands for the number of a block.
        ours: Name in timm.
        axes: How many axes timm has more.
    """

    theirs: str
    ours: str
    axes: int = 0

    def names(self) -> tuple[str, ...]:
        """Names in the layout."""
        return (self.theirs,)

    def join(self, parts: list[Tensor]) -> Tensor:
        """The layout's tensor as timm's."""
        return parts[0].reshape((1,) * self.axes + tuple(parts[0].shape))

    def cut(self, whole: Tensor) -> list[Tensor]:
        """timm's tensor as the layout's."""
        return [whole.reshape(whole.shape[self.axes :])]


class Joined(msgspec.Struct, frozen=True):
    """Tensors of equal shape that are one in timm, rows under rows: q, k and v, or the halves of a gated MLP.

    Args:
        theirs: Names in the layout, in timm's order.
        ours: Name in timm.
    """

    theirs: tuple[str, ...]
    ours: str

    def names(self) -> tuple[str, ...]:
        """Names in the layout."""
        return self.theirs

    def join(self, parts: list[Tensor]) -> Tensor:
        """The layout's tensors as timm's one."""
        return torch.cat(parts)

    def cut(self, whole: Tensor) -> list[Tensor]:
        """timm's tensor as the layout's."""
        return [part.clone() for part in whole.chunk(len(self.theirs))]


class Transposed(msgspec.Struct, frozen=True):
    """A matrix that a layout multiplies by from the right, and timm's linear layer has the other way round.

    Args:
        theirs: Name in the layout.
        ours: Name in timm.
    """

    theirs: str
    ours: str

    def names(self) -> tuple[str, ...]:
        """Names in the layout."""
        return (self.theirs,)

    def join(self, parts: list[Tensor]) -> Tensor:
        """``[D, E]`` to ``[E, D]``."""
        return parts[0].T.contiguous()

    def cut(self, whole: Tensor) -> list[Tensor]:
        """The way back."""
        return [whole.T.contiguous()]


class PositionsWithoutRegisters(msgspec.Struct, frozen=True):
    """Positions of class token and patches; in timm, registers between them have positions too, and theirs are zero.

    Args:
        theirs: Name in the layout.
        ours: Name in timm.
        registers: How many.
    """

    theirs: str
    ours: str
    registers: int

    def names(self) -> tuple[str, ...]:
        """Names in the layout."""
        return (self.theirs,)

    def join(self, parts: list[Tensor]) -> Tensor:
        """``[1, 1 + P, D]`` to ``[1, 1 + registers + P, D]``."""
        zeros = parts[0].new_zeros(1, self.registers, parts[0].shape[2])
        return torch.cat([parts[0][:, :1], zeros, parts[0][:, 1:]], 1)

    def cut(self, whole: Tensor) -> list[Tensor]:
        """The way back; registers that have a position by now would be lost."""
        assert not whole[:, 1 : 1 + self.registers].any(), "the registers have got positions: no way back"
        return [torch.cat([whole[:, :1], whole[:, 1 + self.registers :]], 1)]


Row = Same | Joined | Transposed | PositionsWithoutRegisters


class Table(msgspec.Struct, frozen=True):
    """Rows of names. A row whose tensors are not there, in a file or in a model, is passed over.

    Args:
        rows: One a tensor of timm's.
    """

    rows: tuple[Row, ...]

    def to_timm(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A layout's tensors under timm's names, and those that no row names.

        Args:
            weights: Tensors under the layout's names.
        """
        found: dict[str, Tensor] = {}
        left = dict(weights)
        for row, numbers in self._numbered(weights, theirs=True):
            names = [name.replace("{}", numbers) for name in row.names()]
            if all(name in weights for name in names) and len({weights[name].shape for name in names}) == 1:
                found[row.ours.replace("{}", numbers)] = row.join([left.pop(name) for name in names])
        return found, left

    def to_released(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: timm's tensors under the layout's names.

        Args:
            weights: Tensors under timm's names.

        Raises:
            KeyError: No row names a tensor.
        """
        found: dict[str, Tensor] = {}
        left = dict(weights)
        for row, numbers in self._numbered(weights, theirs=False):
            ours = row.ours.replace("{}", numbers)
            if ours in left:
                parts = row.cut(left.pop(ours))
                found |= {name.replace("{}", numbers): part for name, part in zip(row.names(), parts, strict=True)}
        if left:
            raise KeyError(f"no row for {sorted(left)}")
        return found

    def _numbered(self, weights: Mapping[str, Tensor], *, theirs: bool) -> list[tuple[Row, str]]:
        """Every row with every number of a block that its first name has among the tensors."""
        found: list[tuple[Row, str]] = []
        for row in self.rows:
            pattern = row.names()[0] if theirs else row.ours
            if "{}" not in pattern:
                found.append((row, ""))
                continue
            before, _, after = pattern.partition("{}")
            match = re.compile(re.escape(before) + r"(\d+)" + re.escape(after)).fullmatch
            found += [(row, hit.group(1)) for hit in map(match, weights) if hit]
        return found


def layers(names: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of layers, their weight and their bias.

    Args:
        names: A layer's name in the layout, to the one in timm.
    """
    return tuple(
        Same(f"{theirs}.{part}", f"{ours}.{part}") for theirs, ours in names.items() for part in ("weight", "bias")
    )


def joined_layers(theirs: tuple[str, ...], ours: str) -> tuple[Row, ...]:
    """Rows of layers that are one in timm, their weight and their bias.

    Args:
        theirs: Names of the layers, in timm's order.
        ours: Name in timm.
    """
    return tuple(Joined(tuple(f"{name}.{part}" for name in theirs), f"{ours}.{part}") for part in ("weight", "bias"))
