"""Tokens from files and from Python's documentation: what is taken, what is added, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from qsae_jax.acts.tokens import Windows, check_windows, counted_rows, in_order, load_windows, shuffled, stdlib_docs
from qsae_jax.errors import UserError
from qsae_jax.lm.tokenizer import TextTokenizer

WORDS = ["zero", "one", "two", "three", "four", "<s>"]
TEXT = "zero one two three four zero two four one"
IDS = [0, 1, 2, 3, 4, 0, 2, 4, 1]
BOS = 5


@pytest.fixture
def tokenizer():
    """One id a word; `zero` is token 0. BOS is known, and added where `adds_bos` says so."""

    def make(bos=BOS, adds_bos=False):
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="four"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        return TextTokenizer(inner, bos, None, adds_bos)

    return make


@pytest.fixture
def text(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    return f"text:{tmp_path / 't.txt'}"


@pytest.fixture
def npy(tmp_path):
    """`npy(array)`: the source of a token file."""

    def save(array):
        np.save(tmp_path / "t.npy", array)
        return f"npy:{tmp_path / 't.npy'}"

    return save


def test_npy_is_taken_as_it_is(npy, tokenizer):
    """Bit for bit, id 0 included, and nothing added even where BOS is asked for. Control: other ids differ."""
    ids = np.random.default_rng(0).integers(0, 6, (4, 7), dtype=np.int32)
    for bos in "auto", "always", "never":
        windows = load_windows(npy(ids), tokenizer(adds_bos=True), 3, bos, vocab=6)
        assert np.array_equal(windows.ids, ids) and windows.ids.dtype == np.int32
        assert not windows.bos and windows.seq == 7 and len(windows) == 4
    assert not np.array_equal(load_windows(npy(5 - ids), None, 3).ids, ids)


@pytest.mark.parametrize(
    ("bos", "adds", "added"),
    [
        ("always", False, True),
        ("always", True, True),
        ("never", True, False),
        ("auto", True, True),
        ("auto", False, False),
    ],
)
def test_bos_goes_before_every_window_or_none(text, tokenizer, bos, adds, added):
    """Windows of 4: with BOS it is first and 3 tokens of text follow, without it 4 do; the rest of the text is left.
    Token 0 is a token. Control: the other rule gives other windows."""
    windows = load_windows(text, tokenizer(adds_bos=adds), 4, bos)
    width = 3 if added else 4
    rows = np.array(IDS[: len(IDS) // width * width], np.int32).reshape(-1, width)
    right = {True: np.insert(rows, 0, BOS, axis=1), False: rows}
    assert np.array_equal(windows.ids, right[added]) and windows.bos == added
    assert not np.array_equal(windows.ids, right[not added])


def test_what_a_result_says_of_its_tokens(text, tokenizer):
    windows = load_windows(text, tokenizer(), 4, "always")
    facts = {"n": 12, "seq": 4, "bos": True, "skip_first": 1, "counted": 9, "source": text}
    assert windows.described(1) == facts and windows.described(2) != facts


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4), np.int64), "int64.*expected int32"),
        (np.zeros((2, 4), np.float32), "float32.*expected int32"),
        (np.zeros(8, np.int32), r"\(8,\), expected int32 \[n, seq\]"),
        (np.zeros((0, 4), np.int32), r"\(0, 4\), expected"),
        (np.zeros((4, 1), np.int32), r"\(4, 1\), expected"),
        (np.array([[0, 6]], np.int32), "ids from 0 to 6, the model knows 0 to 5"),
        (np.array([[-1, 5]], np.int32), "ids from -1 to 5"),
        (np.array([["a", "b"]], object), "not a readable .npy file"),
    ],
)
def test_a_token_file_that_does_not_fit_is_refused(npy, array, message):
    """One line. Control: int32 ids up to 5 pass."""
    load_windows(npy(np.array([[0, 5]], np.int32)), None, 4, vocab=6)
    with pytest.raises(UserError, match=message):
        load_windows(npy(array), None, 4, vocab=6)


def test_sources_that_cannot_be_read_are_refused(tmp_path, text, tokenizer):
    """One line each that names the source. Control: the text itself is read."""
    load_windows(text, tokenizer(), 4)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "half.npy").write_bytes(b"\x93NUMPY\x01")
    np.savez(tmp_path / "many.npz", a=np.zeros((2, 2), np.int32))
    cases = {
        f"text:{tmp_path}/empty.txt": "is empty",
        f"text:{tmp_path}/latin.txt": "cannot be read .*UTF-8",
        f"text:{tmp_path}/none.txt": "cannot be read .*none.txt",
        f"npy:{tmp_path}/none.npy": "not a readable .npy file",
        f"npy:{tmp_path}/half.npy": "not a readable .npy file",
        f"npy:{tmp_path}/many.npz": "expected int32",
        "books": "`books` is unknown: give text:FILE, npy:FILE, hf:DATASET or stdlib-docs",
    }
    for source, message in cases.items():
        with pytest.raises(UserError, match=message):
            load_windows(source, tokenizer(), 4)


def test_what_does_not_go_together_is_refused(text, tokenizer):
    """Too short a text, no tokenizer, no BOS to add, an unknown rule. Controls: the widest window that fits, and the
    same rule where there is a BOS."""
    assert load_windows(text, tokenizer(), 9).ids.shape == (1, 9)
    assert load_windows(text, tokenizer(), 10, "always").ids.shape == (1, 10)
    for args, message in [
        ((tokenizer(), 10), "holds 9 tokens, fewer than one window of 10"),
        ((tokenizer(), 11, "always"), "fewer than one window of 11"),
        ((tokenizer(), 1, "always"), "fewer than one window of 1"),
        ((None, 4), "needs a tokenizer"),
        ((tokenizer(bos=None), 4, "always"), "no BOS token"),
        ((tokenizer(), 4, "sometimes"), "--bos is `sometimes`: choose one of auto, always, never"),
    ]:
        with pytest.raises(UserError, match=message):
            load_windows(text, *args)


@pytest.mark.parametrize(("n", "batch"), [(5, 2), (4, 2), (3, 8), (1, 1)])
def test_in_order_covers_every_window_once(n, batch):
    """Counted windows in order; each batch is full, and what fills the last has weight 0. Control: counting the
    padding repeats windows."""
    windows = Windows(np.arange(3 * n, dtype=np.int32).reshape(n, 3), "made", bos=False)
    batches = list(in_order(windows, batch))
    assert all(ids.shape == (batch, 3) and weight.dtype == np.float32 for ids, weight in batches)
    assert np.array_equal(np.concatenate([ids[weight > 0] for ids, weight in batches]), windows.ids)
    padding = len(batches) * batch - n
    assert sum(weight.sum() for _, weight in batches) == n
    every = np.concatenate([ids for ids, _ in batches])
    assert len(every) == n + padding and len(np.unique(every, axis=0)) == n


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_counted_rows_are_chosen_by_position(skip):
    """Against a loop over windows and positions; heads are flattened. Control: another skip."""
    x = np.arange(2 * 4 * 3 * 2, dtype=np.float32).reshape(2, 4, 3, 2)
    right = np.array([x[b, s].ravel() for b in range(2) for s in range(skip, 4)])
    assert np.array_equal(counted_rows(jnp.asarray(x), skip), right)
    assert not np.array_equal(counted_rows(jnp.asarray(x), (skip + 1) % 4), right)


@pytest.mark.parametrize("skip", [-1, 4])
def test_a_skip_that_leaves_nothing_is_refused(skip):
    windows = Windows(np.zeros((2, 4), np.int32), "made", bos=False)
    check_windows(windows, 3, windows.seq)
    with pytest.raises(UserError, match=f"--skip-first {skip} does not fit windows of 4: give 0 to 3"):
        check_windows(windows, skip, windows.seq)


def test_every_epoch_is_shuffled_anew():
    """Each epoch holds every window once, in an order of its own, the same for the same seed. Control: another seed."""
    windows = Windows(np.arange(40, dtype=np.int32).reshape(20, 2), "made", bos=False)

    def epochs(seed):
        order = shuffled(windows, seed)
        return [[int(order[i][0]) for i in range(start, start + 20)] for start in (0, 20)]

    first, second = epochs(3)
    assert sorted(first) == sorted(second) == list(range(0, 40, 2))
    assert first != second and first != sorted(first)
    assert epochs(3) == [first, second] and epochs(4)[0] != first


@pytest.mark.slow
def test_stdlib_docs_are_many():
    """More than a million characters of distinct texts, without what tests and installed packages say. Control: one
    topic of pydoc is among them."""
    texts = stdlib_docs()
    assert sum(map(len, texts)) > 1_000_000 and len(set(texts)) == len(texts)
    assert not any("_docstrings" in text or "pytest" in text.split()[:1] for text in texts)
    assert any(text.startswith("The ``while`` statement") or 'The "while" statement' in text for text in texts)


def test_stdlib_docs_are_parsed_and_mixed(tmp_path, monkeypatch):
    """Of a made-up library: docstrings of 41 characters or more, nothing run, tests and broken files left out, the
    same order each time, by hash and not by name. Control: the same file outside `test` is read."""
    docs = {f"m{i}.py": f"Module {i}: " + "text " * 10 + str(i) for i in range(9)}
    for name, doc in docs.items():
        (tmp_path / name).write_text(f'"""{doc}"""\nraise SystemExit\n')
    for folder in "test", "kept":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.py").write_text(
            f'def f():\n    """In {folder}: a docstring long enough to be taken."""\n'
        )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "short.py").write_text('"""Too short."""')
    monkeypatch.setattr("qsae_jax.acts.tokens.sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setattr("pydoc_data.topics.topics", {"while": "The while statement\n"})
    texts = stdlib_docs()
    kept = {*docs.values(), "The while statement", "In kept: a docstring long enough to be taken."}
    assert set(texts) == kept and len(texts) == len(kept) and stdlib_docs() == texts
    assert texts != sorted(texts)
