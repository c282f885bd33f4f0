"use strict";
// Corners and levels of vertebral bodies, corrected by hand. Nothing leaves the page but the file that is saved.
//
// A corner is (row, column, slice) of the scan, pixel centres at integers, or null where it is not known. On the screen,
// and in all lengths, rows and columns are in mm, because their spacings may differ.

const element = (id) => document.getElementById(id);
const facts = JSON.parse(element("facts").textContent);
const cornerNames = ["upper anterior", "upper posterior", "lower posterior", "lower anterior"];
const edges = { all: [0, 1, 2, 3], upper: [0, 1], lower: [2, 3] };
const steep = 1.75; // tangent of 60°, by which a body may be turned
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

const apply = (affine, point) => [0, 1, 2].map((row) =>
  [...point, 1].reduce((sum, value, column) => sum + affine[row][column] * value, 0));
const toPatient = (scan, corner) => apply(scan.affine, corner);
const toScan = (scan, point) => apply(scan.inverse, point);

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

// What is wrong (nothing can be saved), by the rules of `data_prep.anatomy.corner_file`, and what is doubtful (it can).
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
    const between = (pairs) => pairs.filter((pair) => known(body, pair))
      .map(([from, to]) => minus(inMm(scan, body.corners[to]), inMm(scan, body.corners[from])));
    const backward = between([[0, 1], [3, 2]]), downward = between([[0, 3], [1, 2]]);
    const turned = backward.some(([down, back]) => Math.abs(down) > steep * back) || downward.some(([down, back]) => Math.abs(back) > steep * down);
    if (backward.some(([, back]) => back <= 0)) wrong.push(`${body.name}: its front corner is behind its back corner. Front is left.`);
    else if (known(body) && turned) wrong.push(`${body.name}: its corners are not in order: it is upside down, or turned by more than 60°.`);
    const middle = mean(body.corners.filter(Boolean));
    if (middle.some((value, axis) => value < -0.5 || value > scan.shape[axis] - 0.5)) wrong.push(`${body.name} is outside the image.`);
    if (depth(body) < -0.5 - reach(scan, body) || depth(body) > scan.shape[2] - 0.5 + reach(scan, body)) wrong.push(`${body.name} is outside the slices. Are its corners in LPS and mm?`);
  }
  for (const { level, fault } of discs(scan)) if (fault) doubtful.push(`${level} will not be cut out: ${fault}.`);
  return { wrong, doubtful };
}

// Changing: every change of a scan's bodies can be undone -------------------------------------------------------------

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
