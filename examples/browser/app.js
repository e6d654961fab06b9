// The page: ?artifact=ADDRESS of the folder, ?provider=webgpu or wasm, ?temperature=0.

import { UserError } from "./download.js";
import { Model } from "./model.js";

const asked = new URLSearchParams(location.search);
const [progress, status, form, text, send, stop] = ["progress", "status", "form", "text", "send", "stop"].map(
  (id) => document.getElementById(id),
);
const messages = [];
let model, running;

function say(message, isError = false) {
  status.textContent = message;
  status.classList.toggle("error", isError);
}

/** One line for the person at the page; what nobody foresaw also goes to the console. */
function fail(error) {
  if (error.name === "AbortError") return say("Stopped. Reload the page to begin again.");
  if (!(error instanceof UserError)) console.error(error);
  say(error instanceof UserError ? error.message : `Something failed: ${error.message}. Reload the page.`, true);
}

function busy(controller) {
  running = controller;
  send.hidden = Boolean(controller);
  stop.hidden = !controller;
}

function article(role) {
  const element = document.createElement("article");
  element.className = role;
  return document.getElementById("conversation").appendChild(element);
}

async function load() {
  busy(new AbortController());
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  try {
    model = await Model.load(new URL(`${asked.get("artifact") ?? "artifact"}/`, location.href), {
      provider: asked.get("provider"),
      signal: running.signal,
      report(loaded, total) {
        progress.value = loaded / total;
        say(loaded < total ? `${megabytes(loaded)} of ${megabytes(total)} MB` : "Preparing the model");
      },
    });
    document.getElementById("model").textContent = model.name;
    document.getElementById("provider").textContent = `on ${model.provider}`;
    say(model.reasons.join("; "));
    text.disabled = send.disabled = false;
    text.focus();
  } catch (error) {
    fail(error);
  }
  progress.hidden = true;
  busy(null);
}

async function answer(question) {
  messages.push({ role: "user", content: question });
  article("user").textContent = question;
  const element = article("assistant");
  busy(new AbortController());
  say("");
  try {
    const temperature = asked.get("temperature");
    const sampling = { ...model.defaults, ...(temperature !== null && { temperature: Number(temperature) }) };
    for await (const piece of model.answer(model.prompt(messages), { sampling, signal: running.signal }))
      element.textContent += piece.text;
    messages.push({ role: "assistant", content: element.textContent });
  } catch (error) {
    messages.pop();
    fail(error);
  }
  busy(null);
  text.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = text.value.trim();
  if (!question || running || !model) return;
  text.value = "";
  answer(question);
});
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
stop.addEventListener("click", () => running?.abort());
load();
