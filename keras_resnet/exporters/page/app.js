// The page: images come in, answers go out. The state of the page is in `page`.

import { decode, prepare } from "./pixels.js";
import { RUNTIMES, download, firstLine, openNetwork } from "./runtimes.js";

const find = (id) => document.getElementById(id);
const picture = find("picture").getContext("2d", { willReadFrequently: true });

const page = {
  metadata: null,
  // Name and function of the open network, and the shapes that it has run on.
  runtime: null,
  run: null,
  shapes: new Set(),
  // Why it is another network than the one that was asked for.
  trouble: "",
  // All work of the network, one after the other.
  queue: Promise.resolve(),
  // The last image that was asked for: older ones need no answer any more.
  latest: 0,
  // How many images have been chosen: one that is decoded too late is not shown.
  chosen: 0,
  // The last image, for another runtime; and whether strokes go on with it.
  shown: null,
  isDrawing: false,
};

// ---------------------------------------------------------------------------------------------
// What is shown
// ---------------------------------------------------------------------------------------------

function showProblem(text) {
  find("problem").textContent = text;
}

function inWords(milliseconds) {
  return `${milliseconds.toFixed(milliseconds < 100 ? 1 : 0)} ms`;
}

function showAnswer({ probabilities, milliseconds, isFirst }) {
  const names = page.metadata.class_names;
  const order = names.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
  const percent = (i) => `${(100 * probabilities[i]).toFixed(1)} %`;
  find("answer").textContent = `${names[order[0]]}, ${percent(order[0])}`;
  for (const [place, row] of [...find("bars").children].entries()) {
    const i = order[place];
    const [name, track, share] = row.children;
    name.textContent = name.title = names[i];
    track.firstElementChild.style.transform = `scaleX(${probabilities[i]})`;
    share.textContent = percent(i);
  }
  const first = isFirst ? " (first run)" : "";
  find("speed").textContent = `${inWords(milliseconds)}, ${RUNTIMES[page.runtime].name}${first}`;
}

function clearAnswer(text) {
  find("answer").textContent = text;
  for (const row of find("bars").children) {
    const [name, track, share] = row.children;
    [name.textContent, name.title, share.textContent] = ["–", "", "–"];
    track.firstElementChild.style.transform = "scaleX(0)";
  }
  find("note").textContent = "";
  find("speed").textContent = "–";
}

// Draws an image as large as it fits, in the middle.
async function showPicture(image, description) {
  const { width, height } = picture.canvas;
  const scale = Math.min(width / image.width, height / image.height);
  const size = [image.width * scale, image.height * scale];
  const bitmap = await createImageBitmap(image);
  picture.clearRect(0, 0, width, height);
  picture.imageSmoothingEnabled = scale < 4;
  picture.drawImage(bitmap, (width - size[0]) / 2, (height - size[1]) / 2, ...size);
  picture.canvas.setAttribute("aria-label", description);
  page.isDrawing = false;
}

