"""OpenAI's chat route."""
