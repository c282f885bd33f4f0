"use strict";
// The view of a whole spine: the scan's slices with the discs' boxes, bodies and hotspots, and the grades of all levels.
// `page.js` follows, and has what both share: the facts, the state, and the pictures.

const closeCall = 0.2; // a grade is doubtful if the next one is less behind it

// The most probable of a disc's other grades, by its place in the task's grades.
function rival(disc, task) {
  const others = disc.p[task].map((share, index) => (index === gradeOf(disc, task) ? -1 : share));
  return others.indexOf(Math.max(...others));
}

// A rare grade may be given before it is the most probable one.
const isRare = (disc, task) => disc.p[task][rival(disc, task)] > confidence(disc, task);

function isDoubtful(disc, task) {
  return disc.lead[task] < closeCall;
}

// A cell of a table: what the network gives a disc for a task, and how probable that is.
function gradeCell(disc, task, name = "") {
  const made = cell(span(facts.tasks[task].grades[gradeOf(disc, task)], "grade"), name);
  made.append(" ", span(`${percent(confidence(disc, task))}\u00a0%`, "sure"));
  made.classList.toggle("rare", isRare(disc, task));
  return made;
}

const currentScan = () => facts.scans[state.scan];

// The picture ---------------------------------------------------------------------------------------------------------

const painted = new Map(), mostPainted = 200; // slices of maps, of 25 kB each, of the patient's discs and tasks
let latestSpine = 0;

async function drawSpine() {
  const scan = currentScan(), picture = scan.picture;
  if (!picture) {
    document.body.dataset.spine = `${state.scan} ${state.task} none`;
    return;
  }
  const mine = ++latestSpine, task = state.task;
  const wanted = element("spine-overlay") && element("spine-overlay").checked ? scan.discs : [];
  const [plane, ...maps] = await Promise.all([
    sheet("scan", [state.scan, state.plane]), ...wanted.map((index) => sheet("maps", index))]);
  if (mine !== latestSpine) return;
  const canvas = element("plane-picture"), context = canvas.getContext("2d");
  const [rows, columns] = picture.shape;
  context.setTransform(canvas.width / columns, 0, 0, canvas.height / rows, 0, 0);
  context.imageSmoothingQuality = "high";
  context.globalAlpha = 1;
  if (plane) context.drawImage(plane, 0, 0, columns, rows);
  else context.clearRect(0, 0, columns, rows);
  context.globalAlpha = Number(element("spine-opacity")?.value ?? 0) / 100;
  wanted.forEach((index, place) => maps[place] && drawHotspot(context, index, maps[place], task, state.plane));
  document.body.dataset.spine = `${state.scan} ${task} ${state.plane} ${wanted.length ? element("spine-opacity").value : "plain"}`;
}

function clearPainted() {
  for (const canvas of painted.values()) canvas.width = 0; // otherwise its memory waits for the garbage collector
  painted.clear();
}

function paintedMap(index, maps, task, slice) {
  const id = `${index} ${task} ${slice}`;
  if (!painted.has(id)) {
    if (painted.size >= mostPainted) clearPainted();
    painted.set(id, paint(maps, task, slice));
  }
  return painted.get(id);
}

// One disc's hotspot, turned and scaled to where the disc lies in the scan.
function drawHotspot(context, index, maps, task, plane) {
  const { plane: [a, b, c, d, e, f], slot } = facts.discs[index].at;
  const at = Math.round(slot[0] * plane + slot[1]);
  if (at < 0 || at >= numSlices) return;
  context.save();
  context.transform(a, b, c, d, e + 0.5, f + 0.5); // coordinates are those of pixel centres
  context.drawImage(paintedMap(index, maps, task, at), -0.5, -0.5, columns, rows);
  context.restore();
}

const inPicture = (disc, x, y) => {
  const [a, b, c, d, e, f] = disc.at.plane;
  return [a * x + c * y + e, b * x + d * y + f];
};

