"""Training that is stopped and goes on, against the same training in one go: bit for bit."""

import contextlib
import functools
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qsae_jax.sae.fit as fitting
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.mesh import on_data
from qsae_jax.sae.fit import Job, fit, forget_steps
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.train import finished, make_step, start

pytestmark = pytest.mark.slow

D, BATCH, STEPS = 8, 16, 6
CONFIG = SAEConfig(k=2, expansion=2, lr=0.013, warmup=0.25, decay=0.4, aux=0.37, dead_after=2 * BATCH)
JOBS = {"fp": Job("fp"), "int4": Job("int4"), "fp-7": Job("fp", seed=7)}


class Rows:
    """What training needs of a stream: rows that are a pure function of `seed` and `taken`, the same for both twins."""

    def __init__(self, mesh, seed=0):
        self.mesh, self.batch, self.seed, self.taken = mesh, BATCH, seed, 0

    def described(self):
        return {"seed": self.seed}

    def first(self, rows):
        return self.at(0, min(rows, 32))

    def __next__(self):
        self.taken += self.batch
        return self.at(self.taken - self.batch, self.batch)

    def at(self, taken, rows):
        x = 3 * np.random.default_rng((self.seed, taken)).standard_normal((rows, D), np.float32) + 1
        return {"fp": on_data(x, self.mesh), "int4": on_data(np.round(x), self.mesh)}


make_step_once = functools.cache(make_step)
STARTED = {}


def start_once(config, first, *rest):
    key = config, *(np.asarray(x).tobytes() for x in first), *map(str, rest)
    if key not in STARTED:
        STARTED[key] = start(config, first, *rest)
    return jax.tree.map(jnp.copy, STARTED[key])


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """The trainings of this file share what they compile, and write a log line every other step."""
    monkeypatch.setattr(fitting, "make_step", make_step_once)
    monkeypatch.setattr(fitting, "start", start_once)
    monkeypatch.setattr(fitting, "LOG_EVERY", 2)


@pytest.fixture
def stop_after(monkeypatch):
    """`stop_after(stream, steps)`: trainings are told to stop once so many batches are out of the stream."""

    def plan(stream, steps):
        @contextlib.contextmanager
        def signal():
            yield lambda: stream.taken >= steps * BATCH

        monkeypatch.setattr(fitting, "stop_signal", signal)
        return stream

    return plan


@pytest.fixture
def train(stop_after, mesh):
    """`train(folder, data, model, stop, seed)`: the dictionaries of the jobs, from a new stream."""

    def run(folder, data=1, model=1, stop=STEPS + 1, seed=0, jobs=JOBS):
        return fit(stop_after(Rows(mesh(data, model), seed), stop), jobs, CONFIG, STEPS * BATCH, folder)

    return run


def logs(folder, jobs=JOBS):
    """Per job the lines of its log, without the speed."""
    lines = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in jobs}
    return {name: [{**json.loads(x), "tokens_per_s": 0} for x in some] for name, some in lines.items()}


def same_bits(params, one, two):
    return {
        name: all(np.array_equal(params(one[name])[n], params(two[name])[n]) for n in params(one[name])) for name in one
    }


