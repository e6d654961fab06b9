// The drawer with the chats that this browser keeps.

import { $, button, element } from "./dom.js";
import { isKept, list, load, remove, removeAll, setKept } from "./history.js";

async function show(actions) {
  const titles = await list();
  $("chats").replaceChildren(
    ...titles.map(({ id, title, model, changed }) => {
      const choose = button("", async () => {
        const messages = await load(id);
        $("history").close();
        if (messages) actions.choose({ id, title, model, messages });
      });
      const date = new Date(changed).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
      choose.append(element("span", {}, title), element("small", {}, date));
      if (id === actions.current().id) choose.setAttribute("aria-current", "true");
      const forget = button("\u00d7", async () => {
        await remove(id);
        actions.removed(id);
        await show(actions);
        ($("chats").querySelector("button") ?? $("keep")).focus();
      });
      forget.setAttribute("aria-label", `Delete ${title}`);
      return element("li", {}, choose, forget);
    }),
  );
  $("no-chats").hidden = titles.length > 0;
  $("delete-all").hidden = titles.length === 0;
}

/** `actions`: the chat at hand (`current`), `choose` another, and what to do when one was `removed`. */
export function offerChats(actions) {
  $("open-history").addEventListener("click", async () => {
    $("keep").checked = isKept();
    await show(actions);
    $("history").showModal();
  });
  $("keep").addEventListener("change", () => setKept($("keep").checked));
  $("delete-all").addEventListener("click", async () => {
    if (!confirm("Delete all chats that this browser keeps?")) return;
    await removeAll();
    actions.removed(actions.current().id);
    await show(actions);
  });
}
