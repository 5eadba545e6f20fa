// Uploads: the pictures of this visit, and the runs at the server that serve them.
// A run is one enhancement of one picture by one model. A picture has a main run and, where another
// model's result stands on the left, one for that.

const shown = JSON.parse(document.body.dataset.shown);
const LIMIT = shown.megabytes * 2 ** 20, AT_ONCE = 2, POLL = 200, ROLES = ["main", "left"];
const SMALLER = "choose a smaller file", items = [], line = [];
const onChange = { item: () => {} }; // page.js fills it in
let current = null, underway = 0, sending = false;

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// The server's answer; comes back while it is busy. Throws an Error with the server's own line.
async function fetched(url, options, tries = 8) {
  let answer;
  try {
    answer = await fetch(url, options);
  } catch {
    throw new Error("the server does not answer; see whether it still runs, then try again");
  }
  if (answer.ok) return answer;
  if (answer.status === 503 && tries > 1) {
    await pause(1200);
    return fetched(url, options, tries - 1);
  }
  const said = await answer.json().catch(() => ({}));
  const error = new Error(said.error || `the server answered ${answer.status}; try again`);
  error.status = answer.status;
  throw error;
}

const ask = async (url, options) => (await fetched(url, options)).json();

function makeItem(file) {
  const like = current?.settings ?? firstSettings();
  const item = {
    file, name: file.name || "picture", url: URL.createObjectURL(file), error: "",
    cancelled: false, settings: structuredClone(like), runs: {}, busy: {},
  };
  if (file.size > LIMIT)
    refuse(item, `larger than ${shown.megabytes} MB, the limit of this page; ${SMALLER}`);
  return item;
}

// Say why a picture has no result; a hopeless one is not worth another try.
function refuse(item, message, hopeless = true) {
  Object.assign(item, { error: message, hopeless, quiet: false });
}

function firstSettings() {
  const values = Object.fromEntries(shown.sliders.map((slider) => [slider.key, slider.start]));
  return { values, model: shown.models[0], left: "", answer: "enhanced", uncertain: false };
}

// What a run must have to serve the picture's settings; null where none is wanted.
function needed({ settings }, role) {
  if (role === "left")
    return settings.left ? { model: settings.left, samples: 0, uncertain: false } : null;
  const samples = settings.answer === "enhanced" ? 0 : shown.alternatives;
  return { model: settings.model, samples, uncertain: settings.uncertain };
}

const serves = (run, need) => Boolean(run) && run.model === need.model &&
  run.samples >= need.samples && (run.uncertain || !need.uncertain);

const doneRun = (item, role = "main") => {
  const need = needed(item, role), run = item.runs[role];
  return need && serves(run, need) ? run : null;
};

// The run whose draft stands in for the result while there is none.
const draftRun = ({ runs, busy }) => (!runs.main && busy.main?.info?.draft ? busy.main : null);

const draftUrl = (run, values) => `/jobs/${run.job}/draft?${query(values)}`;

// Start what the picture's settings need and is neither there nor on its way; stop all else.
function ensure(item) {
  if (item.file.size > LIMIT) return;
  for (const role of ROLES) {
    const need = needed(item, role), busy = item.busy[role];
    if (!need || serves(item.runs[role], need)) drop(busy);
    else if (!serves(busy, need)) start(item, role, need);
  }
  if (doneRun(item) && !Object.keys(item.busy).length) item.error = ""; // what failed is not wanted
  onChange.item(item);
  pump();
}

function start(item, role, need) {
  drop(item.busy[role]);
  const run = { ...need, item, role, state: "waiting", tiles: [0, 0], before: 0, dropped: false };
  run.upload = new AbortController();
  item.busy[role] = run;
  item.error = "";
  item.cancelled = false;
  line.push(run);
}

// Give a run up, also at the server.
function drop(run) {
  if (!run) return;
  run.dropped = true;
  run.upload.abort();
  if (run.item.busy[run.role] === run) delete run.item.busy[run.role];
  if (run.job) fetch(`/jobs/${run.job}/cancel`, { method: "POST" }).catch(() => {});
}

function cancel(item) {
  for (const role of ROLES) drop(item.busy[role]);
  if (item.runs.main) restore(item);
  else item.cancelled = true;
  onChange.item(item);
}

// Back to the settings of the result that is there.
function restore(item) {
  const { model, samples, uncertain } = item.runs.main, settings = item.settings;
  settings.model = model;
  settings.uncertain = settings.uncertain && uncertain;
  if (!samples) settings.answer = "enhanced";
  if (!doneRun(item, "left")) settings.left = "";
}

// The picture that is looked at goes first. One upload at a time: of two, a busy server may work at
// the later one first.
function pump() {
  line.sort((a, b) => (b.item === current) - (a.item === current));
  while (underway < AT_ONCE && !sending && line.length) {
    const run = line.shift();
    if (run.dropped) continue;
    underway += 1;
    work(run).finally(() => { underway -= 1; pump(); });
  }
}

async function work(run) {
  const { item, role } = run;
  try {
    run.state = "uploading";
    onChange.item(item);
    run.job = await send(run);
    if (run.dropped) return drop(run);
    await follow(run);
    if (!run.dropped) item.runs[role] = run;
  } catch (error) {
    if (run.dropped) return;
    drop(run); // the server may still be at work
    // what is no longer known there can be sent again
    const hopeless = error.status < 500 && error.status !== 404;
    refuse(item, error.message.replace(/^the picture: /, ""), hopeless);
  }
  if (item.busy[role] === run) delete item.busy[role];
  onChange.item(item);
}

async function send(run) {
  const form = new FormData();
  form.append("model", run.model);
  form.append("samples", run.samples);
  form.append("uncertainty", run.uncertain ? "1" : "0");
  form.append("picture", run.item.file, run.item.name);
  sending = true;
  try {
    const { signal } = run.upload;
    return (await ask("/jobs", { method: "POST", body: form, signal })).job;
  } finally {
    sending = false;
    pump();
  }
}

async function follow(run) {
  for (;;) {
    const info = await ask(`/jobs/${run.job}`);
    if (run.dropped) return;
    if (info.state === "failed") throw Object.assign(new Error(info.message), { status: 400 });
    if (info.state === "cancelled") throw new Error("cancelled at the server; enhance it again");
    Object.assign(run, { state: info.state, tiles: info.tiles, before: info.before, info });
    if (info.state === "done") return;
    onChange.item(run.item);
    await pause(POLL);
  }
}

// Make results again that the server has forgotten; resolves to how many.
async function renew(item) {
  let lost = 0;
  for (const role of ROLES) {
    const run = doneRun(item, role);
    if (!run) continue;
    try {
      await ask(`/jobs/${run.job}`);
    } catch (error) {
      if (error.status !== 404) throw error;
      delete item.runs[role];
      lost += 1;
    }
  }
  if (lost) ensure(item);
  return lost;
}

function stateOf(item) {
  if (item.busy.main) return item.busy.main.state;
  if (item.error) return "failed";
  if (item.runs.main) return "done";
  return item.cancelled ? "cancelled" : "waiting";
}
