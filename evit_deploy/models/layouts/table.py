"""Tables that map a layout's tensor names to timm's, in both directions."""

import re
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor


class Same(msgspec.Struct, frozen=True):
    """A tensor with another name, and possibly more leading axes of length 1 in timm.

    Args:
        theirs: Name in the layout; ``{}`` stands for the number of a block.
        ours: Name in timm.
        axes: Number of additional axes in timm.
    """

    theirs: str
    ours: str
    axes: int = 0

    def names(self) -> tuple[str, ...]:
        """Names in the layout."""
        return (self.theirs,)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Converts the layout's tensor to timm's."""
        return parts[0].reshape((1,) * self.axes + tuple(parts[0].shape))

    def cut(self, whole: Tensor) -> list[Tensor]:
        """Converts timm's tensor to the layout's."""
        return [whole.reshape(whole.shape[self.axes :])]


class Joined(msgspec.Struct, frozen=True):
    """Tensors of equal shape that timm concatenates by rows: q, k and v, or the halves of a gated MLP.

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
        """Concatenates the layout's tensors to timm's."""
        return torch.cat(parts)

    def cut(self, whole: Tensor) -> list[Tensor]:
        """Converts timm's tensor to the layout's."""
        return [part.clone() for part in whole.chunk(len(self.theirs))]


class Transposed(msgspec.Struct, frozen=True):
    """A matrix that the layout multiplies from the right: the transpose of timm's linear layer.

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
    """Position embeddings of class token and patches; timm adds zeros for the registers between them.

    Args:
        theirs: Name in the layout.
        ours: Name in timm.
        registers: Number of register tokens.
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
        """``[1, 1 + registers + P, D]`` to ``[1, 1 + P, D]``; drops the positions of registers."""
        assert not whole[:, 1 : 1 + self.registers].any(), "the registers have got positions: no way back"
        return [torch.cat([whole[:, :1], whole[:, 1 + self.registers :]], 1)]


Row = Same | Joined | Transposed | PositionsWithoutRegisters


class Table(msgspec.Struct, frozen=True):
    """Rows of names. Rows without matching tensors are skipped.

    Args:
        rows: One per tensor in timm.
    """

    rows: tuple[Row, ...]

    def to_timm(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Converts a layout's tensors to timm's names; also returns the tensors that match no row.

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
        """Converts timm's tensors to the layout's names.

        Args:
            weights: Tensors under timm's names.

        Raises:
            KeyError: A tensor matches no row.
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
        """Every row, with every block number for which its first name is among the tensors."""
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
    """Rows for the weights and biases of layers.

    Args:
        names: Name in the layout -> name in timm.
    """
    return tuple(
        Same(f"{theirs}.{part}", f"{ours}.{part}") for theirs, ours in names.items() for part in ("weight", "bias")
    )


def joined_layers(theirs: tuple[str, ...], ours: str) -> tuple[Row, ...]:
    """Rows for the weights and biases of layers that timm concatenates.

    Args:
        theirs: Names of the layers, in timm's order.
        ours: Name in timm.
    """
    return tuple(Joined(tuple(f"{name}.{part}" for name in theirs), f"{ours}.{part}") for part in ("weight", "bias"))
