"""A Scheme: what is done to which weights, as data. Its short name is printed in every result and parses back.

A name is one rule, or several joined by `+`, the first that takes a weight deciding: `int8[mlp.down]+int4` rounds
the mlp.down of every block to int8 and the other matrices to int4. Weights that no rule takes stay as they are.
"""

import re
from dataclasses import dataclass, replace

from qsae_jax.config import expanded, split_list
from qsae_jax.errors import UserError
from qsae_jax.quant.control import Matched, Noise, Permuted, is_control
from qsae_jax.quant.how import How
from qsae_jax.quant.names import parse_how
from qsae_jax.quant.where import EVERYWHERE, Where, parse_where


@dataclass(frozen=True)
class Rule:
    """What is done, and to which weights; None leaves them as they are."""

    how: How | Matched | None
    where: Where = EVERYWHERE

    def __str__(self) -> str:
        return f"{self.how or 'fp'}{self.where}"


@dataclass(frozen=True)
class Scheme:
    """Rules in order. None at all is full precision."""

    rules: tuple[Rule, ...] = ()

    def __str__(self) -> str:
        return "+".join(map(str, self.rules)) or "fp"

    @property
    def full(self) -> bool:
        """Whether nothing is distorted."""
        return all(rule.how is None for rule in self.rules)

    @property
    def control(self) -> bool:
        """Whether some weights are distorted otherwise than by quantizing."""
        return any(is_control(rule.how) for rule in self.rules)

    @property
    def matched(self) -> Matched | None:
        """The control whose strength is still to be found."""
        return next((rule.how for rule in self.rules if isinstance(rule.how, Matched)), None)

    @property
    def of(self) -> str:
        """The scheme that a control is made for: `int4` of `noise@int4`. Empty where there is none."""
        if len(self.rules) != 1 or not isinstance(how := self.rules[0].how, Noise | Permuted | Matched):
            return ""
        return str(self.with_how(how.of))

    @property
    def family(self) -> str:
        """The name of the first draw of what is random: `noise@int4` of `noise@int4#2`."""
        rules = (rule if rule.how is None or not rule.how.draw else self._first(rule) for rule in self.rules)
        return str(Scheme(tuple(rules)))

    @staticmethod
    def _first(rule: Rule) -> Rule:
        return replace(rule, how=replace(rule.how, draw=0))  # pyright: ignore[reportArgumentType]

    def with_how(self, how: How | None) -> "Scheme":
        """The same rule with another distortion."""
        return Scheme((replace(self.rules[0], how=how),))

    def within(self, where: str) -> "Scheme":
        """The same on some weights only, as `--layers` has it; a rule that names its own is refused."""
        if not where or self.full:
            return self
        if own := next((rule for rule in self.rules if rule.where != EVERYWHERE), None):
            raise UserError(f"scheme `{own}` names its weights already: leave --layers out")
        return Scheme(tuple(replace(rule, where=parse_where(where, f"{self}[{where}]")) for rule in self.rules))


def parse_scheme(name: "str | Scheme") -> Scheme:
    """The Scheme of a short name; a name that says nothing, twice, or the unknown is refused part by part."""
    if isinstance(name, Scheme):
        return name
    if not isinstance(name, str):
        raise UserError(f"scheme {name!r} is no name: give for example 'int4-g128'")
    text = name.strip().lower()
    rules = tuple(_rule(part, name) for part in text.split("+"))
    if len(rules) > 1 and any(isinstance(rule.how, Matched) for rule in rules):
        raise UserError(f"scheme `{name}`: a control that is matched by perplexity stands alone")
    return Scheme() if all(rule.how is None for rule in rules) else Scheme(rules)


def _rule(text: str, name: str) -> Rule:
    found = re.fullmatch(r"([^\[\]]*)(?:\[([^\[\]]*)\])?", text.strip())
    if not found:
        raise UserError(f"scheme `{name}`: brackets stand at the end of a rule, for example int8[mlp.down]+int4")
    where = EVERYWHERE if found[2] is None else parse_where(found[2], name)
    return Rule(None if found[1] == "fp" else parse_how(found[1], name), where)


def parse_schemes(names: str) -> tuple[Scheme, ...]:
    """A comma-separated list, without repeats, in the order given. Braces stand for several names: `int{8..2}`,
    `int4-{floor,ceil}`, `int4[{0..29}]`."""
    given = [name for name in split_list(names) if name]
    schemes = tuple(dict.fromkeys(parse_scheme(name) for one in given for name in expanded(one)))
    if not schemes:
        raise UserError("the list of schemes is empty: give for example --schemes int8,int6,int4-g128")
    return schemes
