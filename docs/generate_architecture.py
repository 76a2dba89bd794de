"""Draws docs/architecture.svg from the import contract in pyproject.toml; tests fail when it is stale.

python docs/generate_architecture.py
"""

import tomllib
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
WIDTH, LEFT, BOX, GAP = 720, 48, 30, 8
# Each pair has a contrast of more than 4.5, and the drawing stands on white in light and dark pages alike.
FILLS = ("#e8eaf6", "#e3f2fd", "#e0f2f1", "#f1f8e9")


def floors() -> list[list[str]]:
    """The rooms of each floor, from the top, as the contract has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def drawing() -> str:
    """The drawing as SVG."""
    rows, parts = floors(), []
    height = len(rows) * (BOX + GAP) + GAP
    for row, rooms in enumerate(rows):
        top, floor = GAP + row * (BOX + GAP), len(rows) - row
        parts.append(f'<text x="38" y="{top + 20}" text-anchor="end">{floor}</text>')
        width = (WIDTH - LEFT - GAP * len(rooms)) / len(rooms)
        for place, room in enumerate(rooms):
            x = LEFT + place * (width + GAP)
            fill = FILLS[row % len(FILLS)]
            box = f'x="{x:.1f}" y="{top}" width="{width:.1f}" height="{BOX}" rx="4"'
            parts.append(f'<rect {box} fill="{fill}" stroke="#5c6bc0"/>')
            parts.append(f'<text x="{x + width / 2:.1f}" y="{top + 20}" text-anchor="middle">{escape(room)}</text>')
    arrow = f'<path d="M14 {GAP} V{height - GAP - 8}" stroke="#37474f" stroke-width="2"/>'
    arrow += f'<path d="M9 {height - GAP - 10} h10 l-5 10 z" fill="#37474f"/>'
    title = "Rooms by floor: each may import those on the floors below it, and none on its own floor"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12.5"><title>{title}</title>\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n{arrow}\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(drawing(), encoding="utf-8")
