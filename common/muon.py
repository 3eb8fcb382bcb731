"""The optimizer of the toy's matrices."""
import torch


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is made orthogonal by a Newton-Schulz iteration (Keller Jordan et al.,
    2024).

    torch.optim.Muon does the same, but always in bf16, whose rounding lets runs that differ only in the
    order of their sums (one process, two processes) drift apart; dtype float32 keeps them together."""

    def __init__(self, matrices, lr, weight_decay=0.0, momentum=0.9, dtype=torch.bfloat16):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}  # matrices of one shape are one batch of products
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), same in shapes.items():
                grads = [p.grad for p in same]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in same]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                update = orthogonal(torch.stack(nesterov).to(self.dtype))          # (matrices, rows, columns)
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                scale = max(1, rows / columns) ** 0.5
                torch._foreach_add_(same, update.to(same[0].dtype).unbind(), alpha=-group["lr"] * scale)


def orthogonal(x):
    """Matrices (n, rows, columns), their singular values moved towards 1 by five steps of Newton-Schulz."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x
