"use strict";
// Corners and levels of vertebral bodies, corrected by hand. Nothing leaves the page but the file that is saved.
//
// A corner is (row, column, slice) of the scan, pixel centres at integers, or null where it is not known. On the screen,
// and in all lengths, rows and columns are in mm, because their spacings may differ.

const element = (id) => document.getElementById(id);
const facts = JSON.parse(element("facts").textContent);
const cornerNames = ["upper anterior", "upper posterior", "lower posterior", "lower anterior"];
const edges = { all: [0, 1, 2, 3], upper: [0, 1], lower: [2, 3] };
const copy = (value) => JSON.parse(JSON.stringify(value));
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

const scans = facts.scans.map((given) => ({
  ...given,
  spacing: given.affine && [0, 1, 2].map((axis) => Math.hypot(...[0, 1, 2].map((row) => given.affine[row][axis]))),
  bodies: given.bodies.map((body) => ({ ...body, was: body.name })),
  slice: given.middle || 0, // an index into `slices`
  past: [],
  future: [],
  looked: false,
}));
for (const scan of scans) scan.original = copy(scan.bodies);
const state = { scan: 0, shown: [], body: null, corner: null, placing: null, view: null, drag: null, unsaved: false };
const carried = new Map(); // scans of a loaded file that are not on this page: key → as in the file
const current = () => scans[state.scan];

// Geometry ------------------------------------------------------------------------------------------------------------

const inMm = (scan, corner) => [corner[0] * scan.spacing[0], corner[1] * scan.spacing[1]];
const minus = (a, b) => [a[0] - b[0], a[1] - b[1]];
const mean = (points) => [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length);
const known = (body, which = edges.all) => which.every((corner) => body.corners[corner] !== null);
const depth = (body) => { // the slice of its corners, which may lie between two
  const slices = body.corners.filter(Boolean).map((corner) => corner[2]);
  return slices.reduce((sum, slice) => sum + slice, 0) / slices.length;
};
const reach = (scan, body) => (body.widthMm || 35) / 2 / scan.spacing[2]; // in slices, to either side
const centre = (scan, body) => mean(body.corners.filter(Boolean).map((corner) => inMm(scan, corner)));

function toPatient(scan, corner) {
  return [0, 1, 2].map((row) => [...corner, 1].reduce((sum, value, column) => sum + scan.affine[row][column] * value, 0));
}

function toScan(scan, point) {
  // The axes are at right angles within a tolerance of the reader, so the inverse is calculated, not transposed.
  const [a, b, c] = scan.affine.slice(0, 3), from = [0, 1, 2].map((row) => point[row] - scan.affine[row][3]);
  const minor = (p, q, i, j) => p[i] * q[j] - p[j] * q[i];
  const determinant = a[0] * minor(b, c, 1, 2) - a[1] * minor(b, c, 0, 2) + a[2] * minor(b, c, 0, 1);
  const adjugate = [
    [minor(b, c, 1, 2), -minor(a, c, 1, 2), minor(a, b, 1, 2)],
    [-minor(b, c, 0, 2), minor(a, c, 0, 2), -minor(a, b, 0, 2)],
    [minor(b, c, 0, 1), -minor(a, c, 0, 1), minor(a, b, 0, 1)],
  ];
  return adjugate.map((row) => row.reduce((sum, value, column) => sum + value * from[column], 0) / determinant);
}

