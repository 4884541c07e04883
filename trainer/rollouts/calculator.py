"""Arithmetic as text: numbers, + - * / and brackets, exactly, and nothing else. No Python is ever evaluated."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

LONGEST = 100  # characters of an expression: bounds the depth and the size of every number in it
_OPERATORS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculate(expression: str) -> str:
    """The value: an integer, or a decimal of at most 6 places; "error" for what is no arithmetic."""
    if len(expression) > LONGEST:
        return "error"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        whole = value.denominator == 1
        return str(value.numerator) if whole else f"{float(value):.6f}".rstrip("0").rstrip(".")
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError("not arithmetic")