// Shows the pixels that the network gets, where they differ from the image.
function showSeen(pixels, [, height, width, channels]) {
  const canvas = find("seen");
  if (!canvas) {
    return;
  }
  const image = new ImageData(width, height);
  for (let i = 0; i < height * width; i += 1) {
    for (let c = 0; c < 3; c += 1) {
      image.data[4 * i + c] = pixels[i * channels + (channels === 1 ? 0 : c)];
    }
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// ---------------------------------------------------------------------------------------------
// The network
// ---------------------------------------------------------------------------------------------

// Runs a function when the network is idle; the page can paint before it.
function enqueue(work) {
  const pause = () => new Promise((resolve) => setTimeout(resolve));
  const done = page.queue.then(pause).then(work);
  page.queue = done.catch(() => {});
  return done;
}

async function timed(pixels, shape) {
  const isFirst = !page.shapes.has(String(shape));
  page.shapes.add(String(shape));
  const begin = performance.now();
  const probabilities = await page.run(pixels, shape);
  return { probabilities, milliseconds: performance.now() - begin, isFirst };
}

/**
 * Classifies an image and shows the answer.
 *
 * @param {ImageData} image
 * @param {string} name What it is called in a message.
 * @param {string} note A line below the answer.
 */
async function classify(image, name, note = "") {
  page.latest += 1;
  const turn = page.latest;
  page.shown = { image, name, note };
  await enqueue(async () => {
    if (turn !== page.latest || !page.run) {
      return;
    }
    try {
      const { pixels, shape, inverted } = prepare(image, page.metadata.input);
      showSeen(pixels, shape);
      showAnswer(await timed(pixels, shape));
      const swapped = inverted ? "Light and dark were swapped, as the training images need it." : "";
      find("note").textContent = [note, swapped].filter(Boolean).join(" ");
      showProblem(page.trouble);
    } catch (error) {
      clearAnswer("No answer");
      const size = `${image.width} × ${image.height} pixels`;
      showProblem(`${name}: the network fails on its ${size}: ${firstLine(error)}`);
    }
  });
}

// Opens the network for a runtime; for the other one where that fails.
async function useRuntime(wanted) {
  const problems = [];
  const [sample] = page.metadata.samples;
  const shape = [1, sample.height, sample.width, page.metadata.input.channels];
  const names = [wanted, ...Object.keys(RUNTIMES).filter((name) => name !== wanted)];
  page.run = null;
  page.shapes.clear();
  find("check").className = "";
  find("check").textContent = "–";
  for (const name of names) {
    clearAnswer(`Loading ${RUNTIMES[name].name} …`);
    try {
      page.run = await openNetwork(name, page.metadata.files[name], shape);
    } catch (error) {
      problems.push(firstLine(error));
      continue;
    }
    page.runtime = find("runtime").value = name;
    const instead = `${RUNTIMES[name].name} runs instead.`;
    page.trouble = problems.length ? `${problems.join(". ")}. ${instead}` : "";
    showProblem(page.trouble);
    return;
  }
  clearAnswer("No network");
  showProblem(`${problems.join(". ")}. Copy the whole exported folder to the server again.`);
}

// Compares the answers for the samples with those of Python for the same file.
async function checkItself() {
  const { metadata, runtime } = page;
  const times = [];
  let [equal, largest] = [0, 0];
  for (const sample of metadata.samples) {
    find("check").textContent = `${times.length} of ${metadata.samples.length} …`;
    const image = await readSample(sample);
    const { probabilities, milliseconds } = await enqueue(() => {
      const { pixels, shape } = prepare(image, metadata.input);
      return timed(pixels, shape);
    });
    if (page.runtime !== runtime) {
      return;
    }
    const answer = sample.answers[runtime];
    const top = (values) => values.indexOf(Math.max(...values));
    const difference = Math.max(...answer.map((p, i) => Math.abs(p - probabilities[i])));
    equal += top(answer) === top(probabilities) && !(difference > (metadata.tolerance ?? 1));
    largest = Math.max(largest, difference);
    times.push(milliseconds);
  }
  times.sort((a, b) => a - b);
  const median = inWords(times[Math.floor(times.length / 2)]);
  const shown = largest.toExponential(0).replace("-", "\u2011"); // not broken at its hyphen
  find("check").className = equal === times.length ? "passed" : "problem";
  find("check").textContent =
    `${equal} of ${times.length} answers equal to Python's, largest difference of a probability ` +
    `${shown}; ${median} an image`;
}

async function readSample(sample) {
  return decode(await (await download(sample.file)).blob());
}

// ---------------------------------------------------------------------------------------------
// Where images come from
// ---------------------------------------------------------------------------------------------

function press(button) {
  for (const each of document.querySelectorAll(".samples button")) {
    each.setAttribute("aria-pressed", String(each === button));
  }
}

// Shows and classifies an image, unless another one has been chosen while it was decoded.
async function use(decoding, button, name, description, note) {
  page.chosen += 1;
  const turn = page.chosen;
  const image = await decoding;
  if (turn === page.chosen) {
    press(button);
    await showPicture(image, description);
    await classify(image, name, note);
  }
}

async function useSample(place) {
  const sample = page.metadata.samples[place];
  const button = document.querySelectorAll(".samples button")[place];
  try {
    const note = sample.label ? `Labelled: ${sample.label}.` : "";
    await use(readSample(sample), button, sample.file, `sample ${place + 1}`, note);
  } catch (error) {
    showProblem(firstLine(error));
  }
}

async function useFile(file) {
  if (!file) {
    return;
  }
  try {
    await use(decode(file), null, file.name, file.name);
  } catch (error) {
    const reason =
      error instanceof RangeError
        ? `cannot be used: ${firstLine(error)}`
        : "cannot be read as an image: choose a photograph or a drawing, such as a JPEG, PNG or " +
          "WebP file";
    showProblem(`${file.name} ${reason}.`);
  }
}

function listenToFiles() {
  for (const id of ["file", "camera"]) {
    find(id).addEventListener("change", async (event) => {
      await useFile(event.target.files[0]);
      event.target.value = ""; // the same file can be chosen again
    });
  }
  let inside = 0;
  const mark = (change) => {
    inside = Math.max(0, inside + change);
    document.body.classList.toggle("dropping", inside > 0);
  };
  addEventListener("dragenter", () => mark(1));
  addEventListener("dragleave", () => mark(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    mark(-inside);
    useFile(event.dataTransfer.files[0]);
  });
}

function listenToDrawing() {
  const { canvas } = picture;
  if (!canvas.classList.contains("drawable")) {
    return;
  }
  const dark = page.metadata.input.dark_background;
  const [paper, ink] = dark ? ["black", "white"] : ["white", "black"];
  let last = null;
  const clear = () => {
    page.chosen += 1;
    page.isDrawing = true;
    picture.fillStyle = paper;
    picture.fillRect(0, 0, canvas.width, canvas.height);
    canvas.setAttribute("aria-label", "a drawing");
    press(null);
  };
  const place = (event) => [
    (event.offsetX / canvas.clientWidth) * canvas.width,
    (event.offsetY / canvas.clientHeight) * canvas.height,
  ];
  const drawTo = (point) => {
    picture.beginPath();
    picture.moveTo(...last);
    picture.lineTo(...point);
    Object.assign(picture, { strokeStyle: ink, lineWidth: canvas.width / 10, lineCap: "round" });
    picture.stroke();
    last = point;
    classify(picture.getImageData(0, 0, canvas.width, canvas.height), "The drawing");
  };
  canvas.addEventListener("pointerdown", (event) => {
    // A stroke on a sample or a photograph begins a new drawing.
    if (!page.isDrawing) {
      clear();
    }
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    drawTo(last);
  });
  canvas.addEventListener("pointermove", (event) => last && drawTo(place(event)));
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, () => {
      last = null;
    });
  }
  find("clear").addEventListener("click", () => {
    clear();
    page.latest += 1;
    page.shown = null;
    clearAnswer("Draw, or choose an image");
  });
}

