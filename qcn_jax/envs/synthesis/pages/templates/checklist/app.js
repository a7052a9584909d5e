const form = document.querySelector('#entry');
const field = document.querySelector('#item');
const list = document.querySelector('#list');
const left = document.querySelector('#left');
const entries = [];

function summary(all) {
  const open = all.filter((entry) => !entry.done).length;
  return open === 1 ? '1 entry left' : `${open} entries left`;
}

function row(entry, index) {
  const item = document.createElement('li');
  const label = document.createElement('label');
  const box = document.createElement('input');
  box.type = 'checkbox';
  box.checked = entry.done;
  box.addEventListener('change', () => toggle(index));
  label.append(box, ' ', entry.text);
  label.className = entry.done ? 'done' : '';
  item.append(label);
  return item;
}

function render() {
  list.replaceChildren(...entries.map(row));
  left.textContent = summary(entries);
}

function toggle(index) {
  entries[index].done = !entries[index].done;
  render();
}

function add(text) {
  const clean = text.trim();
  if (clean === '' || entries.some((entry) => entry.text === clean)) {
    return false;
  }
  entries.push({ text: clean, done: false });
  render();
  return true;
}

function clearDone() {
  for (let index = entries.length - 1; index >= 0; index -= 1) {
    if (entries[index].done) {
      entries.splice(index, 1);
    }
  }
  render();
}

form.addEventListener('submit', (event) => {
  event.preventDefault();
  if (add(field.value)) {
    field.value = '';
  }
  field.focus();
});
document.querySelector('#clear').addEventListener('click', clearDone);
render();
