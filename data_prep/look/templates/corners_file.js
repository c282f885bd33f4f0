// The corner file: saved, and loaded again.

// A file may call a scan by its other name, if it has one. It is saved by its key.
const called = (scan, name) => scan.slices.length > 0 && (scan.key === name || (scan.alias !== "" && scan.alias === name));
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
  if (![undefined, "LPS", "RAS"].includes(content.coordinateSystem)) throw new Error("its coordinateSystem is neither LPS nor RAS");
  const turn = (point) => point && [-point[0], -point[1], point[2]], other = content.coordinateSystem === "RAS" ? "LPS" : "RAS";
  if (other === "LPS") {
    for (const body of Object.values(content.scans).flatMap(Object.values)) body.corners_mm = body.corners_mm.map(turn);
  }
  const read = new Map(Object.entries(content.scans).map(([key, bodies]) => [key.normalize(), bodies]));
  for (const [name, bodies] of read) {
    const scan = scans.find((each) => called(each, name));
    if (!scan) continue;
    const points = Object.values(bodies).flatMap((body) => body.corners_mm.filter(Boolean));
    const inside = (list) => list.filter((point) => {
      const corner = toScan(scan, point);
      return [0, 1].every((axis) => corner[axis] > -0.5 && corner[axis] < scan.shape[axis] - 0.5);
    }).length;
    if (2 * inside(points) < points.length && inside(points.map(turn)) > inside(points)) {
      throw new Error(`${name}: its corners are outside the image, and inside it in ${other}. Write "coordinateSystem": "${other}" beside "scans"`);
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
    const scan = scans.find((each) => called(each, key));
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
