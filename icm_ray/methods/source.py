"""What a method's file says of it: its docstring and its parameters, told without torch.

A file is read and not imported, since the methods in it need torch, which takes seconds. Of all its
statements only those run that a signature stands on, such as an import of `Field` or
`Density = Annotated[...]`; a name that comes from another file of ours is looked up there alike.
"""

import ast
import inspect
from collections.abc import Container
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


class Source:
    """One file of ours."""

    def __init__(self, module: str) -> None:
        """Read the file of a module, which is called by its full name."""
        path = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        self.made = {name: one for one in statements for name in _made_by(one)}
        self.values: dict[str, Any] = {}

    def doc(self, function: str) -> str:
        """Return a function's docstring, as `inspect.getdoc` does."""
        return ast.get_docstring(self._function(function)) or ""

    def keywords(self, function: str, *, but: Container[str]) -> dict[str, inspect.Parameter]:
        """Return a function's keyword-only parameters but some, as `inspect.signature` does."""
        given = self._function(function).args
        pairs = zip(given.kwonlyargs, given.kw_defaults, strict=True)
        kept = [(one, default) for one, default in pairs if one.arg not in but]
        bare = ast.parse(f"def {function}(): pass").body[0]
        assert isinstance(bare, ast.FunctionDef)
        bare.args.kwonlyargs = [one for one, _ in kept]
        bare.args.kw_defaults = [default for _, default in kept]
        self._run(bare)
        return dict(inspect.signature(self.values[function]).parameters)

    def value(self, name: str) -> Any:
        """Return what a name of the file stands for."""
        if name not in self.values:
            made = self.made[name]
            if isinstance(made, ast.ImportFrom):
                self.values[name] = _imported(str(made.module), name)
            else:
                self._run(made)
        return self.values[name]

    def _function(self, name: str) -> ast.FunctionDef:
        made = self.made[name]
        assert isinstance(made, ast.FunctionDef)
        return made

    def _run(self, statement: ast.stmt) -> None:
        """Run a statement of the file, after those that make what it reads."""
        names = [part for part in ast.walk(statement) if isinstance(part, ast.Name)]
        for part in names:
            if isinstance(part.ctx, ast.Load) and part.id in self.made:
                self.value(part.id)
        exec(compile(ast.Module([statement], []), __name__, "exec"), self.values)


@cache
def source_of(module: str) -> Source:
    """Return a module's file; each is read once."""
    return Source(module)


def _made_by(statement: ast.stmt) -> list[str]:
    """Return the names that a file's statement makes."""
    if isinstance(statement, ast.ImportFrom):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.FunctionDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _imported(module: str, name: str) -> Any:
    if module.partition(".")[0] == PACKAGE.name:
        return source_of(module).value(name)
    return getattr(import_module(module), name)
