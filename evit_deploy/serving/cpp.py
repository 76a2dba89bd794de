"""Packages for C++: a self-contained folder with the example program and the bundle that it runs."""

import shutil
from pathlib import Path

from evit_deploy.engines.plugin.build import sources
from evit_deploy.engines.plugin.library import LIBRARY

BUNDLE = "bundle"
_README = """# {name}: {platform}, in C++

`bundle/` contains the model: its files, listed with hashes in `bundle/manifest.json`, its golden answers (`golden.npz`)
and the report of its verification. The rest is a program that runs it, for you to copy from. [EXAMPLE.md](EXAMPLE.md)
describes each file and the required libraries; `sbom.json` is the bill of materials.

```bash
cmake -S . -B build -DEVIT_RUNTIME={platform}
cmake --build build
build/evit_example bundle{plugin} photograph.jpg
```

The program compares the model with the golden answers before it runs it on an image. Exit codes: 0 success, 1 the
answers differ, 2 usage or input, 3 a requirement is missing, 4 a stage failed.
"""


def write_example(folder: Path, name: str, platform: str, *, plugin: bool) -> None:
    """Copies the program, and writes a README on how to build and run it.

    Args:
        folder: Folder to write to.
        name: Name of the model.
        platform: Runtime to build the program with.
        plugin: Whether the plan needs the library in ``plugins/``.
    """
    for path in sorted((sources() / "example").iterdir()):
        if path.is_file():  # without the folder of tests
            shutil.copyfile(path, folder / ("EXAMPLE.md" if path.name == "README.md" else path.name))
    option = f" --plugin plugins/{LIBRARY}" if plugin else ""
    text = _README.format(name=name, platform=platform, plugin=option)
    (folder / "README.md").write_text(text, encoding="utf-8")