function listenToSamples() {
  for (const [place, button] of document.querySelectorAll(".samples button").entries()) {
    button.addEventListener("click", () => useSample(place));
  }
}

function listenToRuntime() {
  find("runtime").addEventListener("change", async (event) => {
    const address = new URL(location);
    address.searchParams.set("runtime", event.target.value);
    history.replaceState(null, "", address);
    await enqueue(() => useRuntime(event.target.value));
    await begin();
  });
}

// Shows the answer for the image that is there, or the first sample, and checks the network.
async function begin() {
  document.body.classList.add("ready");
  if (!page.run) {
    return;
  }
  if (page.shown) {
    await classify(page.shown.image, page.shown.name, page.shown.note);
  } else {
    await useSample(0);
  }
  try {
    await checkItself();
  } catch (error) {
    find("check").className = "problem";
    find("check").textContent = `failed: ${firstLine(error)}`;
  }
}

async function start() {
  if (typeof WebAssembly !== "object") {
    clearAnswer("No network");
    throw new Error("this browser has no WebAssembly, or has it switched off: try another one");
  }
  page.metadata = await (await download("metadata.json")).json();
  listenToSamples();
  listenToFiles();
  listenToDrawing();
  listenToRuntime();
  const asked = new URL(location).searchParams.get("runtime");
  await enqueue(() => useRuntime(asked in RUNTIMES ? asked : "tflite"));
  await begin();
}

start().catch((error) => {
  document.body.classList.add("ready");
  clearAnswer("No network");
  showProblem(firstLine(error));
});
