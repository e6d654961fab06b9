// The page: one conversation, kept in memory only.

import { ApiError, chat, health, model } from "./api.js";
import { markdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const options = new URLSearchParams(location.search);
const kiosk = options.has("kiosk");
const idleSeconds = Number(options.get("idle") ?? 120);
const LARGEST_SIDE = 1536; // pixels of an image that is sent

let served = null; // the model
let messages = [];
let images = []; // data URLs that go with the next message
let running = null; // AbortController of the answer that is being written

function article(role, ...children) {
  const node = document.createElement("article");
  node.className = role;
  node.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  node.append(...children);
  $("greeting").hidden = true;
  $("log").append(node);
  scroll(true);
  return node;
}

/** Follow the answer, unless the reader has scrolled up. */
function scroll(always) {
  const log = $("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function picture(url) {
  return Object.assign(document.createElement("img"), { src: url, alt: "Attached image" });
}

function button(label, act) {
  const node = Object.assign(document.createElement("button"), { type: "button", textContent: label });
  node.addEventListener("click", act);
  return node;
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  $("log").setAttribute("aria-busy", String(controller !== null));
}

function request() {
  const system = $("system").value.trim();
  const numbers = { temperature: $("temperature").value, max_tokens: $("max-tokens").value };
  return {
    model: served.id,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    chat_template_kwargs: { enable_thinking: $("think").checked },
    ...Object.fromEntries(
      Object.entries(numbers).filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]),
    ),
  };
}

async function send() {
  const text = $("text").value.trim();
  if (running || !served || (!text && !images.length)) return;
  article("user", ...images.map(picture), text);
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  messages.push({ role: "user", content: parts.length ? [...parts, { type: "text", text }] : text });
  $("text").value = "";
  images = [];
  showImages();
  grow();
  await answer();
}

async function answer() {
  const controller = new AbortController();
  setRunning(controller);
  const node = article("assistant working");
  const thoughts = document.createElement("div");
  const body = document.createElement("div");
  node.append(body);
  let written = "";
  let usage = null;
  let first = 0;
  const begun = performance.now();
  $("status").textContent = "Reading\u2026";
  try {
    for await (const chunk of chat(request(), $("key").value, controller.signal)) {
      usage = chunk.usage ?? usage;
      const delta = chunk.choices[0]?.delta ?? {};
      if (!first && (delta.content || delta.reasoning_content)) {
        first = performance.now();
        $("status").textContent = "";
      }
      if (delta.reasoning_content) {
        if (!thoughts.parentNode) {
          const details = document.createElement("details");
          const summary = Object.assign(document.createElement("summary"), { textContent: "Thoughts" });
          details.append(summary, thoughts);
          body.before(details);
        }
        thoughts.append(delta.reasoning_content);
      }
      if (delta.content) {
        written += delta.content;
        body.replaceChildren(...markdown(written));
      }
      scroll(false);
    }
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  } finally {
    node.classList.remove("working");
    $("status").textContent = controller.signal.aborted ? "Stopped." : "";
    if (running === controller) setRunning(null);
  }
  if (!node.isConnected) return; // a new chat has begun meanwhile
  if (!written && !thoughts.parentNode) {
    node.remove();
    messages.pop(); // the question can be asked again
    return;
  }
  messages.push({ role: "assistant", content: written });
  node.append(footer(written, usage, begun, first));
  scroll(false);
  $("text").focus();
}

function footer(written, usage, begun, first) {
  const node = document.createElement("footer");
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(written);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  if (navigator.clipboard) node.append(copy); // browsers have none on plain HTTP from another machine
  if (usage && first) {
    const rate = (usage.completion_tokens - 1) / ((performance.now() - first) / 1000);
    const wait = (first - begun) / 1000;
    node.append(`${usage.completion_tokens} tokens, ${rate.toFixed(1)} a second, first after ${wait.toFixed(1)} s`);
  }
  return node;
}

function fail(error) {
  let text = "The server cannot be reached: is it running?";
  if (error instanceof ApiError) text = error.message;
  if (error.status === 401) $("settings").showModal();
  article("failed", kiosk && error.status !== 429 ? "Something went wrong. Please try again." : text);
}

/** Redrawn at a size that the model can use; a file that is no image is refused here already. */
async function attach(files) {
  for (const file of files) {
    try {
      const bitmap = await createImageBitmap(file);
      const scale = Math.min(1, LARGEST_SIDE / Math.max(bitmap.width, bitmap.height));
      const canvas = document.createElement("canvas");
      canvas.width = Math.max(1, Math.round(bitmap.width * scale));
      canvas.height = Math.max(1, Math.round(bitmap.height * scale));
      canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      images.push(canvas.toDataURL("image/png"));
    } catch {
      $("status").textContent = `${file.name || "That"} is not an image that this browser can read.`;
    }
  }
  showImages();
}

function showImages() {
  $("images").replaceChildren(
    ...images.map((url, index) => {
      const item = document.createElement("li");
      const remove = button("\u00d7", () => {
        images.splice(index, 1);
        showImages();
      });
      remove.setAttribute("aria-label", `Remove image ${index + 1}`);
      item.append(picture(url), remove);
      return item;
    }),
  );
}

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

function reset() {
  running?.abort();
  messages = [];
  images = [];
  showImages();
  for (const node of $("log").querySelectorAll("article")) node.remove();
  $("greeting").hidden = false;
  $("text").value = "";
  $("status").textContent = "";
  grow();
  $("text").focus();
}

async function connect() {
  try {
    served = await model($("key").value);
    const state = await health();
    $("model").textContent = document.title = kiosk ? "Ask me" : served.id;
    $("provider").textContent = `on ${state.provider}`;
    $("attach").hidden = !served.images;
  } catch (error) {
    if (error instanceof ApiError) fail(error);
    else setTimeout(connect, 2000); // the server may be starting
  }
}

function startKiosk() {
  document.body.classList.add("kiosk");
  $("greeting").textContent = options.get("greeting") ?? "Touch here and ask me something.";
  let timer;
  const touched = () => {
    clearTimeout(timer);
    timer = setTimeout(() => (running ? touched() : reset()), idleSeconds * 1000);
  };
  for (const name of ["pointerdown", "keydown", "scroll"]) addEventListener(name, touched, true);
  addEventListener("pointerdown", () => document.documentElement.requestFullscreen?.().catch(() => {}), {
    once: true,
  });
  addEventListener("contextmenu", (event) => event.preventDefault());
  touched();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("text").addEventListener("input", grow);
$("text").addEventListener("paste", (event) => served?.images && attach(event.clipboardData.files));
$("stop").addEventListener("click", () => running?.abort());
addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
$("new").addEventListener("click", reset);
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("close", () => {
  sessionStorage.setItem("key", $("key").value);
  if (!served) connect();
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
$("key").value = sessionStorage.getItem("key") ?? "";
if (kiosk) startKiosk();
connect();
