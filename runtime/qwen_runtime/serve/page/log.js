// The conversation as it is read: one article for each question, each answer and each failure.

import { $, button, copyButton, element, throttled } from "./dom.js";
import { Markdown } from "./markdown.js";
import { picture } from "./pictures.js";

/** Follow the answer, unless the reader has scrolled up. */
export function scroll(always) {
  const log = $("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

export function clear() {
  for (const node of $("log").querySelectorAll("article")) node.remove();
  $("greeting").hidden = false;
}

/** Take away what only says why there is no answer. */
export function clearFailures() {
  for (const node of $("log").querySelectorAll("article.failed")) node.remove();
}

function article(role, label, ...children) {
  const node = element("article", { className: role }, ...children);
  node.setAttribute("aria-label", label);
  $("greeting").hidden = true;
  $("log").append(node);
  scroll(true);
  return node;
}

/** A question. `edit` gets its new text; without it nothing can be edited. */
export function question({ content, images = [] }, edit) {
  const said = element("div", { className: "said" }, ...images.map(picture), content);
  const node = article("user", "You", said);
  if (!edit) return;
  const footer = element("footer", {}, button("Edit", () => editor(node, [said, footer], content, edit)));
  node.append(footer);
}

function editor(node, shown, content, edit) {
  const text = element("textarea", { value: content, rows: Math.min(12, content.split("\n").length + 1) });
  text.setAttribute("aria-label", "Edit your question");
  const cancel = () => {
    node.replaceChildren(...shown);
    shown[1].querySelector("button").focus();
  };
  const save = () => text.value.trim() && edit(text.value.trim());
  text.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      save();
    }
  });
  const asking = Object.assign(button("Ask again", save), { className: "chief" });
  node.replaceChildren(text, element("footer", {}, asking, button("Cancel", cancel)));
  text.focus();
}

/** Why there is no answer; `again` asks for one. */
export function failure(text, again) {
  article("failed", "No answer", element("span", {}, text), ...(again ? [button("Try again", again)] : []));
}

/** An answer, which may still be written. */
export class Answer {
  #message;
  #body = new Markdown();
  #thoughts = element("div");
  #later = throttled(() => this.#node.isConnected && this.#draw());
  #node;

  /** `message` is { content, thoughts }, and is looked at again whenever it is drawn. */
  constructor(message) {
    this.#message = message;
    this.#node = article("assistant working", "Answer", this.#body.node);
  }

  changed() {
    this.#later();
  }

  #draw() {
    const { content, thoughts } = this.#message;
    if (thoughts && !this.#thoughts.parentNode) {
      const summary = element("summary", {}, "Thoughts");
      this.#body.node.before(element("details", {}, summary, this.#thoughts));
    }
    this.#thoughts.append(thoughts.slice(this.#thoughts.textContent.length));
    this.#body.show(content);
    scroll(false);
  }

  /** It is whole now. `again` makes another in its place. */
  end(again) {
    this.#draw();
    this.#node.classList.remove("working");
    const regenerate = Object.assign(button("Regenerate", again), { className: "again" });
    const { content } = this.#message;
    const copy = content ? copyButton(() => content) : "";
    this.#node.append(element("footer", {}, copy, regenerate, this.#message.facts ?? ""));
    scroll(false);
  }

  remove() {
    this.#node.remove();
  }
}
