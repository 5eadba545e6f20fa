// The page: files in, problems, controls and the strip.

// Files in ----------------------------------------------------------------------------------------

function add(files) {
  const fresh = [...files].map(makeItem);
  if (!fresh.length) return;
  document.body.classList.remove("empty");
  for (const item of fresh) {
    items.push(item);
    makeThumb(item);
  }
  open(fresh.find((item) => !item.error) ?? fresh[0]);
  for (const item of fresh) if (!item.error) ensure(item);
  showProblems();
}

$("picked").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = "";
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) add(event.clipboardData.files);
});
for (const button of document.querySelectorAll("[data-sample]"))
  button.addEventListener("click", async () => {
    const name = button.dataset.sample;
    try {
      const blob = await (await fetched(`/samples/${name}`)).blob();
      add([new File([blob], `${name}.png`, { type: "image/png" })]);
    } catch (error) {
      say([error.message]);
    }
  });

let depth = 0; // a drag enters and leaves every element on its way
function dragging(change) {
  depth = Math.max(0, depth + change);
  $("dropping").hidden = !depth;
}
document.addEventListener("dragenter", (event) => { event.preventDefault(); dragging(1); });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("dragleave", () => dragging(-1));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dragging(-depth);
  add(event.dataTransfer.files);
});

// Problems ----------------------------------------------------------------------------------------

function say(lines) {
  $("problems").replaceChildren(...lines.map((text) => {
    const row = document.createElement("li");
    row.textContent = text;
    return row;
  }));
  $("notice").hidden = !lines.length;
}

// One line for each kind of mistake, with the names of all files that have it.
function showProblems() {
  if (items.length < 2) return; // the one picture's problem stands in its place
  const kinds = new Map();
  for (const { name, error, quiet } of items)
    if (error && !quiet) kinds.set(error, [...(kinds.get(error) ?? []), name]);
  say([...kinds].map(([error, names]) => `${names.join(", ")}: ${error}`));
}

$("dismiss").addEventListener("click", () => {
  for (const item of items) item.quiet = true;
  say([]);
});

// Controls ----------------------------------------------------------------------------------------

const amount = ({ unit }, value) =>
  unit === "%" ? `${Math.round(100 * value)} %`
    : `${value > 0 ? "+" : ""}${Number(value).toFixed(2)} ${unit}`.trim();

for (const slider of shown.sliders) {
  const label = document.createElement("label"), range = document.createElement("input");
  const output = document.createElement("output");
  Object.assign(range, { type: "range", id: slider.key, min: slider.low, max: slider.high });
  range.step = slider.step;
  output.htmlFor = slider.key;
  output.classList.toggle("short", slider.unit === "%");
  label.append(slider.title, range, output);
  $("sliders").append(label);
  range.addEventListener("input", () => slide(slider, range));
  // a slider that is let go where it was taken sends no change
  for (const name of ["change", "pointerup", "blur"])
    range.addEventListener(name, () => { if (held) release(slider, range); });
}

function write(slider) {
  const range = $(slider.key), text = amount(slider, range.value);
  range.nextElementSibling.textContent = text;
  range.setAttribute("aria-valuetext", text);
}

function slide(slider, range) {
  current.settings.values[slider.key] = Number(range.value);
  write(slider);
  held = true;
  frame ||= requestAnimationFrame(preview);
}

function preview() {
  frame = 0;
  for (const one of Object.values(previews)) one.show(current.settings.values);
}

function release(slider, range) {
  slide(slider, range);
  held = false;
  cancelAnimationFrame(frame);
  preview();
  renderThumb(current);
  render();
}

function fill(select, options, value) {
  select.replaceChildren(...options.map(([key, title]) => new Option(title, key)));
  select.value = value;
}

function setControls() {
  const { settings } = current;
  for (const slider of shown.sliders) {
    $(slider.key).value = settings.values[slider.key];
    write(slider);
  }
  const others = shown.models.filter((model) => model !== settings.model);
  const more = Array.from({ length: shown.alternatives }, (_, n) => n + 1);
  fill($("model"), shown.models.map((model) => [model, short(model)]), settings.model);
  fill($("left"), [["", "input"], ...others.map((m) => [m, short(m)])], settings.left);
  fill($("answer"), [["enhanced", "best"], ...more.map((n) => [`sample${n}`, `alternative ${n}`])],
    settings.answer);
  $("uncertain").checked = settings.uncertain;
}

for (const [id, key] of [["model", "model"], ["left", "left"], ["answer", "answer"],
  ["uncertain", "uncertain"]])
  $(id).addEventListener("change", ({ target }) => {
    current.settings[key] = target.type === "checkbox" ? target.checked : target.value;
    if (current.settings.left === current.settings.model) current.settings.left = "";
    setControls();
    ensure(current);
  });

$("reset").addEventListener("click", () => {
  current.settings = firstSettings();
  setControls();
  ensure(current);
});
$("all-alike").addEventListener("click", () => {
  for (const item of items) {
    item.settings = structuredClone(current.settings);
    if (!item.error) ensure(item);
  }
  announce("all pictures have these settings");
});
$("adjust").addEventListener("click", () => {
  const opened = document.body.classList.toggle("adjusting");
  $("adjust").setAttribute("aria-expanded", String(opened));
});
for (const label of document.querySelectorAll(".models")) label.hidden = shown.models.length < 2;

// The strip ---------------------------------------------------------------------------------------

function makeThumb(item) {
  const row = document.createElement("li"), image = new Image();
  item.thumb = document.createElement("button");
  item.thumb.type = "button";
  item.thumb.append(image, document.createElement("i"));
  image.alt = "";
  image.onerror = () => { image.hidden = true; };
  image.onload = () => { image.hidden = false; };
  item.thumb.addEventListener("click", () => open(item));
  row.append(item.thumb);
  $("thumbs").append(row);
  $("strip").hidden = items.length < 2;
  renderThumb(item);
}

function renderThumb(item) {
  const state = stateOf(item), run = item.runs.main, image = item.thumb.firstChild;
  const draft = draftRun(item), values = { side: 160, ...item.settings.values };
  const unfinished = draft ? draftUrl(draft, values) : item.url;
  const url = run ? `/jobs/${run.job}/enhanced?${query(values)}` : unfinished;
  if (image.dataset.url !== url) image.src = image.dataset.url = url;
  item.thumb.dataset.state = state;
  item.thumb.title = item.name;
  item.thumb.setAttribute("aria-label", `${item.name}: ${state}`);
  const [done, total] = item.busy.main?.tiles ?? [0, 0];
  item.thumb.style.setProperty("--done", total ? done / total : 0);
  $("download-all").hidden = items.filter((other) => other.runs.main).length < 2;
}
