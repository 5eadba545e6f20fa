// The viewer: one picture, its two sides, the divider between them, zoom and pan.
// Lengths are CSS pixels; (x, y) is the picture's top left corner in the viewport.

const $ = (id) => document.getElementById(id);
const LARGEST_SCALE = 8, NEAR = 28, STEP = 1.25;
const view = { width: 0, height: 0, scale: 1, x: 0, y: 0, fitted: true, onZoom: () => {} };
const viewport = $("viewport"), split = $("split"), pointers = new Map();
let grip = null;

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const fitScale = () =>
  Math.min(viewport.clientWidth / view.width, viewport.clientHeight / view.height, 1);

// The part of the picture that can be seen, in the viewport.
function visible() {
  const right = view.x + view.width * view.scale, bottom = view.y + view.height * view.scale;
  return {
    left: Math.max(0, view.x), right: Math.min(viewport.clientWidth, right),
    top: Math.max(0, view.y), bottom: Math.min(viewport.clientHeight, bottom),
  };
}

function barPlace() {
  const seen = visible();
  return seen.left + ((seen.right - seen.left) * split.value) / 100;
}

// Smaller than the viewport it lies in the middle, else without a gap at either side.
function keepInside(start, length, room) {
  return length <= room ? (room - length) / 2 : clamp(start, room - length, 0);
}

// On the screen's own pixels: between two of them a picture would be blurred.
const snap = (place, start) =>
  Math.round((start + place) * devicePixelRatio) / devicePixelRatio - start;

function draw() {
  if (!view.width) return;
  const width = view.width * view.scale, height = view.height * view.scale;
  const place = viewport.getBoundingClientRect();
  view.x = snap(keepInside(view.x, width, viewport.clientWidth), place.left);
  view.y = snap(keepInside(view.y, height, viewport.clientHeight), place.top);
  const style = $("picture").style;
  style.width = `${width}px`;
  style.height = `${height}px`;
  style.transform = `translate(${view.x}px, ${view.y}px)`;
  $("picture").classList.toggle("crisp", view.scale >= 2);
  $("zoom").textContent = `${Math.round(100 * view.scale)} %`;
  drawBar(width);
}

function drawBar(width) {
  const seen = visible(), place = barPlace(), bar = $("bar").style;
  $("left-side").style.clipPath = `inset(0 ${width - (place - view.x)}px 0 0)`;
  bar.left = `${place}px`;
  bar.top = `${seen.top}px`;
  bar.height = `${seen.bottom - seen.top}px`;
  split.style.left = `${place}px`;
  $("caption").style.top = `${seen.bottom + 18}px`;
  const work = $("progress");
  for (const [tag, room, side, gap] of [
    [$("left-tag"), place - seen.left, "left", seen.left],
    [$("right-tag"), seen.right - place, "right", viewport.clientWidth - seen.right],
  ]) {
    const hidden = work.offsetHeight && work.offsetLeft < gap + 10 + tag.offsetWidth;
    const least = hidden ? work.offsetTop : viewport.clientHeight;
    tag.style.bottom = `${viewport.clientHeight - Math.min(seen.bottom, least) + 10}px`;
    tag.style[side] = `${gap + 10}px`;
    tag.classList.toggle("gone", room < tag.offsetWidth + 34);
  }
}

function fit() {
  view.fitted = true;
  view.scale = fitScale();
  draw();
  view.onZoom();
}

// Zoom so that what lies under (x, y) of the viewport stays there.
function zoomTo(scale, x = viewport.clientWidth / 2, y = viewport.clientHeight / 2) {
  const least = fitScale(), next = clamp(scale, least, Math.max(LARGEST_SCALE, least));
  view.x = x - ((x - view.x) * next) / view.scale;
  view.y = y - ((y - view.y) * next) / view.scale;
  view.scale = next;
  view.fitted = next <= least;
  draw();
  view.onZoom();
}

// Show a picture of so many pixels; one of the size that is there keeps zoom and place.
function setSize(width, height) {
  const same = view.width === width && view.height === height;
  view.width = width;
  view.height = height;
  if (same && !view.fitted) draw();
  else fit();
}

