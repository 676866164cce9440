"""What the routes take."""

from __future__ import annotations

from typing import Annotated, Any

from trunkline.core.server.api import Ignored, OpenAIPoolingBody, Refused, SGLangPoolingBody


class ClassifyBody(SGLangPoolingBody):
    """``POST /classify``, the request of SGLang's /encode. Unknown top-level fields are ignored.

    ``text`` may hold pairs of texts, joined as the model's tokenizer does it.
    """

    dimensions: Annotated[Any, Refused("{field} is for /encode; scores aren't cut.")] = None
    is_cross_encoder_request: Annotated[Any, Ignored("pairs are told from single texts without it")] = None
    sampling_params: Annotated[Any, Ignored("a score is not sampled")] = None


class OpenAIClassifyBody(OpenAIPoolingBody):
    """``POST /v1/classify``, as vLLM has it.

    ``use_activation`` false gives the scores themselves in ``probs`` (``activation`` is vLLM's
    older name of it).
    """

    use_activation: bool | None = None
    activation: bool | None = None
    softmax: Annotated[Any, Refused("{field} is not supported; use_activation is.", empty=False)] = None
