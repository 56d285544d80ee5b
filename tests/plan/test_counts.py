"""Operations and traffic, against XLA's own count where it knows them, and by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qsae_jax.lm.tap import FINAL, Point, activations, weights_before
from qsae_jax.mesh import make_mesh
from qsae_jax.plan.counts import operations, traffic

X, W, V = (jnp.ones(shape) for shape in ((16, 32), (32, 64), (64, 8)))


def by_xla(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_products_are_counted_as_xla_counts_them():
    """Two products, and their gradients: within the elementwise work that XLA counts too."""

    def loss(w, v):
        return jnp.sum(jnp.tanh(X @ w) @ v)

    mine = operations(loss, W, V)
    assert mine == {"float32": 2 * 16 * 64 * (32 + 8)}
    back = operations(jax.grad(loss, argnums=(0, 1)), W, V)
    # No sum is asked for, so the second product itself is not needed; three gradients are, less the one of X.
    assert back == {"float32": 2 * 16 * 64 * (32 + 8 + 8 + 32)}
    assert by_xla(lambda w: X @ w, W) == pytest.approx(operations(lambda w: X @ w, W)["float32"], rel=0.01)


def test_loops_count_as_often_as_they_run_and_what_is_not_needed_never():
    """Control: XLA takes a loop's body once."""

    def looped(w):
        return jax.lax.scan(lambda x, _: (x @ w, None), jnp.ones((16, 32)), length=5)[0]

    square = jnp.ones((32, 32))
    assert operations(looped, square)["float32"] == 5 * 2 * 16 * 32 * 32 > 2 * by_xla(looped, square)

    @jax.jit
    def both(w, v):
        return X @ w, (X @ w) @ v

    assert operations(lambda w, v: both(w, v)[0], W, V)["float32"] == 2 * 16 * 32 * 64
    assert operations(both, W, V)["float32"] == 2 * (2 * 16 * 32 * 64) + 2 * 16 * 64 * 8
    chosen = operations(lambda on: jax.lax.cond(on, lambda: X @ W, lambda: jnp.zeros((16, 64))), True)
    assert chosen["float32"] == 2 * 16 * 32 * 64
    assert operations(lambda w: w.astype(jnp.bfloat16) @ w.T.astype(jnp.bfloat16), W) == {"bfloat16": 2 * 32 * 32 * 64}


def test_a_forward_pass_takes_its_weights_and_its_attention(tiny_lm):
    """Twice the weights before the point for each token, and 2 x 2 x heads x width x window for scores and values.
    Control: the whole model takes more."""
    tokens = jax.ShapeDtypeStruct((3, 16), jnp.int32)
    c, point = tiny_lm.config, Point(1, "resid_post")
    mine = operations(lambda lm, t: activations(lm, (point,), t), tiny_lm, tokens)["float32"]
    attention = 2 * 2 * 2 * c.n_heads * c.head_dim * 16  # two blocks
    assert mine == 3 * 16 * (2 * weights_before(tiny_lm, point) + attention)
    assert operations(lambda lm, t: activations(lm, (FINAL,), t), tiny_lm, tokens)["float32"] > 1.4 * mine


@pytest.mark.parametrize("loops", [1, 7])
def test_collectives_are_read_off_the_program(loops):
    """A product over a dimension that is cut must be summed over the devices: one all-reduce of its result each time.
    Control: cut elsewhere there is none."""
    mesh = make_mesh(1, 4)

    def place(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def repeated(x, w):
        def body(total, _):
            return total + jnp.tanh((x + total.sum()) @ w), None

        return jax.lax.scan(body, jnp.zeros((16, 8)), length=loops)[0]

    shapes = (16, 64), (64, 8)
    cut = jax.jit(repeated).lower(place(shapes[0], None, "model"), place(shapes[1], "model")).compile().as_text()
    count, size = traffic(cut)["all-reduce"]
    assert (count, size) == (loops, loops * 16 * 8 * 4)
    assert traffic(jax.jit(repeated).lower(place(shapes[0]), place(shapes[1])).compile().as_text()) == {}
