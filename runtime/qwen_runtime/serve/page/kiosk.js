// For a public screen: nothing is kept, nothing can be set, and the chat ends when nobody is there.

import { $ } from "./dom.js";

const options = new URLSearchParams(location.search);
const idleSeconds = Number(options.get("idle") ?? 120);

export const kiosk = options.has("kiosk");

/** `busy`: whether an answer is being written, which is not cut off; `reset` goes back to the greeting. */
export function startKiosk(busy, reset) {
  document.body.classList.add("kiosk");
  $("greeting").textContent = options.get("greeting") ?? "Touch here and ask me something.";
  let timer;
  const touched = () => {
    clearTimeout(timer);
    timer = setTimeout(() => (busy() ? touched() : reset()), idleSeconds * 1000);
  };
  for (const name of ["pointerdown", "keydown", "scroll"]) addEventListener(name, touched, true);
  addEventListener("pointerdown", () => document.documentElement.requestFullscreen?.().catch(() => {}), {
    once: true,
  });
  addEventListener("contextmenu", (event) => event.preventDefault());
  touched();
}
