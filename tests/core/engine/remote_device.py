"""Starts the engine on a device that is made in Python, in a process of its own: ``remote_device.py FOLDER…``.

Its tensors have values, which are computed on the CPU, but claim to be elsewhere. As on a GPU, an operation that mixes
them with tensors on the CPU raises an error, so it finds tensors that were made on the wrong device. Prints a JSON
object with the devices of the models' tensors, and how many bytes of weights the host had at most.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.grad_mode import inference_mode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

REMOTE = torch.device("privateuseone", 0)
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class RemoteTensor(torch.Tensor):
    """A tensor that claims to be on the device ``REMOTE``."""

    values: torch.Tensor  # on the CPU

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> RemoteTensor:
        made: RemoteTensor = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=REMOTE,
        )  # fmt: skip
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("an operation outside of the mode")


class RemoteMode(TorchDispatchMode):
    """Computes operations on remote tensors, and makes tensors on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        tensors = [one for one in tree_leaves((args, given)) if isinstance(one, torch.Tensor)]
        remote = [isinstance(one, RemoteTensor) for one in tensors]
        if any(remote) and func not in COPIES:
            mixed = [one.shape for one, there in zip(tensors, remote, strict=True) if not there and one.ndim]
            assert not mixed, f"{func} mixes remote tensors with {mixed} on the CPU"
        there = remote[0] if func == torch.ops.aten.copy_.default else any(remote)
        if given.get("device") is not None:
            there = torch.device(given["device"]).type == REMOTE.type
            given |= {"device": torch.device("cpu")} if there else {}
        inner = tree_map(lambda one: one.values if isinstance(one, RemoteTensor) else one, (args, given))
        result = func(*inner[0], **inner[1])
        if there and func._schema.is_mutable and result is not None and remote[0]:
            return args[0]
        return (
            tree_map(lambda one: RemoteTensor(one) if isinstance(one, torch.Tensor) else one, result)
            if there
            else (result)
        )


def patch() -> Callable[[], int]:
    """Make trunkline use the device; returns a function for the peak of weights on the host in bytes."""
    import transformers

    from trunkline.core.engine import startup
    from trunkline.core.engine.device.base import Memory
    from trunkline.core.engine.device.staged import Copied, StagedDevice
    from trunkline.core.model.sources.tensor_file import StoredTensor

    # Modes are of one thread. Views can't be made of tensors that have no version counter.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    inference_mode.__enter__ = lambda self: torch._C._set_grad_enabled(False)  # type: ignore[method-assign]
    inference_mode.__exit__ = lambda *_: None  # type: ignore[method-assign]
    _setup_privateuseone_for_python_backend()
    transformers.PreTrainedModel.to = move
    _device_constructors()  # fills a cache that needs the original
    torch.tensor = tensor
    alive, peak = [0], [0]
    read = StoredTensor.to

    def freed(size: int) -> None:
        alive[0] -= size

    def to(self: StoredTensor, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        on_host = read(self, None, dtype)
        alive[0] += on_host.nbytes
        peak[0] = max(peak[0], alive[0])
        weakref.finalize(on_host.untyped_storage(), freed, on_host.nbytes)
        # A remote tensor keeps its values on the host. They are copied, since only what is read counts.
        return RemoteTensor(on_host.clone()) if device == REMOTE else on_host

    StoredTensor.to = to  # type: ignore[method-assign]

    class Done:
        def synchronize(self) -> None:
            pass

    class RemoteDevice(StagedDevice):
        def pinned(self, size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.uint8)

        def copy_to_device(self, staged: torch.Tensor) -> Copied:
            return Copied([staged.to(self.kind)], Done())

        def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> Copied:
            return Copied([one.to("cpu") for one in tensors], Done())

        def capture(self, run: Callable[[], None]) -> Any:
            raise AssertionError("it has no graphs")

        def memory(self) -> Memory:
            return Memory(8 << 30, 8 << 30)

    startup.choose_device = lambda name, **_: RemoteDevice(REMOTE)  # type: ignore[attr-defined]
    return lambda: peak[0]


def tensor(data: Any, *, device: Any = None, make: Callable[..., Any] = torch.tensor, **given: Any) -> torch.Tensor:
    """``torch.tensor``, which doesn't reach the mode if it is to make a remote tensor."""
    if device is None or torch.device(device).type != REMOTE.type:
        made: torch.Tensor = make(data, device=device, **given)
        return made
    remote: torch.Tensor = make(data, device="cpu", **given).to(device)
    return remote


def move(module: Any, device: torch.device) -> Any:
    """``Module.to``, which can't exchange the tensors of subclasses."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, one in table.items():
                if one is not None and one.device != device:
                    table[name] = one.to(device)
    return module


def main(folders: Sequence[str]) -> None:
    from trunkline.core.client.engine import configure
    from trunkline.core.engine.control.pages import tensors_of
    from trunkline.core.engine.startup import build
    from trunkline.core.host import Host

    peak = patch()
    host = Host.load()
    announced: list[str] = []
    config = configure(
        host, tuple(folders), {"dtype": "float32", "max_total_tokens": 512, "attention_backend": "torch_native"}
    )
    with RemoteMode():
        started = build(config, host, lambda phase: announced.append(phase.what))
    found = [one for lane in started.lanes for one in tensors_of(lane.model) if one.numel()]
    values = {id(one.values) for one in found if isinstance(one, RemoteTensor)}
    tensors = [one for one in found if id(one) not in values]
    report = {
        "devices": sorted({str(one.device) for one in tensors}),
        "served": [(served.device, sorted(served.tasks)) for served in started.ready.models],
        "bytes": sum(one.nbytes for one in tensors),
        "largest": max(one.nbytes for one in tensors),
        "peak": peak(),
        "announced": announced,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
