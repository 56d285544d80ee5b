"""Perplexity by protocol, beside a loop over the windows in NumPy; how a text is cut, and what is refused."""

import math

import numpy as np
import pytest

from qsae_jax import fake_quantize
from qsae_jax.audit.protocols import Protocol, check_distinct, cut, perplexities
from qsae_jax.errors import UserError
from qsae_jax.mesh import make_mesh
from qsae_jax.quant.scheme import parse_scheme

STREAM = np.random.default_rng(4).integers(2, 300, 130).astype(np.int32)
BOS = 1
PROTOCOLS = (
    Protocol("chunks", 16, 0, "never", 130),
    Protocol("chunks with bos", 16, 0, "each", 130),
    Protocol("sliding", 16, 5, "each", 120),
    Protocol("one bos", 16, 5, "first", 130),
    Protocol("a stride of a window", 16, 16, "first", 130),
)


def slow(lm, protocol):
    """(perplexity, number of scored tokens): every window by itself, the scored tokens by counting from the left."""
    text = [BOS, *STREAM[: protocol.tokens]] if protocol.bos == "first" else [*STREAM[: protocol.tokens]]
    each = protocol.bos == "each"
    room = protocol.window - each
    stride, total, seen, done = protocol.stride or room, 0.0, 0, 0
    for start in range(0, len(text) - room + 1, stride):
        window = ([BOS] if each else []) + text[start : start + room]
        logits = np.asarray(lm(np.array([window], np.int32)), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i in range(1, len(window)):
            place = start + i - each  # of the predicted token in the text
            if place >= done or not protocol.stride:
                total -= logp[i - 1, window[i]]
                seen += 1
        done = start + room
    return math.exp(total / seen), seen


@pytest.mark.slow
def test_every_protocol_is_the_slow_loop(tiny_lm):
    """Perplexity within 1e-5, and as many scored tokens, for full precision and a twin. Controls: they differ."""
    cuts = {one: cut(one, STREAM, BOS, "text") for one in PROTOCOLS}
    rows = perplexities(tiny_lm, cuts, {"int4": parse_scheme("int4")}, make_mesh(1, 1), batch=3)
    assert [(row["protocol"], row["scheme"]) for row in rows] == [
        (p.name, s) for p in PROTOCOLS for s in ("fp", "int4")
    ]
    models = {"fp": tiny_lm, "int4": fake_quantize(tiny_lm, "int4")}
    found = set()
    for row, protocol in zip(rows, [p for p in PROTOCOLS for _ in models], strict=True):
        ppl, scored = slow(models[row["scheme"]], protocol)
        assert row["ppl"] == pytest.approx(ppl, rel=1e-5) and row["scored"] == scored
        assert row["intervals"]["ppl"][0] < ppl < row["intervals"]["ppl"][1]
        found.add(round(row["ppl"], 2))
    assert len(found) == len(rows)
    assert rows[0]["delta_ppl"] == 0 and rows[0]["top1"] == 1 and rows[1]["kl"] > 0 and rows[1]["top1"] < 1


@pytest.mark.parametrize(
    "facts, what",
    [
        ({"bos": "always"}, "choose one of each, first, never"),
        ({"window": 1}, "at least 2"),
        ({"window": 16, "stride": 16}, "give 1 to 15"),
        ({"window": 512, "tokens": 100}, "one window takes 511"),
    ],
)
def test_what_makes_no_sense_is_refused(facts, what):
    with pytest.raises(UserError, match=what):
        Protocol("p", **facts)


def test_a_text_that_is_too_short_and_a_model_without_bos():
    with pytest.raises(UserError, match="the text has 130 tokens"):
        cut(Protocol("long", 512, tokens=4096), STREAM, BOS, "text")
    with pytest.raises(UserError, match="the tokenizer has no BOS"):
        cut(PROTOCOLS[1], STREAM, None, "text")
    with pytest.raises(UserError, match="names `a` twice"):
        check_distinct([Protocol("a"), Protocol("a")])
