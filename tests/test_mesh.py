"""The mesh: what is cut where, and what a step does to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qsae_jax.acts.tokens import Windows, windows_per_forward
from qsae_jax.errors import UserError
from qsae_jax.mesh import from_chunks, in_chunks, make_mesh, on_data, parse_mesh, spec
from qsae_jax.sae.train import SAEConfig, make_step, start


def test_chunks_are_rows_and_go_back():
    """Chunk c holds the rows c, c + n / size, ...: as NumPy's strides have them, and not consecutive ones."""
    rows = jnp.arange(24.0).reshape(12, 2)
    chunks = in_chunks(rows, 4)
    np.testing.assert_array_equal(chunks[1], np.asarray(rows)[1::3])
    assert not np.array_equal(chunks[1], rows[4:8])
    np.testing.assert_array_equal(from_chunks(chunks), rows)


def test_a_dimension_that_does_not_divide_is_replicated():
    mesh = make_mesh(2, 4)
    assert spec(("embed", "heads", "head_dim"), (16, 8, 4), mesh) == PartitionSpec(None, "model")
    assert spec(("embed", "heads", "head_dim"), (16, 9, 4), mesh) == PartitionSpec()


@pytest.mark.parametrize("text", ["8", "3x", "9x9", "0x-1", "axb"])
def test_a_mesh_that_cannot_be_is_refused(text):
    with pytest.raises(UserError, match="mesh"):
        parse_mesh(text)


@pytest.mark.parametrize("asked, devices, wanted", [(0, 1, 5), (3, 1, 3), (0, 8, 8), (9, 2, 6)])
def test_a_forward_pass_is_a_multiple_of_the_devices(asked, devices, wanted):
    """Five windows: never more than there are, rounded up so that every device has its share."""
    windows = Windows(np.zeros((5, 16), np.int32), "", False)
    assert windows_per_forward(asked, windows, make_mesh(devices, 1)) == wanted


@pytest.mark.parametrize("shape", [(2, 4), (1, 8)])
def test_a_step_keeps_the_shardings_and_compiles_once(shape):
    """Latents stay cut over `model` through three steps, for which one compilation serves."""
    mesh, config = make_mesh(*shape), SAEConfig(k=2, expansion=4, dead_after=8)
    x = on_data(np.random.default_rng(0).standard_normal((16, 8), np.float32), mesh)
    state, step = start(config, [x], 32, 4, 0, mesh), make_step(config, 4, mesh)
    before = [leaf.sharding for leaf in jax.tree.leaves(state)]
    for _ in range(3):
        state, _ = step(state, x)
    after = jax.tree.leaves(state)
    assert all(leaf.sharding.is_equivalent_to(was, leaf.ndim) for leaf, was in zip(after, before, strict=True))
    assert state.sae.W_dec[...].addressable_shards[0].data.shape == (32 // shape[1], 8)
    assert step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
