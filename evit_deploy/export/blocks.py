"""Exports identical blocks once, because the exporter takes as long for a model's twelfth block as for its first.

The exporter runs on a *short* model: stem, head, and one block of each kind. Its output for a block is repeated for all
blocks of that kind, with their own weights and token counts. The output is cached, so that a dense twin and further
keep rates of the same model need no export at all.

Nothing is guessed: a number in the file is treated as a token count only if nothing else in the block has that size. In
unclear cases the whole model is exported. This applies to methods that carry state, whose blocks all differ, to methods
with their own layers, and to LeViT.
"""

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import onnx.numpy_helper
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from torch import Tensor, nn

from evit_deploy.export.kinds import SMALL, Kind, numbers_in, renumbered, signature_of
from evit_deploy.tokens.backbone import Backbone, copy_sharing_weights
from evit_deploy.tokens.plan import BlockPlan, TokenPlan

Run = Callable[[nn.Module], ModelProto]
"""The exporter: converts a model in export form to a file whose nodes are named after their modules."""

_DEDUPLICATED = 1024
"""The exporter merges equal initializers up to this many elements."""
_ENDS = (np.iinfo(np.int64).max, np.iinfo(np.int64).min)


class UnclearError(Exception):
    """The exported file is ambiguous; the whole model has to be exported."""


class Part(msgspec.Struct):
    """Consecutive nodes: the stem, a block or the head.

    Args:
        path: Common prefix of the node names of a block; empty for stem and head.
        nodes: The nodes.
        given: Its only input from the part before; empty for the stem.
        made: Its only output to the part after; empty for the head.
        infos: Types and shapes of its values and weights.
        constants: Its initializers, except a block's weights.
        weights: A block's initializer -> its parameter, and whether it is transposed.
        numbers: Integers in it that are not token counts.
    """

    path: str
    nodes: list[NodeProto]
    given: str
    made: str
    infos: list[ValueInfoProto]
    constants: list[TensorProto]
    weights: dict[str, tuple[str, bool]]
    numbers: set[int]


class Short(msgspec.Struct):
    """The exporter's output for a short model.

    Args:
        around: Identifies its stem and head.
        frame: The file without its graph.
        stem: Before the blocks.
        blocks: One block of each kind.
        head: After the blocks.
        last: Plan of its last block.
    """

    around: Any
    frame: ModelProto
    stem: Part
    blocks: list[tuple[Kind, Part]]
    head: Part
    last: BlockPlan


class Known(msgspec.Struct):
    """Cache of exports of the same weights; :func:`assemble` reads it and adds to it.

    Args:
        shorts: The short models so far.
    """

    shorts: list[Short] = []


def assemble(
    lowered: Any, backbone: type[Backbone], plan: TokenPlan, run: Run, known: Known
) -> tuple[ModelProto, dict[str, Tensor]] | None:
    """Exports a model from one block of each kind.

    Args:
        lowered: The model in export form.
        backbone: Its family.
        plan: Its token counts.
        run: The exporter.
        known: Earlier exports.

    Returns:
        The file without its block weights, and these weights by name, as views of the model's; ``None`` if the whole
            model has to be exported.
    """
    container = backbone.blocks(lowered)
    path = next((name for name, module in lowered.named_modules() if module is container), "")
    blocks = list(container)
    if not path or len(blocks) != len(plan.blocks):
        return None
    signatures, around = [signature_of(block) for block in blocks], _around(lowered, path)
    try:
        alike = (short for short in known.shorts if short.around == around)
        fitting = next((short for short in alike if _sorted(signatures, plan, short)), None)
        if fitting is None:
            kinds, chosen = _kinds(signatures, plan)
            if len(chosen) == len(blocks):
                return None
            try:
                proto, standing = _run_short(lowered, backbone, [blocks[index] for index in chosen], run)
            finally:
                backbone.set_blocks(lowered, container)
            fitting = _taken_apart(proto, path, kinds, standing)
            fitting.around = around
            known.shorts.append(fitting)
        return _joined(blocks, _sorted(signatures, plan, fitting), plan, path, fitting)
    except UnclearError:
        return None


