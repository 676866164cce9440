"""SGLang's native route."""
