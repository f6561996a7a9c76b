"""8-bit products in Linears by torchao: float8 (arXiv:2209.05433) and MXFP8 (OCP Microscaling Formats 1.0).

Only what a Linear multiplies with is replaced: its class, its parameters and its tensor parallelism stay. It comes first,
before the model is divided, so a scale is of the shard that a process multiplies.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from titanarch.config.errors import Problem, did_you_mean
from titanarch.contract.channel import ChannelMixer
from titanarch.contract.layers import Linear, Multiply
from titanarch.contract.linear import LinearLayer
from titanarch.contract.mixer import LocalMixer, SequenceMixer
from titanarch.contract.model import Model
from titanarch.parallel.config import Float8Config
from titanarch.parallel.mesh import Degrees

SECTION = "quantize.linear.float8"
BLOCK = 32
"""Numbers that share a scale in MXFP8."""


Chosen = tuple[str, Linear, SequenceMixer | ChannelMixer]
"""A Linear's name in the model, the layer, and whose child it is."""


def multiple_of(config: Float8Config) -> int:
    """What the dimensions of a product must be multiples of."""
    return BLOCK if config.recipe_name == "mxfp8" else 16


def chosen_linears(model: Model, config: Float8Config) -> Iterator[Chosen]:
    """The Linears that components declare and no filter leaves out."""
    for prefix, component in model.named_modules():
        if isinstance(component, SequenceMixer | ChannelMixer):
            for child in sorted(component.float8 & component._modules.keys()):
                linear, name = component.get_submodule(child), f"{prefix}.{child}"
                if isinstance(linear, LinearLayer) and not linear.takes_float8:
                    continue
                assert isinstance(linear, Linear), f"{name}: float8 is declared for Linears only"
                if not any(part in name for part in config.filter_fqns):
                    yield name, linear, component


def float8_problems(model: Model, config: Float8Config, degrees: Degrees, *, seq_len: int, device_type: str) -> Iterator[Problem]:
    """Why ``config`` cannot be applied to ``model``, bare and on the meta device."""
    if not config.enable:
        return
    if config.enable_fsdp_float8_all_gather and config.recipe_name != "tensorwise":
        yield Problem(
            f"needs one scale a tensor, and {config.recipe_name} has more; use 'tensorwise'", f"{SECTION}.enable_fsdp_float8_all_gather"
        )
    if config.emulate is False and device_type == "cuda" and not _multiplies(config):
        yield Problem(f"this GPU has no products for {config.recipe_name}; use 'auto' or true", f"{SECTION}.emulate")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | LocalMixer)]
    for part in config.filter_fqns:
        if not any(part in name for name in names):
            yield Problem(f"no Linear's name holds '{part}'{did_you_mean(part, names)}", f"{SECTION}.filter_fqns")
    for name, module in model.named_modules():
        if isinstance(module, LocalMixer) and not any(part in name for part in config.filter_fqns):
            yield Problem(f"{name} is a {type(module).__qualname__}, which declares nothing; add it to filter_fqns", f"{SECTION}.enable")
    chosen = list(chosen_linears(model, config))
    if not chosen:
        yield Problem("there is no Linear to apply it to; set it to false", f"{SECTION}.enable")
    yield from _size_problems(chosen, multiple_of(config), degrees.tp)
    if seq_len // degrees.cp % multiple_of(config):
        message = f"{seq_len // degrees.cp} tokens of a row a process are no multiple of {multiple_of(config)}"
        yield Problem(f"{message}, which {SECTION} needs; use a length that is, or turn it off", "training.seq_len")


def _size_problems(chosen: list[Chosen], n: int, tp: int) -> Iterator[Problem]:
    """One problem that names the Linears whose sizes a process are no multiples of ``n``."""
    shapes = {name: _shape_here(linear, component, name.rpartition(".")[2], tp) for name, linear, component in chosen}
    wrong = [f"{name} {d_out} x {d_in}" for name, (d_out, d_in) in shapes.items() if d_out % n or d_in % n]
    if wrong:
        shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        here = f" on each of {tp} processes" if tp > 1 else ""
        yield Problem(f"sizes must be multiples of {n}{here}: {shown}; change them, or add the names to filter_fqns", f"{SECTION}.enable")


