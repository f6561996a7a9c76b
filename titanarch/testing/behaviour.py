"""Checks of what a component computes: causality, packing, gradients, precision, decoding, states."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from titanarch.contract.channel import ChannelMixer
from titanarch.contract.mixer import MixResult, RecurrentMixer, SequenceMixer, State, Streams, mix_whole
from titanarch.contract.sequence import Halo, MixSequence, SequenceInfo, StepHalo
from titanarch.contract.side_channels import Carry
from titanarch.parallel.heads import heads_read_by, select_heads, split_head_params
from titanarch.testing.findings import EXACT, Inapplicable, Wrong, require_equal
from titanarch.testing.subject import N_LAYERS, N_ROWS, N_TOKENS, Stack, Subject, built, inputs, outcome, rows

MOVED = 13
"""The token that the check of causality changes."""
BF16_ERROR = 0.2
"""Largest error of outputs in bf16, the norm of the difference over the norm."""


def causal(subject: Subject) -> str:
    """Changing a token moves no output before it, and outputs before it have no gradient there."""
    stack, (x, weights) = built(subject), inputs()
    seq = SequenceInfo.whole(N_ROWS, N_TOKENS, seed=0)
    changed = x.clone()
    changed[:, MOVED] += 1
    with torch.no_grad():
        before, after = stack(x, seq), stack(changed, seq)
    moved = float((after - before)[:, :MOVED].abs().max() / before.abs().max())
    if moved > EXACT:
        raise Wrong(
            f"{subject.name}: changing token {MOVED} moves outputs before it by {moved:.1e} of the largest; no token may read a later one: "
            "look at masks, at convolutions (seq.previous) and at reductions over the whole row"
        )
    at = float((after - before - (changed - x))[:, MOVED:].abs().max())
    if at == 0:
        raise Wrong(f"{subject.name}: changing token {MOVED} changes nothing that is added to the residual stream; is its output used?")
    leaf = x.clone().requires_grad_()
    (stack(leaf, seq) * weights)[:, :MOVED].sum().backward()
    assert leaf.grad is not None, "the residual stream has a gradient"
    back = float(leaf.grad[:, MOVED:].abs().max() / leaf.grad.abs().max())
    if back > EXACT:
        raise Wrong(
            f"{subject.name}: the loss of the tokens before token {MOVED} has a gradient there, {back:.1e} of the largest; see above"
        )
    return f"outputs before a changed token move by {moved:.1e}, gradients by {back:.1e}"


def packed(subject: Subject) -> str:
    """A document packed with others in a row gives what it gives alone."""
    stack, (x, _) = built(subject), inputs()
    seq = rows(stack)
    if not seq.packed:
        raise Inapplicable("it refuses rows that pack several documents (accepts_packed_rows)")
    alone = []
    with torch.no_grad():
        together = stack(x, seq)
        for row in range(N_ROWS):
            lengths = torch.bincount(seq.document_BT[row]).tolist()
            parts = x[row : row + 1].split(lengths, 1)
            alone.append(torch.cat([stack(part, SequenceInfo.whole(1, part.shape[1], seed=0, first_row=3)) for part in parts], 1))
    remedy = "a document starts where seq.position_BT is 0: nothing of state, window, convolution or token shift may pass it"
    return require_equal(
        subject, {"output": together}, {"output": torch.cat(alone)}, what="documents packed and documents alone", remedy=remedy
    )


def gradients(subject: Subject) -> str:
    """Every parameter has a gradient that is not zero."""
    stack, (x, weights) = built(subject), inputs()
    found = outcome(stack, x, rows(stack), weights)
    names = [name for name, _ in stack.named_parameters()]
    for name in names:
        if name not in found:
            raise Wrong(f"{subject.name}: '{name}' has no gradient; forward does not use it, or detaches it: use it, or do not allocate it")
        if not bool(found[name].isfinite().all()):
            raise Wrong(f"{subject.name}: the gradient of '{name}' is not finite; look for a root or logarithm of 0, or exp that overflows")
        if not bool(found[name].any()):
            raise Wrong(f"{subject.name}: the gradient of '{name}' is zero everywhere; what it adds cancels, or is clamped")
    return f"{len(names)} tensors"


def deterministic(subject: Subject) -> str:
    """The same rows and seed give the same outputs and gradients to the bit, whatever torch's global generators hold."""
    (x, weights), found = inputs(), []
    state = torch.random.get_rng_state()
    for seed in (1, 2):
        torch.manual_seed(seed)
        stack = built(subject)
        found.append(outcome(stack, x, rows(stack), weights))
    torch.random.set_rng_state(state)
    for name, value in found[0].items():
        if not torch.equal(value, found[1][name]):
            raise Wrong(
                f"{subject.name}: two runs differ in {name}; draw with titanarch.ops.counter_random, keyed by seq.seed and seq.row_B"
            )
    return f"{len(found[0])} tensors equal to the bit"


