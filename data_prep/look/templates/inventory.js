"use strict";
const rows = [...document.querySelectorAll("tbody tr")];
const words = document.getElementById("words");
function show() {
  const wanted = words.value.toLowerCase().split(/\s+/);
  let count = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !wanted.every((word) => text.includes(word));
    count += row.hidden ? 0 : 1;
  }
  document.getElementById("shown").textContent = `${count} of ${rows.length} series`;
}
words.addEventListener("input", show);
show();
