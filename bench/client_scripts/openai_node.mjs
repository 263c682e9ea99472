// Chat, embeddings and parsed objects by OpenAI's client for Node: `node openai_node.mjs URL MODEL IMAGE`.

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, model, image] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "-", maxRetries: 0 });
const text = "A flamingo is";
const person = z.object({
  name: z.string(),
  age: z.number().int(),
  email: z.string().nullable(),
  address: z.object({ street: z.string(), kind: z.enum(["home", "work"]) }).nullable(),
});

function fields(content) {
  return { model, messages: [{ role: "user", content }], temperature: 0, max_tokens: 8 };
}

function expect(isMet, message) {
  if (!isMet) throw new Error(typeof message === "string" ? message : JSON.stringify(message));
}

async function answerChat() {
  const reply = await client.chat.completions.create(fields(text));
  expect(reply.choices[0].message.content, reply);
  return JSON.stringify(reply.choices[0].message.content);
}

async function streamChat() {
  const chunks = [];
  for await (const chunk of await client.chat.completions.create({ ...fields(text), stream: true })) chunks.push(chunk);
  const streamed = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  const whole = await client.chat.completions.create(fields(text));
  expect(streamed === whole.choices[0].message.content, `streamed ${JSON.stringify(streamed)}`);
  return `${chunks.length} chunks, the text of the whole answer`;
}

async function useStreamHelper() {
  const streamed = await client.chat.completions.stream(fields(text)).finalChatCompletion();
  const whole = await client.chat.completions.create(fields(text));
  expect(streamed.choices[0].message.content === whole.choices[0].message.content, streamed);
  return JSON.stringify(streamed.choices[0].message.content);
}

async function answerWithImage() {
  const content = [{ type: "image_url", image_url: { url: image } }, { type: "text", text }];
  const reply = await client.chat.completions.create(fields(content));
  const without = await client.chat.completions.create(fields(text));
  const tokens = reply.usage.prompt_tokens - without.usage.prompt_tokens;
  expect(tokens > 0, `${tokens} tokens of the image`);
  expect(reply.choices[0].message.content, reply);
  return JSON.stringify(reply.choices[0].message.content);
}

async function embed() {
  const input = ["a cat", "a dog"];
  const vectors = (await client.embeddings.create({ model, input })).data.map((item) => item.embedding);
  const numbers = (await client.embeddings.create({ model, input, encoding_format: "float" })).data.map(
    (item) => item.embedding,
  );
  const difference = Math.max(...vectors.flatMap((vector, i) => vector.map((x, j) => Math.abs(x - numbers[i][j]))));
  expect(vectors.length === 2 && vectors[0].length > 0, vectors);
  expect(vectors[0].length === numbers[0].length && difference < 1e-4, `base64 and float differ by ${difference}`);
  return `2 vectors of ${vectors[0].length} numbers, by base64 and by float`;
}

async function parse() {
  const reply = await client.chat.completions.parse({
    ...fields("John Smith, 42, lives at 12 Main Street, Springfield."),
    max_tokens: 128,
    response_format: zodResponseFormat(person, "person"),
  });
  const parsed = person.parse(reply.choices[0].message.parsed);
  return `{name: ${JSON.stringify(parsed.name)}, age: ${parsed.age}, …}`;
}

const habits = {
  "chat": answerChat,
  "chat, streamed": streamChat,
  "chat, stream helper": useStreamHelper,
  "chat with an image": answerWithImage,
  "embeddings": embed,
  "parse with zod": parse,
};

for (const [habit, run] of Object.entries(habits)) {
  try {
    console.log(JSON.stringify({ habit, ok: true, detail: await run() }));
  } catch (error) {
    console.error(error);
    console.log(JSON.stringify({ habit, ok: false, detail: `${error.name}: ${error.message}` }));
  }
}
