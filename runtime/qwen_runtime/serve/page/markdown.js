// Markdown as models write it, to DOM nodes. No HTML is ever parsed: text becomes text nodes, so whatever a
// model writes can only be read. Paragraphs, headings, lists, code, bold, italic and web links.

const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|\*([^\s*].*?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/s;

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function inline(text) {
  const nodes = [];
  for (let match; (match = INLINE.exec(text)); text = text.slice(match.index + match[0].length)) {
    const [, , code, bold, italic, label, url] = match;
    nodes.push(text.slice(0, match.index));
    if (code !== undefined) nodes.push(element("code", code));
    else if (bold !== undefined) nodes.push(element("strong", ...inline(bold)));
    else if (italic !== undefined) nodes.push(element("em", ...inline(italic)));
    else {
      const link = element("a", label);
      Object.assign(link, { href: url, target: "_blank", rel: "noopener noreferrer" });
      nodes.push(link);
    }
  }
  return [...nodes, text];
}

const LINES = [
  [/^#{1,6}\s+(.*)/, (match) => ["h3", match[1]]],
  [/^\s*[-*+]\s+(.*)/, (match) => ["ul", match[1]]],
  [/^\s*\d+[.)]\s+(.*)/, (match) => ["ol", match[1]]],
];

function kind(line) {
  for (const [pattern, make] of LINES) {
    const match = pattern.exec(line);
    if (match) return make(match);
  }
  return ["p", line];
}

/** DOM nodes for `text`, which may still grow: an open code block ends with the text. */
export function markdown(text) {
  const blocks = [];
  let last = null; // the block that the next line may continue
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; at++) {
    const fence = /^\s*(```+|~~~+)/.exec(lines[at]);
    if (fence) {
      const code = [];
      while (++at < lines.length && !lines[at].trim().startsWith(fence[1])) code.push(lines[at]);
      blocks.push(element("pre", element("code", code.join("\n"))));
      last = null;
    } else if (!lines[at].trim()) {
      last = last?.name === "p" ? null : last;
    } else {
      const [name, content] = kind(lines[at]);
      if (name === "h3") {
        blocks.push(element("h3", ...inline(content)));
        last = null;
      } else if (name === "p" && last?.name === "p") {
        last.node.append("\n", ...inline(content));
      } else {
        if (last?.name !== name) {
          last = { name, node: element(name) };
          blocks.push(last.node);
        }
        last.node.append(...(name === "p" ? inline(content) : [element("li", ...inline(content))]));
      }
    }
  }
  return blocks;
}
