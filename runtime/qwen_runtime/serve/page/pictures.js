// Pictures that go with the next message.

import { $, button, element } from "./dom.js";

const LARGEST_SIDE = 1536; // pixels of a picture that is sent

let waiting = []; // data URLs

export function picture(url) {
  return element("img", { src: url, alt: "Attached image" });
}

/** Redrawn at a size that the model can use; a file that is no image is refused here already. */
export async function attach(files) {
  for (const file of files) {
    try {
      const bitmap = await createImageBitmap(file);
      const scale = Math.min(1, LARGEST_SIDE / Math.max(bitmap.width, bitmap.height));
      const canvas = document.createElement("canvas");
      canvas.width = Math.max(1, Math.round(bitmap.width * scale));
      canvas.height = Math.max(1, Math.round(bitmap.height * scale));
      canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      waiting.push(canvas.toDataURL("image/png"));
    } catch {
      $("status").textContent = `${file.name || "That"} is not an image that this browser can read.`;
    }
  }
  show();
}

/** Those that were attached; there are none afterwards. */
export function takeAll() {
  const taken = waiting;
  waiting = [];
  show();
  return taken;
}

export function anyWaiting() {
  return waiting.length > 0;
}

function show() {
  $("images").replaceChildren(
    ...waiting.map((url, index) => {
      const remove = button("\u00d7", () => {
        waiting.splice(index, 1);
        show();
      });
      remove.setAttribute("aria-label", `Remove image ${index + 1}`);
      return element("li", {}, picture(url), remove);
    }),
  );
}
