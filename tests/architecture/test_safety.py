"""Security rules that can be seen in the source."""

from __future__ import annotations

import ast
from typing import Any

import pytest

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
CALLS = {
    "eval",
    "exec",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "np.load",
    "numpy.load",
    "os.system",
    "yaml.load",
}
# Writing is no danger to the writer: dumps of expert choices are SGLang's files, and these are made so.
ALLOWED = {"plugins.moe_stats.dump": ["torch.save"]}
KEYWORDS = {"shell", "allow_pickle", "weights_only", "pickle"}


def offences(tree: ast.AST) -> list[str]:
    """What can run a stranger's code: unpickling, evaluating, shells."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in CALLS else []
            found += [f"{name}({word.arg}=)" for word in node.keywords if word.arg in KEYWORDS]
    return found


def test_nothing_unpickles_evaluates_or_opens_a_shell(sources: dict[str, Any]) -> None:
    found = {source.name: offences(source.tree) for source in sources.values() if offences(source.tree)}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from multiprocessing import Process",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
    ],
)
def test_an_offence_is_found(code: str) -> None:
    assert offences(ast.parse(code))


def test_environment_is_read_where_it_is_expected(sources: dict[str, Any]) -> None:
    """Settings come from flags and files; the environment only says where caches are."""
    users = {source.name for source in sources.values() if "os.environ" in source.text or "getenv" in source.text}
    expected = {
        "core.model.sources.catalogue",
        "core.model.sources.info",
        "core.client.engine_process",
        "kernels.cpu.threads",
    }
    expected |= {"core.cluster.deployments", "core.cluster.serve"}  # Ray's own variables
    # SGLang's variables for the folders of dumps and of profiles.
    expected |= {"plugins.moe_stats.dump", "core.engine.control.profile"}
    assert users <= expected, users - expected
