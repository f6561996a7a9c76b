"""The energy-based transformer against dense attention over both streams, and autograd's own second derivatives."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import titanarch.models.components  # noqa: F401 (registers all)
from tests.models.ebt_oracle import dense_energies, dense_objective
from titanarch.contract.init import Init, qualified_names
from titanarch.contract.sequence import SequenceInfo
from titanarch.models.ebt.config import EBTConfig
from titanarch.models.ebt.model import EBT
from titanarch.ops.counter_random import normal

V, T = 31, 9
BASE: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "channel": {"kind": "mlp", "d_ff": 24},
    "step_size": 3.0,
    "init": {"std": 0.2},
}
S2: dict[str, Any] = {"detach": False, "loss": "last", "random_step_scale": 2.0, "random_steps": 2, "langevin_noise": 0.3, "n_steps": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "s1": {},
    "s1, one landscape, tied": {"step_embedding": False, "prediction_embedding": "tied", "n_steps": 3},
    "s1, last": {"loss": "last", "n_steps": 3},
    "s2": S2,
    "s2, three landscapes": {**S2, "n_steps": 3, "loss": "mean"},
    "s2, detached": {**S2, "detach": True, "n_steps": 2},
    "s1, by the logits": {"gradient_by": "logits"},
    "s2, by the logits": {**S2, "gradient_by": "logits"},
    "grouped queries, swiglu, layernorm, zeros": {
        "mixer": {"n_kv_heads": 2, "qk_norm": True},
        "channel": {"kind": "swiglu", "d_ff": 24},
        "norm": "layernorm",
        "start": "zeros",
        "learn_step_size": False,
    },
    "one layer without a channel mixer": {"n_layers": 1, "channel": "none", "mixer": {"output_gate": True, "qkv_bias": True}},
}


def ebt(table: dict[str, Any] | None = None, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> EBT:
    config = EBTConfig.model_validate({**BASE, **(table or {})})
    model = EBT(config, V, T)
    model.reset_parameters(Init(config.init, names=qualified_names(model), seed=seed, n_layers=config.n_layers))
    return model.to(dtype)


def batch(n_rows: int = 2) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(V, (n_rows, T + 1), generator=torch.Generator().manual_seed(1))
    labels = drawn[:, 1:].clone()
    labels[0, 3] = -100
    return drawn[:, :-1], labels


def packed(lengths: tuple[int, ...], *, n_rows: int = 1, seed: int | None = None) -> SequenceInfo:
    return SequenceInfo.of_lengths([lengths] * n_rows, seed=seed, first_row=5)


@pytest.mark.parametrize("name", VARIANTS)
def test_energies_equal_dense_attention_over_both_streams(name: str) -> None:
    model, (tokens, _), seq = ebt(VARIANTS[name]), batch(), packed((4, 1, 4), n_rows=2)
    e_BTD = torch.randn(2, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for number in range(model.config.n_steps):
        contexts = model.landscape.read(model.embedding(tokens), seq, number)
        _, energy_BT = model.landscape(e_BTD, contexts, seq)
        torch.testing.assert_close(energy_BT, dense_energies(model, tokens, e_BTD, seq, number), rtol=1e-10, atol=1e-10)


def test_the_gradient_is_that_of_finite_differences() -> None:
    model, (tokens, _), seq = ebt(), batch(), packed((4, 1, 4), n_rows=2)
    e_BTD = torch.randn(2, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        contexts = model.landscape.read(model.embedding(tokens), seq, 0)
        u_BTD, _ = model.landscape(e_BTD, contexts, seq)
        for seed in range(3):
            way = torch.randn(e_BTD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1e-5
            above, below = (model.landscape.energy(e_BTD + sign * way, contexts, seq).sum() for sign in (1, -1))
            torch.testing.assert_close((u_BTD * way).sum(), (above - below) / 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_objective_and_all_gradients_equal_double_backward(name: str) -> None:
    model, (tokens, labels), seq = ebt(VARIANTS[name]), batch(), packed((4, 1, 4), n_rows=2, seed=11)
    found = model(tokens, seq, labels, 0.01)
    gradients = torch.autograd.grad(found.total, list(model.parameters()))
    total, loss_sum = dense_objective(model, tokens, seq, labels, 0.01)
    expected = torch.autograd.grad(total, list(model.parameters()))
    torch.testing.assert_close(found.total, total, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.loss_sum, loss_sum, rtol=1e-9, atol=0)
    for (parameter, _), ours, theirs in zip(model.named_parameters(), gradients, expected, strict=True):
        assert theirs.norm() > 0, f"{parameter} has no gradient"
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm(), parameter


class CountedProducts(TorchDispatchMode):
    """torch's FlopCounterMode hooks into modules, which torch.func does not bear."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.flops += 0 if count is None else count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("name", VARIANTS)
