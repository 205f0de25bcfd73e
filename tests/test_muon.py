"""The optimiser on problems whose answer is known."""

import pytest
import torch

from continuation.muon import Muon, is_matrix, orthogonalise


@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (32, 32)])
def test_orthogonalise_brings_all_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix[None])[0])
    assert values.min() > 0.3
    assert values.max() < 1.5


def test_orthogonalise_keeps_the_singular_directions():
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalise(matrix[None])[0] @ v.T
    assert (inner - inner.diag().diag()).abs().max() < 1e-3


def test_parameters_that_are_stepped_together_take_the_steps_that_each_takes_alone():
    """Matrices of one shape, some of them convolutions, a tall one, vectors, and one that is frozen at first."""
    shapes = [(16, 48), (16, 16, 3), (16, 48), (48, 16), (5,), (7,)]
    generator = torch.Generator().manual_seed(2)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    together, alone = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    settings = {"lr": 0.01, "weight_decay": 0.1}
    optimisers = Muon(together, **settings), *(Muon([parameter], **settings) for parameter in alone)
    for step in range(5):
        for i, (mine, theirs) in enumerate(zip(together, alone, strict=True)):
            gradient = torch.randn(shapes[i], generator=generator)
            mine.grad, theirs.grad = (None, None) if i == 2 and step < 2 else (gradient, gradient)
        for optimiser in optimisers:
            optimiser.step()
    for mine, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_vectors_take_exactly_the_steps_of_adamw():
    mine, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    optimisers = (
        Muon([mine], lr=0.01, weight_decay=0.1),
        torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1),
    )
    for _ in range(20):
        for parameter, optimiser in zip((mine, theirs), optimisers, strict=True):
            parameter.grad = (parameter.detach() - 3) ** 3
            optimiser.step()
    torch.testing.assert_close(mine, theirs)


def test_depthwise_convolutions_and_filter_banks_are_no_matrices():
    assert is_matrix(torch.nn.Conv1d(32, 64, 3).weight)
    assert not is_matrix(torch.nn.Conv1d(64, 64, 7, groups=64).weight)
    assert not is_matrix(torch.nn.Conv1d(1, 482, 480).weight)
    assert not is_matrix(torch.zeros(64))


def test_least_squares_is_solved_through_a_convolution():
    torch.manual_seed(0)
    layer, target = torch.nn.Conv1d(16, 16, 3, padding=1), torch.nn.Conv1d(16, 16, 3, padding=1)
    optimiser = Muon(layer.parameters(), lr=0.05, weight_decay=0.0)
    x = torch.randn(4, 16, 50)
    first = last = None
    for step in range(150):
        for group in optimiser.param_groups:
            group["lr"] = 0.05 * (1 - step / 150)
        loss = (layer(x) - target(x).detach()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        first, last = first or loss.item(), loss.item()
    assert last < 1e-3 * first
