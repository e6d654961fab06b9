// The files of an artifact, fetched with their progress.

/** What is wrong, and what to do, in words for the person at the page. */
export class UserError extends Error {}

/** The manifest of the artifact at `url`. */
export async function manifestOf(url) {
  const response = await fetched(new URL("manifest.json", url));
  const manifest = await response.json().catch(() => null);
  if (!manifest?.files || manifest.backend !== "onnx")
    throw new UserError(`${url} is no artifact of ONNX Runtime: export one with --profile browser`);
  return manifest;
}

export async function textOf(url, name) {
  return (await fetched(new URL(name, url))).text();
}

/**
 * The files `names` as Uint8Arrays, by name.
 *
 * `report(loaded, total)` is told of bytes; `signal` stops it. Sizes are compared with the manifest's.
 */
export async function filesOf(url, manifest, names, report, signal) {
  const total = names.reduce((sum, name) => sum + manifest.files[name].size, 0);
  const found = {};
  let before = 0;
  for (const name of names) {
    const { size } = manifest.files[name];
    const bytes = allocated(name, size);
    let length = 0;
    for await (const part of chunks(await fetched(new URL(name, url), signal))) {
      if (length + part.length > size) throw changed(name);
      bytes.set(part, length);
      length += part.length;
      report(before + length, total);
    }
    if (length !== size) throw changed(name);
    before += size;
    found[name] = bytes;
  }
  return found;
}

async function fetched(url, signal) {
  const response = await fetch(url, { signal }).catch((error) => {
    if (signal?.aborted) throw error;
    throw new UserError(`cannot reach ${url}: is the server running, and does it allow this page (CORS)?`);
  });
  if (!response.ok)
    throw new UserError(`${url}: the server answered ${response.status}: is the artifact's address right?`);
  return response;
}

async function* chunks(response) {
  const reader = response.body.getReader(); // Safari has no iterable streams
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    yield value;
  }
}

function allocated(name, size) {
  try {
    return new Uint8Array(size);
  } catch {
    throw new UserError(
      `${name} has ${(size / 1e9).toFixed(1)} GB, more than this browser gives a page: choose a smaller model`,
    );
  }
}

function changed(name) {
  return new UserError(`${name} is not as its manifest says: copy the artifact to the server again`);
}
