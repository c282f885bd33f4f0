"use strict";
// Several scans of one patient side by side: at one scale, aligned at a level, on slices equally far from its middle.

const follow = { scans: [], level: "", mm: 0, stepMm: 1, near: false };
const marginMm = 24, reachMm = 58; // above and below the discs, and to either side of the aligned one

const scansOf = (patient) => facts.scans.map((_, index) => index).filter((index) => facts.scans[index].patient === patient)
  .sort((a, b) => (facts.scans[a].examination ?? 0) - (facts.scans[b].examination ?? 0) || a - b);
const discAt = (scan, level) => facts.scans[scan].discs.find((index) => facts.discs[index].level === level);

// The disc that a scan is aligned at: that of the level, or else the nearest.
function anchorOf(scan) {
  const far = (index) => Math.abs(facts.levels.indexOf(facts.discs[index].level) - facts.levels.indexOf(follow.level));
  return facts.scans[scan].discs.reduce((best, index) => (far(index) < far(best) ? index : best));
}

function describeScan(scan) {
  const { name, contrast, examination, days } = facts.scans[scan];
  const when = days === null ? "" : days === 0 ? ", first examination" : `, ${days.toLocaleString("en")} day${days === 1 ? "" : "s"} later`;
  return `${name.replace(/^.*, scan/, "Scan")}${examination === null ? "" : when}${contrast ? `, ${contrast.toUpperCase()}` : ""}`;
}

// What happened to a grade between the first scan that has the disc and the last: 1, -1, or 0; and whether it is doubtful.
function historyOf(level, task) {
  const discs = follow.scans.map((scan) => discAt(scan, level));
  const grades = discs.map((index) => (index === undefined ? null : gradeOf(facts.discs[index], task)));
  const known = grades.filter((grade) => grade !== null);
  return {
    grades, changed: new Set(known).size > 1, change: known.length ? Math.sign(known.at(-1) - known[0]) : 0,
    doubtful: discs.some((index) => index !== undefined && isDoubtful(facts.discs[index], task)),
    words: grades.map((grade) => (grade === null ? "–" : facts.tasks[task].grades[grade])).join(" → "),
  };
}

const markOf = ({ changed, change, doubtful }) =>
  (changed ? (change > 0 ? "▲" : change < 0 ? "▼" : "↕") + (doubtful ? "\u00a0?" : "") : "");

// The pictures --------------------------------------------------------------------------------------------------------

// Where discs lie in mm of the scan's picture, from its upper left.
function placeMm(scan, index) {
  const [rowMm, columnMm] = facts.scans[scan].picture.pixelMm, [x, y] = inPicture(facts.discs[index], (columns - 1) / 2, (rows - 1) / 2);
  return [x * columnMm, y * rowMm];
}

// What all scans show of themselves: as much above and below the aligned disc as the one that needs most.
function frameOf(scans) {
  const above = [], below = [];
  for (const scan of scans) {
    const middle = placeMm(scan, anchorOf(scan))[1];
    const heights = facts.scans[scan].discs.map((index) => placeMm(scan, index)[1] - middle);
    above.push(-Math.min(...heights));
    below.push(Math.max(...heights));
  }
  return { above: Math.max(...above) + marginMm, below: Math.max(...below) + marginMm, across: 2 * reachMm };
}

// The slice of a scan that lies `follow.mm` from the middle of its aligned disc; null beyond the scan.
function planeOf(scan) {
  const { slot } = facts.discs[anchorOf(scan)].at, { sliceMm, slices } = facts.scans[scan].picture;
  const plane = Math.round(((numSlices - 1) / 2 - slot[1]) / slot[0] + follow.mm / sliceMm);
  return plane >= 0 && plane < slices ? plane : null;
}

let latestFollow = 0;

async function drawFollow() {
  const mine = ++latestFollow, task = state.task;
  const figures = [...element("follow-planes").children], pictured = follow.scans.filter((scan) => facts.scans[scan].picture);
  const overlay = element("follow-overlay")?.checked;
  if (element("follow").hidden || !follow.near) return; // the other scans of a large set are not loaded unseen
  const sheets = await Promise.all(pictured.map((scan) => Promise.all([
    planeOf(scan) === null ? null : sheet("scan", [scan, planeOf(scan)]),
    ...facts.scans[scan].discs.map((index) => (overlay ? sheet("maps", index) : null))])));
  if (mine !== latestFollow) return;
  const frame = frameOf(pictured);
  element("follow-planes").style.setProperty("--ratio", String(frame.across / (frame.above + frame.below)));
  pictured.forEach((scan, place) => {
    const [plane, ...maps] = sheets[place];
    drawScanOf(figures[follow.scans.indexOf(scan)].querySelector("canvas"), scan, frame, plane, maps, task);
  });
  document.body.dataset.follow = `${follow.scans.join()} ${follow.level} ${task} ${follow.mm} ${overlay ? "maps" : "plain"}`;
}

