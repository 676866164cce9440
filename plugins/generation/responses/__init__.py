"""OpenAI's route ``/v1/responses``, without state: its body becomes that of a chat, whose replies become items."""
