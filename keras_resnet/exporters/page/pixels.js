// From an image file or a canvas to the pixels that the network takes: the steps of
// `keras-resnet predict`, in its order, with Pillow's arithmetic.

// Pillow's weights have 22 bits behind the point.
const SCALE = 2 ** 22;

// Red, green and blue in the luma of ITU-R 601-2, in 16 bits.
const LUMA = [19595, 38470, 7471];

/**
 * Decodes an image, upright by its orientation tag, on a white background.
 *
 * @param {Blob} file The encoded image.
 * @returns {Promise<ImageData>} Opaque. Colour profiles are ignored, as by `predict`.
 * @throws {RangeError} If it has more pixels than the browser can hold.
 * @throws {DOMException} If it is no image.
 */
export async function decode(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const image = context.getImageData(0, 0, canvas.width, canvas.height);
  // A canvas beyond the browser's limit takes no colour, not even the background.
  if (image.data[3] !== 255) {
    throw new RangeError(`${image.width} × ${image.height} pixels are too many for this browser`);
  }
  return image;
}

/**
 * Returns an image as the network takes it.
 *
 * @param {ImageData} image Opaque.
 * @param {object} input The entry "input" of metadata.json. A height and width of null are those
 *     of the image.
 * @returns {{pixels: Uint8Array, shape: number[], inverted: boolean}} The shape is
 *     [1, height, width, channels].
 */
export function prepare(image, input) {
  const { channels, resampler } = input;
  const [height, width] = [input.height ?? image.height, input.width ?? image.width];
  let pixels = channels === 1 ? toGrey(image.data) : dropAlpha(image.data);
  pixels = resize(pixels, [image.height, image.width, channels], [height, width], resampler);
  const inverted = input.dark_background && borderLevel(pixels, height, width) >= 128;
  if (inverted) {
    pixels = pixels.map((level) => 255 - level);
  }
  return { pixels, shape: [1, height, width, channels], inverted };
}

function toGrey(rgba) {
  const grey = new Uint8Array(rgba.length / 4);
  for (let to = 0, from = 0; to < grey.length; to += 1, from += 4) {
    const sum = rgba[from] * LUMA[0] + rgba[from + 1] * LUMA[1] + rgba[from + 2] * LUMA[2];
    grey[to] = (sum + 2 ** 15) >> 16;
  }
  return grey;
}

function dropAlpha(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let to = 0, from = 0; to < rgb.length; to += 3, from += 4) {
    rgb[to] = rgba[from];
    rgb[to + 1] = rgba[from + 1];
    rgb[to + 2] = rgba[from + 2];
  }
  return rgb;
}

/**
 * Resizes an image as Pillow does by its bilinear filter, which grows with the scale.
 *
 * @param {Uint8Array} pixels Of the shape [height, width, channels].
 * @param {number[]} shape That shape.
 * @param {number[]} size The new height and width.
 * @param {string} resampler A row of `resampling.RESAMPLERS`: "pillow" or "pillow12".
 * @returns {Uint8Array} Of the shape [new height, new width, channels].
 */
export function resize(pixels, [height, width, channels], [newHeight, newWidth], resampler) {
  const resizeRows = (x, columns) => resample(x, 1, height, newHeight, columns * channels);
  const resizeColumns = (x, rows) => resample(x, rows, width, newWidth, channels);
  // Each pass rounds to grey levels: their order matters.
  if (resampler === "pillow" && height - newHeight > 2 * Math.max(0, width - newWidth)) {
    return resizeColumns(resizeRows(pixels, width), newHeight);
  }
  return resizeRows(resizeColumns(pixels, height), newWidth);
}

// Resamples the middle axis of an array of the shape [outer, length, inner].
function resample(pixels, outer, length, newLength, inner) {
  if (length === newLength) {
    return pixels;
  }
  const result = new Uint8Array(outer * newLength * inner);
  const taps = filterTaps(length, newLength);
  let to = 0;
  for (let i = 0; i < outer; i += 1) {
    for (const { first, weights } of taps) {
      for (let j = 0; j < inner; j += 1) {
        let from = (i * length + first) * inner + j;
        let sum = SCALE / 2;
        for (const weight of weights) {
          sum += weight * pixels[from];
          from += inner;
        }
        result[to] = Math.floor(sum / SCALE);
        to += 1;
      }
    }
  }
  return result;
}

// Returns for each new position the first old one that counts, and the weights from there on.
function filterTaps(length, newLength) {
  const scale = length / newLength;
  const reach = Math.max(scale, 1);
  return Array.from({ length: newLength }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const end = Math.min(Math.trunc(centre + reach + 0.5), length);
    const raw = Array.from({ length: end - first }, (_, k) =>
      Math.max(1 - Math.abs((first + k - centre + 0.5) / reach), 0),
    );
    const total = raw.reduce((a, b) => a + b);
    return { first, weights: raw.map((weight) => Math.trunc((weight / total) * SCALE + 0.5)) };
  });
}

// Returns the median of the outermost pixels of a grey image, an estimate of the background.
function borderLevel(pixels, height, width) {
  const levels = [];
  for (let x = 0; x < width; x += 1) {
    levels.push(pixels[x], pixels[(height - 1) * width + x]);
  }
  for (let y = 0; y < height; y += 1) {
    levels.push(pixels[y * width], pixels[(y + 1) * width - 1]);
  }
  levels.sort((a, b) => a - b);
  return (levels[levels.length / 2 - 1] + levels[levels.length / 2]) / 2;
}
