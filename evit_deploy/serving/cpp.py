"""A folder that builds on its own: the C++ example, and the bundle that it runs."""

import shutil
from pathlib import Path

from evit_deploy.engines.plugin.build import sources
from evit_deploy.engines.plugin.library import LIBRARY

BUNDLE = "bundle"
_README = """# {name}: {platform}, in C++

`bundle/` is what runs: the files that `bundle/manifest.json` lists with their hashes, the answers that they have to
give (`golden.npz`), and the report that proves it. The rest is a program that runs it, to be copied into yours;
[EXAMPLE.md](EXAMPLE.md) says what each file is for and which libraries it needs; `sbom.json` is the bill of materials.

```bash
cmake -S . -B build -DEVIT_RUNTIME={platform}
cmake --build build
build/evit_example bundle{plugin} photograph.jpg
```

The program holds the model against the golden answers before it answers anything. Exit codes: 0 all is well, 1 the
answers differ, 2 usage or input, 3 the machine lacks something, 4 a stage failed.
"""


def write_example(folder: Path, name: str, platform: str, *, plugin: bool) -> None:
    """Copies the program, and says how it is built and run.

    Args:
        folder: Where to.
        name: Of the model.
        platform: What the program is to be built with.
        plugin: Whether the plan needs the library in ``plugins/``.
    """
    for path in sorted((sources() / "example").iterdir()):
        if path.is_file():  # its tests stay
            shutil.copyfile(path, folder / ("EXAMPLE.md" if path.name == "README.md" else path.name))
    option = f" --plugin plugins/{LIBRARY}" if plugin else ""
    text = _README.format(name=name, platform=platform, plugin=option)
    (folder / "README.md").write_text(text, encoding="utf-8")