def _around(lowered: Any, path: str) -> Any:
    """Type and weights outside the blocks; weights are hashed, because a family may fold them into new tensors."""
    outside = [(name, tensor) for name, tensor in lowered.named_parameters() if not name.startswith(f"{path}.")]
    digests = [hashlib.sha256(tensor.detach().contiguous().numpy()).digest() for _, tensor in outside]
    return type(lowered), tuple((name, tuple(t.shape), d) for (name, t), d in zip(outside, digests, strict=True))


def _sorted(signatures: list[Any], plan: TokenPlan, short: Short) -> list[tuple[Kind, Part]]:
    """The known kind of each block; empty if one is unknown."""
    found = [
        next((pair for pair in short.blocks if pair[0].takes(signature, row)), None)
        for signature, row in zip(signatures, plan.blocks, strict=True)
    ]
    return [] if None in found else found  # type: ignore[return-value]


def _kinds(signatures: list[Any], plan: TokenPlan) -> tuple[list[Kind], list[int]]:
    """The kinds, and the index of the first block of each.

    In the short model, each block must accept the tokens that the previous one returns; a block without reduction
    accepts any number.
    """
    kinds: list[Kind] = []
    chosen = []
    for index, (signature, row) in enumerate(zip(signatures, plan.blocks, strict=True)):
        if not any(kind.takes(signature, row) for kind in kinds):
            before = kinds[-1].row.tokens_out if kinds else row.tokens_in
            if before != row.tokens_in:
                if row.keep is not None:
                    raise UnclearError
                row = msgspec.structs.replace(row, tokens_in=before, tokens_out=before)
            kinds.append(Kind(signature, row, plan.prefix))
            chosen.append(index)
    return kinds, chosen


