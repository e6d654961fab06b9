// What every part of the page makes its nodes with.

export const $ = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

export function button(label, act) {
  const node = element("button", { type: "button" }, label);
  node.addEventListener("click", act);
  return node;
}

/** A button that copies what `text` gives; nothing where the browser has no clipboard, as on plain HTTP. */
export function copyButton(text) {
  if (!navigator.clipboard) return "";
  const node = button("Copy", async () => {
    node.textContent = await navigator.clipboard.writeText(text()).then(
      () => "Copied",
      () => "Not allowed",
    );
    setTimeout(() => (node.textContent = "Copy"), 1500);
  });
  return node;
}

/** What calls `draw` soon, as often as leaves most of the time to the rest of the page. */
export function throttled(draw) {
  let timer = null;
  let pause = 40; // milliseconds
  return () => {
    timer ??= setTimeout(() => {
      const begun = performance.now();
      draw();
      timer = null;
      pause = Math.max(40, 4 * (performance.now() - begun));
    }, pause);
  };
}
