"""The fields of a declaration, as the code describes them."""

import ast
import inspect

from effattn.tolerances import numerics


def render() -> str:
    """One row a field of `Numerics`."""
    return "\n".join(rows(numerics.Numerics))


def rows(cls: type) -> list[str]:
    """Name, default and the comment above, of each field of a dataclass that has one."""
    source = inspect.getsource(cls)
    lines = source.splitlines()
    found = ["| field | default | meaning |", "|---|---|---|"]
    for node in ast.parse(source).body[0].body:  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        comment: list[str] = []
        at = node.lineno - 2
        while lines[at].strip().startswith("#:"):
            comment.insert(0, lines[at].strip().removeprefix("#:").strip())
            at -= 1
        if comment:
            default = (
                ""
                if node.value is None
                else f"`{ast.unparse(node.value)}`".replace("cast(int, None)", "None")
            )
            text = " ".join(comment).replace("|", "\\|")
            found.append(f"| `{node.target.id}` | {default} | {text} |")
    return found