function shape(name, points, className) {
  const made = document.createElementNS(element("plane-lines").namespaceURI, name);
  made.setAttribute("points", points.map((point) => point.map((value) => value.toFixed(2)).join(",")).join(" "));
  made.setAttribute("class", className);
  return made;
}

// What is drawn over the picture as lines and words: bodies, the discs' boxes, levels and grades.
function labelSpine() {
  const scan = currentScan(), picture = scan.picture;
  if (!picture) return;
  const shownHere = ([first, stop]) => state.plane >= first && state.plane < stop;
  const bodies = picture.bodies.filter((body) => shownHere(body.slices)).map((body) => {
    const known = body.corners.filter(Boolean).map(([row, column]) => [column, row]);
    const unsure = body.confidence !== null && body.confidence < 0.5;
    return shape(known.length === 4 ? "polygon" : "polyline", known, unsure ? "body unsure" : "body");
  });
  const boxes = scan.discs.map((index) => {
    const disc = facts.discs[index], [top, bottom, left, right] = disc.at.box;
    const corners = [[left, top], [right, top], [right, bottom], [left, bottom]].map(([x, y]) => inPicture(disc, x, y));
    const at = Math.round(disc.at.slot[0] * state.plane + disc.at.slot[1]);
    const outside = at < disc.slices[0] || at >= disc.slices[1];
    const box = shape("polygon", corners, ["box", isDoubtful(disc, state.task) && "unsure", outside && "outside", index === state.disc && "chosen"].filter(Boolean).join(" "));
    box.style.stroke = severity(gradeOf(disc, state.task), state.task);
    box.addEventListener("click", () => openDisc(index));
    return box;
  });
  element("plane-lines").replaceChildren(...bodies, ...boxes);
  element("plane-levels").replaceChildren(...scan.discs.map((index) => {
    const disc = facts.discs[index], task = facts.tasks[state.task], grade = gradeOf(disc, state.task);
    const [x, y] = inPicture(disc, disc.at.box[2], (rows - 1) / 2);
    const button = document.createElement("button"), chip = span(task.grades[grade], "chip");
    button.type = "button";
    button.className = "level";
    chip.style.backgroundColor = severity(grade, state.task);
    button.append(disc.level, " ", chip);
    const doubt = isDoubtful(disc, state.task) ? ", a close call" : "";
    // It begins with what is seen, so that spoken commands find it.
    button.setAttribute("aria-label", `${disc.level} ${task.grades[grade]}: ${task.title}, ${percent(confidence(disc, state.task))} %${doubt}. Open this disc.`);
    button.style.left = `${(100 * (x + 0.5)) / picture.shape[1]}%`;
    button.style.top = `${(100 * (y + 0.5)) / picture.shape[0]}%`;
    button.addEventListener("click", () => openDisc(index));
    return button;
  }));
}

function describePlane() {
  const picture = currentScan().picture;
  if (!picture) return;
  const mm = (state.plane - picture.middle) * picture.sliceMm;
  const side = Math.abs(mm) < 0.5 ? "middle" : `${Math.abs(mm).toFixed(0)} mm to the ${mm < 0 ? "right" : "left"}`;
  const said = `slice ${state.plane + 1} of ${picture.slices}, ${side}`;
  element("plane-number").value = String(state.plane + 1);
  element("plane-number").setAttribute("aria-valuetext", said);
  element("plane-where").textContent = said;
  element("plane-picture").setAttribute("aria-label", `${currentScan().name}, ${said}`);
}

// The grades of all levels --------------------------------------------------------------------------------------------

