// The calls of Replicate's documentation by its own JavaScript client: node client.js BASE TOKEN ZIP QUICK_JSON
const fs = require("node:fs");
const assert = require("node:assert");
const http = require("node:http");
const Replicate = require("replicate");

const [, , base, auth, zip, quick] = process.argv;
const sketch = { prompt: "a TOK", num_inference_steps: 1, output_format: "png", seed: 1 };

async function bytes(file) {
  return Buffer.from(await (await file.blob()).arrayBuffer());
}

async function webhook() {
  let end;
  const ended = new Promise((resolve) => (end = resolve));
  const server = http.createServer((request, response) => {
    let body = "";
    request.on("data", (part) => (body += part));
    request.on("end", () => {
      response.end();
      end({ headers: request.headers, body });
    });
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return { url: `http://127.0.0.1:${server.address().port}/`, ended, close: () => server.close() };
}

async function main() {
  const replicate = new Replicate({ auth, baseUrl: `${base}/v1` });
  assert.equal((await replicate.accounts.current()).username, "you");
  assert.ok((await replicate.hardware.list()).length);
  const made = await replicate.models.create("you", "by-javascript", { visibility: "private", hardware: "cpu" });
  assert.equal(made.name, "by-javascript");

  const file = await replicate.files.create(new Blob([fs.readFileSync(zip)], { type: "application/zip" }), { of: "js" });
  assert.deepEqual(file.metadata, { of: "js" });
  const inbox = await webhook();
  let training = await replicate.trainings.create("ostris", "flux-dev-lora-trainer", "a".repeat(64), {
    destination: "you/by-javascript",
    input: { input_images: file.urls.get, trigger_word: "TOK", ...JSON.parse(quick) },
    webhook: inbox.url,
    webhook_events_filter: ["completed"],
  });
  assert.equal(training.status, "starting");
  while (!["succeeded", "failed", "canceled"].includes(training.status)) {
    await new Promise((resolve) => setTimeout(resolve, 300));
    training = await replicate.trainings.get(training.id);
  }
  assert.equal(training.status, "succeeded", training.error);
  assert.ok(training.output.version.startsWith("you/by-javascript:"));
  assert.equal(require("replicate/lib/util").parseProgressFromLogs(training.logs).percentage, 1);
  const hook = await inbox.ended;
  inbox.close();
  const secret = (await replicate.webhooks.default.secret.get()).key;
  const asked = { id: hook.headers["webhook-id"], timestamp: hook.headers["webhook-timestamp"], body: hook.body };
  assert.ok(await Replicate.validateWebhook({ ...asked, signature: hook.headers["webhook-signature"], secret }));

  const [own] = await replicate.run("you/by-javascript", { input: sketch });
  assert.equal((await bytes(own)).subarray(1, 4).toString(), "PNG");
  const [again] = await replicate.run(training.output.version, { input: sketch, wait: { mode: "poll" } });
  const start = await bytes(again);
  const [changed] = await replicate.run("you/by-javascript", {
    input: { ...sketch, image: start, prompt_strength: 0.5, extra_lora: "you/by-javascript" },
  });
  assert.notDeepEqual(await bytes(changed), start);

  const events = [];
  for await (const event of replicate.stream("local/flux-lora-generator", { input: sketch })) events.push(event.event);
  assert.ok(events.includes("logs") && events.includes("output"), events.join());
  assert.equal(events.at(-1), "done");

  const going = await replicate.predictions.create({
    model: "you/by-javascript",
    input: { ...sketch, num_inference_steps: 50, num_outputs: 4 },
  });
  assert.ok(["canceled", "succeeded"].includes((await replicate.predictions.cancel(going.id)).status));
  assert.equal((await replicate.predictions.list()).results[0].id, going.id);
  assert.ok((await replicate.trainings.list()).results.some(({ id }) => id === training.id));
  for await (const page of replicate.paginate(replicate.models.list)) assert.ok(page.length);
  await assert.rejects(replicate.models.get("you", "nothing"), /404/);
  await replicate.files.delete(file.id);
  console.log("all is well");
}

main();
