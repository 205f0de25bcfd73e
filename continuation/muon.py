"""The optimiser of both stages: Muon for matrices, AdamW for everything else, with one learning rate.

torch.optim.Muon takes neither convolutions nor vectors.
"""

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
SMALLEST_MATRIX = 16  # in either dimension; smaller ones take AdamW steps


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximate the semi-orthogonal matrices nearest to (matrices, rows, columns): Newton-Schulz iterations move
    all singular values near 1 (Jordan 2024)."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # Every factor is a polynomial of x x^T, so that all but two products have that matrix's smaller size.
    gram = x @ x.mT
    product = identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(NEWTON_SCHULZ_STEPS):
        factor = a * identity + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.mT if is_tall else x


def is_matrix(parameter: Tensor) -> bool:
    """Return whether Muon updates this parameter: linear and convolution weights that mix channels are matrices;
    depthwise ones, filter banks and vectors are not."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter.shape[1]) >= SMALLEST_MATRIX


class Muon(torch.optim.Optimizer):
    """Muon: orthogonalised momentum, scaled to the size of an AdamW step, so that AdamW's learning rate and weight
    decay serve both (Liu et al. 2025); parameters that are no matrices take AdamW steps (Loshchilov and Hutter 2019).

    Convolution weights (out, in, size) count as matrices (out, in x size). Many parameters are updated at once,
    matrices of one shape together, since launching small kernels would take most of the time on a GPU.
    """

    def __init__(self, groups, lr: float, weight_decay: float, momentum: float = 0.95, betas=(0.9, 0.99)):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not trained:
                continue
            torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
            matrices = [parameter for parameter in trained if is_matrix(parameter)]
            others = [parameter for parameter in trained if not is_matrix(parameter)]
            updates = self.muon_updates(matrices, group) + self.adamw_updates(others, group)
            torch._foreach_add_(matrices + others, updates, alpha=-group["lr"])

    def muon_updates(self, parameters: list[Tensor], group: dict) -> list[Tensor]:
        """Compute the update directions of the matrices, and update their momenta."""
        if not parameters:
            return []
        gradients, momenta = [p.grad for p in parameters], self.states(parameters, "momentum")
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        directions = [*torch._foreach_add(gradients, momenta, alpha=group["momentum"])]
        by_shape: dict[torch.Size, list[int]] = {}
        for i, direction in enumerate(directions):
            by_shape.setdefault(direction.flatten(1).shape, []).append(i)
        for shape, found in by_shape.items():
            stacked = torch.stack([directions[i].flatten(1) for i in found])
            for i, update in zip(found, orthogonalise(stacked) * (0.2 * max(shape) ** 0.5), strict=True):
                directions[i] = update.view_as(parameters[i])
        return directions

    def adamw_updates(self, parameters: list[Tensor], group: dict) -> list[Tensor]:
        """Compute the update directions of the other parameters, and update their moments."""
        if not parameters:
            return []
        gradients = [p.grad for p in parameters]
        means, squares = self.states(parameters, "mean"), self.states(parameters, "square")
        (first, second), steps = group["betas"], self.count_steps(parameters)
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - second)
        sizes = torch._foreach_div(squares, [1 - second**step for step in steps])
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, 1e-8)
        updates = torch._foreach_div(means, [1 - first**step for step in steps])
        torch._foreach_div_(updates, sizes)
        return [*updates]

    def states(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """Return the state `name` of each parameter, zeros at first."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]

    def count_steps(self, parameters: list[Tensor]) -> list[int]:
        """Increment each parameter's number of steps, and return these numbers."""
        for parameter in parameters:
            self.state[parameter]["step"] = self.state[parameter].get("step", 0) + 1
        return [self.state[parameter]["step"] for parameter in parameters]
