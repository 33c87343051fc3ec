"""What each system's Python has, by typeshed, which mypy brings along; and which uses of it are behind a check.

Knows Python's source; nothing of tinyserve.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

SYSTEMS = ("linux", "darwin", "win32")
_STUBS = "typeshed/stdlib"
_LACKS = {"AttributeError", "ImportError", "ModuleNotFoundError", "Exception"}  # what a name that is missing raises
_LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)


class Use(NamedTuple):
    """A name of the standard library where it stands, and a system that lacks it."""

    line: int
    name: str  # "os.fork", or "fcntl"
    system: str


# --- what there is ----------------------------------------------------------------------------------------------------


@cache
def names_of(module: str, system: str) -> frozenset[str] | None:
    """What a module of the standard library has on a system; None for one that is none, or has nothing there."""
    import mypy

    place = Path(mypy.__file__).parent.joinpath(_STUBS, *module.split("."))
    stub = next((file for file in (place / "__init__.pyi", place.with_suffix(".pyi")) if file.is_file()), None)
    if stub is None:
        return None
    return frozenset(_defined(ast.parse(stub.read_text(encoding="utf-8")).body, system)) or None


def missing_names(module: str, system: str) -> frozenset[str]:
    """What other systems' module has, and this one's lacks."""
    everywhere = [names_of(module, other) or frozenset() for other in SYSTEMS]
    return frozenset().union(*everywhere) - (names_of(module, system) or frozenset())


def _defined(body: Sequence[ast.stmt], system: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.If):
            holds = _holds(node.test, system)
            yield from _defined([] if holds is False else node.body, system)
            yield from _defined([] if holds is True else node.orelse, system)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            yield from (target.id for target in targets if isinstance(target, ast.Name) and target.id != "__all__")
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                if alias.name == "*" and isinstance(node, ast.ImportFrom):
                    yield from names_of(node.module or "", system) or ()
                elif alias.asname == alias.name:  # how a stub says that a name is its own
                    yield alias.name


def _holds(test: ast.expr, system: str) -> bool | None:
    """Whether a condition holds on a system; None where it asks for something else."""
    match test:
        case ast.BoolOp(op=op, values=values):
            told = [_holds(value, system) for value in values]
            decides = isinstance(op, ast.Or)
            return decides if decides in told else None if None in told else not decides
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            told_of_it = _holds(operand, system)
            return None if told_of_it is None else not told_of_it
        case ast.Compare(left=left, ops=[op], comparators=[right]) if ast.unparse(left) == "sys.platform":
            known = ast.literal_eval(right)
            match op:
                case ast.Eq() | ast.In():
                    return system == known or (isinstance(known, tuple) and system in known)
                case _:
                    return system != known and not (isinstance(known, tuple) and system in known)
        case ast.Compare(left=left, ops=[ast.GtE()], comparators=[right]) if ast.unparse(left) == "sys.version_info":
            return sys.version_info >= ast.literal_eval(right)
        case ast.Compare(left=left, ops=[ast.Lt()], comparators=[right]) if ast.unparse(left) == "sys.version_info":
            return sys.version_info < ast.literal_eval(right)
        case ast.Call(func=func, args=[argument]) if ast.unparse(func) == "sys.platform.startswith":
            return system.startswith(ast.literal_eval(argument))
    return None


# --- what is used -----------------------------------------------------------------------------------------------------


def unguarded_uses(source: str) -> list[Use]:
    """The names that some system lacks, where the code would use them there without having asked."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    modules = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    found = list[Use]()
    for node in ast.walk(tree):
        for module, name in _uses(node, modules):
            for system in SYSTEMS:
                here = names_of(module, system)
                elsewhere = any(names_of(module, other) for other in SYSTEMS)
                is_missing = elsewhere and (here is None or name in missing_names(module, system))
                if is_missing and not _is_guarded(node, parents, module, name, system):
                    found.append(Use(node.lineno, f"{module}.{name}" if name else module, system))
    return sorted(set(found))


def _uses(node: ast.AST, modules: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(module, name) for each use of a module's name; (module, "") for its import."""
    match node:
        case ast.Attribute(value=ast.Name(id=alias), attr=name) if alias in modules:
            yield modules[alias], name
        case ast.Call(func=ast.Name(id="getattr"), args=[ast.Name(id=alias), ast.Constant(value=str(name))]):
            if alias in modules:
                yield modules[alias], name
        case ast.Import(names=names):
            yield from ((alias.name, "") for alias in names)
        case ast.ImportFrom(module=str(module), names=names, level=0):
            yield from ((module, alias.name) for alias in names)


def _is_guarded(node: ast.AST, parents: dict[ast.AST, ast.AST], module: str, name: str, system: str) -> bool:
    child = node
    while (parent := parents.get(child)) is not None:
        if isinstance(parent, ast.If | ast.IfExp):
            if child is not parent.test and _excludes(parent, child, module, name, system):
                return True
        elif isinstance(parent, ast.BoolOp):
            goes_on = isinstance(parent.op, ast.And)  # to this operand, where those before it are true
            for one in parent.values[: parent.values.index(child)]:  # type: ignore[arg-type]
                asked = one.operand if isinstance(one, ast.UnaryOp) and isinstance(one.op, ast.Not) else one
                if _holds(one, system) is not goes_on and _holds(one, system) is not None:
                    return True
                if _asks_for(asked, module, name) and (asked is one) is goes_on:
                    return True
        elif isinstance(parent, ast.Try):
            caught = {word.id for one in parent.handlers if one.type for word in _words(one.type)}
            if child in parent.body and (_LACKS & caught or any(one.type is None for one in parent.handlers)):
                return True
        elif isinstance(parent, ast.With):
            items = [item.context_expr for item in parent.items]
            calls = [one for one in items if isinstance(one, ast.Call) and ast.unparse(one.func) == "suppress"]
            if child in parent.body and _LACKS & {word.id for call in calls for word in _words(call)}:
                return True
        if isinstance(child, ast.stmt) and _is_left_before(parent, child, system):
            return True
        child = parent
    return False


def _excludes(parent: ast.If | ast.IfExp, child: ast.AST, module: str, name: str, system: str) -> bool:
    """Whether this branch is not taken on the system."""
    body = parent.body if isinstance(parent.body, list) else [parent.body]
    is_body = child in body
    if _asks_for(parent.test, module, name):
        return is_body
    return _holds(parent.test, system) is (not is_body)


def _asks_for(test: ast.expr, module: str, name: str) -> bool:
    """Whether a condition has `hasattr` of this very name in it."""
    return f"hasattr({module}, '{name}')" in ast.unparse(test)


def _is_left_before(parent: ast.AST, child: ast.stmt, system: str) -> bool:
    """Whether a statement before this one, in the same block, goes elsewhere on the system."""
    for block in (getattr(parent, part, None) for part in ("body", "orelse", "finalbody")):
        if isinstance(block, list) and child in block:
            for one in block[: block.index(child)]:
                if isinstance(one, ast.If) and isinstance(one.body[-1], _LEAVES) and _holds(one.test, system):
                    return True
    return False


def _words(node: ast.expr) -> list[ast.Name]:
    return [one for one in ast.walk(node) if isinstance(one, ast.Name)]