function drawScanOf(canvas, scan, frame, plane, maps, task) {
  const { picture, discs } = facts.scans[scan], dense = window.devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * dense);
  canvas.height = Math.round((canvas.width * (frame.above + frame.below)) / frame.across);
  const context = canvas.getContext("2d"), scale = canvas.width / frame.across;
  const [rowMm, columnMm] = picture.pixelMm, [x, y] = placeMm(scan, anchorOf(scan));
  // From the picture's pixels; whole numbers are their centres for boxes, and their edges for images.
  const place = (half) => context.setTransform(
    scale * columnMm, 0, 0, scale * rowMm, scale * (reachMm - x - half * columnMm), scale * (frame.above - y - half * rowMm));
  place(0.5);
  context.imageSmoothingQuality = "high";
  if (plane) context.drawImage(plane, 0, 0, picture.shape[1], picture.shape[0]);
  context.globalAlpha = 0.65;
  discs.forEach((index, number) => maps[number] && plane && drawHotspot(context, index, maps[number], task, planeOf(scan)));
  context.globalAlpha = 1;
  for (const index of discs) drawBox(context, place, facts.discs[index], task, dense, scan !== follow.scans[0]);
}

// A disc's box in the colour of its grade; level, grade and, after the first scan, the mark of a change at its left end.
function drawBox(context, place, disc, task, dense, marked) {
  const [top, bottom, left, right] = disc.at.box, chosen = disc.level === follow.level;
  place(0);
  context.beginPath();
  for (const corner of [[left, top], [right, top], [right, bottom], [left, bottom]]) context.lineTo(...inPicture(disc, ...corner));
  context.closePath();
  const [x, y] = inPicture(disc, left, (rows - 1) / 2), { a, d, e, f } = context.getTransform();
  context.resetTransform();
  context.strokeStyle = severity(gradeOf(disc, task), task);
  context.lineWidth = (chosen ? 3 : 1.6) * dense;
  context.setLineDash(isDoubtful(disc, task) ? [5 * dense, 3 * dense] : []);
  context.stroke();
  const text = `${disc.level} ${facts.tasks[task].grades[gradeOf(disc, task)]} ${marked ? markOf(historyOf(disc.level, task)) : ""}`.trim();
  context.font = `600 ${(context.canvas.width < 240 * dense ? 10 : 12) * dense}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  const width = context.measureText(text).width + 8 * dense, start = Math.max(2 * dense, a * x + e - width - 4 * dense), middle = d * y + f;
  context.fillStyle = "rgb(0 0 0 / 66%)";
  context.fillRect(start, middle - 9 * dense, width, 18 * dense);
  context.fillStyle = context.strokeStyle;
  context.fillText(text, start + 4 * dense, middle);
}

// The table -----------------------------------------------------------------------------------------------------------

function listChanges() {
  const head = element("follow-changes").tHead.rows[0];
  head.replaceChildren(head.cells[0], ...facts.tasks.map((task, index) => {
    const made = cell(task.title, "", "th");
    made.scope = "col";
    made.setAttribute("aria-current", String(index === state.task));
    return made;
  }));
  element("follow-changes").tBodies[0].replaceChildren(...levelsFollowed().map((level) => {
    const line = document.createElement("tr"), button = document.createElement("button");
    line.setAttribute("aria-current", String(level === follow.level));
    button.type = "button";
    button.textContent = level;
    button.addEventListener("click", () => followLevel(level));
    line.append(cell(button, "", "th"), ...facts.tasks.map((_, task) => {
      const history = historyOf(level, task), same = history.grades.find((grade) => grade !== null);
      const made = cell(history.changed ? history.words : facts.tasks[task].grades[same], history.changed ? "changed" : "");
      if (!history.changed) return made;
      made.style.setProperty("--severity", severity(history.grades.findLast((grade) => grade !== null), task));
      made.append(" ", span(markOf(history), "mark"));
      made.addEventListener("click", () => { chooseTask(task); followLevel(level); });
      return made;
    }));
    return line;
  }));
}

const levelsFollowed = () => facts.levels.filter((level) => follow.scans.some((scan) => discAt(scan, level) !== undefined));

function changesAsText() {
  const lines = levelsFollowed().map((level) => {
    const changes = facts.tasks.map((task, index) => [task.title, historyOf(level, index)]).filter(([, { changed }]) => changed);
    return `${level}: ${changes.map(([title, history]) => `${title} ${history.words}${history.doubtful ? " (a close call)" : ""}`).join(", ") || "no change"}.`;
  });
  const scans = follow.scans.map((scan) => `${describeScan(scan)} (${facts.scans[scan].id})`);
  return [`Follow-up of patient ${facts.scans[state.scan].patient}: ${scans.join("; ")}`, ...lines, facts.researchOnly].join("\n") + "\n";
}

// Choosing ------------------------------------------------------------------------------------------------------------

function followLevel(level) {
  follow.level = level;
  const index = discAt(state.scan, level);
  if (index !== undefined && index !== state.disc) chooseDisc(index); // which describes the follow-up, too
  else describeFollow();
}

// The other scans' slices follow the one of the spine above.
function followPlane() {
  const { slot } = facts.discs[anchorOf(state.scan)].at, { sliceMm } = currentScan().picture;
  const mm = (state.plane - ((numSlices - 1) / 2 - slot[1]) / slot[0]) * sliceMm;
  follow.mm = Math.round(mm / follow.stepMm) * follow.stepMm;
  describeFollowedSlice();
  drawFollow();
}

// Called when scan, disc or task change.
function describeFollow() {
  const { patient } = facts.scans[state.scan], before = follow.scans.join();
  follow.scans = scansOf(patient);
  element("follow").hidden = follow.scans.length < 2;
  if (element("follow").hidden) return;
  if (!levelsFollowed().includes(follow.level)) follow.level = facts.discs[state.disc].level;
  if (follow.scans.join() !== before) startFollowing();
  element("follow-level").value = follow.level;
  element("follow-task").value = String(state.task);
  describeFollowedSlice();
  listChanges();
  drawFollow();
}

function describeFollowedSlice() {
  const { mm } = follow, said = Math.abs(mm) < 0.5 ? "middle of the disc" : `${Math.abs(mm).toFixed(0)} mm to the ${mm < 0 ? "right" : "left"}`;
  element("follow-slice").value = String(Math.round(mm / follow.stepMm));
  element("follow-slice").setAttribute("aria-valuetext", said);
  element("follow-where").textContent = said;
  [...element("follow-planes").querySelectorAll("canvas")].forEach((canvas, place) => {
    const scan = follow.scans[place], index = discAt(scan, follow.level);
    const graded = index === undefined ? "is not in this scan" : facts.tasks[state.task].grades[gradeOf(facts.discs[index], state.task)];
    canvas.setAttribute("aria-label", `${describeScan(scan)}, ${said}. ${follow.level}: ${facts.tasks[state.task].title} ${graded}`);
  });
}

// Another patient: as many pictures as scans.
function startFollowing() {
  follow.mm = 0;
  const pictures = follow.scans.map((scan) => facts.scans[scan].picture).filter(Boolean);
  follow.stepMm = pictures.length ? Math.min(...pictures.map(({ sliceMm }) => sliceMm)) : 1;
  const most = Math.max(0, ...pictures.map(({ sliceMm, slices }) => Math.floor((sliceMm * slices) / 2 / follow.stepMm)));
  Object.assign(element("follow-slice"), { min: String(-most), max: String(most) });
  element("follow-slice").closest(".sliders").hidden = most === 0;
  const dated = follow.scans.every((scan) => facts.scans[scan].days !== null);
  element("follow-order").textContent = `${facts.scans[state.scan].name.split(",")[0]} has ${follow.scans.length} scans, ${dated
    ? "in the order of their dates" : "whose dates are not known: they are in the order of their files"}. They have one scale, are aligned at the level, and show slices equally far from the middle of its disc.`;
  element("follow-level").replaceChildren(...levelsFollowed().map((level) => new Option(level, level)));
  element("follow-planes").replaceChildren(...follow.scans.map((scan) => {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    caption.textContent = describeScan(scan);
    figure.append(caption);
    if (!facts.scans[scan].picture) {
      caption.append(span(" The scan itself is not with this data set.", "small"));
      return figure;
    }
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.addEventListener("click", (event) => followLevel(levelUnder(scan, event.offsetY / canvas.clientHeight)));
    figure.append(canvas);
    return figure;
  }));
}

// The level of the disc nearest to a height in a scan's panel, from 0, its upper edge, to 1.
function levelUnder(scan, height) {
  const frame = frameOf(follow.scans.filter((each) => facts.scans[each].picture)), middle = placeMm(scan, anchorOf(scan))[1];
  const at = middle - frame.above + height * (frame.above + frame.below);
  const far = (index) => Math.abs(placeMm(scan, index)[1] - at);
  return facts.discs[facts.scans[scan].discs.reduce((best, index) => (far(index) < far(best) ? index : best))].level;
}

function startFollow() {
  const watch = (entries) => {
    follow.near = entries.at(-1).isIntersecting;
    drawFollow();
  };
  new IntersectionObserver(watch, { rootMargin: "25%" }).observe(element("follow"));
  element("follow-task").append(...facts.tasks.map((task, index) => new Option(task.title, String(index))));
  element("follow-task").addEventListener("change", (event) => chooseTask(Number(event.target.value)));
  element("follow-level").addEventListener("change", (event) => followLevel(event.target.value));
  element("follow-overlay")?.addEventListener("change", drawFollow);
  element("follow-slice").addEventListener("input", (event) => {
    follow.mm = Number(event.target.value) * follow.stepMm;
    describeFollowedSlice();
    drawFollow();
    if (currentScan().picture && planeOf(state.scan) !== null) showPlane(planeOf(state.scan));
  });
  element("follow-copy").addEventListener("click", () => copyText(changesAsText(), "Changes", "follow-copied"));
  window.addEventListener("resize", drawFollow);
}
