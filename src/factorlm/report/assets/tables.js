// Sorting and filtering of tables, and what the controls do.

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const isDescending = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
    rows.sort((a, b) => compare(a[0], b[0], isDescending ? -1 : 1));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }));
}

// Numbers as numbers, texts as texts; what is not known stays at the end either way.
function compare(a, b, direction) {
  const isUnknown = (text) => text === "" || text === "–";
  if (isUnknown(a) || isUnknown(b)) return isUnknown(a) - isUnknown(b);
  const difference = Number(a) - Number(b);
  const order = Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference;
  return direction * order;
}

function refresh() {
  const shown = data.runs.map(isShown);
  for (const node of document.querySelectorAll("[data-run]")) node.hidden = !shown[node.dataset.run];
  $("shown").textContent = `${shown.filter(Boolean).length} of ${shown.length} runs`;
  if (data.monitors.length) fillRuns();
  redraw();
}

// Runs with monitors that are shown; the chosen one stays where it is among them.
function fillRuns() {
  const select = $("monitor-run");
  for (const option of select.options) option.disabled = option.hidden = !isShown(data.runs[option.value]);
  if (select.selectedOptions[0]?.disabled ?? true) {
    select.value = [...select.options].find((option) => !option.disabled)?.value ?? "";
  }
  fillPanels();
}

function checkAll(isChecked) {
  for (const box of document.querySelectorAll('input[name="family"]')) box.checked = isChecked;
  refresh();
}

// The quantities of the chosen run; the one that was shown stays where this run has it too.
function fillPanels() {
  const select = $("monitor-panel");
  const before = select.value;
  const found = monitored();
  const labels = (found?.panels ?? []).map((panel) => panel.label);
  if (found?.alpha.some((share) => share !== null)) labels.push(ALPHA);
  select.replaceChildren(...labels.map((label) => new Option(label)));
  if (labels.includes(before)) select.value = before;
}

document.querySelectorAll("table.sortable").forEach(sortable);
if (data.runs.length) {
  $("families").addEventListener("change", refresh);
  $("filter").addEventListener("input", refresh);
  $("all").addEventListener("click", () => checkAll(true));
  $("none").addEventListener("click", () => checkAll(false));
  $("curves-section").addEventListener("change", redraw);
  $("scaling-section").addEventListener("change", redraw);
  $("run-table").addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (link) document.querySelector(link.getAttribute("href")).open = true;
  });
}
if (data.speed.length) $("speed-section").addEventListener("change", redraw);
if (data.monitors.length) {
  fillPanels();
  $("monitor-run").addEventListener("change", fillPanels);
  $("monitors-section").addEventListener("change", redraw);
}
