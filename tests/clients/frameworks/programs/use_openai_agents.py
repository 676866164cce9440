"""Agents of OpenAI's SDK, with both of its models."""

from __future__ import annotations

from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from cases import TASK, Trip, report
from openai import AsyncOpenAI

set_tracing_disabled(True)  # traces would be sent to OpenAI
MODELS = (OpenAIResponsesModel, OpenAIChatCompletionsModel)
SETTINGS = ModelSettings(temperature=0, max_tokens=TASK.tokens)
BOOKED: list[Trip] = []


@function_tool
def book(trip: Trip) -> str:
    """Book a trip."""
    BOOKED.append(trip)
    return f"Booked: {trip.days} days."


async def with_each_model(use: Any) -> list[Any]:
    """What the function returns for an agent's model, by model."""
    async with AsyncOpenAI(base_url=TASK.chat, api_key="none", max_retries=0) as client:
        return [await use(model("default", client)) for model in MODELS]


async def answer() -> list[Any]:
    async def use(model: Any) -> Any:
        agent = Agent("Assistant", model=model, model_settings=SETTINGS)
        result = await Runner.run(agent, TASK.question)
        return result.final_output, result.context_wrapper.usage.output_tokens

    return await with_each_model(use)


async def stream() -> list[Any]:
    async def use(model: Any) -> Any:
        result = Runner.run_streamed(Agent("Assistant", model=model, model_settings=SETTINGS), TASK.question)
        events = [event.data async for event in result.stream_events() if event.type == "raw_response_event"]
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        return "".join(deltas), result.final_output

    return await with_each_model(use)


async def structured_output() -> list[Any]:
    async def use(model: Any) -> Any:
        settings = ModelSettings(temperature=0, max_tokens=200)
        result = await Runner.run(
            Agent("Planner", model=model, output_type=Trip, model_settings=settings), "Plan a trip."
        )
        return result.final_output_as(Trip, raise_if_incorrect_type=True).model_dump()

    return await with_each_model(use)


async def tool() -> list[Any]:
    """A forced call; its result is the answer in one run, and the model answers after it in another."""

    async def use(model: Any) -> Any:
        settings = ModelSettings(temperature=0, max_tokens=200, tool_choice="required", parallel_tool_calls=False)
        agent = Agent("Booker", "Book a trip.", model=model, tools=[book], model_settings=settings)
        BOOKED.clear()
        first = await Runner.run(agent.clone(tool_use_behavior="stop_on_first_tool"), "A week in Rome, please.")
        again = await Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": "And another one."}])
        kinds = [item.type for item in again.new_items]
        return [trip.model_dump() for trip in BOOKED], first.final_output, kinds

    return await with_each_model(use)


if __name__ == "__main__":
    report(answer, stream, structured_output, tool)
