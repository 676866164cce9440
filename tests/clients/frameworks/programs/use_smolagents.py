"""smolagents: its model for OpenAI's API, and agents."""

from __future__ import annotations

from typing import Any

from cases import TASK, report
from smolagents import CodeAgent, OpenAIModel, Tool, ToolCallingAgent

MESSAGES: Any = [{"role": "user", "content": [{"type": "text", "text": TASK.question}]}]


class Book(Tool):
    name = "book"
    description = "Books a trip."
    inputs = {  # noqa: RUF012
        "city": {"type": "string", "description": "Where to.", "enum": ["Paris", "Rome", "Oslo"]},
        "days": {"type": "integer", "description": "How long."},
    }
    output_type = "string"

    def forward(self, city: str, days: int) -> str:
        return f"Booked: {days} days in {city}."


def model(tokens: int) -> Any:
    return OpenAIModel("default", api_base=TASK.chat, api_key="none", temperature=0, max_tokens=tokens)


def answer() -> list[Any]:
    reply = model(TASK.tokens).generate(MESSAGES)
    return [reply.content, reply.token_usage.output_tokens]


def stream() -> list[Any]:
    deltas = list(model(TASK.tokens).generate_stream(MESSAGES))
    usages = [delta.token_usage.output_tokens for delta in deltas if delta.token_usage]
    return ["".join(delta.content or "" for delta in deltas), *usages]


def tool() -> list[Any]:
    reply = model(200).generate(MESSAGES, tools_to_call_from=[Book()])
    return [[call.function.name, call.function.arguments] for call in reply.tool_calls]


def tool_calling_agent() -> list[Any]:
    """One step: the call that the model must make is run."""
    agent = ToolCallingAgent(tools=[Book()], model=model(200), max_steps=1, verbosity_level=0)
    agent.run("Book a week in Rome.")
    step = agent.memory.steps[1]
    return [[call.name for call in step.tool_calls], step.error and step.error.dict()]


def code_agent() -> list[Any]:
    """One step with structured output: thought and code are the fields of a JSON object."""
    agent = CodeAgent(tools=[], model=model(60), max_steps=1, verbosity_level=0, use_structured_outputs_internally=True)
    agent.run("What is two and three?")
    step = agent.memory.steps[1]
    return [step.model_output, step.token_usage.output_tokens]


if __name__ == "__main__":
    report(answer, stream, tool, tool_calling_agent, code_agent)
