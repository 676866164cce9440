"""Programs in SGLang's frontend language, run by the client's interpreter with the arguments URL and PROGRAM.

Each prints one JSON object, for test_sglang.py to compare. sglang_stubs must have been imported before.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import sglang as sgl

COUNTRIES = ["France", "Japan", "Germany"]
PLACES = [" the water", " libraries", " trees"]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@sgl.function
def capital(s: Any, country: str) -> None:
    s += sgl.system("You are a helpful assistant.")
    s += sgl.user(f"What is the capital of {country}?")
    s += sgl.assistant(sgl.gen("answer", **GREEDY))


@sgl.function
def two_tips(s: Any) -> None:
    s += "Here are two tips for staying healthy: 1. Eat well. 2. Exercise.\n"
    forks = s.fork(2)
    for number, fork in enumerate(forks):
        fork += f"Tip {number + 1} in other words:" + sgl.gen("detail", **GREEDY, stop="\n")
    forks.join()


@sgl.function
def every_parameter(s: Any) -> None:
    s += "Once upon a time, there was a" + sgl.gen(
        "story",
        temperature=0,
        max_tokens=32,
        min_tokens=8,
        stop=["xyzzy"],
        stop_token_ids=[5],
        stop_regex=r"[0-9]{4}",
        top_p=0.9,
        top_k=40,
        min_p=0.01,
        frequency_penalty=0.4,
        presence_penalty=0.2,
        ignore_eos=True,
    )


@sgl.function
def with_logprobs(s: Any) -> None:
    s += "The capital of France is" + sgl.gen(
        "answer",
        temperature=0,
        max_tokens=6,
        ignore_eos=True,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
    )


@sgl.function
def chosen(s: Any) -> None:
    s += "Fish live in" + sgl.select("place", choices=PLACES)
    s += ". One and one is" + sgl.gen("sum", choices=[" two", " seven"], choices_method=sgl.token_length_normalized)


@sgl.function
def restricted(s: Any) -> None:
    s += "A colour: " + sgl.gen("colour", regex="(red|green|blue)", **GREEDY)
    s += (
        ". A year: "
        + sgl.gen("year", dtype=int, **GREEDY)
        + ". True or false: "
        + sgl.gen("truth", dtype=bool, **GREEDY)
    )
    s += ". A number: " + sgl.gen_int("number", **GREEDY) + ". A ratio: " + sgl.gen("ratio", dtype=float, **GREEDY)
    s += ". A text: " + sgl.gen_string("string", temperature=0, max_tokens=64)
    s += ". As JSON: " + sgl.gen("object", json_schema=json.dumps(PERSON), temperature=0, max_tokens=64)


@sgl.function
def addition(s: Any, first: int, second: int) -> int:
    s += f"{first} plus {second} is " + sgl.gen("sum", regex="[0-9]{1,3}", **GREEDY)
    return int(s["sum"])


@sgl.function
def conversation(s: Any, places: list[str]) -> None:
    with s.system():
        s += "You answer in one word."
    for number, place in enumerate(places):
        with s.user():
            s += f"What is the capital of {place}?"
        s += sgl.assistant_begin() + sgl.gen(f"answer {number}", **GREEDY) + sgl.assistant_end()


@sgl.function
def joined(s: Any) -> None:
    s += "Two numbers."
    with s.copy() as alone:
        alone += " The first is " + sgl.gen("first", regex="[0-9]", **GREEDY)
    forks = s.fork(2)
    for number, fork in enumerate(forks):
        fork += f" Number {number + 1} is " + sgl.gen("number", regex="[0-9]", **GREEDY) + "."
    forks.join("concate_and_append")
    with s.var_scope("whole"):
        s += " Their sum is " + sgl.gen("sum", regex="[0-9]{1,2}", **GREEDY)


def result(state: Any, *names: str) -> dict[str, Any]:
    """The text, and each variable with what is known about it. Raises what the program raised."""
    text = state.text()
    if state.error() is not None:
        raise state.error()
    return {"text": text} | {name: {"value": state[name], "meta": state.get_meta_info(name)} for name in names}


def chat() -> dict[str, Any]:
    return result(capital.run(COUNTRIES[0]), "answer")


def batch() -> dict[str, Any]:
    states = capital.run_batch([{"country": country} for country in COUNTRIES], num_threads=3)
    return {"answers": [result(state, "answer") for state in states]}


def stream() -> dict[str, Any]:
    state = capital.run(COUNTRIES[0], stream=True)
    return {"pieces": list(state.text_iter("answer"))} | result(state, "answer")


def async_stream() -> dict[str, Any]:
    async def pieces(state: Any) -> list[Any]:
        return [piece async for piece in state.text_async_iter("answer", return_meta_data=True)]

    state = capital.run(COUNTRIES[0], stream=True)
    return {"pieces": asyncio.run(pieces(state))} | result(state, "answer")


def constraints() -> dict[str, Any]:
    return result(restricted.run(), "colour", "year", "truth", "number", "ratio", "string", "object")


def calls() -> dict[str, Any]:
    """A function's value, arguments that are bound, and a batch as a generator with a common prefix."""
    returned = addition.run(first=3, second=4)
    bound = addition.bind(first=3)
    batch = bound.run_batch([{"second": 4}, {"second": 5}], generator_style=True)
    return {"value": returned.ret_value, "texts": [returned.text(), *(state.text() for state in batch)]}


def turns() -> dict[str, Any]:
    state = conversation.run(COUNTRIES[:2], temperature=0)
    return {"messages": state.messages()} | result(state, "answer 0", "answer 1")


def join() -> dict[str, Any]:
    sgl.global_config.enable_parallel_encoding = False  # else the client asks for a route that no server of SGLang has
    state = joined.run()
    return result(state, "sum") | {"whole": state["whole"], "copied": state["first"]}


def fork() -> dict[str, Any]:
    return result(two_tips.run(), "detail")


def parameters() -> dict[str, Any]:
    return result(every_parameter.run(), "story")


def logprobs() -> dict[str, Any]:
    return result(with_logprobs.run(), "answer")


def select() -> dict[str, Any]:
    return result(chosen.run(), "place", "sum")


def backend() -> dict[str, Any]:
    """The calls of the backend that no program makes."""
    endpoint = sgl.RuntimeEndpoint(sys.argv[1])
    endpoint.cache_prefix("A prefix that is cached before it is needed")
    endpoint.flush_cache()
    sgl.flush_cache(endpoint)
    return {"model": endpoint.get_model_name(), "info": sgl.get_server_info(endpoint)}


if __name__ == "__main__":
    sgl.set_default_backend(sgl.RuntimeEndpoint(sys.argv[1], chat_template_name="chatml"))
    programs = (chat, batch, stream, fork, parameters, logprobs, select, backend)
    programs += (async_stream, constraints, calls, turns, join)
    print(json.dumps({program.__name__: program for program in programs}[sys.argv[2]]()))
