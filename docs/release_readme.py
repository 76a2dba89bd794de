"""Makes the links of ``README.md`` absolute, because a package index shows the file without the repository around it.

    python docs/release_readme.py OWNER/NAME TAG > README.index.md

The release workflow (``.github/workflows/release.yml``) builds with the result. The repository's address is no part of
the sources, so that a fork's packages link to the fork.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?P<image>!?)(?P<text>\[[^\]]*\])\((?P<path>[^)\s:]+)\)")
"""An inline link without a scheme. README.md has no other kind; its test says so."""


def readme(repository: str, tag: str) -> str:
    """README.md with absolute links.

    Args:
        repository: Owner and name on GitHub, ``owner/name``.
        tag: The release's tag or commit, at which the links point.
    """

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["image"] else "tree" if (ROOT / link["path"]).is_dir() else "blob"
        path = f"README.md{link['path']}" if link["path"].startswith("#") else link["path"]
        return f"{link['image']}{link['text']}(https://github.com/{repository}/{kind}/{tag}/{path})"

    return _LINK.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    if len(sys.argv) != 3 or not re.fullmatch(r"[\w.-]+/[\w.-]+", sys.argv[1]):
        sys.exit("usage: python docs/release_readme.py OWNER/NAME TAG")
    print(readme(sys.argv[1], sys.argv[2]), end="")
