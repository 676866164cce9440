"""The request bodies of the routes."""

from __future__ import annotations

from typing import Annotated, Any

from trunkline.core.server.api import Ignored, OpenAIPoolingBody, Refused, SGLangPoolingBody


class ClassifyBody(SGLangPoolingBody):
    """``POST /classify``: the body of SGLang's /encode. Unknown top-level fields are ignored.

    ``text`` may contain pairs of texts, which the model's tokenizer joins.
    """

    dimensions: Annotated[Any, Refused("{field} is for /encode; scores aren't cut.")] = None
    is_cross_encoder_request: Annotated[Any, Ignored("pairs are told from single texts without it")] = None
    sampling_params: Annotated[Any, Ignored("a score is not sampled")] = None


class OpenAIClassifyBody(OpenAIPoolingBody):
    """``POST /v1/classify``, as in vLLM.

    With ``use_activation`` false, ``probs`` are the scores themselves (``activation`` is vLLM's
    older name of the field).
    """

    use_activation: bool | None = None
    activation: bool | None = None
    softmax: Annotated[Any, Refused("{field} is not supported; use_activation is.", empty=False)] = None
