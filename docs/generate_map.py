"""Write the parts of the documentation that come from docstrings of the source, without importing it.

``python docs/generate_map.py`` rewrites the map in architecture.md (folders and files of ``core/``) and
server_api.md (what ``trunkline.core.server.api`` offers to plugins); ``docs/generate.py`` does so, too. A test
compares them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
BEGIN, END = "<!-- The map is written by docs/generate_map.py. -->", "<!-- End of the map. -->"
API = "trunkline.core.server.api"
TOP = {
    "core": "",
    "kernels": "",
    "plugins": "The tasks, one folder per plugin; each imports `core.types`, `core.errors`, `core.hookspecs`, "
    "`core.server.api`, `kernels` and itself, never another plugin.",
    "tests": "Folders as those of the code; `architecture/` tests the project itself, `api/` the HTTP contract on live "
    "servers, `third_party/` plugins from outside.",
    "examples": "Two plugins that are packages of their own, and a script that makes a mixture of experts of a dense "
    "model.",
    "benchmarks": "Measurements against other implementations, the machine's limits, and with and without a feature.",
    "docs": "These pages; `generate.py` and `generate_map.py` write those that come from the source.",
}
# The modules whose names are exported, by heading.
GROUPS = {
    "Bodies, replies and errors": ("bodies", "body_limits"),
    "Fields of bodies": ("fields", "body_schemas"),
    "Inputs": ("inputs", "prepare", "slices", "truncate"),
    "Chat prompts": ("chat_messages", "chat_prompts", "chat_templates"),
    "Models": ("models", "per_model"),
    "Waiting and streams": ("gather", "streams"),
    "Schemas for `opt`": ("reply_schemas", "media_types"),
}

SERVER_API = """# Server functions for routes

`{api}` is the part of the server that plugins may import; the project's own routes use
nothing else. [Plugins](plugins.md) has an example. A `RequestError` is sent to the client; routes
needn't catch it.

## What a route declares

A handler's `opt` has these keys; only `scope` is required.

