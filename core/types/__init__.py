"""Values that cross the plugin boundary, one file per subject; imports only ``core.errors`` and the kernels' types.

Plugins use these and :mod:`trunkline.core.hookspecs`, not the classes that implement them. Heavy libraries are imported
for type checkers only, because ``trunkline --help`` imports these modules.
"""

from __future__ import annotations

from .clients import EngineClient, Reply, Submission
from .experts import ExpertLayers, ExpertObserver, PassRow
from .fields import INT64_MAX, INT64_MIN, CacheKey, Count, Int64, RequestId, TokenId
from .models import Head, Model, ModelInfo, ModelSource, ServedModel, Serves, Tokenizer
from .observers import RequestObserver
from .plugins import MAX_FAILURES, SLOW_SECONDS, Ask, Contribution
from .replicas import ReplicaReply, all_results, current_replica, on_each_replica, on_replica
from .requests import Needs, Request
from .settings import Settings, SettingsGroup
from .stages import Launched, Part, PartRow, Stage, Step, sequence_starts
from .transforms import Transform

__all__ = [
    "INT64_MAX",
    "INT64_MIN",
    "MAX_FAILURES",
    "SLOW_SECONDS",
    "Ask",
    "CacheKey",
    "Contribution",
    "Count",
    "EngineClient",
    "ExpertLayers",
    "ExpertObserver",
    "Head",
    "Int64",
    "Launched",
    "Model",
    "ModelInfo",
    "ModelSource",
    "Needs",
    "Part",
    "PartRow",
    "PassRow",
    "ReplicaReply",
    "Reply",
    "Request",
    "RequestId",
    "RequestObserver",
    "ServedModel",
    "Serves",
    "Settings",
    "SettingsGroup",
    "Stage",
    "Step",
    "Submission",
    "TokenId",
    "Tokenizer",
    "Transform",
    "all_results",
    "current_replica",
    "on_each_replica",
    "on_replica",
    "sequence_starts",
]
