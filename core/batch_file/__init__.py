"""Runs the requests of a file (OpenAI's batch format) on the server's app, in process, and writes the answers."""
