"""Names of schemes: printed and parsed, and refused part by part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsae_jax.errors import UserError
from qsae_jax.quant.grid import SYMMETRIC
from qsae_jax.quant.scheme import EXAMPLES, Scheme, parse_scheme, parse_schemes

MEANT = {
    "fp": Scheme(),
    "int8": Scheme(8, 0, "full_qmax"),
    "int2": Scheme(2),
    "int4-g128": Scheme(4, 128),
    "int4-g32-asym": Scheme(4, 32, "asym"),
    "int4-tensor": Scheme(4, -1),
    "int8-restricted": Scheme(8, 0, "restricted"),
    "int4-g32-signed_full": Scheme(4, 32, "signed_full"),
    "noise@int4": Scheme(4, noise=True),
    "noise@int3-g32-half#7": Scheme(3, 32, "half", noise=True, draw=7),
}


@pytest.mark.parametrize("name", [*EXAMPLES, *MEANT])
def test_a_name_prints_back(name):
    scheme = parse_scheme(name)
    assert str(scheme) == name
    assert parse_scheme(scheme) is scheme
    assert scheme == MEANT.get(name, scheme)


def test_names_are_told_apart():
    """Control of the above: no two of the names are one scheme."""
    assert len({parse_scheme(name) for name in {*EXAMPLES, *MEANT}}) == len({*EXAMPLES, *MEANT})


LONGER = {
    " INT4-G128 ": "int4-g128",
    "int4-channel": "int4",
    "int4-full_qmax": "int4",
    "int4-nearest": "int4",
    "int4-asym-g32": "int4-g32-asym",
    "noise@int4#0": "noise@int4",
    "Noise@int4-channel#01": "noise@int4#1",
}


@pytest.mark.parametrize("name, short", LONGER.items())
def test_longer_names_are_shortened(name, short):
    """Defaults that are written out, capitals and the order of the parts."""
    assert str(parse_scheme(name)) == short


quantizers = st.builds(
    Scheme,
    bits=st.integers(2, 8),
    group=st.one_of(st.sampled_from([0, -1]), st.integers(1, 10**6)),
    convention=st.sampled_from([*SYMMETRIC, "asym"]),
)
noises = st.builds(
    lambda base, draw: Scheme(base.bits, base.group, base.convention, noise=True, draw=draw),
    quantizers,
    st.integers(0, 10**6),
)


@given(st.one_of(st.just(Scheme()), quantizers, noises))
def test_every_scheme_comes_back_from_its_name(scheme):
    assert parse_scheme(str(scheme)) == scheme
    assert hash(parse_scheme(str(scheme))) == hash(scheme)


@given(quantizers, quantizers)
def test_two_schemes_have_two_names(one, other):
    assert (str(one) == str(other)) == (one == other)


REFUSED = {
    "": "`qsae schemes`",
    "int": "nearest: ",
    "int1": "nearest: int",
    "int9": "nearest: int",
    "int16": "`int16`",
    "int-4": "`int-4`",
    "uint4": "nearest: int4",
    "itn4": "nearest: int4",
    "fp-g128": "`fp-g128`",
    "fp16": "nearest: fp",
    "int4-g": "unknown part `g`",
    "int4-g0": "unknown part `g0`",
    "int4-g-128": "unknown part `g`",
    "int4-128": "nearest: g128",
    "int4-asymm": "nearest: asym",
    "int4-assym": "nearest: asym",
    "int4-singed_full": "nearest: signed_full",
    "int4-no-clip": "unknown part `no`",
    "int4-": "unknown part ``",
    "int4--g32": "unknown part ``",
    "int4-tensr": "nearest: tensor",
    "int4-tensor-channel": "two granularities",
    "int4-g32-g64": "two granularities",
    "int4-asym-half": "two conventions",
    "int4-asym-asym": "two conventions",
    "noise@": "unknown scheme ``",
    "noise@fp": "noise@ takes a quantizer",
    "noise@noise@int4": "noise@ takes a quantizer",
    "noise@int4#x": "noise@ takes a quantizer",
    "noise@int4#-1": "noise@ takes a quantizer",
    "noise@int4#²": "noise@ takes a quantizer",
    "noise@itn4": "nearest: int4",
    "int4#1": "`int4#1`",
}


@pytest.mark.parametrize("name, said", REFUSED.items())
def test_refused(name, said):
    """One line that names the scheme, or the one inside noise@, and where it is near to another, that one."""
    with pytest.raises(UserError) as caught:
        parse_scheme(name)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert f"`{name}`" in str(caught.value) or f"`{name.removeprefix('noise@')}`" in str(caught.value)


def test_lists():
    """In the order given, doubles of the same scheme dropped, empty parts ignored; an empty list is refused."""
    assert [str(s) for s in parse_schemes("int6, int4-channel,fp,,int4,")] == ["int6", "int4", "fp"]
    for empty in ("", " , "):
        with pytest.raises(UserError, match="empty"):
            parse_schemes(empty)
    with pytest.raises(UserError, match="`int99`"):
        parse_schemes("int4,int99")
