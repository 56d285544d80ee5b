"""Our objectives against the training classes of the real SAELens and the trainers of the real dictionary_learning.

The same weights and batch: losses and codes to 1e-5, gradients to 1e-4, in float32; where definitions differ, by the
factor that loss.py and objective.py state."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.sae.model import SAE
from qsae_jax.sae.objective import Now, make_objective
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import Gated, JumpReLU
from qsae_jax.sae.train import make_sparsity
from tests.sae.oracle import arrays_of

torch: Any = pytest.importorskip("torch")
lens: Any = pytest.importorskip("sae_lens")
steps: Any = pytest.importorskip("sae_lens.saes.sae")
pytest.importorskip("dictionary_learning")

B, D, M = 16, 8, 24
CONFIG = SAEConfig(k=3, k_aux=4, aux=0.37, l1=0.23, l0=0.31, target_l0=4.5, tanh_scale=2.3, pre_act=0.19, bandwidth=0.7,
                   groups=(0.25, 0.25, 0.5))  # fmt: skip
DEAD = np.arange(M) % 4 == 1
"""They read little and so never fire among the k largest, but are positive: 6 of 24, with AuxK for 4."""


def close(one, two, tolerance=1e-5):
    return np.allclose(one, two, rtol=tolerance, atol=tolerance)


def weights(config, centred=True, unit=True, quiet=0.3):
    """A dictionary with no zero in it; `quiet` is the bias of the dead."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    encoder, b_enc, W_dec = draw(M, D), 0.3 * draw(M) + 0.8, draw(M, D)
    encoder[DEAD] *= 0.02
    b_enc[DEAD] = quiet
    if unit:
        W_dec /= np.linalg.norm(W_dec, axis=-1, keepdims=True)
    sparsity: Any = make_sparsity(config, M)
    if config.sparsity == "jumprelu":
        sparsity = JumpReLU(jnp.linspace(0.4, 0.9, M), config.bandwidth)
    if config.sparsity == "gated":
        sparsity = Gated(*jnp.asarray(0.5 * draw(3, M)))
    bias = None if config.sparsity == "gated" else jnp.asarray(b_enc)
    return SAE(sparsity, jnp.asarray(encoder.T), bias, jnp.asarray(W_dec), jnp.asarray(0.5 * draw(D)), centred)


X = np.random.default_rng(9).standard_normal((B, D)).astype(np.float32) + 0.3


def ours(config, sae, p=0.6):
    objective = make_objective(config)

    def value(sae):
        seen = objective(sae, jnp.asarray(X), jnp.asarray(X), now)
        return seen.loss, seen

    now = Now(jnp.asarray(DEAD), jnp.ones(()), jnp.asarray(p), jnp.ones(()))
    (_, seen), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(sae)
    codes = np.asarray(sae.sparsity(sae.pre(jnp.asarray(X))))
    return SimpleNamespace(loss=float(seen.loss), codes=codes, grads=arrays_of(grads), seen=seen)


def theirs(tensors, compute):
    """`compute() -> loss, codes`, and the gradients of tensors by our names: {name: (tensor, transposed)}."""
    total, codes = compute()
    total.backward()
    grads = {}
    for name, (tensor, turned) in tensors.items():
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        grads[name] = (grad.T if turned else grad).numpy()
    return SimpleNamespace(loss=total.item(), codes=codes.detach().numpy(), grads=grads)


def filled(model, sae, names):
    """The tensors of a model by our names, filled: `names` are theirs, `.T` on what is transposed."""
    arrays, tensors = arrays_of(sae), {}
    for ours, path in names.items():
        tensor = model
        for part in path.removesuffix(".T").split("."):
            tensor = getattr(tensor, part)
        array = torch.tensor(arrays[ours].T if path.endswith(".T") else arrays[ours])
        assert tensor.shape == array.shape
        tensor.data = array.contiguous()
        tensors[ours] = tensor, path.endswith(".T")
    assert tensors.keys() == arrays.keys() == {n for n, _ in zip(arrays, model.parameters(), strict=True)}
    return tensors