def _run_short(
    lowered: Any, backbone: type[Backbone], chosen: list[nn.Module], run: Run
) -> tuple[ModelProto, list[nn.Module]]:
    """Exports stem, head and some blocks with random weights, so that no two are equal and none is folded."""
    generator = torch.Generator().manual_seed(0)
    standing: list[nn.Module] = [copy_sharing_weights(block) for block in chosen]
    for module in (part for block in standing for part in block.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                drawn = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(drawn, requires_grad=False)
    backbone.set_blocks(lowered, nn.Sequential(*standing))
    return run(lowered), standing


def _taken_apart(proto: ModelProto, path: str, kinds: list[Kind], standing: list[nn.Module]) -> Short:
    """Splits a short model's file into its parts."""
    nodes = _split(proto, path, len(kinds))
    joints = _joints(proto, nodes)
    parts = []
    for place, own in enumerate(nodes):
        inside = 0 < place < len(nodes) - 1
        parameters = dict(standing[place - 1].named_parameters()) if inside else {}
        part = _part(proto, own, parameters)
        part.path = f"{path}.{place - 1}" if inside else ""
        part.given, part.made = ("", *joints, "")[place : place + 2]
        part.numbers |= numbers_in(kinds[place - 1].signature) if inside else set()
        parts.append(part)
    frame = ModelProto()
    frame.CopyFrom(proto)
    for field in (frame.graph.node, frame.graph.initializer, frame.graph.value_info):
        del field[:]
    stem, *blocks, head = parts
    return Short(None, frame, stem, list(zip(kinds, blocks, strict=True)), head, kinds[-1].row)


def _split(proto: ModelProto, path: str, count: int) -> list[list[NodeProto]]:
    """The nodes of the stem, of each block and of the head, which must be in this order."""
    pattern = re.compile(rf"{re.escape(path)}\.(\d+)[./]")
    parts: list[list[NodeProto]] = [[] for _ in range(count + 2)]
    place = 0
    for node in proto.graph.node:
        found = pattern.match(node.name)
        here = int(found[1]) + 1 if found else (0 if place == 0 else count + 1)
        if here < place:
            raise UnclearError
        place = here
        parts[place].append(node)
    if not all(parts):
        raise UnclearError
    return parts


def _joints(proto: ModelProto, parts: list[list[NodeProto]]) -> list[str]:
    """The values between parts, one each; only the head may also use values of the stem."""
    constants = {tensor.name for tensor in proto.graph.initializer} | {value.name for value in proto.graph.input}
    made = [{value for node in nodes for value in node.output if value} for nodes in parts]
    joints = []
    for place in range(1, len(parts)):
        taken = {value for node in parts[place] for value in node.input if value} - made[place] - constants
        if place == len(parts) - 1:
            taken -= made[0]
        if len(taken) != 1 or not taken <= made[place - 1]:
            raise UnclearError
        joints += taken
    answers = {value.name for value in proto.graph.output}
    if not answers <= made[-1]:
        raise UnclearError
    return joints


def _part(proto: ModelProto, nodes: list[NodeProto], parameters: Mapping[str, Tensor]) -> Part:
    """A part from its nodes; it must contain each of the block's parameters exactly once."""
    taken = {value for node in nodes for value in node.input if value}
    own = [tensor for tensor in proto.graph.initializer if tensor.name in taken]
    weights: dict[str, tuple[str, bool]] = {}
    for tensor in own:
        array = onnx.numpy_helper.to_array(tensor)
        if parameters and array.dtype.kind == "f" and array.size > 1:
            weights[tensor.name] = _which(array, parameters)
    if sorted(name for name, _ in weights.values()) != sorted(parameters):
        raise UnclearError
    here = {value for node in nodes for value in node.output} | {tensor.name for tensor in own}
    infos = [info for info in proto.graph.value_info if info.name in here]
    constants = [tensor for tensor in own if tensor.name not in weights]
    sizes = {size for tensor in own for size in tensor.dims if tensor.data_type == TensorProto.FLOAT}
    return Part("", nodes, "", "", infos, constants, weights, sizes)


def _which(array: np.ndarray, parameters: Mapping[str, Tensor]) -> tuple[str, bool]:
    """The parameter that an initializer equals, and whether it is transposed."""
    for name, parameter in parameters.items():
        own = parameter.detach().numpy()
        if array.shape == own.shape and np.array_equal(array, own):
            return name, False
        if array.ndim == 2 and array.T.shape == own.shape and np.array_equal(array.T, own):
            return name, True
    raise UnclearError


def _joined(
    blocks: list[nn.Module], pairs: list[tuple[Kind, Part]], plan: TokenPlan, path: str, short: Short
) -> tuple[ModelProto, dict[str, Tensor]]:
    """Joins the stem, every block by its kind, and the head."""
    joint, weights = _Joint(short.frame), dict[str, Tensor]()
    value = joint.add(short.stem, "", "", {})
    for index, (block, (kind, part)) in enumerate(zip(blocks, pairs, strict=True)):
        counts = renumbered(kind.row, plan.blocks[index], plan.prefix, part.numbers)
        value = joint.add(part, value, f"{path}.{index}", counts)
        for name, transposed in part.weights.values():
            tensor = block.get_parameter(name).detach()
            weights[f"{path}.{index}.{name}"] = tensor.T if transposed else tensor
    last, own = (
        msgspec.structs.replace(row, tokens_in=row.tokens_out, keep=None) for row in (short.last, plan.blocks[-1])
    )
    joint.add(short.head, value, "", renumbered(last, own, plan.prefix, short.head.numbers))
    proto = joint.proto
    domains = {node.domain for node in proto.graph.node}
    for entry in [entry for entry in proto.opset_import if entry.domain not in domains]:
        proto.opset_import.remove(entry)
    _make_equal_ones_one(proto, weights)
    return proto, weights


class _Joint:
    """Joins parts into a file.

    Args:
        frame: The file without its graph.
    """

    def __init__(self, frame: ModelProto) -> None:
        self.proto = ModelProto()
        self.proto.CopyFrom(frame)
        self._taken: set[str] = {value.name for value in frame.graph.input}
        self._constants: dict[tuple[int, tuple[int, ...], bytes], str] = {}

    def add(self, part: Part, value: str, path: str, counts: Mapping[int, int] | None) -> str:
        """Adds a part.

        Args:
            part: What to add.
            value: Its input.
            path: Prefix of its node names.
            counts: The part's token counts -> those of this block.

        Returns:
            Its output.
        """
        if counts is None:
            raise UnclearError
        known = _Counts(counts, part.numbers)
        renamed = {part.given: value} if part.given else {}
        renamed |= {constant.name: self._constant(known.tensor(constant)) for constant in part.constants}
        renamed |= {name: f"{path}.{parameter}" for name, (parameter, _) in part.weights.items()}
        for name in (name for node in part.nodes for name in node.output if name):
            renamed[name] = name if name not in self._taken else f"{path}/{name}"
            self._taken.add(renamed[name])
        for node in part.nodes:
            made = self.proto.graph.node.add()
            made.CopyFrom(node)
            made.name = path + node.name.removeprefix(part.path)
            # Names outside the part belong to the stem, which keeps its names.
            made.input[:] = [renamed.get(name, name) for name in node.input]
            made.output[:] = [renamed.get(name, name) for name in node.output]
            for attribute in made.attribute:
                known.attribute(attribute)
        present = {info.name for info in self.proto.graph.value_info} if part.constants else set()
        for info in part.infos:
            if renamed[info.name] not in present:
                made_info = self.proto.graph.value_info.add()
                made_info.CopyFrom(info)
                made_info.name = renamed[info.name]
                known.info(made_info)
        return renamed.get(part.made, "")

    def _constant(self, tensor: TensorProto) -> str:
        """Name of a constant; added unless an equal one exists."""
        array = onnx.numpy_helper.to_array(tensor)
        key = tensor.data_type, array.shape, array.tobytes()
        if key not in self._constants:
            made = self.proto.graph.initializer.add()
            made.CopyFrom(tensor)
            if made.name in self._taken:
                made.name = f"{made.name}/{'_'.join(map(str, array.ravel()[:8]))}"
            self._taken.add(made.name)
            self._constants[key] = made.name
        return self._constants[key]


class _Counts:
    """Replaces the token counts in a part.

    Args:
        counts: Old -> new; empty if nothing changes.
        numbers: Other integers that may occur.
    """

    def __init__(self, counts: Mapping[int, int], numbers: Collection[int]) -> None:
        self._counts, self._numbers = counts, numbers

    def tensor(self, tensor: TensorProto) -> TensorProto:
        """A constant with the new counts."""
        if not self._counts:
            return tensor
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype.kind == "f":
            self._check(array.ravel() if array.size == 1 else ())
            return tensor
        changed = np.array([self._number(int(number)) for number in array.ravel()], array.dtype).reshape(array.shape)
        return tensor if np.array_equal(changed, array) else onnx.numpy_helper.from_array(changed, tensor.name)

    def attribute(self, attribute: AttributeProto) -> None:
        """Changes an attribute in place."""
        if attribute.type == AttributeProto.INT:
            attribute.i = self._counts.get(attribute.i, attribute.i)
        elif attribute.type == AttributeProto.INTS:
            attribute.ints[:] = [self._counts.get(number, number) for number in attribute.ints]
        elif attribute.type == AttributeProto.FLOAT:
            self._check((attribute.f,))

    def info(self, info: ValueInfoProto) -> None:
        """Changes a shape in place, including sizes such as ``17*batch``."""
        for size in info.type.tensor_type.shape.dim:
            if size.HasField("dim_value"):
                size.dim_value = self._counts.get(size.dim_value, size.dim_value)
            elif size.dim_param:
                size.dim_param = re.sub(
                    r"\d+", lambda found: str(self._counts.get(int(found[0]), int(found[0]))), size.dim_param
                )

    def _number(self, number: int) -> int:
        if abs(number) > SMALL and number not in (*_ENDS, *self._numbers, *self._counts):
            raise UnclearError  # possibly computed from counts
        return self._counts.get(number, number)

    def _check(self, numbers: Iterable[float]) -> None:
        """Refuses numbers derived from counts, such as 1/196, which would have to change too."""
        for number in numbers:
            made = (form for count in self._counts for form in (count, 1 / count, count**0.5, count**-0.5))
            if any(math.isclose(abs(number), form, rel_tol=1e-5) for form in made):
                raise UnclearError


def _make_equal_ones_one(proto: ModelProto, weights: dict[str, Tensor]) -> None:
    """Merges equal small initializers, as the exporter does."""
    kept: dict[Any, str] = {}
    renamed = {}
    small = {
        t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if math.prod(t.dims) <= _DEDUPLICATED
    }
    small |= {name: tensor.numpy() for name, tensor in weights.items() if tensor.numel() <= _DEDUPLICATED}
    for name, array in small.items():
        same = kept.setdefault((array.dtype.str, array.shape, array.tobytes()), name)
        if same != name:
            renamed[name] = same
            weights.pop(name, None)
    if renamed:
        for node in proto.graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
        for field in (proto.graph.initializer, proto.graph.value_info):
            kept_entries: list[Any] = [entry for entry in field if entry.name not in renamed]
            del field[:]
            field.extend(kept_entries)