def _shape_here(linear: Linear, component: SequenceMixer | ChannelMixer, child: str, tp: int) -> tuple[int, int]:
    """Outputs and inputs of a process's share of ``linear``."""
    split, (d_out, d_in) = component.tensor_parallel[child], linear.weight.shape
    if split.kind == "row":
        return d_out, d_in // tp
    if split.kind == "column":
        return (d_out // tp if split.count(component.config) % tp == 0 else d_out), d_in
    return d_out, d_in


def is_emulated(config: Float8Config, device_type: str) -> bool:
    """Whether products are rounded to 8 bits and computed in float32 on this machine."""
    return not (device_type == "cuda" and _multiplies(config)) if config.emulate == "auto" else config.emulate


def _multiplies(config: Float8Config) -> bool:
    """Whether the GPU here has such products: float8 from Ada and Hopper or MI300 on, MXFP8 from Blackwell or MI350 on."""
    if not torch.cuda.is_available():
        return False
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties().gcnArchName.startswith("gfx95" if config.recipe_name == "mxfp8" else ("gfx94", "gfx95"))
    return torch.cuda.get_device_capability() >= ((10, 0) if config.recipe_name == "mxfp8" else (8, 9))


def float8_notes(config: Float8Config, device_type: str) -> tuple[str, ...]:
    """What the user is told: whether it is emulated."""
    if not config.enable or not is_emulated(config, device_type):
        return ()
    return (f"{SECTION}: {config.recipe_name} is emulated on this {device_type}: rounded to 8 bits, multiplied in float32, so not faster",)


def apply_float8(model: Model, config: Float8Config, device_type: str) -> None:
    """Make the chosen Linears of ``model`` multiply in 8 bits. Before tensor parallelism."""
    emulate = is_emulated(config, device_type)
    multiply = _mxfp8(emulate=emulate) if config.recipe_name == "mxfp8" else _float8(config, emulate=emulate)
    for _, linear, _ in chosen_linears(model, config):
        linear.multiply = multiply
        if config.enable_fsdp_float8_all_gather:
            assert isinstance(multiply, Float8Product), "only tensorwise scales can be gathered"
            linear.weight = multiply.gathered_in_float8(linear.weight)
    if config.enable_fsdp_float8_all_gather:
        model.register_state_dict_post_hook(_plain_weights)


def precompute_scales(model: Model, config: Float8Config, group: ProcessGroup) -> None:
    """Let ``model.after_update`` find the scales that gathers in float8 need. After FSDP.

    ``group``: the processes among which FSDP divides a weight.
    """
    weights = [linear for _, linear, _ in chosen_linears(model, config)]
    update, scales = model.after_update, PrecomputedScales(weights, group)

    def after_update() -> None:
        update()
        scales()

    model.after_update = after_update  # type: ignore[method-assign]


class Float8Product:
    """x W^T with both factors, and those of the gradients, in float8."""

    def __init__(self, config: Any, mm_config: Any, function: Any) -> None:
        """``config``, ``mm_config``: torchao's Float8LinearConfig and LinearMMConfig. ``function``: its autograd function."""
        self.config = config
        self.mm_config = mm_config
        self.function = function

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self.function.apply(x, weight.t(), self.mm_config, self.config)
        return out

    def gathered_in_float8(self, weight: Tensor) -> nn.Parameter:
        from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

        wrapped = WeightWithDynamicFloat8CastTensor(weight.detach(), self.mm_config, self.config.cast_config_weight.target_dtype)
        return nn.Parameter(wrapped, requires_grad=weight.requires_grad)


def _float8(config: Float8Config, *, emulate: bool) -> Float8Product:
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args

    recipe = Float8LinearConfig.from_recipe_name(config.recipe_name)
    recipe = replace(recipe, emulate=emulate, enable_fsdp_float8_all_gather=config.enable_fsdp_float8_all_gather)
    with torch.device("meta"):
        mm_config = Float8Linear(16, 16, bias=False, config=recipe).linear_mm_config
    return Float8Product(recipe, mm_config, matmul_with_hp_or_float8_args)


def _mxfp8(*, emulate: bool) -> Multiply:
    from torchao.prototype.moe_training.mxfp8_linear import mx_mm
    from torchao.prototype.mx_formats.config import MXFP8Dim0CastKernelChoice, MXFP8Dim1CastKernelChoice, ScaleCalculationMode
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    e4m3 = torch.float8_e4m3fn
    if emulate:
        kernels = (KernelPreference.EMULATED, MXFP8Dim0CastKernelChoice.TORCH, MXFP8Dim1CastKernelChoice.TORCH)
    else:
        kernels = (KernelPreference.AUTO, MXFP8Dim0CastKernelChoice.TRITON, MXFP8Dim1CastKernelChoice.CUDA)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = mx_mm.apply(x, weight, e4m3, e4m3, e4m3, BLOCK, *kernels, ScaleCalculationMode.RCEIL, False)
        return out

    return multiply


class PrecomputedScales:
    """Gives every weight the scale of its float8 copy: one reduction for all, rather than one before each gather."""

    def __init__(self, linears: list[Linear], group: ProcessGroup) -> None:
        self.linears = linears
        self.group = group

    @torch.no_grad()
    def __call__(self) -> None:
        from torchao.float8.float8_utils import amax_to_scale

        shards: list[Any] = []
        for linear in self.linears:
            assert isinstance(linear.weight, DTensor), "FSDP divides every weight"
            shards.append(linear.weight._local_tensor)
        largest = torch.stack([s._tensor.abs().amax() if s.numel() else s._tensor.new_zeros(()) for s in shards])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        for shard, scale in zip(shards, amax_to_scale(largest, shards[0]._dtype).unbind(), strict=True):
            shard._precomputed_scale = scale


def _plain_weights(_model: nn.Module, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
    """Checkpoints hold the weights themselves, so that they load without torchao: the wrapper is only about how they are gathered."""
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    for name, value in state.items():
        shard = value._local_tensor if isinstance(value, DTensor) else value
        if isinstance(shard, WeightWithDynamicFloat8CastTensor):
            plain = shard._tensor
            if isinstance(value, DTensor):
                shape, stride = value.shape, value.stride()
                plain = DTensor.from_local(plain, value.device_mesh, value.placements, run_check=False, shape=shape, stride=stride)
            state[name] = plain
