"""The arguments of controls that change, label or read weights."""

from __future__ import annotations

from msgspec import Struct


class UpdateWeights(Struct, kw_only=True):
    """Arguments of the control ``update_weights``.

    ``hold``: a token; the update is applied by ``commit_update`` only. ``update_number``: the number of the weights,
    see :class:`ServedModel`; nothing is done if the model's is as high already. 0: the next number.
    """

    model_path: str
    load_format: str | None = None
    abort_all_requests: bool = False
    weight_version: str | None = None
    hold: str = ""
    update_number: int = 0


class UpdateTensors(Struct, kw_only=True):
    """Arguments of ``update_weights_from_tensor``. ``path``: a safetensors file, which may be deleted afterwards.

    ``hold`` and ``update_number`` as in :class:`UpdateWeights`.
    """

    path: str
    abort_all_requests: bool = False
    weight_version: str | None = None
    hold: str = ""
    update_number: int = 0


class EndHold(Struct, kw_only=True):
    """Arguments of ``commit_update`` and ``cancel_update``: the token that the update was held with."""

    hold: str


class UpdateVersion(Struct, kw_only=True):
    """Arguments of the control ``update_weight_version``.

    ``label_number``: see :class:`ServedModel`; nothing is done if the model's is as high already. 0: the next number.
    """

    new_version: str
    abort_all_requests: bool = True
    label_number: int = 0


class ReadWeights(Struct, kw_only=True):
    """Arguments of the control ``get_weights_by_name``."""

    name: str
    truncate_size: int = 100


class UpdateRefused(Exception):
    """The new weights can't be used. The message is for the client."""


UpdateArguments = UpdateWeights | UpdateTensors
