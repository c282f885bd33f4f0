"use strict";
// The list of discs that two evaluations grade differently.

const gradeName = (change, who) => (change[who] < 0 ? "" : facts.tasks[change.task].grades[change[who]]);
const isRight = (change, who) => change.label >= 0 && change[who] === change.label;

function passes(change) {
  const [task, right, size] = ["task", "right", "size"].map((id) => element(id).value);
  const words = element("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const told = ` ${facts.names[change.scan]} ${change.patient} ${change.scan} ${change.level}`.toLowerCase();
  const whose = change.label < 0 ? "unknown" : isRight(change, "a") ? "a" : isRight(change, "b") ? "b" : "none";
  return (!task || change.task === Number(task)) && (!right || whose === right) &&
    Math.abs(change.a - change.b) >= Number(size) && words.every((word) => told.includes(` ${word}`));
}

function line(change) {
  const made = document.createElement("tr");
  const name = element("pseudonyms").checked ? change.scan : facts.names[change.scan];
  const graded = ["a", "b"].map((who) => {
    const chip = span(gradeName(change, who), "chip"), content = document.createDocumentFragment();
    chip.style.backgroundColor = severity(change[who], change.task);
    content.append(chip);
    if (change[`${who}_p`] !== null) content.append(span(`${percent(change[`${who}_p`])} %`, "sure"));
    return cell(content, isRight(change, who) ? "right" : "");
  });
  made.append(cell(name, "", "th"), cell(change.level), cell(facts.tasks[change.task].title), ...graded, cell(gradeName(change, "label") || "–"));
  return made;
}

const show = pagedTable("changed", line);
const chosen = () => facts.changed.filter(passes);

function asCsv() {
  const header = ["patient", "scan", "name", "level", "task", "a", "a_probability", "b", "b_probability", "rater"];
  return csvTable([header, ...chosen().map((change) => [
    change.patient, change.scan, facts.names[change.scan], change.level, facts.tasks[change.task].name,
    gradeName(change, "a"), change.a_p ?? "", gradeName(change, "b"), change.b_p ?? "", gradeName(change, "label")])]);
}

element("task").append(...facts.tasks.map((task, index) => new Option(task.title, String(index))));
for (const id of ["task", "right", "size", "pseudonyms"]) element(id).addEventListener("change", () => show(chosen()));
element("search").addEventListener("input", () => show(chosen()));
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
element("save").addEventListener("click", () => saveFile("changed.csv", asCsv()));
show(chosen());
