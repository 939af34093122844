"""Links of the site: names of the package lead to the reference, and files of the repository to their pages."""

import functools
import inspect
import posixpath
import re
from collections.abc import Callable, Mapping

import probode


# What holds no names to link, in this order: blocks of code, headings, links, code.
_PARTS = re.compile(
    r"""(?P<block>^[ ]*(?P<fence>`{3,}|~{3,}).*?^[ ]*(?P=fence)[ ]*$)
    |(?P<heading>^\#.*?$)
    |(?P<link>!?\[[^\]]*\][(\[][^)\]]*[)\]])
    |(?<!`)(?P<ticks>`+)(?!`)(?P<code>[^`]+)(?P=ticks)(?!`)""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
_NAME = re.compile(r"(?:probode\.(?:testing\.|plots\.)?)?(\w+(?:\.\w+)?)(?:\([^`]*\))?")
# Other libraries have some of the same names, as SciPy's `solve_bvp`.
_ELSEWHERE = re.compile(r"(?:SciPy|diffrax|probdiffeq|ProbNum\w*(?:\.jl)?)(?:'s)?\s+$", re.IGNORECASE)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def public_names(module: object) -> list[str]:
    """The names that a module offers: those without underscore that are no modules, and no names from elsewhere."""
    package = probode.__name__
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and (module is not probode.plots or getattr(value, "__module__", "") == module.__name__)
        and getattr(value, "__module__", package).startswith(package)
    )


@functools.cache
def targets() -> dict[str, str]:
    """What a name in code refers to: names of the package, and documented methods as `Solution.evaluate`."""
    found = {}
    for module, path in ((probode.testing, "probode.testing"), (probode.plots, "probode.plots"), (probode, "probode")):
        for name in public_names(module):
            # A plain word, as `fit`, is more often a method, or an argument, of something else.
            if name.lower() != name or "_" in name:
                found[name] = f"{path}.{name}"
            value = getattr(module, name)
            if inspect.isclass(value):
                for member, function in vars(value).items():
                    is_shown = not member.startswith("_") and (callable(function) or isinstance(function, property))
                    if is_shown and (getattr(function, "__doc__", None) or ""):
                        found[f"{name}.{member}"] = f"{path}.{name}.{member}"
    return found


def with_names(text: str, of: str = "") -> str:
    """The text in Markdown, in which the first mention of each name of the package is a link to the reference.

    `of`: the name that the text itself is about, which is not linked.
    """
    seen = {of}

    def linked(match: re.Match) -> str:
        name = match["code"] and _NAME.fullmatch(match["code"])
        if not name or name[1] in seen or name[1] not in targets() or _ELSEWHERE.search(text[: match.start()][-40:]):
            return match[0]
        seen.add(name[1])
        return f"[{match[0]}][{targets()[name[1]]}]"

    return _PARTS.sub(linked, text)


def of_repository(text: str, folder: str, page: str, pages: Mapping[str, str]) -> str:
    """The text in Markdown with links to files of the repository turned into links to pages, or into code.

    Pictures of the repository are left out.

    `folder`: that of the file from which the text comes. `page`: where the text goes. `pages`: the page of each file
    that has one, or of a place in it, as `README.md#choosing`.
    """

    def turned(match: re.Match) -> str:
        path, _, anchor = match["target"].partition("#")
        if "://" in match["target"] or not path:
            return match[0]
        file = posixpath.normpath(posixpath.join(folder, path))
        there = pages.get(f"{file}#{anchor}") or (pages.get(file, "") and f"{pages[file]}{anchor and '#'}{anchor}")
        if match["image"]:
            return ""
        if there:
            return f"[{match['text']}]({posixpath.relpath(there, posixpath.dirname(page) or '.')})"
        code = f"`{file}`"
        return code if match["text"].strip("`") in file else f"{match['text']} ({code})"

    return outside_code(text, lambda words: _LINK.sub(turned, words))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with `change` made to what stands outside of its blocks of code."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else change(part) for part in parts)
