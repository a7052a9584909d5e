const wares = [
  { name: '{{one}}', cents: 250 },
  { name: '{{two}}', cents: 1200 },
  { name: '{{three}}', cents: 95 },
];
const pieces = new Map();
const LIMIT = 5;

function money(cents) {
  return `${Math.floor(cents / 100)}.${String(cents % 100).padStart(2, '0')} EUR`;
}

function total() {
  let sum = 0;
  for (const ware of wares) {
    sum += ware.cents * (pieces.get(ware.name) ?? 0);
  }
  return sum >= 2000 ? sum - Math.round(sum / 10) : sum;
}

function line(ware) {
  const count = pieces.get(ware.name);
  const row = document.createElement('tr');
  for (const text of [ware.name, String(count), money(ware.cents * count)]) {
    const cell = document.createElement('td');
    cell.textContent = text;
    row.append(cell);
  }
  return row;
}

function render() {
  const chosen = wares.filter((ware) => (pieces.get(ware.name) ?? 0) > 0);
  document.querySelector('#lines').replaceChildren(...chosen.map(line));
  document.querySelector('#total').textContent = money(total());
  for (const ware of wares) {
    const count = pieces.get(ware.name) ?? 0;
    button(`Take ${ware.name}`).disabled = count >= LIMIT;
    button(`Return ${ware.name}`).disabled = count === 0;
  }
}

function button(label) {
  return document.querySelector(`button[aria-label="${label}"]`);
}

function change(name, by) {
  pieces.set(name, (pieces.get(name) ?? 0) + by);
  render();
}

function shelf(ware) {
  const item = document.createElement('li');
  const text = document.createElement('span');
  text.textContent = `${ware.name}, ${money(ware.cents)}`;
  const buttons = document.createElement('span');
  for (const [word, sign, by] of [['Return', '-', -1], ['Take', '+', 1]]) {
    const made = document.createElement('button');
    made.textContent = sign;
    made.setAttribute('aria-label', `${word} ${ware.name}`);
    made.addEventListener('click', () => change(ware.name, by));
    buttons.append(made);
  }
  item.append(text, buttons);
  return item;
}

document.querySelector('#shelf').append(...wares.map(shelf));
render();