// The disc between two bodies, as `data_prep.anatomy.discs` cuts it out: its window in mm, or why there is none.
function disc(scan, upper, lower) {
  if (!known(upper, edges.lower) || !known(lower, edges.upper)) return { fault: "a corner beside it is missing" };
  const facing = [...[3, 2].map((corner) => upper.corners[corner]), ...[0, 1].map((corner) => lower.corners[corner])];
  const [upperFront, upperBack, lowerFront, lowerBack] = facing.map((corner) => inMm(scan, corner));
  const endplates = [minus(upperBack, upperFront), minus(lowerBack, lowerFront)];
  const lengths = endplates.map((each) => Math.hypot(...each)), width = (lengths[0] + lengths[1]) / 2;
  let back = [0, 1].map((axis) => endplates[0][axis] / (lengths[0] || 1e-9) + endplates[1][axis] / (lengths[1] || 1e-9));
  const norm = Math.hypot(...back) || 1e-9;
  back = back.map((value) => value / norm);
  const down = [back[1], -back[0]];
  const apart = minus(mean([lowerFront, lowerBack]), mean([upperFront, upperBack]));
  const height = apart[0] * down[0] + apart[1] * down[1];
  const middle = mean([upperFront, upperBack, lowerFront, lowerBack]);
  const box = [[-1, -1], [-1, 1], [1, 1], [1, -1]].map(([along, across]) =>
    [0, 1].map((axis) => middle[axis] + (along * down[axis] * width) / 2 + across * back[axis] * width));
  const within = ([low, high], value) => low <= value && value <= high;
  const fault = within(facts.limits.width, width) && within(facts.limits.height, height) ? ""
    : `its corners span ${width.toFixed(1)} mm front to back and ${height.toFixed(1)} mm top to bottom`;
  return { box, fault };
}

function discs(scan) {
  return facts.levels.flatMap((level) => {
    const [upper, lower] = level.split("-").map((name) => scan.bodies.find((body) => body.name === name));
    return upper && lower ? [{ level, ...disc(scan, upper, lower) }] : [];
  });
}

// What is wrong (nothing can be saved) and what is doubtful (it can).
function faults(scan) {
  const wrong = [], doubtful = [], bodies = scan.bodies;
  if (!bodies.length) return { wrong, doubtful };
  if (bodies.length === 1) wrong.push(`Only ${bodies[0].name} is marked: a disc needs two vertebrae. Add another, or remove it.`);
  const names = bodies.map((body) => body.name);
  for (const name of new Set(names.filter((name, place) => names.indexOf(name) !== place))) wrong.push(`Two vertebrae are called ${name}.`);
  const byHeight = [...bodies].sort((a, b) => centre(scan, a)[0] - centre(scan, b)[0]);
  for (let place = 1; place < byHeight.length; place++) {
    const [upper, lower] = [byHeight[place - 1].name, byHeight[place].name];
    const gap = facts.names.indexOf(lower) - facts.names.indexOf(upper);
    if (gap < 0) wrong.push(`${upper} is above ${lower}: names must run from the top down.`);
    else if (gap > 1) {
      const missing = facts.names.slice(facts.names.indexOf(upper) + 1, facts.names.indexOf(lower));
      doubtful.push(`No ${missing.join(", ")} between ${upper} and ${lower}.`);
    }
  }
  for (const body of bodies) {
    if (!known(body, edges.upper) && !known(body, edges.lower)) wrong.push(`${body.name} has neither its upper nor its lower corners.`);
    const [upperFront, upperBack, lowerBack, lowerFront] = body.corners.map((corner) => corner && inMm(scan, corner));
    const backwards = (front, back) => front && back && front[1] >= back[1] && Math.abs(front[0] - back[0]) < Math.abs(front[1] - back[1]);
    if (backwards(upperFront, upperBack) || backwards(lowerFront, lowerBack)) wrong.push(`${body.name}: its front corner is behind its back corner. Front is left.`);
    else if (known(body)) {
      const outline = [upperFront, upperBack, lowerBack, lowerFront];
      const turns = outline.map((point, place) => {
        const [here, there] = [minus(outline[(place + 1) % 4], point), minus(outline[(place + 2) % 4], outline[(place + 1) % 4])];
        return here[1] * there[0] - here[0] * there[1];
      });
      if (turns.filter((turn) => turn > 0).length < 3) wrong.push(`${body.name}: its corners are not in order; it crosses itself or is upside down.`);
    }
    if (depth(body) < -0.5 - reach(scan, body) || depth(body) > scan.shape[2] - 0.5 + reach(scan, body)) wrong.push(`${body.name} is outside the slices. Are its corners in LPS and mm?`);
  }
  for (const { level, fault } of discs(scan)) if (fault) doubtful.push(`${level} will not be cut out: ${fault}.`);
  return { wrong, doubtful };
}

