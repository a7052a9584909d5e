const names = Array.from({ length: 11 }, (_, index) => `{{one}} ${index + 1}`);
const size = document.querySelector('#size');
const back = document.querySelector('#back');
const on = document.querySelector('#on');
let page = 0;

function pages() {
  return Math.ceil(names.length / Number(size.value));
}

function slice() {
  const start = page * Number(size.value);
  return names.slice(start, start + Number(size.value));
}

function row(name, index) {
  const line = document.createElement('tr');
  for (const text of [String(page * Number(size.value) + index + 1), name]) {
    const cell = document.createElement('td');
    cell.textContent = text;
    line.append(cell);
  }
  return line;
}

function render() {
  document.querySelector('#rows').replaceChildren(...slice().map(row));
  document.querySelector('#where').textContent = `Page ${page + 1} of ${pages()}`;
  back.disabled = page === 0;
  on.disabled = page === pages() - 1;
}

function go(by) {
  page = Math.min(Math.max(page + by, 0), pages() - 1);
  render();
}

function resize() {
  page = 0;
  render();
}

back.addEventListener('click', () => go(-1));
on.addEventListener('click', () => go(1));
size.addEventListener('change', resize);
render();