// Put a loaded picture in the place of the image with this id; resolves to whether it is there.
const latest = new Map();
function swap(id, url, tries = 3) {
  latest.set(id, url);
  return new Promise((resolve) => {
    const image = new Image();
    image.alt = $(id).alt;
    image.draggable = false;
    image.onload = () => {
      const wanted = latest.get(id) === url;
      if (wanted) {
        image.id = id;
        image.hidden = $(id).hidden;
        $(id).replaceWith(image);
      }
      resolve(wanted);
    };
    image.onerror = () => {
      const hopeless = tries <= 1 || url.startsWith("blob:");
      if (latest.get(id) !== url || hopeless) return resolve(false);
      setTimeout(() => swap(id, url, tries - 1).then(resolve), 700);
    };
    image.src = url;
  });
}

function speak() {
  const left = $("left-tag").textContent, right = $("right-tag").textContent;
  split.setAttribute("aria-valuetext", `${Math.round(split.value)} % ${left}, rest ${right}`);
}

function moveSplit(clientX) {
  const seen = visible(), x = clientX - viewport.getBoundingClientRect().left;
  split.value = (100 * (x - seen.left)) / Math.max(1, seen.right - seen.left);
  draw();
  speak();
}

const here = (event) => ({ x: event.clientX, y: event.clientY });

function gripFor(event) {
  if (pointers.size > 1) return "pinch";
  const x = event.clientX - viewport.getBoundingClientRect().left;
  return !view.fitted && Math.abs(x - barPlace()) > NEAR ? "pan" : "split";
}

function pinch(before, after) {
  const distance = ([a, b]) => Math.hypot(a.x - b.x, a.y - b.y) || 1;
  const middle = ([a, b]) => ({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 });
  const box = viewport.getBoundingClientRect(), from = middle(before), to = middle(after);
  view.x += to.x - from.x;
  view.y += to.y - from.y;
  zoomTo((view.scale * distance(after)) / distance(before), to.x - box.left, to.y - box.top);
}

viewport.addEventListener("pointerdown", (event) => {
  if (event.button > 0 || !view.width) return;
  viewport.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, here(event));
  grip = gripFor(event);
  viewport.classList.toggle("panning", grip === "pan");
  split.focus({ preventScroll: true });
  if (grip === "split") moveSplit(event.clientX);
  event.preventDefault();
});

viewport.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) return;
  const all = [...pointers.values()];
  pointers.set(event.pointerId, here(event));
  if (grip === "pinch" && all.length === 2) pinch(all, [...pointers.values()]);
  else if (grip === "split") moveSplit(event.clientX);
  else if (grip === "pan") {
    view.x += event.clientX - before.x;
    view.y += event.clientY - before.y;
    draw();
  }
});

for (const name of ["pointerup", "pointercancel"])
  viewport.addEventListener(name, (event) => {
    pointers.delete(event.pointerId);
    grip = pointers.size ? "pan" : null;
    viewport.classList.remove("panning");
  });

// A trackpad's pinch comes as a wheel, too.
viewport.addEventListener("wheel", (event) => {
  if (!view.width) return;
  event.preventDefault();
  const box = viewport.getBoundingClientRect(), speed = event.ctrlKey ? 0.01 : 0.0022;
  const lines = event.deltaMode === 1 ? 16 : 1, way = event.deltaY * lines;
  zoomTo(view.scale * Math.exp(-way * speed), event.clientX - box.left, event.clientY - box.top);
}, { passive: false });

viewport.addEventListener("dblclick", (event) => {
  const box = viewport.getBoundingClientRect();
  if (!view.fitted) fit();
  else zoomTo(view.scale < 1 ? 1 : 2, event.clientX - box.left, event.clientY - box.top);
});

split.addEventListener("input", () => { draw(); speak(); });
new ResizeObserver(() => { if (view.fitted && view.width) fit(); else draw(); }).observe(viewport);

const zoomKeys = {
  "+": () => zoomTo(view.scale * STEP), "=": () => zoomTo(view.scale * STEP),
  "-": () => zoomTo(view.scale / STEP), 0: fit, 1: () => zoomTo(1),
};
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("select, input:not(#split)");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !view.width) return;
  zoomKeys[event.key]?.();
});
$("zoom-in").addEventListener("click", zoomKeys["+"]);
$("zoom-out").addEventListener("click", zoomKeys["-"]);
$("zoom").addEventListener("click", () => { if (view.scale === 1) fit(); else zoomTo(1); });
