// An artifact's decoder by ONNX Runtime Web, with its tokenizer and chat template: text in, text out.

import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web/webgpu";
import { UserError, filesOf, manifestOf, textOf } from "./download.js";
import { choose } from "./sampling.js";

const TITLES = { webgpu: "WebGPU", wasm: "CPU (WebAssembly)" }; // in the order in which they are tried
const DATA_FILE = "model.onnx.data";
const UNFINISHED = "\uFFFD"; // what a decoder puts in the place of half a character
const ELEMENT_TYPES = { float32: Float32Array, float16: Uint16Array, int64: BigInt64Array };

export class Model {
  /**
   * Loads the artifact at `url`, a folder's address that ends in "/".
   *
   * `provider` is "webgpu" or "wasm"; without it WebGPU is tried first. `report(loaded, total)` is told of
   * bytes, and `signal` stops the download. Throws UserError.
   */
  static async load(url, { provider, report = () => {}, signal } = {}) {
    if (provider && !Object.hasOwn(TITLES, provider))
      throw new UserError(`no provider '${provider}': there are ${Object.keys(TITLES).join(" and ")}`);
    const manifest = await manifestOf(url);
    const config = JSON.parse(await textOf(url, "genai_config.json"));
    if (config.model.vision) throw new UserError("this page takes no images: export with --text-only");
    const reasons = [];
    const providers = [];
    for (const name of provider ? [provider] : Object.keys(TITLES)) {
      const reason = name === "webgpu" ? await whyNoWebgpu(manifest) : "";
      if (reason) reasons.push(reason);
      else providers.push(name);
    }
    const graphs = providers.map((name) => graphFor(manifest, name, config.model.decoder.filename));
    const names = providers.length ? [...new Set(graphs), DATA_FILE] : [];
    const files = await filesOf(url, manifest, names, report, signal);
    for (const [index, name] of providers.entries()) {
      try {
        const session = await opened(files[graphs[index]], files[DATA_FILE], name);
        const model = new Model(session, name, reasons, manifest, config);
        await model.#step([0n], 0); // some devices take a model and fail when it first runs
        await model.#readTexts(url);
        return model;
      } catch (error) {
        if (error instanceof UserError) throw error;
        reasons.push(`${TITLES[name]} failed (${oneLine(error)})`);
      }
    }
    throw new UserError(`${reasons.join("; ")}: export with --profile browser, or try another browser`);
  }

  constructor(session, provider, reasons, manifest, config) {
    this.name = manifest.model.name;
    this.provider = TITLES[provider];
    /** Why each provider before this one was not taken. */
    this.reasons = reasons;
    this.contextLength = config.model.context_length;
    this.defaults = config.search;
    this.ends = new Set([config.model.eos_token_id].flat());
    this.#session = session;
    this.#chunk = config.search.chunk_size;
    this.reset();
  }

  /** Forgets what was read. */
  reset() {
    for (const state of Object.values(this.#states)) state.dispose();
    this.#states = {};
    for (const { name, type, shape } of this.#session.inputMetadata) {
      if (!name.startsWith("past_")) continue;
      const sizes = shape.map((size) => (typeof size === "number" ? size : size === "batch_size" ? 1 : 0));
      const count = sizes.reduce((product, size) => product * size, 1);
      this.#states[name] = new ort.Tensor(type, new ELEMENT_TYPES[type](count), sizes);
    }
  }

  /** Token ids of the prompt for the assistant's next turn. */
  prompt(messages, { thinking = false } = {}) {
    const text = this.#template.render({
      messages,
      add_generation_prompt: true,
      enable_thinking: thinking,
    });
    return this.#tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  /**
   * Answers `ids` piece by piece: yields { text, token } for each token that is not the end.
   *
   * `sampling` has temperature (0: the likeliest token), top_k and top_p; `signal` stops it after a token.
   */
  async *answer(ids, { maxTokens = 512, sampling = this.defaults, signal } = {}) {
    if (ids.length >= this.contextLength)
      throw new UserError(`the conversation has ${ids.length} tokens, the model takes ${this.contextLength}`);
    this.reset();
    let logits;
    for (let start = 0; start < ids.length && !signal?.aborted; start += this.#chunk)
      logits = await this.#step(ids.slice(start, start + this.#chunk).map(BigInt), start);
    const tokens = [];
    const most = Math.min(maxTokens, this.contextLength - ids.length);
    let shown = 0;
    while (!signal?.aborted && tokens.length < most) {
      const token = choose(logits, sampling);
      if (this.ends.has(token)) break;
      tokens.push(token);
      const text = this.#tokenizer.decode(tokens, { skip_special_tokens: true });
      const whole = text.endsWith(UNFINISHED) ? shown : text.length;
      yield { token, text: text.slice(shown, whole) };
      shown = whole;
      if (tokens.length < most && !signal?.aborted)
        logits = await this.#step([BigInt(token)], ids.length + tokens.length - 1);
    }
  }

  async #step(ids, start) {
    const length = start + ids.length;
    const places = ids.map((_, index) => BigInt(start + index));
    const feeds = {
      input_ids: int64(ids, [1, ids.length]),
      attention_mask: int64(new Array(length).fill(1n), [1, length]),
      position_ids: int64([...places, ...places, ...places], [3, 1, ids.length]),
      ...this.#states,
    };
    const { logits, ...presents } = await this.#session.run(feeds);
    for (const name of Object.keys(this.#states)) {
      this.#states[name].dispose();
      this.#states[name] = presents[`present.${name.split(".").slice(1).join(".")}`];
    }
    return logits.getData(true);
  }

  async #readTexts(url) {
    const [tokenizer, settings, template] = await Promise.all(
      ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"].map((name) => textOf(url, name)),
    );
    this.#tokenizer = new Tokenizer(JSON.parse(tokenizer), JSON.parse(settings));
    this.#template = new Template(template);
  }

  #session;
  #chunk;
  #states = {};
  #tokenizer;
  #template;
}

/** Which graph of the artifact the provider takes: docs/artifact.md, "Further graphs". */
function graphFor(manifest, provider, main) {
  const key = provider === "wasm" ? "cpu" : provider;
  const further = manifest.further_graphs?.find(({ providers }) => providers.includes(key));
  return further?.files[main] ?? main;
}

/** Why this browser's WebGPU cannot run the artifact; "" where it can. */
async function whyNoWebgpu(manifest) {
  if (!navigator.gpu) return "this browser has no WebGPU, or the page is neither on https nor on localhost";
  const adapter = await navigator.gpu.requestAdapter();
  if (!adapter) return "WebGPU finds no graphics device";
  if (manifest.activation_dtype === "float16" && !adapter.features.has("shader-f16"))
    return "the graphics device has no float16, in which the artifact was exported";
  return "";
}

function opened(graph, weights, provider) {
  return ort.InferenceSession.create(graph, {
    executionProviders: [provider],
    externalData: [{ path: DATA_FILE, data: weights }],
    // States stay on the device from run to run; logits are fetched.
    ...(provider === "webgpu" && { preferredOutputLocation: "gpu-buffer" }),
    logSeverityLevel: 3, // not that shapes are computed on the CPU
  });
}

function int64(values, dims) {
  return new ort.Tensor("int64", BigInt64Array.from(values), dims);
}

function oneLine(error) {
  return String(error?.message ?? error).split("\n")[0].slice(0, 300);
}
