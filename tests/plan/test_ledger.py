"""The account of storages, against what tensors hold."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from titanarch.plan.ledger import ACTIVATIONS, GATHERED, GRADIENTS, OTHER, Ledger


def test_the_peak_is_the_most_that_is_alive_at_once() -> None:
    with Ledger() as ledger:
        a = torch.empty(1000)
        b = torch.empty(500)
        view = a[10:20]
        del a
        c = torch.empty(2000)  # a lives on in its view
        del view, b
        d = torch.empty(100)
    assert ledger.peak().total == 4 * (1000 + 500 + 2000)
    assert ledger.alive() == 4 * (len(c) + len(d))


def test_a_resized_storage_counts_what_it_holds() -> None:
    with Ledger() as ledger:
        x = torch.empty(1000)
        x.untyped_storage().resize_(0)
        y = torch.empty(600)
        del y
        x.untyped_storage().resize_(4000)
    assert ledger.peak().total == 4000
    assert ledger.alive() == ledger.peak().by_category[GATHERED] == 4000


def test_categories_follow_forward_and_backward() -> None:
    w = torch.empty(64, 64, requires_grad=True)
    with Ledger() as ledger:
        x = torch.empty(8, 64)
        y = torch.relu(x @ w)
        y.backward(torch.empty_like(y))
        del x, y
        ledger.mark_survivors(GRADIENTS)
    peak = ledger.peak().by_category
    assert peak[GRADIENTS] == 4 * 64 * 64
    # x, the product and relu's result before the backward; two more gradients of results may be alive in it
    assert peak[ACTIVATIONS] >= 4 * 3 * 8 * 64
    assert peak[OTHER] <= 4 * 2 * 8 * 64


def test_fake_and_real_tensors_give_the_same_account() -> None:
    def work() -> None:
        w = torch.zeros(32, 32, requires_grad=True)
        x = torch.zeros(16, 32)
        for _ in range(3):
            x = torch.nn.functional.gelu(x @ w)
        x.sum().backward()

    with Ledger() as real:
        work()
    with FakeTensorMode() as fake, Ledger(fake=fake) as traced:
        work()
    assert traced.peak() == real.peak()
    assert real.peak().total > 3 * 2 * 4 * 16 * 32  # both results of each of three layers are kept
