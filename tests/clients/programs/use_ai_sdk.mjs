// Programs with the AI SDK; the arguments are the server's address, a program's name and a provider's.
// Each prints one JSON value, for test_ai_sdk.py to compare.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, embedMany, generateObject, generateText, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const [url, name, provider] = process.argv.slice(1);
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "trunkline",
  baseURL: `${url}/v1`,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = {
  responses: () => openai("default"),
  chat: () => openai.chat("default"),
  completion: () => openai.completion("default"),
  compatible: () => compatible("default"),
  "compatible-completion": () => compatible.completionModel("default"),
  embedding: () => openai.embedding("default"),
  "compatible-embedding": () => compatible.embeddingModel("default"),
}[provider]();

const greedy = { model, temperature: 0, maxRetries: 0 };
const question = { ...greedy, prompt: "Name a colour.", maxOutputTokens: 12 };
const schema = z.object({
  name: z.enum(["red", "green", "blue"]),
  shade: z.string().max(12).nullable(),
  parts: z.array(z.int().min(0).max(255)).length(3),
});
const Weather = z.object({ city: z.string().max(16), unit: z.enum(["celsius", "fahrenheit"]) });
const get_weather = tool({ description: "The weather in a city.", inputSchema: Weather });
const ask = {
  ...greedy,
  prompt: "What is the weather in Rome?",
  tools: { get_weather },
  toolChoice: { type: "tool", toolName: "get_weather" },
};

async function all(stream) {
  const found = [];
  for await (const one of stream) found.push(one);
  return found;
}

const programs = {
  async text() {
    const { text, usage, finishReason } = await generateText(question);
    return { text, usage, finishReason };
  },

  async stream() {
    const answer = streamText(question);
    const pieces = await all(answer.textStream);
    return { pieces, text: await answer.text, usage: await answer.usage, finishReason: await answer.finishReason };
  },

  async object() {
    const fields = { ...greedy, prompt: question.prompt, schema };
    const answer = streamObject(fields);
    const parts = await all(answer.partialObjectStream);
    return { whole: (await generateObject(fields)).object, parts, streamed: await answer.object };
  },

  async tool() {
    const whole = await generateText(ask);
    const answer = streamText(ask);
    await answer.consumeStream();
    return [whole.toolCalls, await answer.toolCalls];
  },

  async toolResult() {
    const { toolCalls, response } = await generateText(ask);
    const [{ toolCallId, toolName, input }] = toolCalls;
    const content = [{ type: "tool-result", toolCallId, toolName, output: { type: "json", value: { temperature: 20 } } }];
    const messages = [{ role: "user", content: ask.prompt }, ...response.messages, { role: "tool", content }];
    const { text } = await generateText({
      ...greedy,
      messages,
      tools: ask.tools,
      toolChoice: "none",
      maxOutputTokens: 12,
      providerOptions: { openai: { store: false } }, // else it sends references to what the server should have stored
    });
    return { input, text };
  },

  async embed() {
    const values = ["A man is eating.", "The sea is calm."];
    const several = await embedMany({ model, values });
    const single = await embed({ model, value: values[0] });
    return { several: several.embeddings, single: single.embedding, usage: several.usage };
  },
};

console.log(JSON.stringify(await programs[name]()));
