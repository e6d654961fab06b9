// Chats kept in this browser (IndexedDB, which holds pictures too). A browser that keeps nothing, because it is
// full, private or told so, is no error: the chat at hand goes on in memory.

const TITLES = "titles"; // { id, title, model, changed }
const MESSAGES = "messages"; // { id, messages }
const SWITCH = "keep-chats"; // in localStorage

/** A storage that may be forbidden: null then. */
function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("qwen-edge", 1);
    request.onupgradeneeded = () => {
      for (const name of [TITLES, MESSAGES]) request.result.createObjectStore(name, { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => reject(request.error);
  });
}

/** What `act` asks of the two stores, in one transaction: its result, or `otherwise` where that failed. */
async function transact(mode, otherwise, act) {
  let database;
  try {
    database = await opened();
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction([TITLES, MESSAGES], mode);
      const request = act(transaction.objectStore(TITLES), transaction.objectStore(MESSAGES));
      transaction.oncomplete = () => resolve(request?.result ?? otherwise);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } catch {
    return otherwise;
  } finally {
    database?.close();
  }
}

export function isKept() {
  return stored(SWITCH) !== "no";
}

/** Whether chats are kept from now on; those that are kept stay. */
export function setKept(keep) {
  try {
    localStorage.setItem(SWITCH, keep ? "yes" : "no");
  } catch {
    // forbidden here, as is keeping chats
  }
}

/** Titles, the newest first. */
export async function list() {
  const found = await transact("readonly", [], (titles) => titles.getAll());
  return found.sort((one, other) => other.changed - one.changed);
}

/** A kept chat's messages; null where it is not there any more. */
export async function load(id) {
  return (await transact("readonly", null, (_, messages) => messages.get(id)))?.messages ?? null;
}

/** Whether it is kept now. */
export async function save({ id, title, model, messages }) {
  const written = await transact("readwrite", null, (titles, bodies) => {
    titles.put({ id, title, model, changed: Date.now() });
    return bodies.put({ id, messages });
  });
  return written !== null;
}

export async function remove(id) {
  await transact("readwrite", null, (titles, messages) => {
    titles.delete(id);
    messages.delete(id);
  });
}

export async function removeAll() {
  await transact("readwrite", null, (titles, messages) => {
    titles.clear();
    messages.clear();
  });
}
