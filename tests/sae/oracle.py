"""What each architecture minimises, in PyTorch's float64 and from the papers' formulas, with faults for controls."""

import numpy as np

NAMES = ("encoder", "b_enc", "W_dec", "b_dec", "W_skip")
OWN = ("threshold", "b_gate", "b_mag", "r_mag")


def arrays_of(sae):
    """All parameters of a dictionary (or of its gradients, or of Adam's moments) by name, copied to NumPy."""
    found = {name: getattr(sae, name) for name in NAMES} | {name: getattr(sae.sparsity, name, None) for name in OWN}
    return {name: np.array(value[...]) for name, value in found.items() if value is not None}


def tensors_of(torch, arrays):
    return {name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in arrays.items()}


def straight_through(pre, theta, eps):
    """`[pre > theta]` and `pre [pre > theta]` whose gradients in theta are `-K/eps` and `-theta K/eps`, K the rectangle
    kernel of width eps; in pre there is none, and the mask (Rajamanoharan et al. 2024, equations 11 and 12)."""
    still = theta.detach()
    on = (pre.detach() > still).double()
    moved = (((pre.detach() - still) / eps).abs() < 0.5).double() / eps * (theta - still)
    return on - moved, pre * on - still * moved


def pre_activations(p, x, centred):
    z = (x - p["b_dec"] if centred else x) @ p["encoder"].T
    return z + p["b_enc"] if "b_enc" in p else z


def codes_of(torch, c, p, pre, rise=1.0):
    k = c.k_first + (c.k - c.k_first) * rise if c.k_first else c.k
    if c.sparsity == "topk":
        best = pre.topk(int(k), dim=-1)
        return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    if c.selects:
        flat = pre.relu().reshape(-1)
        best = flat.topk(int(k * len(pre)))
        return torch.zeros_like(flat).scatter(0, best.indices, best.values).reshape(pre.shape)
    if c.sparsity == "gated":
        return (pre + p["b_gate"] > 0).double() * (pre * p["r_mag"].exp() + p["b_mag"]).relu()
    return straight_through(pre, p["threshold"], c.bandwidth)[1] if c.sparsity == "jumprelu" else pre.relu()


def auxk(torch, c, p, pre, error, dead, fault=""):
    """Gao et al. 2024, A.2: the k_aux largest dead latents, after ReLU and without b_dec, reconstruct the detached
    residual; over its variance."""
    dead = np.flatnonzero(dead)
    if not len(dead):
        return 0.0
    best = pre[:, dead].topk(min(c.k_aux, len(dead)), dim=-1)
    codes = torch.zeros_like(pre[:, dead]).scatter(-1, best.indices, best.values.relu())
    residual = error if fault == "attached" else error.detach()
    guess = codes @ p["W_dec"][dead] + (p["b_dec"] if fault == "b_dec" else 0)
    return (residual - guess).pow(2).sum() / (residual - residual.mean(0)).pow(2).sum()


def jumprelu(c, p, pre, codes, norms, now, fault):
    """The penalty and, of the dead, the loss that lifts them."""
    on = straight_through(codes if fault == "codes" else pre, p["threshold"], c.bandwidth)[0].sum(-1)
    penalty = {
        "step": lambda: on.mean(),
        "tanh": lambda: (c.tanh_scale * codes * norms).tanh().sum(-1).mean(),
        "quadratic": lambda: (2 / c.target_l0 * (on - c.target_l0) ** 2).mean(),
        "target": lambda: (on.mean() / c.target_l0 - 1) ** 2,
    }[c.penalty]()
    dead = np.flatnonzero(now.dead)
    short = (p["threshold"] - pre).relu() * (norms if fault != "norms" else norms.detach())
    return c.l0 * now.rise * penalty + c.pre_act * short[:, dead].sum(-1).mean()


def loss(torch, c, p, x, y, now, centred=True, twins=1, fault=""):
    """The objective of a configuration, the error and the codes. `fault` plants one."""
    pre, rows = pre_activations(p, x, centred), p["W_dec"]
    outside = p["b_dec"] + (x @ p["W_skip"] if "W_skip" in p else 0)
    codes, norms = codes_of(torch, c, p, pre, now.rise), rows.reshape(len(rows), twins, -1).norm(dim=-1).sum(-1)
    error = y - outside - codes @ rows
    mse = error.pow(2).sum(-1).mean()
    if c.selects:
        m, aux = len(rows), c.aux * auxk(torch, c, p, pre, error, now.dead, fault)
        ends = np.round(np.cumsum(c.groups) * m).astype(int) if c.sparsity == "matryoshka" else [m]
        levels = [(y - outside - codes[:, :end] @ rows[:end]).pow(2).sum(-1).mean() for end in ends]
        return sum(levels) / len(levels) ** (2 if fault == "levels" else 1) + aux, error, codes
    coefficient = c.l1 * now.rise
    if c.sparsity == "relu":
        return mse + coefficient * (codes * (1 if fault == "norms" else norms)).sum(-1).mean(), error, codes
    if c.sparsity == "p_anneal":
        sizes = codes * norms
        total = sizes[sizes > 0].pow(1 if fault == "p" else now.p).sum() / len(x)
        return mse + coefficient * now.weight * total, error, codes
    if c.sparsity == "gated":
        gate = (pre + p["b_gate"]).relu()
        frozen = [t if fault == "unfrozen" else t.detach() for t in (rows, outside)]
        by_gate = (y - frozen[1] - gate @ frozen[0]).pow(2).sum(-1).mean()
        return mse + coefficient * (gate * norms).sum(-1).mean() + by_gate, error, codes
    return mse + jumprelu(c, p, pre, codes, norms, now, fault), error, codes
