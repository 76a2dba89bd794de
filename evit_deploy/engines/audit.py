"""Audit of an engine: fused attention, and matrix products in the requested precision."""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec

from evit_deploy.engines import build
from evit_deploy.engines.layers import Layer, compute_dtypes, is_fused_attention, is_matmul, is_opaque, parse_layers
from evit_deploy.errors import first_few
from evit_deploy.report.report import Check, Report
from evit_deploy.tokens.plan import TokenPlan

_REORGANISATION = re.compile(r"blocks\.\d+\.(?:token_reorg|token_merge|reducer)\b")
# Only the matmuls with weights inside the blocks are quantized; attention, stem and head may be in 16 bits, but not 32.
_BESIDE = {"int8": {"fp16", "bf16"}, "fp8": {"fp16", "bf16"}}
_ADVICE = "Look at the layers with trtexec --loadEngine=engine.plan --dumpLayerInfo, and convert again."


def engine_checks(
    built: build.Built,
    path: Path,
    plan: TokenPlan,
    name: str = "engine",
    listing: Callable[[Path], Sequence[Layer]] | None = None,
    unquantized: Collection[str] = (),
) -> Report:
    """Checks that an engine has fused attention and matrix products in the requested precision.

    The layers come from the inspector, which needs a GPU, or for TensorRT-RTX from the plan file. The dense twin's
    engine must pass too: without fused attention it would be slow and overstate the speed-up.

    Args:
        built: Result of the build.
        path: Its plan file.
        plan: The model's token plan.
        name: Name of the engine in the checks.
        listing: Reads the layers from the plan file, for when the inspector could not run.
        unquantized: Linear layers of the model that stayed in the base precision.
    """
    engine, depth = built.engine, plan.attentions
    layers = parse_layers(built.layers) if built.layers else ()
    if not layers and listing is not None:
        layers = listing(path)
    checks = [dtype_check(layers, engine.precision, unquantized)] if layers else []
    if engine.precision != "fp32" and depth:  # no kernel fuses FP32 attention
        # Without a listing rely on the build, which fails if an attention has no fused kernel.
        whole = built.attentions == depth
        reason = "" if whole else "attention was taken apart on the way to the builder"
        count = Check("engine: fusable attentions", built.attentions, depth, whole, reason)
        checks.append(fusion_check(layers, depth) if layers else count)
    named = tuple(msgspec.structs.replace(check, name=check.name.replace("engine", name, 1)) for check in checks)
    notes = () if layers else (f"The {name}'s layers could not be listed here, so its types were not checked.",)
    if not depth:
        notes += (f"The {name} runs attention as matrix products and softmax: this family's has no fused kernel.",)
    return Report(checks=named, notes=notes)


def fusion_check(layers: Sequence[Layer], depth: int) -> Check:
    """Checks that every attention of the model became a single kernel.

    An opaque region counts for the ``Attention`` nodes in it: TensorRT refuses to build an attention that it cannot
    fuse, unless it was marked as decomposable.

    Args:
        layers: Layers of the engine.
        depth: Number of ``Attention`` nodes of the model, one per block.
    """
    fused: dict[object, Layer] = {}
    for layer in layers:
        if is_fused_attention(layer):
            for key in layer.attention or (layer.name,):  # several kernels of one attention count once
                fused[key] = layer
        elif is_opaque(layer):
            fused |= dict.fromkeys(layer.attention, layer)
    name = "engine: fused attentions"
    if len(fused) == depth:
        opaque = sum(is_opaque(layer) for layer in fused.values())
        return Check(name, depth, depth, True, f"{opaque} inside regions that are not listed" if opaque else "")
    spans = [layer.blocks for layer in fused.values() if layer.blocks is not None]
    covered = {block for first, last in spans for block in range(first, last + 1)}
    missing = sorted(set(range(depth)) - covered)
    where = f"not in block {', '.join(map(str, missing))}" if covered and missing else "of the model's attentions"
    reason = f"{len(fused)} kernels for {depth} attentions ({where}): the rest runs as matmul, softmax, matmul. "
    return Check(name, len(fused), depth, False, reason + _ADVICE)


def dtype_check(layers: Sequence[Layer], precision: str, unquantized: Collection[str] = ()) -> Check:
    """Checks that an engine's matrix products are in the requested precision, without a silent fallback to FP32.

    Scoring and gathering of tokens are excluded, because they run in FP32 by design.

    Args:
        layers: Layers of the engine.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``fp8``.
        unquantized: Linear layers of the model that stayed in 16 bits when the others were quantized.
    """
    name = f"engine: matmuls in {precision}"
    reading = [layer for layer in layers if is_matmul(layer) or is_fused_attention(layer)]
    counted = [layer for layer in reading if not _REORGANISATION.search(layer.metadata) and compute_dtypes(layer)]
    if not counted:
        why = "the engine names no matmul with its types: it was built without detailed profiling verbosity"
        return Check(name, 0, "all", False, why)
    wrong = [layer for layer in counted if not _runs_in(layer, precision, unquantized)]
    value = f"{len(counted) - len(wrong)} of {len(counted)}"
    if not wrong:
        return Check(name, value, "all", True)
    shown = (f"{_called(layer)} in {'+'.join(sorted(compute_dtypes(layer)))}" for layer in wrong)
    return Check(name, value, "all", False, f"{first_few(shown, separator='; ')}. {_ADVICE}")


def _runs_in(layer: Layer, precision: str, unquantized: Collection[str]) -> bool:
    from evit_deploy.export.quantization import layer_of  # imports ONNX, which listing the targets must not do

    dtypes = compute_dtypes(layer)
    if precision in dtypes:  # inputs of fused operations, such as a residual, may have another type
        return True
    kept = any(layer_of(node) in unquantized for node in layer.nodes)
    in_a_block = layer.blocks is not None and not is_fused_attention(layer)
    return (kept or not in_a_block) and bool(dtypes) and dtypes <= _BESIDE.get(precision, set())


def _called(layer: Layer) -> str:
    return ", ".join(layer.nodes[:2]) or layer.name