@pytest.mark.parametrize(("data", "model", "stops"), [(1, 1, (3, 5)), (2, 4, (3,))])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, params, train, data, model, stops):
    """Stopped after 3, or after 3 and 5 of 6 steps, with a new stream each time: the parameters (of two twins and two
    seeds, on one device) and the lines of the logs are those of one go. Control: what was kept ends elsewhere on other
    tokens."""
    jobs = JOBS if data * model == 1 else {"fp": JOBS["fp"]}
    whole = train(tmp_path / "whole", data, model, jobs=jobs)
    for stop in stops:
        with pytest.raises(Interrupted, match=f"{stop} of {STEPS}"):
            train(tmp_path / "run", data, model, stop, jobs=jobs)
    lines = logs(tmp_path / "whole", jobs)
    assert [line["tokens"] for line in lines["fp"]] == [2 * BATCH, 4 * BATCH, 6 * BATCH]
    with (tmp_path / "run" / "fp.jsonl").open("a") as file:  # what a killed process wrote after the step that was kept
        file.write(json.dumps({**lines["fp"][-1], "loss": -1.0}) + '\n{"tokens": 9')
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    resumed = train(tmp_path / "run", data, model, jobs=jobs)
    assert all(same_bits(params, resumed, whole).values())
    assert logs(tmp_path / "run", jobs) == lines
    with pytest.raises(UserError, match=r"other settings \(activations of fp, .*seed\)"):
        train(tmp_path / "other", data, model, seed=1, jobs=jobs)
    settings = tmp_path / "other" / fitting.SETTINGS
    (tmp_path / "seed 1").mkdir()
    with pytest.raises(Interrupted):
        train(tmp_path / "seed 1", data, model, stop=stops[0], seed=1, jobs=jobs)
    shutil.copy(tmp_path / "seed 1" / fitting.SETTINGS, settings)
    assert not any(same_bits(params, train(tmp_path / "other", data, model, seed=1, jobs=jobs), whole).values())


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_a_training_goes_on_on_another_mesh(tmp_path, params, train, shape):
    """Begun on one device, ended on eight: one go's parameters to rounding. Control: another seed's are far."""
    jobs = {"fp": JOBS["fp"]}
    whole = train(tmp_path / "whole", jobs=jobs)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", stop=3, jobs=jobs)
    moved = train(tmp_path / "run", *shape, jobs=jobs)
    for name, array in params(whole["fp"]).items():
        np.testing.assert_allclose(params(moved["fp"])[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
    other = train(tmp_path / "other", jobs={"fp": JOBS["fp-7"]})
    assert not np.allclose(params(other["fp"])["W_dec"], params(moved["fp"])["W_dec"], atol=1e-2)


def test_each_job_is_what_training_it_alone_gives(tmp_path, params, train):
    """Two twins and two seeds give three dictionaries and three logs; the last has the bits of training it alone.
    Control: the same twin from the other seed does not."""
    whole, alone = train(tmp_path / "all"), train(tmp_path / "alone", jobs={"fp-7": JOBS["fp-7"]})
    decoders = [params(whole[name])["W_dec"] for name in JOBS]
    assert not any(np.allclose(decoders[i], decoders[j]) for i, j in [(0, 1), (0, 2), (1, 2)])
    assert len({json.dumps(lines) for lines in logs(tmp_path / "all").values()}) == 3
    assert same_bits(params, alone, whole)["fp-7"] and not same_bits(params, alone, {"fp-7": whole["fp"]})["fp-7"]


def test_a_finished_training_leaves_its_log(tmp_path, train):
    """`forget_steps` drops the states, and nothing else."""
    train(tmp_path)
    assert (tmp_path / "steps").is_dir()
    forget_steps(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.jsonl" for name in JOBS)


def test_what_cannot_be_trained_is_refused(tmp_path, mesh):
    """Less than one batch, and more codes than latents: one line that names the number and the remedy."""
    jobs, stream = {"fp": Job("fp")}, Rows(mesh(1, 1))
    with pytest.raises(UserError, match=r"on 15 tokens .*batch of 16.*lower train\.batch"):
        fit(stream, jobs, CONFIG, BATCH - 1, tmp_path)
    with pytest.raises(UserError, match=r"sae\.k 17 .* 16 latents"):
        fit(stream, jobs, replace(CONFIG, k=17), BATCH, tmp_path)


def test_steps_of_another_training_are_refused(tmp_path, train):
    """Kept steps of other jobs do not go on: one line that says which folder to delete. Control: those of the same."""
    jobs = {"fp": JOBS["fp"]}
    with pytest.raises(Interrupted):
        train(tmp_path, stop=2, jobs=jobs)
    with pytest.raises(UserError, match=r"other settings \(job fp, job nf4\).*delete"):
        train(tmp_path, jobs={"nf4": JOBS["fp"]})
    assert set(train(tmp_path, jobs=jobs)) == {"fp"}


def test_changed_settings_do_not_go_on_from_kept_steps(tmp_path, train, stop_after, mesh):
    """Another learning rate on the same shapes would load without complaint: it is refused by name."""
    jobs = {"fp": JOBS["fp"]}
    with pytest.raises(Interrupted):
        train(tmp_path, stop=2, jobs=jobs)
    with pytest.raises(UserError, match=r"\(sae\.lr, train\.tokens\)"):
        fit(Rows(mesh(1, 1)), jobs, replace(CONFIG, lr=0.02), 2 * STEPS * BATCH, tmp_path)


def test_a_used_stream_starts_from_its_beginning(tmp_path, params, train, stop_after, mesh):
    """A stream that has given out rows trains the same dictionary as a new one, not an untrained one."""
    jobs, used = {"fp": JOBS["fp"]}, Rows(mesh(1, 1))
    used.taken = STEPS * BATCH
    again = fit(stop_after(used, STEPS + 1), jobs, CONFIG, STEPS * BATCH, tmp_path / "a")
    assert same_bits(params, again, train(tmp_path / "b", jobs=jobs))["fp"]


def test_an_unknown_twin_is_refused(tmp_path, mesh):
    with pytest.raises(UserError, match="`int3` in the stream; it has fp, int4"):
        fit(Rows(mesh(1, 1)), {"x": Job("int3")}, CONFIG, BATCH, tmp_path)


class Pairs(Rows):
    """Rows with what a transcoder is to make of them: a narrower linear map."""

    def at(self, taken, rows):
        batch = super().at(taken, rows)
        return batch | {f"{name} target": x[:, : D // 2] @ jnp.eye(D // 2) + 2 for name, x in batch.items()}


def test_a_second_point_makes_transcoders(tmp_path, mesh, stop_after):
    """The dictionary reads width 8, writes width 4, takes no b_dec off and has a skip connection; b_dec begins near the
    mean of what is written. Control: without a second point it writes what it reads."""
    config = replace(CONFIG, skip=True, sparsity="batchtopk", lr=0.05)
    made = fit(stop_after(Pairs(mesh(1, 1)), 99), {"t": Job("fp", config=config)}, CONFIG, 4 * BATCH, tmp_path / "t")[
        "t"
    ]
    assert (made.d, made.d_out, made.latents) == (D, D // 2, 2 * D) and made.transcodes and not made.centred
    assert made.W_skip is not None and made.sparsity.name == "jumprelu"
    x = Pairs(mesh(1, 1)).at(0, 32)
    error = np.asarray(made(x["fp"]) - x["fp target"])
    aims = np.asarray(x["fp target"])
    assert (error**2).sum() < ((aims - aims.mean(0)) ** 2).sum()
    plain = fit(stop_after(Rows(mesh(1, 1)), 99), {"s": Job("fp")}, CONFIG, 4 * BATCH, tmp_path / "s")["s"]
    assert plain.d_out == D and not plain.transcodes


def test_twins_joined_make_a_crosscoder(tmp_path, mesh, stop_after):
    """It reads both twins side by side, as many latents as one twin's width asks for; each twin is scaled by itself.
    Control: the dictionary of one twin."""
    made = fit(stop_after(Rows(mesh(1, 1)), 99), {"c": Job("fp", beside=("int4",))}, CONFIG, 4 * BATCH, tmp_path)["c"]
    assert (made.d, made.d_out, made.latents) == (2 * D, 2 * D, 2 * D)
    x = Rows(mesh(1, 1)).at(0, 32)
    both = jnp.concatenate([x["fp"], x["int4"]], axis=-1)
    error = np.asarray(made(both) - both)
    assert (error**2).sum() < ((np.asarray(both) - np.asarray(both).mean(0)) ** 2).sum()
    with pytest.raises(UserError, match="`int3` in the stream"):
        fit(Rows(mesh(1, 1)), {"c": Job("fp", beside=("int3",))}, CONFIG, 4 * BATCH, tmp_path / "x")


def test_jobs_of_other_settings_share_a_stream(tmp_path, params, train):
    """A job with settings of its own is what training it alone under them gives. Control: not under the others'."""
    wide = replace(CONFIG, expansion=3, k=3, sparsity="relu")
    jobs = {"fp": JOBS["fp"], "wide": Job("fp", config=wide)}
    both = train(tmp_path / "both", jobs=jobs)
    alone = train(tmp_path / "alone", jobs={"wide": jobs["wide"]})
    assert same_bits(params, alone, both)["wide"] and both["wide"].latents == 3 * D != both["fp"].latents
    assert both["wide"].sparsity.name == "relu"


def test_a_dictionary_is_gone_on_with(tmp_path, params, train, stop_after, mesh):
    """From a finished dictionary, with a learning rate of almost 0, the result is that dictionary. Controls: from
    nothing it is another; one of another width is refused."""
    before = train(tmp_path / "a", jobs={"fp": JOBS["fp"]})["fp"]
    still = replace(CONFIG, lr=1e-9)
    go = {"jobs": {"fp": Job("fp", origin="a")}, "config": still, "tokens": 2 * BATCH}
    after = fit(stop_after(Rows(mesh(1, 1)), 99), folder=tmp_path / "b", initial={"fp": before}, **go)["fp"]
    new = fit(stop_after(Rows(mesh(1, 1)), 99), folder=tmp_path / "c", **go)["fp"]
    for name, ours in params(after).items():
        np.testing.assert_allclose(ours, params(before)[name], rtol=1e-4, atol=1e-5)
    assert not np.allclose(params(new)["W_dec"], params(before)["W_dec"], atol=1e-3)
    with pytest.raises(UserError, match=f"widths {D} and {D}, the activations have {2 * D}"):
        fit(Rows(mesh(1, 1)), {"fp": Job("fp", beside=("int4",))}, still, BATCH, tmp_path / "d", initial={"fp": before})


def test_rows_that_it_learnt_from_already_are_passed_over(tmp_path, params, train, stop_after, mesh):
    """Gone on with after 4 batches: batches 4 to 6 of the stream and no others, stopped in between or not, as steps by
    hand on these give it. Control: from the stream's beginning it is another."""
    before = train(tmp_path / "a", jobs={"fp": JOBS["fp"]})["fp"]
    go = {"jobs": {"fp": Job("fp", origin="a")}, "config": CONFIG, "tokens": 3 * BATCH, "initial": {"fp": before}}
    one = fit(stop_after(Rows(mesh(1, 1)), 99), folder=tmp_path / "b", after=4 * BATCH, **go)
    with pytest.raises(Interrupted, match="2 of 3"):
        fit(stop_after(Rows(mesh(1, 1)), 6), folder=tmp_path / "c", after=4 * BATCH, **go)
    two = fit(stop_after(Rows(mesh(1, 1)), 99), folder=tmp_path / "c", after=4 * BATCH, **go)
    first = fit(stop_after(Rows(mesh(1, 1)), 99), folder=tmp_path / "d", **go)
    rows = Rows(mesh(1, 1))
    state = start(CONFIG, [rows.first(32)["fp"]], 2 * D, 3, 0, rows.mesh, None, before)
    for i in (4, 5, 6):
        state, _ = make_step_once(CONFIG, 3, rows.mesh, 1)(state, rows.at(i * BATCH, BATCH)["fp"])
    assert same_bits(params, one, two)["fp"] and same_bits(params, one, {"fp": finished(state, CONFIG)})["fp"]
    assert not same_bits(params, one, first)["fp"]
    assert [line["tokens"] for line in logs(tmp_path / "c", ["fp"])["fp"]] == [2 * BATCH, 3 * BATCH]
