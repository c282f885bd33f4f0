// The picture: what is drawn on it, zoom, corners placed and dragged.

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

// Placing corners by clicks, or with arrows and Enter -----------------------------------------------------------------

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

// The pointer ---------------------------------------------------------------------------------------------------------

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
