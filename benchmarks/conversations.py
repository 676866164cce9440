"""Users who talk with a model about this project's documentation, over ``/v1/chat/completions``.

``python benchmarks/conversations.py http://127.0.0.1:30000`` is a load with prompts that repeat, for
benchmarks/record_traffic.py. Users arrive at random. Most ask about a section of docs/, some sections more often than
others, others just chat or have several sentences classified by examples. A user reads an answer before the next
question, which has the whole conversation before it. Answers are the model's own.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path

import msgspec
from http_client import Connection

DOCS = Path(__file__).resolve().parent.parent / "docs"
LONGEST_SECTION = 6000  # characters
SYSTEM = (
    "You are the assistant of an open-source inference server. Answer questions about it shortly and correctly, from "
    "the documentation if some is given. If it doesn't say, answer that you don't know. Use plain English, no lists, "
    "and at most three sentences. Quote the names of flags, routes and fields exactly as they are written."
)
ABOUT_SECTION = (
    "What is this section about?",
    "Which options does it name?",
    "Summarise it in one sentence.",
    "What happens when something fails here?",
    "Who should read this?",
    "What are the limits that it states?",
    "Give an example of its use.",
)
SMALL_TALK = (
    "Hello! What can you do?",
    "What is an inference server?",
    "Explain what a prefix cache is.",
    "How long is a token?",
    "Why do requests wait in a queue?",
    "Can you say that in fewer words?",
    "And why is that so?",
    "Thanks. One more: what is batching?",
)
LABELS = ("bug", "question", "request")
SENTENCES = (
    "The server crashes when I send an empty body.",
    "How do I set the port?",
    "Please support another tokenizer.",
    "Streams end after a minute.",
    "Is there a Docker image?",
    "I would like metrics for each route.",
    "The answer has the wrong encoding.",
    "Which GPUs are tested?",
)

Message = dict[str, str]


class _Choice(msgspec.Struct):
    message: Message


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class Users:
    """Draws users from a seed, and plays them."""

    def __init__(self, base_url: str, model: str, seed: int, think: float) -> None:
        self._base_url, self._model, self._think = base_url, model, think
        self._draw = random.Random(seed)
        self._sections = sections()
        self._draw.shuffle(self._sections)
        self._popularity = [1 / rank for rank in range(1, len(self._sections) + 1)]
        self.requests = 0

    async def arrive(self, rate: float, seconds: float) -> None:
        """``rate`` users per second; returns when all have left."""
        async with asyncio.TaskGroup() as group:
            loop = asyncio.get_running_loop()
            end = loop.time() + seconds
            while True:
                await asyncio.sleep(self._draw.expovariate(rate))
                if loop.time() > end:
                    return
                group.create_task(self._draw.choices([self._reader, self._chatter, self._classifier], [6, 3, 1])[0]())

    async def _reader(self) -> None:
        section = self._draw.choices(self._sections, self._popularity)[0]
        questions = self._draw.sample(ABOUT_SECTION, min(len(ABOUT_SECTION), self._turns()))
        await self._talk([f"{section}\n\n{questions[0]}", *questions[1:]])

    async def _chatter(self) -> None:
        await self._talk([self._draw.choice(SMALL_TALK) for _ in range(self._turns())])

    async def _classifier(self) -> None:
        """All at once, each with the same examples."""
        order = self._draw.sample(SENTENCES, len(SENTENCES))
        examples = "\n".join(f"{sentence} -> {self._draw.choice(LABELS)}" for sentence in order * 4)
        prompts = [f"Label sentences as in these examples.\n{examples}\n{sentence} ->" for sentence in SENTENCES]
        await asyncio.gather(*(self._ask([{"role": "user", "content": prompt}], 8) for prompt in prompts))

    def _turns(self) -> int:
        return 1 + int(self._draw.expovariate(1 / 2.5))

    async def _talk(self, questions: list[str]) -> None:
        messages = [{"role": "system", "content": SYSTEM}]
        for number, question in enumerate(questions):
            if number:
                await asyncio.sleep(self._draw.expovariate(1 / self._think))
            messages.append({"role": "user", "content": question})
            messages.append(await self._ask(messages, 96))

    async def _ask(self, messages: list[Message], tokens: int) -> Message:
        body = {"model": self._model, "messages": messages, "max_tokens": tokens, "temperature": 0.7}
        connection = Connection(self._base_url)
        status, reply = await connection.request("POST", "/v1/chat/completions", body)
        await connection.close()
        if status != 200:
            raise RuntimeError(f"/v1/chat/completions answered {status}: {reply[:500].decode(errors='replace')}")
        self.requests += 1
        answer = msgspec.json.decode(reply, type=_Completion).choices[0].message
        return {"role": "assistant", "content": answer["content"]}


def sections() -> list[str]:
    """The sections of the documentation, without the longest."""
    found = [part for page in sorted(DOCS.glob("*.md")) for part in page.read_text().split("\n## ")]
    return [part for part in found if len(part) < LONGEST_SECTION]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url")
    parser.add_argument("--model", default="default")
    parser.add_argument("--rate", type=float, default=0.4, help="users per second")
    parser.add_argument("--seconds", type=float, default=600.0, help="in which users arrive")
    parser.add_argument("--think", type=float, default=8.0, help="seconds between an answer and the next question")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    users = Users(given.base_url, given.model, given.seed, given.think)
    await users.arrive(given.rate, given.seconds)
    print(f"{users.requests} requests were answered")


if __name__ == "__main__":
    asyncio.run(main())
