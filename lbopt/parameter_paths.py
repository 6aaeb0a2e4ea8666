"""Parameters selected by regular expressions on their paths."""

import re
from typing import Any, NamedTuple

from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from lbopt._typing import Params


class Matching(NamedTuple):
    """Selects the parameters in whose paths a regular expression is found.

    Attributes:
      argument: name of the argument that the expression was passed as.
      expression: the expression; None matches nothing.
    """

    argument: str
    expression: re.Pattern | None

    def __call__(self, path: Any) -> bool:
        """Whether the expression is found in a path of ``jax.tree_util``."""
        return self.expression is not None and bool(
            self.expression.search(_named(path))
        )

    def inverted(self, params: Params) -> Any:
        """An optax mask of all parameters that do not match."""
        self.require(params)
        return tree_map_with_path(lambda path, _: not self(path), params)

    def require(self, params: Params) -> None:
        """Raises ValueError if the expression matches no parameter."""
        # A misspelt name would otherwise change nothing, silently.
        paths = [path for path, _ in tree_leaves_with_path(params)]
        if self.expression is None or any(map(self, paths)):
            return
        # A few paths show how they are written; a large model has thousands.
        shown = ", ".join(_named(path) for path in paths[:5])
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        raise ValueError(
            f"{self.argument}={self.expression.pattern!r} is found in no path of the "
            f"parameters ({shown}{more}); correct it, or pass {self.argument}=None"
        )


def matching(argument: str, expression: str | None) -> Matching:
    """Compiles the regular expression that was passed as an argument.

    Args:
      argument: the argument's name, for messages.
      expression: a regular expression to search for in the paths of parameters, such as
        ``"Conv_0/kernel"``; None matches nothing.

    Returns:
      A function that tells whether a path matches.

    Raises:
      ValueError: if ``expression`` is not a valid regular expression.
    """
    if expression is None:
        return Matching(argument, None)
    try:
        return Matching(argument, re.compile(expression))
    except re.error as error:
        raise ValueError(
            f"{argument}={expression!r} must be a regular expression: {error}"
        ) from error


def _named(path: Any) -> str:
    # Slashes, as layers are named: "Conv_0/kernel" instead of "['Conv_0']['kernel']".
    return keystr(path, simple=True, separator="/")
