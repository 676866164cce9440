"""Structured output: compiles grammars, follows them token by token, and masks the tokens that they don't allow."""
