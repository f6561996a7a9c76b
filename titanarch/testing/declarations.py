"""Checks of what a component declares: children and parameters, initial weights, costs, names, its card."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from titanarch.contract.channel import ChannelMixer
from titanarch.contract.layers import Linear
from titanarch.contract.mixer import LocalMixer, MixResult, SequenceMixer, Streams, mix_whole
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import Split
from titanarch.testing.findings import Inapplicable, Wrong, parameter_count
from titanarch.testing.subject import D_MODEL, N_ROWS, N_TOKENS, Stack, Subject, built, cost_of, initialized, inputs, rows

MIX_FACTOR = 8.0
"""By how much the products that a mix step does may differ from those that ``cost`` counts: masks hide half of them, and in a model
this narrow chunks are longer than heads are wide."""


def declaring(subject: Subject) -> list[SequenceMixer | ChannelMixer]:
    """The layers' components where they declare how they are divided; Inapplicable for a LocalMixer."""
    found = [component for component in built(subject).components() if isinstance(component, SequenceMixer | ChannelMixer)]
    if not found:
        raise Inapplicable("a LocalMixer declares nothing, so nothing but its rows can be divided")
    return found


def declared(subject: Subject) -> str:
    """Every direct child and parameter, and every entry of ``head_params``, stands in ``tensor_parallel``, and fits what it says."""
    n = 0
    for component in declaring(subject):
        table, children = component.tensor_parallel, dict(component.named_children())
        own = [name for name, _ in component.named_parameters(recurse=False)]
        given = _head_params(component) if isinstance(component, SequenceMixer) else {}
        for name in (*children, *own, *given):
            if name not in table:
                raise Wrong(
                    f"{subject.name}: tensor_parallel does not declare '{name}'; say COLUMN, ROW, PER_HEAD, SHARED or REPLICATED for it"
                )
        for name in own:
            if table[name] != Split.SHARED:
                raise Wrong(
                    f"{subject.name}: the parameter '{name}' is declared {table[name].kind}, but outside HeadParams it can only be SHARED; "
                    "make it a child of HeadParams, or say SHARED"
                )
        for name, child in children.items():
            _fits(subject, component, name, child)
        n += len(children) + len(own) + len(given)
    return f"{n} children, parameters and entries of head_params in {len(declaring(subject))} layers"


def _fits(subject: Subject, component: SequenceMixer | ChannelMixer, name: str, child: nn.Module) -> None:
    split = component.tensor_parallel[name]
    if split.kind == "row" and not isinstance(child, Linear):
        raise Wrong(f"{subject.name}: '{name}' is declared ROW and is no titanarch.contract.layers.Linear; use that, since it sums parts")
    if split.kind != "column":
        return
    try:
        n = split.count(component.config)
    except AttributeError:
        raise Wrong(
            f"{subject.name}: '{name}' is declared COLUMN by '{split.heads}', which its Config does not have; "
            f'write COLUMN("field") with the field that counts its heads or units'
        ) from None
    for parameter_name, parameter in child.named_parameters() if isinstance(child, nn.Linear) else ():
        if parameter.shape[0] % n:
            raise Wrong(
                f"{subject.name}: '{name}' is declared COLUMN by '{split.heads}' ({n}), which does not divide the {parameter.shape[0]} "
                f"outputs of '{name}.{parameter_name}'; name the field that counts its heads or units"
            )


def _head_params(mixer: SequenceMixer) -> dict[str, Tensor]:
    with torch.no_grad():
        found, _ = mixer.head_params(SequenceInfo.whole(N_ROWS, N_TOKENS), Carry.empty())
    return dict(found)


