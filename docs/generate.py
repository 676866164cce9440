"""Write the parts of the documentation that come from the source.

``python docs/generate.py`` rewrites plugins.md (hooks from ``core/hookspecs.py`` and ``plugins/generation/hooks.py``,
files of ``examples/``), configuration.md (settings from their structs), fields.md (fields of request bodies
from theirs) and the pages of the other ``docs/generate_*.py``; tests compare them.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from msgspec import Struct

from trunkline.core import hookspecs
from trunkline.core.commands import compat
from trunkline.core.commands.flags import flags_of
from trunkline.core.commands.plugins import NoEngine
from trunkline.core.config import Config, settings_groups
from trunkline.core.discovery import find
from trunkline.core.host import Host
from trunkline.core.server.api.fields import Ignored, Refused, fields_of
from trunkline.core.server.lifecycle import Lifecycle
from trunkline.core.server.routes import routes
from trunkline.core.server.routes.weights import weight_routes
from trunkline.core.settings import ModelSettings
from trunkline.core.types import SettingsGroup
from trunkline.plugins.generation import hooks as generation_hooks
from trunkline.plugins.generation.sampling import checks

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
EXAMPLE = EXAMPLES / "trunkline-surprise"
SPECIFICATIONS = (hookspecs, generation_hooks)  # core's hooks, and those of the project's own plugins
WHERE = ("Front", "Engine", "Update")

PLUGINS = """# Plugins

A plugin adds a task, a route, a command, a model source, or any mix of them, without changing a
file of core. The project's own tasks are plugins and use the same interfaces.

```console
$ trunkline plugins list               # what is installed, and what was left out and why
$ trunkline plugins inspect NAME       # hooks, settings, routes with their scopes, controls
$ trunkline serve --plugin NAME        # load only NAME and core's own
$ trunkline serve --no-plugin NAME     # load all but NAME
```

Installed plugins load by default. One that can't be imported, or that implements a hook which
doesn't exist, is left out with a warning; it stops the start only when `--plugin` asked for it.