def low_precision(subject: Subject) -> str:
    """In bf16 outputs and gradients are finite and near those in fp64, and what is declared fp32 stays so."""
    stack, (x, weights) = built(subject, torch.float32), inputs()
    expected = outcome(built(subject), x, rows(stack), weights)["output"] - x
    for component in stack.components():
        kept = component.fp32 if isinstance(component, SequenceMixer | ChannelMixer) else frozenset[str]()
        for name, parameter in component.named_parameters():
            if name.partition(".")[0] not in kept:
                parameter.data = parameter.data.to(torch.bfloat16)
    before = {name: p.dtype for name, p in stack.named_parameters()}
    try:
        _require_bf16(subject, stack, x)
        found = outcome(stack, x.bfloat16(), rows(stack), weights.bfloat16())
    except RuntimeError as error:
        raise Wrong(
            f"{subject.name}: it does not run in bf16 ({error}); parameters are bf16 but for the children in fp32, so cast where they meet"
        ) from error
    bad = [name for name, value in found.items() if not bool(value.isfinite().all())]
    if bad:
        raise Wrong(f"{subject.name}: in bf16 {bad[0]} is not finite; compute exponentials, sums and states in fp32")
    assert before == {name: p.dtype for name, p in stack.named_parameters()}, "nothing converts a parameter in a forward"
    error_norm = float((found["output"].double() - x - expected).norm() / expected.norm().clamp(min=1e-300))
    if error_norm > BF16_ERROR:
        raise Wrong(
            f"{subject.name}: outputs in bf16 are off by {error_norm:.2f} of their norm ({BF16_ERROR} allowed); sum and decay in fp32"
        )
    n_kept = sum(dtype == torch.float32 for dtype in before.values())
    return f"outputs are off by {error_norm:.1e} of their norm ({BF16_ERROR} is allowed); {n_kept} tensors stay fp32"


def _require_bf16(subject: Subject, stack: Stack, x_BTD: Tensor) -> None:
    """What each component adds to a bf16 stream is bf16."""
    carry, seq = Carry.empty(), rows(stack)
    for component in stack.components():
        with torch.no_grad():
            out, carry = component.run(x_BTD.bfloat16(), seq, carry)
        if out.dtype != torch.bfloat16:
            raise Wrong(f"{subject.name}: given bf16 it returns {out.dtype}; cast the result back to the dtype of x")


def decoding(subject: Subject) -> str:
    """A token at a time from ``initial_state`` gives what the whole row gives."""
    stack, (x, _) = built(subject), inputs()
    states: list[State] = []
    for component in stack.components():
        if isinstance(component, SequenceMixer) and type(component).initial_state is SequenceMixer.initial_state:
            raise Inapplicable("it declares no initial_state, so it cannot decode a token at a time")
        if subject.slot == "mixer" and not isinstance(component, SequenceMixer):
            raise Inapplicable("a LocalMixer cannot decode a token at a time")
        states.append(component.initial_state(N_ROWS, torch.float64, x.device) if isinstance(component, SequenceMixer) else {})
    steps = []
    with torch.no_grad():
        whole = stack(x, SequenceInfo.whole(N_ROWS, N_TOKENS))
        for index in range(N_TOKENS):
            y_B1D, states = _step(stack, x[:, index : index + 1], index, states)
            steps.append(y_B1D)
    remedy = "mix is given the state before the token and returns the one after it; positions come from seq.query"
    return require_equal(subject, {"output": torch.cat(steps, 1)}, {"output": whole}, what="decoding and the whole forward", remedy=remedy)


def _step(stack: Stack, x_B1D: Tensor, index: int, states: list[State]) -> tuple[Tensor, list[State]]:
    """One token through all layers, as the decoder does it."""
    whole = SequenceInfo.whole(N_ROWS, index + 1)
    last, carry, after = whole.some(lambda x, dim: x.narrow(dim, index, 1)), Carry.empty(), []
    for number, (component, state) in enumerate(zip(stack.components(), states, strict=True)):
        halo = StepHalo(state)
        query = replace(last, halo=halo)
        if isinstance(component, SequenceMixer):
            out, carry, state = component.step(x_B1D, MixSequence(query=query, key=whole, site=number), carry, state)
        else:
            (out, carry), state = component.run(x_B1D, query, carry), {}
        after.append({**state, **halo.kept})
        x_B1D = x_B1D + out
    return x_B1D, after


Mixed = tuple[SequenceMixer, Streams, Mapping[str, Tensor], MixSequence, MixResult]


