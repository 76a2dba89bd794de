"""An opened bundle for inference: predictions, embeddings, and the patches that were kept."""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from PIL import Image

from evit_deploy.bundle.bundle import Bundle, changed_files, read_bundle
from evit_deploy.bundle.manifest import MODEL
from evit_deploy.errors import InputError, MissingRequirement, first_few
from evit_deploy.export.card import EMBEDDING, kept_name
from evit_deploy.inference.batches import calls_for
from evit_deploy.inference.choice import asked_for, check_plugin, in_order
from evit_deploy.inference.inputs import Given, ImageLike
from evit_deploy.inference.prediction import Prediction, predictions_of
from evit_deploy.inference.session import Session
from evit_deploy.tokens.choices import original_patches, patch_groups

_LOG = logging.getLogger(__name__)


def load(
    path: str | Path,
    runtime: str | None = None,
    *,
    threads: int | None = None,
    batch_size: int | None = None,
    plugin: str | Path | None = None,
    against: str | Path | None = None,
) -> "Model":
    """Opens a bundle for inference.

    By default the first of these that runs here is used: the bundle's engine, ONNX Runtime on a GPU, the bundle's
    OpenVINO model, ONNX Runtime on the CPU, OpenVINO on the ONNX file. :attr:`Model.runtime` is the one chosen; a
    warning is logged if a faster file of the bundle does not run here.

    Args:
        path: The bundle.
        runtime: Name in the registry of runtimes to use; ``eager`` is PyTorch.
        threads: CPU threads of the runtime and for decoding images. Default: the runtime's default, and one for each
            core.
        batch_size: Maximum images per call. Default: 32, or the size that the engine was tuned for.
        plugin: Library that a TensorRT engine needs. Default: the one in the user's cache with the hash from the
            manifest.
        against: For PyTorch's runtimes: checkpoint of the bundle, if it was moved.

    Raises:
        InputError: Not a bundle, its files have changed, or the runtime is unknown or cannot run it.
        MissingRequirement: The requested runtime is not installed, or no runtime here can run any of its files.
        StageError: The runtime refused the file.
    """
    for name, number in (("threads", threads), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise InputError("not a valid number", where=name, seen=number, wanted="a whole number from 1 up")
    bundle = checked_bundle(path)
    if runtime is not None:
        artifact = asked_for(bundle, runtime, Path(against) if against is not None else None)
        check_plugin(bundle, runtime, plugin)
        return Model(bundle, runtime, artifact, threads=threads, batch_size=batch_size)
    if against is not None:
        raise InputError("only PyTorch's runtimes use a checkpoint", where="against", fix="Give runtime='eager' too.")
    reasons: dict[str, str] = {}
    passed_over: dict[Path, str] = {}
    for name, file, refusals in in_order(bundle):
        if refusals:
            reasons[name] = "; ".join(refusals)
            passed_over.setdefault(file, reasons[name])  # overwritten if another runtime fails on the same file
            continue
        try:
            check_plugin(bundle, name, plugin)
            model = Model(bundle, name, file, threads=threads, batch_size=batch_size)
        except (InputError, MissingRequirement) as error:  # such as an engine for another GPU, or a missing package
            reasons[name] = passed_over[file] = error.what
            continue
        for other, reason in passed_over.items():
            if other not in (file, bundle.path / MODEL):
                what = f"{other.relative_to(bundle.path)} does not run here ({reason})"
                _LOG.warning(f"{what}; {name} answers in its place, from {file.relative_to(bundle.path)}.")
        return model
    said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise MissingRequirement(
        f"nothing here runs any file of this bundle ({said})", where=bundle.path,
        fix="evit-deploy doctor says what is missing.",
    )  # fmt: skip


def checked_bundle(path: str | Path) -> Bundle:
    """Reads a bundle, and checks that its files are unchanged and that it has one label per class, if any.

    Raises:
        InputError: A check failed.
    """
    bundle = read_bundle(path)
    changed = changed_files(bundle)
    if changed:
        raise InputError(
            f"files of the bundle have changed or are missing: {first_few(changed)}", where=bundle.path,
            fix="Copy the bundle here again, or convert again.",
        )  # fmt: skip
    manifest = bundle.manifest
    classes = manifest.outputs[0].shape[-1]
    if manifest.labels is not None and manifest.answer != EMBEDDING and len(manifest.labels) != classes:
        raise InputError(
            "the manifest has not one label for each class", where=bundle.path, seen=f"{len(manifest.labels)} labels",
            wanted=f"{classes}", fix="Convert again, with the right labels.",
        )  # fmt: skip
    return bundle


class Model:
    """An opened bundle, created by :func:`load`; a context manager. Threads can share it.

    An *image* is a path, the bytes of an image file, a PIL image, or an array: uint8 ``[H, W, 3]`` is an RGB image,
    float32 ``[C, H, W]`` with the shape of the model's input is already prepared (resized, cropped and normalized).
    Several images are any iterable of these, also mixed, or one array with an additional first dimension. Images that
    are not prepared go through the bundle's preprocessing; gray and transparent ones are converted to RGB first.

    Args:
        bundle: The bundle.
        runtime: Name of the runtime.
        artifact: The artifact that it runs.
        threads: CPU threads; ``None`` for the runtime's default.
        batch_size: See :func:`load`.
    """

    def __init__(
        self, bundle: Bundle, runtime: str, artifact: Any, *, threads: int | None = None, batch_size: int | None = None
    ) -> None:
        self.bundle, self.runtime, self.artifact = bundle, runtime, artifact
        self._threads, self._batch_size = threads, batch_size
        self._opening, self._turn = threading.Lock(), threading.Lock()
        self._session = self._opened(with_indices=False)
        self._telling: Session | None = None  # with outputs for the choices; opened on first use

    @property
    def labels(self) -> list[str] | None:
        """Class names, or ``None`` if the bundle has none."""
        return self.bundle.manifest.labels

    @overload
    def predict(self, images: str | Path | bytes | Image.Image, *, top: int = 5) -> Prediction: ...  # pyright: ignore[reportOverlappingOverload]

    @overload
    def predict(self, images: np.ndarray, *, top: int = 5) -> Any: ...

    @overload
    def predict(
        self,
        images: Iterable[ImageLike],
        *,
        top: int = 5,
        on_error: Callable[[int, InputError], None] | None = None,
    ) -> list[Prediction]: ...

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        top: int = 5,
        on_error: Callable[[int, InputError], None] | None = None,
    ) -> Prediction | list[Prediction]:
        """Returns the most probable classes of each image.

        Args:
            images: One image or several, see :class:`Model`.
            top: Number of classes to list for each image, if there are as many.
            on_error: Called with the number of an unusable image and its error; the image is then skipped. Without it,
                the first unusable image raises.

        Returns:
            A prediction for a single image, a list for several.

        Raises:
            InputError: The model has no classes, an image cannot be used, or the model is closed.
            StageError: The runtime failed.
        """
        self._refuse_embedding()
        given = self._given(images)
        logits, numbers = self._answers(given, on_error)
        found = predictions_of(logits, self.labels, top, [given.name(number) for number in numbers])
        return found[0] if given.single and found else found

    def logits(self, images: ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """Returns the logits of one image or several, float32 ``[n, classes]``.

        Args:
            images: See :class:`Model`.

        Raises:
            InputError: See :meth:`predict`.
            StageError: The runtime failed.
        """
        self._refuse_embedding()
        return self._answers(self._given(images))[0]

    def embed(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        on_error: Callable[[int, InputError], None] | None = None,
    ) -> np.ndarray:
        """Returns the embeddings of one image or several, for a model without classes.

        Args:
            images: See :class:`Model`.
            on_error: See :meth:`predict`.

        Returns:
            Float32 ``[n, d]``.

        Raises:
            InputError: The model has classes; or see :meth:`predict`.
            StageError: The runtime failed.
        """
        if self.bundle.manifest.answer != EMBEDDING:
            raise InputError(
                "this model answers with classes and has no embedding output", where=self.bundle.path,
                fix="Use predict or logits; or convert the same weights without their classifier.",
            )  # fmt: skip
        return self._answers(self._given(images), on_error)[0]

    def kept(self, images: ImageLike | Iterable[ImageLike]) -> dict[int, np.ndarray]:
        """Returns which patches of each image the model kept at each location.

        Patches are numbered row by row from the top left, starting at 0.

        Args:
            images: See :class:`Model`.

        Returns:
            Block -> int32 ``[n, K]``: numbers of the kept patches, in the order of their tokens; −1 is a fused token,
            also one from an earlier location. For a location that merges, ``[n, patches]``: for every patch the lowest
            number of all patches in its token, so that merged patches have the same number; −1 if it was dropped
            earlier.

        Raises:
            InputError: The artifact has no such outputs, for example an engine built without them; or see
                :meth:`predict`.
            StageError: The runtime failed.
        """
        plan = self.bundle.manifest.plan
        if not plan.locations:
            return {}
        choices = self.choices(images)[1]
        numbers, groups = original_patches(choices, plan), patch_groups(choices, plan)
        return {row.block: groups[i] if row.choice == "merge" else numbers[i] for i, row in enumerate(plan.locations)}

    def choices(self, images: ImageLike | Iterable[ImageLike]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns the answers and the choices of each location, which :meth:`kept` converts to patch numbers.

        Args:
            images: See :class:`Model`.

        Returns:
            float32 ``[n, classes or d]``, and for each location int32 ``[n, length]``: for kind ``kept``, the
            candidates in their new order; for kind ``merge``, the tokens that stay, those that move, and where to.

        Raises:
            InputError: See :meth:`kept`.
            StageError: The runtime failed.
        """
        names = [kept_name(row.block) for row in self.bundle.manifest.plan.locations]
        answer, given = self.bundle.manifest.answer, self._given(images)
        found = self._run(self._session_with(names), given, [answer, *names])[0]
        return found[answer].astype(np.float32, copy=False), [found[name] for name in names]

    def close(self) -> None:
        """Waits for running calls and frees the runtime's memory; later calls raise."""
        with self._opening:
            for session in (self._telling, self._session):  # in reverse order of opening
                if session is not None:
                    session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        manifest = self.bundle.manifest
        wide = manifest.outputs[0].shape[-1]
        answers = f"embeddings of {wide} numbers" if manifest.answer == EMBEDDING else f"{wide} classes"
        return f"Model({str(self.bundle.path)!r} on {self.runtime}: {manifest.model}, {manifest.precision}, {answers})"

    def _refuse_embedding(self) -> None:
        if self.bundle.manifest.answer == EMBEDDING:
            raise InputError("this model has no classes", where=self.bundle.path, fix="Use embed.")

    def _answers(
        self, given: Given, on_error: Callable[[int, InputError], None] | None = None
    ) -> tuple[np.ndarray, list[int]]:
        """Returns the answers, float32 ``[n, classes or d]``, and the numbers of their images."""
        name = self.bundle.manifest.answer
        found, numbers = self._run(self._session, given, [name], on_error)
        return found[name].astype(np.float32, copy=False), numbers

    def _run(
        self,
        session: Session,
        given: Given,
        outputs: Sequence[str],
        on_error: Callable[[int, InputError], None] | None = None,
    ) -> tuple[dict[str, np.ndarray], list[int]]:
        """Returns the named outputs for all usable images, and the numbers of these images."""
        parts: list[dict[str, np.ndarray]] = []
        numbers: list[int] = []
        with session.used():
            for start, count, size in calls_for(len(given), session.runner.profiles, self._batch_size):
                images, unusable = given.prepared(start, start + count)
                for number, error in unusable.items():
                    if on_error is None:
                        raise error
                    on_error(number, error)
                usable = [number for number in range(start, start + count) if number not in unusable]
                if not usable:
                    continue
                if len(images) < size and session.runner.profiles:  # pad by repeating images
                    images = np.resize(images, (size, *images.shape[1:]))
                answers = session.infer(images)
                parts.append({name: answers[name][: len(usable)] for name in outputs})
                numbers += usable
        if not parts:
            return {name: self._nothing(session, name) for name in outputs}, []
        if len(parts) == 1:
            return parts[0], numbers
        return {name: np.concatenate([part[name] for part in parts]) for name in outputs}, numbers

    def _nothing(self, session: Session, name: str) -> np.ndarray:
        spec = next(spec for spec in session.runner.outputs if spec.name == name)
        return np.empty((0, *(int(size or 0) for size in spec.shape[1:])), spec.dtype)

    def _given(self, images: Any) -> Given:
        manifest = self.bundle.manifest
        shape = tuple(int(size or 0) for size in manifest.inputs[0].shape[1:])
        return Given(images, manifest.preprocess, shape, self._threads)

    def _opened(self, *, with_indices: bool) -> Session:
        where = self.bundle.path
        return Session(
            self.runtime, self.artifact, self._threads, with_indices=with_indices, where=where, turn=self._turn
        )

    def _session_with(self, names: Sequence[str]) -> Session:
        """Returns a session with these outputs, opening it if necessary."""
        with self._opening, self._session.used():
            for known in (self._session, self._telling):
                if known is not None and set(names) <= {spec.name for spec in known.runner.outputs}:
                    return known
            session = self._opened(with_indices=True)
            if not set(names) <= {spec.name for spec in session.runner.outputs}:
                session.close()
                raise InputError(
                    f"{self.runtime} runs a file that does not say which patches it keeps", where=self.bundle.path,
                    fix="Convert with --with-indices, or load with runtime='onnxruntime'.",
                )  # fmt: skip
            self._telling = session
            return session