// Changing: every change of a scan's bodies can be undone -----------------------------------------------------------------

// What follows from a scan's bodies and is asked of all scans: calculated once a change.
function settle(scan) {
  scan.changed = !same(scan.bodies, scan.original);
  scan.faults = faults(scan);
}

function record(scan, before) {
  if (same(before, scan.bodies)) return;
  scan.past.push(before);
  scan.future = [];
  state.unsaved = true;
  settle(scan);
}

function commit(before) {
  record(current(), before);
  refresh();
}

function change(act) {
  const before = copy(current().bodies);
  act(current());
  commit(before);
}

function undo(from, to) {
  const scan = current();
  if (!from.length) return;
  state.placing = null;
  to.push(scan.bodies);
  scan.bodies = from.pop();
  state.unsaved = true;
  settle(scan);
  const body = state.body !== null && scan.bodies[state.body];
  if (!body || (state.corner !== null && !body.corners[state.corner])) state.body = state.corner = null;
  refresh();
}

function shift(by) {
  const lost = [];
  change((scan) => {
    scan.bodies = scan.bodies.filter((body) => {
      const name = facts.names[facts.names.indexOf(body.name) + by];
      if (name === undefined) lost.push(body.name);
      else body.name = name;
      return name !== undefined;
    });
  });
  if (lost.length) tell(`${lost[0]} has no name ${by > 0 ? "below" : "above"} it and was removed. Undo brings it back.`);
}

function remove(index) {
  state.body = state.corner = null;
  change((scan) => scan.bodies.splice(index, 1));
  element("picture").focus();
}

function move(rows, columns) {
  change((scan) => place(scan, scan.bodies[state.body].corners[state.corner], rows, columns));
}

function place(scan, corner, rows, columns) {
  const [within, beside] = [0, 1].map((axis) => (value) => Math.min(Math.max(value, -0.5), scan.shape[axis] - 0.5));
  corner[0] = within(corner[0] + rows);
  corner[1] = beside(corner[1] + columns);
}

// Placing corners by clicks, or with arrows and Enter ---------------------------------------------------------------------

function startPlacing(name, which, index = null) {
  const scan = current();
  if (!scan.slices.length) return;
  const { x, y, width, height } = state.view;
  state.body = index;
  state.corner = null;
  state.placing = { name, wanted: edges[which], points: [], index, cursor: [(y + height / 2) / scan.spacing[0], (x + width / 2) / scan.spacing[1]] };
  element("picture").focus();
  refresh();
}

function placeCorner() {
  const scan = current(), { name, wanted, points, index, cursor } = state.placing;
  points.push([...cursor, scan.slices[scan.slice]]);
  if (points.length < wanted.length) return refresh();
  state.placing = null;
  change(() => {
    const body = index === null ? { name, corners: [null, null, null, null], widthMm: null, confidence: null, was: "" } : scan.bodies[index];
    if (index === null) scan.bodies.push(body);
    // A body keeps its own slice where it has one: corners are those of its mid-sagittal plane.
    const own = body.corners.find(Boolean);
    wanted.forEach((corner, place) => { body.corners[corner] = [points[place][0], points[place][1], own ? own[2] : points[place][2]]; });
    scan.bodies.sort((a, b) => centre(scan, a)[0] - centre(scan, b)[0]);
    state.body = scan.bodies.indexOf(body);
  });
}

function cancel() {
  state.placing = null;
  state.body = state.corner = null;
  element("picture").focus();
  refresh();
}