def mixed(subject: Subject) -> list[Mixed]:
    """What each layer's mix step was given, and gave. Inapplicable where there is no mix step."""
    stack, (x, _), found = built(subject), inputs(), []

    def note(mixer: SequenceMixer, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult:
        result = mix_whole(mixer, streams, head_params, seq)
        found.append((mixer, streams, head_params, seq, result))
        return result

    for component in stack.components():
        if not isinstance(component, SequenceMixer):
            raise Inapplicable("it has no mix step")
        component.mix_step = note
    with torch.no_grad():
        stack(x, rows(stack))
    assert len(found) == N_LAYERS, "forward calls the mix step once a layer"
    return found


def heads(subject: Subject) -> str:
    """``mix`` on the second half of the heads gives the second half of ``mix``."""
    found, expected = {}, {}
    for layer, (mixer, streams, head_params, seq, whole) in enumerate(mixed(subject)):
        declared = mixer.declared_streams
        if streams.keys() != declared.keys():
            raise Wrong(f"{subject.name}: project makes {sorted(streams)}, and streams declares {sorted(declared)}; make them the same")
        for name, stream in declared.items():
            if streams[name].shape[2] != stream.n_heads:
                raise Wrong(f"{subject.name}: stream '{name}' has {streams[name].shape[2]} heads, and {stream.n_heads} are declared")
        n = max(stream.n_heads for stream in declared.values())
        if n % 2:
            raise Inapplicable(f"its {n} heads have no half")
        local = {name: select_heads(x, heads_read_by(n // 2, n // 2, n_query_heads=n, n_heads=x.shape[2])) for name, x in streams.items()}
        params = split_head_params(head_params, mixer.tensor_parallel, rank=1, degree=2)
        with torch.no_grad():
            half = mixer.mix(mixer.config, local, params, replace(seq, first_head=n // 2))
        found[f"block {layer}"] = half.y_BTHV
        expected[f"block {layer}"] = whole.y_BTHV[:, :, whole.y_BTHV.shape[2] // 2 :]
    remedy = "take head counts from the shapes of the streams, never from config, and let no head read another's"
    return require_equal(subject, found, expected, what="mix on half of the heads and half of mix", remedy=remedy)


class _Half(Halo):
    """One half of whole rows. ``before``: what the calls of the first half were given, for those of the second, by number."""

    def __init__(self, before: list[Tensor] | None = None) -> None:
        self.before = before
        self.given: list[Tensor] = []

    def shift(self, x: Tensor, n: int) -> Tensor:
        self.given.append(x)
        if self.before is None:
            earlier = torch.zeros_like(x)
        else:
            assert len(self.given) <= len(self.before), "both halves look back as often"
            earlier = self.before[len(self.given) - 1]
        joined = torch.cat([torch.zeros_like(x), earlier, x], 1)
        return joined.narrow(1, joined.shape[1] - x.shape[1] - n, x.shape[1])


def states(subject: Subject) -> str:
    """Two halves of a row, composed, do to the state what the row does; the second half, given the state between, gives its outputs."""
    found: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for layer, mixing in enumerate(mixed(subject)):
        if not isinstance(mixing[0], RecurrentMixer):
            raise Inapplicable("it hands no state from shard to shard")
        with torch.no_grad():
            pairs = _halves_and_whole(mixing[0], *mixing[1:])
        found |= {f"{name} of block {layer}": pair[0] for name, pair in pairs.items()}
        expected |= {f"{name} of block {layer}": pair[1] for name, pair in pairs.items()}
    remedy = (
        "transition gives (decay, state from zero), compose puts a later one after an earlier one, mix adds the incoming 'recurrent' state"
    )
    return require_equal(subject, found, expected, what="two halves of a row and the whole", remedy=remedy)


def _halves_and_whole(
    mixer: RecurrentMixer, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, whole: MixResult
) -> dict[str, tuple[Tensor, Tensor]]:
    """What two halves give, and what the whole gives, by name."""
    config, middle = mixer.config, N_TOKENS // 2

    def half(number: int, before: list[Tensor] | None = None) -> tuple[Streams, MixSequence, _Half]:
        halo = _Half(before)
        part = replace(seq.query.some(lambda x, dim: x.narrow(dim, number * middle, middle)), halo=halo)
        cut = {name: x.narrow(1, number * middle, middle) for name, x in streams.items()}
        return cut, replace(seq, query=part, key=part), halo

    early, here, halo = half(0)
    first = mixer.transition(config, early, head_params, here)
    later, there, _ = half(1, halo.given)
    composed = mixer.compose(mixer.transition(config, later, head_params, there), first)
    early, here, halo = half(0)
    mixer.mix(config, early, head_params, here)
    later, there, _ = half(1, halo.given)
    late = mixer.mix(config, later, head_params, there, {"recurrent": first.state})
    at_once = mixer.transition(config, streams, head_params, seq)
    ended = mixer.mix(config, streams, head_params, seq, {"recurrent": torch.zeros_like(first.state)})
    if late.state is None or ended.state is None:
        raise Wrong(f"{type(mixer).__qualname__}: mix was given a state and returned none; return MixResult(y, state={{'recurrent': ...}})")
    return {
        "the state": (composed.state, at_once.state),
        "the decay": (composed.decay, at_once.decay),
        "the state after mix": (ended.state["recurrent"], at_once.state),
        "the state after the second half": (late.state["recurrent"], at_once.state),
        "the outputs of the second half": (late.y_BTHV, whole.y_BTHV[:, middle:]),
    }
