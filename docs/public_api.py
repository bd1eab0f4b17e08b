"""Sphinx directive `{api}`: public names with signature and docstring, read from the source without importing it.

    ```{api} train, QuantConfig, mecdeploy.training.loop.TrainResult
    ```

A name of `mecdeploy.__all__`, or a full path. Each field of a docstring becomes a paragraph.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import mecdeploy

Definition = ast.FunctionDef | ast.ClassDef


class Api(SphinxDirective):
    """Documents the names in its argument."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Nodes of all names; one that is not defined is an error of the page."""
        found: list[nodes.Node] = []
        for name in re.split(r"[,\s]+", self.arguments[0].strip(", ")):
            try:
                path, node = definition(home_of(name))
            except LookupError as error:
                raise self.error(str(error.args[0])) from None
            self.env.note_dependency(str(path))
            prefix = "" if "." in name else "mecdeploy."
            found += self.parse_text_to_nodes("\n".join(described(node, prefix + name)))
        return found


def home_of(name: str) -> str:
    """Full path of a name of the front door; a full path as it is."""
    if "." in name:
        return name
    homes = {public: home for home, names in mecdeploy._HOMES.items() for public in names}
    homes["export"] = "mecdeploy.api"  # the room and the verb share a name
    if name not in homes:
        raise LookupError(f"mecdeploy has no public {name}.")
    return f"{homes[name]}.{name}"


def definition(path: str) -> tuple[Path, Definition]:
    """The file and the syntax tree of the function or class at this path, through imports."""
    module, _, name = path.rpartition(".")
    file = source_of(module)
    for node in ast.walk(parsed(file)):
        if isinstance(node, Definition) and node.name == name and not overload(node):
            return file, node
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names] and node.module:
            return definition(f"{node.module}.{name}")
    raise LookupError(f"{module} defines no {name}.")


def source_of(module: str) -> Path:
    """Where a module's text is: in a checkout the rooms lie beside the package."""
    for base in mecdeploy.__path__:
        path = Path(base, *module.split(".")[1:])
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
    raise LookupError(f"there is no module {module}.")


@cache
def parsed(file: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(file.read_text(encoding="utf-8"))


def described(node: Definition, name: str) -> list[str]:
    """MyST: a directive of Sphinx's Python domain; a class with its public methods inside."""
    if isinstance(node, ast.FunctionDef):
        return directive("py:function", name + arguments(node), paragraphs(node), ticks=3)
    inner = paragraphs(node)
    for method in node.body:
        public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and not overload(method)
        if public and ast.get_docstring(method):
            kinds = {decorator.id for decorator in method.decorator_list if isinstance(decorator, ast.Name)}
            kind = "property" if "property" in kinds else "classmethod" if "classmethod" in kinds else "method"
            signature = method.name + ("" if kind == "property" else arguments(method, bound=True))
            option = [":classmethod:", ""] if kind == "classmethod" else []
            kind = kind.replace("classmethod", "method")
            inner += directive(f"py:{kind}", signature, option + paragraphs(method), ticks=3)
    return directive("py:class", name + fields(node), inner, ticks=4)


def directive(kind: str, signature: str, content: list[str], *, ticks: int) -> list[str]:
    """A fenced directive."""
    return [f"{'`' * ticks}{{{kind}}} {signature}", *content, "`" * ticks, ""]


def arguments(node: ast.FunctionDef, *, bound: bool = False) -> str:
    """(a: int, *, b: str = "x") -> float; without the first for a method."""
    every = ast.unparse(node.args)
    if bound:
        every = re.sub(r"^\w+(, )?", "", every)
    return f"({every})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def fields(node: ast.ClassDef) -> str:
    """What a dataclass is made of; nothing for other classes, which the API makes itself."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return ""
    written = []
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            value = f" = {default(field.value)}" if field.value is not None else ""
            written.append(f"{field.target.id}: {ast.unparse(field.annotation)}{value}")
    return f"({', '.join(['*', *written])})"


def default(value: ast.expr) -> str:
    """What a field is if it is not given: a factory as its call."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        (factory,) = [keyword.value for keyword in value.keywords if keyword.arg == "default_factory"]
        return f"{ast.unparse(factory)}()"
    return ast.unparse(value)


def paragraphs(node: Definition) -> list[str]:
    """The docstring as Markdown: `field: what it is` and `Raises ...` begin a paragraph, pages are linked."""
    parts = [name for part in ast.walk(node) for name in named(part)]
    field = rf"(?:{'|'.join(parts)})" if parts else r"(?!)"
    text = (ast.get_docstring(node) or "").replace("*", r"\*")
    text = re.sub(rf"(?:^|(?<=\. ))({field}(?:, {field})*): ", r"\n\n**\1**: ", text, flags=re.MULTILINE)
    text = re.sub(r"(?:^|(?<=\. ))(?=Raises )", r"\n\n", text, flags=re.MULTILINE)
    return re.sub(r"\bdocs/([\w-]+)\.md", r"[\1](/\1.md)", text).splitlines()


def named(part: ast.AST) -> list[str]:
    """What a docstring explains by name: an argument, or a field of a dataclass."""
    if isinstance(part, ast.arg):
        return [part.arg]
    return [part.target.id] if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) else []


def overload(node: Definition) -> bool:
    """Whether it is one spelling of several, without a docstring of its own."""
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("api", Api)
    return {"parallel_read_safe": True}
