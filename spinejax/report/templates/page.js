"use strict";
// The disc browser. The facts are in the page as JSON. The pictures are text that is decoded when shown: in the page, too,
// or, of a large set, in scripts beside it, because a page that was opened from the disk may load nothing else.

const [rows, columns, numSlices] = facts.window;
const state = { scan: 0, plane: 0, disc: 0, task: 0, slice: (numSlices - 1) / 2, shown: [], from: 0 };

// The upper part of Matplotlib's inferno; its dark violets would only tint the bright slice below.
const palette = [[136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]];
const faintest = 0.12; // of a map's brightest; darker pixels are transparent

// Facts about one disc ------------------------------------------------------------------------------------------------

const gradeOf = (disc, task) => disc.grade[task];
const confidence = (disc, task) => disc.p[task][disc.grade[task]];
const isGraded = (disc, task) => disc.label[task] >= 0;
const differs = (disc, task) => isGraded(disc, task) && disc.label[task] !== gradeOf(disc, task);
// The distance in grades; among equals, the network's confidence.
const disagreement = (disc, task) =>
  isGraded(disc, task) ? Math.abs(disc.label[task] - gradeOf(disc, task)) + confidence(disc, task) : -1;
const places = new Map(facts.scans.map((scan, index) => [scan.id, index]));
const scanOf = (disc) => places.get(disc.scan);
const nameOf = (disc) => facts.scans[scanOf(disc)].name;

// Pictures: decoded once, and the last few kept -----------------------------------------------------------------------

const decoded = new Map(); // by id, the longest unused first
const mostDecoded = () => 12 * Math.max(1, follow.scans.length) + 2; // what is drawn at once: a slice, and each disc's maps

async function sheet(kind, index) {
  const id = `${kind}-${index.at ? index.join("-") : index}`, disc = index.at ? facts.scans[index[0]].discs[0] : index;
  const picture = decoded.get(id) ?? textOf(id, facts.discs[disc].chunk).then((text) => text && decode(text));
  decoded.delete(id);
  decoded.set(id, picture);
  while (decoded.size > mostDecoded()) {
    const [oldest, unused] = decoded.entries().next().value;
    decoded.delete(oldest);
    unused.then((bitmap) => bitmap?.close()); // otherwise its memory waits for the garbage collector
  }
  return picture;
}

function decode(text) {
  const letters = atob(text.trim()), bytes = new Uint8Array(letters.length);
  for (let place = 0; place < letters.length; place++) bytes[place] = letters.charCodeAt(place);
  return createImageBitmap(new Blob([bytes], { type: "image/webp" }));
}

const chunks = new Map(), mostChunks = 6; // number → pictures by id, the last few that were asked for
const keepers = new Map(); // what waits for a chunk

async function textOf(id, number) {
  if (number === null) return element(id)?.textContent;
  if (!chunks.has(number)) {
    if (chunks.size >= mostChunks) chunks.delete(chunks.keys().next().value);
    chunks.set(number, loadChunk(number));
  }
  return (await chunks.get(number))[id];
}

function loadChunk(number) {
  return new Promise((resolve) => {
    const script = document.createElement("script"), name = `discs-${String(number + 1).padStart(4, "0")}.js`;
    const end = (pictures, fault) => {
      script.remove();
      keepers.delete(number);
      if (fault) {
        element("missing").textContent = `${name} ${fault}: its discs are shown without pictures. Keep the page and the files beside it together.`;
        element("missing").hidden = false;
      }
      resolve(pictures);
    };
    keepers.set(number, end);
    script.src = name;
    script.addEventListener("error", () => end({}, "is missing"));
    script.addEventListener("load", () => keepers.has(number) && end({}, "is damaged"));
    document.head.append(script);
  });
}

// Called by the chunks themselves.
function keepChunk(identity, number, pictures) {
  if (identity === facts.identity) keepers.get(number)?.(pictures);
  else keepers.get(number)?.({}, "is of another report");
}

