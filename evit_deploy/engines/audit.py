"""Whether an engine is what was asked for: fused attention, and matrix products in the asked type."""

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
# What is quantized is the matmuls with weights inside the blocks; attention, stem and head may stay in 16 bits, as the
# quantizer chose, but not in 32.
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
    """Whether an engine is what was asked for: attention in fused kernels, matrix products in the asked type.

    A GPU's inspector lists the layers of any engine; TensorRT-RTX also writes them into the plan. The dense twin's
    has to pass as well: a speed-up over one whose attention was taken apart would be too good.

    Args:
        built: The build.
        path: Its plan.
        plan: The model's plan.
        name: What the checks call the engine.
        listing: Reads the layers out of the plan itself, where no inspector could.
        unquantized: Linear layers of the model that stayed in the base precision.
    """
    engine, depth = built.engine, plan.attentions
    layers = parse_layers(built.layers) if built.layers else ()
    if not layers and listing is not None:
        layers = listing(path)
    checks = [dtype_check(layers, engine.precision, unquantized)] if layers else []
    if engine.precision != "fp32" and depth:  # no kernel fuses FP32 attention
        # Without a listing the build is the proof: it fails on an attention that has no fused kernel.
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
    """Checks that every attention of the model became one kernel.

    A region that the listing does not look into counts for the ``Attention`` nodes in it: TensorRT refuses to build
    what it would have to take apart, unless the attention was marked as decomposable.

    Args:
        layers: Of the engine.
        depth: ``Attention`` nodes of the model, one a block.
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
    """Checks that an engine multiplies in the type that was asked for, and did not silently fall back to FP32.

    What scores and gathers tokens is left out: it runs in FP32 on purpose.

    Args:
        layers: Of the engine.
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
    from evit_deploy.export.quantization import layer_of  # with ONNX, which what lists the targets does without

    dtypes = compute_dtypes(layer)
    if precision in dtypes:  # what is fused behind the matmul, a residual for one, may be read in another type
        return True
    kept = any(layer_of(node) in unquantized for node in layer.nodes)
    in_a_block = layer.blocks is not None and not is_fused_attention(layer)
    return (kept or not in_a_block) and bool(dtypes) and dtypes <= _BESIDE.get(precision, set())


def _called(layer: Layer) -> str:
    return ", ".join(layer.nodes[:2]) or layer.name
