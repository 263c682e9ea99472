// An evaluation of texts and images by promptfoo's command line: `node promptfoo.mjs URL MODEL IMAGE`.

import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const [url, model, image] = process.argv.slice(2);
const command = join(dirname(fileURLToPath(import.meta.url)), "node_modules/promptfoo/dist/src/entrypoint.js");
const text = "A flamingo is";

function expect(isMet, message) {
  if (!isMet) throw new Error(typeof message === "string" ? message : JSON.stringify(message));
}

// Run an evaluation in a folder of its own, without cache, telemetry and updates, and return the results of its output.
function evaluate(config) {
  const folder = mkdtempSync(join(tmpdir(), "promptfoo-"));
  const [input, output] = [join(folder, "config.json"), join(folder, "output.json")];
  const off = Object.fromEntries(
    ["TELEMETRY", "UPDATE", "REMOTE_GENERATION", "SHARING"].map((name) => [`PROMPTFOO_DISABLE_${name}`, "1"]),
  );
  const env = { ...process.env, ...off, PROMPTFOO_CONFIG_DIR: folder, PROMPTFOO_FAILED_TEST_EXIT_CODE: "0" };
  const provider = {
    id: `openai:chat:${model}`,
    config: { apiBaseUrl: `${url}/v1`, apiKey: "none", temperature: 0, max_tokens: 8 },
  };
  try {
    writeFileSync(input, JSON.stringify({ providers: [provider], ...config }));
    const options = ["eval", "--config", input, "--output", output, "--no-cache", "--no-table", "--no-progress-bar"];
    execFileSync(process.execPath, [command, ...options], { cwd: folder, env, stdio: ["ignore", "ignore", "inherit"] });
    return JSON.parse(readFileSync(output, "utf8")).results;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

async function answer(content) {
  const body = { model, messages: [{ role: "user", content }], temperature: 0, max_tokens: 8 };
  const headers = { "Content-Type": "application/json" };
  const response = await fetch(`${url}/v1/chat/completions`, { method: "POST", headers, body: JSON.stringify(body) });
  return (await response.json()).choices[0].message.content;
}

async function evaluateTexts() {
  const expected = await answer(text);
  const { stats, results } = evaluate({
    prompts: ["{{text}}"],
    tests: [
      { vars: { text }, assert: [{ type: "equals", value: expected }] },
      { vars: { text }, assert: [{ type: "equals", value: "another answer" }] },
    ],
  });
  expect(stats.successes === 1 && stats.failures === 1 && stats.errors === 0, stats);
  expect(results.every((result) => result.response.output === expected), results);
  expect(results[0].response.tokenUsage.total > 0, results[0].response.tokenUsage);
  return `1 of 2 assertions holds, about ${JSON.stringify(expected)}`;
}

async function evaluateImages() {
  const content = [{ type: "image_url", image_url: { url: "{{image}}" } }, { type: "text", text: "{{text}}" }];
  const expected = await answer([{ type: "image_url", image_url: { url: image } }, { type: "text", text }]);
  const { stats, results } = evaluate({
    prompts: [JSON.stringify([{ role: "user", content }])],
    tests: [{ vars: { image, text }, assert: [{ type: "equals", value: expected }] }],
  });
  expect(stats.successes === 1 && stats.failures === 0 && stats.errors === 0, { stats, results });
  return JSON.stringify(expected);
}

async function evaluateSchema() {
  const schema = {
    type: "object",
    properties: { animal: { enum: ["cat", "flamingo"] } },
    required: ["animal"],
    additionalProperties: false,
  };
  const format = { type: "json_schema", json_schema: { name: "animal", strict: true, schema } };
  const { stats, results } = evaluate({
    prompts: ["{{text}}"],
    tests: [{ vars: { text }, options: { response_format: format }, assert: [{ type: "is-json", value: schema }] }],
  });
  expect(stats.successes === 1 && stats.errors === 0, { stats, results });
  return JSON.stringify(results[0].response.output);
}

const habits = { "texts": evaluateTexts, "images": evaluateImages, "JSON schema": evaluateSchema };

for (const [habit, run] of Object.entries(habits)) {
  try {
    console.log(JSON.stringify({ habit, ok: true, detail: await run() }));
  } catch (error) {
    console.error(error);
    console.log(JSON.stringify({ habit, ok: false, detail: `${error.name}: ${error.message}` }));
  }
}