While requests are served, an exception of a plugin, or a return value that its contract doesn't
allow, ends the request that it was called for with a 500; the log line names plugin, distribution and
method ([operations](operations.md#a-plugin-that-fails)). A `RequestError` is sent to the client. Observers of
requests and collectors of metrics end no request: their failures are logged and counted.

A plugin may import `trunkline.core.types`, `trunkline.core.errors`, `trunkline.core.hookspecs`,
`trunkline.core.server.api` ([contents](server_api.md)) and `trunkline.kernels`, and its tests also
`trunkline.core.testing` and `trunkline.core.Engine` ([tests](#testing-a-plugin)); everything else may change without
notice.

## A whole plugin

`examples/trunkline-surprise` is a package of its own: a task that computes how many bits a model needs
per token of a text. Install it with `pip install ./examples/trunkline-surprise`.

It is a plugin because of its entry point:

{pyproject}

Its hooks. The module is imported by `trunkline --help`, so heavy libraries are imported inside functions:

{hooks}

Its code in the engine. Requests of different tasks share forward passes; the stage says which
hidden rows it needs and computes results from them:

{stage}

Its route in the front process:

{routes}

## Testing a plugin

`trunkline.core.testing` has tiny checkpoints of real architectures, which are built in a second, without downloads.
As a pytest plugin (`pytest -p trunkline.core.testing`, or `pytest_plugins = ["trunkline.core.testing"]` in the root
folder's `conftest.py`) it has the fixture `zoo`, a function from the name of a checkpoint to a local folder.
`trunkline.core.Engine` runs the stages of installed plugins without HTTP:

{test}

| names of checkpoints | models |
| --- | --- |
| `trunkline.core.testing.ZOO` | causal language models |
| `ENCODERS`, `DECODERS` | base models, bidirectional and causal |
| `SCORERS` | sequence classification |

`build_checkpoint(name, folder, **config)` writes one of them with other values in its config.

From Python, without HTTP, `Engine.submit` takes requests of every task; `prompt` is text or token ids, and the params
are those of the stage. `Engine.submit_all` takes several `Submission`s, which are batched from the first pass on:

```python
from trunkline.core import Engine
from trunkline_surprise.stage import SurpriseParams

with Engine("demo:smollm2-135m-instruct") as engine:
    ticket = engine.submit("surprise", "The capital of France is", SurpriseParams())
    reply = ticket.result(timeout=60)  # raises the request's error
    print(reply.data["bits"])
    ticket.cancel()  # aborts a request that hasn't ended
```

A `Ticket` also has `done` and `reply` (a `core.types.Reply`, which is updated while the request runs), and
iterates over output tokens as they arrive.

## Several engine replicas

A front may have several engine replicas. An admin route then runs on each, and its reply is a list with an entry for
each replica, unless it declares something else ([server functions](server_api.md#replies-of-several-engine-replicas)).
Here the engines count, so the sum is wanted:

```python
@get("/shout/count", opt={{"scope": "admin", "replicas": "sum", "replies": ShoutCount}})
async def count() -> Response[Any]:
    return json_response(await engine.call("shout_count"))  # {{"count": 3}}
```

A function decides otherwise, for example for the largest:

```python
def largest(replies: list[ReplicaReply]) -> Response[Any]:
    return json_response({{"count": max(reply.json()["count"] for reply in replies if reply.ok)}})
```

Routes of the scopes infer and public run once, and `engine.call` runs a control on every replica.

## Hooks

{intro}

{table}

{manual}

## Hooks of the generation plugin

{generation_intro}

`examples/trunkline-no-digits` uses both; install it with `pip install ./examples/trunkline-no-digits`:

{generation_example}

Without the generation plugin (`--no-plugin generation`) there are no such hooks, and plugins that implement them are
left out with a warning.

{generation_table}

{generation_manual}
"""

CONFIGURATION = """# Configuration

Every setting is a flag of `trunkline serve` and a key of a TOML file (`--config FILE`); the key is
the flag's name with underscores. Table `[plugins]` has `only` for `--plugin` and `without` for `--no-plugin`. Flags
win over the file, the file wins over defaults.

```toml
[server]
port = 8000

[[models]]
model_path = "path/to/model"
dtype = "float32"

[[models]]
model_path = "demo:smollm2-135m-instruct"
context_length = 2048

[plugins]
without = ["moe_stats"]
```

The same models on the command line: flags after a model apply to that model, flags before the first model to
all models. Tables below with the heading "or per model" have settings for all models, which can be overridden for
one model: by a key in its `[[models]]` table, or by a flag after it.

```console
$ trunkline serve --port 8000 path/to/model --dtype float32 demo:smollm2-135m-instruct --context-length 2048
```

{tables}

## Flags of SGLang without a setting here

Accepted and ignored, with a log line each:

{ignored}

Refused with an error, because clients would get other results if they were ignored:

{refused}
"""


FIELDS = """# Fields of requests

The treatment of every known field. *Honoured*: it works as in the API that defines it.
*Refused*: a value that requests something is a 400 that names the field; null is accepted, and so are, unless
noted, false, 0, an empty string, array or object, and the values given here. *Ignored*: any value is accepted and
has no effect, for the reason given. Fields that aren't listed are ignored; those that SGLang, vLLM, Jina, Infinity,
Text Embeddings Inference and the SDKs of OpenAI and Cohere send to these routes are all listed.

{tables}

## `sampling_params` of `/generate`

{sampling}
"""


def plugins() -> str:
    """The text of plugins.md."""
    return PLUGINS.format(
        pyproject=_code(EXAMPLE / "pyproject.toml", "toml"),
        hooks=_code(EXAMPLE / "trunkline_surprise" / "__init__.py", "python"),
        stage=_code(EXAMPLE / "trunkline_surprise" / "stage.py", "python"),
        routes=_code(EXAMPLE / "trunkline_surprise" / "routes.py", "python"),
        test=_code(EXAMPLE / "test_surprise.py", "python"),
        intro=_prose(hookspecs.__doc__ or ""),
        table=_hook_table(hookspecs),
        manual="\n\n".join(_hook(name) for name in _hooks(hookspecs)),
        generation_intro=_prose(generation_hooks.__doc__ or ""),
        generation_example=_code(EXAMPLES / "trunkline-no-digits" / "trunkline_no_digits" / "__init__.py", "python"),
        generation_table=_hook_table(generation_hooks),
        generation_manual="\n\n".join(_hook(name) for name in _hooks(generation_hooks)),
    )


def configuration() -> str:
    """The text of configuration.md: the settings of core and of the project's own plugins."""
    own = [plugin for plugin in find() if plugin.distribution == "trunkline"]
    groups = [SettingsGroup("models", ModelSettings, per_model=True), *settings_groups(Host(own)).values()]
    tables = []
    for group in groups:
        rows = (
            (", ".join(f"`{flag}`" for flag in flag.names), flag.default or "", flag.help)
            for flag in flags_of(group, group.name)
        )
        title = "`[[models]]`" if group.name == "models" else f"`[{group.name}]`" + ", or per model" * group.per_model
        tables.append(f"## {title}\n\n{_table(('flag', 'default', 'meaning'), rows)}")
    return CONFIGURATION.format(
        tables="\n\n".join(tables), ignored=_foreign(compat.IGNORED), refused=_foreign(compat.REFUSED)
    )


def fields() -> str:
    """The text of fields.md: the bodies of core's routes and of the project's own plugins'."""
    tables = [f"## {', '.join(labels)}\n\n{_fields(schema)}" for schema, labels in bodies().items()]
    later = ", ".join(f"`{key}`" for key in checks.UNSUPPORTED)
    rows = [
        (", ".join(f"`{key}`" for key in checks.CHECKS), "honoured"),
        (later, "refused: is not supported yet; neutral values pass"),
        (", ".join(f"`{key}`" for key in checks.IGNORED), "ignored: no tokenizer puts spaces there"),
        ("any other", "refused: unknown field"),
    ]
    return FIELDS.format(tables="\n\n".join(tables), sampling=_table(("keys", "treatment"), rows))


def bodies() -> dict[type[Struct], list[str]]:
    """The struct of every JSON body, with the routes that take it."""
    own = [plugin for plugin in find() if plugin.distribution == "trunkline"]
    host = Host(own)
    engine: Any = NoEngine()
    handlers: list[Any] = [handler for _, handler in host.routes(engine, Config.load({}, host).settings)]
    handlers += [*routes(engine, Lifecycle(), cast("Any", None)), *weight_routes(engine, None)]
    found: dict[type[Struct], list[str]] = {}
    for handler in handlers:
        if "body" in handler.opt:
            found.setdefault(handler.opt["body"], []).extend(f"`{path}`" for path in sorted(handler.paths))
    return found


def _fields(schema: type[Struct]) -> str:
    """A table of a body's fields, those with the same treatment together."""
    rows: dict[str, list[str]] = {}
    for name, mark in fields_of(schema):
        passing = ", ".join(f"`{json.dumps(value)}`" for value in mark.neutral) if isinstance(mark, Refused) else ""
        rows.setdefault(_treatment(mark), []).append(f"`{name}`" + (f" (accepted: {passing})" if passing else ""))
    return _table(("fields", "treatment"), ((", ".join(names), treatment) for treatment, names in rows.items()))


def _treatment(mark: Refused | Ignored | None) -> str:
    if mark is None:
        return "honoured"
    if isinstance(mark, Ignored):
        return f"ignored: {mark.why}"
    only_null = "" if mark.empty else " (also false, 0 and empty values)"
    return f"refused{only_null}: {mark.message.removeprefix('{field} ')}"


def _hooks(specification: ModuleType) -> list[str]:
    return [name for name in vars(specification) if name.startswith("trunkline_")]


def _specification(name: str) -> Any:
    """The function that specifies a hook."""
    return next(vars(module)[name] for module in SPECIFICATIONS if name in vars(module))


def _hook_table(specification: ModuleType) -> str:
    return _table(("hook", "what it contributes", *WHERE), (_hook_row(name) for name in _hooks(specification)))


def _hook_row(name: str) -> tuple[str, ...]:
    """The hook, the first sentence of its documentation, and when it is called in each process."""
    about = _prose((_specification(name).__doc__ or "").split("\n\n")[0]).removesuffix(".")
    calls = when_called(name)
    return (f"`{name}`", about, *(calls.get(where, "never").replace("``", "`") for where in WHERE))


def when_called(name: str) -> dict[str, str]:
    """``{"Front": "once, …"}``: the second paragraph of a hook's documentation, by process."""
    paragraph = inspect.cleandoc(_specification(name).__doc__ or "").split("\n\n")[1]
    text = " ".join(paragraph.split()).rstrip(":.")
    parts = re.split(rf"(?:^|\. )({'|'.join(WHERE)}): ", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _hook(name: str) -> str:
    signature = str(inspect.signature(_specification(name))).replace("'", "")
    return f"### `{name}{signature}`\n\n{_prose(_specification(name).__doc__ or '')}"


def _prose(docstring: str) -> str:
    """Markdown of a docstring: the block after ``::`` becomes code, roles become plain code."""
    text, colons, code = inspect.cleandoc(docstring).partition("::\n")
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text.replace("``", "`")).rstrip()
    if not colons:
        return text
    indented, _, after = (
        code.strip("\n").partition("\n\n") if text.startswith("The hooks:") else (code.strip("\n"), "", "")
    )
    language = "toml" if indented.lstrip().startswith("[") else "python"
    block = f"```{language}\n{textwrap.dedent(indented).strip()}\n```"
    return "\n\n".join(
        part
        for part in (
            text if text.endswith(("?", ".")) else f"{text}:" if text else "",
            block,
            _prose(after) if after else "",
        )
        if part
    )


def _code(path: Path, language: str) -> str:
    return f"`{Path(*path.relative_to(EXAMPLES).parts[1:])}`\n\n```{language}\n{path.read_text().strip()}\n```"


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _foreign(flags: Iterable[compat.ForeignFlag]) -> str:
    lines = []
    for flag in flags:
        only = f" (only {' or '.join(f'`{value}`' for value in flag.accepted if value)})" if flag.accepted else ""
        lines.append(f"* `{'`, `'.join(flag.names)}`{only}: {flag.why}")
    return "\n".join(lines)


if __name__ == "__main__":
    import generate_clients  # from this script's folder
    import generate_map
    import generate_reliability

    generate_clients.write()
    generate_map.write()
    generate_reliability.write()
    if find_spec("triton"):  # its wheels are for Linux only
        import generate_gpu

        generate_gpu.write()
    for name, text in (("plugins.md", plugins()), ("configuration.md", configuration()), ("fields.md", fields())):
        (DOCS / name).write_text(text)
