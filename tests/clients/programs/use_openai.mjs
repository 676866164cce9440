// Programs with OpenAI's client for JavaScript; the arguments are the server's address and a program's name.
// Each prints one JSON value, for test_openai_javascript.py to compare.

import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { toResponseInputItems } from "openai/lib/responses/ResponseInputItems";
import { z } from "zod";

const [url, name] = process.argv.slice(1);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const greedy = { model: "default", temperature: 0 };
const question = "Name a colour.";
const messages = [{ role: "user", content: question }];
const chat = { ...greedy, messages, max_tokens: 12 };
const respond = { ...greedy, input: question, max_output_tokens: 12 };

const Colour = z.object({
  name: z.enum(["red", "green", "blue"]),
  shade: z.string().max(12).nullable(),
  parts: z.array(z.int().min(0).max(255)).length(3),
});
const Weather = z.object({ city: z.string().max(16), unit: z.enum(["celsius", "fahrenheit"]) });
const weather = { name: "get_weather", description: "The weather in a city.", parameters: Weather };
const rome = [{ role: "user", content: "What is the weather in Rome?" }];
const forced = { type: "function", function: { name: "get_weather" } };
const ask = { ...greedy, messages: rome, tools: [zodFunction(weather)], tool_choice: forced };
const askResponse = {
  ...greedy,
  input: rome,
  tools: [zodResponsesFunction(weather)],
  tool_choice: { type: "function", name: "get_weather" },
};

async function all(stream) {
  const found = [];
  for await (const one of stream) found.push(one);
  return found;
}

const programs = {
  async chat() {
    return client.chat.completions.create(chat);
  },

  async chatStream() {
    return all(await client.chat.completions.create({ ...chat, stream: true, stream_options: { include_usage: true } }));
  },

  async chatHelper() {
    const deltas = [];
    const stream = client.chat.completions.stream(chat).on("content", (delta) => deltas.push(delta));
    return { deltas, content: await stream.finalContent(), completion: await stream.finalChatCompletion() };
  },

  async parsed() {
    const format = { response_format: zodResponseFormat(Colour, "colour") };
    const whole = await client.chat.completions.parse({ ...greedy, messages, ...format });
    const stream = client.chat.completions.stream({ ...greedy, messages, ...format });
    const streamed = await stream.finalChatCompletion();
    return [whole, streamed].map((completion) => completion.choices[0].message.parsed);
  },

  async tool() {
    const whole = await client.chat.completions.parse(ask);
    const streamed = await client.chat.completions.stream(ask).finalChatCompletion();
    return [whole, streamed].map((completion) => completion.choices[0]);
  },

  async runTools() {
    const called = [];
    const lookUp = (given) => {
      called.push(given);
      return { temperature: 20 };
    };
    const tools = [zodFunction({ ...weather, function: lookUp })];
    const runner = client.chat.completions.runTools({ ...ask, tools });
    await runner.done();
    return { called, messages: runner.messages };
  },

  async toolResult() {
    const call = { id: "call_1", type: "function", function: { name: "get_weather", arguments: '{"city": "Rome"}' } };
    const turns = [
      ...rome,
      { role: "assistant", content: null, tool_calls: [call] },
      { role: "tool", tool_call_id: "call_1", content: '{"temperature": 20}' },
    ];
    return client.chat.completions.create({ ...chat, messages: turns, tools: ask.tools, tool_choice: "none" });
  },

  async response() {
    const response = await client.responses.create(respond);
    return { ...response, output_text: response.output_text };
  },

  async responseStream() {
    const events = await all(await client.responses.create({ ...respond, stream: true }));
    const helper = client.responses.stream(respond);
    return { events, final: await helper.finalResponse() };
  },

  async responseParsed() {
    const format = { ...greedy, input: question, text: { format: zodTextFormat(Colour, "colour") } };
    const streamed = await client.responses.stream(format).finalResponse();
    return [await client.responses.parse(format), streamed].map((response) => response.output_parsed);
  },

  async responseTool() {
    const first = await client.responses.parse(askResponse);
    const streamed = await client.responses.stream(askResponse).finalResponse();
    const [call] = first.output;
    const result = { type: "function_call_output", call_id: call.call_id, output: '{"temperature": 20}' };
    const input = [...rome, ...toResponseInputItems(first.output), result];
    const second = await client.responses.create({ ...askResponse, input, tool_choice: "none", max_output_tokens: 12 });
    return { calls: [call, streamed.output[0]], text: second.output_text };
  },

  async completion() {
    const fields = { ...greedy, prompt: "The capital of France is", max_tokens: 12 };
    const chunks = await all(await client.completions.create({ ...fields, stream: true }));
    return { whole: await client.completions.create(fields), chunks };
  },

  async embeddings() {
    const fields = { model: "default", input: ["A man is eating.", "The sea is calm."] };
    const options = [{}, { encoding_format: "float" }, { dimensions: 384 }];
    return Promise.all(options.map((more) => client.embeddings.create({ ...fields, ...more })));
  },

  async models() {
    const [model] = await all(client.models.list());
    return [model, await client.models.retrieve(model.id)];
  },

  async refused() {
    try {
      return await client.chat.completions.create({ ...chat, temperature: -1 });
    } catch (error) {
      return { class: error.constructor.name, status: error.status, message: error.message };
    }
  },
};

console.log(JSON.stringify(await programs[name]()));