// A slice of one task's map of a disc, painted: a canvas, transparent where the map is dark. Each slice on its own, because
// the whole spine shows one of nine.
function paint(maps, task, slice) {
  const height = rows / facts.shrink, width = columns / facts.shrink;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(maps, slice * width, task * height, width, height, 0, 0, width, height);
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
  const overlay = maps && element("overlay").checked ? (slice) => paintedMap(state.disc, maps, state.task, slice) : null;
  const strip = element("strip").children;
  element("strip").hidden = disc.slices[1] - disc.slices[0] === 1;
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
  if (!windows) return context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(windows, 0, slice * rows, columns, rows, 0, 0, canvas.width, canvas.height);
  if (!overlay) return;
  context.globalAlpha = Number(element("opacity").value) / 100;
  context.drawImage(overlay(slice), 0, 0, canvas.width, canvas.height);
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
    ? ` Over the views the network's probability spreads by ± ${(100 * disc.spread[state.task]).toFixed(1)} points.` : "";
  const refer = disc.refer[state.task] ? " This grade is referred to a rater." : "";
  const unusual = disc.unusual ? " The disc looks unlike those that the network learned from." : "";
  element("doubt").textContent = rater + spread + refer + unusual;
  const traced = disc.traced && task.grades[disc.traced[state.task]];
  element("traced").textContent = traced === null ? "" : `Hotspot: evidence for the score of ${task.title}, grade ${traced}. Not proven pathology.`;
  element("tasks").tBodies[0].replaceChildren(...facts.tasks.map((other, index) => {
    const line = document.createElement("tr"), button = document.createElement("button");
    button.type = "button";
    button.textContent = other.title;
    button.addEventListener("click", () => chooseTask(index));
    line.setAttribute("aria-current", String(index === state.task));
    const label = isGraded(disc, index) ? other.grades[disc.label[index]] : "–";
    line.append(cell(button, "", "th"), gradeCell(disc, index), cell(label, differs(disc, index) ? "other" : ""));
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

const choices = ["search", "scan", "level", "grade", "rater", "sure", "sort"];

function passes(disc, { scan, level, grade, rater, sure, words }) {
  return (!scan || disc.scan === scan) && (!level || disc.level === level) &&
    (!grade || gradeOf(disc, state.task) === Number(grade)) &&
    (!sure || confidence(disc, state.task) < Number(sure)) &&
    (!words.length || words.every((word) => wordsOf(disc).includes(word))) &&
    (!rater || (rater === "none" ? !isGraded(disc, state.task)
      : isGraded(disc, state.task) && differs(disc, state.task) === (rater === "differs")));
}

// Name, pseudonyms and level, each word behind a space.
const wordsOf = (disc) => ` ${nameOf(disc)} ${disc.patient} ${disc.scan} ${disc.level}`.toLowerCase();

const orders = {
  scan: () => 0,
  confidence: (disc) => confidence(disc, state.task),
  disagreement: (disc) => -disagreement(disc, state.task),
  spread: (disc) => -disc.spread[state.task],
};

function list() {
  const chosen = Object.fromEntries(choices.map((id) => [id, element(id).value])), order = orders[chosen.sort];
  chosen.words = chosen.search.toLowerCase().split(/\s+/).filter(Boolean).map((word) => ` ${word}`);
  state.shown = facts.discs.map((_, index) => index).filter((index) => passes(facts.discs[index], chosen));
  const keys = facts.discs.map(order);
  state.shown.sort((a, b) => keys[a] - keys[b] || a - b);
  state.from = 0;
  element("count").textContent = state.shown.length === facts.discs.length
    ? `${facts.discs.length} discs` : `${state.shown.length} of ${facts.discs.length} discs`;
  listPart();
  showTable();
  if (!state.shown.includes(state.disc) && state.shown.length) chooseDisc(state.shown[0]);
  else select();
}

const listed = 300; // more at a time are slow to draw

// The part of the list from `state.from` on.
function listPart() {
  const grades = facts.tasks[state.task].grades, stop = Math.min(state.from + listed, state.shown.length);
  element("list-turn").hidden = state.shown.length <= listed;
  element("list-range").textContent = `${state.from + 1} to ${stop}`;
  element("list-earlier").disabled = state.from === 0;
  element("list-later").disabled = stop === state.shown.length;
  element("list").replaceChildren(...state.shown.slice(state.from, stop).map((index) => {
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
}

function turnList(by) {
  state.from += by * listed;
  listPart();
  chooseDisc(state.shown[state.from]);
}

function select() {
  const at = state.shown.indexOf(state.disc);
  if (at >= 0 && Math.floor(at / listed) * listed !== state.from) {
    state.from = Math.floor(at / listed) * listed;
    listPart();
  }
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

// The same discs as a table, with all tasks; made when it is opened.
const tablePart = pagedTable("table", (index) => {
  const disc = facts.discs[index], line = document.createElement("tr"), button = document.createElement("button");
  button.type = "button";
  button.textContent = nameOf(disc);
  button.addEventListener("click", () => openDisc(index));
  line.append(cell(button, "", "th"), cell(disc.level), ...facts.tasks.map((task, place) => {
    const made = gradeCell(disc, place);
    if (differs(disc, place)) made.append(" ", span(`rater ${task.grades[disc.label[place]]}`, "other"));
    return made;
  }));
  return line;
}, { perPage: 50 });

const showTable = () => element("as-table").open && tablePart(state.shown);

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
  if (event.target.matches("input[type=search]")) return;
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
  for (const id of choices) element(id).addEventListener(id === "search" ? "input" : "change", list);
  element("list-earlier").addEventListener("click", () => turnList(-1));
  element("list-later").addEventListener("click", () => turnList(1));
  element("as-table").addEventListener("toggle", showTable);
  element("save").addEventListener("click", () => saveFile("discs.csv", asCsv(state.shown.map((index) => facts.discs[index]))));
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
