// The page: the chat at hand, and what its buttons and keys do.

import * as api from "./api.js";
import { offerChats } from "./chats.js";
import { $, element } from "./dom.js";
import { isKept, save } from "./history.js";
import { kiosk, startKiosk } from "./kiosk.js";
import { Answer, clear, clearFailures, failure, question } from "./log.js";
import { anyWaiting, attach, takeAll } from "./pictures.js";

const KEY = "key"; // in sessionStorage, which may be forbidden

let models = [];
let served = null; // the model that is asked
let chat = newChat();
let running = null; // AbortController of the answer that is being written
let thinkChosen = false; // whether the switch was touched, and the server's default says nothing any more

/** Messages are { role, content } with a question's `images`, and an answer's `thoughts` and `facts`. */
function newChat() {
  return { id: `${Date.now()}-${Math.random()}`, title: "", model: served?.id, messages: [] };
}

async function keep(one) {
  if (kiosk || one.removed || !isKept()) return;
  $("not-kept").hidden = await save(one);
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  $("log").setAttribute("aria-busy", String(controller !== null));
}

function sent({ role, content, images = [] }) {
  if (!images.length) return { role, content };
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role, content: [...parts, { type: "text", text: content }] };
}

function request(messages) {
  const system = $("system").value.trim();
  const numbers = { temperature: $("temperature").value, max_tokens: $("max-tokens").value };
  return {
    model: served.id,
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...messages.filter(({ role, content }) => role === "user" || content).map(sent),
    ],
    chat_template_kwargs: { enable_thinking: $("think").checked },
    ...Object.fromEntries(
      Object.entries(numbers).filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]),
    ),
  };
}

async function ask() {
  const text = $("text").value.trim();
  if (running || !served || (!text && !anyWaiting())) return;
  $("text").value = "";
  grow();
  clearFailures();
  await add({ role: "user", content: text, images: takeAll() });
}

/** Put a question to the chat, and have it answered. */
async function add(message) {
  chat.title ||= message.content.split("\n")[0].slice(0, 80) || "An image";
  chat.model = served.id;
  chat.messages.push(message);
  drawQuestion(message, chat.messages.length - 1);
  keep(chat);
  await answer();
}

function drawQuestion(message, at) {
  question(message, kiosk ? null : (content) => edit(at, content));
}

/** Ask another question in place of one. The chat as it was stays among those that are kept. */
function edit(at, content) {
  if (!served) return;
  const { messages } = chat;
  show({ ...newChat(), messages: messages.slice(0, at), title: at ? chat.title : "" });
  add({ ...messages[at], content });
}

function regenerate() {
  if (running || !served) return;
  const before = chat.messages.at(-1).role === "assistant" ? chat.messages.pop() : null;
  show(chat);
  clearFailures();
  answer(before);
}

/** Let the model answer the chat at hand. Where it writes nothing, `before` stays the answer. */
async function answer(before = null) {
  const [one, controller] = [chat, new AbortController()];
  setRunning(controller);
  const message = { role: "assistant", content: "", thoughts: "" };
  const drawn = new Answer(message);
  let why = "";
  $("status").textContent = "Reading\u2026";
  try {
    await write(message, drawn, request(one.messages), controller.signal);
  } catch (error) {
    why = error.name === "AbortError" ? "Stopped." : explained(error);
  }
  const written = message.content || message.thoughts;
  const kept = written ? message : before;
  if (kept) one.messages.push(kept);
  if (written) keep(one);
  if (running === controller) setRunning(null);
  if (one !== chat) return; // another chat is at hand meanwhile
  $("status").textContent = kept && why === "Stopped." ? why : "";
  if (written) drawn.end(regenerate);
  else drawn.remove();
  if (!written && before) drawAnswer(before);
  if (why && !(kept && why === "Stopped.")) failure(why, kept ? null : regenerate);
  if (!document.querySelector("dialog[open]")) $("text").focus();
}

