// The page around the picture: text, the list of scans, keys and controls.

// Text beside the picture ---------------------------------------------------------------------------------------------

function made(kind, text, name = "") {
  const node = document.createElement(kind);
  node.className = name;
  node.append(text);
  return node;
}

function button(text, label, act) {
  const node = made("button", text);
  node.type = "button";
  node.setAttribute("aria-label", label);
  node.title = label;
  node.addEventListener("click", act);
  return node;
}

const tell = (text) => { element("status").textContent = text; };

function describe() {
  const scan = current(), readable = scan.slices.length > 0;
  element("scan-name").textContent = scan.key || scan.name;
  element("nothing").hidden = readable;
  element("placing").hidden = !state.placing;
  for (const id of ["slice", "in", "out", "fit", "add", "up", "down", "looked"]) element(id).disabled = id !== "looked" && !readable;
  element("undo").disabled = !scan.past.length;
  element("redo").disabled = !scan.future.length;
  element("reset").disabled = !scan.changed;
  element("looked").checked = scan.looked;
  const doubts = scan.failure ? [made("li", scan.failure, "failed")] : [];
  element("doubts").replaceChildren(...doubts, ...scan.notes.map((note) => made("li", note)));
  describeBodies(scan);
  const used = new Set(scan.bodies.map((body) => body.name)), free = facts.names.filter((name) => !used.has(name));
  const before = element("new-name").value;
  element("new-name").replaceChildren(...free.toReversed().map((name) => new Option(name, name)));
  if (free.includes(before)) element("new-name").value = before;
  else element("new-corners").value = free.at(-1) === "S1" ? "upper" : "all";
  element("add").disabled = !readable || !free.length;
  const cut = discs(scan).filter((each) => !each.fault).map((each) => each.level), lost = lostLevels(scan, cut);
  element("discs").textContent = `Discs: ${cut.join(", ") || "none"}.${lost}`;
  const { wrong, doubtful } = scan.faults;
  element("faults").replaceChildren(...wrong.map((text) => made("li", text, "wrong")), ...doubtful.map((text) => made("li", text)));
  const stopped = scans.filter((each) => toSave(each) && each.faults.wrong.length);
  element("save").disabled = stopped.length > 0;
  element("blocked").textContent = stopped.length
    ? `Nothing can be saved yet. ${stopped.slice(0, 3).map((each) => `${each.key}: ${each.faults.wrong[0]}`).join(" ")}${stopped.length > 3 ? ` And ${stopped.length - 3} more scans.` : ""}` : "";
}

// What a change does to the list of discs, in words.
function lostLevels(scan, cut) {
  const before = discs({ ...scan, bodies: scan.original }).filter((each) => !each.fault).map((each) => each.level);
  const [gone, come] = [before.filter((level) => !cut.includes(level)), cut.filter((level) => !before.includes(level))];
  const words = [gone.length ? `no longer ${gone.join(", ")}` : "", come.length ? `new ${come.join(", ")}` : ""].filter(Boolean);
  return scan.changed && words.length ? ` Compared with before: ${words.join("; ")}.` : "";
}

// Rows are updated in place: a list of names that was replaced would lose the focus, and what is being typed.
function describeBodies(scan) {
  const body = element("table").tBodies[0];
  while (body.rows.length > scan.bodies.length) body.deleteRow(-1);
  while (body.rows.length < scan.bodies.length) body.append(newRow(body.rows.length));
  scan.bodies.forEach((each, index) => fillRow(body.rows[index], scan, each, index));
}

function newRow(index) {
  const line = document.createElement("tr"), name = document.createElement("select");
  name.append(...facts.names.map((each) => new Option(each, each)));
  name.addEventListener("change", () => change((scan) => { scan.bodies[index].name = name.value; }));
  name.addEventListener("focus", () => choose(index, null));
  line.append(made("td", name), made("td", "", "n"), document.createElement("td"));
  line.cells[0].append(made("span", "", "was"));
  line.addEventListener("click", (event) => event.target.closest("select, button") || choose(index, null));
  return line;
}

function fillRow(line, scan, body, index) {
  const [name, was] = line.cells[0].children, [, sure, actions] = line.cells;
  line.className = index === state.body ? "chosen" : "";
  name.value = body.name;
  name.setAttribute("aria-label", `Name of ${body.name}`);
  was.textContent = body.was === body.name ? "" : body.was ? `was ${body.was}` : "added";
  sure.textContent = body.confidence === null ? "–" : `${Math.round(100 * body.confidence)} %`;
  sure.title = body.cornerMm ? `9 in 10 of its corners are within ${(2 * body.cornerMm).toFixed(1)} mm` : "";
  sure.classList.toggle("low", body.confidence !== null && body.confidence < facts.sure);
  const missing = ["upper", "lower"].filter((half) => !known(body, edges[half]) && !(half === "lower" && body.name === "S1"));
  actions.replaceChildren(
    ...missing.map((half) => button(`+ ${half}`, `Place the ${half} corners of ${body.name}`, () => startPlacing(body.name, half, index))),
    button("×", `Remove ${body.name}: it is not there`, () => remove(index)));
}

