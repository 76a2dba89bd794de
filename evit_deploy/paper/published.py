"""What the paper printed, row by row: ``published.json``, and what model each row is."""

from pathlib import Path

import msgspec

from evit_deploy.errors import InputError, did_you_mean
from evit_deploy.tokens.plan import TokenSpec

FILE = Path(__file__).with_name("published.json")


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The figures of one row; ``None`` where the paper has none.

    Args:
        top1: Percent.
        top5: Percent.
        images_per_second: Throughput.
        gmacs: Multiply-adds for one image, in 10⁹, as the paper counts them.
    """

    top1: float | None = None
    top5: float | None = None
    images_per_second: float | None = None
    gmacs: float | None = None


class PaperRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of a table.

    Args:
        name: What it is called here.
        model: timm name.
        published: What the paper printed.
        keep_rate: Share of the patches that stays at each location; 1 of a dense model.
        locations: 0-based blocks; the method's own where it is ``None``.
        fuse: With the fused token.
        image_size: Pixels; the model's own where it is ``None``.
        recipe: The recipe that trains it, if one comes with the package.
        weights: Name of the weights it takes, where that is not its own: of a table without training.
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
        """Whether it is the model that the others are compared with."""
        return self.keep_rate == 1.0

    @property
    def tokens(self) -> TokenSpec:
        """How its tokens are reduced."""
        return TokenSpec(keep_rate=self.keep_rate, locations=self.locations, fuse=self.fuse)

    @property
    def takes(self) -> str:
        """Name of its weights."""
        return self.weights or self.name


class PaperTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table.

    Args:
        title: What it is about.
        rows: The first one is the dense model, where the table has it.
        notes: What to know of its figures.
    """

    title: str
    rows: tuple[PaperRow, ...]
    notes: tuple[str, ...] = ()


class Paper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All tables.

    Args:
        source: The paper.
        conditions: What its figures were measured on.
        counting: How its multiply-adds differ from those that are counted here.
        tables: By number: ``1``, ``2a``, ``2b`` and so on.
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
        InputError: There is no such table here.
    """
    tables = paper().tables
    if number not in tables:
        below = [name for name in tables if name.startswith(number)] if number else []
        hint = f"Did you mean {' or '.join(below)}?" if below else did_you_mean(number, tables)
        raise InputError("no such table of the EViT paper", seen=number, wanted=", ".join(tables), fix=hint)
    return tables[number]