def test_cost_counts_parameters_and_the_products_of_training(name: str) -> None:
    model = ebt({**VARIANTS[name], "start": "zeros"}, dtype=torch.float32)
    config, n_rows = model.config, 6
    cost = EBT.cost(config, V, 1)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    tokens = torch.arange(n_rows)[:, None]
    with CountedProducts() as counter:
        model(tokens, SequenceInfo.whole(n_rows, 1, seed=1), tokens).total.backward()
    counted = counter.flops / n_rows
    # With rows of one token every key is visible. The counter sees no sums over a query's own keys, but what is computed again.
    config_steps, width = config.most_steps, 4.0 * config.attention.n_heads * config.attention.channels_per_head(16)
    last_alone = config.loss == "last" and config.detach
    through = config.random_steps + 1 if last_alone else config_steps
    landscapes = config.n_steps if config.step_embedding else 1
    landscapes_through = 1 if last_alone else landscapes
    own = width * (1 + config.step_embedding) * config.n_layers * (4 * through + 2 * config_steps)
    own += width * config.step_embedding * (config.n_layers - 1) * (2 * landscapes_through + landscapes)
    again = 4.0 * V * 16 * through
    # Not equal: the step embedding goes through the blocks by itself, and the first and last products lack a neighbour.
    assert counted == pytest.approx(cost.training_flops_per_token - own + again, rel=0.06)


@pytest.mark.parametrize("gradient_by", ["distribution", "logits"])
def test_no_step_leaves_the_first_prediction(gradient_by: str) -> None:
    model, (tokens, _) = ebt({"step_size": 1e-15, "learn_step_size": False, "n_steps": 1, "gradient_by": gradient_by}), batch()
    with torch.no_grad():
        logits = model.logits(tokens, packed((4, 5), n_rows=2))
    position = torch.cat([torch.arange(4), torch.arange(5)])
    noise = normal(seed=0, row_B=torch.zeros(1, dtype=torch.int64), index_T=position, site=1 << 20, n_channels=V)
    start = noise.double() if gradient_by == "logits" else noise.double().softmax(-1)
    torch.testing.assert_close(logits, start.expand_as(logits), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["s1", "s2"])
def test_packed_documents_equal_separate_ones(name: str) -> None:
    model, (tokens, _), lengths = ebt(VARIANTS[name]), batch(1), (4, 1, 4)
    with torch.no_grad():
        together = model.logits(tokens, packed(lengths))
        apart = [model.logits(part, SequenceInfo.whole(1, part.shape[1])) for part in tokens.split(lengths, 1)]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["s1", "s2"])
