"use strict";
/* NiiVue's own script is above. It gets the volumes out of the page; what it says goes to the line below the discs. */
const find = (id) => document.getElementById(id);
const facts = JSON.parse(find("facts").textContent);
const HOTSPOT_FLOOR = 45, LABEL_OPACITY = 0.35;
const BODY = [[86, 160, 211], [120, 190, 180]], DISC = [[230, 159, 0], [240, 200, 90]];
const viewer = new niivue.Niivue({
  isRadiologicalConvention: true, sagittalNoseLeft: true, dragAndDropEnabled: false, logLevel: "error",
  loadingText: "", crosshairColor: [1, 1, 1, 0.6], crosshairWidth: 1, show3Dcrosshair: true, backColor: [0, 0, 0, 1],
  fontMinPx: 15, multiplanarShowRender: 0,
});
const images = {};
const state = { disc: 0, task: 0 };

async function image(name, options) {
  const base64 = find(`volume-${name}`).textContent;
  images[name] ??= await niivue.NVImage.loadFromBase64({ base64, name: `${name}.nii.gz`, cal_min: 0, cal_max: 255, ...options });
  return images[name];
}

/* Body and disc take turns along the spine, so that neighbours differ; the first label is nothing. */
function labels() {
  const isDisc = (name) => name.includes("-");
  const colours = facts.labels.map((name, i) => (isDisc(name) ? DISC : BODY)[i % 2]);
  const channel = (c) => colours.map((colour) => colour[c]);
  const A = facts.labels.map((name) => (name ? 255 : 0));
  return { R: channel(0), G: channel(1), B: channel(2), A, I: facts.labels.map((_, i) => i), labels: facts.labels };
}

async function shown(name, on, opacity, options) {
  if (!on && !images[name]) return;
  const volume = await image(name, options);
  const there = viewer.volumes.includes(volume);
  if (on && !there) viewer.addVolume(volume);
  if (on) viewer.setOpacity(viewer.volumes.indexOf(volume), opacity);
  if (!on && there) viewer.removeVolume(volume);
}

/* One after the other: what is loaded for an earlier choice must not appear over a later one. */
let drawing = Promise.resolve();
const draw = () => (drawing = drawing.then(drawNow));

async function drawNow() {
  const want = JSON.stringify(choice());
  if (facts.hotspots) {
    for (const [i, task] of facts.tasks.entries()) {
      const on = i === state.task && find("hotspots").checked;
      await shown(`hotspots-${task.name}`, on, find("opacity").value / 100, { colormap: "warm", cal_min: HOTSPOT_FLOOR });
    }
  }
  await shown("masks", find("masks").checked, LABEL_OPACITY, {});
  if (find("lesions")) await shown("lesions", find("lesions").checked, 0.6, { colormap: "red", cal_min: 0.5, cal_max: 1 });
  viewer.setSliceType(Number(find("planes").value));
  viewer.createOnLocationChange();
  list();
  document.body.dataset.drawn = want;
}

function choice() {
  return { ...state, on: ["hotspots", "masks", "lesions"].filter((id) => find(id)?.checked), planes: find("planes").value, opacity: find("opacity")?.value };
}

function list() {
  const rows = facts.discs.map((disc, i) => {
    const [grade, p] = disc.grades[state.task];
    const row = document.createElement("li"), button = document.createElement("button"), said = document.createElement("span");
    button.type = "button";
    button.setAttribute("aria-current", i === state.disc);
    said.textContent = `${grade} · ${Math.round(100 * p)} %`;
    button.append(disc.level, said);
    button.addEventListener("click", () => go(i));
    row.append(button);
    return row;
  });
  const focused = [...find("discs").children].findIndex((row) => row.contains(document.activeElement));
  find("discs").replaceChildren(...rows);
  if (focused >= 0) rows[focused].firstChild.focus();
  find("discs-of").textContent = facts.tasks[state.task].title;
}

function go(disc) {
  state.disc = (disc + facts.discs.length) % facts.discs.length;
  viewer.scene.crosshairPos = viewer.mm2frac(facts.discs[state.disc].centre, 0, true);
  viewer.drawScene();
  draw();
}

/* NiiVue counts from the patient's left to the right, from back to front and from the feet to the head. */
const STEPS = { ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 0, 1], ArrowDown: [0, 0, -1], PageUp: [0, 1, 0], PageDown: [0, -1, 0] };
const KEYS = {
  n: () => go(state.disc + 1), p: () => go(state.disc - 1), t: () => choose((state.task + 1) % facts.tasks.length),
  o: () => find("hotspots")?.click(), m: () => find("masks").click(),
};

function choose(task) {
  state.task = task;
  find("task").value = task;
  draw();
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = STEPS[event.key], act = KEYS[event.key.toLowerCase()];
  if (step) viewer.moveCrosshairInVox(...step);
  else if (act) act();
  else return;
  event.preventDefault();
  event.stopImmediatePropagation();
}

async function begin() {
  find("canvas").addEventListener("keydown", keys, { capture: true });
  viewer.onLocationChange = (at) => {
    const [right, front, up] = at.mm, names = at.values.filter((each) => each.name.startsWith("masks")).map((each) => facts.labels[Math.round(each.value)]);
    find("where").textContent = `${Math.abs(right).toFixed(0)} mm ${right < 0 ? "left" : "right"}, ${Math.abs(front).toFixed(0)} mm ${front < 0 ? "back" : "front"}, ${Math.abs(up).toFixed(0)} mm ${up < 0 ? "down" : "up"}${names.filter(Boolean).map((name) => ` · ${name}`).join("")}`;
  };
  await viewer.attachToCanvas(find("canvas"));
  viewer.addVolume(await image("scan", { colormap: "gray" }));
  (await image("masks", {})).setColormapLabel(labels());
  for (const id of ["hotspots", "masks", "lesions", "planes"]) find(id)?.addEventListener("change", draw);
  find("opacity")?.addEventListener("input", draw);
  find("task").addEventListener("change", () => choose(Number(find("task").value)));
  if (facts.flat || window.innerWidth < 600) find("planes").value = "2";
  go(Math.floor(facts.discs.length / 2));
}

if (document.createElement("canvas").getContext("webgl2")) begin();
else {
  find("fault").textContent = "This browser has no WebGL 2, which the picture needs. Another browser, or its settings for graphics, may.";
  find("fault").hidden = false;
}
