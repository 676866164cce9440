"""Checks of values that plugins return. Each returns the text of an error, "" if the value is valid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec import Raw, Struct

from trunkline.core.errors import RequestError, describe_error
from trunkline.core.types import Launched, Needs, Request, Step

from .messages import MAX_FRAME

UPLOADED = ("int64", "int32", "float32", "float64", "bool", "uint8")  # dtypes of arrays for the device
MAX_RESULT = MAX_FRAME // 4  # bytes of one result as msgpack

_encoder = msgspec.msgpack.Encoder()


def problem_of_needs(needs: Any, request: Request) -> str:
    if not isinstance(needs, Needs):
        return f"{type(needs).__name__}, not Needs"
    try:
        msgspec.convert(msgspec.structs.asdict(needs), Needs)
    except msgspec.ValidationError as error:
        return f"{needs!r:.200}: {error}"
    if needs.rows_from is not None and needs.rows_from >= request.prompt_len > 0:
        return f"rows_from={needs.rows_from} for a prompt of {request.prompt_len} tokens"
    if needs.rows_up_to is not None and (needs.rows_from is None or needs.rows_up_to <= needs.rows_from):
        return f"rows_up_to={needs.rows_up_to}, which must be above rows_from={needs.rows_from}"
    return ""


def problem_of_new_needs(needs: Any, request: Request) -> str:
    """Of needs that replace those that the request has: room was made for a number of tokens, which stays."""
    problem = problem_of_needs(needs, request)
    if not problem and needs.new_tokens != request.needs.new_tokens:
        problem = f"new_tokens={needs.new_tokens}, not {request.needs.new_tokens} as before"
    return problem


def problem_of_arrays(arrays: Any) -> str:
    if not isinstance(arrays, dict):
        return f"{type(arrays).__name__}, not dict"
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.name not in UPLOADED:
            return f"{name!r}, an array of {getattr(array, 'dtype', type(array).__name__)}; use {', '.join(UPLOADED)}"
        if not array.flags.c_contiguous:
            return f"{name!r}, which is not C-contiguous"
    return ""


def problem_of_launched(launched: Any, rows: int) -> str:
    """``rows``: number of rows of the part."""
    if not isinstance(launched, Launched):
        return f"{type(launched).__name__}, not Launched"
    ids: Any = launched.next_ids
    tensors: Any = launched.tensors
    if ids is not None:
        if not isinstance(ids, torch.Tensor):
            return f"next_ids of type {type(ids).__name__}, not Tensor"
        if ids.dtype != torch.int64 or ids.shape != (rows,):
            return f"next_ids {ids.dtype} {tuple(ids.shape)}, not torch.int64 ({rows},)"
    if not isinstance(tensors, dict):
        return f"tensors of type {type(tensors).__name__}, not dict"
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            return f"tensors[{name!r}] of type {type(tensor).__name__}, not Tensor"
    return ""


def problem_of_step(step: Step, final: bool, vocabulary: int) -> str:
    """Checks all fields but ``data``. ``final``: the pass computed the request's last known token."""
    if not isinstance(step.tokens, tuple | list) or not are_tokens(step.tokens, vocabulary):
        return f"tokens must be ids in [0, {vocabulary}), not {step.tokens!r:.200}"
    if step.tokens and not final:
        return "tokens, before the whole prompt was computed"
    if step.postponed:
        return _problem_of_postponed(step, final)
    if step.error is not None and not is_sendable(step.error):
        return f"error must be a RequestError with a status from 400 to 599, not {step.error!r:.200}"
    return "" if step.finish is None else _problem_of_finish(step.finish)


def _problem_of_postponed(step: Step, final: bool) -> str:
    if step.tokens or step.data is not None or step.finish is not None or step.error is not None:
        return "it is postponed, and has a result"
    return "" if final and step.request.needs.lockstep else "only final rows of requests with lockstep can be postponed"


def _problem_of_finish(finish: Any) -> str:
    if not isinstance(finish, dict) or not isinstance(finish.get("type"), str):
        return f'finish must be a dict with a string "type", not {finish!r:.200}'
    try:
        msgspec.msgpack.decode(_encoder.encode(finish), type=dict[str, Any])
        msgspec.json.encode(finish)  # it is sent to clients unchanged
    except Exception as error:
        return f"finish can't be sent: {describe_error(error)}"
    return ""


def are_tokens(ids: Iterable[Any], vocabulary: int) -> bool:
    for token in ids:  # noqa: SIM110 (all() takes twice as long)
        if type(token) is not int or not 0 <= token < vocabulary:
            return False
    return True


def encoded(value: Any, schema: type[Struct] | None = None) -> Raw:
    """A value as msgpack. ValueError if it can't be encoded, or decoded again as ``schema``."""
    try:
        raw = _encoder.encode(value)
        back = msgspec.msgpack.decode(raw)
        if schema is not None:
            msgspec.convert(back, schema)
    except Exception as error:
        raise ValueError(f"it can't be sent: {describe_error(error)}") from error
    if len(raw) > MAX_RESULT:
        raise ValueError(f"it has {len(raw)} bytes, at most {MAX_RESULT} are sent")
    return Raw(raw)


def is_sendable(error: Any) -> bool:
    """Whether it is a RequestError that can be sent to a client."""
    if not isinstance(error, RequestError):
        return False
    try:
        wire = msgspec.convert((error.status, error.message, error.param), tuple[int, str, str | None])
        _encoder.encode(wire)
    except (msgspec.ValidationError, ValueError, OverflowError):
        return False
    return 400 <= error.status <= 599