* `scope`: who may call the route, `"public"`, `"infer"` or `"admin"` ([keys](operations.md#keys)).
* `dialect`: the format of errors, `"openai"` or `"native"` (the default).
* `body`: the Struct that `read_body` reads. A field that clients send and the route doesn't support is declared
  `Annotated[Any, Refused()]` (a 400 when its value requests something) or `Annotated[Any, Ignored("why")]`.
* `body_required`: False if the body may be missing; default True.
* `raw_body`: in place of `body`, the media type of a body that isn't JSON.
* `query`: a Struct with the query parameters.
* `replies`: a type for JSON with status 200, several in a tuple, or types by status and media type,
  `{{200: {{JSON: Shout, SSE: Shout}}, 409: {{TEXT: str}}, 204: None}}` (of an event stream, the type of an event's
  data; None for an empty body). Errors that are common to all routes are added.
* `reply_headers`: headers by status, with descriptions: `{{200: {{"X-Loud": "How loud."}}}}`.
* `replicas`: how replies are merged where a front has several engine replicas, see below.

`/openapi.json` is made from them.

## Replies of several engine replicas

On one machine there is one engine, and `replicas` has no effect. Where the front has several engine replicas, a handler
runs once for each of them, at the same time, and the front merges the replies:

* `"first"`: the first replica's reply if the status of all is below 400, else the first error, with the replica's name
  in the header `X-Replica`.
* `"all"`: `[{{"replica": "…", "status": 200, "reply": …}}]`. A reply is JSON, or a string if it is text, or null if it
  is empty. The status of the whole is 200, or the highest error.
* `"sum"`: the numbers in JSON replies of the same shape are added up; texts, booleans and null are those of the first
  replica. Errors as for `"first"`; 500 if the shapes differ.
* a function `(list[ReplicaReply]) -> Response`; a `ReplicaReply` has `replica`, `status`, `headers`, `body`, `ok`
  (status below 400) and `json()`.
* `"once"`: the handler runs once, in the front.

The default is `"all"` for the scope `"admin"`, else `"once"`. Start-up fails for other values. All runs get the same
body, which is held in memory. Routes with bodies that are too large for that must declare `"once"`, and so must routes
that stream their replies: otherwise the reply is a 501 that says so.

While a handler runs for a replica, `engine.models` and `engine.call` are about that replica only. In a handler that
runs once, `engine.call` runs the control on every replica, and when all have answered it returns the first one's answer
or raises the first error. Two functions of `trunkline.core.types` choose: in the block `with on_replica(name):`, the
engine means that replica; `await on_each_replica(engine, work)` awaits `work()` for each, and returns a dict from names
to results. `engine.replicas` has the names, none on one machine: then `work()` is awaited once, and the dict has one
entry, "".

{groups}
"""


def architecture() -> str:
    """The text of architecture.md with the map as it should be."""
    page = (DOCS / "architecture.md").read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{source_map()}\n\n{END}{after}"


def server_api() -> str:
    """The text of server_api.md."""
    found: dict[str, list[str]] = {}
    for name, module in exports():
        [group] = [title for title, stems in GROUPS.items() if module.stem in stems]
        found.setdefault(group, []).append(_entry(name, module))
    groups = [f"## {title}\n\n" + "\n".join(found[title]) for title in GROUPS]
    return SERVER_API.format(api=API, groups="\n\n".join(groups))


def source_map() -> str:
    """Every folder in one sentence, every file of core in half a sentence."""
    lines = ["| folder | what |", "| --- | --- |"]
    for top, about in TOP.items():
        lines.append(f"| `{top}/` | {about or _about(ROOT / top / '__init__.py')} |")
        lines += [f"| `{_path(folder)}/` | {_about(folder / '__init__.py')} |" for folder in _folders(ROOT / top)]
    core = ROOT / "core"
    for folder in (core, *_folders(core)):
        files = [file for file in sorted(folder.glob("*.py")) if file.name != "__init__.py"]
        entries = [f"* `{file.name}`: {_about(file).removesuffix('.')}" for file in files]
        lines += ["", f"**`{_path(folder)}/`**", "", *entries]
    return "\n".join(lines)


def exports() -> Iterator[tuple[str, Path]]:
    """(name, the file that defines it) of all that ``core.server.api`` exports."""
    package = ROOT / "core" / "server" / "api"
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            parts = (node.module or "").removeprefix("trunkline.").split(".")
            module = (package if node.level else ROOT).joinpath(*parts).with_suffix(".py")
            yield from ((alias.name, module) for alias in node.names)


def documentation(name: str, module: Path) -> tuple[str, str]:
    """A module-level name as its definition shows it, and its docstring: for values, the string after it."""
    body = ast.parse(module.read_text()).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            keyword = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            return f"{keyword}{name}({ast.unparse(node.args)}){returns}", ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and node.name == name:
            return name, ast.get_docstring(node) or ""
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = after.value if isinstance(after, ast.Expr) else None
            return name, str(value.value) if isinstance(value, ast.Constant) else ""
    raise LookupError(f"{name} isn't defined in {module}")


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring as Markdown."""
    text = " ".join(docstring.split("\n\n")[0].split())
    text = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", text.replace("``", "`"))
    found = re.match(r".*?[.?!](?=\s|$)", text)
    return (found.group() if found else text).removesuffix("::")


def _entry(name: str, module: Path) -> str:
    shown, docstring = documentation(name, module)
    return f"* `{shown}`: {first_sentence(docstring)}"


def _about(file: Path) -> str:
    return first_sentence(ast.get_docstring(ast.parse(file.read_text())) or "").replace("|", "\\|")


def _folders(folder: Path) -> list[Path]:
    """The packages below a folder, each before those inside it."""
    return (
        sorted(file.parent for file in folder.rglob("*/__init__.py"))
        if folder.name in ("core", "kernels", "plugins")
        else []
    )


def _path(folder: Path) -> str:
    return folder.relative_to(ROOT).as_posix()


def write() -> None:
    """Rewrite the pages."""
    for name, text in (("architecture.md", architecture()), ("server_api.md", server_api())):
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    write()
