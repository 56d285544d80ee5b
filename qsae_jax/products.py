"""Products of float32 numbers in float32, on every device.

JAX's default lets a TPU round float32 operands to bfloat16 and a GPU to TF32: 8 and 10 bits of mantissa, where
logits are to agree to 1e-4 and int8's damage is a few parts in a thousand. bfloat16 models lose nothing by it.
"""

from functools import partial

import jax
import jax.numpy as jnp

einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