// The list ------------------------------------------------------------------------------------------------------------

const passes = {
  "": () => true,
  failed: (scan) => scan.doubt === 0,
  doubtful: (scan) => scan.doubt > 0 && scan.doubt < facts.groups.length - 1,
  changed: (scan) => scan.changed,
  wrong: (scan) => scan.faults.wrong.length > 0,
  open: (scan) => !scan.looked,
};

function list() {
  const show = passes[element("show").value];
  state.shown = scans.map((_, index) => index).filter((index) => show(scans[index]));
  const total = scans.length, done = scans.filter((scan) => scan.looked).length, edited = scans.filter((scan) => scan.changed).length;
  element("count").textContent = `${state.shown.length === total ? total : `${state.shown.length} of ${total}`} scans; ${done} looked at, ${edited} changed`;
  element("list").replaceChildren(...state.shown.map((index) => {
    const scan = scans[index], line = made("div", "", "scan");
    line.id = `scan-${index}`;
    line.setAttribute("role", "option");
    line.setAttribute("aria-selected", String(index === state.scan));
    const least = Math.min(...scan.bodies.map((body) => (body.confidence === null ? 1 : body.confidence)));
    const why = facts.groups[scan.doubt] + (least < 1 ? `, lowest ${Math.round(100 * least)} %` : "");
    line.append(made("span", scan.key || scan.name, "who"), made("span", `${scan.changed ? "changed " : ""}${scan.looked ? "✓" : ""}`, "state"), made("span", why, `why g${scan.doubt}`));
    line.addEventListener("click", () => chooseScan(index));
    return line;
  }));
  const chosen = element(`scan-${state.scan}`), box = element("list");
  if (!chosen) return box.removeAttribute("aria-activedescendant");
  box.setAttribute("aria-activedescendant", chosen.id);
  if (chosen.offsetTop < box.scrollTop || chosen.offsetTop + chosen.offsetHeight > box.scrollTop + box.clientHeight) {
    box.scrollTop = chosen.offsetTop - (box.clientHeight - chosen.offsetHeight) / 2;
  }
}

// Choosing ------------------------------------------------------------------------------------------------------------

function refresh() {
  list();
  describe();
  draw();
}

function chooseScan(index) {
  Object.assign(state, { scan: index, body: null, corner: null, placing: null, drag: null });
  fit();
  if (current().slices.length) drawSlice();
  else {
    element("picture").replaceChildren();
    element("where").textContent = "";
  }
  refresh();
}

function choose(body, corner) {
  if (state.placing) return;
  state.body = body;
  state.corner = corner;
  for (const [place, line] of [...element("table").tBodies[0].rows].entries()) line.className = place === body ? "chosen" : "";
  draw();
}

function chooseSlice(index) {
  const scan = current();
  if (!scan.slices.length) return;
  scan.slice = Math.min(Math.max(index, 0), scan.slices.length - 1);
  drawSlice();
  draw();
}

function step(by) {
  const at = state.shown.indexOf(state.scan);
  const next = state.shown[Math.min(Math.max(at + by, 0), state.shown.length - 1)];
  if (next !== undefined && next !== state.scan) chooseScan(next);
}

function nextCorner(by) {
  const all = current().bodies.flatMap((body, index) => edges.all.filter((corner) => body.corners[corner]).map((corner) => [index, corner]));
  if (!all.length || !element("drawn").checked) return;
  const at = all.findIndex(([body, corner]) => body === state.body && (state.corner === null || corner === state.corner));
  const next = at < 0 ? (by > 0 ? 0 : all.length - 1) : state.corner === null ? at : (at + by + all.length) % all.length;
  element("picture").focus({ preventScroll: true });
  choose(...all[next]);
}

function nextBody(by) {
  const { bodies } = current();
  if (!bodies.length || !element("drawn").checked) return;
  const index = state.body === null ? (by > 0 ? 0 : bodies.length - 1) : (state.body + by + bodies.length) % bodies.length;
  element("picture").focus({ preventScroll: true });
  choose(index, edges.all.find((corner) => bodies[index].corners[corner]));
}

function look(value) {
  current().looked = value;
  remember();
  list();
  element("looked").checked = value;
}

