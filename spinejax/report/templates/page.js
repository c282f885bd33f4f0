"use strict";
// The disc browser. Everything it shows is in the page: the facts as JSON, the pictures as text that is decoded when shown.

const [rows, columns, numSlices] = facts.window;
const state = { scan: 0, plane: 0, disc: 0, task: 0, slice: (numSlices - 1) / 2, shown: [] };

// The upper part of Matplotlib's inferno; its dark violets would only tint the bright slice below.
const palette = [[136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]];
const faintest = 0.12; // of a map's brightest; darker pixels are transparent

// Facts about one disc ------------------------------------------------------------------------------------------------

const gradeOf = (disc, task) => disc.p[task].indexOf(Math.max(...disc.p[task]));
const confidence = (disc, task) => Math.max(...disc.p[task]);
const isGraded = (disc, task) => disc.label[task] >= 0;
const differs = (disc, task) => isGraded(disc, task) && disc.label[task] !== gradeOf(disc, task);
// The distance in grades; among equals, the network's confidence.
const disagreement = (disc, task) =>
  isGraded(disc, task) ? Math.abs(disc.label[task] - gradeOf(disc, task)) + confidence(disc, task) : -1;
const places = new Map(facts.scans.map((scan, index) => [scan.id, index]));
const scanOf = (disc) => places.get(disc.scan);
const nameOf = (disc) => facts.scans[scanOf(disc)].name;

// Pictures: decoded once, and a few kept ------------------------------------------------------------------------------

const decoded = new Map();

async function sheet(kind, index) {
  const id = `${kind}-${index}`;
  if (!element(id)) return null;
  if (!decoded.has(id)) {
    const picture = new Image();
    picture.src = "data:image/webp;base64," + element(id).textContent.trim();
    if (decoded.size > 60) decoded.delete(decoded.keys().next().value);
    decoded.set(id, picture.decode().then(() => picture));
  }
  return decoded.get(id);
}

