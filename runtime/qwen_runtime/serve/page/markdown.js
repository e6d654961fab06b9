// Markdown as models write it, to DOM nodes: parsed by marked, and cleaned by DOMPurify. HTML in it is shown as
// text, pictures are links, links go to the web only, and formulas stay as they were written.

import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";

import { copyButton, element } from "./dom.js";
import { kiosk } from "./kiosk.js";

const WEB = /^(?:https?:\/\/|mailto:)/i;
const LONGEST = 400_000; // characters; beyond them the text is shown as it is
const CLEAN = {
  ALLOWED_TAGS: [
    ...["p", "br", "hr", "strong", "em", "del", "code", "pre", "span", "a", "blockquote", "ul", "ol", "li"],
    ...["h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"],
  ],
  ALLOWED_ATTR: ["href", "class", "align", "start"],
  ALLOWED_URI_REGEXP: WEB, // of every attribute but class, and:
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

const escaped = (text) => text.replace(/[&<>"']/g, (character) => ESCAPES[character]);

// TeX between its signs. A lone dollar is money, so it begins a formula only before and ends it only after a sign
// that is no space, and not before a digit.
const BLOCK_MATH = /^ {0,3}(?:\$\$[^]{1,4000}?\$\$|\\\[[^]{1,4000}?\\\])[ \t]*(?:\n|$)/;
const INLINE_MATH =
  /^(?:\$\$[^]{1,4000}?\$\$|\\\[[^]{1,4000}?\\\]|\\\([^]{1,4000}?\\\)|\$(?![\s$])(?:[^$\n\\]|\\.){0,400}?(?<!\s)\$(?!\d))/;

const math = [
  {
    name: "blockMath",
    level: "block",
    start: (text) => /^ {0,3}(?:\$\$|\\\[)/m.exec(text)?.index,
    tokenizer(text) {
      const match = BLOCK_MATH.exec(text);
      return match ? { type: "blockMath", raw: match[0], text: match[0].trim() } : undefined;
    },
    renderer: (token) => `<p class="math">${escaped(token.text)}</p>`,
  },
  {
    name: "inlineMath",
    level: "inline",
    start: (text) => /\$|\\[([]/.exec(text)?.index,
    tokenizer(text) {
      const match = INLINE_MATH.exec(text);
      return match ? { type: "inlineMath", raw: match[0] } : undefined;
    },
    renderer: (token) => `<span class="math">${escaped(token.raw)}</span>`,
  },
];

const renderer = {
  html: ({ text, block }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)),
  checkbox: ({ checked }) => (checked ? "\u2611 " : "\u2610 "),
  heading({ tokens, depth }) {
    const name = `h${Math.min(6, depth + 1)}`; // below the page's own
    return `<${name}>${this.parser.parseInline(tokens)}</${name}>`;
  },
  link({ href, raw, tokens }) {
    return WEB.test(href) ? `<a href="${escaped(href)}">${this.parser.parseInline(tokens)}</a>` : escaped(raw);
  },
  image: ({ href, raw, text }) =>
    WEB.test(href) ? `<a href="${escaped(href)}">${escaped(text || href)}</a>` : escaped(raw),
};

const marked = new Marked({ breaks: true, renderer, extensions: math });

function finished(fragment) {
  for (const link of fragment.querySelectorAll("a")) {
    if (kiosk) link.replaceWith(...link.childNodes); // a public screen shows no other page
    else Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = element("div", { className: "table", tabIndex: 0 });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const language = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "";
    const frame = element("div", { className: "code" });
    pre.tabIndex = 0; // what scrolls is reached by keys
    pre.replaceWith(frame);
    frame.append(element("div", {}, element("span", {}, language), copyButton(() => pre.textContent)), pre);
  }
  return fragment;
}

function drawn(token) {
  const block = element("div");
  block.append(finished(DOMPurify.sanitize(marked.parser([token]), CLEAN)));
  return block;
}

const plain = (text) => element("div", { className: "plain" }, text);

/** A node that shows a text which grows: only the blocks that changed are drawn again. */
export class Markdown {
  #blocks = []; // of { raw, node }
  #links = "";

  constructor() {
    this.node = element("div");
  }

  show(text) {
    let next;
    try {
      next = text.length > LONGEST ? null : this.#drawBlocks(text);
    } catch {
      next = null; // nested deeper than the parser can follow
    }
    next ??= [{ raw: text, node: plain(text) }];
    const same = next.findIndex((block, at) => block.node !== this.#blocks[at]?.node);
    const from = same < 0 ? next.length : same;
    for (const { node } of this.#blocks.slice(from)) node.remove();
    this.node.append(...next.slice(from).map(({ node }) => node));
    this.#blocks = next;
  }

  #drawBlocks(text) {
    const tokens = marked.lexer(text);
    const links = JSON.stringify(tokens.links); // references that any block may use
    const known = links === this.#links ? this.#blocks : [];
    this.#links = links;
    return tokens
      .filter(({ type }) => type !== "space" && type !== "def")
      .map((token, at) =>
        known[at]?.raw === token.raw ? known[at] : { raw: token.raw, node: drawn(token) },
      );
  }
}
