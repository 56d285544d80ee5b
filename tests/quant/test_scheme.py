"""Names of schemes: printed and parsed, expanded, and refused part by part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsae_jax.errors import UserError
from qsae_jax.quant.codebook import Lookup
from qsae_jax.quant.control import Cast, Matched, Noise, Permuted, Prune
from qsae_jax.quant.ggml import TYPES, Ggml
from qsae_jax.quant.grid import ASYMMETRIC, FLOATS, SYMMETRIC, FloatGrid, IntGrid
from qsae_jax.quant.group import CHANNEL, DUAN2026, TENSOR, Groups
from qsae_jax.quant.mx import ELEMENTS, RULES, Blocks
from qsae_jax.quant.names import EXAMPLES, HEADS
from qsae_jax.quant.rounding import MODES
from qsae_jax.quant.scaled import Scaled
from qsae_jax.quant.scheme import Rule, Scheme, parse_scheme, parse_schemes
from qsae_jax.quant.where import EVERYWHERE, Where


def one(how, where=EVERYWHERE):
    return Scheme((Rule(how, where),))


INT4 = Scaled(IntGrid(4))
MEANT = {
    "fp": Scheme(),
    "int8": one(Scaled(IntGrid(8, "full_qmax"), CHANNEL, "", "nearest", "f32", 0)),
    "int4-g128": one(Scaled(IntGrid(4), Groups(128))),
    "int4-g32-asym": one(Scaled(IntGrid(4, "asym"), Groups(32))),
    "int4-tensor": one(Scaled(IntGrid(4), TENSOR)),
    "int6-duan2026": one(Scaled(IntGrid(6), DUAN2026)),
    "int4-b64x128": one(Scaled(IntGrid(4), Groups(128, 64))),
    "int4-g64-hqq": one(Scaled(IntGrid(4, "asym"), Groups(64), "hqq")),
    "int3-half-mse-floor-scale_f16": one(Scaled(IntGrid(3, "half"), CHANNEL, "mse", "floor", "f16")),
    "int4-p99.9": one(Scaled(IntGrid(4), CHANNEL, "p99.9")),
    "int4-stochastic#7": one(Scaled(IntGrid(4), CHANNEL, "", "stochastic", "f32", 7)),
    "fp8_e5m2-tensor-trunc": one(Scaled(FloatGrid("fp8_e5m2"), TENSOR, "", "trunc")),
    "nf4": one(Lookup("nf4")),
    "fp4-g128-double": one(Lookup("fp4", 128, True)),
    "mxfp6_e3m2-scale_rceil-stochastic#2": one(Blocks("mxfp6_e3m2", "rceil", "stochastic", 2)),
    "nvfp4": one(Blocks("nvfp4")),
    "q4_k": one(Ggml("q4_k")),
    "bf16": one(Cast("bf16")),
    "prune0.25": one(Prune(0.25)),
    "noise@int4": one(Noise(INT4)),
    "noise0.5@int3-g32-half#7": one(Noise(Scaled(IntGrid(3, "half"), Groups(32)), 0.5, 7)),
    "permuted@q4_0#1": one(Permuted(Ggml("q4_0"), 1)),
    "prune~int4": one(Matched("prune", INT4)),
    "noise~nf4#3": one(Matched("noise", Lookup("nf4"), 3)),
    "int4[4-8]": one(INT4, Where(((4, 8),))),
    "int8[mlp.down]+int4": Scheme((Rule(Scaled(IntGrid(8)), Where((), ("mlp.down",))), Rule(INT4))),
    "fp[0,29]+int4": Scheme((Rule(None, Where(((0, 0), (29, 29)))), Rule(INT4))),
    "int4[1,3-4,attn,mlp.up]": one(INT4, Where(((1, 1), (3, 4)), ("attn", "mlp.up"))),
}


@pytest.mark.parametrize("name", dict.fromkeys([*EXAMPLES, *MEANT, *HEADS]))
def test_a_name_prints_back(name):
    scheme = parse_scheme(name)
    assert str(scheme) == name
    assert parse_scheme(scheme) is scheme
    assert scheme == MEANT.get(name, scheme)


def test_names_are_told_apart():
    """Control of the above: no two of the names are one scheme."""
    names = {*EXAMPLES, *MEANT, *HEADS}
    assert len({parse_scheme(name) for name in names}) == len(names)


LONGER = {
    " INT4-G128 ": "int4-g128",
    "int4-channel": "int4",
    "int4-full_qmax-absmax-nearest-scale_f32": "int4",
    "int4-minmax-asym-g32": "int4-g32-asym",
    "int4-hqq-asym-g64": "int4-g64-hqq",
    "int4-mse-p99.90": None,
    "int4-p99.90": "int4-p99.9",
    "noise@int4#0": "noise@int4",
    "noise1@int4": "noise@int4",
    "Noise@int4-channel#01": "noise@int4#1",
    "prune0.250": "prune0.25",
    "mxfp8_e4m3-scale_floor": "mxfp8",
    "nf4-g64": "nf4",
    "int4[8,4-7,5]": "int4[4-8]",
    "int4[mlp.up, mlp.down]": "int4[mlp.down,mlp.up]",
    "int8[embed] + int4": "int8[embed]+int4",
}


@pytest.mark.parametrize("name, short", [item for item in LONGER.items() if item[1]])
def test_longer_names_are_shortened(name, short):
    """Defaults that are written out, capitals, the order of the parts, ranges that touch."""
    assert str(parse_scheme(name)) == short


groups = st.one_of(
    st.sampled_from([CHANNEL, TENSOR, DUAN2026]),
    st.builds(Groups, st.integers(1, 10**6)),
    st.builds(Groups, st.integers(1, 999), st.integers(2, 999)),
)
modes = st.sampled_from(list(MODES))
draws = st.integers(0, 10**6)
integers = st.builds(
    lambda bits, convention, groups, rule, mode, stored, draw: Scaled(
        IntGrid(bits, convention), groups, rule, mode, stored, draw * (mode == "stochastic")
    ),
    *(st.integers(2, 8), st.sampled_from([*SYMMETRIC, *ASYMMETRIC]), groups, st.sampled_from(["", "mse", "p99.5"])),
    *(modes, st.sampled_from(["f32", "f16", "bf16"]), draws),
).filter(lambda how: how.grid.convention != "signed_full" or how.mode not in ("floor", "ceil"))
quantizers = st.one_of(
    integers,
    st.builds(Scaled, st.builds(FloatGrid, st.sampled_from(list(FLOATS))), groups),
    st.builds(Scaled, st.builds(IntGrid, st.integers(2, 8), st.just("asym")), groups, st.just("hqq")),
    st.builds(Lookup, st.sampled_from(["nf4", "fp4"]), st.integers(1, 4096), st.booleans()),
    st.builds(Blocks, st.sampled_from(list(ELEMENTS)), st.sampled_from(RULES)),
    st.builds(Ggml, st.sampled_from(list(TYPES))),
)
strengths = st.integers(1, 999_999).map(lambda i: i / 10**6)
hows = st.one_of(
    quantizers,
    st.builds(Prune, strengths),
    st.builds(Noise, quantizers.filter(lambda how: not how.draw), strengths, draws),
    st.builds(Permuted, quantizers.filter(lambda how: not how.draw), draws),
)
places = st.builds(
    Where,
    st.lists(st.integers(0, 99), max_size=3, unique=True).map(
        lambda xs: tuple((x, x) for x in sorted(2 * x for x in xs))
    ),
    st.lists(st.sampled_from(["attn.q", "mlp", "*.k", "embed"]), max_size=2, unique=True).map(
        lambda xs: tuple(sorted(xs))
    ),
)
rules = st.lists(st.builds(Rule, hows, places), min_size=1, max_size=3).map(lambda xs: Scheme(tuple(xs)))


@given(st.one_of(st.just(Scheme()), rules))
def test_every_scheme_comes_back_from_its_name(scheme):
    assert parse_scheme(str(scheme)) == scheme
    assert hash(parse_scheme(str(scheme))) == hash(scheme)


@given(rules, rules)
def test_two_schemes_have_two_names(a, b):
    assert (str(a) == str(b)) == (a == b)


REFUSED = {
    "": "`qsae schemes`",
    "int": "nearest: int",
    "int1": "nearest: int",
    "int9": "nearest: int",
    "int16": "`int16`",
    "uint4": "nearest: int4",
    "itn4": "nearest: int4",
    "fp-g128": "`fp-g128`",
    "fp16": "nearest: ",
    "mxfp6": "it comes as mxfp6_e2m3, mxfp6_e3m2",
    "mxpf4": "nearest: mxfp4",
    "q4k": "nearest: q4_k",
    "q7_k": "nearest: q",
    "fp8": "it comes as fp8_e4m3, fp8_e5m2",
    "wanda0.5": "unknown scheme",
    "int4-gptq": "unknown part `gptq`",
    "int4-g": "unknown part `g`",
    "int4-g0": "unknown part `g0`",
    "int4-128": "nearest: g128",
    "int4-asymm": "nearest: asym",
    "int4-singed_full": "nearest: signed_full",
    "int4-no-clip": "unknown part `no`",
    "int4-": "unknown part ``",
    "int4--g32": "unknown part ``",
    "int4-tensr": "nearest: tensor",
    "int4-scale_fp16": "nearest: scale_f16",
    "int4-tensor-channel": "two of one kind (granularity), `tensor` and `channel`",
    "int4-asym-half": "two of one kind (convention), `asym` and `half`",
    "int4-floor-ceil": "two of one kind (rounding mode)",
    "int4-mse-hqq": "two of one kind (scale rule)",
    "int4-p101": "not a percentile between 50 and 100",
    "int4-p1.2.3": "not a percentile",
    "int4-p100": "not a percentile",
    "int4-p50": "not a percentile between 50 and 100",
    "int4-asym-absmax": "absmax is a symmetric rule",
    "int4-minmax": "minmax is an asymmetric rule",
    "int4-half-hqq": "hqq is asymmetric",
    "int4-hqq-floor": "hqq rounds to the nearest",
    "int4-signed_full-floor": "has no one direction",
    "int4-affine-scale_e8m0": "does not hold the minimum",
    "int4-signed_full-scale_e8m0": "has no sign",
    "fp8_e4m3-asym": "unknown part `asym` of fp8_e4m3; nearest: absmax, away; possible: tensor",
    "fp8_e4m3-hqq": "unknown part `hqq`",
    "nf4-g4097": "at most 4096 weights",
    "nf4-floor": "unknown part `floor` of nf4; possible: g64, double",
    "mxfp4-g32": "unknown part `g32`",
    "nvfp4-scale_even": "unknown part `scale_even`",
    "q4_k-g32": "q4_k has no parts",
    "bf16-g32": "unknown scheme",
    "int4#1": "nothing random in `int4`",
    "prune0.2#1": "nothing random",
    "prune~int4#1": "nothing random",
    "int4-stochastic#x": "`#x` is no draw",
    "noise@int4#²": "is no draw",
    "prune": "not a fraction",
    "prune0": "not a fraction",
    "prune1": "not a fraction",
    "prune-0.5": "not a fraction",
    "noise@": "unknown scheme ``",
    "noise@fp": "noise@ takes a quantizer",
    "noise@noise@int4": "noise@ takes a quantizer",
    "noise~prune0.2": "noise~ takes a quantizer",
    "noise@itn4": "nearest: int4",
    "noise0@int4": "not a factor",
    "noise2~int4": "unknown control `noise2~`",
    "permuted~int4": "unknown control `permuted~`",
    "prune@int4": "unknown control `prune@`",
    "int4[": "brackets stand at the end",
    "[4]": "unknown scheme ``",
    "int4[4]x": "brackets stand at the end",
    "int4[]": "`` in brackets",
    "int4[8-4]": "runs backwards: write 4-8",
    "int4[4-]": "`4-` in brackets",
    "int4[-1]": "`-1` in brackets",
    "int4[mlp/down]": "`mlp/down` in brackets",
    "int4+": "unknown scheme ``",
    "prune~int4+int8": "stands alone",
}


@pytest.mark.parametrize("name, said", REFUSED.items())
def test_refused(name, said):
    """One line that names the scheme, the part, and what is near or possible."""
    with pytest.raises(UserError) as caught:
        parse_scheme(name)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    inner = name.partition("@")[2] or name
    assert f"`{name}`" in str(caught.value) or f"`{inner}`" in str(caught.value) or not name.strip("[4]+int")


def test_lists():
    """In the order given, doubles of the same scheme dropped, empty parts ignored; an empty list is refused."""
    assert [str(s) for s in parse_schemes("int6, int4-channel,fp,,int4,")] == ["int6", "int4", "fp"]
    for empty in ("", " , "):
        with pytest.raises(UserError, match="empty"):
            parse_schemes(empty)
    with pytest.raises(UserError, match="`int99`"):
        parse_schemes("int4,int99")


EXPANDED = {
    "int{8..6}": ["int8", "int7", "int6"],
    "int{3,4}-{floor,ceil}": ["int3-floor", "int3-ceil", "int4-floor", "int4-ceil"],
    "int4[{0..2}],nf4": ["int4[0]", "int4[1]", "int4[2]", "nf4"],
    "int4[0,4-8],int8[mlp.up,mlp.down]+int4": ["int4[0,4-8]", "int8[mlp.down,mlp.up]+int4"],
    "noise@int4#{0..1}": ["noise@int4", "noise@int4#1"],
    "int4[4-8,mlp.{gate,up}],int8": ["int4[4-8,mlp.gate]", "int4[4-8,mlp.up]", "int8"],
    "int4[mlp.down,{0..1}]": ["int4[0,mlp.down]", "int4[1,mlp.down]"],
    "fp[3]": ["fp"],
    "int4[{attn,mlp}]": ["int4[attn]", "int4[mlp]"],
}


@pytest.mark.parametrize("text, names", EXPANDED.items())
def test_braces_are_several_names(text, names):
    """Commas in brackets and braces do not cut the list."""
    assert [str(scheme) for scheme in parse_schemes(text)] == names


@pytest.mark.parametrize("text", ["int{4", "int4}", "int{8..2", "int{4,{5,6}"])
def test_braces_without_a_partner(text):
    with pytest.raises(UserError, match=r"has no partner"):
        parse_schemes(text)


def test_full_control_and_matched():
    said = {name: (parse_scheme(name).full, parse_scheme(name).control) for name in MEANT}
    assert {name for name, (full, _) in said.items() if full} == {"fp"}
    assert {name for name, (_, control) in said.items() if control} == {
        *("bf16", "prune0.25", "noise@int4", "noise0.5@int3-g32-half#7", "permuted@q4_0#1", "prune~int4", "noise~nf4#3")
    }
    assert parse_scheme("prune~int4").matched == Matched("prune", INT4) and not parse_scheme("int4").matched


def test_within_layers():
    """What --layers does; not where the scheme says it already, and not to full precision."""
    assert str(parse_scheme("int4").within("4-8")) == "int4[4-8]"
    assert parse_scheme("fp").within("4-8") == Scheme() and str(parse_scheme("int4").within("")) == "int4"
    with pytest.raises(UserError, match=r"`int4\[3\]` names its weights already"):
        parse_scheme("int4[3]").within("4-8")
    with pytest.raises(UserError, match="`x-y` in brackets"):
        parse_scheme("int4").within("x-y")


@pytest.mark.parametrize("thing", [None, 4, ["int4"]])
def test_what_is_no_name_is_refused(thing):
    with pytest.raises(UserError, match="is no name: give for example 'int4-g128'"):
        parse_scheme(thing)


@pytest.mark.parametrize("text", ["int{}", "int{8}", "int{8..}", "int{2..8..2}", "int{1..99999999}"])
def test_braces_that_hold_one_thing(text):
    with pytest.raises(UserError, match=r"braces hold a range or several things"):
        parse_schemes(text)


def test_braces_stand_for_a_bounded_number():
    """Refused before all combinations are made."""
    for text in ("int4-g{1..9999}", "int4-g{1..9999}-p{1..9999}", "int4-g{1..999}-b{1..9}x{1..9}"):
        with pytest.raises(UserError, match="more than 1000 names"):
            parse_schemes(text)