def saelens(name, sae, coefficients, **more):
    """A step of `{name}TrainingSAE`."""
    config = getattr(lens, f"{name}TrainingSAEConfig")(d_in=D, d_sae=M, apply_b_dec_to_input=sae.centred, **more)
    model = getattr(lens, f"{name}TrainingSAE")(config)
    own = [n for n in arrays_of(sae) if n not in ("encoder", "W_dec", "b_dec", "b_enc")]
    names = {"encoder": "W_enc.T"} | {n: n for n in ("b_enc", "W_dec", "b_dec", *own) if n in arrays_of(sae)}
    kept = {}

    def compute():
        given = steps.TrainStepInput(torch.tensor(X), coefficients, torch.tensor(DEAD), 0, False)
        kept["out"] = model.training_forward_pass(given)
        return kept["out"].loss, kept["out"].feature_acts

    got = theirs(filled(model, sae, names), compute)
    got.parts = {key: float(value) for key, value in kept["out"].losses.items()}
    return got


LINEAR = {"encoder": "encoder.weight", "W_dec": "decoder.weight.T", "b_enc": "encoder.bias", "b_dec": "bias"}
PLAIN = {"encoder": "W_enc.T", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
GATES = {"encoder": "encoder.weight", "W_dec": "decoder.weight.T", "b_dec": "decoder_bias", "b_gate": "gate_bias"}


def dictionary_learning(module, name, sae, names, **more):
    """The loss of a trainer after its warm-up, with the dead silent for longer than it waits."""
    trainers = pytest.importorskip(f"dictionary_learning.trainers.{module}")
    more = {"steps": 100, "warmup_steps": 1, "layer": 0, "lm_name": "none", "device": "cpu"} | more
    trainer = getattr(trainers, name)(activation_dim=D, dict_size=M, **more)
    trainer.num_tokens_since_fired = torch.tensor(DEAD * 20_000_000)
    tensors = filled(trainer.ae, sae, names)
    trainer.p = 0.6

    def compute():
        log = trainer.loss(torch.tensor(X), step=50, logging=True)
        trainer.num_tokens_since_fired = torch.tensor(DEAD * 20_000_000)
        return trainer.loss(torch.tensor(X), step=50), log[2]

    return theirs(tensors, compute)


def agree(one, two, but=()):
    """Losses, codes and gradients; without those named, which must differ."""
    assert close(one.loss, two.loss) and close(one.codes, two.codes), (one.loss, two.loss)
    for name in one.grads:
        assert close(one.grads[name], two.grads[name], 1e-4) == (name not in but), name


LENS = {
    "relu": ("Standard", {"l1": 0.23}, {}, ()),
    "gated": ("Gated", {"l1": 0.23}, {}, ("W_dec", "b_dec")),
    "step": ("JumpReLU", {"l0": 0.31}, {"jumprelu_sparsity_loss_mode": "step"}, ()),
    "tanh": ("JumpReLU", {"l0": 0.31}, {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_tanh_scale": 2.3}, ()),
    "quadratic": ("JumpReLU", {"l0": 0.31}, {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.5}, ()),
}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", LENS)
def test_saelens_penalties_are_ours(kind, centred):
    """Standard, JumpReLU with each penalty and the loss that lifts dead latents, with free decoder norms; Gated, whose
    decoder SAELens does not freeze: loss and codes the same, the decoder's gradients not. Control: another l1 or l0."""
    name, coefficients, more, but = LENS[kind]
    config = replace(CONFIG, sparsity="jumprelu" if name == "JumpReLU" else kind)
    if name == "JumpReLU":
        config = replace(config, penalty=kind)
        more = more | {"jumprelu_bandwidth": 0.7, "pre_act_loss_coefficient": 0.19}
    sae = weights(config, centred, unit=False)
    agree(ours(config, sae), saelens(name, sae, coefficients, **more), but)
    other = saelens(name, sae, {key: value / 2 for key, value in coefficients.items()}, **more)
    assert not close(ours(config, sae).loss, other.loss)


TOP = {"topk": ("TopK", {}), "batchtopk": ("BatchTopK", {}),
       "matryoshka": ("MatryoshkaBatchTopK", {"matryoshka_widths": [6, 12, 24]})}  # fmt: skip


@pytest.mark.parametrize("kind", TOP)
def test_saelens_selections_are_ours_by_their_factors(kind):
    """Codes and the gradients of the mse; its matryoshka is the sum of the levels, ours their mean; its AuxK is not
    divided by the residual's variance and takes pre-activations as they are, so that with negative ones it is another
    (the control)."""
    name, more = TOP[kind]
    config = replace(CONFIG, sparsity=kind, aux=0.0)
    levels, sae = 3 if kind == "matryoshka" else 1, weights(config)
    given = {"k": 3, "rescale_acts_by_decoder_norm": False} | more
    bare, right = ours(config, sae), saelens(name, sae, {}, aux_loss_coefficient=0.0, **given)
    scaled = SimpleNamespace(
        loss=bare.loss * levels, codes=bare.codes, grads={n: levels * g for n, g in bare.grads.items()}
    )
    agree(scaled, right)
    for quiet, same in (0.3, True), (-0.01, False):
        config, sae = replace(config, aux=0.37), weights(config, quiet=quiet)
        seen = ours(config, sae).seen
        variance = np.sum(np.var(seen.error, axis=0))
        part = saelens(name, sae, {}, aux_loss_coefficient=0.37, **given).parts["auxiliary_reconstruction_loss"]
        assert close(0.37 * float(seen.parts["aux"]) * variance, part) == same, kind


def test_saelens_selects_by_decoder_norms_where_told():
    """Its default multiplies pre-activations by decoder norms: of unit rows the same codes, of free ones others."""
    config = replace(CONFIG, aux=0.0)
    for unit in True, False:
        sae = weights(config, unit=unit)
        right = saelens("TopK", sae, {}, k=3, rescale_acts_by_decoder_norm=True, aux_loss_coefficient=0.0)
        assert close(ours(config, sae).codes, right.codes) == unit


DICTIONARIES = {
    "relu": ("standard", "StandardTrainer", LINEAR, {"l1_penalty": 0.23, "sparsity_warmup_steps": None}),
    "p_anneal": ("p_anneal", "PAnnealTrainer", LINEAR, {"initial_sparsity_penalty": 0.23, "sparsity_function": "Lp^p",
                 "sparsity_warmup_steps": None, "anneal_start": 90}),
    "gated": ("gdm", "GatedSAETrainer", GATES | {"b_mag": "mag_bias", "r_mag": "r_mag"},
              {"l1_penalty": 0.23, "sparsity_warmup_steps": None}),
    "topk": ("top_k", "TopKTrainer", LINEAR | {"b_dec": "b_dec"}, {"k": 3, "auxk_alpha": 0.37}),
    "batchtopk": ("batch_top_k", "BatchTopKTrainer", LINEAR | {"b_dec": "b_dec"}, {"k": 3, "auxk_alpha": 0.37}),
    "jumprelu": ("jumprelu", "JumpReluTrainer", PLAIN | {"threshold": "threshold"},
                 {"sparsity_penalty": 0.31, "bandwidth": 0.7, "target_l0": 4.5, "sparsity_warmup_steps": None}),
}  # fmt: skip


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learnings_losses_are_ours(kind):
    """Loss, codes and gradients of unit rows, AuxK of dead latents included (norms of rows, which weigh our penalties,
    have gradients along the rows alone: those are projected away). Its JumpReLU takes the step of codes: the loss is
    the same, the gradient of thresholds is not. Control: another coefficient."""
    module, name, names, more = DICTIONARIES[kind]
    config = replace(CONFIG, sparsity=kind, pre_act=0.0)
    sae = weights(config, centred=kind != "jumprelu")
    one, two = ours(config, sae), dictionary_learning(module, name, sae, names, **more)
    rows = np.asarray(sae.W_dec[...])
    for got in one, two:
        got.grads["W_dec"] = got.grads["W_dec"] - (got.grads["W_dec"] * rows).sum(-1, keepdims=True) * rows
    agree(one, two, ("threshold",) if kind == "jumprelu" else ())
    other = ours(replace(config, l1=0.1, l0=0.1, aux=0.1), sae)
    assert not close(other.loss, two.loss)


def test_dictionary_learnings_matryoshka_is_ours_over_its_levels():
    """Its loss is the mean of levels that were weighted by one over their number: ours over 3, AuxK apart. Control:
    without that factor."""
    config = replace(CONFIG, sparsity="matryoshka")
    sae = weights(config)
    got = dictionary_learning("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", sae, PLAIN, k=3,
                              auxk_alpha=3.7, group_fractions=[0.25, 0.25, 0.5])  # fmt: skip
    one = ours(replace(config, aux=3.7), sae)
    mse, aux = float(one.seen.parts["mse"]), float(one.seen.parts["aux"])
    assert close(mse / 3 + 3.7 * aux, got.loss) and not close(mse + 3.7 * aux, got.loss)
    assert close(one.codes, got.codes)
