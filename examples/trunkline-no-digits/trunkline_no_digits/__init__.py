"""Answers without digits, and of a few sentences at most, for requests that ask for it in ``custom_params``."""

from trunkline.core.errors import RequestError
from trunkline.core.hookspecs import hookimpl

DIGITS = {*"0123456789"}


class NoDigits:
    """``{"no_digits": true}``: no token with a digit in it."""

    def __init__(self, model):
        decode, size = model.tokenizer.decode, model.info.vocab_size
        self.ids = [token for token in range(size) if DIGITS & {*decode([token])}]

    def admit(self, request):
        return (request.params.custom_params or {}).get("no_digits") or None

    def apply(self, state, logits, tokens):
        logits[self.ids] = float("-inf")


class Sentences:
    """``{"max_sentences": 3}``: the third ".", "!" or "?" ends the answer."""

    def admit(self, request):
        most = (request.params.custom_params or {}).get("max_sentences")
        if most is not None and not isinstance(most, int):
            raise RequestError("max_sentences must be an integer.", param="custom_params")
        return most

    def check(self, state, token, text):
        return "max_sentences" if sum(map(text.count, ".!?")) >= state else None


@hookimpl
def trunkline_logits_processors(model):
    return [NoDigits(model)] if model.tokenizer else []


@hookimpl
def trunkline_stop_conditions(model):
    return [Sentences()]