def filled(subject: Subject) -> str:
    """Built on the meta device, every parameter is filled by ``reset_parameters``, once memory is there."""
    stack, names = initialized(subject)
    forgotten = [name for name, p in stack.named_parameters() if name not in names]
    if forgotten:
        raise Wrong(
            f"{subject.name}: reset_parameters leaves out {', '.join(forgotten)}; fill each through init (linear, normal, constant, fill)"
        )
    for name, tensor in (*stack.named_parameters(), *stack.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Wrong(
                f"{subject.name}: after reset_parameters '{name}' is not finite; a run builds a model on the meta device, so nothing that "
                "__init__ computes is kept: fill it in reset_parameters"
            )
    return f"{len(names)} tensors"


def seeded(subject: Subject) -> str:
    """The same seed gives the same weights, whatever torch's global generators hold; another seed gives others."""
    torch.manual_seed(1)
    (one, _), state = initialized(subject), torch.random.get_rng_state()
    torch.manual_seed(2)
    again, _ = initialized(subject)
    other, _ = initialized(subject, seed=7)
    torch.random.set_rng_state(state)
    for name, parameter in one.named_parameters():
        if not torch.equal(parameter, again.get_parameter(name)):
            raise Wrong(f"{subject.name}: two starts from one seed differ in '{name}'; draw with the generator that init.fill hands over")
    random = [name for name, p in one.named_parameters() if not torch.equal(p, other.get_parameter(name))]
    if any(isinstance(module, nn.Linear) for module in one.modules()) and not random:
        raise Wrong(f"{subject.name}: weights do not depend on the seed; draw them with the generator that init.fill hands over")
    return f"{len(random)} of {len(dict(one.named_parameters()))} tensors depend on the seed, alone"


def parameters(subject: Subject) -> str:
    """``cost`` counts the parameters exactly, of the first block and of a later one."""
    counts = []
    for layer, component in enumerate(built(subject).components()):
        counted, there = cost_of(subject, layer).parameters, parameter_count(component)
        if counted != there:
            raise Wrong(f"{subject.name}: cost counts {counted:,} parameters in block {layer}, which has {there:,}; correct cost")
        counts.append(there)
    return f"{', '.join(f'{n:,}' for n in counts)} in blocks 0 to {len(counts) - 1}"


def flops(subject: Subject) -> str:
    """``cost`` counts the FLOPs of the matrix products that torch's counter sees.

    Exactly those of a channel mixer, and of what stands around the mix step of a mixer; of a mix step, whose chunks and
    masks depend on the kernel, to a factor of MIX_FACTOR where the counter sees any.
    """
    stack, (x, _) = built(subject), inputs()
    mixing: dict[int, float] = {}
    for component in stack.components():
        if isinstance(component, SequenceMixer):
            component.mix_step = _Counted(mixing)
    n_tokens, found = N_ROWS * N_TOKENS, []
    with torch.no_grad():
        for layer, part in enumerate(_parts(stack, x)):
            inside, counted = mixing.get(layer, 0.0) / n_tokens, cost_of(subject, layer).forward_flops_per_token
            around = part / n_tokens - inside
            left = counted - around
            if left < -1e-6 * counted - 1e-3:
                raise Wrong(
                    f"{subject.name}: cost counts {counted:,.0f} FLOPs a token in block {layer}, and products around the mix step "
                    f"alone have {around:,.0f}; add the {-left:,.0f} that are missing (a product of [m, k] and [k, n] is 2 m k n)"
                )
            if not mixing and left > 1e-6 * counted + 1e-3 and not isinstance(next(stack.components()), LocalMixer):
                raise Wrong(
                    f"{subject.name}: cost counts {counted:,.0f} FLOPs a token in block {layer}, whose products have {around:,.0f}; "
                    "count matrix products alone, a multiply-add as 2"
                )
            if inside and not inside / MIX_FACTOR <= left <= inside * MIX_FACTOR:
                raise Wrong(
                    f"{subject.name}: cost leaves {left:,.0f} forward FLOPs a token for the mix step of block {layer}, whose products are "
                    f"{inside:,.0f} ({N_TOKENS} tokens, {D_MODEL} wide); count them, or say in the card's differs['flops'] why they differ"
                )
            found.append(f"block {layer}: {counted:,.0f} a token, {around:,.0f} counted around the mix step, {inside:,.0f} in it")
    return "; ".join(found)


def _parts(stack: Stack, x_BTD: Tensor) -> list[float]:
    """The FLOPs that torch's counter sees in each layer."""
    seq, carry, found = rows(stack), Carry.empty(), []
    for layer in stack.layers:
        with _Products() as products:
            x_BTD, carry = layer(x_BTD, seq, carry)
        found.append(products.flops)
    return found


class _Products(TorchDispatchMode):
    """Adds up the FLOPs of the operators that torch's counter has a formula for: FlopCounterMode without its tracking of modules,
    which forbids operators that differentiate inside a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += float(formula(*args, **kwargs, out_val=out))
        return out


class _Counted:
    """A mix step that notes the FLOPs of its products by block."""

    def __init__(self, found: dict[int, float]) -> None:
        self.found = found

    def __call__(self, mixer: SequenceMixer, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult:
        with _Products() as products:
            result = mix_whole(mixer, streams, head_params, seq)
        self.found[mixer.layer] = products.flops
        return result


def names(subject: Subject) -> str:
    """``float8`` and ``fp32`` name children that ``tensor_parallel`` declares; those in float8 are Linears, and no child is in both."""
    for component in declaring(subject):
        children = dict(component.named_children())
        for field, listed in (("float8", component.float8), ("fp32", component.fp32)):
            unknown = sorted(listed - component.tensor_parallel.keys())
            if unknown:
                raise Wrong(f"{subject.name}: {field} names '{unknown[0]}', which tensor_parallel does not declare; correct the name")
        for name in sorted(component.float8 & children.keys()):
            if not isinstance(children[name], Linear):
                raise Wrong(f"{subject.name}: float8 names '{name}', which is no Linear; leave it out")
        both = sorted(component.float8 & component.fp32)
        if both:
            raise Wrong(f"{subject.name}: '{both[0]}' stands in float8 and in fp32; choose one")
    return f"float8: {', '.join(sorted(component.float8)) or 'none'}; fp32: {', '.join(sorted(component.fp32)) or 'none'}"
