"""Groups of statements as C functions of their own.

The time of C compilers grows faster than a function. A kernel is therefore written as many small ones, one for each loop
nest (the statements that were fused into one pass over a tile), and a body that calls them. Tiles are passed by the
arena, in which each has a fixed place, so every function knows that they do not overlap and how they are aligned; what
is scalar is passed by value, and returned where the group assigns it.

A function called from several places in a kernel makes the same loop nests for each call. Those that differ in the names
of what they use only are written once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*")

#: what every kernel is handed, by its C type
PROGRAM = {f"{what}_{axis}": "int32_t" for what in ("pid", "grid") for axis in "xyz"}


@dataclass(frozen=True)
class Group:
    """A C function, and the statement that calls it."""

    definition: list[str]
    call: str
    #: the definition without comments, its own name and those of its parameters and variables
    meaning: str


def words(lines: Sequence[str]) -> dict[str, None]:
    """The identifiers of some statements, in the order of their first use; not those in comments and strings."""
    return dict.fromkeys(
        word for line in lines for word in _WORD.findall(_STRING.sub('""', line).split("//", 1)[0])
    )


def indented(lines: Sequence[str]) -> list[str]:
    """The lines of a function's body, indented by their braces."""
    out, depth = [], 1
    for line in lines:
        text = line.strip()
        bare = _STRING.sub("", text)
        out.append("    " * (depth - bare.startswith("}")) + text)
        depth += bare.count("{") - bare.count("}")
    return out


#: names that a loop nest declares in its body
_DECLARED = re.compile(
    r"(?:^|[;{(])\s*(?:const )?(?:long|int|float|double|u?int\d+_t|char|f64|vf) ?\*? ?(?:const )?(\w+)(?= = |\[|;)",
    re.MULTILINE,
)


def _meaning(name: str, definition: Sequence[str], own: Iterable[str]) -> str:
    if any('"' in line for line in definition):
        return "\n".join(definition)  # a text may be about a name
    text = "\n".join(line.split("//", 1)[0] for line in definition)
    numbers = {
        word: f"${i}"
        for i, word in enumerate(dict.fromkeys(words(definition)))
        if word in own or word == name
    }
    return _WORD.sub(lambda found: numbers.get(found[0], found[0]), text)


def _assigned(name: str, text: str) -> bool:
    return (
        re.search(rf"(?<![\w.]){name}\s*(=(?!=)|[-+*/%|&^]=|<<=|>>=|\+\+|--)|(\+\+|--|&){name}\b", text)
        is not None
    )


def group(
    name: str, lines: Sequence[str], scalars: Mapping[str, str], arrays: Mapping[str, str], comment: str
) -> Group:
    """Make a function of `lines`.

    `scalars` gives the C type of each scalar that may be used, `arrays` the declaration of each tile.
    A `return;` among the lines ends the kernel.
    """
    used = words(lines)
    text = "\n".join(lines)
    inputs = [word for word in used if word in scalars]
    outputs = [word for word in inputs if _assigned(word, text)]
    ends = "return;" in text
    by_value = outputs[0] if len(outputs) == 1 and not ends else None
    parameters, arguments = ["char *arena"], ["arena"]
    head: list[str] = [f"    {arrays[word]}" for word in used if word in arrays]
    tail: list[str] = []
    for word in inputs:
        type_ = scalars[word]
        if word in outputs and word != by_value:
            parameters.append(f"{type_} *{word}_at")
            arguments.append(f"&{word}")
            head.append(f"    {type_} {word} = *{word}_at;")
            tail.append(f"    *{word}_at = {word};")
        else:
            type_ = "const char *" if type_ == "char *" and word != by_value else type_
            parameters.append(f"{type_}{'' if type_.endswith('*') else ' '}{word}")
            arguments.append(word)
    call = f"{name}({', '.join(arguments)})"
    if ends:
        lines = [line.replace("return;", "return 1;") for line in lines]
        tail.append("    return 0;")
        call = f"if ({call}) return"
    elif by_value is not None:
        tail.append(f"    return {by_value};")
        call = f"{by_value} = {call}"
    result = "int" if ends else scalars[by_value] if by_value is not None else "void"
    definition = [
        *([f"// {comment}"] if comment else []),
        f"NEST {result} {name}({', '.join(parameters)}) {{",
        *head,
        *indented(lines),
        *tail,
        "}",
        "",
    ]
    own = {*inputs, *(f"{word}_at" for word in outputs), *(word for word in used if word in arrays)}
    own.update(_DECLARED.findall("\n".join(lines)))
    return Group(definition, f"{call};", _meaning(name, definition, own))
