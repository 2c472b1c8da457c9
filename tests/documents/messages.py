"""The messages of all errors that the package raises, read from its source: each as a template with ‹places›."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"mbf": ROOT / "mbf", "mbf.kernels": ROOT / "kernels"}
BUILT_IN = ("ValueError", "TypeError", "RuntimeError", "ImportError", "OSError")
OTHERS = ("BadParameter", "ArgumentTypeError")
AS_IT_IS = ("list", "tuple", "type", "repr", "str", "sorted")  # calls that only change how a value looks
MOST_VARIANTS = 6  # of one message, by the values that a name in it may have

Scope = dict[str, list[ast.expr]]


@dataclass(frozen=True)
class Message:
    """One message of an error.

    Attributes:
        module: the module that has it, such as "mbf.run.config".
        line: where the error is made.
        error: name of its class.
        text: the template; None where the message is that of another error, passed on.
        source: the expression in the code.
    """

    module: str
    line: int
    error: str
    text: str | None
    source: str


def messages() -> list[Message]:
    """Of every call in the sources that makes an error, by module and line."""
    found = []
    for module, tree in trees().items():
        own = _classes()
        for scope, call in _calls(tree):
            name = _name(call.func)
            if not (name in BUILT_IN or name in OTHERS or name in own) or name.startswith("_"):
                continue
            if not call.args:
                continue
            texts = Reader(module, scope).read(call.args[0])
            found += [Message(module, call.lineno, name, text, ast.unparse(call.args[0])) for text in texts or [None]]
    return sorted(found, key=lambda one: (one.module, one.line, one.text or ""))


@cache
def trees() -> dict[str, ast.Module]:
    """The parsed modules of the package by name."""
    found = {}
    for package, folder in SOURCES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


@cache
def _classes() -> dict[str, str]:
    """The package's own classes of errors: name → docstring."""
    classes = [node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {one.name: ast.get_docstring(one) or "" for one in classes if one.name.endswith("Error")}


def described() -> dict[str, str]:
    """The first sentence of what each of the package's own errors says of itself."""
    return {name: " ".join(text.split()) for name, text in _classes().items()}


def _calls(tree: ast.Module) -> Iterator[tuple[list[Scope], ast.Call]]:
    """Every call with the names that were assigned around it, the outermost first."""

    def walk(node: ast.AST, scopes: list[Scope]) -> Iterator[tuple[list[Scope], ast.Call]]:
        for child in ast.iter_child_nodes(node):
            inside = [*scopes, _assigned(child)] if isinstance(child, ast.FunctionDef) else scopes
            if isinstance(child, ast.Call):
                yield inside, child
            yield from walk(child, inside)

    yield from walk(tree, [_assigned(tree)])


def _assigned(body: ast.AST) -> Scope:
    """Names → what is assigned to them in a module or function, not in the functions within it."""
    found: Scope = {}
    if isinstance(body, ast.FunctionDef):  # what a parameter is where no call says otherwise
        named = [*body.args.posonlyargs, *body.args.args]
        last = named[len(named) - len(body.args.defaults) :]
        pairs = [*zip(last, body.args.defaults, strict=True)]
        pairs += [(arg, value) for arg, value in zip(body.args.kwonlyargs, body.args.kw_defaults, strict=True) if value]
        found = {arg.arg: [value] for arg, value in pairs if isinstance(value, ast.Name)}
    nodes = list(ast.iter_child_nodes(body))
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for one, value in zip(target.elts, node.value.elts, strict=False):
                        if isinstance(one, ast.Name):
                            found.setdefault(one.id, []).append(value)
        elif (
            isinstance(node, ast.NamedExpr | ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.value is not None
        ):
            found.setdefault(node.target.id, []).append(node.value)
        nodes += ast.iter_child_nodes(node)
    return found


def _name(function: ast.expr) -> str:
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


class Reader:
    """Renders expressions of text as templates.

    A name stands for each text that is assigned to it in the function, the module, or the module it is imported from;
    whatever is known at run time only becomes a ‹place›.
    """

    def __init__(self, module: str, scopes: list[Scope]) -> None:
        self._module, self._scopes = module, scopes

    def read(self, node: ast.expr) -> list[str] | None:
        """The variants of a message; None where it is no text of ours."""
        if isinstance(node, ast.Constant):
            return [str(node.value)] if isinstance(node.value, str) else None
        if isinstance(node, ast.JoinedStr):
            return self._product([self._piece(part) for part in node.values])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._product([self._or_place(node.left), self._or_place(node.right)])
        if isinstance(node, ast.IfExp):
            return [*self._or_place(node.body), *self._or_place(node.orelse)]
        if isinstance(node, ast.Name):
            return self._assigned(node.id)
        if isinstance(node, ast.Call) and _name(node.func) == "format" and isinstance(node.func, ast.Attribute):
            templates = self.read(node.func.value)
            return None if templates is None else [re.sub(r"\{\w*\}", "‹name›", text) for text in templates]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._returned(node.func.id)
        return None

    def _returned(self, name: str) -> list[str] | None:
        """The texts that a function of the module returns, where it says what is wrong, or None."""
        for function in trees()[self._module].body:
            if (
                isinstance(function, ast.FunctionDef)
                and function.name == name
                and function.returns is not None
                and ast.unparse(function.returns) == "str | None"
            ):
                inner = Reader(self._module, [self._scopes[0], _assigned(function)])
                values = [one.value for one in ast.walk(function) if isinstance(one, ast.Return) and one.value]
                texts = [inner.read(one) for one in values if not (isinstance(one, ast.Constant) and one.value is None)]
                return [text for one in texts for text in one] if texts and None not in texts else None
        return None

    def _product(self, pieces: list[list[str]]) -> list[str]:
        found = ["".join(parts) for parts in itertools.islice(itertools.product(*pieces), MOST_VARIANTS + 1)]
        if len(found) <= MOST_VARIANTS:
            return found
        return ["".join(piece[0] if len(piece) == 1 else "‹…›" for piece in pieces)]

    def _piece(self, part: ast.expr) -> list[str]:
        if isinstance(part, ast.FormattedValue):
            plain = part.conversion == -1 and part.format_spec is None
            return self._or_place(part.value) if plain else [_place(part.value)]
        return self._or_place(part)

    def _or_place(self, node: ast.expr) -> list[str]:
        return self.read(node) or [_place(node)]

    def _assigned(self, name: str, module: str | None = None) -> list[str] | None:
        scopes = self._scopes if module is None else [_assigned(trees()[module])]
        for scope in reversed(scopes):
            if name in scope:
                inner = Reader(module or self._module, scopes)
                texts = [inner.read(value) for value in scope[name] if not _mentions(value, name)]
                return [text for one in texts for text in one] if texts and None not in texts else None
        for node in ast.walk(trees()[module or self._module]):
            if isinstance(node, ast.ImportFrom) and node.module in trees():
                for alias in node.names:
                    if (alias.asname or alias.name) == name and node.module != module:
                        return self._assigned(alias.name, node.module)
        return None


def _mentions(node: ast.expr, name: str) -> bool:
    return any(isinstance(one, ast.Name) and one.id == name for one in ast.walk(node))


def _place(node: ast.expr) -> str:
    """A value known at run time, by the last word that the code has for it."""
    if isinstance(node, ast.Name):
        word = node.id
    elif isinstance(node, ast.Attribute):
        word = node.attr
    elif (
        isinstance(node, ast.Call)
        and node.args
        and _name(node.func) in ("list", "tuple", "type", "repr", "str", "sorted")
    ):
        return _place(node.args[0])
    elif isinstance(node, ast.Subscript):
        return _place(node.value)
    else:
        return "‹…›"
    return f"‹{word.strip('_')}›"


def native_messages() -> list[str]:
    """The messages of the C++ operators, as templates."""
    found = set()
    for file in sorted((ROOT / "csrc").rglob("*")):
        if file.suffix in (".cpp", ".h", ".cu", ".cuh") and "emulation" not in file.parts:
            text = re.sub(r"//[^\n]*", "", file.read_text(encoding="utf-8"))
            for match in re.finditer(r"\b(?:STD_TORCH_CHECK|refuse)\(", text):
                arguments = _split(text, match.end())
                if len(arguments) > 1 and '"' in "".join(arguments[1:]):
                    pieces = ["‹op›: ‹argument› "] if match[0].startswith("refuse") else []
                    pieces += [piece for one in arguments[1:] for piece in _cpp_pieces(one)]
                    found.add("".join(pieces))
    return sorted(found)


def _split(text: str, start: int) -> list[str]:
    """The arguments of a C++ call whose parenthesis opened just before ``start``."""
    depth, quoted, begin, found = 1, False, start, []
    for at in range(start, len(text)):
        character = text[at]
        if character == '"' and text[at - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 or (depth == 1 and character == ","):
            found.append(text[begin:at])
            begin = at + 1
        if depth == 0:
            return found
    return found


def _cpp_pieces(argument: str) -> Iterator[str]:
    """Literals as they are, anything between them as one place."""
    for literal, other in re.findall(r'"((?:[^"\\]|\\.)*)"|([^"]+)', argument):
        if literal:
            yield literal.replace('\\"', '"')
        elif re.search(r"\w", other):
            yield "‹…›"
