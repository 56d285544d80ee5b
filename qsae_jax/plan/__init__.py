"""What a study takes on a mesh that is not here: bytes, operations, traffic and time, before it is rented."""

from qsae_jax.plan.page import written
from qsae_jax.plan.plan import Plan, named_device, plan

__all__ = ["Plan", "named_device", "plan", "written"]
