"""Dense float64 versions of the maths, written from the paper and design, one layer and one position at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def factors(a: Tensor, g2: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 and 5 by explicit sums: Φ [d, d], Ψ [m]."""
    a, g2 = a.double(), g2.double()
    phi = torch.zeros(a.shape[1], a.shape[1], dtype=torch.float64)
    numerator, denominator = torch.zeros(g2.shape[1], dtype=torch.float64), 0.0
    for row, square in zip(a, g2, strict=True):
        phi += torch.outer(row, row) * square.sum()
        numerator += row.dot(row) * square
        denominator += float(row.dot(row) * square.sum())
    return phi / len(a), numerator / denominator


def blockwise(matrix: Tensor, k: int, b: int) -> Tensor:
    """The block-diagonal part of a d × d matrix cut into k blocks of b columns, the last one shorter."""
    result = torch.zeros_like(matrix)
    for i in range(k):
        part = slice(i * b, min((i + 1) * b, len(matrix)))
        result[part, part] = matrix[part, part]
    return result


def damping_of(mean: float, rho: float | str, least: float, most: float) -> float:
    """λ from tr/dim."""
    return min(max(mean, least), most) if rho == "paper" else rho * mean


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A symmetric matrix to a power."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return vectors @ torch.diag(values.clamp_min(0) ** exponent) @ vectors.T


# Of the mean square of each row of the polar direction; of its Ψ, which every fifth step updates, or so.
ROW_DECAY, PSI_DECAY, PSI_INTERVAL, PSI_DAMPING = 0.95, 0.9, 5, 0.3
# Of the gain at low rates: the most, steps ahead, share of the weights' first size.
MOST_GAIN, GAIN_STEPS, GAIN_REACH = 10, 20, 0.3


