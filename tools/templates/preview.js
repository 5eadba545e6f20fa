// The preview: exposure and strength on a reduced picture, as the server does them at full size:
// gains and mixtures in linear light (sRGB, IEC 61966-2-1). Noise is the server's work, on release.

const PREVIEW_SIDE = 800, WHITE = 65534; // two rounded halves still fit into 16 bits
const light = Float64Array.from({ length: 256 }, (_, level) => {
  const value = level / 255;
  return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
});
const levels = Uint8ClampedArray.from({ length: 65536 }, (_, step) => {
  const value = Math.min(1, step / WHITE);
  return 255 * (value <= 0.0031308 ? value * 12.92 : 1.055 * value ** (1 / 2.4) - 0.055);
});

// What each 8-bit level adds to the mixture.
const share = (part, gain) => Uint16Array.from(light, (l) => part * Math.min(1, l * gain) * WHITE);

// Mix the pixels of the input and of an answer into those of `out`.
function mix(out, low, answer, values) {
  const dark = share(1 - values.strength, 1), lit = share(values.strength, 2 ** values.exposure);
  for (let place = 0; place < out.length; place += 4) {
    out[place] = levels[dark[low[place]] + lit[answer[place]]];
    out[place + 1] = levels[dark[low[place + 1]] + lit[answer[place + 1]]];
    out[place + 2] = levels[dark[low[place + 2]] + lit[answer[place + 2]]];
    out[place + 3] = 255;
  }
}

// The pixels of a view of the server's; null where it cannot be had.
async function pixelsOf(url) {
  const answer = await fetch(url);
  if (!answer.ok) return null;
  const bitmap = await createImageBitmap(await answer.blob(), { colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

// A preview of one job's answer over the image of one side.
class Preview {
  constructor(canvas) {
    this.canvas = canvas;
    this.clear();
  }

  clear() {
    this.url = "";
    this.low = this.answer = null;
    this.canvas.hidden = true;
  }

  // Fetch what it works on, once for each answer.
  async prepare(job, what, denoise) {
    const url = `/jobs/${job}/${what}?side=${PREVIEW_SIDE}&lossless=1&denoise=${denoise}`;
    if (url === this.url) return;
    this.clear();
    this.url = url;
    const low = `/jobs/${job}/low?side=${PREVIEW_SIDE}&lossless=1`;
    const found = await Promise.all([low, url].map(pixelsOf)).catch(() => [null]);
    if (url !== this.url) return;
    if (found.includes(null)) this.url = ""; // tried again when the picture is shown again
    else [this.low, this.answer] = found;
  }

  show(values) {
    if (!this.answer) return;
    const { width, height } = this.answer, context = this.canvas.getContext("2d");
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    const out = context.createImageData(width, height);
    mix(out.data, this.low.data, this.answer.data, values);
    context.putImageData(out, 0, 0);
    this.canvas.hidden = false;
  }
}
