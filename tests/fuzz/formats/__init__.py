"""The formats, a module each kind; :data:`FORMATS` is all of them by name."""

from tests.fuzz.formats import archives, bundles, checkpoints, images, models, texts
from tests.fuzz.harness import Format

FORMATS: dict[str, Format] = {
    form.name: form for module in (checkpoints, bundles, models, texts, images, archives) for form in module.FORMATS
}
