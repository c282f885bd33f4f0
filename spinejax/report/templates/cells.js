"use strict";
// What the pages of graded discs share: cells of tables, the colours of grades, and tables as CSV.

const element = (id) => document.getElementById(id);
const facts = JSON.parse(element("facts").textContent);
element("facts").remove(); // of a large set, megabytes
const percent = (share) => (share > 0.995 && share < 1 ? ">99" : String(Math.round(100 * share)));

function span(text, name) {
  const made = document.createElement("span");
  made.className = name;
  made.append(text);
  return made;
}

function cell(content, name = "", kind = "td") {
  const made = document.createElement(kind);
  if (kind === "th") made.scope = "row";
  made.className = name;
  made.append(content);
  return made;
}

// From the mildest grade to the most severe. Brightness alone tells them apart, so it survives colour blindness.
const severities = [[75, 139, 203], [127, 166, 184], [179, 183, 149], [224, 198, 103], [255, 224, 75]];

function severity(grade, task) {
  const at = (grade / (facts.tasks[task].grades.length - 1)) * (severities.length - 1);
  const below = severities[Math.floor(at)], above = severities[Math.ceil(at)];
  return `rgb(${below.map((value, channel) => Math.round(value + (above[channel] - value) * (at % 1))).join(" ")})`;
}

// A spreadsheet would run a text that begins like a formula.
const csvCell = (value) => {
  const text = typeof value === "string" && /^[=+@\t\r-]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};


const csvTable = (lines) => lines.map((line) => line.map(csvCell).join(",")).join("\r\n") + "\r\n";

// Hand a text to the reader as a file.
function saveFile(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// A table of which a part is on the screen at a time. `line` makes a row; the result takes the rows to show.
function pagedTable(id, line, { perPage = 100 } = {}) {
  let shown = [], first = 0;
  function draw() {
    const stop = Math.min(first + perPage, shown.length), count = (number) => number.toLocaleString("en");
    element(id).tBodies[0].replaceChildren(...shown.slice(first, stop).map(line));
    element(`${id}-range`).textContent = shown.length ? `${count(first + 1)} to ${count(stop)} of ${count(shown.length)}` : "none";
    element(`${id}-earlier`).disabled = first === 0;
    element(`${id}-later`).disabled = stop === shown.length;
  }
  element(`${id}-earlier`).addEventListener("click", () => { first -= perPage; draw(); });
  element(`${id}-later`).addEventListener("click", () => { first += perPage; draw(); });
  return (rows) => {
    shown = rows;
    first = 0;
    draw();
  };
}
