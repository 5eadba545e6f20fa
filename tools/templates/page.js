// The page: files in, the picture that is open, its controls, the strip, and what is saved.

const previews = { after: new Preview($("after-preview")), before: new Preview($("before-preview")) };
const bare = (model) => model.split(/[\\/]/).pop().replace(/\.pth$/, "");
const twice = (name) => shown.models.filter((model) => bare(model) === name).length > 1;
const short = (model) => (twice(bare(model)) ? model : bare(model));
const query = (values) => new URLSearchParams(values).toString();
const announce = (text) => { $("status").textContent = text; };
let painted = "", sliding = false;

// Files in ----------------------------------------------------------------------------------------

function add(files) {
  const fresh = [...files].map(makeItem);
  if (!fresh.length) return;
  document.body.classList.remove("empty");
  hideProblems();
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

const hideProblems = () => say([]);

// One line for each kind of mistake, with the names of all files that have it.
function showProblems() {
  if (items.length < 2) return; // the one picture's problem stands in its place
  const kinds = new Map();
  for (const { name, error } of items)
    if (error) kinds.set(error, [...(kinds.get(error) ?? []), name]);
  say([...kinds].map(([error, names]) => `${names.join(", ")}: ${error}`));
}

$("dismiss").addEventListener("click", hideProblems);

// The picture that is open ------------------------------------------------------------------------

function open(item) {
  if (current !== item) painted = "";
  current = item;
  for (const preview of Object.values(previews)) preview.clear();
  for (const other of items) other.thumb.setAttribute("aria-current", String(other === item));
  item.thumb.scrollIntoView({ block: "nearest", inline: "nearest" });
  setControls();
  render();
  pump();
}

onChange.item = (item) => {
  renderThumb(item);
  if (item.error && !item.told) showProblems();
  item.told = item.error;
  if (item === current) render();
};

function render() {
  const item = current, run = doneRun(item), state = stateOf(item), info = item.runs.main?.info;
  $("name").textContent = item.name;
  if (info) $("name").append(detail(` ${info.width} × ${info.height}, ${info.seconds} s`));
  $("download").hidden = !run;
  if (run) $("download").href = fileUrl(item, run);
  renderNotes(run ? info.notes : []);
  renderProgress(item);
  const stopped = (state === "failed" || state === "cancelled") && !item.runs.main;
  $("message").hidden = !stopped && !item.error;
  $("why").textContent = item.error ? `${item.name}: ${item.error}` : `${item.name}: cancelled`;
  $("retry").hidden = !item.cancelled;
  paint();
}

function detail(text) {
  const part = document.createElement("small");
  part.textContent = text;
  return part;
}

function renderNotes(notes) {
  const deviation = current.settings.uncertain ? doneRun(current)?.info.deviation : null;
  const all = [...notes];
  if (typeof deviation === "number")
    all.push(`uncertainty: ${(100 * deviation).toFixed(1)} % of full scale on average`);
  $("notes").textContent = all.join("; ");
  $("notes").hidden = !all.length;
}

function renderProgress(item) {
  const run = item.busy.main ?? item.busy.left;
  $("progress").hidden = !run;
  viewport.classList.toggle("working", Boolean(run));
  if (!run) return;
  const [done, total] = run.tiles, bar = $("tiles");
  const words = { uploading: "Uploading", working: "Enhancing", done: "Enhancing" };
  const queue = run.before ? `Waiting, ${run.before} before this one` : "Waiting";
  const tiles = total > 1 && run.state === "working" ? `, ${done} of ${total} tiles` : "";
  const text = (words[run.state] ?? queue) + tiles;
  if ($("doing").textContent !== text) $("doing").textContent = text;
  if (tiles) {
    bar.max = total;
    bar.value = done;
  } else bar.removeAttribute("value");
}

// A view of a result; all its pixels where the screen can show more than a reduced view has.
function viewUrl(run, what, values) {
  const longest = Math.max(run.info.width, run.info.height);
  const full = longest > 2048 && longest * view.scale * devicePixelRatio > 2100;
  return `/jobs/${run.job}/${what}?${query(values)}${full ? "&size=full" : ""}`;
}

const fileUrl = (item, run) =>
  `/jobs/${run.job}/${item.settings.answer}?full=1&${query(item.settings.values)}`;

// The addresses of the two sides, and what the tags say of them.
function sides(item) {
  const { settings } = item, run = doneRun(item) ?? item.runs.main;
  if (!run) return { before: item.url, after: "", tags: ["Input", ""] };
  const ready = doneRun(item), answer = ready ? settings.answer : "enhanced";
  const left = doneRun(item, "left");
  const before = left ? viewUrl(left, "enhanced", settings.values) : viewUrl(run, "low", {});
  const number = answer.replace("sample", "alternative ");
  const name = answer === "enhanced" ? "Enhanced" : `Enhanced, ${number}`;
  const tags = left ? [short(left.model), short(run.model)] : ["Input", name];
  const heat = ready && settings.uncertain ? `/jobs/${run.job}/uncertainty` : "";
  return { before, after: viewUrl(run, answer, settings.values), tags, heat, run, left, answer };
}

// Bring the stage up to date; nothing is fetched twice.
async function paint() {
  const item = current;
  if (!item) return;
  const want = sides(item), key = [item.url, want.before, want.after, want.heat].join(" ");
  if (key === painted) return;
  painted = key;
  const fresh = !view.width || viewport.dataset.of !== item.url;
  if (fresh) viewport.classList.add("single");
  const loads = [swap("before", want.before)];
  if (want.after) loads.push(swap("after", want.after));
  if (want.heat) loads.push(swap("heat", want.heat));
  const arrived = await Promise.all(loads);
  if (painted !== key) return;
  if (want.run && arrived.includes(false)) {
    renew(item).then((lost) => lost && say(["a result was no longer kept; it is made again"]));
    return;
  }
  reveal(item, want, arrived[0]);
}

function reveal(item, want, visibleAlone) {
  viewport.dataset.of = item.url;
  viewport.classList.toggle("single", !want.after);
  viewport.classList.toggle("nothing", !want.after && !visibleAlone);
  $("before").hidden = !visibleAlone;
  $("after").hidden = !want.after;
  $("heat").hidden = !want.heat;
  [$("left-tag").textContent, $("right-tag").textContent] = want.tags;
  if (want.run) setSize(want.run.info.width, want.run.info.height);
  else if (visibleAlone) setSize($("before").naturalWidth, $("before").naturalHeight);
  speak();
  if (!want.run) return;
  if (!sliding) for (const preview of Object.values(previews)) preview.canvas.hidden = true;
  previews.after.prepare(want.run.job, want.answer);
  if (want.left) previews.before.prepare(want.left.job, "enhanced");
  else previews.before.clear();
  if (doneRun(item) && viewport.dataset.said !== want.after) announce(`${item.name}: enhanced`);
  viewport.dataset.said = want.after;
}

let settling = 0;
view.onZoom = () => {
  clearTimeout(settling);
  settling = setTimeout(paint, 250);
};

$("cancel").addEventListener("click", () => {
  cancel(current);
  setControls();
  announce(`${current.name}: cancelled`);
});
$("retry").addEventListener("click", () => ensure(current));

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
  label.append(slider.title, range, output);
  $("sliders").append(label);
  range.addEventListener("input", () => slide(slider, range));
  range.addEventListener("change", () => release(slider, range));
}

