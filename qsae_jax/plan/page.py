"""A plan as text."""

from qsae_jax.devices import DEVICES
from qsae_jax.plan.plan import Plan, Stage
from qsae_jax.plan.programs import Cost

UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def written(plan: Plan, name: str = "") -> str:
    """The plan, a block for each stage, and what it comes to."""
    device, (data, model) = DEVICES[plan.device], plan.mesh
    lines = [f"{name or 'study'} on {data}x{model} of {plan.device}, {device.memory / 2**30:.0f} GiB each"]
    if plan.simulated != plan.mesh:
        lines.append(
            f"compiled for {plan.simulated[0]}x{plan.simulated[1]}, with the same share of work on each device"
        )
    for stage in plan.stages:
        lines += _stage(stage, plan.device)
    total = sum(stage.seconds(device) for stage in plan.stages)
    share = "at the rates that were measured" if device.reached == 1 else f"at {device.reached:.0%} of the peaks"
    lines.append(f"in all {_time(total)} {share}, {_time(total * data * model)} of one chip; loading, quantizing, "
                 "compiling and statistics on the host come on top")  # fmt: skip
    if lacks := plan.lacks:
        stage, what, held = lacks
        lines.append(f"WILL NOT FIT: {stage} holds {held / 2**30:.2f} GiB with {what}")
    else:
        lines.append("it fits")
    return "\n".join(lines)


def _stage(stage: Stage, device: str) -> list[str]:
    lines = [f"{stage.name}: {stage.bytes / 2**30:.2f} GiB a device, {_time(stage.seconds(DEVICES[device]))}"]
    lines += [f"    {size / 2**30:8.3f} GiB  {what}" for what, size in stage.held.items() if size]
    return lines + [_run(what, times, cost, device) for what, (times, cost) in stage.runs.items()]


def _run(what: str, times: float, cost: Cost, device: str) -> str:
    operations = sum(cost.operations.values())
    one = f"    {times:10,.1f} {what}, each {_short(operations)}FLOP, {_time(cost.seconds(DEVICES[device]))}"
    if not cost.collectives:
        return one
    moved = ", ".join(f"{count} {kind} of {_short(size)}B" for kind, (count, size) in cost.collectives.items())
    return f"{one}; {moved}"


def _short(number: float) -> str:
    for unit, size in UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "


def _time(seconds: float) -> str:
    """In the unit that leaves two or three digits."""
    for unit, length, below in (("ms", 1e-3, 1), ("s", 1, 120), ("min", 60, 7200), ("h", 3600, 360_000)):
        if seconds < below:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86400:,.0f} days"
