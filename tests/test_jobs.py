"""Which dictionaries a training makes of settings."""

import jax.numpy as jnp
import pytest

from qsae_jax.errors import UserError
from qsae_jax.jobs import plan_jobs
from qsae_jax.sae.formats import Stored
from qsae_jax.sae.model import with_sparsity
from qsae_jax.sae.sparsity import JumpReLU, ReLU, TopK


def test_braces_and_lists_multiply():
    """Two twins, two kinds, two widths, three seeds: 24 dictionaries, each named by what differs, with its settings.
    Control: what stands alone is in no name."""
    settings = ["sae.expansion={4,16}", "train.seed={0..2}", "sae.k=8", "train.tokens=4096"]
    jobs, how = plan_jobs([["fp"], ["int4"]], "topk,batchtopk", settings, {})
    assert len(jobs) == 24 and how.tokens == 4096
    one = jobs["int4-batchtopk-expansion16-seed2"]
    assert (one.twin, one.seed, one.config.sparsity, one.config.expansion, one.config.k) == (
        "int4",
        2,
        "batchtopk",
        16,
        8,
    )
    assert "fp-topk-expansion4-seed0" in jobs and not any("k8" in name for name in jobs)


def test_one_dictionary_has_its_twins_name():
    jobs, how = plan_jobs([["fp"]], "", ["sae.aux=0.2"], {})
    assert list(jobs) == ["fp"] and jobs["fp"].config.sparsity == "topk" and jobs["fp"].config.aux == 0.2 and how.batch


@pytest.mark.parametrize(("sparsity", "kind", "k"), [(TopK(5), "topk", 5), (ReLU(), "relu", 32)])
def test_what_is_gone_on_with_keeps_its_kind(tiny_sae, sparsity, kind, k):
    """Kind and k are the dictionary's. Control: what the command names comes first."""
    sae = tiny_sae()
    sae.sparsity = sparsity
    before = {"runs/a": Stored(sae)}
    job = plan_jobs([["fp"]], "", [], before)[0]["fp"]
    assert (job.config.sparsity, job.config.k, job.origin) == (kind, k, "runs/a")
    assert plan_jobs([["fp"]], "batchtopk", ["sae.k=9"], before)[0]["fp"].config.k == 9


def test_a_jumprelu_is_gone_on_with_at_its_own_l0(tiny_sae):
    """From the file of a BatchTopK its k, of a JumpReLU its target; without either the user has to say. What the
    dictionary has already is not set again."""
    sae = with_sparsity(tiny_sae(), JumpReLU(jnp.ones(32)))
    for told, goal in (({"sparsity": "batchtopk", "k": 7.0}, 7), ({"sparsity": "jumprelu", "target_l0": 9.0}, 9)):
        job = plan_jobs([["fp"]], "", [], {"a": Stored(sae, {"training": told})})[0]["fp"]
        assert job.config.target_l0 == goal
    with pytest.raises(UserError, match=r"does not say its L0: give --set sae\.target_l0"):
        plan_jobs([["fp"]], "", [], {"a": Stored(sae)})
    assert plan_jobs([["fp"]], "", ["sae.target_l0=5"], {"a": Stored(sae)})[0]["fp"].config.target_l0 == 5
    with pytest.raises(UserError, match=r"sae\.expansion: the dictionary that --from names"):
        plan_jobs([["fp"]], "topk", ["sae.expansion={4,8}"], {"a": Stored(sae)})


@pytest.mark.parametrize(
    ("kinds", "settings", "said"),
    [
        ("topk", ["train.batch={1,2}"], "only the seed may stand in braces"),
        ("topk", ["sae.k={1..9}", "train.seed={1..9}"], "81 dictionaries, more than 64"),
        ("topk", ["sea.k=3"], "unknown table `sea`"),
        ("topq", [], "sae.sparsity `topq` is unknown; nearest: topk"),
        ("topk", ["sae.k"], "not of the form key=value"),
        ("topk", ["train.log=tensorbord"], "train.log `tensorbord` is unknown; nearest: tensorboard"),
        ("jumprelu", ["sae.k={16,64}"], "sae.k is for topk, batchtopk, matryoshka, not for jumprelu"),
        ("topk,relu", ["sae.k={16,64}"], "not for topk, relu"),
        ("topk,topk", [], "names a kind twice"),
        ("topk", ["sae.k_first=3"], "falls to sae.k, 32"),
        ("topk", ["sae.k=2.5"], "topk takes whole numbers"),
        ("matryoshka", ["sae.groups=[0.5,0.6]"], "sum to 1"),
        ("relu", ["sae.beta1=1"], "below 1"),
        ("jumprelu", ["sae.penalty=stair"], "sae.penalty `stair` is unknown"),
    ],
)
def test_settings_that_mean_nothing_are_refused(kinds, settings, said):
    with pytest.raises(UserError, match=said):
        plan_jobs([["fp"]], kinds, settings, {})


def test_a_transcoder_that_no_format_holds_is_refused_before_it_is_trained():
    """TopK and Gated ones; without a name it is BatchTopK. Control: an SAE of these kinds."""
    jobs = plan_jobs([["fp"]], "", ["sae.skip=true"], {}, transcodes=True)[0]
    assert jobs["fp"].config.sparsity == "batchtopk" and jobs["fp"].config.skip
    for kind in ("topk", "gated"):
        with pytest.raises(UserError, match=f"--sae {kind}: SAELens has no such transcoder"):
            plan_jobs([["fp"]], f"relu,{kind}", [], {}, transcodes=True)
        assert plan_jobs([["fp"]], kind, [], {})[0]
    with pytest.raises(UserError, match="for transcoders"):
        plan_jobs([["fp"]], "relu", ["sae.skip=true"], {})


def test_a_crosscoder_reads_schemes_of_several_rules():
    """A scheme's own `+` does not part it. Control: two dictionaries where the twins stand alone."""
    names = ["fp", "int8[mlp.down]+int4"]
    job = plan_jobs([names], "batchtopk", [], {})[0]["fp+int8[mlp.down]+int4"]
    assert job.twins == names
    assert [job.twins for job in plan_jobs([[name] for name in names], "", [], {})[0].values()] == [[n] for n in names]
