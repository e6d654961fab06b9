// The server's OpenAI API and llama-server's /props, as much of them as the page needs.

/** What went wrong, in words for the person at the page. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error?.message ?? `the server answered ${response.status}`);
}

async function get(path, key) {
  return (await checked(await fetch(path, { headers: headers(key) }))).json();
}

/** All of them: { id, context_length, images }. */
export async function models(key) {
  return (await get("v1/models", key)).data;
}

/** What the server does where a request does not say. */
export async function defaults(key, model) {
  return (await get(`props?model=${encodeURIComponent(model)}`, key)).default_generation_settings;
}

export async function health() {
  return (await fetch("health")).json();
}

/** One streamed chat completion's chunks, and { read, of } while its prompt is read. */
export async function* chat(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await checked(
    await fetch("v1/chat/completions", { method: "POST", headers: headers(key), body, signal }),
  );
  for await (const event of events(response.body)) {
    const progress = /^: prompt: (\d+) of (\d+) tokens/.exec(event);
    if (progress) yield { read: Number(progress[1]), of: Number(progress[2]) };
    if (event.startsWith(":")) continue;
    const data = event.replace(/^data: /, "");
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, chunk.error.message);
    yield chunk;
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const found = (rest + value).split("\n\n");
    rest = found.pop();
    yield* found;
  }
}