function listLevels() {
  const scan = currentScan(), head = element("levels").tHead.rows[0], body = element("levels").tBodies[0];
  head.replaceChildren(head.cells[0], ...facts.tasks.map((task, index) => {
    const made = document.createElement("th"), button = document.createElement("button");
    made.scope = "col";
    made.setAttribute("aria-current", String(index === state.task));
    button.type = "button";
    button.textContent = task.title;
    button.addEventListener("click", () => chooseTask(index));
    made.append(button);
    return made;
  }));
  body.replaceChildren(...scan.discs.map((index) => {
    const disc = facts.discs[index], line = document.createElement("tr"), button = document.createElement("button");
    line.setAttribute("aria-current", String(index === state.disc));
    button.type = "button";
    button.textContent = disc.level;
    button.addEventListener("click", () => openDisc(index));
    line.append(cell(button, "", "th"), ...facts.tasks.map((task, place) => {
      const made = gradeCell(disc, place, place === state.task ? "current" : "");
      made.style.setProperty("--severity", severity(gradeOf(disc, place), place));
      if (isDoubtful(disc, place)) {
        made.lastChild.append("\u00a0?");
        made.title = "A close call: the next grade is less than 20 points behind.";
      }
      if (isGraded(disc, place)) made.append(span(`rater ${task.grades[disc.label[place]]}`, differs(disc, place) ? "other" : "same"));
      made.addEventListener("click", () => { chooseTask(place); openDisc(index); });
      return made;
    }));
    return line;
  }));
  element("scale-title").textContent = `${facts.tasks[state.task].title}, from mild to severe`;
  element("scale-of-grades").replaceChildren(...facts.tasks[state.task].grades.map((grade, index) => {
    const chip = span(grade, "chip");
    chip.style.backgroundColor = severity(index, state.task);
    return chip;
  }));
}

// A grade with its probability, its rival where the call is close, and the rater's grade.
function inWords(disc, task) {
  const { grades, title } = facts.tasks[task], grade = gradeOf(disc, task), said = [`${percent(confidence(disc, task))} %`];
  if (isRare(disc, task) || isDoubtful(disc, task)) {
    const other = rival(disc, task), words = isRare(disc, task) ? "more probable" : "close";
    said.push(`${words}: ${grades[other]}, ${percent(disc.p[task][other])} %`);
  }
  if (disc.refer[task]) said.push("referred to a rater");
  if (isGraded(disc, task)) said.push(`rater ${grades[disc.label[task]]}`);
  return `${title} ${grades[grade]} (${said.join("; ")})`;
}

function asText(scan) {
  const doubt = scan.picture?.doubtfulLevels ? ["The levels are doubtful: all names may be off by one."] : [];
  const lines = scan.discs.map((index) => {
    const disc = facts.discs[index];
    const unusual = disc.unusual ? " (looks unlike the discs that the network learned from)" : "";
    return `${disc.level}${unusual}: ${facts.tasks.map((_, task) => inWords(disc, task)).join(", ")}.`;
  });
  return [`${scan.name} (${scan.id})`, ...doubt, ...lines, facts.researchOnly].join("\n") + "\n";
}

function asCsv(discs) {
  const header = ["patient", "scan", "name", "level", ...facts.tasks.flatMap(({ name }) => [name, `${name}_probability`, `${name}_rater`])];
  const names = new Map(facts.scans.map((scan) => [scan.id, scan.name]));
  const lines = discs.map((disc) => [disc.patient, disc.scan, names.get(disc.scan), disc.level, ...facts.tasks.flatMap(({ grades }, task) => [
    grades[gradeOf(disc, task)], confidence(disc, task), isGraded(disc, task) ? grades[disc.label[task]] : ""])]);
  return csvTable([header, ...lines]);
}

async function copyText(text, what, where = "copied") {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no permission, or an old browser
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  element(where).textContent = done ? `${what} copied.` : "The browser did not allow copying.";
}

// Choosing ------------------------------------------------------------------------------------------------------------

function describeSpine() {
  const scan = currentScan();
  element("spine-name").textContent = scan.name;
  element("spine-id").textContent = `patient ${scan.patient}, scan ${scan.id}`;
  element("spine-id").hidden = !element("pseudonyms").checked;
  element("spine-scan").value = String(state.scan);
  element("spine-task").value = String(state.task);
  element("no-picture").hidden = Boolean(scan.picture);
  element("spine-view").classList.toggle("discs-only", !scan.picture);
  element("doubtful-levels").hidden = !scan.picture?.doubtfulLevels;
  listLevels();
  labelSpine();
  describePlane();
  describeFollow();
}