class NaiveLayer:
    """One layer under LNGD, as plainly as possible: a factor estimate and a gradient a step. `time`: steps made by the
    optimizer; `every`: the interval of updates, and `turn` the first; `heads`: blocks of rows of an attention;
    `first_rms`: of the layer's weight."""

    def __init__(self, weight: Tensor, config, heads: int = 1) -> None:
        self.w, self.c, self.heads, self.time, self.turn = weight.double().clone(), config, heads, 0, 0
        self.every = 1 if config.update_interval == "auto" else config.update_interval
        self.first_rms, self.gain, self.path = float(self.w.square().mean().sqrt()), 1.0, 0.0
        self.left = torch.zeros(len(weight), len(weight)).double()
        self.u = torch.eye(len(weight)).double()
        m, d = weight.shape
        self.phi, self.psi, self.seen = torch.zeros(d, d).double(), torch.zeros(m).double(), 0.0
        self.momentum = torch.zeros(m, d).double()
        self.rows = torch.zeros(m).double()

    def observe(self, a: Tensor, g2: Tensor) -> None:
        """Eq. 14 on undamped factors, with the sum of weights kept."""
        phi, psi = factors(a, g2)
        e = self.c.ema_decay
        self.phi, self.psi, self.seen = (
            e * self.phi + (1 - e) * phi,
            e * self.psi + (1 - e) * psi,
            e * self.seen + 1 - e,
        )

    def step(self, grad: Tensor, lr: float, decay: float = 0.0) -> None:
        """Algorithm 1 and its variants, recomputing everything."""
        joint_step([self], [grad], lr, decay)

    @property
    def is_due(self) -> bool:
        """Whether it is the layer's turn."""
        return self.time % self.every == self.turn

    @property
    def updates(self) -> int:
        """Made before this step."""
        return self.time // self.every

    def average(self, grad: Tensor) -> None:
        """The gradient of this step, averaged."""
        c, self.gradient = self.c, grad.double()
        if c.momentum_on == "gradient":
            self.momentum = c.momentum * self.momentum + (1 - c.momentum) * self.gradient
            self.gradient = c.momentum * self.momentum + (1 - c.momentum) * self.gradient

    def prepare(self) -> Tensor:
        """D of this step, its rows scaled."""
        c, direction = self.c, self.direction(self.gradient)
        if c.direction == "polar":
            self.rows = ROW_DECAY * self.rows + (1 - ROW_DECAY) * direction.square().mean(1)
            direction = direction / self.rows.sqrt()[:, None]
        return direction

    def apply(self, update: Tensor, decay: float) -> None:
        """The step itself: `update` is αα_l D, `decay` what the weights shrink by."""
        c = self.c
        if c.momentum_on == "update":
            self.momentum = update = c.momentum * self.momentum + update
        self.w = self.w * (1 - decay) - update

    def direction(self, g: Tensor) -> Tensor:
        """D."""
        c, d = self.c, g.shape[1]
        phi, psi = self.phi / self.seen, self.psi / self.seen
        lam = damping_of(float(phi.trace()) / d, c.damping, *c.damping_bounds)
        damped = phi + lam * torch.eye(d).double()
        if c.direction == "natural":
            lam_psi = damping_of(float(psi.mean()), c.damping, *c.damping_bounds)
            return torch.diag(1 / (psi + lam_psi)) @ g @ power(damped, -1)
        white = torch.eye(d).double() if c.whiten == "none" else power(damped / (phi.trace() / d), -0.5)
        if c.whiten == "both" and self.updates % psi_interval(self.every) == 0 and g.any():
            self.update_psi(g @ white)
        heads = (self.u @ g @ white).chunk(self.heads)
        return self.u @ torch.cat([newton_schulz(head) for head in heads]) @ white

    def update_psi(self, white: Tensor) -> None:
        """Ψ of gradients in coordinates in which the inputs are white, and U = (Ψ m / tr Ψ + 0.3)^(-½)."""
        m = len(white)
        new = blockwise(white @ white.T, self.heads, m // self.heads)
        self.left = PSI_DECAY * self.left + (1 - PSI_DECAY) * new / new.trace()
        self.u = power(self.left * (m / self.left.trace()) + PSI_DAMPING * torch.eye(m).double(), -0.5)


def psi_interval(interval: int) -> int:
    """Updates of a layer between two of its Ψ."""
    return max(1, PSI_INTERVAL // interval)


def joint_step(units: list, grads: list[Tensor], lr: float, decay: float = 0.0) -> None:
    """A step of a layer's groups, which have factors and directions of their own and one α_l."""
    c = units[0].c
    for unit, grad in zip(units, grads, strict=True):
        unit.average(grad)
    if not units[0].is_due:
        return
    directions, lr, rate = [unit.prepare() for unit in units], units[0].every * lr, 1.0
    if c.rate == "rms":
        rate = c.rate_scale / float(torch.stack(directions).square().mean().sqrt())
        if c.direction == "polar":
            rate *= gain_of(units, directions, lr * c.rate_scale)
    for unit, direction in zip(units, directions, strict=True):
        unit.apply(lr * rate * direction, lr * decay)


def gain_of(units: list, directions: list[Tensor], lr: float) -> float:
    """By what a layer's step is multiplied, from every fifth step on; the first of its units keeps it."""
    own = units[0]
    if own.updates % psi_interval(own.every) == 0:
        size = float(torch.stack(directions).square().mean().sqrt())
        signs = sum(float(unit.gradient.abs().sum()) for unit in units)
        inner = sum(float((unit.gradient * d / size).sum()) for unit, d in zip(units, directions, strict=True))
        most = (GAIN_REACH * own.first_rms - own.path) / (GAIN_STEPS * lr)
        own.gain = min(max(signs / inner, 1.0), MOST_GAIN, max(most, 1.0)) if inner else 1.0
        own.path += psi_interval(own.every) * lr * own.gain
    return own.gain


# Polar Express, Amsel et al. 2025, Algorithm 1: three quintics for [0.05, 1].
_QUINTICS = [
    (6.68552007671117, -17.8112697677008, 12.6195413037955),
    (2.51273712828626, -1.81954295890403, 0.419863121622494),
    (1.92697853828797, -1.3066162336211, 0.380705135148909),
]


def newton_schulz(x: Tensor) -> Tensor:
    """The quintics on the singular values themselves, divided by 1.01 (Σ s⁸)^⅛. One row or column is normalised."""
    if min(x.shape) == 1 or not x.any():
        return x / x.norm().clamp_min(1e-300)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.max()
    s = s / (1.01 * (s**8).sum() ** 0.125)
    for a, b, c in _QUINTICS:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def block(a: Tensor, g: Tensor, scale: float) -> Tensor:
    """F = scale · Σ_t (a aᵀ) ⊗ (g gᵀ), dense: a [N, d], g [N, m] → [d·m, d·m], index (input, output)."""
    total = torch.zeros(a.shape[1] * g.shape[1], a.shape[1] * g.shape[1], dtype=torch.float64)
    for x, y in zip(a.double(), g.double(), strict=True):
        total += torch.kron(torch.outer(x, x), torch.outer(y, y))
    return scale * total


class NaiveFamily:
    """One layer's Fisher block under another family, as its definition says, position by position."""

    def __init__(self, family: str, m: int, d: int, config) -> None:
        self.family, self.m, self.d, self.c = family, m, d, config
        self.average: dict[str, Tensor] = {}
        self.weight, self.moments_weight = 0.0, 0.0
        self.basis: tuple[Tensor, Tensor] | None = None
        self.moments = torch.zeros(m, d).double()

    def observe(self, a: Tensor, g: Tensor, rows: list[int], scale: float, left: list, right: list) -> None:
        """Eq. 14 with the positions of one step, those that count.

        Args:
            rows: which row of the batch each position belongs to.
            left, right: (k, b) of both sides.
        """
        a, g = a.double(), g.double()
        new = {
            key: blockwise(value, *(right if key == "right" else left)) for key, value in self._new(a, g, rows, scale)
        }
        e = self.c.ema_decay
        zero = torch.zeros(()).double()
        self.average = {key: e * self.average.get(key, zero) + (1 - e) * value for key, value in new.items()}
        self.weight = e * self.weight + 1 - e
        if self.family == "ekfac" and self.basis is not None:
            u, v = self.basis
            fresh = scale * sum(torch.outer((u.T @ y) ** 2, (v.T @ x) ** 2) for x, y in zip(a, g, strict=True))
            old = e * self.moments_weight
            self.moments = (old * self.moments + (1 - e) * fresh) / (old + 1 - e)
            self.moments_weight = old + 1 - e

    def _new(self, a: Tensor, g: Tensor, rows: list[int], scale: float):
        pairs = list(zip(a, g, strict=True))
        if self.family in ("kfac", "ekfac"):
            yield "right", sum(torch.outer(x, x) for x, _ in pairs) / len(a)
            yield "left", scale * sum(torch.outer(y, y) for _, y in pairs)
        elif self.family == "tkfac":
            yield "right", scale * sum(torch.outer(x, x) * y.dot(y) for x, y in pairs)
            yield "left", scale * sum(torch.outer(y, y) * x.dot(x) for x, y in pairs)
        else:
            nablas = {row: torch.zeros(self.m, self.d).double() for row in rows}
            for (x, y), row in zip(pairs, rows, strict=True):
                nablas[row] += torch.outer(y, x)
            if self.d <= self.m:
                yield "right", scale * sum(n.T @ n for n in nablas.values())
            else:
                yield "left", scale * sum(n @ n.T for n in nablas.values())

    def side(self, name: str) -> Tensor:
        """The bias-corrected average."""
        return self.average[name] / self.weight

    def invert(self) -> None:
        """A new eigenbasis; s turns with it as the diagonal of the dense matrix that it stands for."""
        if self.family != "ekfac":
            return
        (alpha, v), (beta, u) = torch.linalg.eigh(self.side("right")), torch.linalg.eigh(self.side("left"))
        if self.moments_weight:
            turned = torch.kron(v, u).T @ self.dense() @ torch.kron(v, u)
            self.moments = turned.diagonal().view(self.d, self.m).T
        else:
            self.moments = torch.outer(beta.clamp_min(0), alpha.clamp_min(0))
        self.basis = u, v

    def dense(self) -> Tensor:
        """What stands in place of F."""
        if self.family == "ekfac":
            u, v = self.basis
            both = torch.kron(v, u)
            return both @ torch.diag(self.moments.T.flatten()) @ both.T
        if self.family == "kfac":
            return torch.kron(self.side("right"), self.side("left"))
        delta = self.side("right").trace()
        return torch.kron(self.side("right"), self.side("left")) / delta

    def direction(self, grad: Tensor) -> Tensor:
        """D by one dense solve: grad [m, d]."""
        c, m, d = self.c, self.m, self.d
        lam_of = lambda mean: damping_of(mean, c.damping, *c.damping_bounds)  # noqa: E731
        eye_m, eye_d = torch.eye(m).double(), torch.eye(d).double()
        if self.family == "ng+":
            (name,) = self.average
            side = self.side(name)
            damped = side + lam_of(float(side.trace()) / len(side)) * torch.eye(len(side)).double()
            whole = torch.kron(damped, eye_m) if name == "right" else torch.kron(eye_d, damped)
        elif self.family == "ekfac":
            whole = self.dense() + lam_of(float(self.dense().trace()) / (m * d)) * torch.eye(m * d).double()
        else:
            right, left = self.side("right"), self.side("left")
            size_r, size_l = float(right.trace()), float(left.trace())
            if self.family == "kfac":
                lam, pi = lam_of(size_r / d * size_l / m), math.sqrt(size_r / d / (size_l / m))
                whole = torch.kron(right + pi * lam**0.5 * eye_d, left + lam**0.5 / pi * eye_m)
            else:
                root = size_r**0.5  # of δ
                lam = lam_of(size_r / (m * d))
                p, q = right / size_r, left / size_r
                whole = torch.kron(root * p + lam**0.5 * eye_d, root * q + lam**0.5 * eye_m)
        return torch.linalg.solve(whole, grad.double().T.flatten()).view(d, m).T


class NaiveFamilyLayer(NaiveLayer):
    """One layer under another family: its direction, in the same step."""

    def __init__(self, weight: Tensor, config) -> None:
        super().__init__(weight, config)
        self.own = NaiveFamily(config.family, *weight.shape, config)

    def observe_gradients(self, a: Tensor, g: Tensor, rows: list[int], scale: float) -> None:
        """As `NaiveFamily.observe` with whole factors, then inverses."""
        m, d = self.w.shape
        self.own.observe(a, g, rows, scale, (1, m), (1, d))
        self.own.invert()

    def direction(self, g: Tensor) -> Tensor:
        """D."""
        return self.own.direction(g)
