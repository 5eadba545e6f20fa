// Saving: one picture, or all of them as a zip.

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