// One task's maps of a disc, painted: a canvas with the slices side by side, transparent where the map is dark.
function paint(maps, task) {
  const height = rows / facts.shrink, width = (columns / facts.shrink) * numSlices;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(maps, 0, task * height, width, height, 0, 0, width, height);
  const image = context.getImageData(0, 0, width, height);
  for (let place = 0; place < image.data.length; place += 4) {
    const value = image.data[place] / 255, at = value * (palette.length - 1);
    const below = palette[Math.floor(at)], above = palette[Math.ceil(at)];
    for (let channel = 0; channel < 3; channel++) {
      image.data[place + channel] = below[channel] + (above[channel] - below[channel]) * (at % 1);
    }
    image.data[place + 3] = 255 * Math.pow(Math.max(0, (value - faintest) / (1 - faintest)), 0.7);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// Drawing -------------------------------------------------------------------------------------------------------------

let latest = 0; // decoding takes time: only the latest choice is drawn

async function draw() {
  const mine = ++latest;
  const disc = facts.discs[state.disc];
  const [windows, maps] = await Promise.all([sheet("window", state.disc), sheet("maps", state.disc)]);
  if (mine !== latest) return;
  const overlay = maps && element("overlay").checked ? paint(maps, state.task) : null;
  const strip = element("strip").children;
  for (let slice = 0; slice < numSlices; slice++) {
    drawSlice(strip[slice].firstChild, windows, overlay, slice);
    const outside = slice < disc.slices[0] || slice >= disc.slices[1];
    strip[slice].disabled = outside;
    strip[slice].setAttribute("aria-pressed", String(slice === state.slice));
  }
  drawSlice(element("slice"), windows, overlay, state.slice);
  document.body.dataset.drawn = `${state.disc} ${state.task} ${state.slice} ${overlay ? element("opacity").value : "plain"}`;
}

function drawSlice(canvas, windows, overlay, slice) {
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.globalAlpha = 1;
  context.drawImage(windows, 0, slice * rows, columns, rows, 0, 0, canvas.width, canvas.height);
  if (!overlay) return;
  const width = columns / facts.shrink, height = rows / facts.shrink;
  context.globalAlpha = Number(element("opacity").value) / 100;
  context.drawImage(overlay, slice * width, 0, width, height, 0, 0, canvas.width, canvas.height);
}

// Text beside the picture --------------------------------------------------------------------------------------------

function describe() {
  const disc = facts.discs[state.disc], task = facts.tasks[state.task], given = gradeOf(disc, state.task);
  element("disc-name").replaceChildren(disc.level, span(nameOf(disc), "small"));
  element("task-name").textContent = task.title;
  describeSlice();
  element("scale").style.width = `${(100 * 10) / disc.pixelMm / columns}%`;
  const body = element("chances").tBodies[0];
  body.replaceChildren(...task.grades.map((grade, index) => {
    const line = document.createElement("tr");
    line.className = index === given ? "given" : "";
    const bar = span("", ""), track = span("", "track");
    bar.style.width = `${100 * disc.p[state.task][index]}%`;
    track.append(bar);
    const mark = index === disc.label[state.task] ? "rater" : "";
    line.append(cell(grade, "", "th"), cell(track), cell(`${percent(disc.p[state.task][index])} %`, "share"), cell(mark, "mark"));
    return line;
  }));
  const rater = isGraded(disc, state.task)
    ? `The rater gave ${task.grades[disc.label[state.task]]}.` : "The rater did not grade this disc.";
  const spread = disc.spread[state.task] > 0
    ? ` The views' probabilities for ${task.grades[given]} spread by ± ${(100 * disc.spread[state.task]).toFixed(1)} points.` : "";
  const refer = disc.refer[state.task] ? " This grade is referred to a rater." : "";
  const unusual = disc.unusual ? " The disc looks unlike those that the network learned from." : "";
  element("doubt").textContent = rater + spread + refer + unusual;
  const traced = disc.traced && task.grades[disc.traced[state.task]];
  element("traced").textContent = traced === null ? "" : `Hotspot: evidence for the score of ${task.title.toLowerCase()}, grade ${traced}. Not proven pathology.`;
  element("tasks").tBodies[0].replaceChildren(...facts.tasks.map((other, index) => {
    const line = document.createElement("tr"), button = document.createElement("button");
    button.type = "button";
    button.textContent = other.title;
    button.addEventListener("click", () => chooseTask(index));
    line.setAttribute("aria-current", String(index === state.task));
    const network = cell(other.grades[gradeOf(disc, index)]);
    network.append(" ", span(`${percent(confidence(disc, index))}\u00a0%`, "sure"));
    const label = isGraded(disc, index) ? other.grades[disc.label[index]] : "–";
    line.append(cell(button, "", "th"), network, cell(label, differs(disc, index) ? "other" : ""));
    return line;
  }));
}

function describeSlice() {
  const disc = facts.discs[state.disc], task = facts.tasks[state.task];
  const mm = (state.slice - (numSlices - 1) / 2) * disc.sliceMm;
  const side = mm === 0 ? "middle" : `${Math.abs(mm).toFixed(0)} mm to the ${mm < 0 ? "right" : "left"}`;
  element("number").value = String(state.slice + 1);
  element("number").setAttribute("aria-valuetext", `slice ${state.slice + 1} of ${numSlices}, ${side}`);
  element("where").textContent = `slice ${state.slice + 1} of ${numSlices}, ${side}`;
  element("slice").setAttribute("aria-label", `${disc.level}, slice ${state.slice + 1} of ${numSlices}, ${side}. ${task.title}: ${task.grades[gradeOf(disc, state.task)]}`);
}

// The list ------------------------------------------------------------------------------------------------------------

function passes(disc) {
  const { scan, level, grade, rater } = Object.fromEntries(
    ["scan", "level", "grade", "rater"].map((id) => [id, element(id).value]));
  return (!scan || disc.scan === scan) && (!level || disc.level === level) &&
    (!grade || gradeOf(disc, state.task) === Number(grade)) &&
    (!rater || (rater === "none" ? !isGraded(disc, state.task)
      : isGraded(disc, state.task) && differs(disc, state.task) === (rater === "differs")));
}

const orders = {
  scan: () => 0,
  confidence: (disc) => confidence(disc, state.task),
  disagreement: (disc) => -disagreement(disc, state.task),
  spread: (disc) => -disc.spread[state.task],
};

function list() {
  const order = orders[element("sort").value];
  state.shown = facts.discs.map((_, index) => index).filter((index) => passes(facts.discs[index]));
  state.shown.sort((a, b) => order(facts.discs[a]) - order(facts.discs[b]) || a - b);
  element("count").textContent = state.shown.length === facts.discs.length
    ? `${facts.discs.length} discs` : `${state.shown.length} of ${facts.discs.length} discs`;
  const grades = facts.tasks[state.task].grades;
  element("list").replaceChildren(...state.shown.map((index) => {
    const disc = facts.discs[index], line = document.createElement("div");
    line.className = "disc";
    line.id = `disc-${index}`;
    line.setAttribute("role", "option");
    const given = span(grades[gradeOf(disc, state.task)], "given");
    given.append(" ", span(`${percent(confidence(disc, state.task))} %`, "sure"));
    if (differs(disc, state.task)) given.append(" ", span(`rater ${grades[disc.label[state.task]]}`, "other"));
    line.append(span(disc.level, ""), span(nameOf(disc), "who"), given);
    line.addEventListener("click", () => chooseDisc(index));
    return line;
  }));
  if (!state.shown.includes(state.disc) && state.shown.length) chooseDisc(state.shown[0]);
  else select();
}

function select() {
  for (const line of element("list").children) {
    const chosen = line.id === `disc-${state.disc}`;
    line.setAttribute("aria-selected", String(chosen));
    if (chosen) {
      element("list").setAttribute("aria-activedescendant", line.id);
      const list = element("list"), above = line.offsetTop - list.offsetTop;
      if (above < list.scrollTop || above + line.offsetHeight > list.scrollTop + list.clientHeight) {
        list.scrollTop = above - (list.clientHeight - line.offsetHeight) / 2;
      }
    }
  }
}

// Choosing ------------------------------------------------------------------------------------------------------------

function chooseDisc(index) {
  state.disc = index;
  follow.level = facts.discs[index].level;
  const [first, stop] = facts.discs[index].slices;
  state.slice = Math.min(Math.max(state.slice, first), stop - 1);
  select();
  describe();
  draw();
  const scan = scanOf(facts.discs[index]);
  if (scan !== state.scan) chooseScan(scan);
  else describeSpine();
}

function chooseTask(index) {
  state.task = index;
  element("task").value = String(index);
  element("grade").replaceChildren(element("grade").options[0],
    ...facts.tasks[index].grades.map((grade, place) => new Option(grade, String(place))));
  element("grade").value = "";
  list();
  describe();
  draw();
  describeSpine();
  drawSpine();
}

function chooseSlice(slice) {
  const [first, stop] = facts.discs[state.disc].slices;
  state.slice = Math.min(Math.max(slice, first), stop - 1);
  describeSlice();
  draw();
}

function step(by) {
  const at = state.shown.indexOf(state.disc);
  const next = state.shown[Math.min(Math.max(at + by, 0), state.shown.length - 1)];
  if (next !== undefined) chooseDisc(next);
}

// Keys and controls ---------------------------------------------------------------------------------------------------

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const at = event.target, inControl = at.matches("select, input");
  const inSpine = Boolean(at.closest("#spine"));
  const onDiscs = at === element("list") || at === element("picture"), onPlane = at === element("plane");
  const turn = (by) => (inSpine ? choosePlane(state.plane + by) : chooseSlice(state.slice + by));
  const keys = {
    ArrowLeft: () => !inControl && turn(-1),
    ArrowRight: () => !inControl && turn(1),
    ArrowUp: () => (onDiscs ? step(-1) : onPlane && stepInSpine(-1)),
    ArrowDown: () => (onDiscs ? step(1) : onPlane && stepInSpine(1)),
    Enter: () => onPlane && openDisc(state.disc),
    Home: () => at === element("list") && step(-facts.discs.length),
    End: () => at === element("list") && step(facts.discs.length),
    n: () => !at.matches("select") && step(1),
    p: () => !at.matches("select") && step(-1),
    t: () => !at.matches("select") && chooseTask((state.task + 1) % facts.tasks.length),
    o: () => !at.matches("select") && element("overlay") && element(inSpine ? "spine-overlay" : "overlay").click(),
  };
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  // Other keys keep the browser's own action: scrolling, moving a slider.
  if (act && act() !== false && act !== null) event.preventDefault();
}

function start() {
  element("task").append(...facts.tasks.map((task, index) => new Option(task.title, String(index))));
  for (const scan of facts.scans) element("scan").append(new Option(scan.name, scan.id));
  for (const level of facts.levels) element("level").append(new Option(level, level));
  for (let slice = 0; slice < numSlices; slice++) {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    button.type = "button";
    button.tabIndex = -1; // the slider beside does the same from the keyboard
    button.setAttribute("aria-label", `Slice ${slice + 1}`);
    canvas.width = columns;
    canvas.height = rows;
    button.append(canvas);
    button.addEventListener("click", () => chooseSlice(slice));
    element("strip").append(button);
  }
  element("number").max = String(numSlices);
  element("filters").addEventListener("submit", (event) => event.preventDefault());
  element("task").addEventListener("change", (event) => chooseTask(Number(event.target.value)));
  for (const id of ["scan", "level", "grade", "rater", "sort"]) element(id).addEventListener("change", list);
  element("number").addEventListener("input", (event) => chooseSlice(Number(event.target.value) - 1));
  element("previous").addEventListener("click", () => step(-1));
  element("next").addEventListener("click", () => step(1));
  if (element("overlay")) {
    element("overlay").addEventListener("change", draw);
    element("opacity").addEventListener("input", draw);
  }
  document.addEventListener("keydown", onKey);
  startSpine();
  chooseTask(0);
}

start();