function chooseScan(index) {
  state.scan = index;
  clearPainted();
  const picture = currentScan().picture;
  if (picture) {
    const [rowMm, columnMm] = picture.pixelMm, [rows, columns] = picture.shape, mm = Math.min(rowMm, columnMm);
    const canvas = element("plane-picture"), lines = element("plane-lines");
    canvas.width = Math.round((columns * columnMm) / mm);
    canvas.height = Math.round((rows * rowMm) / mm);
    lines.setAttribute("viewBox", `-0.5 -0.5 ${columns} ${rows}`);
    element("plane").style.setProperty("--ratio", String((columns * columnMm) / (rows * rowMm)));
    element("plane-number").max = String(picture.slices);
    element("plane-number").parentElement.hidden = element("plane-where").hidden = picture.slices === 1;
    state.plane = picture.middle;
  }
  if (!currentScan().discs.includes(state.disc)) chooseDisc(currentScan().discs[0]);
  describeSpine();
  drawSpine();
}

function choosePlane(plane) {
  const picture = currentScan().picture;
  if (!picture) return;
  showPlane(Math.min(Math.max(plane, 0), picture.slices - 1));
  if (follow.scans.length > 1) followPlane();
}

function showPlane(plane) {
  state.plane = plane;
  labelSpine();
  describePlane();
  drawSpine();
}

// The disc browser at a disc.
function openDisc(index) {
  chooseDisc(index);
  element("discs").scrollIntoView();
  element("picture").focus({ preventScroll: true });
}

function stepInSpine(by) {
  const levels = currentScan().discs, at = levels.indexOf(state.disc);
  chooseDisc(levels[Math.min(Math.max(at + by, 0), levels.length - 1)]);
}

function startSpine() {
  element("spine-scan").append(...facts.scans.map((scan, index) => new Option(scan.name, String(index))));
  element("spine-task").append(...facts.tasks.map((task, index) => new Option(task.title, String(index))));
  element("spine-scan").addEventListener("change", (event) => chooseScan(Number(event.target.value)));
  element("spine-task").addEventListener("change", (event) => chooseTask(Number(event.target.value)));
  element("pseudonyms").addEventListener("change", describeSpine);
  element("plane-number").addEventListener("input", (event) => choosePlane(Number(event.target.value) - 1));
  element("lines").addEventListener("change", () => element("plane").classList.toggle("bare", !element("lines").checked));
  element("spine-overlay")?.addEventListener("change", drawSpine);
  element("spine-opacity")?.addEventListener("input", drawSpine);
  element("copy-text").addEventListener("click", () => copyText(asText(currentScan()), "Text"));
  element("copy-csv").addEventListener("click", () => copyText(asCsv(currentScan().discs.map((index) => facts.discs[index])), "Table"));
  element("print").addEventListener("click", () => printScans([state.scan]));
  element("print-all")?.addEventListener("click", () => {
    const all = facts.scans.map((_, index) => index), from = all.length > printedAtOnce ? state.scan : 0;
    printScans(all.slice(from, from + printedAtOnce));
  });
  startFollow();
  chooseScan(0);
}

const printedAtOnce = 60; // each is a picture in memory until the browser has printed it

// One sheet a scan: what is on the screen, copied without its controls.
async function printScans(scans) {
  const before = state.scan, disc = state.disc;
  for (const index of scans) {
    chooseScan(index);
    await drawSpine();
    const sheet = element("spine").cloneNode(true), canvas = sheet.querySelector("canvas");
    canvas.getContext("2d").drawImage(element("plane-picture"), 0, 0);
    for (const each of [sheet, ...sheet.querySelectorAll("[id]")]) each.removeAttribute("id");
    sheet.classList.add("sheet");
    element("sheets").append(sheet);
  }
  chooseScan(before);
  chooseDisc(disc);
  window.print();
  element("sheets").replaceChildren();
}
