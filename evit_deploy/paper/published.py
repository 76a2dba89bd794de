"""The published rows of the paper's tables (``published.json``), with the model of each row."""

from pathlib import Path

import msgspec

from evit_deploy.errors import InputError, did_you_mean
from evit_deploy.tokens.plan import TokenSpec

FILE = Path(__file__).with_name("published.json")


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Published figures of a row; ``None`` if the paper has none.

    Args:
        top1: Percent.
        top5: Percent.
        images_per_second: Throughput.
        gmacs: Multiply-adds per image, in 10⁹, as counted by the paper.
    """

    top1: float | None = None
    top5: float | None = None
    images_per_second: float | None = None
    gmacs: float | None = None


class PaperRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of a table.

    Args:
        name: Name of the row.
        model: timm name.
        published: The published figures.
        keep_rate: Fraction of the patches kept at each location; 1 for a dense model.
        locations: 0-based blocks; ``None`` for the method's default.
        fuse: Whether there is a fused token.
        image_size: Side in pixels; ``None`` for the model's default.
        recipe: The packaged recipe that trains it, if any.
        weights: Name of its weights, if different from ``name``, as in tables without training.
    """

    name: str
    model: str
    published: Published
    keep_rate: float | tuple[float, ...] = 1.0
    locations: tuple[int, ...] | None = None
    fuse: bool = True
    image_size: int | None = None
    recipe: str | None = None
    weights: str | None = None

    @property
    def dense(self) -> bool:
        """Whether it is the dense model that the others are compared with."""
        return self.keep_rate == 1.0

    @property
    def tokens(self) -> TokenSpec:
        """Its token reduction."""
        return TokenSpec(keep_rate=self.keep_rate, locations=self.locations, fuse=self.fuse)

    @property
    def takes(self) -> str:
        """Name of the weights it uses."""
        return self.weights or self.name


class PaperTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table.

    Args:
        title: Title of the table.
        rows: The rows, starting with the dense model if the table has one.
        notes: Notes on its figures.
    """

    title: str
    rows: tuple[PaperRow, ...]
    notes: tuple[str, ...] = ()


class Paper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All tables.

    Args:
        source: The paper.
        conditions: Hardware and conditions of its measurements.
        counting: How its count of multiply-adds differs from ours.
        tables: The tables by number: ``1``, ``2a``, ``2b`` and so on.
    """

    source: str
    conditions: str
    counting: str
    tables: dict[str, PaperTable]


def paper() -> Paper:
    """The published figures."""
    return msgspec.json.decode(FILE.read_bytes(), type=Paper)


def published_table(number: str) -> PaperTable:
    """One table of the paper.

    Raises:
        InputError: There is no such table.
    """
    tables = paper().tables
    if number not in tables:
        below = [name for name in tables if name.startswith(number)] if number else []
        hint = f"Did you mean {' or '.join(below)}?" if below else did_you_mean(number, tables)
        raise InputError("no such table of the EViT paper", seen=number, wanted=", ".join(tables), fix=hint)
    return tables[number]
