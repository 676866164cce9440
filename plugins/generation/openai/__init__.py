"""OpenAI's route ``/v1/chat/completions``: its body, chat messages, sampling defaults."""
