"""The same trainings in PyTorch: torch.optim.Adam, schedules and what is kept along, in float64."""

from types import SimpleNamespace

import numpy as np

from tests.sae.oracle import loss, tensors_of


def share_of(share, steps):
    return max(int(steps * share), 1)


def learning_rate(c, steps, t):
    """At step t from 0: linear rise from 0 over the first share of the steps, fall to 0 over the last."""
    left = min((steps - t) / share_of(c.decay, steps), 1)
    fall = left if c.schedule == "linear" else (1 - np.cos(np.pi * left)) / 2
    return c.lr * min(t / share_of(c.warmup, steps), 1) * fall


def exponents(c, steps, t):
    """p of p-annealing: 1, and after `p_from` of the steps p_steps + 1 spans of equal length, each lower."""
    span = np.clip(np.floor((t / steps - c.p_from) / (1 - c.p_from) * (c.p_steps + 1)), 0, c.p_steps)
    return 1 - span * (1 - c.p_end) / c.p_steps


def with_short_rows(x, longest):
    """Which row stands where: the last one that is not too long; at the beginning the first."""
    fits = np.flatnonzero(np.linalg.norm(x, axis=-1) <= longest)
    return [max([i for i in fits if i <= row], default=fits[0]) for row in range(len(x))]


def running(mean, new, t):
    """A running mean that begins at its first finite value and forgets faster in the first steps."""
    decay = min(0.99, (2 + t) / (11 + t))
    moved = np.where(mean < 0, new, decay * mean + (1 - decay) * new)
    return np.where(np.isfinite(new), moved, mean)


def train(torch, c, steps, arrays, batches, scales, longest, *, centred=True, twins=1, project=True, unit=None):
    """What a training leaves. Controls: `project` takes the radial part off the decoder's gradient; `unit` is what a
    batch adds to the count of a silent latent."""
    p, m = tensors_of(torch, arrays), len(arrays["W_dec"])
    slow = [t for name, t in p.items() if name != "threshold"]
    groups = [{"params": slow, "own": 1.0}]
    if "threshold" in p:
        groups.append({"params": [p["threshold"]], "own": (c.threshold_lr or c.lr) / c.lr})
    adam = torch.optim.Adam(groups, betas=(c.beta1, c.beta2))
    kept = SimpleNamespace(
        losses=[], dead=[], silent=np.zeros(m, int), weight=1.0, cut=np.array(-1.0), cuts=-np.ones(m)
    )
    kept.average = {name: a.astype(float) for name, a in arrays.items()}
    for t, (x, y) in enumerate(batches):
        x, y = x.astype(float) / scales[0], y.astype(float) / scales[1]
        rows = with_short_rows(x, longest) if c.max_norm else slice(None)
        x, y = (torch.tensor(a[rows]) for a in (x, y))
        powers = [float(exponents(c, steps, i)) for i in (t, t + 1)]
        rise = min((t + 1) / share_of(c.sparsity_warmup, steps), 1)
        now = SimpleNamespace(dead=kept.silent >= c.dead_after, rise=rise, p=powers[0], weight=kept.weight)
        adam.zero_grad()
        total, _, codes = loss(torch, c, p, x, y, now, centred, twins)
        total.backward()
        codes, norms = codes.detach().numpy(), p["W_dec"].detach().reshape(m, twins, -1).norm(dim=-1).sum(-1).numpy()
        move(torch, c, steps, t, p, adam, project)
        kept.silent = np.where((codes > 0).any(0), 0, kept.silent + (unit or len(x)))
        kept.losses.append(total.item())
        kept.dead.append(np.mean(kept.silent >= c.dead_after))
        least = np.where(codes > 0, codes, np.inf).min(0)
        kept.cut, kept.cuts = running(kept.cut, least.min(), t), running(kept.cuts, least, t)
        sizes = (codes * norms)[codes > 0]
        kept.weight *= (sizes ** powers[0]).sum() / (sizes ** powers[1]).sum()
        decay = min(c.ema, (2 + t) / (11 + t))
        kept.average = {n: decay * a + (1 - decay) * p[n].detach().numpy() for n, a in kept.average.items()}
    kept.arrays = {name: tensor.detach().numpy() for name, tensor in p.items()}
    return kept


def move(torch, c, steps, t, p, adam, project):
    """One step of Adam, with what goes before and after it."""
    rows = p["W_dec"].data
    if c.unit and project:
        p["W_dec"].grad -= (p["W_dec"].grad * rows).sum(-1, keepdim=True) * rows
    if c.clip:
        torch.nn.utils.clip_grad_norm_(list(p.values()), c.clip)
    for group in adam.param_groups:
        group["lr"] = learning_rate(c, steps, t) * group["own"]
    adam.step()
    if "threshold" in p:
        p["threshold"].data.clamp_(min=0)
    if c.unit:
        rows /= rows.norm(dim=-1, keepdim=True)
