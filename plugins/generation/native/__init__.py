"""SGLang's native route ``/generate``: its body, its checks, its replies."""
