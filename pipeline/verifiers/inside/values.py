"""Plain values across a process boundary: JSON in which Python's types stay apart.

A tuple is not a list and `True` is not `1` on the other side; what is no plain value does not cross.
Subclasses of plain types arrive as the plain type, so an object that overrides `__eq__` arrives
without it. This text also runs inside the sandbox, where importing json would cost as much as starting Python:
it uses json's own scanner and text encoder in C without the package around them.
"""

from __future__ import annotations

from typing import Any

try:
    from _json import encode_basestring_ascii, make_scanner
except ImportError:  # another Python than CPython
    from json.encoder import encode_basestring_ascii
    from json.scanner import make_scanner

MAX_INTEGER_BITS = 1 << 20
_PLAIN_INTEGER_BITS = 256


class CantCross(TypeError):
    """The value has a type that does not cross the boundary."""


class _Context:
    """What the scanner asks its decoder for."""

    strict = False
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float
    memo: dict[str, str] = {}  # noqa: RUF012  (unused by the scanner in C)


_scan = make_scanner(_Context())  # type: ignore[arg-type]


def dumps(value: Any) -> str:
    """The value as text. Raises CantCross for anything but plain values (nested too deeply included)."""
    parts: list[str] = []
    try:
        _write(encode(value), parts)
    except RecursionError:
        raise CantCross("a value nested too deeply") from None
    return "".join(parts)


def _write(tree: Any, parts: list[str]) -> None:
    """JSON of what `encode` returned."""
    if isinstance(tree, str):
        parts.append(encode_basestring_ascii(tree))
    elif tree is None or tree is True or tree is False:
        parts.append({None: "null", True: "true", False: "false"}[tree])
    elif isinstance(tree, list):
        parts.append("[")
        for place, item in enumerate(tree):
            if place:
                parts.append(",")
            _write(item, parts)
        parts.append("]")
    elif isinstance(tree, dict):
        [(tag, body)] = tree.items()
        parts.append(f'{{"{tag}":')
        _write(body, parts)
        parts.append("}")
    else:
        parts.append(repr(tree))


def loads(text: str) -> Any:
    """Inverse of `dumps`; only plain values are ever made. Raises CantCross for any other text."""
    try:
        tree, end = _scan(text, 0)
        if end != len(text):
            raise CantCross("unreadable value (more than one)")
        return decode(tree)
    except CantCross:
        raise
    except (StopIteration, ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise CantCross(f"unreadable value ({type(error).__name__})") from None


def encode(value: Any) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        bits = value.bit_length()
        if bits > MAX_INTEGER_BITS:
            raise CantCross("an integer of more than a million bits")
        return value if bits <= _PLAIN_INTEGER_BITS else {"i": hex(value)}
    if kind is float:
        return value if value - value == 0 else {"f": repr(value)}
    if kind is list:
        return [encode(item) for item in value]
    if kind is tuple:
        return {"t": [encode(item) for item in value]}
    if kind is dict:
        return {"d": [[encode(key), encode(item)] for key, item in value.items()]}
    if kind is set or kind is frozenset:
        return {"s" if kind is set else "z": [encode(item) for item in value]}
    if kind is bytes or kind is bytearray:
        return {"b": value.hex()}
    if kind is complex:
        return {"c": [encode(value.real), encode(value.imag)]}
    if kind is range:
        return {"r": [value.start, value.stop, value.step]}
    return _encode_other(value)


def _encode_other(value: Any) -> Any:
    """Subclasses by their base's own methods; iterators by what they yield."""
    if isinstance(value, int):
        return encode(int.__add__(value, 0))
    if isinstance(value, float):
        return encode(float.__add__(value, 0.0))
    if isinstance(value, str):
        return str.__str__(value) if type(str.__str__(value)) is str else "".join(str.__iter__(value))
    if isinstance(value, list):
        return [encode(item) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"t": [encode(item) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"d": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    module, name = type(value).__module__, type(value).__qualname__
    if module == "builtins" and hasattr(type(value), "__next__"):
        return {"n": [encode(item) for item in value]}
    if module == "builtins" and name in ("dict_keys", "dict_values", "dict_items"):
        return {"n": [encode(item) for item in value]}
    raise CantCross(f"a value of type {name!s:.60}")


def decode(tree: Any) -> Any:
    if isinstance(tree, list):
        return [decode(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) != 1:
        raise CantCross("unreadable value (tag)")
    [(tag, body)] = tree.items()
    if tag == "i":
        return int(body, 16)
    if tag == "f":
        return float(body)
    if tag == "b":
        return bytes.fromhex(body)
    if tag == "c":
        return complex(decode(body[0]), decode(body[1]))
    if tag == "r":
        return range(body[0], body[1], body[2])
    if tag == "d":
        return {decode(key): decode(item) for key, item in body}
    items = [decode(item) for item in body]
    makers: dict[str, Any] = {"t": tuple, "s": set, "z": frozenset, "n": iter}
    if tag not in makers:
        raise CantCross("unreadable value (tag)")
    return makers[tag](items)
