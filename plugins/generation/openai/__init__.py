"""OpenAI's routes ``/v1/completions`` and ``/v1/chat/completions``: bodies, sampling, grammars, replies, streams."""