// Ticks are remembered where the browser allows it, by place: no name enters its storage.
function remember() {
  try {
    localStorage.setItem(`spinejax-${facts.page}`, JSON.stringify(scans.map((scan) => Number(scan.looked))));
  } catch { /* forgotten when the page is closed */ }
}

function recall() {
  try {
    const ticks = JSON.parse(localStorage.getItem(`spinejax-${facts.page}`) || "[]");
    scans.forEach((scan, index) => { scan.looked = ticks[index] === 1; });
  } catch { /* as if there were none */ }
}

// Keys and controls ---------------------------------------------------------------------------------------------------

function onKey(event) {
  const at = event.target, inPicture = Boolean(at.closest("#picture")), scan = current();
  if (at.matches("select, input[type=file]")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey || event.metaKey) {
    if (key === "z" || key === "y") {
      if (key === "y" || event.shiftKey) undo(scan.future, scan.past);
      else undo(scan.past, scan.future);
      event.preventDefault();
    }
    return;
  }
  if (event.altKey) return;
  const by = event.shiftKey ? 5 : 1, back = event.shiftKey ? -1 : 1;
  const go = (rows, columns) => () => {
    if (inPicture && state.placing) {
      place(scan, state.placing.cursor, by * rows, by * columns);
      draw();
    } else if (inPicture && state.corner !== null) move(by * rows, by * columns);
    else if (at === element("list") && rows) step(rows);
    else if (columns && (inPicture || at === element("list"))) chooseSlice(scan.slice + columns);
    else return false;
  };
  const keys = {
    ArrowUp: go(-1, 0), ArrowDown: go(1, 0), ArrowLeft: go(0, -1), ArrowRight: go(0, 1),
    Enter: () => (inPicture && state.placing ? placeCorner() : false),
    Escape: () => (state.placing || state.body !== null ? cancel() : false),
    Delete: () => (inPicture && state.body !== null && !state.placing ? remove(state.body) : false),
    c: () => nextCorner(back),
    b: () => nextBody(back),
    n: () => step(1),
    p: () => step(-1),
    a: () => element("add").click(),
    l: () => look(!scan.looked),
    h: () => element("drawn").click(),
    "+": () => zoom(1 / 1.5),
    "=": () => zoom(1 / 1.5),
    "-": () => zoom(1.5),
    0: () => { fit(); draw(); },
  };
  // Other keys keep the browser's own action: scrolling, moving a slider.
  if (Object.hasOwn(keys, key) && keys[key]() !== false) event.preventDefault();
}

function start() {
  const click = (id, act) => element(id).addEventListener("click", act);
  click("save", save);
  click("previous", () => step(-1));
  click("next", () => step(1));
  click("in", () => zoom(1 / 1.5));
  click("out", () => zoom(1.5));
  click("fit", () => { fit(); draw(); });
  click("undo", () => undo(current().past, current().future));
  click("redo", () => undo(current().future, current().past));
  click("reset", () => { cancel(); change((scan) => { scan.bodies = copy(scan.original); }); });
  click("up", () => shift(-1));
  click("down", () => shift(1));
  click("add", () => startPlacing(element("new-name").value, element("new-corners").value));
  element("new-name").addEventListener("change", (event) => { element("new-corners").value = event.target.value === "S1" ? "upper" : "all"; });
  element("load").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file) await load(file);
    event.target.value = "";
  });
  for (const choice of document.querySelectorAll('[name="which"]')) choice.addEventListener("change", describe);
  element("show").addEventListener("change", () => {
    list();
    if (!state.shown.includes(state.scan) && state.shown.length) chooseScan(state.shown[0]);
  });
  element("slice").addEventListener("input", (event) => chooseSlice(Number(event.target.value)));
  element("drawn").addEventListener("change", draw);
  element("looked").addEventListener("change", (event) => look(event.target.checked));
  const picture = element("picture");
  picture.addEventListener("pointerdown", onDown);
  picture.addEventListener("pointermove", onMove);
  picture.addEventListener("pointerup", onUp);
  picture.addEventListener("pointercancel", onUp);
  // A finger that drags must not scroll the page. It does where nothing is dragged.
  picture.addEventListener("touchstart", (event) => { if (state.drag) event.preventDefault(); }, { passive: false });
  picture.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return; // a pinch on a touchpad, too; without it the page scrolls
    event.preventDefault();
    zoom(Math.exp(Math.min(Math.max(event.deltaY, -60), 60) / 100), pointOf(event));
  }, { passive: false });
  new ResizeObserver(() => draw()).observe(picture);
  document.addEventListener("keydown", onKey);
  window.addEventListener("beforeunload", (event) => { if (state.unsaved) event.preventDefault(); });
  if (!scans.length) return tell("There are no scans.");
  scans.forEach(settle);
  recall();
  chooseScan(0);
}

start();
