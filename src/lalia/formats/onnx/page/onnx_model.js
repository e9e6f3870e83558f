// A model that lalia convert wrote, in a browser. Token ids in, ids or numbers out; `ort` is onnxruntime-web's module.

/** The graph, ready to run. `files` are URLs: {model, data}, data only where the weights are in a second file. */
export async function loadModel(ort, files) {
  const options = { executionProviders: ["wasm"], graphOptimizationLevel: "all" };
  if (files.data) {
    options.externalData = [{ path: files.data.split("/").pop(), data: files.data }];
  }
  return new OnnxModel(ort, await ort.InferenceSession.create(files.model, options));
}

export class OnnxModel {
  constructor(ort, session) {
    this.ort = ort;
    this.session = session;
    this.cache = session.inputMetadata.filter((input) => input.name.startsWith("past_key_values."));
  }

  /** All outputs for one sequence; `past` is what an earlier call gave, whose keys and values are taken. */
  async forward(ids, past = null) {
    const integers = (values) => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const feed = { input_ids: integers(ids) };
    let numPast = 0;
    for (const { name, shape } of this.cache) {
      feed[name] = past
        ? past[name.replace("past_key_values", "present")]
        : new this.ort.Tensor("float32", new Float32Array(0), [1, shape[1], 0, shape[3]]);
      numPast = feed[name].dims[2];
    }
    feed.attention_mask = integers(new Array(numPast + ids.length).fill(1));
    if (this.session.inputNames.includes("token_type_ids")) {
      feed.token_type_ids = integers(new Array(ids.length).fill(0));
    }
    return this.session.run(feed);
  }

  /** The vector of a text, of length 1. */
  async embed(ids) {
    const { sentence_embedding: embedding } = await this.forward(ids);
    return embedding.data;
  }

  /** Greedy continuation with the cache: the new ids. `onToken(id)` is called for each. */
  async generate(ids, maxTokens, { stopIds = [], onToken = () => {} } = {}) {
    const found = [];
    let past = null;
    let step = ids;
    while (found.length < maxTokens && !stopIds.includes(found.at(-1))) {
      past = await this.forward(step, past);
      const next = indexOfLargest(past.logits);
      found.push(next);
      onToken(next);
      step = [next];
    }
    return found;
  }
}

/** Index of the largest logit of the last position. */
function indexOfLargest({ data, dims }) {
  const size = dims[2];
  const last = data.subarray(data.length - size);
  let best = 0;
  for (let i = 1; i < size; i++) {
    if (last[i] > last[best]) best = i;
  }
  return best;
}
