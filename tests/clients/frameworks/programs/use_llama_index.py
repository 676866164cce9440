"""LlamaIndex: language models and embeddings for servers with OpenAI's API, and an index over texts."""

from __future__ import annotations

from typing import Any

from cases import TASK, Trip, report
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

SERVER: Any = {"model": "default", "api_base": TASK.chat, "api_key": "none", "temperature": 0, "max_retries": 0}
CHAT = OpenAILike(**SERVER, is_chat_model=True, max_tokens=TASK.tokens)


def completion() -> list[Any]:
    """With the default settings: the model is one for completions."""
    model = OpenAILike(**SERVER, max_tokens=TASK.tokens)
    chunks = list(model.stream_complete(TASK.prompt))
    return [model.complete(TASK.prompt).text, "".join(chunk.delta or "" for chunk in chunks)]


def chat() -> list[Any]:
    messages = [ChatMessage(role="user", content=TASK.question)]
    reply = CHAT.chat(messages)
    streamed = "".join(chunk.delta or "" for chunk in CHAT.stream_chat(messages))
    return [reply.message.content, streamed, reply.raw.usage.completion_tokens]


def structured_output() -> list[Any]:
    """By a JSON Schema, and by a function that must be called."""
    by_schema = OpenAILike(**SERVER, is_chat_model=True, max_tokens=200, should_use_structured_outputs=True)
    by_call = OpenAILike(**SERVER, is_chat_model=True, max_tokens=200, is_function_calling_model=True)
    first = by_schema.as_structured_llm(Trip).complete("Plan a trip.").raw
    program = FunctionCallingProgram.from_defaults(
        Trip, prompt_template_str="Plan a trip.", llm=by_call, tool_required=True, allow_parallel_tool_calls=False
    )
    return [first.model_dump(), program().model_dump()]


def embeddings() -> list[Any]:
    like = OpenAILikeEmbedding("default", api_base=TASK.vectors, api_key="none", max_retries=0)
    named = OpenAIEmbedding(model_name="default", api_base=TASK.vectors, api_key="none", max_retries=0)
    return [like.get_text_embedding_batch(TASK.texts), named.get_text_embedding_batch(TASK.texts)]


def index() -> list[Any]:
    """An index by our vectors, and an answer by the language model that has the nearest text in its prompt."""
    embedding = OpenAILikeEmbedding("default", api_base=TASK.vectors, api_key="none", max_retries=0)
    documents = [Document(text=text) for text in TASK.texts]
    found = VectorStoreIndex.from_documents(documents, embed_model=embedding)
    engine = found.as_query_engine(llm=CHAT, similarity_top_k=1)
    reply = engine.query(TASK.texts[2])
    return [[node.text for node in reply.source_nodes], str(reply)]


if __name__ == "__main__":
    report(completion, chat, structured_output, embeddings, index)
