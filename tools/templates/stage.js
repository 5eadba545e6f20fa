// The stage: the picture that is open, what is said of it, and the example of the empty page.

const previews = {
  after: new Preview($("after-preview")),
  before: new Preview($("before-preview")),
};
const bare = (model) => model.split(/[\\/]/).pop().replace(/\.pth$/, "");
const twice = (name) => shown.models.filter((model) => bare(model) === name).length > 1;
const short = (model) => (twice(bare(model)) ? model : bare(model));
const query = (values) => new URLSearchParams(values).toString();
const announce = (text) => { $("status").textContent = text; };
let painted = "", revealed = "", held = false, frame = 0;

function open(item) {
  if (current !== item) painted = revealed = "";
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
  if (item.error !== (item.told ?? "")) showProblems();
  item.told = item.error;
  if (item === current) render();
};

function render() {
  const item = current, run = doneRun(item), state = stateOf(item), info = item.runs.main?.info;
  $("name").textContent = item.name;
  if (info) $("name").append(detail(` ${info.width} × ${info.height}`));
  if (info) $("name").append(detail(`, ${info.seconds.toFixed(1)} s`));
  $("download").hidden = !run;
  if (run) $("download").href = fileUrl(item, run);
  renderNotes(run ? info.notes : []);
  renderProgress(item);
  const stopped = (state === "failed" || state === "cancelled") && !item.runs.main;
  $("message").hidden = !stopped && !item.error;
  $("why").textContent = item.error ? `${item.name}: ${item.error}` : `${item.name}: cancelled`;
  $("retry").hidden = Boolean(item.error && item.hopeless);
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
  draw(); // the tags keep clear of it
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

// Until there is a result: the file itself where the browser can show it, and the draft.
function sidesAtWork(item) {
  const run = draftRun(item);
  if (!run) return { before: item.url, after: "", tags: ["Input", ""] };
  const before = item.blind ? draftUrl(run, { strength: 0 }) : item.url;
  const after = draftUrl(run, item.settings.values);
  return { before, after, tags: ["Input", "Draft"], info: run.info };
}

// The addresses of the two sides, and what the tags say of them.
function sides(item) {
  const { settings } = item, run = doneRun(item) ?? item.runs.main;
  if (!run) return sidesAtWork(item);
  const ready = doneRun(item), answer = ready ? settings.answer : "enhanced";
  const left = doneRun(item, "left");
  const before = left ? viewUrl(left, "enhanced", settings.values) : viewUrl(run, "low", {});
  const number = answer.replace("sample", "alternative ");
  const name = answer === "enhanced" ? "Enhanced" : `Enhanced, ${number}`;
  const tags = left ? [short(left.model), short(run.model)] : ["Input", name];
  const heat = ready && settings.uncertain ? `/jobs/${run.job}/uncertainty` : "";
  const after = viewUrl(run, answer, settings.values);
  return { before, after, tags, heat, run, left, answer, info: run.info };
}

const keyOf = (item, want) => [item.url, want.before, want.after, want.heat].join(" ");

// Bring the stage up to date; nothing is fetched twice, nor while a slider moves: its preview is
// there, and its release comes here.
async function paint() {
  const item = current;
  if (!item || held) return;
  const want = sides(item), key = keyOf(item, want);
  if (key === revealed) settle();
  if (key === painted) return;
  painted = key;
  const fresh = !view.width || viewport.dataset.of !== item.url;
  if (fresh) viewport.classList.add("single");
  const loads = [swap("before", want.before)];
  if (want.after) loads.push(swap("after", want.after));
  if (want.heat) loads.push(swap("heat", want.heat));
  const arrived = await Promise.all(loads);
  if (painted !== key) return;
  if (want.after && arrived.includes(false)) {
    painted = "";
    if (!want.run) item.blind ||= !arrived[0]; // a draft: the next poll paints again
    else renewed(item);
    return;
  }
  revealed = key;
  reveal(item, want, arrived[0]);
}

// A view did not come: its result is made again, or the view is asked for again in a while.
async function renewed(item) {
  try {
    if (await renew(item)) say(["a result was no longer kept; it is made again"]);
    else setTimeout(paint, 1200);
  } catch (error) {
    say([error.message]);
  }
}

// The picture itself is there: the preview over it may go, unless a slider is still moving.
function settle() {
  if (!held) for (const preview of Object.values(previews)) preview.canvas.hidden = true;
}

function reveal(item, want, visibleAlone) {
  viewport.dataset.of = item.url;
  viewport.classList.toggle("single", !want.after);
  viewport.classList.toggle("nothing", !want.after && !visibleAlone);
  $("before").hidden = !visibleAlone;
  $("after").hidden = !want.after;
  $("heat").hidden = !want.heat;
  [$("left-tag").textContent, $("right-tag").textContent] = want.tags;
  if (want.info) setSize(want.info.width, want.info.height);
  else if (visibleAlone) setSize($("before").naturalWidth, $("before").naturalHeight);
  speak();
  if (!want.run) return;
  settle();
  const { denoise } = item.settings.values;
  previews.after.prepare(want.run.job, want.answer, denoise);
  if (want.left) previews.before.prepare(want.left.job, "enhanced", denoise);
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