// Drawing -------------------------------------------------------------------------------------------------------------

function svg(kind, attributes, text = "") {
  const made = document.createElementNS(element("picture").namespaceURI, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

const gripRadius = () => (matchMedia("(pointer: coarse)").matches ? 18 : 11); // in pixels of the screen
const pixelsPerMm = () => {
  const { clientWidth, clientHeight } = element("picture");
  return Math.max(Math.min(clientWidth / state.view.width, clientHeight / state.view.height), 1e-6);
};

function fit() {
  const scan = current();
  if (!scan.slices.length) state.view = { x: 0, y: 0, width: 1, height: 1 };
  else {
    const [height, width] = [0, 1].map((axis) => scan.shape[axis] * scan.spacing[axis]);
    state.view = { x: -scan.spacing[1] / 2, y: -scan.spacing[0] / 2, width, height, whole: width };
  }
}

function zoom(factor, at = null) {
  const scan = current(), view = state.view;
  if (!scan.slices.length) return;
  if (view.width * factor >= view.whole * 0.999) fit();
  else {
    const chosen = state.body !== null && state.corner !== null && inMm(scan, scan.bodies[state.body].corners[state.corner]);
    const [y, x] = at || chosen || [view.y + view.height / 2, view.x + view.width / 2];
    const by = Math.max(factor, view.whole / 16 / view.width);
    state.view = { ...view, x: x - (x - view.x) * by, y: y - (y - view.y) * by, width: view.width * by, height: view.height * by };
  }
  draw();
}

function drawSlice() {
  const scan = current(), picture = element("picture"), image = picture.querySelector("image") || svg("image", { preserveAspectRatio: "none" });
  const slices = element(`slices-${state.scan}`).textContent.trim().split(/\s+/);
  const [height, width] = [0, 1].map((axis) => scan.shape[axis] * scan.spacing[axis]);
  for (const [name, value] of Object.entries({ x: -scan.spacing[1] / 2, y: -scan.spacing[0] / 2, width, height })) image.setAttribute(name, value);
  image.setAttribute("href", `data:image/webp;base64,${slices[scan.slice]}`);
  if (!image.parentNode) picture.prepend(image);
  const shown = scan.slices[scan.slice], mm = (shown - scan.slices[scan.middle]) * scan.spacing[2];
  const side = mm === 0 ? "middle" : `${Math.abs(mm).toFixed(0)} mm to the ${mm < 0 ? "right" : "left"}`;
  element("where").textContent = `slice ${shown + 1} of ${scan.shape[2]}, ${side}`;
  element("slice").max = String(scan.slices.length - 1);
  element("slice").value = String(scan.slice);
  element("slice").setAttribute("aria-valuetext", element("where").textContent);
}

function draw() {
  const scan = current(), picture = element("picture"), view = state.view;
  const focused = document.activeElement && document.activeElement.closest && document.activeElement.closest("#picture");
  for (const old of [...picture.children]) if (old.tagName !== "image") old.remove();
  picture.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
  picture.classList.toggle("zoomed", Boolean(scan.slices.length) && view.width < view.whole * 0.999);
  if (scan.slices.length && element("drawn").checked) picture.append(...drawing(scan, 1 / pixelsPerMm()));
  if (scan.slices.length && state.placing) picture.append(...placing(scan, 1 / pixelsPerMm()));
  const chosen = picture.querySelector(".grip.chosen");
  if (focused) (chosen || picture).focus({ preventScroll: true });
}

function drawing(scan, pixel) {
  const made = [], points = (list) => list.map(([row, column]) => `${column.toFixed(3)},${row.toFixed(3)}`).join(" ");
  for (const { level, box } of discs(scan)) {
    if (!box) continue;
    made.push(svg("polygon", { class: "box", points: points(box) }));
    const [row, column] = mean([box[1], box[2]]);
    made.push(svg("text", { class: "level", x: column - 4 * pixel, y: row, "font-size": 11 * pixel, "stroke-width": 3 * pixel }, level));
  }
  const grips = [];
  scan.bodies.forEach((body, index) => {
    const parity = index % 2 ? "odd" : "even", corners = body.corners.map((corner) => corner && inMm(scan, corner));
    const unsure = body.confidence !== null && body.confidence < facts.sure ? " unsure" : "";
    const away = Math.abs(depth(body) - scan.slices[scan.slice]) > reach(scan, body) + 0.5 ? " away" : "";
    const name = `${parity}${unsure}${away}${index === state.body ? " chosen" : ""}`;
    made.push(svg(known(body) ? "polygon" : "polyline", { class: `body ${known(body) ? "" : "open "}${name}`, points: points(corners.filter(Boolean)) }));
    const [row, column] = centre(scan, body), low = body.confidence === null ? "" : ` ${Math.round(100 * body.confidence)}`;
    made.push(svg("text", { class: parity, x: column, y: row, "font-size": 13 * pixel, "stroke-width": 3 * pixel }, body.name + low));
    corners.forEach((corner, place) => {
      if (!corner) return;
      const chosen = index === state.body && place === state.corner ? " chosen" : "", [y, x] = corner;
      made.push(svg("circle", { class: `dot ${parity}${chosen}`, cx: x, cy: y, r: (chosen ? 5 : 3.5) * pixel }));
      const label = `${body.name}, ${cornerNames[place]} corner: row ${body.corners[place][0].toFixed(1)}, column ${body.corners[place][1].toFixed(1)}`;
      grips.push(svg("circle", { class: `grip${chosen}`, cx: x, cy: y, r: gripRadius() * pixel, tabindex: "-1", role: "button", "aria-label": label }));
    });
  });
  return [...made, ...grips];
}

function placing(scan, pixel) {
  const { name, wanted, points, cursor } = state.placing, [y, x] = inMm(scan, cursor), arm = 12 * pixel;
  element("placing").textContent = `${name}: click its ${cornerNames[wanted[points.length]]} corner (${points.length + 1} of ${wanted.length}). Esc cancels.`;
  const line = [...points.map((point) => inMm(scan, point)), [y, x]].map(([row, column]) => `${column},${row}`).join(" ");
  return [
    svg("polyline", { class: "cross", points: line }),
    svg("path", { class: "cross", d: `M${x - arm} ${y}H${x + arm}M${x} ${y - arm}V${y + arm}` }),
  ];
}

// Text beside the picture --------------------------------------------------------------------------------------------

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

// The corner file -----------------------------------------------------------------------------------------------------

const toSave = (scan) => scan.key && scan.bodies.length > 0 && (scan.changed || document.querySelector('[name="which"]:checked').value === "all");

function entry(scan) {
  const order = [...scan.bodies].sort((a, b) => facts.names.indexOf(a.name) - facts.names.indexOf(b.name));
  return Object.fromEntries(order.map((body) => {
    const points = body.corners.map((corner) => corner && toPatient(scan, corner).map((value) => Number(value.toFixed(4))));
    return [body.name, { corners_mm: points, ...(body.widthMm === null ? {} : { width_mm: body.widthMm }) }];
  }));
}

// One line a vertebra. JSON.stringify writes the names, whatever is in them.
function cornerFile() {
  const entries = new Map([...carried, ...scans.filter(toSave).map((scan) => [scan.key, entry(scan)])]);
  const lines = [...entries].map(([key, bodies]) => {
    const rows = Object.entries(bodies).map(([name, body]) => `  ${JSON.stringify(name)}: ${JSON.stringify(body)}`);
    return `${JSON.stringify(key)}: {\n${rows.join(",\n")}\n}`;
  });
  return { text: `{"scans": {\n${lines.join(",\n")}\n}}\n`, count: entries.size };
}

function save() {
  if (element("save").disabled) return;
  const { text, count } = cornerFile();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "corners.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  state.unsaved = false;
  const empty = scans.filter((scan) => !scan.bodies.length).length;
  tell(`Saved ${count} scans${carried.size ? `, ${carried.size} of them from the loaded file and not on this page` : ""}. ` +
    (empty ? `${empty} scans have no vertebrae and are not in the file. ` : "") + "Read them with --corners corners.json.");
}

// The scans of a corner file: a Map of key → vertebrae. Throws what is wrong with it.
function parse(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
  if (!isObject(content) || !isObject(content.scans)) throw new Error("it has no \"scans\"");
  const isPoint = (point) => Array.isArray(point) && point.length === 3 && point.every((value) => Number.isFinite(value) && Math.abs(value) <= 2000);
  for (const [key, bodies] of Object.entries(content.scans)) {
    if (!isObject(bodies)) throw new Error(`${key} has no vertebrae`);
    for (const [name, body] of Object.entries(bodies)) {
      const where = `${key}, ${name}`;
      if (!facts.names.includes(name)) throw new Error(`${where}: expected one of ${facts.names.join(", ")}`);
      if (!isObject(body) || !Array.isArray(body.corners_mm) || body.corners_mm.length !== 4 || !body.corners_mm.every((point) => point === null || isPoint(point))) {
        throw new Error(`${where}: expected corners_mm with four points in mm, or null`);
      }
      if (!known({ corners: body.corners_mm }, edges.upper) && !known({ corners: body.corners_mm }, edges.lower)) throw new Error(`${where}: neither its upper nor its lower corners are known`);
      if (body.width_mm !== undefined && !(body.width_mm >= 5 && body.width_mm <= 100)) throw new Error(`${where}: expected a width_mm from 5 to 100`);
    }
  }
  const read = new Map(Object.entries(content.scans));
  for (const scan of scans.filter((each) => each.slices.length && read.has(each.key))) {
    const points = Object.values(read.get(scan.key)).flatMap((body) => body.corners_mm.filter(Boolean));
    const inside = (signs) => points.filter((point) => {
      const corner = toScan(scan, point.map((value, axis) => signs[axis] * value));
      return [0, 1].every((axis) => corner[axis] > -0.5 && corner[axis] < scan.shape[axis] - 0.5);
    }).length;
    if (2 * inside([1, 1, 1]) < points.length && inside([-1, -1, 1]) > inside([1, 1, 1])) {
      throw new Error(`${scan.key}: its corners are outside the image, and inside it with the signs of RAS. Write them in LPS: the negative of x and y`);
    }
  }
  return read;
}

async function load(file) {
  let read;
  try {
    read = parse(await file.text());
  } catch (error) {
    return tell(`${file.name} cannot be loaded: ${error.message}.`);
  }
  let count = 0;
  for (const [key, bodies] of read) {
    const scan = scans.find((each) => each.key === key && each.slices.length);
    if (!scan) {
      carried.set(key, bodies);
      continue;
    }
    count++;
    const before = copy(scan.bodies), own = new Map(scan.original.map((body) => [body.name, body]));
    const loaded = Object.entries(bodies).map(([name, body]) => withOriginal(scan, own.get(name), {
      name,
      corners: body.corners_mm.map((point) => point && toScan(scan, point)),
      widthMm: body.width_mm === undefined ? null : body.width_mm,
      confidence: null,
      was: "",
    }));
    scan.bodies = loaded.sort((a, b) => centre(scan, a)[0] - centre(scan, b)[0]);
    record(scan, before);
  }
  chooseScan(state.scan);
  tell(`${file.name}: ${count} scans of this page loaded${carried.size ? `; ${carried.size} other scans are kept and saved again` : ""}.`);
}

// A loaded vertebra that is where the page's own is: that one, or a file of all scans would change them all.
function withOriginal(scan, original, loaded) {
  if (!original) return loaded;
  const near = (corner, other) => (corner === null) === (other === null) && (corner === null || corner.every((value, axis) => Math.abs(value - other[axis]) * scan.spacing[axis] < 0.001));
  const equal = loaded.widthMm === original.widthMm && original.corners.every((corner, place) => near(corner, loaded.corners[place]));
  return equal ? copy(original) : { ...loaded, was: original.name };
}

// The pointer -----------------------------------------------------------------------------------------------------------

function pointOf(event) { // (row, column) in mm
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(element("picture").getScreenCTM().inverse());
  return [point.y, point.x];
}

// The nearest corner under the pointer: where a disc is thin, the corners' grips overlap.
function nearest(scan, at) {
  let [best, least] = [null, gripRadius() / pixelsPerMm()];
  if (!element("drawn").checked) return best;
  scan.bodies.forEach((body, index) => body.corners.forEach((corner, which) => {
    const distance = corner ? Math.hypot(...minus(inMm(scan, corner), at)) : Infinity;
    if (distance < least) [best, least] = [[index, which], distance];
  }));
  return best;
}

// The body that a point is in, by how many of its edges are to the point's right.
function bodyAt(scan, [row, column]) {
  const found = scan.bodies.findIndex((body) => {
    const outline = body.corners.filter(Boolean).map((corner) => inMm(scan, corner));
    return outline.filter(([y, x], place) => {
      const [nextY, nextX] = outline[(place + 1) % outline.length];
      return (y > row) !== (nextY > row) && column < x + ((row - y) / (nextY - y)) * (nextX - x);
    }).length % 2;
  });
  return found < 0 || !element("drawn").checked ? null : found;
}

function onDown(event) {
  const scan = current(), picture = element("picture");
  if (event.button !== 0 || !scan.slices.length) return;
  const at = pointOf(event), near = nearest(scan, at), capture = () => picture.setPointerCapture(event.pointerId);
  if (state.placing) {
    state.drag = { kind: "cross" };
    capture();
    onMove(event);
  } else if (near) {
    picture.focus({ preventScroll: true });
    choose(...near);
    const corner = scan.bodies[state.body].corners[state.corner];
    state.drag = { kind: "corner", before: copy(scan.bodies), offset: minus(inMm(scan, corner), at), from: [event.clientX, event.clientY] };
    capture();
  } else {
    picture.focus({ preventScroll: true });
    choose(bodyAt(scan, at), null);
    if (!picture.classList.contains("zoomed")) return event.preventDefault();
    state.drag = { kind: "pan", at };
    capture();
  }
  event.preventDefault();
}

function onMove(event) {
  const scan = current(), drag = state.drag, at = pointOf(event);
  if (!drag) {
    const over = scan.slices.length && !state.placing && nearest(scan, at);
    return element("picture").classList.toggle("over", Boolean(over));
  }
  if (drag.kind === "pan") {
    const by = minus(drag.at, at);
    state.view = { ...state.view, x: state.view.x + by[1], y: state.view.y + by[0] };
  } else if (drag.kind === "cross") {
    state.placing.cursor = [0, 0];
    place(scan, state.placing.cursor, at[0] / scan.spacing[0], at[1] / scan.spacing[1]);
  } else {
    if (!drag.moved && Math.hypot(event.clientX - drag.from[0], event.clientY - drag.from[1]) < 3) return; // a click selects
    drag.moved = true;
    const corner = scan.bodies[state.body].corners[state.corner];
    place(scan, corner, (at[0] + drag.offset[0]) / scan.spacing[0] - corner[0], (at[1] + drag.offset[1]) / scan.spacing[1] - corner[1]);
  }
  draw();
}

function onUp(event) {
  const drag = state.drag;
  state.drag = null;
  if (!drag) return;
  if (event.type === "pointercancel") {
    if (drag.kind === "corner") current().bodies = drag.before;
    return refresh();
  }
  if (drag.kind === "cross") placeCorner();
  else if (drag.kind === "corner") commit(drag.before);
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
