"""Does a worker satisfy a label expression? A small safe grammar, three-valued.

    expression  = term { "or" term }
    term        = factor { "and" factor }
    factor      = "not" factor | "(" expression ")" | name comparison value
    comparison  = "==" | "!=" | "<" | "<=" | ">" | ">="
    value       = number | "text" | 'text'

A comparison with a missing attribute, or of a text with a number, is unknown; `not unknown` is unknown; an expression that is
unknown as a whole never matches.
"""

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

from ollm_service.core.errors import InvalidExpression, shown

Attributes = Mapping[str, str | float]
ANY = "any"  # what users say for no expression; it can be none, since it compares nothing
_LONGEST = 1000
_DEEPEST = 50
_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?\d+(?:\.\d+)?)|(?P<text>\"[^\"]*\"|'[^']*')|(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)|(?P<sign>[<>=!]=|[<>()]))"
)
_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`name comparison value`."""

    name: str
    sign: str
    value: str | float

    def evaluate(self, attributes: Attributes) -> bool | None:
        """True, False, or None where the attribute is missing or of another type."""
        found = attributes.get(self.name)
        if found is None or isinstance(found, str) != isinstance(self.value, str):
            return None
        return _COMPARISONS[self.sign](found, self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Negation:
    """`not operand`."""

    operand: "Expression"

    def evaluate(self, attributes: Attributes) -> bool | None:
        """The opposite; unknown stays unknown."""
        value = self.operand.evaluate(attributes)
        return None if value is None else not value


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """All (`and`) or any (`or`) of the operands."""

    is_and: bool
    operands: tuple["Expression", ...]

    def evaluate(self, attributes: Attributes) -> bool | None:
        """Kleene's strong three-valued conjunction or disjunction."""
        decisive, otherwise = not self.is_and, self.is_and
        found: bool | None = otherwise
        for operand in self.operands:
            value = operand.evaluate(attributes)
            if value is decisive:
                return decisive
            found = found if value is otherwise else None
        return found


Expression = Comparison | Negation | Combination


@lru_cache(maxsize=256)  # a fleet is matched worker by worker
def parse_expression(text: str) -> Expression:
    """Parse a label expression. Raises InvalidExpression saying where it went wrong."""
    if len(text) > _LONGEST:
        raise InvalidExpression(f"A label expression has at most {_LONGEST} characters.", param="where")
    return _Parser(text).parse()


@lru_cache(maxsize=256)
def names_in(text: str) -> frozenset[str]:
    """The attributes that an expression compares. Raises InvalidExpression."""
    return frozenset(_names(parse_expression(text)))


def _names(expression: Expression) -> Iterator[str]:
    if isinstance(expression, Comparison):
        yield expression.name
    for operand in _operands(expression):
        yield from _names(operand)


def _operands(expression: Expression) -> tuple[Expression, ...]:
    if isinstance(expression, Combination):
        return expression.operands
    return (expression.operand,) if isinstance(expression, Negation) else ()


def satisfies(text: str | None, attributes: Attributes) -> bool:
    """Whether the attributes satisfy the expression for certain; no expression is always satisfied."""
    return text is None or parse_expression(text).evaluate(attributes) is True


def leaving_out(where: str | None, name: str, values: Iterable[str]) -> str | None:
    """An expression that holds where the given one does and the attribute has none of these texts.

    None where it cannot be said: a text with both kinds of quotes, or more than an expression may hold.
    """
    terms = [] if where is None else [f"({where})"]
    for value in values:
        quote = '"' if '"' not in value else "'"
        terms.append(f"{name} != {quote}{value}{quote}")
    text = " and ".join(terms)
    try:
        return text if names_in(text) else None
    except InvalidExpression:
        return None


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0
        self.kind, self.token = "", ""
        self._advance()

    def parse(self) -> Expression:
        expression = self._combination(is_and=False)
        if self.kind != "end":
            self._refuse("the end")
        return expression

    def _combination(self, *, is_and: bool) -> Expression:
        word, deeper = ("and", self._factor) if is_and else ("or", lambda: self._combination(is_and=True))
        operands = [deeper()]
        while self.kind == "name" and self.token == word:
            self._advance()
            operands.append(deeper())
        return operands[0] if len(operands) == 1 else Combination(is_and=is_and, operands=tuple(operands))

    def _factor(self) -> Expression:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise InvalidExpression(f"A label expression nests at most {_DEEPEST} deep.", param="where")
        try:
            if self.kind == "name" and self.token == "not":
                self._advance()
                return Negation(operand=self._factor())
            if self.token == "(" and self.kind == "sign":
                self._advance()
                inner = self._combination(is_and=False)
                self._expect(")")
                return inner
            return self._comparison()
        finally:
            self.depth -= 1

    def _comparison(self) -> Comparison:
        if self.kind != "name" or self.token in ("and", "or", "not"):
            self._refuse("a label's name")
        name = self.token
        self._advance()
        if self.token not in _COMPARISONS:
            self._refuse("one of == != < <= > >=")
        sign = self.token
        self._advance()
        if self.kind not in ("number", "text"):
            self._refuse("a number or a quoted text")
        value: str | float = float(self.token) if self.kind == "number" else self.token[1:-1]
        self._advance()
        return Comparison(name=name, sign=sign, value=value)

    def _expect(self, sign: str) -> None:
        if self.token != sign or self.kind != "sign":
            self._refuse(f"`{sign}`")
        self._advance()

    def _advance(self) -> None:
        if not self.text[self.position :].strip():
            self.kind, self.token, self.position = "end", "", len(self.text)
            return
        found = _TOKEN.match(self.text, self.position)
        if found is None:
            self.kind, self.token = "other", self.text[self.position :].split()[0]
            self._refuse("a name, a comparison or a value")
        self.kind, self.token = found.lastgroup or "", found[found.lastgroup or 0]
        self.position = found.end()

    def _refuse(self, expected: str) -> NoReturn:
        met = f"`{shown(self.token)}`" if self.kind != "end" else "the end"
        raise InvalidExpression(
            f"Expected {expected} but met {met} in the label expression.",
            param="where",
            remedy='Write something like: zone == "home" and gpu_memory_gb >= 16',
        )
