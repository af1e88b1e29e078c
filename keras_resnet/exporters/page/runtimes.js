// The two runtimes: each runs its own file of the same network.

const here = new URL("./", import.meta.url);

/** Name -> what the page calls it, and how it opens a file. */
export const RUNTIMES = {
  tflite: { name: "LiteRT.js", open: openLiteRt },
  onnx: { name: "ONNX Runtime Web", open: openOnnx },
};

/**
 * Downloads a file of this folder.
 *
 * @param {string} path Relative to this script.
 * @returns {Promise<Response>}
 * @throws {Error} If it is missing; the message names it.
 */
export async function download(path) {
  let response;
  try {
    // A new export must not meet an old file in the browser's cache.
    response = await fetch(new URL(path, here), { cache: "no-cache" });
  } catch {
    throw new Error(`${path} cannot be downloaded: is the server still there?`);
  }
  if (!response.ok) {
    throw new Error(`${path} is missing on the server (status ${response.status})`);
  }
  return response;
}

/**
 * Opens a network.
 *
 * @param {string} name A row of RUNTIMES.
 * @param {object} row The entry of metadata.json about its file.
 * @param {number[]} shape The shape of the first image, for which it is made ready.
 * @returns {Promise<function(Uint8Array, number[]): Promise<Float32Array>>} Function of pixels and
 *     their shape, [1, height, width, channels], that returns the probabilities.
 * @throws {Error} If a file is missing or damaged; the message names it.
 */
export async function openNetwork(name, row, shape) {
  const content = new Uint8Array(await (await download(row.file)).arrayBuffer());
  try {
    return await RUNTIMES[name].open(content, row, shape);
  } catch (error) {
    throw new Error(`${RUNTIMES[name].name} cannot run ${row.file}: ${firstLine(error)}`);
  }
}

/** Returns the first line of an error's message. */
export function firstLine(error) {
  return String(error?.message ?? error).split("\n")[0];
}

async function openLiteRt(content, row, firstShape) {
  const litert = await loadLiteRt();
  const view = new DataView(content.buffer);
  let [model, ready] = [null, ""];
  const compile = async (shape) => {
    if (ready === String(shape)) {
      return;
    }
    model?.delete();
    [model, ready] = [null, ""];
    // LiteRT.js 2.5 takes tensors of the shape that the file states: it is written into it.
    for (const offset of row.shape_at) {
      shape.forEach((edge, axis) => view.setInt32(offset + 4 * axis, edge, true));
    }
    model = await litert.loadAndCompile(content, { accelerator: "wasm" });
    ready = String(shape);
  };
  await compile(firstShape);
  return async (pixels, shape) => {
    await compile(shape);
    const image = new litert.Tensor(pixels, shape);
    try {
      const [output] = await model.run(image);
      const probabilities = output.toTypedArray();
      output.delete();
      return probabilities;
    } finally {
      image.delete();
    }
  };
}

let litertLoaded;

function loadLiteRt() {
  litertLoaded ??= (async () => {
    const litert = await import("./runtime/@litertjs/core/dist/index.js");
    // Its log comes as errors; the loader takes the options of the module from this name.
    globalThis.Module = {
      printErr: (line) => console[/^(INFO|WARNING)/.test(line) ? "debug" : "error"](line),
    };
    await litert.loadLiteRt(new URL("runtime/@litertjs/core/wasm/", here).href);
    return litert;
  })();
  return litertLoaded;
}

async function openOnnx(content) {
  const ort = await import("./runtime/onnxruntime-web/dist/ort.wasm.min.mjs");
  // Several threads would need a server that sends the headers of cross-origin isolation.
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL("runtime/onnxruntime-web/dist/", here).href;
  const session = await ort.InferenceSession.create(content, { executionProviders: ["wasm"] });
  return async (pixels, shape) => {
    const outputs = await session.run({ image: new ort.Tensor("uint8", pixels, shape) });
    return outputs.probabilities.data;
  };
}