function write(slider) {
  const range = $(slider.key), text = amount(slider, range.value);
  range.nextElementSibling.textContent = text;
  range.setAttribute("aria-valuetext", text);
}

function slide(slider, range) {
  current.settings.values[slider.key] = Number(range.value);
  write(slider);
  if (!sliding) requestAnimationFrame(preview);
  sliding = true;
}

function preview() {
  for (const one of Object.values(previews)) one.show(current.settings.values);
  sliding = false;
}

function release(slider, range) {
  slide(slider, range);
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
  const url = run ? `/jobs/${run.job}/enhanced?side=160&${query(item.settings.values)}` : item.url;
  if (image.dataset.url !== url) image.src = image.dataset.url = url;
  item.thumb.dataset.state = state;
  item.thumb.title = item.name;
  item.thumb.setAttribute("aria-label", `${item.name}: ${state}`);
  const [done, total] = item.busy.main?.tiles ?? [0, 0];
  item.thumb.style.setProperty("--done", total ? done / total : 0);
  $("download-all").hidden = items.filter((other) => other.runs.main).length < 2;
}

// Saving ------------------------------------------------------------------------------------------

async function save(button, url, name) {
  button.setAttribute("aria-busy", "true");
  try {
    const blob = await (await fetched(url)).blob(), link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

$("download").addEventListener("click", async (event) => {
  event.preventDefault();
  const item = current, run = doneRun(item);
  try {
    if (await renew(item)) return say([`${item.name}: no longer kept; it is made again, so wait`]);
    await save($("download"), fileUrl(item, run), run.info.files[item.settings.answer]);
  } catch (error) {
    say([`${item.name}: ${error.message}`]);
  }
});

const entryOf = (item) =>
  [doneRun(item).job, item.settings.answer, ...Object.values(item.settings.values)].join(",");

$("download-all").addEventListener("click", async () => {
  const ready = items.filter((item) => doneRun(item));
  try {
    const lost = (await Promise.all(ready.map(renew))).filter(Boolean).length;
    if (lost) return say([`${lost} results were no longer kept; they are made again, so wait`]);
    for (let from = 0; from < ready.length; from += shown.most) {
      const jobs = ready.slice(from, from + shown.most).map((item) => ["job", entryOf(item)]);
      const name = from ? `enhanced_${from / shown.most + 1}.zip` : "enhanced.zip";
      await save($("download-all"), `/zip?${query(jobs)}`, name);
    }
  } catch (error) {
    say([error.message]);
  }
});

// The empty page shows an example -----------------------------------------------------------------

async function showExample() {
  for (let tries = 0; tries < 300 && !current; tries += 1) {
    const info = await ask("/jobs/example").catch(() => null);
    if (info?.state === "failed" || info === null) return;
    if (info.state === "done") return paintExample(info);
    await pause(400);
  }
}

async function paintExample(info) {
  await Promise.all([swap("before", "/jobs/example/low"), swap("after", "/jobs/example/enhanced")]);
  if (current) return;
  $("before").hidden = $("after").hidden = false;
  viewport.classList.remove("single");
  setSize(info.width, info.height);
  speak();
}

viewport.classList.add("single");
showExample();
