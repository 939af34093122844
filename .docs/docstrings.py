"""How docstrings are read for the reference: doctests become blocks of code, and names of the package become links."""

import dataclasses
import inspect
import re
from typing import Any

import equinox as eqx
import griffe
import links


_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.VAR_POSITIONAL: griffe.ParameterKind.var_positional,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
    inspect.Parameter.VAR_KEYWORD: griffe.ParameterKind.var_keyword,
}
# What solves and fits return, and nobody makes: of these the fields are listed, and no arguments are shown.
_RETURNED = {
    "AdaptiveState",
    "Attempt",
    "CalibrationReport",
    "CheckReport",
    "Finding",
    "Fit",
    "Marginal",
    "Occurrences",
    "Posterior",
    "Solution",
    "State",
    "Transformed",
}


class Docstrings(griffe.Extension):
    """The extension that mkdocstrings loads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value, obj.name)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Write defaults that are constants of a module, as `_RTOL`, as their values."""
        for parameter in func.parameters:
            if re.fullmatch(r"_[A-Z_]+", str(parameter.default)):
                parameter.default = repr(griffe.dynamic_import(f"{func.module.path}.{parameter.default}"))

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Give a class the arguments that its fields make, where no `__init__` is written down."""
        if "__init__" in cls.members or cls.name in _RETURNED or cls.name.startswith("_"):
            return
        value = griffe.dynamic_import(cls.path)
        if not dataclasses.is_dataclass(value) or issubclass(value, eqx.Enumeration) or inspect.isabstract(value):
            return
        parameters = [
            griffe.Parameter(name, kind=_KINDS[parameter.kind], default=_default(parameter))
            for name, parameter in inspect.signature(value.__init__).parameters.items()
        ]
        init = griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls)
        cls.set_member("__init__", init)


def as_markdown(text: str, name: str) -> str:
    """A docstring with its doctests in blocks of code, and with links to the reference."""
    return links.with_names(_DOCTEST.sub(lambda match: f"``` {{ .pycon .no-copy }}\n{match[0]}\n```", text), of=name)


def _default(parameter):
    if parameter.default is inspect.Parameter.empty:
        return None
    return getattr(parameter.default, "__name__", None) or repr(parameter.default)