async function write(message, drawn, asked, signal) {
  const begun = performance.now();
  let [first, usage, cut] = [0, null, false];
  for await (const chunk of api.chat(asked, $("key").value, signal)) {
    if (chunk.of && !first) $("status").textContent = `Reading: ${chunk.read} of ${chunk.of} tokens\u2026`;
    usage = chunk.usage ?? usage;
    const { delta = {}, finish_reason: reason } = chunk.choices?.[0] ?? {};
    cut ||= reason === "length";
    if (!delta.content && !delta.reasoning_content) continue;
    if (!first) {
      first = performance.now();
      $("status").textContent = "";
    }
    message.thoughts += delta.reasoning_content ?? "";
    message.content += delta.content ?? "";
    drawn.changed();
  }
  if (!usage || !first) return;
  const rate = (usage.completion_tokens - 1) / ((performance.now() - first) / 1000);
  const wait = ((first - begun) / 1000).toFixed(1);
  message.facts = `${usage.completion_tokens} tokens, ${rate.toFixed(1)} a second, first after ${wait} s`;
  if (cut) message.facts += ", cut off at the limit";
}

/** What went wrong, for the person at the page. A key is asked for at once. */
function explained(error) {
  if (error.status === 401) {
    $("key-wanted").hidden = false;
    if (!$("settings").open) $("settings").showModal();
    $("key").focus();
  }
  if (kiosk && error.status !== 429) return "Something went wrong. Please try again.";
  return error instanceof api.ApiError ? error.message : "The server cannot be reached: is it running?";
}

function drawAnswer(message) {
  new Answer(message).end(regenerate);
}

/** Make another chat the one at hand. */
function show(other) {
  running?.abort();
  setRunning(null);
  chat = other;
  clear();
  $("status").textContent = "";
  for (const [at, message] of chat.messages.entries()) {
    if (message.role === "user") drawQuestion(message, at);
    else drawAnswer(message);
  }
  if (chat.messages.at(-1)?.role === "user") failure("Not answered yet.", regenerate);
  const wanted = models.find(({ id }) => id === chat.model);
  if (wanted) change(wanted);
}

function reset() {
  takeAll();
  show(newChat());
  $("text").value = "";
  grow();
  $("text").focus();
}

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

async function connect() {
  try {
    models = await api.models($("key").value);
    const state = await api.health();
    $("provider").textContent = `on ${state.provider}`;
    $("models").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
    $("models").hidden = kiosk || models.length < 2;
    $("model").classList.toggle("hidden", !$("models").hidden);
    await choose(models.find(({ id }) => id === state.model) ?? models[0]);
  } catch (error) {
    // The server may be starting, or loading its model.
    if (!(error instanceof api.ApiError) || error.status === 503) setTimeout(connect, 2000);
    else $("status").textContent = explained(error);
  }
}

/** Ask another model from now on. */
function change(model) {
  choose(model).catch((error) => ($("status").textContent = explained(error)));
}

async function choose(model) {
  if (model === served) return;
  const { chat_template_kwargs: template } = await api.defaults($("key").value, model.id);
  served = model;
  if (!thinkChosen) $("think").checked = template.enable_thinking;
  $("models").value = model.id;
  $("model").textContent = document.title = kiosk ? "Ask me" : model.id;
  $("attach").hidden = !model.images;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
$("text").addEventListener("input", grow);
$("text").addEventListener("paste", (event) => served?.images && attach(event.clipboardData.files));
$("stop").addEventListener("click", () => running?.abort());
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
});
$("new").addEventListener("click", reset);
$("models").addEventListener("change", () => change(models.find(({ id }) => id === $("models").value)));
$("think").addEventListener("change", () => (thinkChosen = true));
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("close", () => {
  $("key-wanted").hidden = true;
  try {
    sessionStorage.setItem(KEY, $("key").value);
  } catch {
    // it is asked for again after a reload
  }
  if (!served && $("key").value) connect();
});
$("attach").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  await attach($("file").files);
  $("file").value = "";
});
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    $("form").classList.toggle("over", name === "dragover" && Boolean(served?.images));
    if (name === "drop" && served?.images) attach(event.dataTransfer.files);
  });
}
try {
  $("key").value = sessionStorage.getItem(KEY) ?? "";
} catch {
  // no key is kept here
}
if (kiosk) {
  startKiosk(() => running !== null, reset);
} else {
  offerChats({
    current: () => chat,
    choose: show,
    removed(id) {
      if (id !== chat.id) return;
      chat.removed = true;
      reset();
    },
  });
}
connect();