def test_no_prediction_sees_a_later_token(name: str) -> None:
    model, (tokens, _), seq = ebt(VARIANTS[name]), batch(), SequenceInfo.whole(2, T)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    with torch.no_grad():
        before, after = model.logits(tokens, seq), model.logits(changed, seq)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-12)
    assert ((before[:, 5:] - after[:, 5:]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_losses_are_those_of_the_logits_after_refinement(seed: int | None) -> None:
    """With a seed each row takes steps of its own number, and what it has after its last one counts."""
    model, (tokens, labels), seq = ebt(S2), batch(), SequenceInfo.whole(2, T, seed=seed)
    with torch.no_grad():
        losses, logits = model.token_losses(tokens, seq, labels), model.logits(tokens, seq)
        loss_sum = model(tokens, seq, labels).loss_sum
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view_as(labels)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(loss_sum, expected.sum())
    assert losses[0, 3] == 0


def _loss(table: dict[str, Any], *, seed: int | None = 3) -> float:
    model, (tokens, labels) = ebt(table), batch()
    with torch.no_grad():
        return float(model(tokens, SequenceInfo.whole(2, T, seed=seed), labels).total)


@pytest.mark.parametrize(
    ("changes", "evaluated"),
    [
        ({"n_steps": 3}, True),
        ({"random_steps": 6}, False),
        ({"step_size": 4.0}, True),
        ({"random_step_scale": 2.0}, False),
        ({"langevin_noise": 0.2}, False),
        ({"start": "zeros"}, True),
        ({"gradient_by": "logits"}, True),
        ({"loss": "last"}, True),
        ({"step_embedding": False}, True),
        ({"prediction_embedding": "tied"}, True),
    ],
)
def test_each_option_has_an_effect(changes: dict[str, Any], evaluated: bool) -> None:
    assert _loss(changes) != pytest.approx(_loss({}), rel=1e-6)
    if evaluated:
        assert _loss(changes, seed=None) != pytest.approx(_loss({}, seed=None), rel=1e-6)


def test_detaching_changes_the_gradient_alone() -> None:
    (tokens, labels), seq = batch(), SequenceInfo.whole(2, T, seed=3)
    through, cut = (ebt({"detach": detach}) for detach in (False, True))
    totals = [model(tokens, seq, labels).total for model in (through, cut)]
    assert torch.equal(*totals)
    a, b = (torch.autograd.grad(total, model.step_size)[0] for total, model in zip(totals, (through, cut), strict=True))  # type: ignore[arg-type]
    assert abs(float(a - b)) > 1e-6 * abs(float(b))


def test_evaluation_takes_its_own_number_of_steps() -> None:
    (tokens, labels), seq = batch(), SequenceInfo.whole(2, T)
    longer, plain = ebt({"eval_steps": 4, "step_embedding": False}), ebt({"n_steps": 4, "step_embedding": False})
    with torch.no_grad():
        assert torch.equal(longer.token_losses(tokens, seq, labels), plain.token_losses(tokens, seq, labels))
        trained = replace(seq, seed=3)
        few = ebt({"step_embedding": False})
        assert torch.equal(longer(tokens, trained, labels).total, few(tokens, trained, labels).total)


def test_draws_do_not_depend_on_which_rows_are_together() -> None:
    model, (tokens, labels) = ebt(S2), batch(3)
    whole = SequenceInfo.whole(3, T, seed=3)
    with torch.no_grad():
        together = model(tokens, whole, labels)
        apart = [
            model(tokens[rows], SequenceInfo.whole(len(tokens[rows]), T, seed=3, first_row=rows.start), labels[rows])
            for rows in (slice(0, 1), slice(1, 3))
        ]
    torch.testing.assert_close(together.total, apart[0].total + apart[1].total, rtol=1e-12, atol=0)


def _descent(table: dict[str, Any], *, n_tokens: int = V, n_steps: int = 12) -> Iterator[float]:
    config = EBTConfig.model_validate({**BASE, "init": {"std": 0.05}, **table})
    model = EBT(config, n_tokens, T)
    model.reset_parameters(Init(config.init, names=qualified_names(model), seed=0, n_layers=config.n_layers))
    drawn = torch.randint(n_tokens, (4, T + 1), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(n_steps):
        found = model(drawn[:, :-1], SequenceInfo.whole(4, T, seed=0, first_row=4 * step), drawn[:, 1:])
        yield float((found.loss_sum / found.n_targets).detach())
        optimizer.zero_grad()
        (found.total / found.n_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("table", [{}, {"detach": False, "loss": "last", "langevin_noise": 0.1}])
def test_training_lowers_the_loss(table: dict[str, Any]) -> None:
    losses = list(_descent({**table, "gradient_by": "logits", "step_size": 30.0}))
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("table", [{}, {"detach": False, "loss": "last", "n_steps": 1, "random_steps": 2, "random_step_scale": 2.0}])
def test_a_large_vocabulary_is_learned(table: dict[str, Any]) -> None:
    """By the logits, where a step is of the size of 1 / n_tokens, the loss stays near ln n_tokens."""
    n_tokens = 1024
    losses = list(_descent({**table, "step_size": 1.0}, n_tokens=n_tokens, n_steps=40))
    assert sum(losses[-10:]) / 10 < 0.85 * math.log(n_tokens), losses
